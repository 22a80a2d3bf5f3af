"""Tracing in ranks: unmodified scripts of different shape, DDP's buckets, FSDP2, and switches that rewire."""

from __future__ import annotations

import contextlib
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytest_gputrain.launch import LaunchDefaults, Launcher, LaunchResult, Verdict
from pytest_gputrain.reference.sparse_attention import case as sparse_case
from pytest_gputrain.trace.digest import tensor_digest

NET = """
import hashlib, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.gate = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
    def forward(self, x):
        return x + self.attn(x)

def build():
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(2)), "head": nn.Linear(8, 4)})

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 4)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def digest(model):
    state = hashlib.sha256()
    for parameter in model.parameters():
        state.update(b"none" if parameter.grad is None else parameter.grad.numpy().tobytes())
        state.update(parameter.detach().numpy().tobytes())
    return state.hexdigest()
"""
NET = NET.replace(NET[NET.index("def build") : NET.index("class Net")], "")
LOOP = """
torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
for step in range(3):
    for micro in range(2):
        model(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    if step < 2:
        optimizer.zero_grad()
print("digest", digest(model))
"""
PLAIN = f"""{NET}
def train():
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters())
{textwrap.indent(LOOP, "    ")}

train()
dist.destroy_process_group()
"""
WITH_ARGUMENTS = f"""{NET}
import argparse

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, required=True)
    options = parser.parse_args()
    os.environ["MY_RANK"] = os.environ["RANK"]  # its own launcher's environment
    dist.init_process_group("gloo", rank=int(os.environ["MY_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    model = Net()
    wrapped = DistributedDataParallel(model, None, None, 0, True, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    model = wrapped
{textwrap.indent(LOOP, "    ")}

if __name__ == "__main__":
    main()
    dist.destroy_process_group()
"""
STEP = ["  - MISSING: blocks.0.gate.weight", "  - MISSING: blocks.1.gate.weight"]
# 2 x (8 x 8 + 8) + 8 x 4 + 4 with a gradient, 2 x 8 x 8 without: one bucket, as find_unused never cuts again.
BUCKETS = {rank: [f"[DDP] rank={rank} bucket_elems=308 dtype=torch.float32"] * 2 for rank in range(2)}


def expected(rank: int) -> list[str]:
    lines = []
    for step in (1, 2, 3):
        lines += [*BUCKETS[rank], f"[GRAD-TRACE] after_backward_step{step} arrived=6 missing=2", *STEP]
    return lines


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def run(folder: Path, script: str, *argv: object, **options: Any) -> LaunchResult:
    options = {"timeout": 120, **options}
    launcher = Launcher(defaults=LaunchDefaults(artifacts=folder))
    return launcher.torchrun(script, *argv, check=False, **options)


def digests(result: LaunchResult) -> list[str]:
    return [line for rank in result.ranks for line in rank.stdout.splitlines() if line.startswith("digest")]


@pytest.mark.parametrize("shape", ["plain", "arguments", "module"])
def test_scripts_that_know_nothing_of_it(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "package/__init__.py", "")
    program = WITH_ARGUMENTS if shape == "arguments" else PLAIN
    script = write(tmp_path, "package/train.py", program)
    monkeypatch.chdir(tmp_path)
    target = "package.train" if shape == "module" else script
    argv = ["--lr", 0.1] if shape == "arguments" else []
    options = {"module": shape == "module"}
    switches = ("GRADS", "DDP_BUCKETS")
    on = {f"GPUTRAIN_TRACE_{name}": "1" for name in switches}
    printed = run(tmp_path / "on", target, *argv, env=on, **options)
    quiet = run(tmp_path / "off", target, *argv, trace=False, **options)
    assert printed.passed, printed.summary()
    assert quiet.passed, quiet.summary()
    assert digests(printed) == digests(quiet)
    assert len(digests(quiet)) == 2
    for rank in printed.ranks:
        said = [line for line in rank.stdout.splitlines() if not line.startswith("digest")]
        folder = printed.artifacts / f"rank{rank.rank}"
        assert said == (folder / "traces.log").read_text().splitlines() == expected(rank.rank)
        beats = [
            json.loads(line)
            for line in (folder / f"heartbeat_rank{rank.rank}.jsonl").read_text().splitlines()
        ]
        assert [(beat["step"], beat["msg"]) for beat in beats][:2] == [(0, "start"), (1, "step")]
        assert (beats[-1]["step"], beats[-1]["rank"]) == (3, rank.rank)
    for rank in quiet.ranks:
        assert [rank.stdout.rstrip()] == digests(quiet)[:1]
        left = {path.name for path in (quiet.artifacts / f"rank{rank.rank}").iterdir()}
        assert not left & {"traces.log", f"heartbeat_rank{rank.rank}.jsonl", "watchdog_pending.txt"}


def test_scripts_are_traced_into_files_by_default(tmp_path: Path) -> None:
    result = run(tmp_path / "out", write(tmp_path, "train.py", PLAIN))
    for rank in result.ranks:
        assert [line.split()[0] for line in rank.stdout.splitlines()] == ["digest"]
        folder = result.artifacts / f"rank{rank.rank}"
        assert (folder / "traces.log").read_text().splitlines() == expected(rank.rank)
        assert not list(folder.glob("watchdog*"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def train_ddp(hook: str | None = None) -> tuple[list[str], list[list[int]]]:
    """Four steps, the first within no_sync(): digests of the gradients, and the reducer's own buckets."""
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
    calls = []
    if hook == "own":

        def own(state, bucket):  # type: ignore[no-untyped-def]  # torch takes no annotation but its own
            calls.append(bucket.index())
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

        model.register_comm_hook(None, own)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    found, sizes = [], []
    for step in range(4):
        with model.no_sync() if step == 0 else contextlib.nullcontext():
            model(torch.randn(4, 16)).sum().backward()
        buckets = model.reducer._get_zeros_like_grad_buckets() if step else []
        sizes.append([bucket.buffer().numel() for bucket in buckets])
        found += [tensor_digest(parameter.grad) for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    assert bool(calls) == (hook == "own")
    return found, sizes


# Three ranks, since only then dividing by their number and multiplying by its inverse can differ.
@pytest.mark.parametrize(("hook", "world_size"), [(None, 3), ("own", 2)])
def test_buckets_are_ddps_own_and_change_no_bit(hook: str | None, world_size: int, tmp_path: Path) -> None:
    launcher = Launcher(defaults=LaunchDefaults(artifacts=tmp_path))
    options: Any = {"world_size": world_size, "timeout": 120}
    traced = launcher(train_ddp, hook, trace=True, **options)
    assert traced.values == launcher(train_ddp, hook, **options).values
    lines = (traced.artifacts / "rank1" / "traces.log").read_text().splitlines()
    sizes = traced.values[1][1]
    assert sizes == [[], [816], [272, 272, 272], [272, 272, 272]]  # cut again when DDP knows the order
    wanted = []
    for step, elements in enumerate(sizes, start=1):
        wanted += [f"[DDP] rank=1 bucket_elems={number} dtype=torch.float32" for number in elements]
        wanted.append(f"[GRAD-TRACE] after_backward_step{step} arrived=6 missing=0")
    assert lines == wanted


def train_fsdp() -> list[str]:
    from torch.distributed.fsdp import fully_shard

    model = Net()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    return [tensor_digest(parameter.grad) for parameter in model.parameters()]


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="this torch has no FSDP2")
def test_fsdp2_is_traced_and_not_changed(tmp_path: Path) -> None:
    launcher = Launcher(defaults=LaunchDefaults(artifacts=tmp_path))
    traced = launcher(train_fsdp, trace=True, timeout=120)
    assert traced.values == launcher(train_fsdp, timeout=120).values
    assert (traced.artifacts / "rank0" / "traces.log").read_text().splitlines() == [
        "[GRAD-TRACE] after_backward_step1 arrived=6 missing=0",
        "[GRAD-TRACE] after_backward_step2 arrived=6 missing=0",
    ]


def options_of_ddp() -> tuple[bool, bool]:
    with_positions = DistributedDataParallel(Net(), None, None, 0, True, False)
    torch.optim.SGD(with_positions.parameters(), lr=0.1)
    return with_positions.static_graph, with_positions.find_unused_parameters


@pytest.mark.parametrize(
    ("env", "options"),
    [
        ({}, (False, False)),
        ({"GPUTRAIN_DDP_STATIC_GRAPH": "1"}, (True, False)),
        ({"GPUTRAIN_DDP_FIND_UNUSED": "on"}, (False, True)),
    ],
)
def test_options_of_every_ddp_constructor(env: dict[str, str | None], options: tuple[bool, bool]) -> None:
    assert Launcher()(options_of_ddp, env=env, timeout=120).values == [options, options]


def train_reference() -> list[str]:
    """Trains a step; which layers ran, those that are computed again in backward twice."""
    runs: list[str] = []

    class Layer(nn.Linear):
        name = ""

        def forward(self, x: Tensor) -> Tensor:
            runs.append(self.name)
            return super().forward(x)

    model = Net()
    for index in range(3):
        model.layers[index] = layer = Layer(16, 16)
        layer.name = f"layer {index}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    return runs


def train_branches() -> list[str]:
    model = sparse_case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse_case.loss(model, sparse_case.batch(2, "cpu")).backward()
    optimizer.step()
    names = [name for name, p in model.named_parameters() if p.grad is not None and "key_value" in name]
    return sorted({name.split(".")[4] for name in names})


def test_a_range_of_layers_is_checkpointed(tmp_path: Path) -> None:
    launcher = Launcher(defaults=LaunchDefaults(artifacts=tmp_path))
    result = launcher(train_reference, world_size=1, env={"GPUTRAIN_GC_RANGE": "1:"}, timeout=120)
    assert result.ranks[0].stdout == "[GC-RANGE] 1:3 of 3 layers (layers) are checkpointed\n"
    assert result.values == [["layer 0", "layer 1", "layer 2", "layer 2", "layer 1"]]


def test_one_branch_alone() -> None:
    launcher = Launcher()
    forced = launcher(train_branches, world_size=1, env={"GPUTRAIN_FORCE_BRANCH": "sliding"}, timeout=120)
    assert forced.values == [["sliding"]]
    assert forced.ranks[0].stdout == ("[BRANCH] sliding alone in blocks.0.attention, blocks.1.attention\n")
    free = launcher(train_branches, world_size=1, timeout=120)
    assert free.values == [["compressed", "selected", "sliding"]]


WRONG = [
    (train_reference, {"GPUTRAIN_GC_RANGE": "2:9"},
     "SwitchError: GPUTRAIN_GC_RANGE='2:9': Net has 3 layers (layers), so the range must lie within 0:3"),
    (train_reference, {"GPUTRAIN_FORCE_BRANCH": "left"},
     "SwitchError: GPUTRAIN_FORCE_BRANCH is set, but no model that was trained has a method "
     "force_branch(name); unset it"),
    (train_branches, {"GPUTRAIN_FORCE_BRANCH": "left"},
     "SwitchError: GPUTRAIN_FORCE_BRANCH='left': blocks.0.attention has the branches "
     "compressed, selected, sliding"),
    (train_reference, {"GPUTRAIN_DDP_STATIC_GRAPH": "1"},
     "SwitchError: GPUTRAIN_DDP_STATIC_GRAPH is set, but no DistributedDataParallel was made; unset it"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "env", "message"), WRONG, ids=["range", "none", "branch", "ddp"])
def test_a_switch_that_does_not_fit_the_model(target: Any, env: Any, message: str) -> None:
    result = Launcher()(target, world_size=1, env=env, timeout=120, check=False)
    assert result.verdict is Verdict.FAILED
    assert message in str(result.cause).replace("pytest_gputrain.trace.switches.", "")


def test_a_script_sees_no_frame_of_the_tracer_in_its_traceback(tmp_path: Path) -> None:
    script = write(tmp_path, "bad.py", "import torch\ntorch.ones(2, requires_grad=True).backward()\n")
    result = run(tmp_path / "out", script, nproc=1)
    assert result.verdict is Verdict.FAILED
    assert "grad can be implicitly created only for scalar outputs" in result.ranks[0].stderr
    assert "pytest_gputrain" not in result.ranks[0].stderr


ODD = """
import inspect, os, sys, torch
from torch import nn

class Odd(nn.Module):
    __hash__ = None
    def parameters(self, recurse=True):
        raise NotImplementedError

class Unmade(nn.Module):
    def __init__(self):
        pass

kept = [Odd(), Unmade()]
assert "retain_graph" in inspect.signature(torch.autograd.backward).parameters
assert torch.optim.Optimizer.add_param_group.__qualname__ == "Optimizer.add_param_group"
net = nn.Linear(2, 2)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
net(torch.ones(1, 2)).sum().backward()
optimizer.step()
if (child := os.fork()) == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_script_that_forks_and_has_odd_modules_runs_as_without_it(tmp_path: Path) -> None:
    result = run(tmp_path, write(tmp_path, "odd.py", ODD), timeout=60, stall=20)
    assert result.verdict is Verdict.PASSED, result.summary()
