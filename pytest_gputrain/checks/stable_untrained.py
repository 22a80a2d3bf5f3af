"""What no step trains, compared between ranks: frozen parameters every few steps, buffers at the end.

A frozen parameter has to be the same on every rank. A buffer need not be: BatchNorm's statistics follow a
rank's own batches, and DistributedDataParallel replaces them by rank 0's at the next forward only. But one
that differs and that no step changes makes ranks compute with different constants. Not looked at: tensors
of a subclass, which hold shards or quantised weights; and, where ranks hold parts of the weights, all of it
but buffers under FSDP2 in one dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pytest_gputrain.checks.peers import Peers
from pytest_gputrain.checks.stable_watch import ALL_EVERY, sampled
from pytest_gputrain.checks.stable_weights import flat
from pytest_gputrain.checks.stable_words import constants_differ, frozen_differ, statistics_differ
from pytest_gputrain.endurance.findings import Finding

_PIECES = 64  # elements of each tensor that are read as they are: a sum is blind to their order


class Untrained:
    """Of one rank's ``run``. frozen: by name, what every rank has to hold the same."""

    def __init__(self, run: Any) -> None:
        self._peers: Peers = run.peers
        self._module = run.wrapped
        self._ignored = frozenset(getattr(run.model, "_ddp_params_and_buffers_to_ignore", ()))
        self._looks = not run.sharded or _is_data_parallel(run.wrapped)
        trained = {id(one) for one in run.trained}
        self.frozen: dict[str, Any] = {}
        if not run.sharded:
            self.frozen = self._plain({n: p for n, p in run.parameters.items() if id(p) not in trained})
        self._first: dict[str, str] = {}

    def begin(self) -> Finding | None:
        """A collective, before the first step: frozen parameters that differ already."""
        buffers = self._buffers()
        if not self._peers.all_equal([*self.frozen, "", *buffers]):  # ranks that hold different modules
            self.frozen.clear()
            return None
        self._first = fingerprints(buffers)
        return self.compare(0)

    def added_to(self, digest: str, step: int) -> str:
        """The digest of what is trained with that of what is frozen in it, every few steps."""
        if not self.frozen or step % ALL_EVERY:
            return digest
        text = " ".join([digest, *fingerprints(self.frozen).values()])
        return sampled(digest) + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def compare(self, step: int) -> Finding | None:
        """A collective, after a step: frozen parameters that differ."""
        differing = self._differing(fingerprints(self.frozen))
        return frozen_differ(step, differing, self.frozen) if differing else None

    def end(self, steps: int) -> tuple[Finding | None, list[str]]:
        """A collective, after the last step: frozen parameters or constants that differ, and notes."""
        if (found := self.compare(steps)) is not None:
            return found, []
        buffers = self._buffers()
        if self._peers.any_rank([*buffers] != [*self._first]):
            return None, []
        now = fingerprints(buffers)
        differing = self._differing(now)
        moved = self._peers.flagged([now[name] != self._first[name] for name in differing])
        moved_on = dict(zip(differing, moved, strict=True))
        constants = {n: differing[n] for n, ranks in moved_on.items() if not ranks and _counts(buffers[n])}
        kept = _kept_statistics(self._module)
        statistics = {n: ranks for n, ranks in moved_on.items() if ranks and n in kept}
        finding = constants_differ(steps, constants) if constants else None
        return finding, statistics_differ(statistics, self._peers.world_size)

    def _differing(self, prints: Mapping[str, str]) -> dict[str, list[int]]:
        """A collective: by name, the ranks that hold something else than rank 0."""
        ranks = self._peers.deviating(list(prints.values()))
        return {name: those for name, those in zip(prints, ranks, strict=True) if those}

    def _buffers(self) -> dict[str, Any]:
        return self._plain(dict(self._module.named_buffers())) if self._looks else {}

    def _plain(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Those whose elements can be read, and that the program has not declared a rank's own."""
        found = {name.removeprefix("module."): one for name, one in named.items()}
        return {name: one for name, one in found.items() if name not in self._ignored and _is_plain(one)}


def _is_data_parallel(module: Any) -> bool:
    """Whether the parameters of this module are shards that FSDP2 puts together before they are used."""
    from torch.distributed.fsdp import FSDPModule

    meshes = [one.device_mesh for one in module.parameters() if hasattr(one, "device_mesh")]
    return isinstance(module, FSDPModule) and all(mesh.ndim == 1 for mesh in meshes)


def _is_plain(tensor: Any) -> bool:
    import torch

    return (
        type(tensor.data) is torch.Tensor
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
    )


def _counts(buffer: Any) -> bool:
    """Whether ranks compute with it: a rank's number or a switch may well be another on each."""
    return bool(buffer.numel() > 1 and (buffer.is_floating_point() or buffer.is_complex()))


def _kept_statistics(module: Any) -> set[str]:
    """Floating buffers that the checkpoint takes, but those of normalisation, known to differ."""
    from torch.nn.modules.batchnorm import _NormBase

    found = set()
    for prefix, one in module.named_modules():
        if not isinstance(one, _NormBase):
            own = one.named_buffers(prefix, recurse=False)
            saved = one.state_dict(keep_vars=True) if one._buffers else {}
            found |= {n for n, buffer in own if buffer.is_floating_point() and n.rpartition(".")[2] in saved}
    return {name.removeprefix("module.") for name in found}


def fingerprints(tensors: Mapping[str, Any]) -> dict[str, str]:
    """By name, of the bits of each tensor; one transfer a device."""
    import torch

    by_device: dict[Any, list[str]] = {}
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            parts[name] = _part(flat(tensor.detach()))
            by_device.setdefault(tensor.device, []).append(name)
    found = dict.fromkeys(tensors, "")
    for names in by_device.values():
        lengths = [parts[name].numel() for name in names]
        together = torch.cat([parts[name] for name in names]).cpu()
        for name, part in zip(names, together.split(lengths), strict=True):
            found[name] = hashlib.blake2b(part.numpy().tobytes(), digest_size=8).hexdigest()
    return found


def _part(tensor: Any) -> Any:
    """Of a line of elements, as bytes: the sum of its bits read as whole numbers, and some elements."""
    import torch

    tensor = tensor.contiguous()
    if tensor.data_ptr() % 8:  # a view within other memory, which can only be read by bytes
        tensor = tensor.clone()
    bits = tensor.view(torch.uint8)
    total = bits[: bits.numel() // 8 * 8].view(torch.int64).sum()
    pieces = tensor[:: max(1, tensor.numel() // _PIECES)].contiguous()
    tail = bits[-8:]
    return torch.cat([total.reshape(1).view(torch.uint8), pieces.view(torch.uint8), tail])
