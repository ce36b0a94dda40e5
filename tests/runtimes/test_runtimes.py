"""The rules for which runtime loads an export: one row per runtime, and every place prints the same."""

import json

import pytest

from a3cli.runtimes import NO, UNTRIED, YES, Verdict, judge, summarise, tokenizer_class_of
from a3cli.runtimes.rules import RULES

BASE = {"model_type": "mistral", "hidden_size": 512, "num_attention_heads": 4, "head_dim": 96}
LLAMA, QWEN2, QWEN3, SMOLLM3 = (BASE | {"model_type": kind} for kind in ("llama", "qwen2", "qwen3", "smollm3"))
PHI3, FACTORS = BASE | {"model_type": "phi3"}, {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
STARCODER2, NEMOTRON = BASE | {"model_type": "starcoder2"}, BASE | {"model_type": "nemotron"}
LONGROPE, LINEAR, THETA, LLAMA3, YARN = (
    {"rope_parameters": {"rope_type": kind}} for kind in ("longrope", "linear", "default", "llama3", "yarn")
)
GEMMA3 = BASE | {"model_type": "gemma3_text"}


def two_ropes(full: float, sliding: float, rope_type: str = "default") -> dict:
    """Return RoPE as Gemma 3 has it."""
    tables = {
        "full_attention": {"rope_type": rope_type, "rope_theta": full},
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }
    return {"rope_parameters": tables}


PER_LAYER = {"per_layer_config": {"0": {}}}


def verdicts(config: dict, *, smaller_heads: bool = True, **more) -> dict[str, Verdict]:
    return {each.runtime: each for each in judge(config, smaller_heads=smaller_heads, **more)}


@pytest.mark.parametrize(
    ("runtime", "config", "loads", "note"),
    [
        ("transformers 5", BASE | LONGROPE, YES, ""),
        ("transformers 5", BASE | PER_LAYER, YES, "trust_remote_code=True"),
        ("transformers 5", NEMOTRON | LONGROPE, YES, ""),
        ("transformers 4.57", BASE | LINEAR, YES, ""),
        ("transformers 4.57", BASE | PER_LAYER, YES, "trust_remote_code=True"),
        ("transformers 4.57", NEMOTRON | LONGROPE, NO, "ignores RoPE type longrope"),
        ("transformers 4.57", NEMOTRON | THETA, YES, ""),
        ("transformers 4.57", PHI3 | {"rope_scaling": {"type": "longrope", **FACTORS}}, YES, ""),
        ("transformers 4.57", PHI3 | {"rope_scaling": {"rope_type": "longrope", **FACTORS}}, NO, "refuses"),
        ("transformers 4.57", PHI3 | {"rope_scaling": {"type": "longrope", "factor": 2.0, **FACTORS}}, NO, "refuses"),
        ("transformers 4.57", BASE | {"model_type": "ministral3"}, NO, "does not have ministral3"),
        ("transformers 4.57", BASE | {"model_type": "qwen3_5_text"}, NO, "does not have qwen3_5_text"),
        ("transformers 5", BASE | {"model_type": "qwen3_5_text"}, YES, "from 5.2 on"),
        ("transformers 5", BASE | PER_LAYER | {"model_type": "qwen3_5_text"}, YES, "in the folder; from 5.2 on"),
        (
            "vLLM",
            BASE | {"model_type": "ministral3"} | LONGROPE,
            UNTRIED,
            "not tried with ministral3 and smaller heads",
        ),
        ("vLLM", BASE | LONGROPE, YES, ""),
        ("vLLM", BASE | THETA, YES, ""),
        ("vLLM", BASE | LINEAR, YES, "longer context"),
        ("vLLM", BASE | LLAMA3, YES, ""),
        ("vLLM", BASE | THETA | {"head_dim": 88}, YES, "refuses head size 88"),
        ("vLLM", BASE | THETA | {"head_dim": 40}, YES, "refuses head size 40"),
        ("vLLM", BASE | PER_LAYER, YES, "--model-impl transformers"),
        ("vLLM", QWEN2 | PER_LAYER, YES, "--model-impl transformers"),
        ("vLLM", STARCODER2 | PER_LAYER, NO, "stops with an error"),
        ("vLLM", NEMOTRON | PER_LAYER, YES, "--model-impl transformers"),
        *(
            ("vLLM", BASE | {"model_type": each} | PER_LAYER, NO, f"stops with an error for {each}")
            for each in ("opt", "gpt2", "mixtral", "mpt", "qwen3_5_text")
        ),
        ("vLLM", BASE | {"model_type": "qwen3_5_text"}, UNTRIED, "whose class it does not load on a CPU"),
        ("vLLM", QWEN3 | THETA, YES, ""),
        ("vLLM", BASE | {"model_type": "gemma3_text"} | LONGROPE, YES, ""),
        ("vLLM", QWEN2 | THETA, NO, "ignores head_dim"),
        ("vLLM", STARCODER2 | LONGROPE, YES, ""),
        ("vLLM", NEMOTRON | THETA, YES, ""),
        ("vLLM", NEMOTRON | LONGROPE, UNTRIED, "not tried with nemotron and RoPE type longrope"),
        ("vLLM", BASE | {"model_type": "granite"} | PER_LAYER, YES, "--model-impl transformers"),
        ("vLLM", BASE | {"model_type": "granite"} | LONGROPE, YES, ""),
        ("vLLM", QWEN3 | PER_LAYER, YES, "--model-impl transformers"),
        ("vLLM", BASE | {"model_type": "phi3"} | PER_LAYER, UNTRIED, "not tried with phi3 per-layer"),
        ("transformers 4.57", QWEN3 | PER_LAYER, YES, "trust_remote_code=True"),
        ("transformers 4.57", BASE | {"model_type": "gemma2"} | THETA, YES, "does not cap attention scores"),
        ("llama.cpp", BASE | LONGROPE, NO, "drops the longrope factors"),
        ("llama.cpp", BASE | THETA, YES, ""),
        ("llama.cpp", BASE | LINEAR, YES, ""),
        ("llama.cpp", BASE | LLAMA3, UNTRIED, "llama3"),
        ("llama.cpp", BASE | PER_LAYER, NO, "differ"),
        ("llama.cpp", QWEN2 | THETA, NO, "ignores head_dim"),
        ("llama.cpp", STARCODER2 | THETA, NO, "ignores head_dim"),
        ("OpenVINO", BASE | LONGROPE, YES, "optimum-intel"),
        ("OpenVINO", BASE | PER_LAYER, NO, "tracing"),
        ("ONNX Runtime GenAI", BASE | LONGROPE, NO, "ignores RoPE type longrope"),
        ("ONNX Runtime GenAI", BASE | LINEAR, NO, "ignores RoPE type linear"),
        ("ONNX Runtime GenAI", BASE | THETA, YES, ""),
        ("ONNX Runtime GenAI", BASE | THETA | {"head_dim": 88}, NO, "multiple of 16"),
        ("ONNX Runtime GenAI", BASE | PER_LAYER, NO, "architecture"),
        ("MLX", BASE | LONGROPE, YES, ""),
        ("MLX", BASE | PER_LAYER, NO, "shapes"),
        ("MLX", QWEN2 | THETA, NO, "ignores head_dim"),
        ("CTranslate2", BASE | THETA, YES, ""),
        ("CTranslate2", BASE | LINEAR, YES, ""),
        ("CTranslate2", BASE | LONGROPE, NO, "no longrope"),
        ("CTranslate2", LLAMA | THETA, NO, "ignores head_dim"),
        ("CTranslate2", QWEN2 | THETA, NO, "ignores head_dim"),
        ("CTranslate2", BASE | PER_LAYER, NO, "differ"),
    ],
)
def test_rules(runtime, config, loads, note):
    found = verdicts(config)[runtime]
    assert found.loads == loads
    assert note in found.note
    assert bool(note) == bool(found.note)


@pytest.mark.parametrize(
    "config", [LLAMA, QWEN2, QWEN3, STARCODER2, LLAMA | YARN | {"rope_theta": 1e4}, LLAMA | {"head_dim": 40}]
)
def test_whole_heads_load_where_the_source_loads(config):
    found = verdicts(config, smaller_heads=False)
    assert {each.loads for each in found.values()} == {YES}
    assert all("as it loads the source" in each.note for name, each in found.items() if "transformers" not in name)


@pytest.mark.parametrize(
    ("config", "loads"),
    [
        (QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, NO),
        (QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6}, YES),
        (QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, YES),
        (QWEN3 | {"rope_theta": 1e6}, YES),
        (LLAMA | YARN, NO),
        (SMOLLM3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}, YES),
        (SMOLLM3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, NO),
        (GEMMA3 | two_ropes(1e6, 1e4), YES),
        (GEMMA3 | two_ropes(1e5, 1e4), NO),
        (GEMMA3 | two_ropes(1e6, 1e3), NO),
        (GEMMA3 | two_ropes(1e6, 1e4, rope_type="linear"), NO),
        (GEMMA3 | two_ropes(1e5, 1e3) | {"rope_theta": 1e5, "rope_local_base_freq": 1e3}, YES),
        (GEMMA3 | two_ropes(1e5, 1e3) | {"rope_theta": 1e5}, NO),
        (PHI3 | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}, NO),
        (PHI3 | {"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": 0.75}, YES),
    ],
)
def test_rope_that_transformers_4_does_not_find(config, loads):
    """A source that transformers 5 saved; smaller heads and layers of their own get both spellings."""
    assert verdicts(config, smaller_heads=False)["transformers 4.57"].loads == loads
    for written in (verdicts(config), verdicts(config | PER_LAYER, smaller_heads=False)):
        assert written["transformers 4.57"].loads == YES


def test_a_decoder_inside_another_type_was_tried_with_transformers_5_alone():
    found = verdicts(BASE | THETA, held_by="mistral3")
    assert {name for name, each in found.items() if each.loads == YES} == {"transformers 5"}
    assert all("mistral3" in each.note for each in found.values() if each.loads == UNTRIED)
    whole = verdicts(BASE, smaller_heads=False, held_by="mistral3")
    assert {name for name, each in whole.items() if each.loads != YES} == {"transformers 4.57"}


def test_the_tokenizer_of_transformers_5_is_not_read_by_4(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    named = tokenizer_class_of(tmp_path)
    assert "TokenizersBackend" in verdicts(BASE, tokenizer_class=named)["transformers 4.57"].note
    assert "TokenizersBackend" not in verdicts(BASE, tokenizer_class="LlamaTokenizer")["transformers 4.57"].note
    assert tokenizer_class_of(tmp_path / "none") is None


def test_the_older_spelling_of_rope_says_the_same():
    old = BASE | {"rope_scaling": {"type": "longrope"}}
    assert judge(old, smaller_heads=True) == judge(BASE | LONGROPE, smaller_heads=True)
    assert verdicts(BASE | {"rope_scaling": None})["ONNX Runtime GenAI"].loads == YES


def test_smaller_heads_of_a_qwen2_are_read_if_it_is_written_as_a_llama():
    """Where Llama's class ignores them as well, --as is no remedy."""
    before = verdicts(QWEN2 | THETA, could_be_llama=True)
    for runtime in ("vLLM", "llama.cpp", "MLX"):
        assert before[runtime].note == "its class for qwen2 ignores head_dim; export with --as llama"
        assert "--components mlp" in verdicts(QWEN2 | THETA)[runtime].note
    assert "--components mlp" in before["CTranslate2"].note


def test_what_loads_the_source_says_nothing_of_another_model_type():
    whole = verdicts(LLAMA | THETA | {"head_dim": 88}, smaller_heads=False, retyped=True)
    assert (whole["ONNX Runtime GenAI"].loads, whole["MLX"].loads) == (NO, YES)
    assert not any("as it loads the source" in each.note for each in whole.values())


def test_summary_names_who_does_not_load_it_and_why():
    line = summarise(judge(BASE | LONGROPE, smaller_heads=True))
    loading, _, refusing = line.partition("; not with ")
    assert loading == "transformers 5, transformers 4.57, vLLM, OpenVINO, MLX"
    assert "llama.cpp (its converter drops" in refusing
    assert summarise([Verdict("one", YES), Verdict("two", UNTRIED, "x")]) == "one"


def test_plan_export_and_card_speak_from_the_rules(a3, work, tmp_path):
    out = tmp_path / "out"
    shown = a3("export", out, "--work", work).stdout
    manifest, card = json.loads((out / "a3_manifest.json").read_text()), (out / "README.md").read_text()
    smaller_heads = manifest["solution"]["sizes"][0]["qk"] < manifest["solution"]["full_size"]["qk"]
    expected = judge(
        json.loads((out / "config.json").read_text()),
        smaller_heads=smaller_heads,
        tokenizer_class=tokenizer_class_of(out),
    )
    assert [Verdict(**each) for each in manifest["runtimes"]] == expected
    for each in manifest["runtimes"]:
        assert f"| {each['runtime']} | {each['loads']} | {each['note']} |" in card
        assert each["runtime"] in shown
    plan = a3("plan", out.parent / "source", "--seq-len", 32, "--head-multiple", 2, "--mlp-multiple", 8, "--json").json
    assert [each["runtime"] for each in plan["runtimes"]] == list(RULES)
