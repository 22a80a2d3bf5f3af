"""Automatic batch size in real training: ``pytest --pyargs pytest_gputrain.checks -k auto_batch``.

Runs the package's own training script (``reference/train.py``) under memory budgets that it measures first,
on 1, 2 and 4 ranks; with ``--gputrain-case``, the tests that are not about the script's own options train
that case instead. The cuda tests need as many GPUs as ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_gputrain.checks.auto_batch_trials import MARGIN, STEPS, Subject, Trials
from pytest_gputrain.checks.context import DEVICES
from pytest_gputrain.checks.throughput import compare, write
from pytest_gputrain.launch import Verdict
from pytest_gputrain.plugin.cases import cases_of
from pytest_gputrain.plugin.settings import settings_of
from pytest_gputrain.values import LEAST_CAPACITY, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gputrain.checks.auto_batch_trials import Trial
    from pytest_gputrain.plugin.launcher import PytestLauncher

RANKS = {"test_two_ranks": 2, "test_four_ranks": 4, "test_out_of_memory_on_one_rank_only": 2}
SAMPLES = 12  # what the budgets hold: far enough from 1 and from the 8 that is the script's default
TOTAL = 20  # samples a step, in the tests that accumulate: what fits does not divide it
FACTOR = 16  # evaluation's batch against training's, where evaluation is what runs out of memory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``subject`` is each of the user's cases, ``script`` always the script's own model."""
    for name in ("subject", "script"):
        if name not in metafunc.fixturenames:
            continue
        given = (
            cases_of(metafunc.config) if name == "subject" and settings_of(metafunc.config).cases else [None]
        )
        gpus = pytest.mark.requires_gpus(RANKS.get(metafunc.function.__name__, 1))
        subjects = [Subject(case, device) for case in given for device in DEVICES]
        metafunc.parametrize(
            name,
            [
                pytest.param(
                    subject,
                    id=f"{subject.name}-{subject.device}",
                    marks=gpus if subject.device == "cuda" else (),
                )
                for subject in subjects
            ],
        )


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    """What this module has run: several tests look at the same runs."""
    done = Trials()
    yield done
    done.done.clear()


def automatic(subject: Subject, launcher: PytestLauncher, trials: Trials, nproc: int = 1) -> Trial:
    """The run that most tests start from: found under a budget that holds so many samples a rank."""
    budget = subject.budget(launcher, trials, SAMPLES, nproc=nproc)
    return subject.train(launcher, trials, "--auto_batch_size", f"--memory_budget={budget}", nproc=nproc)


def test_single_device(subject: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    """The size found trains within the margin, and the next one does not."""
    found = automatic(subject, ddp_launcher, trials)
    assert "Running auto-discovery on rank 0" in found.printed()
    assert f"Auto-discovery found device_batch_size={found.size}" in found.printed()
    assert found.metrics["batch_size_source"] == "discovered"
    limit = int(subject.budget(ddp_launcher, trials, SAMPLES) * MARGIN)
    assert found.metrics["peak_bytes"] <= limit
    # A GPU's allocator hands out blocks, not bytes: there the very next size may still fit.
    more = found.size + (1 if subject.device == "cpu" else max(1, found.size // 4))
    options = (f"--device_batch_size={more}", f"--memory_budget={limit}")
    ends_out_of_memory(subject.train(ddp_launcher, trials, *options, passing=False))


def test_two_ranks(subject: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    every_rank_trains_at_the_size_found(automatic(subject, ddp_launcher, trials, nproc=2), 2)


def test_four_ranks(subject: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    every_rank_trains_at_the_size_found(automatic(subject, ddp_launcher, trials, nproc=4), 4)


def every_rank_trains_at_the_size_found(found: Trial, world_size: int) -> None:
    assert found.size > 1
    assert f"Auto-discovery found device_batch_size={found.size}" in found.printed(0)
    for rank in range(world_size):
        assert f"Micro-batch: {found.size}," in found.printed(rank)
    for rank in range(1, world_size):
        assert f"Received batch size from rank 0: {found.size}" in found.printed(rank)
    assert found.metrics["total_batch_size"] == found.size * world_size
    assert found.metrics["peak_bytes"] <= found.metrics["memory_budget"]


def test_manual_against_auto(script: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    """With the same total batch size, a device batch size changes the speed and not the losses."""
    manual, found = manual_and_automatic(script, ddp_launcher, trials)
    assert found.size > manual.size
    assert TOTAL % found.size == 0
    assert found.metrics["total_batch_size"] == manual.metrics["total_batch_size"] == TOTAL
    tolerance = 1e-4 if script.device == "cpu" else 1e-2  # bfloat16 rounds by the shape of the product
    assert found.losses == pytest.approx(manual.losses, rel=tolerance)
    assert len(found.losses) == STEPS


def manual_and_automatic(
    script: Subject, launcher: PytestLauncher, trials: Trials, again: int = 0
) -> tuple[Trial, Trial]:
    options = (f"--total_batch_size={TOTAL}", f"--memory_budget={script.budget(launcher, trials, SAMPLES)}")
    manual = script.train(launcher, trials, "--device_batch_size=2", *options, again=again)
    return manual, script.train(launcher, trials, "--auto_batch_size", *options, again=again)


def test_override(subject: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    """A size that the user gives goes before finding one."""
    given = subject.train(ddp_launcher, trials, "--auto_batch_size", "--device_batch_size=3")
    assert "Using manual device_batch_size=3" in given.printed()
    assert "Running auto-discovery" not in given.printed()
    assert (given.size, given.metrics["batch_size_source"]) == (3, "manual")


def test_disabled(subject: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    """Without being asked, nothing is searched."""
    plain = subject.train(ddp_launcher, trials)
    assert f"Auto-discovery disabled, using default device_batch_size={plain.size}" in plain.printed()
    assert "Running auto-discovery" not in plain.printed()
    assert plain.metrics["batch_size_source"] == "disabled"


def cached(
    subject: Subject, launcher: PytestLauncher, trials: Trials, folder: Path, *options: str, again: int = 0
) -> Trial:
    budget = subject.budget(launcher, trials, SAMPLES)
    given = ("--auto_batch_size", "--batch_size_cache", f"--memory_budget={budget}", *options)
    return subject.train(launcher, trials, *given, env={"GPUTRAIN_CACHE_DIR": str(folder)}, again=again)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gputrain-batch-sizes")


def test_cache_miss(
    subject: Subject, ddp_launcher: PytestLauncher, trials: Trials, cache_folder: Path
) -> None:
    """The first run finds for itself, what it would find without a cache."""
    first = cached(subject, ddp_launcher, trials, cache_folder)
    assert "Running auto-discovery on rank 0" in first.printed()
    assert "Cache hit!" not in first.printed()
    assert first.metrics["batch_size_source"] == "discovered"
    assert first.size == automatic(subject, ddp_launcher, trials).size


def test_cache_hit(
    subject: Subject, ddp_launcher: PytestLauncher, trials: Trials, cache_folder: Path
) -> None:
    """The second run takes what the first has found."""
    first = cached(subject, ddp_launcher, trials, cache_folder)
    second = cached(subject, ddp_launcher, trials, cache_folder, again=1)
    assert f"Cache hit! Using cached batch size {first.size}" in second.printed()
    assert (second.size, second.metrics["batch_size_source"]) == (first.size, "cache")


def test_cache_invalidation(
    subject: Subject, ddp_launcher: PytestLauncher, trials: Trials, cache_folder: Path
) -> None:
    """Another training, here one that evaluates in larger batches, is not given the old answer."""
    first = cached(subject, ddp_launcher, trials, cache_folder)
    other = cached(subject, ddp_launcher, trials, cache_folder, f"--eval_batch_factor={FACTOR}")
    assert "Cache hit!" not in other.printed()
    assert other.metrics["batch_size_source"] == "discovered"
    assert other.size <= first.size


def test_model_too_large_for_batch_1(subject: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    """It ends, soon and with the reason; nothing trains at a size that does not fit."""
    budget = too_little(subject, ddp_launcher, trials)
    options = ("--auto_batch_size", f"--memory_budget={budget}")
    ends_out_of_memory(subject.train(ddp_launcher, trials, *options, passing=False))


def too_little(subject: Subject, launcher: PytestLauncher, trials: Trials, nproc: int = 1) -> int:
    """Bytes that do not hold the training of one sample."""
    # From two samples, which need at most twice as much: a model with BatchNorm does not train on one.
    budget = int(subject.peak(launcher, trials, 2, nproc=nproc) * 0.45)
    if budget < LEAST_CAPACITY:
        pytest.skip(
            f"one sample trains in {format_size(budget)}, a budget that would be refused as a unit forgotten"
        )
    return budget


def ends_out_of_memory(trial: Trial) -> None:
    assert trial.result.verdict is Verdict.FAILED, trial.story
    assert "OutOfMemory" in str(trial.result.cause), trial.story


def test_out_of_memory_in_the_optimizer_step_only(
    script: Subject, ddp_launcher: PytestLauncher, trials: Trials
) -> None:
    """AdamW's moments are made in its first step: they take room that SGD leaves to samples."""
    budget = script.budget(ddp_launcher, trials, SAMPLES)
    options = ("--auto_batch_size", f"--memory_budget={budget}", "--optimizer=sgd")
    blind = script.train(ddp_launcher, trials, *options).size  # what a probe without the step would find
    assert automatic(script, ddp_launcher, trials).size < blind
    given = (f"--device_batch_size={blind}", f"--memory_budget={int(budget * MARGIN)}")
    ends_out_of_memory(script.train(ddp_launcher, trials, *given, passing=False))


def test_out_of_memory_in_evaluation_only(
    subject: Subject, ddp_launcher: PytestLauncher, trials: Trials
) -> None:
    """Where evaluation takes larger batches than training, the size found holds them."""
    budget = f"--memory_budget={subject.budget(ddp_launcher, trials, SAMPLES)}"
    factor = f"--eval_batch_factor={FACTOR}"
    found = subject.train(ddp_launcher, trials, "--auto_batch_size", budget, factor)
    assert found.metrics["eval_loss"] is not None
    blind = automatic(subject, ddp_launcher, trials).size  # what a probe without evaluation finds
    if found.size == blind:
        pytest.skip(f"evaluation at {FACTOR} x {blind} samples needs no more memory than training does")
    given = (f"--device_batch_size={blind}", budget, factor)
    failed = subject.train(ddp_launcher, trials, *given, passing=False)
    ends_out_of_memory(failed)
    assert len(failed.losses) == STEPS, "it was not evaluation that ran out of memory"


def test_out_of_memory_on_one_rank_only(
    subject: Subject, ddp_launcher: PytestLauncher, trials: Trials
) -> None:
    """The rank with the least memory decides; one that holds no sample at all ends the run, on every rank."""
    much = subject.budget(ddp_launcher, trials, SAMPLES, nproc=2)
    less = subject.budget(ddp_launcher, trials, SAMPLES // 2, nproc=2)
    found = subject.train(
        ddp_launcher, trials, "--auto_batch_size", f"--memory_budget={much},{less}", nproc=2
    )
    assert 1 <= found.size < automatic(subject, ddp_launcher, trials, nproc=2).size
    nothing = too_little(subject, ddp_launcher, trials, nproc=2)
    options = ("--auto_batch_size", f"--memory_budget={much},{nothing}")
    ends_out_of_memory(subject.train(ddp_launcher, trials, *options, nproc=2, passing=False))


def test_throughput_comparison(
    script: Subject,
    ddp_launcher: PytestLauncher,
    trials: Trials,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Manual against automatic, into ``throughput_comparison.json``; speed is reported and not judged."""
    pairs = [manual_and_automatic(script, ddp_launcher, trials, again=again) for again in range(2)]
    figures = compare([(manual.metrics, found.metrics) for manual, found in pairs])
    folder = settings_of(request.config).report or tmp_path
    path = write(figures, folder, script.device)
    kept = json.loads(path.read_text(encoding="utf-8"))
    for side in ("manual", "auto"):
        assert kept[side]["tokens_per_second"] > 0
        assert kept[side]["training_seconds"] > 0
        assert kept[side]["start_seconds"] > 0
    assert kept["manual"]["tokens"] == kept["auto"]["tokens"]
    assert kept["manual"]["discovery_seconds"] < kept["auto"]["discovery_seconds"]
    assert kept["auto"]["device_batch_size"] > kept["manual"]["device_batch_size"]
