"""A branch as a configuration: plain Python assignments, with what they mean beside them."""

from __future__ import annotations

from pytest_gputrain.batch.accumulation import AccumulationPlan
from pytest_gputrain.sweep.branches import Branch, BranchPlan

RATES = {"sqrt": "sqrt({k}) x {lr!r}", "linear": "{k} x {lr!r}", "none": "the base rate, whatever the batch"}


def config_text(branch: Branch, plan: BranchPlan) -> str:
    """Return the configuration of a branch of ``plan``; ``config_file.read_config`` reads it back."""
    step, last, size = branch.plan, branch.last_plan, branch.block_size
    rate = RATES[plan.lr_scaling].format(k=branch.k, lr=plan.base_lr)
    ranks = f", {step.world_size} ranks" if step.world_size > 1 else ""
    lines = [
        f"# Branch k={branch.k} of {plan.base_name}: {branch.k} x the base batch of {plan.base_batch}.",
        "# Written by `gputrain branches plan` and named in manifest.json. It is read and never run: each",
        "# line gives a name a plain value. Batch sizes count sequences of block_size tokens: those of an",
        "# optimizer step on all ranks, those of a micro-batch (device_batch_size, last_micro_batch) on one.",
        f"k = {branch.k}",
        "",
        f"# An optimizer step is {_sum(step)}{ranks}: {step.global_batch_size} sequences.",
        f"total_batch_size = {step.global_batch_size}",
        *_micro_batches(step, ""),
        f"world_size = {step.world_size}",
        "",
        f"# {rate}",
        f"learning_rate = {branch.learning_rate!r}",
        "",
        f"# Every branch of the sweep sees {branch.tokens} tokens: {plan.sequences} sequences of {size}.",
        f"# That is {_steps(branch)}.",
        f"block_size = {size}",
        f"tokens = {branch.tokens}",
        f"num_steps = {branch.num_steps}",
        "",
        f"# The last step is {_sum(last)}{ranks}: {last.global_batch_size} sequences.",
        f"last_step_sequences = {last.global_batch_size}",
        *_micro_batches(last, "last_step_"),
        "",
        "# For Weights & Biases; nothing here needs it.",
        f'wandb_run_name = "{branch.wandb_run_name}"',
        f'wandb_group = "{plan.base_name}"',
        f'wandb_tags = ["k={branch.k}", "batch={branch.global_batch_size}", "lr-{plan.lr_scaling}"]',
    ]
    return "\n".join(lines) + "\n"


def _micro_batches(plan: AccumulationPlan, prefix: str) -> list[str]:
    ragged = "  # smaller: weigh its mean loss by its share" if plan.is_ragged else ""
    return [
        f"{prefix}device_batch_size = {plan.device_batch_size}",
        f"{prefix}accumulation_steps = {plan.accumulation_steps}",
        f"{prefix}last_micro_batch = {plan.last_micro_batch}{ragged}",
    ]


def _sum(plan: AccumulationPlan) -> str:
    """How a rank comes to its sequences: ``4 micro-batches of 16`` or ``6 of 14 and one of 13``."""
    whole = plan.accumulation_steps - plan.is_ragged
    said = f"{whole} micro-batch{'es' if whole > 1 else ''} of {plan.device_batch_size}"
    return f"{said} and one of {plan.last_micro_batch}" if plan.is_ragged else said


def _steps(branch: Branch) -> str:
    size, last = branch.global_batch_size, branch.last_step_sequences
    if last == size:
        return f"{branch.num_steps} steps of {size}"
    return f"{branch.num_steps - 1} steps of {size} and a last one of {last}"
