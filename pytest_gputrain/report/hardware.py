"""What GPUs can do at most: dense matrix products, without sparsity, by type. Pure.

From the makers' data sheets; where a sheet gives only the figure with sparsity, half of it. A GPU that is not
here has no peak, and then nothing is said about utilisation: a wrong peak is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping

# By what NVML calls it, the first that fits (so the more special ones first); TFLOP/s. ``16``: bfloat16 and
# float16 with tensor cores; ``tf32``: float32 products on tensor cores; ``32``: float32 without them.
_PEAKS: tuple[tuple[str, Mapping[str, float]], ...] = (
    # NVIDIA DGX B200 data sheet: 36 PFLOP/s with sparsity for 8 GPUs.
    ("B200", {"16": 2250.0, "tf32": 1125.0}),
    # NVIDIA H100 data sheet, column NVL: 1,671 with sparsity.
    ("H100 NVL", {"16": 835.5, "tf32": 417.5, "32": 60.0}),
    # NVIDIA H100 PCIe product brief: 1,513 with sparsity.
    ("H100 PCIe", {"16": 756.5, "tf32": 378.0, "32": 51.0}),
    # NVIDIA H200, H100 and GH200 data sheets, SXM: 1,979 with sparsity.
    ("GH200", {"16": 989.5, "tf32": 494.5, "32": 67.0}),
    ("H200 NVL", {"16": 835.5, "tf32": 417.5, "32": 60.0}),
    ("H200", {"16": 989.5, "tf32": 494.5, "32": 67.0}),
    ("H100", {"16": 989.5, "tf32": 494.5, "32": 67.0}),
    # NVIDIA A100 data sheet: PCIe and SXM alike.
    ("A100", {"16": 312.0, "tf32": 156.0, "32": 19.5}),
    # NVIDIA A10, A30, A40 data sheets.
    ("A10", {"16": 125.0, "tf32": 62.5, "32": 31.2}),
    ("A30", {"16": 165.0, "tf32": 82.0, "32": 10.3}),
    ("A40", {"16": 149.7, "tf32": 74.8, "32": 37.4}),
    # NVIDIA L40S, L4 data sheets: half of the figures with sparsity.
    ("L40S", {"16": 362.0, "tf32": 183.0, "32": 91.6}),
    ("L4", {"16": 121.0, "tf32": 60.0, "32": 30.3}),
    # NVIDIA RTX A6000 and RTX 6000 Ada data sheets: half of the figures with sparsity.
    ("RTX A6000", {"16": 154.8, "tf32": 77.4, "32": 38.7}),
    ("RTX 6000 Ada", {"16": 364.2, "tf32": 182.1, "32": 91.1}),
    # NVIDIA Ada and Ampere GA102 white papers: 16 bit with float32 accumulation, as torch does.
    ("RTX 4090", {"16": 165.2, "tf32": 82.6, "32": 82.6}),
    ("RTX 3090", {"16": 71.0, "tf32": 35.6, "32": 35.6}),
    # NVIDIA V100 data sheet, by form; it has no bfloat16.
    ("V100-SXM2", {"float16": 125.0, "32": 15.7}),
    ("V100-PCIE", {"float16": 112.0, "32": 14.0}),
    # NVIDIA T4 data sheet; it has no bfloat16.
    ("Tesla T4", {"float16": 65.0, "32": 8.1}),
)
_KINDS = {"bfloat16": "16", "float16": "16", "tf32": "tf32", "float32": "32"}


def peak_flops(gpu: str, dtype: str) -> float | None:
    """FLOP/s of one GPU of that name, for products of ``dtype``; None where it is not known.

    dtype: bfloat16, float16, float32, or tf32 for float32 on tensor cores.
    """
    words = f" {gpu} ".replace("-", " ")
    for name, peaks in _PEAKS:
        # As whole words: an L40 is no L4, and an A100 no A10.
        if f" {name} ".replace("-", " ") in words:
            found = peaks.get(dtype) or peaks.get(_KINDS.get(dtype, ""))
            return found * 1e12 if found else None
    return None
