"""A case's own training step on fake tensors: its model, optimizer, batch and loss, and their memory.

Everything is built fresh and forgotten at the end. The first step makes the optimizer's state, so only from
the second on does a step need what training needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.memory import as_cuda, categories
from pytest_gputrain.memory.fake_books import Blocks, FakeAccounting
from pytest_gputrain.memory.fake_manners import FakeManners
from pytest_gputrain.memory.fake_model import as_if_wrapped, make_fake
from pytest_gputrain.memory.fake_seam import as_fake, conversions, fake_mode, is_fake
from pytest_gputrain.memory.fake_values import Unanswerable, Values
from pytest_gputrain.memory.lines import location, raising_lines
from pytest_gputrain.memory.no_trace import leaving_no_trace
from pytest_gputrain.trace.optimizers import optimizers_in

# A batch is drawn for real where it is small enough: its values then answer what the program asks of it.
MOST_REAL_BATCH = 64 * 2**20  # bytes


class PredictionError(ValueError):
    """A case that cannot be run on fake tensors; the text says at which operation and line."""


@dataclass(frozen=True)
class Peak:
    """What one step needs at most, in bytes, and what for.

    passes: outside of the optimizer's step, which grows with the batch; update: within it, which does not.
    """

    by_category: Mapping[str, int]
    passes: int
    update: int


class FakeTraining:
    """A case, built on fake tensors. Use as a context manager; ``step(n)`` is one step at batch size n.

    like: "cuda" keeps in memory what CUDA would, "cpu" what the CPU does.
    """

    def __init__(
        self,
        case: TrainingCase,
        *,
        like: str = "cuda",
        checkpointing: bool = False,
        accumulation_steps: int = 1,
        seed: int = 0,
    ) -> None:
        self.case = case
        self.like = like
        self.checkpointing = checkpointing
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self.num_steps = 0
        self._peaks: dict[str, tuple[int, dict[str, int]]] = {}
        self.model: Any = None
        self.optimizer: Any = None
        self._doing = "building the model"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FakeTraining:
        self._mode = fake_mode()
        self.values = Values(self._mode)
        self.ledger = Blocks(as_cuda.GRANULARITY if self.like == "cuda" else 1)
        self._manners = FakeManners(self.values)
        self._accounting = FakeAccounting(self.ledger, self.values)
        with self._stack:
            self._remembered = self._stack.enter_context(leaving_no_trace(vars(self.case).values()))
            if self.like == "cuda":
                self._stack.enter_context(as_cuda.as_cuda())
            with self._running(), self._reporting():
                self._build()
            self.values.guesses.clear()  # of weights: no amount of memory hangs on them
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.model = self.optimizer = None
        self._stack.close()

    @property
    def guesses(self) -> Mapping[str, str]:
        """Line -> how a question about unknown values was answered there."""
        return self.values.guesses

    def gradient_bytes(self) -> int:
        """What the gradients of all trainable parameters need."""
        return sum(one.numel() * one.element_size() for one in self.model.parameters() if one.requires_grad)

    def sequence_length(self) -> int | None:
        """Tokens of a sample: the longest second dimension of integers of shape (batch, tokens)."""
        with self._reporting():
            self._doing = "drawing a batch of 2"
            tensors = pytree.tensors(self._draw(2))
        return max(
            (one.shape[1] for one in tensors if one.dim() == 2 and not one.is_floating_point()), default=None
        )

    def step(self, batch_size: int) -> Peak:
        """Two steps the first time, one from then on. Raises PredictionError naming operation and line."""
        with self._reporting():
            if not self.num_steps:
                self._step(batch_size)
            return self._step(batch_size)

    def _build(self) -> None:
        model = self.case.model()
        if not isinstance(model, torch.nn.Module):
            raise PredictionError(
                f"case {self.case.name!r}: model() returned a {type(model).__name__}; "
                "it has to return a torch.nn.Module"
            )
        if not all(is_fake(parameter) for parameter in model.parameters()):
            self._remembered.add([model])  # it may be somebody's own
        make_fake(self._mode, model)
        model = model if model.training else model.train()
        if self.checkpointing:
            if self.case.set_checkpointing is None:
                raise PredictionError(
                    f"case {self.case.name!r} has no set_checkpointing; give one, "
                    "or predict without checkpointing"
                )
            self.case.set_checkpointing(model, None)
        self.model = as_if_wrapped(model)
        self._accounting.owners.adopt(self.model)
        self._doing = "building the optimizer"
        self.optimizer = self.case.optimizer(self.model)
        if self.like == "cuda":
            for optimizer in optimizers_in(self.optimizer):
                as_cuda.use_cuda_defaults(optimizer)
        self._stack.enter_context(self._accounting.owners)
        self._watch()

    def _watch(self) -> None:
        """The optimizer's step is told apart from the passes before and after it."""
        from torch.optim import optimizer as hooks

        pre = hooks.register_optimizer_step_pre_hook(lambda *_: self._turn("passes"))
        self._stack.callback(pre.remove)
        post = hooks.register_optimizer_step_post_hook(lambda *_: self._turn("update"))
        self._stack.callback(post.remove)

    def _turn(self, ended: str) -> None:
        """A part of the step has ended."""
        if self.ledger.peak > self._peaks.get(ended, (0, {}))[0]:
            self._peaks[ended] = (self.ledger.peak, self.ledger.by_category_at_peak())
        self.ledger.reset_peak()

    def _step(self, batch_size: int) -> Peak:
        self._doing = f"drawing a batch of {batch_size}"
        batches = [self._draw(batch_size) for _ in range(self.accumulation_steps)]
        self._doing = "the training step"
        self._peaks.clear()
        for tensor in pytree.tensors(batches):
            self._accounting.mark(tensor, categories.OTHER)
        self.ledger.reset_peak()
        with self._running():
            self.case.step(self.model, self.optimizer, batches)
        self._turn("passes")
        self.num_steps += 1
        passes, update = self._peaks["passes"], self._peaks.get("update", (0, {}))
        return Peak(max(passes, update, key=lambda peak: peak[0])[1], passes[0], update[0])

    def _draw(self, batch_size: int) -> Any:
        torch.manual_seed(self.seed)
        if self._is_small(batch_size):
            with self._manners:
                real = self.case.batch(batch_size, torch.device("cpu"))
            return pytree.map_tensors(self._with_values, real)
        with self._running():
            return pytree.map_tensors(self._as_fake, self.case.batch(batch_size, torch.device("cpu")))

    def _is_small(self, batch_size: int) -> bool:
        """Whether drawing for real is cheap: seen on a batch of one."""
        with self._running():
            one = pytree.tensors(self.case.batch(1, torch.device("cpu")))
        num_bytes: int = sum(tensor.untyped_storage().nbytes() for tensor in one)
        return num_bytes * batch_size <= MOST_REAL_BATCH

    def _with_values(self, real: Any) -> Any:
        fake = self._as_fake(real)
        self.values.know(fake, real.clone())  # a step may write into it
        return fake

    def _as_fake(self, tensor: Any) -> Any:
        return tensor if is_fake(tensor) else as_fake(self._mode, tensor)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with conversions(self._mode), self._mode, self._accounting, self._manners:
            yield

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (PredictionError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> PredictionError:
        said = str(error).strip().splitlines() or [""]
        what = (
            f"{error} depends on values"
            if isinstance(error, Unanswerable)
            else f"{type(error).__name__}: {said[0]}"
        )
        where = location(raising_lines(error.__traceback__))
        return PredictionError(
            f"case {self.case.name!r} cannot be predicted: {self._doing} on fake tensors ended with {what}"
            f"{f' at {where}' if where else ''}; measure it instead (find-batch without --capacity)"
        )
