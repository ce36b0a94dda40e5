"""Open a checkpoint as a model: family, configuration, shape and RoPE, all checked before any work begins."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint, same_content
from a3cli.models.config import (
    SLIDING,
    check_local_rope,
    check_rope,
    check_rope_spellings,
    read_shape,
    rope_parameters_of,
)
from a3cli.models.costs import linear_weights
from a3cli.models.families import Family, ModelShape, Role, family_for, usual_entries
from a3cli.models.families.base import Kind
from a3cli.models.families.wrappers import Wrapper, decoder_config, wrapper_of
from a3cli.models.fused import take_role
from a3cli.models.hub import refuse_per_layer
from a3cli.models.rope import Rope, read_rope
from a3cli.models.source import open_recorded
from a3cli.models.stock import StockClass, match_tensors, read_stock_class, read_wrapper_class
from a3cli.work.files import Json
from a3cli.work.folder import Work
from a3cli.work.manifests import SOURCE_REMEDY, CalibrationManifest, SourceRecord
from a3cli.work.sealed import name_differences


@dataclass(frozen=True)
class Model:
    """A source as every stage sees it. `config` is transformers' configuration object, `stock` its class.

    The source's tensors have that class's names, even if they are stored under others. `rope` is that of all layers, or
    of those without a window where these have their own, `local_rope`.
    """

    source: Checkpoint
    family: Family
    config: Any
    shape: ModelShape
    rope: Rope
    stock: StockClass
    wrapper: Wrapper | None = None  # what holds the decoder; then the names of its other tensors are those of its class
    local_rope: Rope | None = None

    def rope_of(self, layer: int) -> Rope:
        """Return the rotation of one layer's heads."""
        return self.rope.still if layer in self.shape.still_layers else self.table_of(layer)

    def table_of(self, layer: int) -> Rope:
        """Return the RoPE of the layers with one layer's type of attention."""
        return self.local_rope if self.local_rope and self.config.layer_types[layer] == SLIDING else self.rope

    def layers_by_table(self) -> list[list[int]]:
        """Return the layers of each type of attention that has a RoPE of its own: mostly all layers together."""
        local = [self.table_of(layer) is self.local_rope for layer in range(self.shape.layers)]
        return [[layer for layer, own in enumerate(local) if own == kind] for kind in (False, True) if kind in local]

    def exported_name(self, tensor: str) -> str:
        """Return the name of a tensor in an export: a wrapper keeps those of the source's files."""
        return self.source.info(tensor).stored if self.wrapper else tensor

    def read(self, layer: int, role: Role, kind: Kind = "weight", *, expert: int | None = None) -> torch.Tensor:
        """Return a role's weight `[out, in]` or bias `[out]` in its stored dtype: a view of the mapped file.

        If there are experts, the MLP's roles are of one `expert`.
        """
        stored = self.source.read(self.family.tensor(layer, role, kind, expert))
        return take_role(stored, self.family, role, self.shape.linear_shapes())


def describe(source: Checkpoint, *, trust_remote_code: bool = False, calibrated: bool = False) -> Model:
    """Return the model. Raises A3Error for an unknown family, a bad configuration, or missing or unknown tensors.

    A stored copy of a tied embedding must equal it; for a `calibrated` source this was checked before.
    """
    wrapper = wrapper_of(source.raw_config)
    shapes = own_names({name: info.shape for name, info in source.tensors.items()}, wrapper, source.name)
    config, stock = read_stock(
        source.folder, source.raw_config, source.name, tensors=len(shapes), trust_remote_code=trust_remote_code
    )
    if wrapper is not None:
        source = source.renamed({name: wrapper.own_name(name) for name in source.tensors})
    source = source.renamed(match_tensors(stock, shapes, source.name))
    if not calibrated:
        check_tied(source, stock.tied)
    with invalid_config(source.folder):
        family, rope = family_for(source.raw_config), read_rope(config)
        local_rope = read_rope(config, SLIDING) if family.local_rope else None
    return Model(source, family, config, read_shape(config), rope, stock, wrapper, local_rope)


T = TypeVar("T")


def own_names(stored: Mapping[str, T], wrapper: Wrapper | None, where: str) -> dict[str, T]:
    """Return what is known of stored tensors by the names of the decoder's class. Raises A3Error for one name twice."""
    if wrapper is None:
        return dict(stored)
    names = {name: wrapper.own_name(name) for name in stored}
    if len({*names.values()}) < len(names):
        twice = sorted(name for name, own in names.items() if list(names.values()).count(own) > 1)
        raise A3Error(f"{where}: {' and '.join(twice[:2])} are the same tensor; remove one of them")
    return {own: stored[name] for name, own in names.items()}


def read_stock(
    folder: Path, raw: Json, name: str, *, tensors: int | None, trust_remote_code: bool = False
) -> tuple[Any, StockClass]:
    """Return transformers' configuration of the decoder, and the class, for config.json, whose content is `raw`.

    Raises A3Error. `tensors` is how many the checkpoint has, None if that is unknown.
    """
    refuse_per_layer(raw, name)
    family, wrapper, own = family_for(raw), wrapper_of(raw), decoder_config(raw)
    check_rope_spellings(own, folder / "config.json")
    if tensors is not None:
        check_layers(own, name, tensors)
    with invalid_config(folder):
        whole, config = read_config_object(folder, raw, trust_remote_code=trust_remote_code)
        config.head_dim = read_shape(config).head_dim  # some types know it only as hidden size over heads
        config.output_router_logits = False  # of experts: they serve training alone
        check_activation(getattr(config, "hidden_act", "gelu"))  # MPT has but one
        if not family.carried_attention:
            check_rope(rope_parameters_of(config), partial=family.rotary_factor is not None)
        if family.local_rope:
            check_local_rope(config)
        if unsupported := family.refusal(config):
            raise A3Error(f"{folder / 'config.json'}: a3 does not support {family.model_type} with {unsupported}")
        return config, read_stock_class(config) if wrapper is None else read_wrapper_class(whole, config, wrapper)


def read_config_object(folder: Path, raw: Json, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return transformers' configuration for config.json, and its part for the decoder, which may be all of it.

    That part has Llama's names for entries that the family's has under others.
    """
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    wrapper, family = wrapper_of(raw), family_for(raw)
    config = whole if wrapper is None else getattr(whole, wrapper.entry)
    own = {name: getattr(config, name, None) for name in family.names.values()}
    for name, value in family.usual(own).items():
        if name not in own:
            setattr(config, name, value)
    return whole, config


@contextmanager
def invalid_config(folder: Path) -> Iterator[None]:
    """Raise any error of a configuration's class as an A3Error: these classes validate in many ways."""
    try:
        yield
    except A3Error:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise A3Error(f"{folder / 'config.json'} is not a valid configuration: {reason}") from error


def check_layers(raw: Json, name: str, tensors: int) -> None:
    """Raise A3Error for more layers than tensors: some configuration classes make lists of as many."""
    layers = usual_entries(raw).get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors:
        raise A3Error(f"{name}: config.json says {layers:,} layers, there are {tensors} tensors")


def check_tied(source: Checkpoint, tied: Mapping[str, str]) -> None:
    """Raise A3Error for a stored tensor that is tied to another and differs: transformers' versions take either."""
    for name, original in tied.items():
        if name in source.tensors and not same_content(source.info(name), source.info(original)):
            raise A3Error(
                f"{source.name}: config.json ties {name} to {original}, and the two are stored with different values; "
                "set tie_word_embeddings to false if both are intended, or remove the first"
            )


def check_size(source: Checkpoint) -> None:
    """Raise A3Error if config.json describes far more weights than there are: memory would be filled with them."""
    check_layers(source.config, source.name, len(source.tensors))
    try:
        _, config = read_config_object(source.folder, source.raw_config)
        shape = read_shape(config)
    except Exception:  # another family, or a configuration that does not load: loading it says so
        return
    if "per_layer_config" in source.config:  # the sizes there are those of the source
        described = shape.layers
    else:
        described = linear_weights(shape, shape.sizes) + config.vocab_size * shape.hidden_size
    if described > 2 * source.parameters():
        raise A3Error(
            f"{source.name}: config.json describes {described:,} weights, the checkpoint has {source.parameters():,}; "
            "use the config.json of this checkpoint"
        )


def check_activation(name: str) -> None:
    """Raise ValueError unless transformers has it."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"hidden_act is {name!r}, which transformers does not know")


def open_calibrated_source(work: Work, calibration: CalibrationManifest, *, full_check: bool = False) -> Model:
    """Return the checkpoint that a calibration was made from. Raises A3Error if it is no longer the same.

    Samples of its content are compared; with `full_check` all of it, if the calibration did that too.
    """
    recorded = SourceRecord.read(work.source, SOURCE_REMEDY)
    try:
        source = open_recorded(recorded)
    except A3Error as error:
        raise A3Error(f"the source of {work.folder}: {error}; if it was moved, give --source NEWPATH") from error
    expected, found = calibration.request.source.plain(), source.fingerprint(full=full_check)
    if full_check and "in_full" not in expected:
        raise A3Error(
            f"--full-check: {work.calibration_manifest} has only sampled hashes of its source; "
            "run a3 calibrate --full-check --overwrite, or leave the option out"
        )
    if differs := name_differences({key: expected.get(key) for key in found}, found):
        raise A3Error(
            f"{source.name}, named in {work.source}, is not the checkpoint of {work.calibration_manifest} "
            f"(differs in {differs}); "
            "restore the source, give --source NEWPATH if it was moved, or run a3 calibrate again"
        )
    return describe(source, calibrated=True)
