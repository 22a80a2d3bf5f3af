"""What a module is for, told from its name and its siblings': attention projections, MLPs, vocabulary.

Pure: walks a mapping from module names to modules and imports no torch. Not told: attention and MLP spread
over several parents (BERT), experts in one three-dimensional parameter; those stay as they are, on every
rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# (query, key, value), then what may be the output projection beside them.
ATTENTION = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")),
    (("to_query", "to_key", "to_value"), ("proj",)),
    (("c_q", "c_k", "c_v"), ("c_proj",)),
    (("wq", "wk", "wv"), ("wo",)),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    (("query", "key", "value"), ("proj", "out", "out_proj", "dense")),
)
# Queries, keys and values side by side in one projection. Only where the module's own attributes say where
# to cut.
FUSED = ((("c_attn",), ("c_proj",)),)
# What widens, then what narrows again.
MLP = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("w1", "w3"), ("w2",)),
    (("fc1",), ("fc2",)),
    (("c_fc",), ("c_proj",)),
    (("fc",), ("proj",)),
    (("up_proj",), ("down_proj",)),
    (("fc_in",), ("fc_out",)),
    (("lin1",), ("lin2",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
)


@dataclass(frozen=True)
class Block:
    """One attention or MLP: the names below the model of the module that has it and of its parts."""

    owner: str
    kind: str  # "attention", "fused" (an attention of one projection), "mlp"
    columns: tuple[str, ...]
    row: str

    def within(self, child: str) -> str:
        return f"{self.owner}.{child}" if self.owner else child


def blocks(modules: Mapping[str, Any]) -> Iterator[Block]:
    """Every attention and MLP whose parts have names of a known family, in the model's order."""
    children: dict[str, set[str]] = {}
    for name in modules:
        owner, _, child = name.rpartition(".")
        children.setdefault(owner, set()).add(child)
    for owner in modules:
        found = children.get(owner, set())
        for kind, families in (("attention", ATTENTION), ("fused", FUSED), ("mlp", MLP)):
            if (names := _match(found, families)) is not None:
                columns, row = names
                within = f"{owner}." if owner else ""
                yield Block(owner, kind, tuple(within + name for name in columns), within + row)


def _match(found: set[str], families: Any) -> tuple[tuple[str, ...], str] | None:
    for columns, rows in families:
        row = [name for name in rows if name in found]
        if row and found.issuperset(columns):
            return columns, row[0]
    return None


def vocabulary(modules: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The names of the token embedding and of the head; None where there is none.

    The head is the last linear module from the embedding's width to its rows. Where several embeddings could
    be the tokens', it is the one tied to a head, then one that has a head, then the largest; never one of
    positions.
    """
    heads = {
        name: (module.out_features, module.in_features)
        for name, module in modules.items()
        if hasattr(module, "out_features")
    }
    ranked = []
    for name, module in modules.items():
        if not hasattr(module, "num_embeddings") or _is_of_positions(name):
            continue
        shape = (module.num_embeddings, module.embedding_dim)
        own = [head for head, width in heads.items() if width == shape]
        tied = any(modules[head].weight is module.weight for head in own)
        ranked.append(((tied, bool(own), module.num_embeddings), name, own[-1] if own else None))
    if not ranked:
        return None, None
    _, embedding, head = max(ranked, key=lambda entry: entry[0])
    return embedding, head


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return last == "wpe" or "pos" in last or "type" in last or "segment" in last


def layers(modules: Mapping[str, Any]) -> list[str]:
    """The names of the layers that have attention or MLP, in the model's order: what a number names."""
    found: dict[str, None] = {}
    for block in blocks(modules):
        parts = block.owner.split(".")
        numbered = [index for index, part in enumerate(parts) if part.isdecimal()]
        if numbered:
            found[".".join(parts[: numbered[0] + 1])] = None
    return list(found)


def widths(module: Any) -> tuple[int, int]:
    """Input and output channels of a Linear or a Conv1D."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    inputs, outputs = module.weight.shape
    return inputs, outputs


def is_conv1d(module: Any) -> bool:
    """GPT-2's transposed linear layer, told by its class's name: transformers may not be there."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
