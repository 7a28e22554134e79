"""Frozen chains are flagged, chains that rightly stay where they are are not."""

import numpy as np
import pytest

from latticeflow.cli.sectors import Fraction, judge_sectors, pulls, sector_fractions, weighted_fractions
from latticeflow.exact import u1_charge_distribution

CHARGES, EXACT = u1_charge_distribution(2.0, (4, 4))
EXPECTED = {int(q): Fraction(float(p), 0.0) for q, p in zip(CHARGES, EXACT, strict=True)}


def draws(shape, *, seed, hold=0.0):
    """Charges `(chain, draw)` of the exact distribution, each kept from the draw before with probability `hold`."""
    random = np.random.default_rng(seed)
    fresh = random.choice(CHARGES, size=shape, p=EXACT / EXACT.sum()).astype(float)
    kept = random.random(shape) < hold
    kept[:, 0] = False
    last = np.maximum.accumulate(np.where(kept, 0, np.arange(shape[1])), axis=1)
    return np.take_along_axis(fresh, last, axis=1)


def test_independent_draws_are_not_flagged():
    """60 sets of 4096; the three to five sectors that count give 3e-4 each if normal, so one alarm is allowed."""
    alarms = sum(judge_sectors(draws((16, 256), seed=seed), EXPECTED, "it").frozen for seed in range(60))
    assert alarms <= 1


def test_correlated_draws_are_not_flagged_for_sectors_that_are_visited_often():
    """tau_int = 4.5, 4096 draws; no sector that counts has less than 500 visits."""
    reports = [judge_sectors(draws((16, 256), seed=seed, hold=0.8), EXPECTED, "it") for seed in range(60)]
    assert sum(report.frozen for report in reports) <= 1


def test_correlated_draws_are_not_flagged_for_a_rare_sector():
    """tau_int = 9.5, 16384 draws: 22 in Q = 2 are expected, but of one or two independent visits."""
    reports = [judge_sectors(draws((16, 1024), seed=seed, hold=0.9), EXPECTED, "it") for seed in range(40)]
    assert sum(report.frozen for report in reports) <= 2


def test_one_sector_is_flagged_twice():
    report = judge_sectors(np.zeros((8, 64)), EXPECTED, "the exact distribution")
    assert report.frozen
    assert report.changes == 0
    never, off = report.warnings
    assert "never changed" in never
    assert "frozen in Q = 0" in never
    assert "the exact distribution" in off
    assert all(f"Q = {q} by" in off for q in (-1, 0, 1))
    assert "Q = 2 by" not in off  # 0.7 draws expected


def test_several_sectors_without_changes():
    charge = np.repeat([[-1.0], [0.0], [0.0], [1.0]], 100, axis=1)
    (text,) = judge_sectors(charge, {}, "").warnings
    assert "the sectors where they started" in text


@pytest.mark.parametrize(("changes", "frozen"), [(19, True), (20, False)])
def test_few_changes_are_counted(changes, frozen):
    charge = np.zeros((2, 400))
    charge[0, 1 : 2 * changes + 1] = np.arange(2 * changes) // 2 % 2 * 2 - 1.0
    charge[0, 2 * changes :] = charge[0, 2 * changes]
    report = judge_sectors(charge, {}, "")
    assert report.changes == changes
    assert report.frozen is frozen
    assert [f"only {changes} times" in text for text in report.warnings] == [True] * frozen


@pytest.mark.parametrize("error", [0.0, 1e-4])
def test_sectors_that_are_rightly_absent(error):
    """Deep in the confined phase of a small volume all charges are 0, and the chains may stay there."""
    expected = {-1: Fraction(1e-5, error / 10), 0: Fraction(1 - 2e-5, error / 10), 1: Fraction(1e-5, error / 10)}
    report = judge_sectors(np.zeros((16, 256)), expected, "the exact distribution")
    assert not report.frozen
    assert report.warnings == ()


def test_a_sector_that_should_not_be_there_is_flagged():
    charge = np.where(np.random.default_rng(5).random((16, 256)) < 0.02, 3.0, 0.0)
    report = judge_sectors(charge, {0: Fraction(1.0, 0.0)}, "it")
    assert "Q = 3 by +" in report.warnings[-1]


def test_a_lopsided_flow_is_flagged_though_it_moves():
    """Half the weight of Q = -1 is missing."""
    charge = draws((16, 256), seed=7)
    charge[:, ::2] = np.abs(charge[:, ::2])
    report = judge_sectors(charge, EXPECTED, "it")
    assert report.changes > 1000
    assert "Q = -1 by -" in report.warnings[0]
    assert "Q = 1 by +" in report.warnings[0]


def test_pulls_are_in_units_of_both_errors():
    found, expected = {0: Fraction(0.7, 0.03), 1: Fraction(0.3, 0.03)}, {0: Fraction(0.6, 0.04), 1: Fraction(0.4, 0.04)}
    result = pulls(found, expected, draws=1000)
    assert result == pytest.approx({0: 0.1 / 0.05, 1: -0.1 / 0.05})


def test_the_error_of_a_pull_is_at_least_the_binomial_one():
    result = pulls({0: Fraction(1.0, 0.0)}, {0: Fraction(0.9, 0.0), 1: Fraction(0.1, 0.0)}, draws=400)
    assert result == pytest.approx({0: 0.1 / 0.015, 1: -0.1 / 0.015})


def test_only_sectors_with_ten_visits_count():
    found, expected = (
        {0: Fraction(1.0, 0.0)},
        {0: Fraction(0.97, 0.0), 1: Fraction(0.021, 0.0), 2: Fraction(0.009, 0.0)},
    )
    assert set(pulls(found, expected, draws=1000)) == {0, 1}
    assert set(pulls(found, expected, draws=2000)) == {0, 1, 2}


def test_nothing_expected_pulls_nothing():
    assert pulls({0: Fraction(1.0, 0.0)}, {}, draws=1000) == {}


def test_fractions_are_those_of_the_draws():
    charge = draws((8, 500), seed=3)
    found = sector_fractions(charge)
    assert sum(fraction.value for fraction in found.values()) == pytest.approx(1.0)
    assert found[0].value == (charge == 0).mean()
    naive = np.sqrt(found[0].value * (1 - found[0].value) / charge.size)
    assert found[0].error == pytest.approx(naive, rel=0.4)


def test_weighted_fractions_are_of_the_target():
    """Uniform charges with the weights of the exact distribution; 4 sigma, four sectors: 3e-4."""
    charge = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], size=4000)
    logs = np.log([EXPECTED[int(q)].value for q in charge])
    found, total = weighted_fractions(charge, logs), sum(EXPECTED[q].value for q in (-1, 0, 1))
    for q, fraction in found.items():
        assert 0 < fraction.error < 0.02
        assert abs(fraction.value - EXPECTED[q].value / total) < 4 * fraction.error
