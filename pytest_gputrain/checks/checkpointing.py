"""Do gradients stay the same with activation checkpointing on? All layers, and the first alone.

The same weights, batch and random state, off and on, over several steps; the weights are shaken in between,
because at a zero-initialised projection a wrong layer looks like the right one. Does not compare buffers:
BatchNorm counts a recomputed batch twice, which changes no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, CheckSkipped, CheckUndecided, Figures

STEPS = 3
SHAKE = 0.05  # of a parameter's own size: enough to leave zero, far too little to break a healthy model
NEARLY_ZERO, SIZE_FOR_ZERO = 1e-2, 0.4
# A recomputation is the same arithmetic on the same numbers: bitwise equal on one thread, but for kernels
# that add in any order. Relative to the gradient's norm.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


_NOT_REPEATED = (
    "recomputation does not repeat forward: random state not preserved, a lambda bound late in the layer "
    "loop, or state that forward changes"
)
_OTHER_FORWARD = (
    "another forward runs: a lambda bound late in the layer loop, or random numbers drawn in another order"
)


@check("checkpointing_parity", subject="gradient flow")
def check_checkpointing_parity(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when a gradient differs with checkpointing on, or when turning it on changes nothing."""
    if case.set_checkpointing is None:
        raise CheckSkipped("no set_checkpointing given")
    figures: Figures = alone(_compare, case, ctx, doing="training with activation checkpointing on")
    return figures


@dataclass
class _Trainer:
    """One model of the case with its optimizer."""

    model: Any
    optimizer: Any
    parameters: dict[str, Any]

    @classmethod
    def build(cls, case: TrainingCase, ctx: CheckContext, layers: slice | None) -> _Trainer:
        from pytest_gputrain.checks.session import as_if_wrapped, build_model
        from pytest_gputrain.trace.names import named_parameters

        model = build_model(case, ctx)
        if layers is not None:
            assert callable(case.set_checkpointing)
            case.set_checkpointing(model, layers)
        model = as_if_wrapped(model)
        return cls(model, case.optimizer(model), named_parameters(model))


@dataclass
class _Taken:
    """What one step came to. work: how many operations ran, forward and backward."""

    gradients: dict[str, Any]
    loss: float | None
    work: int


def _compare(case: TrainingCase, ctx: CheckContext) -> Figures:
    """In the rank: off, off again (what is not repeatable anyway), all layers on, the first layer on."""
    plain, again = _Trainer.build(case, ctx, None), _Trainer.build(case, ctx, None)
    noise = 0.0
    weights, expected = [], []
    for step in range(STEPS):
        weights.append(_values(plain))
        expected.append(_take(case, ctx, plain, weights[step], step))
        repeated = _take(case, ctx, again, weights[step], step)
        noise = max([noise, *_distances(expected[step].gradients, repeated.gradients).values()])
        _shake(plain, ctx, step)
    if noise > 1e-2:
        raise CheckUndecided(
            f"the same step, batch and seed give gradients that differ by {noise:.1%} without checkpointing; "
            "draw all randomness from torch's default generator"
        )
    figures: Figures = {"parameters": len(plain.parameters), "steps": STEPS, "noise": noise}
    for label, layers in (("all layers", slice(None)), ("layer 0 alone", slice(0, 1))):
        trainer = _Trainer.build(case, ctx, layers)
        taken = [_take(case, ctx, trainer, weights[step], step) for step in range(STEPS)]
        if label == "all layers" and all(a.work == b.work for a, b in zip(expected, taken, strict=True)):
            raise CheckFailed(
                f"set_checkpointing changes nothing: with it on, the step runs the same {taken[0].work} "
                "operations, so nothing is recomputed\n"
                "  likely: it sets a flag that forward does not read, or forward reads it only in eval mode",
                figures,
            )
        figures[f"worst ({label})"] = _judge(expected, taken, plain, noise, label)
    return figures


def _take(
    case: TrainingCase, ctx: CheckContext, trainer: _Trainer, weights: dict[str, Any], step: int
) -> _Taken:
    from pytest_gputrain.checks.session import draw_batch, loss_value, seed_for, take_step
    from pytest_gputrain.trace.steps import AFTER_BACKWARD, AT_STEP, StepRecorder
    from pytest_gputrain.trace.work import count_work

    _load(trainer, weights)
    for parameter in trainer.parameters.values():
        parameter.grad = None
    batch = draw_batch(case, ctx, step)
    recorder = StepRecorder(trainer.parameters, trainer.optimizer)
    with recorder.step() as record, count_work() as work:
        loss = take_step(case, trainer.model, trainer.optimizer, [batch], seed_for(ctx, step))
    gradients = record.gradients[AFTER_BACKWARD] or record.gradients[AT_STEP]
    return _Taken(gradients, loss_value(loss), work.operations)


def _values(trainer: _Trainer) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def _load(trainer: _Trainer, weights: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(weights[name])


def _shake(trainer: _Trainer, ctx: CheckContext, step: int) -> None:
    """Every float parameter a little: late-bound layers and swapped weights show only when layers differ."""
    import torch

    from pytest_gputrain.checks.session import seed_everything, seed_for

    seed_everything(seed_for(ctx, step, rank=1))
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            if parameter.is_floating_point() and parameter.element_size() > 1:
                size = float(parameter.float().square().mean().sqrt())
                # Zero, or as good as zero after a step at a warm-up's learning rate.
                size = size if size > NEARLY_ZERO else SIZE_FOR_ZERO
                parameter.add_(torch.randn_like(parameter) * (SHAKE * size))


def _distances(expected: dict[str, Any], seen: dict[str, Any]) -> dict[str, float]:
    """By name, the norm of the difference over the norm of the gradient; missing on one side only is 1."""
    from pytest_gputrain.checks.averages import distance

    return {name: distance(expected.get(name), seen.get(name)) for name in {**expected, **seen}}


def _judge(expected: list[_Taken], taken: list[_Taken], plain: _Trainer, noise: float, label: str) -> float:
    """The worst distance over all steps. Raises CheckFailed for one out of tolerance."""
    worst = 0.0
    for step, (wanted, got) in enumerate(zip(expected, taken, strict=True)):
        distances = _distances(wanted.gradients, got.gradients)
        wrong = {
            name: distance
            for name, distance in distances.items()
            if distance > _tolerance(plain.parameters[name], noise)
            and _matters(wanted.gradients, got.gradients, name)
        }
        if wrong:
            raise CheckFailed(*_failure(wrong, wanted, got, plain, step, label))
        worst = max([worst, *distances.values()])
    return worst


def _tolerance(parameter: Any, noise: float) -> float:
    kind = str(parameter.dtype).removeprefix("torch.")
    return TOLERANCE.get(kind, TOLERANCE["float32"]) + 4 * noise


def _matters(expected: dict[str, Any], seen: dict[str, Any], name: str) -> bool:
    """Not if the difference is rounding beside the whole gradient: a bias before a norm has only noise."""
    import torch

    total = sum(float(g.double().square().sum()) for g in expected.values() if g is not None) ** 0.5
    one, other = expected.get(name), seen.get(name)
    if one is None or other is None:
        return True
    difference = float((one.double() - other.double()).norm())
    return difference > torch.finfo(one.dtype).eps * total or difference != difference


def _failure(
    wrong: dict[str, float], wanted: _Taken, got: _Taken, plain: _Trainer, step: int, label: str
) -> tuple[str, Figures]:
    from pytest_gputrain.trace.names import owners

    name = max(wrong, key=lambda key: wrong[key])
    owned_by = owners(plain.model)
    forward = (
        "the loss is the same" if wanted.loss == got.loss else f"the loss too: {got.loss}, not {wanted.loss}"
    )
    how = "is missing" if got.gradients.get(name) is None else f"is off by {wrong[name]:.1%}"
    likely = _NOT_REPEATED if wanted.loss == got.loss else _OTHER_FORWARD
    message = (
        f"gradients differ with checkpointing on ({label}): {len(wrong)} of {len(plain.parameters)} "
        f"parameters in step {step}, worst {name} ({owned_by[name]}), which {how}; "
        f"{forward}\n  likely: {likely}"
    )
    return message, {"wrong": sorted(wrong), "step": step, "parameters": len(plain.parameters)}
