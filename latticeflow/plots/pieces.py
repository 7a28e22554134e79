"""Samplers in pieces: how each was fitted, and where they are in the plane."""

from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from latticeflow.plots.style import CURVES, STYLE, WIDTH, draw_line, finish, thinned

LEVEL = 0.1
"""Where the contours are, as a fraction of the largest density of the target."""
SHADES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def fit_curves(piece: ArrayLike, step: ArrayLike, held_out: ArrayLike) -> Figure:
    """Draw the mean of `-log q` over the held-out samples at every evaluation, one curve for each piece.

    All three are `(evaluations,)`; the smallest of each piece, whose weights are kept, is marked. Up to four pieces are
    named, more look alike. Raises ValueError for other shapes.
    """
    pieces, steps, losses = np.asarray(piece), np.asarray(step), np.asarray(held_out, dtype=np.float64)
    if steps.ndim != 1 or steps.size == 0 or not pieces.shape == steps.shape == losses.shape:
        raise ValueError(
            f"piece, step and held_out must be (evaluations,), found {pieces.shape}, {steps.shape}, {losses.shape}"
        )
    figure = Figure(figsize=(WIDTH, 3.4), **STYLE["figure"])
    axes, numbers = figure.subplots(), np.unique(pieces)
    alike = {"color": "0.4", "linewidth": 0.8, "linestyle": "-"}
    looks = CURVES if numbers.size <= len(CURVES) else (alike,) * numbers.size
    for k, look in zip(numbers.tolist(), looks, strict=False):
        x, y = steps[pieces == k], losses[pieces == k]
        label = f"piece {k}" if look is not alike else f"{numbers.size} pieces" if k == numbers[0] else None
        draw_line(axes, x, y, label=label, **look)
        if np.isfinite(y).any():
            best = np.nanargmin(np.where(np.isfinite(y), y, np.nan))
            axes.plot(x[best], y[best], **{**STYLE["point_mark"], "color": look["color"]})
    axes.set(xlabel="training step", ylabel=r"held-out loss $-\langle\log q_k\rangle$")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, **STYLE["integers"]))
    return finish(figure, columns=4)


def planar_pieces(
    points: ArrayLike, label: ArrayLike, grid: tuple[ArrayLike, ArrayLike], target: ArrayLike, sampler: ArrayLike
) -> Figure:
    """Draw samples of a density of the plane by their piece, and the density beside that of the sampler.

    `points (n, 2)`, `label (n,)`; `target` and `sampler` are densities, both normalised, `(y, x)` on the `grid (x, y)`.
    On the right the target is shaded and each density has one contour, at a tenth of the target's maximum. Raises
    ValueError for other shapes.
    """
    xy, labels = np.asarray(points, dtype=np.float64), np.asarray(label)
    x, y, p, q = (np.asarray(part, dtype=np.float64) for part in (*grid, target, sampler))
    if xy.shape != (labels.size, 2) or labels.size == 0 or not p.shape == q.shape == (y.size, x.size):
        found = f"{xy.shape}, {labels.shape}, {p.shape}, {q.shape} on a grid ({y.size}, {x.size})"
        raise ValueError(f"expected points (n, 2), label (n,) and densities (y, x), found {found}")
    figure = Figure(figsize=(WIDTH, 3.7), **STYLE["figure"])
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for k, look in zip(np.unique(labels).tolist(), cycle(CURVES), strict=False):
        own = xy[labels == k]
        shown = own[thinned(own[:, 0])]
        left.plot(*shown.T, **{**STYLE["cloud"], "color": look["color"], "marker": look["marker"], "alpha": 0.6})
        box = {"facecolor": "white", "edgecolor": look["color"], "boxstyle": "round,pad=0.2"}
        left.text(*np.median(own, axis=0), str(k), ha="center", va="center", bbox=box, **STYLE["small"])
    peak = p.max()
    right.contourf(x, y, p, levels=[shade * peak for shade in SHADES], cmap="Greys", alpha=0.6)
    for density, name, look in ((p, "target", CURVES[0]), (q, "sampler", CURVES[2])):
        own = {"colors": look["color"], "linestyles": look["linestyle"], "linewidths": 1.2}
        right.contour(x, y, density, levels=[LEVEL * peak], **own)
        right.plot([], [], color=look["color"], linestyle=look["linestyle"], label=f"{name}, 1/10 of the target's peak")
    for axes in (left, right):
        axes.set(xlabel="$x_0$", ylabel="$x_1$", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")
    return finish(figure, columns=2)
