"""Pictures of detections: what is drawn, and which loggers get it."""

from __future__ import annotations

import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_prune.tasks import SegmentationTask
from lightning_prune.tasks.drawing import draw, draw_classes, log_images
from tests.tasks.helpers import SIDE, loader, make_trainer, oracle_task, pictures, stacked, sure, yolo_task


class Gallery(WandbLogger):
    """Keeps images instead of sending them."""

    def __init__(self):
        self.images = {}

    def log_image(self, key, images, step=None, **kwargs):
        self.images.setdefault(key, []).append(images)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass

    def finalize(self, status):
        pass

    name = version = save_dir = None


def test_a_few_images_are_drawn_for_loggers_that_take_them(tmp_path):
    samples = pictures(6)
    task = oracle_task(samples, [sure(target) for _, target in samples])
    task.drawn_images = 3
    gallery = Gallery()
    make_trainer(tmp_path, logger=gallery).test(task, loader(samples), verbose=False)
    (drawn,) = gallery.images["test_detections"]
    factor = 256 // SIDE  # on small images a label would cover what it names
    assert [image.size for image in drawn] == [(256, 256)] * 3
    x, top, _, bottom = (factor * int(v) for v in samples[0][1]["boxes"][0])
    colour = {0: (230, 25, 75), 1: (60, 180, 75)}[int(samples[0][1]["labels"][0])]
    assert drawn[0].getpixel((x, (top + bottom) // 2 + 3)) == colour


class Board(TensorBoardLogger):
    """A TensorBoard that keeps images; the package itself is not needed."""

    def __init__(self):
        self.images = {}

    @property
    def experiment(self):
        return self

    def add_image(self, tag, image, step):
        self.images[tag] = (tuple(image.shape), image.dtype, step)


def test_tensorboard_gets_every_image_under_a_name_of_its_own():
    board, image = Board(), torch.zeros(3, 8, 9, dtype=torch.uint8)
    log_images([board, CSVLogger("unused")], "val_detections", [image, image], 7)
    expected = ((3, 8, 9), torch.uint8, 7)
    assert board.images == {"val_detections/0": expected, "val_detections/1": expected}


def test_weak_boxes_and_grey_images():
    found = {"boxes": torch.tensor([[1.0, 1, 6, 6]]), "scores": torch.tensor([0.49]), "labels": torch.tensor([0])}
    assert torch.equal(draw(torch.ones(1, 8, 8), found, ["a"]), torch.full((3, 256, 256), 255, dtype=torch.uint8))
    found["scores"] += 0.02
    assert draw(torch.ones(1, 8, 8), found, ["a"]).shape == (3, 256, 256)
    assert draw(torch.ones(1, 8, 8), found, ["a"]).min() < 255


def test_images_of_more_channels_are_drawn_in_grey():
    drawn = draw_classes(torch.rand(6, 256, 256), torch.zeros(256, 256, dtype=torch.int64))
    assert drawn.shape == (3, 256, 256)
    assert torch.equal(drawn[0], drawn[2])


def test_true_boxes_have_names_without_scores():
    image, (_, target) = torch.ones(3, 256, 300), pictures(1)[0]
    found = {**target, "scores": torch.ones(len(target["labels"]))}
    plain, scored = draw(image, target, ["a", "b"]), draw(image, found, ["a", "b"])
    assert plain.shape == scored.shape == (3, 256, 300)  # large enough as it is
    assert (plain != 255).sum() < (scored != 255).sum()


def test_both_tasks_draw_the_truth_and_what_they_find():
    samples = pictures(2)
    task, batch = yolo_task(), stacked(samples)
    truth, found = task.draw_predictions(batch), task.draw_predictions(batch, [sure(t) for _, t in samples])
    assert len(truth) == len(found) == 2
    assert not torch.equal(truth[0], found[0])  # with scores
    segmentation = SegmentationTask(torch.nn.Conv2d(3, 3, 1), 3, input_size=(3, 8, 8))
    masks = torch.tensor([[[0, 1], [2, 255]]]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    grey = torch.linspace(-2, 3, 64).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    (drawn,) = segmentation.draw_predictions((grey, masks))
    (bare,) = segmentation.draw_predictions((grey, masks), torch.zeros_like(masks))
    assert drawn.shape == (3, 256, 256)
    changed = (drawn != bare).any(0)
    assert not changed[:128, :128].any()  # background
    assert not changed[128:, 128:].any()  # 255: nothing is known
    assert drawn[:, :128, 128:].float().mean((1, 2)).argmax() == 0  # class 1 is red
    assert drawn[:, 128:, :128].float().mean((1, 2)).argmax() == 1  # class 2 is green
    assert (bare.min(), bare.max()) == (0, 255)
    segmentation.background = None
    (all_coloured,) = segmentation.draw_predictions((grey, masks))
    assert (all_coloured != bare).any(0)[:128, :128].all()
    assert torch.equal(all_coloured[:, 128:], drawn[:, 128:])


def test_as_many_classes_as_street_scenes_have_differ_in_colour():
    grey, classes = torch.zeros(1, 256, 256), torch.arange(11).repeat_interleave(24)[:256].expand(256, -1)
    drawn = draw_classes(grey, classes, (None, 255))
    assert len({tuple(drawn[:, 0, 24 * label].tolist()) for label in range(11)}) == 11


def test_sanity_checking_draws_nothing(tmp_path):
    gallery = Gallery()
    task = yolo_task()
    trainer = make_trainer(tmp_path, logger=gallery, num_sanity_val_steps=1, max_epochs=2, log_every_n_steps=1)
    trainer.fit(task, loader(pictures(4)), loader(pictures(4)))
    assert len(gallery.images["val_detections"]) == 2
