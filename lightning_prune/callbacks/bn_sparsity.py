"""The L1 penalty on batch-norm scales while training."""

from __future__ import annotations

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_prune.criteria import add_bn_sparsity_
from lightning_prune.criteria.number_checks import check_weight


class BNSparsityCallback(Callback):
    """Trains with ``strength * sum |gamma|`` over all batch norms, so that `BNScale` can tell channels apart.

    Liu et al., Network Slimming (2017): the subgradient is added to the gradients before every optimizer step
    (under gradient accumulation once per step, under mixed precision to the unscaled ones), so before Lightning
    clips them. With several optimizers each step adds to the scales it updates. The loss that is logged does not
    hold the penalty.

    Args:
        strength: weight of the penalty; 1e-4 for VGG, 1e-5 for ResNet-164 and DenseNet-40 in the paper, with all
            scales starting from 0.5.

    Raises:
        ScoreError: the strength is negative or not finite.

    Example:
        >>> BNSparsityCallback(1e-5).strength
        1e-05
    """

    def __init__(self, strength: float = 1e-4) -> None:
        check_weight("strength", strength)
        self.strength = strength

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        add_bn_sparsity_(pl_module, self.strength, parameters)
