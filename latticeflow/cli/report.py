"""How results are shown: a table with errors in brackets, or JSON at full precision."""

import json
import math
from typing import Any

from latticeflow.cli.analysis import Report, WeightReport

HIDDEN_IN_JSON = ("rho", "tau_int_of_window")


def value_error(value: float, error: float) -> str:
    """Return `0.75629(49)`: the error in units of the last two digits shown; without an error, six digits."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{value:.6g}"
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
    for name, result in report.observables.items():
        rows.append(
            (
                name,
                value_error(result.mean, result.error),
                value_error(result.tau_int, result.tau_int_error),
                f"{result.n_eff:.0f}",
                f"{report.r_hat[name]:.3f}",
                *_against_exact(report, name, result.mean, result.error),
            )
        )
    flow = report.flow
    rows.append(
        ("log Z", value_error(flow.log_z, flow.log_z_error), "", str(flow.samples), "")
        + _against_exact(report, "log_z", flow.log_z, flow.log_z_error)
    )
    columns = 7 if report.exact else 5
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in range(columns)).rstrip() for row in rows]
    return "\n".join([*lines, *_summary(report), *(f"warning: {text}" for text in report.warnings)])


def as_json(report: Report) -> str:
    """Return the report as JSON at full precision."""
    observables = {
        name: {key: value for key, value in vars(result).items() if key not in HIDDEN_IN_JSON}
        for name, result in report.observables.items()
    }
    plain: dict[str, Any] = vars(report) | {"observables": observables}
    return json.dumps(_finite(plain), indent=2)


def _against_exact(report: Report, name: str, mean: float, error: float) -> tuple[str, str]:
    if name not in report.exact:
        return "", ""
    exact = report.exact[name]
    return f"{exact:.6g}", f"{(mean - exact) / error:+.1f}" if error > 0 else ""


def _summary(report: Report) -> list[str]:
    flow, lines = report.flow, []
    lines.append(
        f"proposals: ESS/N {value_error(flow.ess, flow.ess_error)}, acceptance {report.acceptance:.3f} "
        f"(from the weights: {flow.predicted_acceptance:.3f}), longest rejection run {report.longest_rejection_run}, "
        f"Pareto k {flow.pareto_k:.2f}, seed {report.seed}"
    )
    if report.baseline is not None:
        lines.append(f"training-free baseline: {_baseline(report.baseline)}")
    if report.baseline_plain is not None:
        lines.append(f"  the same without holonomy orbits: {_baseline(report.baseline_plain)}")
    return lines


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
