"""Pieces by topological charge against a single flow of equal cost (arXiv:2305.02930 on a gauge theory).

    python runs/benchmarks/sectors.py [--steps 200] [--draws 512] [--only WORD] [--threads 1]

Every row trains from one of the configurations runs/piecewise-*-sectors.toml with the changes that it names, for the
same number of steps, then runs 32 chains of independence Metropolis. The sectors are compared with
exact P(Q) in pure gauge theory, with the trusted values of the README's model otherwise: the probabilities of Q = 0 and
abs(Q) = 1, 2, their chi^2, and the topological susceptibility, with errors by the Gamma method. Writes
results/sectors.json and results/sectors.md beside this file; rows that `--only` leaves out stay as they were.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latticeflow.config.building import build_kernel, build_sampler, build_trainer
from latticeflow.config.loading import parse_config
from latticeflow.exact import u1_charge_distribution, u1_susceptibility
from latticeflow.lattice import volume
from latticeflow.stats import ess, gamma_method
from latticeflow.storage import provenance
from latticeflow.streams import stream
from latticeflow.u1 import topological_charge

RUNS = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
REPLICA, LARGEST = 32, 2
TRUSTED = {"schwinger": [(0.792, 0.005), (0.197, 0.004), (0.011, 0.001)]}
"""P(0), P(abs(Q) = 1), P(abs(Q) = 2) at 8x8, beta = 2, kappa = 0.276: 4 10^5 reweighted quenched draws."""

U1, SCHWINGER = "piecewise-u1-sectors.toml", "piecewise-schwinger-sectors.toml"
CASES: dict[str, tuple[str, list[str] | None]] = {
    "U(1) 16x16, beta 7: pieces by charge": (U1, None),
    "U(1) 16x16, beta 7: single flow, Haar prior": (U1, ['sampler.prior={kind="haar"}']),
    "U(1) 16x16, beta 7: single flow, draws of Q = 0": (U1, ["sampler.prior.sector=30"]),
    "U(1) 16x16, beta 7: single flow, draws of beta 6": (U1, []),
    "Schwinger 8x8: pieces by charge": (SCHWINGER, None),
    "Schwinger 8x8: single flow": (SCHWINGER, ["sampler.prior.smooth_sector=[[0.79, 4.1], [0.21, 0.4]]"]),
}
"""Configuration and changes; None for the pieces, changes of a single flow else."""


def exact(config: Any) -> tuple[list[tuple[float, float]], float | None]:
    """Return the probabilities of abs(Q) = 0, 1, 2 with their errors, and the susceptibility where it is known."""
    if config.action.kind != "u1":
        return TRUSTED[config.action.kind], None
    beta, shape = config.action.beta, config.lattice.shape
    known = dict(zip(*(array.tolist() for array in u1_charge_distribution(beta, shape)), strict=True))
    shares = [known[0], *(2 * known[q] for q in range(1, LARGEST + 1))]
    return [(share, 0.0) for share in shares], u1_susceptibility(beta, shape)


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    path, changes = CASES[name]
    text = (RUNS / path).read_text()
    if changes is not None:
        text = text.replace('kind = "piecewise"\npieces = "charge"', 'kind = "flow"')
    config = parse_config(text, [*(changes or []), f"training.steps={options.steps}"])
    started = time.process_time()
    trainer = build_trainer(config, build_sampler(config))
    trainer.run()
    trained = time.process_time() - started
    charge, log_weight, accepted = chains(config, trainer.sampler, options.draws)
    known, susceptibility = exact(config)
    shares = [gamma_method((np.abs(charge) == q).astype(float)) for q in range(LARGEST + 1)]
    squared = gamma_method(charge**2)
    pulls = [
        (share.mean - value) / np.hypot(max(share.error, np.sqrt(value / charge.size)), error)
        for share, (value, error) in zip(shares, known, strict=True)
    ]
    found = {
        "case": name,
        "steps": options.steps,
        "training_seconds": trained,
        "ess": ess(log_weight.ravel()),
        "acceptance": float(accepted.mean()),
        "shares": [(share.mean, share.error) for share in shares],
        "known": known,
        "pulls": pulls,
        "tau_int_charge2": squared.tau_int if np.ptp(charge) else None,
        "susceptibility": (squared.mean / volume(config.lattice.shape), squared.error / volume(config.lattice.shape)),
        "exact_susceptibility": susceptibility,
    }
    print(json.dumps(found), flush=True)
    return found


@torch.no_grad()
def chains(config: Any, sampler: Any, draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return charges, log weights of the proposals and what was accepted, `(replica, draws)`."""
    kernel, generator = build_kernel(config, sampler), stream(config.run.seed, "benchmark")
    state = kernel.start(REPLICA, generator)
    charge, proposed, accepted = [], [], []
    for _ in range(draws):
        state, info = kernel.step(state, generator)
        charge.append(topological_charge(state.field))
        proposed.append(info.proposals["log_weight"])
        accepted.append(info.accepted)
    return tuple(torch.stack(rows, 1).double().numpy() for rows in (charge, proposed, accepted))


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| case | ESS/N | acceptance | tau_int of Q^2 | P(0) | P(1) | P(2) | largest pull | chi_t | pull | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results["rows"]:
        shares = [f"{mean:.4f} ({error:.4f})" for mean, error in r["shares"]]
        mean, error = r["susceptibility"]
        known = r["exact_susceptibility"]
        pull = "" if known is None or error == 0 else f"{(mean - known) / error:+.1f}"
        tau = "never moves" if r["tau_int_charge2"] is None else f"{r['tau_int_charge2']:.2f}"
        cells = [
            r["case"],
            f"{r['ess']:.3f}",
            f"{r['acceptance']:.3f}",
            tau,
            *shares,
            f"{max(r['pulls'], key=abs):+.1f}",
            f"{mean:.6f} ({error:.6f})",
            pull,
            f"{r['training_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if r["case"].endswith("pieces by charge"):
            cells = ["known", "", "", "", *(f"{v:.4f}" + f" ({e:.4f})" * (e > 0) for v, e in r["known"]), ""]
            cells += ["" if known is None else f"{known:.6f}", "", ""]
            lines.insert(len(lines) - 1, f"| {' | '.join(cells)} |")
    options = results["options"]
    lines += ["", f"{options['steps']} steps of 64 each, then {REPLICA} chains of {options['draws']} draws; "]
    lines[-1] += f"{options['threads']} thread(s), torch {results['provenance']['torch']}."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--draws", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stored = RESULTS / "sectors.json"
    results = json.loads(stored.read_text()) if stored.exists() else {"rows": []}
    for name in CASES:
        if options.only in name:
            rows = {r["case"]: r for r in [*results["rows"], row(name, options)]}
            results["rows"] = [rows[case] for case in CASES if case in rows]
            results["options"] = {k: v for k, v in vars(options).items() if k != "only"}
            results["provenance"] = {k: v for k, v in provenance().items() if k not in ("host", "command")}
            stored.write_text(json.dumps(results, indent=2) + "\n")
            (RESULTS / "sectors.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
