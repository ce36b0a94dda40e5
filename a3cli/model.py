"""A checkpoint as a model: family, configuration, shape and RoPE, all checked before any work begins."""

from dataclasses import dataclass
from typing import Any

from a3cli.checkpoint import Checkpoint, resolve_model
from a3cli.errors import A3Error
from a3cli.families import Family, ModelShape, family_of, read_shape
from a3cli.families.rope import Rope, read_rope
from a3cli.hub import refuse_per_layer
from a3cli.work import Json, Work, read_json


@dataclass(frozen=True)
class Model:
    """What every stage knows of a source. `config` is transformers' own configuration object."""

    source: Checkpoint
    family: Family
    config: Any
    shape: ModelShape
    rope: Rope


def describe(source: Checkpoint, *, trust_remote_code: bool = False) -> Model:
    """Raises A3Error for an unknown family, a configuration that does not fit, or missing tensors."""
    from transformers import AutoConfig

    refuse_per_layer(source.config, source.name)
    family = family_of(source.config.get("model_type"))
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)
        shape = read_shape(config)
        config.head_dim = shape.head_dim  # some types know it only as hidden size over heads
        check_tensors(source, family, shape)
        rope = read_rope(config)
    except A3Error:
        raise
    except Exception as error:  # config classes validate in many ways
        reason = " ".join(str(error).split())
        raise A3Error(f"{source.folder / 'config.json'} is not a valid configuration: {reason}") from error
    return Model(source, family, config, shape, rope)


def check_tensors(source: Checkpoint, family: Family, shape: ModelShape) -> None:
    """Raise A3Error unless every linear weight of every layer is there with the configured shape."""
    for layer in range(shape.layers):
        for role, expected in shape.linear_shapes().items():
            name = family.tensor(layer, role)
            found = source.info(name).shape
            if found != expected:
                raise A3Error(f"{source.name}: tensor {name} is {list(found)}, config.json says {list(expected)}")


def open_calibrated_source(work: Work, calibration: Json) -> Model:
    """The checkpoint that a calibration was made from. Raises A3Error if it is no longer the same."""
    recorded = read_json(work.source)
    try:
        source = resolve_model(str(recorded.get("model")), recorded.get("revision"))
    except A3Error as error:
        raise A3Error(f"the source of {work.folder}: {error}; if it was moved, run a3 calibrate on it again") from error
    if source.fingerprint() != calibration["request"]["source"]:
        raise A3Error(f"{source.name} is not the checkpoint that {work.folder} was calibrated on; calibrate again")
    return describe(source)
