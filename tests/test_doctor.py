"""``gputrain doctor``: what it says of a machine, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.cli import doctor, doctor_torch, main
from pytest_gputrain.cli.doctor import Finding
from pytest_gputrain.devices import Gpu, Inventory, discover, inventory
from pytest_gputrain.devices.lease_folder import LeaseFolder
from pytest_gputrain.devices.lease_place import Request
from pytest_gputrain.devices.leases import acquire

ROOT = Path(__file__).parent.parent
needs_linux = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")
H200 = tuple(Gpu(i, f"GPU-{i}", "NVIDIA H200", 150754820096, False, "NVML") for i in range(2))
# What torch answers on a machine with two of these.
WELL: dict[str, Any] = {"version": "2.13.0", "cuda": "13.0", "num_gpus": 2, "nccl": "2.27.5"}


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GPUTRAIN_FAKE_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPUTRAIN_LEASE_DIR", str(tmp_path / "leases"))


def test_a_machine_as_it_is(tmp_path: Path) -> None:
    """A real run: torch in its child process, two real ranks."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest_gputrain", "doctor", "--json", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "gputrain doctor: nothing stands in the way"
    if sys.platform == "linux":
        assert "ok    step, gloo   2 ranks, one DDP step: gradients are right" in lines
    assert any(line.startswith(("ok    GPUs ", "warn  GPUs ")) for line in lines)
    document = json.loads(out.read_text())
    assert document["pretended"] is False
    assert [str(Finding(**finding)) for finding in document["findings"]] == lines[:-2]
    assert {"torch", "gpus", "time", "commit"} <= set(document["origin"])
    assert not (tmp_path / "leases").exists()  # looked at, not made


def with_gpus(monkeypatch: pytest.MonkeyPatch, found: Inventory) -> list[str]:
    monkeypatch.setattr(inventory, "_discover", lambda fake, path: found)
    return [str(finding) for finding in doctor._gpus(discover())]


def test_no_driver_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = with_gpus(monkeypatch, Inventory((), "NVML", "no NVIDIA driver"))
    assert lines == ["ok    GPUs         0 by NVML (no NVIDIA driver); tests that need GPUs skip"]


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = with_gpus(monkeypatch, Inventory((), "NVML", "driver 580 is loaded but shows no GPU", "580"))
    assert lines == [
        "warn  GPUs         0 by NVML (driver 580 is loaded but shows no GPU), driver 580; tests that need "
        "GPUs skip; in a container, give it GPUs (docker run --gpus all)"
    ]


def test_links_between_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "links", lambda gpus: {"NVLink": [(0, 1)], "one NUMA node": [(0, 2), (1, 2)]})
    lines = with_gpus(monkeypatch, Inventory(H200, "NVML"))
    assert lines[-1] == "ok    links        NVLink: 0-1; one NUMA node: 0-2, 1-2"


def test_gpus_and_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(doctor, "links", lambda gpus: {})
    cut = (Gpu(2, "MIG-1", "NVIDIA H200 MIG 1g.18gb", 2**34, True, "NVML"),)
    assert with_gpus(monkeypatch, Inventory((*H200, *cut), "NVML", "", "580")) == [
        "ok    GPUs         1 (NVIDIA H200, 2 hidden by CUDA_VISIBLE_DEVICES='1', by NVML), driver 580",
        "ok    GPU 0        NVIDIA H200, 140.4 GiB, GPU-0, hidden from CUDA",
        "ok    GPU 1        NVIDIA H200, 140.4 GiB, GPU-1",
        "ok    MIG 2        NVIDIA H200 MIG 1g.18gb, 16.0 GiB, MIG-1, a MIG slice of GPU 2, hidden from CUDA",
    ]


def test_a_gpu_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-1")
    monkeypatch.setattr(doctor, "links", lambda gpus: {})
    assert with_gpus(monkeypatch, Inventory(H200, "NVML"))[0] == (
        "FAIL  GPUs         0 (CUDA_VISIBLE_DEVICES='1,GPU-1' names GPU 1 twice, so CUDA shows none: "
        "name each once, by NVML)"
    )


def test_pretended_gpus_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    lines = [str(finding) for finding in doctor._gpus(discover())]
    assert lines == [
        "warn  GPUs         pretended: 1 (pretended GPU, by GPUTRAIN_FAKE_GPUS); tests select and skip by "
        "them, nothing can run on them; unset GPUTRAIN_FAKE_GPUS",
        "ok    pretended 0  pretended GPU, 74.5 GiB, GPU-fa4e0000-0000-0000-0000-000000000000",
    ]


def test_who_holds_which_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "2")
    gpus = discover().gpus
    folder = LeaseFolder(tmp_path / "leases")
    folder.prepare()
    lease = acquire(folder, Request(1, gpus[1:], "test_x.py::test_a", 1.0), deadline=60)
    try:
        first, second = doctor._leases(discover())
    finally:
        lease.release()
    assert str(first) == f"ok    leases       1 in {tmp_path / 'leases'}"
    said = f"ok    lease        GPU 1: {gpus[1].uuid}: test_x.py::test_a, pid {os.getpid()}, for "
    assert str(second).startswith(said)


def test_a_lease_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "leases").write_text("")
    (finding,) = doctor._leases(Inventory((), "NVML"))
    assert str(finding).startswith(f"FAIL  leases       lease folder {str(tmp_path / 'leases')!r} ")
    assert str(finding).endswith("by --gputrain-lease-dir or GPUTRAIN_LEASE_DIR")


@pytest.mark.parametrize(
    ("changed", "num_visible", "expected"),
    [
        ({}, 2, ["ok    torch        2.13.0, built for CUDA 13.0, sees 2 GPUs", "ok    NCCL         2.27.5"]),
        (
            {"cuda": None, "num_gpus": 0, "nccl": None},
            2,
            [
                "FAIL  torch        2.13.0, built without CUDA, sees 0 GPUs; install a torch that is built "
                "for CUDA"
            ],
        ),
        (
            {"num_gpus": 0},
            2,
            [
                "FAIL  torch        2.13.0, built for CUDA 13.0, sees 0 GPUs; it should see 2: is the driver "
                "new enough for this build?",
                "ok    NCCL         2.27.5",
            ],
        ),
        (
            {"cuda": None, "num_gpus": 0},
            0,
            ["ok    torch        2.13.0, built without CUDA, sees 0 GPUs"],
        ),
        (
            {"broken": "RuntimeError: CUDA error: out of memory", "nccl": None},
            None,
            [
                "ok    torch        2.13.0, built for CUDA 13.0, sees 2 GPUs",
                "ok    NCCL         none in this build",
                "FAIL  CUDA         a GPU cannot be used: RuntimeError: CUDA error: out of memory; see "
                "nvidia-smi and dmesg",
            ],
        ),
        (
            {"peers": [[0, 1, True], [0, 2, False], [1, 2, False]]},
            2,
            [
                "ok    torch        2.13.0, built for CUDA 13.0, sees 2 GPUs",
                "ok    NCCL         2.27.5",
                "warn  peer access  1 of 3 pairs of GPUs; none between 0-2, 1-2: NCCL goes through host "
                "memory",
            ],
        ),
    ],
)
def test_what_torch_says(changed: dict[str, Any], num_visible: int | None, expected: list[str]) -> None:
    found = doctor._torch_findings({**WELL, **changed}, num_visible)
    assert [str(finding) for finding in found] == expected


def test_limits() -> None:
    assert str(doctor._shared_memory(64 << 20)) == (
        "warn  memory       /dev/shm has 64.0 MiB; DataLoader workers and NCCL need 1 GiB and more: docker "
        "run --shm-size=8g, or --ipc=host"
    )
    assert doctor._shared_memory(1 << 30).state == "ok"
    assert str(doctor._open_files(256, 4096, unlimited=-1)) == (
        "warn  open files   at most 256 a process; many ranks need more: ulimit -n 4096"
    )
    assert str(doctor._open_files(-1, -1, unlimited=-1)) == "ok    open files   no limit"


@needs_linux
def test_a_step_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_torch, "ddp_step", lambda device: 1.0)
    assert doctor_torch.try_step("cpu") == "gradients are [1.0, 1.0] and not [1.5, 1.5]"

    def broken(device: str) -> float:
        raise OSError("no such network")

    monkeypatch.setattr(doctor_torch, "ddp_step", broken)
    why = doctor_torch.try_step("cpu") or ""
    assert "raised OSError: no such network" in why
    assert "\n" not in why
    (finding,) = [doctor._step("cpu")]
    assert finding.state == "FAIL"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise ImportError('no torch here')", "left with exit code 1: ImportError: no torch here"),
        ("print('hello')", "gave an answer that cannot be read: 'hello\\n'"),
        ("import time; time.sleep(600)", "did not answer within 2 s"),
    ],
)
def test_a_torch_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    monkeypatch.setattr(doctor_torch, "SCRIPT", program)
    with pytest.raises(doctor_torch.NoAnswer) as caught:
        doctor_torch.ask_torch(timeout=2 if "sleep" in program else 60)
    assert said in str(caught.value)


def test_what_fails_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def findings(found: Inventory) -> Iterator[Finding]:
        yield Finding("ok", "python", "3.11")
        yield Finding("FAIL", "torch", "not there", "install it")

    monkeypatch.setattr(doctor, "_findings", findings)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    python       3.11",
        "FAIL  torch        not there; install it",
        "",
        "gputrain doctor: something would fail here: torch; see what to do above",
    ]


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "eight")
    assert main(["doctor"]) == 2
    assert capsys.readouterr() == (
        "",
        "gputrain doctor: GPUTRAIN_FAKE_GPUS='eight' is not legal: give a number of GPUs from 0 to 1024, "
        'alone or with their memory, such as "8" or "8x80GB"\n',
    )
