"""What a model answers to a case's loss: its outputs, caught at the model itself, and the loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.tensor_parallel.golden_model import asking


@dataclass
class Answer:
    """outputs: by call of the model, path and tensor of its main output. by: which module's they are. kinds:
    the floating types of what its modules gave.
    """

    loss: Any
    outputs: list[tuple[str, Any]] = field(default_factory=list)
    by: str = ""
    kinds: frozenset[torch.dtype] = frozenset()


def ask(case: TrainingCase, model: nn.Module, batch: Any, seed: int, *, gradients: bool = False) -> Answer:
    """The case's loss on a copy of the batch, and what the model returned on the way; or backward as well."""
    seen: list[Any] = []
    last: list[tuple[str, Any]] = []
    kinds: set[torch.dtype] = set()
    handles = [model.register_forward_hook(lambda module, args, output: seen.append(output))]
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(_Last(name, last, kinds)))
    try:
        with asking(seed), torch.set_grad_enabled(gradients):
            loss = case.loss(model, pytree.map_tensors(torch.clone, batch))
            if gradients:
                with _as_the_loss_was(seen):
                    loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    # A loss that calls the parts of a model, or model.forward itself: the last part that answered, then.
    by = "" if seen or not last else last[-1][0]
    outputs = [main_output(output) for output in (seen or [output for _, output in last[-1:]])]
    return Answer(loss, [one for one in outputs if one is not None], by, frozenset(kinds))


def _as_the_loss_was(outputs: list[Any]) -> AbstractContextManager[None]:
    """Backward of a loss over a sharded vocabulary needs what its forward had: torch's loss_parallel."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import loss_parallel

    main = [found[1] for output in outputs if (found := main_output(output))]
    sharded = any(
        isinstance(one, DTensor) and any(p.is_shard(one.dim() - 1) for p in one.placements) for one in main
    )
    enabled = torch.ops.aten._log_softmax.default in DTensor._op_dispatcher._custom_op_handlers
    context: AbstractContextManager[None] = loss_parallel() if sharded and not enabled else nullcontext()
    return context


class _Last:
    """Keeps the latest output of any module and its name, and the types of all."""

    def __init__(self, name: str, last: list[tuple[str, Any]], kinds: set[torch.dtype]) -> None:
        self.name, self.last, self.kinds = name, last, kinds

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.last[:] = [(self.name, output)]
        first = output[0] if isinstance(output, tuple) and output else output
        if _is_floating(first):
            self.kinds.add(first.dtype)


def main_output(output: Any) -> tuple[str, Any] | None:
    """Logits where something has that name, else the first floating-point tensor that is no scalar."""
    found = [(path, leaf) for path, leaf in pytree.leaves(output) if _is_floating(leaf)]
    if not found:
        return None
    named = [(path, leaf) for path, leaf in found if "logits" in path]
    large = [(path, leaf) for path, leaf in found if leaf.numel() > 1 and "loss" not in path]
    path, leaf = (named or large or found)[0]
    return ("logits" if named or not path else f"output {path}"), leaf.detach()


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
