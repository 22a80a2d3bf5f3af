"""The monitor in ranks: DistributedDataParallel around compile, compile around it, FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from pytest_gputrain import compile_monitor, launch
from pytest_gputrain.compile.records import CompileReport

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="launching ranks needs Linux")


def train(wrap: Callable[[Any, Any], Any], blocks: int) -> CompileReport:
    """Two steps, an evaluation and a step, of 1 MiB linear layers: DDPOptimizer has a bucket for each."""
    import torch

    torch.set_num_threads(1)

    class Block(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block(512, 512) for _ in range(blocks))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    with compile_monitor() as monitor:
        model = wrap(torch, Model())
        for step in range(2):
            monitor.step(step, "train")
            model(torch.ones(2, 512)).sum().backward()
        with torch.no_grad():
            monitor.phase("eval")
            model(torch.ones(2, 512))
        monitor.step(2, "train")
        model(torch.ones(2, 512)).sum().backward()
    return monitor.report()


def data_parallel() -> list[CompileReport]:
    def ddp(torch: Any, model: Any) -> Any:
        return torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)

    def around_ddp(torch: Any, model: Any) -> Any:
        return torch.compile(ddp(torch, model), backend="eager")

    def inside_ddp(torch: Any, model: Any) -> Any:
        return ddp(torch, torch.compile(model, backend="eager"))

    return [train(around_ddp, 3), train(inside_ddp, 3)]


def fully_sharded() -> list[CompileReport]:
    def whole(torch: Any, model: Any) -> Any:
        return torch.compile(sharded(torch, model), backend="aot_eager")

    def regional(torch: Any, model: Any) -> Any:
        for block in model.blocks:
            block.compile(backend="aot_eager")
        return sharded(torch, model)

    def sharded(torch: Any, model: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in [*model.blocks, model]:
            fully_shard(block, mesh=mesh)
        return model

    return [train(whole, 2), train(regional, 2)]


def runs(report: CompileReport) -> dict[tuple[str, int | None], int]:
    return {(figures.phase, figures.step): figures.graph_runs for figures in report.steps}


def test_data_parallel() -> None:
    result = launch(data_parallel, world_size=2)
    for around, inside in result.values:
        for report in (around, inside):
            # DDPOptimizer's split is not a graph break: one graph of dynamo's, in three buckets.
            assert [(g.buckets, g.backend) for g in report.graphs] == [(3, "eager")] * 2
            assert set(runs(report).values()) == {1} and report.is_compiled()
        assert not inside.breaks and len(inside.recompiles) == 1
        # DDP's own forward breaks, which a user can do nothing about; of theirs nothing does.
        assert around.breaks and all(found.in_torch for found in around.breaks)
        theirs = [found.function for found in around.recompiles if not found.in_torch]
        assert theirs == ["DistributedDataParallel.forward", inside.recompiles[0].function]
        assert inside.recompiles[0].function.endswith("Model.forward")


def compiled_once() -> bool:
    import torch

    with compile_monitor() as monitor:
        model = torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), backend="aot_eager")
        model(torch.ones(1, 2)).sum().backward()
    return monitor.is_compiled()


def test_a_kept_rank_is_as_clean_as_before() -> None:
    """Compiling alone leaves a thread, and functions of ``torch.nn.Module`` that are others."""
    for _ in range(2):
        result = launch(compiled_once, world_size=1, isolation="warm")
        assert result.values == [True] and result.recycled is None


@pytest.mark.slow
def test_fully_sharded() -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")
    result = launch(fully_sharded, world_size=2)
    for whole, regional in result.values:
        assert whole.is_compiled() and regional.is_compiled()
        assert set(runs(regional).values()) == {2} and not regional.breaks
        assert len(regional.graphs) <= 3  # a graph serves all blocks
