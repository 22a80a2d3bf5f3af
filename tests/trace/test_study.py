"""What the phase plan asks of a rank by its environment, in real ranks of a script."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import Verdict

pytestmark = pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux")

# Two optimizers step in turn, as a generator's and a discriminator's do; the end would hang on gloo.
PROGRAM = """
import random, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("nccl")
models = [DDP(torch.nn.Linear(2, 2)) for _ in range(2)]
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
print("drew", torch.rand(1).item(), random.random())
try:
    for step in range(1000):
        for model, optimizer in zip(models, optimizers):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        print("step", step)
except BaseException as error:
    print("caught", error)
finally:
    print("finally")
"""


def write(folder: Path) -> str:
    path = folder / "two_optimizers.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return str(path)


def test_a_rank_leaves_after_its_steps_with_nothing_of_the_script_run_on_the_way(tmp_path: Path) -> None:
    study = {"GPUTRAIN_MAX_STEPS": "3", "GPUTRAIN_BACKEND": "gloo", "GPUTRAIN_SEED": "5"}
    drawn = []
    for _ in range(2):
        result = launch.torchrun(write(tmp_path), timeout=100, env={**study, "GPUTRAIN_STUDY": str(tmp_path)})
        assert result.verdict is Verdict.PASSED
        lines = [line.split() for line in result.ranks[1].stdout.splitlines()]
        drawn.append(lines.pop(1))
        assert [" ".join(line) for line in lines] == [
            "[gputrain] backend nccl replaced by gloo (GPUTRAIN_BACKEND)",
            "step 0",
            "step 1",
            "[gputrain] stopped after 3 steps (GPUTRAIN_MAX_STEPS)",
        ]
    assert drawn[0] == drawn[1]
    facts = json.loads((tmp_path / "facts_rank1.json").read_text())
    assert (facts["backend"], facts["asked"], facts["stopped_after"]) == ("gloo", "nccl", 3)
    assert len(facts["steps"]) == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GPUTRAIN_MAX_STEPS", "0", "GPUTRAIN_MAX_STEPS='0' is not legal; give a whole number from 1 up"),
        ("GPUTRAIN_BACKEND", "mpi", "GPUTRAIN_BACKEND='mpi' is not legal; give gloo or nccl"),
    ],
)
def test_a_nonsense_value_is_told_in_one_line(tmp_path: Path, name: str, value: str, message: str) -> None:
    result = launch.torchrun(write(tmp_path), nproc=1, timeout=100, env={name: value}, check=False)
    assert result.verdict is Verdict.FAILED
    assert str(result.cause).endswith(message)
    assert "drew" not in result.ranks[0].stdout
