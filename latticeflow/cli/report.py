"""How results are shown: a table with errors in brackets, or JSON at full precision."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from latticeflow.cli.parts import part_lines
from latticeflow.cli.pieces import piece_lines, silhouette_line
from latticeflow.cli.results import Report
from latticeflow.cli.sectors import Fraction, SectorReport
from latticeflow.cli.weighing import WeightReport
from latticeflow.stats import GammaResult

HIDDEN_IN_JSON = ("rho", "tau_int_of_window")
LEAST_FRACTION = 1e-4
SMALLEST_ERROR, LARGEST_ERROR = 1e-10, 1e10


def value_error(value: float, error: float) -> str:
    """Return `0.75629(49)`: the error in units of the last two digits shown; without an error, six digits.

    What would need more than ten digits is written as `1.2e-15 +- 3e-16`.
    """
    if error == math.inf:
        return f"{value:.6g}(inf)"
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{value:.6g}"
    if not SMALLEST_ERROR <= error < LARGEST_ERROR:
        return f"{value:.2g} +- {error:.1g}"
    decimals = 1 - math.floor(math.log10(error))
    scaled = round(error * 10.0**decimals)
    if scaled == 100:
        decimals, scaled = decimals - 1, 10
    if decimals <= 0:
        return f"{round(value, decimals):.0f}({round(error, decimals):.0f})"
    shown = f"{scaled / 10**decimals:.{decimals}f}" if decimals == 1 else str(scaled)
    return f"{value:.{decimals}f}({shown})"


def table(report: Report) -> str:
    """Return the result table as text."""
    rows = [("observable", "mean(err)", "tau_int(err)", "N_eff", "R-hat", "exact", "sigma")]
    rows += [_row(report, name, result) for name, result in (report.observables | report.derived).items()]
    if report.proposals is not None:
        best = report.forward or report.proposals
        rows.append(("log Z", value_error(best.log_z, best.log_z_error), "", str(report.proposals.samples), ""))
        rows[-1] += _against_exact(report, "log_z", best.log_z, best.log_z_error)
    lines = aligned([row if report.exact else row[:5] for row in rows])
    return "\n".join([*lines, *_summary(report), *(f"warning: {text}" for text in report.warnings)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are as wide as their longest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(report: Report, name: str, result: GammaResult) -> tuple[str, ...]:
    r_hat = f"{report.r_hat[name]:.3f}" if name in report.r_hat else ""
    numbers = (
        value_error(result.mean, result.error),
        value_error(result.tau_int, result.tau_int_error),
        f"{result.n_eff:.0f}",
    )
    if not math.isfinite(result.mean):
        numbers = ("undefined", "", "")
    return name, *numbers, r_hat, *_against_exact(report, name, result.mean, result.error)


def as_json(report: Report) -> str:
    """Return the report as JSON at full precision."""
    plain: dict[str, Any] = vars(report) | {
        kind: {
            name: {key: value for key, value in vars(result).items() if key not in HIDDEN_IN_JSON}
            for name, result in results.items()
        }
        for kind, results in (("observables", report.observables), ("derived", report.derived))
    }
    return json.dumps(_finite(plain), indent=2)


def _against_exact(report: Report, name: str, mean: float, error: float) -> tuple[str, str]:
    if name not in report.exact:
        return "", ""
    exact = report.exact[name]
    return f"{exact:.6g}", f"{(mean - exact) / error:+.1f}" if error > 0 else ""


def _summary(report: Report) -> list[str]:
    lines = [f"{name}: {_kernel(report, name)}" for name in report.kernels]
    proposals, forward = report.proposals, report.forward
    if proposals is not None:
        size = f"ESS/N {value_error(proposals.ess, proposals.ess_error)}, Pareto k {proposals.pareto_k:.2f}"
        lines.append(f"proposals: {size}")
    if forward is not None:
        size = f"ESS/N {value_error(forward.ess, forward.ess_error)} (forward)"
        lines.append(f"target samples of {forward.source}: {size}")
    if report.baseline is not None:
        lines.append(f"training-free baseline: {_baseline(report.baseline)}")
    if report.baseline_plain not in (None, report.baseline):
        lines.append(f"  the same without holonomy orbits: {_baseline(report.baseline_plain)}")
    if report.sectors is not None:
        lines.append(_sector_line(report.sectors))
    if report.pieces is not None:
        lines += [silhouette_line(report.pieces), *(f"  {line}" for line in aligned(piece_lines(report.pieces)))]
    if report.parts is not None:
        lines += [f"parts: {report.parts.schedule}", *(f"  {line}" for line in aligned(part_lines(report.parts)))]
    spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in report.cpu_seconds.items() if seconds >= 0.5)
    return [*lines, f"seed {report.seed}" + (f"; CPU seconds: {spent}" if spent else "")]


def _kernel(report: Report, name: str) -> str:
    kernel, parts = report.kernels[name], []
    parts.append(f"acceptance {kernel.acceptance:.3f}")
    if name == "independence" and report.proposals is not None:
        parts[-1] += f" (from the weights: {report.proposals.predicted_acceptance:.3f})"
    if kernel.exp_minus_delta_h is not None:
        violation = value_error(kernel.exp_minus_delta_h, kernel.exp_minus_delta_h_error)
        parts.append(f"<exp(-delta_h)> {violation}, step size {kernel.step_size:.3g}")
    return ", ".join([*parts, f"longest rejection run {kernel.longest_rejection_run}"])


def _sector_line(sectors: SectorReport) -> str:
    """Return the fractions of the sectors by abs(Q), those above 1e-4, beside the expected ones."""
    found, expected = (_by_size(fractions) for fractions in (sectors.found, sectors.expected))
    shown = [q for q in sorted({*found, *expected}) if max(found.get(q, 0), expected.get(q, 0)) > LEAST_FRACTION]
    parts = [
        f"abs(Q) = {q}: {found.get(q, 0):.4f}" + (f" ({expected.get(q, 0):.4f})" if expected else "") for q in shown
    ]
    source = f", in brackets {sectors.source}" if expected else ""
    return f"sectors: {', '.join(parts)}{source}; {sectors.changes} changes of Q"


def _by_size(fractions: Mapping[int, Fraction]) -> dict[int, float]:
    sizes = {abs(q) for q in fractions}
    return {size: sum(f.value for q, f in fractions.items() if abs(q) == size) for size in sizes}


def _baseline(weights: WeightReport) -> str:
    return (
        f"ESS/N {value_error(weights.ess, weights.ess_error)}, acceptance {weights.predicted_acceptance:.3f}, "
        f"log Z {value_error(weights.log_z, weights.log_z_error)}"
    )


def _finite(value: Any) -> Any:
    """Return plain JSON values: dataclasses as objects, non-finite numbers as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return _finite(vars(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
