"""A probe is a real step: what training needs is seen, and nothing of it is left behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_gputrain.batch.discovery import find_batch
from pytest_gputrain.case import TrainingCase
from tests.batch.models import Restless, case_of, mlp, rows, square

ONE_MIB = 2**20


def everything_of(model: Restless, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that could change, values copied, objects by identity."""
    attributes = (model.average.clone(), model.calls, len(model.seen), hasattr(model, "kept"))
    found: dict[str, Any] = {"model": attributes}
    for name, module in model.named_modules():
        found[f"module {name}"] = (module.training, [*vars(module)], [*module._forward_hooks])
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.clone()
        where = (tensor.data_ptr(), id(tensor), id(tensor.grad), tensor.requires_grad)
        found[f"tensor {name}"] = (tensor.detach().clone(), grad, where)
    found["optimizer"] = copy.deepcopy(optimizer.state_dict()), [id(key) for key in optimizer.state]
    found["generators"] = torch.get_rng_state(), random.getstate()
    found["flags"] = torch.backends.cudnn.benchmark, torch.is_grad_enabled(), torch.get_default_dtype()
    return found


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return [*left] == [*right] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def wide(batch_size: int, device: Any) -> Tensor:
    return rows(batch_size, device, 64)


def fails_above(size: int, error: BaseException) -> Callable[..., Tensor]:
    def loss(model: Any, batch: Tensor) -> Tensor:
        value = square(model, batch)
        if len(batch) > size:
            value.backward()  # in the middle of a step: gradients are there
            raise error
        return value

    return loss


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("error", [None, TypeError("a bug"), KeyboardInterrupt()], ids=repr)
def test_no_trace(used: bool, error: BaseException | None) -> None:
    """After sizes that fit, sizes that run out and an exception in the middle; before and after training."""
    model = Restless()
    optimizer = torch.optim.AdamW(model.parameters())
    if used:
        square(model, rows(4, "cpu")).backward()
        optimizer.step()
        model.last.weight.grad = None
    case = case_of(Restless, loss=square if error is None else fails_above(40, error))
    before = everything_of(model, optimizer)
    with contextlib.suppress(*([type(error)] if error else [])):
        find_batch(case, model=model, optimizer=optimizer, capacity=2 * ONE_MIB, max_batch_size=4096)
        assert error is None
    after = everything_of(model, optimizer)
    assert [name for name in before if not same(before[name], after[name])] == []


class Averaging:
    """A step that keeps an average of the weights from its first call on, and a gradient scaler."""

    def __init__(self) -> None:
        self.average: Any = None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
        self.calls = 0

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Any) -> None:
        self.calls += 1
        self.scaler.scale(square(model, micro_batches[0])).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        self.average = self.average or torch.optim.swa_utils.AveragedModel(model)
        self.average.update_parameters(model)


@pytest.mark.parametrize("kept", [False, True])
def test_no_trace_in_what_the_step_keeps(kept: bool) -> None:
    step, model = Averaging(), mlp(16)
    if kept:
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), [rows(2, "cpu")])
    average, calls, scale = step.average, step.calls, step.scaler.get_scale()
    before = copy.deepcopy(average.state_dict()) if kept else None

    for same_step in (step, step.__call__, functools.partial(step.__call__)):
        find_batch(case_of(mlp, step=same_step), model=model, capacity="1MB", max_batch_size=8)
        assert step.average is average
        assert step.scaler.get_scale() == scale
        assert before is None or same(before, average.state_dict())
        assert not step.scaler._per_optimizer_states
    assert step.calls > calls  # what it counts is its author's


class AveragesOfItsOwn:
    """Made by the first call, under a name that was not there: several, in a list."""

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Any) -> None:
        square(model, micro_batches[0]).backward()
        if not hasattr(self, "averages"):
            self.averages = [[p.detach().clone() for p in model.parameters()] for _ in range(8)]


def test_every_probe_counts_what_the_first_step_makes() -> None:
    step = AveragesOfItsOwn()
    case = case_of(mlp, step=step)
    found = find_batch(case, model=mlp(16), capacity="1MB", max_batch_size=8)
    assert not hasattr(step, "averages")
    alone = find_batch(case, model=mlp(16), capacity="1MB", min_batch_size=8, max_batch_size=8)
    assert dict(found.search.probes)[8] == dict(alone.search.probes)[8]


def test_no_trace_in_a_closure_of_the_step() -> None:
    average: Any = None

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Any) -> None:
        nonlocal average
        square(model, micro_batches[0]).backward()
        average = average or torch.optim.swa_utils.AveragedModel(model)

    find_batch(case_of(mlp, step=step), model=mlp(16), capacity="1MB", max_batch_size=2)
    assert average is None


def test_garbage_is_looked_for_in_what_the_probes_made() -> None:
    """And afterwards everywhere again, but where what there was is frozen already, as in this suite."""
    frozen = list[int]()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        frozen.append(gc.get_freeze_count())
        return square(model, batch)

    gc.unfreeze()
    try:
        find_batch(case_of(mlp, loss=loss), model=mlp(16), capacity="1MB", max_batch_size=2)
        assert gc.get_freeze_count() == 0 < min(frozen)
    finally:
        gc.freeze()
    find_batch(case_of(mlp, loss=loss), model=mlp(16), capacity="1MB", max_batch_size=2)
    assert gc.get_freeze_count() > 0


def peaks(case: TrainingCase, size: int = 4, **settings: Any) -> tuple[float, dict[str, int]]:
    found = find_batch(
        case, capacity="1GB", min_batch_size=size, max_batch_size=size, **{"eval_batch_factor": 0, **settings}
    )
    ((_, peak),) = found.search.probes
    assert peak is not None
    return peak, dict(found.by_category)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_optimizer_has_its_state() -> None:
    """AdamW keeps two values a parameter, which are there from the end of the first step on."""
    width = 256
    weights = 4 * (width * width + width)
    case = case_of(lambda: mlp(width, layers=1), batch=lambda size, device: rows(size, device, width))
    _, categories = peaks(case)
    assert categories["parameters"] == weights
    assert 2 * weights <= categories["optimizer state"] < 2 * weights + 100
    with_state, _ = peaks(case)
    without, _ = peaks(TrainingCase(**{**vars(case), "optimizer": sgd}))
    assert with_state - without >= 2 * weights


class LateState(torch.optim.SGD):
    """Takes 8 MiB in its second step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        state = self.state[self.param_groups[0]["params"][0]]
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] == 2:
            state["late"] = torch.zeros(8 * ONE_MIB, dtype=torch.uint8)


def late_state(model: nn.Module) -> torch.optim.Optimizer:
    return LateState(model.parameters(), lr=0.1)


def test_out_of_memory_only_in_the_second_step() -> None:
    case = case_of(mlp, batch=wide, optimizer=late_state)
    found = find_batch(case, capacity=4 * ONE_MIB)
    assert found.size == 0
    assert found.failure.startswith("in step 2: out of memory on cpu")


def test_accumulation_has_gradients_during_forward() -> None:
    width = 256
    case = case_of(lambda: mlp(width, layers=4), batch=lambda size, device: rows(size, device, width))
    alone, _ = peaks(case, 512, global_batch_size=512)
    one_of_two, _ = peaks(case, 512, global_batch_size=1024)
    assert one_of_two > alone


def test_data_parallel_has_buckets() -> None:
    """One more copy of the gradients, by a real DistributedDataParallel, and no process group afterwards."""
    width = 512
    case = case_of(lambda: mlp(width), batch=lambda size, device: rows(size, device, width))
    alone, categories = peaks(case)
    wrapped, _ = peaks(case, world_size=2)
    assert wrapped - alone >= 0.9 * categories["parameters"]
    assert not torch.distributed.is_initialized()
    found = find_batch(case, capacity="1GB", max_batch_size=1, world_size=2)
    assert "by a group of this rank alone" in found.data_parallel


class EvaluatesAtLength(nn.Linear):
    """Needs 16 times the memory a sample in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.training else torch.cat([out] * 16)


def test_evaluation_counts_at_its_own_batch() -> None:
    case = case_of(lambda: EvaluatesAtLength(256, 256), batch=lambda size, device: rows(size, device, 256))
    asked: dict[str, Any] = {"capacity": 16 * ONE_MIB, "max_batch_size": 4096, "safety_margin": 1}
    sizes = [find_batch(case, eval_batch_factor=factor, **asked).size for factor in (0, 1, 4)]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2] > 0


def test_longest_of_varying_batches() -> None:
    """The first batch drawn may be a short one; the probe takes the longest of many, and says so."""
    lengths = torch.Generator().manual_seed(0)

    def batch(size: int, device: Any) -> Tensor:
        length = int(torch.randint(10, 101, (), generator=lengths))
        return rows(size * length, device, 64)

    case = case_of(mlp, batch=batch)
    found = find_batch(case, capacity=16 * ONE_MIB, safety_margin=1)
    longest = case_of(mlp, batch=lambda size, device: rows(size * 100, device, 64))
    best = find_batch(longest, capacity=16 * ONE_MIB, safety_margin=1).size
    assert best <= found.size <= best * 1.15
    assert f"batches of size {found.size} vary from" in found.warnings[-1]
    assert found.warnings[-1].endswith("let the case's batch() give the longest")


class Leaking(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.__dict__.setdefault("past", []).append(x.detach().clone())
        return super().forward(x)


def skips_what_does_not_fit(model: Any, optimizer: Any, micro_batches: Any) -> Any:
    """As fairseq does: a batch that does not fit is left out, and training goes on."""
    loss = torch.zeros(())
    try:
        loss = square(model, micro_batches[0])
        loss.backward()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        optimizer.zero_grad()
    optimizer.step()
    return loss.detach()


def test_a_step_that_catches_its_out_of_memory_has_not_trained() -> None:
    case = TrainingCase(name="skips", model=mlp, batch=wide, loss=square)
    skipping = dataclasses.replace(case, step=skips_what_does_not_fit)
    right, found = (find_batch(one, capacity=ONE_MIB, max_batch_size=2048) for one in (case, skipping))
    assert 0 < found.size < 2048 and abs(found.size - right.size) <= right.size // 20
    nothing = find_batch(skipping, capacity=ONE_MIB, min_batch_size=4096, max_batch_size=8192)
    assert nothing.size == 0
    assert (nothing.failure or "").endswith(", which the case's code caught to go on without it")


def test_a_leak_a_step_is_told() -> None:
    case = case_of(lambda: Leaking(64, 64), batch=wide)
    found = find_batch(case, capacity=4 * ONE_MIB, max_batch_size=16, eval_batch_factor=0)
    assert found.size == 16
    said = "memory grows by 4.0 KiB a step at batch size 16: out of memory after about "
    assert found.warnings[-1].startswith(said)
    healthy = case_of(mlp, batch=wide)
    assert find_batch(healthy, capacity=4 * ONE_MIB, max_batch_size=16).warnings == ()


def test_not_memory_is_raised_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that cannot be launched at a large batch is no out-of-memory, nor is a bug."""
    error = RuntimeError("CUDA error: invalid configuration argument")
    with pytest.raises(RuntimeError, match="invalid configuration argument") as raised:
        find_batch(case_of(mlp, batch=wide, loss=fails_above(40, error)), capacity="1GB")
    assert raised.value is error
    said = caplog.messages[-1]
    kind = "a kernel's limit does (RuntimeError)"
    assert said.startswith(f"memory is not what fails at batch size 128: {kind}; 1 ran,")
    assert said.endswith("give max_batch_size=127 or less")
    assert said in getattr(error, "__notes__", [said])  # notes came with Python 3.11


def test_a_bug_of_the_model_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_batch(case_of(mlp), capacity="1GB")


@pytest.mark.slow
def test_compiled_and_checkpointed() -> None:
    """Each size is compiled for itself, and checkpointing takes less memory."""
    from pytest_gputrain.reference.gpt import gpt_case

    case = TrainingCase(**{**vars(gpt_case(2, sequence_length=64)), "compile": compile_eagerly})
    asked: dict[str, Any] = {"min_batch_size": 8, "max_batch_size": 8, "capacity": "1GB"}
    (_, plain), (_, checkpointed) = [
        find_batch(case, checkpointing=on, **asked).search.probes[0] for on in (False, True)
    ]
    assert plain is not None
    assert checkpointed is not None
    assert checkpointed < 0.8 * plain
    assert find_batch(case, compiled=True, **asked).size == 8


def compile_eagerly(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager", dynamic=False)
