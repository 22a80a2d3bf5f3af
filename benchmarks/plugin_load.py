"""What loading the plugin costs: ``pytest --collect-only`` on one empty test, with and without it.

    python -m benchmarks.plugin_load

Autoload is off in both, and both find their bytecode cached, as from the second run on. The aim is under
20 ms; the header, which looks for GPUs, is included. Where there is an NVIDIA driver, asking it comes on top:
that time is the driver's, not measured here.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._harness import ROOT, interleave, options, report, run_command, scratch

ROUNDS = 25
LIMIT_MS = 20.0


def collect(folder: Path, *arguments: str) -> None:
    """Run pytest once. Raises ``RuntimeError`` when it fails."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *arguments, "."]
    # A cache of our own: where bytecode may not be written, every run would compile the plugin anew.
    environ = {
        "PYTHONPATH": str(ROOT),
        "PYTHONPYCACHEPREFIX": str(folder / "cache"),
        "PYTHONDONTWRITEBYTECODE": None,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": None,
    }
    run_command(command, timeout=60, cwd=folder, env=environ)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the claim holds; a quick run only has to get to its end."""
    given = options(__doc__, argv)
    with scratch() as folder:
        (folder / "test_empty.py").write_text("def test_empty():\n    pass\n")
        ways = {
            "pytest": lambda: collect(folder),
            "pytest -p pytest_gputrain": lambda: collect(folder, "-p", "pytest_gputrain"),
        }
        seconds = interleave(ways, 1 if given.quick else ROUNDS, warm_up=1 if given.quick else 2)
    # Round by round: a machine that is busy for a while then adds to both, and not to the difference.
    added = statistics.median(more - less for less, more in zip(*seconds.values(), strict=True)) * 1000
    held = added < LIMIT_MS
    figures: dict[str, float | int | str] = {
        "added ms": round(added, 1),
        "claim": f"under {LIMIT_MS:.0f} ms",
        "claim_holds": str(held),
    }
    report("plugin_load", seconds, figures, results=given.results)
    return 0 if held or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
