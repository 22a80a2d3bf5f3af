"""The benchmarks run and say what they measured. Nothing here looks at a time: test machines are busy."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import _harness, compile_gpu, torchrun_script
from benchmarks._harness import ROOT

SECONDS = {"ours": [0.03, 0.02, 0.04], "rival": [3.0, 2.7, 3.3]}


def test_table_shows_medians_and_ratios() -> None:
    assert _harness.table(SECONDS, "ours").splitlines() == [
        "            median          min          max   runs     ratio",
        "ours       30.0 ms      20.0 ms      40.0 ms      3     1.0 x",
        "rival    3000.0 ms    2700.0 ms    3300.0 ms      3   100.0 x",
    ]


def test_rivals_run_in_turn() -> None:
    order: list[str] = []
    ways = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = _harness.interleave(ways, 2, warm_up=1, repeats={"a": 2})
    assert "".join(order) == "aab" * 3
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 4, "b": 2}


def test_table_without_a_base_has_no_ratios() -> None:
    assert "ratio" not in _harness.table(SECONDS)


def test_report_writes_where_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _harness.report("demo", SECONDS, {"times faster": 100.0}, ours="ours", results=tmp_path)
    document = json.loads((tmp_path / "demo.json").read_text())
    assert document["measured"]["rival"]["median_s"] == 3.0
    assert {"cpu", "cpu_cores", "torch", "commit", "time"} <= document["origin"].keys()
    assert "times faster: 100" in capsys.readouterr().out


def test_a_quick_run_writes_no_file_unless_told_to() -> None:
    assert _harness.options("", ["--quick"]).results is None
    assert _harness.options("", ["--quick", "--results", "here"]).results == Path("here")
    assert _harness.options("", []).results == _harness.RESULTS


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "pathlib.Path('pid').write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(RuntimeError, match="was not done after 6 s"):
        _harness.run_command([sys.executable, "hang.py"], timeout=6, cwd=tmp_path)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_temporary_files_go_into_the_scratch_folder_and_with_it() -> None:
    before = os.environ.get("TMPDIR")
    with _harness.scratch() as folder:
        assert os.environ["TMPDIR"] == str(folder)
    assert not folder.exists()
    assert os.environ.get("TMPDIR") == before


def test_compare_names_every_difference() -> None:
    mine = {"exit code": 0, "environ": {"RANK", "EXTRA"}, "argv": ["a"]}
    other = {"exit code": 1, "environ": {"RANK", "LOST"}, "argv": ["a"]}
    assert torchrun_script.compare("ok", mine, other) == [
        "ok: only launch.torchrun has environ EXTRA",
        "ok: only torchrun has environ LOST",
        "ok: exit code: launch.torchrun has 0, torchrun has 1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fresh_launch",
        "leases",
        "torchrun_script",
        "suite_20_tests",
        "deadlock_analysis",
        "certain_deadlock",
        "tracing_cost",
        "batch_search",
        "cache_hit",
        "prediction",
        "accumulation_overhead",
        "tp_golden",
        "compile_monitor_cost",
        "stability_cost",
        "stability_leaks",
    ],
)
def test_a_quick_run_gets_to_its_end(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--results", str(tmp_path)]
    _harness.run_command(command, timeout=280, cwd=ROOT)
    assert json.loads((tmp_path / f"{name}.json").read_text())["measured"]


def test_the_gpu_benchmark_says_in_a_line_that_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compile_gpu.main(["--quick"]) == 2
    assert capsys.readouterr().err == (
        "no GPU here: compile_gpu measures compiled training on one, and nothing was measured\n"
    )
