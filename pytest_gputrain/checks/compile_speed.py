"""Is compiled training faster, soon enough compiled, and no larger? On a GPU, alone and on all ranks there
are.

A loop's own way to measure its speed (``meter``) is judged as well, on a CPU too: it is given steps of which
it is known how long they take, and has to say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone, on_ranks
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped, Figures
from pytest_gputrain.report.metrics import measured, once, spread_of
from pytest_gputrain.report.mfu import DTYPE, FLOPS
from pytest_gputrain.report.series import series

if TYPE_CHECKING:
    from pytest_gputrain.compile.speed import SpeedReport

NEEDS_A_GPU = (
    "compiled and eager are timed on a GPU only (--device cuda): on a CPU their ratio says nothing of one; "
    "what "
    "a loop measures itself with is judged on a CPU as well, run_checks(case, meter=...)"
)


@check("compile_speed", subject="compile")
def check_compile_speed(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails below 1.3 times as fast, above 60 s of first compile, above 10 % more memory, or for a wrong
    meter.
    """
    figures: Figures = {}
    if ctx.meter is not None:
        figures |= alone(_judge_meter, case, ctx, doing="trying the meter on steps of known length")
    if ctx.device != "cuda":
        if ctx.meter is None:
            raise CheckSkipped(NEEDS_A_GPU)
        return figures
    problems: list[str] = []
    metrics: Figures = {}
    drawn: list[Figures] = []
    for world_size in _world_sizes():
        report: SpeedReport = on_ranks(
            _measure, case, ctx, world_size=world_size, doing="timing eager and compiled in turn"
        )[0]
        where = "" if world_size == 1 else f"{world_size} ranks: "
        problems += [f"{where}{problem}" for problem in _shortcomings(report)]
        figures |= {f"{where}{name}": value for name, value in figures_of(report).items()}
        after = "" if world_size == 1 else f"_{world_size}_ranks"
        metrics |= {f"{name}{after}": value for name, value in metrics_of(report).items()}
        drawn += series_of(report)
        if report.flops_per_token is not None:
            figures |= {FLOPS: report.flops_per_token, DTYPE: report.flops_dtype}
    figures |= {"metrics": metrics, "series": drawn}
    if problems:
        raise CheckFailed("\n  ".join(problems), figures)
    return figures


def figures_of(report: SpeedReport) -> Figures:
    """What a table shows of a measurement."""
    from pytest_gputrain.compile.speed import grade

    found: Figures = {
        "ratio": round(report.ratio.median, 3),
        "from": round(report.ratio.low, 3),
        "to": round(report.ratio.high, 3),
        "grade": grade(report.ratio),
        "tokens/s": round(report.compiled.tokens_per_second),
        "eager tokens/s": round(report.eager.tokens_per_second),
        "useful tokens/s": round(report.compiled.useful_per_second),
        "step p50, p95": [round(report.compiled.p50, 4), round(report.compiled.p95, 4)],
        "first compile": round(report.first_compile_seconds, 1),
        "graphs": report.graphs,
        "recompiles": len(report.recompiles),
    }
    if report.memory_ratio is not None:
        found["memory"] = round(report.memory_ratio, 3)
    return {**found, "notes": list(report.notes)} if report.notes else found


def metrics_of(report: SpeedReport) -> dict[str, Figures]:
    """What nights are compared by. Steps have a spread; compiling for the first time happens once."""
    compiled = report.compiled
    steps = measured(compiled.step_seconds, unit="s", better="lower")
    share = (steps["spread"] or 0.0) / steps["value"]
    speed = compiled.tokens_per_second
    found = {
        "step_seconds": steps,
        "tokens_per_second": once(speed, unit="tokens/s", better="higher", spread=share * speed),
        "speed_up": once(report.ratio.median, unit="x", better="higher", spread=spread_of(report.ratio.each)),
        "first_compile_seconds": once(report.first_compile_seconds, unit="s", better="lower"),
    }
    if compiled.peak_bytes is not None:
        found["peak_bytes"] = once(compiled.peak_bytes, unit="bytes", better="lower", spread=0.0)
    return found


def series_of(report: SpeedReport) -> list[Figures]:
    """Both sides' steady steps, for the report's plots."""
    found = []
    for name, side in (("eager", report.eager), ("compiled", report.compiled)):
        label = name if report.world_size == 1 else f"{name}, {report.world_size} ranks"
        speeds = [report.tokens_per_step / seconds if seconds else None for seconds in side.step_seconds]
        found.append(series("step_seconds", label, side.step_seconds, unit="s"))
        found.append(series("tokens_per_second", label, speeds, unit="tokens/s"))
    return found


def _world_sizes() -> list[int]:
    """One, and as many ranks as there are GPUs."""
    import os

    from pytest_gputrain.devices import discover, visible_gpus

    return sorted({1, max(1, len(visible_gpus(discover(), os.environ)))})


def _shortcomings(report: SpeedReport) -> list[str]:
    from pytest_gputrain.compile.speed import shortcomings

    return shortcomings(report)


def _measure(case: TrainingCase, ctx: CheckContext) -> Any:
    from pytest_gputrain.checks.compile_measure import measure
    from pytest_gputrain.checks.compile_report_data import keep

    report = measure(case, ctx)
    if _is_first():
        keep(case, ctx, f"speed{'' if report.world_size == 1 else report.world_size}", report.to_json())
    return report


def _judge_meter(case: TrainingCase, ctx: CheckContext) -> Figures:
    from pytest_gputrain.checks.compile_meter import judge_meter

    return judge_meter(case, ctx)


def _is_first() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
