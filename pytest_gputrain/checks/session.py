"""Building a case's parts inside a rank, always the same way: seeded, on the device, in training mode."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.case.returned import stream_of
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.result import CheckFailed
from pytest_gputrain.trace.names import canonical_name, named_parameters

# Far apart, so that no step's seed of one rank is another step's of its neighbour.
_STEP_STRIDE, _RANK_STRIDE = 1_009, 1_000_003


def seed_everything(seed: int) -> None:
    """torch on all devices, random, and numpy where somebody uses it."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def seed_for(ctx: CheckContext, step: int, rank: int = 0) -> int:
    return ctx.seed + (step + 1) * _STEP_STRIDE + rank * _RANK_STRIDE


def device_of(ctx: CheckContext) -> Any:
    """This rank's device."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if ctx.device == "cuda" else torch.device("cpu")


def build_model(case: TrainingCase, ctx: CheckContext) -> Any:
    """Fresh weights, the same on every rank and in every process, on the device, in training mode."""
    from torch import nn

    seed_everything(ctx.seed)
    model = case.model()
    if not isinstance(model, nn.Module):
        raise CheckFailed(f"model() returned a {type(model).__name__}; it has to return a torch.nn.Module")
    model = model.to(device_of(ctx))
    # from_pretrained gives models in eval mode; parts that are frozen on purpose keep theirs.
    return model if model.training else model.train()


def build_alone(case: TrainingCase, ctx: CheckContext) -> Any:
    """A model for one process whose step may speak to it as to a wrapped one."""
    return as_if_wrapped(build_model(case, ctx))


def as_if_wrapped(model: Any) -> Any:
    """The same object with ``.module`` (itself) and ``.no_sync()`` (nothing), where it has none.

    A step written for DistributedDataParallel then runs without it, with no data-parallel code at all.
    Plain instance attributes: the class stays what it is, no submodule is added, and the model can still be
    copied and pickled, which a step may do (a moving average, a snapshot).
    """
    added = {"module": model, "no_sync": _nothing, "join": _nothing}
    for name, value in added.items():
        if not hasattr(model, name):
            # A layout that forbids this has no user step to serve anyway.
            with contextlib.suppress(AttributeError, TypeError):
                object.__setattr__(model, name, value)  # nn.Module's own would register a submodule
    return model


def _nothing(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """In the module's namespace, so that pickle finds it."""
    return contextlib.nullcontext()


def trained_parameters(model: Any, wrapped: Any, optimizer: Any) -> dict[str, Any]:
    """The model's parameters, and those the optimizer holds beside them (a loss with weights of its own)."""
    from pytest_gputrain.trace.optimizers import optimizers_in, parameters_of

    found = parameter_names(model, wrapped)
    known = {id(parameter) for parameter in found.values()}
    held = [parameter for inner in optimizers_in(optimizer) for parameter in parameters_of(inner)]
    for parameter in {id(one): one for one in held}.values():
        if id(parameter) not in known:
            found[f"(outside the model) {len(found)}"] = parameter
    return found


def parameter_names(model: Any, wrapped: Any) -> dict[str, Any]:
    """Every parameter of the wrapped model under the name it has in the bare one."""
    bare = {id(parameter): name for name, parameter in named_parameters(model).items()}
    named = {}
    for name, parameter in named_parameters(wrapped).items():
        # A wrapper of the user's own may hold the model under "module", as DDP does, or hold a copy.
        named[bare.get(id(parameter)) or canonical_name(name).removeprefix("module.")] = parameter
    return named


def build_optimizer(case: TrainingCase, model: Any, wrapped: Any) -> Any:
    """The optimizer, given the bare model if that is what the wrapped one trains."""
    same = {id(parameter) for parameter in model.parameters()} == {
        id(parameter) for parameter in wrapped.parameters()
    }
    return case.optimizer(model if same else wrapped)


def draw_batch(case: TrainingCase, ctx: CheckContext, step: int, rank: int = 0) -> Any:
    """The batch of one rank at one step: the same for the same numbers."""
    seed_everything(seed_for(ctx, step, rank))
    return case.batch(ctx.batch_size, device_of(ctx))


def take_step(case: TrainingCase, model: Any, optimizer: Any, micro_batches: Sequence[Any], seed: int) -> Any:
    """One call of the case's step, seeded."""
    seed_everything(seed)
    return case.step(model, optimizer, list(micro_batches))


def stream(case: TrainingCase, ctx: CheckContext) -> Iterator[Any]:
    """The case's data as its loop sees it, without end where only ``batch`` is given."""
    device = device_of(ctx)
    if case.has_own_batches:
        for batch in stream_of(case):
            yield pytree.to_device(batch, device)
    else:
        while True:
            yield case.batch(ctx.batch_size, device)


def loss_value(loss: Any) -> float | None:
    """A step's loss as a number; None where it returns nothing that is one."""
    if pytree.is_tensor(loss):
        return float(loss.detach().float().mean())
    return float(loss) if isinstance(loss, int | float) else None
