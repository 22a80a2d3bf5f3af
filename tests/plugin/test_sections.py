"""What ranks printed, where pytest shows captured output."""

from __future__ import annotations

import pytest

from .conftest import Run

PRINTS = """
import sys
from pytest_gputrain.plugin.sections import add_rank_sections

def test_it(ddp_launcher, request):
    def speak():
        import torch.distributed as dist
        print("said", dist.get_rank())
        if dist.get_rank(): print("moaned <1>", file=sys.stderr)
    add_rank_sections(request.node, ddp_launcher(speak))
"""


@pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
def test_sections_are_shown_as_pytest_shows_its_own(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(test_it=PRINTS)
    shown = run_with_torch("-rP", "--junitxml=junit.xml", "-o", "junit_logging=all").stdout
    shown.fnmatch_lines(
        ["*Captured stdout of rank 0 call*", "said 0", "*Captured stdout of rank 1 call*", "said 1"]
    )
    shown.fnmatch_lines(["*Captured stderr of rank 1 call*", "moaned <1>"])
    shown.no_fnmatch_line("*stderr of rank 0*")
    junit = (pytester.path / "junit.xml").read_text()
    assert all(part in junit for part in ("[rank 0]\nsaid 0\n", "[rank 1]\nsaid 1\n", "moaned &lt;1&gt;"))
    run_with_torch().stdout.no_fnmatch_line("*said*")
    hidden = run_with_torch("-rP", "--show-capture=stderr").stdout
    hidden.fnmatch_lines(["moaned <1>"])
    hidden.no_fnmatch_line("said *")
    run_with_torch("-s").stdout.fnmatch_lines(["*[[]rank 0[]] said 0", "[[]rank 1[]] said 1"])
