"""Pictures of detections: what is drawn, and which loggers get it."""

from __future__ import annotations

from pytorch_lightning.loggers import WandbLogger

from tests.helpers_detection import SIDE, loader, make_trainer, oracle_task, pictures, sure, yolo_task


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
    assert [image.size for image in drawn] == [(SIDE, SIDE)] * 3
    x, top, _, bottom = (int(v) for v in samples[0][1]["boxes"][0])
    colour = {0: (230, 25, 75), 1: (60, 180, 75)}[int(samples[0][1]["labels"][0])]
    assert drawn[0].getpixel((x, (top + bottom) // 2 + 3)) == colour


def test_sanity_checking_draws_nothing(tmp_path):
    gallery = Gallery()
    task = yolo_task()
    trainer = make_trainer(tmp_path, logger=gallery, num_sanity_val_steps=1, max_epochs=2, log_every_n_steps=1)
    trainer.fit(task, loader(pictures(4)), loader(pictures(4)))
    assert len(gallery.images["val_detections"]) == 2
