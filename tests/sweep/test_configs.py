"""Configurations and their manifest: written whole or not at all, read back and never run."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.sweep import BranchPlan, SweepError, plan_branches, read_manifest, write_configs
from pytest_gputrain.sweep.config_file import COUNTS, parse_config
from pytest_gputrain.sweep.config_text import config_text
from pytest_gputrain.sweep.configs import check_folder

WAY_OUT = "; mend it, or plan again with gputrain branches plan --force"
AGAIN = "; plan again with gputrain branches plan --force"


def plan_of(*ks: int, **changed: Any) -> BranchPlan:
    given = {"base_batch": 97, "base_lr": 3e-4, "block_size": 16, "tokens": 50_001, "max_device_batch": 16}
    return plan_branches(k_values=ks, **{**given, **changed})


def files_in(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


@given(st.integers(1, 64), st.integers(1, 99), st.integers(1, 64), st.floats(1e-12, 1e3), st.integers(1, 4))
def test_a_configuration_says_what_was_planned(
    k: int, share: int, limit: int, base_lr: float, world_size: int
) -> None:
    plan = plan_branches(
        k_values=[k],
        base_batch=share * world_size,
        base_lr=base_lr,
        block_size=8,
        tokens=k * share * world_size * 8 + 1000,
        max_device_batch=limit,
        world_size=world_size,
    )
    (branch,) = plan
    text = config_text(branch, plan)
    compile(text, "config", "exec")
    # Python's own reading: every line is a name and a plain value.
    values = {
        statement.targets[0].id: ast.literal_eval(statement.value)  # type: ignore[attr-defined]
        for statement in ast.parse(text).body
    }
    assert parse_config(text.encode(), Path("config.py")) == values
    assert values["learning_rate"] == branch.learning_rate
    assert values["tokens"] == plan.tokens
    for prefix, step in (("", branch.plan), ("last_step_", branch.last_plan)):
        assert values[f"{prefix}device_batch_size"] == step.device_batch_size
        assert values[f"{prefix}accumulation_steps"] == step.accumulation_steps
        assert values[f"{prefix}last_micro_batch"] == step.last_micro_batch
    assert values["last_step_sequences"] == branch.last_step_sequences
    assert values["total_batch_size"] == branch.global_batch_size
    assert values["num_steps"] == branch.num_steps
    assert all(isinstance(tag, str) and len(tag) <= 64 for tag in values["wandb_tags"])
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_configuration_reads_like_this() -> None:
    plan = plan_of(2, world_size=2, base_batch=98, max_device_batch=97)
    assert (
        config_text(plan.branches[0], plan)
        == """\
# Branch k=2 of branches: 2 x the base batch of 98.
# Written by `gputrain branches plan` and named in manifest.json. It is read and never run: each
# line gives a name a plain value. Batch sizes count sequences of block_size tokens: those of an
# optimizer step on all ranks, those of a micro-batch (device_batch_size, last_micro_batch) on one.
k = 2

# An optimizer step is 2 micro-batches of 49, 2 ranks: 196 sequences.
total_batch_size = 196
device_batch_size = 49
accumulation_steps = 2
last_micro_batch = 49
world_size = 2

# sqrt(2) x 0.0003
learning_rate = 0.0004242640687119285

# Every branch of the sweep sees 49984 tokens: 3124 sequences of 16.
# That is 15 steps of 196 and a last one of 184.
block_size = 16
tokens = 49984
num_steps = 16

# The last step is 2 micro-batches of 46, 2 ranks: 184 sequences.
last_step_sequences = 184
last_step_device_batch_size = 46
last_step_accumulation_steps = 2
last_step_last_micro_batch = 46

# For Weights & Biases; nothing here needs it.
wandb_run_name = "branches-k2-bs196-lr0.0004243"
wandb_group = "branches"
wandb_tags = ["k=2", "batch=196", "lr-sqrt"]
"""
    )


def test_what_is_planned_is_what_is_read(tmp_path: Path) -> None:
    plan = plan_of(4, 1, 2)
    manifest = write_configs(
        plan, tmp_path / "new" / "configs", max_device_batch_source="found by find-batch"
    )
    assert manifest == read_manifest(tmp_path / "new" / "configs")
    assert [branch.k for branch in manifest] == [4, 1, 2]
    assert [branch.name for branch in manifest] == ["branch_k4", "branch_k1", "branch_k2"]
    assert len(manifest) == 3 and manifest.tokens == plan.tokens
    assert not any(branch.edited for branch in manifest)
    assert [branch.values["tokens"] for branch in manifest] == [plan.tokens] * 3
    assert sorted(files_in(tmp_path / "new" / "configs")) == [
        "branch_k1.py",
        "branch_k2.py",
        "branch_k4.py",
        "manifest.json",
    ]
    assert manifest.base == {
        "name": "branches",
        "batch": 97,
        "learning_rate": 3e-4,
        "lr_scaling": "sqrt",
        "block_size": 16,
        "tokens": 50_000,
        "tokens_asked": 50_001,
        "world_size": 1,
        "max_device_batch": 16,
        "max_device_batch_source": "found by find-batch",
    }


def test_another_plan_is_refused_and_replaced_with_force(tmp_path: Path) -> None:
    write_configs(plan_of(1, 2, 4), tmp_path)
    before = files_in(tmp_path)
    assert write_configs(plan_of(1, 2, 4), tmp_path)  # the same again is no other plan
    message = (
        f"{tmp_path} holds another plan (4 files, branch_k1.py among them); give another --out, "
        "or --force to replace it"
    )
    for other in (plan_of(1, 2), plan_of(1, 2, 4, base_lr=1e-3)):
        with pytest.raises(SweepError, match=f"^{re.escape(message)}$"):
            write_configs(other, tmp_path)
    with pytest.raises(SweepError, match="holds another plan"):
        check_folder(tmp_path)
    assert files_in(tmp_path) == before

    (tmp_path / "results.json").write_text("mine")
    manifest = write_configs(plan_of(2, 8), tmp_path, force=True)
    assert [branch.k for branch in manifest] == [2, 8]
    # Nothing stale is left to be picked up, and nothing that is not a plan's has gone.
    assert sorted(files_in(tmp_path)) == ["branch_k2.py", "branch_k8.py", "manifest.json", "results.json"]


def test_only_what_the_manifest_names_is_a_branch(tmp_path: Path) -> None:
    write_configs(plan_of(1), tmp_path)
    (tmp_path / "branch_k64.py").write_text("import os")
    assert [branch.k for branch in read_manifest(tmp_path)] == [1]


def test_a_configuration_without_a_manifest_is_in_the_way_too(tmp_path: Path) -> None:
    (tmp_path / "branch_k1.py").write_text("k = 1\n")
    with pytest.raises(SweepError, match=r"holds another plan \(1 files, branch_k1.py among them\)"):
        write_configs(plan_of(1), tmp_path)


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """As on a full disk: writing more than that to a file is an OSError."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


needs_limits = pytest.mark.skipif("sys.platform == 'win32'", reason="Windows has no limit of a file's size")


@needs_limits
def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    message = f"{new} cannot be written (File too large); give a folder that can be, by --out"
    with no_file_above(200), pytest.raises(SweepError, match=f"^{re.escape(message)}$"):
        write_configs(plan_of(1, 2), new)
    assert list(tmp_path.iterdir()) == []

    write_configs(plan_of(1, 2), new)
    before = files_in(tmp_path)
    with no_file_above(200), pytest.raises(SweepError, match="File too large"):
        write_configs(plan_of(4), new, force=True)
    assert files_in(tmp_path) == before


def test_a_file_where_the_folder_or_a_configuration_would_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for write in (lambda where: write_configs(plan_of(1), where), check_folder):
        message = f"{file} is a file; give a folder, there or not yet there, by --out"
        with pytest.raises(SweepError, match=f"^{re.escape(message)}$"):
            write(file)
        with pytest.raises(SweepError, match=r"cannot be written \(Not a directory\)"):
            write(file / "configs")
    (tmp_path / "branch_k1.py").mkdir()
    message = (
        f"{tmp_path / 'branch_k1.py'} is a folder, where a file of the plan would be; give another --out"
    )
    with pytest.raises(SweepError, match=f"^{re.escape(message)}$"):
        write_configs(plan_of(1), tmp_path, force=True)
    assert files_in(tmp_path) == {"file": "mine"}


def test_looking_at_a_folder_leaves_no_trace(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("not hasattr(os, 'fork')", reason="tries each point in a forked process")
def test_whatever_happens_while_writing_leaves_a_whole_plan_or_none(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crash_points.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    # Each kind of end was met, so the points were really inside of the writing.
    assert set(seen["killed"]) == {"old", "none", "new"}
    assert set(seen["interrupted"]) == {"old", "none", "new"}
    # Another plan written in the midst of it, to its end: never a mixture.
    assert set(seen["overtaken"]) == {"new", "none", "other"}


# What someone may do to a configuration by hand: (text before, text after, what is said).
EDITS = [
    ("num_steps = 33", "num_steps = ", "{path}:21: invalid syntax"),
    (
        "tokens = 50000",
        "tokens = 10 * 5000",
        "{path}:20: tokens is no plain value (a number, a text, a list)",
    ),
    ("k = 1\n", "import os\n", "{path}:5: this is not `name = value`"),
    ("k = 1\n", "", "{path}: k is missing"),
    ("k = 1\n", "k = 1\nk = 2\n", "{path}:6: k is given a second time"),
    ("k = 1\n", "k = 2\n", "{path}: k is 2, the manifest's is 1"),
    ("k = 1\n", "k = True\n", "{path}: k is True; legal is a whole number of 1 or more"),
    (
        "learning_rate = 0.0003",
        "learning_rate = 1e999",
        "{path}: learning_rate is inf; legal is a finite number above 0",
    ),
    (
        "total_batch_size = 97",
        "total_batch_size = 96",
        "{path}: total_batch_size is 96, but the micro-batches make 97 ((14 x 6 + 13) x 1)",
    ),
    (
        "accumulation_steps = 7\nlast_micro_batch = 13",
        "accumulation_steps = 7\nlast_micro_batch = 14",
        "{path}: total_batch_size is 97, but the micro-batches make 98 (14 x 7 x 1)",
    ),
    (
        "\nlast_micro_batch = 13",
        "\nlast_micro_batch = 15",
        "{path}: last_micro_batch 15 is above device_batch_size 14",
    ),
    (
        "num_steps = 33",
        "num_steps = 34",
        "{path}: tokens is 50000, but the steps see 51552 ((33 x 97 + 21) x 16)",
    ),
    (
        "tokens = 50000\nnum_steps = 33",
        "tokens = 51552\nnum_steps = 34",
        "{path}: 51552 tokens, but every branch has to see 50000 to be compared",
    ),
    (
        "last_step_sequences = 21",
        "last_step_sequences = 98",
        "{path}: last_step_sequences 98 is above total_batch_size 97",
    ),
    (
        "last_step_device_batch_size = ",
        "last_step_device_batch_size = 1",
        "{path}: last_step_device_batch_size is above device_batch_size",
    ),
]


@pytest.mark.parametrize(("before", "after", "message"), EDITS)
def test_an_edited_configuration_that_is_none_any_more(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    write_configs(plan_of(1), tmp_path)
    path = tmp_path / "branch_k1.py"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(SweepError, match=f"^{re.escape(message.format(path=path) + WAY_OUT)}$"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"k = 1\0", b"k = " + b"(" * 5000 + b")" * 5000, b"k = [" * 99999]
)
def test_what_is_no_python_at_all(tmp_path: Path, data: bytes) -> None:
    write_configs(plan_of(1), tmp_path)
    (tmp_path / "branch_k1.py").write_bytes(data)
    with pytest.raises(SweepError, match=r"^[^\n]*branch_k1\.py:[^\n]*; mend it, or plan again[^\n]*$"):
        read_manifest(tmp_path)


def test_an_edited_configuration_that_is_still_one(tmp_path: Path) -> None:
    write_configs(plan_of(1, 2), tmp_path)
    path = tmp_path / "branch_k2.py"
    text = path.read_text()
    path.write_text(
        '"""Tried by hand."""\n'
        + text.replace("learning_rate = ", "weight_decay: float = -0.1\nlearning_rate = 1")
    )
    first, second = read_manifest(tmp_path)
    assert (first.edited, second.edited) == (False, True)
    assert second.values["weight_decay"] == -0.1
    assert second.values["learning_rate"] > 1


def remove(path: Path) -> None:
    path.unlink()


def becomes_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(remove, "cannot be read (No such file or directory)"), (becomes_a_folder, "is not a file")],
)
def test_a_configuration_that_is_gone(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    write_configs(plan_of(1), tmp_path)
    spoil(tmp_path / "branch_k1.py")
    with pytest.raises(SweepError, match=f"^{re.escape(f'{tmp_path}/branch_k1.py {message}{WAY_OUT}')}$"):
        read_manifest(tmp_path)


def spoilt(document: dict[str, Any], where: str, value: object) -> str:
    *path, last = where.split(".")
    place: Any = document
    for name in path:
        place = place[int(name) if name.isdecimal() else name]
    place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", "webpack", " was not written by gputrain branches plan; give a folder that it wrote"),
        ("version", 2, f" has version 2, this reads 1{AGAIN}"),
        ("branches", [], f": it names no branch{AGAIN}"),
        ("branches", [1], f": branches[0] is no branch{AGAIN}"),
        ("branches.0.config", "../../branch_k1.py", f": branches[0] is not named after its k{AGAIN}"),
        ("branches.0.name", "branch_k2", f": branches[0] is not named after its k{AGAIN}"),
        ("branches.0.k", True, f": branches[0] is not named after its k{AGAIN}"),
        ("base", None, f": base is missing{AGAIN}"),
        ("base.tokens", "many", f": base.tokens is missing or not what it was{AGAIN}"),
        ("base.batch", True, f": base.batch is missing or not what it was{AGAIN}"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, where: str, value: object, message: str) -> None:
    write_configs(plan_of(1), tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(spoilt(json.loads(path.read_text()), where, value))
    with pytest.raises(SweepError, match=f"^{re.escape(f'{path}{message}')}$"):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    for folder, there in (
        (tmp_path, "it holds no manifest.json"),
        (tmp_path / "no", "there is no such folder"),
    ):
        message = f"{folder}: {there}; gputrain branches plan --out {folder} writes one"
        with pytest.raises(SweepError, match=f"^{re.escape(message)}$"):
            read_manifest(folder)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SweepError, match="is not JSON; plan again"):
        read_manifest(tmp_path)
    write_configs(plan_of(1), tmp_path, force=True)
    document = json.loads((tmp_path / "manifest.json").read_text())
    document["branches"] *= 2
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(SweepError, match="it names a branch twice"):
        read_manifest(tmp_path)


def test_every_name_that_is_needed_is_written() -> None:
    plan = plan_of(1)
    values = parse_config(config_text(plan.branches[0], plan).encode(), Path("config.py"))
    assert set(values) == {*COUNTS, "learning_rate", "wandb_run_name", "wandb_group", "wandb_tags"}
