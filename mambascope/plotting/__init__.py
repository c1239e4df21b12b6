"""Pictures of what a model does, written as PNG files without a display.

``looks``: the method on one image.
``tradeoff``: accuracy against cost of one model. ``methods``: of several. ``heatmaps``: importance and refined
cells on the images. ``exits``: which images left after the coarse look (the paper's Figure 8). ``curves``: training
curves from Lightning's CSV log. ``dense``: what dense models predict.

The modules take arrays and dataclasses of their own; whoever has a result turns it into them.
"""

from mambascope.plotting.curves import plot_training_curves
from mambascope.plotting.exits import plot_exits
from mambascope.plotting.heatmaps import Example, draw_example, plot_heatmaps
from mambascope.plotting.tradeoff import plot_tradeoff

__all__ = [
    "Example",
    "draw_example",
    "plot_exits",
    "plot_heatmaps",
    "plot_tradeoff",
    "plot_training_curves",
]
