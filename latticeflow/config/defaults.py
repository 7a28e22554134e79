"""Defaults that depend on the theory: the training-free proposal, and the baseline of gauge theories."""

from collections.abc import Mapping
from typing import Any

from latticeflow.config.checks import GAUGE_THEORIES


def with_theory_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections with sampler, prior, flow and baseline filled in where they are absent.

    A gauge theory gets the quenched prior and a baseline, any other the normal prior; both get the identity as flow. A
    stabilised sampler gets the student-t prior.
    """
    gauge = _theory(data.get("action")) in GAUGE_THEORIES
    filled = dict(data)
    sampler = data.get("sampler", {})
    if isinstance(sampler, dict):
        stabilised = sampler.get("kind") == "stabilised"
        prior = "quenched" if gauge else "student_t" if stabilised else "normal"
        flow = {} if stabilised else {"kind": "flow", "flow": {"kind": "identity"}}
        filled["sampler"] = {**flow, "prior": {"kind": prior}, **sampler}
    if gauge and data.get("baseline") is None:
        filled["baseline"] = {}
    return filled


def _theory(action: object) -> object:
    return action.get("kind") if isinstance(action, dict) else getattr(action, "kind", None)
