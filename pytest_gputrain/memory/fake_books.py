"""The books of a step on fake tensors: what every operation makes, in an allocator's blocks."""

from __future__ import annotations

from typing import Any

import torch

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.fake_seam import DispatchMode
from pytest_gputrain.memory.fake_values import Values
from pytest_gputrain.memory.ledger import Ledger, Record
from pytest_gputrain.memory.owners import Owners

# The sum of gradients, and the gradients of x[indices], gather, max, index_select, masked_select and take.
_IN_PLACE_IN_BACKWARD = ("add", "index_put", "scatter_add", "scatter", "index_add", "masked_scatter", "put")


class Blocks(Ledger):
    """Books of an allocator that hands out multiples of ``granularity`` bytes."""

    def __init__(self, granularity: int) -> None:
        super().__init__()
        self._granularity = granularity

    def charge(self, storage: Any, tensor: Any, category: str, op: Any = None) -> Record:
        record = super().charge(storage, tensor, category, op)
        self.resize(record, record.num_bytes)
        return record

    def resize(self, record: Record, num_bytes: int) -> None:
        super().resize(record, -(-num_bytes // self._granularity) * self._granularity)


class FakeAccounting(DispatchMode):  # type: ignore[misc]
    """Charges every storage that an operation makes."""

    def __init__(self, ledger: Ledger, values: Values) -> None:
        super().__init__()
        self.ledger = ledger
        self.values = values
        self.owners = Owners(self.mark)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.values.run(func, args, kwargs or {})
        self._charge(out, categories.OTHER if self.owners.stepping else categories.ACTIVATIONS)
        if not _is_in_place_for_real(func):
            self.ledger.settle()
        return out

    def mark(self, tensor: Any, category: str) -> None:
        """What is in the books, or not yet, is for this from now on."""
        self._record(tensor, category).category = category

    def _charge(self, tree: Any, category: str) -> None:
        for one in tree if isinstance(tree, tuple | list) else (tree,):
            if isinstance(one, torch.Tensor):
                self._record(one, category)
            elif isinstance(one, tuple | list):
                self._charge(one, category)

    def _record(self, tensor: Any, category: str) -> Record:
        storage = tensor.untyped_storage()
        record = self.ledger.records.get(storage._cdata)
        if record is None:
            return self.ledger.charge(storage, tensor, category)
        if record.num_bytes < storage.nbytes():
            self.ledger.resize(record, storage.nbytes())
        return record


def _is_in_place_for_real(func: Any) -> bool:
    """Whether autograd, in backward, writes this operation's result into its first operand.

    It asks whether a tensor is of a subclass (``isTensorSubclassLike`` in torch/csrc/autograd), fake ones
    are, and then makes a new one; the operand is freed before the next operation.
    """
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    return in_backward and func.__name__.split(".")[0] in _IN_PLACE_IN_BACKWARD
