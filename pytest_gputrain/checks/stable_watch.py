"""What is measured in a rank at each step of a stability run, in well under a hundredth of the step's time.

Each step: a few elements of every parameter, not the same ones; bytes in use, open files, threads; time,
without that for which the rank was ready to run and others ran, or waited for other ranks. Every 50 steps:
all elements of parameters and gradients. On a GPU the times are the host's: when work is asked for, not when
it is done.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_gputrain.checks.stable_attached import Attached
from pytest_gputrain.checks.stable_clock import Arrivals, Clock, Moment, Waits
from pytest_gputrain.checks.stable_memory import Census, device_memory
from pytest_gputrain.checks.stable_weights import Sample, norms, weights
from pytest_gputrain.endurance.heap import HeapMeter
from pytest_gputrain.endurance.held import Held

_PROCESS_EVERY, _PROCESS_MOST = 8, 16  # steps between two questions about files, threads and host memory
_PROCESS_TIMES = 64  # in a run, where that is less often
ALL_EVERY = 50  # steps between two looks at every element
_HALF = 12  # characters of a digest for the pieces, and as many for all elements
_ASKED = 4  # optimizers' steps of a step before which the queue is asked for
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Watch:
    """Context manager around a rank's steps; for each ``load()``, ``begin()``, ``end()``, ``voted()``.

    ``load``: before the batch is drawn; ``begin`` and ``end``: right before and after the step; ``voted``:
    when the ranks have agreed after it. trained: the trained parameters; limit: steps the run has at most.
    rate: the highest learning rate seen.
    """

    def __init__(
        self,
        case: Any,
        model: Any,
        wrapped: Any,
        optimizer: Any,
        trained: Sequence[Any],
        device: Any,
        limit: int,
    ) -> None:
        from pytest_gputrain.trace.optimizers import OptimizerWatch

        self.rate: float | None = None
        self._trained, self._device, self._limit = list(trained), device, limit
        known = {"case": case, "model": model, "wrapped": wrapped, "optimizer": optimizer}
        self._on_gpu = device.type == "cuda"
        self._heap = HeapMeter(limit)
        self._census = Census(known, device, limit)
        self._clock = Clock()
        self._arrivals = Arrivals(self._clock)
        self._waits = Waits(self._clock, self._arrivals)
        self._parameters = Sample()
        self._optimizer = OptimizerWatch(optimizer, before=self._before)
        self._begun = self._ended = Moment()
        self._loaded: Moment | None = None
        self._updated: Moment | None = None
        self._updates = 0
        self._had_gradients: int | None = None
        self._rate: float | None = None
        self._attached = Attached(wrapped, optimizer)
        self._waited_since: float | None = None
        self._load_seconds = self._wait_seconds = 0.0
        self._told: Mapping[str, int] = {}
        self._process_every = max(_PROCESS_EVERY, min(_PROCESS_MOST, limit // _PROCESS_TIMES))
        self._step, self._norm, self._gradients_finite = 0, None, True  # type: int, float | None, bool

    def __enter__(self) -> Watch:
        self._optimizer.__enter__()
        self._waits.__enter__()
        self._arrivals.look_at([one for one in self._trained if not hasattr(one, "to_local")])
        return self

    def __exit__(self, *exception: object) -> None:
        self._arrivals.close()
        self._waits.__exit__()
        self._optimizer.__exit__(*exception)
        self._clock.close()

    def load(self) -> None:
        self._loaded = self._clock.glance(self._ended)

    def begin(self) -> None:
        self._step += 1
        self._norm, self._gradients_finite = None, True
        self._arrivals.last = None
        begun = self._clock.now()
        # The queue is asked for only where a step begins and ends and its gradients are there: a question
        # takes a hundredth of a millisecond or more. What it held between step and load is little.
        self._load_seconds = begun.own_since(self._loaded) if self._loaded else 0.0
        self._updated, self._updates, self._begun = None, 0, begun
        self._had_gradients = self._rate = None
        self._cpu = self._clock.cpu_seconds

    def end(self, step: int, seconds: float, loss: float | None = None) -> dict[str, Any]:
        """Fields of the step's record. loss: the step's; where it is not finite everything is looked at."""
        ended = self._clock.now()
        cpu = self._clock.cpu_seconds - self._cpu
        ill = loss is not None and not math.isfinite(loss)
        digest, whole, finite = self._weights(step, everything=ill or self._is_full(step))
        if ill and self._norm is None:
            self._all_gradients([one.grad for one in self._trained if one.grad is not None])
        heap = self._heap.read(step, seconds)
        memory = device_memory(self._device) if self._on_gpu else {}
        ready = self._arrivals.last
        updated = max(self._updated, ready or self._begun) if self._updated else None
        fields = {
            "grad_norm": self._norm,
            "finite": {"gradients": self._gradients_finite, "parameters": finite},
            "digest": digest,
            "whole_digest": whole,
            "cpu_seconds": cpu,
            "queued_seconds": min(ended.queued - self._begun.queued, seconds),
            "load_seconds": self._load_seconds,
            "ready_seconds": None if ready is None else ready.own_since(self._begun),
            "update_seconds": ended.own_since(updated) if updated else None,
            "updated": self._had_gradients,
            "rate": self._rate,
            "wait_seconds": self._wait_seconds,
            "heap_bytes": heap,
            **self._process(step),
            **memory,
            **self._census.look(step, memory.get("allocated_bytes", self._heap.last or 0)),
        }
        self._arrivals.learn()
        self._waited_since, self._loaded, self._ended = time.perf_counter(), None, ended
        return fields

    def voted(self) -> None:
        if self._waited_since is not None:
            self._wait_seconds = time.perf_counter() - self._waited_since

    def held(self) -> Held | None:
        """What memory that grew is made of and who holds it, after the last step. Runs Python's collector."""
        return self._census.held()

    def _process(self, step: int) -> Mapping[str, int]:
        """As it was up to fifteen steps ago: the kernel takes its time to tell."""
        if step % self._process_every == 0 or not self._told:
            self._told = {**process(), **self._attached.count()}
        return self._told

    def _is_full(self, step: int) -> bool:
        """The same on every rank, as the digests have to be."""
        return step % ALL_EVERY == 0 or step == self._limit

    def _weights(self, step: int, *, everything: bool) -> tuple[str, str | None, bool]:
        """(digest of what is looked at, of all elements where they are, whether all of it is finite)."""
        bits, finite = self._parameters.take(self._trained, step)
        digest = hashlib.blake2b(bits, digest_size=_HALF // 2).hexdigest()
        if not everything:
            return digest, None, finite
        of_all, all_finite = weights(self._trained)
        return digest + of_all[:_HALF], of_all, finite and all_finite

    def _before(self, optimizer: Any, held: list[Any] | None) -> None:
        """Right before an optimizer's step, when its gradients are there."""
        # Others may have had the processor since the last gradient, but hardly between many optimizers.
        self._updates += 1
        last = self._updated if self._updates > _ASKED else None
        self._updated = self._clock.glance(last) if last else self._clock.now()
        if held is not None:
            self._had_gradients = (self._had_gradients or 0) + sum(one.grad is not None for one in held)
        for group in getattr(optimizer, "param_groups", ()):
            rate = group.get("lr")
            if isinstance(rate, (int, float)):
                self._rate = max(self._rate or 0.0, float(rate))
        self.rate = max(self.rate or 0.0, self._rate) if self._rate is not None else self.rate
        if self._is_full(self._step):
            self._all_gradients([one.grad for one in held or () if one.grad is not None])

    def _all_gradients(self, gradients: list[Any]) -> None:
        if not gradients:
            return
        squares = sum(norm * norm for norm in norms(gradients)) + (self._norm or 0.0) ** 2
        self._norm = math.sqrt(squares) if math.isfinite(squares) else math.nan
        self._gradients_finite &= math.isfinite(squares)


def sampled(digest: str) -> str:
    """What a digest says of a few elements, in a step in which it says something of all as well."""
    return digest[:_HALF]


def process() -> Mapping[str, int]:
    """Of this process: host memory, open files, threads, small objects; nothing where nobody tells."""
    try:
        with open("/proc/self/statm", "rb") as file:
            rss = int(file.read().split()[1]) * _PAGE
        return {
            "rss_bytes": rss,
            "fds": len(os.listdir("/proc/self/fd")) - 1,
            "threads": len(os.listdir("/proc/self/task")),
            "objects": sys.getallocatedblocks(),
        }
    except (OSError, ValueError, IndexError):
        return {}
