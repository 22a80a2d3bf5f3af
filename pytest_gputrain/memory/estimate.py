"""A first guess at memory by a closed formula, always called an estimate: nothing is run, no GPU asked.

Parameters, gradients and optimizer state are counted from the model on fake tensors. Activations follow
Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models": a layer keeps about
34 x sequence x batch x width bytes with 2-byte activations and fused attention, the logits come on top. Only
for transformers whose configuration or layers can be read; `predict_peak_memory` counts what the formula
leaves out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.memory.fake_step import FakeTraining
from pytest_gputrain.trace.optimizers import optimizers_in
from pytest_gputrain.values import format_size

# Numbers of a parameter's size that an optimizer keeps for it. SGD keeps one with momentum, RMSprop one more
# each with momentum and when centred.
STATES = {
    "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "SparseAdam": 2, "Adagrad": 1, "Adadelta": 2,
    "Rprop": 2, "ASGD": 1, "Muon": 1, "Lion": 1, "Adafactor": 0,
}  # fmt: skip
UNKNOWN_STATES = 2
BYTES_OF_A_LAYER = 34  # x sequence x batch x width, at 2 bytes a number
BYTES_OF_A_CHECKPOINTED_LAYER = 2  # its input
# The names of the same three things in the configurations of Hugging Face and of nanoGPT's descendants.
WIDTH = ("hidden_size", "n_embd", "d_model", "num_channels", "dim", "n_embed")
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "depth", "n_layers")
VOCABULARY = ("vocab_size",)


@dataclass(frozen=True)
class Estimate:
    """Bytes by formula: an estimate, neither predicted nor measured.

    activations: None where width and depth of a transformer are not to be seen
    """

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int | None
    why: str

    @property
    def static_bytes(self) -> int:
        """What training needs at any batch size."""
        return self.parameters + self.gradients + self.optimizer_state

    @property
    def total_bytes(self) -> int:
        """Without activations where they are not known."""
        return self.static_bytes + (self.activations or 0)

    def __str__(self) -> str:
        activations = "unknown" if self.activations is None else format_size(self.activations)
        more = " + activations" if self.activations is None else ""
        return (
            f"estimate: {format_size(self.total_bytes)}{more} (parameters {format_size(self.parameters)}, "
            f"gradients {format_size(self.gradients)}, optimizer state {format_size(self.optimizer_state)}, "
            f"activations {activations}: {self.why})"
        )


def estimate_memory(
    case: TrainingCase, batch_size: int, sequence_length: int | None = None, *, checkpointing: bool = False
) -> Estimate:
    """Estimate a training step's memory from parameters, optimizer and sequence length.

    sequence_length: tokens; None takes the longest (batch, tokens) of integers in a batch

    Raises ValueError for a size or length below 1, PredictionError where the model cannot be built on fake
    tensors.
    """
    _whole("batch_size", batch_size)
    if sequence_length is not None:
        _whole("sequence_length", sequence_length)
    with FakeTraining(case, like="cpu") as training:
        sizes = [parameter.nbytes for parameter in training.model.parameters()]
        gradients = training.gradient_bytes()
        state = sum(_state_bytes(one) for one in optimizers_in(training.optimizer))
        element = max(parameter.element_size() for parameter in training.model.parameters())
        shape = _shape(training.model)
        length = sequence_length or training.sequence_length()
    if shape is None or length is None:
        lacks = "width and depth to be read from the model" if shape is None else "tokens in its batch"
        return Estimate(sum(sizes), gradients, state, None, f"no {lacks}")
    activations = _activations(*shape, batch_size * length, element, checkpointing)
    width, depth, vocabulary = shape
    why = f"{depth} layers of {width}, vocabulary {vocabulary}, {length} tokens"
    return Estimate(sum(sizes), gradients, state, activations, why)


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number of 1 or more")


def _state_bytes(optimizer: Any) -> int:
    """By the optimizer's class; two numbers a parameter for one that is not known."""
    return sum(
        _states_of(type(optimizer).__name__, group) * parameter.nbytes
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def _states_of(name: str, group: dict[str, Any]) -> int:
    momentum = 1 if group.get("momentum") else 0
    if name == "SGD":
        return momentum
    if name == "RMSprop":
        return 1 + momentum + bool(group.get("centered"))
    return STATES.get(name, UNKNOWN_STATES) + bool(group.get("amsgrad"))


def _activations(
    width: int, depth: int, vocabulary: int, tokens: int, element: int, checkpointing: bool
) -> int:
    """At the start of backward; ``element`` bytes a number (the formula's constants are for two)."""
    layer = BYTES_OF_A_LAYER * tokens * width * element // 2
    logits = 3 * vocabulary * tokens * 4  # in float32: themselves, their log-softmax, its gradient
    if checkpointing:
        return BYTES_OF_A_CHECKPOINTED_LAYER * tokens * width * element // 2 * depth + max(layer, logits)
    return layer * depth + logits


def _shape(model: torch.nn.Module) -> tuple[int, int, int] | None:
    """(width, depth, vocabulary) from the model's ``config``, else from its modules; None without a clue."""
    config = getattr(model, "config", None)
    width, depth = _read(config, WIDTH), _read(config, DEPTH)
    if width is None or depth is None:
        return _shape_of_modules(model)
    return width, depth, _read(config, VOCABULARY) or 0


def _shape_of_modules(model: torch.nn.Module) -> tuple[int, int, int] | None:
    """The largest embedding says width and vocabulary; layers are the most modules of one class side by side
    that have a linear layer of that width inside.
    """
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if not embeddings:
        return None
    largest = max(embeddings, key=lambda module: module.num_embeddings)
    width = largest.embedding_dim
    depth = max((_layers_in(module, width) for module in model.modules()), default=0)
    return (width, depth, largest.num_embeddings) if depth else None


def _layers_in(parent: torch.nn.Module, width: int) -> int:
    kinds = Counter(type(child) for child in parent.children() if _has_linear(child, width))
    return max((count for kind, count in kinds.items() if kind is not torch.nn.Linear), default=0)


def _has_linear(module: torch.nn.Module, width: int) -> bool:
    return any(isinstance(one, torch.nn.Linear) and one.in_features == width for one in module.modules())


def _read(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
