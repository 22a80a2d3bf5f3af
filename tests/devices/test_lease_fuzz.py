"""Random requests and random SIGKILLs: no GPU is held twice, nobody waits for ever, nothing stays locked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif("sys.platform == 'win32'", reason="the fuzz forks and kills processes")
@pytest.mark.parametrize(
    ("num_leases", "num_kills"), [(200, 12), pytest.param(2000, 120, marks=pytest.mark.nightly)]
)
def test_fuzz(num_leases: int, num_kills: int, tmp_path: Path) -> None:
    program = Path(__file__).with_name("lease_fuzz.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "8", str(num_leases), str(num_kills), "7"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["errors"] == ""
    assert result["leases"] >= num_leases and result["kills"] == num_kills
    assert result["held_at_the_end"] == 0
    assert result["waiting_at_the_end"] == []
