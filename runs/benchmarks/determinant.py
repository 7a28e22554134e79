"""Cost of log|det M|: cyclic reduction against the dense batched LU, forward and forward plus gradient, in one run.

    python runs/benchmarks/determinant.py [--sizes 8 12 16 24 32] [--repeats 5] [--threads 1]

All get the same links (complex128, random at beta 2) and the same batch. "dense" is assembling the matrix and its LU,
"lu" the LU (and the inverse, for the gradient) of a matrix that is there already. Times are medians of CPU seconds per
configuration; the methods take turns. Writes results/determinant.json and results/determinant.md beside this file.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from latticeflow.dirac import log_abs_det, wilson_matrix
from latticeflow.priors import QuenchedU1
from latticeflow.storage import provenance
from latticeflow.streams import stream

KAPPA = 0.276
BATCH = {8: 64, 12: 32, 16: 16, 24: 4, 32: 4}
RESULTS = Path(__file__).parent / "results"


METHODS = ("cyclic", "dense", "lu")


def log_det(links: torch.Tensor, method: str) -> torch.Tensor:
    """Return log|det M|; for "lu" the matrices are given in place of links."""
    return torch.linalg.slogdet(links)[1] if method == "lu" else log_abs_det(links, KAPPA, method)[0]


def forward(links: torch.Tensor, method: str) -> torch.Tensor:
    with torch.no_grad():
        return log_det(links, method)


def gradient(links: torch.Tensor, method: str) -> torch.Tensor:
    leaf = links.clone().requires_grad_()
    return torch.autograd.grad(log_det(leaf, method).sum(), leaf)[0]


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(size: int, repeats: int) -> dict[str, float]:
    """Return median CPU seconds per configuration of both methods, their ratios and their largest disagreement."""
    links = QuenchedU1(2.0, (size, size)).sample(BATCH.get(size, 4), stream(1, "benchmark", size))
    inputs = {"cyclic": links, "dense": links, "lu": wilson_matrix(links, KAPPA)}
    row: dict[str, float] = {"L": size, "batch": len(links)}
    for name, work in (("forward", forward), ("gradient", gradient)):
        cyclic, dense = work(links, "cyclic"), work(links, "dense")
        row[f"{name}_disagreement"] = float((cyclic - dense).abs().max() / dense.abs().max())
        times: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(repeats):
            for method, measured in times.items():
                measured.append(cpu_seconds(lambda method=method, work=work: work(inputs[method], method)) / len(links))
        for method, measured in times.items():
            row[f"{name}_{method}"] = statistics.median(measured)
        for method in METHODS[1:]:
            row[f"{name}_ratio_{method}"] = row[f"{name}_{method}"] / row[f"{name}_cyclic"]
    return row


def exponent(rows: list[dict[str, float]], key: str) -> float:
    """Return the slope of log time against log L, fitted over all sizes."""
    return float(np.polyfit(np.log([row["L"] for row in rows]), np.log([row[key] for row in rows]), 1)[0])


def markdown(result: dict) -> str:
    """Return the table that is committed."""
    lines = [
        "| L | forward: cyclic | dense | LU alone | ratios | with gradient: cyclic | dense | LU alone | ratios |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"{1e3 * row[f'{n}_{m}']:.3g}" for n in ("forward", "gradient") for m in METHODS]
        ratios = [f"{row[f'{n}_ratio_dense']:.0f}, {row[f'{n}_ratio_lu']:.0f}" for n in ("forward", "gradient")]
        lines.append(f"| {row['L']} | {' | '.join([*cells[:3], ratios[0], *cells[3:], ratios[1]])} |")
    exponents = ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in result["exponents"].items())
    machine = result["provenance"]
    lines += [
        "",
        f"CPU milliseconds per configuration, medians, {result['threads']} thread(s). Exponents in L: {exponents}.",
        f"torch {machine['torch']}, Python {machine['python']}, {machine['cpu_count']} cores.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=sorted(BATCH))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for size in options.sizes:
        rows.append(compare(size, options.repeats))
        print(json.dumps(rows[-1]), flush=True)
    keys = [f"{work}_{method}" for work in ("forward", "gradient") for method in METHODS]
    result = {
        "rows": rows,
        "exponents": {key: exponent(rows, key) for key in keys},
        "threads": options.threads,
        "provenance": {k: v for k, v in provenance().items() if k not in ("host", "command")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "determinant.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "determinant.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
