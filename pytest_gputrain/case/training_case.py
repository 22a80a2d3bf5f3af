"""`TrainingCase`: a training loop taken apart into named functions.

Each default is the right thing, so that a case usually is three functions, and a planted bug is one
field replaced. Importing this module imports no torch; nothing here builds a model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from pytest_gputrain.case import defaults
from pytest_gputrain.case.loading import CaseError, LazyCallable
from pytest_gputrain.case.signatures import misfit

LossReduction = Literal["mean", "sum", "token_mean"]
Function = Callable[..., Any]
# Any stands for "package.module:attribute": given as text, it is a function by the time it is read.
Given = Function | Any

# These may stay None: "not given" has a meaning of its own (a check is skipped, or a default is used).
_OPTIONAL = ("num_targets", "parallelize", "set_checkpointing")
_NOT_FUNCTIONS = ("name", "loss_reduction", "expected_failures")


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """What a user hands over: how to build the model, make a batch and compute the loss.

    Any function may be given as ``"package.module:attribute"``; it is looked up when first called.

    name:              shows in ids, ``test_training[gpt-ddp_parity]``
    model:             ``model() -> nn.Module``, fresh weights (the caller seeds)
    batch:             ``batch(batch_size, device) -> Any``, one batch, any nesting of tensors, drawn
                       from the torch random generator
    loss:              ``loss(model, batch) -> Tensor``, a scalar
    loss_reduction:    how ``loss`` joins samples: "mean", "sum" or "token_mean" (needs ``num_targets``)
    num_targets:       ``num_targets(batch) -> int``, the tokens that count in the loss
    split:             ``split(batch, n) -> list`` of micro-batches; default cuts dimension 0
    optimizer:         ``optimizer(model) -> Optimizer``; default AdamW, learning rate 1e-3
    step:              ``step(model, optimizer, micro_batches) -> Tensor``, one optimizer step
    wrap:              ``wrap(model) -> nn.Module``; default ``DistributedDataParallel``
    compile:           ``compile(model) -> nn.Module``; default ``torch.compile(model, dynamic=False)``
    parallelize:       ``parallelize(model, mesh) -> nn.Module`` or a plan mapping; default none
    set_checkpointing: ``set_checkpointing(model, layers: slice | None)``; default none
    state_dict:        ``state_dict(model) -> dict``; default the unwrapped model's
    batches:           ``batches() -> Iterable``, the real data stream; default repeats ``batch``
    expected_failures: check id -> reason; strict: a check that passes after all is a failure. Of a long run
                       one thing may be named, ``stable_training:loss`` (or step_time, straggler, memory),
                       and all others are still looked for; that need not come

    Raises CaseError (a ValueError) with one line when a field cannot be what it has to be.
    """

    name: str
    model: Given
    batch: Given
    loss: Given
    loss_reduction: LossReduction = "mean"
    num_targets: Given | None = None
    split: Given = defaults.split
    optimizer: Given = defaults.optimizer
    step: Given = defaults.UNBOUND_STEP
    wrap: Given = defaults.wrap
    compile: Given = defaults.compile_model
    parallelize: Given | Mapping[str, Any] | None = None
    set_checkpointing: Given | None = None
    state_dict: Given = defaults.state_dict
    batches: Given = defaults.UNBOUND_BATCHES
    expected_failures: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_name()
        for spec in fields(self):
            if spec.name not in _NOT_FUNCTIONS:
                self._set(spec.name, self._function(spec.name))
        self._check_model()
        self._check_reduction()
        self._check_expected_failures()
        # Bound here, not in the default, so that dataclasses.replace(case, loss=...) steps with the new loss.
        if isinstance(self.step, defaults.DefaultStep):
            step = defaults.DefaultStep(self.loss, self.loss_reduction, self.num_targets, self.optimizer)
            self._set("step", step)
        if isinstance(self.batches, defaults.DefaultBatches):
            self._set("batches", defaults.DefaultBatches(self.batch))

    @property
    def has_own_step(self) -> bool:
        return not isinstance(self.step, defaults.DefaultStep)

    @property
    def has_own_batches(self) -> bool:
        return not isinstance(self.batches, defaults.DefaultBatches)

    def __repr__(self) -> str:
        return f"TrainingCase({self.name!r})"

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _function(self, name: str) -> Any:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return None
        if isinstance(value, str):
            return LazyCallable(value, f"{self.name}.{name}")
        if name == "parallelize" and isinstance(value, Mapping):
            return value
        if callable(value):
            if problem := misfit(name, value):
                raise CaseError(f"case {self.name!r}: {problem}")
            return value
        raise CaseError(
            f"case {self.name!r}: {name} is {value!r} ({type(value).__name__}); "
            'give a function or "package.module:attribute"'
        )

    def _check_name(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise CaseError(f"a case's name is {self.name!r}; give a non-empty string, it shows in test ids")

    def _check_model(self) -> None:
        """A module can be called, too: with a batch."""
        torch = sys.modules.get("torch")  # without it there is no module
        if torch is not None and isinstance(self.model, torch.nn.Module):
            raise CaseError(
                f"case {self.name!r}: model is a {type(self.model).__name__}; give a function that builds "
                "one with fresh weights, for checks train several"
            )

    def _check_reduction(self) -> None:
        legal = get_args(LossReduction)
        if self.loss_reduction not in legal:
            raise CaseError(
                f"case {self.name!r}: loss_reduction is {self.loss_reduction!r}; "
                f"give one of {', '.join(legal)}"
            )
        if self.loss_reduction == "token_mean" and self.num_targets is None:
            raise CaseError(
                f"case {self.name!r}: loss_reduction 'token_mean' needs num_targets(batch), "
                "the number of tokens that count in the loss"
            )

    def _check_expected_failures(self) -> None:
        given = self.expected_failures
        well_formed = isinstance(given, Mapping) and all(
            isinstance(check, str) and isinstance(reason, str) and reason.strip()
            for check, reason in given.items()
        )
        if not well_formed:
            raise CaseError(
                f"case {self.name!r}: expected_failures is {given!r}; "
                "give a mapping from check id to the reason"
            )
