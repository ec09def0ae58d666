"""Fine-tuning a model that is small already: its checkpoints, too, say how a dense model takes their shapes."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.callbacks.checkpoint_shapes import write_shapes
from lightning_prune.callbacks.reconstruction import prunes
from lightning_prune.errors import CallbackError
from lightning_prune.model_state.cutting import dense_shapes
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.dropped_blocks import dropped_blocks


class SmallCheckpointCallback(Callback):
    """Adds the plan of a model that is small already to Lightning's checkpoints of its fine-tuning.

    `lightning_prune.load` then turns a freshly built dense module into any of them, as it does with those of a
    `PruneCallback`. Without it they hold shapes that no freshly built module has. To go on with a run, load the small
    model first, then ``fit(ckpt_path=...)``.

    Args:
        plan: what the model was built with, as `lightning_prune.load` and `lightning_prune.prune` return it.

    Raises:
        CallbackError: the model is dense, or something prunes it in this fit.

    Example:
        >>> import torch, lightning_prune as lp
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> result = lp.prune(net, torch.zeros(1, 3, 8, 8), criterion="l1", ratio=0.5)
        >>> callbacks = [SmallCheckpointCallback(result.plan)]  # for a module around result.model
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if prunes(trainer.callbacks):  # type: ignore[attr-defined]
            raise CallbackError(
                "SmallCheckpointCallback is for a model that is small already, and PruneCallback writes the plan itself"
            )
        if not dense_shapes(pl_module) and not dropped_blocks(pl_module):
            raise CallbackError(
                f"{type(pl_module).__name__} is dense: load the small model into it first (lightning_prune.load)"
            )
        write_shapes(trainer, pl_module, lambda: self.plan)

    def state_dict(self) -> dict[str, Any]:
        """The plan, by which a checkpoint is known as one of these."""
        return {"plan": self.plan.to_dict()}
