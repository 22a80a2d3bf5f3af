"""What a training loop does with a model made parallel: clip, step, save; and OPT-125M itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_gputrain import launch
from tests.tensor_parallel import families, golden

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "adam fused": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "sgd foreach": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, foreach=True),
    "rmsprop foreach": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-2, foreach=True),
}


def trained(optimizer: str, sequence_parallel: bool) -> dict[str, float]:
    """After three clipped steps: the largest difference of the norms and of each parameter."""
    from pytest_gputrain.tensor_parallel import parallelize

    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = golden.random_weights(families.opt(vocab_size=251))
    model = parallelize(copy.deepcopy(reference), golden.tp_mesh(), sequence_parallel=sequence_parallel)
    norms = []
    for one in (reference, model):
        torch.manual_seed(1)
        stepping = OPTIMIZERS[optimizer](one.parameters())
        for _ in range(3):
            stepping.zero_grad()
            golden.run(one, torch.randint(2, 50, (2, 7)))
            norms.append(golden.whole(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)))
            stepping.step()
    made: Any = model
    assert made.lm_head.weight is made.get_input_embeddings().weight
    found = {f"norm {step}": golden.difference(norms[step], norms[step + 3]) for step in range(3)}
    ours = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        # Without a gradient, a key's bias is moved by rounding alone.
        if not name.endswith("k_proj.bias"):
            found[name] = golden.difference(parameter.detach(), golden.whole(ours[name]))
    return found


def test_optimizers_and_clipping_are_as_in_one_process() -> None:
    def all_of_them() -> dict[str, dict[str, float]]:
        return {
            f"{name} {part}": trained(name, part) for name in OPTIMIZERS for part in (False, name == "adamw")
        }

    for found in launch(all_of_them, world_size=2).values:
        assert not {
            (which, name): error
            for which, of in found.items()
            for name, error in of.items()
            if not error <= 1e-9
        }


def test_every_parameter_is_a_dtensor_and_the_sharded_ones_are_halved() -> None:
    def shares() -> dict[str, tuple[str, float]]:
        from torch.distributed.tensor import DTensor

        from pytest_gputrain.tensor_parallel import parallelize

        model = parallelize(families.opt(), golden.tp_mesh())
        found = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), name
            found[name] = (str(parameter.placements[0]), parameter.to_local().numel() / parameter.numel())
        return found

    for found in launch(shares, world_size=2).values:
        assert found["model.decoder.embed_tokens.weight"] == ("S(0)", 0.5)
        assert found["model.decoder.layers.0.self_attn.q_proj.bias"] == ("S(0)", 0.5)
        assert found["model.decoder.layers.0.self_attn.out_proj.weight"] == ("S(1)", 0.5)
        assert found["model.decoder.layers.0.self_attn.out_proj.bias"] == ("R", 1.0)
        assert found["model.decoder.final_layer_norm.weight"] == ("R", 1.0)


def test_weights_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_gputrain.reference import opt125m

    saved: Any = families.opt()
    saved.save_pretrained(tmp_path / "opt")
    monkeypatch.setenv("GPUTRAIN_OPT_WEIGHTS", str(tmp_path / "opt"))
    loaded = opt125m.case.model()
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
    assert loaded.training
    monkeypatch.setenv("GPUTRAIN_OPT_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match=r".") as refused:
        opt125m.case.model()
    assert str(refused.value) == (
        f"GPUTRAIN_OPT_WEIGHTS={str(tmp_path)!r}: no config.json there; give the folder of a model saved by "
        "save_pretrained"
    )
    other: Any = families.gpt2()
    other.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setenv("GPUTRAIN_OPT_WEIGHTS", str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="the model there is of type 'gpt2'; give an OPT"):
        opt125m.case.model()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["case", pytest.param("case_odd", marks=pytest.mark.nightly)])
def test_opt125m_in_full_size(which: str) -> None:
    def errors() -> dict[str, float]:
        from pytest_gputrain.reference import opt125m
        from pytest_gputrain.tensor_parallel import parallelize

        torch.set_num_threads(1)
        torch.manual_seed(0)
        reference = getattr(opt125m, which).model().eval()
        model = parallelize(copy.deepcopy(reference), golden.tp_mesh())
        tokens = torch.randint(2, 50000, (1, 16))
        expected, given = golden.run(reference, tokens), golden.run(model, tokens)
        found = dict(zip(("logits", "loss"), map(golden.difference, expected, given), strict=True))
        return found | golden.gradient_errors(reference, model)

    for found in launch(errors, world_size=2).values:
        assert len(found) == 2 + 196
        # A key's bias has no gradient: softmax does not see it. What there is, is rounding.
        assert not {
            name: error
            for name, error in found.items()
            if not error <= 1e-4 and not name.endswith("k_proj.bias")
        }
