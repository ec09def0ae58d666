"""Example inputs of any form as arguments of a model."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune.graph import as_args, call_model


def test_example_inputs_become_arguments():
    x = torch.zeros(1)
    assert as_args(x) == ((x,), {})
    assert as_args((x, 2)) == ((x, 2), {})
    assert as_args([x, x]) == (([x, x],), {})
    assert as_args({"x": x}) == ((), {"x": x})
    assert as_args({0: x}) == (({0: x},), {})
    assert call_model(nn.Identity(), {"input": x}) is x
