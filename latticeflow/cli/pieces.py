"""What a run says of a sampler whose pieces are clusters."""

from dataclasses import dataclass
from typing import Any

from latticeflow.storage import Ensemble

NAME, SHORT = "pieces", 5


@dataclass(frozen=True)
class PieceReport:
    """The pieces of a sampler, by their number: samples, weight `N_k / N`, smallest held-out mean of `-log q_k`.

    `silhouettes` has the score of every number of clusters that was tried.
    """

    samples: list[int]
    weights: list[float]
    held_out: list[float]
    silhouettes: dict[int, float]

    @property
    def passed_over(self) -> int | None:
        """Return the number of clusters with the largest score where that was not taken: a cluster was too small."""
        best = max(self.silhouettes, key=self.silhouettes.__getitem__, default=len(self.samples))
        return best if best != len(self.samples) else None


def stored_pieces(ensemble: Ensemble) -> PieceReport | None:
    """Return what an ensemble says of the pieces of its sampler, None where it has none."""
    found: dict[str, Any] | None = ensemble.analysis().get(NAME)
    if found is None:
        return None
    columns = {name: found[name].tolist() if name in found else [] for name in ("clusters", "silhouette")}
    return PieceReport(
        samples=found["samples"].tolist(),
        weights=found["weight"].tolist(),
        held_out=found["held_out"].tolist(),
        silhouettes=dict(zip(columns["clusters"], columns["silhouette"], strict=True)),
    )


def piece_lines(pieces: PieceReport) -> list[list[str]]:
    """Return a table of the pieces, its header first."""
    rows = [["piece", "samples", "weight", "held-out NLL"]]
    columns = zip(pieces.samples, pieces.weights, pieces.held_out, strict=True)
    return rows + [[str(k), str(n), f"{w:.4f}", f"{loss:.4f}"] for k, (n, w, loss) in enumerate(columns)]


def silhouette_line(pieces: PieceReport) -> str:
    """Return the number of pieces with the best silhouette scores."""
    best = sorted(pieces.silhouettes, key=pieces.silhouettes.__getitem__, reverse=True)[:SHORT]
    scores = ", ".join(f"{k}: {pieces.silhouettes[k]:.3f}" for k in best)
    left = len(pieces.silhouettes) - len(best)
    line = f"pieces: {len(pieces.samples)}"
    if scores:
        line += f"; silhouette by number of clusters {scores}" + f", {left} more below" * bool(left)
    if pieces.passed_over is not None:
        line += f"; {pieces.passed_over} clusters were passed over, one was too small"
    return line
