"""The documentation's examples, run as a reader would run them; what the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
README = (ROOT / "README.md").read_text()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=EXAMPLES, env=environment(), timeout=240, check=False,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def environment() -> dict[str, str]:
    import os

    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }


def pytest_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    # "-c /dev/null": the project's own settings are not the reader's.
    return run("pytest", "-c", "/dev/null", "-p", "pytest_gputrain", "-p", "no:cacheprovider", *arguments)


def test_the_examples_of_tests() -> None:
    """In one session, which imports torch and the model library once. Of the tour's checks, one."""
    which = "not test_training or gradients_arrive"
    files = ("test_uneven.py", "test_tour.py", "test_on_every_rank.py")
    done = pytest_here("--rootdir=.", "-v", "-rs", "-k", which, *files)
    assert done.returncode == 1, done.stdout
    the_failure_is_the_readmes(done.stdout.splitlines())
    assert outcomes(done.stdout, "test_uneven.py") == ["FAILED"], done.stdout
    tour = outcomes(done.stdout, "test_tour.py")
    assert tour == ["PASSED"] * 4 + ["SKIPPED"], done.stdout
    assert outcomes(done.stdout, "test_on_every_rank.py") == ["PASSED"] * 2 + ["SKIPPED"] * 2, done.stdout
    assert "needs 2 GPUs, found" in done.stdout


@pytest.mark.slow
def test_all_checks_of_the_tour() -> None:
    done = pytest_here("--rootdir=.", "-v", "test_tour.py", "-k", "test_training")
    assert done.returncode == 0, done.stdout
    tour = outcomes(done.stdout, "test_tour.py")
    assert tour.count("PASSED") == 14 and set(tour) == {"PASSED", "SKIPPED"}, done.stdout


def the_failure_is_the_readmes(shown: list[str]) -> None:
    start = next(number for number, line in enumerate(shown) if line.startswith("HUNG after"))
    assert "test_one_epoch" in shown[start - 1]  # nothing above the cause
    for line in shown[start : start + 4]:
        assert without_seconds(line) in without_seconds(README)


def outcomes(text: str, file: str) -> list[str]:
    """Of the tests of one file, passes first."""
    return sorted(re.findall(rf"^{re.escape(file)}::\S+ (PASSED|FAILED|SKIPPED|ERROR)", text, re.MULTILINE))


def without_seconds(text: str) -> str:
    return re.sub(r"after \d+\.\d s", "after N s", text)


def test_the_program_that_the_readme_shows_is_the_one_that_runs() -> None:
    program = (EXAMPLES / "test_uneven.py").read_text()
    assert program[program.index("def train_one_epoch") :].strip() in README


def test_the_test_on_every_rank_that_the_readme_shows_is_the_one_that_runs() -> None:
    program = (EXAMPLES / "test_on_every_rank.py").read_text()
    start = program.index("@distributed(world_size=2)\ndef test_gradients")
    assert program[start : program.index("\n\n", start)] in README


@pytest.mark.nightly
def test_the_command_line_on_the_examples_case() -> None:
    """The next one's, and the tour's checks."""
    done = run("pytest_gputrain", "check", "my_cases:llama", "--checks", "gradients_arrive,optimizer_covers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("2 passed, 0 failed, 0 skipped\n")


@pytest.mark.slow
def test_the_broken_case_that_the_readme_shows() -> None:
    checks = "gradients_arrive,checkpointing_parity,optimizer_covers"
    assert f"$ gputrain check my_cases:detached --checks {checks}\n" in README
    done = run("pytest_gputrain", "check", "my_cases:detached", "--checks", checks)
    assert done.returncode == 1
    for line in done.stdout.splitlines()[:4]:
        shown = re.sub(r" +\d+\.\d ", " N ", line)
        assert shown in re.sub(r" +\d+\.\d ", " N ", README)
    assert done.stdout.endswith("1 passed, 1 failed, 1 skipped\n")
    assert "1 passed, 1 failed, 1 skipped\n" in README


def test_the_report_that_the_documentation_shows(tmp_path: Path) -> None:
    phases = "--phases=ddp_steps,ddp_whole,single"
    done = run("pytest_gputrain", "diagnose", phases, "--out", str(tmp_path / "out"), "hangs.py")
    assert done.returncode == 1, done.stdout + done.stderr
    headline = next(line for line in done.stdout.splitlines() if line.startswith("HANG in "))
    assert headline in README and f"**{headline}**" in (ROOT / "docs" / "diagnose.md").read_text()
    assert f"**{headline}**" in (tmp_path / "out" / "SUMMARY.md").read_text()


def test_the_examples_need_nothing_for_developers() -> None:
    """From the checkout, with its own settings, where hypothesis is not installed."""
    without = "import sys, pytest; sys.modules['hypothesis'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "docs/examples/test_uneven.py"]
    done = subprocess.run(
        [sys.executable, "-c", without, *arguments], cwd=ROOT, env=environment(), timeout=240, check=False,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_python_file_is_run_by_one_of_these() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "test_uneven.py",
        "test_on_every_rank.py",
        "test_stays_compiled.py",  # by test_compile_example.py
        "test_tour.py",
        "my_cases.py",
        "train.py",
        "hangs.py",
    }


def test_the_readme_knows_the_options_and_the_checks() -> None:
    from pytest_gputrain.checks import all_check_ids
    from pytest_gputrain.plugin.settings_table import SETTINGS

    for setting in SETTINGS:
        assert setting.option in README
        assert setting.variable in README
    for check in all_check_ids():
        assert f"`{check}`" in README
