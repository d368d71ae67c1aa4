"""The matrix of Hugging Face models on fastattn: families of models × what is done with them × the way they reach fastattn.

    python tests/transformers_matrix.py --write          runs every cell and writes docs/matrix.md; fails where a cell does

A cell is right where it equals eager attention in transformers' own modules: float results within the error budget of fastattn.testing,
with eager in float64 as the truth and eager in float32 as the naive one, tokens exactly. A cell that does not apply is in WHY_NOT with the
reason. test_transformers_matrix.py runs the cells as tests.

Models are random, with weights large enough that attention matters, of two layers; each is built once, and eager's results are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from fastattn.integrations import transformers as on_transformers
from fastattn.testing.budget import check_budget

PAGE = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"

# --------------------------------------------------------------------------------------------------------------------
# Families.

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # no text ends early
COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
LLAMA = {**COMMON, **IDS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
WINDOW = 8
TWO_KINDS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = {**IDS, "vocab_size": 64, "d_model": 32, "decoder_start_token_id": 0}


@dataclass(frozen=True)
class Family:
    """`model` and `config` are names in transformers; what is done with a model depends on its kind: decoder, encoder, seq2seq, vision."""

    model: str
    config: str
    options: dict[str, Any]
    kind: str = "decoder"
    slides: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.model)(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith(("bias", "sinks")):  # ones and zeros otherwise
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3 if not name.endswith("sinks") else 2.0)
        if "final_logits_bias" in dict(model.named_buffers()):
            nn.init.normal_(model.final_logits_bias)  # Bart's, which is zero and trained by nobody
        if self.has_experts:
            model.set_experts_implementation("eager")
        return model

    @property
    def has_experts(self) -> bool:
        return "num_experts_per_tok" in self.options


def _decoder(name: str, slides: bool = False, **options: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**LLAMA, **options}, slides=slides)


FAMILIES: dict[str, Family] = {
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", slides=True, sliding_window=WINDOW),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "qwen3_moe": _decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True),
    "gemma2": _decoder("Gemma2", slides=True, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=20.0, **TWO_KINDS),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "query_pre_attn_scalar": 24, **TWO_KINDS}, slides=True
    ),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": _decoder("GptOss", slides=True, num_local_experts=4, num_experts_per_tok=2, **TWO_KINDS),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **IDS, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        },
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", {**COMMON, **IDS, **NO_DROPOUT, "max_position_embeddings": 64}, kind="encoder"),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **SEQ2SEQ, "init_std": 0.2, "max_position_embeddings": 64, "dropout": 0.0, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
            "forced_eos_token_id": None,
        },
        kind="seq2seq",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **SEQ2SEQ, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "initializer_factor": 3.0,
        },
        kind="seq2seq",
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {**COMMON, **NO_DROPOUT, "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 5},
        kind="vision",
    ),
}  # fmt: skip
del FAMILIES["vit"].options["vocab_size"]


EAGER_IN_FLOAT64 = "eager_in_float64"


def eager_in_float64(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """The model's own eager attention. It takes its softmax in float32, where a mask of float64's lowest number is -inf, and a row that sees
    no key NaN: so the mask holds float32's lowest."""
    if attention_mask is not None:
        attention_mask = attention_mask.clamp(min=torch.finfo(torch.float32).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


transformers.AttentionInterface.register(EAGER_IN_FLOAT64, eager_in_float64)
AttentionMaskInterface.register(EAGER_IN_FLOAT64, eager_mask)


@functools.cache
def built(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The family's model, in eager attention; a cell that changes it changes it back."""
    model = FAMILIES[family].build() if dtype == torch.float32 else copy.deepcopy(built(family)).to(dtype)
    model.set_attn_implementation("eager" if dtype == torch.float32 else EAGER_IN_FLOAT64)
    return model


# --------------------------------------------------------------------------------------------------------------------
# Routes: how a model gets to fastattn.


@contextlib.contextmanager
def _attention(model: nn.Module, name: str, experts: str = "eager") -> Iterator[None]:
    has_experts = getattr(model.config, "_experts_implementation", None) == "eager"
    model.set_attn_implementation(name)
    if has_experts:
        model.set_experts_implementation(experts)
    reached = {part.config._attn_implementation for part in model.modules() if isinstance(part, transformers.PreTrainedModel)}
    assert reached == {name}, f"set_attn_implementation({name!r}) left parts of the model at {reached - {name}}"
    try:
        yield
    finally:
        model.set_attn_implementation("eager")
        if has_experts:
            model.set_experts_implementation("eager")


@contextlib.contextmanager
def _patched(model: nn.Module) -> Iterator[None]:
    with _attention(model, "fastattn"):
        on_transformers.patch(model)
        try:
            yield
        finally:
            on_transformers.unpatch(model)


@contextlib.contextmanager
def _torch_sdpa(model: nn.Module) -> Iterator[None]:
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    from fastattn.integrations import torch_sdpa

    torch_sdpa.register()
    activate_flash_attention_impl("fastattn")
    try:
        with _attention(model, "sdpa"):
            yield
    finally:
        restore_flash_attention_impl()


ROUTES: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager]] = {
    "fastattn": functools.partial(_attention, name="fastattn", experts="fastattn"),
    "fastattn + patch": _patched,
    "fastattn_flash2": functools.partial(_attention, name=on_transformers.FLASH_NAME),
}
if importlib.util.find_spec("fastattn.integrations.torch_sdpa"):
    ROUTES["torch sdpa"] = _torch_sdpa

# --------------------------------------------------------------------------------------------------------------------
# Scenarios. Each gives its results on a model; `expected`, where there is one, gives the right ones on an eager model, by a simpler way.

BATCH, LENGTH, PADDING, NEW_TOKENS = 2, 20, 5, 8
DECODED = 17  # tokens of a decoder that has an encoder: another number
Results = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    what: str
    run: Callable[[nn.Module, str], Results]
    expected: Callable[[nn.Module, str], Results]
    exact: bool = False  # tokens


def random_tokens(length: int = LENGTH, batch: int = BATCH, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, length: int = LENGTH) -> Tensor:
    """(B, S), 1 = a token: the first sequence is PADDING shorter than the second."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, slice(PADDING) if side == "left" else slice(length - PADDING, None)] = 0
    return mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def inputs(family: str, side: str | None = None) -> dict[str, Tensor]:
    kind = FAMILIES[family].kind
    if kind == "vision":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    given = {"input_ids": random_tokens()}
    if kind == "seq2seq":
        given["decoder_input_ids"] = random_tokens(DECODED, seed=2)
    if side is not None:
        given["attention_mask"] = padding(side)
        if kind == "seq2seq":
            given["decoder_attention_mask"] = padding(side, DECODED)
    return given


def output_length(family: str) -> int:
    return DECODED if FAMILIES[family].kind == "seq2seq" else LENGTH


def real(logits: Tensor, mask: Tensor) -> Tensor:
    """The rows of tokens. What a row of padding holds is nobody's business, as long as it does not spread: it must be finite."""
    assert logits.isfinite().all(), "not finite, perhaps in a row that sees no key"
    return logits[mask.bool()]


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Results:
    return {"logits": model(**inputs(family)).logits}


@torch.no_grad()
def padded(model: nn.Module, family: str, side: str) -> Results:
    return {"logits": real(model(**inputs(family, side)).logits, padding(side, output_length(family)))}


def labels(family: str) -> Tensor:
    return random_tokens(output_length(family), seed=3).masked_fill(padding("right", output_length(family)) == 0, -100)


def gradients(model: nn.Module, family: str) -> Results:
    """The loss of a padded batch, in training mode, and every parameter's gradient."""
    if FAMILIES[family].kind == "vision":
        given = {**inputs(family), "labels": torch.tensor([1, 4])}
    else:
        given = inputs(family, "right")
        given["labels"] = labels(family)
    model.train()
    try:
        loss = model(**given).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}
    finally:
        model.zero_grad()
        model.eval()


LENGTHS = (11, 1, 8)  # of the sequences in one packed row


@torch.no_grad()
def packed(model: nn.Module, family: str, by_lengths: bool) -> Results:
    options: dict[str, Any] = {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    if FAMILIES[family].kind == "decoder":
        options["use_cache"] = False
    if by_lengths:
        ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    return {"logits": model(random_tokens(batch=1), **options).logits}


@torch.no_grad()
def one_by_one(model: nn.Module, family: str) -> Results:
    return {"logits": torch.cat([model(part).logits for part in random_tokens(batch=1).split(LENGTHS, dim=1)], dim=1)}


STOPS = (9, 14, 15, 16, DECODED, LENGTH)  # a prompt in two parts, some tokens, and some more


def new_cache(model: nn.Module, family: str, kind: str) -> Any:
    config = model.config

    def cache(length: int) -> Any:
        if kind == "static":
            return transformers.StaticCache(config=config, max_cache_len=length)
        return transformers.DynamicCache(config=config) if kind == "sliding" else transformers.DynamicCache()

    if FAMILIES[family].kind == "seq2seq":
        return transformers.EncoderDecoderCache(cache(LENGTH + 4), cache(LENGTH))
    return cache(LENGTH + 4)


@torch.no_grad()
def cached(model: nn.Module, family: str, kind: str) -> Results:
    """Logits of a left-padded batch (of a right-padded one, where an encoder reads it), some tokens at a time."""
    cache, parts, start = new_cache(model, family, kind), [], 0
    seq2seq = FAMILIES[family].kind == "seq2seq"
    mask = padding("right" if seq2seq else "left")
    if seq2seq:
        encoded = model.get_encoder()(inputs(family)["input_ids"], attention_mask=mask)
    for stop in STOPS[: -1 if seq2seq else None]:
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if seq2seq:
            options |= {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": random_tokens(DECODED, seed=2)[:, start:stop]}
            options |= {"decoder_attention_mask": torch.ones(BATCH, stop, dtype=torch.long)}
        else:
            options |= {"input_ids": random_tokens()[:, start:stop], "attention_mask": mask[:, :stop]}
            options |= {"position_ids": positions(mask)[:, start:stop]}
        parts.append(model(**options).logits)
        start = stop
    return {"logits": real(torch.cat(parts, dim=1), torch.ones(BATCH, DECODED) if seq2seq else mask)}


@torch.no_grad()
def at_once(model: nn.Module, family: str) -> Results:
    if FAMILIES[family].kind == "seq2seq":
        return {"logits": model(**inputs(family), attention_mask=padding("right")).logits.flatten(0, 1)}
    mask = padding("left")
    return {"logits": real(model(random_tokens(), attention_mask=mask, position_ids=positions(mask)).logits, mask)}


def generated(model: nn.Module, family: str) -> Results:
    side = "right" if FAMILIES[family].kind == "seq2seq" else "left"
    tokens = model.generate(random_tokens(), attention_mask=padding(side), max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"tokens": tokens}


PROMPTS = (5, 12, 3)


def batched_continuously(model: nn.Module, family: str) -> Results:
    prompts = [random_tokens(n, batch=1, seed=n)[0].tolist() for n in PROMPTS]
    options = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, **IDS)
    page_size = {"page_size" if hasattr(transformers.ContinuousBatchingConfig, "page_size") else "block_size": 16}  # 5.17's name
    cache = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, **page_size)
    found = model.generate_batch(prompts, generation_config=options, continuous_batching_config=cache, progress_bar=False, warmup=False)
    return {f"tokens of {n}": torch.tensor(answer.generated_tokens) for n, answer in zip(PROMPTS, by_request(found), strict=True)}


def by_request(found: dict[str, Any]) -> list[Any]:
    """Answers in the order of their prompts: a request's id ends in its number."""
    return [found[key] for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]


def generated_one_by_one(model: nn.Module, family: str) -> Results:
    found = {}
    for n in PROMPTS:
        tokens = model.generate(random_tokens(n, batch=1, seed=n), max_new_tokens=NEW_TOKENS, do_sample=False)
        found[f"tokens of {n}"] = tokens[0, n:]
    return found


@torch.no_grad()
def compiled(model: nn.Module, family: str) -> Results:
    torch.compiler.reset()
    return {"logits": torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs(family)).logits}


def _with(function: Callable, **options: Any) -> Callable[[nn.Module, str], Results]:
    return functools.partial(function, **options)


SCENARIOS: dict[str, Scenario] = {
    "logits": Scenario("a batch without padding", logits, logits),
    "gradients": Scenario("the loss of a right-padded batch in training mode, and every parameter's gradient", gradients, gradients),
    "left padding": Scenario("logits where there are tokens; finite elsewhere", _with(padded, side="left"), _with(padded, side="left")),
    "right padding": Scenario("the same", _with(padded, side="right"), _with(padded, side="right")),
    "packed by position_ids": Scenario("three texts in one row, as three rows", _with(packed, by_lengths=False), one_by_one),
    "packed by cu_seq_lens": Scenario("the same, with `cu_seq_lens_q` and its like", _with(packed, by_lengths=True), one_by_one),
    "dynamic cache": Scenario(
        "a padded prompt in two parts, then tokens; as all at once (for the window of a model, of full length)",
        _with(cached, kind="dynamic"), at_once,
    ),
    "sliding cache": Scenario("the same with a cache of the window's length, past it", _with(cached, kind="sliding"), at_once),
    "static cache": Scenario("the same with a cache longer than the text", _with(cached, kind="static"), at_once),
    "generate": Scenario("greedy, from a padded batch", generated, generated, exact=True),
    "continuous batching": Scenario(
        "`generate_batch` of three prompts, as each by itself", batched_continuously, generated_one_by_one, exact=True
    ),
    "compile": Scenario('`torch.compile(fullgraph=True, backend="aot_eager")`', compiled, logits),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# What does not apply, and why.

ALL = None
DECODERS = {name for name, family in FAMILIES.items() if family.kind == "decoder"}
SEQ2SEQS = {name for name, family in FAMILIES.items() if family.kind == "seq2seq"}
SLIDING = {name for name, family in FAMILIES.items() if family.slides}
PACKED = {"packed by position_ids", "packed by cu_seq_lens"}
PADDED = {"left padding", "right padding"}
CACHED = {"dynamic cache", "sliding cache", "static cache"}


@dataclass(frozen=True)
class Reason:
    """Of these families, in these scenarios, on these routes (None: all). fails: a cell that is run fails, which a test holds."""

    families: set[str] | None
    scenarios: set[str] | None
    routes: set[str] | None
    text: str
    fails: bool = False

    def holds(self, cell: tuple[str, str, str]) -> bool:
        return all(wanted is None or value in wanted for wanted, value in zip((self.families, self.scenarios, self.routes), cell, strict=True))


FLASH = {"fastattn_flash2"}
OTHERS = set(ROUTES) - FLASH
WHY_NOT: list[Reason] = [
    Reason({"vit"}, PADDED | PACKED, ALL, "images are neither padded nor packed"),
    Reason({"vit", "bert"}, CACHED | {"generate", "continuous batching"}, ALL, "it does not generate"),
    Reason(SEQ2SEQS, PACKED, ALL, "an encoder and a decoder are packed at different places, and transformers has no names for both"),
    Reason(SEQ2SEQS, {"continuous batching"}, ALL, "transformers batches decoders alone continuously"),
    Reason(set(FAMILIES) - SLIDING, {"sliding cache"}, ALL, "it has no window that a cache could slide with"),
    Reason({"t5"}, ALL, FLASH, "flash functions take no position bias: refused by name", fails=True),
    Reason({"gpt2"}, ALL, FLASH, "in float32 transformers' flash wrapper fails on layers without an nn.Linear: refused by name", fails=True),
    Reason(ALL, {"compile"}, FLASH, "in float32 transformers' flash wrapper logs a warning, which a graph cannot hold", fails=True),
    Reason(
        ALL, {"continuous batching"}, {"fastattn", "fastattn + patch"},
        "from 5.20 on transformers takes sdpa, paged|eager or a name with flash in it for this", fails=True,
    ),
    Reason({"gemma2", "gpt_oss"}, ALL, {"torch sdpa"}, "transformers has no sdpa for it: scores are capped, or sinks join them", fails=True),
    Reason({"qwen3_moe", "mixtral"}, {"compile"}, {"torch sdpa"}, "transformers' own experts read how many tokens each got, which no graph can hold", fails=True),
    Reason({"bert"}, {"packed by cu_seq_lens"}, {"torch sdpa"}, "transformers' sdpa does not read cu_seq_lens", fails=True),
    Reason({"bert"}, {"packed by position_ids"}, OTHERS, "transformers' bidirectional masks do not look at position_ids, eager's neither", fails=True),
    Reason({"gpt_oss"}, {"packed by position_ids"}, OTHERS, "gpt-oss makes its masks without position_ids, eager's too", fails=True),
]  # fmt: skip


def cells() -> list[tuple[str, str, str]]:
    return [(family, scenario, route) for family in FAMILIES for scenario in SCENARIOS for route in ROUTES]


def why_not(family: str, scenario: str, route: str) -> str | None:
    return next((reason.text for reason in WHY_NOT if reason.holds((family, scenario, route))), None)


# --------------------------------------------------------------------------------------------------------------------
# Running a cell, and the page.

HEAD = """# Hugging Face models on fastattn: what has been compared

Each cell is a family of models, something done with one, and a way to fastattn (a table each). `ok`: the results are those of eager attention
in transformers' own modules: logits, losses and every parameter's gradient within the [error budget](../CONTRIBUTING.md#tests), with eager
in float64 as the truth; tokens exactly. A number: it does not apply, for the [reason](#why-not) of that number.

`python tests/transformers_matrix.py --write` runs every cell and writes this page; `tests/test_transformers_matrix.py` runs them as tests. The models are
random and tiny, in float32, and run on the CPU; none of this has run on a GPU. What is done
([transformers_matrix.py](../tests/transformers_matrix.py)):"""


@functools.cache
def expected(family: str, scenario: str, dtype: torch.dtype) -> Results:
    return SCENARIOS[scenario].expected(built(family, dtype), family)


def run(family: str, scenario: str, route: str) -> None:
    """Raises AssertionError where the cell's results are not eager's, and whatever the model raises."""
    on_transformers.register(continuous_batching=True)
    model = built(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = expected(family, scenario, torch.float32)
        with ROUTES[route](model):
            ours = SCENARIOS[scenario].run(model, family)
    assert ours.keys() == naive.keys(), ours.keys() ^ naive.keys()
    name = f"{family}, {scenario}, {route}:"
    if SCENARIOS[scenario].exact:
        for key, tokens in naive.items():
            assert torch.equal(ours[key], tokens), f"{name} {key} {ours[key].tolist()}, not {tokens.tolist()}"
        return
    truth = expected(family, scenario, torch.float64)
    for key, value in naive.items():
        check_budget(f"{name} {key}", ours[key], value, truth[key].double())


def page() -> str:
    """docs/matrix.md, of cells that all pass where they apply."""
    texts = list(dict.fromkeys(why_not(*cell) for cell in cells() if why_not(*cell)))
    parts = [HEAD, "\n".join(f"- {name}: {scenario.what}" for name, scenario in SCENARIOS.items())]
    for route in ROUTES:
        rows = [["", *SCENARIOS], ["---"] * (1 + len(SCENARIOS))]
        for family in FAMILIES:
            marks = (why_not(family, scenario, route) for scenario in SCENARIOS)
            rows.append([family, *("ok" if text is None else str(1 + texts.index(text)) for text in marks)])
        parts.append(f"## {route}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    parts.append("## Why not\n\n" + "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1)))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("words", nargs="*", help="only cells whose family, scenario or route is one of these")
    arguments = parser.parse_args()
    failed = 0
    for cell in cells():
        if not set(arguments.words) <= set(cell) or why_not(*cell):
            continue
        start = time.process_time()
        try:
            run(*cell)
            word = "ok"
        except Exception as error:
            failed += 1
            word = f"FAILED {type(error).__name__}: {str(error)[:300]}"
        print(f"{time.process_time() - start:6.2f} s  {' | '.join(cell)}: {word}", flush=True)
    if arguments.write and not arguments.words and not failed:
        PAGE.write_text(page(), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
