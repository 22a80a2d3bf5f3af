"""Records as sessions leave them, made for the tests of what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_gputrain.report.codec import encode
from pytest_gputrain.report.model import Gpu, Machine

MACHINE = Machine(
    host="node1", os="Linux x86_64", python="3.11.7", torch="2.13.0", pytest_gputrain="0.1.0", cpu="EPYC",
    cores=16, memory_bytes=64 * 2**30, gpus=(Gpu("H200", 141 * 10**9),), gpu_origin="NVML",
    label="H200 · torch 2.13.0 · commit 4d1c2ab", commit="4d1c2ab", dirty=False,
)  # fmt: skip


def a_test(name: str, outcome: str = "passed", **more: Any) -> dict[str, Any]:
    return {"id": name, "kind": "test", "outcome": outcome, "message": "", "seconds": 1.0, **more}


class Session:
    """Lines of one process's file; times count up by a second a line."""

    def __init__(self, folder: Path, process: str = "main", *, session: str = "s1", at: float = 1e9) -> None:
        self.path = folder / "records" / f"node1-{process}-{session}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        self._at = at
        own = {"machine": encode(MACHINE), "command": ["pytest"]} if process == "main" else {}
        self.line("begin", version=1, session=session, process=process, host="node1", pid=1, **own)

    def line(self, event: str, **fields: Any) -> Session:
        self._at += 1
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "at": self._at, **fields}) + "\n")
        return self

    def run(self, *tests: dict[str, Any]) -> Session:
        for test in tests:
            self.line("start", id=test["id"], kind="test").line("done", test=test)
        return self

    def end(self, exit_code: int | None = 0, **fields: Any) -> Session:
        return self.line("end", exit_code=exit_code, **{"workers": [], **fields})
