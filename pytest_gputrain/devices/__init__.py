"""Which GPUs exist and which of them this process may use. Imports nothing heavy, creates no CUDA context."""

from __future__ import annotations

from pytest_gputrain.devices.inventory import Gpu, Inventory, discover
from pytest_gputrain.devices.sharing import gpus_to_share
from pytest_gputrain.devices.shortage import describe_found, shortage
from pytest_gputrain.devices.visible import visible_gpus

__all__ = [
    "Gpu",
    "Inventory",
    "describe_found",
    "discover",
    "gpus_to_share",
    "shortage",
    "visible_gpus",
]
