"""``validation``: its lines are true of real loops, and it does nothing where it is not asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pytest_gputrain import validation
from pytest_gputrain.compile.batch_tokens import BatchTokens, tokens_of
from pytest_gputrain.compile.step_times import StepTimes


class Toy(torch.nn.Module):
    """(rows, columns) int64 -> (rows, columns, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embedding(tokens).sin()
        return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_of(rows: int, columns: int, num_masked: int = 0) -> dict[str, torch.Tensor]:
    labels = torch.ones(rows, columns, dtype=torch.long)
    labels[0, :num_masked] = -100
    return {"labels": labels, "input_ids": torch.ones(rows, columns, dtype=torch.long)}


def run(
    batches: list[Any], capsys: pytest.CaptureFixture[str], *, compiled: bool = True, warmup: int = 1
) -> tuple[list[str], dict[str, Any]]:
    model = Toy()
    with validation(enabled=True, warmup=warmup) as watch:
        trained: Any = torch.compile(model, dynamic=False, backend="eager") if compiled else model
        for batch in batches:
            with watch.step(batch):
                trained(batch["input_ids"]).sum().backward()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[VALIDATION] ") for line in lines)
    return [line.removeprefix("[VALIDATION] ") for line in lines], watch.figures()


def test_a_compiled_loop(capsys: pytest.CaptureFixture[str]) -> None:
    lines, figures = run([batch_of(4, 6, num_masked=3)] * 4, capsys)
    assert lines[:2] == ["✓ Model is compiled", "Step 0 | Batch shape: torch.Size([4, 6])"]
    assert lines[2].startswith("Graphs: 1 (Toy.forward) | Recompiles: 0 | Graph breaks: 0 | Compiling: ")
    seconds, speed = figures["seconds_per_step"], figures["per_second"]
    assert lines[3] == f"Avg time/step: {seconds:.3f}s | Tokens/sec: {speed:.1f}"
    assert lines[4] == f"Useful tokens/sec: {speed * 21 / 24:.1f} (87.5% of all count in the loss)"
    assert figures["is_compiled"] is True
    assert (figures["warmup_steps"], figures["num_steps"]) == (1, 3)
    assert speed == pytest.approx(24 / seconds)
    json.dumps(figures)


def test_a_loop_that_forgets_what_compile_returns(capsys: pytest.CaptureFixture[str]) -> None:
    lines, figures = run([batch_of(4, 6)] * 2, capsys, compiled=False)
    why = "nothing was compiled; call torch.compile, and train with what it returns"
    assert lines[0] == f"✗ Model is not compiled: {why}"
    assert sum(line.startswith("✗") for line in lines) == 1
    assert figures["is_compiled"] is False


def test_shapes_that_change_until_torch_gives_up(capsys: pytest.CaptureFixture[str]) -> None:
    lines, figures = run([batch_of(4, columns) for columns in range(6, 17)], capsys)
    again = [line for line in lines if "| Recompiled Toy.forward (" in line]
    assert len(again) == 7
    assert again[0].startswith("✗ Step 1 |")
    assert "expected 6, actual 7" in again[0]
    gave_up = next(line for line in lines if "any more" in line)
    assert gave_up.startswith(
        "✗ Model is not compiled any more: Toy.forward was compiled 8 times, the limit; what is new runs "
        "eager from step 8 on ("
    )
    assert "✗ No compiled graph ran in 3 later steps, first in step 8" in lines
    assert sum("Batch shape" in line for line in lines) == 8
    assert figures["is_compiled"] is False
    assert next(line for line in lines if line.startswith("Graphs: 8")).endswith("s of it after warm-up")


def test_a_backend_that_fails_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such kernel")

    with validation(enabled=True) as watch:
        torch._dynamo.config.suppress_errors = True
        trained = torch.compile(Toy(), backend=fails)
        with watch.step(batch_of(2, 3)):
            trained(batch_of(2, 3)["input_ids"])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(
        "[VALIDATION] ✗ Model is not compiled: compiling Toy.forward failed, and it runs eager"
    )
    assert "no such kernel" in line
    assert not torch._dynamo.config.suppress_errors


def test_evaluation_between_steps_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("pytest_gputrain.compile.validation._clock", lambda: now)
    with validation(enabled=True, warmup=2) as watch:
        for seconds in (50.0, 9.0, 2.0, 3.0):
            with watch.step(batch_of(1, 10)):
                now += seconds
            now += 100.0
    assert "Avg time/step: 2.500s | Tokens/sec: 4.0\n" in capsys.readouterr().out


def test_a_compiled_loss_is_no_compiled_model(capsys: pytest.CaptureFixture[str]) -> None:
    loss_of = torch.compile(lambda output: output.sum(), backend="eager")
    model = Toy()
    with validation(enabled=True) as watch, watch.step():
        loss_of(model(batch_of(2, 3)["input_ids"])).backward()
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("[VALIDATION] ✗ Model is not compiled: only test_a_compiled_loss")
    assert line.endswith("<lambda> was, which takes no parameter of it")
    assert not watch.figures()["is_compiled"]


def test_evaluation_may_have_a_graph_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = batch_of(2, 3)["input_ids"]
    with validation(enabled=True) as watch:
        model = torch.compile(Toy(), backend="eager")
        with watch.step(tokens):
            model(tokens).sum().backward()
        with torch.no_grad():
            model(tokens)
    printed = capsys.readouterr().out
    assert "[VALIDATION] After step 0 | Recompiled Toy.forward (" in printed
    assert "✗" not in printed
    assert watch.figures()["is_compiled"]


def test_nothing_happens_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUTRAIN_VALIDATE", raising=False)
    with validation() as watch, watch.step(batch_of(1, 2)):
        pass
    assert capsys.readouterr().out == ""
    assert watch.figures() == {}
    monkeypatch.setenv("GPUTRAIN_VALIDATE", "yes")
    assert validation().enabled
    assert not validation(enabled=False).enabled
    monkeypatch.setenv("GPUTRAIN_VALIDATE", "perhaps")
    with pytest.raises(ValueError, match="GPUTRAIN_VALIDATE='perhaps' is not legal; give "):
        validation()
    with pytest.raises(ValueError, match="warmup is -1; give a number of steps, 0 or more"):
        validation(enabled=True, warmup=-1)


def test_the_error_of_a_step_is_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), validation(enabled=True) as watch, watch.step():
        raise ZeroDivisionError
    assert capsys.readouterr().out == ""


TOKENS = torch.zeros(3, 5, dtype=torch.long)
MASK = torch.tensor([[1, 1, 0, 0, 0]] * 3)
BATCHES: dict[str, tuple[Any, BatchTokens]] = {
    "tuple": ((TOKENS, TOKENS), BatchTokens((3, 5), 1, "tokens", 15, None)),
    "list of tensors": ([TOKENS, TOKENS], BatchTokens((3, 5), 1, "tokens", 15, None)),
    "mask": ({"attention_mask": MASK, "input_ids": TOKENS}, BatchTokens((3, 5), 1, "tokens", 15, 6)),
    "micro-batches": ([{"x": TOKENS}, {"x": TOKENS[:1]}], BatchTokens((3, 5), 2, "tokens", 20, None)),
    "images": (
        {"y": torch.zeros(2, dtype=torch.long), "x": torch.zeros(2, 3, 4, 4)},
        BatchTokens((2, 3, 4, 4), 1, "samples", 2, None),
    ),
    "labels first": ((torch.zeros(2), torch.zeros(2, 7)), BatchTokens((2, 7), 1, "samples", 2, None)),
    "nothing": (None, BatchTokens((), 1, "samples", 0, None)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_tokens_of_a_batch(name: str) -> None:
    batch, expected = BATCHES[name]
    assert tokens_of(batch) == expected


def test_the_user_may_count() -> None:
    assert tokens_of(({"x": TOKENS}, None), num_targets=lambda batch: 7).useful == 7


def test_too_few_steps_are_no_average() -> None:
    times = StepTimes(warmup=5)
    times.add(1.0, tokens_of(None))
    assert times.lines() == ["Avg time/step: not measured (1 steps, the first 5 warm up)"]
    assert times.figures() == {"warmup_steps": 1, "num_steps": 0}


def test_a_short_batch_counts_by_its_tokens() -> None:
    times = StepTimes(warmup=0)
    times.add(3.0, BatchTokens((4, 10), 1, "tokens", 40, 30))
    times.add(1.0, BatchTokens((1, 10), 1, "tokens", 10, 10))
    assert times.lines() == [
        "Avg time/step: 2.000s | Tokens/sec: 12.5",
        "Useful tokens/sec: 10.0 (80.0% of all count in the loss)",
    ]
