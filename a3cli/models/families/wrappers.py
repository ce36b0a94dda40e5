"""Model types that hold a decoder of another type, for example with a vision tower: only the decoder is compressed.

config.json describes the decoder in an entry of its own. Everything else of such a checkpoint is carried as it is.
"""

from dataclasses import dataclass, replace
from typing import Any

from a3cli.models.families.base import Family

Json = dict[str, Any]
DECODER = "model."  # of the decoder's own class


@dataclass(frozen=True)
class Wrapper:
    """How a model type holds its decoder.

    `entry` is where config.json describes the decoder, `auto_class` the class of transformers that loads the whole.
    That class has the decoder's tensors under `prefix`. Files may have older names: `renames` are prefixes in files,
    and those of the class.
    """

    model_type: str
    entry: str = "text_config"
    auto_class: str = "AutoModelForImageTextToText"
    prefix: str = "model.language_model."
    renames: tuple[tuple[str, str], ...] = (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )

    def class_name(self, stored: str) -> str:
        """Return the name that the class has for a tensor of a file."""
        for old, new in self.renames:
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return stored

    def own_name(self, stored: str) -> str:
        """Return the name that the decoder's own class has for a tensor of a file; the class's for all others."""
        name = self.class_name(stored)
        return DECODER + name.removeprefix(self.prefix) if name.startswith(self.prefix) else name

    def held_name(self, own: str) -> str:
        """Return the name that the class has for a tensor of the decoder's own class."""
        return self.prefix + own.removeprefix(DECODER) if own.startswith(DECODER) else own

    def with_decoder(self, raw: Json, decoder: Json) -> Json:
        """Return config.json with a changed decoder; the dtype is also that of the whole."""
        whole = {**raw, self.entry: {key: value for key, value in decoder.items() if key not in shared(raw, self)}}
        if decoder.get("dtype", raw.get("dtype")) != raw.get("dtype"):
            whole.pop("torch_dtype", None)
            whole["dtype"] = decoder["dtype"]
        return whole


def shared(raw: Json, wrapper: Wrapper) -> Json:
    """Return the entries that config.json states once for the whole and that hold for the decoder."""
    own = raw.get(wrapper.entry)
    return {key: raw[key] for key in ("dtype", "torch_dtype") if key in raw and key not in (own or {})}


WRAPPERS = {each.model_type: each for each in (Wrapper("gemma3"), Wrapper("mistral3"), Wrapper("qwen3_5", renames=()))}


def wrapper_of(raw: Json) -> Wrapper | None:
    """Return how config.json's model type holds its decoder; None if it is the decoder itself."""
    kind = raw.get("model_type")
    return WRAPPERS.get(kind) if isinstance(kind, str) else None


def decoder_config(raw: Json) -> Json:
    """Return the part of config.json that describes the decoder: all of it, except for a wrapper."""
    wrapper = wrapper_of(raw)
    if wrapper is None:
        return raw
    own = raw.get(wrapper.entry)
    return {**(own if isinstance(own, dict) else {}), **shared(raw, wrapper)}


def as_held(family: Family, wrapper: Wrapper | None) -> Family:
    """Return a decoder's family as a wrapper holds it: what only the decoder's own class could load is not written."""
    return family if wrapper is None else replace(family, held_by=wrapper.model_type, like_llama=False)
