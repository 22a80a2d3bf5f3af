"""What 1,024 ranks on 128 machines cost: gathering their records over a real TCPStore, and the cause.

    python -m benchmarks.many_ranks

The machines are simulated: 128 clients of the store in threads of one process, each with the report of its
8 ranks, as large as a launch sends it. One rank never came to the collective in which all others wait. Timed
are node 0's reading of all reports and of one round of heartbeats, and from the reports to the text.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from benchmarks._harness import options, report
from pytest_gputrain.launch import blame, deadlock, output
from pytest_gputrain.launch.deadlock import Scene, from_json
from pytest_gputrain.launch.nodes import courier, telling
from pytest_gputrain.launch.records import RankResult
from pytest_gputrain.launch.result import fate

NODES, PER_NODE, ROUNDS, CULPRIT = 128, 8, 5, 512
RANKS = NODES * PER_NODE


def records(rank: int) -> list[dict[str, Any]]:
    """The last collectives of a rank; the culprit lacks the one in which the others wait."""
    last = telling.kept(RANKS)
    return [
        {
            "seq": seq, "op": "all_reduce", "sizes": [[1 + seq % 7]], "dtypes": ["float32"], "group": "0",
            "ranks": list(range(RANKS)), "state": "waiting" if seq == last else "done",
            "location": f"train.py:{seq % 50} in step", "at": 1795887670.6 + seq, "note": None,
        }
        for seq in range(1, last + 1 - (rank == CULPRIT))
    ]  # fmt: skip


def node_report(node: int) -> bytes:
    """What one machine sends."""
    told = []
    for rank in range(node * PER_NODE, (node + 1) * PER_NODE):
        mine = records(rank)
        state: Any = "returned" if rank == CULPRIT else "running"
        scene = Scene(
            rank, state, rank != CULPRIT, mine[-1]["location"], "loss.backward()", calls=from_json(mine)
        )
        told.append(telling.told_scene(scene, mine, telling.kept(RANKS)))
    return courier.packed({"kind": "report", "scenes": told})


def gather(clients: Sequence[Any], reports: Sequence[bytes], leader: Any) -> list[dict[str, Any]]:
    """All nodes write at once; node 0 reads as a courier does."""

    def send(node: int) -> None:
        clients[node].set(f"log/{node}/0", reports[node])
        clients[node].set(f"beat/{node}", json.dumps({"n": 1, "said": 1, "data": {}}).encode())

    threads = [threading.Thread(target=send, args=(node,)) for node in range(NODES)]
    for thread in threads:
        thread.start()
    missing, found = set(range(NODES)), []
    while missing:
        for node, text in zip(range(NODES), beats(leader), strict=True):
            if node in missing and text:
                found.append(courier.unpacked(leader.get(f"log/{node}/0")))
                missing.discard(node)
    for thread in threads:
        thread.join()
    for node in range(NODES):
        leader.set(f"beat/{node}", b"")
    return found


def beats(leader: Any) -> list[bytes]:
    """One round of heartbeats."""
    found: list[bytes] = leader.multi_get([f"beat/{node}" for node in range(NODES)])
    return found


def text_of(reports: Sequence[dict[str, Any]]) -> str:
    """From the reports to what a person reads."""
    scenes = {}
    for told in (told for one in reports for told in one["scenes"]):
        scenes[told["rank"]] = telling.scene_told(told)[0]
    assert len(deadlock.stuck(scenes)) == RANKS - 1
    finding = blame.explain(scenes)
    assert finding is not None and finding.cause.rank == CULPRIT
    fates = {rank: fate(RankResult(rank, "ended", fate=blame.fate(scene))) for rank, scene in scenes.items()}
    lines = [
        str(finding.cause),
        *(f"{output.rank_list(ranks)}: {text}" for ranks, text in output.grouped(fates)),
    ]
    return "\n".join(lines)


def timed(seconds: list[float], function: Callable[[], Any]) -> Any:
    """The function's value; how long it took is added to ``seconds``."""
    start = time.perf_counter()
    value = function()
    seconds.append(time.perf_counter() - start)
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 when the printed text names the one rank in a handful of lines."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    given = options(__doc__, argv)
    wait = timedelta(seconds=60)
    leader: Any = TCPStore("127.0.0.1", 0, None, is_master=True, timeout=wait, wait_for_workers=False)
    clients: list[Any] = [
        TCPStore("127.0.0.1", leader.port, None, is_master=False, timeout=wait) for _ in range(NODES)
    ]
    for node in range(NODES):
        leader.set(f"beat/{node}", b"")
    reports = [node_report(node) for node in range(NODES)]
    gathering, round_of_beats, analysis = list[float](), list[float](), list[float]()
    text = ""
    for _ in range(1 if given.quick else ROUNDS):
        found = timed(gathering, lambda: gather(clients, reports, leader))
        timed(round_of_beats, lambda: beats(leader))
        text = timed(analysis, partial(text_of, found))
    print(text)
    runs = {
        "gathering 128 reports": gathering,
        "a round of 128 heartbeats": round_of_beats,
        "from reports to the cause": analysis,
    }
    figures = {f"{name}, median seconds": statistics.median(seconds) for name, seconds in runs.items()}
    sizes = {"bytes a node": max(map(len, reports)), "collectives a rank": telling.kept(RANKS)}
    report(
        "many_ranks",
        runs,
        {**figures, **sizes, "lines of text": len(text.splitlines())},
        results=given.results,
    )
    return 0 if len(text.splitlines()) <= 5 else 1


if __name__ == "__main__":
    sys.exit(main())
