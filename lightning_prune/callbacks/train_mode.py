"""Modules that were left in eval mode before fitting: since Lightning 2.2 the Trainer trains them like that."""

from __future__ import annotations

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_prune.errors import EvalModeWarning


class EvalModeCheck:
    """Notes at the start of fitting what is in eval mode, and says so once when fine-tuning starts like that.

    What the user's own hooks freeze later is meant, and so is what stays in eval under ``module.train()``.
    """

    def __init__(self) -> None:
        self._noted: list[str] = []

    def note(self, module: LightningModule) -> None:
        """Look at the module before any hook of the training loop has run."""
        in_eval = _in_eval(module)
        if in_eval:
            modes = [(part, part.training) for part in module.modules()]
            module.train()
            meant = set(_in_eval(module))
            for part, training in modes:
                part.training = training
            in_eval = [path for path in in_eval if path not in meant]
        self._noted = in_eval

    def warn(self, module: LightningModule) -> None:
        """Look at what was noted when the first batch after pruning is about to be trained on."""
        noted, self._noted = self._noted, []
        in_eval = set(_in_eval(module)) if noted else ()
        still = [path for path in noted if path in in_eval]
        if still:
            rank_zero_warn(
                f"fine-tuning starts with {len(still)} batch norm or dropout modules in eval mode, the first is "
                f"{still[0]!r}: the Trainer keeps the modes it finds, so statistics stay frozen and nothing is "
                "dropped, which costs accuracy after pruning. Call module.train() before fit; or, if it is meant, "
                "silence lightning_prune.errors.EvalModeWarning by warnings.filterwarnings",
                category=EvalModeWarning,
            )


def _in_eval(module: nn.Module) -> list[str]:
    """Paths of the batch norms and dropouts in eval mode, but for norms whose weights are frozen as well."""
    return [
        path
        for path, part in module.named_modules()
        if not part.training
        and (
            (isinstance(part, _DropoutNd) and part.p > 0)
            or (isinstance(part, _BatchNorm) and part.track_running_stats and not _is_frozen(part))
        )
    ]


def _is_frozen(norm: _BatchNorm) -> bool:
    return norm.affine and not any(parameter.requires_grad for parameter in norm.parameters())
