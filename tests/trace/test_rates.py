"""The learning rates that optimizers really step with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain.trace.rates import Rates, has_opened, read_rates


def test_first_highest_and_last_rate_of_every_group_of_every_optimizer(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.ones(2)
    groups: list[dict[str, Any]] = [{"params": weights[0]}, {"params": weights[1], "lr": 0.5}]
    one = torch.optim.SGD(groups, lr=0.1)
    other = torch.optim.AdamW([weights[2]], lr=torch.tensor(0.25))
    one.step()  # before anybody looks
    with Rates(tmp_path / "rank0").watching():
        for rate in (0.2, 0.3, 0.05):
            one.param_groups[0]["lr"] = rate
            one.step()
        other.step()
    one.step()
    assert read_rates(tmp_path / "rank0") == [
        {
            "type": "SGD",
            "steps": 3,
            "last_at": 3,
            "groups": [
                {"first": 0.2, "highest": 0.3, "last": 0.05},
                {"first": 0.5, "highest": 0.5, "last": 0.5},
            ],
        },
        {
            "type": "AdamW",
            "steps": 1,
            "last_at": 4,
            "groups": [{"first": 0.25, "highest": 0.25, "last": 0.25}],
        },
    ]


def test_no_file_and_no_step_are_nothing(tmp_path: Path) -> None:
    assert read_rates(tmp_path) == []
    with Rates(tmp_path).watching():
        pass
    assert read_rates(tmp_path) == []
    (tmp_path / "rates.json").write_text("{")
    assert read_rates(tmp_path) == []


def test_files_that_the_arguments_name_are_seen_to_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("read.pt", "unread.pt", "other.pt"):
        torch.save({}, tmp_path / name)
    monkeypatch.setattr(
        "sys.argv", ["train.py", f"--from={tmp_path / 'read.pt'}", str(tmp_path / "unread.pt")]
    )
    monkeypatch.chdir(tmp_path)
    with Rates(tmp_path).watching():
        torch.load("read.pt")
        torch.load("other.pt")
    torch.load("unread.pt")  # nobody looks any more
    assert has_opened(tmp_path, tmp_path / "read.pt") is True
    assert has_opened(tmp_path, tmp_path / "unread.pt") is False
    assert has_opened(tmp_path / "nowhere", tmp_path / "read.pt") is None
