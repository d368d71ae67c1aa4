"""The sizes of real models, from which each benchmark's `model` suite takes its shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One language model as its config.json has it; `source` is the repository on the Hugging Face hub that holds it.

    window: keys that a windowed layer's query sees, itself included; softcap: of the attention's scores; activation and norm: of every
    layer. intermediate_size is a dense layer's, or one expert's where there are experts (num_experts, top_k of them a token).
    """

    name: str
    source: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm: str = "rms_norm"
    activation: str = "swiglu"
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    num_experts: int = 0
    top_k: int = 0


GPT_2 = Model("GPT-2", "openai-community/gpt2", 768, 12, 12, 64, 3072, 50257, norm="layer_norm", activation="gelu")
SMOLLM2_135M = Model("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", 576, 9, 3, 64, 1536, 49152)
LLAMA_32_1B = Model("Llama-3.2-1B", "meta-llama/Llama-3.2-1B", 2048, 32, 8, 64, 8192, 128256)
LLAMA_3_8B = Model("Llama-3-8B", "meta-llama/Meta-Llama-3-8B", 4096, 32, 8, 128, 14336, 128256)
GEMMA_2_9B = Model("Gemma-2-9B", "google/gemma-2-9b", 3584, 16, 8, 256, 14336, 256000, activation="geglu", window=4096, softcap=50.0)
GEMMA_3_4B = Model("Gemma-3-4B", "google/gemma-3-4b-it", 2560, 8, 4, 256, 10240, 262208, activation="geglu", window=1024)
QWEN3_30B_A3B = Model("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", 2048, 32, 4, 128, 768, 151936, num_experts=128, top_k=8)
GPT_OSS_20B = Model(
    "gpt-oss-20b", "openai/gpt-oss-20b", 2880, 64, 8, 64, 2880, 201088, window=128, sinks=True, num_experts=32, top_k=4
)  # fmt: skip
MIXTRAL_8X7B = Model("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1", 4096, 32, 8, 128, 14336, 32000, num_experts=8, top_k=2)

MODELS = (GPT_2, SMOLLM2_135M, LLAMA_32_1B, LLAMA_3_8B, GEMMA_2_9B, GEMMA_3_4B, QWEN3_30B_A3B, GPT_OSS_20B, MIXTRAL_8X7B)
SMALL = (GPT_2, SMOLLM2_135M)  # whose every matrix a CPU multiplies while one waits
MIXTURES = tuple(model for model in MODELS if model.num_experts)


def labelled(model: str, shape_id: str) -> str:
    """A row's id, with the model that its shape is from in front of it."""
    return f"{model}-{shape_id}" if model else shape_id
