"""How many heads an attention module has, and the same module told that it has this rank's share of them.

Pure: reads and writes attributes, imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUERY = ("num_heads", "num_attention_heads", "n_head", "n_heads", "n_local_heads", "heads")
KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_kv_head", "n_kv_heads", "n_local_kv_heads")
GROUPS = ("num_key_value_groups", "n_rep")
# Widths of all heads together, which some families use to cut or to join heads.
WIDTHS = ("embed_dim", "split_size", "all_head_size", "attn_dim", "dim")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")


@dataclass(frozen=True)
class Heads:
    """Heads of queries, heads of keys and values, and the width of one in channels."""

    query: int
    key_value: int
    width: int


def _first(names: tuple[str, ...], *owners: Any) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def count(module: Any, query_width: int, key_width: int) -> Heads | None:
    """Heads of an attention module whose projections are so wide; None where nothing tells.

    Asks the module's attributes, then its ``config``'s.
    """
    config = getattr(module, "config", None)
    width = _first(HEAD_WIDTHS, module)
    if width is None:
        number = _first(QUERY, module, config)
        if number is None or query_width % number:
            return None
        width = query_width // number
    if query_width % width or key_width % width:
        return None
    return Heads(query_width // width, key_width // width, width)


def divide(module: Any, heads: Heads, world_size: int) -> None:
    """Tell the module that it has 1 / ``world_size`` of the heads (keys and values: at least one).

    Expects numbers that ``validate_plan`` has passed.
    """
    query = heads.query // world_size
    key_value = max(1, heads.key_value // world_size)
    _exchange(module, QUERY, heads.query, query)
    _exchange(module, KEY_VALUE, heads.key_value, key_value)
    _exchange(module, GROUPS, heads.query // heads.key_value, query // key_value)
    _exchange(module, WIDTHS, heads.query * heads.width, query * heads.width)


def _exchange(module: Any, names: tuple[str, ...], whole: int, part: int) -> None:
    for name in names:
        # Only what has the whole number: a family may use one of these names for something else.
        if getattr(module, name, None) == whole:
            setattr(module, name, part)


def own_norms(
    owner: str, modules: Mapping[str, Any], projections: Sequence[str], width: int
) -> list[str] | None:
    """Names of the norms over one head's channels (Qwen3's ``q_norm``) in an attention module.

    None where it has parameters that are neither those nor its projections': a bias by position, a scale for
    each head, a norm over all heads or one for each head, which divided heads would make wrong.
    """
    found = []
    for name, module in modules.items():
        inside = name == owner or name.startswith(f"{owner}." if owner else "")
        parameters = [value for value in module._parameters.values() if value is not None]
        if not inside or not parameters or name in projections:
            continue
        if any(tuple(parameter.shape) != (width,) for parameter in parameters):
            return None
        found.append(name)
    return found


def by_head(owner: str, modules: Mapping[str, Any], heads: Heads) -> str | None:
    """The name of a list in an attention module that has one entry for each head, as StableLM's.

    A rank that has a part of the heads would take the first entries for its own.
    """
    for name, module in modules.items():
        entries = [*module._modules, *module._parameters]
        inside = name == owner or name.startswith(f"{owner}." if owner else "")
        listed = len(entries) > 1 and all(entry.isdecimal() for entry in entries)
        if inside and listed and len(entries) in (heads.query, heads.key_value):
            return name
    return None
