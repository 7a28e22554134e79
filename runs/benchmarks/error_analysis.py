"""Speed and calibration of the error analysis: the Gamma method against pyerrors, many observables against single ones.

    OMP_NUM_THREADS=1 python runs/benchmarks/error_analysis.py [--samples 1000000] [--repeats 7] [--chains 2000]

Speed: medians of CPU seconds, the methods taking turns on the same AR(1) data with ``tau_int`` 9.5. Calibration: AR(1)
chains of given N/tau, the share of quoted one-sigma intervals that cover the truth (0.683 if Gaussian) and the width
of (mean - truth)/error. Needs pyerrors. Writes results/error_analysis.json and results/error_analysis.md beside this
file.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from latticeflow.stats import gamma_many, gamma_method
from latticeflow.storage import provenance

COEFFICIENT = 0.9
OBSERVABLES, SAMPLES_OF_MANY = 64, 16384
RATIOS = (20, 200, 2000)
RESULTS = Path(__file__).parent / "results"


def ar1(coefficient: float, shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Return stationary chains of variance one, time last: ``tau_int = (1 + a) / (2 (1 - a))``."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise[..., 1:] *= np.sqrt(1 - coefficient**2)
    return lfilter([1], [1, -coefficient], noise, axis=-1)


def in_turns(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of each work; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            times[name].append(time.process_time() - started)
    return {name: float(np.median(measured[1:])) for name, measured in times.items()}


def against_pyerrors(samples: int, repeats: int) -> dict[str, float]:
    """Return the seconds of both for one long chain, their ratio and how far their errors differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import pyerrors
    series = ar1(COEFFICIENT, (samples,), seed=1)

    def reference() -> float:
        observable = pyerrors.Obs([series], ["ensemble"])
        observable.gamma_method(S=2.0)
        return observable.dvalue

    row = in_turns({"latticeflow": lambda: gamma_method(series), "pyerrors": reference}, repeats)
    disagreement = abs(gamma_method(series).error / reference() - 1)
    return {"samples": samples, **row, "ratio": row["pyerrors"] / row["latticeflow"], "disagreement": disagreement}


def many_against_single(repeats: int) -> dict[str, float]:
    """Return the seconds for a table (n, K) at once and column by column, and for its transpose row by row."""
    rows = ar1(COEFFICIENT, (OBSERVABLES, SAMPLES_OF_MANY), seed=2)
    table = np.ascontiguousarray(rows.T)
    works = {
        "many": lambda: gamma_many(table),
        "columns": lambda: [gamma_method(column) for column in table.T],
        "rows": lambda: [gamma_method(row) for row in rows],
    }
    row = in_turns(works, repeats)
    pairs = zip(gamma_many(table), works["rows"](), strict=True)
    return {
        "observables": OBSERVABLES,
        "samples": SAMPLES_OF_MANY,
        **row,
        "ratio_columns": row["columns"] / row["many"],
        "ratio_rows": row["rows"] / row["many"],
        "disagreement": max(abs(many.error / single.error - 1) for many, single in pairs),
    }


def calibration(ratio: int, chains: int) -> dict[str, float]:
    """Return coverage and pull width, with their statistical errors, and the mean error over the exact one."""
    tau = (1 + COEFFICIENT) / (2 * (1 - COEFFICIENT))
    n = round(ratio * tau)
    lags = np.arange(1, n)
    exact = np.sqrt((1 + 2 * np.sum((1 - lags / n) * COEFFICIENT**lags)) / n)
    results = [gamma_method(chain) for chain in ar1(COEFFICIENT, (chains, n), seed=3)]
    pulls = np.array([result.mean / result.error for result in results])
    coverage, width = np.mean(np.abs(pulls) < 1), np.sqrt(np.mean(pulls**2))
    return {
        "n_over_tau": ratio,
        "n": n,
        "coverage": float(coverage),
        "coverage_error": float(np.sqrt(coverage * (1 - coverage) / chains)),
        "pull_width": float(width),
        "pull_width_error": float(np.std(pulls**2) / np.sqrt(chains) / (2 * width)),
        "error_over_exact": float(np.mean([result.error for result in results]) / exact),
        "warned": float(np.mean([len(result.warnings) > 0 for result in results])),
    }


def markdown(result: dict) -> str:
    """Return the tables that are committed."""
    long, many = result["pyerrors"], result["many"]
    lines = [
        "| analysis | CPU seconds | ratio |",
        "|---|---|---|",
        f"| gamma_method, {long['samples']} samples | {long['latticeflow']:.3f} | 1 |",
        f"| pyerrors {result['pyerrors_version']}, the same | {long['pyerrors']:.3f} | {long['ratio']:.1f} |",
        f"| gamma_many, {many['observables']} observables of {many['samples']} | {many['many']:.3f} | 1 |",
        f"| gamma_method, column by column | {many['columns']:.3f} | {many['ratio_columns']:.2f} |",
        f"| gamma_method, from contiguous rows | {many['rows']:.3f} | {many['ratio_rows']:.2f} |",
        "",
        f"Errors agree with pyerrors to {long['disagreement']:.0e}, many with single to {many['disagreement']:.0e}.",
        "",
        "| N/tau | coverage of one sigma | pull width | mean error / exact | warned |",
        "|---|---|---|---|---|",
    ]
    for row in result["calibration"]:
        coverage = f"{row['coverage']:.3f} +- {row['coverage_error']:.3f}"
        width = f"{row['pull_width']:.3f} +- {row['pull_width_error']:.3f}"
        shares = f"{row['error_over_exact']:.3f} | {row['warned']:.2f}"
        lines.append(f"| {row['n_over_tau']} | {coverage} | {width} | {shares} |")
    machine = result["provenance"]
    lines += [
        "",
        f"AR(1), tau_int 9.5, {result['chains']} chains per row, medians of {result['repeats']} runs in turn, "
        f"OMP_NUM_THREADS {result['threads']}.",
        f"NumPy {machine['numpy']}, Python {machine['python']}, {machine['cpu_count']} cores.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--chains", type=int, default=2000)
    options = parser.parse_args()
    result = {
        "pyerrors": against_pyerrors(options.samples, options.repeats),
        "many": many_against_single(options.repeats),
        "calibration": [calibration(ratio, options.chains) for ratio in RATIOS],
        "chains": options.chains,
        "repeats": options.repeats,
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "pyerrors_version": metadata.version("pyerrors"),
        "provenance": {k: v for k, v in provenance().items() if k not in ("host", "command")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "error_analysis.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "error_analysis.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
