"""Does the checkpoint of a compiled loop load without it? Saved, loaded uncompiled, strictly, and compared.

What is loaded has to give the outputs of the original module, whose evaluation beside the compiled one must
compile nothing. One process. Does not see whether optimizer and scheduler are saved rightly, nor sharded
checkpoints.
"""

from __future__ import annotations

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.keys_run import Saved, save_and_load
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures
from pytest_gputrain.checks.saved_state import PREFIX

NAMED = 3
_SOMETHING_ELSE = "it saves something else, or under names of its own"


@check("compile_checkpoint_keys", subject="compile")
def check_compile_checkpoint_keys(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when saved keys carry _orig_mod., do not load strictly, or give another model."""
    saved: Saved = alone(
        save_and_load, case, ctx, doing="saving the compiled model, and loading it uncompiled"
    )
    figures: Figures = {"keys": len(saved.keys), "graphs": saved.graphs}
    _judge_loads(saved, figures)
    _judge_keys(saved, figures)
    _judge_strict(saved, figures)
    _judge_weights(saved, figures)
    _judge_outputs(saved, figures)
    return {**figures, "worst difference": saved.difference, "notes": saved.notes}


def _judge_loads(saved: Saved, figures: Figures) -> None:
    """Raises CheckFailed where a state that the case itself loads does not fit for torch.compile's prefix."""
    for load in saved.loads:
        nothing = load.given and load.expected and not load.loaded
        if nothing or load.lost:
            said = (
                f"loads nothing, at {load.location}: none of {load.given} keys is one of the model's "
                f"{load.expected}"
                if nothing
                else f"leaves out {load.lost} of {load.given} keys, at {load.location}: they differ from the "
                f"model's by {PREFIX}"
            )
            raise CheckFailed(
                f"load_state_dict(strict=False) {said} ({load.example})\n"
                f"  likely: one of them is compiled and the other not, which puts {PREFIX} in front; load "
                "into the uncompiled model, with strict=True",
                figures,
            )


def _judge_keys(saved: Saved, figures: Figures) -> None:
    if saved.prefixed:
        raise CheckFailed(
            f"{len(saved.prefixed)} saved keys carry {PREFIX}: {_some(saved.prefixed)}\n"
            "  likely: state_dict() of what torch.compile returned, or of a model with compiled regions; "
            "save the original's (model._orig_mod.state_dict()), or compile in place with model.compile()",
            {**figures, "prefixed": len(saved.prefixed)},
        )
    if not saved.keys:
        others = f", but {len(saved.others)} others: {_some(saved.others)}" if saved.others else ""
        cut = any(name.endswith(f".{saved.wanted}") for name in saved.others)
        why = f"a prefix is cut off by its length; use removeprefix({PREFIX!r})" if cut else _SOMETHING_ELSE
        raise CheckFailed(
            f"state_dict(model) of the compiled model has none of the model's tensors ({saved.wanted}, ...)"
            f"{others}\n  likely: {why}",
            figures,
        )


def _judge_strict(saved: Saved, figures: Figures) -> None:
    lines = [f"  missing: {_some(saved.missing)}"] if saved.missing else []
    lines += [f"  unexpected: {_some(saved.unexpected)}"] if saved.unexpected else []
    lines += [f"  {saved.refused}"] if saved.refused else []
    if lines:
        raise CheckFailed(
            "what the compiled loop saves does not load strictly into an uncompiled model: "
            f"{len(saved.missing)} keys missing, {len(saved.unexpected)} unexpected\n" + "\n".join(lines),
            figures,
        )


def _judge_weights(saved: Saved, figures: Figures) -> None:
    if saved.stale:
        raise CheckFailed(
            f"{len(saved.stale)} of {len(saved.keys)} tensors saved are not those that train: "
            f"{_some(saved.stale)}\n"
            "  likely: compile works on a copy of the model, and the original is saved",
            figures,
        )
    if saved.ignored:
        raise CheckFailed(
            f"load_state_dict passes and leaves {len(saved.ignored)} of {len(saved.keys)} tensors as they "
            f"were: {_some(saved.ignored)}\n"
            "  likely: a load_state_dict of the model's own that is not strict",
            figures,
        )


def _judge_outputs(saved: Saved, figures: Figures) -> None:
    if saved.difference > saved.tolerance and saved.apart:
        raise CheckFailed(
            f"compile(model) trains another model than the one it is given: {len(saved.apart)} of "
            f"{len(saved.keys)} tensors saved are not the original's: {_some(saved.apart)}\n"
            "  likely: it compiles a new model, or a copy; compile the model that it is given",
            figures,
        )
    if saved.difference > saved.tolerance:
        raise CheckFailed(
            f"the model loaded from what was saved gives other outputs: off by {saved.difference:.1e} where "
            f"rounding explains {saved.tolerance:.0e}\n"
            "  likely: forward depends on what the state_dict does not hold (a buffer with persistent=False "
            "that changes, a tensor that is no buffer)",
            figures,
        )
    if saved.by_original:
        raise CheckFailed(
            f"evaluation through the original module compiles {len(saved.by_original)} graphs: "
            f"{_some(saved.by_original)}\n"
            "  likely: the original is compiled in place, too, or the compiled forward replaces its own",
            figures,
        )


def _some(keys: list[str]) -> str:
    more = f" (+{len(keys) - NAMED})" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more
