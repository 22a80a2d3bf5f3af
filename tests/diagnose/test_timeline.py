"""The rank timeline: what Perfetto opens, and the picture in the summary."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.diagnose import timeline

SVG = "{http://www.w3.org/2000/svg}"


def record(seq: int, at: float, state: str = "done", op: str = "all_reduce") -> dict[str, Any]:
    return {
        "seq": seq, "op": op, "sizes": [[128]], "dtypes": ["float32"], "group": "0", "ranks": [0, 1],
        "state": state, "location": f"train.py:{seq} in <step>", "at": at,
    }  # fmt: skip


HUNG = {
    0: [record(1, 100.0), record(2, 101.0), record(3, 102.0, "waiting", "barrier")],
    1: [record(1, 100.1), record(2, 101.2)],
}


def test_ranks_are_lanes_and_the_stuck_collective_is_red_to_the_end() -> None:
    bars = timeline.bars(HUNG, end=110.0)
    trace = timeline.chrome_trace(bars)
    assert json.loads(json.dumps(trace)) == trace
    lanes = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert lanes == {0: "rank 0", 1: "rank 1"}
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["tid"], e["name"]) for e in events] == [
        (0, "all_reduce #1"), (0, "all_reduce #2"), (0, "barrier #3"),
        (1, "all_reduce #1"), (1, "all_reduce #2"),
    ]  # fmt: skip
    (stuck,) = [event for event in events if event.get("cname") == "terrible"]
    assert (stuck["name"], stuck["ts"], stuck["dur"]) == ("barrier #3", 2_000_000, 8_000_000)
    assert stuck["args"]["location"] == "train.py:3 in <step>"


def test_the_picture_is_well_formed_and_the_stuck_bar_is_the_only_red_one() -> None:
    picture = ElementTree.fromstring(timeline.svg(timeline.bars(HUNG, end=110.0), "ddp_steps & <more>"))
    red = [bar for bar in picture.iter(f"{SVG}rect") if bar.get("fill") == "#d62728"]
    assert len(red) == 1
    title = red[0].find(f"{SVG}title")
    assert title is not None and title.text == "rank 0: barrier #3 at train.py:3 in <step>"
    assert {"rank 0", "rank 1"} <= {text.text for text in picture.iter(f"{SVG}text")}


def test_no_records_no_bars() -> None:
    assert timeline.bars({}) == timeline.bars({0: [], 1: [{"op": "send", "seq": None, "at": None}]}) == []


@given(st.dictionaries(st.integers(0, 7), st.lists(st.floats(0, 1e9), max_size=300), max_size=4))
def test_any_records_make_a_trace_in_bounds(times: dict[int, list[float]]) -> None:
    records = {rank: [record(n, at) for n, at in enumerate(sorted(found))] for rank, found in times.items()}
    bars = timeline.bars(records, end=None)
    assert len(bars) == sum(bool(at) for found in times.values() for at in found)
    assert all(0 <= bar.start <= bar.end for bar in bars)
    ElementTree.fromstring(timeline.svg(bars, "x"))
