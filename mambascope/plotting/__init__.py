"""Pictures of what a model does, written as PNG files without a display.

``frontier``: accuracy against cost of one model. ``methods``: of several methods. ``heatmaps``: importance and refined
cells on the images. ``exits``: which images left after the coarse look (the paper's Figure 8). ``curves``: training
curves from Lightning's CSV log. ``eye``: accuracy of a MambaEye against glimpses. ``eye_animation``: films of its
glimpses.
"""

from mambascope.plotting.curves import plot_training_curves
from mambascope.plotting.exits import plot_exits
from mambascope.plotting.frontier import plot_frontier
from mambascope.plotting.heatmaps import Example, draw_example, plot_heatmaps

__all__ = [
    "Example",
    "draw_example",
    "plot_exits",
    "plot_frontier",
    "plot_heatmaps",
    "plot_training_curves",
]
