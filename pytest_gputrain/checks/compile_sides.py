"""Eager and compiled as two sides of one case: the same weights, buffers, data, random state and counters.

Whatever a side is asked, it is asked in the same order as the other, each with a copy of the case of its own:
a scaler or a counter in the user's step is then as far on both. The eager side runs with dynamo off, so that
what a user compiles himself (a decorated forward) is eager there, too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.returned import wrapped_by
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed
from pytest_gputrain.checks.session import (
    as_if_wrapped,
    build_model,
    build_optimizer,
    loss_value,
    parameter_names,
    seed_everything,
    take_step,
)
from pytest_gputrain.trace.names import inner_model, named_buffers, named_parameters
from pytest_gputrain.trace.steps import AFTER_BACKWARD, AT_STEP, StepRecorder

Tensors = dict[str, Any]
_PLAIN = (int, float, bool, str)
_TORCHS_OWN = frozenset(vars(torch.nn.Module()))


@dataclass(frozen=True)
class Snapshot:
    """A model's values. attributes: the numbers and strings that modules keep, by module path."""

    parameters: Tensors
    buffers: Tensors
    attributes: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: Any) -> Snapshot:
        return cls(_copies(named_parameters(model)), _copies(named_buffers(model)), _attributes(model))

    def restore(self, model: Any) -> None:
        """Raises nothing for what the model no longer has."""
        with torch.no_grad():
            for there, mine in ((named_parameters, self.parameters), (named_buffers, self.buffers)):
                for name, tensor in there(model).items():
                    if name in mine and tensor.shape == mine[name].shape:
                        tensor.copy_(mine[name])
        modules = dict(inner_model(model).named_modules())
        for path, values in self.attributes.items():
            if path in modules:
                modules[path].__dict__.update(values)


@dataclass(frozen=True)
class Probe:
    """One training step from given weights. gradients and buffers by name, buffers as the step left them."""

    loss: float | None
    gradients: Tensors
    buffers: Tensors

    @property
    def given(self) -> list[Any]:
        """The gradients that there are."""
        return [gradient for gradient in self.gradients.values() if gradient is not None]


@dataclass
class Side:
    """bare: the module with the weights. run: what the step calls, compiled or not. guard: what it runs
    under.
    """

    case: TrainingCase
    bare: Any
    run: Any
    optimizer: Any
    parameters: Tensors
    guard: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)
    step_seconds: list[float] = field(default_factory=list)

    def probe(self, batch: Any, seed: int) -> Probe:
        """One step of the case from the weights as they are."""
        for parameter in self.parameters.values():
            parameter.grad = None
        recorder = StepRecorder(self.parameters, self.optimizer)
        with self.guard(), recorder.step() as record:
            loss = take_step(self.case, self.run, self.optimizer, [copied(batch)], seed)
        gradients = record.gradients[AFTER_BACKWARD] or record.gradients[AT_STEP]
        return Probe(loss_value(loss), gradients, _copies(named_buffers(self.bare)))

    def quiet(self, batch: Any, seed: int) -> Probe:
        """The case's own loss and its gradients in evaluation mode, where dropout does nothing."""
        for parameter in self.parameters.values():
            parameter.grad = None
        with self._evaluating(seed):
            loss = self.case.loss(self.run, copied(batch))
            loss.backward()
            gradients = {name: _copy(parameter.grad) for name, parameter in self.parameters.items()}
        return Probe(loss_value(loss), gradients, {})

    @property
    def shows_outputs(self) -> bool:
        """Whether what the loop calls takes hooks. A function that is compiled, as of a method, does not."""
        return isinstance(self.run, torch.nn.Module)

    def outputs(self, batch: Any, seed: int, *, hooks: bool) -> Probe:
        """The case's own loss as an evaluation computes it, without gradients; in their place, what the model
        gives, by number. hooks: whether to look at that, which has to be seen on both sides or on none.
        """
        seen: list[Any] = []
        with contextlib.ExitStack() as stack:
            if hooks and isinstance(self.run, torch.nn.Module):
                handle = self.run.register_forward_hook(lambda module, inputs, output: seen.append(output))
                stack.callback(handle.remove)
            stack.enter_context(self._evaluating(seed))
            stack.enter_context(torch.no_grad())
            loss = self.case.loss(self.run, copied(batch))
        tensors = [tensor for tensor in pytree.tensors(seen) if tensor.is_floating_point()]
        return Probe(loss_value(loss), {f"output {n}": _copy(one) for n, one in enumerate(tensors)}, {})

    @contextlib.contextmanager
    def _evaluating(self, seed: int) -> Iterator[None]:
        modules = list(self.bare.modules()) + ([self.run] if isinstance(self.run, torch.nn.Module) else [])
        modes = [module.training for module in modules]
        try:
            for module in modules:
                module.eval()
            seed_everything(seed)
            with self.guard():
                yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                object.__setattr__(module, "training", mode)

    def train(
        self, start: Snapshot, batches: Sequence[Any], seeds: Sequence[int], told: Callable[[int], None]
    ) -> list[float | None]:
        """A step for every seed, over the batches in turn, from these weights with a fresh optimizer.

        told: called with each step's number before it. Returns each step's loss; ``step_seconds`` are what
        each took until its loss was there.
        """
        start.restore(self.bare)
        self.optimizer = build_optimizer(self.case, self.bare, _holder(self.bare, self.run))
        losses = []
        self.step_seconds = []
        for step, seed in enumerate(seeds):
            told(step)
            batch = copied(batches[step % len(batches)])
            began = time.perf_counter()
            with self.guard():
                losses.append(loss_value(take_step(self.case, self.run, self.optimizer, [batch], seed)))
            self.step_seconds.append(time.perf_counter() - began)
        return losses


def eager(
    case: TrainingCase, ctx: CheckContext, start: Snapshot | None = None, *, wraps: bool = False
) -> Side:
    """A fresh eager side, from these weights where given; data parallel where ``wraps``."""
    case = own_copy(case)
    model = build_model(case, ctx)
    if start is not None:
        start.restore(model)
    run = wrapped_by(case, model) if wraps else as_if_wrapped(model)
    optimizer = build_optimizer(case, model, run)
    return Side(case, model, run, optimizer, named_parameters(model), without_compiling)


def compiled(case: TrainingCase, ctx: CheckContext, start: Snapshot, *, wraps: bool = False) -> Side:
    """The compiled side: ``compile`` around ``wrap``, as torch recommends, where ``wraps``.

    Raises CheckFailed for what no loop could call or train.
    """
    case = own_copy(case)
    model = build_model(case, ctx)
    start.restore(model)
    run = case.compile(wrapped_by(case, model) if wraps else model)
    if run is None:
        raise CheckFailed(
            "compile() returned None; it has to return what the loop calls\n"
            "  likely: model.compile() compiles in place and returns nothing: return model after it"
        )
    if not callable(run):
        raise CheckFailed(f"compile() returned a {type(run).__name__}; it has to return what the loop calls")
    run = as_if_wrapped(run)
    holder = _holder(model, run)
    optimizer = build_optimizer(case, model, holder)
    return Side(case, _bare(model, holder), run, optimizer, parameter_names(model, holder))


def _bare(model: Any, holder: Any) -> Any:
    """The module whose names count: within a wrapper of the user's own around the model, the model."""
    inner = inner_model(holder)
    return model if {*map(id, _tensors(inner))} == {*map(id, _tensors(model))} else inner


def _tensors(model: Any) -> list[Any]:
    return [*model.parameters(), *model.buffers()]


def _holder(bare: Any, run: Any) -> Any:
    """What has the parameters: a function, as torch.compile(model.forward) gives, has none."""
    return run if isinstance(run, torch.nn.Module) else bare


def own_copy(case: TrainingCase) -> TrainingCase:
    import pickle

    from pytest_gputrain.launch.payload import dumps

    copy: TrainingCase = pickle.loads(dumps(case))
    return copy


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def copied(batch: Any) -> Any:
    """A step may change its batch in place."""
    return pytree.map_tensors(lambda tensor: tensor.clone(), batch)


def _copy(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().clone()


def _copies(tensors: Tensors) -> Tensors:
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def _attributes(model: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for path, module in inner_model(model).named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if type(value) in _PLAIN and name not in _TORCHS_OWN
        }
        if plain:
            found[path] = plain
    return found
