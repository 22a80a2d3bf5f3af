"""``find_batch``, ``discover_batch_size``, ``choose_batch_size`` and ``batch_finder`` on one rank."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_gputrain import OutOfMemory, choose_batch_size, discover_batch_size, find_batch
from pytest_gputrain.batch import probe_target
from pytest_gputrain.batch.finder import BatchFinder
from pytest_gputrain.batch.users_own import raised_by_user
from pytest_gputrain.memory.guard import OomGuard
from pytest_gputrain.reference.gpt import gpt_case
from tests.batch.models import Language, Restless, case_of, mlp, rows

Lines = list[str]
LANGUAGE_FITS = 49  # of `Language` at length 32 within 0.85 * 2 MB


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    told: Lines = []
    caplog.set_level(logging.INFO, logger="pytest_gputrain.batch")

    def tell(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        return True

    caplog.handler.addFilter(tell)
    return told


def discover_of_case(case: Any) -> int:
    return discover_batch_size(None, 32, "cpu", case=case)


def trains(case: Any, size: int, limit: int) -> bool:
    """Three steps and an evaluation, written once more."""
    model = case.model()
    optimizer = case.optimizer(model)
    try:
        with OomGuard(limit, roots=[model]):
            for _ in range(3):
                case.step(model, optimizer, [case.batch(size, "cpu")])
            with torch.no_grad():
                case.loss(model.eval(), case.batch(size, "cpu"))
    except OutOfMemory:
        return False
    return True


def test_the_answer_is_the_exact_maximum() -> None:
    """Tried by a loop of its own around the answer: it is the last size that trains."""
    case = gpt_case(1, sequence_length=16)
    found = find_batch(case, capacity="6MB", max_batch_size=256)
    assert found.source == "discovered"
    around = range(found.size - 2, found.size + 4)
    assert [size for size in around if trains(case, size, found.limit)] == [*around][:3]
    assert found.law is not None
    assert found.law[1] > 0
    assert found.limit == 0.85 * found.capacity


def test_an_answer_prints_in_one_line() -> None:
    case = gpt_case(1, sequence_length=16)
    assert re.fullmatch(
        r"device batch size 2 \(discovered\): peak \S+ MiB of 5\.1 MiB",
        str(find_batch(case, capacity="6.3MB", max_batch_size=2, eval_batch_factor=0)),
    )
    nothing = find_batch(case, capacity="100KB")
    assert nothing.size == 0
    assert str(nothing).startswith(
        "nothing fits within 83.0 KiB: in step 1: out of memory on cpu: the model or optimizer given needs "
    )


@pytest.mark.parametrize("ask", [find_batch, BatchFinder(), discover_of_case])
def test_a_case_by_name_is_refused(ask: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^case is 'mine:gpt' \(str\); give a TrainingCase, such as pytest_gputrain\."
    ):
        ask("mine:gpt")


def test_an_optimizer_of_another_model_is_told() -> None:
    case = gpt_case(1, width=32, sequence_length=16)
    model, another = case.model(), case.model()
    doubts = [
        find_batch(
            case, model=model, optimizer=case.optimizer(owner), capacity="3MB", max_batch_size=1
        ).warnings
        for owner in (model, another)
    ]
    assert doubts[0] == ()
    assert doubts[1] == (
        "the optimizer given holds none of the model's parameters, so its state may be missing from the "
        "peaks; make it after the model, from model.parameters()",
    )


def test_answers_divide_the_global_batch() -> None:
    case = gpt_case(1, width=32, sequence_length=16)
    sizes = [
        find_batch(case, capacity="3MB", global_batch_size=120, world_size=world).size for world in (1, 4)
    ]
    assert all(size > 1 and 120 // world % size == 0 for size, world in zip(sizes, (1, 4), strict=True))


@pytest.mark.parametrize("returns", ["loss", "tuple", "mapping"])
def test_a_language_model_as_it_is_called(returns: str, lines: Lines) -> None:
    assert discover_batch_size(Language(returns=returns), 32, "cpu", capacity="2MB") == LANGUAGE_FITS
    assert lines == ["Running auto-discovery on rank 0", "Auto-discovery found device_batch_size=49"]


def test_cache_by_lines(lines: Lines, tmp_path: Path) -> None:
    """A hit trains nothing, another margin uses what was measured, another length is another key."""
    model = Language()
    asked: dict[str, Any] = {"capacity": "2MB", "use_cache": True, "cache_dir": tmp_path}
    first = discover_batch_size(model, 32, "cpu", **asked)
    del lines[:]
    assert discover_batch_size(model, 32, "cpu", **asked) == first
    assert lines == [f"Cache hit! Using cached batch size {first}"]
    assert discover_batch_size(model, 32, "cpu", 0.5, **asked) < first
    del lines[:]
    assert discover_batch_size(model, 16, "cpu", **asked) > first
    assert lines[0] == "Running auto-discovery on rank 0"


def wide(batch_size: int, device: Any) -> torch.Tensor:
    return rows(batch_size, device, 64)


def test_too_large_says_so_with_the_ways_out() -> None:
    with pytest.raises(OutOfMemory) as raised:
        discover_batch_size(Language(), 32, "cpu", capacity="100KB")
    first, second, third = str(raised.value).splitlines()
    assert first.startswith("Language does not fit at batch size 1; in step 1: out of memory on cpu: ")
    assert second.startswith("  limit 83.0 KiB of a capacity of 97.7 KiB; in use before that: ")
    assert "parameters 20.4 KiB" in second
    assert third.startswith("  what helps: ")
    assert raised.value.limit == 85_000
    nothing = find_batch(gpt_case(1, sequence_length=16), capacity="100KB").too_large("gpt").splitlines()
    assert "the model or optimizer given needs 322.0 KiB with 0 bytes in use" in nothing[0]
    assert nothing[1].endswith("; in use before that: nothing")


def test_a_margin_never_rounds_to_no_sample() -> None:
    """One sample fits into the margin, and not two; 0.85 of one would be none."""
    case = gpt_case(1, width=32, sequence_length=16)
    one, two = (
        dict(find_batch(case, capacity="1GB", min_batch_size=size, max_batch_size=size).search.probes)[size]
        for size in (1, 2)
    )
    assert one is not None
    assert two is not None
    assert find_batch(case, capacity=int((one + two) / 2 / 0.85)).size == 1


def test_batch_norm_cannot_train_on_one_sample() -> None:
    found = find_batch(case_of(Restless), capacity="2MB", max_batch_size=8)
    assert found.size == 8
    assert found.warnings[0].startswith("batch size 1 cannot be trained (BatchNorm needs more than one ")


def test_failed_discovery_falls_back_loudly(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(device: Any) -> tuple[int, int]:
        raise OSError("no meminfo")

    monkeypatch.setattr(probe_target, "memory_of", unreadable)
    assert discover_batch_size(Language(), 32, "cpu") == 1
    assert discover_batch_size(Language(), 32, "cpu", fallback=4) == 4
    assert lines[0].startswith("Auto-discovery failed (OSError: no meminfo")
    assert lines[0].endswith("falling back to device_batch_size=1")


def test_a_bug_of_the_model_is_no_reason_to_fall_back() -> None:
    class Broken(Language):
        def forward(self, x: Any, y: Any) -> Any:
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        discover_batch_size(Broken(), 32, "cpu", capacity="2MB")


def test_what_is_refused_about_a_users_result_is_not_raised_by_the_user() -> None:
    class Broken(Language):
        def forward(self, x: Any, y: Any) -> Any:
            raise ValueError("a bug")

    class Vector(Language):
        def forward(self, x: Any, y: Any) -> Any:
            return super().forward(x, y).expand(2)

    for model, is_users in ((Broken(), True), (Vector(), False)):
        with pytest.raises(ValueError, match=r"a bug|scalar") as caught:
            discover_batch_size(model, 32, "cpu", capacity="2MB")
        assert raised_by_user(caught.value) is is_users


def test_what_a_script_chooses(lines: Lines) -> None:
    model = Language()
    assert choose_batch_size(model, 32, "cpu", auto=True, device_batch_size=16).source == "manual"
    assert choose_batch_size(model, 32, "cpu", auto=False).size == 8
    later = choose_batch_size(
        model, 32, "cpu", auto=True, capacity="2MB", stage="sft", pretraining_batch_size=32
    )
    assert (later.size, later.source) == (LANGUAGE_FITS, "auto")
    assert discover_batch_size(model, 32, "cpu", override=16) == 16
    assert lines == [
        "Using manual device_batch_size=16",
        "Auto-discovery disabled, using default device_batch_size=8",
        "Running auto-discovery on rank 0",
        "Auto-discovery found device_batch_size=49",
        "stage sft: device_batch_size=49 exceeds the pretraining stage's 32; check the learning rate "
        "that was tuned for it, and that the stage's longest batch fits",
        "Using manual device_batch_size=16",
    ]


WAY_OUT = "give case=TrainingCase(...), which says how your loop makes a batch and a loss"
MARGIN = "legal is a fraction of the memory above 0 and up to 1, such as 0.85"
UNIT = 'legal is 64.0 KiB or more: give the unit, such as "80GB" or "79.1GiB"'
Bad = tuple[dict[str, Any], str]
BAD_INPUT: list[Bad] = [
    ({"safety_margin": 0}, f"safety_margin is 0; {MARGIN}"),
    ({"safety_margin": 1.01}, f"safety_margin is 1.01; {MARGIN}"),
    (
        {"min_batch_size": 9, "max_batch_size": 4},
        "min_batch_size 9 is above max_batch_size 4; legal is 1 <= min_batch_size <= max_batch_size",
    ),
    ({"max_seq_len": -4}, "max_seq_len is -4; legal is a whole number of 1 or more"),
    ({"capacity": "80"}, f"capacity='80' is 80 bytes; {UNIT}"),
    (
        {"capacity": "much"},
        'capacity: \'much\' is not a size above 0 such as "80GB", "79.1GiB" or a number of bytes',
    ),
    ({"override": 0}, "override is 0; legal is a whole number of 1 or more"),
    (
        {"override": 3, "global_batch_size": 64},
        "override 3 does not divide 64, the samples of a step on one rank (64 = 21 * 3 + 1)",
    ),
    (
        {"eval_batch_factor": -1},
        "eval_batch_factor is -1; legal is 0 (no evaluation) or a number above, such as 2",
    ),
    ({"device": "nowhere"}, "'nowhere' is not a device; give 'cpu', 'cuda' or 'cuda:0'"),
    (
        {"ddp_world_size": 2},
        "ddp_world_size=2, and no process group is initialised for these ranks to agree through; "
        "call torch.distributed.init_process_group() first, or give ddp_world_size=1",
    ),
    (
        {"ddp_world_size": 2, "global_batch_size": 7},
        "global_batch_size 7 is not divisible by world size 2 (7 = 3 * 2 + 1); the nearest that are: 6 and 8",
    ),
    ({"ddp_rank": 1}, "ddp_rank is 1 of ddp_world_size=1; legal is 0 to 0"),
    ({"fallback": 0}, "fallback is 0; legal is a whole number of 1 or more"),
    ({"strategy": "fast"}, "strategy is 'fast'; legal are 'model', 'exponential'"),
    ({"model": None}, "model is None, with no case; give a model called as model(x, y), or case="),
    (
        {"model": "gpt"},
        "model is 'gpt' (str); legal is a torch.nn.Module called as model(x, y), or case=",
    ),
    (
        {"model": Language(returns="detached")},
        "Language(x, y) returned a loss that requires no gradient, so nothing can be trained by it; "
        "legal is one that autograd computed: without .detach(), .item() or no_grad in forward",
    ),
    (
        {"model": Language(returns="count")},
        "Language(x, y) returned a int64 tensor of shape (); legal is the loss, a scalar tensor: "
        f"alone, in a tuple, or as .loss; for a model that is called otherwise, {WAY_OUT}",
    ),
    (
        {"model": Language(returns="logits")},
        "Language(x, y) returned a tensor of shape (1, 32, 64); legal is the loss, a scalar tensor: "
        f"alone, in a tuple, or as .loss; for a model that is called otherwise, {WAY_OUT}",
    ),
    (
        {"model": nn.Linear(2, 2)},
        "no vocabulary size found in Linear: neither it nor its config has vocab_size or n_vocab, "
        f"and it has no nn.Embedding; give vocab_size=, or {WAY_OUT}",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD_INPUT, ids=[str([*bad]) for bad, _ in BAD_INPUT])
def test_bad_input_is_one_line(bad: dict[str, Any], message: str) -> None:
    asked = {"model": Language(), "max_seq_len": 32, "device": "cpu", "capacity": "2MB", **bad}
    with pytest.raises(ValueError, match=r"^") as raised:
        discover_batch_size(**asked)
    assert str(raised.value) == message


class Labelled(Language):
    """As the models of the transformers library: its second argument is not the targets."""

    def forward(self, x: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        assert attention_mask is None
        loss = None if labels is None else super().forward(x, labels)
        return SimpleNamespace(loss=loss, of_routers=torch.zeros(()))


def test_targets_that_are_labels() -> None:
    assert discover_batch_size(Labelled(), 32, "cpu", capacity="2MB") == LANGUAGE_FITS


def test_a_loss_of_none_is_not_replaced_by_another_scalar() -> None:
    class Unasked(Language):
        def forward(self, x: Any, y: Any) -> Any:
            return SimpleNamespace(loss=None, of_routers=self.layer.weight.sum())

    with pytest.raises(ValueError, match=r"^Unasked\(x, y\) returned a SimpleNamespace without"):
        discover_batch_size(Unasked(), 32, "cpu", capacity="2MB")


def test_what_is_odd_is_said_in_sizes() -> None:
    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > 3:
            raise MemoryError
        output: torch.Tensor = model(batch)
        return output.square().mean()

    found = find_batch(case_of(mlp, batch=wide, loss=loss), capacity="2MB", max_batch_size=4)
    assert found.size == 3
    assert found.warnings[0].startswith("4 does not fit although 3 takes ")
    assert found.warnings[0].endswith("KiB of 1.6 MiB: more may fit")


def test_a_case_without_a_scalar_loss() -> None:
    case = case_of(mlp, batch=wide, loss=lambda model, batch: model(batch))
    with pytest.raises(ValueError, match=r"^") as raised:
        find_batch(case, capacity="2MB")
    said = "the case's loss(model, batch) returned a tensor of shape (1, 64); legal is a scalar tensor"
    assert str(raised.value) == said


def test_global_batch_for_ranks() -> None:
    with pytest.raises(ValueError, match=r"^") as raised:
        find_batch(gpt_case(), global_batch_size=100, world_size=3)
    assert str(raised.value) == (
        "global_batch_size 100 is not divisible by world size 3 (100 = 33 * 3 + 1); "
        "the nearest that are: 99 and 102"
    )


def test_batch_finder(batch_finder: BatchFinder) -> None:
    assert batch_finder(model=Language(), max_seq_len=32, capacity="2MB").size == LANGUAGE_FITS
    assert batch_finder(case_of(mlp, batch=wide), capacity="2MB", max_batch_size=4).size == 4
    with pytest.raises(ValueError, match=r"^batch_finder needs a case, or model= and max_seq_len="):
        batch_finder()


class FewPositions(nn.Module):
    """Has eight positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.positions(torch.arange(x.shape[1])).square().mean()
        return loss


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_more_tokens_than_the_model_has_positions_are_told() -> None:
    with pytest.raises(IndexError) as caught:
        discover_batch_size(FewPositions(), max_seq_len=16, device="cpu", capacity="1MB")
    assert getattr(caught.value, "__notes__", [])[0] == (
        "FewPositions(x, y) got 16 tokens a sample: does the model have as many positions? max_seq_len says "
        "how many it gets"
    )
