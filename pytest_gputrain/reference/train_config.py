"""``--config FILE``: a configuration of ``gputrain branches plan``; options that are given go before it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_gputrain.sweep.config_file import COUNTS, SweepError, read_config

# The configuration's names that this script has under another, or as well.
_AS_OPTIONS = {
    "learning_rate": "lr",
    "total_batch_size": "total_batch_size",
    "device_batch_size": "device_batch_size",
    "tokens": "tokens",
    "block_size": "block_size",
    "world_size": "world_size",
}
# What follows from the others, and what is for people.
_PASSED_OVER = {*COUNTS, "wandb_run_name", "wandb_group", "wandb_tags"} - _AS_OPTIONS.keys()


class ConfigError(ValueError):
    """One line, with the file."""


def defaults_of(path: Path, parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the options' values as text, which the parser reads as if they had been given.

    Options' names may have been added by hand (``seed = 3``); others are refused. Raises ConfigError.
    """
    try:
        values = read_config(path)
    except SweepError as error:
        raise ConfigError(f"--config {error}") from None
    known = {action.dest: action for action in parser._actions}
    found = {}
    for name, value in values.items():
        if name in _PASSED_OVER:
            continue
        option = _AS_OPTIONS.get(name, name)
        if option not in known or option == "config":
            raise ConfigError(f"--config {path}: {name} is no option of this script; take it out")
        choices = known[option].choices
        if choices is not None and value not in choices:
            raise ConfigError(
                f"--config {path}: {name} is {value!r}; legal are {', '.join(map(str, choices))}"
            )
        found[option] = str(value)
    return found


def checked(values: Mapping[str, Any], *, tokens: int, world_size: int) -> str | None:
    """What a configuration says of sample and ranks against what there is; None where they agree."""
    if values["block_size"] not in (None, tokens):
        return (
            f"--config counts sequences of {values['block_size']} tokens, the model takes {tokens}; "
            f"plan again with --block-size {tokens}"
        )
    if values["world_size"] not in (None, world_size):
        return (
            f"--config is for {values['world_size']} ranks, here are {world_size}; start as many, "
            f"or plan again with --world-size {world_size}"
        )
    return None
