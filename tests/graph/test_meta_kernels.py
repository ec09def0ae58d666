"""The kernels that answer for torch on the meta device say what torch itself says of shape, type and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.graph.meta_kernels import _kernel_for, answer
from lightning_prune.model_state.dispatch import EagerMode


class Answers(EagerMode):
    """Answers for every operator, and compares with what torch says on the CPU, where it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        expected = func(*args, **(kwargs or {}))
        meta = _to_meta(args)
        kernel = None if kwargs else _kernel_for(func)
        if kernel is not None and (found := kernel(*meta)) is not None:
            self.answered.append(func.overloadpacket.__name__)
            outputs = expected if isinstance(expected, tuple) else (expected,)
            answers = found if isinstance(found, tuple) else (found,)
            assert len(answers) == len(outputs)
            assert _form(answers[0]) == _form(outputs[0]), func
            if "batch_norm" not in func.overloadpacket.__name__:  # nobody looks at its statistics
                assert [_form(a) for a in answers] == [_form(o) for o in outputs], func
        return expected


def _form(tensor: Tensor) -> tuple[Any, ...]:
    strides = [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    return tuple(tensor.shape), tensor.dtype, strides


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return type(value)(_to_meta(item) for item in value) if isinstance(value, (list, tuple)) else value


X, WIDE = torch.randn(2, 6, 9, 12), torch.randn(2, 6, 9, 12).to(memory_format=torch.channels_last)
MASK = torch.ones(1, 1, 9, 12, dtype=torch.bool)
CALLS = {
    "convolution": lambda: F.conv2d(X, torch.randn(4, 3, 3, 2), torch.randn(4), (2, 1), (1, 0), (1, 2), 2),
    "one dimension": lambda: F.conv1d(X[:, :, 0].contiguous(), torch.randn(4, 6, 3), None, 1, 1),
    "three dimensions": lambda: F.conv3d(torch.randn(1, 2, 5, 6, 7), torch.randn(4, 2, 3, 3, 3), None, 2, 1),
    "transposed convolution": lambda: F.conv_transpose2d(X, torch.randn(6, 2, 3, 2), None, 2, 1, 1, 2, (2, 3)),
    "channels last": lambda: F.conv2d(WIDE, torch.randn(4, 6, 3, 3)),
    "batch norm": lambda: F.batch_norm(X, torch.zeros(6), torch.ones(6), torch.ones(6), torch.ones(6)),
    "batch norm of the batch": lambda: F.batch_norm(X, None, None, torch.ones(6), torch.ones(6), training=True),
    "layer norm": lambda: F.layer_norm(X, (9, 12), torch.ones(9, 12)),
    "layer norm of what was moved": lambda: F.layer_norm(X.permute(0, 2, 3, 1), (6,), torch.ones(6), torch.ones(6)),
    "vector norm": lambda: (
        torch.linalg.vector_norm(X, dim=(1, 2)) + torch.linalg.vector_norm(X, 1, 1, True).sum(2)[:, 0]
    ),
    "group norm": lambda: F.group_norm(X, 3, torch.ones(6), torch.ones(6)),
    "linear": lambda: F.linear(X, torch.randn(5, 12), torch.randn(5)),
    "linear without bias": lambda: F.linear(X[0, 0], torch.randn(5, 12)),
    "batched product": lambda: torch.bmm(X[0], X[1].transpose(1, 2)),
    "mean": lambda: X.mean((2, 3)) + X.mean(-1, keepdim=True).sum((1, 3)).sum() + X.amax(1).mean(),
    "max pool": lambda: F.max_pool2d(X, 3, 2, 1),
    "max pool, ceil": lambda: F.max_pool2d(X, (2, 3), (3, 5), (1, 1), ceil_mode=True),
    "max pool, default stride": lambda: F.max_pool2d(X, 3),
    "cat": lambda: torch.cat([X, X[:, :2]], 1),
    "upsample": lambda: F.interpolate(X, scale_factor=1.7) + F.interpolate(X, scale_factor=1.7, mode="bilinear"),
    "upsample to a size": lambda: F.interpolate(X, (20, 5), mode="bicubic", align_corners=True),
    "grid sample": lambda: F.grid_sample(X, torch.zeros(2, 4, 7, 2), align_corners=False),
    "activations": lambda: F.gelu(F.leaky_relu(F.hardswish(X))) * F.silu(WIDE) + torch.sigmoid(X.mT).mT,
    "broadcast": lambda: X * torch.randn(6, 1, 1) + torch.randn(2, 1, 9, 1) - 1.5,
    "in place": lambda: X.clone().relu_().mul_(2).add_(torch.randn(12)),
    "masks": lambda: X.masked_fill(MASK, 0.0) + torch.where(MASK, X, 1.0) + X.clone().masked_fill_(MASK, 1.0),
    "comparisons": lambda: (X > 0) | (X[:1] == X) | X.isnan(),
    "types": lambda: X.double() + X + X.long() + X.half() * 2,
    "softmax": lambda: X.softmax(1) + X.log_softmax(-1) + X.roll(1, 2).flip(3),
    "numbers first": lambda: 2.0**X + 1 / X + torch.rsub(X, 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_says_what_torch_says(name: str) -> None:
    with torch.no_grad(), Answers() as answers:
        CALLS[name]()
    expected_of_torch = {"channels last"}
    assert bool(answers.answered) != (name in expected_of_torch)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ops.aten.convolution(*_to_meta((X, torch.randn(4, 5, 3, 3), None)), [1], [0], [1], False, [0], 1),
        lambda: torch.ops.aten.convolution(*_to_meta((X, torch.randn(4, 3, 3, 3), None)), [1], [0], [1], False, [0], 3),
        lambda: torch.ops.aten.add.Tensor(*_to_meta((X, torch.randn(5, 1, 1)))),
        lambda: torch.ops.aten.addmm(*_to_meta((torch.randn(4), X[0, 0], torch.randn(11, 4)))),
        lambda: torch.ops.aten.cat(_to_meta([X, X[:, :, 1:]]), 1),
        lambda: torch.ops.aten.native_layer_norm(_to_meta(X), [11], None, None, 1e-5),
        lambda: torch.ops.aten.native_group_norm(_to_meta(X), _to_meta(torch.ones(5)), None, 2, 6, 108, 3, 1e-5),
        lambda: torch.ops.aten.native_batch_norm(_to_meta(X), *_to_meta([torch.ones(5)] * 4), False, 0.1, 1e-5),
    ],
)
def test_what_does_not_fit_fails_as_it_does_in_torch(call: Any) -> None:
    class Asks(EagerMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return answer(func, args, kwargs or {})

    with Asks(), pytest.raises((RuntimeError, ValueError)):
        call()
