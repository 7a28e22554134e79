"""The measuring stage: observables on the stored configurations, and the weights of a reference ensemble."""

from pathlib import Path

import torch
from torch import Tensor

from latticeflow.cli.folder import RunFolder, UsageError, ensemble_path
from latticeflow.cli.progress import ticker
from latticeflow.cli.stopping import finishing
from latticeflow.cli.training import trained_sampler
from latticeflow.cli.verifying import check_all, open_checked
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_bare_action
from latticeflow.observables import measure, observables
from latticeflow.storage import DataError, Ensemble
from latticeflow.u1 import topological_charge

MOST_REFERENCE_DRAWS = 16384


def measure_ensemble(folder: RunFolder, *, skip_damaged: bool = False) -> None:
    """Evaluate the observables on every committed configuration and store them, `(chain, draw, ...)`."""
    action = build_bare_action(folder.config)
    wanted = observables(action, folder.config.analysis.observables)
    with (
        folder.ensemble("a", skip_damaged=skip_damaged) as ensemble,
        ticker("measuring", ensemble.n_committed) as counter,
        finishing("block") as stop,
    ):
        if ensemble.n_committed == 0:
            raise UsageError(f"{folder.path} has no draws yet; run `latticeflow sample {folder.path}` first")
        check_all(ensemble, folder.config, measured=False)
        parts: list[dict[str, Tensor]] = []
        for _, block in ensemble.iter_blocks(action.field_name):
            chains, draws = block.shape[:2]
            fields = torch.from_numpy(block).flatten(0, 1).to(folder.config.run.device)
            values = measure(fields, wanted)
            parts.append({name: value.unflatten(0, (chains, draws)).cpu() for name, value in values.items()})
            counter.advance(draws, "")
            stop.here()
        for name in wanted:
            ensemble.write_observable(name, torch.cat([part[name] for part in parts], dim=1).numpy())
        if folder.config.analysis.reference is not None:
            _measure_reference(folder, ensemble)
        folder.status("measuring", ensemble.n_committed, ensemble.n_committed)
        stop.here()


def _measure_reference(folder: RunFolder, ensemble: Ensemble) -> None:
    """Store charges and log weights `(chain, draw)` of the reference's configurations in /analysis/reference.

    At most 16384 of them, evenly spread over its draws.
    """
    action = build_action(folder.config)
    with open_reference(folder.config) as reference:
        every = -(-reference.chains * reference.n_committed // MOST_REFERENCE_DRAWS)
        fields = torch.from_numpy(reference.field(action.field_name, slice(None, None, every)))
    arrays = {}
    if action.field_name == "links":
        arrays["charge"] = topological_charge(fields.flatten(0, 1)).unflatten(0, fields.shape[:2]).numpy()
    if folder.config.chain.uses_sampler:
        sampler = trained_sampler(folder).double()
        with torch.no_grad(), ticker("weighing the reference", fields.shape[1]) as counter:
            columns = []
            for draw in range(fields.shape[1]):
                x = fields[:, draw].to(folder.config.run.device)
                columns.append(-action(x) - sampler.log_prob(x))
                counter.advance(1, "")
        arrays["log_weight"] = torch.stack(columns, dim=1).cpu().numpy()
    ensemble.write_analysis("reference", {"chains": fields.shape[0], "draws": fields.shape[1]}, arrays)


def open_reference(config: Config) -> Ensemble:
    """Open the reference ensemble of `analysis.reference`.

    Raises UsageError where there is none, DataError where it is of another theory or has no draws.
    """
    path = ensemble_path(Path(config.analysis.reference))
    reference, made_by = open_checked(path)
    different = config.theory_differences(made_by)
    if different or reference.n_committed == 0:
        reason = f"differs in {', '.join(different)}" if different else "has no draws"
        reference.close()
        raise DataError(f"analysis.reference: {path} {reason}")
    return reference
