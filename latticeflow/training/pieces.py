"""Fitting a piecewise sampler: one flow for each cluster of samples, by maximum likelihood, also in parallel."""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import BrokenProcessPool, TerminatedWorkerError
from torch import Tensor

from latticeflow.samplers import FlowSampler, PiecewiseSampler
from latticeflow.streams import stream
from latticeflow.training.likelihood import FitRecord, LikelihoodSettings, fit
from latticeflow.training.samples import check_weights
from latticeflow.training.trainer import TrainingError

Task = tuple[int, FlowSampler, Tensor, Tensor, LikelihoodSettings]


class Fitted(NamedTuple):
    """What the fit of a piece leaves behind: its weights, its records, the CPU seconds it took."""

    weights: dict[str, Tensor]
    records: list[FitRecord]
    cpu_seconds: float


def fit_pieces(
    build: Callable[[int, Tensor], FlowSampler],
    data: Tensor,
    labels: Tensor | Sequence[int],
    *,
    weights: Tensor | None = None,
    settings: LikelihoodSettings | None = None,
    minimum: int = 100,
    processes: int = 1,
    finished: Sequence[Fitted] = (),
    on_piece: Callable[[int, Fitted], None] | None = None,
) -> tuple[PiecewiseSampler, list[list[FitRecord]]]:
    """Fit one piece to the samples of each label 0 ... K - 1 and return their mixture and the records of each fit.

    `data (n, *shape)`, `labels (n,)`. `build(k, data_k)` makes piece k under a random state of its own, and `fit`
    trains it with a seed of its own, both from `settings.seed` and k. The mixture has `w_k = N_k / N`, with `weights`
    `(n,)` the share of their sum. `processes` share the pieces; the result does not depend on their number, bit for
    bit, as every fit runs on one thread. `on_piece(k, fitted)` sees each piece once it is fitted, in the order of k;
    the first pieces, where `finished` has them from an earlier life, are not fitted again.

    Raises ValueError for labels that are not `(n,)` integers, unlabelled samples (-1, as clusterings mark noise: drop
    them with their data, or label them), a label without samples, or with less than `minimum` ones, pieces that share
    parameters, and what `fit` refuses; TrainingError for a fit that fails. Both name the piece.
    """
    settings = settings or LikelihoodSettings()
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes!r}")
    numbers = _check_labels(labels, len(data), minimum)
    share = torch.ones(len(data), dtype=torch.float64) if weights is None else check_weights(weights, len(data))
    members = [(numbers == k).nonzero().flatten() for k in range(int(numbers.max()) + 1)]
    tasks = [_task(build, k, data[member.to(data.device)], share[member], settings) for k, member in enumerate(members)]
    pieces = [piece for _, piece, *_ in tasks]
    _refuse_shared(pieces)
    fitted, left = list(finished), tasks[len(finished) :]
    with closing(_fit_here(left) if processes == 1 else _fit_in(processes, left)) as results:
        for result in results:
            fitted.append(result)
            if on_piece is not None:
                on_piece(len(fitted) - 1, result)
    for piece, result in zip(pieces, fitted, strict=True):
        piece.load_state_dict(result.weights)
    sums = [float(share[member].sum()) for member in members]
    return PiecewiseSampler(pieces, sums), [result.records for result in fitted]


def _check_labels(labels: Tensor | Sequence[int], n: int, minimum: int) -> Tensor:
    numbers = torch.as_tensor(labels).cpu()
    if numbers.shape != (n,) or n == 0 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(
            f"labels must be {n} integers, one for each sample, got {numbers.dtype} {tuple(numbers.shape)}"
        )
    unlabelled = int((numbers < 0).sum())
    if unlabelled:
        raise ValueError(f"{unlabelled} of {n} samples have no label (below 0); drop them with data[labels >= 0]")
    for k, size in enumerate(torch.bincount(numbers).tolist()):
        if size < max(minimum, 1):
            raise ValueError(f"piece {k} has {size} samples, expected at least {max(minimum, 1)}: take fewer clusters")
    return numbers


def _task(
    build: Callable[[int, Tensor], FlowSampler], k: int, data: Tensor, weights: Tensor, settings: LikelihoodSettings
) -> Task:
    with torch.random.fork_rng(devices=[]), _one_thread(), _naming(k):
        torch.manual_seed(stream(settings.seed, "build piece", k).initial_seed())
        piece = build(k, data)
    own = replace(settings, seed=stream(settings.seed, "fit piece", k).initial_seed())
    return k, piece, data, weights, own


def _refuse_shared(pieces: Sequence[FlowSampler]) -> None:
    owned = [{id(parameter) for parameter in piece.parameters()} for piece in pieces]
    for i, j in combinations(range(len(pieces)), 2):
        if owned[i] & owned[j]:
            raise ValueError(f"pieces {i} and {j} share parameters, but each is fitted by itself")


def _fit_here(tasks: Sequence[Task]) -> Generator[Fitted]:
    yield from (_fit_one(*task) for task in tasks)


def _fit_in(processes: int, tasks: Sequence[Task]) -> Generator[Fitted]:
    with parallel_config(backend="loky", inner_max_num_threads=1):
        workers = Parallel(n_jobs=processes, max_nbytes=None, batch_size=1, pre_dispatch="all", return_as="generator")
        with _spared():
            results = workers(delayed(_fit_elsewhere)(*task) for task in tasks)
    try:
        for k, *_ in tasks:
            try:
                result = next(results)
            except TerminatedWorkerError as error:
                raise TrainingError(f"a process died while it fitted a piece, {k} or a later one") from error
            except BrokenProcessPool as error:
                raise TrainingError(f"a piece cannot go to another process, take processes = 1: {error}") from error
            yield result
    finally:
        with warnings.catch_warnings(action="ignore"):  # joblib warns of results that nobody waits for any more
            results.close()


def _fit_elsewhere(*task: object) -> Fitted:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a process that was started later, by a thread
    return _fit_one(*task)


@contextmanager
def _spared() -> Iterator[None]:
    """Let processes that are started now ignore the keyboard's signal, which is left to this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fit_one(k: int, piece: FlowSampler, data: Tensor, weights: Tensor, settings: LikelihoodSettings) -> Fitted:
    started = time.process_time()
    with _one_thread(), _naming(k):
        records = fit(piece, data, weights=weights, settings=settings)
    return Fitted(piece.state_dict(), records, time.process_time() - started)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend in their last bits on the number of threads that share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _naming(k: int) -> Iterator[None]:
    """Say of any failure which piece it was, whichever process it was in."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"piece {k}: {error}") from error
    except TrainingError as error:
        raise TrainingError(f"piece {k}: {error}") from error
    except Exception as error:
        raise TrainingError(f"piece {k}: {type(error).__name__}: {error}") from error
