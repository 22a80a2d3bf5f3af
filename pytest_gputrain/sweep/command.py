"""What a branch runs: the user's script with its configuration, the checkpoint and a file for metrics.

By default ``--config FILE --checkpoint FILE --metrics FILE`` are put behind the script's own arguments. A
script with other names gets them where its arguments say so: ``{config}``, ``{checkpoint}``, ``{metrics}``,
or any name of the configuration, such as ``--lr={learning_rate}``. Doubled braces stand for braces.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.sweep.config_file import SweepError
from pytest_gputrain.sweep.manifest import Manifest, PlannedBranch

FILES = ("config", "checkpoint", "metrics")
_PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Command:
    """A script, or a module, and its arguments as they were given, placeholders and all."""

    script: str
    arguments: tuple[str, ...]
    module: bool = False

    def __str__(self) -> str:
        return shlex.join([*(["-m"] if self.module else []), self.script, *self.arguments])

    @property
    def places(self) -> set[str]:
        """The names in braces."""
        found = (_PLACE.finditer(argument) for argument in self.arguments)
        return {match[1] for matches in found for match in matches if match[1]}

    def check(self, manifest: Manifest) -> None:
        """Raise SweepError for a placeholder that means nothing, or a branch that could not be one."""
        places = self.places
        for branch in manifest:
            if unknown := sorted(places - {*FILES, *branch.values}):
                raise SweepError(
                    f"{{{unknown[0]}}} is no placeholder; legal are {{{'}, {'.join(FILES)}}} and the names "
                    f"in {branch.config}, such as {{learning_rate}}; write {{{{{unknown[0]}}}}} for braces"
                )
        if places and "checkpoint" not in places:
            raise SweepError(
                f"the arguments have {{{min(places)}}} but no {{checkpoint}}, so no branch would start from "
                "it; say  where it goes, such as --init_from {checkpoint}"
            )
        if places and not places & {"config", "learning_rate"}:
            raise SweepError(
                "the arguments have neither {config} nor {learning_rate}, so all branches would be the same; "
                "say where they go, such as --lr={learning_rate} --batch={total_batch_size}"
            )

    def arguments_of(self, branch: PlannedBranch, checkpoint: Path, metrics: Path) -> list[str]:
        """The arguments of the script for one branch."""
        files = {"config": branch.config, "checkpoint": checkpoint, "metrics": metrics}
        names = {name: os.path.abspath(path) for name, path in files.items()}
        if not self.places:
            return [
                *(_filled(argument, {}) for argument in self.arguments),
                *(part for name in FILES for part in (f"--{name}", names[name])),
            ]
        values = {name: _text(value) for name, value in branch.values.items()}
        return [_filled(argument, {**values, **names}) for argument in self.arguments]


def _filled(argument: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda match: values[match[1]] if match[1] else match[0][0], argument)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


def torchrun_line(command: Command, arguments: Sequence[str], num_ranks: int) -> str:
    """A branch's command as a shell takes it; the runner does the same without a shell."""
    script = [*(["-m"] if command.module else []), command.script]
    return shlex.join(["torchrun", f"--nproc-per-node={num_ranks}", *script, *arguments])
