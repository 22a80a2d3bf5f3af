"""What the phase plan asks of a rank, by environment variables, and what the rank tells about itself.

``GPUTRAIN_MAX_STEPS=k``   the rank leaves, successfully, after its k-th optimizer step
``GPUTRAIN_BACKEND=gloo``  every process group is gloo, whatever the program asks for
``GPUTRAIN_SEED=n``        all random generators are seeded before the program starts
``GPUTRAIN_DDP_NO_SYNC=1`` DDP reduces nothing, as inside ``no_sync()``
``GPUTRAIN_GRAD_DIGEST=1`` each step's gradients are noted, in a few numbers a parameter
``GPUTRAIN_STUDY=folder``  where the rank writes ``facts_rank{r}.json`` (and ``gradients_rank{r}.jsonl``)

Changes no gradient. The step that is noted is the optimizer's: a program without one takes no step here.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytest_gputrain.trace.names import inner_model, named_parameters
from pytest_gputrain.trace.switches import SwitchError

BACKENDS = ("gloo", "nccl")
# Enough that two different gradients agree in all of them by chance only to within a tenth or so.
_PROJECTIONS = 4
WRITE_EVERY = 0.5  # seconds


def install(environ: Mapping[str, str], leave: Callable[[], None]) -> Study:
    """Does what the switches ask, for the rest of this process. ``leave`` ends the rank as passed.

    Raises SwitchError for a value that is not legal.
    """
    from pytest_gputrain.trace import limits

    max_steps = _whole(environ, "GPUTRAIN_MAX_STEPS", least=1)
    seed = _whole(environ, "GPUTRAIN_SEED", least=0)
    backend = environ.get("GPUTRAIN_BACKEND", "")
    if backend and backend not in BACKENDS:
        raise SwitchError(f"GPUTRAIN_BACKEND={backend!r} is not legal; give {' or '.join(BACKENDS)}")
    if seed is not None:
        _seed(seed)
    study = Study(environ)
    limits.replace_backend(backend, study.joined)

    def stepped(optimizer: Any, number: int) -> None:
        study.stepped(optimizer, number)
        if max_steps is not None and number >= max_steps:
            study.stopped(number)
            leave()

    limits.after_steps(stepped)
    limits.on_wrap(study.met, synchronise=not environ.get("GPUTRAIN_DDP_NO_SYNC"))
    if environ.get("GPUTRAIN_GRAD_DIGEST"):
        study.watch_gradients()
    return study


class Study:
    """What one rank tells: its backend, when its steps were, its model's layers and branches."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        folder = environ.get("GPUTRAIN_STUDY")
        self._folder = Path(folder) if folder else None
        self._rank = environ.get("RANK", "0")
        self._owner = os.getpid()
        self._written = 0.0
        self._names: dict[int, str] = {}
        self.facts: dict[str, Any] = {"began": time.time(), "steps": []}

    def joined(self, asked: str | None, used: str) -> None:
        """A process group was made."""
        if "backend" not in self.facts:
            self.facts |= {"backend": used, "asked": asked}
            if asked is not None and asked != used and asked.rpartition(":")[2] != used:
                print(f"[gputrain] backend {asked} replaced by {used} (GPUTRAIN_BACKEND)", flush=True)
            self._write()

    def stepped(self, optimizer: Any, number: int) -> None:
        """An optimizer step is over."""
        if number == 1 and "layers" not in self.facts and (model := _model_of(_held(optimizer))) is not None:
            self.met(model)
        self.facts["steps"].append(time.time())
        # A file a step would cost a fast loop more than its step.
        if number <= 10 or time.monotonic() - self._written > WRITE_EVERY:
            self._write()

    def met(self, model: Any) -> None:
        """A model is there: as soon as DDP wraps it, since it may never come to a step."""
        from pytest_gputrain.trace.layers import branches_of, layers_of

        self.facts |= {"layers": len(layers_of(inner_model(model))), "branches": branches_of(model)}
        self._write()

    def stopped(self, number: int) -> None:
        """The rank leaves now, because it was to take so many steps."""
        self.facts["stopped_after"] = number
        self._write()
        print(f"[gputrain] stopped after {number} steps (GPUTRAIN_MAX_STEPS)", flush=True)

    def watch_gradients(self) -> None:
        """Notes each step's gradients before the optimizer uses them."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            line = {"step": len(self.facts["steps"]) + 1, "gradients": self._gradients(optimizer)}
            if self._folder is not None:
                with (self._folder / f"gradients_rank{self._rank}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

        register_optimizer_step_pre_hook(before)

    def _gradients(self, optimizer: Any) -> dict[str, list[float] | None]:
        held = _held(optimizer)
        if not self._names and (model := _model_of(held)) is not None:
            self._names = {id(parameter): name for name, parameter in named_parameters(model).items()}
        return {
            self._names.get(id(parameter), f"(outside the model) {index}"): summarised(parameter.grad)
            for index, parameter in enumerate(held)
        }

    def _write(self) -> None:
        # A process that the rank forked (a data loader's worker) inherits the hooks and has nothing to tell.
        if self._folder is None or os.getpid() != self._owner:
            return
        path = self._folder / f"facts_rank{self._rank}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.facts), encoding="utf-8")
        part.replace(path)  # a rank may be killed at any moment
        self._written = time.monotonic()


def summarised(gradient: Any) -> list[float] | None:
    """Norm and a few projections on fixed random directions: near to equal only for equal gradients."""
    import torch

    from pytest_gputrain.trace.digest import whole

    if gradient is None:
        return None
    flat = whole(gradient).detach().flatten().double().cpu()
    directions = torch.Generator().manual_seed(flat.numel())
    dots = [
        float(flat @ torch.randn(flat.numel(), generator=directions, dtype=torch.float64))
        for _ in range(_PROJECTIONS)
    ]
    return [float(flat.norm()), *dots]


def _held(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _model_of(parameters: list[Any]) -> Any:
    """The living module that holds most of these parameters, the smallest of equals; None without one."""
    from pytest_gputrain.trace.models import roots

    ids = {id(parameter) for parameter in parameters}

    def holds(module: Any) -> tuple[int, int]:
        own = [id(parameter) in ids for parameter in module.parameters()]
        return sum(own), -sum(1 for _ in module.modules())

    best = max(roots(), key=holds, default=None)
    return best if best is not None and holds(best)[0] else None


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _whole(environ: Mapping[str, str], name: str, *, least: int) -> int | None:
    text = environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise SwitchError(f"{name}={text!r} is not legal; give a whole number from {least} up")
    return int(text)
