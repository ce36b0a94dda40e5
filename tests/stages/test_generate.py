"""`a3 generate`: two models continue the same prompts, as transformers would, one at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3cli.stages.generate import choose_token
from tests.conftest import CONTEXT, SOLVE, but, refused

pytestmark = pytest.mark.usefixtures("hasty")
PROMPTS = ("Once upon a time", "def main():")


@pytest.fixture
def export(a3, prepared, tmp_path) -> Path:
    assert a3("export", tmp_path / "out", "--work", prepared / "work").code == 0
    return tmp_path / "out"


def expected(folder: Path, prompt: str, count: int) -> list[int]:
    """What stock transformers writes, greedily."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(**tokens, **options)[0, tokens["input_ids"].shape[1] :].tolist()


def given(prompts=PROMPTS) -> tuple[str, ...]:
    return tuple(word for prompt in prompts for word in ("--prompt", prompt))


def test_both_models_continue_as_transformers_does(a3, export, prepared):
    source = prepared / "source"
    result = a3("generate", export, "--against", source, *given(), "--max-new-tokens", 12, "--json").json
    assert (result["model"], result["against"]) == (str(export), str(source))
    tokenizer = AutoTokenizer.from_pretrained(source)
    for prompt, each in zip(PROMPTS, result["prompts"], strict=True):
        assert each["prompt"] == prompt
        for role, folder in (("model", export), ("against", source)):
            tokens = expected(folder, prompt, 12)
            assert each[role]["tokens"] == tokens
            assert each[role]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
            assert each[role]["ended"] == (tokens[-1] == 0)
        both = zip(each["model"]["tokens"], each["against"]["tokens"], strict=False)
        assert each["same_tokens"] == next((i for i, (a, b) in enumerate(both) if a != b), 12)
    itself = a3("generate", source, "--against", source, *given(), "--json").json["prompts"]
    assert all(each["same_tokens"] == len(each["model"]["tokens"]) for each in itself)
    alone = a3("generate", export, *given(PROMPTS[1:]), "--max-new-tokens", 12, "--json").json
    assert "against" not in alone
    assert alone["prompts"] == [{key: result["prompts"][1][key] for key in ("prompt", "model")}]


def test_an_end_token_ends_the_text(a3, prepared, tmp_path):
    source = shutil.copytree(prepared / "source", tmp_path / "source")
    tokens = expected(source, PROMPTS[0], 6)
    stop = next(token for i, token in enumerate(tokens) if i > 0 and token not in tokens[:i])
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [stop], "repetition_penalty": 9.0}))
    (found,) = a3("generate", source, *given(PROMPTS[:1]), "--max-new-tokens", 6, "--json").json["prompts"]
    assert found["model"]["tokens"] == tokens[: tokens.index(stop) + 1]  # without the penalty
    assert found["model"]["ended"] is True


def test_samples_follow_seed_and_temperature(a3, prepared):
    def tokens(*options: object, prompts=PROMPTS) -> list[list[int]]:
        words = (*given(prompts), "--max-new-tokens", 12, "--json")
        found = a3("generate", prepared / "source", *words, *options).json["prompts"]
        return [each["model"]["tokens"] for each in found]

    greedy, drawn = tokens(), tokens("--temperature", 2)
    assert drawn != greedy
    assert tokens("--temperature", 2) == drawn
    assert tokens("--temperature", 2, prompts=PROMPTS[1:]) == drawn[1:]  # whatever else is asked
    assert tokens("--temperature", 2, "--seed", 1) != drawn
    assert tokens("--temperature", 1e-6) == greedy


def test_tokens_are_drawn_from_the_distribution():
    logits, temperature, draws = torch.tensor([0.0, 1.0, 2.0, -20.0]), 0.7, 4000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose_token(logits, temperature, generator) for _ in range(draws)])
    found = drawn.bincount(minlength=4) / draws
    torch.testing.assert_close(found, (logits / temperature).softmax(-1), atol=0.03, rtol=0)


def test_prompts_from_a_file(a3, prepared, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufefffirst, with a comma\n\n  \nzwölf\n", "utf-8")
    words = ("generate", prepared / "source", "--max-new-tokens", 2, "--json")
    found = a3(*words, "--prompt", "a, b", "--prompts", file).json["prompts"]
    assert [each["prompt"] for each in found] == ["a, b", "first, with a comma", "zwölf"]
    file.write_bytes(b"\xff\xfe\x00")
    refused(a3(*words, "--prompts", file), f"--prompts {file} cannot be read", "UTF-8")
    refused(a3(*words, "--prompts", tmp_path / "none.txt"), "none.txt cannot be read")


def test_what_cannot_be_continued_is_refused_before_a_model_is_loaded(a3, prepared, monkeypatch):
    monkeypatch.setattr("a3cli.stages.generate.load_model", pytest.fail)
    words = ("generate", prepared / "source")
    refused(a3(*words), "nothing to continue: give --prompt TEXT, or --prompts FILE")
    refused(a3(*words, "--prompt", "x" * CONTEXT), f"'{'x' * 40}…' has 256 tokens", "--max-new-tokens 50", "(256)")
    refused(a3(*words, "--prompt", ""), "--prompt")
    refused(a3(*words, "--prompt", "x", "--temperature", -1), "--temperature")
    monkeypatch.setattr("a3cli.stages.generate.available_memory", lambda *_: 1000)
    refused(a3(*words, "--prompt", "x"), "GB to generate, 0.00 GB are free", "--dtype bfloat16")


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(a3, prepared, tmp_path, temperature):
    source = shutil.copytree(prepared / "source", tmp_path / "source")
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][0] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
    words = ("--prompt", "x", "--temperature", temperature)
    refused(a3("generate", source, *words, "--quiet"), "the logits of token 2 are not finite", "--dtype float32")


def test_code_of_a_per_layer_export_runs_only_if_allowed(a3, prepared, work, tmp_path):
    out = tmp_path / "per-layer"
    assert a3(*but(SOLVE, "--budget", 0.3), "--shape", "per-layer", "--overwrite", "--work", work).code == 0
    assert a3("export", out, "--work", work).code == 0
    words = ("generate", out, "--against", prepared / "source", *given(), "--max-new-tokens", 4)
    refused(a3(*words), "--trust-remote-code")
    found = a3(*words, "--trust-remote-code", "--json").json["prompts"]
    assert [len(each["model"]["tokens"]) for each in found] == [4, 4]


def test_continuations_are_shown_side_by_side(a3, export, prepared):
    outcome = a3("generate", export, "--against", prepared / "source", *given(("a\x1b[1m\nb",)), "--max-new-tokens", 3)
    assert outcome.code == 0
    assert "\\x1b[1m\\nb" in outcome.stdout
    heading = next(line for line in outcome.stdout.splitlines() if "prompt" in line)
    assert heading.index("prompt") < heading.index(str(export)) < heading.index(str(prepared / "source"))
    assert "of 3" in outcome.stdout
