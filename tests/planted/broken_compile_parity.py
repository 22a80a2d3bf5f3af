"""Compiled training that computes something else than eager, or is no compiled training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, Net, broken, case

PARITY = "compile_parity"
ALSO = ("compile_no_recompiles", "compile_checkpoint_keys", "checkpointing_parity")


def compile_fresh(model: nn.Module) -> Any:
    return torch.compile(Net(), dynamic=False)


@broken({PARITY: "compile() gives a model with other weights"}, may_fail=ALSO)
def compiled_model_has_other_weights() -> TrainingCase:
    return case("compiled_model_has_other_weights", compile=compile_fresh)


def compile_cast(model: nn.Module) -> Any:
    return torch.compile(model.double(), dynamic=False)


@broken({PARITY: "(float64 (32, 16), not float32 (32, 16))"}, may_fail=ALSO)
def compile_casts_the_weights() -> TrainingCase:
    return case("compile_casts_the_weights", compile=compile_cast)


@broken({PARITY: "nothing compiled"}, may_fail=ALSO)
def compile_gives_the_eager_model() -> TrainingCase:
    return case("compile_gives_the_eager_model", compile=lambda model: model)


@broken({PARITY: "nothing compiled"}, may_fail=ALSO)
def compiled_and_disabled() -> TrainingCase:
    def compile_disabled(model: nn.Module) -> Any:
        model.forward = torch.compiler.disable(model.forward)
        return torch.compile(model)

    return case("compiled_and_disabled", compile=compile_disabled)


class DroppingNet(nn.Module):
    """Drops half of its hidden units."""

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.drop = nn.Dropout(probability)
        self.down = nn.Linear(4 * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.drop(F.relu(self.up(x))))
        return out


def compile_evaluating(model: nn.Module) -> Any:
    return torch.compile(model.eval(), dynamic=False)


@broken({PARITY: "modules in evaluation mode, and eager's are not"}, may_fail=ALSO)
def compiled_in_evaluation_mode() -> TrainingCase:
    return case("compiled_in_evaluation_mode", model=DroppingNet, compile=compile_evaluating)


class UnscaledNet(DroppingNet):
    """Compiled, it draws other numbers than eager, and forgets to scale what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        if torch.compiler.is_compiling() and self.training:
            torch.rand(1)
            hidden = hidden * (torch.rand_like(hidden) > 0.5)
        else:
            hidden = self.drop(hidden)
        out: Tensor = self.down(hidden)
        return out


@broken({PARITY: "compiled differs by more than its random numbers"}, may_fail=ALSO)
def dropout_unscaled_when_compiled() -> TrainingCase:
    return case("dropout_unscaled_when_compiled", model=UnscaledNet)


class Doubling(torch.autograd.Function):
    """Passes on what it gets; its backward is right in eager and doubled when compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * (2.0 if torch.compiler.is_compiling() else 1.0)


class DoublingNet(Net):
    """The first block's gradient goes through ``Doubling``."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = Doubling.apply(x)  # type: ignore[no-untyped-call]
        out: Tensor = self.head(self.blocks[1](x))
        return out


@broken({PARITY: "off by 100.00%"}, may_fail=ALSO)
def function_with_another_backward() -> TrainingCase:
    return case("function_with_another_backward", model=DoublingNet)


def backend_that_detaches(graph: Any, inputs: Any) -> Callable[..., Any]:
    """Runs the captured graph with the first of its normalisations cut out of backward."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is F.layer_norm:
            with graph.graph.inserting_after(node):
                cut = graph.graph.call_method("detach", (node,))
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
            break
    graph.recompile()
    forward: Callable[..., Any] = graph.forward
    return forward


@broken({PARITY: "the loss is the same"}, may_fail=ALSO)
def backend_loses_a_gradient() -> TrainingCase:
    return case(
        "backend_loses_a_gradient", compile=lambda model: torch.compile(model, backend=backend_that_detaches)
    )


SCHEDULE = [1.0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def scale_now() -> float:
    return SCHEDULE[0]


class ScheduledNet(Net):
    """What it returns is scaled by a global that falls after five steps; the graph keeps its first value."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * scale_now()
        return out


def scheduled_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    SCHEDULE[0] = 1.0 if steps < 5 else 0.3
    optimizer.zero_grad()
    value = F.cross_entropy(model(micro_batches[0]["x"]), micro_batches[0]["y"])
    value.backward()
    optimizer.step()
    return value.detach()


@broken({PARITY: "compiled training leaves eager's loss in step"}, may_fail=ALSO)
def global_schedule_frozen_in_the_graph() -> TrainingCase:
    return case("global_schedule_frozen_in_the_graph", model=ScheduledNet, step=scheduled_step)


class RoundingNet(Net):
    """Under autocast to bfloat16; compiled, a gradient is a quarter too small, above what rounding does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            first = self.blocks[0](x)
            if torch.compiler.is_compiling():
                first = first + 0.25 * (first.detach() - first)
            out: Tensor = self.head(self.blocks[1](first))
        return out.float()


@broken({PARITY: "off by 25"}, may_fail=ALSO)
def gradient_too_small_in_bfloat16() -> TrainingCase:
    return case("gradient_too_small_in_bfloat16", model=RoundingNet)


class WarmerInEvaluation(Net):
    """Training is the same; compiled, evaluation alone computes with another temperature."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out / 1.05 if torch.compiler.is_compiling() and not self.training else out


@broken({PARITY: "something else in evaluation mode"}, may_fail=ALSO)
def evaluation_differs_when_compiled() -> TrainingCase:
    return case("evaluation_differs_when_compiled", model=WarmerInEvaluation)
