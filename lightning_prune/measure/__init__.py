"""What a model costs: parameters, FLOPs by convention, memory, latency, layer by layer.

Here: counting and timing. Not here: choosing channels by cost (selection/), tables of it (report/).
"""

from lightning_prune.measure.cost_model import CostModel
from lightning_prune.measure.counting import (
    Convention,
    count_flops,
    count_params,
    flops_by_convention,
    measure_memory,
    samples_in,
    state_size,
    with_samples,
)
from lightning_prune.measure.latency import Latency, compare_latency, compare_programs, measure_latency, thread_count
from lightning_prune.measure.latency_table import LatencyTable, LayerTimes, Surface
from lightning_prune.measure.layer_calls import LayerCall, LayerKind, layer_calls
from lightning_prune.measure.layer_findings import Finding, explain_speed
from lightning_prune.measure.layers import LayerTime, Machine, ModelTime, measure_machine, time_layers
from lightning_prune.measure.measurement import Measurement, measure
from lightning_prune.measure.profile_kit import write_profile_kit
from lightning_prune.measure.table_making import make_table

__all__ = [
    "Convention",
    "CostModel",
    "Finding",
    "Latency",
    "LatencyTable",
    "LayerCall",
    "LayerKind",
    "LayerTime",
    "LayerTimes",
    "Machine",
    "Measurement",
    "ModelTime",
    "Surface",
    "compare_latency",
    "compare_programs",
    "count_flops",
    "count_params",
    "explain_speed",
    "flops_by_convention",
    "layer_calls",
    "make_table",
    "measure",
    "measure_latency",
    "measure_machine",
    "measure_memory",
    "samples_in",
    "state_size",
    "thread_count",
    "time_layers",
    "with_samples",
    "write_profile_kit",
]

# `lp.measure` is the function, and the place of all these names: lp.measure.count_flops(model, inputs).
vars(measure).update({name: globals()[name] for name in __all__})
