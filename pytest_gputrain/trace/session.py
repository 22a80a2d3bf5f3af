"""Traces whatever trains in this process, through torch's global hooks and constructors alone.

Changes no gradient, and adds nothing to modules or parameters that would be saved with them. Everything is
taken off again at the end. Does not see steps of optimizers that are not torch's, nor gradients that are
assigned by hand.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pytest_gputrain.trace.ddp import Bucket, BucketTracer, patched_constructor
from pytest_gputrain.trace.heartbeat import Beat, Heartbeat
from pytest_gputrain.trace.lines import bucket_line, gradient_lines
from pytest_gputrain.trace.models import Models
from pytest_gputrain.trace.module_backward import ModuleTracer, roots_met
from pytest_gputrain.trace.optimizers import Held, OptimizerWatch
from pytest_gputrain.trace.rates import Rates
from pytest_gputrain.trace.rewiring import Rewiring
from pytest_gputrain.trace.sink import Progress, Sink
from pytest_gputrain.trace.steps import patched_backward
from pytest_gputrain.trace.switches import Switches
from pytest_gputrain.trace.vitals import Vitals
from pytest_gputrain.trace.watchdog import Watchdog


class Session:
    """One rank's tracing: ``install`` puts it in place, ``remove`` takes every hook off again.

    watchdog_seconds: without movement for so long the stacks are written; the switch goes before.
    """

    def __init__(self, switches: Switches, folder: Path, rank: int, watchdog_seconds: float) -> None:
        self.switches, self.rank = switches, rank
        self.progress = Progress()
        self.sink = Sink(folder, (*switches.printed, "rewiring"))
        self.rewiring = Rewiring(switches, self.sink)
        self.models = Models(self.rewiring.rewire, self._arrived)
        self.buckets: list[BucketTracer] = []
        self.modules = ModuleTracer(self.models.names, self.sink, self.progress)
        self._heartbeat = Heartbeat(folder, rank)
        self._rates = Rates(folder) if "rates" in switches.tracers else None
        self._vitals = Vitals(self._heartbeat) if "heartbeat" in switches.tracers else None
        seconds = switches.watchdog_seconds or watchdog_seconds
        self._watchdog = Watchdog(folder, rank, seconds, self.progress, self.describe, self._stood_still)
        self._stack = contextlib.ExitStack()
        self._installed = False
        self._pid = os.getpid()
        self._depth = self._backwards = self._counted = 0
        self._stepped_within = self._has_optimizer = False

    def install(self) -> Session:
        """Imports torch and hooks it."""
        enter, on = self._stack.enter_context, self.switches.tracers
        self._installed = True
        enter(patched_backward(self._backward))
        enter(OptimizerWatch(None, self._steps, self._steps))
        enter(_watched_groups(self._group_added))
        enter(patched_constructor(self.rewiring.ddp_options, self._wrapping, self._wrapped))
        if "module_bwd" in on:
            enter(self.modules.hooked())
        if "module_bwd" in on or self.rewiring.unmet:
            enter(roots_met(self._meet))
        if self._rates is not None:
            enter(self._rates.watching())
        if self._vitals is not None:
            enter(self._vitals.watching())
            self._stack.callback(self._heartbeat.close)
            self._heartbeat.beat(Beat(0, "start"))
        if "watchdog" in on:
            enter(self._watchdog.running())
        return self

    def remove(self) -> None:
        """Writes what is not yet written, and takes everything off. Twice is once."""
        if os.getpid() != self._pid:  # a child that the script has forked: the threads and files are not its
            return
        if self._installed:
            self._installed = False
            self._end_step(None)
            if self._vitals is not None:
                self._vitals.step_ended(self.progress.step, "end")
            self._stack.close()
            self.models.close()
            self.sink.close()

    def describe(self) -> str:
        """How far the rank is, for a stack dump: gradients of the step so far, the last traced lines."""
        said = [f"step {self.progress.step + 1}, {self._backwards} backward passes so far"]
        for model in self.models:
            order, missing = model.gradients.order, model.gradients.missing
            said += gradient_lines(self.progress.step + 1, len(order), missing, model.label)
            said += [f"  - ARRIVED: {name}" for name in order]
        return "\n".join([*said, "", "the last lines traced:", *self.sink.recent, ""])

    def _stood_still(self, file: str) -> None:
        if self._vitals is not None:
            self._heartbeat.beat(Beat(self.progress.step, f"nothing moved, stacks in {file}"))

    def _meet(self, module: Any) -> bool:
        """A module is called; True when no module needs to be met any more."""
        self.models.meet(module)
        return "module_bwd" not in self.switches.tracers and not self.rewiring.unmet

    def _group_added(self, parameters: Iterable[Any]) -> None:
        self._has_optimizer = True
        self.models.holding(parameters)

    def _wrapping(self, module: Any) -> None:
        self.progress.beat()
        self.models.meet(module)

    def _wrapped(self, ddp: Any, parameters: list[Any], buckets: list[list[int]]) -> None:
        self.rewiring.met.add("ddp")
        if "ddp_buckets" in self.switches.tracers:
            self.buckets.append(BucketTracer(ddp, parameters, buckets, self._bucket_full))

    def _bucket_full(self, bucket: Bucket) -> None:
        self.sink.write("ddp_buckets", [bucket_line(self.rank, bucket.num_elements, bucket.dtype)])

    def _arrived(self, parameter: Any) -> None:
        self.progress.beat()
        for buckets in self.buckets:
            buckets.arrived(parameter)

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._installed or self._depth:  # reentrant checkpoints call backward within backward
            return original(*args, **kwargs)
        self._begin(args[0] if args else kwargs.get("tensors"))
        self._depth += 1
        try:
            outcome = original(*args, **kwargs)
        finally:
            self._depth -= 1
        for buckets in self.buckets:
            buckets.end()
        self.progress.beat()
        # Optimizers may step in gradient hooks, parameter by parameter. Without one of torch's, each backward
        # is taken for a step.
        if self._stepped_within or not self._has_optimizer:
            self._stepped_within = False
            self._end_step(None)
        return outcome

    def _begin(self, tensors: Any) -> None:
        self.progress.beat()
        self._backwards += 1
        if self._backwards == 1 and not list(self.models):  # nobody has made an optimizer
            self.models.all_of_the_script()
        self.buckets = [buckets for buckets in self.buckets if buckets.alive]
        for buckets in self.buckets:
            buckets.begin()
        if self._vitals is not None:
            self._vitals.backward_begins(tensors)

    def _steps(self, optimizer: Any, held: Held) -> None:
        """Before and after every optimizer step; after, because a closure may have run backward in it."""
        self.progress.beat()
        if self._depth:
            self._stepped_within = True
        else:
            self._end_step(held)

    def _end_step(self, held: Held) -> None:
        """Reports the models that an optimizer holds parts of, unless a first one for them already has."""
        ids = None if held is None else {id(parameter) for parameter in held}
        several = len(list(self.models)) > 1
        for model in self.models:
            if model.num_backwards == self._backwards:
                continue
            parameters = model.parameters()
            if ids is not None and not any(id(parameter) in ids for parameter in parameters.values()):
                continue
            model.num_backwards = self._backwards
            self._count_step()
            num_arrived, missing = model.end_step(parameters)
            if "grads" in self.switches.tracers:
                label = model.label if several else None
                self.sink.write("grads", gradient_lines(self.progress.step, num_arrived, missing, label))
            if self.progress.step == 1 and self._installed:
                self.rewiring.require_effect()

    def _count_step(self) -> None:
        """Two models trained by the same backward passes make one step."""
        if self._counted != self._backwards:
            self._counted = self._backwards
            self.progress.step += 1
            if "module_bwd" in self.switches.tracers:
                self.modules.end_step()
            if self._vitals is not None:
                self._vitals.step_ended(self.progress.step)


@contextlib.contextmanager
def _watched_groups(holding: Callable[[Iterable[Any]], None]) -> Iterator[None]:
    """Tells the parameters of every group that a torch optimizer gets."""
    from torch.optim import Optimizer

    original: Any = Optimizer.add_param_group

    @functools.wraps(original)
    def add_param_group(self: Any, param_group: Any) -> None:
        original(self, param_group)
        holding(self.param_groups[-1]["params"])

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]
