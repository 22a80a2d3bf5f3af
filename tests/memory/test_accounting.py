"""The accounted peak of real models, beside what torch's profiler counts in its allocator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.memory.guard import OomGuard
from pytest_gputrain.reference.gpt import gpt_case

Loss = Callable[[Any], torch.Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

HUGGING_FACE = {
    "gpt2": {
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "vocab_size": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
}
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, foreach=True),
    "loop": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conv_net() -> tuple[torch.nn.Module, Loss]:
    body = [torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Flatten()]
    net = torch.nn.Sequential(*body, torch.nn.Linear(16 * 14 * 14, 10))
    return net, lambda net: torch.nn.functional.cross_entropy(
        net(torch.randn(16, 3, 16, 16)), torch.randint(10, (16,))
    )


def of_case(case: TrainingCase) -> tuple[torch.nn.Module, Loss]:
    return case.model(), lambda model: case.loss(model, case.batch(8, "cpu"))


def gpt() -> tuple[torch.nn.Module, Loss]:
    return of_case(gpt_case())


def checkpointed_gpt() -> tuple[torch.nn.Module, Loss]:
    case = gpt_case()
    model, loss = of_case(case)
    assert case.set_checkpointing is not None
    case.set_checkpointing(model, None)
    return model, loss


def hugging_face(kind: str) -> tuple[torch.nn.Module, Loss]:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **HUGGING_FACE[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)

    def loss(model: Any) -> Any:
        tokens = torch.randint(256, (4, 64))
        return model(input_ids=tokens, labels=tokens).loss

    return model, loss


def train(model: Any, optimizer: torch.optim.Optimizer, loss: Loss) -> None:
    for _ in range(2):
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def profiled_peak(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> int:
    """The highest sum of what the allocator gave and took back, above what the model has."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(model, optimizer, loss)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = own_bytes(model)
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def own_bytes(model: torch.nn.Module) -> int:
    return sum(
        tensor.nbytes for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    )


def compare(build: Callable[[], tuple[torch.nn.Module, Loss]], optimizer: str) -> OomGuard:
    torch.manual_seed(0)
    model, loss = build()
    truth = profiled_peak(model, OPTIMIZERS[optimizer](model.parameters()), loss)
    torch.manual_seed(0)
    model, loss = build()
    made = OPTIMIZERS[optimizer](model.parameters())
    with OomGuard(roots=(model, made)) as guard:
        train(model, made, loss)
    # The kernels' own work space is not accounted for: a few hundred bytes here.
    assert guard.peak_bytes == pytest.approx(truth, rel=0.003)
    assert sum(guard.by_category.values()) == guard.peak_bytes
    assert guard.by_category["parameters"] == sum(parameter.nbytes for parameter in model.parameters())
    assert guard.leaks == ()
    return guard


@pytest.mark.parametrize("build", [conv_net, gpt, checkpointed_gpt])
def test_the_peak_is_that_of_the_allocator(build: Callable[[], tuple[torch.nn.Module, Loss]]) -> None:
    compare(build, "adam")


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adam"])
def test_every_kind_of_optimizer(optimizer: str) -> None:
    compare(conv_net, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_models_of_others(kind: str) -> None:
    compare(lambda: hugging_face(kind), "adam")


def test_each_category_is_the_sum_of_its_tensors() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    optimizer = torch.optim.Adam(net.parameters())
    weights = sum(parameter.nbytes for parameter in net.parameters())
    with OomGuard(roots=(net, optimizer)) as guard:
        net(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        torch.empty(2**20, dtype=torch.uint8)
    state = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert guard.by_category == {
        "parameters": weights,
        "gradients": weights,
        "optimizer state": state,
        "activations": 0,
        "buffers": sum(buffer.nbytes for buffer in net.buffers()),
        "other": 2**20,
    }


def test_views_and_operations_in_place_cost_nothing() -> None:
    with OomGuard() as guard:
        tensor = torch.zeros(1000)
        tensor.view(10, 100).t()[0].add_(1)
        tensor.detach().untyped_storage()
    assert guard.peak_bytes == 4000


def test_a_storage_that_is_resized_counts_as_it_is() -> None:
    with OomGuard() as guard:
        tensor = torch.empty(10)
        tensor.resize_(1000)
        assert guard.in_use == 4000
        tensor.untyped_storage().resize_(0)
        tensor.resize_(0)
    assert guard.peak_bytes == 4000


def test_sparse_and_complex_tensors_count_with_all_their_parts() -> None:
    with OomGuard() as guard:
        sparse = torch.sparse_coo_tensor(
            torch.zeros(1, 10, dtype=torch.int64), torch.ones(10), (5,), check_invariants=True
        )
        complex_one = torch.zeros(10, dtype=torch.complex64)
        expected = 80 + 40 + 80
        assert guard.in_use == expected
    assert sparse.shape == (5,) and complex_one.shape == (10,)


def test_fake_and_meta_tensors_are_none() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with OomGuard("1MiB") as guard, FakeTensorMode():
        torch.empty(2**40).add(1)
    torch.empty(2**40, device="meta")
    assert guard.peak_bytes == 0


def test_recomputation_needs_less_and_is_activations() -> None:
    net = torch.nn.Sequential(
        *(torch.nn.Sequential(*[torch.nn.Linear(64, 64), torch.nn.Tanh()] * 2) for _ in range(8))
    )

    def peak(run: Callable[[Any, torch.Tensor], torch.Tensor]) -> int:
        with OomGuard(roots=[net]) as guard:
            x = torch.randn(512, 64, requires_grad=True)
            for block in net:
                x = run(block, x)
            x.sum().backward()
        net.zero_grad()
        return guard.by_category["activations"]

    plain = peak(lambda block, x: block(x))
    recomputed = peak(lambda block, x: checkpoint(block, x, use_reentrant=False))
    assert recomputed < 0.8 * plain


def test_evaluation_makes_activations_too() -> None:
    net = torch.nn.Linear(64, 64)
    with OomGuard(roots=[net]) as guard, torch.no_grad():
        net(torch.randn(1024, 64))
    assert guard.by_category["activations"] == 1024 * 64 * 4


def test_the_optimizer_of_another_thread_is_not_charged() -> None:
    def elsewhere() -> None:
        weight = torch.nn.Parameter(torch.ones(1000))
        weight.grad = torch.ones(1000)
        torch.optim.SGD([weight]).step()

    with OomGuard() as guard:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert guard.peak_bytes == 0
