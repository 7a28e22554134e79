"""How figures look, and how they are written: what all of them share."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from latticeflow.storage import atomic_write_bytes

Array = NDArray[np.float64]
STYLE: dict[str, dict[str, Any]] = {
    "figure": {"dpi": 150, "layout": "constrained", "facecolor": "white"},
    "label": {"fontsize": 9},
    "small": {"fontsize": 8},
    "legend": {"fontsize": 8, "title_fontsize": 9, "alignment": "left", "frameon": False, "handlelength": 3.0},
    "line": {"color": "black", "linewidth": 1.3, "markersize": 4},
    "thin": {"color": "black", "linewidth": 0.7, "markersize": 4},
    "cloud": {"color": "0.6", "linestyle": "none", "marker": "o", "markersize": 1.8, "markeredgewidth": 0},
    "fill": {"facecolor": "0.82", "edgecolor": "black", "linewidth": 0.8, "fill": True},
    "outline": {"edgecolor": "black", "linewidth": 1.5, "linestyle": "--"},
    "integers": {"integer": True, "min_n_ticks": 1, "steps": (1, 2, 3, 5, 10)},
    "point": {"color": "black", "marker": "o", "markersize": 4, "capsize": 2.5, "elinewidth": 1.2},
    "point_mark": {"linestyle": "none", "marker": "o", "markersize": 5, "markerfacecolor": "none"},
    "exact": {"color": "black", "linestyle": "none", "marker": "D", "markersize": 5, "markerfacecolor": "none"},
}
CURVES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "#0060a8", "linestyle": "--", "marker": "s"},
    {"color": "#d55e00", "linestyle": "-.", "marker": "^"},
    {"color": "#808080", "linestyle": ":", "marker": "D"},
)
WIDTH = 7.0
MOST_POINTS = 2000


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure, a PNG at 150 dots per inch or what else the name ends in, under its name only once complete."""
    path, buffer = Path(path), BytesIO()
    figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=STYLE["figure"]["dpi"])
    atomic_write_bytes(path, buffer.getvalue())


def draw_line(axes: Axes, x: Array, y: Array, **look: Any) -> None:
    """Draw a thinned line, or the point where there is only one."""
    every = thinned(x)
    axes.plot(x[every], y[every], **{**STYLE["line"], **look, "marker": "o" if x.size == 1 else ""})


def finish(figure: Figure, *, title: str = "", columns: int = 1) -> Figure:
    """Give a figure its sizes of text and its legend, and return it."""
    for axes in figure.axes:
        axes.tick_params(which="both", labelsize=STYLE["small"]["fontsize"])
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(**STYLE["label"])
            axis.offsetText.set(**STYLE["small"])
    if any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        figure.legend(loc="outside upper left", ncols=columns, title=title or None, **STYLE["legend"])
    return figure


def axis_range(values: Array, *always: float) -> tuple[float, float]:
    """Return the range of the values up to two inter-decile widths beyond the deciles, widened to show `always`."""
    ends = list(always)
    if values.size > 0:
        low, high = np.quantile(values, (0.1, 0.9))
        reach = 2 * (high - low) or np.inf
        ends += [max(values.min(), low - reach), min(values.max(), high + reach)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    margin = max(0.05 * (high - low), 0.01)
    return low - margin, high + margin


def thinned(values: Array) -> slice:
    """Return which of many values to draw, 2000 at most."""
    return slice(None, None, max(1, -(-values.size // MOST_POINTS)))
