"""Weights as short names: pieces of each parameter at every step, all of their bits now and then."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any

PER_PARAMETER = 16  # elements in a piece: each is a miss of the cache


class Sample:
    """A piece of each tensor, another one in each of eight steps, as bytes; and whether they are finite."""

    _TURNS = 8

    def __init__(self) -> None:
        self._places: list[int] = []
        self._pieces: dict[int, list[_Pieces]] = {}

    def take(self, tensors: Sequence[Any], step: int) -> tuple[bytes, bool]:
        # A program may put other memory below a parameter; what was there must not be kept alive for long.
        places = [_place(one) for one in tensors]
        if places != self._places:
            self._places, self._pieces = places, {}
        turn = step % self._TURNS
        if (pieces := self._pieces.get(turn)) is None:
            pieces = self._pieces[turn] = _by_kind(tensors, turn / (self._TURNS - 1))
        bits = b"".join([some.read() for some in pieces])
        return bits, all(some.are_finite() for some in pieces)


class _Pieces:
    """Views of one dtype on one device, and the bytes into which they are put together, always the same ones:
    every call of torch that is saved is a hundredth of a millisecond.
    """

    def __init__(self, views: list[Any]) -> None:
        import torch

        first = views[0]
        self._views, self._on_cpu = views, first.device.type == "cpu"
        self._bits = bytearray(sum(one.numel() for one in views) * first.element_size())
        self._whole = torch.frombuffer(self._bits, dtype=first.dtype)
        self._real = torch.view_as_real(self._whole) if self._whole.is_complex() else self._whole
        self._is_float32 = self._real.dtype == torch.float32

    def read(self) -> bytearray:
        import torch

        if self._on_cpu:
            torch.cat(self._views, out=self._whole)
        else:
            self._whole.copy_(torch.cat(self._views))
        return self._bits

    def are_finite(self) -> bool:
        """Of what was read; one sum keeps what is not finite, and in doubles no other one overflows."""
        import torch

        if self._is_float32:  # without another call of torch
            return math.isfinite(sum(memoryview(self._bits).cast("f")))
        return math.isfinite(float(self._real.sum(dtype=torch.float64)))


def _place(tensor: Any) -> int:
    try:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return int(own.data_ptr())
    except RuntimeError:  # sparse
        return 0


def _by_kind(tensors: Sequence[Any], where: float) -> list[_Pieces]:
    """A piece of each, from the begin (0) to the end (1), in an order that is the same in every rank."""
    import torch

    groups: dict[Any, list[Any]] = {}
    for one in map(_local, tensors):
        if one.layout == torch.strided and one.numel():
            line = flat(one)
            if line.data_ptr() != one.data_ptr():  # a copy, which would not change with the weights
                line = _row(one, where)
            start = round(where * max(0, line.shape[0] - PER_PARAMETER))
            groups.setdefault((one.dtype, one.device), []).append(line[start : start + PER_PARAMETER])
    return [_Pieces(views) for views in groups.values()]


def _row(tensor: Any, where: float) -> Any:
    """A view on one row of it."""
    while tensor.dim() > 1:
        tensor = tensor[round(where * (tensor.shape[0] - 1))]
    return tensor


def flat(tensor: Any) -> Any:
    """Its elements in one dimension, in the order of memory; a view where they are dense."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if reach == tensor.numel():  # dense in another order, such as channels last
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def norms(tensors: list[Any]) -> list[float]:
    """The norm of each, in one transfer; NaN or infinite where it holds such a value."""
    import torch

    plain = [_local(one) for one in tensors]
    dense = [one for one in plain if one.layout == torch.strided and one.numel()]
    found = torch._foreach_norm(dense) if dense else []
    rest = [one.to_dense().norm() for one in plain if one.layout != torch.strided]
    by_device: dict[Any, list[Any]] = {}
    for one in [*found, *rest]:
        by_device.setdefault(one.device, []).append(one.double())
    return [value for those in by_device.values() for value in torch.stack(those).tolist()]


def _local(tensor: Any) -> Any:
    own = tensor.detach()
    return own.to_local() if hasattr(own, "to_local") else own


def weights(parameters: list[Any]) -> tuple[str, bool]:
    """A digest of all elements, the same on ranks whose bits are the same; and whether all are finite."""
    values = norms(parameters)
    sums = _sums([_local(one) for one in parameters])
    packed = struct.pack(f"{len(values)}d{len(sums)}q", *values, *sums)
    return hashlib.blake2b(packed, digest_size=12).hexdigest(), all(map(math.isfinite, values))


def _sums(tensors: list[Any]) -> list[int]:
    """Of each one's bits read as whole numbers: a norm's rounding hides what moved by little."""
    import torch

    found = []
    for one in tensors:
        if one.layout == torch.strided and one.numel() and one.is_contiguous():
            bits = one.view(-1).view(torch.uint8)
            whole = bits[: bits.numel() // 8 * 8]
            found.append(whole.view(torch.int64).sum() if whole.data_ptr() % 8 == 0 else bits.sum())
    by_device: dict[Any, list[Any]] = {}
    for one in found:
        by_device.setdefault(one.device, []).append(one)
    return [value for those in by_device.values() for value in torch.stack(those).tolist()]
