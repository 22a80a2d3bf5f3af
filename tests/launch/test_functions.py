"""Functions on ranks: what travels there and back, what a rank finds, what it prints."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import LaunchDefaults, Launcher, LaunchError, Verdict
from tests.launch.torchs_own import without_gloo

FACTOR = 3


@dataclasses.dataclass
class Pair:
    left: int
    right: int


def helper(number: int) -> int:
    return number * FACTOR


def module_level(number: int) -> int:
    return helper(number) + int(os.environ["RANK"])


def test_a_module_level_function_with_its_helpers() -> None:
    assert launch(module_level, 5).values == [15, 16]


def test_a_closure_and_a_lambda() -> None:
    captured = {"a": 1}
    assert launch(lambda: (captured["a"], int(os.environ["RANK"]))).values == [(1, 0), (1, 1)]


def test_arguments_and_keyword_arguments() -> None:
    def program(a: int, *, b: int) -> int:
        return a - b

    assert launch(program, 5, b=2, world_size=1).values == [3]


def test_instances_of_a_test_modules_class_come_back_as_themselves() -> None:
    def program() -> Pair:
        return Pair(int(os.environ["RANK"]), 7)

    assert launch(program).values == [Pair(0, 7), Pair(1, 7)]


def test_a_rewritten_assertion_keeps_its_explanation() -> None:
    def program() -> None:
        value = 6
        assert value == helper(7)

    with pytest.raises(LaunchError) as caught:
        launch(program)
    assert "assert 6 == 21" in str(caught.value)
    assert str(caught.value).splitlines()[0].startswith("FAILED after ")


def test_a_rewritten_assertion_in_a_helper_of_the_module() -> None:
    with pytest.raises(LaunchError, match=r"assert 1 == \(1 \+ 1\)"):
        launch(asserting_helper)


def asserting_helper() -> None:
    one = 1
    assert one == one + 1


def test_the_process_group_is_ready() -> None:
    def program() -> Any:
        import torch
        import torch.distributed as dist

        total = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(total)
        return dist.get_backend(), dist.get_rank(), dist.get_world_size(), total

    values = launch(program, world_size=3).values
    assert [value[:3] for value in values] == [("gloo", rank, 3) for rank in range(3)]
    assert [value[3].item() for value in values] == [6.0, 6.0, 6.0]


def test_the_environment_is_torchruns() -> None:
    def program() -> Any:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        return {name: os.environ[name] for name in (*names, "OMP_NUM_THREADS")}

    first, second = launch(program).values
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "1", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != "0"
    assert first["OMP_NUM_THREADS"] == "1"


def test_a_second_group_can_be_made_through_the_environment() -> None:
    def program() -> int:
        import torch.distributed as dist

        dist.destroy_process_group()
        dist.init_process_group("gloo")
        size = dist.get_world_size()
        dist.barrier()
        return size

    assert launch(program).values == [2, 2]


def test_a_group_that_one_rank_destroys_at_once_was_there_on_all() -> None:
    def program() -> str | None:
        import torch.distributed as dist

        dist.destroy_process_group()
        return os.environ.get("TORCH_DIST_INIT_BARRIER")

    for _ in range(30):  # without the barrier 2 to 10 of 100 fail
        assert launch(program).values == [None, None]
    assert launch(program, env={"TORCH_DIST_INIT_BARRIER": "0"}, world_size=1).values == ["0"]


def test_env_is_added_and_none_removes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_TEST_GONE", "1")

    def program() -> Any:
        return os.environ.get("LAUNCH_TEST_A"), os.environ.get("LAUNCH_TEST_GONE")

    assert launch(program, env={"LAUNCH_TEST_A": "x", "LAUNCH_TEST_GONE": None}).values[0] == ("x", None)


def test_variables_that_python_reads_at_its_start_count_too() -> None:
    result = launch(lambda: hash("a"), env={"PYTHONHASHSEED": "123"}, world_size=2)
    assert result.values[0] == result.values[1]
    again = launch(lambda: hash("a"), env={"PYTHONHASHSEED": "123"}, world_size=1)
    assert again.values[0] == result.values[0]


def test_a_working_directory_that_is_removed_is_no_failure() -> None:
    def program() -> int:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
        return 1

    assert launch(program).values == [1, 1]


def test_each_launch_is_fresh() -> None:
    def program() -> Any:
        import torch

        before = (torch.get_default_dtype(), getattr(sys, "left_by_a_launch", None))
        torch.set_default_dtype(torch.float64)
        sys.left_by_a_launch = 1  # type: ignore[attr-defined]
        return str(before[0]), before[1], os.getpid()

    first, second = launch(program).values[0], launch(program).values[0]
    assert first[:2] == second[:2] == ("torch.float32", None)
    assert first[2] != second[2]


def test_unseeded_numbers_differ_between_ranks_and_launches() -> None:
    def program() -> Any:
        import random

        import numpy
        import torch

        return torch.initial_seed(), float(torch.rand(1)), float(numpy.random.rand()), random.random()

    drawn = [values for _ in range(2) for values in launch(program).values]
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == 4


def test_a_model_library_is_imported_once_for_all_later_launches() -> None:
    """And what torch imports only when it compiles. The server that forks the ranks gets no thread by it."""

    def program() -> tuple[bool, bool, int]:
        # A family that no other test imports: a new server knows those of the process that starts it.
        names = ("transformers.models.xlnet.modeling_xlnet", "torch._functorch.aot_autograd")
        there = [name in sys.modules for name in names]
        for name in names:
            importlib.import_module(name)
        return there[0], there[1], len(os.listdir(f"/proc/{os.getppid()}/task"))

    own_server = {"PYTHONHASHSEED": "5"}
    (*first, threads), _ = launch(program, env=own_server).values
    assert first == [False, False]
    assert launch(program, env=own_server).values == [(True, True, threads)] * 2


def test_tensors_and_parameters_come_back() -> None:
    def program() -> Any:
        import torch

        return {"p": torch.nn.Parameter(torch.arange(3.0)), "t": [torch.ones(2, dtype=torch.bfloat16)]}

    value = launch(program, world_size=1).values[0]
    assert value["p"].tolist() == [0.0, 1.0, 2.0]
    assert value["p"].requires_grad
    assert str(value["t"][0].dtype) == "torch.bfloat16"


def test_a_large_value_comes_back() -> None:
    values = launch(lambda: b"x" * 30_000_000).values
    assert [len(value) for value in values] == [30_000_000] * 2


def test_output_is_kept_by_rank_and_shown_once_if_the_same() -> None:
    def program() -> None:
        print("the same")
        print(f"I am {os.environ['RANK']}", file=sys.stderr)
        raise ValueError("boom")

    result = launch(program, check=False)
    if "[Gloo]" in result.ranks[1].stdout:
        pytest.skip("this torch prints a line on each rank that differs")
    assert result.ranks[1].stdout == "the same\n"
    assert result.ranks[1].stderr.startswith("I am 1\n")
    text = result.summary()
    assert text.count("the same") == 2  # the heading and the line
    assert "--- ranks 0-1 stdout (the same)" in text
    assert "I am 0" in text and "I am 1" in text


def test_output_written_below_python_is_kept() -> None:
    def program() -> None:
        os.write(1, b"from C\n")

    assert without_gloo(launch(program, world_size=1).ranks[0].stdout) == "from C\n"


def test_stdin_is_empty() -> None:
    assert launch(lambda: sys.stdin.read(), world_size=1).values == [""]


def test_artifacts_live_as_long_as_the_result() -> None:
    result = launch(lambda: print("hello"))
    folder = result.artifacts
    assert without_gloo((folder / "rank0" / "stdout.log").read_text()) == "hello\n"
    del result
    assert not folder.exists()


def test_artifacts_stay_in_a_given_folder(tmp_path: Path) -> None:
    launcher = Launcher(defaults=LaunchDefaults(artifacts=tmp_path / "a"))
    folder = launcher(lambda: print("hello")).artifacts
    assert folder.parent == tmp_path / "a"
    assert without_gloo((folder / "rank1" / "stdout.log").read_text()) == "hello\n"


def test_defaults_apply_and_the_call_wins() -> None:
    launcher = Launcher(defaults=LaunchDefaults(timeout=1.0))
    assert launcher(lambda: time.sleep(30), check=False).seconds < 20
    assert launcher(lambda: time.sleep(1.5), timeout=60).passed


def test_the_error_carries_the_result_and_survives_pickling() -> None:
    def program() -> None:
        raise ValueError("boom")

    with pytest.raises(LaunchError) as caught:
        launch(program)
    assert caught.value.result.verdict is Verdict.FAILED
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert isinstance(caught.value, AssertionError)


def test_launches_from_several_threads() -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(launch(lambda: n).values)) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [[0, 0], [1, 1], [2, 2]]


def test_eight_ranks() -> None:
    assert launch(lambda: int(os.environ["RANK"]), world_size=8).values == list(range(8))


def test_the_working_directory_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch(os.getcwd, world_size=1).values == [str(tmp_path)]


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of its own: other tests, in other processes, use the usual one.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert launch(tempfile.gettempdir).values == [str(tmp_path)] * 2
    # Importing torch._dynamo, as the server does, makes the cache folder that torch keeps for a user.
    assert [name for name in os.listdir(tmp_path) if not name.startswith("torchinductor_")] == []
