"""Training by several processes that share every batch: the training of one process, up to the rounding of sums.

All processes draw the same latent variables, or samples and noise, from the same stream for the whole batch; each takes
its rows of them. The baseline of reinforce, the log weights and the gradients are brought together, the latter as a
mean and before they are clipped, so that every process takes the same step. A step in which an ActNorm sees its first
batch is taken by every process with the whole batch.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from torch import Generator, Tensor

from latticeflow.flows import ActNorm
from latticeflow.streams import SharedStream, own_rows
from latticeflow.training.estimators import Estimator, ExplicitScore, OnSamples, leave_one_out, reinforce
from latticeflow.training.team import Alone, Team
from latticeflow.training.trainer import StepRecord, Trainer, TrainingError

OnStep = Callable[[Trainer, StepRecord], None]
END, GO_ON = 0, 1


class _Stopped(Exception):
    """The first process said that there is no next step."""


def run_data_parallel(trainer: Trainer, team: Team, on_step: OnStep | None = None) -> None:
    """Do what `Trainer.run` does, on every process of the team, each with a trainer of the same settings.

    The state is that of the first process (rank 0), which alone calls `on_step`; the others follow until the end and
    leave quietly where it fails there, or where the training does. Raises ValueError for a batch that the processes
    cannot share equally, LostProcessError where one does not answer, TrainingError, on the first, as `Trainer.run`.
    """
    team.share(trainer.settings.batch)
    _join(trainer, team)
    if team.is_first:
        team.spread(trainer.state_dict())
        team.waiting = False
        try:
            trainer.run(partial(_lead, team, on_step))
        except TrainingError:
            team.waiting = True  # the others fail in the same step
            raise
        team.waiting = True
    else:
        trainer.load_state_dict(team.spread(None))
        with suppress(_Stopped, TrainingError):
            trainer.run(partial(_follow, team))


def _lead(team: Team, on_step: OnStep | None, trainer: Trainer, record: StepRecord) -> None:
    word = END
    trainer.cpu_elsewhere += team.taken_elsewhere()
    try:
        if on_step is not None:
            on_step(trainer, record)
        word = GO_ON
    finally:
        team.spread_word(word)
        team.waiting = word == END


def _follow(team: Team, _trainer: Trainer, _record: StepRecord) -> None:
    if team.spread_word(END) == END:
        raise _Stopped


def _join(trainer: Trainer, team: Team) -> None:
    """Let the trainer share its batches, its first steps excepted where layers have not seen a batch."""
    trainer.team = _Sharing(team, [layer for layer in trainer.sampler.modules() if isinstance(layer, ActNorm)])
    trainer.estimator = _shared_estimator(trainer.estimator, trainer.team)
    if trainer.fine_tuner is not None:
        trainer.fine_tuner = _shared_estimator(trainer.fine_tuner, trainer.team)


class _Sharing(Alone):
    """What the trainer asks of the team; nothing is shared while one of `layers` waits for its first batch."""

    def __init__(self, team: Team, layers: list[ActNorm]) -> None:
        self.team, self.layers, self.whole = team, layers, False

    def share(self, n: int) -> int:
        return n if self.whole else self.team.share(n)

    def stream(self, generator: Generator, n: int) -> Generator | SharedStream:
        self.layers = [layer for layer in self.layers if not bool(layer.initialised)]
        self.whole = bool(self.layers)
        return generator if self.whole else self.team.stream(generator, n)

    def joined_rows(self, own: list[Tensor]) -> list[Tensor]:
        if not self.whole:
            return self.team.joined_rows(own)
        self.team.joined_rows([each[:0] for each in own])
        return own

    def average(self, parameters: Iterable[Tensor]) -> None:
        self.team.average(parameters)

    def leave_one_out(self, signal: Tensor) -> Tensor:
        """Return the advantage of the rows of this process, the baseline being of all."""
        if self.whole:
            return leave_one_out(signal)
        everything = leave_one_out(self.team.gathered(signal).flatten())
        return everything[self.team.rows(len(everything))]


def _shared_estimator(estimator: Estimator, sharing: _Sharing) -> Estimator:
    """Return the estimator on the rows of this process."""
    if isinstance(estimator, OnSamples | ExplicitScore) and estimator.target is not None:
        return replace(estimator, target=partial(own_rows, estimator.target))
    if getattr(estimator, "func", estimator) is reinforce:
        return partial(estimator, advantage=sharing.leave_one_out)
    return estimator
