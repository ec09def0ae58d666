"""The channel graph: which channels of which tensors go together."""

from lightning_prune.graph.groups import ChannelGraph, Group, Layer, Slice
from lightning_prune.graph.inputs import as_args, call_model, on_device
from lightning_prune.graph.tracing import trace

__all__ = ["ChannelGraph", "Group", "Layer", "Slice", "as_args", "call_model", "on_device", "trace"]
