"""Tests that `make test-slow` runs in place of `make test`: cases that repeat at length what quicker ones show."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

Parameters = Mapping[str, Any]


def others(first: str) -> Callable[[Parameters], bool]:
    """Return whether a case is of another model than the first of its test."""
    return lambda given: given["name"] != first


# By the test's name: whether a case, by its parameters, belongs to the long tail.
LONG_TAIL: dict[str, Callable[[Parameters], bool]] = {
    "test_export_equals_the_full_size_reference": lambda of: of["method"] == "paper" and of["name"] != "llama-gqa",
    "test_export_equals_the_literal_reference": lambda of: of["method"] == "paper" and of["name"] != "llama-gqa",
    "test_a_lower_context_changes_nothing_within_it": lambda of: of["shape"] == "per-layer",
    "test_a_configuration_without_head_dim": others("starcoder2-gqa"),
    "test_weights_are_the_literal_regressions": lambda of: of["shape"] == "per-layer" and of["name"] != "llama-gqa",
    "test_predicted_error_is_the_measured_one": lambda of: (
        of["name"] in ("mistral-gqa", "starcoder2-gqa", "granite-gqa")
    ),
    "test_a_checkpoint_of_the_base_model": others("llama-gqa-tied"),
    "test_singular_statistics_are_solved": lambda of: of["options"] in (("--method", "paper"), ("--sequential",)),
    "test_damaged_halfway": lambda of: of["damage"].__name__ in ("empty", "replace"),
    "test_the_commands_of_a_card_give_the_same_bytes": lambda of: of["name"] == "sequential",
}
# Models of the table that repeat at length what others of their type show.
FURTHER_MODELS = ("phi3-partial", "phi3-longrope")


def is_long_tail(item: pytest.Item) -> bool:
    """Return whether a test is one of these cases."""
    if hasattr(item, "callspec") and item.callspec.params.get("name") in FURTHER_MODELS:
        return True
    found = LONG_TAIL.get(getattr(item, "originalname", ""))
    return found is not None and found(item.callspec.params)  # type: ignore[attr-defined]
