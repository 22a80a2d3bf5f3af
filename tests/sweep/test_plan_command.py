"""``gputrain branches plan``: the table, exit codes, bad input."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pytest_gputrain.cli import main
from pytest_gputrain.sweep import read_manifest

needs_linux = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
DOCS = Path(__file__).parents[2] / "docs" / "branches.md"
ASKED = [
    *("branches", "plan", "--base-batch", "8", "--base-lr", "3e-4"),
    *("--block-size", "128", "--tokens", "100000", "--max-device-batch", "32"),
]


def code_of(arguments: list[str]) -> int:
    """What the process would exit with: argparse leaves by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


def test_the_run_that_the_documentation_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = DOCS.read_text(encoding="utf-8").split("```\n")
    shown = next(block for block in blocks if block.startswith("$ gputrain branches plan"))
    command, _, output = shown.partition("\n")
    assert code_of(shlex.split(command.removeprefix("$ gputrain "))) == 0
    assert capsys.readouterr() == (output, "")
    manifest = read_manifest(tmp_path / "configs")
    assert [branch.k for branch in manifest] == [1, 2, 4, 8, 16, 32]
    assert manifest.tokens == 99_968


def test_without_a_folder_the_table_is_all(capsys: pytest.CaptureFixture[str]) -> None:
    ragged = ["--base-batch", "194", "--max-device-batch", "16", "--world-size", "2", "--tokens", "1e5"]
    assert code_of([*ASKED, "--k", "1", *ragged, "--lr-scaling", "none"]) == 0
    head, row, budget = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells == ["1", "194", "14 (last 13)", "7", "194", "0.0003", "5", "4", "99,840"]
    assert head.split()[-1] == "tokens"
    assert budget == (
        "every branch sees 99,840 tokens: 780 sequences of 128; of the 100,000 asked for, 160 make no whole "
        "one, the same number on each of 2 ranks"
    )


def test_a_budget_that_comes_out_even(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([*ASKED, "--k", "1", "--tokens", "10240"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "every branch sees 10,240 tokens: 80 sequences of 128"


AUTO = ["--max-device-batch", "auto"]
ARGUMENT = "argument {}: {!r} is not legal; give "
WHOLE = "a whole number of 1 or more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], ARGUMENT.format("--k", "0") + WHOLE),
        (["--k", "2", "-4"], ARGUMENT.format("--k", "-4") + WHOLE),
        (["--k", "1.5"], ARGUMENT.format("--k", "1.5") + WHOLE),
        (["--k", "2", "2"], "k 2 is given twice; give each k once"),
        (["--k", "2", "--k", "2"], "k 2 is given twice; give each k once"),
        (["--k", "1", "--out", ""], "argument --out: '' is not legal; give a folder, such as configs"),
        (["--k", "1", "--base-batch", "0"], ARGUMENT.format("--base-batch", "0") + WHOLE),
        (["--k", "1", "--block-size", "0"], ARGUMENT.format("--block-size", "0") + WHOLE),
        (["--k", "1", "--base-lr", "inf"], ARGUMENT.format("--base-lr", "inf") + "a finite number above 0"),
        (["--k", "1", "--base-lr", "nan"], ARGUMENT.format("--base-lr", "nan") + "a finite number above 0"),
        (["--k", "1", "--tokens", "1e400"], ARGUMENT.format("--tokens", "1e400") + WHOLE + ", such as"),
        (["--k", "1", "--tokens", "0"], ARGUMENT.format("--tokens", "0") + WHOLE + ", such as"),
        (
            ["--k", "1", "--max-device-batch", "0"],
            ARGUMENT.format("--max-device-batch", "0") + WHOLE + ", or auto",
        ),
        (
            ["--k", "1", "--case", "mine:net"],
            "--case is for --max-device-batch auto; here it is 32, so leave --case out",
        ),
        ([*AUTO, "--k", "1", "--tokens", "99"], "99 tokens are 0 sequences of 128"),
        ([*AUTO, "--k", "1"], "no case given; give MODULE:ATTR"),
        ([*AUTO, "--k", "1", "--case", "net"], "case: 'net' is not MODULE:ATTR"),
        ([*AUTO, "--k", "1", "--case", "mine:net", "--capacity", "much"], "--capacity: 'much' is not a size"),
        (["--k", "1", "--tokens", "99"], "99 tokens are 0 sequences of 128, fewer than the 8 (1 x 8)"),
        (["--k", "1", "--world-size", "3"], "k 1 makes a batch of 1 x 8 = 8, which 3 ranks cannot share"),
        (["--k", "1", "--name", "a b"], "base_name is 'a b'; legal are"),
        (["--k"], "argument --k: expected at least one argument"),
        ([], "the following arguments are required: --k"),
        (["--k", "1", "--dry-run"], "unrecognized arguments: --dry-run"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "configs"
    assert code_of([*ASKED, "--out", str(out), *arguments]) == 2
    said, told = capsys.readouterr()
    assert said == ""
    assert told.startswith(f"gputrain branches plan: {message}")
    assert told.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert code_of([*ASKED, "--k", "1", "--out", str(tmp_path / "file" / "configs")]) == 2
    assert capsys.readouterr() == (
        "",
        f"gputrain branches plan: {tmp_path / 'file' / 'configs'} cannot be written (Not a directory); "
        "give a folder that can be, by --out\n",
    )


def test_force_replaces_another_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert code_of([*ASKED, "--k", "1", *out]) == 0
    assert capsys.readouterr().out.endswith(f"\n1 configuration and manifest.json are in {tmp_path}\n")
    assert code_of([*ASKED, "--k", "2", *out]) == 2
    assert "holds another plan" in capsys.readouterr().err
    assert code_of([*ASKED, "--k", "2", *out, "--force"]) == 0
    assert [branch.k for branch in read_manifest(tmp_path)] == [2]


CASE = """
import torch
from torch import nn
from pytest_gputrain import TrainingCase

net = TrainingCase(
    name="net",
    model=lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)),
    batch=lambda size, device: (
        torch.randn(size, 64, 64, device=device), torch.zeros(size, 64, dtype=torch.long, device=device)
    ),
    loss=lambda model, batch: model(batch[0]).square().mean(),
)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that find what fits for a small case."""
    (tmp_path / "mine.py").write_text(CASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUTRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [*AUTO, "--case", "mine:net", "--device", "cpu", "--block-size", "64", "--out", "configs"]


@needs_linux
def test_the_limit_is_found_as_find_batch_finds_it(
    net: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of([*ASKED, *net, "--k", "1", "4", "--capacity", "2MB", "--block-size", "32"]) == 0
    said, told = capsys.readouterr()
    manifest = read_manifest("configs")
    limit = manifest.base["max_device_batch"]
    assert 1 <= limit < 32
    assert f"device batch size {limit}: peak " in told and f"{limit + 1} ran out of memory" in told
    assert (
        "\n  warning: the sequences of net are 64 tokens long, those of --block-size 32, so another batch "
        "size may fit\n"
    ) in told
    source = "measured for the case net on cpu within 1.9 MiB"
    assert f"at most {limit} sequences on a device: {source}\n" in said
    assert manifest.base["max_device_batch_source"] == source
    assert max(branch.values["device_batch_size"] for branch in manifest) <= limit
    # A folder that would be refused is refused before anything is searched.
    assert code_of([*ASKED, *net, "--k", "1", "--capacity", "2MB"]) == 2
    said, told = capsys.readouterr()
    assert said == "" and "holds another plan" in told and told.count("\n") == 1


@needs_linux
@pytest.mark.slow
def test_nothing_is_planned_where_nothing_fits(
    net: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of([*ASKED, *net, "--k", "1", "--capacity", "70KB"]) == 1
    said, told = capsys.readouterr()
    assert said == ""
    assert "net does not fit: batch size 1 runs out of memory" in told
    assert "--block-size" not in told
    assert not (tmp_path / "configs").exists()
