"""The sizes of well-known models, as the config.json on their cards has them, and what the cards say of the result."""

from dataclasses import dataclass, field
from typing import Any

from a3cli.models.families import FAMILIES


@dataclass(frozen=True)
class Published:
    """A row of the table: sizes by their usual names, and the number of parameters that the card gives.

    `head` is the head size; config.json says it if it is not hidden size over heads. `most` is the largest share that
    rounding to the default multiples may remove where a quarter was asked for.
    """

    model_type: str
    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    parameters: int
    tied: bool = False
    context: int = 32768
    most: float = 0.26
    more: dict[str, Any] = field(default_factory=dict)
    experts: int = 1
    multiple: int = 64  # of MLP widths, with which a quarter of the weights can be removed

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json, under the names that the type has for Llama's entries."""
        family = FAMILIES[self.model_type]
        head = {} if self.head * self.heads == self.hidden else {"head_dim": self.head}
        rotated = {"num_key_value_heads": self.kv_heads, "rope_theta": 1e6} if family.rotates else {}
        content = {
            "model_type": self.model_type,
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            **head,
            **rotated,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.context,
            **self.more,
        }
        if family.mlp_ratio is not None:  # such cards leave the width out
            del content["intermediate_size"]
        return {family.names.get(key, key): value for key, value in content.items()}

    @property
    def cache(self) -> int:
        """Return the bytes of the KV cache per token in bfloat16."""
        layers = self.layers // self.more.get("full_attention_interval", 1)  # the others have linear attention
        return 2 * layers * self.kv_heads * self.head * 2


LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
NO_WINDOW = {"sliding_window": None}
GEMMA3 = {"rope_local_base_freq": 10000.0, "sliding_window": 512, "query_pre_attn_scalar": 256}
QWEN3 = {"attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}

# model_type, hidden, width, layers, heads, KV heads, head size, vocabulary, parameters
PUBLISHED: dict[str, Published] = {
    "Llama-3.2-1B": Published(
        "llama", 2048, 8192, 16, 32, 8, 64, 128256, 1_235_814_400, tied=True, context=131072, more=LLAMA3
    ),
    "Llama-3.2-3B": Published(
        "llama", 3072, 8192, 28, 24, 8, 128, 128256, 3_212_749_824, tied=True, context=131072, more=LLAMA3
    ),
    "Llama-3.1-8B": Published(
        "llama", 4096, 14336, 32, 32, 8, 128, 128256, 8_030_261_248, context=131072, more=LLAMA3
    ),
    "Llama-3.1-70B": Published(
        "llama", 8192, 28672, 80, 64, 8, 128, 128256, 70_553_706_496, context=131072, more=LLAMA3
    ),
    "Llama-2-13b": Published("llama", 5120, 13824, 40, 40, 40, 128, 32000, 13_015_864_320, context=4096),
    "TinyLlama-1.1B": Published("llama", 2048, 5632, 22, 32, 4, 64, 32000, 1_100_048_384, context=2048),
    "SmolLM2-135M": Published("llama", 576, 1536, 30, 9, 3, 64, 49152, 134_515_008, tied=True, context=8192),
    "SmolLM2-360M": Published("llama", 960, 2560, 32, 15, 5, 64, 49152, 361_821_120, tied=True, context=8192),
    "SmolLM2-1.7B": Published("llama", 2048, 8192, 24, 32, 32, 64, 49152, 1_711_376_384, tied=True, context=8192),
    "Falcon3-7B": Published("llama", 3072, 23040, 28, 12, 4, 256, 131072, 7_455_550_464),
    "Mistral-7B-v0.3": Published("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 7_248_023_552, more=NO_WINDOW),
    "Mistral-Nemo-12B": Published(
        "mistral", 5120, 14336, 40, 32, 8, 128, 131072, 12_247_782_400, context=131072, more=NO_WINDOW
    ),
    "Ministral-8B": Published(
        "mistral", 4096, 12288, 36, 32, 8, 128, 131072, 8_019_808_256, more={"sliding_window": 32768}
    ),
    "Mistral-Small-24B": Published("mistral", 5120, 32768, 40, 32, 8, 128, 131072, 23_572_403_200, more=NO_WINDOW),
    "Qwen2.5-0.5B": Published("qwen2", 896, 4864, 24, 14, 2, 64, 151936, 494_032_768, tied=True),
    "Qwen2.5-7B": Published("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 7_615_616_512, context=131072),
    "Qwen2.5-Coder-3B": Published("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, 3_085_938_688, tied=True),
    "Qwen2.5-72B": Published("qwen2", 8192, 29568, 80, 64, 8, 128, 152064, 72_706_203_648, context=131072),
    "DeepSeek-R1-Distill-Qwen-1.5B": Published(
        "qwen2", 1536, 8960, 28, 12, 2, 128, 151936, 1_777_088_000, context=131072
    ),
    "Qwen3-0.6B": Published(
        "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 596_049_920, tied=True, context=40960, more=QWEN3
    ),
    "Qwen3-4B": Published(
        "qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 4_022_468_096, tied=True, context=40960, more=QWEN3
    ),
    "Qwen3-8B": Published("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 8_190_735_360, context=40960, more=QWEN3),
    "Qwen3-32B": Published("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 32_762_123_264, context=40960, more=QWEN3),
    "Mixtral-8x7B-v0.1": Published(
        "mixtral", 4096, 14336, 32, 32, 8, 128, 32000, 46_702_792_704, more=NO_WINDOW | {"num_local_experts": 8},
        experts=8,
    ),
    "Qwen3-30B-A3B": Published(
        "qwen3_moe", 2048, 768, 48, 32, 4, 128, 151936, 30_532_122_624, context=40960,
        more=QWEN3 | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1},
        experts=128, multiple=8,
    ),
    "Qwen3.5-27B": Published(  # without its vision tower
        "qwen3_5_text", 5120, 17408, 64, 24, 4, 256, 248320, 26_895_998_464, context=262144,
        more={
            "full_attention_interval": 4,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 48,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    ),
    "Gemma-3-270M": Published(
        "gemma3_text", 640, 2048, 18, 4, 1, 256, 262144, 268_098_176, tied=True, more=GEMMA3, most=0.27
    ),
    "Gemma-3-1B": Published("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, 999_885_952, tied=True, more=GEMMA3),
    "Gemma-3-27B": Published(  # without its vision tower of 423,060,336 parameters
        "gemma3_text", 5376, 21504, 62, 32, 16, 128, 262208, 27_009_346_304, tied=True, context=131072,
        more={**GEMMA3, "sliding_window": 1024, "query_pre_attn_scalar": 168},
    ),
    "Phi-4": Published("phi3", 5120, 17920, 40, 40, 10, 128, 100352, 14_659_507_200, context=16384),
    "Phi-4-mini": Published(
        "phi3", 3072, 8192, 32, 24, 8, 128, 200064, 3_836_021_760, tied=True, more={"partial_rotary_factor": 0.75}
    ),
    "Phi-3-medium-4k": Published("phi3", 5120, 17920, 40, 40, 10, 128, 32064, 13_960_238_080, context=4096),
    "SmolLM3-3B": Published(
        "smollm3", 2048, 11008, 36, 16, 4, 128, 128256, 3_075_098_624, tied=True, context=65536,
        more={"no_rope_layers": [1, 1, 1, 0] * 9},
    ),
    "granite-3.1-2b": Published("granite", 2048, 8192, 40, 32, 8, 64, 49155, 2_533_531_648, tied=True, context=131072),
    "granite-3.1-8b": Published(
        "granite", 4096, 12800, 40, 32, 8, 128, 49155, 8_170_848_256, tied=True, context=131072
    ),
    "starcoder2-3b": Published(
        "starcoder2", 3072, 12288, 30, 24, 2, 128, 49152, 3_030_371_328, tied=True, context=16384
    ),
    "starcoder2-15b": Published("starcoder2", 6144, 24576, 40, 48, 4, 128, 49152, 15_957_889_024, context=16384),
    "opt-125m": Published("opt", 768, 3072, 12, 12, 12, 64, 50272, 125_239_296, tied=True, context=2048),
    "opt-6.7b": Published("opt", 4096, 16384, 32, 32, 32, 128, 50272, 6_658_473_984, tied=True, context=2048),
    "gpt2": Published("gpt2", 768, 3072, 12, 12, 12, 64, 50257, 124_439_808, tied=True, context=1024),
    "gpt2-xl": Published("gpt2", 1600, 6400, 48, 25, 25, 64, 50257, 1_557_611_200, tied=True, context=1024),
    "mpt-7b": Published("mpt", 4096, 16384, 32, 32, 32, 128, 50432, 6_649_286_656, tied=True, context=2048),
    "Minitron-4B": Published(
        "nemotron", 3072, 9216, 32, 24, 8, 128, 256000, 4_190_509_056, context=4096,
        more={"partial_rotary_factor": 0.5},
    ),
}  # fmt: skip
