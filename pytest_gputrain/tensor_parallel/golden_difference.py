"""How far two tensors are apart, where, and what apart may mean in their precision."""

from __future__ import annotations

from typing import Any

import torch

from pytest_gputrain.tensor_parallel.records import Difference

SHORT = (torch.bfloat16, torch.float16)
# Absolute, and relative to the element. Ranks add partial sums in another order than one process does, so
# equal bits cannot be asked for; a missing or doubled reduction is larger by orders of magnitude.
OUTPUT_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
# Absolute, and relative to the loss.
LOSS_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Norm of the difference over the gradient's norm.
GRADIENT_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}
# A gradient below this, in units of rounding of the whole gradient, is rounding itself.
NEGLIGIBLE = 16.0


def kind_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tolerance(table: dict[str, float], dtype: torch.dtype) -> float:
    """Of a precision; that of float32 for one that is in no table."""
    return table.get(kind_of(dtype), table["float32"])


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real if real.dtype == torch.float64 else real.float()


def norm(tensor: torch.Tensor) -> float:
    """Euclidean, added up in float64."""
    return float(torch.linalg.vector_norm(_comparable(tensor), dtype=torch.float64))


def difference(golden: torch.Tensor, parallel: torch.Tensor, rank: int = 0) -> Difference:
    """Shapes have to agree. An element that is NaN or infinite on one side only is infinitely far off."""
    assert golden.shape == parallel.shape, (golden.shape, parallel.shape)
    if not golden.numel():
        return Difference(0.0, (), 0.0, 0.0, 0.0, rank)
    wanted, got = _comparable(golden), _comparable(parallel).to(golden.device)
    delta = (got - wanted).abs()
    # Equal infinities subtract to NaN, as do NaNs, which are then equal if they are in the same places.
    unknown = torch.isnan(delta)
    if bool(unknown.any()):
        same = (wanted == got) | (torch.isnan(wanted) & torch.isnan(got))
        delta = torch.where(unknown, torch.where(same, 0.0, torch.inf), delta)
    flat = int(delta.argmax())
    size, apart = norm(wanted), norm(delta)
    relative = apart / size if size else (0.0 if apart == 0.0 else float("inf"))
    return Difference(
        largest=float(delta.flatten()[flat]),
        index=tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), delta.shape)),
        golden=float(wanted.flatten()[flat]),
        parallel=float(got.flatten()[flat]),
        relative=relative if relative == relative else float("inf"),
        rank=rank,
    )


def excess(golden: torch.Tensor, parallel: torch.Tensor, relative: float) -> float:
    """The largest |difference| - relative x |golden| of an element: wrong above the absolute tolerance."""
    if not golden.numel():
        return 0.0
    wanted, got = _comparable(golden), _comparable(parallel).to(golden.device)
    beyond = (got - wanted).abs() - relative * wanted.abs()
    beyond = torch.where((wanted == got) | (torch.isnan(wanted) & torch.isnan(got)), 0.0, beyond)
    return float(torch.nan_to_num(beyond, nan=torch.inf).max())


def nonfinite(tensor: torch.Tensor) -> int:
    """How many elements are NaN or infinite."""
    return int((~torch.isfinite(tensor)).sum())


def worst(differences: list[Any]) -> Any:
    """The one with the largest relative error."""
    return max(differences, key=lambda one: (one.relative, one.largest))
