"""Does the optimizer hold, and move, every trainable parameter? Runs the case's own step in one process.

Whatever steps is seen, by torch's global hooks: one optimizer, several, or a wrapper of some. Does not judge
whether an update is right, only that there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.finite import parameters_are_finite
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures

STEPS = 5
# A loss scaler skips the optimizer's first steps until its scale fits.
PATIENT_STEPS = 20


@check("optimizer_covers", subject="gradient flow")
def check_optimizer_covers(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails for a trainable parameter that no optimizer holds, that two hold, or that never moves."""
    figures: Figures = alone(_watch, case, ctx, doing="taking training steps in one process")
    return figures


@dataclass
class _Book:
    """What was seen of each parameter, by name, over all steps."""

    parameters: dict[str, Any]
    held: set[str] = field(default_factory=set)
    twice: dict[str, list[str]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    moved_in_update: set[str] = field(default_factory=set)
    pushed: set[str] = field(default_factory=set)
    cleared: set[str] = field(default_factory=set)
    beyond_rounding: set[str] = field(default_factory=set)
    rates: dict[str, float] = field(default_factory=dict)
    outside: list[Any] = field(default_factory=list)
    updates: int = 0
    torch_updates: int = 0

    def __post_init__(self) -> None:
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._before: dict[str, Any] = {}
        self._updating = False
        self._holders: dict[str, dict[int, str]] = {}

    def begin_step(self) -> None:
        """Two optimizers may take turns from step to step; in one step they may not both hold a parameter."""
        self._holders.clear()

    def hold(self, optimizer: Any) -> None:
        """What one optimizer has in its groups; with a name for the message if it has one twice."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self.names.get(id(parameter))
                if name is None:
                    self.outside.append(parameter)
                    continue
                self.held.add(name)
                rate = abs(float(group.get("lr", 1.0)))
                self.rates[name] = max(rate, self.rates.get(name, 0.0))

    def before_update(self, optimizer: Any, held: list[Any] | None) -> None:
        self._before, self._updating = snapshot(self.parameters), True
        if held is None:
            names = list(self.parameters)
        else:
            self.torch_updates += 1
            self.hold(optimizer)
            names = [self.names[id(parameter)] for parameter in held if id(parameter) in self.names]
            self._count_holders(optimizer, names)
        for name in names:
            self._look(name)

    def after_update(self, optimizer: Any, held: list[Any] | None) -> None:
        self.updates += 1
        self._updating = False
        self.moved_in_update |= changed(self._before, self.parameters)

    def after_backward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a backward pass: which gradients there are before anybody can clear them."""
        from pytest_gputrain.trace.digest import whole

        outcome = original(*args, **kwargs)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and bool((whole(parameter.grad) != 0).any()):
                self.cleared.add(name)
                if self._updating:  # a closure: the optimizer calls back for its gradients
                    self.pushed.add(name)
        return outcome

    def _count_holders(self, optimizer: Any, names: list[str]) -> None:
        for name in dict.fromkeys(names):
            holders = self._holders.setdefault(name, {})
            holders[id(optimizer)] = type(optimizer).__name__
            if names.count(name) > 1:
                self.twice[name] = [type(optimizer).__name__] * names.count(name)
            elif len(holders) > 1:
                self.twice[name] = list(holders.values())

    def _look(self, name: str) -> None:
        """Whether this parameter has a gradient, and one that its precision can turn into a movement."""
        import torch

        from pytest_gputrain.trace.digest import is_finite, whole

        parameter = self.parameters[name]
        gradient = parameter.grad
        if gradient is None:
            return
        if not is_finite(gradient):
            self.broken.add(name)
        gradient = whole(gradient).abs().double()
        if not bool((gradient != 0).any()):
            return
        self.pushed.add(name)
        step = self.rates.get(name, 1.0) * gradient.clamp(max=1.0)
        smallest = torch.finfo(parameter.dtype).eps * parameter.detach().abs().double()
        if bool((step > smallest).any()):
            self.beyond_rounding.add(name)


def snapshot(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def changed(before: dict[str, Any], parameters: dict[str, Any]) -> set[str]:
    import torch

    return {name for name, old in before.items() if not torch.equal(old, parameters[name].detach())}


def _watch(case: TrainingCase, ctx: CheckContext) -> Figures:
    """In the rank: five steps, more while the optimizer has not stepped."""
    from pytest_gputrain.checks.session import build_alone, draw_batch, seed_for, take_step
    from pytest_gputrain.trace.names import named_parameters, owners
    from pytest_gputrain.trace.optimizers import OptimizerWatch, optimizers_in
    from pytest_gputrain.trace.steps import patched_backward

    model = build_alone(case, ctx)
    optimizer = case.optimizer(model)
    book = _Book(named_parameters(model))
    trainable = [name for name, parameter in book.parameters.items() if parameter.requires_grad]
    for inner in optimizers_in(optimizer):
        book.hold(inner)
    steps = 0
    while steps < STEPS or (book.updates < STEPS and steps < PATIENT_STEPS):
        batch = draw_batch(case, ctx, steps)
        before = snapshot(book.parameters)
        book.begin_step()
        watch = OptimizerWatch(optimizer, book.before_update, book.after_update)
        with watch, patched_backward(book.after_backward):
            take_step(case, model, optimizer, [batch], seed_for(ctx, steps))
        book.moved |= changed(before, book.parameters)
        parameters_are_finite(model, steps, book.broken)
        _judge_new(model, optimizer, book, steps)
        steps += 1
    _judge_hidden(model, book)
    return _judge(book, trainable, owners(model), steps)


def _judge(book: _Book, trainable: list[str], owned_by: dict[str, Any], steps: int) -> Figures:
    from pytest_gputrain.trace.gradients import describe_missing

    total, figures = len(trainable), {"parameters": len(trainable), "steps": steps}
    # By hand or by a wrapper that tells nothing: then moving is the only evidence.
    moved = book.moved_in_update if book.torch_updates else book.moved
    if not book.updates and not book.moved:
        raise CheckFailed(
            f"no optimizer stepped in {steps} steps: the case's step never calls optimizer.step()", figures
        )
    alien = [name for name in trainable if name not in book.held and name not in moved]
    if alien:
        raise CheckFailed(
            f"{len(alien)} of {total} trainable parameters are in no optimizer group: "
            f"{describe_missing(alien, owned_by)}\n  likely: {_why_missing(book, alien)}",
            {**figures, "missing": alien},
        )
    if book.updates and book.cleared and not book.pushed:
        raise CheckFailed(
            f"gradients arrive in {steps} steps, but every one is cleared before the optimizer steps\n"
            "  likely: zero_grad() between backward() and optimizer.step()",
            figures,
        )
    twice = [name for name in trainable if name in book.twice]
    if twice:
        who = " and ".join(book.twice[twice[0]])
        raise CheckFailed(
            f"{len(twice)} of {total} trainable parameters are updated twice a step, by {who}: "
            f"{describe_missing(twice, owned_by)}",
            {**figures, "twice": twice},
        )
    still = [name for name in trainable if name in book.pushed and name not in book.moved]
    stuck = [name for name in still if name in book.beyond_rounding or book.rates.get(name) == 0.0]
    if stuck:
        raise CheckFailed(
            f"{len(stuck)} of {total} trainable parameters never moved in {steps} steps, though their "
            f"gradient is not zero: {describe_missing(stuck, owned_by)}\n  likely: {_why_still(book, stuck)}",
            {**figures, "stuck": stuck},
        )
    return {**figures, "lost_in_rounding": still, "notes": _notes(book, still)}


def _judge_new(model: Any, optimizer: Any, book: _Book, step: int) -> None:
    """A module that is replaced while training has parameters that the optimizer never saw."""
    from pytest_gputrain.trace.gradients import describe_missing
    from pytest_gputrain.trace.names import named_parameters, owners
    from pytest_gputrain.trace.optimizers import optimizers_in, parameters_of

    inners = optimizers_in(optimizer)
    if not inners:
        return  # it does not say what it holds
    known = {id(parameter) for inner in inners for parameter in parameters_of(inner)}
    known |= {id(parameter) for parameter in book.outside} | set(book.names)
    alien = [
        name
        for name, parameter in named_parameters(model).items()
        if parameter.requires_grad and parameter.grad is not None and id(parameter) not in known
    ]
    if alien:
        raise CheckFailed(
            f"{len(alien)} parameters were replaced in step {step}, get gradients, and are in no optimizer "
            f"group: {describe_missing(alien, owners(model))}\n"
            "  likely: a module is made anew after the optimizer was built; keep it, or build the optimizer "
            "after it",
            {"new": alien},
        )


def _judge_hidden(model: Any, book: _Book) -> None:
    """A layer in a plain list computes and gets gradients, and nothing ever updates, moves or saves it."""
    from pytest_gputrain.trace.names import hidden_parameters

    held = {id(parameter) for parameter in book.outside}
    trained = [
        name
        for name, parameter in hidden_parameters(model).items()
        if parameter.grad is not None and id(parameter) not in held
    ]
    if trained:
        shown = ", ".join(trained[:5]) + (f" and {len(trained) - 5} more" if len(trained) > 5 else "")
        raise CheckFailed(
            f"{len(trained)} parameter(s) get gradients, but are not registered in the model and in no "
            f"optimizer group: {shown}\n  likely: modules in a Python list or dict; use nn.ModuleList, "
            "nn.ModuleDict or nn.ParameterList",
            {"hidden": trained},
        )


def _why_missing(book: _Book, alien: list[str]) -> str:
    shapes = {tuple(book.parameters[name].shape) for name in alien}
    if shapes & {tuple(parameter.shape) for parameter in book.outside}:
        return (
            "the optimizer holds other tensors of the same shape, which are not this model's: it was built "
            "over a copy, or before the model's modules were replaced"
        )
    return "the groups were made by a filter that leaves them out, or before these modules were added"


def _why_still(book: _Book, stuck: list[str]) -> str:
    if all(book.rates.get(name) == 0.0 for name in stuck):
        return "their group's learning rate is 0 in every step"
    return "the optimizer's step leaves them out, or something restores them after it"


def _notes(book: _Book, lost: list[str]) -> list[str]:
    if not lost:
        return []
    kinds = sorted({str(book.parameters[name].dtype).removeprefix("torch.") for name in lost})
    return [
        f"{len(lost)} parameters did not move because the update is below their precision "
        f"({', '.join(kinds)}): {', '.join(lost[:5])}"
    ]
