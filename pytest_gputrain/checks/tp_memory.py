"""Does each rank hold its part of the model and no more, and does it compute with it?

Elements and bytes by rank and layer; then whether changing a rank's part changes the output: a model that is
whole on every rank passes all comparisons of values. Layers that are cut and make no collective are noted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import Figures
from pytest_gputrain.checks.tp_runs import compared, fail, labelled
from pytest_gputrain.report.metrics import once
from pytest_gputrain.report.series import by_name

if TYPE_CHECKING:
    from pytest_gputrain.tensor_parallel.records import Finding
    from pytest_gputrain.tensor_parallel.records_memory import Accounting, Share

MOST_LAYER_NOTES = 3
NEARLY_WHOLE = 0.95


@check("tp_memory", subject="tensor parallel")
def check_tp_memory(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when ranks hold half as much again as the model, are out of balance, or do not use their part."""
    accounts, findings = compared(_held, case, ctx, doing="counting what ranks hold")
    figures = figures_of(accounts, findings)
    wrong = [finding.message for finding in findings if finding.fails]
    if problem := accounts.problem or next(iter(wrong), None):
        fail(ctx, problem, figures)
    return labelled(ctx, figures)


def _held(case: TrainingCase, mesh: Any) -> tuple[Accounting, list[Finding]]:
    """In each rank."""
    from pytest_gputrain.tensor_parallel.golden_account import account
    from pytest_gputrain.tensor_parallel.golden_communication import silent_layers
    from pytest_gputrain.tensor_parallel.golden_pair import Pair
    from pytest_gputrain.tensor_parallel.golden_perturb import unused_shards

    accounts = account(case, mesh)
    if accounts.problem:
        return accounts, []
    pair = Pair(case, mesh)
    batch = pair.reference_batch()
    pair.parallelize()
    # Noted only: a layer of columns alone, such as a head over sharded logits, has no need to.
    silent = [replace(finding, fails=False) for finding in silent_layers(pair, batch)]
    return accounts, [*unused_shards(pair, batch), *silent]


def figures_of(accounts: Accounting, findings: list[Finding]) -> Figures:
    """Elements and bytes of parameters by rank; overhead as a fraction of the model."""
    return {
        "overhead": accounts.overhead,
        "imbalance": accounts.whole.imbalance,
        "parameters by rank": list(accounts.whole.local),
        "bytes by rank": list(accounts.parameter_bytes),
        "whole parameters": accounts.whole.total,
        "whole bytes": accounts.total_bytes,
        "overhead by layer": {layer.name: layer.overhead for layer in accounts.layers},
        "metrics": {
            "parameter_bytes_per_rank": once(
                max(accounts.parameter_bytes, default=0), unit="bytes", better="lower", spread=0.0
            )
        },
        "series": [
            by_name(
                "memory",
                "parameters by rank",
                {f"rank {r}": float(b) for r, b in enumerate(accounts.parameter_bytes)},
                unit="bytes",
                limit=accounts.total_bytes,
                limit_label="the whole model",
            )
        ],
        "notes": [*accounts.notes, *_layers(accounts), *(f.message for f in findings if not f.fails)],
    }


def _layers(accounts: Accounting) -> list[str]:
    """Layers that are whole on every rank, the largest first."""
    size = accounts.world_size
    whole: list[Share] = [
        one for one in accounts.layers if one.total and one.overhead > NEARLY_WHOLE * (size - 1)
    ]
    largest = sorted(whole, key=lambda one: -one.total)[:MOST_LAYER_NOTES]
    return [f"{one.name} ({one.total:,}) is whole on every rank" for one in largest]
