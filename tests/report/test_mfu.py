"""MFU: from tokens a second, FLOPs counted in a real step, and the peak of a GPU that is known."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_gputrain.report.hardware import peak_flops
from pytest_gputrain.report.mfu import with_mfu

H200 = {"gpus": [{"name": "NVIDIA H200"}] * 2}


def test(**more: Any) -> dict[str, Any]:
    speed = {
        "plot": "tokens_per_second",
        "label": "rank 0",
        "unit": "tokens/s",
        "x": [0, 1],
        "y": [1e6, None],
    }
    figures = {"flops_per_token": 494_750_000, "flops_dtype": "bfloat16", "world_size": 2}
    return {"id": "t", "device": "cuda", "series": [speed], "figures": figures, "labels": [], **more}


test.__test__ = False  # type: ignore[attr-defined]


def test_the_share_of_the_peak() -> None:
    series, notes = with_mfu(test(), H200)
    assert series[-1] == {"plot": "mfu", "label": "rank 0", "unit": "fraction", "x": [0, 1], "y": [0.5, None]}
    assert notes == []


def test_all_ranks_tokens_are_shared_by_all_gpus() -> None:
    both = test()
    both["series"] = [{**both["series"][0], "label": label} for label in ("compiled", "eager, 4 ranks")]
    series, _ = with_mfu(both, H200)
    assert [one["y"][0] for one in series[2:]] == [0.25, 0.125]


@pytest.mark.parametrize(
    ("more", "machine", "why"),
    [
        ({}, {"gpus": [{"name": "Jetson"}]}, "the peak of Jetson for bfloat16 is not known here"),
        ({"device": "cpu"}, {"gpus": []}, "it ran on a CPU, of which no peak is known"),
        ({"labels": ["shared GPU"]}, H200, "shared GPU"),
        ({}, {"gpus": [{"name": "NVIDIA H200"}, {"name": "Tesla T4"}]},
         "GPUs of several kinds (NVIDIA H200, Tesla T4)"),
    ],
)  # fmt: skip
def test_without_a_peak_there_is_none_and_it_is_said(
    more: dict[str, Any], machine: dict[str, Any], why: str
) -> None:
    series, notes = with_mfu(test(**more), machine)
    assert (len(series), notes) == (1, [f"No MFU: {why}."])


def test_what_counted_no_flops_has_nothing_to_say() -> None:
    assert with_mfu(test(figures={}), H200) == (test()["series"], [])


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5e12),
        ("NVIDIA H100 PCIe", "float16", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA L40S", "float32", 91.6e12),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA B200", "float8_e4m3fn", None),
    ],
)
def test_peaks_by_name(gpu: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(gpu, dtype) == peak
