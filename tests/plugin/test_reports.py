"""What a test's report says of its launches: sections, properties; the same with and without xdist."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from .conftest import Run

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")

# What the plugins of a session get to see: from reports alone, in the process that shows them.
RECORDER = """
import json

def pytest_runtest_logreport(report):
    with open("reports.jsonl", "a") as file:
        row = [report.nodeid, report.when, report.sections, report.user_properties]
        file.write(json.dumps(row) + "\\n")
"""

TESTS = """
import sys
import torch.distributed as dist

def speak(lines=1, fail=False):
    rank = dist.get_rank()
    for number in range(lines):
        print(f"rank {rank} says {number}")
    print(f"rank {rank} moans", file=sys.stderr)
    if fail:
        raise ValueError("boom")

def test_passes(ddp_launcher):
    ddp_launcher(speak)

def test_launch_fails(ddp_launcher):
    ddp_launcher(speak, fail=True)

def test_long(ddp_launcher):
    ddp_launcher(speak, 5000, fail=True)

def test_assertion_fails(ddp_launcher):
    assert ddp_launcher(speak).values == [1, 2]

def test_expected(ddp_launcher):
    assert not ddp_launcher(speak, fail=True, check=False).passed

def test_two_launches(ddp_launcher):
    ddp_launcher(speak)
    ddp_launcher(speak, 2)
    assert False, "of no launch"
"""


def reports(pytester: pytest.Pytester) -> dict[tuple[str, str], tuple[dict[str, str], dict[str, str]]]:
    """(test, phase) -> its sections by title, its properties."""
    import json

    found = {}
    for line in (pytester.path / "reports.jsonl").read_text().splitlines():
        nodeid, when, sections, properties = json.loads(line)
        assert all(isinstance(value, str) for _, value in properties)
        found[nodeid.rpartition("::test_")[2], when] = (dict(sections), dict(properties))
    return found


def titles(lines: list[str]) -> list[str]:
    return [line.strip("- ") for line in lines if line.startswith("----") and "Captured" in line]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_report_tells_what_ranks_said(
    pytester: pytest.Pytester, run_each_way: Run, workers: list[str]
) -> None:
    pytester.makeconftest(RECORDER)
    pytester.makepyfile(test_it=TESTS)
    options = ["-rA", "--junitxml=out.xml", "-o", "junit_logging=all", "--gputrain-report=kept"]
    result = run_each_way(*options, *workers)
    result.assert_outcomes(passed=2, failed=4)
    sections_and_junit(pytester)
    the_terminal_shows_it_once(result.outlines)
    artifacts_are_named(pytester)


def sections_and_junit(pytester: pytest.Pytester) -> None:
    found = reports(pytester)
    assert found["passes", "teardown"][0] == {}
    # In the text already, so not in the report that the terminal shows.
    assert found["launch_fails", "call"][0] == {}
    said = {
        "Captured stdout of rank 0 call": "[rank 0]\nrank 0 says 0\n",
        "Captured stderr of rank 0 call": "[rank 0]\nrank 0 moans\n",
        "Captured stdout of rank 1 call": "[rank 1]\nrank 1 says 0\n",
        "Captured stderr of rank 1 call": "[rank 1]\nrank 1 moans\n",
    }
    assert found["launch_fails", "teardown"][0] == said
    assert found["assertion_fails", "call"][0] == said
    assert found["expected", "call"][0] == said
    several = found["two_launches", "call"][0]
    assert several["Captured stdout of rank 1, launch 2 call"] == "[rank 1]\nrank 1 says 0\nrank 1 says 1\n"
    assert len(several) == 8
    long = found["long", "teardown"][0]["Captured stdout of rank 1 call"]
    assert len(long) < 17_000
    assert "characters left out; see the artifacts" in long
    assert long.startswith("[rank 1]\nrank 1 says 0\n")
    assert long.endswith("rank 1 says 4999\n")
    junit(pytester, said)


def junit(pytester: pytest.Pytester, said: dict[str, str]) -> None:
    cases = {
        case.attrib["name"]: case for case in ElementTree.parse(pytester.path / "out.xml").iter("testcase")
    }
    for name in ("test_launch_fails", "test_assertion_fails", "test_expected"):
        for stream in ("out", "err"):
            text = cases[name].findtext(f"system-{stream}") or ""
            assert [part in text for title, part in said.items() if f"std{stream}" in title] == [True, True]
    assert "rank 0 says 4999" in (cases["test_long"].findtext("system-out") or "")
    assert "says" not in (cases["test_passes"].findtext("system-out") or "")


def the_terminal_shows_it_once(shown: list[str]) -> None:
    start = next(number for number, line in enumerate(shown) if " test_launch_fails " in line)
    end = next(n for n, line in enumerate(shown[start + 1 :], start + 1) if line.startswith(("___", "===")))
    text = shown[start:end]
    assert [text.count(line) for line in ("rank 0 says 0", "rank 1 says 0", "rank 0 moans")] == [1, 1, 1]
    assert titles(text) == []
    assert "--- rank 0 stdout" in text


def artifacts_are_named(pytester: pytest.Pytester) -> None:
    found = reports(pytester)
    folder = found["launch_fails", "call"][1]["gputrain_artifacts"]
    assert folder.startswith(str(pytester.path / "kept" / "test_it.py-test_launch_fails" / "speak-"))
    assert "gputrain_artifacts" not in found["passes", "teardown"][1]
    assert "gputrain_artifacts" not in found["assertion_fails", "call"][1]


def test_show_capture_hides_sections(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(test_it=TESTS)
    shown = run_with_torch("-k", "assertion_fails", "--show-capture=stderr").outlines
    assert titles(shown) == ["Captured stderr of rank 0 call", "Captured stderr of rank 1 call"]


def test_a_report_has_an_end(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makeconftest(RECORDER)
    pytester.makepyfile(
        test_it="""
        def test_floods(ddp_launcher):
            def flood(): print("x" * 100_000)
            for _ in range(20):
                ddp_launcher(flood)
            assert False
        """
    )
    run_with_torch().assert_outcomes(failed=1)
    sections = reports(pytester)["floods", "call"][0]
    sizes = {title: len(content) for title, content in sections.items()}
    assert "Captured stdout of further ranks call" in sizes
    assert sum(sizes.values()) < 257 * 1024


def test_what_a_fixture_launched(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makeconftest(RECORDER)
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.fixture
        def values(ddp_launcher):
            return ddp_launcher(print, "made").values

        @pytest.fixture
        def broken(ddp_launcher):
            ddp_launcher(print, "made", end=1)

        def test_fails(values): assert False
        def test_passes(values): pass
        def test_errors(broken): pass
        """
    )
    run_with_torch().assert_outcomes(failed=1, passed=1, errors=1)
    found = reports(pytester)
    assert found["fails", "setup"][0] == {}
    assert found["fails", "call"][0]["Captured stdout of rank 1 call"] == "[rank 1]\nmade\n"
    assert found["passes", "teardown"][0] == {}
    assert "test_errors" in found["errors", "setup"][1]["gputrain_artifacts"]


def test_properties_are_text(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(
        """
        from pytest_gputrain.plugin import properties

        def test_it(request):
            properties.add(request.node, "number", {1: object})
            properties.add(request.node, "number", {1: object})
            assert request.node.user_properties == [("number", "{1: <class 'object'>}")]
        """
    )
    run_child("-n", "1").assert_outcomes(passed=1)
