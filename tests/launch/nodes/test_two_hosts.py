"""Two hosts, made of network namespaces: one verdict over all ranks; a host that vanishes is the cause."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launch.nodes import hosts as network
from tests.launch.nodes.hosts import PORT, Command, Host

_WHY_NOT = network.why_not()
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)

TRAIN = """
import os, sys, time
import torch, torch.distributed as dist

def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(int(sys.argv[1])):
        if sys.argv[2:] == ["uneven"] and rank == 3 and step == 2:
            break
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        if step == 10:
            open(f"rank{rank}", "w").close()
        time.sleep(0.05)
    print("node", os.environ["GROUP_RANK"], "rank", rank, dist.get_world_size())

main()
"""
LAUNCH = """
import json, sys
from pytest_gputrain import launch
rank, endpoint, steps, *more = sys.argv[1:]
print("started", flush=True)
result = launch.torchrun("train.py", steps, *more, nproc=2, nnodes=2, timeout=40, check=False,
                         node_rank=int(rank), rdzv_endpoint=endpoint)
cause = result.cause
print(json.dumps({"verdict": str(result.verdict), "cause": str(cause), "rank": cause and cause.rank,
                  "ranks": [[one.rank, one.node, one.host, one.state, one.stdout] for one in result.ranks],
                  "summary": result.summary(printed=False), "seconds": result.seconds}))
"""


def start(there: list[Host], folder: Path, *arguments: str, **environ: str) -> list[Command]:
    """The same command on each host."""
    (folder / "train.py").write_text(TRAIN)
    (folder / "launch.py").write_text(LAUNCH)
    endpoint = f"{there[0].address}:{PORT}"
    return [
        host.run(
            ["launch.py", str(number), endpoint, *arguments], folder, GPUTRAIN_NODE_TIMEOUT="4", **environ
        )
        for number, host in enumerate(there)
    ]


def result(command: Command) -> dict[str, Any]:
    command.wait()
    assert command.lines and command.lines[-1].startswith("{"), command.text
    found: dict[str, Any] = json.loads(command.lines[-1])
    return found


def test_every_rank_of_both_hosts_passes(tmp_path: Path) -> None:
    with network.hosts() as there:
        first, second = map(result, start(there, tmp_path, "3"))
    assert first["verdict"] == second["verdict"] == "PASSED", first["summary"]
    where = [one[:4] for one in first["ranks"]]
    assert where == [[0, 0, "host-a", "passed"], [1, 0, "host-a", "passed"],
                     [2, 1, "host-b", "passed"], [3, 1, "host-b", "passed"]]  # fmt: skip
    assert first["ranks"][3][4] == "node 1 rank 3 4\n"
    assert [one[0] for one in second["ranks"]] == [2, 3]


@pytest.mark.slow
def test_a_hang_on_the_other_host_is_named(tmp_path: Path) -> None:
    with network.hosts() as there:
        first, second = map(result, start(there, tmp_path, "9", "uneven"))
    assert first["verdict"] == second["verdict"] == "HUNG", first["summary"]
    assert first["rank"] == 3
    assert "rank 3 never reached all_reduce" in first["cause"]
    assert "[rank 3: node 1, host-b]" in first["cause"]
    assert second["cause"] == first["cause"]
    assert first["seconds"] < 30


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_the_cause(tmp_path: Path) -> None:
    with network.hosts() as there:
        commands = start(there, tmp_path, "100000")
        training(tmp_path)
        there[1].cut_off()
        first, second = map(result, commands)
    assert first["verdict"] == second["verdict"] == "CRASHED", first["summary"]
    assert first["rank"] is None
    assert re.match(
        r"node 1 \(host-b, ranks 2-3\) vanished \d+\.\d s after step \d+: "
        r"no heartbeat since ..:..:.. \(\d\.\d s\)",
        first["cause"],
    ), first["summary"]
    assert "ranks 2-3: gone with node 1 (host-b)" in first["summary"]
    assert re.match(r"node 0 \(host-a, ranks 0-1\) vanished", second["cause"]), second["cause"]
    assert "node 1 ended its own ranks" in second["cause"]


def training(folder: Path) -> None:
    """Until every rank of both hosts trains."""
    limit = time.monotonic() + 60
    while not all((folder / f"rank{rank}").exists() for rank in range(4)):
        assert time.monotonic() < limit
        time.sleep(0.05)
