"""Where a run stands, looked up without disturbing it."""

from datetime import UTC, datetime
from typing import Any

from latticeflow.cli.folder import TRAINING, RunFolder, UsageError
from latticeflow.cli.report import aligned
from latticeflow.cli.training import needs_training
from latticeflow.storage import DataError, checkpoint_steps, lock_holder


def state_of(folder: RunFolder) -> dict[str, Any]:
    """Return what is known of a run: its stage, draws, steps of training, CPU seconds, writer, and how to go on."""
    stored, holder = folder.stored_status, lock_holder(folder.lock_file)
    found: dict[str, Any] = {
        "run": str(folder.path),
        "theory": folder.config.action.kind,
        "seed": folder.config.run.seed,
    }
    found |= {name: stored.get(name) for name in ("stage", "done", "total", "updated")}
    found |= {"cpu_seconds": folder.cpu_seconds, "writer": holder}
    if needs_training(folder.config):
        steps = checkpoint_steps(folder.checkpoints(TRAINING))
        last = steps[-1] if steps else 0
        found["training"] = (
            {"pieces": last} if folder.config.clustered else {"steps": folder.config.training.steps, "checkpoint": last}
        )
    found |= _ensemble(folder)
    return found | {"state": "running" if holder else "finished" if found.get("analysed") else "stopped"}


def described(found: dict[str, Any], folder: RunFolder) -> str:
    """Return the same for people."""
    states = {"running": found["writer"], "finished": "", "stopped": f"go on with: {folder.go_on}"}
    rows = [["run", f"{found['run']}: {found['theory']} {list(folder.config.lattice.shape)}, seed {found['seed']}"]]
    rows.append(["state", ": ".join(filter(None, (found["state"], states[found["state"]])))])
    if found["stage"] not in (None, "done"):
        rows.append(["stage", f"{found['stage']} {found['done']} of {found['total']}, {_ago(found['updated'])}"])
    if "training" in found:
        rows.append(["training", _trained(**found["training"])])
    if "damage" in found:
        rows.append(["ensemble", f"damaged: {found['damage']}"])
    elif "draws" in found:
        draws = f"{found['draws']} of {found['room']} draws in {folder.config.chain.replica} chains"
        rows.append(["ensemble", f"{draws}: {', '.join(found['files'])}"])
    if found["cpu_seconds"]:
        spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in found["cpu_seconds"].items())
        rows.append(["CPU seconds", spent])
    return "\n".join(aligned(rows))


def _ensemble(folder: RunFolder) -> dict[str, Any]:
    try:
        with folder.ensemble() as ensemble:
            measured = [ensemble.observable(name).shape[1] for name in ensemble.observable_names[:1]]
            return {
                "draws": ensemble.n_committed,
                "room": ensemble.draws,
                "files": [path.name for path in ensemble.paths],
                "analysed": measured == [ensemble.draws] and "cost" in ensemble.analysis(),
            }
    except UsageError:
        return {}
    except DataError as error:
        return {"damage": str(error)}


def _trained(*, pieces: int | None = None, steps: int = 0, checkpoint: int = 0) -> str:
    return f"checkpoint at step {checkpoint} of {steps}" if pieces is None else f"{pieces} pieces fitted"


def _ago(updated: str | None) -> str:
    """Return how long ago a time was, "some time ago" where it is not known."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(updated)).total_seconds()
    except (TypeError, ValueError):
        return "some time ago"
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
