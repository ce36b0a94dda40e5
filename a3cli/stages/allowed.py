"""What the family of a model lets a solution cut, and why it keeps the rest."""

from contextlib import suppress

from a3cli.errors import A3Error
from a3cli.models.families import Family, family_for
from a3cli.models.hub import find_folder, read_config
from a3cli.models.source import recorded_source
from a3cli.settings import PlanSettings, SolveSettings
from a3cli.settings.options import option_of
from a3cli.stages.context import AGAIN, check_settings
from a3cli.stages.sizes import HEADS, default_components, possible_components
from a3cli.work.folder import Work
from a3cli.work.manifests import SolutionManifest


def known_family(model: str, revision: str | None) -> Family | None:
    """Return the family of a model whose config.json is on this machine, None for any other model."""
    with suppress(A3Error):
        folder = find_folder(model, revision, files=("config.json",), cached_only=True)
        return family_for(read_config(folder, model))
    return None


def calibrated_family(work: Work) -> Family | None:
    """Return the family of a work folder's source, None if there is none on this machine."""
    with suppress(A3Error):
        _, config, _ = recorded_source(work)
        return family_for(config)
    return None


def resolve_for_work(settings: SolveSettings, work: Work) -> SolveSettings:
    """Return `resolve_settings` for a work folder's source.

    Without the source on this machine, components that are not named are those of the folder's solution of this shape,
    so that it is found to be finished.
    """
    family = calibrated_family(work)
    if family is None and settings.components is None and work.solution_manifest.is_file():
        with suppress(A3Error):  # a damaged manifest is reported by whoever needs it
            recorded = SolutionManifest.read(work.solution_manifest, AGAIN).request.settings
            if recorded.shape == settings.shape:
                settings = settings.model_copy(update={"components": recorded.components})
    return resolve_settings(settings, family)


def resolve_settings(settings: SolveSettings, family: Family | None) -> SolveSettings:
    """Return settings that name the components that may be cut, if they do not: `default_components`.

    Raises A3Error if they contradict each other or the family.
    """
    components = settings.cut
    if family is not None:
        check_shape(settings, family)
        check_heads(settings, family)
        check_components(settings, family)
        components = settings.components or default_components(settings, family)
    resolved = settings.model_copy(update={"components": components})
    check_settings(resolved, family)
    return resolved


def check_shape(settings: SolveSettings | PlanSettings, family: Family) -> None:
    """Raise A3Error for a shape in which a3 compresses nothing of a family."""
    if family.compressible(settings.shape):
        return
    if family.held_by is None:
        where = in_shape(family, settings.shape)
        raise A3Error(f"--shape {settings.shape}: a3 cannot compress anything {where}; use --shape per-layer")
    raise A3Error(
        f"--shape {settings.shape}: a3 writes the {family.model_type} decoder of a {family.held_by!r} model in the "
        "stock shape, which the model's own class loads with all its other parts; use --shape stock"
    )


def check_heads(settings: SolveSettings | PlanSettings, family: Family) -> None:
    """Raise A3Error for a budget of attention or of the KV cache if a family keeps all heads whole in this shape."""
    if HEADS & {*possible_components(settings, family)}:
        return
    other = "--shape per-layer, or " if HEADS & {*family.compressible("per-layer")} else ""
    alone = "--budget or --mlp-budget" if isinstance(settings, SolveSettings) else "--budget"
    for name in ("attention_budget", "kv_budget"):
        if budget := getattr(settings, name, None):
            raise A3Error(
                f"{option_of((name,))} {budget}: a3 cannot compress attention {in_shape(family, settings.shape)}; "
                f"use {other}{alone} alone"
            )


def check_components(settings: SolveSettings, family: Family) -> None:
    """Raise A3Error if a component was named that a family does not allow in this shape."""
    named, allowed = settings.components or (), possible_components(settings, family)
    if refused := [component for component in named if component not in allowed]:
        raise A3Error(
            f"--components {','.join(named)}: a3 cannot compress {' and '.join(refused)} "
            f"{in_shape(family, settings.shape)}; use --components {','.join(allowed)}"
        )


def in_shape(family: Family, shape: str) -> str:
    """Return the family and the shape, and why heads stay whole there, for a message."""
    why = family.why_whole(shape)
    return f"of model_type {family.model_type!r} with --shape {shape}" + (f": {why}" if why else "")
