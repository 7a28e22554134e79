"""Defaults that depend on the theory: the training-free proposal, and the baseline of gauge theories."""

from collections.abc import Mapping
from typing import Any

from latticeflow.config.checks import DENSITIES, GAUGE_THEORIES

UNORDERED = {"conditioner": "dense", "mask": "random"}
"""Couplings of variables that are no lattice."""


def with_theory_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections with sampler, prior, flow and baseline filled in where they are absent.

    A gauge theory gets the quenched prior and a baseline, any other the normal prior; both get the identity as flow. A
    stabilised sampler gets the student-t prior, and couplings of a density dense conditioners and random masks.
    """
    theory = _theory(data.get("action"))
    gauge, couplings = theory in GAUGE_THEORIES, UNORDERED if theory in DENSITIES else {}
    filled = dict(data)
    sampler = data.get("sampler", {})
    if isinstance(sampler, dict):
        stabilised = sampler.get("kind") == "stabilised"
        prior = "quenched" if gauge else "student_t" if stabilised else "normal"
        flow = couplings if stabilised else {"kind": "flow", "flow": {"kind": "identity"}}
        filled["sampler"] = {**flow, "prior": {"kind": prior}, **sampler}
        chosen = sampler.get("flow")
        if isinstance(chosen, dict) and chosen.get("kind") == "coupling":
            filled["sampler"]["flow"] = {**couplings, **chosen}
    if gauge and data.get("baseline") is None:
        filled["baseline"] = {}
    return filled


def _theory(action: object) -> str | None:
    kind = action.get("kind") if isinstance(action, dict) else getattr(action, "kind", None)
    return kind if isinstance(kind, str) else None
