"""Reports for the tests of the page: one as a night leaves it, one with hostile texts, one of any size."""

from __future__ import annotations

import math
from typing import Any

LABEL = "2 CPU cores, no GPU · torch 2.13.0 · commit abc1234"
HANG = "HUNG after 2.1 s: rank 1 never reached all_reduce #7 (128 x float32); it returned at train.py:42"
HOSTILE = (
    "</script><script>document.title='owned'</script>"
    "<img src=http://127.0.0.1:9/x onerror=alert(1)>\u202e\ud800\x1b[31m"
)


def a_test(name: str, outcome: str = "passed", **more: Any) -> dict[str, Any]:
    """A test of a report, with defaults."""
    plain = {"kind": "test", "case": None, "check": None, "device": None, "message": "", "seconds": 0.12}
    empty: dict[str, Any] = {"worker": None, "machine": 0, "labels": [], "figures": {}, "metrics": {}}
    return {"id": name, "outcome": outcome, **plain, **empty, "series": [], "launches": [], **more}


def report_of(tests: list[dict[str, Any]], verdict: str = "failed", **more: Any) -> dict[str, Any]:
    """A report of ``tests``."""
    kinds = ("passed", "failed", "skipped", "error")
    totals = {key: sum(test["outcome"] == key for test in tests) for key in kinds}
    session = {"started": "2026-11-29T02:00:04+00:00", "seconds": 1834.2, "ending": "finished", "notes": []}
    return {
        "schema": "gputrain.report",
        "version": 1,
        "verdict": verdict,
        "session": {**session, "command": ["pytest", "-m", "gpu"]},
        "machines": [{"host": "node-1", "label": LABEL}],
        "totals": {**totals, "seconds": 1834.2},
        "not_run": [],
        "tests": tests,
        **more,
    }


def launch_of(
    ranks: int, stack: str = 'File "train.py", line 57, in main\n  loss.backward()'
) -> dict[str, Any]:
    """A launch in which rank 1 left and the others hang."""
    return {
        "verdict": "HUNG",
        "seconds": 2.1,
        "cause": {"rank": 1, "kind": "missing", "message": "returned early", "location": "train.py:42"},
        "likely": "ranks ran a different number of steps (rank 0: 4, rank 1: 3).",
        "ranks": [
            {
                "rank": rank,
                "outcome": "returned" if rank == 1 else "hung",
                "seconds": 0.8 if rank == 1 else 2.1,
                "peak_bytes": 1_500_000_000 + rank * 10**8,
                "host": "node-1",
                "last": None if rank == 1 else "all_reduce #7 at train.py:57",
                "stack": None if rank == 1 else stack,
                "log_tail": f"step 3 | loss 5.{rank}",
            }
            for rank in range(ranks)
        ],
        "artifacts": "artifacts/test_ddp",
        "timeline": None,
    }


def night() -> dict[str, Any]:
    """Every section of the page has something to show."""
    steps = list(range(200))
    loss = [5 * math.exp(-step / 60) + 1 + 0.1 * math.sin(step * 1.7) for step in steps]

    def series(plot: str, label: str, unit: str, y: list[Any]) -> dict[str, Any]:
        return {"plot": plot, "label": label, "unit": unit, "x": steps[: len(y)], "y": y}

    metrics = {
        "tokens_per_second": {"value": 45120.0, "unit": "tokens/s", "better": "higher"},
        "peak_bytes": {"value": 1.5e9, "unit": "bytes", "better": "lower", "spread": None, "samples": 1},
    }
    stable = [
        series("loss", "eager", "", loss),
        series("loss", "compiled", "", [value + 1e-4 * (1 + index % 7) for index, value in enumerate(loss)]),
        series("step_seconds", "rank 0", "s", [0.021 + 0.002 * (index % 5) for index in steps]),
        series("tokens_per_second", "rank 0", "tokens/s", [45000 + 300.0 * (index % 9) for index in steps]),
        *(
            series("memory", f"rank {rank}", "bytes", [1.2e9 + rank * 9e7 + 1e6 * index for index in steps])
            for rank in range(4)
        ),
        series("recompiles", "compiled", "", [1, 2, 1]),
        series("tp_gradient_error", "relative", "", [0.0] + [1e-7 * 1.2**index for index in range(60)]),
        {
            "plot": "ladder",
            "label": "peak",
            "unit": "bytes",
            "x": [1, 4, 8, 16],
            "y": [2e9, 5e9, 9e9, None],
            "limit": 1.2e10,
            "limit_label": "memory limit",
        },
    ]

    def check(case: str, name: str, outcome: str = "passed", **more: Any) -> dict[str, Any]:
        return a_test(f"{case}::{name}", outcome, kind="check", case=case, check=name, device="cpu", **more)

    names = ("gradients_arrive", "ddp_parity", "batch_size_found", "compile_parity")
    tests = [
        check("gpt", "ddp_completes", "failed", message=f"{HANG}\n  rank 0 waits", launches=[launch_of(8)]),
        check(
            "gpt", "stable_training", metrics=metrics, series=stable, launches=[launch_of(4)], seconds=61.0
        ),
        check("opt-125m", "tp_memory", "skipped", message="no tensor-parallel plan given"),
        *(check(case, name, metrics=metrics) for case in ("gpt", "opt-125m") for name in names),
        check("gpt", "tp_training", series=[series("loss", "rank 0", "", loss[:40])]),
        check("opt-125m", "tp_backward", labels=["simulated"]),
        a_test(
            "tests/test_loop.py::test_resume[a::b]", "error", message="RuntimeError: the checkpoint is gone"
        ),
    ]
    reason = "needs 2 GPUs, found 0 (no NVIDIA driver); --require-gpus 2 makes this a failure"
    missing = {"reason": reason, "count": 12, "tests": ["tests/test_a.py::test_b"]}
    return report_of(tests, not_run=[missing])


def large(tests: int, ranks: int, *, failing: bool = False) -> dict[str, Any]:
    """``failing``: every test, with stacks that are all different; else one in a hundred."""
    made = []
    for number in range(tests):
        bad = failing or number % 100 == 0
        launch = launch_of(ranks, f'File "train.py", line {number}, in main\n' * 40)
        message = f"HUNG: {number:x} {'abcdefghij'[number % 10] * 40} never reached all_reduce" if bad else ""
        name = (
            f"tests/part{number // 250}/test_training_of_models.py::test_number[{number}-depth{number % 7}]"
        )
        made.append(a_test(name, "failed" if bad else "passed", message=message, launches=[launch]))
    return report_of(made)
