"""What is measured at each step of a stability run, on real models and the default step."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_gputrain.checks.stable_clock import Clock, Moment
from pytest_gputrain.checks.stable_end import not_finite_buffers, not_finite_state
from pytest_gputrain.checks.stable_memory import Census
from pytest_gputrain.checks.stable_watch import ALL_EVERY, Watch
from pytest_gputrain.checks.stable_weights import Sample, weights
from tests.planted.plant import Net, case, draw, loss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Program:
    """The default step under the watch; ``spoil``: what is done to the model after a step, by its number."""

    def __init__(self, model: Any = None) -> None:
        self.case = case("watched")
        self.model = model or Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def run(self, steps: int, spoil: Any = None) -> list[dict[str, Any]]:
        trained = list(self.model.parameters())
        watch = Watch(self.case, self.model, self.model, self.optimizer, trained, CPU, steps)
        found = []
        with watch:
            for step in range(1, steps + 1):
                watch.load()
                batch = draw(4, CPU)
                watch.begin()
                value = float(self.case.step(self.model, self.optimizer, [batch]).detach())
                if spoil:
                    spoil(step, self.model)
                found.append(watch.end(step, 1.0, value))
                watch.voted()
        assert watch.rate == 1e-3
        return found


def test_a_step_is_measured() -> None:
    records = Program().run(2 * ALL_EVERY)
    first = records[0]
    assert first["finite"] == {"gradients": True, "parameters": True}
    assert sum(one["cpu_seconds"] for one in records) > 0  # the kernel counts in ticks
    assert 0 < first["ready_seconds"] < 60
    assert 0 < first["update_seconds"] < 60
    assert min(first["rss_bytes"], first["fds"], first["threads"]) > 0
    assert len({one["digest"] for one in records}) == len(records)
    normed = [step for step, one in enumerate(records, 1) if one["grad_norm"] is not None]
    assert normed == [ALL_EVERY, 2 * ALL_EVERY]
    counted = [step for step, one in enumerate(records, 1) if "tensor_count" in one]
    assert counted == [20, 100]


def test_digests_are_the_same_for_the_same_weights_alone() -> None:
    def moved(step: int, model: Any) -> None:
        if step == 3:
            with torch.no_grad():
                next(iter(model.parameters())).add_(1e-6)

    digests = []
    for spoil in (None, None, moved):
        torch.manual_seed(1)
        digests.append([one["digest"] for one in Program().run(4, spoil)])
    assert digests[0] == digests[1]
    assert digests[0][:2] == digests[2][:2]
    assert digests[0][2] != digests[2][2]


def test_one_bit_of_many_elements_is_seen_when_all_are_looked_at() -> None:
    values = torch.randn(100_001)
    before = weights([values])
    values[77_777] = torch.nextafter(values[77_777], torch.tensor(math.inf))
    assert weights([values])[0] != before[0]
    values[5] = math.nan
    assert not weights([values])[1]


def test_one_nan_among_many_elements_is_seen_in_a_few_steps() -> None:
    def spoil(step: int, model: Any) -> None:
        if step == 2:
            with torch.no_grad():
                model.head.weight[3, 5] = math.nan

    finite = [one["finite"]["parameters"] for one in Program().run(ALL_EVERY - 1, spoil)]
    assert finite[0]
    assert not all(finite[:9])


class Laid(nn.Module):
    """Weights in other orders and dtypes: channels last, transposed, bfloat16, complex, empty, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last))
        self.turned = nn.Parameter(torch.randn(16, 8).t())
        self.halves = nn.Parameter(torch.randn(300, dtype=torch.bfloat16))
        self.complex = nn.Parameter(torch.randn(20, dtype=torch.complex64))
        self.twice = nn.Parameter(torch.randn(20, dtype=torch.complex128))
        self.every_second = nn.Parameter(torch.randn(64)[::2])
        self.empty = nn.Parameter(torch.randn(0))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out * self.scalar


def test_weights_in_any_order_are_read_and_not_replaced() -> None:
    model = Laid()
    pointers = [one.data_ptr() for one in model.parameters()]
    records = Program(model).run(ALL_EVERY)
    assert all(one["finite"]["parameters"] for one in records)
    assert [one.data_ptr() for one in model.parameters()] == pointers


def test_weights_that_lie_apart_in_memory_are_read_as_they_are_now() -> None:
    rows = torch.ones(8, 64)[:, :32]  # no view of it has one dimension
    sample = Sample()
    before = [sample.take([rows], step)[0] for step in range(8)]
    rows.add_(1)
    assert all(sample.take([rows], step)[0] != before[step] for step in range(8))
    rows.fill_(math.nan)
    assert not sample.take([rows], 0)[1]


def test_weights_whose_memory_is_replaced_are_read_anew() -> None:
    def replace(step: int, model: Any) -> None:
        model.head.weight.data = torch.full_like(model.head.weight, math.nan if step == 2 else 1.0)

    finite = [one["finite"]["parameters"] for one in Program().run(2, replace)]
    assert finite == [True, False]


def test_hooks_are_gone_afterwards() -> None:
    program = Program()
    program.run(2)
    assert not any(one._post_accumulate_grad_hooks for one in program.model.parameters())


class Keeps:
    """Keeps something of each step, in the way that is asked for."""

    def __init__(self, way: str) -> None:
        self.way, self.kept, self.total = way, [], 0.0  # type: str, list[Any], Any

    def __call__(self) -> None:
        x = torch.ones(4, requires_grad=True)
        if self.way == "tensors":
            self.kept.append(torch.zeros(1024))
        elif self.way == "graph":
            self.total = self.total + (x * 2).sum()
        elif self.way == "cycles":
            ring: list[Any] = [torch.zeros(10**6)]
            ring.append(ring)


@pytest.mark.parametrize(
    ("way", "holder"),
    [
        ("tensors", "`case`.kept[…] in the case"),
        ("graph", "`case`.total in the case"),
        ("cycles", ""),
        ("", ""),
    ],
)
def test_what_was_added_and_who_holds_it(way: str, holder: str) -> None:
    gc.collect()  # what other tests have left to it is not this one's
    census = Census({"case": (keeps := Keeps(way))}, CPU, 100)
    in_use = 10**12 if way == "cycles" else 0
    hidden = [keeps]
    del keeps
    for step in range(1, 61):
        hidden[0]()
        census.look(step, in_use)
    held = census.held()
    assert held is not None
    assert held.steps == 40
    assert held.holder.replace("`hidden`[…]", "`case`").split(" in ")[0] == holder.split(" in ")[0]
    assert (held.tensors >= 40) is (way in ("tensors", "graph"))
    assert (held.graph_nodes >= 40) is (way == "graph")
    assert (held.freed_bytes > 0) is (way == "cycles")


def test_loss_that_is_not_finite_makes_everything_be_looked_at() -> None:
    program = Program()
    watch = Watch(
        program.case,
        program.model,
        program.model,
        program.optimizer,
        list(program.model.parameters()),
        CPU,
        9,
    )
    with watch:
        watch.begin()
        batch = draw(4, CPU)
        (loss(program.model, batch) * math.nan).backward()
        program.optimizer.step()
        fields = watch.end(1, 1.0, math.nan)
    assert fields["finite"] == {"gradients": False, "parameters": False}
    assert math.isnan(fields["grad_norm"])


def test_what_others_had_before_the_update_is_not_taken_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between the last gradient and the optimizer's step on a busy machine."""
    others, now = [0.0], Clock.now

    def later(clock: Clock) -> Moment:
        moment = now(clock)
        return moment._replace(queued=moment.queued + others[0])

    def step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        value = loss(model, micro_batches[0])
        value.backward()
        others[0] += 100.0
        optimizer.step()
        return value.detach()

    monkeypatch.setattr(Clock, "now", later)
    program = Program()
    program.case = case("watched", step=step)
    assert all(one["update_seconds"] > 0 for one in program.run(3))


def test_statistics_are_ill_when_infinite_and_masks_are_not() -> None:
    norm, mask = nn.BatchNorm1d(4), torch.full((2, 2), -math.inf).triu(1)
    other = nn.Linear(2, 2)
    other.register_buffer("mask", mask)
    model = nn.ModuleDict({"norm": norm, "other": other})
    assert not_finite_buffers(model) == set()
    assert norm.running_var is not None
    norm.running_var[2] = math.inf
    assert not_finite_buffers(model) == {"norm.running_var"}
    mask[0, 0] = math.nan
    assert not_finite_buffers(model) == {"norm.running_var", "other.mask"}


def test_what_an_optimizer_keeps_is_ill_when_infinite() -> None:
    net = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    named = dict(net.named_parameters())
    assert not_finite_state(optimizer, named) == []
    optimizer.state[net.weight]["exp_avg_sq"][0, 1] = math.inf
    optimizer.state[net.bias]["best"] = torch.tensor(math.inf)  # a number of its own, which may be anything
    assert not_finite_state([optimizer], named) == ["exp_avg_sq of weight"]
    optimizer.state[net.bias]["best"] = torch.tensor(math.nan)
    assert not_finite_state(optimizer, named)[1:] == ["best of bias"]


def test_hooks_and_groups_that_a_program_adds_are_counted() -> None:
    def add(step: int, model: Any) -> None:
        model.head.register_forward_hook(lambda *_: None)
        model.head.weight.register_hook(lambda gradient: None)
        program.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    program = Program()
    records = program.run(32, add)
    early, late = records[7], records[-1]  # the first steps have hooks of the watch's own
    assert late["hooks"] - early["hooks"] == 2 * (late["groups"] - early["groups"]) == 48
