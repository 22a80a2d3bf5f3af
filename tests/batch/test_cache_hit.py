"""A hit in a new process costs the reading, not the imports of a discovery.

Above all not torch's compiler, which every optimizer imports: so a hit makes none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pytest_gputrain import discover_batch_size
from tests.batch.models import Language

size = discover_batch_size(
    Language(), 16, "cpu", use_cache=True, cache_dir=sys.argv[1], capacity="16MB", max_batch_size=16
)
print(size, *sorted({"torch._dynamo", "numpy.random", "psutil"} & {*sys.modules}))
"""


@pytest.mark.slow
def test_a_hit_imports_nothing_slow(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.split()
        for _ in range(2)
    ]
    assert said[0][0] == "16"
    assert "torch._dynamo" in said[0]
    assert said[1] == ["16"]
