"""The training script, compiled: ``pytest --pyargs pytest_gputrain.checks -k compiled_training``.

Runs ``reference/train.py --compile --validate`` on 1 and 2 ranks beside itself uncompiled. On a CPU with
dynamo's aot_eager backend, which needs no compiler, and once with inductor; the cuda tests with inductor, and
need as many GPUs as ranks. Does not judge speed, and not your case: the checks in ``test_compile`` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gputrain.checks.auto_batch_trials import Subject, Trials
from pytest_gputrain.checks.context import DEVICES
from pytest_gputrain.compile.backend import validate_backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gputrain.checks.auto_batch_trials import Trial
    from pytest_gputrain.plugin.launcher import PytestLauncher

SAID = "[VALIDATION] ✓ Model is compiled"
# 22 samples a step in micro-batches of 4 leave 2, on two ranks 3 each; evaluation takes another size again.
COURSE: tuple[str, ...] = ("--steps=8", "--total_batch_size=22", "--device_batch_size=4", "--lr=0.02")
COURSE += ("--eval_every=3", "--eval_batch_factor=2")
BUDGETED_SAMPLES = 6
BACKENDS = {"cpu": ("--compile_backend=aot_eager",), "cuda": ()}
TOLERANCES = {"cpu": 1e-4, "cuda": 1e-2}  # bfloat16 there, and fused
UNTRAINED = 5.5  # the loss of a model that predicts nothing is log 256 = 5.545


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "script" not in metafunc.fixturenames:
        return
    gpus = pytest.mark.requires_gpus(2 if metafunc.function.__name__ == "test_two_ranks" else 1)
    subjects = [
        pytest.param(Subject(None, device), id=f"train-{device}", marks=gpus if device == "cuda" else ())
        for device in DEVICES
    ]
    metafunc.parametrize("script", subjects)


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    """What this module has run: several tests look at the same runs."""
    done = Trials()
    yield done
    done.done.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gputrain-compiled")


def plain(script: Subject, launcher: PytestLauncher, trials: Trials, folder: Path) -> Trial:
    return script.train(launcher, trials, *COURSE, f"--out={folder / 'plain.pt'}")


def compiled(script: Subject, launcher: PytestLauncher, trials: Trials, folder: Path) -> Trial:
    options = with_compile(script, *COURSE, f"--out={folder / 'compiled.pt'}")
    return script.train(launcher, trials, *options)


def with_compile(script: Subject, *options: str) -> tuple[str, ...]:
    return (*options, "--compile", "--validate", *BACKENDS[script.device])


def fine_tuned(
    script: Subject, launcher: PytestLauncher, trials: Trials, start: Path, *options: str
) -> Trial:
    course = ("--stage=sft", "--steps=7", "--device_batch_size=4", "--lr=0.005", f"--checkpoint={start}")
    return script.train(launcher, trials, *course, *options)


def stays_compiled(trial: Trial) -> dict[str, Any]:
    """One graph for everything, which runs in every step; what the run says of itself agrees."""
    found: dict[str, Any] = trial.metrics["validation"]
    assert SAID in trial.printed().splitlines(), trial.printed()
    assert "[VALIDATION] ✗" not in trial.story, trial.story
    assert (found["is_compiled"], found["graphs"], found["recompiles"]) == (True, 1, 0)
    return found


def test_stays_compiled(script: Subject, ddp_launcher: PytestLauncher, trials: Trials, folder: Path) -> None:
    """Through accumulation with a short last micro-batch, evaluation at another size, and a schedule."""
    run = compiled(script, ddp_launcher, trials, folder)
    found = stays_compiled(run)
    assert "[VALIDATION] Step 0 | Batch shape: torch.Size([4, " in run.printed()
    assert "[VALIDATION] Avg time/step: " in run.printed()
    assert found["per_second"] > 0
    assert found["useful_share"] == pytest.approx(22 / 24)


def test_same_losses(script: Subject, ddp_launcher: PytestLauncher, trials: Trials, folder: Path) -> None:
    """From the same weights and samples, in training and in evaluation."""
    alone = plain(script, ddp_launcher, trials, folder)
    run = compiled(script, ddp_launcher, trials, folder)
    tolerance = TOLERANCES[script.device]
    assert alone.losses[-1] < UNTRAINED
    assert run.losses == pytest.approx(alone.losses, rel=tolerance)
    assert run.metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=tolerance)


def test_checkpoints(script: Subject, ddp_launcher: PytestLauncher, trials: Trials, folder: Path) -> None:
    """What a compiled run saves goes on uncompiled, and the other way round, with the same losses."""
    plain(script, ddp_launcher, trials, folder)
    compiled(script, ddp_launcher, trials, folder)
    assert keys_of(folder / "compiled.pt") == keys_of(folder / "plain.pt")
    assert not any("_orig_mod" in key for key in keys_of(folder / "compiled.pt"))
    tolerance = TOLERANCES[script.device]
    onward = fine_tuned(script, ddp_launcher, trials, folder / "compiled.pt")
    back = fine_tuned(script, ddp_launcher, trials, folder / "plain.pt", *with_compile(script))
    assert onward.losses[0] < UNTRAINED
    assert back.losses == pytest.approx(onward.losses, rel=tolerance)


def keys_of(path: Path) -> set[str]:
    import torch

    return set(torch.load(path, map_location="cpu", weights_only=True)["model"])


def test_fine_tuning_on_documents(
    script: Subject, ddp_launcher: PytestLauncher, trials: Trials, folder: Path
) -> None:
    """Documents of unequal lengths at one shape: one graph, and its padding is counted as what it is."""
    plain(script, ddp_launcher, trials, folder)
    found = stays_compiled(
        fine_tuned(script, ddp_launcher, trials, folder / "plain.pt", *with_compile(script))
    )
    assert 0.1 < found["useful_share"] < 0.9


def test_two_ranks(script: Subject, ddp_launcher: PytestLauncher, trials: Trials, folder: Path) -> None:
    """Data parallel around the compiled model, accumulating without synchronising: as one rank does it."""
    run = script.train(ddp_launcher, trials, *with_compile(script, *COURSE), nproc=2)
    stays_compiled(run)
    alone = plain(script, ddp_launcher, trials, folder)
    assert run.losses == pytest.approx(alone.losses, rel=TOLERANCES[script.device])


def test_batch_size_found(script: Subject, ddp_launcher: PytestLauncher, trials: Trials) -> None:
    """The search leaves nothing behind that would be compiled again."""
    budget = f"--memory_budget={script.budget(ddp_launcher, trials, BUDGETED_SAMPLES)}"
    options = with_compile(script, "--auto_batch_size", "--steps=7", budget)
    run = script.train(ddp_launcher, trials, *options)
    stays_compiled(run)
    assert run.metrics["batch_size_source"] == "discovered"
    assert run.size > 1


def test_inductor_on_a_cpu(ddp_launcher: PytestLauncher, trials: Trials, folder: Path) -> None:
    """Generated code, once: everything else on a CPU runs without."""
    if lack := validate_backend("inductor"):
        pytest.skip(lack)
    script = Subject(None, "cpu")
    run = script.train(ddp_launcher, trials, *COURSE, "--compile", "--validate")
    stays_compiled(run)
    alone = plain(script, ddp_launcher, trials, folder)
    assert run.losses == pytest.approx(alone.losses, rel=1e-3)
