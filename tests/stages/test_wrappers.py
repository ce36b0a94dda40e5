"""A decoder inside another model type: the whole is written again, with a smaller decoder and the rest as it was.

The wrapper is a tiny Mistral 3 with a vision tower. Its export is opened by transformers alone.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Ministral3ForCausalLM, Mistral3Config
from transformers import Mistral3ForConditionalGeneration as Mistral3

from tests.conftest import GROWING, SHORT, VOCABULARY, build_model, build_tokenizer, refused

pytestmark = pytest.mark.usefixtures("hasty")

IMAGE = 5  # the token in place of a part of an image
VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
}
SOLVE = ("solve", "--attention-budget", 0.3, "--mlp-budget", 0.3, "--head-multiple", 2, "--mlp-multiple", 8)
PROCESSOR = {"processor_class": "PixtralProcessor", "spatial_merge_size": 2}


def build_wrapper(*, tied: bool) -> Any:
    """Return a random model around the decoder of the table."""
    decoder = build_model("ministral3-gqa", tie_word_embeddings=tied)
    config = Mistral3Config(
        text_config=decoder.config.to_dict(),
        vision_config=VISION,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    model = Mistral3(config).eval()
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    return model


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
    folder = tmp_path_factory.mktemp("wrappers")
    build_wrapper(tied=False).save_pretrained(folder / "old")
    build_tokenizer().save_pretrained(folder / "old")
    (folder / "old" / "processor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "old" / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(folder / "old", folder / "new")
    tensors = load_file(folder / "old" / "model.safetensors")
    assert any(name.startswith("language_model.model.layers.0.") for name in tensors)
    renamed = {as_of_the_class(name): value for name, value in tensors.items()}
    save_file(renamed, folder / "new" / "model.safetensors", metadata={"format": "pt"})
    return {"old": folder / "old", "new": folder / "new"}


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
def decoder_of(folder: Path, source: Path) -> torch.Tensor:
    """Return the logits of the exported decoder in its own class, from its tensors and its part of config.json."""
    config = json.loads((folder / "config.json").read_text())["text_config"]
    model = Ministral3ForCausalLM(Ministral3ForCausalLM.config_class(**config)).eval()
    own = {as_of_the_class(name): value for name, value in load_file(folder / "model.safetensors").items()}
    text = {name.replace("model.language_model.", "model."): own[name] for name in own if "vision" not in name}
    model.load_state_dict({name: text[name] for name in model.state_dict()})
    return logits(model)


@pytest.mark.parametrize("names", ["old", "new"])
def test_the_whole_is_written_again(names, a3, sources, text_file, tmp_path):
    source = sources[names]
    out = run_chain(a3, source, text_file, tmp_path, *SOLVE)
    verified = a3("verify", out, "--work", tmp_path / "work", "--require-reference", "--json")
    assert verified.code == 0, verified
    assert {check["outcome"] for check in verified.json["checks"]} == {"passed"}

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source))
    assert ours.keys() == theirs.keys()
    changed = {name for name in theirs if ours[name].shape != theirs[name].shape}
    assert {name.split(".")[-2] for name in changed} == {
        f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert not any("vision" in name or "projector" in name for name in changed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name not in changed and "proj" not in name)

    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    own, was = config.pop("text_config"), before.pop("text_config")
    assert config == before
    assert (own["head_dim"], own["intermediate_size"]) == (10, 64)
    assert own["rope_parameters"]["llama_4_scaling_beta"] == was["rope_parameters"]["llama_4_scaling_beta"]
    assert own["rope_parameters"]["original_max_position_embeddings"] == 64
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()

    small, full = load(out), load(source)
    torch.testing.assert_close(logits(small), decoder_of(out, source), rtol=1e-5, atol=1e-5)
    assert (logits(small) - logits(full)).norm() > 1e-2 * logits(full).norm()
    image = {"pixel_values": torch.randn(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}
    seen = [each.model.get_image_features(**image).pooler_output for each in (small, full)]
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    assert torch.isfinite(logits(small, **image)).all()
    assert not torch.equal(logits(small, **image)[:, 4:], logits(small))
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card


def test_nothing_removed_keeps_every_byte(a3, sources, text_file, tmp_path):
    out = run_chain(a3, sources["old"], text_file, tmp_path, "solve", "--budget", 0)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, sources["old"]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_statistics_are_those_of_the_decoder_alone(a3, sources, checkpoint, text_file, tmp_path):
    """The same weights in a checkpoint of their own give the same bytes."""
    for folder, source in (("whole", sources["old"]), ("alone", checkpoint("ministral3-gqa"))):
        assert a3("calibrate", source, "--dataset", text_file, *SHORT, "--work", tmp_path / folder).code == 0
    for layer in (0, 1):
        name = f"calibration/layer-{layer:03d}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_export_and_source_are_evaluated_and_inspected(a3, sources, text_file, tmp_path, monkeypatch):
    out = run_chain(a3, sources["old"], text_file, tmp_path, *SOLVE)
    command = ("eval", out, "--against", sources["old"], "--dataset", text_file, *SHORT, "--json")
    whole = a3(*command)
    assert whole.code == 0, whole.stderr
    monkeypatch.setattr("a3cli.stages.answers.available_memory", lambda *_: 0)
    streamed = a3(*command).json
    for figure in ("perplexity", "source_perplexity", "kl"):
        assert streamed[figure] == pytest.approx(whole.json[figure], rel=1e-4)
    assert a3("inspect", out, "--json").json["layers"][0]["qk"]["size"] == 10
    assert a3("inspect", tmp_path / "work", "--json").code == 0
    planned = a3("plan", sources["old"], "--budget", 0.2, "--mlp-multiple", 8, "--json")
    assert planned.code == 0, planned.stderr
    assert planned.json["model_type"] == "ministral3"
    assert planned.json["parameters"]["before"] == sum(
        tensor.numel() for tensor in load_file(sources["old"] / "model.safetensors").values()
    )


def test_a_shape_that_needs_code_is_refused_with_the_reason(a3, sources, text_file, tmp_path):
    work = ("--work", tmp_path / "work")
    assert a3("calibrate", sources["old"], "--dataset", text_file, *SHORT, *work).code == 0
    outcome = a3("solve", "--budget", 0.2, "--shape", "per-layer", *work)
    refused(outcome, "--shape per-layer", "ministral3 decoder of a 'mistral3' model", "use --shape stock")
    refused(a3("plan", sources["old"], "--shape", "per-layer"), "'mistral3'", "use --shape stock")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("vision_tower.patch_conv.weight"), ("missing", "vision_tower.patch_conv.weight")),
        (lambda t: t.update({"vision_tower.more": torch.ones(2)}), ("not known to this class", "vision_tower.more")),
        (
            lambda t: t.update({"model.language_model.norm.weight": torch.ones(48)}),
            ("language_model.model.norm.weight and model.language_model.norm.weight", "the same tensor"),
        ),
    ],
)
def test_damaged_tensors_are_refused_before_any_work(damage, words, a3, sources, text_file, tmp_path):
    folder = Path(shutil.copytree(sources["old"], tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work"), *words)


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_fp8_releases_are_refused_with_the_reason(place, a3, sources, text_file, tmp_path):
    folder = Path(shutil.copytree(sources["old"], tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    (config if place == "top" else config["text_config"])["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work")
    refused(outcome, "quantised (fp8", "bf16")


def test_another_decoder_is_refused_by_its_type(a3, sources, text_file, tmp_path):
    folder = Path(shutil.copytree(sources["old"], tmp_path / "source"))
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
