"""Bad input to ``gputrain diagnose``: one line, exit code 2, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gputrain.cli import _parser, diagnose, main

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
SCRIPTS = Path(__file__).parents[1] / "planted" / "scripts"
WITH_ARGUMENTS = str(SCRIPTS / "with_arguments.py")
GPT = "pytest_gputrain.reference.gpt:case"
HELP = "; see gputrain diagnose --help"
LEGAL = (
    "ddp_one_step, ddp_steps, ddp_whole, gloo, branches, static_graph, find_unused, fsdp2, single, "
    "checkpointing, gradient_parity"
)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    try:
        code = main(["diagnose", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    return err.strip().removeprefix("gputrain diagnose: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither a script nor a case given; give SCRIPT, -m MODULE or --case MODULE:ATTR"),
        (
            ["--case", GPT, "train.py"],
            "both a script and a case given; give SCRIPT, -m MODULE or --case MODULE:ATTR",
        ),
        (["no.py"], "script '{cwd}/no.py' does not exist; give the path of a Python script"),
        (
            ["no_module"],
            "script '{cwd}/no_module' does not exist; give the path of a Python script; "
            "for a module give -m MODULE",
        ),
        (
            ["--setps", "2", WITH_ARGUMENTS],
            f"unrecognized arguments: --setps; did you mean --steps?{HELP}",
        ),
        (["-m", "no_module"], "module 'no_module' cannot be found from {cwd}; check its name and PYTHONPATH"),
        (["--case", "nocolon"], "case: 'nocolon' is not MODULE:ATTR; give \"package.module:attribute\""),
        (
            ["--phases", "single,lunch", WITH_ARGUMENTS],
            f"--phases: 'lunch' is no phase; legal are {LEGAL}",
        ),
        (["--phases", ",", WITH_ARGUMENTS], f"--phases: ',' is no phase; legal are {LEGAL}"),
        (
            ["--layers", "4:2", WITH_ARGUMENTS],
            "argument --layers: '4:2' is not legal; give start:end with start below end, half open, such as "
            f"0:4, 2: or :{HELP}",
        ),
        (
            ["--steps", "1", WITH_ARGUMENTS],
            f"argument --steps: '1' is not legal; give a number of steps from 2 up{HELP}",
        ),
        (
            ["--nproc", "1", WITH_ARGUMENTS],
            "--nproc 1 is not legal; give a number of ranks from 2 up",
        ),
        (
            ["--out", "{file}", WITH_ARGUMENTS],
            "--out {file} is a file; give a folder, new or empty",
        ),
        (
            ["--out", "{file}/below", "--case", GPT],
            "--out {file}/below cannot be written (Not a directory); give another folder",
        ),
        (
            ["--out", "/proc/gputrain/deep", "--case", GPT],
            "--out /proc/gputrain/deep cannot be written (No such file or directory); give another folder",
        ),
        (["--out", "{full}", WITH_ARGUMENTS], "--out {full} is not empty; give a new or an empty folder"),
        (
            ["--out", "{new}", "--layers", "1:9", "--case", GPT],
            "--layers 1:9: the model has 2 layers; give a range within 0:2",
        ),
        (
            ["--out", "{new}", "--branches", "sliding,lunch", "--case", "{sparse}"],
            "--branches: the model has no branch 'lunch'; it has compressed, selected, sliding",
        ),
        (
            ["--out", "{new}", "--branches", "lunch", WITH_ARGUMENTS],
            "--branches: the model has no branch 'lunch'; it has wide, narrow",
        ),
    ],
)
def test_one_line_and_nothing_left(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in (("file", "x"), ("full/other.txt", "x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    names = {
        "cwd": str(cwd), "file": str(tmp_path / "file"), "full": str(tmp_path / "full"),
        "new": str(tmp_path / "new"), "sparse": "pytest_gputrain.reference.sparse_attention:case",
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    assert refused([text.format(**names) for text in arguments], capsys) == message.format(**names)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_option_of_ours_behind_the_script_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = _parser().parse_args(["diagnose", WITH_ARGUMENTS, "--out", "D", "--lr=1", "--steps=3", "-m"])
    diagnose._warn_of_ours_behind_the_script(options)
    assert capsys.readouterr().err == (
        "gputrain diagnose: --out after the script goes to the script; what is meant for gputrain "
        "diagnose stands before it\n"
    ), "the script has a --steps of its own"
    options = _parser().parse_args(["diagnose", "--out", "D", WITH_ARGUMENTS, "--lr=1"])
    diagnose._warn_of_ours_behind_the_script(options)
    assert capsys.readouterr().err == ""


def test_a_script_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read what nobody may
    assert refused([str(script)], capsys) == f"script {str(script)!r} cannot be read; check its permissions"
