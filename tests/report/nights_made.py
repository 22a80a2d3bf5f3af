"""Reports as nights leave them, made for the tests of comparisons."""

from __future__ import annotations

from typing import Any

from pytest_gputrain.report.metrics import once

MACHINE = {
    "host": "node1", "cpu": "EPYC", "cores": 16, "torch": "2.13.0", "gpus": [{"name": "H200"}],
    "gpu_origin": "NVML", "commit": "4d1c2ab00000", "label": "H200 · torch 2.13.0",
}  # fmt: skip


def speed(value: float, spread: float | None = None) -> dict[str, Any]:
    return once(value, unit="tokens/s", better="higher", spread=value * 0.01 if spread is None else spread)


def entry(case: str = "gpt", check: str = "stable_training", **fields: Any) -> dict[str, Any]:
    return {
        "id": f"{case}::{check}", "kind": "check", "case": case, "check": check, "device": "cpu",
        "outcome": "passed", "message": "", "seconds": 1.0, "machine": 0, "labels": [], "figures": {},
        "metrics": {}, **fields,
    }  # fmt: skip


def report(*tests: dict[str, Any], day: int = 28, verdict: str = "passed", **machine: Any) -> dict[str, Any]:
    outcomes = [test["outcome"] for test in tests]
    return {
        "schema": "gputrain.report", "version": 1, "verdict": verdict,
        "session": {"id": f"s{day}", "started": f"2026-11-{day:02}T01:00:00+00:00", "seconds": 60.0,
                    "complete": True},
        "machines": [{**MACHINE, **machine}],
        "totals": {name: outcomes.count(name) for name in ("passed", "failed", "skipped", "error")},
        "tests": list(tests),
    }  # fmt: skip
