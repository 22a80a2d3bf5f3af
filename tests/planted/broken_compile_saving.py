"""Broken programs whose compiled model is saved under other names, or loaded so that nothing loads."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.healthy_compile_loops import compile_regions
from tests.planted.plant import Net, broken, case

KEYS = "compile_checkpoint_keys"


def state_as_it_is(model: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "step": 3}


@broken({KEYS: "14 saved keys carry _orig_mod.: _orig_mod.blocks.0.norm.weight"})
def saved_with_the_prefix() -> TrainingCase:
    return case("saved_with_the_prefix", state_dict=state_as_it_is)


@broken({KEYS: "blocks.0._orig_mod.norm.weight"})
def regions_saved_with_the_prefix() -> TrainingCase:
    """The model itself is not wrapped: the prefix stands within the names."""
    return case("regions_saved_with_the_prefix", compile=compile_regions, state_dict=state_as_it_is)


def compile_and_resume(model: Any) -> Any:
    """Resumes from what an uncompiled run has saved: no key fits."""
    checkpoint = Net().state_dict()
    compiled: Any = torch.compile(model, dynamic=False)
    compiled.load_state_dict(checkpoint, strict=False)
    return compiled


@broken({KEYS: "load_state_dict(strict=False) loads nothing, at "})
def resumed_with_nothing() -> TrainingCase:
    return case("resumed_with_nothing", compile=compile_and_resume)


def compile_regions_and_resume(model: Any) -> Any:
    """Resumes from what a run with compiled regions has saved: only what is outside of them fits."""
    model.load_state_dict(compile_regions(Net()).state_dict(), strict=False)
    return torch.compile(model, dynamic=False)


@broken(
    {KEYS: "load_state_dict(strict=False) leaves out "},
    may_fail=("compile_parity",),  # what it leaves out begins anew
)
def resumed_with_the_rest() -> TrainingCase:
    return case("resumed_with_the_rest", compile=compile_regions_and_resume)


def state_cut_short(model: Any) -> dict[str, Any]:
    """Cuts off the prefix of another wrapper, by its length."""
    return {name[len("module.") :]: tensor for name, tensor in model.state_dict().items()}


@broken({KEYS: "has none of the model's tensors (blocks.0.norm.weight, ...), but 14 others: "})
def saved_with_a_wrong_prefix_cut() -> TrainingCase:
    return case("saved_with_a_wrong_prefix_cut", state_dict=state_cut_short)


class Lenient(Net):
    """Loads what fits, and does not say that nothing does."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        renamed = {f"model.{name}": tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict=False)


@broken({KEYS: "load_state_dict passes and leaves 14 of 14 tensors as they were"})
def model_that_loads_what_fits() -> TrainingCase:
    return case("model_that_loads_what_fits", model=Lenient)


class Originals:
    """Compiles a copy, and saves the original, which does not train."""

    def __init__(self) -> None:
        self.model: Any = None

    def compile(self, model: Any) -> Any:
        self.model = model
        return torch.compile(copy.deepcopy(model), dynamic=False)

    def state_dict(self, model: Any) -> Any:
        return (self.model or model).state_dict()


@broken({KEYS: "tensors saved are not those that train"}, may_fail=("compile_parity",))
def original_saved_a_copy_trained() -> TrainingCase:
    originals = Originals()
    return case("original_saved_a_copy_trained", compile=originals.compile, state_dict=originals.state_dict)


class Running(Net):
    """A running mean that forward uses and state_dict leaves out."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return super().forward(x - self.mean)


@broken({KEYS: "gives other outputs"}, may_fail=("accumulation_parity", "ddp_parity", "compile_parity"))
def running_mean_that_is_not_saved() -> TrainingCase:
    return case("running_mean_that_is_not_saved", model=Running)


def compile_and_add(model: Any) -> Any:
    compiled: Any = torch.compile(model, dynamic=False)
    compiled._orig_mod.register_module("tail", nn.Linear(1, 1))
    return compiled


@broken({KEYS: "2 unexpected"}, may_fail=("compile_parity", "compile_no_recompiles"))
def compile_adds_a_module() -> TrainingCase:
    return case("compile_adds_a_module", compile=compile_and_add)


def compile_twice(model: Any) -> Any:
    model.compile(dynamic=False)
    return torch.compile(model, dynamic=False)


@broken({KEYS: "evaluation through the original module compiles 1 graph"}, may_fail=("compile_parity",))
def original_compiled_too() -> TrainingCase:
    return case("original_compiled_too", compile=compile_twice)


class RaisingHook(Net):
    """Its state_dict hook does not bear the compiled model's names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._check)  # type: ignore[no-untyped-call]

    @staticmethod
    def _check(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        if prefix:
            raise KeyError(f"{prefix}head.weight")


@broken(
    {KEYS: "state_dict(model) of the compiled model raises KeyError: '_orig_mod.head.weight'"},
    may_fail=("compile_no_recompiles",),  # whose loop saves, too
)
def hook_that_raises() -> TrainingCase:
    return case("hook_that_raises", model=RaisingHook, state_dict=state_as_it_is)
