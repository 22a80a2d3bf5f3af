"""A compiled training loop as people run it, under a compile monitor: steps, evaluation, saving, toggles.

Runs in a rank and only records; ``compile_growth`` judges. A learning rate that changes with every step, the
first batches of the case's own stream, evaluation twice, a checkpoint, a look at the loss without gradients,
the stream's other shapes and its last batch, and steps enough to pass the recompile limit.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.loading import describe
from pytest_gputrain.checks.batch_columns import Shapes
from pytest_gputrain.checks.context import CheckContext

if TYPE_CHECKING:
    from pytest_gputrain.checks.compile_session import Compiled
    from pytest_gputrain.compile.records import CompileReport

# Past torch's limit of 8 recompiles, with what is compiled in the first steps.
FIRST_STEPS = 14
EVALUATED = 3
BETWEEN, LAST_STEPS = 3, 8
OTHER_SHAPES = 8
# A slow model gets fewer steps of each kind, after so long.
SECONDS = 90.0
DECAY = 0.97

TRAIN, EVALUATE, WITHOUT_GRAD, SAVE = "train", "eval", "no_grad", "save"


@dataclass(frozen=True)
class Unit:
    """One step of training (or evaluation, or saving). number: among all units, as the monitor's step.

    graphs: how many were compiled before it and after it; runs: of compiled graphs. batch: which one; shapes:
    of it. cpu_seconds: of this process, which a busy machine makes longer than its own time by less.
    """

    number: int
    phase: str
    index: int
    batch: str
    shapes: Shapes
    graphs: tuple[int, int]
    runs: int
    cpu_seconds: float = 0.0


@dataclass
class Loop:
    """What ran. is_itself: ``compile`` returned its own argument. left_out: why there was no evaluation."""

    units: list[Unit] = field(default_factory=list)
    report: CompileReport | None = None
    is_itself: bool = False
    left_out: str = ""


def run_loop(case: TrainingCase, ctx: CheckContext) -> Loop:
    """In a rank. Raises what the case raises."""
    from pytest_gputrain.checks.batch_shapes import draw
    from pytest_gputrain.checks.compile_context import backend_of
    from pytest_gputrain.checks.compile_session import build_compiled
    from pytest_gputrain.compile.monitor import compile_monitor

    drawn = draw(case, ctx)
    with backend_of(ctx):
        _begin_compiling()
    with backend_of(ctx), compile_monitor() as monitor:
        built = build_compiled(case, ctx)
        runner = _Runner(case, ctx, built, monitor)
        first = drawn.first[:FIRST_STEPS]
        others = [(i, b) for i, b in drawn.others() if i not in dict(first)][:OTHER_SHAPES]
        runner.train(first, FIRST_STEPS)
        runner.evaluate(first)
        runner.train(first, BETWEEN)
        runner.save()
        runner.train(first, BETWEEN)
        runner.without_grad(first)
        runner.train(first, BETWEEN)
        runner.without_grad(first)
        runner.evaluate(first)
        runner.train(others, len(others))
        runner.train(first, LAST_STEPS)
        loop = runner.loop
        loop.report, loop.is_itself = monitor.report(), not built.is_wrapped
    return loop


def _begin_compiling() -> None:
    """What torch does once in a process before it compiles anything is not this case's time."""
    import torch

    layer = torch.nn.Linear(2, 2)
    # Of no interest here: what cannot compile is told of the case's own model.
    with contextlib.suppress(Exception):
        torch.compile(layer)(torch.ones(1, 2)).sum().backward()
    torch._dynamo.reset()


class _Runner:
    """Takes the steps, one unit after the other."""

    def __init__(self, case: TrainingCase, ctx: CheckContext, built: Compiled, monitor: Any) -> None:
        self._case, self._ctx, self._built, self._monitor = case, ctx, built, monitor
        self._deadline = time.monotonic() + SECONDS
        self._steps = 0
        self.loop = Loop()

    def train(self, batches: list[tuple[int, Any]], number: int) -> None:
        """So many steps over the batches in turn."""
        from pytest_gputrain.checks.ranks import mark_progress
        from pytest_gputrain.checks.session import seed_for, take_step

        for step in range(number):
            if step and time.monotonic() > self._deadline:
                return
            mark_progress(self._steps)
            with self._unit(TRAIN, self._steps, batches[step % len(batches)]) as batch:
                seed = seed_for(self._ctx, self._steps)
                take_step(self._case, self._built.compiled, self._built.optimizer, [batch], seed)
            self._steps += 1
            _decay(self._built.optimizer)

    def evaluate(self, batches: list[tuple[int, Any]]) -> None:
        """The loss in evaluation mode, without gradients."""
        import torch

        with self._in_evaluation_mode(), torch.no_grad():
            for index in range(EVALUATED):
                self._loss(EVALUATE, index, batches[index % len(batches)])

    def without_grad(self, batches: list[tuple[int, Any]]) -> None:
        """The loss as a loop logs it in between: still in training mode."""
        import torch

        with torch.no_grad():
            self._loss(WITHOUT_GRAD, 0, batches[0])

    def save(self) -> None:
        """What the loop saves, written away."""
        import torch

        with self._unit(SAVE, 0, None):
            torch.save(self._case.state_dict(self._built.holder), io.BytesIO())

    def _loss(self, phase: str, index: int, chosen: tuple[int, Any]) -> None:
        if self.loop.left_out:
            return
        try:
            with self._unit(phase, index, chosen) as batch:
                self._case.loss(self._built.compiled, batch)
        except Exception as error:
            if self._raises_eagerly(chosen):
                self.loop.left_out = f"evaluation is left out: loss() raises {describe(error)}"
                return
            raise

    def _raises_eagerly(self, chosen: tuple[int, Any]) -> bool:
        """Whether the loss raises uncompiled, too: a loop with a step of its own may have no use for it."""
        import torch

        with torch.compiler.set_stance("force_eager"):
            try:
                self._case.loss(self._built.compiled, self._placed(chosen))
            except Exception:
                return True
        return False

    @contextlib.contextmanager
    def _in_evaluation_mode(self) -> Iterator[None]:
        built = self._built
        modules = [*built.holder.modules(), *built.model.modules()]
        modes = [module.training for module in modules]
        for module in (built.holder, built.model):
            module.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

    @contextlib.contextmanager
    def _unit(self, phase: str, index: int, chosen: tuple[int, Any] | None) -> Iterator[Any]:
        from pytest_gputrain.checks.batch_shapes import shapes_of

        number = len(self.loop.units)
        self._monitor.step(number, phase)
        graphs, runs = len(self._monitor.graphs), self._monitor.graph_runs
        batch = None if chosen is None else self._placed(chosen)
        shapes = () if batch is None else shapes_of(batch)
        began = time.process_time()
        yield batch
        took = time.process_time() - began
        compiled = graphs, len(self._monitor.graphs)
        name = "" if chosen is None else f"batch {chosen[0]}"
        ran = self._monitor.graph_runs - runs
        self.loop.units.append(Unit(number, phase, index, name, shapes, compiled, ran, took))

    def _placed(self, chosen: tuple[int, Any]) -> Any:
        """On the device, and copied: a step may change its batch in place."""
        from pytest_gputrain.checks.session import device_of

        device = device_of(self._ctx)
        return pytree.map_tensors(lambda tensor: tensor.to(device, copy=True), chosen[1])


def _decay(optimizer: Any) -> None:
    """A learning rate that is another number in every step, as a schedule makes it."""
    from pytest_gputrain.trace.optimizers import optimizers_in

    for inner in optimizers_in(optimizer):
        for group in inner.param_groups:
            if pytree.is_tensor(group["lr"]):
                group["lr"].mul_(DECAY)
            else:
                group["lr"] *= DECAY
