"""Budgets: the fraction to remove of weights or of the KV cache, or the largest size of the result."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from a3cli.settings.options import CUT, MACHINE, option_of

DEFAULT_BUDGET = 0.25  # of `a3 plan` and `compress`, unless another budget is given
BUDGET_HELP = "Fraction of the decoder's linear weights to remove."
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}
COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "": 1}


def parse_size(text: Any) -> Any:
    """Return the bytes of '5GB', '500MB', '1.5GiB' or a plain number of bytes."""
    return read_number(text, "BGIKM", UNITS, "must have the form 5GB, 500MB or 2GiB")


def parse_count(text: Any) -> Any:
    """Return the number that '6B', '500M' or '1.5e9' says."""
    return read_number(text, "KMBT", COUNTS, "must have the form 6B, 500M or 1.5e9")


def read_number(text: Any, letters: str, units: dict[str, int], otherwise: str) -> Any:
    """Return the whole number that text with a unit says; what is no text as it is."""
    if not isinstance(text, str):
        return text
    number = text.strip().rstrip(letters + letters.lower())
    try:
        return int(float(number) * units[text.strip()[len(number) :].upper()])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(otherwise) from None


Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Budget = Annotated[Fraction | None, CUT, Field(description=BUDGET_HELP)]
KvBudget = Annotated[Fraction | None, CUT, Field(description="Fraction of the KV cache's bytes per token to remove.")]
BudgetBytes = Annotated[
    Annotated[int, Field(ge=1)] | None,
    CUT,
    BeforeValidator(parse_size),
    Field(description="Largest size of all weights, in their dtype, like 10GB."),
]
BudgetParams = Annotated[
    Annotated[int, Field(ge=1)] | None,
    CUT,
    BeforeValidator(parse_count),
    Field(description="Largest number of parameters, like 6B or 500M."),
]

Memory = Annotated[
    Annotated[int, Field(ge=1)] | None,
    MACHINE,
    BeforeValidator(parse_size),
    Field(description="Show how many sequences fit this memory, like 80GB."),
]

OF_ALL = ("budget", "budget_bytes", "budget_params")  # of the whole model: one at most
BUDGETS = (*OF_ALL, "kv_budget", "attention_budget", "mlp_budget")
SINCE = ("kv_budget", "budget_bytes", "budget_params")  # left out of requests when not given, as before they existed


def given_budgets(settings: Any) -> list[str]:
    """Return the names of the budgets that settings have."""
    return [name for name in BUDGETS if getattr(settings, name, None) is not None]


def budget_problems(settings: Any) -> list[str]:
    """Return what is wrong with the budgets that are given together."""
    given = given_budgets(settings)
    whole = [option_of((name,)) for name in OF_ALL if name in given]
    problems = []
    if not given:
        problems.append(
            "no budget: give --budget (or --kv-budget, --budget-bytes, --budget-params, or "
            "--attention-budget and --mlp-budget)"
        )
    if len(whole) > 1:
        problems.append(f"{' and '.join(whole)} are budgets of the same weights: give one of them")
    if "kv_budget" in given and "attention_budget" in given:
        problems.append("--kv-budget and --attention-budget both say how small heads get: give one of them")
    part = next((name for name in ("attention_budget", "kv_budget") if name in given), None)
    if whole and part and "mlp_budget" in given:
        problems.append(f"{whole[0]}, {option_of((part,))} and --mlp-budget contradict each other: give two at most")
    return problems
