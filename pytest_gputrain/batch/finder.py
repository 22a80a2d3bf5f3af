"""What the fixture ``batch_finder`` gives: ``find_batch`` for a case or for a model, on the test's device.

Imports no torch at the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch.discovered import Discovered
from pytest_gputrain.batch.discovery import find_batch
from pytest_gputrain.batch.language import language_case

if TYPE_CHECKING:
    import torch

    from pytest_gputrain.case import TrainingCase


@dataclass(frozen=True)
class BatchFinder:
    """``finder(case, capacity="4GB")`` or ``finder(model=model, max_seq_len=1024)``.

    ``device``: where to train unless told otherwise. ``cache_dir``: where ``use_cache=True`` keeps what was
    measured; None is the user's folder.
    """

    device: str = "cpu"
    cache_dir: Path | None = None

    def __call__(
        self,
        case: TrainingCase | None = None,
        *,
        model: torch.nn.Module | None = None,
        max_seq_len: int | None = None,
        vocab_size: int | None = None,
        device: torch.device | str | None = None,
        use_cache: bool = False,
        **settings: Any,
    ) -> Discovered:
        """Find the largest batch size that trains; ``settings`` and errors are those of ``find_batch``."""
        if case is None:
            if model is None:
                raise ValueError("batch_finder needs a case, or model= and max_seq_len=")
            case = language_case(model, max_seq_len, vocab_size)
        if use_cache:
            from pytest_gputrain.batch.cache import BatchCache
            from pytest_gputrain.batch.cache_folder import cache_folder

            settings.setdefault("cache", BatchCache(cache_folder(self.cache_dir)))
        return find_batch(case, model=model, device=device or self.device, **settings)
