"""What loading the plugin costs: ``pytest --collect-only`` on one empty test, with and without it.

    python -m benchmarks.plugin_load

Autoload is off in both, and both find their bytecode cached, as from the second run on. The aim is under
20 ms; the header, which looks for GPUs, is included. Where there is an NVIDIA driver, asking it comes on top:
that time is the driver's, not measured here.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._harness import interleave, report

ROUNDS = 25
LIMIT_MS = 20.0


def collect(folder: Path, *arguments: str) -> None:
    """Run pytest once. Raises ``subprocess.CalledProcessError`` when it fails."""
    root = str(Path(__file__).parent.parent)
    # A cache of our own: where bytecode may not be written, every run would compile the plugin anew.
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environ |= {"PYTHONPATH": root, "PYTHONPYCACHEPREFIX": str(folder / "cache")}
    environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *arguments, str(folder)],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=folder,
        env=environ,
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_empty.py").write_text("def test_empty():\n    pass\n")
        rivals = {
            "pytest": lambda: collect(folder),
            "pytest -p pytest_gputrain": lambda: collect(folder, "-p", "pytest_gputrain"),
        }
        seconds = interleave(rivals, ROUNDS, warm_up=2)
    without, with_plugin = (statistics.median(runs) * 1000 for runs in seconds.values())
    added = with_plugin - without
    report("plugin_load", seconds, {"added_ms": round(added, 1), "limit_ms": LIMIT_MS})
    return 0 if added < LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
