"""One branch from its launch to its result. Whatever happens to it stays its own affair."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gputrain.sweep import branch_log
from pytest_gputrain.sweep.findings import Observed, Rate, never_read, notes, observed_of, rates_of, wrong
from pytest_gputrain.sweep.gpus import HIDDEN
from pytest_gputrain.sweep.manifest import PlannedBranch, SweepError, digest
from pytest_gputrain.sweep.metrics import Reported, read_reported
from pytest_gputrain.sweep.prepare import Prepared
from pytest_gputrain.sweep.results import BranchResult, curve_of

if TYPE_CHECKING:
    from pytest_gputrain.launch import LaunchResult

CANCELLED = "CANCELLED"
# What a script reports and does is watched; gradients are not, which would cost a little and fill files.
_TRACE = {"grads": False, "ddp_buckets": False, "rates": True}


def blank(prepared: Prepared, branch: PlannedBranch, verdict: str, message: str = "") -> BranchResult:
    """A result with nothing in it yet but where it comes from."""
    return BranchResult(
        k=branch.k,
        name=branch.name,
        success=False,
        verdict=verdict,
        duration=0.0,
        exit_code=None,
        log_file=prepared.log(branch).name,
        planned_learning_rate=float(branch.values["learning_rate"]),
        message=message,
        config_sha256=branch.sha256,
        checkpoint_sha256=prepared.checkpoint.sha256,
        command=prepared.command_text,
        script_sha256=prepared.script_sha256,
    )


def run_branch(
    prepared: Prepared,
    branch: PlannedBranch,
    cancelled: Callable[[], bool],
    others: Callable[[], Sequence[Rate]],
) -> BranchResult:
    """Launch the branch, wait for it, write its log. Raises nothing that only concerns this branch.

    cancelled: asked while it runs; others: asked at its end, the branches that have passed by then.
    """
    from pytest_gputrain.devices.lease_folder import LeaseFolderError
    from pytest_gputrain.devices.leases import GpusOccupied, LeaseTimeout
    from pytest_gputrain.launch import LaunchCancelled, LaunchUsageError

    began = time.monotonic()
    launched, result = prepared.launched(branch), None
    try:
        _clear(prepared, branch)
        with _gpus(prepared, branch, cancelled) as gpus:
            began = time.monotonic()  # the wait for GPUs is not the branch's
            result = _launch(prepared, branch, cancelled, gpus)
        outcome = _judged(prepared, branch, result, others())
    except LaunchCancelled:
        outcome = blank(prepared, branch, CANCELLED, "cancelled while it ran")
    except (LeaseTimeout, GpusOccupied) as error:
        outcome = blank(prepared, branch, "SKIPPED", str(error))
    except (SweepError, LaunchUsageError, LeaseFolderError, OSError) as error:
        outcome = blank(prepared, branch, "FAILED", str(error))
    seconds = result.seconds if result is not None else time.monotonic() - began
    outcome = dataclasses.replace(outcome, duration=round(seconds, 3))
    with contextlib.suppress(OSError):  # a full disk takes no result away
        branch_log.finish(prepared.log(branch), outcome, launched, result)
        branch_log.remove(launched)
    return outcome


def _clear(prepared: Prepared, branch: PlannedBranch) -> None:
    """Nothing of an earlier run may be taken for this one's. Raises SweepError, OSError."""
    config = branch.config.read_bytes()
    if digest(config) != branch.sha256:
        raise SweepError(f"{branch.config} has changed since the sweep was started; run it again")
    prepared.metrics(branch).unlink(missing_ok=True)
    branch_log.remove(prepared.launched(branch))
    prepared.launched(branch).mkdir()
    branch_log.start(
        prepared.log(branch),
        branch=f"{branch.name} of {prepared.manifest.folder}" + (" (edited)" if branch.edited else ""),
        config=config.decode(errors="replace"),
        command=prepared.line(branch),
        launched=prepared.launched(branch),
    )


@contextlib.contextmanager
def _gpus(
    prepared: Prepared, branch: PlannedBranch, cancelled: Callable[[], bool]
) -> Iterator[tuple[str, ...]]:
    if prepared.gpus is None:
        yield ()
        return
    with prepared.gpus.held(f"gputrain branches run: {branch.name}", cancelled) as gpus:
        yield tuple(gpu.uuid for gpu in gpus)


def _launch(
    prepared: Prepared, branch: PlannedBranch, cancelled: Callable[[], bool], gpus: tuple[str, ...]
) -> LaunchResult:
    from pytest_gputrain.launch import LaunchDefaults, Launcher

    asked = prepared.asked
    defaults = LaunchDefaults(artifacts=prepared.launched(branch), device=asked.device, gpus=gpus)
    return Launcher(defaults=defaults, cancelled=cancelled).torchrun(
        asked.command.script,
        *prepared.arguments(branch),
        nproc=prepared.num_ranks,
        module=asked.command.module,
        timeout=asked.timeout,
        stall=asked.stall,
        env=_environment(prepared),
        trace=_TRACE,
        check=False,
    )


def _environment(prepared: Prepared) -> dict[str, str | None]:
    """On the CPU, no GPU, and no more threads than there are cores for all that runs at once."""
    if prepared.gpus is not None:
        return {}
    if prepared.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return dict(HIDDEN)
    cores = len(os.sched_getaffinity(0))
    return {**HIDDEN, "OMP_NUM_THREADS": str(max(1, cores // (prepared.jobs * prepared.num_ranks)))}


def _judged(
    prepared: Prepared, branch: PlannedBranch, result: LaunchResult, others: Sequence[Rate]
) -> BranchResult:
    from pytest_gputrain.trace.rates import has_opened, read_rates

    launched, values = prepared.launched(branch), branch.values
    reported = read_reported(prepared.metrics(branch), branch_log.printed_by_first(launched))
    observed = observed_of(read_rates(result.artifacts / "rank0"))
    outcome = dataclasses.replace(
        blank(prepared, branch, str(result.verdict)),
        success=result.passed,
        exit_code=_exit_code(result),
        final_loss=reported.final_loss,
        eval_loss=reported.eval_loss,
        tokens=reported.tokens,
        learning_rate=max(rates_of(observed, reported), default=None),
        curve=curve_of(reported.points, values),
    )
    if not result.passed:
        likely = f" (likely: {result.likely})" if result.likely else ""
        return dataclasses.replace(outcome, message=f"{result.cause}{likely}")
    outcome = _compared(outcome, values, observed, reported, prepared.checkpoint.rates, others)
    checkpoint = prepared.checkpoint.path
    if has_opened(result.artifacts / "rank0", checkpoint) is False:
        return dataclasses.replace(outcome, notes=(*outcome.notes, never_read(checkpoint.name)))
    return outcome


def _compared(
    outcome: BranchResult,
    values: Any,
    observed: Observed,
    reported: Reported,
    checkpoint_rates: Sequence[float],
    others: Sequence[Rate],
) -> BranchResult:
    """With what the run did otherwise than planned, which makes it FAILED although its script ended well."""
    if (found := wrong(values, observed, reported, checkpoint_rates, others)) is None:
        return dataclasses.replace(outcome, notes=tuple(notes(values, observed, reported)))
    return dataclasses.replace(outcome, success=False, verdict="FAILED", message=found)


def _exit_code(result: LaunchResult) -> int | None:
    """That of the rank that went wrong first; None where the launch ended it."""
    if result.passed:
        return 0
    if result.cause is None or result.cause.rank is None:
        return None
    rank = next((rank for rank in result.ranks if rank.rank == result.cause.rank), None)
    if rank is None or rank.state == "ended":
        return None
    if rank.signal is not None:
        return -int(getattr(signal, rank.signal, 0)) or None
    return rank.exit_code
