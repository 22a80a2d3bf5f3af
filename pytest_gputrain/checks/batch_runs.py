"""What a batch size really takes, found without any finder: real steps of the case, then evaluation.

A fresh model and optimizer a size; the case's own step, often enough for state that an optimizer makes late;
then its loss in evaluation mode. The bytes are those of the memory guard: of the accounting on CPU, of the
allocator on CUDA. Batches are drawn before, on the loader's account.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.context import CheckContext

if TYPE_CHECKING:
    from pytest_gputrain.memory.guard import OomGuard

# State comes with the first step, and lies beside the gradients from the second on.
STEPS = 3
# Apart from every step's seed: what a size takes is asked with the same data for every size.
_DATA_STEP = 7_000


@dataclass(frozen=True)
class Ran:
    """One size, tried. peak: bytes; shares: what they are for; where: in which phase memory ran out, or "".

    part: "optimizer", "evaluation", "first step" or "later step", of the phase.
    """

    peak: int
    shares: str
    where: str = ""
    part: str = ""


def run(
    case: TrainingCase,
    ctx: CheckContext,
    batch_size: int,
    *,
    accumulation: int = 1,
    limit: int | None = None,
    data: int = 0,
    evaluating: bool = True,
) -> Ran:
    """Trains and evaluates at this size. accumulation: micro-batches a step; data: other ones for another
    number.

    Raises whatever the case raises that is no out-of-memory.
    """
    from pytest_gputrain.checks.session import build_alone, device_of, seed_for, take_step
    from pytest_gputrain.memory.categories import describe
    from pytest_gputrain.memory.guard import OomGuard
    from pytest_gputrain.memory.oom import is_oom

    model = build_alone(case, ctx)
    optimizer = case.optimizer(model)
    batches = [draw(case, ctx, batch_size, step + data * STEPS) for step in range(STEPS)]
    step, guard = 0, OomGuard(limit, device_of(ctx), roots=roots_of(model, optimizer))
    try:
        with guard:
            for step in range(STEPS):
                batch = batches.pop(0)
                take_step(case, model, optimizer, [batch] * accumulation, seed_for(ctx, step + data * STEPS))
                raise_swallowed(guard)
            step = STEPS
            if evaluating:
                evaluate(case, model, batch)
                raise_swallowed(guard)
    except Exception as error:
        if not is_oom(error):
            raise
        part = "evaluation" if step == STEPS else part_of(error, step)
        return Ran(guard.peak_bytes, describe(guard.by_category), _where(part, step), part)
    return Ran(guard.peak_bytes, describe(guard.by_category))


def raise_swallowed(guard: OomGuard) -> None:
    """Raises the OutOfMemory that the case's own code has caught, to go on without that batch."""
    if guard.swallowed is not None:
        raise guard.swallowed


@contextlib.contextmanager
def quick_collection() -> Iterator[None]:
    """Collecting garbage passes over what is there already: torch's hundred thousands of objects.

    For a rank's process, after a first run has imported what is imported late.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _where(part: str, step: int) -> str:
    return {"evaluation": part, "optimizer": f"the optimizer's update of step {step}"}.get(
        part, f"step {step}"
    )


def draw(case: TrainingCase, ctx: CheckContext, batch_size: int, step: int) -> Any:
    """A batch of this size, the same for the same numbers."""
    from pytest_gputrain.checks.session import device_of, seed_everything, seed_for

    seed_everything(seed_for(ctx, _DATA_STEP + step))
    return case.batch(batch_size, device_of(ctx))


def evaluate(case: TrainingCase, model: Any, batch: Any) -> None:
    """The case's loss as an evaluation computes it; every module is in its mode again afterwards."""
    import torch

    with in_evaluation_mode(model), torch.no_grad():
        case.loss(model, batch)


@contextlib.contextmanager
def in_evaluation_mode(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def roots_of(model: Any, optimizer: Any) -> tuple[Any, ...]:
    """What a memory guard charges from the beginning, and tells apart."""
    from pytest_gputrain.trace.optimizers import optimizers_in

    return (model, *optimizers_in(optimizer))


def num_bytes(batch: Any) -> int:
    """What the batch's tensors take."""
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in pytree.tensors(batch))


def part_of(error: BaseException, step: int) -> str:
    """Of a step: whether an exception came from an optimizer's update, by the frames that it went through."""
    frames = [frame for link in _links(error) for frame in traceback.extract_tb(link.__traceback__)]
    in_optimizer = any("/torch/optim/" in Path(frame.filename).as_posix() for frame in frames)
    return "optimizer" if in_optimizer else "later step" if step else "first step"


def _links(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is not above the limit."""
    return max(size for size in range(1, limit + 1) if number % size == 0)
