"""What a model costs: parameters, FLOPs by convention, memory, latency, layer by layer.

Here: counting and timing. Not here: choosing channels by cost (selection/), tables of it (report/).
"""

from lightning_prune.measure.cost_model import CostModel
from lightning_prune.measure.layer_findings import explain_speed
from lightning_prune.measure.layers import measure_machine, time_layers
from lightning_prune.measure.measurement import (
    Latency,
    Measurement,
    compare_latency,
    count_flops,
    count_params,
    flops_by_convention,
    measure,
    measure_latency,
    measure_memory,
    state_size,
)

__all__ = [
    "CostModel",
    "Latency",
    "Measurement",
    "compare_latency",
    "count_flops",
    "count_params",
    "explain_speed",
    "flops_by_convention",
    "measure",
    "measure_latency",
    "measure_machine",
    "measure_memory",
    "state_size",
    "time_layers",
]

# `lp.measure` is the function, and the place of all these names: lp.measure.count_flops(model, inputs).
vars(measure).update({name: globals()[name] for name in __all__})
