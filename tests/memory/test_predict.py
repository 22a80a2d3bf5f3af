"""Predicted peaks against what torch's allocator really hands out, on models of several kinds."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks._allocator import measured_peak
from pytest_gputrain import TrainingCase, predict_maximum, predict_peak_memory
from pytest_gputrain.memory.categories import CATEGORIES
from pytest_gputrain.memory.fake_step import PredictionError

VOCAB = 500


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    """One layer in the manner of nanoGPT, with dropout everywhere."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.tokens = nn.Embedding(VOCAB, 64)
        self.qkv = nn.Linear(64, 192)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.tokens(tokens), self.dropout, self.training)
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=self.dropout)
        out: Tensor = self.head(x + mixed.transpose(1, 2).flatten(2))
        return out


def tokens(batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(VOCAB, (batch_size, 65)).to(device)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


nano = TrainingCase(name="nano", model=Attention, batch=tokens, loss=cross_entropy)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(), nn.Linear(16 * 15 * 15, 10),
    )  # fmt: skip


def images(batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(10, (batch_size,), device=device)


conv = TrainingCase(
    name="conv", model=conv_net, batch=images, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1])
)


def selecting(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Branches and shapes that hang on the batch's values."""
    logits, targets = model(batch[0]), batch[1]
    keep = targets % 3 == 0
    longest = int((targets > 9).sum(1).max().item())
    if keep.all():
        raise AssertionError("not with these targets")
    value: Tensor = F.cross_entropy(logits[keep], targets[keep]) + logits[:, :longest].mean()
    return value


def scaled(model: Any, optimizer: Any, micro_batches: list[Any], scaler: Any) -> Tensor:
    optimizer.zero_grad()
    for batch in micro_batches:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = cross_entropy(model, batch)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    scaler.step(optimizer)
    scaler.update()
    print(f"loss {loss.item():.3f}, norm {norm:.3f}")
    return loss.detach()


CASES = {
    "dropout": nano,
    "by the batch": replace(nano, loss=selecting),
    "fused": replace(nano, optimizer=lambda m: torch.optim.AdamW(m.parameters(), fused=True)),
    "convolution": conv,
    "scaled": replace(nano, step=partial(scaled, scaler=torch.amp.GradScaler("cpu"))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_allocator_hands_out_is_what_was_predicted(name: str) -> None:
    predicted = predict_peak_memory(CASES[name], 4, device="cpu")
    assert measured_peak(CASES[name], 4) == pytest.approx(predicted.peak_bytes, rel=0.01)
    assert sum(predicted.by_category.values()) == predicted.peak_bytes
    assert list(predicted.by_category) == list(CATEGORIES)
    assert predicted.law.holds


def test_what_the_batch_says_is_no_guess() -> None:
    assert not predict_peak_memory(replace(nano, loss=selecting), 4, device="cpu").notes


def meeting(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Gradients that autograd writes into memory that is there, and the sum of all of them."""
    logits, targets = model(batch[0]), batch[1].unsqueeze(-1)
    picked = logits.gather(-1, targets).mean() + logits.max(-1)[0].mean() + logits.topk(9)[0].mean()
    rows = logits.index_select(1, torch.arange(9)).square().mean() + logits[:, :9].exp().mean()
    out: Tensor = picked + rows + torch.take(logits, batch[1]).mean()
    return out


def test_gradients_that_meet_need_no_memory_of_their_own() -> None:
    case = replace(nano, loss=meeting)
    predicted = predict_peak_memory(case, 4, device="cpu")
    assert measured_peak(case, 4) == pytest.approx(predicted.peak_bytes, rel=0.002)


class Recomputing(nn.Module):
    """Blocks that may be recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)
        )
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return x


def test_checkpointing_is_predicted() -> None:
    deep = TrainingCase(
        name="deep",
        model=Recomputing,
        batch=lambda n, d: torch.randn(n, 128, 64),
        loss=lambda m, b: m(b).square().mean(),
        set_checkpointing=lambda m, layers: setattr(m, "recompute", True),
    )
    predicted = predict_peak_memory(deep, 8, device="cpu", checkpointing=True)
    assert measured_peak(deep, 8, checkpointing=True) == pytest.approx(predicted.peak_bytes, rel=0.01)
    assert predicted.peak_bytes < 0.7 * predict_peak_memory(deep, 8, device="cpu").peak_bytes


def activations(case: TrainingCase, **how: Any) -> int:
    return predict_peak_memory(case, 16, **how).by_category["activations"]


def test_autocast_of_cuda_is_that_of_cuda() -> None:
    def autocast(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return cross_entropy(model, batch)

    wide = replace(nano, model=lambda: Attention(0.0))
    mixed = replace(wide, loss=autocast)
    # Norms and the loss stay in float32, as on CUDA, so it is less than half that is saved.
    assert 0.5 < activations(mixed) / activations(wide) < 1.0
    assert activations(mixed, device="cpu") == activations(wide, device="cpu")


def test_dropout_keeps_a_byte_on_cuda() -> None:
    plain = replace(nano, model=lambda: Attention(0.0))
    # Attention's weights are not kept, and the mask after the embedding is 64 x 64 bytes a sample.
    assert activations(nano) - activations(plain) <= 2 * 16 * 64 * 64 * 5
    assert activations(nano, device="cpu") > activations(nano) + 16 * 4 * 64 * 64 * 4


def test_a_program_written_for_cuda_runs() -> None:
    def batch(batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(VOCAB, (batch_size, 65), device="cuda").pin_memory()
        return drawn[:, :-1].contiguous().cuda(), drawn[:, 1:].to("cuda:0", non_blocking=True).contiguous()

    on_cuda = replace(nano, model=lambda: Attention().to(torch.bfloat16).to("cuda"), batch=batch)
    assert predict_peak_memory(on_cuda, 4).by_category["parameters"] > 2 * 64 * 2 * VOCAB


def test_ranks_and_accumulation_need_the_gradients_longer() -> None:
    one = predict_peak_memory(nano, 4, device="cpu")
    gradients = sum(parameter.nbytes for parameter in Attention().parameters())
    assert predict_peak_memory(nano, 4, device="cpu", world_size=2).peak_bytes == one.peak_bytes + gradients
    more = predict_peak_memory(nano, 4, device="cpu", accumulation_steps=2)
    assert one.peak_bytes + gradients / 2 < more.peak_bytes < one.peak_bytes + 2 * gradients


def test_the_maximum_fits_and_the_next_does_not() -> None:
    plain = TrainingCase(
        name="plain",
        model=lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)),
        batch=lambda n, d: torch.randn(n, 64),
        loss=lambda m, b: m(b).square().mean(),
    )
    answer = predict_maximum(plain, "1MB", device="cpu")
    assert answer.prediction.peak_bytes <= 1e6 < (answer.beyond or 0)
    assert predict_peak_memory(plain, answer.size + 1, device="cpu").peak_bytes == answer.beyond
    assert predict_maximum(plain, "1MB", device="cpu", maximum=7).size == 7
    assert predict_maximum(plain, "100KB", device="cpu").size == 0


def test_the_law_holds_far_from_where_it_was_made() -> None:
    low, high = (predict_peak_memory(nano, size, device="cpu") for size in (4, 64))
    assert low.law(64) == pytest.approx(high.peak_bytes, rel=0.02)
    assert low.law(1) >= low.law.floor_bytes
    assert low.law.floor_bytes == pytest.approx(high.law.floor_bytes, rel=0.01)
    assert low.law.floor_bytes_per_sample == 2 * 64 * 8  # the optimizer's step keeps the batch


def test_a_large_model_needs_no_memory() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(36864, 36864) for _ in range(8)))

    large = TrainingCase(
        name="large", model=build, batch=lambda n, d: torch.randn(n, 36864), loss=lambda m, b: m(b).sum()
    )
    predicted = predict_peak_memory(large, 2, "80GB")
    assert predicted.by_category["parameters"] > 40e9
    assert predicted.fits is False and predicted.certain


def state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.get_default_device(), torch.amp.autocast_mode.autocast.__init__, torch.utils.swap_tensors,
        len(torch.overrides._get_current_function_mode_stack()),
        torch._C._dispatch_dump("aten::dropout"), torch._C._dispatch_dump("aten::layer_norm"),
    )  # fmt: skip


@pytest.mark.parametrize("case", [nano, replace(nano, loss=lambda m, b: 1 / 0)], ids=["runs", "raises"])
def test_leaves_no_trace(case: TrainingCase) -> None:
    before = state()
    with contextlib.suppress(PredictionError):
        predict_peak_memory(case, 4)
    assert state() == before
    assert type(nn.Linear(2, 2).weight.data) is Tensor


calls = 0


class Trainer:
    """Keeps what trainers keep between steps."""

    def __init__(self) -> None:
        self.model = Attention()
        self.losses: list[Tensor] = []
        self.held = nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        global calls
        calls += 1
        self.losses.append(cross_entropy(model, batch) * self.held.mean())
        return self.losses[-1]

    def step(self, model: Any, optimizer: Any, micro_batches: list[Any]) -> Tensor:
        self.loss(model, micro_batches[0]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return self.losses[-1].detach()


def test_what_a_step_keeps_is_as_it_was() -> None:
    trainer = Trainer()
    case = replace(
        nano, model=lambda: trainer.model, optimizer=lambda m: trainer.optimizer, step=trainer.step
    )
    case.step(trainer.model, trainer.optimizer, [case.batch(1, "cpu")])
    trainer.model.eval()
    before = (
        trainer.losses.copy(), [*trainer.model.parameters()], calls, trainer.scheduler.state_dict(),
        trainer.optimizer.state_dict(), trainer.held.grad, sorted(vars(trainer.model)), [*vars(trainer)],
    )  # fmt: skip
    assert predict_peak_memory(case, 4).peak_bytes > 0
    after = (
        trainer.losses.copy(), [*trainer.model.parameters()], calls, trainer.scheduler.state_dict(),
        trainer.optimizer.state_dict(), trainer.held.grad, sorted(vars(trainer.model)), [*vars(trainer)],
    )  # fmt: skip
    assert [*map(repr, after)] == [*map(repr, before)]
    assert all(one is other for one, other in zip(after[1], before[1], strict=True))
    assert not trainer.model.training
    case.step(trainer.model, trainer.optimizer, [case.batch(1, "cpu")])  # all of it is real
    assert type(trainer.losses[-1]) is Tensor and type(trainer.held.grad) is Tensor


def keeps_by_unknown(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits[logits.amax(-1) > 0], batch[1][logits.amax(-1) > 0])


def test_a_selection_by_unknown_values_is_taken_at_its_largest_and_told() -> None:
    predicted = predict_peak_memory(replace(nano, loss=keeps_by_unknown), 4)
    assert any("guessed: the largest result at test_predict.py" in note for note in predicted.notes)
    assert predicted.error_bar.low == -0.40


def repeats_by_unknown(model: Any, batch: Any) -> Tensor:
    counts = (model(batch[0]).amax(-1) > 0).long().flatten()
    return cross_entropy(model, batch) + torch.repeat_interleave(counts).float().mean()


def test_what_fake_tensors_cannot_run_is_named_with_its_line() -> None:
    with pytest.raises(PredictionError) as caught:
        predict_peak_memory(replace(nano, loss=repeats_by_unknown), 4)
    line = repeats_by_unknown.__code__.co_firstlineno + 2
    assert str(caught.value) == (
        "case 'nano' cannot be predicted: the training step on fake tensors ended with "
        "aten.repeat_interleave.Tensor depends on values "
        f"at test_predict.py:{line} in repeats_by_unknown; "
        "measure it instead (find-batch without --capacity)"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict_peak_memory(nano, 0), "batch_size is 0; give a whole number of 1 or more"),
        (lambda: predict_peak_memory(nano, True), "batch_size is True; give a whole number of 1 or more"),
        (lambda: predict_peak_memory(nano, 1, device="tpu"), "device is 'tpu'; give one of cuda, cpu"),  # type: ignore[arg-type]
        (lambda: predict_peak_memory(nano, 1, "80 apples"), "capacity: '80 apples' is not a size"),
        (
            lambda: predict_peak_memory(nano, 1, 80),
            "capacity=80 is 80 bytes; legal is 64.0 KiB or more: give",
        ),
        (lambda: predict_maximum(nano, "80B"), "capacity='80B' is 80 bytes; legal is 64.0 KiB or more"),
        (lambda: predict_peak_memory(nano, 1, world_size=-1), "world_size is -1; give a whole number"),
        (lambda: predict_peak_memory(nano, 1, checkpointing=True), "case 'nano' has no set_checkpointing"),
        (lambda: predict_peak_memory(nn.Linear, 1), "give a TrainingCase"),  # type: ignore[arg-type]
        (
            lambda: predict_maximum(nano, "1GB", minimum=8, maximum=4),
            "maximum is 4 and minimum 8; give a maximum of at least 8",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
