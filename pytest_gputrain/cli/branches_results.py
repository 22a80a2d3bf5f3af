"""What ``gputrain branches run`` shows of a sweep: a table and, where matplotlib is there, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gputrain.sweep.prepare import Prepared
    from pytest_gputrain.sweep.results import BranchResult

PICTURE = "sweep.png"
HEADS = ("k", "verdict", "exit", "seconds", "rate", "tokens", "final loss", "eval loss", "log")


def table(results: Sequence[BranchResult]) -> Iterable[str]:
    """Lines; what did not pass has its reason below."""
    rows = [HEADS, *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, result in zip(rows, [None, *results], strict=True):
        cells = (cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False))
        yield "  ".join([*cells, row[-1]])
        if result is not None and result.message:
            yield f"{'':{widths[0]}}  {result.message}"
    passed = sum(result.success for result in results)
    yield f"{passed} of {len(results)} passed"


def _row(result: BranchResult) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        str(result.k),
        result.verdict + (" (before)" if result.resumed else ""),
        "-" if result.exit_code is None else str(result.exit_code),
        f"{result.duration:.1f}",
        shown(result.learning_rate, ".6g"),
        shown(result.tokens, ",d"),
        shown(result.final_loss, ".4f"),
        shown(result.eval_loss, ".4f"),
        result.log_file,
    )


def draw(results: Sequence[BranchResult], prepared: Prepared) -> str | None:
    """Draw the picture into the results folder; one line where that could not be."""
    from pytest_gputrain.report.ladder_plot import missing

    if lack := missing():
        return lack
    from pytest_gputrain.origin import origin
    from pytest_gputrain.report.sweep_plot import Curve, Sweep
    from pytest_gputrain.report.sweep_plot import draw as draw_picture

    curves = [Curve(r.k, r.curve, r.final_loss, r.eval_loss, r.success) for r in results]
    base, came_from = prepared.manifest.base, origin()
    title = f"{base.get('name', 'branches')}: {prepared.manifest.tokens:,} tokens a branch"
    footnote = f"rate by {base.get('lr_scaling')}; torch {came_from['torch']}, {came_from['cpu']}"
    try:
        draw_picture(Sweep(title, curves, f"{footnote}, {came_from['time']}"), prepared.out / PICTURE)
    except OSError as error:
        return f"{prepared.out / PICTURE} cannot be written ({error.strerror or error})"
    return None
