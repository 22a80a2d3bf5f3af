"""Parts of a weight are known by what is in them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from pytest_gputrain.tensor_parallel.golden_layout import Segment, lay

torch.manual_seed(0)
whole = torch.randn(12, 8)
other = torch.randn(4, 8)

def segments(own, sources):
    layout = lay(own, sources)
    return layout and (layout.dim, layout.transposed, [(s.start, s.length, s.source, s.source_start)
                                                       for s in layout.segments])

print(segments(whole[6:], {"w": whole}))
print(segments(whole[:, 4:], {"w": whole}))
print(segments(torch.cat([p.chunk(2)[1] for p in whole.chunk(3)]), {"w": whole}))
print(segments(whole.t()[:, :6].contiguous(), {"w": whole}))
print(segments(torch.cat([whole[6:], other[:2]]), {"w": whole, "o": other}))
print(segments(torch.cat([whole[6:], torch.zeros(2, 8)]), {"w": whole}))
print(segments(torch.randn(6, 8), {"w": whole}))
print(segments(whole[:6].bfloat16(), {"w": whole.bfloat16()}))
"""

EXPECTED = [
    "(0, False, [(0, 6, 'w', 6)])",
    "(1, False, [(0, 4, 'w', 4)])",
    "(0, False, [(0, 2, 'w', 2), (2, 2, 'w', 6), (4, 2, 'w', 10)])",
    "(1, True, [(0, 6, 'w', 0)])",
    "(0, False, [(0, 6, 'w', 6), (6, 2, 'o', 0)])",
    "(0, False, [(0, 6, 'w', 6)])",
    "None",
    "(0, False, [(0, 6, 'w', 0)])",
]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("index", range(len(EXPECTED)))
def test_where_a_part_comes_from(printed: list[str], index: int) -> None:
    assert printed[index] == EXPECTED[index]
