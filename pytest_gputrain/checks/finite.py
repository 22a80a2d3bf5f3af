"""Weights that became NaN or infinite: nothing that is compared or counted after that means anything."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from pytest_gputrain.checks.result import CheckFailed
from pytest_gputrain.trace.digest import is_finite
from pytest_gputrain.trace.gradients import describe_missing
from pytest_gputrain.trace.names import Owner, named_parameters, owners


def not_finite(parameters: dict[str, Any]) -> list[str]:
    """Names of the trainable parameters with a NaN or infinite value in them."""
    return [name for name, p in parameters.items() if p.requires_grad and not is_finite(p)]


def parameters_are_finite(model: Any, step: int, broken_gradients: Container[str]) -> None:
    """Raises CheckFailed when the step left a trainable parameter of the model NaN or infinite.

    broken_gradients: names whose gradient was, when the optimizer stepped.
    """
    parameters = named_parameters(model)
    if names := not_finite(parameters):
        words = in_words(names, parameters, owners(model), f"after step {step}", broken_gradients)
        raise CheckFailed(words, {"not_finite": names, "parameters": len(parameters)})


def in_words(
    names: list[str],
    parameters: dict[str, Any],
    owned_by: dict[str, Owner],
    when: str,
    broken_gradients: Container[str],
) -> str:
    """What is said of parameters that are not finite."""
    broken = [name for name in names if name in broken_gradients]
    cause = (
        f"the optimizer stepped with a NaN or infinite gradient ({broken[0]}): a mean over no samples, a "
        "division, root or logarithm of zero, or an overflow"
        if broken
        else "their gradients were finite, so the update itself is not: learning rate, or optimizer state"
    )
    return (
        f"{len(names)} of {len(parameters)} parameters are NaN or infinite {when}: "
        f"{describe_missing(names, owned_by)}\n  likely: {cause}"
    )
