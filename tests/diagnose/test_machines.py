"""``gputrain diagnose`` on two hosts made of network namespaces; and what of the command line cannot be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_gputrain.cli import main
from pytest_gputrain.diagnose.nodes import folder_of, told_phase
from tests.launch.nodes import hosts as network
from tests.launch.nodes.hosts import PORT, Command, Host
from tests.launch.nodes.test_two_hosts import TRAIN, training

_WHY_NOT = network.why_not()
on_two_hosts = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)
HANGING = ("--phases", "ddp_one_step,ddp_whole,single")
ONE_PHASE = ("--phases", "ddp_one_step")
ENDPOINT = "10.213.0.1"
_ENDLESS = ("range(int(sys.argv[1]))", "range(1_000_000)")
_UNTIL_TOLD = (
    "        time.sleep(0.05)",
    """        told = torch.tensor(float(os.path.exists("stop")))
        dist.all_reduce(told)
        if told:
            break""",
)


def start(
    host: Host, folder: Path, *arguments: str, nnodes: int = 2, port: int = PORT, **environ: str
) -> Command:
    """The command as a user gives it."""
    command = ["-m", "pytest_gputrain", "diagnose", "--nnodes", str(nnodes), "--timeout", "60"]
    command += ["--rdzv-endpoint", f"{ENDPOINT}:{port}", "--out", f"{host.name}-out", *arguments]
    return host.run(command, folder, GPUTRAIN_NODE_TIMEOUT="4", **environ)


def on_both(there: Sequence[Host], folder: Path, *arguments: str) -> list[Command]:
    (folder / "train.py").write_text(TRAIN)
    (folder / "until_told.py").write_text(TRAIN.replace(*_UNTIL_TOLD).replace(*_ENDLESS))
    return [start(host, folder, "--node-rank", str(n), *arguments) for n, host in enumerate(there)]


@on_two_hosts
@pytest.mark.slow
def test_two_hosts_name_the_rank_and_end_alike(tmp_path: Path) -> None:
    with network.hosts() as there:
        first, second = on_both(there, tmp_path, *HANGING, "train.py", "9", "uneven")
        assert first.wait() == second.wait() == 1, first.text
    assert "HANG in ddp_whole: rank 3 never reached all_reduce" in first.text, first.text
    assert "[rank 3: node 1, host-b]" in first.text
    assert re.search(r"ddp_one_step +PASS ", first.text) and re.search(r"single +PASS ", first.text)
    assert second.lines[-1].startswith("node 1 of 2: HANG in ddp_whole: rank 3"), second.text
    assert second.lines[-1].endswith("(node 0 has the report)")
    summary = (tmp_path / "host-a-out" / "SUMMARY.md").read_text()
    assert "ranks on 2 machines: node 0 (host-a, ranks 0-1), node 1 (host-b, ranks 2-3)" in summary
    assert (tmp_path / "host-b-out-node1" / "02-ddp_whole").is_dir()


@on_two_hosts
@pytest.mark.nightly
def test_a_host_that_is_cut_off_is_the_cause_and_later_phases_are_not_run(tmp_path: Path) -> None:
    with network.hosts() as there:
        phases = "ddp_whole,static_graph,single"
        commands = on_both(there, tmp_path, "--phases", phases, "train.py", "100000")
        training(tmp_path)
        there[1].cut_off()
        first, second = commands
        assert first.wait() == second.wait() == 1, first.text
    assert re.search(r"node 1 \(host-b, ranks 2-3\) vanished \d+\.\d s after step \d+", first.text), (
        first.text
    )
    assert re.search(r"static_graph +SKIPPED .*node 1 has not been heard of for \d+ s", first.text), (
        first.text
    )
    assert "node 1 of 2: lost node 0 at 10.213.0.1:29400: " in second.lines[-1]


@on_two_hosts
@pytest.mark.nightly
def test_kubeflows_variables_say_where_nodes_meet_and_one_rank_a_machine_is_enough(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    where = {"PET_NNODES": "2", "PET_MASTER_ADDR": "host-a", "PET_MASTER_PORT": str(PORT)}
    command = ["-m", "pytest_gputrain", "diagnose", "--phases", "ddp_one_step,single", "--nproc", "1"]
    with network.hosts() as there:
        commands = [
            host.run([*command, "--out", host.name, "train.py", "3"], tmp_path, PET_NODE_RANK=str(n), **where)
            for n, host in enumerate(there)
        ]
        assert [one.wait() for one in commands] == [0, 0], commands[0].text
    assert commands[1].lines[-1] == (
        "node 1 of 2: PASS: 2 phases ran, nothing accuses the program (node 0 has the report)"
    )


@on_two_hosts
@pytest.mark.nightly
def test_machines_that_were_not_started_alike_say_so_on_both(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    with network.hosts() as there:
        first = start(there[0], tmp_path, *ONE_PHASE, "--node-rank", "0", "train.py", "3")
        second = start(there[1], tmp_path, *ONE_PHASE, "--node-rank", "1", "train.py", "3", nnodes=3)
        assert first.wait() == second.wait() == 2
    line = (
        "gputrain diagnose: nnodes is 2 on node 0 (host-a) and 3 on node 1 (host-b); start the same command "
        "on every machine"
    )
    assert first.lines == second.lines == [line]
    assert not (tmp_path / "host-a-out").exists()


@on_two_hosts
@pytest.mark.nightly
def test_a_node_that_comes_twice_is_refused_and_disturbs_nobody(tmp_path: Path) -> None:
    with network.hosts() as there:
        first, second = on_both(there, tmp_path, "--phases", "ddp_whole", "until_told.py")
        training(tmp_path)
        again = start(there[1], tmp_path, "--node-rank", "1", "until_told.py")
        more = start(there[1], tmp_path, "--node-rank", "2", "until_told.py", nnodes=3)
        assert (again.wait(), more.wait()) == (2, 2), again.text
        (tmp_path / "stop").touch()
        assert (first.wait(), second.wait()) == (0, 0), first.text
    assert again.lines == [
        "gputrain diagnose: node 1 is host-b already; give each machine a --node-rank of its own"
    ]
    assert more.lines == [
        "gputrain diagnose: this is node 2 counted from 0, and node 0 was started for 2 nodes; start the "
        "same command on every machine, once"
    ]


@on_two_hosts
@pytest.mark.nightly
def test_nodes_that_do_not_find_each_other_give_up_in_time(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    with network.hosts() as there:
        waiting = ["--timeout", "6", "--node-rank"]
        first = start(there[0], tmp_path, *waiting, "0", "train.py", "3")
        second = start(there[1], tmp_path, *waiting, "1", "train.py", "3", port=PORT + 1)
        assert first.wait() == second.wait() == 1
        nobody = start(there[1], tmp_path, *waiting, "0", "train.py", "3")
        assert nobody.wait() == 2
    assert re.fullmatch(
        r"gputrain diagnose: node 1 never arrived: waited \d+ s at 10.213.0.1:29400 for 2 nodes; start the "
        r"same command there with --node-rank 1, or look for a firewall between the machines",
        first.text,
    ), first.text
    assert second.text == (
        "gputrain diagnose: node 0 did not open 10.213.0.1:29401 within 6 s (Connection refused); start the "
        "same command there with --node-rank 0, or look for a firewall between the machines"
    )
    assert nobody.text == (
        "gputrain diagnose: this is node 0, but no interface of host-b has the address of '10.213.0.1'; the "
        "endpoint is host:port of node 0"
    )


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (
            ["--nnodes", "0"],
            {},
            "argument --nnodes: '0' is not legal; give a number of machines from 1 to 1024",
        ),
        (
            ["--node-rank", "-1"],
            {},
            "argument --node-rank: '-1' is not legal; give 0 on the first machine, 1 on the next, …",
        ),
        (["--node-rank", "1"], {}, "--node-rank 1 needs --rdzv-endpoint HOST:PORT of node 0"),
        (["--rdzv-endpoint", "a:1"], {}, "--rdzv-endpoint a:1 needs --nnodes, the number of machines"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "a"],
            {},
            "--rdzv-endpoint 'a': must be 'host:port', such as '10.0.0.1:29400'",
        ),
        (
            ["--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "a:1"],
            {},
            "--node-rank 2: must be from 0 to 1, as --nnodes 2",
        ),
        (
            ["--nnodes", "2"],
            {"PET_NNODES": "4", "PET_RDZV_ENDPOINT": "a:1"},
            "--nnodes 2, and PET_NNODES says 4; leave --nnodes out, or give --rdzv-endpoint HOST:PORT of "
            "node 0, or --nnodes 1 for this machine alone",
        ),
    ],
)
def test_a_command_line_that_cannot_be(
    arguments: list[str],
    environ: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    try:
        code = main(["diagnose", *arguments, "train.py"])
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr().err.strip().removeprefix("gputrain diagnose: ")
    assert (code, said.removesuffix("; see gputrain diagnose --help")) == (2, message)


def test_a_case_runs_on_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    case = "pytest_gputrain.reference.gpt:case"
    assert main(["diagnose", "--nnodes", "2", "--rdzv-endpoint", "a:1", "--case", case]) == 2
    assert capsys.readouterr().err == (
        "gputrain diagnose: --case runs on one machine, and there are 2 nodes; give a script, or --nnodes 1\n"
    )


def test_of_node_0_only_known_switches_are_taken_and_no_path() -> None:
    switches = {"GPUTRAIN_SEED": "3", "GPUTRAIN_STUDY": "/etc", "LD_PRELOAD": "x.so"}
    phase = told_phase({"name": "../../branch:a b", "steps": "3", "switches": switches}, 8)
    assert (phase.name, phase.steps, phase.ranks) == ("______branch:a_b", 3, 8)
    assert dict(phase.switches) == {"GPUTRAIN_SEED": "3"}
    assert not phase.alone


def test_another_node_writes_beside_node_0() -> None:
    assert folder_of(Path("a/out"), 0) == Path("a/out")
    assert folder_of(Path("a/out"), 2) == Path("a/out-node2")
