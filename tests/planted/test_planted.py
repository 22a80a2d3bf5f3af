"""Every broken program is caught, with the right words; every healthy one is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest

from pytest_gputrain.checks import CheckResult, all_check_ids, registry, run_checks
from pytest_gputrain.launch import LaunchDefaults, Launcher
from tests.planted import BROKEN, HEALTHY, Plant

BATCH_SIZE = ("batch_size_found", "batch_size_holds")
# Of programs that were planted for another subject, those in which memory is likely to look suspicious.
SUSPICIOUS = ("batchnorm_convnet", "length_buckets_all_ranks_share")
ACCUMULATION = ("accumulation_parity", "accumulation_schedule")
# A compilation takes its second: on programs planted for another subject these are nightly.
COMPILE = (
    "compile_no_recompiles",
    "compile_parity",
    "compile_checkpoint_keys",
    "batch_shapes_constant",
    "compile_speed",
)
# On every healthy tensor-parallel program; but on one the others of these checks are nightly.
TENSOR_PARALLEL = ("tp_backward", "tp_memory")
ALL_OF_TENSOR_PARALLEL = "megatron"
ACCUMULATES = ("batchnorm_convnet", "tied_weights", "autocast", "scheduler_and_clipping_by_hand")
# Healthy, but for a copy of the whole model that comes in a later step than a finder tries.
COMES_LATE = ("model_copied_and_saved",)
# Its line search looks at each rank's own loss: once it has converged, ranks evaluate it differently often.
HANGS_LATE = ("quasi_newton_optimizer",)
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
    # lengths_vary_by_choice stands for shapes that are dynamic.
    "lengths_made_dynamic_by_torch",
    # temperature_from_the_ninth_step_on and counter_in_forward: a value in the graph.
    "temperature_that_is_a_constant",
    "string_that_names_the_stage",
    # branch_on_a_value: a break within forward.
    "print_in_forward",
    "branch_on_a_value_in_a_loop",
    # caches_made_when_first_used: memory that comes late, and once.
    "average_of_the_weights_and_metrics",
    "scheduler_of_the_step",
    # autocast, and dropout_with_checkpointing.
    "autocast_to_bfloat16",
    "activations_recomputed",
    # megatron_clipped_by_the_global_norm, megatron_loss_over_sharded_vocabulary.
    "dtensor_clipped",
    "dtensor_loss_parallel",
    # dtensor_tied_again_uneven_vocabulary.
    "megatron_tied_in_double_precision",
    # summed_loss; loss_scaler_that_overflows_first; contrastive_across_ranks.
    "summed_loss_with_clipping",
    "loss_scaler_with_fused_optimizer",
    "contrastive",
    # The same as losses_kept_with_their_graph and outputs_kept_by_the_model, in another place.
    "hook_that_appends",
    "evaluation_keeps_its_logits",
    "features_kept_by_a_closure",
    # Judged from records in tests/endurance/test_offspring.py.
    "data_workers_started_anew_in_every_epoch",
    "data_workers_whose_cache_fills_and_stops",
    # Judged from records in tests/endurance/test_judge.py; told in tests/launch/test_verdict.py.
    "records_of_every_sample",
    "hook_registered_in_every_step",
    "data_worker_raises",
    # Judged from records in tests/endurance/test_updates.py.
    "batch_skipped_on_one_rank",
    "update_skipped_on_one_rank",
    "loss_scale_that_stays_too_high",
    "loss_of_detached_outputs",
    "optimizer_of_a_copy_from_a_step_on",
    # Judged from records in tests/endurance/test_pace.py.
    "rank_that_is_waited_for_before_the_forward",
    "rank_that_gets_slower_before_the_forward",
    # ci/check runs all checks on them; on the other, all_checks_of_the_tour in tests/docs.
    "reference_opt",
    "reference_gpt",
    "llama",
    # branch_on_a_value.
    "item_in_forward",
    # counter_in_forward and temperature_from_the_ninth_step_on; error_of_the_backend_suppressed.
    "global_that_changes",
    "error_of_the_backend_caught",
    # lengths_padded_to_the_longest and last_batch_is_short.
    "another_type_in_between",
    # backend_loses_a_gradient; compile_gives_the_eager_model; saved_with_the_prefix.
    "function_with_another_backward",
    "compiled_and_disabled",
    "original_compiled_too",
    # timed_from_the_first_step and tokens_counted_differently.
    "timed_with_evaluation",
    # believes_a_line_where_memory_is_not_monotone and margin_that_rounds_to_zero.
    "only_powers_of_two",
    "margin_that_leaves_no_sample",
    # probe_that_moves_batchnorm_and_random_state and optimizer_not_restored: something is not put back.
    "probe_that_moves_the_random_state",
    "left_in_evaluation_mode",
    # stale_cache_after_a_dtype_change.
    "garbage_in_the_cache",
    # losses_kept_with_their_graph; longer_sequences_come_later.
    "logits_kept_every_twelve_steps",
    "average_of_the_weights_comes_late",
    # comm_hook_that_does_not_divide; weights_are_sent_around_instead.
    "manual_all_reduce_that_does_not_divide",
    "divided_twice",
    "every_rank_takes_rank_0s_gradient",
    # different_rate_on_each_rank, and a fast test of what is said.
    "update_left_out_on_one_rank",
    "noise_by_rank_on_averaged_gradients",
    # bare_model_on_constant_data; one_small_parameter_not_reduced.
    "wrap_returns_the_bare_model",
    "parameter_on_the_ignore_list",
    # same_data_augmented_by_rank; same_data_permuted; epochs_shuffled_without_a_sampler.
    "same_data_with_noise_of_its_own",
    "same_data_tagged_with_the_rank",
    "shuffled_without_a_sampler",
    # checkpoint_lambda_bound_late.
    "checkpoint_bound_late_behind_a_zero_head",
    # loss_not_divided; token_means_averaged; last_micro_batch_twice.
    "fixed_divisor",
    "divided_by_micro_batches_twice",
    "loss_not_divided_behind_batchnorm",
    "token_mean_called_a_mean",
    "last_micro_batch_dropped",
    # clipping_inside_the_loop; scheduler_inside_the_loop; no_sync_around_the_backward_only.
    "clipping_by_hand_inside_the_loop",
    "warm_up_that_counts_micro_batches",
    "no_sync_around_the_last_too",
    # no_backward_reduce_before_the_head; reduction_doubled_in_backward.
    "no_backward_reduce_in_the_first_mlp_alone",
    "reduced_behind_autograd",
    "logits_gathered_with_a_sum_in_backward",
    "gradients_averaged_as_in_data_parallel",
    # tokens_of_other_shards_not_masked; no_forward_reduce; same_shard_everywhere.
    "vocabulary_padding_not_masked",
    "row_bias_added_on_every_rank",
    "replicated_parameter_initialised_by_rank",
    # norm_gradients_partial_under_sequence_parallel; tied_weights_untied; dtensor_block_put_back_whole.
    "dtensor_sequence_parallel_plan_without_norms",
    "dtensor_tied_weights_untied",
    "dtensor_weights_used_as_local_ones",
    # padding_token_in_every_part; mlp_of_one_layer_left_whole; no_backward_reduce_in_one_of_two_branches.
    "first_token_of_a_part_lost",
    "one_layer_computes_with_the_whole_weights",
    "gradients_summed_in_bfloat16",
    "routers_gradient_partial",
    "norm_over_all_heads_summed_forward_only",
    "uneven_sequences_padded_in_front",
    "gradients_of_parts_summed",
    "no_backward_reduce_at_the_second_call",
    # dropout_differs_on_replicated_activations; clipping_by_local_norms.
    "no_backward_reduce_for_large_batches",
    "optimizer_without_the_parallel_layers",
    # Healthy: megatron_with_one_key_head_on_every_rank.
    "experts_divided_over_ranks",
    "norm_over_all_heads",
    # Healthy ones. plain and sparse_gradients; dropout_with_checkpointing; autocast and float16_compression.
    "complex_parameters",
    "stochastic_depth",
    "bfloat16",
    # buffer_that_forward_reads_and_writes; distributed_sampler.
    "buffer_of_each_rank",
    "epochs_shuffled_anew",
    "parts_that_ranks_take_in_turn",
    # loss_scaler_that_overflows_first; quasi_newton_optimizer; scheduler_and_clipping_by_hand.
    "loss_scaler",
    "closure_in_the_optimizer",
    "clipping_and_accumulation",
    # summed_loss and token_mean_over_ranks; manual_all_reduce; noise_seeded_by_rank.
    "summed_loss_averaged_over_ranks",
    "loss_weights_averaged_by_hand",
    "dropout_seeded_by_rank",
    # distributed_sampler, and checks of its collectives in zero_redundancy_optimizer.
    "batches_scattered_from_rank_0",
    # timed_synchronised; dropout_compiled.
    "evaluation_within_the_step",
    "loss_scaled_by_the_steps_own_count",
    # batch_of_one_cannot_be_normalised, with many probes too; caches_made_when_first_used.
    "memory_that_is_not_monotone",
    "batches_shorter_than_batch",
    "optimizer_without_state",
    # test_probe.py: test_a_step_that_catches_its_out_of_memory_has_not_trained.
    "batch_left_out_when_memory_runs_out",
    # batchnorm_accumulated; tokens_of_the_whole_window; half_autocast_and_scaler_in_the_step.
    "tied_embeddings_accumulated",
    "divided_and_decayed_at_the_end",
    "autocast_and_scaler_accumulated",
    # dtensor_tied_again_uneven_vocabulary; megatron_sequence_parallel_uneven.
    "megatron_tied_uneven_vocabulary_without_bias",
    "dtensor_sequence_parallel",
)
# Long runs: others stand for these in the fast tests.
LONG = (
    "activations_kept_by_the_model",
    "bytes_kept_in_every_step",
    "data_worker_hangs",
    "data_worker_keeps_every_sample",
    "data_worker_opens_a_file_for_each_sample",
    "four_kilobytes_a_step_on_one_rank",
    "infinite_weight_in_a_late_step",
    "leak_in_every_tenth_step",
    "leak_that_begins_late",
    "loss_of_the_wrong_sign",
    "memory_that_comes_and_goes",
    "nothing_to_learn_in_the_stream",
    "out_of_memory_late",
    "processes_that_nobody_ends",
    "random_features_of_each_rank",
    "running_mean_becomes_nan",
    "statistics_of_each_rank",
    "steps_that_get_slower",
    "teacher_that_one_rank_averages",
    "thread_leak",
    "unfrozen_after_it_was_wrapped",
    "warm_up_clipping_and_averaged_weights",
)
# lengths_vary_by_choice: many compilations; dropout_compiled and timed_synchronised are fast.
# A unit test stands for evaluation_differs_when_compiled.
MINUTES = (
    "gpt2",
    "bert",
    "conditional_collective",
    "evaluation_differs_when_compiled",
    "lengths_vary_by_choice",
)


def params(plants: Iterable[Plant]) -> list[object]:
    return [pytest.param(plant, id=plant.name, marks=marks(plant)) for plant in plants]


def marks(plant: Plant) -> list[pytest.MarkDecorator]:
    if plant.name in NIGHTLY:
        return [pytest.mark.nightly]
    return [pytest.mark.slow] if plant.name in (*MINUTES, *LONG) else []


def run(plant: Plant, checks: Iterable[str]) -> list[CheckResult]:
    # Nothing here computes for seconds, but on a busy machine a rank may get no processor for many.
    launcher = Launcher(defaults=LaunchDefaults(timeout=plant.timeout, stall=plant.timeout / 2))
    return run_checks(
        plant.case(),
        checks=list(checks),
        launcher=launcher,
        finder=plant.finder,
        meter=plant.meter,
        iterations=plant.iterations,
    )


def about_memory(plant: Plant) -> bool:
    return plant.case.__module__.endswith(("_memory", "_finders")) or plant.name in SUSPICIOUS


def about_ranks_sharing_a_model(plant: Plant) -> bool:
    return "tensor_parallel" in plant.case.__module__


def about_compiling(plant: Plant) -> bool:
    return "_compile" in plant.case.__module__.rpartition(".")[2]


def about_many_steps(plant: Plant) -> bool:
    return "_stability" in plant.case.__module__


def is_planted_for(check: str, plant: Plant) -> bool:
    """Whether this check is likely to go wrong on this healthy program: the other pairs are slow."""
    if check == "stable_training" or about_many_steps(plant):
        return check == "stable_training" and about_many_steps(plant)
    if check in COMPILE or about_compiling(plant):
        return check in COMPILE and about_compiling(plant)
    if check.startswith("tp_") or about_ranks_sharing_a_model(plant):
        mine = check in TENSOR_PARALLEL or plant.name == ALL_OF_TENSOR_PARALLEL
        return check.startswith("tp_") and mine and about_ranks_sharing_a_model(plant)
    if check in BATCH_SIZE or plant.case.__module__.endswith("_memory"):
        return check in BATCH_SIZE and about_memory(plant)
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
@pytest.mark.timeout(900)  # many checks
@pytest.mark.parametrize("plant", params(BROKEN))
def test_broken_program_trips_no_other_check(plant: Plant) -> None:
    others = [check for check in all_check_ids() if check not in plant.fails]
    # What is broken elsewhere need not train at all, and what asks for memory is broken there alone.
    if about_memory(plant):
        others = [check for check in BATCH_SIZE if check not in plant.fails]
    else:
        others = [check for check in others if check not in BATCH_SIZE]
    if not about_many_steps(plant):  # what is broken need not train well for long either
        others = [check for check in others if check != "stable_training"]
    verify(plant, run(plant, others))


@pytest.mark.parametrize("plant", params(HEALTHY))
def test_healthy_program_is_left_alone(plant: Plant) -> None:
    verify(plant, run(plant, [check for check in all_check_ids() if is_planted_for(check, plant)]))


@pytest.mark.nightly
@pytest.mark.timeout(900)  # many checks
@pytest.mark.parametrize("plant", [pytest.param(p, id=p.name) for p in HEALTHY])
def test_healthy_program_is_left_alone_by_the_rest(plant: Plant) -> None:
    checks = [check for check in all_check_ids() if check not in BATCH_SIZE]
    if plant.name in HANGS_LATE:
        checks.remove("stable_training")
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
    for check in all_check_ids():
        broken = [plant for plant in BROKEN if check in plant.fails and not marks(plant)]
        healthy = [plant for plant in HEALTHY if is_planted_for(check, plant) and not marks(plant)]
        assert len(broken) >= 2 and healthy, f"{check}: too few that .ci/run sees in its fast step"


@pytest.mark.parametrize("check_id", all_check_ids())
def test_emptying_a_check_is_noticed(check_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = next(p for p in BROKEN if check_id in p.fails and not marks(p))
    check = registry.get_check(check_id)
    emptied = registry.as_check(check_id, lambda case, ctx: {})
    monkeypatch.setitem(registry._CHECKS, check_id, dataclasses.replace(check, function=emptied))
    with pytest.raises(AssertionError, match="PASSED"):
        verify(plant, run(plant, [check_id]))
