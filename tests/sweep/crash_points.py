"""Ends `write_configs` at every single thing that it does to the disk, and looks at what is left.

Run as a script with a folder to work in; prints which ends were met as JSON. Killing is `os._exit` in a
forked process, interrupting is KeyboardInterrupt, both out of an audit hook.
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


OLD, NEW = plan_of(1, 2, 4, lr=1e-3), plan_of(2, 8, lr=2e-3)


def state_of(folder: Path) -> str:
    """Which plan the folder holds; an edited or broken one would be a mixture."""
    try:
        manifest = read_manifest(folder)
    except SweepError as error:
        told = str(error)
        assert "it holds no manifest.json" in told or "there is no such folder" in told, told
        return "none"
    assert not any(branch.edited for branch in manifest)
    return {1e-3: "old", 2e-3: "new"}[manifest.base["learning_rate"]]


def die() -> None:
    os._exit(KILLED)


def interrupt() -> None:
    raise KeyboardInterrupt


def ended_at(number: int, folder: Path, end: Callable[[], None]) -> bool:
    """Write the new plan in a forked process that ends at its ``number``-th event; False if it has fewer."""
    pid = os.fork()
    if pid == 0:
        left = number

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in EVENTS:
                left -= 1
                if left == 0:
                    end()

        sys.addaudithook(hook)
        try:
            write_configs(NEW, folder, force=True)
        except KeyboardInterrupt:
            os._exit(KILLED)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED


def main(root: Path) -> None:
    seen: dict[str, list[str]] = {}
    for kind, end in (("killed", die), ("interrupted", interrupt)):
        for number in range(1, 1000):
            there, fresh = root / f"{kind}{number}", root / f"{kind}{number}-fresh" / "configs"
            write_configs(OLD, there)
            reached = ended_at(number, there, end)
            state = state_of(there)
            seen.setdefault(kind, []).append(state)
            reached_fresh = ended_at(number, fresh, end)
            assert state_of(fresh) in ("none", "new")
            if kind == "interrupted":
                assert not list(there.glob(".*")), "an unfinished file is left"
                assert state_of(fresh) == "new" or not fresh.parent.exists()
            assert reached or (state, state_of(fresh)) == ("new", "new")
            if not reached and not reached_fresh:
                break
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
