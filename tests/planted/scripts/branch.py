"""A tiny training script that goes on from a checkpoint; ``--defect`` plants what a sweep must notice.

Without one it is healthy, also with ``--manner``, which is only another way of training well, or one that
is told in a note.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_gputrain.sweep.config_file import read_config

DEFECTS = (
    "rate_of_checkpoint",
    "rate_of_checkpoint_by_scheduler",
    "rate_ignored",
    "token_overshoot",
    "too_few_tokens",
    "batch_not_target",
    "batch_twice_the_target",
    "step_per_micro_step",
    "changes_checkpoint",
    "raises",
    "killed",
    "hangs",
    "ignores_signals",
)
MANNERS = ("from_nothing", "warm_up", "two_groups", "says_nothing", "prints_only", "diverges")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("config", "checkpoint", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--defect", choices=DEFECTS)
    parser.add_argument("--of", type=int, default=0, help="the branch with the defect; 0: all of them")
    parser.add_argument("--manner", choices=MANNERS)
    given = parser.parse_args()
    config = read_config(given.config)
    defect = given.defect if given.of in (0, config["k"]) else None
    torch.set_num_threads(1)
    torch.manual_seed(1)
    Branch(config, given.checkpoint, given.metrics, defect, given.manner).train()


def at_twice_the_batch(config: dict[str, Any]) -> dict[str, Any]:
    """The same sequences in half of the steps, as with an accumulation that is twice as long."""
    size = 2 * config["total_batch_size"]
    sequences = config["tokens"] // config["block_size"]
    steps = math.ceil(sequences / size)
    last = sequences - (steps - 1) * size
    return {**config, "total_batch_size": size, "num_steps": steps, "last_step_sequences": last}


class Branch:
    def __init__(
        self, config: dict[str, Any], checkpoint: Path, metrics: Path, defect: str | None, manner: str | None
    ) -> None:
        if defect == "batch_twice_the_target":
            config = at_twice_the_batch(config)
        self.config, self.metrics, self.defect, self.manner = config, metrics, defect, manner
        self.checkpoint = checkpoint
        self.model = nn.Linear(4, 4)
        self.seen = 0
        content: Any = {"model": self.model.state_dict()}
        if manner != "from_nothing":
            content = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(content["model"])
        rate = 0.123 if defect == "rate_ignored" else config["learning_rate"]
        groups: list[dict[str, Any]] = [{"params": self.model.weight}, {"params": self.model.bias}]
        if manner == "two_groups":
            groups[0]["lr"] = 20 * rate
        own: Any = groups if manner == "two_groups" else self.model.parameters()
        self.optimizer = torch.optim.AdamW(own, lr=rate)
        if manner not in ("two_groups", "from_nothing"):
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(content["optimizer"])
            if defect not in ("rate_of_checkpoint", "rate_of_checkpoint_by_scheduler"):
                for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = group["initial_lr"] = lr
        steps = config["num_steps"]
        warm = manner == "warm_up" or defect == "rate_of_checkpoint_by_scheduler"

        def share(step: int) -> float:
            """Linear up in two steps, then down to a tenth; 1 where there is no warm-up."""
            up = min((step + 1) / 2, 1.0)
            return (up if step < 2 else 0.1 + 0.9 * (1 - step / steps)) if warm else 1.0

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def train(self) -> None:
        loss, lines = math.nan, []
        for step in range(1, self.config["num_steps"] + 1):
            self.misbehave(step)
            loss = self.step(step)
            rate = self.config["learning_rate"]  # what it was asked for, whatever the optimizer has
            lines.append({"step": step, "loss": loss, "tokens": self.seen, "lr": rate})
            if self.manner == "prints_only":
                print(f"step {step}/{self.config['num_steps']} | loss {loss:.6f} | lr {rate:.3e}")
        final = math.nan if self.manner == "diverges" else loss
        size = self.config["total_batch_size"] // (2 if self.defect == "batch_not_target" else 1)
        told = {} if self.defect == "batch_twice_the_target" else {"total_batch_size": size}
        lines.append({"final_loss": final, "tokens": self.seen, **told})
        if self.manner not in ("says_nothing", "prints_only"):
            file = open(self.metrics, "w")  # noqa: SIM115 - left open, as many scripts do
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            globals()["_left_open"] = file

    def step(self, step: int) -> float:
        config, total = self.config, 0.0
        last = step == config["num_steps"] and self.defect != "token_overshoot"
        left = config["last_step_sequences"] if last else config["total_batch_size"]
        samples = left = left - 1 if self.defect == "too_few_tokens" and last else left
        self.optimizer.zero_grad()
        while left:
            size = min(left, config["device_batch_size"])
            loss = self.loss(size) * size / samples
            loss.backward()
            total += float(loss.detach())
            left -= size
            if self.defect == "step_per_micro_step" and left:
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.optimizer.step()
        self.scheduler.step()
        self.seen += samples * config["block_size"]
        return total

    def loss(self, size: int) -> Tensor:
        out: Tensor = self.model(torch.randn(size, 4)).pow(2).mean()
        return out

    def misbehave(self, step: int) -> None:
        if self.defect == "raises":
            raise RuntimeError("planted")
        if self.defect == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.defect == "hangs":
            time.sleep(3600)
        if self.defect == "changes_checkpoint" and step == 1:
            torch.save({"model": self.model.state_dict()}, self.checkpoint)
        if self.defect == "ignores_signals":
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            print("ready", flush=True)
            while True:
                time.sleep(0.01)


if __name__ == "__main__":
    main()
