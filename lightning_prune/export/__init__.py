"""A model as a file that runs without this package: ONNX or torch.export, checked by running it.

Here: what of a model is deployed, the file, what it says of itself, and the check. Not here: the bytes of an ONNX file
and what runs them (engines/).
"""

from lightning_prune.export.loading import load_exported
from lightning_prune.export.metadata import read_metadata
from lightning_prune.export.writing import ExportReport, Format, export

__all__ = ["ExportReport", "Format", "export", "load_exported", "read_metadata"]

# `lp.export` is the function, and the place of these names: lp.export.read_metadata(path).
vars(export).update({name: globals()[name] for name in __all__ if name != "export"})
