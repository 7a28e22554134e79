"""Every figure must build, be drawn without a warning and say what its axes show, also for degenerate input."""

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex
from matplotlib.image import imread
from scipy.signal import lfilter

from latticeflow import plots, stats
from latticeflow.plots import (
    autocorrelation,
    charge_history,
    comparison,
    fit_curves,
    planar_pieces,
    save,
    training_curve,
    weight_histogram,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LOG_Z = 60.76


@pytest.fixture
def draw(tmp_path):
    """Save the figure and return its legend entries, after checking the file, the axis labels and the leftovers."""

    def check(figure):
        path = tmp_path / "figure.png"
        save(figure, path)
        assert path.read_bytes().startswith(PNG_SIGNATURE)
        image = imread(path)
        assert image.shape[1::-1] == tuple(np.floor(figure.get_size_inches() * 150))
        assert np.ptp(image[..., :3]) > 0.9
        assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]
        assert all(axes.get_ylabel() for axes in figure.axes)
        assert_text_is_inside(figure)
        return [text.get_text() for text in figure.legends[0].get_texts()]

    return check


def assert_text_is_inside(figure):
    width, height = figure.bbox.size
    for axes in panels(figure):
        box = axes.get_tightbbox()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    legend = figure.legends[0].get_window_extent()
    assert legend.x1 <= width
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in panels(figure))


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def ar1(a, n, *, seed):
    return lfilter([1.0], [1.0, -a], np.random.default_rng(seed).normal(size=n))


def losses(n):
    step = np.arange(1, n + 1)
    return step, 1 - LOG_Z + 20 / step + np.random.default_rng(1).normal(0, 0.3, n)


@pytest.fixture(scope="module")
def result():
    return stats.gamma_method(ar1(0.8, 4000, seed=3))


@pytest.mark.parametrize("n", [1, 30, 1_000_000])
def test_training_curve_of_any_length(draw, n):
    step, loss = losses(n)
    figure = training_curve(step, loss, np.full(n, 0.4), log_z=LOG_Z)
    draw(figure)
    upper, lower = figure.axes
    assert upper.get_ylim()[0] < -LOG_Z < upper.get_ylim()[1]
    assert lower.get_ylim() == (0, 1)
    assert lower.get_xlabel() == "training step"
    assert all(len(line.get_xdata()) <= plots.MOST_POINTS for axes in figure.axes for line in axes.lines)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_training_curve_by_parts(draw, count):
    """Each part has its own steps and colour, in both panels, and the whole is black."""
    step, loss = losses(600)
    part = np.where(step <= 400, 1 + step % count, 0)
    figure = training_curve(step, loss + 5 * (part == 1), part / 10 + 0.1, part=part, log_z=LOG_Z)
    names = [*(f"part {k}" for k in range(1, count + 1)), "end to end"]
    entries = draw(figure)
    assert entries[0].startswith("each step, lines: running median")
    assert entries[1:] == [r"bound $-\log Z$", *names]
    upper, lower = figure.axes
    assert [line.get_label() for line in lower.lines] == names
    for k, line in zip([*range(1, count + 1), 0], lower.lines, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), step[part == k])
        np.testing.assert_array_equal(line.get_ydata(), np.full(np.sum(part == k), k / 10 + 0.1))
    colors = [to_hex(line.get_color()) for line in lower.lines]
    assert len({*colors}) == count + 1
    assert [to_hex(line.get_color()) for line in upper.lines[1 : count + 2]] == colors
    assert colors[-1] == "#000000"


def test_training_curve_by_one_part_alone_or_useless_losses(draw):
    draw(training_curve([1, 2, 3], [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], part=[1, 1, 2]))
    draw(training_curve([1, 2, 3], [np.inf, np.nan, 3.0], [0.0, 0.0, 0.3], part=[1, 1, 0]))
    with pytest.raises(ValueError, match=r"part must be \(3,\)"):
        training_curve([1, 2, 3], [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], part=[1, 1])


def test_training_curve_shows_the_bulk_and_counts_the_rest(draw):
    step, loss = losses(5000)
    loss[[100, 200, 300]] = 1e7, -1e7, np.inf
    loss[400] = np.nan
    figure = training_curve(step, loss, np.linspace(0, 0.5, 5000))
    entries = draw(figure)
    low, high = figure.axes[0].get_ylim()
    shown = int(np.sum((loss >= low) & (loss <= high)))
    assert -LOG_Z - 2 < low < high < -LOG_Z + 10
    assert 5000 - 40 < shown <= 5000 - 4
    assert entries == [f"each step ({5000 - shown} of 5000 outside)", "running median"]


def test_running_median_ignores_outliers_and_follows_the_loss():
    step = np.arange(10_000)
    loss = np.where(step % 50 == 7, 1e9, 100.0 - 0.01 * step)
    median = training_curve(step, loss, np.zeros(10_000)).axes[0].lines[1]
    x, y = median.get_data()
    inside = (x > 200) & (x < 9800)
    np.testing.assert_allclose(y[inside], 100 - 0.01 * x[inside], atol=0.05)


@pytest.mark.parametrize("loss", [[5.0, 5.0], [np.nan, np.inf]])
def test_training_curve_of_constant_or_useless_losses(draw, loss):
    draw(training_curve([1, 2], loss, [1.0, 0.0]))


@pytest.mark.parametrize(("step", "loss"), [([1, 2], [1.0]), ([], []), ([[1, 2]], [[1.0, 2.0]])])
def test_training_curve_rejects_other_shapes(step, loss):
    with pytest.raises(ValueError, match=r"must be \(steps,\), found"):
        training_curve(step, loss, loss)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (6, 5000)])
def test_charge_history_of_any_shape(draw, shape):
    charge = np.rint(np.random.default_rng(5).normal(0, 1.5, shape)) + 1e-5
    figure = charge_history(charge)
    assert draw(figure) == ["all chains"]
    chains, draws = shape
    assert len(figure.axes) == min(chains, 4) + 1
    assert figure.axes[-2].get_xlabel() == ("draw (one in 3 shown)" if draws == 5000 else "draw")
    assert figure.axes[0].get_title(loc="right") == f"chain 0 of {chains}"


def test_charge_distribution_is_normalised_and_has_the_error_of_independent_draws():
    """Draws are independent, so the bars are binomial; the Gamma method scatters about that by a few per cent."""
    charge = np.random.default_rng(6).integers(-2, 4, (2, 20_000))
    axes = charge_history(charge).axes[-1]
    frequency, edges, _ = axes.patches[0].get_data()
    np.testing.assert_array_equal(edges, np.arange(-2, 5) - 0.5)
    np.testing.assert_array_equal(frequency, np.unique(charge, return_counts=True)[1] / charge.size)
    lengths = [np.ptp(segment[:, 1]) / 2 for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(lengths, np.sqrt(5 / 36 / charge.size), rtol=0.2)


def test_exact_distribution_shows_the_sectors_a_frozen_chain_misses(draw):
    exact = {q: 0.4 * np.exp(-(q**2) / 2) for q in range(-9, 10)}
    figure = charge_history(np.zeros((2, 500)), exact=exact)
    assert draw(figure) == ["all chains", "exact"]
    axes = figure.axes[-1]
    assert list(axes.lines[-1].get_xdata()) == [-3, -2, -1, 0, 1, 2, 3]
    assert axes.get_xlim() == (-4, 4)
    assert all(segment.size == 0 for segment in axes.collections[0].get_segments())


@pytest.mark.parametrize(
    ("charge", "message"),
    [
        (np.zeros(5), r"charge must be \(chain, draw\), found shape \(5,\)"),
        (np.zeros((2, 0)), r"found shape \(2, 0\)"),
        (np.array([[0.0, 1.0, 0.3]]), r"charge must not hold 0.3, found at index \(0, 2\)"),
        (np.array([[0.0, np.inf]]), r"charge must not hold inf, found at index \(0, 1\)"),
    ],
)
def test_charge_history_rejects(charge, message):
    with pytest.raises(ValueError, match=message):
        charge_history(charge)


def test_autocorrelation_marks_the_quoted_window(draw, result):
    figure = autocorrelation(result, name="topological_charge2")
    (entry,) = draw(figure)
    assert entry.startswith("topological_charge2: ")
    assert f"$W$ = {result.window}" in entry
    assert "not converged" not in entry
    left, right = figure.axes
    assert "1/2 + \\sum" in right.get_ylabel()
    assert "rho" in left.get_ylabel()
    for axes in (left, right):
        assert list(axes.lines[1].get_xdata()) == [result.window, result.window]
    assert right.lines[2].get_xydata().tolist() == [[result.window, result.tau_int]]


def test_the_band_at_the_window_is_the_quoted_error(result):
    right = autocorrelation(result, name="plaquette").axes[1]
    (band,) = (entry for entry in right.collections if isinstance(entry, FillBetweenPolyCollection))
    vertices = band.get_paths()[0].vertices
    heights = vertices[vertices[:, 0] == result.window][:, 1]
    assert np.ptp(heights) / 2 == pytest.approx(result.tau_int_error)


def test_autocorrelation_overlays_four_results_of_unlike_memory(draw):
    series = {f"a = {a}": ar1(a, 20_000, seed=8) for a in (-0.5, 0.0, 0.9, 0.98)}
    figure = autocorrelation({name: stats.gamma_method(a) for name, a in series.items()}, name="8 x 8")
    assert [entry.split(":")[0] for entry in draw(figure)] == list(series)
    assert figure.legends[0].get_title().get_text() == "8 x 8"
    assert figure.axes[0].get_xscale() == "symlog"


def test_autocorrelation_of_degenerate_series(draw):
    constant = stats.gamma_method(np.ones(50))
    assert draw(autocorrelation(constant, name="constant"))[0].endswith("not converged")
    slow = stats.gamma_method(ar1(0.9, 4000, seed=9), tau_exp=20.0)
    draw(autocorrelation({"constant": constant, "drift": stats.gamma_method(np.arange(60.0)), "slow": slow}))


@pytest.mark.parametrize("count", [0, 5])
def test_autocorrelation_takes_one_to_four_results(result, count):
    with pytest.raises(ValueError, match=f"1 to 4 results, found {count}"):
        autocorrelation({str(i): result for i in range(count)})


def test_weight_histogram_counts_every_proposal(draw):
    rng = np.random.default_rng(10)
    flow, baseline = rng.normal(-60, 1, (2, 4000)), rng.normal(-62, 2, 5000)
    figure = weight_histogram(flow, baseline=baseline, ess=0.41, baseline_ess=0.2871)
    first, second, mean = draw(figure)
    assert first == "flow proposals: ESS$/N$ = 0.41, $N$ = 8000"
    assert second == "training-free baseline: ESS$/N$ = 0.287, $N$ = 5000"
    assert "w" in mean
    (axes,) = figure.axes
    assert [patch.get_data().values.sum() for patch in axes.patches] == [8000, 5000]
    assert axes.get_yscale() == "log"


def test_weight_histogram_is_centred_on_the_mean_weight_of_all_proposals():
    logs = np.log([1.0] * 900 + [4.0] * 99) - 700
    logs = np.append(logs, -np.inf)
    counts, edges, _ = weight_histogram(logs).axes[0].patches[0].get_data()
    filled = np.flatnonzero(counts)
    assert list(counts[filled]) == [900, 99]
    shift = np.log((900 + 4 * 99) / 1000)
    for index, value in zip(filled, (-shift, np.log(4) - shift), strict=True):
        assert edges[index] <= value <= edges[index + 1]


def test_weight_histogram_names_zero_weights_and_outliers(draw):
    logs = np.random.default_rng(11).normal(0, 1, 1000)
    logs[:3], logs[3:5] = -np.inf, -1e6
    figure = weight_histogram(logs)
    assert draw(figure)[0].endswith(f"= {stats.ess(logs):.3g}, $N$ = 1000, 3 at $w = 0$, 2 left of the axis")
    assert figure.axes[0].get_xlim()[0] > -20


@pytest.mark.parametrize("logs", [[3.0], np.full(100, -1e4), [-np.inf, 0.0]])
def test_weight_histogram_of_degenerate_weights(draw, logs):
    draw(weight_histogram(logs, baseline=logs))


def test_weight_histogram_rejects_what_has_no_mean_weight():
    with pytest.raises(ValueError, match="every weight is zero"):
        weight_histogram([-np.inf, -np.inf])


MEANS = {"plaquette": [(0.70, 0.01), (0.69, 0.02), (0.71, 0.01)], "charge": [(1.0, 0.2), (1.2, 0.1), (1.1, 0.1)]}
LABELS = ["hmc", "hmc + winding", "flow"]


def saved(figure, tmp_path):
    save(figure, tmp_path / "figure.png")
    assert np.ptp(imread(tmp_path / "figure.png")[..., :3]) > 0.9
    assert_text_is_inside(figure)
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points(axes):
    """The points of the error bars, by their height from the top."""
    (bars,) = axes.containers
    x, y = bars.lines[0].get_data()
    return dict(zip((2 - np.asarray(y)).astype(int).tolist(), np.asarray(x).tolist(), strict=True))


def test_comparison_has_a_panel_for_each_observable(tmp_path):
    figure = comparison(LABELS, MEANS, {"plaquette": [10, 20, 900]}, exact={"plaquette": 0.6977, "log_z": 3.0})
    assert saved(figure, tmp_path) == ["exact", "plaquette"]
    assert [axes.get_title() for axes in panels(figure)] == [*MEANS, "effective samples per CPU second"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == LABELS
    for axes, values in zip(figure.axes, MEANS.values(), strict=False):
        assert points(axes) == {i: mean for i, (mean, _) in enumerate(values)}
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"] == [0.6977]
    assert not [line for line in figure.axes[1].lines if line.get_linestyle() == "--"]


def test_comparison_shows_errors_and_rates(tmp_path):
    figure = comparison(LABELS, MEANS, {"plaquette": [10, 20, 900], "charge": [1, 2, 3]})
    assert saved(figure, tmp_path) == ["plaquette", "charge"]
    (bars,) = figure.axes[0].containers
    ends = [segment[:, 0] for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[0.69, 0.71], [0.67, 0.71], [0.70, 0.72]])
    rates = panels(figure)[-1]
    assert [list(line.get_xdata()) for line in rates.lines] == [[10, 20, 900], [1, 2, 3]]
    assert [list(line.get_ydata()) for line in rates.lines] == [[2, 1, 0]] * 2
    assert rates.get_xscale() == "log"


def test_comparison_leaves_out_what_is_not_finite(tmp_path):
    means = {"plaquette": [(0.7, 0.01), (np.nan, np.nan), (0.71, np.inf)], "mass": [(np.nan, np.nan)] * 3}
    figure = comparison(LABELS, means, {"plaquette": [np.nan, 3.0, np.nan]}, exact={"plaquette": 0.7})
    saved(figure, tmp_path)
    assert points(figure.axes[0]) == {0: 0.7}
    assert points(figure.axes[1]) == {}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == LABELS


@pytest.mark.parametrize("rates", [[5.0], [np.nan]])
def test_comparison_of_one(tmp_path, rates):
    figure = comparison(["hmc"], {"plaquette": [(0.7, 0.01)]}, {"plaquette": rates})
    assert saved(figure, tmp_path) == ["plaquette"]
    assert len(panels(figure)) == 2
    assert panels(figure)[-1].get_xscale() == "linear"


@pytest.mark.parametrize(("count", "rows"), [(2, 1), (3, 2), (7, 3)])
def test_comparison_has_rows_of_three_panels(tmp_path, count, rows):
    means = {f"observable {i}": [(1.0 * i, 0.1), (1.1 * i, 0.1)] for i in range(count)}
    figure = comparison(LABELS[:2], means, {"observable 0": [1.0, 2.0]})
    saved(figure, tmp_path)
    assert len(figure.axes) == 3 * rows
    assert [axes.get_title() for axes in panels(figure)] == [*means, "effective samples per CPU second"]
    for axes in figure.axes[::3]:
        assert [label.get_text() for label in axes.get_yticklabels()] == LABELS[:2]


@pytest.mark.parametrize(
    ("labels", "means", "rates"),
    [
        (["one"], MEANS, {}),
        (LABELS, {"plaquette": [(0.7, 0.1)] * 2}, {}),
        (LABELS, MEANS, {"plaquette": [1.0]}),
        (LABELS, {}, {}),
        (LABELS, {}, {"plaquette": [1.0, 2.0, 3.0]}),
    ],
)
def test_comparison_rejects_other_numbers(labels, means, rates):
    with pytest.raises(ValueError, match=f"must hold {len(labels)} values"):
        comparison(labels, means, rates)


def test_comparison_without_rates(tmp_path):
    comparison(LABELS, MEANS, {})


def test_comparison_names_the_exact_line_of_any_panel(tmp_path):
    assert saved(comparison(LABELS, MEANS, {}, exact={"charge": 1.1}), tmp_path) == ["exact"]


def test_comparison_draws_every_rate_or_refuses(tmp_path):
    rates = {name: [1.0, 2.0, 3.0] for name in "abcd"}
    assert saved(comparison(LABELS, MEANS, rates), tmp_path) == list("abcd")
    with pytest.raises(ValueError, match="at most 4"):
        comparison(LABELS, MEANS, rates | {"e": [1.0, 2.0, 3.0]})


def test_save_keeps_the_old_file_when_it_fails(tmp_path, result, monkeypatch):
    figure, path = autocorrelation(result), tmp_path / "rho.png"
    path.write_bytes(b"old")

    def fail_half_way(target, **settings):
        target.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", fail_half_way)
    with pytest.raises(OSError, match="no space"):
        save(figure, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rho.png"]
    assert path.read_bytes() == b"old"


def test_save_follows_the_name(tmp_path, result):
    figure = autocorrelation(result)
    save(figure, str(tmp_path / "rho.pdf"))
    assert (tmp_path / "rho.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="nonsense"):
        save(figure, tmp_path / "rho.nonsense")


def test_the_global_state_of_matplotlib_is_left_alone(result, tmp_path):
    before = dict(matplotlib.rcParams)
    save(autocorrelation(result, name="plaquette"), tmp_path / "rho.png")
    assert dict(matplotlib.rcParams) == before


# ---------------------------------------------------------------- pieces


def fits(pieces, evaluations=11):
    step = np.tile(np.arange(evaluations) * 50, pieces)
    piece = np.repeat(np.arange(pieces), evaluations)
    return piece, step, 1 + piece + np.exp(-step / 100) + 0.01 * (step - 400) ** 2 / 400**2


@pytest.mark.parametrize(
    ("pieces", "entries"), [(1, ["piece 0"]), (4, [f"piece {k}" for k in range(4)]), (20, ["20 pieces"])]
)
def test_fit_curves_name_a_few_pieces(draw, pieces, entries):
    piece, step, held_out = fits(pieces)
    figure = fit_curves(piece, step, held_out)
    assert draw(figure) == entries
    curves, marks = figure.axes[0].lines[::2], figure.axes[0].lines[1::2]
    assert len(curves) == len(marks) == pieces
    for k, mark in enumerate(marks):
        own = held_out[piece == k]
        assert mark.get_xydata().tolist() == [[step[own.argmin()], own.min()]]


def test_fit_curves_of_losses_that_are_not_finite(draw):
    draw(fit_curves([0, 0, 0], [0, 1, 2], [np.inf, 1.5, np.nan]))
    assert len(fit_curves([0, 0, 1], [0, 1, 0], [1.0, 2.0, np.nan]).axes[0].lines) == 3


def test_fit_curves_reject_other_shapes():
    with pytest.raises(ValueError, match=r"must be \(evaluations,\), found \(2,\), \(3,\), \(3,\)"):
        fit_curves([0, 0], [0, 1, 2], [1.0, 1.0, 1.0])


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_planar_pieces(draw, pieces):
    random = np.random.default_rng(1)
    label = np.arange(3000) % pieces
    centres = 4.0 * np.stack([np.cos(np.arange(pieces)), np.sin(np.arange(pieces))], axis=1)
    points = centres[label] + random.normal(size=(3000, 2))
    x, y = np.linspace(-7, 7, 40), np.linspace(-8, 8, 50)
    cells = np.stack(np.meshgrid(x, y), axis=-1)[:, :, None] - centres
    density = np.exp(-0.5 * (cells**2).sum(-1)).mean(-1) / (2 * np.pi)
    figure = planar_pieces(points, label, (x, y), density, density * 0.9)
    assert draw(figure) == ["target, 1/10 of the target's peak", "sampler, 1/10 of the target's peak"]
    left, _ = figure.axes
    assert [text.get_text() for text in left.texts] == [str(k) for k in range(pieces)]
    assert sum(len(line.get_xdata()) for line in left.lines) >= 1000
    assert all(len(line.get_xdata()) <= plots.MOST_POINTS for line in left.lines)


def test_planar_pieces_reject_other_shapes():
    x, y = np.arange(3.0), np.arange(4.0)
    good = {"points": np.zeros((5, 2)), "label": np.zeros(5), "target": np.ones((4, 3)), "sampler": np.ones((4, 3))}
    for wrong in ({"points": np.zeros((5, 3))}, {"label": np.zeros(4)}, {"target": np.ones((3, 4))}):
        with pytest.raises(ValueError, match="expected points"):
            planar_pieces(grid=(x, y), **{**good, **wrong})
