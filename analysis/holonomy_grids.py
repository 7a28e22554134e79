"""Spread and ESS of the weights of quenched draws against the grid of holonomy shifts, 8x8, beta 2, kappa 0.276.

python analysis/holonomy_grids.py [--samples 1000]
"""

import argparse

from latticeflow.actions import HolonomyMarginal, SchwingerAction
from latticeflow.priors import QuenchedU1
from latticeflow.stats import ess
from latticeflow.streams import stream

GRIDS = ((1, 1), (2, 1), (2, 2), (3, 2), (4, 3), (6, 3), (12, 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    prior = QuenchedU1(2.35, (8, 8), sector=0.6)
    links = prior.sample(options.samples, stream(1, "grids"))
    log_q, action = prior.log_prob(links), SchwingerAction(2.0, 0.276)
    print("| grid | std of log w | ESS/N |\n|---|---|---|")
    for grid in GRIDS:
        log_weight = -HolonomyMarginal(action, grid)(links) - log_q
        print(f"| {grid[0]} x {grid[1]} | {float(log_weight.std()):.3f} | {ess(log_weight.numpy()):.3f} |")


if __name__ == "__main__":
    main()
