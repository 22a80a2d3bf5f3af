"""Tracing of loops that know nothing of it, in this process: lines by step, and all taken off again."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_gputrain.trace import models
from pytest_gputrain.trace.install import install
from pytest_gputrain.trace.session import Session
from pytest_gputrain.trace.switches import Switches

Loop = Callable[[], object]


class Net(nn.Module):
    """``unused`` never gets a gradient, ``zero`` gets one that is exactly zero, ``frozen`` asks for none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.unused = nn.Linear(3, 3, bias=False)
        self.zero = nn.Linear(3, 3, bias=False)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(self.body(x)) + 0 * self.zero(x)
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def loss(model: Any) -> Tensor:
    out: Tensor = model(torch.ones(2, 3)).square().mean()
    return out


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Runs a loop under tracing and returns the lines of ``traces.log``."""
    sessions: list[Session] = []
    # A loop without an optimizer trains whatever models its process has; here other tests' are there as well.
    all_roots, others = models.roots, models.roots()
    monkeypatch.setattr(models, "roots", lambda: [one for one in all_roots() if is_none_of(one, others)])

    def run(loop: Loop, *tracers: str, **switches: Any) -> list[str]:
        record = Switches(tracers=tracers or ("grads",), **switches).as_record()
        sessions.append(install(record, tmp_path, 0, watchdog_seconds=100.0))
        try:
            loop()
        finally:
            sessions[-1].remove()
        log = tmp_path / "traces.log"
        return log.read_text().splitlines() if log.exists() else []

    yield run
    for session in sessions:
        session.remove()


def is_none_of(module: Any, others: list[Any]) -> bool:
    return not any(module is other for other in others)


def heads(lines: list[str]) -> list[str]:
    return [line.removeprefix("[GRAD-TRACE] ") for line in lines if line.startswith("[GRAD-TRACE]")]


def plain(steps: int = 2, micro: int = 1, **options: Any) -> Loop:
    def loop() -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        for _ in range(steps):
            for _ in range(micro):
                loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def test_the_lines_of_each_step(traced: Callable[..., list[str]]) -> None:
    assert traced(plain(steps=2)) == [
        "[GRAD-TRACE] after_backward_step1 arrived=5 missing=1",
        "  - MISSING: unused.weight",
        "[GRAD-TRACE] after_backward_step2 arrived=5 missing=1",
        "  - MISSING: unused.weight",
    ]


def test_micro_batches_make_one_step(traced: Callable[..., list[str]]) -> None:
    assert heads(traced(plain(steps=1, micro=3))) == ["after_backward_step1 arrived=5 missing=1"]


def two_optimizers() -> None:
    model = net()
    parameters = [*model.body.parameters(), model.zero.weight]
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in parameters]
    for _ in range(2):
        loss(model).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def two_models() -> None:
    generator, critic = nn.Linear(3, 3, bias=False), nn.Linear(3, 1)
    optimizers = {model: torch.optim.Adam(model.parameters()) for model in (generator, critic)}
    for model in (critic, generator):
        made = generator(torch.ones(2, 3))
        critic(made.detach() if model is critic else made).sum().backward()
        optimizers[model].step()


def no_optimizer() -> None:
    model = net()
    for _ in range(3):
        loss(model).backward()


def never_backward() -> None:
    torch.optim.SGD(net().parameters(), lr=0.1).step()


def detached() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (loss(model).detach() + torch.ones((), requires_grad=True)).backward()
    optimizer.step()


def closure() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def again() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    optimizer.step(again)


def steps_in_hooks() -> None:
    model = net()
    for parameter in [*model.body.parameters(), model.zero.weight]:
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    for _ in range(2):
        loss(model).backward()


def replaced() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.unused = nn.Linear(3, 3, bias=False)
    model.body[0].weight = nn.Parameter(torch.ones(3, 3))
    for _ in range(2):
        loss(model).backward()
        optimizer.step()


def thawed() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.frozen.requires_grad_(True)


def scaled() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        scaler.scale(loss(model)).backward()
        scaler.step(optimizer)
        scaler.update()


def compiled() -> None:
    model: Any = torch.compile(net(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model).backward()
    optimizer.step()


def inside_another() -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

    trainer = Trainer()
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    loss(trainer.model).backward()
    optimizer.step()


ONE = ["after_backward_step1 arrived=5 missing=1"]
TWO = [*ONE, "after_backward_step2 arrived=5 missing=1"]


@pytest.mark.parametrize(
    ("loop", "lines"),
    [
        (two_optimizers, TWO),
        (two_models, ["after_backward_step1 arrived=2 missing=0 model=Linear#2",
                      "after_backward_step2 arrived=1 missing=0 model=Linear"]),
        (no_optimizer, [*TWO, "after_backward_step3 arrived=5 missing=1"]),
        (never_backward, []),
        (detached, ["after_backward_step1 arrived=0 missing=6"]),
        (closure, ONE),
        (steps_in_hooks, TWO),
        (replaced, TWO),
        (thawed, [*ONE, "after_backward_step2 arrived=7 missing=1"]),
        (scaled, TWO),
        (compiled, ONE),
        (inside_another, ONE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_loops_of_other_kinds(loop: Loop, lines: list[str], traced: Callable[..., list[str]]) -> None:
    assert heads(traced(loop)) == lines


def test_gradients_and_weights_are_bitwise_the_same(traced: Callable[..., list[str]]) -> None:
    def train() -> list[Tensor | None]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            loss(model).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return [*model.parameters(), *(p.grad for p in model.parameters())]

    found: list[Tensor | None] = []
    everything = ("grads", "module_bwd", "ddp_buckets", "heartbeat", "watchdog")
    assert traced(lambda: found.extend(train()), *everything)
    for one, other in zip(train(), found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (other is not None and torch.equal(one, other))


def test_modules_in_the_order_of_backward(traced: Callable[..., list[str]]) -> None:
    assert traced(plain(steps=1), "module_bwd") == [
        "[MODULE-BWD] step=1 Net grad_out=ok",
        "[MODULE-BWD] step=1 zero grad_out=zero",
        "[MODULE-BWD] step=1 frozen grad_out=ok",
        "[MODULE-BWD] step=1 body.1 grad_out=ok",
        "[MODULE-BWD] step=1 body grad_out=ok",
        "[MODULE-BWD] step=1 body.0 grad_out=ok",
    ]


def test_modules_without_gradient_and_with_a_bad_one(traced: Callable[..., list[str]]) -> None:
    def loop() -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.unused(torch.ones(1, 3))
        (model.body[1](model.body[0](torch.ones(1, 3))) * float("nan")).sum().backward()
        optimizer.step()
        (model.body[0](torch.ones(1, 3)) * float("inf")).sum().backward()
        optimizer.step()

    assert traced(loop, "module_bwd") == [
        "[MODULE-BWD] step=1 body.1 grad_out=nan",
        "[MODULE-BWD] step=1 body.0 grad_out=nan",
        "[MODULE-BWD] step=1 unused grad_out=none",
        "[MODULE-BWD] step=2 body.0 grad_out=inf",
    ]


def test_output_only_where_a_switch_asked_for_it(
    traced: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = traced(plain(steps=1))
    assert capsys.readouterr().out == ""
    lines = traced(plain(steps=1), printed=("grads",))[len(lines) :]
    assert capsys.readouterr().out.splitlines() == lines != []


def globals_of_torch() -> list[Any]:
    from torch.amp.grad_scaler import GradScaler
    from torch.nn.modules import module
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import optimizer

    return [
        torch.autograd.backward, GradScaler.scale, DistributedDataParallel.__init__,
        torch.optim.Optimizer.add_param_group, nn.utils.clip_grad._get_total_norm,
        dict(module._global_forward_pre_hooks), dict(module._global_forward_hooks),
        dict(optimizer._global_optimizer_pre_hooks), dict(optimizer._global_optimizer_post_hooks),
    ]  # fmt: skip


def test_everything_is_taken_off_again(traced: Callable[..., list[str]], tmp_path: Path) -> None:
    import faulthandler
    import signal
    import threading

    before = [*globals_of_torch(), faulthandler.dump_traceback_later, signal.getsignal(signal.SIGUSR1)]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop() -> None:
        assert globals_of_torch() != before[:-2]
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        loss(model).backward()
        optimizer.step()
        assert any(p._post_accumulate_grad_hooks for p in model.parameters())

    traced(loop, "grads", "module_bwd", "ddp_buckets", "heartbeat", "watchdog")
    after = [*globals_of_torch(), faulthandler.dump_traceback_later, signal.getsignal(signal.SIGUSR1)]
    assert after == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not [thread for thread in threading.enumerate() if thread.name == "gputrain-watchdog"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeat_rank0.jsonl", "traces.log"]


def test_nothing_of_it_is_saved_copied_or_kept_alive(traced: Callable[..., list[str]]) -> None:
    def loop() -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss(model).backward()
        optimizer.step()
        saved = io.BytesIO()
        torch.save(model, saved)
        assert b"pytest_gputrain" not in saved.getvalue()
        assert not any(p._post_accumulate_grad_hooks for p in copy.deepcopy(model).parameters())
        gone = weakref.ref(model)
        del model, optimizer
        assert gone() is None

    traced(loop, "grads", "ddp_buckets", "heartbeat", "watchdog")
