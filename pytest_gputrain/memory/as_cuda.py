"""A program for CUDA, taken through its step on fake CPU tensors: what CUDA would keep in memory is kept.

Where the two differ in what they keep: autocast (CUDA computes norms, softmax, losses and powers in float32),
dropout (a mask of one byte, not of the input's type), attention with dropout (no weights kept),
optimizers (CUDA's default does all parameters at once, with temporaries of their whole size). ``cuda`` in
the program means the CPU meanwhile. Does not cover: what a kernel allocates for itself (cuDNN's workspaces
above all), calls into ``torch.cuda``, torch.compile, and custom kernels without a fake implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pytest_gputrain.memory.fake_seam import has_kernel, overridden, without

GRANULARITY = 512  # bytes: CUDA's caching allocator rounds every request up to this

# What CUDA's autocast computes in float32 and the CPU's leaves as it is, of ATen/autocast_mode.h (2.13).
FLOAT32_ON_CUDA = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm",
    "native_layer_norm", "rms_norm", "group_norm", "cosine_similarity", "nll_loss", "nll_loss2d", "kl_div",
    "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits", "dist",
    "cdist", "logsumexp", "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "sum", "sum.dim_IntList", "norm.Scalar",
)  # fmt: skip
_HALVES = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def as_cuda() -> Iterator[None]:
    """Until the end, operations keep what they would keep on CUDA."""
    kernels: dict[tuple[str, str], Callable[..., Any]] = {
        ("dropout", "AutogradCPU"): _dropout,
        ("scaled_dot_product_attention", "AutogradCPU"): _attention,
    }
    for operator in FLOAT32_ON_CUDA:
        if not has_kernel(operator, "AutocastCPU"):
            kernels[operator, "AutocastCPU"] = partial(_in_float32, operator)
    with overridden(kernels), _autocast_means_cpu():
        yield


def _in_float32(operator: str, *args: Any, **kwargs: Any) -> Any:
    name, _, overload = operator.partition(".")
    call = getattr(getattr(torch.ops.aten, name), overload or "default")
    with without("AutocastCPU"):
        return call(*(_widened(one) for one in args), **{key: _widened(one) for key, one in kwargs.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALVES else value


def _dropout(tensor: Any, probability: float, train: bool) -> Any:
    if train and 0 < probability < 1 and tensor.numel():
        return torch.native_dropout(tensor, probability, train)[0]
    return torch.ops.aten.dropout.default.decompose(tensor, probability, train)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Any:
    """CUDA's fused kernels draw dropout again in backward; the CPU's refuse it and would keep all weights."""
    whole = torch.ops.aten.scaled_dot_product_attention.default
    return whole.decompose(query, key, value, attn_mask, 0.0, is_causal, **kwargs)


@contextlib.contextmanager
def _autocast_means_cpu() -> Iterator[None]:
    """``torch.autocast("cuda", …)`` is the CPU's autocast, with CUDA's rules and default type meanwhile."""
    autocast = torch.amp.autocast_mode.autocast
    original = autocast.__init__

    def init(
        self: Any,
        device_type: str,
        dtype: Any = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        original(self, device_type, dtype, enabled, cache_enabled)

    autocast.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        autocast.__init__ = original  # type: ignore[method-assign]


def use_cuda_defaults(optimizer: Any) -> None:
    """CUDA's default is one fused sweep over all parameters (foreach), where nothing else was asked for."""
    for group in getattr(optimizer, "param_groups", ()):
        if group.get("foreach", False) is None and not group.get("fused") and not group.get("differentiable"):
            group["foreach"] = True
