"""What the scripts of this folder share: runs that are made where they are missing, figures and tables beside them."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from latticeflow import plots
from latticeflow.cli import main as latticeflow
from latticeflow.cli.folder import RUN_CONTROL
from latticeflow.config import Config, load_config
from latticeflow.config.loading import parse_config
from latticeflow.storage import Ensemble

ROOT = Path(__file__).resolve().parents[1]


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with `--runs`, the folder of the runs, and `--out`, that of figure and table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / name, help=f"folder of the runs (runs/{name})")
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results", help="folder of figure and table")
    return parser


def ensemble(folder: Path, configuration: str, changes: Mapping[str, object]) -> Path:
    """Return the ensemble of `runs/<configuration>.toml` with some keys changed, running or resuming it if need be."""
    file = ROOT / "runs" / f"{configuration}.toml"
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    path = folder / "ensemble.h5"
    if not _finished(path, load_config(file, overrides)):
        settings = [word for change in overrides for word in ("--set", change)]
        with redirect_stdout(sys.stderr):
            code = latticeflow(["run", str(file), "--out", str(folder), "--resume", *settings])
        if code:
            sys.exit(code)
    return path


def publish(name: str, figure: Figure, text: str, out: Path) -> None:
    """Write `<name>.png` and `<name>.md` into a folder, and print the text."""
    out.mkdir(parents=True, exist_ok=True)
    plots.save(figure, out / f"{name}.png")
    (out / f"{name}.md").write_text(text + "\n")
    print(text)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def new_figure(height: float) -> Figure:
    """Return a figure as wide as those of the package."""
    return Figure(figsize=(plots.WIDTH, height), **plots.STYLE["figure"])


def tidy(axes: Iterable[Axes]) -> None:
    """Give axes the sizes of text that the figures of the package have, without a box."""
    for panel in axes:
        panel.tick_params(which="both", labelsize=plots.STYLE["small"]["fontsize"])
        panel.spines[["top", "right"]].set_visible(False)
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set(**plots.STYLE["label"])
            axis.offsetText.set(**plots.STYLE["small"])


def _finished(path: Path, wanted: Config) -> bool:
    """Return whether a run is analysed. Exits where it was made with another configuration."""
    if not path.exists():
        return False
    with Ensemble.open(path) as stored:
        different = wanted.differences(parse_config(stored.config, source=str(path)))
        changed = [key for key in different if _matters(key, wanted)]
        if changed:
            sys.exit(f"{path} was made with another {', '.join(changed)}; choose another folder by --runs")
        return "cost" in stored.analysis()


def _matters(key: str, config: Config) -> bool:
    """Return whether a key changes what a run stores; those of the sampler do not where no kernel uses it."""
    unused = () if config.chain.uses_sampler else ("sampler", "training")
    return key not in RUN_CONTROL and not key.startswith(unused)
