"""Settings: command line > environment > ini, and every value that is not legal says where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run

SHOW = """
from pytest_gputrain.plugin.settings import settings_of

def test_show(request):
    settings = settings_of(request.config)
    print("SHOWN", settings.cases, settings.report, settings.require_gpus, settings.timeout, settings.stall)
    for name, origin in settings.origins.items():
        print("ORIGIN", name, "=", origin)
"""


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUTRAIN_LEASE_DIR")  # which keeps the other tests from waiting for each other


def test_defaults(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(SHOW)
    result = run("-s")
    result.stdout.fnmatch_lines(["*SHOWN () None None 300.0 60.0", "*ORIGIN timeout = default"])
    result.stdout.fnmatch_lines(["gputrain: timeout 300 s, stall 60 s"])


def test_ini(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(SHOW)
    pytester.makeini(
        "[pytest]\ngputrain_timeout = 20\ngputrain_case =\n  a.b:c\n  d:e\ngputrain_report = out\n"
    )
    result = run("-s")
    result.stdout.fnmatch_lines([f"*SHOWN ('a.b:c', 'd:e') {pytester.path / 'out'} None 20.0 60.0"])
    result.stdout.fnmatch_lines(["*ORIGIN timeout = gputrain_timeout in tox.ini"])


def test_pyproject(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(SHOW)
    pytester.makepyprojecttoml(
        "[tool.pytest.ini_options]\n"
        "gputrain_case = ['a.b:c', 'd:e']\ngputrain_stall = 7\ngputrain_stability = true\n"
    )
    result = run("-s")
    result.stdout.fnmatch_lines(["*SHOWN ('a.b:c', 'd:e') None None 300.0 7.0"])
    result.stdout.fnmatch_lines(["*ORIGIN stability = gputrain_stability in pyproject.toml"])


def test_environment_goes_before_ini(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(SHOW)
    pytester.makeini("[pytest]\ngputrain_timeout = 20\ngputrain_stall = 3\n")
    monkeypatch.setenv("GPUTRAIN_TIMEOUT", "30")
    monkeypatch.setenv("GPUTRAIN_STALL", "")
    monkeypatch.setenv("GPUTRAIN_CASE", "a:b, c:d")
    result = run("-s")
    result.stdout.fnmatch_lines(["*SHOWN ('a:b', 'c:d') None None 30.0 3.0"])
    result.stdout.fnmatch_lines(["*ORIGIN timeout = the environment variable GPUTRAIN_TIMEOUT"])


def test_command_line_goes_before_environment(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(SHOW)
    monkeypatch.setenv("GPUTRAIN_TIMEOUT", "30")
    monkeypatch.setenv("GPUTRAIN_CASE", "a:b")
    result = run(
        "-s",
        "--gputrain-timeout",
        "40",
        "--gputrain-case",
        "x:y",
        "--gputrain-case",
        "z:w",
        "--gputrain-report=r",
    )
    result.stdout.fnmatch_lines([f"*SHOWN ('x:y', 'z:w') {pytester.path / 'r'} None 40.0 60.0"])
    result.stdout.fnmatch_lines(
        [
            "gputrain: case x:y z:w (from the command line), report */r (from the command line), "
            "timeout 40 s (from the command line), stall 60 s"
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gputrain-timeout=-1"],
            "--gputrain-timeout: '-1' (from the command line) is not legal; give a number of seconds above 0",
        ),
        (
            ["--gputrain-timeout=inf"],
            "--gputrain-timeout: 'inf' (from the command line) is not legal; "
            "give a number of seconds above 0",
        ),
        (
            ["--gputrain-stall=soon"],
            "--gputrain-stall: 'soon' (from the command line) is not legal; give a number of seconds above 0",
        ),
        (
            ["--require-gpus=-2"],
            "--require-gpus: '-2' (from the command line) is not legal; "
            "give a number of GPUs, 0 (none required) or more",
        ),
        (
            ["--require-gpus=two"],
            "--require-gpus: 'two' (from the command line) is not legal; "
            "give a number of GPUs, 0 (none required) or more",
        ),
        (
            ["--gputrain-case=nocolon"],
            "--gputrain-case: 'nocolon' (from the command line) is not legal; "
            "give MODULE:ATTRIBUTE, such as my_project.cases:gpt",
        ),
        (
            ["--gputrain-report=test_show.py/deep/below"],
            "--gputrain-report: 'test_show.py/deep/below' (from the command line) is not legal; "
            "give a folder, there or not yet there",
        ),
        (
            ["--gputrain-lease-dir=test_show.py/below"],
            "--gputrain-lease-dir: 'test_show.py/below' (from the command line) is not legal; "
            "give a folder, there or not yet there",
        ),
        (
            ["--gputrain-cache-dir=test_show.py"],
            "--gputrain-cache-dir: 'test_show.py' (from the command line) is not legal; "
            "give a folder, there or not yet there",
        ),
        (
            ["--gputrain-report=test_show.py"],
            "--gputrain-report: 'test_show.py' (from the command line) is not legal; "
            "give a folder, there or not yet there",
        ),
    ],
)
def test_bad_option_is_a_usage_error(
    pytester: pytest.Pytester, run: Run, arguments: list[str], message: str
) -> None:
    pytester.makepyfile(test_show=SHOW)
    result = run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {message}" in result.errlines


def test_bad_environment_names_the_variable(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(SHOW)
    monkeypatch.setenv("GPUTRAIN_STABILITY", "maybe")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = (
        "--stability: 'maybe' (from the environment variable GPUTRAIN_STABILITY) is not legal; "
        "give true or false"
    )
    assert f"ERROR: {message}" in result.errlines


def test_a_misspelt_variable_is_a_usage_error(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(SHOW)
    monkeypatch.setenv("GPUTRAIN_STAL", "5")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = "GPUTRAIN_STAL='5': there is no such variable; did you mean GPUTRAIN_STALL?"
    assert f"ERROR: {message}" in result.errlines


def test_bad_ini_names_key_and_file(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(SHOW)
    pytester.makeini("[pytest]\ngputrain_require_gpus = all\n")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = (
        "--require-gpus: 'all' (from gputrain_require_gpus in tox.ini) is not legal; "
        "give a number of GPUs, 0 (none required) or more"
    )
    assert f"ERROR: {message}" in result.errlines


def test_bad_pretended_gpus_are_a_usage_error(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(SHOW)
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "eight")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = (
        "GPUTRAIN_FAKE_GPUS='eight' is not legal: give a number of GPUs from 0 to 1024, "
        'alone or with their memory, such as "8" or "8x80GB"'
    )
    assert f"ERROR: {message}" in result.errlines


def test_usage_error_stops_an_xdist_session(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(SHOW)
    result = run_child("-n", "2", "--gputrain-timeout=0")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_settings_reach_xdist_workers(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(
        SHOW.replace("settings.timeout,", "settings.timeout,\n    ") + "    assert settings.timeout == 33\n"
    )
    result = run_child("-n", "1", "--gputrain-timeout=33")
    result.assert_outcomes(passed=1)


def test_options_are_listed_with_their_twins(pytester: pytest.Pytester, run: Run) -> None:
    help_text = " ".join(run("--help").stdout.str().split())
    assert "(environment: GPUTRAIN_REQUIRE_GPUS; ini: gputrain_require_gpus)" in help_text
    assert "(environment: GPUTRAIN_CASE; ini: gputrain_case)" in help_text


def test_report_folder_from_ini_is_relative_to_it(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makeini("[pytest]\ngputrain_report = out\n")
    folder = pytester.mkdir("below")
    (folder / "test_show.py").write_text(SHOW)
    result = run("-s", str(Path("below") / "test_show.py"))
    result.stdout.fnmatch_lines([f"*SHOWN () {pytester.path / 'out'} *"])
