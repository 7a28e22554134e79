"""When weights are not to be trusted."""

import numpy as np
import pytest

from latticeflow.cli.weighing import ForwardReport, WeightReport, weigh, weigh_forward, weight_warnings


def weights(ess=0.5, error=0.01, k=0.2):
    return WeightReport(1000, ess, error, 1.0, 0.01, 0.6, 0.01, k)


def forward(ess, error=0.01):
    return ForwardReport("a reference", 1000, ess, error, 1.0, 0.01)


def test_good_weights_are_not_flagged():
    assert weight_warnings(weights(), forward(0.49), weights(0.2)) == []


def test_no_proposals_no_warnings():
    assert weight_warnings(None, None, weights(0.9)) == []


@pytest.mark.parametrize(("k", "flagged"), [(0.7, False), (0.71, True), (float("inf"), True), (float("-inf"), False)])
def test_a_heavy_tail_is_flagged(k, flagged):
    assert ["heavy tail" in text for text in weight_warnings(weights(k=k), None, None)] == [True] * flagged


@pytest.mark.parametrize(("ess", "error", "flagged"), [(1e-9, 1e-9, True), (0.2, 0.01, True), (0.2, 0.1, False)])
def test_a_small_forward_ess_is_flagged_beyond_its_error(ess, error, flagged):
    found = weight_warnings(weights(), forward(ess, error), None)
    assert ["miss a part of the target" in text for text in found] == [True] * flagged


def test_a_flow_worse_than_nothing_is_flagged():
    (text,) = weight_warnings(weights(0.3), None, weights(0.4))
    assert "0.300" in text
    assert "0.400" in text


def test_a_flow_as_good_as_quenched_draws_within_errors_is_not_flagged():
    assert weight_warnings(weights(0.3999), None, weights(0.4)) == []


def test_rounding_is_no_heavy_tail():
    """The weights of a perfect flow, each a last digit off or not."""
    logs = 13.19 + np.spacing(13.19) * np.rint(np.random.default_rng(1).normal(size=512))
    assert weight_warnings(weigh(logs), None, None) == []


def test_a_missed_mode_is_seen_from_the_target_alone():
    """Proposals of one of two modes: reverse ESS 1, forward tiny, log Z from both sides between the two."""
    proposed, visited = np.zeros(512), np.random.default_rng(3).choice([0.0, 30.0], size=(8, 64))
    report = weigh_forward(proposed, visited, source="it", s=2.0)
    assert weigh(proposed).ess == 1
    assert report.ess < 1e-10
    assert report.samples == 512
    assert abs(report.log_z - np.log(2)) < 4 * report.log_z_error
    assert any("miss a part" in text for text in weight_warnings(weights(1.0, 0.0), report, None))


def test_honest_weights_agree_from_both_sides():
    """Normal log weights of variance 1/4: `p` has its mean a variance above `q`; 4 sigma: 2e-4 in all."""
    random = np.random.default_rng(2)
    reverse = weigh(random.normal(-0.125, 0.5, size=8192))
    report = weigh_forward(
        random.normal(-0.125, 0.5, size=8192), random.normal(0.125, 0.5, size=(16, 512)), source="it", s=2.0
    )
    assert abs(reverse.ess - np.exp(-0.25)) < 4 * reverse.ess_error
    assert abs(report.ess - np.exp(-0.25)) < 4 * report.ess_error
    assert abs(report.log_z) < 4 * report.log_z_error
    assert weight_warnings(reverse, report, None) == []
