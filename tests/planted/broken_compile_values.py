"""Broken programs in which torch compiles values into the graph, or compiles nothing: forward's own doing."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, Net, broken, case, loss

RECOMPILES = "compile_no_recompiles"
# Compiled code that is not run, or runs eager, or runs other code in evaluation: what else that may trip.
ALSO = ("compile_parity", "compile_speed")


class Counting(Net):
    """Counts its calls in a Python number, and warms up by it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * min(1.0, 0.1 * self.calls)


@broken({RECOMPILES: "graphs, then torch ran eager (recompile limit 8) from step"}, may_fail=ALSO)
def counter_in_forward() -> TrainingCase:
    return case("counter_in_forward", model=Counting)


class Annealed(Net):
    """A number that the loop sets: constant in the graph, because compiled with dynamic=False."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


class Routed(Net):
    """Leaves a layer out where nothing is above zero: a break in a loop, after which torch cannot go on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if (x > 0).any():
                x = block(x)
        out: Tensor = self.head(x)
        return out


@broken(
    {RECOMPILES: "uncompiled, for a graph break after which it cannot go on, and no graph ran"}, may_fail=ALSO
)
def branch_on_a_value_in_a_loop() -> TrainingCase:
    return case("branch_on_a_value_in_a_loop", model=Routed)


class AnnealingStep:
    """Sets the number in every step."""

    def __init__(self, hold: int = 0) -> None:
        self.hold, self.steps = hold, 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        model.temperature = 1.0 + 0.01 * max(0, self.steps - self.hold)
        return stepped(model, optimizer, micro_batches)


def stepped(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    optimizer.step()
    return value.detach()


@broken({RECOMPILES: "self.temperature == "}, may_fail=(*ALSO, "ddp_parity"))  # steps are counted on
def temperature_that_is_a_constant() -> TrainingCase:
    return case("temperature_that_is_a_constant", model=Annealed, step=AnnealingStep())


@broken({RECOMPILES: "\n  step 9  "}, may_fail=ALSO)
def temperature_from_the_ninth_step_on() -> TrainingCase:
    return case("temperature_from_the_ninth_step_on", model=Annealed, step=AnnealingStep(hold=9))


class Named(Net):
    """Chooses what to do by a string."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = "warmup"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.stage.startswith("warmup") else 2 * x)


class StageStep:
    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        model.stage = f"warmup {self.steps}" if self.steps < 5 else f"stage {self.steps // 4}"
        return stepped(model, optimizer, micro_batches)


@broken({RECOMPILES: "self.stage == "}, may_fail=(*ALSO, "ddp_parity"))  # steps are counted on
def string_that_names_the_stage() -> TrainingCase:
    return case("string_that_names_the_stage", model=Named, step=StageStep())


scale_of_the_run = 1.0


class Scaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * scale_of_the_run


def scaling_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    global scale_of_the_run
    scale_of_the_run *= 0.99
    return stepped(model, optimizer, micro_batches)


@broken({RECOMPILES: "a global that changes is a constant of the graph"}, may_fail=ALSO)
def global_that_changes() -> TrainingCase:
    return case("global_that_changes", model=Scaled, step=scaling_step)


class Clipping(Net):
    """Looks at the size of what it computes, and says so."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        largest = out.abs().max().item()
        return out / largest if largest > 1e6 else out


@broken({RECOMPILES: "Tensor.item()"}, may_fail=ALSO)
def item_in_forward() -> TrainingCase:
    return case("item_in_forward", model=Clipping)


class Printing(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        print("mean", out.mean())
        return out


@broken({RECOMPILES: "print"}, may_fail=ALSO)
def print_in_forward() -> TrainingCase:
    return case("print_in_forward", model=Printing)


class Deciding(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if out.norm() > 1e6:
            out = out / out.norm()
        return out


@broken({RECOMPILES: "Data-dependent branching"}, may_fail=ALSO)
def branch_on_a_value() -> TrainingCase:
    return case("branch_on_a_value", model=Deciding)


class Dropping(Net):
    """Layers with dropout that the step turns on one after the other, and off again for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for drop in self.drops:
            x = drop(x)
        return super().forward(x)


class TogglingStep:
    """Every few steps another part of the model is in evaluation mode."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        for bit, drop in enumerate(model.drops):
            drop.train(bool(self.steps // 2 >> bit & 1))
        return stepped(model, optimizer, micro_batches)


@broken(
    {RECOMPILES: "modules are switched between training and evaluation"},
    may_fail=(*ALSO, "ddp_completes", "ddp_parity"),  # it looks for its layers in what DDP wraps
)
def parts_in_evaluation_in_turn() -> TrainingCase:
    return case("parts_in_evaluation_in_turn", model=Dropping, step=TogglingStep())


@broken({RECOMPILES: "nothing compiled runs: no graph ran in"}, may_fail=ALSO)
def compile_that_does_not() -> TrainingCase:
    return case("compile_that_does_not", compile=lambda model: model)


class OriginalStep:
    """Keeps the original model, and trains that."""

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        return stepped(getattr(model, "_orig_mod", model), optimizer, micro_batches)


@broken({RECOMPILES: "step or loss calls the original model"}, may_fail=ALSO)
def compiled_and_never_called() -> TrainingCase:
    return case("compiled_and_never_called", step=OriginalStep())


class EagerLater:
    """Compiled at first; from the sixth step on what runs is the original."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        chosen = getattr(model, "_orig_mod", model) if self.steps > 6 else model
        return stepped(chosen, optimizer, micro_batches)


@broken({RECOMPILES: "the first of them step 6"}, may_fail=ALSO)
def eager_after_a_while() -> TrainingCase:
    return case("eager_after_a_while", step=EagerLater())


def failing_backend(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no kernel for this operation")


def compile_and_suppress(model: Any) -> Any:
    torch._dynamo.config.suppress_errors = True
    return torch.compile(model, backend=failing_backend)


@broken({RECOMPILES: "no kernel for this operation"}, may_fail=(*ALSO, "compile_checkpoint_keys"))
def error_of_the_backend_suppressed() -> TrainingCase:
    return case("error_of_the_backend_suppressed", compile=compile_and_suppress)


class CompilingStep:
    """Compiles anew in every step, a closure of its own each time."""

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        inner = getattr(model, "_orig_mod", model)
        torch._dynamo.reset()
        return stepped(torch.compile(inner, backend="eager"), optimizer, micro_batches)


@broken({RECOMPILES: "is called in every step; compile once"}, may_fail=ALSO)
def compiled_in_every_step() -> TrainingCase:
    return case("compiled_in_every_step", step=CompilingStep())


class EvaluationCounting(Net):
    """Only evaluation counts."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.evaluated += 1
            x = x * (1 + 1e-9 * self.evaluated)
        return super().forward(x)


@broken({RECOMPILES: "evaluation, batch 1"}, may_fail=ALSO)
def counter_in_evaluation() -> TrainingCase:
    return case("counter_in_evaluation", model=EvaluationCounting)


class Saved(Net):
    """Remembers when it was saved last."""

    def __init__(self) -> None:
        super().__init__()
        self.saved = "never"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.saved else x


def save_and_mark(model: Any) -> dict[str, Any]:
    inner = getattr(model, "_orig_mod", model)
    inner.saved = f"{inner.saved}+"
    return copy.deepcopy(inner.state_dict())


@broken({RECOMPILES: "self.saved == "}, may_fail=ALSO)
def mark_of_the_last_checkpoint() -> TrainingCase:
    return case("mark_of_the_last_checkpoint", model=Saved, state_dict=save_and_mark)


class CompiledUpdate:
    """The optimizer's step is compiled, too."""

    def __init__(self) -> None:
        self.compiled: tuple[Any, Any] = (None, None)

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        if self.compiled[0] is not optimizer:
            self.compiled = optimizer, torch.compile(_update(optimizer), dynamic=False)
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        self.compiled[1]()
        return value.detach()


def _update(optimizer: Any) -> Any:
    def update() -> None:
        optimizer.step()

    return update


def float_rate(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=1e-2)


@broken({RECOMPILES: "learning rate"}, may_fail=ALSO)
def compiled_optimizer_with_a_number_for_rate() -> TrainingCase:
    return case("compiled_optimizer_with_a_number_for_rate", optimizer=float_rate, step=CompiledUpdate())


class Fallback(nn.Module):
    """Calls the original where the compiled model raises, and says nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.compiled: list[Any] = [torch.compile(model, dynamic=False, backend=failing_backend)]

    def forward(self, x: Tensor) -> Tensor:
        try:
            out: Tensor = self.compiled[0](x)
        except Exception:
            out = self.model(x)
        return out


@broken(
    {RECOMPILES: "nothing compiled runs: compiling Net.forward fails, and the program goes on"},
    may_fail=(*ALSO, "compile_checkpoint_keys"),
)
def error_of_the_backend_caught() -> TrainingCase:
    return case("error_of_the_backend_caught", compile=Fallback)


class CompiledLoss:
    def __init__(self) -> None:
        self.compiled: Any = None

    def __call__(self, model: Any, batch: Any) -> Tensor:
        self.compiled = self.compiled or torch.compile(nn.functional.cross_entropy, dynamic=False)
        out: Tensor = self.compiled(model(batch["x"]), batch["y"])
        return out


def compile_the_loss_alone(model: Any) -> Any:
    return model


@broken({RECOMPILES: "the model runs eager: compile(model) returned the model itself"}, may_fail=ALSO)
def loss_compiled_and_no_model() -> TrainingCase:
    return case("loss_compiled_and_no_model", compile=compile_the_loss_alone, loss=CompiledLoss())
