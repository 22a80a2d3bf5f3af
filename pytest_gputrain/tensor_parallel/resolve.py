"""A plan's names made out: wildcards to modules, transformers' words to styles."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any


def resolve(modules: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Module name -> style, wildcards spelled out; a later entry wins. Raises ValueError for a name not
    there.
    """
    if not plan:
        raise ValueError(
            "the tensor-parallel plan is empty; give module name -> style, or use tp_plan_for(model)"
        )
    resolved: dict[str, Any] = {}
    for pattern, style in plan.items():
        if not isinstance(pattern, str):
            raise ValueError(f"the plan has the key {pattern!r}; legal is a module's name as text")
        found = list(_matching(modules, pattern))
        if not found:
            raise ValueError(_not_there(modules, pattern))
        resolved.update(dict.fromkeys(found, _by_name(pattern, style) if isinstance(style, str) else style))
    return resolved


def _by_name(pattern: str, name: str) -> Any:
    """The style that transformers' own plans (``model.tp_plan``) give by this name."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from pytest_gputrain.tensor_parallel.styles import Replicated

    legal = {
        "colwise": ColwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "rowwise": RowwiseParallel(),
        "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
        "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
        "replicated_with_grad_allreduce": Replicated(summed=True),
    }
    if name not in legal:
        raise ValueError(
            f"the plan gives {pattern!r} the style {name!r}; legal by name are {', '.join(legal)}, others "
            f"as a "
            "ParallelStyle"
        )
    return legal[name]


def _matching(modules: Mapping[str, Any], pattern: str) -> Iterator[str]:
    parts = pattern.split(".")
    for name in modules:
        names = name.split(".")
        # A part at a time, as torch matches: "*" is one step of the path.
        if len(names) == len(parts) and all(map(fnmatchcase, names, parts)):
            yield name


def _not_there(modules: Mapping[str, Any], pattern: str) -> str:
    last = pattern.rpartition(".")[2]
    near = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.6)
    near = near or [name for name in modules if name.rpartition(".")[2] == last][:3]
    children = [name for name in modules if name and "." not in name]
    way_out = f"near: {', '.join(near)}" if near else f"the model's own are {', '.join(children) or 'none'}"
    return f"the plan names {pattern!r}, and the model has no such module; {way_out}"
