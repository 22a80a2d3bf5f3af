"""Short names for the exact bits of tensors, so that ranks can compare without sending them."""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

_DIGEST_BYTES = 12  # 2**-48 for a collision among all tensors of a run; the texts stay short


def whole(tensor: Any) -> Any:
    """A detached plain tensor: a sharded one (DTensor) is gathered, a collective, a sparse one filled."""
    import torch

    tensor = tensor.detach()
    plain = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return plain if plain.layout == torch.strided else plain.to_dense()


def tensor_digest(tensor: Any) -> str:
    """Digest of shape, dtype and bits; ``"none"`` for None."""
    if tensor is None:
        return "none"
    plain = whole(tensor)
    state = hashlib.blake2b(f"{plain.dtype}{tuple(plain.shape)}".encode(), digest_size=_DIGEST_BYTES)
    state.update(bits(plain))
    return state.hexdigest()


def bits(tensor: Any) -> bytes:
    """The elements of a plain tensor in order, from wherever it is."""
    plain = tensor.cpu().contiguous().resolve_conj().resolve_neg()
    # Not .numpy(): it knows no bfloat16, and torch works without numpy.
    return ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size())


def is_finite(tensor: Any) -> bool:
    """Neither NaN nor infinite anywhere; None and integers are finite."""
    import torch

    return tensor is None or bool(torch.isfinite(whole(tensor)).all())


def value_digest(value: Any) -> str:
    """Digest of any leaf of a batch: tensors and arrays by their bits, the rest by its text."""
    if hasattr(value, "data_ptr"):
        return tensor_digest(value)
    content = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
