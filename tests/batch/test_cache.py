"""The cache of discoveries: what is stored comes back to the same key, and nothing else ever does."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.batch.cache import VERSION, BatchCache
from pytest_gputrain.batch.cache_entry import Entry
from pytest_gputrain.batch.cache_folder import cache_folder, default_folder

ROOT = Path(__file__).parents[2]
KEY: dict[str, Any] = {"model": {"class": "GPT", "config": "abc"}, "world_size": 1, "components": None}
GB = 10**9
PROBES = [(1, 2.0 * GB), (2, 2.5 * GB), (14, None), (13, 7.9 * GB)]
ENTRY = Entry.measured(PROBES, limit=8 * GB, capacity=10 * GB, free_bytes=9 * GB)


@pytest.fixture
def cache(tmp_path: Path) -> BatchCache:
    return BatchCache(tmp_path / "made" / "cache")


def test_what_is_stored_comes_back(cache: BatchCache) -> None:
    assert cache.load(KEY) is None
    cache.store(KEY, ENTRY)
    assert cache.load(KEY) == ENTRY
    assert cache.load({**KEY, "world_size": 2}) is None
    assert [path.suffix for path in cache.folder.iterdir()] == [".json"]


def test_the_order_of_a_keys_parts_does_not_matter(cache: BatchCache) -> None:
    cache.store(KEY, ENTRY)
    assert cache.load(dict(reversed(KEY.items()))) == ENTRY


def test_an_entry_is_of_measurements_and_serves_any_limit() -> None:
    assert ENTRY.known(8 * GB) == {1: 2 * GB, 2: 2.5 * GB, 13: 7.9 * GB, 14: None}
    assert ENTRY.known(4 * GB) == {1: 2 * GB, 2: 2.5 * GB, 13: 7.9 * GB, 14: None}
    assert ENTRY.known(8.5 * GB) == {1: 2 * GB, 2: 2.5 * GB, 13: 7.9 * GB}  # 14 may fit now


def test_of_two_tries_of_a_size_the_last_counts() -> None:
    again = Entry.measured([(4, None), (4, 7.0), (5, 9.0), (5, None)], limit=10, capacity=10, free_bytes=10)
    assert (again.peaks, again.ran_out) == ({4: 7}, {5: 10})


def test_merged_keeps_both_and_believes_the_newer() -> None:
    newer = Entry.measured([(14, 8.4 * GB), (2, None)], limit=9 * GB, capacity=12 * GB, free_bytes=11 * GB)
    merged = ENTRY.merged(newer)
    assert dict(merged.peaks) == {1: 2 * GB, 13: 7.9 * GB, 14: 8.4 * GB}
    assert dict(merged.ran_out) == {2: 9 * GB}
    assert (merged.capacity, merged.free_bytes) == (12 * GB, 11 * GB)


@pytest.mark.parametrize(
    ("free", "limit", "slack", "asked"),
    [
        (9 * GB, 8 * GB, 0.05, False),
        (9 * GB, 9.5 * GB, 0.05, False),
        (8.6 * GB, 8 * GB, 0.05, False),
        (8.5 * GB, 8 * GB, 0.05, True),
        (8.9 * GB, 8.95 * GB, 0.05, True),
        (8.5 * GB, 8 * GB, None, False),
        (7 * GB, 8 * GB, None, True),
    ],
    ids=["as-much", "no-less-than-then", "little-less", "less", "scarce", "counted", "counted-scarce"],
)
def test_an_answer_is_confirmed_where_less_is_free(
    free: int, limit: int, slack: float | None, asked: bool
) -> None:
    assert ENTRY.must_be_confirmed(free, limit, slack) is asked


def damaged(document: dict[str, Any], name: str) -> Any:
    entry = document["entry"]
    return {
        "empty": b"",
        "truncated": json.dumps(document).encode()[:-40],
        "binary": os.urandom(300),
        "deep": b"[" * 100_000,
        "foreign": b'{"hello": "world"}',
        "a-list": b"[1, 2, 3]",
        "not-a-number": json.dumps(document).replace("8000000000", "NaN").encode(),
        "future": {**document, "version": VERSION + 1},
        "another-key": {**document, "key": {**KEY, "world_size": 2}},
        "another-programs": {**document, "format": "batch sizes"},
        "one-digit": {**document, "entry": {**entry, "peaks": {"1": 2, "2": 3, "13": 4}}},
        "no-checksum": {name: value for name, value in document.items() if name != "checksum"},
        "large": b" " * (1 << 20) + json.dumps(document).encode(),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "empty", "truncated", "binary", "deep", "foreign", "a-list", "not-a-number", "future", "another-key",
        "another-programs", "one-digit", "no-checksum", "large",
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_is_ignored_and_written_anew(cache: BatchCache, name: str) -> None:
    cache.store(KEY, ENTRY)
    found = damaged(json.loads(cache.path(KEY).read_text()), name)
    cache.path(KEY).write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    assert cache.load(KEY) is None
    cache.store(KEY, ENTRY)
    assert cache.load(KEY) == ENTRY


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"peaks": {}, "ran_out": {}, "capacity": 1, "free_bytes": 1},
        {"peaks": {"0": 5}, "ran_out": {}, "capacity": 1, "free_bytes": 1},
        {"peaks": {"1": -5}, "ran_out": {}, "capacity": 1, "free_bytes": 1},
        {"peaks": {"1": True}, "ran_out": {}, "capacity": 1, "free_bytes": 1},
        {"peaks": {"one": 5}, "ran_out": {}, "capacity": 1, "free_bytes": 1},
        {"peaks": [1, 5], "ran_out": {}, "capacity": 1, "free_bytes": 1},
        [],
    ],
)
def test_an_entry_that_makes_no_sense_is_none(entry: object) -> None:
    with pytest.raises(ValueError, match=r"entry|mapping|below 1|bytes|invalid literal"):
        Entry.from_json(entry)


@pytest.mark.skipif("not hasattr(os, 'mkfifo')")
def test_what_is_no_file_is_ignored(cache: BatchCache) -> None:
    cache.folder.mkdir(parents=True)
    os.mkfifo(cache.path(KEY))
    assert cache.load(KEY) is None  # and does not wait for a writer
    cache.store(KEY, ENTRY)
    assert cache.load(KEY) == ENTRY


def test_a_folder_that_is_a_file_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    for cache in (BatchCache(tmp_path / "file"), BatchCache(tmp_path / "file")):
        with cache.lock(KEY) as held:
            assert not held
        cache.store(KEY, ENTRY)
        assert cache.load(KEY) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"batch-size cache: {tmp_path / 'file'} cannot be written (File exists); going on without it; "
        "give another folder by --gputrain-cache-dir or GPUTRAIN_CACHE_DIR"
    ]
    assert (tmp_path / "file").read_text() == "mine"


READ_ONLY = """
import filelock, os, sys, logging, secrets  # before the user changes, who may not read Python's folder
from pathlib import Path
from pytest_gputrain.batch.cache import BatchCache
from pytest_gputrain.batch.cache_entry import Entry
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)  # root may write anywhere
logging.basicConfig(format="%(levelname)s %(message)s")
cache = BatchCache(Path(sys.argv[1]))
print(cache.load({"a": 1}) is not None, cache.load({"a": 2}) is not None)
with cache.lock({"a": 2}) as held:
    print(held)
cache.store({"a": 2}, Entry({1: 5}))
print(cache.load({"a": 2}))
"""


@pytest.mark.skipif("sys.platform == 'win32'", reason="folders have no such modes")
def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    # Not below tmp_path, whose parents are this user's alone.
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "cache"
        BatchCache(folder).store({"a": 1}, ENTRY)
        folder.chmod(0o555)
        Path(made).chmod(0o755)
        try:
            done = child(READ_ONLY, folder)
        finally:
            folder.chmod(0o755)
    assert done.stdout.split() == ["True", "False", "False", "None"], done.stderr
    assert done.stderr.count("WARNING") == 1
    assert "cannot be written (Permission denied)" in done.stderr


def child(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


HOLDS = """
import sys, time
from pathlib import Path
from pytest_gputrain.batch.cache import BatchCache
with BatchCache(Path(sys.argv[1])).lock({"a": 1}) as held:
    print(held, flush=True)
    time.sleep(1000)
"""


def test_a_lock_that_is_held_is_waited_for_in_bounds_and_a_dead_holders_is_free(
    cache: BatchCache, caplog: pytest.LogCaptureFixture
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, cache.folder], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with cache.lock({"a": 1}, timeout=0.1) as held:
            assert not held
        with cache.lock({"a": 2}, timeout=0.1) as other:
            assert other  # another key's
        assert "has been held for 0 s by a process that does not go on; discovering without" in caplog.text
    finally:
        holder.kill()
        holder.communicate()
    with cache.lock({"a": 1}, timeout=30) as held:
        assert held


def test_writers_at_once_leave_a_whole_entry(cache: BatchCache) -> None:
    entries = [Entry({size: size * GB for size in range(1, 2 + writer * 40)}) for writer in range(4)]
    seen = []

    def write(entry: Entry) -> None:
        for _ in range(8):
            cache.store(KEY, entry)
            seen.append(cache.load(KEY))

    threads = [threading.Thread(target=write, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 32
    assert all(found in entries for found in seen)
    assert [path.suffix for path in cache.folder.iterdir()] == [".json"]


def test_the_temporary_file_of_a_writer_that_was_killed_goes_some_day(cache: BatchCache) -> None:
    cache.folder.mkdir(parents=True)
    old, new = (cache.folder / f".batch-size-{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.store(KEY, ENTRY)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_full_disk_costs_one_warning_and_leaves_nothing(
    cache: BatchCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache.store(KEY, ENTRY)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert [*cache.folder.iterdir()] == []


def test_the_folder_is_given_or_the_variables_or_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    environ = {"GPUTRAIN_CACHE_DIR": "/there", "XDG_CACHE_HOME": "/xdg"}
    assert cache_folder("/given", environ) == Path("/given")
    assert cache_folder(None, environ) == Path("/there")
    assert cache_folder(None, {**environ, "GPUTRAIN_CACHE_DIR": " "}) == Path("/xdg/pytest-gputrain")
    assert cache_folder("~/mine", environ) == Path("/home/me/mine")
    assert cache_folder("relative", environ) == Path.cwd() / "relative"


@pytest.mark.skipif("sys.platform == 'win32'", reason="paths are another platform's")
@pytest.mark.parametrize(
    ("environ", "platform", "folder"),
    [
        ({}, "linux", "/home/me/.cache/pytest-gputrain"),
        ({"XDG_CACHE_HOME": "/xdg"}, "linux", "/xdg/pytest-gputrain"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "linux", "/home/me/.cache/pytest-gputrain"),
        ({}, "darwin", "/home/me/Library/Caches/pytest-gputrain"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/pytest-gputrain/Cache"),
    ],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], platform: str, folder: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder(environ, platform) == Path(folder)
