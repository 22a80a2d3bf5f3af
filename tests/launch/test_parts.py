"""The small parts of a launch, without processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.launch import libraries, observe, output, payload, place, process, stacks, wire
from pytest_gputrain.launch.member import Member

DUMP = """\
--- dump 10:00:00
Current thread 0x01 (most recent call first):
  File "/home/me/old.py", line 1 in old
--- dump 10:00:01
Thread 0x02 [worker] (most recent call first):
  File "/home/me/data.py", line 3 in load

Current thread 0x01 [python] (most recent call first):
  File "{torch}/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/home/me/train.py", line 57 in step
  File "{ours}/launch/rank.py", line 120 in run_function
  File "{ours}/launch/server.py", line 10 in main
""".replace("{ours}", str(Path(stacks.__file__).parents[1])).replace("{torch}", stacks._torch_folder()[:-1])


def test_the_last_dump_is_read_down_to_this_package() -> None:
    text = stacks.last_dump(DUMP)
    assert "old.py" not in text
    assert text.endswith('  File "/home/me/train.py", line 57 in step\n  (below: pytest_gputrain.launch)')


def test_the_main_thread_the_user_frame_and_the_wait_are_found() -> None:
    frames = stacks.main_thread(DUMP)
    assert str(stacks.user_frame(frames)) == "/home/me/train.py:57 in step"
    assert stacks.in_collective(frames)
    assert not stacks.in_collective(frames[1:])
    engine = stacks.Frame("/site-packages/torch/autograd/graph.py", 979, "_engine_run_backward")
    assert stacks.in_backward([engine, *frames])
    assert not stacks.in_backward([frames[-1], engine])
    assert not stacks.in_backward([])
    assert stacks.main_thread("nothing") == []
    assert stacks.user_frame([]) is None


def test_the_checks_own_frames_are_named_only_where_nothing_else_is_left() -> None:
    package = Path(stacks.__file__).parents[1]
    names = [package / "case/defaults.py", package / "checks/peers.py", package / "launch/rank.py"]
    step, vote, rank = (stacks.Frame(str(name), 1, "f") for name in names)
    library = stacks.Frame("/usr/lib/python3/site-packages/transformers/trainer.py", 2, "loss")
    user = stacks.Frame("/home/me/train.py", 3, "loss")
    assert stacks.user_frame([step, library, user, vote, rank]) == user
    assert stacks.user_frame([step, library, vote, rank]) == library
    assert stacks.user_frame([step, vote, rank]) == step
    assert stacks.user_frame([rank]) is None


@given(st.lists(st.tuples(st.dictionaries(st.text(), st.integers()), st.binary(max_size=5000)), max_size=8))
def test_frames_survive_any_cutting(frames: list[tuple[dict[str, int], bytes]]) -> None:
    left, right = socket.socketpair()
    with left, right:
        reader = wire.Reader(right)
        for header, body in frames:
            wire.send(left, header, body)
        left.close()
        received = []
        while reader.read():
            received += list(reader.frames())
    assert received == frames


def test_a_long_stream_keeps_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "stdout.log"
    path.write_bytes(b"first\n" + b"x" * 20_000_000 + b"\nlast\n")
    output.relieve(path)
    assert path.stat().st_size == 20_000_012
    assert path.stat().st_blocks * 512 < 5_000_000
    text = output.read(path)
    assert text.startswith("first\n") and text.endswith("\nlast\n")
    output.compact(path, text)
    assert path.read_text() == text


def test_a_missing_stream_is_empty(tmp_path: Path) -> None:
    assert output.read(tmp_path / "none") == ""
    output.relieve(tmp_path / "none")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 3], "ranks 0-3"), ([3, 0, 1], "ranks 0-1, 3"), ([0, 2], "ranks 0, 2")],
)
def test_ranks_are_listed_briefly(ranks: list[int], text: str) -> None:
    assert output.rank_list(ranks) == text


def test_several_ranks_wait_where_one_waits() -> None:
    assert output.told_of([0], "waits in barrier #1") == "rank 0: waits in barrier #1"
    assert output.told_of([0, 1], "waits in barrier #1") == "ranks 0-1: wait in barrier #1"
    assert output.told_of([1, 2], "is in backward") == "ranks 1-2: are in backward"
    assert output.told_of([1, 2], "was still running") == "ranks 1-2: were still running"
    assert output.told_of([1, 2], "finished") == "ranks 1-2: finished"


def test_last_lines_say_what_is_missing_and_are_bounded() -> None:
    assert output.last_lines("a\nb\nc\n", 2) == "[1 line before]\nb\nc"
    assert len(output.last_lines("x" * 10_000, 5)) == 400


def test_a_temporary_folder_is_where_tmpdir_says_or_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert output.temporary_folder("it-").parent == tmp_path
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    for least, where in ((0, tmp_path), (1 << 62, Path("/tmp"))):
        monkeypatch.setattr(output, "_MEMORY", str(tmp_path))
        monkeypatch.setattr(output, "_FREE", least)
        made = output.temporary_folder("it-")
        made.rmdir()
        assert made.parent == where
    monkeypatch.setattr(output, "_MEMORY", str(tmp_path / "missing"))
    made = output.temporary_folder("it-")
    made.rmdir()
    assert made.parent == Path("/tmp")


def test_a_module_of_another_class_travels_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``torch._dynamo.config`` is one, and a function that sets something there names it."""
    # Where it is not set, the first import of dynamo in a process sets it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    import torch._dynamo

    config = torch._dynamo.config
    target, _, _ = payload.unpack_call(payload.pack_call(lambda: config, [], {}))
    assert target() is config


def test_a_call_travels() -> None:
    captured = [1, 2]
    target, args, kwargs = payload.unpack_call(
        payload.pack_call(lambda x, y: (captured, x, y), [3], {"y": 4})
    )
    assert target(*args, **kwargs) == ([1, 2], 3, 4)


def test_no_value_is_none() -> None:
    assert payload.unpack_value(b"") is None
    assert payload.unpack_value(payload.pack_value({"a": [1]})) == {"a": [1]}


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_a_rank_that_is_not_ready_to_answer_is_not_killed_by_the_question(tmp_path: Path) -> None:
    assert process.catches(os.getpid(), signal.SIGINT)
    assert not process.catches(os.getpid(), place.DUMP_SIGNAL)
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "stacks.txt").touch()
    with subprocess.Popen(["sleep", "300"]) as child:
        member = Member(0)
        member.pid = child.pid
        observe.dump([member], tmp_path)
        try:
            assert child.poll() is None
            assert member.waiting_at is None
        finally:
            child.kill()


def test_a_fork_server_imports_files_of_models_that_its_owner_has_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("timm", "timm.layers", "transformers.models.mine.modeling_mine", "numpy.modeling_none")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert set(libraries.imported()) >= {*names[:3]}
    found = libraries.with_models()
    assert [name in found for name in names] == [True, False, True, False]
    assert "timm" not in libraries.imported(known=frozenset(sys.modules))
