"""What importance weights say: from proposals (reverse), and from samples of the target (forward)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latticeflow.stats import (
    bennett,
    ess,
    ess_error,
    forward_ess,
    gamma_derived,
    largest_weight,
    log_z,
    pareto_k,
    predicted_acceptance,
)
from latticeflow.storage import Ensemble

PARETO_LIMIT = 0.7
SIGMAS = 3.0


@dataclass(frozen=True)
class WeightReport:
    """What a set of log weights says: ESS/N and log Z with errors, the acceptance it predicts, the weight tail."""

    samples: int
    ess: float
    ess_error: float
    log_z: float
    log_z_error: float
    predicted_acceptance: float
    largest_weight: float
    pareto_k: float


@dataclass(frozen=True)
class ForwardReport:
    """What the weights of target samples say: forward ESS/N, which sees modes that the proposals miss, with its error.

    `log_z` is the Bennett acceptance ratio of both kinds of samples; `source` says where the target samples are from.
    """

    source: str
    samples: int
    ess: float
    ess_error: float
    log_z: float
    log_z_error: float


def weigh(log_weight: NDArray[np.float64]) -> WeightReport:
    """Return the report on one set of independent log weights, any shape."""
    flat = log_weight.ravel()
    value, error = log_z(flat)
    return WeightReport(
        samples=flat.size,
        ess=ess(flat),
        ess_error=ess_error(flat),
        log_z=value,
        log_z_error=error,
        predicted_acceptance=predicted_acceptance(flat),
        largest_weight=largest_weight(flat),
        pareto_k=pareto_k(flat),
    )


def stored_weights(ensemble: Ensemble, name: str) -> WeightReport | None:
    """Return the report on a stored set of proposals, None where there is none of this name."""
    return weigh(ensemble.proposals(name)) if name in ensemble.proposal_names else None


def weigh_forward(
    proposed: NDArray[np.float64], visited: NDArray[np.float64], *, source: str, s: float
) -> ForwardReport:
    """Return the report on log weights of the proposals, any shape, and of target samples `(chain, draw)`.

    Draws at which some density could not be computed are left out.
    """
    visited = visited[:, np.isfinite(visited).all(axis=0)]
    value, error = bennett(proposed.ravel(), visited, correlated=True)
    scaled = [np.exp(visited - visited.max()), np.exp(visited.min() - visited)]
    product = gamma_derived(lambda means: means[0] * means[1], scaled, s=s)
    fraction = forward_ess(visited)
    return ForwardReport(source, visited.size, fraction, fraction * product.error / product.mean, value, error)


def weight_warnings(
    proposals: WeightReport | None, forward: ForwardReport | None, baseline: WeightReport | None
) -> list[str]:
    """Return why the weights, or the flow, should not be trusted, in plain sentences."""
    if proposals is None:
        return []
    found = []
    if proposals.pareto_k > PARETO_LIMIT:
        found.append(
            f"the weights have a heavy tail, Pareto k = {proposals.pareto_k:.2f} > {PARETO_LIMIT}: do not trust ESS"
        )
    if forward is not None and forward.ess < proposals.ess / 2 and _is_below(forward, proposals):
        found.append(
            f"ESS/N is {proposals.ess:.3g} from proposals and {forward.ess:.3g} from target samples: "
            "the proposals miss a part of the target"
        )
    if baseline is not None and _is_below(proposals, baseline):
        found.append(f"the proposals (ESS/N {proposals.ess:.3f}) do not beat quenched draws ({baseline.ess:.3f})")
    return found


def _is_below(one: WeightReport | ForwardReport, other: WeightReport | ForwardReport) -> bool:
    return other.ess - one.ess > SIGMAS * float(np.hypot(one.ess_error, other.ess_error))
