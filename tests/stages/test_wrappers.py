"""A decoder inside another model type: the whole is written again, with a smaller decoder and the rest as it was.

The wrappers are a tiny Mistral 3 and a tiny Gemma 3, each with a vision tower. transformers alone opens their exports.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from tests.conftest import DEFAULT, GROWING, MODELS, SHORT, VOCABULARY, build_model, build_tokenizer, refused

pytestmark = pytest.mark.usefixtures("hasty")

IMAGE = 5  # the token in place of a part of an image
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
PATCHES = "vision_tower.patch_conv.weight"  # in Mistral 3
ROUNDING = ("--head-multiple", 2, "--mlp-multiple", 8)
MLP = ("gate", "up", "down")


@dataclass(frozen=True)
class Held:
    """A wrapper around a decoder of the table, what a solution changes in it, and what else belongs to its checkpoint.

    `sizes` are head size and MLP width of the export, `image` what its class takes beside the pixels.
    """

    config: Any
    model: Any
    decoder: str
    entries: dict[str, Any]
    processor: str
    solve: tuple[Any, ...]
    changed: tuple[str, ...] = MLP
    sizes: tuple[int, int] = (16, 64)
    image: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    def build(self, **overrides: Any) -> Any:
        """Return a random model with the weights of the decoder of the table."""
        decoder = build_model(self.decoder, **overrides)
        tied = decoder.config.tie_word_embeddings
        config = self.config(
            text_config=decoder.config.to_dict(), image_token_index=IMAGE, tie_word_embeddings=tied, **self.entries
        )
        torch.manual_seed(1)
        model = self.model(config).eval()
        model.model.language_model.load_state_dict(decoder.model.state_dict())
        model.lm_head.load_state_dict(decoder.lm_head.state_dict())
        return model


HELD = {
    "mistral3": Held(
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        "ministral3-gqa",
        {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 16}, "spatial_merge_size": 2},
        "PixtralProcessor",
        ("solve", "--attention-budget", 0.3, "--mlp-budget", 0.3, *ROUNDING),
        ("q", "k", "v", "o", *MLP),
        (10, 64),
        {"image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "gemma3": Held(
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        "gemma3-gqa",
        {
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
        "Gemma3Processor",
        ("solve", "--mlp-budget", 0.3, *ROUNDING),
    ),
}


def as_of_the_class(name: str) -> str:
    """Return the name of a tensor that newer files have."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Return checkpoints with names as hubs have them, and with those of the class. Do not write there."""
    made = {}
    for kind, held in HELD.items():
        folder = tmp_path_factory.mktemp(kind)
        held.build().save_pretrained(folder / "old")
        build_tokenizer().save_pretrained(folder / "old")
        (folder / "old" / "processor_config.json").write_text(json.dumps({"processor_class": held.processor}))
        (folder / "old" / "chat_template.jinja").write_text("{{ messages }}")
        shutil.copytree(folder / "old", folder / "new")
        tensors = load_file(folder / "old" / "model.safetensors")
        assert any(name.startswith("language_model.model.layers.0.") for name in tensors)
        renamed = {as_of_the_class(name): value for name, value in tensors.items()}
        save_file(renamed, folder / "new" / "model.safetensors", metadata={"format": "pt"})
        made |= {kind: folder / "old", f"{kind} new": folder / "new"}
    return made


def run_chain(a3, source: Path, text: Path, folder: Path, *solve: object) -> Path:
    work, out = ("--work", folder / "work"), folder / "out"
    for command in (("calibrate", source, "--dataset", text, "--samples", 6, "--seq-len", 80), solve, ("export", out)):
        outcome = a3(*command, *work)
        assert outcome.code == 0, outcome.stderr
    return out


def load(folder: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tokens(length: int = 120) -> torch.Tensor:
    return torch.randint(10, VOCABULARY - 3, (2, length), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(model: Any, **image: torch.Tensor) -> torch.Tensor:
    text = tokens()
    return model(torch.cat([torch.full((2, 4), IMAGE), text], 1) if image else text, **image).logits


@torch.no_grad()
def decoder_of(folder: Path, held: Held) -> torch.Tensor:
    """Return the logits of the exported decoder in its own class, from its tensors and its part of config.json."""
    config_class, model_class, _ = MODELS[held.decoder]
    config = json.loads((folder / "config.json").read_text())["text_config"]
    model = model_class(config_class(**config)).eval()
    own = {as_of_the_class(name): value for name, value in load_file(folder / "model.safetensors").items()}
    text = {name.replace("model.language_model.", "model."): own[name] for name in own if "vision" not in name}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert model.load_state_dict(text, strict=False).missing_keys == [*tied]
    return logits(model)


@pytest.mark.parametrize("spelling", ["", " new"])
@pytest.mark.parametrize("kind", HELD)
def test_the_whole_is_written_again(kind, spelling, a3, sources, text_file, tmp_path):
    source, held = sources[kind + spelling], HELD[kind]
    out = run_chain(a3, source, text_file, tmp_path, *held.solve)
    verified = a3("verify", out, "--work", tmp_path / "work", "--require-reference", "--json")
    assert verified.code == 0, verified
    assert {check["outcome"] for check in verified.json["checks"]} == {"passed"}

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source))
    assert ours.keys() == theirs.keys()
    changed = {name for name in theirs if ours[name].shape != theirs[name].shape}
    assert {name.split(".")[-2] for name in changed} == {f"{each}_proj" for each in held.changed}
    assert not any("vision" in name or "projector" in name for name in changed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name not in changed and "proj" not in name)

    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    own, was = config.pop("text_config"), before.pop("text_config")
    assert config == before
    assert (own["head_dim"], own["intermediate_size"]) == held.sizes
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings", "sliding_attention"):
        assert own["rope_parameters"].get(name) == was["rope_parameters"].get(name)
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()

    small, full = load(out), load(source)
    torch.testing.assert_close(logits(small), decoder_of(out, held), rtol=1e-5, atol=1e-5)
    assert (logits(small) - logits(full)).norm() > 1e-2 * logits(full).norm()
    image = {"pixel_values": torch.randn(2, 3, 16, 16), **held.image}
    with torch.inference_mode():
        seen = [torch.stack([*each.model.get_image_features(**image).pooler_output]) for each in (small, full)]
    assert torch.equal(*seen)
    assert torch.isfinite(logits(small, **image)).all()
    assert not torch.equal(logits(small, **image)[:, 4:], logits(small))
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card


@pytest.mark.parametrize("kind", HELD)
def test_nothing_removed_keeps_every_byte(kind, a3, sources, text_file, tmp_path):
    out = run_chain(a3, sources[kind], text_file, tmp_path, "solve", "--budget", 0)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, sources[kind]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", HELD)
def test_statistics_are_those_of_the_decoder_alone(kind, a3, sources, checkpoint, text_file, tmp_path):
    """The same weights in a checkpoint of their own give the same bytes."""
    for folder, source in (("whole", sources[kind]), ("alone", checkpoint(HELD[kind].decoder))):
        assert a3("calibrate", source, "--dataset", text_file, *SHORT, "--work", tmp_path / folder).code == 0
    for layer in (0, 1):
        name = f"calibration/layer-{layer:03d}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("kind", HELD)
def test_export_and_source_are_evaluated_and_inspected(kind, a3, sources, text_file, tmp_path, monkeypatch):
    source, held = sources[kind], HELD[kind]
    out = run_chain(a3, source, text_file, tmp_path, *held.solve)
    command = ("eval", out, "--against", source, "--dataset", text_file, *SHORT, "--json")
    whole = a3(*command)
    assert whole.code == 0, whole.stderr
    monkeypatch.setattr("a3cli.stages.answers.available_memory", lambda *_: 0)
    streamed = a3(*command).json
    for figure in ("perplexity", "source_perplexity", "kl"):
        assert streamed[figure] == pytest.approx(whole.json[figure], rel=1e-4)
    layer = a3("inspect", out, "--json").json["layers"][0]
    assert (layer["qk"]["size"], layer["mlp"]["size"]) == held.sizes
    assert a3("inspect", tmp_path / "work", "--json").code == 0
    planned = a3("plan", source, "--budget", 0.2, "--mlp-multiple", 8, "--json")
    assert planned.code == 0, planned.stderr
    assert planned.json["model_type"] == MODELS[held.decoder][0].model_type
    assert planned.json["parameters"]["before"] == sum(
        tensor.numel() for tensor in load_file(source / "model.safetensors").values()
    )


def test_sizes_that_config_json_leaves_to_its_class(a3, text_file, tmp_path):
    """Gemma 3 releases say little more than what differs from the defaults of the newest class."""
    usual = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
    source, scaled = tmp_path / "source", {"rope_type": "linear", "factor": 8.0}
    ropes = {"full_attention": scaled | {"rope_theta": 1e6}, "sliding_attention": DEFAULT}
    HELD["gemma3"].build(**usual, hidden_size=64, rope_parameters=ropes).save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    said = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "vocab_size")
    config["text_config"] = {key: config["text_config"][key] for key in said} | {
        "rope_scaling": scaled,
        "sliding_window_pattern": 2,
    }
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    out = run_chain(a3, source, text_file, tmp_path, "solve", "--mlp-budget", 0.3, *ROUNDING)
    own = json.loads((out / "config.json").read_text())["text_config"]
    assert own == config["text_config"] | {"intermediate_size": 64} | {
        key: usual[key] for key in usual if key != "query_pre_attn_scalar"
    } | {"max_position_embeddings": 131072}
    torch.testing.assert_close(logits(load(out)), decoder_of(out, HELD["gemma3"]), rtol=1e-5, atol=1e-5)


def test_a_shape_that_needs_code_is_refused_with_the_reason(a3, sources, text_file, tmp_path):
    work = ("--work", tmp_path / "work")
    assert a3("calibrate", sources["mistral3"], "--dataset", text_file, *SHORT, *work).code == 0
    outcome = a3("solve", "--budget", 0.2, "--shape", "per-layer", *work)
    refused(outcome, "--shape per-layer", "ministral3 decoder of a 'mistral3' model", "use --shape stock")
    refused(a3("plan", sources["mistral3"], "--shape", "per-layer"), "'mistral3'", "use --shape stock")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(PATCHES), ("missing", PATCHES)),
        (lambda t: t.update({"vision_tower.more": torch.ones(2)}), ("not known to this class", "vision_tower.more")),
        (
            lambda t: t.update({"model.language_model.norm.weight": torch.ones(48)}),
            ("language_model.model.norm.weight and model.language_model.norm.weight", "the same tensor"),
        ),
    ],
)
def test_damaged_tensors_are_refused_before_any_work(damage, words, a3, sources, text_file, tmp_path):
    folder = Path(shutil.copytree(sources["mistral3"], tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work"), *words)


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_fp8_releases_are_refused_with_the_reason(place, a3, sources, text_file, tmp_path):
    folder = Path(shutil.copytree(sources["mistral3"], tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    (config if place == "top" else config["text_config"])["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work")
    refused(outcome, "quantised (fp8", "bf16")


def test_another_decoder_is_refused_by_its_type(a3, sources, text_file, tmp_path):
    folder = Path(shutil.copytree(sources["mistral3"], tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "mamba"
    (folder / "config.json").write_text(json.dumps(config))
    refused(a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work"), "'mamba' is not supported")


def test_queries_that_grow_need_numbers(a3, checkpoint, text_file, tmp_path):
    folder = Path(shutil.copytree(checkpoint("ministral3-gqa"), tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**GROWING, "llama_4_scaling_beta": -1.0}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work")
    refused(outcome, "llama_4_scaling_beta is -1.0")
