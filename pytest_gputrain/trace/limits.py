"""Limits put on a program from outside: how many steps, on which backend, with or without DDP's reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def after_steps(on_step: Callable[[Any, int], None]) -> None:
    """Calls ``on_step(optimizer, n)`` after the n-th step of the first optimizer that steps.

    Only the first counts: a program with two optimizers (a generator and a discriminator) takes one training
    step where both have stepped. Optimizers that are no ``torch.optim.Optimizer`` are not seen.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    first: list[Any] = []
    count = 0

    def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        if not first:
            first.append(optimizer)
        if optimizer is first[0]:
            count += 1
            on_step(optimizer, count)

    register_optimizer_step_post_hook(stepped)


def replace_backend(backend: str, on_use: Callable[[str | None, str], None]) -> None:
    """From here on every process group is made with ``backend``, whatever the program asks for.

    on_use(asked, used): told of each. An empty ``backend`` replaces nothing and only tells.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    def replacing(original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            asked = given[position] if len(given) > position else kwargs.get("backend")
            # Asked for nothing: torch then takes what fits the devices, or the first group's.
            if backend and len(given) > position:
                given[position] = backend
            elif backend:
                kwargs["backend"] = backend
            made = original(*given, **kwargs)
            on_use(None if asked is None else str(asked), str(dist.get_backend()))
            return made

        return make

    # backend is the first argument of one, the third of the other.
    for name, position in (("init_process_group", 0), ("new_group", 2)):
        replaced = replacing(getattr(distributed_c10d, name), position)
        setattr(distributed_c10d, name, replaced)
        setattr(dist, name, replaced)


def on_wrap(wrapped: Callable[[Any], None], *, synchronise: bool) -> None:
    """Calls ``wrapped(model)`` with each model for which a DistributedDataParallel has been made.

    synchronise: with False it is as inside ``no_sync()`` for ever and reduces nothing. For one process: what
    fails then is the program's own arithmetic, not what DDP demands of it.
    """
    from torch.nn.parallel import DistributedDataParallel

    original = DistributedDataParallel.__init__

    @functools.wraps(original)  # others look at its signature
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.require_backward_grad_sync = synchronise
        wrapped(self.module)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
