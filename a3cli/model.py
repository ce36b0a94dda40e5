"""A checkpoint as a model: family, configuration, shape and RoPE, all checked before any work begins."""

from dataclasses import dataclass
from typing import Any

from a3cli.checkpoint import Checkpoint, resolve_model
from a3cli.errors import A3Error
from a3cli.families import Family, ModelShape, family_of, read_shape
from a3cli.families.rope import Rope, read_rope
from a3cli.hub import refuse_per_layer
from a3cli.work import Json, Work, name_differences, read_manifest


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
    check_layers(source)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)
        shape = read_shape(config)
        config.head_dim = shape.head_dim  # some types know it only as hidden size over heads
        check_tensors(source, family, shape, config.vocab_size)
        check_activation(config.hidden_act)
        rope = read_rope(config)
    except A3Error:
        raise
    except Exception as error:  # config classes validate in many ways
        reason = " ".join(str(error).split())
        raise A3Error(f"{source.folder / 'config.json'} is not a valid configuration: {reason}") from error
    return Model(source, family, config, shape, rope)


def check_layers(source: Checkpoint) -> None:
    """Raise A3Error for more layers than tensors: some configuration classes make lists of as many."""
    layers = source.config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(source.tensors):
        raise A3Error(f"{source.name}: config.json says {layers:,} layers, there are {len(source.tensors)} tensors")


def check_size(source: Checkpoint) -> None:
    """Raise A3Error if config.json describes far more weights than there are: memory would be filled with them."""
    check_layers(source)
    try:
        family_of(source.config.get("model_type"))
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        shape = read_shape(config)
    except Exception:  # another family, or a configuration that does not load: loading it says so
        return
    if "per_layer_config" in source.config:  # the sizes there are those of the source
        described = shape.layers
    else:
        of_layer = sum(rows * columns for rows, columns in shape.linear_shapes().values())
        described = shape.layers * of_layer + config.vocab_size * shape.hidden_size
    if described > 2 * source.parameters():
        raise A3Error(
            f"{source.name}: config.json describes {described:,} weights, the checkpoint has {source.parameters():,}; "
            "is config.json of this checkpoint?"
        )


def check_activation(name: str) -> None:
    """Raise ValueError unless transformers has it."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"hidden_act is {name!r}, which transformers does not know")


def check_tensors(source: Checkpoint, family: Family, shape: ModelShape, vocabulary: int) -> None:
    """Raise A3Error unless the embedding and every linear weight of every layer are there as configured."""
    expect(source, f"{family.embedding}.weight", (vocabulary, shape.hidden_size))
    for layer in range(shape.layers):
        for role, expected in shape.linear_shapes().items():
            expect(source, family.tensor(layer, role), expected)
    for tensor in source.tensors:
        if (found := family.find_role(tensor)) and found[0] >= shape.layers:
            raise A3Error(f"{source.name}: tensor {tensor} is there, config.json says {shape.layers} layers")


def expect(source: Checkpoint, tensor: str, shape: tuple[int, ...]) -> None:
    found = source.info(tensor).shape
    if found != shape:
        raise A3Error(f"{source.name}: tensor {tensor} is {list(found)}, config.json says {list(shape)}")


def open_calibrated_source(work: Work, calibration: Json, *, full_check: bool = False) -> Model:
    """The checkpoint that a calibration was made from. Raises A3Error if it is no longer the same.

    Its content is sampled; with `full_check` all of it is read and compared, if the calibration did that too.
    """
    recorded = read_manifest(work.source, "run a3 calibrate on the source again")
    try:
        source = resolve_model(str(recorded.get("model")), recorded.get("revision"))
    except A3Error as error:
        raise A3Error(f"the source of {work.folder}: {error}; if it was moved, run a3 calibrate on it again") from error
    expected, found = calibration["request"]["source"], source.fingerprint(full=full_check)
    if full_check and "in_full" not in expected:
        raise A3Error(
            f"--full-check: {work.calibration_manifest} has only sampled hashes of its source; "
            "run a3 calibrate --full-check --overwrite, or leave the option out"
        )
    if differs := name_differences({key: expected.get(key) for key in found}, found):
        raise A3Error(
            f"{source.name}, named in {work.source}, is not the checkpoint of {work.calibration_manifest} "
            f"(differs in {differs}); "
            "restore what was changed, or calibrate again"
        )
    return describe(source)
