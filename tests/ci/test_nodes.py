"""The recipes for several nodes, on two hosts made of network namespaces.

Slurm's own commands are not here: ``srun`` and ``scontrol`` are played as far as the scripts use them, with
the variables that Slurm sets. The TrainJob's command is run on both hosts with those of Kubeflow's runtime.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ci import recipes
from tests.ci.conftest import Machine, end
from tests.ci.recipes import CI, TRAINJOB
from tests.launch.nodes import hosts as network
from tests.launch.nodes.hosts import Host

_WHY_NOT = network.why_not()
pytestmark = [
    pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT),
    pytest.mark.nightly,
    pytest.mark.timeout(600),
]
TRAIN = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
assert os.environ.get("TRAIN") != "fail" or dist.get_rank() != 3
print("ranks", int(total))
dist.destroy_process_group()
"""
TESTS = """
import pytest

@pytest.mark.parametrize("again", range(2))
def test_all_ranks_meet(ddp_launcher, again):
    result = ddp_launcher.torchrun("train.py", nproc=2, nnodes=2)
    assert all(rank.stdout == "ranks 4\\n" for rank in result.ranks)
"""
# The command on each of two nodes; the highest of their exit codes. Kills at once; Slurm waits half a minute.
SRUN = """#!/usr/bin/env bash
while [[ ${1-} == --* ]]; do [[ $1 != --kill-on-bad-exit=1 ]] || kill=1; shift; done
spaces=(SPACES) pids=() code=0
for number in 0 1; do
    SLURM_NODEID=$number SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 \\
        ip netns exec "${spaces[number]}" unshare --uts \\
        sh -c 'hostname "$0" && mount --bind HOSTS /etc/hosts && mount --bind RESOLV /etc/resolv.conf &&
        exec "$@"' "host-$number" "$@" &
    pids+=($!)
done
for _ in "${pids[@]}"; do
    wait -n && continue || last=$?
    [ "$last" -le "$code" ] || code=$last
    [ -z "${kill-}" ] || kill -KILL "${pids[@]}" 2>&-
done
exit "$code"
"""


def slurm(machine: Machine, there: list[Host]) -> dict[str, str]:
    """The environment of a job on these hosts, and its commands in the machine's folder of tools."""
    tools = Path(machine.environ["PATH"].split(":")[0])
    # Within the mount namespace that `ip netns exec` makes, and nowhere else.
    names = tools / "hosts"
    known = [f"{host.address} host-{number}\n" for number, host in enumerate(there)]
    names.write_text("127.0.0.1 localhost\n" + "".join(known))
    nobody = tools / "resolv.conf"  # a name server that is out of reach would be waited for
    nobody.write_text("")
    spaces = " ".join(host.space for host in there)
    srun = SRUN.replace("SPACES", spaces).replace("HOSTS", str(names)).replace("RESOLV", str(nobody))
    (tools / "srun").write_text(srun)
    (tools / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames host-[0-1]" ] && printf \'host-0\\nhost-1\\n\'\n'
    )
    for name in ("srun", "scontrol"):
        (tools / name).chmod(0o755)
    return {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host-[0-1]",
            "GLOO_SOCKET_IFNAME": "eth0", "NIGHT_DEVICE": "cpu"}  # fmt: skip


@pytest.fixture
def project(machine: Machine) -> Path:
    (machine.project / "train.py").write_text(TRAIN)
    (machine.project / "tests" / "nodes").mkdir()
    (machine.project / "tests" / "nodes" / "test_nodes.py").write_text(TESTS)
    return machine.project


@pytest.mark.parametrize("train", ["pass", "fail"])
def test_tests_over_nodes_of_slurm(machine: Machine, project: Path, train: str) -> None:
    with network.hosts() as there:
        code, said = machine.bash(
            str(CI / "slurm" / "nodes.sbatch"), "tests/nodes", TRAIN=train, **slurm(machine, there)
        )
    assert code == (train == "fail"), said
    report = json.loads((project / "reports" / "7" / "report.json").read_text())
    assert report["verdict"] == f"{train}ed"
    assert len(report["tests"]) == 4 and len(report["machines"]) == 2
    if train == "fail":
        assert "rank 3" in str([test["message"] for test in report["tests"]])


def test_a_script_over_nodes_of_slurm(machine: Machine, project: Path) -> None:
    script = str(CI / "slurm" / "torchrun.sbatch")
    assert machine.bash(script) == (
        2, "torchrun.sbatch: no script given: sbatch ci/slurm/torchrun.sbatch train.py\n"
    )  # fmt: skip
    with network.hosts() as there:
        environ = slurm(machine, there)
        code, said = machine.bash(script, "train.py", SLURM_GPUS_ON_NODE="2", **environ)
        assert code == 0 and said.count("ranks 4") == 4, said
        code, said = machine.bash(script, "train.py", SLURM_GPUS_ON_NODE="2", TRAIN="fail", **environ)
        assert code != 0, said


def test_a_trainjob(machine: Machine, project: Path) -> None:
    command, environ = recipes.container(TRAINJOB)
    # As Kubernetes' variables have it; but for the GPUs, which are not here.
    text = command[-1].replace('--require-gpus "$NIGHT_GPUS"', "").replace("/gputrain", str(project))
    assert text != command[-1]
    with network.hosts() as there:
        started = []
        for number, host in enumerate(there):
            own = {**environ, "JOB": "nodes-x", "PET_NNODES": "2", "PET_NODE_RANK": str(number),
                   "PET_MASTER_ADDR": there[0].address, "PET_MASTER_PORT": "29400",
                   "GLOO_SOCKET_IFNAME": "eth0"}  # fmt: skip
            inside = ["ip", "netns", "exec", host.space, *command[:-1], text]
            started.append(machine.start(inside, **own))
        said = []
        try:
            said = [process.communicate(timeout=200)[0] for process in started]
        finally:
            for process in started:
                end(process)
    assert [process.returncode for process in started] == [0, 0], said
    for number in (0, 1):
        folder = project / "reports" / "nodes-x" / f"node-{number}"
        assert json.loads((folder / "report.json").read_text())["verdict"] == "passed"
