"""What every benchmark here shares: interleaved runs, medians, a table, a JSON file that carries its origin.

Rivals run in turn, round by round, so that a machine that becomes busy slows all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pytest_gputrain.origin import origin
from pytest_gputrain.schemas import head

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Options:
    """``quick``: few repeats, to see that it runs; ``results``: the folder for the JSON, None for no file."""

    quick: bool
    results: Path | None


def options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Read the command line. A quick run is no measurement, so it writes only where it is told to."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few repeats and no JSON: does it run at all?")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="where the JSON goes, if not with the others"
    )
    given = parser.parse_args(argv)
    return Options(given.quick, given.results or (None if given.quick else RESULTS))


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Run the rivals in turn, round by round, and return the seconds of each run.

    Each runs once a round, or as often as ``repeats`` says; ``warm_up`` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(warm_up + rounds):
        for name, run in rivals.items():
            for _ in range((repeats or {}).get(name, 1)):
                start = time.perf_counter()
                run()
                if number >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], rival: str, ours: str) -> float:
    """How many times as long as ``ours`` the rival takes, by medians."""
    return statistics.median(seconds[rival]) / statistics.median(seconds[ours])


def table(seconds: Mapping[str, list[float]], ours: str | None = None) -> str:
    """Medians, extremes and, with ``ours``, each one's median as a multiple of that of ``ours``."""
    width = max(map(len, seconds))
    lines = [f"{'':{width}}       median          min          max   runs" + ("     ratio" if ours else "")]
    for rival, runs in seconds.items():
        cells = "".join(
            f"{value * 1000:10.1f} ms" for value in (statistics.median(runs), min(runs), max(runs))
        )
        times = f"{ratio(seconds, rival, ours):8.1f} x" if ours else ""
        lines.append(f"{rival:{width}}{cells}  {len(runs):5}{times}")
    return "\n".join(lines)


def report(
    name: str,
    seconds: Mapping[str, list[float]],
    figures: Mapping[str, float | int | str],
    *,
    ours: str | None = None,
    results: Path | None = RESULTS,
) -> None:
    """Print the medians and the figures drawn from them, and write both to ``NAME.json`` in ``results``."""
    print(table(seconds, ours))
    measured = {
        rival: {"median_s": round(statistics.median(runs), 5), "runs_s": [round(run, 5) for run in runs]}
        for rival, runs in seconds.items()
    }
    write(name, figures, measured, results)


def write(
    name: str,
    figures: Mapping[str, float | int | str],
    measured: Mapping[str, object],
    results: Path | None = RESULTS,
) -> None:
    """Print the figures, and write them with what was measured to ``NAME.json`` in ``results``, if any."""
    for figure, value in figures.items():
        print(f"{figure}: {value:.3g}" if isinstance(value, float) else f"{figure}: {value}")
    if results is None:
        return
    known = {"benchmark": name, "origin": origin(), "figures": dict(figures), "measured": dict(measured)}
    document = {**head("gputrain.benchmark"), **known}
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for files and for whatever is put in the temporary folder meanwhile; removed at the end.

    torchrun leaves its log folders in the temporary folder for good.
    """
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="gputrain-bench-", ignore_cleanup_errors=True) as name:
        os.environ["TMPDIR"] = tempfile.tempdir = name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = None
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before


def run_command(
    command: Sequence[str],
    *,
    timeout: float,
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    expect: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; after ``timeout`` seconds end it and everything it started.

    ``subprocess.run(timeout=)`` would end torchrun and leave its ranks running, in sessions of their own.
    ``env`` goes on top of this process's environment, None removes a name. Raises RuntimeError, with what
    was printed, at the timeout and for an exit code other than ``expect``.
    """
    environ = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    with subprocess.Popen(
        command, cwd=cwd, env=environ, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill_tree(process.pid)
            raise RuntimeError(f"{command} was not done after {timeout:.0f} s") from None
        except BaseException:  # Ctrl-C above all
            _kill_tree(process.pid)
            raise
    if process.returncode != expect:
        raise RuntimeError(f"{command} ended with exit code {process.returncode}:\n{stdout}{stderr}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        tree = [*top.children(recursive=True), top]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(
            tree, timeout=30
        )  # what is killed and still runs would disturb the next measurement
