"""Peak memory of a training step on a GPU that you do not have: the case's own step on fake tensors.

``predict_peak_memory(case, 32, "80GB")`` takes seconds and allocates nothing. Predicted as eager code; does
not cover fragmentation, workspaces of cuDNN, torch.compile's fusions and memory outside of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.memory import categories
from pytest_gputrain.memory.fake_step import FakeTraining, Peak
from pytest_gputrain.memory.fake_values import LARGEST_RESULT
from pytest_gputrain.memory.prediction import ERROR_BARS, Law, MaximumPrediction, Prediction
from pytest_gputrain.values import capacity_in_bytes

Device = Literal["cuda", "cpu"]

# Assumed, not measured here: a CUDA context with torch's kernels on a recent data-centre GPU.
CUDA_CONTEXT_BYTES = 512 * 2**20
# cuBLAS's workspace on Hopper, which torch takes from its own allocator (aten/src/ATen/cuda/CUDABlas.cpp).
CUBLAS_WORKSPACE_BYTES = 32 * 2**20
LARGEST_ASKED = 1 << 20


def predict_peak_memory(
    case: TrainingCase,
    batch_size: int,
    capacity: int | str | None = None,
    *,
    device: Device = "cuda",
    checkpointing: bool = False,
    accumulation_steps: int = 1,
    world_size: int = 1,
    compiled: bool = False,
) -> Prediction:
    """Predict the peak of one training step at a device batch size, the optimizer's state included.

    capacity:           ``"80GB"``, ``"79.1GiB"`` or bytes, for ``Prediction.fits``
    device:             "cuda" counts what CUDA would keep, "cpu" what the CPU does
    checkpointing:      through the case's ``set_checkpointing``, all layers
    accumulation_steps: micro-batches of ``batch_size`` an optimizer step
    world_size:         above 1, DistributedDataParallel's buckets are counted: the gradients once more
    compiled:           only noted: predicted as eager

    Raises ValueError for what makes no sense, PredictionError (a ValueError) naming operation and line where
    fake tensors cannot run the case, PredictionUnavailable where this torch has none.
    """
    predictor = _Predictor(case, device, checkpointing, accumulation_steps, world_size, compiled)
    limit = None if capacity is None else capacity_in_bytes(capacity)
    _whole("batch_size", batch_size)
    with predictor:
        return predictor.predict(batch_size, limit)


def predict_maximum(
    case: TrainingCase,
    capacity: int | str,
    *,
    minimum: int = 1,
    maximum: int | None = None,
    device: Device = "cuda",
    checkpointing: bool = False,
    accumulation_steps: int = 1,
    world_size: int = 1,
    compiled: bool = False,
) -> MaximumPrediction:
    """Predict the largest batch size whose step fits the capacity, by the law; arguments and errors as above.

    The answer and the next size are both predicted, not extrapolated.
    """
    predictor = _Predictor(case, device, checkpointing, accumulation_steps, world_size, compiled)
    limit = capacity_in_bytes(capacity)
    _whole("minimum", minimum)
    largest = LARGEST_ASKED if maximum is None else _whole("maximum", maximum)
    if largest < minimum:
        raise ValueError(f"maximum is {largest} and minimum {minimum}; give a maximum of at least {minimum}")
    with predictor:
        size = _largest_that_fits(predictor.peak, limit - predictor.overhead, minimum, largest)
        beyond = predictor.peak(size + 1) if minimum <= size < largest else None
        return MaximumPrediction(size, predictor.predict(max(size, minimum), limit), beyond)


def _largest_that_fits(peak: Callable[[int], int], room: int, minimum: int, maximum: int) -> int:
    """The largest size with peak(size) <= room, 0 where the minimum's is more; a secant in a bracket."""
    if peak(minimum) > room:
        return 0
    fits, over = minimum, maximum + 1  # the first fits, the second does not or must not be asked
    guess = min(2 * minimum, maximum)
    points = [minimum]
    while over - fits > 1:
        guess = min(max(guess, fits + 1), over - 1)
        points.append(guess)
        if peak(guess) <= room:
            fits = guess
        else:
            over = guess
        guess = _by_secant(peak, points[-2:], room) or (fits + over) // 2
        if len(points) > 8:  # no line: halve what is left
            guess = (fits + over) // 2
    return fits


def _by_secant(peak: Callable[[int], int], points: list[int], room: int) -> int | None:
    first, second = points
    slope = (peak(second) - peak(first)) / (second - first) if first != second else 0
    if slope <= 0:
        return None
    return int(second + (room - peak(second)) / slope)


class _Predictor:
    """A case on fake tensors, asked at several batch sizes; what was asked before is not run again."""

    def __init__(
        self,
        case: TrainingCase,
        device: Device,
        checkpointing: bool,
        accumulation_steps: int,
        world_size: int,
        compiled: bool,
    ) -> None:
        if not isinstance(case, TrainingCase):
            raise ValueError(f"case is {case!r:.60} ({type(case).__name__}); give a TrainingCase")
        if device not in get_args(Device):
            raise ValueError(f"device is {device!r}; give one of {', '.join(get_args(Device))}")
        self.case = case
        self.device = device
        self.world_size = _whole("world_size", world_size)
        self.compiled = compiled
        self.overhead = CUDA_CONTEXT_BYTES if device == "cuda" else 0
        self._training = FakeTraining(
            case,
            like=device,
            checkpointing=checkpointing,
            accumulation_steps=_whole("accumulation_steps", accumulation_steps),
        )
        self._peaks: dict[int, Peak] = {}
        self._fixed: dict[str, int] = {}

    def __enter__(self) -> _Predictor:
        self._training.__enter__()
        if self.device == "cuda":
            self._fixed[categories.OTHER] = CUBLAS_WORKSPACE_BYTES
        if self.world_size > 1:
            self._fixed[categories.GRADIENTS] = self._training.gradient_bytes()
        return self

    def __exit__(self, *exception: object) -> None:
        self._training.__exit__(*exception)

    def peak(self, batch_size: int) -> int:
        seen = self._step(batch_size)
        return max(seen.passes, seen.update) + sum(self._fixed.values())

    def by_category(self, batch_size: int) -> Mapping[str, int]:
        seen = self._step(batch_size).by_category
        return {name: seen[name] + self._fixed.get(name, 0) for name in categories.CATEGORIES}

    def law(self, batch_sizes: Sequence[int]) -> Law:
        fixed = sum(self._fixed.values())
        steps = {size: self._step(size) for size in batch_sizes}
        return Law.through({size: (step.passes + fixed, step.update + fixed) for size, step in steps.items()})

    def _step(self, batch_size: int) -> Peak:
        if batch_size not in self._peaks:
            self._peaks[batch_size] = self._training.step(batch_size)
        return self._peaks[batch_size]

    def predict(self, batch_size: int, capacity: int | None) -> Prediction:
        return Prediction(
            case=self.case.name,
            batch_size=batch_size,
            peak_bytes=self.peak(batch_size),
            by_category=self.by_category(batch_size),
            error_bar=ERROR_BARS[self._kind()],
            law=self.law((batch_size, 2 * batch_size, 3 * batch_size)),
            device=self.device,
            capacity=capacity,
            overhead_bytes=self.overhead,
            notes=tuple(self._notes()),
        )

    def _kind(self) -> str:
        """What of the program is hardest to predict."""
        from torch.nn.modules.conv import _ConvNd
        from torch.nn.modules.rnn import RNNBase

        if LARGEST_RESULT in self._training.guesses.values():
            return "selection"
        modules = list(self._training.model.modules())
        if any(isinstance(module, RNNBase) for module in modules):
            return "recurrent"
        return "convolution" if any(isinstance(module, _ConvNd) for module in modules) else "other"

    def _notes(self) -> list[str]:
        notes = [
            f"guessed: {answer} at {line}, whose values are not known"
            for line, answer in self._training.guesses.items()
        ]
        if self.compiled:
            notes.append("predicted as eager: torch.compile usually needs less, and is not modelled")
        if self.world_size > 1:
            notes.append(
                f"with DistributedDataParallel's buckets, {self.world_size} ranks: the gradients once more"
            )
        return notes


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number of 1 or more")
    return value
