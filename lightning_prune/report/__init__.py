"""What people are shown: one table type, one page, figures, and the picture of a graph.

Here: the data classes of a report, tables, pages, pictures. Not here: models, measuring, or anything that runs; what is
shown comes as plain data, plans, graphs and scores.
"""

from lightning_prune.report.data import (
    DENSE,
    FINE_TUNED,
    MASKED,
    RECONSTRUCTED,
    EpochRecord,
    KeptChannels,
    OrderTiming,
    Predictions,
    PruneReport,
    StageResult,
)
from lightning_prune.report.summary import markdown_table, print_report
from lightning_prune.report.table import Column, Entry, Table

__all__ = [
    "DENSE",
    "FINE_TUNED",
    "MASKED",
    "RECONSTRUCTED",
    "Column",
    "Entry",
    "EpochRecord",
    "KeptChannels",
    "OrderTiming",
    "Predictions",
    "PruneReport",
    "StageResult",
    "Table",
    "markdown_table",
    "print_report",
]
