"""The cache's key: whatever changes the memory curve changes it, and nothing that another process would."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_gputrain import TrainingCase
from pytest_gputrain.batch.cache_key import cache_key, functions_of
from pytest_gputrain.batch.code_digest import code_digest
from pytest_gputrain.batch.stable_text import text

ROOT = Path(__file__).parents[2]
FACTOR = 2


@dataclasses.dataclass
class Config:
    width: int = 8
    dropout: float = 0.0
    capacity_factor: float = 1.25


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.checkpoint = False
        self.inner = nn.Sequential(
            nn.Linear(4, config.width), nn.Dropout(config.dropout), nn.Linear(config.width, 1)
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) * FACTOR


class SavesMore(Model):
    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x).exp() * FACTOR


def key(change: Callable[[Model], Any] = lambda model: None, **more: Any) -> dict[str, Any]:
    model = more.pop("model", None) or Model(more.pop("config", Config()))
    change(model)
    optimizer = more.pop("optimizer", torch.optim.AdamW)(model.parameters())
    batch = more.pop("batch", torch.zeros(2, 4))
    return cache_key(model, device=more.pop("device", "cpu"), optimizer=optimizer, batch=batch, **more)


def checkpointed(model: Model) -> None:
    model.checkpoint = True


def frozen(model: Model) -> None:
    model.inner[0].weight.requires_grad_(False)


def hooked(model: Model) -> None:
    model.inner[0].register_forward_hook(lambda module, arguments, output: output.clone())


def patched(model: Model) -> None:
    model.inner[0].forward = functools.partial(torch.utils.checkpoint.checkpoint, model.inner[0].forward)


def on_gpu(name: str = "GPU A", total_memory: int = 80 * 10**9) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        properties = SimpleNamespace(name=name, total_memory=total_memory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
            return key(device="cuda")

    return make


def of_another_torch() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        return key()


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "configuration": lambda: key(config=Config(capacity_factor=2.0)),
    "shape": lambda: key(config=Config(width=16)),
    "dropout": lambda: key(config=Config(dropout=0.1)),
    "dtype": lambda: key(lambda model: model.bfloat16()),
    "one-dtype": lambda: key(lambda model: model.inner[2].bfloat16()),
    "frozen": lambda: key(frozen),
    "checkpointing": lambda: key(checkpointed),
    "forward": lambda: key(model=SavesMore(Config())),
    "hook": lambda: key(hooked),
    "optimizer": lambda: key(optimizer=torch.optim.SGD),
    "momentum": lambda: key(optimizer=functools.partial(torch.optim.SGD, momentum=0.9)),
    "amsgrad": lambda: key(optimizer=functools.partial(torch.optim.AdamW, amsgrad=True)),
    "foreach": lambda: key(optimizer=functools.partial(torch.optim.AdamW, foreach=False)),
    "sequence-length": lambda: key(max_seq_len=512),
    "batch": lambda: key(batch=torch.zeros(2, 4, dtype=torch.int64)),
    "nesting": lambda: key(batch={"x": torch.zeros(2, 4)}),
    "compiled": lambda: key(compiled=True),
    "ranks": lambda: key(world_size=2),
    "components": lambda: key(components=["packed", torch.bfloat16, Path("data"), {"a": 1.5}]),
    "settings": lambda: key(settings={"eval_batch_factor": 2}),
    "patched": lambda: key(patched),
    "gpu": on_gpu(),
    "gpu-name": on_gpu(name="GPU B"),
    "gpu-memory": on_gpu(total_memory=40 * 10**9),
    "torch": of_another_torch,
    "loss": lambda: key(functions=[lambda model, batch: model(batch).mean()]),
}


def test_every_change_is_another_key() -> None:
    keys = {name: json.dumps(make()) for name, make in CHANGES.items()}
    keys["nothing"] = json.dumps(key())
    assert len(set(keys.values())) == len(keys)


def test_autocast_and_attention_are_in_it() -> None:
    plain = key()
    with torch.autocast("cpu", torch.bfloat16):
        assert key() != plain
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        assert key() != plain


@pytest.mark.parametrize(
    "make",
    [
        lambda: key(optimizer=functools.partial(torch.optim.AdamW, lr=0.5)),
        lambda: key(optimizer=functools.partial(torch.optim.AdamW, betas=(0.8, 0.9))),
        lambda: key(lambda model: model.eval()),
        lambda: key(lambda model: [nn.init.zeros_(parameter) for parameter in model.parameters()]),
    ],
    ids=["learning-rate", "betas", "mode", "weights"],
)
def test_what_changes_no_memory_is_not(make: Callable[[], dict[str, Any]]) -> None:
    assert make() == key()


def test_a_switch_on_one_optimizer_is_another_key_of_the_same_class() -> None:
    sgd = key(optimizer=torch.optim.SGD)
    assert key(optimizer=functools.partial(torch.optim.SGD, momentum=0.5)) != sgd
    assert key(optimizer=functools.partial(torch.optim.SGD, lr=0.5)) == sgd


IN_A_PROCESS = """
import json
from tests.batch.test_cache_key import reference_key
print(json.dumps(reference_key()))
"""


def reference_key() -> dict[str, Any]:
    from pytest_gputrain.reference.gpt import case

    model, batch = case.model(), case.batch(2, torch.device("cpu"))
    optimizer = case.optimizer(model)
    return cache_key(model, device="cpu", optimizer=optimizer, batch=batch, functions=functions_of(case))


def test_another_process_has_the_same_key() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert json.loads(done.stdout) == reference_key()


def test_components_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_key_components") as caught:
        key(components={"a": {1, 2}})
    assert str(caught.value) == (
        "cache_key_components: {1, 2} is a set; give text, numbers, True, False, None, dtypes, and lists, "
        "tuples or mappings of these"
    )


def test_functions_of_a_case_are_those_that_a_probe_runs() -> None:
    def loss(model: Any, batch: Any) -> Any:
        return model(batch).mean()

    def other(model: Any, batch: Any) -> Any:
        return model(batch).exp().mean()

    case = TrainingCase(
        name="a", model=lambda: Model(Config()), batch=lambda n, d: torch.zeros(n, 4), loss=loss
    )
    digest = code_digest(functions_of(case))
    assert code_digest(functions_of(dataclasses.replace(case, loss=other))) != digest
    assert code_digest(functions_of(dataclasses.replace(case, name="b"))) == digest


def program(source: str) -> Any:
    """What ``loss`` of a user's module is, its source text being this."""
    found: dict[str, Any] = {"__name__": "users"}
    exec(compile(source, "users.py", "exec"), found)
    return found["loss"]


LOSS = """
import torch
SEQ_LEN = 128
def helper(x):
    return x.relu()
class Head:
    scale = 2
    def __call__(self, x): return x * self.scale
def loss(model, batch, weight=1.0):
    return Head()(helper(model(batch)))[:SEQ_LEN].mean() * weight
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SEQ_LEN = 128", "SEQ_LEN = 256"),
        ("x.relu()", "x.exp()"),
        ("scale = 2", "scale = 3"),
        ("=1.0", "=2.0"),
        (".mean() *", ".sum() *"),
    ],
    ids=["global", "helper", "class", "default", "code"],
)
def test_the_digest_follows_what_a_function_uses(old: str, new: str) -> None:
    assert code_digest([program(LOSS)]) == code_digest([program("\n# a comment\n" + LOSS)])
    assert old in LOSS
    assert code_digest([program(LOSS.replace(old, new))]) != code_digest([program(LOSS)])


def test_the_digest_follows_closures_and_partials() -> None:
    def of(width: int) -> Callable[[], int]:
        return lambda: width

    assert code_digest([of(1)]) == code_digest([of(1)]) != code_digest([of(2)])
    assert code_digest([functools.partial(of, 1)]) != code_digest([functools.partial(of, 2)])
    assert code_digest([of]) != code_digest([functools.partial(of, 1)])


def test_text_ends_on_a_circle_and_has_no_addresses() -> None:
    class Holder:
        def __init__(self) -> None:
            self.itself = self
            self.many = dict.fromkeys(range(2000))
            self.call = print

    assert text(Holder()) == text(Holder())
    assert "0x" not in text(Holder())
    assert text({"b", "a"}) == "set [\"'a'\", \"'b'\"]"
