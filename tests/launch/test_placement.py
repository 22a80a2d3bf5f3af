"""Where ranks run and how they talk, with and without ``share_gpu``; the label that such launches carry."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pytest_gputrain.devices import Gpu, Inventory, inventory
from pytest_gputrain.launch import LaunchDefaults, Launcher, LaunchUsageError, Verdict, request
from pytest_gputrain.launch.request import Placement, placement

LABEL = "2 ranks shared 1 GPU (NVIDIA H200) through gloo: not a multi-GPU result"


def machine_with(monkeypatch: pytest.MonkeyPatch, num_gpus: int) -> None:
    gpus = tuple(Gpu(i, f"GPU-{i}", "NVIDIA H200", 2**37, False, "NVML") for i in range(num_gpus))
    monkeypatch.setattr(inventory, "_discover", lambda fake, path: Inventory(gpus, "NVML"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("num_gpus", "visible", "ranks", "backend", "share", "expected"),
    [
        (2, None, 2, None, False, Placement("cuda", "nccl")),
        (2, None, 2, None, True, Placement("cuda", "nccl")),  # a GPU each: as without the option
        (2, None, 2, "nccl", True, Placement("cuda", "nccl")),
        (1, None, 1, None, True, Placement("cuda", "nccl")),
        (1, None, 2, None, True, Placement("cuda", "gloo", LABEL)),
        (1, None, 2, "gloo", True, Placement("cuda", "gloo", LABEL)),
        (8, "3", 2, None, True, Placement("cuda", "gloo", LABEL)),
    ],
)
def test_placement(
    monkeypatch: pytest.MonkeyPatch,
    num_gpus: int,
    visible: str | None,
    ranks: int,
    backend: str | None,
    share: bool,
    expected: Placement,
) -> None:
    machine_with(monkeypatch, num_gpus)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert placement("cuda", backend, ranks, environ, share_gpu=share) == expected


def test_no_gpu_is_needed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 0)
    assert placement("cpu", None, 2, {}, share_gpu=True) == Placement("cpu", "gloo")


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_nccl_cannot_share(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    machine_with(monkeypatch, 1)
    message = (
        f"backend={backend!r}: NCCL refuses two ranks on one GPU, and 2 ranks share 1 GPU here "
        "(--share-gpu); leave backend out or give 'gloo'"
    )
    with pytest.raises(LaunchUsageError, match=f"^{re.escape(message)}$"):
        Launcher(defaults=LaunchDefaults(share_gpu=True))(int, device="cuda", backend=backend)


@pytest.mark.parametrize(("num_gpus", "share"), [(0, True), (0, False), (1, False)])
def test_too_few(monkeypatch: pytest.MonkeyPatch, num_gpus: int, share: bool) -> None:
    machine_with(monkeypatch, num_gpus)
    with pytest.raises(LaunchUsageError, match=f"^2 ranks on device='cuda' need 2 GPUs, found {num_gpus} "):
        Launcher(defaults=LaunchDefaults(share_gpu=share))(int, device="cuda")


def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 2)
    launcher = Launcher(defaults=LaunchDefaults(gpus=("GPU-1",)))
    with pytest.raises(LaunchUsageError, match=r"found 1 \(NVIDIA H200, 1 hidden by CUDA_VISIBLE_DEVICES"):
        launcher(int, device="cuda")
    with pytest.raises(LaunchUsageError, match=r"need 2 GPUs, found 0 .*names GPU 1 twice"):
        Launcher()(int, device="cuda", env={"CUDA_VISIBLE_DEVICES": "1,1"})


def test_a_script_cannot_be_made_to_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine_with(monkeypatch, 1)
    (tmp_path / "train.py").write_text("")
    launcher = Launcher(defaults=LaunchDefaults(share_gpu=True, device="cuda"))
    with pytest.raises(LaunchUsageError, match=r"^2 ranks on device='cuda' need 2 GPUs, found 1 "):
        launcher.torchrun(tmp_path / "train.py")


def test_pretended_gpus_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUTRAIN_FAKE_GPUS", "1")
    message = (
        "GPUs found here are pretended (GPUTRAIN_FAKE_GPUS=1): tests select and skip by them, but nothing "
        "can run on them; use device='cpu'"
    )
    with pytest.raises(LaunchUsageError, match=f"^{re.escape(message)}$"):
        Launcher(defaults=LaunchDefaults(share_gpu=True))(int, device="cuda")


def test_the_label_is_in_every_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ranks, on the CPU: this machine may have no GPU that they could share."""
    monkeypatch.setattr(request, "placement", lambda *_, **__: Placement("cpu", "gloo", LABEL))

    def backend_of(fail: bool) -> str:
        import torch.distributed as dist

        assert not fail
        return str(dist.get_backend())

    passed = Launcher()(backend_of, False)
    assert (passed.values, passed.shared_gpu) == (["gloo", "gloo"], LABEL)
    assert re.fullmatch(rf"PASSED: ranks 0-1 in \d+\.\d s \({re.escape(LABEL)}\)", passed.summary())
    failed = Launcher()(backend_of, True, check=False)
    assert failed.verdict is Verdict.FAILED
    assert failed.summary().splitlines()[1] == f"  {LABEL}"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
