"""Checks between keys of flows that are trained by parts, as in `latticeflow.config.checks`."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from latticeflow.config.problems import Problem, refused, written
from latticeflow.flows.coupling import CYCLE as COUPLING_CYCLE
from latticeflow.flows.gauge import CYCLE as GAUGE_CYCLE
from latticeflow.training.estimators import SCORE_ESTIMATORS
from latticeflow.training.schedule import END_TO_END

OF_STAGES = ("fine_tuning", "fine_tuning_rate")
"""What training by parts has, and training whose last steps are by another estimator."""
OF_PARTS = ("schedule", *OF_STAGES, "learning_rates")
MOST_PLACES = 6

Values = Mapping[str, Any]


class Layers(NamedTuple):
    """The key that has a flow's number of layers, and the layers after which every variable has moved."""

    path: str
    cycle: int


LAYERS = {
    "gauge": Layers("sampler.flow.layers", GAUGE_CYCLE),
    "coupling": Layers("sampler.flow.layers", COUPLING_CYCLE),
    "autoregressive": Layers("sampler.flow.blocks", 1),
    "stabilised": Layers("sampler.layers", COUPLING_CYCLE),
}
"""By the kind of the flow, or of the sampler that is one."""


def part_keys(values: Values) -> list[Problem]:
    """A flow that is not cut has no parts to take turns."""
    if values["training.parts"] is not None:
        return []
    without = "no such key without training.parts"
    problems = list(refused(values, "training", [key for key in OF_PARTS if key not in OF_STAGES], without))
    if values["training.fine_tuning_estimator"] is None:
        problems += refused(values, "training", OF_STAGES, f"{without} or training.fine_tuning_estimator")
    return problems


def parts_sampler(values: Values) -> list[Problem]:
    """One flow with layers is cut."""
    parts, kind = values["training.parts"], values["sampler.kind"]
    if parts is None:
        return []
    if kind in ("piecewise", "ebflow"):
        expected = f'no such key for sampler.kind = {written(kind)} (only the flow of "flow" or "stabilised" is cut)'
        return [Problem("training.parts", expected, written(parts))]
    flow = values["sampler.flow.kind"] if kind == "flow" else kind
    if flow not in LAYERS:
        known = ", ".join(map(written, LAYERS))
        reason = "there are no layers to cut" if flow == "identity" else f"those that are cut are {known}"
        expected = f"no such key for sampler.flow.kind = {written(flow)} ({reason})"
        return [Problem("training.parts", expected, written(parts))]
    return []


def parts_estimator(values: Values) -> list[Problem]:
    """What is before a part has no score that the part could carry."""
    parts, estimator = values["training.parts"], values["training.estimator"]
    if parts is None or estimator not in SCORE_ESTIMATORS or values["training.schedule"] == END_TO_END:
        return []
    expected = "an estimator of a Kullback-Leibler divergence for training by parts (scores are those of whole flows)"
    return [Problem("training.estimator", expected, written(estimator))]


def parts_layers(values: Values) -> list[Problem]:
    """The parts are the whole flow, cut where every variable has moved equally often."""
    parts, kind = values["training.parts"], values["sampler.kind"]
    name = values["sampler.flow.kind"] if kind == "flow" else kind
    if parts is None or name not in LAYERS:
        return []
    path, cycle = LAYERS[name]
    layers, noun = values[path], path.rpartition(".")[2]
    *cuts, total = accumulate(parts)
    if total != layers:
        expected = f"integers that add up to {path} = {layers}"
        return [Problem("training.parts", expected, f"{written(parts)}, which add up to {total}")]
    if all(cut % cycle == 0 for cut in cuts):
        return []
    expected = f"cuts after multiples of {cycle} {noun}, when every variable has moved"
    found = f"{written(parts)}, cut after {written(cuts)}"
    return [Problem("training.parts", expected, found, _places(range(cycle, layers, cycle), noun))]


def parts_in_turn(values: Values) -> list[Problem]:
    """A single part is the whole flow."""
    parts, schedule = values["training.parts"], values["training.schedule"]
    if parts is None or len(parts) > 1 or schedule == END_TO_END:
        return []
    expected = f"{written(END_TO_END)} for a single part, training.parts = {written(parts)}"
    return [Problem("training.schedule", expected, written(schedule))]


def part_rates(values: Values) -> list[Problem]:
    """Each part has one learning rate."""
    parts, rates = values["training.parts"], values["training.learning_rates"]
    if parts is None or rates is None or len(rates) == len(parts):
        return []
    expected = f"{len(parts)} numbers, one for each of training.parts = {written(parts)}"
    return [Problem("training.learning_rates", expected, written(rates))]


def _places(cuts: range, noun: str) -> str:
    if not cuts:
        return "there is no place for a cut"
    shown = [*cuts] if len(cuts) <= MOST_PLACES else [*cuts[: MOST_PLACES // 2], "...", cuts[-1]]
    return f"cuts may come after {', '.join(map(str, shown))} {noun}"


PART_CHECKS = (part_keys, parts_sampler, parts_estimator, parts_layers, parts_in_turn, part_rates)
