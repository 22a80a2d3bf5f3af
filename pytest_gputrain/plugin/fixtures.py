"""The fixtures. Each imports its room when first used, so that loading the plugin imports no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_gputrain.plugin import known_there, leasing

if TYPE_CHECKING:
    import torch

    from pytest_gputrain.batch.finder import BatchFinder
    from pytest_gputrain.plugin.compile import MonitorMaker
    from pytest_gputrain.plugin.launcher import PytestLauncher
    from pytest_gputrain.plugin.memory import GuardMaker
    from pytest_gputrain.trace.gradients import GradTracer


@pytest.fixture
def gpu_count(request: pytest.FixtureRequest) -> int:
    """Return how many GPUs this test may use: those that it holds, if it is marked ``requires_gpus``.

    ``CUDA_VISIBLE_DEVICES`` is respected (by index, UUID and MIG); no CUDA context is created.
    """
    from pytest_gputrain.devices import discover, visible_gpus

    return len(leasing.held(request.node) or visible_gpus(discover(), os.environ))


@pytest.fixture
def gpus(request: pytest.FixtureRequest) -> leasing.HeldGpus:
    """Return the GPUs that this test alone holds: ``index``, ``uuid``, ``name``, ``memory_bytes`` of each.

    The ranks of ``ddp_launcher`` see these alone; ``gpus.devices`` are their names in the pytest process
    itself.
    """
    if not (held := leasing.held(request.node)):
        pytest.fail(
            f"{request.node.nodeid}: the fixture gpus lists the GPUs that a test holds; "
            "mark the test requires_gpus(n)",
            pytrace=False,
        )
    return held


@pytest.fixture
def ddp_launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PytestLauncher:
    """Return a launcher: ``ddp_launcher(function, *args, world_size=2, …)`` runs the function on every rank.

    A launch that is not PASSED fails the test with the cause first; one that is SKIPPED skips the test.
    With ``check=False`` the ``LaunchResult`` comes back whatever the verdict.
    """
    from pytest_gputrain.plugin.launcher import launcher_for

    return launcher_for(request.node, tmp_path_factory.getbasetemp() / "gputrain")


@pytest.fixture
def grad_tracer() -> type[GradTracer]:
    """Return ``grad_tracer(model)``, a context manager that records which parameters got a gradient."""
    from pytest_gputrain.trace.gradients import GradTracer

    return GradTracer


# Under another name than the fixture's: `from pytest_gputrain import compile_monitor` is the function itself.
@pytest.fixture(name="compile_monitor")
def compile_monitor_fixture(request: pytest.FixtureRequest) -> MonitorMaker:
    """Return ``compile_monitor()``, a context manager that tells what torch.compile did in its block.

    Graphs, recompiles with dynamo's reason, graph breaks, the recompile limit, swallowed backend errors, and
    how often compiled graphs ran. Dynamo is reset before and after, its configuration put back.
    """
    from pytest_gputrain.plugin.compile import MonitorMaker

    return MonitorMaker(request.node)


@pytest.fixture
def oom_guard(request: pytest.FixtureRequest) -> GuardMaker:
    """Return ``oom_guard(limit=None, device=None)``, a context manager: a block of training under a limit.

    It tells the peak, what that was for, and what the block left behind; an out-of-memory leaves it as
    ``OutOfMemory``, after the memory has been freed.
    """
    from pytest_gputrain.plugin.memory import GuardMaker

    return GuardMaker(request.node)


@pytest.fixture
def batch_finder(request: pytest.FixtureRequest) -> BatchFinder:
    """Return ``batch_finder(case, **settings)`` or ``batch_finder(model=…, max_seq_len=…, **settings)``: the
    largest batch size that trains, as a ``Discovered``. Settings are those of ``find_batch``.

    On the GPU that the test holds, if it is marked ``requires_gpus``, else on the CPU, within its memory or
    the ``capacity`` given.
    """
    from pytest_gputrain.plugin.settings import settings_of
    from pytest_gputrain.plugin.told_figures import TellingFinder

    held = leasing.held(request.node)
    return TellingFinder(held.devices[0] if held else "cpu", settings_of(request.config).cache_dir)


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> int:
    """Return the number of this rank, in a test marked ``distributed``."""
    number: int = known_there.rank_of(request.node)
    return number


@pytest.fixture
def world_size(request: pytest.FixtureRequest) -> int:
    """Return the number of ranks of a test marked ``distributed``."""
    return known_there.world_size_of(request.node)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device of this rank, in a test marked ``distributed``: ``cpu``, or its GPU."""
    mine: torch.device = known_there.device_of(request.node)
    return mine
