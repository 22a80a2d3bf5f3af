"""Runs of a case's step and of its own loss from the same weights, data and random state, as often as asked.

In float64 where model and loss allow it, with autocast off: then equal means equal to 1e-6, and nothing is
hidden by rounding. Else in the case's own precision. ``quiet`` holds the model in eval mode: BatchNorm by
its running statistics, no dropout.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.accumulation_window import Gradients, Handed, Window, WindowWatch, dense
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckUndecided

# No threshold of a clipping is as small; far from where float32 ends.
TINY = 2.0**-24
HUGE = 2.0**24

States = Sequence[dict[str, Any]]


class Lab:
    """One case, one precision, one mode."""

    def __init__(self, case: TrainingCase, ctx: CheckContext, *, double: bool, quiet: bool) -> None:
        from pytest_gputrain.checks.session import build_model
        from pytest_gputrain.launch.payload import dumps

        self.case, self.ctx, self.double, self.quiet = case, ctx, double, quiet
        self._packed = dumps(case)
        self._pristine = build_model(case, ctx)
        self._pristine = self._pristine.double() if double else self._pristine
        _wake(self._pristine, ctx.seed)
        if quiet:
            self._pristine.eval()

    def batch(self, num_samples: int, draw: int = 0) -> Any:
        from pytest_gputrain.checks.session import device_of, seed_everything, seed_for

        seed_everything(seed_for(self.ctx, draw))
        batch = self.case.batch(num_samples, device_of(self.ctx))
        return pytree.map_tensors(_doubled, batch) if self.double else batch

    def precision(self) -> tuple[float, str]:
        """Rounding and name of the coarsest type among the parameters."""
        import torch

        kinds = {one.dtype for one in self._pristine.parameters() if one.is_floating_point()}
        kind = max(kinds or {torch.float32}, key=lambda each: torch.finfo(each).eps)
        return torch.finfo(kind).eps, str(kind).removeprefix("torch.")

    def model(self) -> Any:
        """Fresh, the same every time."""
        from pytest_gputrain.checks.session import as_if_wrapped, build_model

        try:
            model = copy.deepcopy(self._pristine)
        except Exception:  # something in it cannot be copied: it can be built
            model = build_model(self.case, self.ctx)
            model = model.double() if self.double else model
            _wake(model, self.ctx.seed)
            model = model.eval() if self.quiet else model
        return as_if_wrapped(model)

    def own(
        self, parts: Sequence[Any], *, root: float = 1.0, states: States = (), draw: int = 0
    ) -> tuple[list[Gradients], list[float]]:
        """Of each part alone, the gradients and the value of the case's own loss; no step is involved.

        root: what the loss is multiplied with. states: of a window's forward passes, to be random alike.
        """
        from pytest_gputrain.checks.parity_rank import same_random_states
        from pytest_gputrain.checks.session import seed_everything, seed_for
        from pytest_gputrain.trace.names import named_parameters

        case, model, found, values = self._fresh_case(), self.model(), [], []
        parameters = named_parameters(model)
        seed_everything(seed_for(self.ctx, draw))
        with self.arithmetic(), same_random_states(model, list(states)):
            for part in parts:
                model.zero_grad(set_to_none=True)
                loss = case.loss(model, _copied(part))
                if not pytree.is_tensor(loss) or loss.dim() or not loss.requires_grad:
                    raise CheckUndecided("loss(model, batch) gave no scalar with a gradient")
                (loss * root).backward()
                found.append({name: dense(parameter.grad) for name, parameter in parameters.items()})
                values.append(float(loss.detach()))
        return found, values

    def window(self, parts: Sequence[Any], factor: float = 1.0) -> Window:
        """One call of the step, from fresh weights."""
        return self.windows([parts], factor)[0]

    def windows(self, windows: Sequence[Sequence[Any]], factor: float = 1.0) -> list[Window]:
        """A call of the step for each, one after another as in a loop, from fresh weights."""
        from pytest_gputrain.checks.session import seed_everything, seed_for

        case, model = self._fresh_case(), self.model()
        optimizer = case.optimizer(model)
        found = []
        with self.arithmetic():
            for number, parts in enumerate(windows):
                seed_everything(seed_for(self.ctx, number))
                found.append(_watched(case, model, optimizer, parts, factor))
        return found

    def apart(self, parts: Sequence[Any], factor: float = 1.0, states: States = ()) -> list[Window]:
        """The step on each part alone, from the same weights; buffers and random numbers go on."""
        from pytest_gputrain.checks.parity_rank import same_random_states
        from pytest_gputrain.checks.session import seed_everything, seed_for

        model, found = self.model(), []
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with self.arithmetic(), same_random_states(model, list(states)):
            cases = [self._fresh_case() for _ in parts]
            optimizers = [case.optimizer(model) for case in cases]
            seed_everything(seed_for(self.ctx, 0))
            for case, optimizer, part in zip(cases, optimizers, parts, strict=True):
                found.append(_watched(case, model, optimizer, [part], factor))
                _restore(model, weights)
        return found

    def _fresh_case(self) -> Any:
        """Its step may keep state, such as a scheduler, from call to call."""
        import cloudpickle

        return cloudpickle.loads(self._packed)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        import torch

        with contextlib.ExitStack() as stack:
            if self.double:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(torch.float64)
                stack.enter_context(_no_autocast())
            if self.quiet:
                stack.enter_context(_no_mode_change())
            yield


def _watched(case: Any, model: Any, optimizer: Any, parts: Sequence[Any], factor: float) -> Window:
    from pytest_gputrain.checks.parity_rank import before_forward, keep_state
    from pytest_gputrain.checks.session import loss_value, trained_parameters

    handed = Handed(_copied(part) for part in parts)
    states: list[dict[str, Any]] = []
    with (
        before_forward(lambda: model, lambda module: keep_state(states)),
        WindowWatch(trained_parameters(model, model, optimizer), optimizer, factor) as window,
    ):
        returned = case.step(model, optimizer, handed)
    window.states = states
    if isinstance(returned, dict):
        returned = returned.get("loss")
    elif isinstance(returned, tuple | list) and returned:
        returned = returned[0]
    window.loss, window.asked = loss_value(returned), handed.asked
    return window


def _wake(model: Any, seed: int) -> None:
    """A projection that starts at zero hides all gradients behind it; here it starts small."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1 and not bool(parameter.any()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(noise * 0.02)


def _restore(model: Any, weights: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in weights:
                parameter.copy_(weights[name])


def _copied(batch: Any) -> Any:
    """A step may change its batch in place."""
    return pytree.map_tensors(lambda tensor: tensor.clone(), batch)


def _doubled(tensor: Any) -> Any:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """``torch.autocast(...)`` is entered, and does nothing."""
    import torch

    original: Any = torch.amp.autocast_mode.autocast.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._enabled = False

    torch.amp.autocast_mode.autocast.__init__ = initialise  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.amp.autocast_mode.autocast.__init__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _no_mode_change() -> Iterator[None]:
    """A loop calls ``model.train()`` before each step; here the mode stays what it is."""
    from torch import nn

    original = nn.Module.train

    def train(self: Any, mode: bool = True) -> Any:
        return self

    nn.Module.train = train  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.train = original  # type: ignore[method-assign]
