"""Which device batch size a training script uses: the user's, the discovered one, or the default.

One function for the script's options ``--device_batch_size``, ``--auto_batch_size`` and its stages, with the
log lines that people look for. Imports no torch.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch import bounds
from pytest_gputrain.batch.discover import discover_batch_size, manual
from pytest_gputrain.batch.ladder import whole

if TYPE_CHECKING:
    import torch

DEFAULT_DEVICE_BATCH_SIZE = 8
log = logging.getLogger("pytest_gputrain.batch")


@dataclass(frozen=True)
class Chosen:
    """``source``: "manual", "auto" or "disabled". ``seconds``: what choosing took, discovery for the most
    part.
    """

    size: int
    source: str
    seconds: float


def choose_batch_size(
    model: torch.nn.Module | None,
    max_seq_len: int | None,
    device: torch.device | str,
    *,
    auto: bool,
    device_batch_size: int | None = None,
    default: int = DEFAULT_DEVICE_BATCH_SIZE,
    stage: str = "base",
    pretraining_batch_size: int | None = None,
    ddp_rank: int = 0,
    ddp_world_size: int = 1,
    global_batch_size: int | None = None,
    **discovery: Any,
) -> Chosen:
    """Choose: ``device_batch_size`` if given, else with ``auto`` what ``discover_batch_size`` finds, else
    ``default``.

    ``pretraining_batch_size``: of the stage that trained the model so far; a later ``stage`` above it gets a
    warning. ``discovery``: further arguments of ``discover_batch_size``. Raises ``ValueError`` with one line
    for a size that cannot be one or does not divide the global batch, and what discovery raises.
    """
    began = time.monotonic()
    share = bounds.per_rank(global_batch_size, whole("ddp_world_size", ddp_world_size))
    if device_batch_size is not None:
        size, source = manual(device_batch_size, share, rank=ddp_rank), "manual"
    elif auto:
        size = discover_batch_size(
            model,
            max_seq_len,
            device,
            ddp_rank=ddp_rank,
            ddp_world_size=ddp_world_size,
            global_batch_size=global_batch_size,
            **discovery,
        )
        source = "auto"
    else:
        size, source = bounds.dividing("default", default, share), "disabled"
        if not ddp_rank:
            log.info("Auto-discovery disabled, using default device_batch_size=%d", size)
    if pretraining_batch_size is not None and size > pretraining_batch_size and not ddp_rank:
        log.warning(
            "stage %s: device_batch_size=%d exceeds the pretraining stage's %d; check the learning rate "
            "that was tuned for it, and that the stage's longest batch fits",
            stage,
            size,
            pretraining_batch_size,
        )
    return Chosen(size, source, time.monotonic() - began)
