"""What a run trains: the script's own model at a stage, or a user's `TrainingCase`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pytest_gputrain.case import CaseError, TrainingCase, load_case
from pytest_gputrain.case.pytree import tensors
from pytest_gputrain.reference.gpt import HEAD_WIDTH, GPTConfig
from pytest_gputrain.reference.train_arguments import TrainUsageError
from pytest_gputrain.reference.train_case import stage_case, with_clipping
from pytest_gputrain.reference.train_checkpoint import Checkpoint, config_of
from pytest_gputrain.reference.train_data import HELD_OUT, DrawnSamples, Samples, text_tokens
from pytest_gputrain.reference.train_loop import Source
from pytest_gputrain.reference.train_options import Options, refuse_shape
from pytest_gputrain.reference.train_parser import DEFAULT_DEPTH, DEFAULT_SEQUENCE_LENGTH, SHAPE


@dataclass(frozen=True)
class Job:
    """case: whose step is the one that trains. config: of the script's own model. tokens: in a sample."""

    case: TrainingCase
    source: Source
    step: Callable[..., Any]
    config: GPTConfig | None
    tokens: int


def job_of(options: Options, checkpoint: Checkpoint | None, case: TrainingCase | None = None) -> Job:
    """Raises TrainUsageError where the options ask for something that cannot be."""
    if case is None and options.case is not None:
        case = _loaded(options.case)
    return _own(options, checkpoint) if case is None else _users(options, case)


def _own(options: Options, checkpoint: Checkpoint | None) -> Job:
    given = {name: getattr(options, name) for name in SHAPE}
    if checkpoint is None:
        defaults = {"depth": DEFAULT_DEPTH, "sequence_length": DEFAULT_SEQUENCE_LENGTH}
        given = {name: given[name] or defaults.get(name) for name in SHAPE}
    config = config_of(given, checkpoint)
    if config.num_channels % HEAD_WIDTH:
        raise TrainUsageError(
            f"--width {config.num_channels} is not a multiple of {HEAD_WIDTH}, a head's width"
        )
    if options.dataset == "text" and config.sequence_length >= (
        held_out := int(len(text_tokens()) * HELD_OUT)
    ):
        raise TrainUsageError(
            f"--sequence_length {config.sequence_length} is too long for the text, of which {held_out} "
            "tokens are kept for evaluation; give less, or --dataset synthetic"
        )
    longest = options.padding == "longest"
    samples = Samples(options.stage, options.dataset, config.sequence_length, options.seed, longest)
    case = stage_case(options, config, samples)
    return Job(case, samples, case.step, config, config.sequence_length)


def _users(options: Options, case: TrainingCase) -> Job:
    refuse_shape(options, case.name)
    step = with_clipping(case, options.max_norm)
    # With the step that trains, so that the probe of a batch size runs it too.
    trained = replace(case, step=step)
    return Job(trained, DrawnSamples(case.batch, options.seed), step, None, _tokens_of(case))


def _loaded(spec: str) -> TrainingCase:
    try:
        cases = load_case(spec)
    except CaseError as error:
        raise TrainUsageError(f"--{error}") from None
    if len(cases) != 1:
        raise TrainUsageError(f"--case {spec} names {len(cases)} cases; name one")
    return cases[0]


def _tokens_of(case: TrainingCase) -> int:
    """Columns of a batch of token ids; 1 where a batch holds something else, so that samples are counted."""
    with torch.random.fork_rng():
        first = next(iter(tensors(case.batch(1, torch.device("cpu")))), None)
    is_tokens = first is not None and first.dim() == 2 and not first.is_floating_point()
    return int(first.size(1)) if is_tokens and first is not None else 1
