"""Outputs of two models of one case in evaluation mode, and how far they are apart."""

from __future__ import annotations

from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.context import CheckContext

# Of the same weights in the same uncompiled code only kernels that add in any order differ.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


def evaluated(case: TrainingCase, ctx: CheckContext, model: Any, batch: Any) -> list[Any] | None:
    """What the model gives for the batch, and the loss; None where the loss cannot be computed so."""
    import torch

    from pytest_gputrain.checks.session import seed_everything

    seen: list[Any] = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.eval()
    seed_everything(ctx.seed)
    try:
        with torch.no_grad():
            loss = case.loss(model, pytree.map_tensors(lambda tensor: tensor.clone(), batch))
    except Exception:
        return None  # a loop with a step of its own may have no use for loss()
    finally:
        hook.remove()
    return [tensor.detach().clone() for tensor in pytree.tensors([seen, loss])]


def furthest(one: list[Any], other: list[Any]) -> tuple[float, float]:
    """The largest difference, relative to the largest value of its tensor, and what rounding explains."""
    import torch

    worst, tolerance = 0.0, TOLERANCE["float32"]
    for a, b in zip(one, other, strict=False):
        if a.shape != b.shape:
            return float("inf"), tolerance
        if not a.is_floating_point() or not a.numel():
            continue
        tolerance = max(tolerance, TOLERANCE.get(str(a.dtype).removeprefix("torch."), 0.0))
        apart, size = (a.double() - b.double()).abs().max(), a.double().abs().max()
        if not torch.equal(a, b):  # as it is where both are infinite
            worst = max(worst, float(apart / size.clamp(min=1e-12)))
    return worst, tolerance


def with_numbers_of(model: Any, other: Any) -> None:
    """Numbers and strings that modules keep beside their tensors: a loop sets them again, or a schedule."""
    from pytest_gputrain.trace.names import canonical_name

    theirs = {canonical_name(path): module for path, module in other.named_modules()}
    for path, module in model.named_modules():
        twin = theirs.get(canonical_name(path))
        if twin is None:
            continue
        for name, value in vars(twin).items():
            if type(value) in (int, float, str) and type(vars(module).get(name)) is type(value):
                vars(module)[name] = value
