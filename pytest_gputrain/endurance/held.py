"""What memory that grew is made of, as a rank finds at the end of its run. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """Added within the last ``steps`` steps: live tensors, their bytes, nodes of autograd graphs.

    freed_bytes, freed_objects: what Python's collector freed at the end, so that it had only waited for it.
    collects: whether the collector is on. holder: the variable that holds what was added, in words, "" where
    none is known. container: of a list, dict, set or deque that grew, whatever it holds.
    """

    steps: int
    tensors: int
    tensor_bytes: int
    graph_nodes: int
    freed_bytes: int = 0
    freed_objects: int = 0
    collects: bool = True
    holder: str = ""
    container: str = ""
