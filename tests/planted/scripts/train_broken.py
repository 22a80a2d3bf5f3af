"""The training script with one thing broken: the one that ``PLANTED_TRAIN`` names. Shipped tests have to notice.

Run by ``tests/checks/test_auto_batch.py`` in the place of ``reference/train.py``. Runs that only measure a peak
stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pytest_gputrain import OutOfMemory
from pytest_gputrain.batch.probe_target import Target
from pytest_gputrain.checks.auto_batch_trials import AMPLE
from pytest_gputrain.reference import train, train_batch, train_case

discover = train_batch.discover_batch_size
parse = train.parse
Asked = dict[str, Any]


def one_too_many(asked: Asked) -> int:
    return discover(**asked) + 1


def one_too_few(asked: Asked) -> int:
    return discover(**asked) - 1


def smallest(asked: Asked) -> int:
    discover(**asked)
    return 1


def ranks_disagree(asked: Asked) -> int:
    return discover(**asked) - int(os.environ["RANK"])


def every_rank_for_itself(asked: Asked) -> int:
    return discover(**{**asked, "ddp_rank": 0, "ddp_world_size": 1})


def total_ignored(asked: Asked) -> int:
    return discover(**{**asked, "global_batch_size": None})


def override_ignored(asked: Asked) -> int:
    return discover(**{**asked, "override": None})


def stale_answer(asked: Asked) -> int:
    logging.getLogger("pytest_gputrain.batch").info("Cache hit! Using cached batch size 4")
    return 4


def cache_never_read(asked: Asked) -> int:
    return discover(**{**asked, "use_cache": False})


def evaluation_not_probed(asked: Asked) -> int:
    return discover(**{**asked, "eval_batch_factor": 0})


def optimizer_not_probed(asked: Asked) -> int:
    without = dataclasses.replace(asked["case"], optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    return discover(**{**asked, "case": without})


def first_ranks_memory_only(asked: Asked) -> int:
    first = sys.argv[-1].partition("=")[2].split(",")[0]
    return discover(**{**asked, "capacity": first})


def too_large_swallowed(asked: Asked) -> int:
    train._guard = unguarded  # type: ignore[assignment]
    try:
        return discover(**asked)
    except OutOfMemory:
        return 1


@contextlib.contextmanager
def unguarded(*_: Any) -> Iterator[None]:
    yield None


def key_of_everything(asked: Asked) -> int:
    Target.cache_key = lambda self, *_: {"format": 1}  # type: ignore[method-assign]
    return discover(**asked)


def loss_not_divided(asked: Asked) -> int:
    def ones(self: train_case.ClippedStep, micro_batches: Sequence[Any]) -> list[float]:
        return [1.0] * len(micro_batches)

    train_case.ClippedStep._scales = ones  # type: ignore[method-assign]
    return discover(**asked)


def searches_unasked(asked: Asked) -> int:
    return discover(**asked)


def main() -> int:
    name = os.environ.get("PLANTED_TRAIN", "")
    if name and not any(AMPLE in argument for argument in sys.argv):
        broken = globals()[name]
        train_batch.discover_batch_size = lambda **asked: broken(asked)
        if broken is searches_unasked:
            train.parse = lambda given: dataclasses.replace(parse(given), auto_batch_size=True)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
