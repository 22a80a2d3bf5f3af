"""Tests marked ``distributed`` that hold: what the body may use on a rank, and what becomes of it."""

from __future__ import annotations

import pytest

from .conftest import Run

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")

CONFTEST = """
import os
import pytest

def pytest_assertrepr_compare(op, left, right):
    if left == "mine":
        return ["explained by the conftest"]

@pytest.fixture
def torn_down(tmp_path_factory):
    yield "up"
    with open(tmp_path_factory.getbasetemp() / "torn_down", "a") as file:
        file.write(f"{os.getpid()} ")

@pytest.fixture(scope="session", autouse=True)
def torn_down_once(tmp_path_factory):
    yield
    assert (tmp_path_factory.getbasetemp() / "torn_down").read_text() == f"{os.getpid()} "

@pytest.fixture
def keeps_the_rank(rank, device):
    return {"rank": rank, "device": [device]}
"""

PASSING = """
import logging, os, sys, warnings
import pytest
import torch
import torch.distributed as dist
from pytest_gputrain import distributed

total = 0

@pytest.fixture
def settings(monkeypatch, tmp_path):
    monkeypatch.setenv("OF_A_FIXTURE", "seen")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "total", 3)

@distributed
def test_group_and_fixtures(rank, world_size, device, tmp_path, torn_down, settings, keeps_the_rank):
    value = torch.full((1,), float(rank + 1), device=device)
    dist.all_reduce(value)
    assert (value.item(), world_size, total, torn_down) == (3.0, 2, 3, "up")
    assert (os.environ["OF_A_FIXTURE"], os.getcwd()) == ("seen", str(tmp_path))
    assert keeps_the_rank == {"rank": dist.get_rank(), "device": [torch.device("cpu")]}
    (tmp_path / str(rank)).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2
    print("said by", rank)

@pytest.fixture
def model(): return torch.nn.Linear(1, 1)

@pytest.fixture
def optimizer(model): return torch.optim.SGD(model.parameters(), lr=1.0)

@distributed
def test_shared_between_fixtures(model, optimizer):
    assert optimizer.param_groups[0]["params"][0] is model.weight

class TestInAClass:
    def setup_method(self): self.made = 4

    @pytest.mark.parametrize("number", [4, pytest.param(5, marks=pytest.mark.xfail(strict=True))])
    @distributed(world_size=3, env={"OF_THE_MARKER": "yes"})
    def test_method(self, number, world_size):
        assert self.made == number and world_size == 3 and os.environ["OF_THE_MARKER"] == "yes"

@distributed(world_size=1)
def test_output_fixtures(capsys, caplog, recwarn, tmp_path_factory, monkeypatch, rank):
    print("out"); print("err", file=sys.stderr)
    assert capsys.readouterr() == ("out\\n", "err\\n")
    os.write(1, b"not by sys\\n")
    assert capsys.readouterr().out == ""
    with caplog.at_level("INFO"):
        logging.getLogger("mine").info("logged %d", 1)
    assert caplog.record_tuples == [("mine", logging.INFO, "logged 1")]
    warnings.warn("warned")
    assert [str(one.message) for one in recwarn] == ["warned"]
    first, second = tmp_path_factory.mktemp("x"), tmp_path_factory.mktemp("x")
    assert first != second and first.is_dir()
    monkeypatch.setenv("A", "B")

@distributed
def test_descriptors(capfdbinary):
    os.write(1, b"raw\\n"); print("cooked")
    assert capfdbinary.readouterr() == (b"raw\\ncooked\\n", b"")

class Odd(Exception):
    def __init__(self, one, other): super().__init__(f"{one}-{other}")  # cannot be unpickled

@pytest.mark.xfail(raises=Odd, strict=True)
@distributed
def test_xfail_raises(): raise Odd(1, 2)

@distributed
def test_xfail_in_the_body(rank):
    if rank == 1:
        import time; time.sleep(2)  # every rank is waited for
    pytest.xfail("not yet")

@distributed
def test_skip_in_the_body(): pytest.skip("not here")

@pytest.mark.skip(reason="marked")
@distributed
def test_skip_marker(): raise AssertionError

@distributed
def test_raises_and_warns():
    with pytest.raises(ValueError, match="boo+m"): raise ValueError("booom")
    with pytest.warns(UserWarning, match="care"): warnings.warn("take care")
    warnings.warn("for the summary")

@pytest.mark.filterwarnings("error:as an error")
@distributed
def test_filterwarnings():
    with pytest.raises(UserWarning): warnings.warn("as an error")

@distributed
def test_explained():
    with pytest.raises(AssertionError, match="explained by the conftest"): assert "mine" == "theirs"

def test_not_marked(): assert total == 0
"""


def test_what_a_body_may_use(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_it=PASSING)
    result = run_child("-rA", "--junitxml=junit.xml", "-o", "junit_logging=all", "--strict-markers")
    result.assert_outcomes(passed=9, skipped=2, xfailed=3, warnings=1)
    result.stdout.fnmatch_lines(["*Captured stdout of rank 1 call*", "said by 1"])
    result.stdout.fnmatch_lines(["*test_it.py:*: UserWarning: for the summary"])
    line = 1 + PASSING[1:].splitlines().index('def test_skip_in_the_body(): pytest.skip("not here")')
    result.stdout.fnmatch_lines_random(
        [f"SKIPPED [[]1[]] test_it.py:{line}: not here", "XFAIL *test_xfail_in_the_body - not yet"]
    )
    assert "[rank 1]\nsaid by 1\n" in (pytester.path / "junit.xml").read_text()


SOME_OF_EACH = """
import pytest

@pytest.mark.parametrize("number", range(3))
@pytest.mark.distributed
def test_equal(number, rank):
    print("rank", rank, "of", number)
    assert number == 1

@pytest.fixture(scope="class")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("shared")

class TestTogether:
    @pytest.mark.distributed
    def test_first(self, folder, rank): (folder / f"{rank}").touch()

    @pytest.mark.distributed
    def test_second(self, folder): assert len(list(folder.iterdir())) == 2
"""


def test_under_xdist_and_in_part(pytester: pytest.Pytester, run_each_way: Run) -> None:
    pytester.makepyfile(test_it=SOME_OF_EACH)
    result = run_each_way("-n", "2", "--dist", "loadscope")
    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines(
        [
            "FAILED after * s: ranks 0-1 raised AssertionError: assert 0 == 1   at *test_equal",
            ">       assert number == 1",
            "*Captured stdout of rank 1 call*",
            "rank 1 of 0",
        ]
    )
    result.stdout.fnmatch_lines(["FAILED test_it.py::test_equal[[]2[]] - ranks 0-1: assert 2 == 1"])
    # Once more only what failed, and of that a part.
    result = run_each_way("--lf", "-k", "equal and 2")
    result.assert_outcomes(failed=1, deselected=3)


def test_collecting_starts_no_rank(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_it=SOME_OF_EACH)
    run("--collect-only", "-q").stdout.fnmatch_lines(["5 tests collected*"])
    run("--setup-plan", "-q").stdout.fnmatch_lines(["*no tests ran*"])
