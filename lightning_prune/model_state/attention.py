"""Multi-head attention whose heads may be narrower than `torch.nn.MultiheadAttention` can make them.

Torch's own takes the width of a head from its input: ``embed_dim // num_heads``. So no channel inside could ever go
while the input keeps its width. This class computes the same of the same parameters, and takes it from the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, the same call and parameters, with heads of any width.

    ``in_proj_weight`` is (3 * num_heads * width, embed_dim), ``out_proj.weight`` (embed_dim, num_heads * width). The
    scale of the scores stays that of the heads it was built with, ``head_dim ** -0.5``.
    """

    # Not the kind for which torch calls its fused encoder layer, which knows nothing of such heads.
    _qkv_same_embed_dim = property(lambda _: False, lambda *_: None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        batched, first = query.dim() == 3, self.batch_first and query.dim() == 3
        same = query is key and key is value
        given = [query] if same else [query, key, value]
        if not batched:
            given = [tensor.unsqueeze(0) for tensor in given]
        elif not first:
            given = [tensor.transpose(0, 1) for tensor in given]
        q, k, v = self._projected(given * 3 if same else given)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in (q, k, v))
        dropout, scale, weights = self.dropout if self.training else 0.0, float(self.head_dim) ** -0.5, None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        out = out if first else out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out if batched else out.squeeze(1), weights

    def _projected(self, given: list[Tensor]) -> list[Tensor]:
        biases: Any = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            matrices = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif given[0] is given[1] and given[1] is given[2]:
            return list(F.linear(given[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            matrices = list(self.in_proj_weight.chunk(3))
        return [F.linear(*each) for each in zip(given, matrices, biases, strict=True)]

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """(batch or 1, heads or 1, queries or 1, keys): what is added to the scores."""
        batch, queries, keys = len(q), q.shape[1], k.shape[1]
        padding, mask = (_additive(one, q.dtype) for one in (padding, mask))
        if mask is not None:
            mask = F.pad(mask, (0, keys - mask.shape[-1]))
            mask = mask[None, None] if mask.dim() == 2 else mask.view(-1, self.num_heads, queries, keys)
        if padding is not None:
            padding = F.pad(padding, (0, keys - padding.shape[-1])).view(batch, 1, 1, keys)
        return mask if padding is None else padding if mask is None else mask + padding


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Minus infinity where a boolean mask says that nothing may look."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.bool(), float("-inf"))


def narrow_(model: nn.Module) -> None:
    """Give every `torch.nn.MultiheadAttention` of a model, and of no class derived from it, heads of any width."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = NarrowMultiheadAttention


@contextmanager
def narrowed(model: nn.Module) -> Iterator[None]:
    """Let every attention run code in which its projections can be seen."""
    narrow_(model)
    try:
        yield
    finally:
        fit_attention_(model)


def fit_attention_(model: nn.Module) -> None:
    """Let the class of every attention, and its sizes, be what the shapes of its weights ask for."""
    narrow = set()
    for module in model.modules():
        if type(module) in (nn.MultiheadAttention, NarrowMultiheadAttention):
            assert isinstance(module, nn.MultiheadAttention)
            width, inner = module.out_proj.weight.shape
            plain = width == inner == module.num_heads * module.head_dim and _width_of_queries(module) == width
            module.__class__ = nn.MultiheadAttention if plain else NarrowMultiheadAttention
            module.embed_dim = width
            if not plain:
                narrow.add(module)
    for module in model.modules() if narrow else ():
        if isinstance(module, nn.TransformerEncoder) and not narrow.isdisjoint(module.modules()):
            module.use_nested_tensor = False  # which only the fused layers understand


def _width_of_queries(module: nn.MultiheadAttention) -> int:
    matrix = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    return matrix.shape[1]
