"""Published tables and figures, one recipe each, run at three scales, with ours beside the published numbers.

Here: reading recipes, the cells of every kind of table, the page. Not here: one pruning (callbacks, session), how
tables and figures look (report/); the recipes themselves lie in conf/reproduce.
"""

from lightning_prune.experiments.reproduce.cells import Cell
from lightning_prune.experiments.reproduce.page import markdown, print_page, write_page
from lightning_prune.experiments.reproduce.recipe import SCALES, Recipe, Row, read_recipe, recipe_names
from lightning_prune.experiments.reproduce.run import Refused, Reproduction, reproduce

__all__ = [
    "SCALES",
    "Cell",
    "Recipe",
    "Refused",
    "Reproduction",
    "Row",
    "markdown",
    "print_page",
    "read_recipe",
    "recipe_names",
    "reproduce",
    "write_page",
]
