"""The picture of a channel graph: which layers make, share and read which channels, as SVG or as a page."""

from lightning_prune.report.graph_picture.drawing import graph_html, graph_svg

__all__ = ["graph_html", "graph_svg"]
