"""The storages that hold a tensor's data, whatever kind of tensor it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def storages_of(tensor: torch.Tensor) -> Sequence[torch.UntypedStorage]:
    """The storages under a tensor: one, or those of its parts (sparse tensors, subclasses such as DTensor).

    Those of fake and meta tensors are on no real device; opaque (MKL-DNN) tensors show none.
    """
    if tensor.layout is torch.strided and type(tensor) in _PLAIN:
        return (tensor.untyped_storage(),)
    if (parts := _parts(tensor)) is None:
        return (tensor.untyped_storage(),)
    return [storage for part in parts for storage in storages_of(part)]


def _parts(tensor: Any) -> list[torch.Tensor] | None:
    """The tensors that a tensor is made of; None: it is plain."""
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        attributes = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [value for value in attributes if isinstance(value, torch.Tensor)]  # DTensor lists its mesh
    if tensor.layout is torch.strided:
        return None
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _COMPRESSED_ROWS:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in _COMPRESSED_COLUMNS:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
