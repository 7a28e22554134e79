"""Defaults that depend on the theory: the training-free proposal, and the baseline of gauge theories."""

from collections.abc import Mapping
from typing import Any

from latticeflow.config.families import DENSITIES, GAUGE_THEORIES

UNORDERED = {"conditioner": "dense", "mask": "random"}
"""Couplings of variables that are no lattice."""
CLUSTERS = {"clusterer": "kmeans", "smallest_cluster": 100}
SEARCH, DBSCAN = {"most_clusters": 20}, {"noise": "refuse"}
FITS = {"validation": 0.2, "patience": 10, "evaluate_every": 50, "processes": 1}
"""Pieces that are clusters: how they are cut, and how their flows are fitted."""
STAGES = {"fine_tuning": 1 / 3}
"""Trainings whose last steps are of another kind."""
PARTS = {"schedule": "alternate", **STAGES}
"""Flows that are trained by parts."""


def with_theory_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections with sampler, prior, flow and baseline filled in where they are absent.

    A gauge theory gets the quenched prior and a baseline, any other the normal prior; both get the identity as flow. A
    stabilised sampler gets the student-t prior, and couplings of a density dense conditioners and random masks. Pieces
    that are clusters get the settings of clustering and fits, a training by parts its schedule, an energy-based flow
    linear layers.
    """
    theory = _theory(data.get("action"))
    gauge, couplings = theory in GAUGE_THEORIES, UNORDERED if theory in DENSITIES else {}
    filled = dict(data)
    sampler = data.get("sampler", {})
    if isinstance(sampler, dict):
        stabilised = sampler.get("kind") == "stabilised"
        prior = "quenched" if gauge else "student_t" if stabilised else "normal"
        default = "linear" if sampler.get("kind") == "ebflow" else "identity"
        flow = couplings if stabilised else {"kind": "flow", "flow": {"kind": default}}
        filled["sampler"] = {**flow, "prior": {"kind": prior}, **sampler}
        chosen = sampler.get("flow")
        if isinstance(chosen, dict) and chosen.get("kind") == "coupling":
            filled["sampler"]["flow"] = {**couplings, **chosen}
    if gauge and data.get("baseline") is None:
        filled["baseline"] = {}
    return _with_parts(_with_clusters(filled))


def _with_clusters(filled: dict[str, Any]) -> dict[str, Any]:
    sampler, training = filled.get("sampler"), filled.get("training")
    if not isinstance(sampler, dict) or (sampler.get("kind"), sampler.get("pieces")) != ("piecewise", "clusters"):
        return filled
    clusterer = sampler.get("clusterer", CLUSTERS["clusterer"])
    own = DBSCAN if clusterer == "dbscan" else SEARCH if clusterer == "kmeans" and "clusters" not in sampler else {}
    filled["sampler"] = {**CLUSTERS, **own, **sampler}
    if isinstance(training, dict):
        filled["training"] = {**FITS, **training}
    return filled


def _with_parts(filled: dict[str, Any]) -> dict[str, Any]:
    training = filled.get("training")
    if isinstance(training, dict) and training.get("parts") is not None:
        filled["training"] = {**PARTS, **training}
    elif isinstance(training, dict) and training.get("fine_tuning_estimator") is not None:
        filled["training"] = {**STAGES, **training}
    return filled


def _theory(action: object) -> str | None:
    kind = action.get("kind") if isinstance(action, dict) else getattr(action, "kind", None)
    return kind if isinstance(kind, str) else None
