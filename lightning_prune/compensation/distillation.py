"""Knowledge distillation: how far a student's class probabilities are from its teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.errors import DistillationError


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Divergence of softened class probabilities, with gradients as large as those of a cross-entropy.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015):
    :math:`T^2 \, \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))`, averaged over samples, and over
    positions where there are some. In float32 at least.

    Args:
        student: logits s, (N, C) or (N, C, H, W).
        teacher: logits t of the same shape; no gradient goes there.
        temperature: T; the higher, the more the classes that are not the answer count.

    Raises:
        DistillationError: a temperature that is not positive, or shapes that differ or have no classes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> round(float(distillation_loss(student, teacher, temperature=1.0)), 4)
        0.3278
    """
    check_temperature(temperature)
    if student.shape != teacher.shape or student.dim() < 2:
        raise DistillationError(
            f"student and teacher must return logits of one shape (N, C) or (N, C, H, W), got {list(student.shape)} "
            f"and {list(teacher.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_student = (student.to(wide) / temperature).log_softmax(1)
    log_teacher = (teacher.detach().to(wide) / temperature).log_softmax(1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * divergence.mean()


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or a dict that holds them as "out" (segmentation)."""
    logits = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        held = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise DistillationError(
            f"no logits in what the model returns: expected a tensor or a dict with the key 'out', got "
            f"{type(output).__name__}{held}"
        )
    return logits


def check_temperature(temperature: float) -> None:
    """Refuse anything but a positive number."""
    if not math.isfinite(temperature) or temperature <= 0:
        raise DistillationError(f"temperature must be positive, got {temperature!r}")
