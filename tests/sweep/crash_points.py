"""Ends `write_configs` at every single thing that it does to the disk, and looks at what is left.

Run as a script with a folder to work in; prints what was left, each time, as JSON. Killing is `os._exit` in a
forked process, interrupting is KeyboardInterrupt, overtaking is another plan written there meanwhile; all
out of an audit hook.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pytest_gputrain.sweep import BranchPlan, SweepError, plan_branches, read_manifest, write_configs

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
KILLED = 9


def plan_of(*ks: int, lr: float) -> BranchPlan:
    return plan_branches(
        k_values=ks, base_batch=8, base_lr=lr, block_size=16, tokens=50_000, max_device_batch=16
    )


OLD, NEW, OTHER = plan_of(1, 2, 4, lr=1e-3), plan_of(2, 8, lr=2e-3), plan_of(2, 8, lr=3e-3)


def state_of(folder: Path) -> str:
    """Which plan the folder holds; an edited or broken one would be a mixture."""
    try:
        manifest = read_manifest(folder)
    except SweepError as error:
        told = str(error)
        assert "it holds no manifest.json" in told or "there is no such folder" in told, told
        return "none"
    assert not any(branch.edited for branch in manifest)
    return {1e-3: "old", 2e-3: "new", 3e-3: "other"}[manifest.base["learning_rate"]]


def die(folder: Path) -> None:
    os._exit(KILLED)


def interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


def overtake(folder: Path) -> None:
    write_configs(OTHER, folder, force=True)


def reached(number: int, folder: Path, happen: Callable[[Path], None]) -> bool:
    """Write the new plan in a forked process, at the ``number``-th event of which something happens."""
    pid = os.fork()
    if pid == 0:
        left = number

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in EVENTS:
                left -= 1
                if left == 0:
                    happen(folder)

        sys.addaudithook(hook)
        try:
            write_configs(NEW, folder, force=True)
        except KeyboardInterrupt:
            os._exit(KILLED)
        except SweepError as error:
            told = f"{folder}: another plan was written there at the same time; plan again"
            os._exit(KILLED if str(error) == told else 1)
        os._exit(KILLED if left <= 0 else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), code
    return code == KILLED


def main(root: Path) -> None:
    seen: dict[str, list[str]] = {}
    for kind, happen in (("killed", die), ("interrupted", interrupt), ("overtaken", overtake)):
        for number in range(1, 1000):
            there, fresh = root / f"{kind}{number}", root / f"{kind}{number}-fresh" / "configs"
            write_configs(OLD, there)
            was_reached = [reached(number, folder, happen) for folder in (there, fresh)]
            states = [state_of(folder) for folder in (there, fresh)]
            seen.setdefault(kind, []).append(states[0])
            if kind == "interrupted":
                assert not list(there.glob(".*")), "an unfinished file is left"
                assert states[1] == "new" or not fresh.parent.exists()
            if not any(was_reached):
                assert states == ["new", "new"]
                break
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
