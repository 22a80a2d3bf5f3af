"""The report of 10,000 tests of 8 ranks: seconds to make it, the page's size, how soon it can be used.

    python -m benchmarks.report_size

One test in a hundred fails, and then all of them do, each with stacks of its own. Made is what ``gputrain
report DIR`` does in a new process, from the records to report.json, summary.md and index.html; written is the
page alone. Interactive is: loaded, its script run, and the filter's first answer on the screen. Needs the
Debian packages chromium and chromium-driver.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import options, report, scratch
from pytest_gputrain.report.codec import encode
from pytest_gputrain.report.machine import this_machine
from pytest_gputrain.report.page import write_page
from pytest_gputrain.report.reading import VERSION
from pytest_gputrain.report.records import BEGIN, COLLECTED, DONE, END, MAIN, START, Recorder
from tests.report.browser import browser, missing
from tests.report.page_reports import large

ROUNDS, TESTS, RANKS = 5, 10_000, 8
# As long as typing in the filter takes to be answered, two frames drawn.
FILTER = """const done = arguments[0], told = document.getElementById('told');
const field = document.getElementById('filter');
new MutationObserver(() => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))
    .observe(told, {childList: true});
field.value = 'part3'; field.dispatchEvent(new Event('input'));"""


def records(folder: Path, document: dict[str, Any]) -> None:
    """What a session of these tests leaves: a line at each one's begin and end."""
    machine = {**encode(this_machine(Path.cwd())), "label": "made up"}
    recorder = Recorder(folder, "host", MAIN)
    begin = {"version": VERSION, "session": "s", "process": MAIN, "host": "host", "machine": machine}
    recorder.line(BEGIN, at=1e9, **begin)
    recorder.line(COLLECTED, at=1e9, ids=[test["id"] for test in document["tests"]])
    for second, test in enumerate(document["tests"]):
        recorder.line(START, at=1e9 + second, id=test["id"], kind="launch")
        recorder.line(DONE, at=1e9 + second + 0.5, test=test)
    recorder.line(END, at=2e9, exit_code=1, workers=[], outcomes=len(document["tests"]))
    recorder.close()


def made(folder: Path) -> float:
    """Seconds of ``gputrain report`` over that folder, its start included."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "pytest_gputrain", "report", str(folder)], check=False,
                          stdout=subprocess.DEVNULL)  # fmt: skip
    seconds = time.perf_counter() - start
    assert done.returncode == 1, done.returncode  # tests failed
    assert all((folder / name).is_file() for name in ("report.json", "summary.md", "index.html"))
    return seconds


def opened(path: Path) -> float:
    """Seconds from the start of the navigation to the filter's first answer, in a new browser."""
    with browser() as chromium:
        chromium.open(path)
        # Loaded, then from the filter's input to its answer: the way between driver and page is left out.
        loaded = chromium.run("return performance.getEntriesByType('navigation')[0].loadEventEnd")
        begun = chromium.run("return performance.now()")
        return float(loaded + chromium.later(FILTER) - begun) / 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claims hold; a quick run only has to get to its end."""
    given = options(__doc__, argv)
    if lacking := missing():
        print(lacking)
        return 0 if given.quick else 1
    seconds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    json_sizes: dict[str, int] = {}
    for name, failing in (("one in a hundred fails", False), ("all fail", True)):
        document = large(100 if given.quick else TESTS, RANKS, failing=failing)
        for _ in range(1 if given.quick else ROUNDS):
            with scratch() as folder:
                start = time.perf_counter()
                path = write_page(document, folder)
                seconds.setdefault(f"{name}: written", []).append(time.perf_counter() - start)
                sizes[name] = path.stat().st_size
                seconds.setdefault(f"{name}: interactive", []).append(opened(path))
            with scratch() as folder:
                records(folder, document)
                seconds.setdefault(f"{name}: made", []).append(made(folder))
                json_sizes[name] = (folder / "report.json").stat().st_size
    held = all(
        max(runs) < (2 if key.endswith("interactive") else 10) for key, runs in seconds.items()
    ) and all(size < 5_000_000 for size in sizes.values())
    figures: dict[str, float | int | str] = {
        f"{name}: MB": round(size / 1e6, 2) for name, size in sizes.items()
    }
    figures |= {f"{name}: MB of report.json": round(size / 1e6, 1) for name, size in json_sizes.items()}
    figures |= {"claim": "made in under 10 s, 5 MB, 2 s", "claim_holds": str(held)}
    report("report_size", seconds, figures, results=given.results)
    return 0 if held or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
