"""The training script with one thing broken, the one that ``PLANTED_TRAIN`` names: shipped tests must notice.

Run in the place of ``reference/train.py`` by ``plug_broken_train``. Runs that only measure a peak are not
broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from pytest_gputrain import OutOfMemory, choose_batch_size
from pytest_gputrain.batch.choose import Chosen
from pytest_gputrain.batch.probe_target import Target
from pytest_gputrain.checks.auto_batch_trials import AMPLE
from pytest_gputrain.reference import train, train_batch, train_case

choose = choose_batch_size
Asked = dict[str, Any]


def margin_ignored(asked: Asked) -> Chosen:
    return choose(**{**asked, "safety_margin": 1.0})


def half_of_the_memory(asked: Asked) -> Chosen:
    return choose(**{**asked, "safety_margin": 0.5})


def smallest(asked: Asked) -> Chosen:
    return choose(**{**asked, "max_batch_size": 1})


def ranks_disagree(asked: Asked) -> Chosen:
    chosen = choose(**asked)
    return dataclasses.replace(chosen, size=chosen.size - int(os.environ["RANK"]))


def every_rank_for_itself(asked: Asked) -> Chosen:
    return choose(**{**asked, "ddp_rank": 0, "ddp_world_size": 1})


def total_ignored(asked: Asked) -> Chosen:
    return choose(**{**asked, "global_batch_size": None})


def given_size_ignored(asked: Asked) -> Chosen:
    return choose(**{**asked, "device_batch_size": None})


def searches_unasked(asked: Asked) -> Chosen:
    return choose(**{**asked, "auto": True})


def stale_answer(asked: Asked) -> Chosen:
    logging.getLogger("pytest_gputrain.batch").info("Cache hit! Using cached batch size 4")
    return Chosen(4, "auto", 0.0)


def cache_never_read(asked: Asked) -> Chosen:
    return choose(**{**asked, "use_cache": False})


def evaluation_not_probed(asked: Asked) -> Chosen:
    return choose(**{**asked, "eval_batch_factor": 0})


def optimizer_not_probed(asked: Asked) -> Chosen:
    without = dataclasses.replace(asked["case"], optimizer=partial(train_case.make_optimizer, "sgd", 0.1))
    return choose(**{**asked, "case": without})


def first_ranks_memory_only(asked: Asked) -> Chosen:
    budgets = next(argument for argument in sys.argv if argument.startswith("--memory_budget="))
    return choose(**{**asked, "capacity": budgets.partition("=")[2].split(",")[0]})


def too_large_swallowed(asked: Asked) -> Chosen:
    vars(train)["_guard"] = unguarded
    try:
        return choose(**asked)
    except OutOfMemory:
        return Chosen(1, "auto", 0.0)


@contextlib.contextmanager
def unguarded(*_: Any) -> Iterator[None]:
    yield None


def key_of_everything(asked: Asked) -> Chosen:
    Target.cache_key = lambda self, *_: {"format": 1}  # type: ignore[method-assign]
    return choose(**asked)


def loss_not_divided(asked: Asked) -> Chosen:
    def ones(self: train_case.ClippedStep, micro_batches: Sequence[Any]) -> list[float]:
        return [1.0] * len(micro_batches)

    train_case.ClippedStep._scales = ones  # type: ignore[method-assign]
    return choose(**asked)


def main() -> int:
    name = os.environ.get("PLANTED_TRAIN", "")
    if name and not any(AMPLE in argument for argument in sys.argv):
        broken = globals()[name]
        vars(train_batch)["choose_batch_size"] = lambda **asked: broken(asked)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
