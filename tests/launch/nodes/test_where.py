"""Which node of how many: arguments, torchrun's variables, Slurm's; what nodes have in common. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gputrain.launch import LaunchUsageError
from pytest_gputrain.launch.nodes import alike, where
from pytest_gputrain.launch.nodes.where import Where

KUBEFLOW = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "job-0", "MASTER_PORT": "29400"}
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_NNODES": "3", "SLURM_NTASKS": "3", "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08],login", "SLURM_JOB_ID": "12345",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"PET_NNODES": "1"}, None),
        (KUBEFLOW, Where(2, 1, "job-0", 29400, "")),
        (KUBEFLOW | {"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "[f::1]:12"}, Where(4, 1, "f::1", 12, "")),
        (SLURM, Where(3, 2, "gpu07", 20000 + 345, "")),
        (SLURM | {"SLURM_STEP_RESV_PORTS": "15001-15002"}, Where(3, 2, "gpu07", 15001, "")),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, None),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, None),
    ],
)  # fmt: skip
def test_what_the_environment_says(environ: dict[str, str], found: Where | None) -> None:
    assert where.by_environment(environ) == found


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"PET_NNODES": "2"},
            "PET_NNODES=2 and no PET_RDZV_ENDPOINT (or MASTER_ADDR and MASTER_PORT); "
            "give host:port of node 0 with --rdzv-endpoint",
        ),
        ({"PET_NNODES": "two"}, "PET_NNODES='two': must be a whole number"),
        (
            SLURM | {"SLURM_NTASKS": "24"},
            "srun started 24 tasks on 3 nodes; one a node is needed, which starts the ranks of its node: "
            "srun --ntasks-per-node=1",
        ),
        (
            SLURM | {"SLURM_JOB_NODELIST": "gpu[07"},
            "SLURM_JOB_NODELIST='gpu[07' names no host; give host:port of node 0 with --rdzv-endpoint",
        ),
        (SLURM | {"SLURM_NODEID": "3"}, "SLURM_NODEID=3: must be from 0 to 2, as nnodes=3"),
    ],
)
def test_an_environment_that_says_too_little(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchUsageError) as caught:
        where.by_environment(environ)
    assert str(caught.value) == message


def test_host_names_of_a_slurm_list() -> None:
    assert where.host_names("a[1-2]b[08,10],c") == ["a1b08", "a1b10", "a2b08", "a2b10", "c"]


def test_one_place_is_the_same_whoever_named_it() -> None:
    slurm = where.by_environment(SLURM)
    assert slurm is not None
    assert where.given(3, 2, slurm.endpoint) == slurm
    assert where.given(3, 2, "[fd00::1]:1").endpoint == "[fd00::1]:1"


@pytest.mark.parametrize("endpoint", ["10.0.0.1", "10.0.0.1:", ":29400", "a:b", "a:0", "a:65536"])
def test_an_endpoint_without_host_or_port(endpoint: str) -> None:
    message = f"rdzv_endpoint={endpoint!r}: must be 'host:port', such as '10.0.0.1:29400'"
    with pytest.raises(LaunchUsageError, match=re.escape(message)):
        where.given(2, None, endpoint)


def test_what_nodes_were_not_started_alike_with(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("1")
    mine = alike.what(2, 4, str(script), False) | {"host": "a"}
    theirs = mine | {"host": "b"}
    assert alike.differs(mine, 1, theirs) is None
    everywhere = "start the same command on every machine"
    for name, value, message in (
        ("nnodes", 3, f"nnodes is 2 on node 0 (a) and 3 on node 1 (b); {everywhere}"),
        ("nproc", 8, f"nproc is 4 on node 0 (a) and 8 on node 1 (b); {everywhere}"),
        ("sha256", "", "train.py is another text on node 0 (a) than on node 1 (b); copy it to every machine"),
        ("version", 2, f"pytest-gputrain's protocol is 1 on node 0 (a) and 2 on node 1 (b); {everywhere}"),
    ):
        assert alike.differs(mine, 1, theirs | {name: value}) == message


def test_a_place_knows_what_said_so() -> None:
    found = where.by_environment(KUBEFLOW)
    assert found is not None
    assert found.origin == "PET_NNODES"
    assert replace(found, origin="x") == found
