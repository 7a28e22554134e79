"""The figures of a run, drawn from what its ensemble holds."""

import numpy as np
import torch

from latticeflow import plots
from latticeflow.cli.analysis import measured
from latticeflow.cli.exact import exact_charges, exact_values
from latticeflow.cli.folder import TRAINING, RunFolder
from latticeflow.cli.parts import COLUMN as PART
from latticeflow.cli.pieces import NAME as PIECES
from latticeflow.cli.training import trained_sampler
from latticeflow.config.building import build_bare_action
from latticeflow.stats import ess, gamma_method
from latticeflow.storage import Ensemble

SHOWN = ("plaquette", "topological_charge2", "condensate", "magnetisation_squared", "phi_squared")
GRID, MARGIN = 200, 0.1


def draw_figures(folder: RunFolder, *, skip_damaged: bool = False) -> list[str]:
    """Write training, pieces, weights, autocorrelation and charge (.png), those there is data for; return the paths."""
    drawn = {}
    with folder.ensemble(skip_damaged=skip_damaged) as ensemble:
        training = ensemble.training()
        series = measured(folder.config, ensemble) if ensemble.observable_names else {}
        log_z = exact_values(folder.config).get("log_z") or ensemble.analysis().get("log_z", {}).get("mean")
        if "piece" in training:
            drawn["training"] = plots.fit_curves(training["piece"], training["step"], training["held_out"])
            drawn |= _pieces(folder, ensemble)
        elif training:
            columns = (training[name] for name in ("step", "loss", "ess"))
            drawn["training"] = plots.training_curve(*columns, part=training.get(PART), log_z=log_z)
        if "log_weight" in ensemble.proposal_names:
            drawn["weights"] = _weights(ensemble.proposals("log_weight").ravel(), _baseline(ensemble))
        results = {
            name: gamma_method(values, s=folder.config.analysis.s) for name, values in series.items() if name in SHOWN
        }
        if results:
            drawn["autocorrelation"] = plots.autocorrelation(results)
        if "topological_charge" in series:
            charge = series["topological_charge"]
            drawn["charge"] = plots.charge_history(charge, exact=exact_charges(folder.config))
    for name, figure in drawn.items():
        plots.save(figure, folder.figure(name))
    return [str(folder.figure(name)) for name in drawn]


def _pieces(folder: RunFolder, ensemble: Ensemble) -> dict[str, plots.Figure]:
    """Return the figure of the pieces of a density of the plane; where their weights are gone there is none."""
    stored, config = ensemble.analysis().get(PIECES), folder.config
    action, log_z = build_bare_action(config), exact_values(config).get("log_z")
    planar = action.field_name == "x" and config.lattice.shape == (2,) and log_z is not None
    if stored is None or not planar or not folder.checkpoints(TRAINING).is_dir():
        return {}
    points = stored["feature"]
    low, high = points.min(axis=0), points.max(axis=0)
    axes = [np.linspace(a - MARGIN * (b - a), b + MARGIN * (b - a), GRID) for a, b in zip(low, high, strict=True)]
    sites = torch.cartesian_prod(*map(torch.from_numpy, axes))
    with torch.no_grad():
        logs = (-action(sites) - log_z, trained_sampler(folder).cpu().double().log_prob(sites))
    target, sampler = (log.exp().reshape(GRID, GRID).T.numpy() for log in logs)
    return {"pieces": plots.planar_pieces(points, stored["label"], tuple(axes), target, sampler)}


def _baseline(ensemble: Ensemble) -> np.ndarray | None:
    return ensemble.proposals("baseline_log_weight") if "baseline_log_weight" in ensemble.proposal_names else None


def _weights(flow: np.ndarray, baseline: np.ndarray | None) -> plots.Figure:
    baseline_ess = None if baseline is None else ess(baseline)
    return plots.weight_histogram(flow, baseline=baseline, ess=ess(flow), baseline_ess=baseline_ess)
