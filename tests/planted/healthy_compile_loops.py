"""Healthy compiled programs that compile more than once, or have shapes that vary, and are right to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_compile_shapes import (
    LENGTH,
    VOCABULARY,
    Documents,
    Tagger,
    pad_to_longest,
    padded_to_longest,
    tagger,
    tokens,
)
from tests.planted.broken_compile_values import Annealed, AnnealingStep, CompiledUpdate, stepped
from tests.planted.plant import WIDTH, Net, case, draw, healthy, healthy_but, loss


def compile_dynamic(model: Any) -> Any:
    return torch.compile(model, dynamic=True)


@healthy_but("ddp_data_differs", "batch_size_holds")  # every rank reads the same stream, of longer samples
def lengths_vary_by_choice() -> TrainingCase:
    return tagger("lengths_vary_by_choice", batches=padded_to_longest, compile=compile_dynamic)


def compile_as_it_comes(model: Any) -> Any:
    return torch.compile(model)


@healthy_but("ddp_data_differs", "batch_size_holds")  # every rank reads the same stream, of longer samples
def lengths_made_dynamic_by_torch() -> TrainingCase:
    """dynamic=None: one compilation more, the first time that a length is another."""
    return tagger("lengths_made_dynamic_by_torch", batches=padded_to_longest, compile=compile_as_it_comes)


@healthy
def schedule_made_dynamic_by_torch() -> TrainingCase:
    """A float that changes from the ninth step on: with dynamic=None compiled twice, then an input."""
    return case(
        "schedule_made_dynamic_by_torch",
        model=Annealed,
        step=AnnealingStep(hold=9),
        compile=compile_as_it_comes,
    )


class OtherInEvaluation(nn.Module):
    """BatchNorm and dropout, and another branch in evaluation: a second graph, once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.net = nn.BatchNorm1d(WIDTH), nn.Dropout(0.1), Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.drop(self.norm(x)))
        return out if self.training else out.clamp(-10, 10)


@healthy
def second_graph_for_evaluation() -> TrainingCase:
    return case("second_graph_for_evaluation", model=OtherInEvaluation)


class TiedTagger(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, VOCABULARY)
        self.head.weight = self.embed.weight
        self.back = nn.Linear(4, 16, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        scores: Tensor = self.head(self.back(self.net(self.embed(tokens))))
        return scores


def pad_to_fixed(documents: list[Tensor]) -> dict[str, Tensor]:
    """64 columns of inputs, whatever comes."""
    batch = pad_to_longest(documents)
    more = 64 - batch["inputs"].shape[1]
    inputs, targets = F.pad(batch["inputs"], (0, more)), F.pad(batch["targets"], (0, more), value=-100)
    return {"inputs": inputs, "targets": targets, "documents": torch.tensor(len(documents))}


def padded_to_fixed() -> Any:
    return torch.utils.data.DataLoader(Documents(62), batch_size=4, collate_fn=pad_to_fixed, drop_last=True)


@healthy_but("ddp_data_differs")  # every rank reads the same stream
def tied_weights_and_fixed_padding() -> TrainingCase:
    return tagger("tied_weights_and_fixed_padding", model=TiedTagger, batches=padded_to_fixed)


def compile_in_place(model: Any) -> Any:
    model.compile(dynamic=False, mode="reduce-overhead")
    return model


@healthy
def compiled_in_place() -> TrainingCase:
    return case("compiled_in_place", compile=compile_in_place)


def compile_regions(model: Any) -> Any:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, dynamic=False, fullgraph=True)
    return model


@healthy
def regions_compiled() -> TrainingCase:
    return case("regions_compiled", compile=compile_regions)


class Engine(nn.Module):
    """What a trainer puts around the model: its names are longer, its tensors the model's."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner: Any = torch.compile(inner, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def state_of_the_inner(model: Any) -> dict[str, Any]:
    inner = getattr(model, "inner", model)
    state: dict[str, Any] = getattr(inner, "_orig_mod", inner).state_dict()
    return state


@healthy
def compiled_within_an_engine() -> TrainingCase:
    return case("compiled_within_an_engine", compile=Engine, state_dict=state_of_the_inner)


def ragged() -> Iterator[Any]:
    """Lists of documents, which the loss pads to a fixed length: what varies never reaches the model."""
    for _ in range(20):
        yield [torch.randint(VOCABULARY, (int(n),)) for n in torch.randint(2, LENGTH, (4,))]


def ragged_draw(batch_size: int, device: Any) -> Any:
    return [row.to(device) for row in tokens(batch_size, "cpu")["inputs"]]


def padding_loss(model: Any, batch: Any) -> Tensor:
    inputs = torch.stack([F.pad(row, (0, LENGTH - len(row))) for row in batch])
    scores = model(inputs)
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())


@healthy
def padded_in_the_loss() -> TrainingCase:
    return tagger("padded_in_the_loss", batch=ragged_draw, batches=ragged, loss=padding_loss)


def tensor_rate(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=torch.tensor(1e-2))


@healthy
def compiled_optimizer() -> TrainingCase:
    """A learning rate in a tensor: a schedule that changes it compiles nothing anew."""
    return case("compiled_optimizer", optimizer=tensor_rate, step=CompiledUpdate())


def endless() -> Iterator[Any]:
    while True:
        yield draw(4, "cpu")


@healthy
def endless_stream() -> TrainingCase:
    return case("endless_stream", batches=endless)


class EvaluatingStep:
    """Evaluates every tenth step by itself: a second graph, in the middle of training, once."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        if self.steps % 10 == 0:
            model.eval()
            with torch.no_grad():
                loss(model, micro_batches[0])
            model.train()
        return stepped(model, optimizer, micro_batches)


@healthy
def evaluation_within_the_step() -> TrainingCase:
    return case("evaluation_within_the_step", step=EvaluatingStep())


def state_in_half(model: Any) -> dict[str, Tensor]:
    """Half the size on disk; the loop goes on in full precision."""
    original = getattr(model, "_orig_mod", model)
    return {name: value.half() for name, value in original.state_dict().items()}


@healthy
def saved_in_half_precision() -> TrainingCase:
    return case("saved_in_half_precision", state_dict=state_in_half)


def compile_forward(model: Any) -> Any:
    """The method is compiled: what the loop calls is a function, and the model stays what it is."""
    return torch.compile(model.forward, dynamic=False)


@healthy
def compiled_method() -> TrainingCase:
    return case("compiled_method", compile=compile_forward)
