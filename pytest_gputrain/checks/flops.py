"""How many floating-point operations a step needs, and of which type: counted as torch runs it.

Products and attention only, as for MFU; a multiplication and an addition are two. What a compiled graph or a
kernel of the user's own does is not seen, so count an eager step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """number: of all products; dtype: of most of them, ``tf32`` for float32 on tensor cores."""

    number: int
    dtype: str


def count_flops(run: Callable[[], object]) -> Flops | None:
    """Run it once and count; None where it made no product that torch can count."""
    types = _Types()
    with FlopCounterMode(display=False) as counter, types:
        run()
    number = counter.get_total_flops()
    if not number or not types.seen:
        return None
    return Flops(number, _name(types.seen.most_common(1)[0][0]))


class _Types(TorchDispatchMode):
    """Types of the first operand of each product, by its elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if ("mm" in name or "conv" in name or "attention" in name) and torch.is_tensor(args[0]):
            self.seen[args[0].dtype] += args[0].numel()
        return func(*args, **(kwargs or {}))


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    on_tensor_cores = (
        torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    )
    return "tf32" if name == "float32" and on_tensor_cores else name
