"""Models of the libraries that people bring: a suite per library, a table of models per file.

A table needs its library only when a model of it is built, so that listing and reporting need none of them.
"""

from __future__ import annotations

import functools
import importlib

from benchmarks.zoo.users.model import Model, images, sized

#: Suites, each the name of a file here.
LIBRARIES = (
    "ultralytics", "smp", "transformers", "diffusers", "monai", "video", "audio", "spandrel", "pytorchcv", "facenet",
    "kornia",
)  # fmt: skip

__all__ = ["LIBRARIES", "Model", "images", "models", "sized"]


@functools.cache
def models(suite: str) -> dict[str, Model]:
    """The table of a library by the models' names."""
    return importlib.import_module(f"benchmarks.zoo.users.{suite}_models").MODELS
