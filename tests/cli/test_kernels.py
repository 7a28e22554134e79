"""What the history of a kernel says: long rejections, and `<exp(-delta_h)> = 1`."""

import numpy as np
import pytest

from latticeflow.cli.kernels import KernelReport, kernel_reports, kernel_warnings
from latticeflow.config.loading import parse_config
from latticeflow.storage import Ensemble


def hmc(value=1.0, error=0.01, *, run=3):
    return {"hmc": KernelReport(0.8, run, value, error, 0.1)}


@pytest.mark.parametrize("value", [0.95, 1.05, float("nan"), float("inf")])
def test_a_broken_identity_is_flagged(value):
    (text,) = kernel_warnings(hmc(value), draws=100)
    assert text.startswith(f"hmc: <exp(-delta_h)> = {value:.4g} is more than 4 sigma from 1")


@pytest.mark.parametrize(("value", "error"), [(1.0, 0.01), (1.039, 0.01), (0.961, 0.01), (1.0, 0.0), (0.5, 0.2)])
def test_the_identity_within_four_sigma_is_not(value, error):
    assert kernel_warnings(hmc(value, error), draws=100) == []


@pytest.mark.parametrize(("run", "flagged"), [(25, False), (26, True)])
def test_a_replica_that_stands_still_for_a_quarter_is_flagged(run, flagged):
    reports = {"independence": KernelReport(0.1, run)}
    assert (
        kernel_warnings(reports, draws=100)
        == [f"independence: one replica stood still for {run} of 100 draws"] * flagged
    )


def test_each_kernel_speaks_for_itself():
    """A winding step may be rejected for long without the chain standing still."""
    reports = hmc(2.0, run=90) | {"winding": KernelReport(0.01, 99)}
    found = kernel_warnings(reports, draws=100)
    assert [text.partition(":")[0] for text in found] == ["hmc", "hmc"]


def test_the_report_is_that_of_the_history(runs):
    with Ensemble.open(runs["winding"] / "ensemble.h5") as ensemble:
        found = kernel_reports(ensemble, parse_config(ensemble.config).chain)
        accepted = {name: ensemble.history(f"accepted_{name}") for name in found}
        weights = np.exp(-ensemble.history("delta_h"))
        tuned = ensemble.analysis()["tuned"]
    assert {name: kernel.acceptance for name, kernel in found.items()} == {
        name: values.mean() for name, values in accepted.items()
    }
    assert found["hmc"].exp_minus_delta_h == pytest.approx(weights.mean())
    assert found["hmc"].step_size == tuned["hmc.step_size"]
    assert found["winding"].exp_minus_delta_h is None
    assert kernel_warnings(found, draws=64) == []
