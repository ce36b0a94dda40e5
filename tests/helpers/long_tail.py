"""Tests that `make test-slow` runs in place of `make test`: cases that repeat at length what quicker ones show."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

Parameters = Mapping[str, Any]


def others(first: str) -> Callable[[Parameters], bool]:
    """Return whether a case is of another model than the first of its test; not if it is of none."""
    return lambda given: given.get("name", first) != first


# Rows of the table of models that differ little from another row of their type.
VARIANTS = {
    *("llama-mha", "llama-gqa-tied", "llama-mha-bias", "llama-linear", "llama-llama3", "llama-yarn"),
    *("qwen2-window", "qwen3-bias", "qwen3-window", "smollm3-window", "starcoder2-window", "nemotron-mha-bias"),
}


def variants(of: Parameters) -> bool:
    """Return whether a case is of a model that is much like another."""
    return of["name"] in VARIANTS


def repeated(of: Parameters) -> bool:
    """Return whether a case is of such a model, or of the paper's method and not of the plainest model."""
    return variants(of) or (of["method"] == "paper" and of["name"] != "llama-gqa")


# Models whose smaller heads of the stock shape are chosen as those of another model are.
CHOSEN_ALIKE = {
    *("llama-gqa-bias", "llama-longrope", "mistral-gqa", "granite-gqa", "mixtral-gqa", "ministral3-gqa"),
    *("starcoder2-gqa", "gemma2-gqa", "qwen2-gqa", "qwen3moe-gqa"),
}


def chosen_alike(of: Parameters) -> bool:
    """Return whether a case is repeated, or of a model whose heads are chosen as another model's."""
    return repeated(of) or of["name"] in CHOSEN_ALIKE


# By the test's name: whether a case, by its parameters, belongs to the long tail.
LONG_TAIL: dict[str, Callable[[Parameters], bool]] = {
    **dict.fromkeys(
        (
            "test_all_experts_count_as_weights_and_those_of_a_token_as_flops",
            "test_each_expert_is_refit_on_its_own_tokens",
            "test_every_tensor_of_an_expert_is_compared_with_the_loaded_model",
            "test_experts_held_apart_answer_like_the_stock_module",
            "test_layers_of_different_width_load_with_their_own_code",
            "test_predicted_loss_is_the_sum_of_the_experts_errors",
            "test_predicted_loss_is_the_whole_error_where_a_token_has_one_expert",
            "test_verify_notices_one_wrong_expert",
        ),
        others("mixtral-gqa"),
    ),
    **dict.fromkeys(
        (
            "test_generation_without_rope_is_the_same_with_cache",
            "test_nothing_of_rope_is_written",
            "test_predicted_score_error_is_the_measured_one",
            "test_the_paper_s_method_is_its_literal_theorem",
            "test_the_reference_of_a_second_sweep_agrees_with_its_export",
        ),
        others("mpt-mha"),
    ),
    **dict.fromkeys(
        (
            "test_export_and_source_are_evaluated_and_inspected",
            "test_nothing_removed_keeps_every_byte",
            "test_statistics_are_those_of_the_decoder_alone",
        ),
        lambda of: of.get("kind", "mistral3") != "mistral3",
    ),
    "test_the_mlp_is_cut_and_attention_is_carried": lambda of: "probe" not in str(of["options"]),
    "test_experts_with_few_tokens_are_cut_without_a_refit_and_reported": lambda of: (
        of["name"] != "mixtral-gqa" or of["method"] == "paper"
    ),
    "test_export_equals_the_full_size_reference": chosen_alike,
    "test_export_equals_the_literal_reference": repeated,
    "test_full_sizes_are_bit_for_bit_the_source": lambda of: of["name"] not in ("llama-gqa", "gemma3-gqa", "opt-mha"),
    "test_a_streamed_model_has_the_same_figures": lambda of: (
        of["name"] not in ("llama-gqa", "llama-longrope", "gemma3-gqa", "mixtral-gqa", "qwen3_5-hybrid", "mpt-mha")
    ),
    "test_statistics_equal_those_of_a_plain_forward": variants,
    "test_our_own_exports_say_it_twice_alike": variants,
    "test_rope_has_the_form_that_was_asked_for": lambda of: (of["name"], of["form"]) != ("llama-gqa", "linear"),
    "test_a_lower_context_changes_nothing_within_it": lambda of: of["shape"] == "per-layer",
    "test_a_configuration_without_head_dim": others("starcoder2-gqa"),
    "test_generation_with_cache_equals_generation_without": lambda of: (
        of["implementation"] == "eager" and of["name"] != "llama-gqa-bias"
    ),
    "test_it_equals_whole_models_on_those_blocks": lambda of: (
        of["name"] != "llama-gqa" and (of["name"], of["how"]) != ("smollm3-bias", ("--shape", "per-layer"))
    ),
    "test_weights_are_the_literal_regressions": lambda of: (
        of["name"] not in ("llama-gqa", "starcoder2-gqa") or (of["shape"] == "per-layer" and of["name"] != "llama-gqa")
    ),
    "test_gate_and_up_are_fitted_too": others("llama-gqa"),
    "test_a_softmax_scale_of_the_config_is_not_folded_into_queries": lambda of: of["method"] == "paper",
    "test_heads_with_a_norm_keep_their_size": lambda of: of["shape"] == "per-layer",
    "test_a_budget_that_only_smaller_heads_meet_takes_them": lambda of: of["option"] == "--kv-budget",
    "test_half_precision_sources_are_rounded_once": lambda of: of["dtype"] == torch.float16,
    "test_probes_equal_the_zeroed_stock_model": lambda of: of["name"] not in ("llama-gqa", "starcoder2-gqa"),
    "test_goes_on_at_the_layer_where_it_stopped": lambda of: of["damage"] is not None,
    "test_goes_on_at_the_pass_where_it_stopped": lambda of: of["damage"] is not None and of["stopped"] != "_backward",
    "test_energies_equal_autograd_through_the_stock_model": lambda of: of["name"] in ("granite-gqa", "mpt-mha"),
    "test_one_analysis_serves_every_budget": lambda of: "rope_form" in of["variant"],
    "test_predicted_error_is_the_measured_one": lambda of: of["name"] not in ("llama-gqa", "mpt-mha"),
    "test_other_samples_tell_when_to_stop": lambda of: of["seed"] > 0,
    "test_reference_agrees_within_rounding_and_notices_more": lambda of: (
        of["name"] not in ("llama-gqa", "nemotron-gqa")
    ),
    "test_the_cache_has_the_bytes_that_were_predicted": lambda of: (
        of["name"] in ("mistral-gqa", "nemotron-mha-bias") or of["shape"] == "stock"
    ),
    "test_a_checkpoint_of_the_base_model": others("llama-gqa-tied"),
    "test_singular_statistics_are_solved": lambda of: (
        of["options"] != ("--method", "best") or of["singular"].__name__ in ("kill_channels", "kill_all")
    ),
    "test_the_whole_is_written_again": lambda of: of["spelling"] != "" and of["kind"] != "mistral3",
    "test_the_same_statistics_from_any_number_of_processes": lambda of: of["samples"] == 2,
    "test_solve_and_export_give_the_same_bytes_from_any_number": lambda of: of["method"] == "paper",
    "test_batches_are_halved_until_they_fit": lambda of: of["where"] == "disk",
    "test_figures_are_those_of_the_card": lambda of: of["name"] == "Qwen3-30B-A3B",
    "test_memory_that_one_of_them_lacks_makes_all_batches_smaller": lambda of: of["victim"] == 0,
    "test_killed_at_random_moments": lambda of: of["stage"] != "export",
    "test_export_generates_with_cache_as_without": lambda of: of["name"] not in ("llama-longrope", "mixtral-gqa"),
    "test_budget_zero_keeps_every_byte": lambda of: of["name"] not in ("llama-yarn", "qwen3-bias", "mixtral-gqa"),
    "test_damaged": lambda of: of["damage"].__name__ != "flip_a_bit",
    "test_damaged_under_way": lambda of: of["damage"].__name__ not in ("flip_a_bit", "replace"),
    "test_damaged_halfway": lambda of: of["damage"].__name__ != "flip_a_bit",
    "test_absurd_sizes": lambda of: of["command"] == "eval",
    "test_configurations": lambda of: of["command"] != "plan",
    "test_damaged_drafts_are_made_again": lambda of: not of["damaged"].startswith("streams"),
    "test_solve_goes_on_at_every_step": lambda of: of["rounds"] == 0,
    "test_windows_that_cut_the_context_are_refused": others("qwen2-window"),
    "test_its_products_are_those_that_a_plan_counts": lambda of: (of["name"], of["rounds"]) == ("llama-gqa", 0),
    "test_a_damaged_export_is_made_again": lambda of: of["name"] == "config.json" or of["damage"] is None,
    "test_heads_keep_their_size_where_some_layers_have_no_rope": lambda of: (
        (of["name"], of["shape"]) != ("smollm3-bias", "per-layer")
    ),
    "test_each_type_of_attention_has_its_own_slots": lambda of: of["form"] == "longrope",
    "test_smaller_heads_get_norms_of_their_own": lambda of: of["source"] == "qwen3",
    "test_a_second_budget_refines_nothing_again": lambda of: "stock" not in str(of["variant"]),
    "test_what_is_kept_belongs_to_its_settings": lambda of: of["option"][0] != "--context",
    "test_heads_that_cannot_be_cut_are_not_refined": lambda of: "mlp" not in of["options"],
    "test_a_qwen2_as_a_llama_is_the_same_model": lambda of: not of["changes"],
    "test_statistics_while_a_solution_is_written": lambda of: of["damage"].__name__ != "truncate",
    "test_plot_is_a_picture": lambda of: of["suffix"] != ".svg",
    "test_exports_are_valid_and_mutations_are_not": lambda of: of["out"] in ("stock", "paper"),
    "test_a_signal_is_obeyed_in_time": lambda of: of["alone"] != of["again"],
    "test_a_failed_upload_loses_nothing": lambda of: of["status"] == 403,
    "test_refined_value_maps_only_improve_and_end_at_a_minimum": lambda of: of["heads"] == of["kv_heads"],
    "test_the_commands_of_a_card_give_the_same_bytes": lambda of: of["name"] == "sequential",
}
# Models of the table that repeat at length what others of their type show.
FURTHER_MODELS = ("phi3-partial", "phi3-longrope", "phi3-mini4")


def is_long_tail(item: pytest.Item) -> bool:
    """Return whether a test is one of these cases."""
    if hasattr(item, "callspec") and item.callspec.params.get("name") in FURTHER_MODELS:
        return True
    found = LONG_TAIL.get(getattr(item, "originalname", ""))
    return found is not None and found(item.callspec.params)  # type: ignore[attr-defined]
