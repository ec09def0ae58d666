"""What a pruning run measured, as plain data, and the table that a terminal, log or README shows of it."""

from lightning_prune.report.data import (
    DENSE,
    FINE_TUNED,
    MASKED,
    RECONSTRUCTED,
    EpochRecord,
    LayerChannels,
    Losslessness,
    OrderTiming,
    Predictions,
    PruneReport,
    StageResult,
)
from lightning_prune.report.table import markdown_table, print_report

__all__ = [
    "DENSE",
    "FINE_TUNED",
    "MASKED",
    "RECONSTRUCTED",
    "EpochRecord",
    "LayerChannels",
    "Losslessness",
    "OrderTiming",
    "Predictions",
    "PruneReport",
    "StageResult",
    "markdown_table",
    "print_report",
]
