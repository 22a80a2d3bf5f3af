"""OPT-125M as cases for tensor parallelism: the published size, and one with an odd vocabulary.

``case``      12 layers, 768 wide, 12 heads, vocabulary 50272, tied: 125,239,296 parameters
``case_odd``  the same with a vocabulary of 50257, which no number of ranks above 1 but 29 and 1733 divides

Weights are random, from the configuration; with GPUTRAIN_OPT_WEIGHTS naming a folder (what
``save_pretrained`` writes) ``case`` has those. Nothing is downloaded. Importing this module imports neither
torch nor transformers.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_gputrain.reference import opt

WEIGHTS = "GPUTRAIN_OPT_WEIGHTS"


def build() -> Any:
    """The published size, with the weights of $GPUTRAIN_OPT_WEIGHTS if that is set.

    Raises ValueError with one line where that is no folder with a model's ``config.json``, or another model.
    """
    if not (folder := os.environ.get(WEIGHTS)):
        return opt.build("opt-125m")
    if not Path(folder, "config.json").is_file():
        raise ValueError(
            f"{WEIGHTS}={folder!r}: no config.json there; give the folder of a model saved by save_pretrained"
        )
    from transformers import AutoConfig, OPTForCausalLM

    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind != "opt":
        raise ValueError(f"{WEIGHTS}={folder!r}: the model there is of type {kind!r}; give an OPT")
    return OPTForCausalLM.from_pretrained(folder, local_files_only=True).train()


case = replace(opt.case_125m, model=build)
case_odd = opt.opt_case("opt-125m-50257")
