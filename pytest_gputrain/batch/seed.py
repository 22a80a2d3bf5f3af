"""A first guess for the search: the memory law of a case, predicted from fake tensors when it is first asked.

It only says which size to try first. A case that cannot be predicted is searched without, and that is logged
for those who look. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pytest_gputrain.batch.probe_target import Target
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.memory.prediction import Law

# Where the law is taken from: far from the answer it is as good as near it, and fake tensors are as quick.
SIZE = 2
log = logging.getLogger("pytest_gputrain.batch")


class Seed:
    """Peak in bytes by batch size; NaN, which no search believes, where nothing can be predicted.

    ``settings``: of ``predict_peak_memory``.
    """

    def __init__(self, case: TrainingCase, device: Literal["cuda", "cpu"], **settings: Any) -> None:
        self._case = case
        self._device = device
        self._settings = settings
        self._law: Law | None = None
        self._asked = False

    @classmethod
    def of(cls, target: Target, share: int | None, world_size: int) -> Seed:
        """For what a discovery trains: its model, which is left as it was, without compile's wrapper."""
        from pytest_gputrain.case.defaults import unwrapped

        model = unwrapped(target.model)
        return cls(
            dataclasses.replace(target.case, model=lambda: model),
            "cuda" if target.device.type == "cuda" else "cpu",
            checkpointing=target.conditions.checkpointing,
            accumulation_steps=1 if share is None or share == 1 else 2,
            world_size=world_size,
        )

    def __call__(self, batch_size: int) -> float:
        law = self.law()
        return math.nan if law is None else law(batch_size)

    def law(self) -> Law | None:
        """None where it cannot be predicted, whatever the reason."""
        if not self._asked:
            self._asked = True
            try:
                self._law = self._predicted()
            except Exception as error:
                log.debug("no prediction to begin with: %s", error)
        return self._law

    def _predicted(self) -> Law:
        from pytest_gputrain.memory.predict import predict_peak_memory

        return predict_peak_memory(self._case, SIZE, device=self._device, **self._settings).law


def wanted(asked: bool | None, predicted: Callable[[int], float] | None, device: str, sizes: int) -> bool:
    """Whether a search begins with a prediction: on a GPU, unless told otherwise or given one.

    sizes: how many are legal; with two there is nothing to choose.
    """
    if predicted is not None or sizes <= 2:
        return False
    return device == "cuda" if asked is None else asked
