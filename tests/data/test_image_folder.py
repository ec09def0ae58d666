"""Folders of classes: layouts, splits, sizes, recipes, and what is refused, on tiny trees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_prune.data import ImageFolderDataModule
from lightning_prune.data.samples import read_image
from lightning_prune.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from lightning_prune.errors import DataError
from lightning_prune.models import ThinCifarResNet
from lightning_prune.tasks import ClassificationTask
from tests.tasks.helpers import make_trainer


def write(root, names, size=(32, 32), start=0):
    """One image for each path; the pixels of number i are all 10 * i."""
    for number, name in enumerate(names, start):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * number,) * 3).save(path)


def tree(root, classes=("ant", "bee"), parts=("train", "val"), count=3, **options):
    for place, part in enumerate(parts):
        names = [f"{part}/{name}/{index}.png" for name in classes for index in range(count)]
        write(root, names, start=place * len(names), **options)
    return root


def ready(root, **options):
    module = ImageFolderDataModule(str(root), **{"batch_size": 4, "normalisation": "none", "num_workers": 0, **options})
    module.setup()
    return module


def values(part):
    """The numbers of a part's images by their middle pixels."""
    return [round(float(image[0, image.shape[1] // 2, image.shape[2] // 2]) * 25.5) for image, _ in part]


def labels(part):
    return [int(label) for _, label in part]


@pytest.mark.parametrize("in_memory", [True, False])
def test_parts_are_folders_and_classes_are_numbered_by_name(tmp_path, in_memory):
    tree(tmp_path, ("bee", "ant", ".hidden"))
    write(tmp_path, ["train/ant/._0.png"])  # macOS leaves such beside every file of an archive
    data = ready(tmp_path, in_memory=in_memory)
    assert (data.class_names, data.num_classes) == (("ant", "bee"), 2)
    assert values(data.parts["train"]) == [3, 4, 5, 0, 1, 2]
    assert labels(data.parts["train"]) == [0, 0, 0, 1, 1, 1]
    assert values(data.parts["val"]) == [12, 13, 14, 9, 10, 11]
    assert data.parts["test"] is data.parts["val"]


def test_test_images_choose_nothing_where_a_share_is_held_out(tmp_path):
    tree(tmp_path, parts=("train", "test"), count=5)
    first, again, other = (ready(tmp_path, val_share=0.4, seed=seed, in_memory=False) for seed in (0, 0, 3))
    train, val, test = (values(first.parts[name]) for name in ("train", "val", "test"))
    assert sorted(train + val) == list(range(10))
    assert [sum(number < 5 for number in part) for part in (train, val)] == [3, 2]
    assert test == list(range(10, 20))
    assert values(again.parts["val"]) == val
    assert values(other.parts["val"]) != val
    assert first.parts["val"].files != first.parts["test"].files


def test_what_is_exported_knows_the_normalisation(tmp_path):
    assert ready(tree(tmp_path), normalisation="imagenet").normalisation == (IMAGENET_MEAN, IMAGENET_STD)
    data = ready(tmp_path, mean=(0.1, 0.2, 0.3))
    assert data.normalisation == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


def test_what_was_there_to_validate_on_is_tested_on_where_a_share_is_held_out(tmp_path):
    data = ready(tree(tmp_path, count=4), val_share=0.25)
    assert [len(data.parts[name]) for name in ("train", "val")] == [6, 2]
    assert values(data.parts["test"]) == list(range(8, 16))


def test_one_folder_is_split_by_a_share_or_by_lists(tmp_path):
    write(tmp_path, [f"{name}/deep/{index}.JPG" for name in ("ant", "bee") for index in range(4)])
    data = ready(tmp_path, val_share=0.25)
    assert len(data.parts["val"]) == 2
    assert sorted(values(data.parts["train"]) + values(data.parts["val"])) == list(range(8))
    (tmp_path / "one.txt").write_text("bee/deep/0.JPG\n\nant/deep/3.JPG\n")
    (tmp_path / "two.txt").write_text("ant/deep/1.JPG\n")
    data = ready(tmp_path, lists={"train": str(tmp_path / "one.txt"), "test": str(tmp_path / "two.txt")})
    assert (values(data.parts["train"]), labels(data.parts["train"])) == ([4, 3], [1, 0])
    assert values(data.parts["val"]) == values(data.parts["test"]) == [1]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("size", "resize"), [((40, 60), None), ((32, 32), 40), ((32, 32), None)])
def test_evaluation_images_are_resized_cropped_and_standardised_as_torchvision_does(tmp_path, size, resize, in_memory):
    torch.manual_seed(0)
    for part in ("train", "val"):
        path = tmp_path / part / "ant" / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(torch.randint(256, (*size, 3), dtype=torch.uint8).numpy()).save(path)
    data = ready(tmp_path, resize=resize, in_memory=in_memory, normalisation="imagenet")
    expected = v2.Compose(
        [
            v2.Resize(resize or 32, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )(read_image(tmp_path / "val" / "ant" / "0.png"))
    assert torch.equal(data.parts["val"][0][0], expected)


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_images_are_cropped_after_padding_and_flipped(tmp_path, in_memory):
    tree(tmp_path, count=1)
    data = ready(tmp_path, in_memory=in_memory, mean=(0.5, 0.5, 0.5))
    images = torch.stack([data.parts["train"][1][0] for _ in range(200)])
    assert images.shape[1:] == (3, 32, 32)
    assert images.amin((1, 2, 3)).min() == -0.5  # the padding of some
    assert images.amin((1, 2, 3)).max() > -0.5  # one of 81 has none
    padded = (images[:, 0] == -0.5).all(1).sum(1)
    assert int(padded.max()) == 32 // 8
    plain = ready(tmp_path, in_memory=in_memory, augment="none")
    assert len({float(image) for image in plain.parts["train"][1][0].flatten()}) == 1


def test_imagenets_recipe(tmp_path):
    """Training crops of some of the image, resized; the middle 224 of 256 in evaluation."""
    ramp = torch.arange(256).to(torch.uint8).expand(256, 256)
    for part in ("train", "val"):
        path = tmp_path / part / "ant" / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(ramp.numpy()).save(path)
    data = ready(tmp_path, size=224, augment="resized_crop")
    assert data.resize == 256
    assert data.parts["val"][0][0][0, 0].mul(255).round().tolist() == list(range(16, 240))
    torch.manual_seed(0)
    crops = [data.parts["train"][0][0] for _ in range(20)]
    assert all(crop.shape == (3, 224, 224) for crop in crops)
    spans = [float(crop[0, 0, -1] - crop[0, 0, 0]) for crop in crops]
    assert min(spans) < 0 < max(spans)  # flips
    assert len({round(abs(span), 3) for span in spans}) > 10  # of many sizes
    assert min(map(abs, spans)) > (0.08 * 3 / 4) ** 0.5 - 0.05


def test_small_images_lie_in_memory_and_large_ones_do_not(tmp_path, monkeypatch):
    tree(tmp_path)
    assert ready(tmp_path, num_workers=2).num_workers == 0
    monkeypatch.setattr("lightning_prune.data.image_folder.KEPT_BYTES", 12 * 3 * 32 * 32)
    data = ready(tmp_path, num_workers=2)
    assert data.num_workers == 2
    images, found = next(iter(data.val_dataloader()))
    assert (images.shape, found.tolist()) == ((4, 3, 32, 32), [0, 0, 0, 1])


def test_a_trainer_learns_colours_apart(tmp_path):
    for part in ("train", "val"):
        for name, colour in (("dark", (20, 20, 20)), ("light", (230, 230, 230))):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (32, 32), colour).save(tmp_path / part / name / f"{index}.jpg")
    torch.manual_seed(0)
    task = ClassificationTask(
        ThinCifarResNet(8, num_classes=2), num_classes=2, optimizer=lambda p: torch.optim.SGD(p, 0.02)
    )
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(task, ImageFolderDataModule(str(tmp_path), batch_size=4))
    assert trainer.callback_metrics["val_acc"] == 1


# --- what is refused


def refused(words, root, **options):
    with pytest.raises(DataError, match=words):
        ready(root, **options)


def test_missing_folders_and_images_are_named(tmp_path):
    refused(r"absent does not exist", tmp_path / "absent")
    refused(r"holds no folders", tmp_path)
    tree(tmp_path, parts=("train",))
    refused(r"neither val/ nor test/ beside train/.*val_share", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    refused(r"train/cat stands for a class and holds no image", tmp_path, val_share=0.5)


def test_parts_of_other_classes_are_refused(tmp_path):
    tree(tmp_path, parts=("train",))
    tree(tmp_path, ("ant", "wasp"), parts=("test",))
    refused(r"test lacks bee and has wasp besides: its classes \(2\) must be those of train \(2\)", tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unreadable_image_is_named(tmp_path, in_memory):
    tree(tmp_path)
    path = tmp_path / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"val/bee/1\.png is not a readable image"):
        list(ready(tmp_path, in_memory=in_memory).val_dataloader())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("ant/9.png", r"one\.txt, line 1: .*ant/9\.png does not exist"),
        ("ant/0.png\nwasp/0.png", r"one\.txt, line 2: wasp/0\.png must begin with the folder of its class"),
        ("ant/0.png\nant/2.png", r"two\.txt, line 1: ant/2\.png is in the list of train too"),
        ("", r"one\.txt of train names no image"),
    ],
)
def test_lists_that_name_what_is_not_there_or_twice(tmp_path, lines, words):
    write(tmp_path, [f"{name}/{index}.png" for name in ("ant", "bee") for index in range(3)])
    (tmp_path / "one.txt").write_text(lines)
    (tmp_path / "two.txt").write_text("ant/2.png")
    refused(words, tmp_path, lists={"train": str(tmp_path / "one.txt"), "val": str(tmp_path / "two.txt")})


def test_lists_need_a_training_part_and_files(tmp_path):
    tree(tmp_path)
    refused(r"lists needs train, .* got val", tmp_path, lists={"val": "x.txt"})
    refused(r"absent\.txt of train does not exist", tmp_path, lists={"train": "absent.txt"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": "crop"}, "augment must be one of none, crop_flip, resized_crop"),
        ({"normalisation": "cifar"}, "normalisation must be one of"),
        ({"mean": (0.5,)}, "three numbers each"),
        ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
        ({"size": 32, "resize": 28}, "resize at least size, got 32 and 28"),
        ({"augment": "resized_crop", "in_memory": True}, "leave in_memory out"),
        ({"val_share": 1.0}, r"must be in \[0, 1\), got 1\.0"),
        ({"val_share": 0.1}, "of the 3 images of class 'ant' is 0"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path, options, words):
    refused(words, tree(tmp_path), **options)


def test_paths_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    tree(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert len(ready(Path("mine")).parts["train"]) == 6
