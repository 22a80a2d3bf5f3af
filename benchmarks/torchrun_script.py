"""``launch.torchrun(script)`` beside the ``torchrun`` command: the time, and whether anything is different.

    python -m benchmarks.torchrun_script

The script imports torch and does one ``all_reduce`` on two ranks. Each way runs it three times more, not
timed: to its end, to ``sys.exit(3)`` and to an exception; compared are ``sys.argv``, ``__name__``,
``__file__``, the working directory, the names in the environment, the exit codes of torchrun and of the
ranks, and the last line of a rank's standard error.

Claim: at least 5 times faster, and the same. The server that our ranks are forked from is running.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import interleave, options, ratio, report, run_command, scratch
from pytest_gputrain.launch import Launcher, shutdown
from pytest_gputrain.launch.sweep import MARK

ROUNDS = 11
TIMEOUT = 120.0
OURS, THEIRS = "launch.torchrun", "torchrun"
CLAIM = 5.0
OWN_NAMES = {MARK}
"""The one environment variable that our ranks have and torchrun's have not: what ends them is found by it."""
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
ENDINGS = {"ok": 0, "exit": 3, "raise": 1}
"""What the script is told to do at the end, and the exit code of a rank that does it."""

SCRIPT = """\
import json, os, pathlib, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
tensor = torch.ones(1)
dist.all_reduce(tensor)
assert tensor.item() == 2
dist.destroy_process_group()
if len(sys.argv) > 1:
    seen = {"argv": sys.argv, "name": __name__, "file": __file__, "cwd": os.getcwd()}
    seen["environ"] = sorted(os.environ)
    pathlib.Path(sys.argv[2], os.environ["RANK"] + ".json").write_text(json.dumps(seen))
    if sys.argv[1] == "exit":
        sys.exit(3)
    if sys.argv[1] == "raise":
        raise ValueError("no luck with --this one")
"""


def ours(script: Path) -> None:
    """The timed launch, with what it leaves removed."""
    assert Launcher().torchrun(script, nproc=2, timeout=TIMEOUT).passed


def theirs(script: Path) -> None:
    """The timed command (``-m torch.distributed.run`` is what ``torchrun`` runs)."""
    run_command([*COMMAND, str(script)], timeout=TIMEOUT, cwd=script.parent)


Seen = dict[str, Any]


def seen_by_ours(script: Path, ending: str, folder: Path) -> Seen:
    """What the script saw and how it ended, under ``launch.torchrun``."""
    result = Launcher().torchrun(script, ending, str(folder), nproc=2, timeout=TIMEOUT, check=False)
    first = next(rank for rank in result.ranks if rank.exit_code == ENDINGS[ending])
    found = _read(folder)
    return found | {
        "exit code": result.exit_code,
        "rank's exit code": first.exit_code,
        "last line": _last_line(first.stderr, first.rank),
        "environ": found["environ"] - OWN_NAMES,
    }


def seen_by_theirs(script: Path, ending: str, folder: Path) -> Seen:
    """The same under the command, whose ranks write to files so that their text is not mixed."""
    logs = folder / "logs"
    done = run_command(
        [*COMMAND, "--redirects=3", f"--log-dir={logs}", str(script), ending, str(folder)],
        timeout=TIMEOUT,
        cwd=Path.cwd(),
        expect=1 if ENDINGS[ending] else 0,
    )
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", done.stderr)  # in torchrun's closing table
    ranks = re.findall(r"rank\s*:\s*(\d+)", done.stderr)
    rank = int(ranks[-1]) if ranks else 0  # the table ends with the root cause
    (stderr,) = logs.glob(f"*/attempt_0/{rank}/stderr.log")
    return _read(folder) | {
        "exit code": done.returncode,
        "rank's exit code": int(codes[-1]) if codes else 0,
        "last line": _last_line(stderr.read_text(), rank),
    }


def _read(folder: Path) -> Seen:
    """What rank 0 or, where torchrun ended that one first, rank 1 wrote down; folders made comparable."""
    seen: Seen = json.loads(min(folder.glob("?.json")).read_text())
    argv = [argument.replace(str(folder), "FOLDER") for argument in seen["argv"]]
    return seen | {"argv": argv, "environ": set(seen["environ"])}


def _last_line(text: str, rank: int) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[-1].replace(f"[rank{rank}]", "[rank]")


def differences(script: Path, folder: Path) -> list[str]:
    """One line for everything that is not the same; empty when the two cannot be told apart."""
    found = []
    for ending in ENDINGS:
        both = []
        for who, look in ((OURS, seen_by_ours), (THEIRS, seen_by_theirs)):
            place = folder / f"{ending}-{who}"
            place.mkdir()
            both.append(look(script, ending, place))
        found += compare(ending, *both)
    return found


def compare(ending: str, mine: Seen, other: Seen) -> list[str]:
    """The differences between two looks at one ending, a line each."""
    lines = []
    for what in sorted(mine.keys() | other.keys()):
        here, there = mine.get(what), other.get(what)
        if isinstance(here, set) and isinstance(there, set):
            lines += [f"{ending}: only {OURS} has {what} {name}" for name in sorted(here - there)]
            lines += [f"{ending}: only {THEIRS} has {what} {name}" for name in sorted(there - here)]
        elif here != there:
            lines.append(f"{ending}: {what}: {OURS} has {here!r}, {THEIRS} has {there!r}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when it is the same and fast enough; a quick run may be slow."""
    given = options(__doc__, argv)
    with scratch() as folder:
        script = folder / "all_reduce.py"
        script.write_text(SCRIPT)
        differ = differences(script, folder)
        ways = {OURS: lambda: ours(script), THEIRS: lambda: theirs(script)}
        seconds = interleave(ways, 1 if given.quick else ROUNDS, warm_up=0 if given.quick else 1)
        shutdown()
    faster = ratio(seconds, THEIRS, OURS)
    figures: dict[str, float | int | str] = {
        "times faster": faster,
        "claim": CLAIM,
        "differences": "; ".join(differ) or f"none ({', '.join(ENDINGS)})",
    }
    report("torchrun_script", seconds, figures, ours=OURS, results=given.results)
    return 0 if not differ and (faster >= CLAIM or given.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
