"""Compensation: repair what remains for what was removed. Optional, and no part of reconstruction.

Here: functions that change weights, biases or statistics once, from batches and a plan, and the loss of distillation.
Not here: cutting channels out without loss (reconstruction), training with a teacher (callbacks), scores (criteria).
"""

from lightning_prune.compensation.batch_norm import recalibrate_bn_
from lightning_prune.compensation.constants import fold_constants_
from lightning_prune.compensation.distillation import distillation_loss
from lightning_prune.compensation.least_squares import least_squares_
from lightning_prune.compensation.rescaling import Rescaling, rescale_

__all__ = ["Rescaling", "distillation_loss", "fold_constants_", "least_squares_", "recalibrate_bn_", "rescale_"]
