"""Return the commands that reproduce an export, from the requests in its manifests."""

import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from a3cli.report.names import public_dataset
from a3cli.settings import DEFAULT_WORK, Settings, SolveSettings
from a3cli.settings.options import command_words
from a3cli.settings.texts import MixedText, mixture_options
from a3cli.work.escape import printable
from a3cli.work.files import Json
from a3cli.work.manifests import CalibrationRequest, Ingredient, MadeWith, MixturePart


def recorded_settings(settings: Settings) -> Json:
    """Return settings as a manifest has them, without those that its version of a3 did not have."""
    return settings.model_dump(mode="json", exclude_unset=True)


def calibrate_commands(
    base: str, revision: str | None, request: CalibrationRequest, made_with: Sequence[MadeWith] | None
) -> list[str]:
    """Return the commands that reproduce these statistics bit for bit, also for a merged calibration."""
    parts: list[tuple[CalibrationRequest | Ingredient, Sequence[MadeWith]]]
    parts = [(part, part.made_with) for part in request.merged or ()] or [(request, made_with or ())]
    works = [f"work-{number}" for number in range(1, len(parts) + 1)] if len(parts) > 1 else []
    commands = []
    for (part, divided), work in zip_longest(parts, works):
        commands += calibrate_command(base, revision, request, part, divided, work=work)
    return [*commands, f"a3 stats merge {' '.join(works)} --into {DEFAULT_WORK}"] if works else commands


def calibrate_command(
    base: str,
    revision: str | None,
    request: CalibrationRequest,
    part: CalibrationRequest | Ingredient,
    made_with: Sequence[MadeWith],
    *,
    work: str | None,
) -> list[str]:
    """Return the command of one calibration, or of a part of a merged one, after a comment if it is not exact."""
    divided, alike = division(made_with)
    options = {
        "revision": revision,
        **recorded_settings(part.text),
        "dataset": public_dataset(part.text.dataset),
        **mixture_options([mixed_text(each) for each in part.mixture or ()]),
        "device": part.device,
        "batch_size": part.batch_size,
        "dtype": request.dtype,
        "mlp_stats": request.mlp_stats,
        "trust_remote_code": request.trust_remote_code,
        **divided,
        "full_check": bool(request.source.in_full),
        "work": work,
    }
    comment = "# Not all layers were calibrated with these blocks per batch and processes: they may differ"
    return [*([] if alike else [comment]), command("calibrate", base, options)]


def mixed_text(part: MixturePart) -> MixedText:
    name, text = public_dataset(part.text.dataset), part.text
    return MixedText(dataset=name, weight=part.weight, text_field=text.text_field, split=text.split)


def division(made_with: Sequence[MadeWith]) -> tuple[Json, bool]:
    """Return batch size and processes of most layers, and whether all layers had the same.

    Floating-point sums depend on them, and `--batch-size auto` depends on the free memory.
    """
    if not made_with:
        return {}, True
    counts = Counter((each.batch_size, each.processes) for each in made_with)
    ((batch_size, processes), _), *others = counts.most_common()
    return {"batch_size": batch_size, "num_processes": processes if processes > 1 else None}, not others


def solve_command(settings: SolveSettings) -> str:
    """Return the command for these settings; options that have no effect are left out if they have their default."""
    without = set()
    if not settings.sequential:
        without |= {"refit_rounds"}
    if settings.sensitivity != "probe":
        without |= {"probe_blocks", "probe_points"}
        if not settings.sequential:
            without |= {"batch_size"} if settings.sensitivity == "gradient" else {"dtype", "batch_size"}
    defaults = {name: field.default for name, field in SolveSettings.model_fields.items()}
    recorded = recorded_settings(settings)
    return command("solve", None, {k: v for k, v in recorded.items() if k not in without or v != defaults[k]})


def export_command(dtype: str, max_shard_size: int, as_type: str | None) -> str:
    return command("export", "OUT", {"dtype": dtype, "max_shard_size": max_shard_size, "as_type": as_type})


def command(name: str, argument: str | None, options: Json) -> str:
    """Return a shell command; names with special characters are quoted and escaped."""
    return " ".join(shlex.quote(printable(word)) for word in ("a3", *command_words(name, argument, options)))
