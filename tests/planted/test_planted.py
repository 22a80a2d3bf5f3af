"""Every broken program is caught, with the right words; every healthy one is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest

from pytest_gputrain.checks import CheckResult, all_check_ids, registry, run_checks
from pytest_gputrain.launch import LaunchDefaults, Launcher
from tests.planted import BROKEN, HEALTHY, Plant

# Nothing in these programs computes for seconds: a rank without a sign of life for so long waits for ever.
STALL = 8.0
BATCH_SIZE = ("batch_size_found", "batch_size_holds")
# Of programs that were planted for another subject, those in which memory is likely to look suspicious.
SUSPICIOUS = ("batchnorm_convnet", "mixture_of_experts", "stochastic_depth", "length_buckets_all_ranks_share")
ACCUMULATION = ("accumulation_parity", "accumulation_schedule")
# A compilation takes its second: on programs planted for another subject these are nightly.
COMPILE = (
    "compile_no_recompiles",
    "compile_parity",
    "compile_checkpoint_keys",
    "batch_shapes_constant",
    "compile_speed",
)
# On every healthy tensor-parallel program; the others of these checks are nightly there.
TENSOR_PARALLEL = ("tp_backward", "tp_memory")
ACCUMULATES = ("batchnorm_convnet", "tied_weights", "autocast", "scheduler_and_clipping_by_hand")
# Healthy, but for a copy of the whole model that comes in a later step than a finder tries.
COMES_LATE = ("model_copied_and_saved",)
# The same as others, in another place.
AGAIN = ("hook_that_appends", "evaluation_keeps_its_logits", "features_kept_by_a_closure")
# Of a class that others stand for in .ci/run, which has to end: each of these takes seconds.
NIGHTLY = (
    "row_bias_added_on_every_rank_while_it_is_zero",
    "no_backward_reduce_before_column_layers",
    "reduction_doubled_in_forward",
    "row_bias_gradients_partial_under_sequence_parallel",
    "last_token_of_an_odd_vocabulary_lost",
    "fake_tensor_parallel_that_communicates",
    "dtensor_heads_not_divided",
    "dtensor_output_left_partial",
    "dtensor_cross_entropy_on_the_local_vocabulary",
    "dtensor_clipping_by_local_norms",
    "megatron_with_grouped_heads",
    "megatron_sequence_parallel_with_dropout",
    "dtensor_plan",
    "dtensor_in_double_precision",
    "dtensor_with_grouped_heads_and_bfloat16",
    "compile_casts_the_weights",
    "gradient_too_small_in_bfloat16",
    "mask_in_some_batches_only",
    "padding_cut_off_in_the_loss",
    "parts_in_evaluation_in_turn",
    "compiled_in_every_step",
    "counter_in_evaluation",
    "mark_of_the_last_checkpoint",
    "compiled_optimizer_with_a_number_for_rate",
    "regions_saved_with_the_prefix",
    "resumed_with_the_rest",
    "saved_with_a_wrong_prefix_cut",
    "model_that_loads_what_fits",
    "running_mean_that_is_not_saved",
    "compile_adds_a_module",
    "tokens_counted_a_column_short",
    "compiled_in_place",
    "regions_compiled",
    "compiled_within_an_engine",
    "padded_in_the_loss",
    "compiled_optimizer",
    "endless_stream",
    "compiled_method",
    "batchnorm_compiled",
    "autocast_compiled",
    "tied_weights_compiled",
    "compiled_by_layer",
    "timed_by_step",
    "schedule_made_dynamic_by_torch",
    "state_space_scan",
    "timed_by_reading_the_loss",
    "second_graph_for_evaluation",
    "keys_and_values_kept_in_evaluation",
    "dropout_from_another_stream",
    "queue_of_the_last_hundred",
    "tied_weights_and_fixed_padding",
)
MINUTES = ("gpt2", "llama", "bert", "reference_opt", "reference_gpt", "conditional_collective")


def params(plants: Iterable[Plant]) -> list[object]:
    return [pytest.param(plant, id=plant.name, marks=marks(plant)) for plant in plants]


def marks(plant: Plant) -> list[pytest.MarkDecorator]:
    if plant.name in NIGHTLY:
        return [pytest.mark.nightly]
    return [pytest.mark.slow] if plant.name in (*MINUTES, *AGAIN) else []


def run(plant: Plant, checks: Iterable[str]) -> list[CheckResult]:
    launcher = Launcher(defaults=LaunchDefaults(timeout=plant.timeout, stall=STALL))
    return run_checks(
        plant.case(), checks=list(checks), launcher=launcher, finder=plant.finder, meter=plant.meter
    )


def about_memory(plant: Plant) -> bool:
    return plant.case.__module__.endswith(("_memory", "_finders")) or plant.name in SUSPICIOUS


def about_ranks_sharing_a_model(plant: Plant) -> bool:
    return "tensor_parallel" in plant.case.__module__


def about_compiling(plant: Plant) -> bool:
    return "_compile" in plant.case.__module__.rpartition(".")[2]


def is_planted_for(check: str, plant: Plant) -> bool:
    """Whether this check is likely to go wrong on this healthy program: the other pairs are slow."""
    if check in COMPILE or about_compiling(plant):
        return check in COMPILE and about_compiling(plant)
    if check.startswith("tp_") or about_ranks_sharing_a_model(plant):
        return check in TENSOR_PARALLEL and about_ranks_sharing_a_model(plant)
    if check in BATCH_SIZE:
        return about_memory(plant)
    if plant.case.__module__.endswith("_accumulation"):
        return check in ACCUMULATION
    return check not in ACCUMULATION or plant.name in ACCUMULATES


def verify(plant: Plant, results: Iterable[CheckResult]) -> None:
    """What the plant says of itself, against what the checks say of it."""
    for result in results:
        if result.check in plant.fails:
            assert result.outcome == "failed", str(result)
            assert plant.fails[result.check] in result.message, str(result)
        elif result.check not in plant.may_fail:
            assert result.outcome in ("passed", "skipped"), str(result)


@pytest.mark.parametrize("plant", params(BROKEN))
def test_broken_program_is_caught(plant: Plant) -> None:
    verify(plant, run(plant, plant.fails))


@pytest.mark.nightly
@pytest.mark.parametrize("plant", params(BROKEN))
def test_broken_program_trips_no_other_check(plant: Plant) -> None:
    others = [check for check in all_check_ids() if check not in plant.fails]
    # What is broken elsewhere need not train at all, and what asks for memory is broken there alone.
    if about_memory(plant):
        others = [check for check in BATCH_SIZE if check not in plant.fails]
    else:
        others = [check for check in others if check not in BATCH_SIZE]
    verify(plant, run(plant, others))


@pytest.mark.parametrize("plant", params(HEALTHY))
def test_healthy_program_is_left_alone(plant: Plant) -> None:
    verify(plant, run(plant, [check for check in all_check_ids() if is_planted_for(check, plant)]))


@pytest.mark.nightly
@pytest.mark.parametrize("plant", [pytest.param(p, id=p.name) for p in HEALTHY])
def test_healthy_program_is_left_alone_by_the_rest(plant: Plant) -> None:
    checks = [check for check in all_check_ids() if check not in BATCH_SIZE]
    verify(plant, run(plant, [check for check in checks if not is_planted_for(check, plant)]))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "plant", [pytest.param(p, id=p.name) for p in HEALTHY if not about_memory(p) and p.name not in COMES_LATE]
)
def test_healthy_program_has_a_batch_size_that_holds(plant: Plant) -> None:
    verify(plant, run(plant, BATCH_SIZE))


def test_there_are_enough_of_each() -> None:
    assert len(BROKEN) >= 12
    assert len(HEALTHY) >= 8
    assert {check for plant in BROKEN for check in plant.fails} == set(all_check_ids())


@pytest.mark.parametrize("check_id", all_check_ids())
def test_emptying_a_check_is_noticed(check_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = next(p for p in BROKEN if check_id in p.fails and p.name not in (*MINUTES, *NIGHTLY))
    check = registry.get_check(check_id)
    emptied = registry.as_check(check_id, lambda case, ctx: {})
    monkeypatch.setitem(registry._CHECKS, check_id, dataclasses.replace(check, function=emptied))
    with pytest.raises(AssertionError, match="PASSED"):
        verify(plant, run(plant, [check_id]))
