"""Figures of a run: arrays in, a matplotlib `Figure` out; readable in grey, long histories thinned, no global state."""

from matplotlib.figure import Figure

from latticeflow.plots.pieces import fit_curves, planar_pieces
from latticeflow.plots.run import autocorrelation, charge_history, comparison, training_curve, weight_histogram
from latticeflow.plots.style import CURVES, MOST_POINTS, STYLE, WIDTH, save

__all__ = [
    "CURVES",
    "MOST_POINTS",
    "STYLE",
    "WIDTH",
    "Figure",
    "autocorrelation",
    "charge_history",
    "comparison",
    "fit_curves",
    "planar_pieces",
    "save",
    "training_curve",
    "weight_histogram",
]
