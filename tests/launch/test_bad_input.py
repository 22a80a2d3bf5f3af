"""Bad input: one line with what was given, what is legal and the way out, before any rank starts."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pytest_gputrain
from pytest_gputrain.launch import LaunchUsageError, client

launch: Any = pytest_gputrain.launch  # Any: what is wrong here, mypy would refuse


def nothing() -> None:
    """Never runs."""


CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: launch(nothing, world_size=0), "world_size=0: must be an integer from 1 to 512"),
    (lambda: launch(nothing, world_size=-1), "world_size=-1: must be an integer from 1 to 512"),
    (lambda: launch(nothing, world_size="two"), "world_size='two': must be an integer from 1 to 512"),
    (lambda: launch(nothing, world_size=True), "world_size=True: must be an integer from 1 to 512"),
    (lambda: launch(nothing, isolation="hot"), "isolation='hot': must be one of 'fresh', 'warm'"),
    (lambda: launch(nothing, device="tpu"), "device='tpu': must be one of 'cpu', 'cuda'"),
    (
        lambda: launch(nothing, backend="mpi"),
        "backend='mpi': must be one of 'gloo', 'nccl', 'cpu:gloo,cuda:nccl'",
    ),
    (
        lambda: launch(nothing, backend="nccl"),
        "backend='nccl' needs device='cuda'; on device='cpu' use backend='gloo'",
    ),
    (
        lambda: launch(nothing, timeout=-5),
        "timeout=-5: must be a positive number of seconds; every launch has an end, so give a large number "
        "rather than none",
    ),
    (
        lambda: launch(nothing, stall=float("inf")),
        "stall=inf: must be a positive number of seconds; every launch has an end, so give a large number "
        "rather than none",
    ),
    (
        lambda: launch("train.py"),
        "target='train.py': must be a function; for a script use .torchrun(path)",
    ),
    (lambda: launch(nothing, env={"A": 1}), "env['A']=1: names and values must be strings; write '1'"),
    (
        lambda: launch(nothing, env="A=1"),
        "env='A=1': must be a mapping of names to strings (None removes a variable)",
    ),
    (lambda: launch.torchrun("train.py", nproc=0), "nproc=0: must be an integer from 1 to 512"),
    (lambda: launch.torchrun("t.py", max_restarts=-1), "max_restarts=-1: must be an integer of at least 0"),
    (
        lambda: launch.torchrun(3),
        "script=3: must be a path to a Python script, or a module name with module=True",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message[:30] for _, message in CASES])
def test_is_one_clear_line_and_starts_nothing(
    call: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "borrow", lambda environ: pytest.fail("a server was asked for"))
    with pytest.raises(LaunchUsageError, match=f"^{re.escape(message)}$"):
        call()


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    with pytest.raises(
        LaunchUsageError, match=r"2 ranks on device='cuda' need 2 GPUs, found 1 \(pretended GPU, by "
    ):
        launch(nothing, device="cuda")


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "train.py")
    with pytest.raises(
        LaunchUsageError, match=rf"^script {path!r} does not exist; give the path of a Python"
    ):
        launch.torchrun(path)
    with pytest.raises(LaunchUsageError, match="is a folder"):
        launch.torchrun(tmp_path)
    with pytest.raises(LaunchUsageError, match="for a module give module=True"):
        launch.torchrun("package.train")


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(LaunchUsageError, match=r"^module 'no_such.thing' cannot be found from /"):
        launch.torchrun("no_such.thing", module=True)


@pytest.mark.parametrize("endpoint", ["host", "host:port", ":29400", "host:70000"])
def test_an_endpoint_that_is_none(endpoint: str, tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    script.write_text("")
    with pytest.raises(LaunchUsageError, match=r"must be 'host:port', such as '10\.0\.0\.1:29400'"):
        launch.torchrun(script, nnodes=2, rdzv_endpoint=endpoint)


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan"])
def test_the_seconds_after_which_a_node_is_gone(
    seconds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.setenv("GPUTRAIN_NODE_TIMEOUT", seconds)
    with pytest.raises(LaunchUsageError) as raised:
        launch.torchrun(tmp_path / "train.py", nnodes=2, node_rank=0, rdzv_endpoint="127.0.0.1:29400")
    assert str(raised.value) == f"GPUTRAIN_NODE_TIMEOUT={seconds!r}: must be seconds above 0, such as 30"


def test_a_function_that_cannot_travel() -> None:
    lock = threading.Lock()
    with pytest.raises(
        LaunchUsageError, match=r"cannot be sent to the ranks: TypeError: cannot pickle '_thread.lock'"
    ):
        launch(lambda: lock)
