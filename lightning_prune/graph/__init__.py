"""The channel graph: which channels of which tensors go together, and which can go at all.

Here: from a model's forward to groups of channels. Not here: which channels should go (criteria, selection), and
changing the model (model_state, reconstruction).

`tracing` runs the model and records each `operator_call`; `rules` follow `labels` through it and tell `label_space`
what goes together and which `constraints` the sizes in the code put on it; `resolve` and `build_groups` make groups of
it; `rehearse` tries them out on smaller models: `trial_runs` of `model_copies` without values (`meta_kernels`), and
`compared_runs` of such with values, where blocks that repeat another (`repeated_blocks`) are left out. `unreached`
cares for modules that no run used (`parts`), `widths` for numbers that code only compares.
"""

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.groups import Group, Layer, Slice
from lightning_prune.graph.running import as_args, call_model, on_device
from lightning_prune.graph.tracing import trace

__all__ = ["ChannelGraph", "Group", "Layer", "Slice", "as_args", "call_model", "on_device", "trace"]
