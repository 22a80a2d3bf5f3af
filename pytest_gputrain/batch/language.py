"""A language model called as ``model(x, y)`` as a `TrainingCase`: random tokens at the full length, its own
loss.

``x`` and ``y`` are (batch, max_seq_len) int64, drawn below the vocabulary. The loss may be all that the model
returns, or be in a tuple (``logits, loss``), a mapping or an object under ``loss``. A model whose second
argument is something else, and which has ``labels`` (those of the transformers library), gets y as that.
Imports no torch at the top.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_gputrain.batch.ladder import whole
from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.defaults import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VOCABULARY_NAMES = ("vocab_size", "n_vocab", "num_tokens", "padded_vocab_size", "n_tokens")
CONFIG_NAMES = ("config", "cfg", "args", "params", "hparams")
WAY_OUT = "give case=TrainingCase(...), which says how your loop makes a batch and a loss"


def language_case(
    model: torch.nn.Module, max_seq_len: int | None, vocab_size: int | None = None
) -> TrainingCase:
    """The case of ``model(x, y)``. Raises ``ValueError`` for a bad length, or without a vocabulary."""
    length = whole("max_seq_len", max_seq_len)
    size = vocabulary_of(model) if vocab_size is None else whole("vocab_size", vocab_size)
    return TrainingCase(
        name=type(unwrapped(model)).__name__,
        model=lambda: model,
        batch=Tokens(length, size),
        loss=scalar_loss,
    )


@dataclass(frozen=True)
class Tokens:
    """``tokens(batch_size, device) -> (x, y)``, each (batch_size, length) int64."""

    length: int
    vocab_size: int

    def __call__(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        import torch

        shape = (batch_size, self.length)
        return (
            torch.randint(self.vocab_size, shape, device=device),
            torch.randint(self.vocab_size, shape, device=device),
        )


def scalar_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The one scalar of ``model(x, y)``. Raises ``ValueError`` with one line where there is none."""
    import torch

    x, y = batch
    keyword = _takes_labels(unwrapped(model))
    called = f"{type(unwrapped(model)).__name__}(x, {'labels=y' if keyword else 'y'})"
    try:
        output = model(x, labels=y) if keyword else model(x, y)
    except IndexError as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(
                f"{called} got {x.shape[1]} tokens a sample: does the model have as many positions? "
                "max_seq_len says how many it gets"
            )
        raise
    found = next(_scalars(output), None)
    if found is None:
        raise ValueError(
            f"{called} returned {_described(output)}; legal is the loss, "
            "a scalar tensor: alone, in a tuple, or as .loss; for a model that is called otherwise, "
            f"{WAY_OUT}"
        )
    if torch.is_grad_enabled() and not found.requires_grad:
        raise ValueError(
            f"{called} returned a loss that requires no gradient, so nothing can be trained by it; "
            "legal is one that autograd computed: without .detach(), .item() or no_grad in forward"
        )
    # One value in any shape: (1,) comes from losses that keep a dimension.
    return found.reshape(())


def _takes_labels(model: Any) -> bool:
    """Whether targets are ``labels``, which are not the second argument: an attention mask is, or a cache."""
    try:
        parameters = [*inspect.signature(model.forward).parameters]
    except (TypeError, ValueError):  # of C++
        return False
    return "labels" in parameters[2:]


def _scalars(output: Any) -> Iterator[Tensor]:
    """The loss first where it has its name."""
    import torch

    if isinstance(output, torch.Tensor):
        if output.numel() == 1 and output.is_floating_point():
            yield output
    elif _has_loss(output):  # where it is None, another scalar (of routers, say) is not the loss
        yield from _scalars(_named_loss(output))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _scalars(item)
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _scalars(item)


def _has_loss(output: Any) -> bool:
    return hasattr(output, "loss") or (isinstance(output, Mapping) and "loss" in output)


def _named_loss(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def _described(output: Any) -> str:
    import torch

    if isinstance(output, torch.Tensor):
        kind = "" if output.is_floating_point() else f"{str(output.dtype).removeprefix('torch.')} "
        return f"a {kind}tensor of shape {tuple(output.shape)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(map(_described, output)) or 'nothing'}"
    return f"{output!r}" if output is None else f"a {type(output).__name__} without a scalar tensor"


def vocabulary_of(model: Any) -> int:
    """The number of tokens: by the model's or its configuration's ``vocab_size`` and the like, else by its
    embeddings. Raises ``ValueError`` with one line where neither is there.
    """
    bare = unwrapped(model)
    for holder in (bare, *(getattr(bare, name, None) for name in CONFIG_NAMES)):
        for name in VOCABULARY_NAMES:
            held = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(held, int) and not isinstance(held, bool) and held > 0:
                return held
    if sizes := [*_embedding_sizes(bare)]:
        # The smallest: positions and types are embeddings as well, and any token below all of them is legal.
        return min(sizes)
    raise ValueError(
        f"no vocabulary size found in {type(bare).__name__}: neither it nor its config has "
        f"{' or '.join(VOCABULARY_NAMES[:2])}, and it has no nn.Embedding; give vocab_size=, or {WAY_OUT}"
    )


def _embedding_sizes(model: Any) -> Iterator[int]:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            yield module.num_embeddings
