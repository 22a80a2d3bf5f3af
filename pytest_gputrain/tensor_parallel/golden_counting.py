"""Collectives of one step by the module that runs, in the plan's groups and in others; and what the plan
predicts of them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gputrain.tensor_parallel.golden_pending import Pending
from pytest_gputrain.tensor_parallel.golden_prediction import Call, Predicted, predict
from pytest_gputrain.tensor_parallel.golden_styles import Applied
from pytest_gputrain.trace.names import canonical_name

Ranks = frozenset[int]
_NONE = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


@dataclass
class Made:
    """Of one module in one step: kinds of collectives, and what the plan predicts of them.

    unknown: a style that is not known, or a forward that runs again in backward (checkpointing): no
    prediction then. may: how many more the plan's backward may make. elsewhere: those of groups that are not
    the plan's, such as data parallel's on the other dimension of a mesh; none of them is in the others.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    planned_forward: Counter[str] = field(default_factory=Counter)
    planned_backward: Counter[str] = field(default_factory=Counter)
    may: int = 0
    unknown: bool = False
    elsewhere: int = 0

    def add(self, other: Made) -> None:
        self.forward += other.forward
        self.backward += other.backward
        self.planned_forward += other.planned_forward
        self.planned_backward += other.planned_backward
        self.may += other.may
        self.unknown |= other.unknown
        self.elsewhere += other.elsewhere


class Counting(TorchDispatchMode):
    """Counts collectives by the module that runs, forward, or whose output's gradient came last, backward.

    Not torch's CommDebugMode, which a module that is called twice in one forward (a dropout) breaks.
    pending: which of them are read before they are waited for.
    """

    def __init__(self, model: nn.Module, applied: list[Applied]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[str, Made] = {}
        self.pending = Pending()
        self._applied: dict[int, list[Applied]] = {}
        self._groups = {members(one.mesh.get_group()) for one in applied}
        self._members: dict[str, Ranks] = {}
        for one in applied:
            self._applied.setdefault(id(one.module), []).append(one)
        self._stack: list[str] = [""]
        self._calls: list[Call | None] = []
        self._called: set[int] = set()
        self._outputs: dict[int, tuple[Any, str]] = {}
        self._behind: str | None = None
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            own = canonical_name(name)
            # Around a plan's own hooks, which communicate: before the first and behind the last of them.
            self._handles += [
                module.register_forward_pre_hook(partial(self._enter, own), prepend=True, with_kwargs=True),
                module.register_forward_hook(partial(self._computed, own), prepend=True),
                module.register_forward_hook(partial(self._leave, own)),
            ]

    def of(self, name: str) -> Made:
        return self.made.setdefault(name, Made())

    def _enter(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        self._stack.append(name)
        self._called.add(id(module))
        styles = self._applied.get(id(module))
        if styles and self._behind is not None:
            self.of(name).unknown = True
        columns = any(isinstance(a.style, _COLUMNS) for m in module.children() for a in self._at(m))
        self._calls.append(Call(module, args, kwargs, None, columns) if styles else None)

    def _at(self, module: Any) -> list[Applied]:
        return self._applied.get(id(module), [])

    def _computed(self, name: str, module: Any, args: Any, output: Any) -> None:
        call = self._calls[-1] if self._calls else None
        if call is not None:
            self._calls[-1] = Call(module, call.args, call.kwargs, output, call.has_columns)

    def _leave(self, name: str, module: Any, args: Any, output: Any) -> None:
        del self._stack[-1:]
        call = self._calls.pop() if self._calls else None
        backward: list[Predicted] = []
        if call is not None:
            backward = self._predict(name, call)
        # Of tuples only where something is predicted: a cache of keys is an output of every module above.
        outputs = output if isinstance(output, tuple) and backward else (output,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                # The innermost module's, where the ones around it hand the same tensor on.
                known = self._outputs.get(id(tensor))
                owner = name if known is None or known[0]() is not tensor else known[1]
                self._outputs[id(tensor)] = weakref.ref(tensor), owner
                tensor.register_hook(partial(self._backward, owner, name, backward))

    def _predict(self, name: str, call: Call) -> list[Predicted]:
        """Adds what is made forward; returns what is made backward, once a gradient comes."""
        made = self.of(name)
        found = [predict(one.style, call) for one in self._at(call.module) if one.mesh.size() > 1]
        made.unknown |= any(one is None for one in found)
        known = [one for one in found if one is not None]
        made.planned_forward.update(kind for one in known for kind in one.forward)
        return known

    def _backward(self, owner: str, name: str, predicted: list[Predicted], gradient: Any) -> None:
        self._behind = owner
        made = self.of(name)
        for one in predicted:
            made.planned_backward.update(one.backward)
            made.may += one.may
        predicted.clear()

    def passed_by(self, model: nn.Module) -> list[str]:
        """Modules with a style and a gradient, and no call: somebody else reads their weights."""
        return [
            canonical_name(name)
            for name, module in model.named_modules()
            if self._at(module)
            and id(module) not in self._called
            and any(p.grad is not None for p in module.parameters(recurse=False))
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _is_the_plans(self, args: tuple[Any, ...]) -> bool:
        """Whether these ranks are those of a style's mesh: by whichever name their group goes."""
        if not self._groups:
            return True
        ranks = next((found for arg in reversed(args) if (found := self._ranks_of(arg))), None)
        return ranks is None or ranks in self._groups

    def _ranks_of(self, arg: Any) -> Ranks | None:
        """Of the group that an operator is given, by name (functional collectives) or as itself (c10d)."""
        from torch.distributed import distributed_c10d as c10d

        if isinstance(arg, str):
            if arg not in self._members:
                try:
                    self._members[arg] = members(c10d._resolve_process_group(arg))  # type: ignore[attr-defined, arg-type]
                except (RuntimeError, ValueError, KeyError):  # the name of a reduction
                    return None
            return self._members[arg]
        if isinstance(arg, torch.ScriptObject):
            try:
                return members(c10d.ProcessGroup.unbox(arg))
            except (RuntimeError, AttributeError):  # a reduction; or a torch that has no unbox
                return None
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it is made of
        if not is_collective(func):
            self.pending.reads(func, args, kwargs)
        else:
            made = self.of(self._behind or self._stack[-1])
            if self._is_the_plans((*args, *(kwargs or {}).values())):
                (made.forward if self._behind is None else made.backward)[_kind(func)] += 1
            else:
                made.elsewhere += 1
        result = func(*args, **(kwargs or {}))
        if is_collective(func):
            self.pending.started(_kind(func), self._behind or self._stack[-1], args, result)
        return result


def _columns() -> tuple[type[Any], ...]:
    from torch.distributed.tensor.parallel import ColwiseParallel

    return (ColwiseParallel,)


_COLUMNS = _columns()


def is_collective(operator: Any) -> bool:
    namespace, _, name = operator.name().partition("::")
    return namespace in ("c10d", "_c10d_functional", "_dtensor") and name.partition(".")[0] not in _NONE


def _kind(operator: Any) -> str:
    """all_reduce of c10d's ``allreduce_`` and of ``_c10d_functional``'s ``all_reduce_coalesced``."""
    name: str = operator.name().partition("::")[2]
    plain = name.replace("_", "").lower()
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        if kind.replace("_", "") in plain:
            return kind
    return name


def members(group: Any) -> Ranks:
    """The ranks of a process group, as the default group numbers them."""
    import torch.distributed as dist

    return frozenset(dist.get_process_group_ranks(group))
