"""The gradients of one training step at three moments: after backward, before clipping, at the optimizer.

Ranks may be synchronised at any of them: DistributedDataParallel has averaged when ``backward`` returns,
a hand-written all_reduce comes after it, and clipping hides a wrong scale from what the optimizer sees.
Changes no gradient. Does not see gradients that never pass through ``torch.autograd.backward`` until the
optimizer steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.trace.digest import whole
from pytest_gputrain.trace.optimizers import Held, OptimizerWatch, optimizers_in

Gradients = dict[str, Any]  # name -> tensor or None

AFTER_BACKWARD, BEFORE_CLIP, AT_STEP = "after backward", "before clipping", "at the optimizer step"
MOMENTS = (AFTER_BACKWARD, BEFORE_CLIP, AT_STEP)


@dataclass
class StepRecord:
    """What one call of a case's ``step`` did.

    gradients: by moment, by name; a name is absent where the moment did not come for it.
    backwards_before: by name, how many backward passes had run when its optimizer stepped.
    updates: by optimizer step but the last, the parameters as it left them.
    """

    gradients: dict[str, Gradients] = field(default_factory=lambda: {moment: {} for moment in MOMENTS})
    backwards: int = 0
    backwards_before: dict[str, int] = field(default_factory=dict)
    optimizer_steps: int = 0
    updates: list[Gradients] = field(default_factory=list)


class StepRecorder:
    """Records steps of one model and optimizer: ``with recorder.step() as record: case.step(...)``.

    after_backward(record): called when the n-th backward of the step returned (n is record.backwards).
    after_update(record): called when the n-th optimizer step returned (n is record.optimizer_steps).
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        optimizer: Any,
        *,
        after_backward: Callable[[StepRecord], None] | None = None,
        after_update: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.after_backward = after_backward
        self.after_update = after_update
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._depth = 0
        self._updating: list[str] | None = None
        self._ran_closure = False
        self._latest: Gradients = {}
        self._clipped: Gradients = {}
        self._record = StepRecord()

    @contextlib.contextmanager
    def step(self) -> Iterator[StepRecord]:
        self._record, self._latest, self._clipped = StepRecord(), {}, {}
        watch = OptimizerWatch(self.optimizer, self._before_update, self._after_update)
        with patched_backward(self._backward), patched_norm(self._around_norm), watch:
            yield self._record
        seen = self._record.gradients
        for name, gradient in self._latest.items():
            seen[AFTER_BACKWARD].setdefault(name, gradient)
        for name, gradient in self._clipped.items():
            seen[BEFORE_CLIP].setdefault(name, gradient)
        self._record.updates = self._record.updates[: self._record.optimizer_steps - 1]

    def _gradients(self) -> Gradients:
        return {name: copy_of(parameter.grad) for name, parameter in self.parameters.items()}

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        try:
            outcome = original(*args, **kwargs)
        finally:
            self._depth -= 1
        # Reentrant checkpoints call backward within backward: only the outermost is the step's.
        if self._depth == 0:
            self._record.backwards += 1
            if self.after_backward is not None:
                self.after_backward(self._record)
            self._keep(self._gradients())
        return outcome

    def _keep(self, gradients: Gradients) -> None:
        """A closure runs backward inside the optimizer's step, maybe often: the first is at these weights."""
        if self._updating is None:
            self._latest, self._clipped = gradients, {}
        elif not self._ran_closure:
            self._ran_closure = True
            self._latest, self._clipped = gradients, {}
            seen = self._record.gradients
            for name in self._updating:  # what was there before the closure is left from the last step
                seen[AT_STEP].pop(name, None)
                seen[BEFORE_CLIP].pop(name, None)
                seen[AFTER_BACKWARD][name] = gradients[name]

    def _around_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._clipped:
            self._clipped = self._gradients()
        return original(*args, **kwargs)

    def _before_update(self, optimizer: Any, held: Held) -> None:
        seen = self._record.gradients
        self._updating, self._ran_closure = self._held_names(held), False
        for name in self._updating:
            if held is not None or name not in seen[AT_STEP]:
                seen[AT_STEP][name] = self._at_step(name)
            self._record.backwards_before.setdefault(name, self._record.backwards)
            if name in self._latest:
                seen[AFTER_BACKWARD].setdefault(name, self._latest[name])
            if name in self._clipped:
                seen[BEFORE_CLIP].setdefault(name, self._clipped[name])

    def _at_step(self, name: str) -> Any:
        """The gradient now; the very tensor kept after backward if nothing changed it since."""
        import torch

        gradient, earlier = copy_of(self.parameters[name].grad), self._latest.get(name)
        same = gradient is not None and earlier is not None and torch.equal(gradient, earlier)
        return earlier if same else gradient

    def _after_update(self, optimizer: Any, held: Held) -> None:
        self._updating = None
        self._record.optimizer_steps += 1
        names = self._held_names(held)
        self._record.updates.append({name: copy_of(self.parameters[name]) for name in names})
        if self.after_update is not None:
            self.after_update(self._record)

    def _held_names(self, held: Held) -> list[str]:
        if held is None:
            return list(self.parameters)
        names = [self._names[id(parameter)] for parameter in held if id(parameter) in self._names]
        return list(dict.fromkeys(names))


def copy_of(tensor: Any) -> Any:
    """A detached copy, whole; None stays None."""
    return None if tensor is None else whole(tensor).clone()


def learning_rates(optimizer: Any) -> list[list[float]]:
    """The learning rate of each group of each optimizer."""
    return [
        [float(group.get("lr", 0.0)) for group in inner.param_groups] for inner in optimizers_in(optimizer)
    ]


@contextlib.contextmanager
def patched_backward(around: Callable[..., Any]) -> Iterator[None]:
    """``Tensor.backward`` looks this function up at every call."""
    import torch

    original = torch.autograd.backward

    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


@contextlib.contextmanager
def patched_norm(around: Callable[..., Any]) -> Iterator[None]:
    """Clipping, however it was imported, starts by asking for the total norm here."""
    from torch.nn.utils import clip_grad

    names = [name for name in ("_get_total_norm", "get_total_norm") if hasattr(clip_grad, name)]
    originals = {name: getattr(clip_grad, name) for name in names}

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def total_norm(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        return total_norm

    for name, original in originals.items():
        setattr(clip_grad, name, replacement(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(clip_grad, name, original)
