"""What a gradient is worth: the noise of each estimator at the same weights, and the ESS that equal CPU time buys."""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from rows import Row
from timing import Clock, medians
from training_models import ESTIMATORS, paper_config, readme_config, trainer_of

from latticeflow.config.building import build_action
from latticeflow.config.schema import Config
from latticeflow.samplers import Sampler
from latticeflow.stats import ess, ess_error, pareto_k
from latticeflow.streams import stream
from latticeflow.training import StepRecord, Trainer, TrainingError, make_estimator
from latticeflow.training.estimators import Estimator

STAGES = (0.0, 0.1, 1.0)
MODELS = {"README": readme_config, "paper": paper_config}
LOCAL = ["sampler.flow.conditioner=local", "sampler.flow.hidden=[32,32]"]


def variance_rows(model: str, steps: int, batches: int, overrides: Sequence[str]) -> Iterator[Row]:
    """Train a model with the path estimator; yield the noise of all estimators at the start, at a tenth and at the end.

    All see the same weights and the same draws of `batches` batches.
    """
    schedule = [f"training.steps={steps}", f"training.window={max(1, min(50, steps // 10))}"]
    trainer = trainer_of(MODELS[model](8, "path", [*schedule, *overrides]))
    weights = {0.0: deepcopy(trainer.sampler.state_dict())}

    def keep(trainer: Trainer, record: StepRecord) -> None:
        if record.step == max(1, round(STAGES[1] * steps)):
            weights[STAGES[1]] = deepcopy(trainer.sampler.state_dict())

    trainer.run(keep)
    weights[1.0] = deepcopy(trainer.sampler.state_dict())
    for stage, state in weights.items():
        trainer.sampler.load_state_dict(state)
        rows = {name: noise(trainer, make_estimator(name), batches) for name in ESTIMATORS[:3]}
        squared = min(rows.values(), key=lambda row: row["trace"])["squared_mean"]
        for name, row in rows.items():
            where = {"model": model, "stage": stage, "estimator": name, "steps": steps, "batches": batches}
            relative = row["trace"] / squared if squared > 0 else None
            yield {**where, "batch": trainer.settings.batch, **row, "relative": relative}


def noise(trainer: Trainer, estimator: Estimator, batches: int) -> Row:
    """Return the trace of the gradient's covariance and the square of its mean, both without bias.

    Typical is the median of the squared gradient, which rare huge ones do not move.
    """
    total, squares, log_weights, clock = 0.0, [], [], Clock(trainer.device.type)
    began = clock.now()
    for number in range(batches):
        generator = stream(0, "variance", number, device=trainer.device)
        trainer.sampler.zero_grad()
        surrogate, log_weight = estimator(trainer.sampler, trainer.action, trainer.settings.batch, generator)
        surrogate.backward()
        gradient = torch.cat([p.grad.flatten().double() for p in trainer.sampler.parameters() if p.grad is not None])
        total = total + gradient
        squares.append(float(gradient @ gradient))
        log_weights.append(log_weight)
    mean = total / batches
    trace = batches / (batches - 1) * (math.fsum(squares) / batches - float(mean @ mean))
    return {
        "trace": trace,
        "squared_mean": float(mean @ mean) - trace / batches,
        "typical": sorted(squares)[batches // 2],
        "largest": max(squares),
        "seconds": (clock.now() - began) / batches,
        "ess": ess(torch.cat(log_weights).cpu().numpy()),
    }


def equal_time(size: int, estimator: str, seconds: float, seed: int, overrides: Sequence[str]) -> Row:
    """Train the README's model with local conditioners for so many seconds of CPU; return the ESS/N of its proposals.

    The learning-rate schedule is as long as the steps that fit, by the time of trial steps.
    """
    chosen = [*LOCAL, f"run.seed={seed}", *overrides]
    trainer = trainer_of(readme_config(size, estimator, chosen), estimator)
    clock = Clock(trainer.device.type)
    steps = max(1, int(seconds / (1.05 * medians({"step": trainer.trial_step}, clock)["step"])))
    schedule = [f"training.steps={steps}", f"training.window={min(50, steps)}"]
    trainer = trainer_of(readme_config(size, estimator, [*chosen, *schedule]), estimator)
    row: Row = {"L": size, "estimator": estimator, "budget": seconds, "seed": seed, "steps": steps}
    began = clock.now()
    try:
        trainer.run()
    except TrainingError as error:
        row["failed"] = str(error)
    row |= {"seconds": clock.now() - began, "skipped": sum(record.skipped for record in trainer.records)}
    return row | weigh(trainer.sampler.double(), readme_config(size, estimator, chosen))


@torch.no_grad()
def weigh(sampler: Sampler, config: Config, proposals: int = 4096, chunk: int = 256) -> Row:
    """Return the quality of fresh proposals under the action that chains accept and reject with."""
    device = next(sampler.parameters()).device
    action, generator, parts = build_action(config), stream(1, "proposals", device=device), []
    for _ in range(proposals // chunk):
        x, log_q = sampler.sample(chunk, generator)
        parts.append((-action(x.double()) - log_q).cpu())
    log_weight = torch.cat(parts).numpy()
    return {"ess": ess(log_weight), "ess_error": ess_error(log_weight), "pareto_k": pareto_k(log_weight)}


def untrained(size: int, overrides: Sequence[str]) -> Row:
    """Return the quality of the prior's own draws."""
    config = readme_config(size, overrides=[*LOCAL, *overrides])
    sampler = trainer_of(config).sampler.double()
    for parameter in sampler.parameters():
        torch.nn.init.zeros_(parameter)
    row = {"L": size, "estimator": "none", "budget": 0.0, "seed": 0, "steps": 0, "seconds": 0.0, "skipped": 0}
    return {**row, **weigh(sampler, config)}
