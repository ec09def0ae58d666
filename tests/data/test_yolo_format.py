"""Ultralytics' layout: where images and labels lie, what a line means, and every defect by file and line."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image

from lightning_prune.data import Scenes, YOLODetection
from lightning_prune.data.yolo_files import label_file, read_boxes
from lightning_prune.errors import DataError

DIGITS = list("0123456789")
SIZE = 48
PARTS = {"train": Scenes("train", 4, size=SIZE), "val": Scenes("val", 3, size=SIZE)}


def line(label, box):
    x1, y1, x2, y2 = (edge / SIZE for edge in box)
    return f"{label} {(x1 + x2) / 2:.8f} {(y1 + y2) / 2:.8f} {x2 - x1:.8f} {y2 - y1:.8f}\n"


def write(root, description=None):
    for part, scenes in PARTS.items():
        for folder in ("images", "labels"):
            (root / folder / part).mkdir(parents=True)
        for index in range(len(scenes)):
            scene = scenes[index]
            Image.fromarray(scene.image).save(root / f"images/{part}/{index}.png")
            lines = [line(*of) for of in zip(scene.labels.tolist(), scene.boxes.tolist(), strict=True)]
            (root / f"labels/{part}/{index}.txt").write_text("".join(lines))
    describe(root, **(description or {}))
    return root


def describe(root, **changes):
    content = {"path": None, "train": "images/train", "val": "images/val", "names": DIGITS, **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def ready(root, **options):
    settings = {"batch_size": 2, "size": None, "augment": "none", "num_workers": 0, **options}
    module = YOLODetection(str(root), **settings)
    module.setup()
    return module


def test_boxes_survive_the_round_trip(tmp_path):
    data = ready(write(tmp_path))
    assert (data.class_names, data.num_classes) == (tuple(DIGITS), 10)
    for part, scenes in PARTS.items():
        assert len(data.parts[part]) == len(scenes)
        for index in range(len(scenes)):
            scene, (image, target) = scenes[index], data.parts[part][index]
            assert np.array_equal((image * 255).round().permute(1, 2, 0).numpy(), scene.image)
            assert np.abs(target["boxes"].numpy() - scene.boxes).max() < 1e-5
            assert target["labels"].tolist() == scene.labels.tolist()
            assert target["orig_size"] == (SIZE, SIZE)
            assert not (target["difficult"] | target["iscrowd"]).any()
    assert data.parts["test"] is data.parts["val"]


def test_images_are_letterboxed(tmp_path):
    images, targets = next(iter(ready(write(tmp_path), size=64).train_dataloader()))
    assert images.shape == (2, 3, 64, 64)
    assert all(target["boxes"].max() <= 64 for target in targets)


@pytest.mark.parametrize(
    "changes",
    [
        {"names": dict(enumerate(DIGITS)), "nc": 10},
        {"path": "."},
        {"train": ["images/train"], "test": "images/val"},
        {"train": "../images/train", "val": "../images/val"},  # as Roboflow writes them
        {"download": "raise SystemExit('never run')"},
    ],
)
def test_ways_to_describe_the_same(tmp_path, changes):
    data = ready(write(tmp_path, changes))
    assert data.class_names == tuple(DIGITS)
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [4, 3, 3]


def test_path_is_relative_to_the_file_or_to_where_we_are(tmp_path, monkeypatch):
    write(tmp_path / "sets/digits")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for path in ("../sets/digits", "sets/digits", str(tmp_path / "sets/digits")):
        describe(tmp_path / "recipes", path=path)
        assert len(ready("recipes/data.yaml").parts["train"]) == 4
    describe(tmp_path / "recipes", path="elsewhere")
    with pytest.raises(
        DataError, match=r"recipes/data\.yaml: path is elsewhere, but there is no .*/recipes/elsewhere nor"
    ):
        ready("recipes/data.yaml")


def test_images_can_be_named_in_lists(tmp_path):
    write(tmp_path, {"train": "some.txt", "val": ["some.txt", "images/val"]})
    (tmp_path / "some.txt").write_text(f"./images/train/2.png\n\n{tmp_path}/images/train/0.png\nimages/val/1.png\n")
    data = ready(tmp_path)
    assert [path.name for path, _ in data.parts["train"].items] == ["2.png", "0.png", "1.png"]
    assert data.parts["train"][0][1]["labels"].tolist() == PARTS["train"][2].labels.tolist()
    assert len(data.parts["val"]) == 6
    (tmp_path / "some.txt").write_text("images/train/2.png\nimages/train/7.png\n")
    with pytest.raises(DataError, match=r"some\.txt, line 2: .*images/train/7\.png does not exist"):
        ready(tmp_path)


def test_labels_lie_where_ultralytics_looks_for_them(tmp_path):
    found = [
        str(label_file(tmp_path / name).relative_to(tmp_path))
        for name in ("images/train/a.b.jpg", "images/x/images/1.png", "train/images/1.JPG", "other/1.png")
    ]
    assert found == ["labels/train/a.b.txt", "images/x/labels/1.txt", "train/labels/1.txt", "other/1.txt"]


def test_an_image_without_labels_is_a_negative(tmp_path):
    write(tmp_path)
    (tmp_path / "labels/train/1.txt").unlink()
    (tmp_path / "labels/train/2.txt").write_text("\n")
    data = ready(tmp_path)
    assert [len(target["labels"]) > 0 for _, target in data.parts["train"]] == [True, False, False, True]
    for path in (tmp_path / "labels/val").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"none of the 3 images of val has a label file, such as .*labels/val/0\.txt"):
        ready(tmp_path)


def test_an_outline_becomes_the_box_around_it(tmp_path):
    path = tmp_path / "1.txt"
    path.write_text("3 .5 .25 .75 .5 .125 .375\n1 0.5 0.5 0.25 0.5\n")
    assert read_boxes(path, 4) == [(3, [0.125, 0.25, 0.75, 0.5]), (1, [0.375, 0.25, 0.625, 0.75])]


def test_images_are_turned_as_their_exif_says(tmp_path):
    """A quarter turn: a label file speaks of the image as viewers show it."""
    write(tmp_path)
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 30:] = 255  # on the right; below, once it is turned clockwise
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "images/val/0.png", exif=exif)
    (tmp_path / "labels/val/0.txt").write_text("2 .5 .875 1 .25")
    image, target = ready(tmp_path).parts["val"][0]
    assert image.shape == (3, 40, 20)
    assert target["boxes"].tolist() == [[0, 30, 20, 40]]
    assert image[:, 30:].min() == 1
    assert image[:, :30].max() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 .5 .5 .2", r"line 3: 4 numbers are neither a box .* nor an outline"),
        ("0 .5 .5 .2 .2 .9", r"line 3: 6 numbers are neither"),
        ("0 .5 .5 .2 .2 .9 .9 .9", r"line 3: 8 numbers are neither"),
        ("cat .5 .5 .2 .2", r"line 3: could not convert string to float: 'cat'; a line is class, centre x"),
        ("10 .5 .5 .2 .2", r"line 3: class 10 is none of 10 names, 0 to 9"),
        ("-1 .5 .5 .2 .2", r"line 3: class -1 is none"),
        ("1.5 .5 .5 .2 .2", r"line 3: class 1\.5 is none"),
        ("nan .5 .5 .2 .2", r"line 3: class nan is none"),
        ("0 24 24 10 10", r"line 3: '0 24 24 10 10' must be shares of the image's width and height"),
        ("0 .5 nan .2 .2", r"line 3: '0 \.5 nan \.2 \.2' must be shares"),
        ("0 .5 .5 -.2 .2", r"line 3: .* must be shares"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    path = write(tmp_path) / "labels/train/1.txt"
    path.write_text(f"1 .5 .5 .2 .2\n\n{text}\n")
    with pytest.raises(DataError, match=rf"labels/train/1\.txt, {message}"):
        ready(tmp_path)


def test_bad_boxes_are_refused_or_repaired(tmp_path):
    path = write(tmp_path) / "labels/train/1.txt"
    path.write_text("1 .9 .5 .5 .5\n2 .5 .5 0 .5\n3 .5 .5 .5 .5")
    with pytest.raises(
        DataError, match=r"labels/train/1\.txt: box 1, .* in an image of 48 x 48 leaves it by 7\.2 pixels"
    ):
        ready(tmp_path)
    _, target = ready(tmp_path, bad_boxes="repair").parts["train"][1]
    assert target["labels"].tolist() == [1, 3]
    assert target["boxes"][0].tolist() == pytest.approx([31.2, 12, 48, 36], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": None}, r"data\.yaml has no val: give each a folder or a list"),
        ({"train": None, "val": None}, "has no train and no val"),
        ({"train": "images/training"}, r"train is images/training, but .*images/training does not exist"),
        ({"train": 3}, "train is 3, neither a folder nor a list of images"),
        ({"train": "labels/train"}, r"labels/train, train of .*data\.yaml, holds no image"),
        ({"names": None}, "names must be a list of names, or numbers from 0 with names, got None"),
        ({"names": []}, r"names must be a list of names, .* got \[\]"),
        ({"names": {1: "a", 2: "b"}}, "names must be numbered from 0 without gaps, got 1, 2"),
        ({"names": [True, "yes"]}, "names holds True, which is no text: put it in quotes"),
        ({"nc": 3}, "nc is 3, but there are 10 names"),
        ({"path": 3}, "path is 3, not the name of a folder"),
        ({"kpt_shape": [17, 3]}, r"describes key points \(kpt_shape\)"),
    ],
)
def test_a_description_that_lacks_something_is_named(tmp_path, changes, message):
    write(tmp_path, changes)
    with pytest.raises(DataError, match=message):
        ready(tmp_path)


def test_classes_without_names_are_called_as_ultralytics_does(tmp_path):
    assert ready(write(tmp_path, {"names": None, "nc": 10})).class_names[9] == "class_9"


def test_broken_descriptions_and_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere cannot be read \(No such file.*: root is a data\.yaml or its folder"):
        ready(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [a\ntrain: images/train\n")
    with pytest.raises(DataError, match=r"data\.yaml, line 2, column 6: no valid YAML"):
        ready(tmp_path)
    (tmp_path / "data.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(DataError, match=r"data\.yaml, line 1, column 1: no valid YAML"):
        ready(tmp_path)
    (tmp_path / "data.yaml").write_text("- images")
    with pytest.raises(DataError, match="must hold names, train and val, got list"):
        ready(tmp_path)
    describe(tmp_path)
    (tmp_path / "images/val/1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"images/val/1\.png is not a readable image"):
        ready(tmp_path)
