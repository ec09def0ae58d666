"""Channel pruning for PyTorch Lightning: score, mask, and reconstruct a smaller model without loss.

The verbs and the names that nearly every script needs are here; the rest is one step down, where it works as an
attribute without an import of its own: ``lp.callbacks``, ``lp.criteria``, ``lp.measure``, ``lp.models``, ...

Example:
    >>> import torch, lightning_prune as lp
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    >>> lp.prune(model, torch.randn(1, 3, 8, 8), criterion="l1", ratio=0.5).model[0].out_channels
    4
"""

import lazy_loader

# Imported on first use, as __init__.pyi lists them: `lightning-prune --help` waits neither for torch nor for Lightning.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
