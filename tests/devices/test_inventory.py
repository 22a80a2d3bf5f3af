"""What is found, by whom, and what is said when nothing is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_gputrain.devices import Gpu, Inventory, discover, probes

from .conftest import Card, FakeNvml, error

MISMATCH = "driver and NVML library are of different versions; reload the driver"

UseNvml = Callable[[FakeNvml], FakeNvml]


@pytest.fixture
def no_device_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "DEVICE_NODES", ())


def with_smi(folder: Path, script: str) -> dict[str, str]:
    """An environment in which ``nvidia-smi`` is that shell script."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def no_smi() -> dict[str, str]:
    return {"PATH": "/nowhere"}


@pytest.mark.parametrize(
    ("text", "num_gpus", "memory"),
    [("8", 8, 80 * 10**9), ("8x40GB", 8, 40 * 10**9), (" 2 x 1.5GiB ", 2, 3 * 2**29), ("0", 0, 0)],
)
def test_pretended_gpus(text: str, num_gpus: int, memory: int) -> None:
    found = discover({"GPUTRAIN_FAKE_GPUS": text})
    assert [gpu.index for gpu in found.gpus] == list(range(num_gpus))
    assert len({gpu.uuid for gpu in found.gpus}) == num_gpus
    assert all(gpu.memory_bytes == memory for gpu in found.gpus)
    assert found.source == "GPUTRAIN_FAKE_GPUS"


@pytest.mark.parametrize("text", ["eight", "-1", "1025", "8x", "8xlots", "8x0GB", "1.5"])
def test_bad_pretended_gpus_say_what_is_legal(text: str) -> None:
    with pytest.raises(ValueError, match="GPUTRAIN_FAKE_GPUS") as raised:
        discover({"GPUTRAIN_FAKE_GPUS": text})
    assert str(raised.value) == (
        f"GPUTRAIN_FAKE_GPUS={text!r} is not legal: give a number of GPUs from 0 to 1024, "
        'alone or with their memory, such as "8" or "8x80GB"'
    )


def test_an_empty_variable_pretends_nothing(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1")]))
    assert discover({"GPUTRAIN_FAKE_GPUS": ""}).source == "NVML"


def test_nvml(use_nvml: UseNvml) -> None:
    fake = use_nvml(FakeNvml([Card("GPU-1"), Card("GPU-2", memory=None)]))
    found = discover(no_smi())
    assert found == Inventory(
        (
            Gpu(0, "GPU-1", "NVIDIA H200", 143771 * 2**20, False, "NVML"),
            Gpu(1, "GPU-2", "NVIDIA H200", 0, False, "NVML"),
        ),
        "NVML",
        "",
        "580.95.05",
    )
    assert fake.calls == ["init", "shutdown"]


def test_nvml_lists_the_slices_of_a_gpu_cut_by_mig(use_nvml: UseNvml) -> None:
    slices = [
        Card("MIG-a", "NVIDIA H200 MIG 3g.71gb", 71 * 2**30),
        None,
        Card("MIG-b", "NVIDIA H200 MIG 1g.18gb", 18 * 2**30),
    ]
    use_nvml(FakeNvml([Card("GPU-1", slices=slices), Card("GPU-2")]))
    found = discover(no_smi())
    assert [(gpu.index, gpu.uuid, gpu.mig) for gpu in found.gpus] == [
        (0, "MIG-a", True),
        (0, "MIG-b", True),
        (1, "GPU-2", False),
    ]  # fmt: skip


def test_a_gpu_in_mig_mode_without_slices_is_no_gpu(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([Card("GPU-1", slices=[None, None])]))
    found = discover(no_smi())
    assert found.gpus == ()
    assert found.detail == "driver 580.95.05 is loaded but shows no GPU"


@pytest.mark.usefixtures("no_device_nodes")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NVMLError_LibraryNotFound", "no NVIDIA driver: the NVML library is not there"),
        ("NVMLError_DriverNotLoaded", "the NVIDIA driver is installed but not loaded"),
        ("NVMLError_LibRmVersionMismatch", MISMATCH),
        ("NVMLError_NoPermission", "no permission to talk to the NVIDIA driver"),
        ("NVMLError_Unknown", "in NVML's own words"),
    ],
)  # fmt: skip
def test_why_nvml_cannot_answer(use_nvml: UseNvml, name: str, reason: str) -> None:
    use_nvml(FakeNvml([], error(name, "in NVML's own words")))
    assert discover(no_smi()) == Inventory((), "NVML", reason)


def test_a_failure_within_nvml_still_shuts_it_down(use_nvml: UseNvml) -> None:
    fake = FakeNvml([Card("GPU-1")])

    def lost(_: Card) -> str:
        raise error("NVMLError_GpuIsLost", "GPU is lost")

    fake.nvmlDeviceGetUUID = lost  # type: ignore[method-assign, assignment]
    use_nvml(fake)
    notes: list[str] = []
    assert probes.by_nvml(notes) is None
    assert (notes, fake.calls) == (["GPU is lost"], ["init", "shutdown"])


@pytest.mark.usefixtures("no_device_nodes")
def test_no_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert discover(no_smi()) == Inventory((), "NVML", "nvidia-ml-py is not installed")


@pytest.fixture
def nvml_fails(use_nvml: UseNvml) -> None:
    use_nvml(FakeNvml([], error("NVMLError_Unknown", "no NVML")))


@pytest.mark.usefixtures("nvml_fails", "no_device_nodes")
class TestNvidiaSmi:
    def test_answers_when_nvml_cannot(self, tmp_path: Path) -> None:
        rows = "0, GPU-1, NVIDIA H200, 143771, 580.95.05\\n1, GPU-2, NVIDIA GB10, [N/A], 580.95.05\\n"
        found = discover(with_smi(tmp_path, f"printf '{rows}'"))
        assert found == Inventory(
            (
                Gpu(0, "GPU-1", "NVIDIA H200", 143771 * 2**20, False, "nvidia-smi"),
                Gpu(1, "GPU-2", "NVIDIA GB10", 0, False, "nvidia-smi"),
            ),
            "nvidia-smi",
            "",
            "580.95.05",
        )

    def test_lists_none(self, tmp_path: Path) -> None:
        assert discover(with_smi(tmp_path, "true")) == Inventory((), "nvidia-smi", "it lists no GPU")

    @pytest.mark.parametrize(
        ("script", "note"),
        [
            ("echo NVIDIA-SMI has failed; exit 9", "nvidia-smi exited with 9: NVIDIA-SMI has failed"),
            ("exit 3", "nvidia-smi exited with 3: nothing said"),
            ("echo zero, GPU-1", "nvidia-smi gave an answer that cannot be read: 'zero, GPU-1'"),
        ],
    )
    def test_why_it_cannot_answer(self, tmp_path: Path, script: str, note: str) -> None:
        assert discover(with_smi(tmp_path, script)) == Inventory((), "NVML", f"no NVML; {note}")

    def test_does_not_answer_for_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probes, "NVIDIA_SMI_TIMEOUT", 0.2)
        found = discover(with_smi(tmp_path, "exec sleep 60"))
        assert "nvidia-smi did not answer" in found.detail
        assert "timed out" in found.detail


@pytest.mark.usefixtures("nvml_fails")
class TestTorchInAChild:
    @pytest.fixture(autouse=True)
    def _a_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(probes, "DEVICE_NODES", (str(tmp_path / "nvidiactl"),))

    def test_answers_when_nothing_else_can(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probes, "TORCH_SCRIPT", 'print(\'[["1-2", "NVIDIA H200", 7]]\')')
        found = discover(no_smi())
        gpu = Gpu(0, "GPU-1-2", "NVIDIA H200", 7, False, "torch in a child process")
        assert found == Inventory((gpu,), "torch in a child process")

    def test_is_not_told_what_is_visible(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        script = "import os; assert 'CUDA_VISIBLE_DEVICES' not in os.environ; print('[]')"
        monkeypatch.setattr(probes, "TORCH_SCRIPT", script)
        assert discover(no_smi()).detail == "it sees no CUDA device"

    def test_crashes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probes, "TORCH_SCRIPT", "raise SystemExit(7)")
        found = discover(no_smi())
        assert found.source == "NVML"
        assert "torch in a child process did not answer" in found.detail

    def test_the_real_script_runs(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", probes.TORCH_SCRIPT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.startswith("["), done.stderr


def test_asks_once_for_the_same_environment(use_nvml: UseNvml) -> None:
    fake = use_nvml(FakeNvml([Card("GPU-1")]))
    assert discover(no_smi()) is discover(no_smi())
    assert fake.calls == ["init", "shutdown"]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
@pytest.mark.skipif("sys.platform != 'linux'", reason="the NVML library has another name there")
def test_really_nothing_here() -> None:
    """No pretending: this machine, without a GPU."""
    found = discover(os.environ)
    assert found == Inventory((), "NVML", "no NVIDIA driver: the NVML library is not there")
    assert "torch" not in found.detail
