"""CIFAR-10 on a small tree in its format: parts, augmentation, and what is refused."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import RandomSampler, SequentialSampler
from torchvision.transforms import v2

from lightning_prune.callbacks import RandomStateCallback
from lightning_prune.data import CIFAR10DataModule
from lightning_prune.data.cifar10 import MEAN, STD
from lightning_prune.errors import DataError
from tests.tasks.helpers import make_trainer

COUNT = 12  # images per file


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small tree in CIFAR-10's format; the pixels of image i are all i, or 200 + i in the test file."""
    cifar10 = torchvision.datasets.CIFAR10
    folder = tmp_path / cifar10.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, values):
        rows = np.repeat(np.array(values, dtype=np.uint8)[:, None], 3072, axis=1)
        return write(name, {"data": rows, "labels": [value % 10 for value in values]})

    train = [batch(f"data_batch_{k + 1}", range(k * COUNT, (k + 1) * COUNT)) for k in range(5)]
    test = [batch("test_batch", range(200, 200 + COUNT))]
    names = write("batches.meta", {"label_names": list(CIFAR10DataModule.class_names)})
    monkeypatch.setattr(cifar10, "train_list", train)
    monkeypatch.setattr(cifar10, "test_list", test)
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "filename": names[0], "md5": names[1]})
    return tmp_path


def ready(root, **options):
    module = CIFAR10DataModule(str(root), **{"batch_size": 5, "val_size": 20, "num_workers": 0, **options})
    module.prepare_data()
    module.setup()
    return module


def values(part):
    """The grey value that tells an image of the tree apart, from its middle pixel, which no crop by 4 loses."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return [round(((image[:, 16, 16] * std + mean) * 255).mean().item()) for image, _ in part]


def test_cifar10_holds_out_validation_images_by_seed(cifar):
    first, again, other = ready(cifar), ready(cifar), ready(cifar, seed=1)
    train, val, test = (values(first.parts[name]) for name in ("train", "val", "test"))
    assert len(val) == 20
    assert sorted(train + val) == list(range(60))
    assert test == list(range(200, 212))
    assert values(again.parts["val"]) == val
    assert values(other.parts["val"]) != val
    assert [label for _, label in first.parts["val"]] == [value % 10 for value in val]


def test_cifar10_without_held_out_part_validates_on_the_test_images(cifar):
    module = ready(cifar, val_size=0)
    assert sorted(values(module.parts["train"])) == list(range(60))
    assert values(module.parts["val"]) == list(range(200, 212))


@pytest.mark.parametrize("size", [-1, 60])
def test_cifar10_refuses_impossible_parts(cifar, size):
    with pytest.raises(DataError, match=r"val_size must be in \[0, 60\)"):
        ready(cifar, val_size=size)


def test_cifar10_is_normalised_and_evaluated_without_augmentation(cifar):
    assert MEAN == (0.4914, 0.4822, 0.4465)
    assert STD == (0.2471, 0.2435, 0.2616)
    module = ready(cifar)
    for part in ("val", "test"):
        for value, (image, _) in zip(values(module.parts[part]), module.parts[part], strict=True):
            assert image.shape == (3, 32, 32)
            expected = (value / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
            torch.testing.assert_close(image, expected[:, None, None].expand(3, 32, 32))


def test_cifar10_training_images_are_cropped_and_flipped(cifar):
    """An image with one marked column: where the column goes tells crop and flip; black comes in from outside."""
    module = ready(cifar)
    images, _ = module.parts["train"].tensors
    images.zero_()
    images[..., 10] = 255
    torch.manual_seed(0)
    black = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    columns = set()
    for _ in range(4):
        for image, _ in module.parts["train"]:
            assert image.shape == (3, 32, 32)
            assert torch.isclose(image, black[:, None, None]).all(0).any()
            columns.add(int(image[0].amax(0).argmax()))
    assert columns == {*range(6, 15), *range(17, 26)}  # 10 +- 4, and 21 +- 4 after a flip


def test_cifar10_loaders(cifar):
    module = ready(cifar, batch_size=7)
    assert isinstance(module.train_dataloader().sampler, RandomSampler)
    assert isinstance(module.val_dataloader().sampler, SequentialSampler)
    assert [len(labels) for _, labels in module.train_dataloader()] == [7] * 5
    assert [len(labels) for _, labels in module.val_dataloader()] == [7, 7, 6]
    assert [len(labels) for _, labels in module.test_dataloader()] == [7, 5]
    module.drop_last = False
    assert len(module.train_dataloader()) == 6


def test_cifar10_batches_are_those_of_torchvisions_transforms(cifar):
    """Bit for bit, for what is not augmented; each epoch otherwise, for what is."""
    module = ready(cifar, batch_size=12)
    files = torchvision.datasets.CIFAR10(str(cifar), train=False)
    each = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    ((images, labels),) = module.test_dataloader()
    assert torch.equal(images, torch.stack([each(image) for image, _ in files]))
    assert labels.tolist() == [label for _, label in files]
    first, second = (torch.stack([image for image, _ in module.parts["train"]]) for _ in range(2))
    assert not torch.equal(first, second)


class Reads(pl.LightningModule):
    """Draws random numbers of its own between batches, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch):
        self.seen.append((self.current_epoch, batch[0], batch[1], torch.rand(())))
        return self.weight**2

    def validation_step(self, batch):
        torch.rand(len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_gets_the_same_crops_bit_for_bit(cifar, tmp_path):
    runs = []
    for seed, resumed in ((0, None), (1, tmp_path / "epoch=0.ckpt")):
        torch.manual_seed(seed)
        callbacks = [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), RandomStateCallback()]
        trainer = make_trainer(tmp_path, max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
        runs.append(Reads())
        trainer.fit(runs[-1], ready(cifar), ckpt_path=resumed)
    later = [step for step in runs[0].seen if step[0] > 0]
    assert len(later) == len(runs[1].seen) == 16
    for whole, again in zip(later, runs[1].seen, strict=True):
        assert all(
            torch.equal(torch.as_tensor(one), torch.as_tensor(two)) for one, two in zip(whole, again, strict=True)
        )


def test_missing_cifar10_is_named_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"cifar-10-batches-py does not exist.*download: true.*unpack") as caught:
        ready(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("checked", [True, False])
def test_truncated_cifar10_is_named_with_the_way_out(cifar, monkeypatch, checked):
    path = cifar / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:1000])
    if not checked:
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    with pytest.raises(DataError, match=r"cifar-10-batches-py is damaged or incomplete.*download: true") as caught:
        ready(cifar)
    assert str(cifar) in str(caught.value)


def test_cifar10_downloads_only_when_asked(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append(self.root)
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert not asked
    with pytest.raises(DataError, match="no route to host"):
        CIFAR10DataModule(str(tmp_path), download=True).prepare_data()
    assert asked == [str(tmp_path)]
