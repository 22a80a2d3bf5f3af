"""A plan and a checkpoint for the tiny branch script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_gputrain.sweep import plan_branches, write_configs

SCRIPT = Path(__file__).parents[1] / "planted" / "scripts" / "branch.py"
CHECKPOINT_RATE = 1e-3


@pytest.fixture(scope="session")
def checkpoint_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of four weights whose optimizer has stepped at CHECKPOINT_RATE."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CHECKPOINT_RATE)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # leaves initial_lr behind
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("base") / "ckpt.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path.read_bytes()


@pytest.fixture
def checkpoint(tmp_path: Path, checkpoint_bytes: bytes) -> Path:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(checkpoint_bytes)
    return path


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Path]:
    """Writes a plan: 31 sequences of 8 tokens, base batch 2 at 3e-3, at most 4 on a device."""

    def plan(*ks: int, **changes: Any) -> Path:
        given = {"base_batch": 2, "base_lr": 3e-3, "block_size": 8, "tokens": 250, "max_device_batch": 4}
        write_configs(plan_branches(k_values=ks, **{**given, **changes}), tmp_path / "configs")
        return tmp_path / "configs"

    return plan
