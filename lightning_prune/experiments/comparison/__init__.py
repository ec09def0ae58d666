"""Criteria side by side on one trained model: accuracy before and after the same fine-tuning, FLOPs, parameters."""

from lightning_prune.experiments.comparison.cells import Cell, Comparison, Dense, Refusal, Row, Spread
from lightning_prune.experiments.comparison.picture import comparison_figure
from lightning_prune.experiments.comparison.run import compare_criteria, trained_once
from lightning_prune.experiments.comparison.table import csv_text, markdown_table, print_comparison, write_comparison

__all__ = [
    "Cell",
    "Comparison",
    "Dense",
    "Refusal",
    "Row",
    "Spread",
    "compare_criteria",
    "comparison_figure",
    "csv_text",
    "markdown_table",
    "print_comparison",
    "trained_once",
    "write_comparison",
]
