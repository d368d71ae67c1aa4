"""fastattn.nn's modules over the row ops: constructors, state_dicts and results of their torch namesakes; Attention; a block that trains.

On the CPU path; `both` tests also run on the kernels.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
import fastattn.nn as fnn

# --------------------------------------------------------------------------------------------------------------------
# In torch's place.

TORCH_NAMESAKES = {
    "Softmax": [dict(dim=-1), dict(dim=1)],
    "LayerNorm": [dict(normalized_shape=24), dict(normalized_shape=(4, 24), eps=1e-3), dict(normalized_shape=24, bias=False),
                  dict(normalized_shape=24, elementwise_affine=False)],
    "RMSNorm": [dict(normalized_shape=24), dict(normalized_shape=[4, 24], eps=1e-3), dict(normalized_shape=24, elementwise_affine=False)],
}  # fmt: skip


@pytest.mark.both
@pytest.mark.parametrize(
    "name, kwargs", [(name, kwargs) for name, options in TORCH_NAMESAKES.items() for kwargs in options], ids=str
)
def test_namesakes_give_torch_s_results(name, kwargs):
    theirs, ours = getattr(nn, name)(**kwargs), getattr(fnn, name)(**kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    x = torch.randn(3, 4, 24)
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * torch.linspace(-1, 1, 24)).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*TORCH_NAMESAKES, "CrossEntropyLoss"])
def test_constructors_begin_as_torch_s_do(name):
    theirs, ours = (list(inspect.signature(getattr(m, name).__init__).parameters.values()) for m in (nn, fnn))
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_softmax_without_a_dim_picks_torch_s_and_says_so():
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension choice for softmax"):
        got = fnn.Softmax()(x)
    torch.testing.assert_close(got, x.softmax(1))


@pytest.mark.both
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_norms_add_a_residual_on_the_way(norm):
    module = getattr(fnn, norm)(40)
    x, residual = torch.randn(2, 5, 40)
    y, stream = module(x, residual)
    torch.testing.assert_close(stream, x + residual)
    torch.testing.assert_close(y, module(x + residual))


@pytest.mark.both
def test_gemma_s_norm_starts_as_the_identity_on_unit_rows():
    module = fnn.RMSNorm(64, weight_offset=1.0)
    assert not module.weight.any()
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x), F.rms_norm(x, (64,)))


@pytest.mark.both
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1, reduction="sum"), dict(weight=torch.linspace(0.1, 2, 11), ignore_index=3)], ids=["plain", "smoothed", "weighted"])
def test_cross_entropy_loss(options):
    logits, target = torch.randn(9, 11), torch.arange(9) % 5
    torch.testing.assert_close(fnn.CrossEntropyLoss(**options)(logits, target), nn.CrossEntropyLoss(**options)(logits, target))
    loss, lse = fnn.CrossEntropyLoss(**options, z_loss=0.1, return_lse=True)(logits, target)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert loss > fnn.CrossEntropyLoss(**options)(logits, target)


@pytest.mark.both
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss(bias):
    module = fnn.LinearCrossEntropyLoss(16, 50, bias=bias, label_smoothing=0.1, weight=torch.rand(50), chunk_size=4)
    assert set(module.state_dict()) == {"weight", "linear.weight", *(["linear.bias"] if bias else [])}
    x, target = torch.randn(2, 5, 16, requires_grad=True), torch.randint(50, (2, 5))
    loss = module(x, target)
    expected = F.cross_entropy(module.linear(x).flatten(0, 1), target.flatten(), module.weight, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        theirs = nn.LinearCrossEntropyLoss(16, 50, bias=bias, label_smoothing=0.1, weight=torch.rand(50))
        theirs.load_state_dict(module.state_dict())
        torch.testing.assert_close(loss, theirs(x.flatten(0, 1), target.flatten()))
    with pytest.raises(NotImplementedError, match="LinearCrossEntropyLoss: out_features must be empty"):
        fnn.LinearCrossEntropyLoss(16, 50, out_features=(2,))


@pytest.mark.both
def test_glu_modules():
    gate, up = torch.randn(2, 3, 40)
    torch.testing.assert_close(fnn.SwiGLU()(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(fnn.GEGLU()(torch.cat([gate, up], -1)), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(fnn.GEGLU("none")(gate, up), F.gelu(gate) * up)


# --------------------------------------------------------------------------------------------------------------------
# RotaryEmbedding.


@pytest.mark.parametrize(
    "scaling, seqlen",
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, 200),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, 64),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_tables_are_transformers_(scaling, seqlen):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=64, max_position_embeddings=64, rope_parameters={"rope_theta": 5e4, **scaling}
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, seqlen, 64), torch.arange(seqlen)[None])
    ours = fnn.RotaryEmbedding(64, base=5e4, max_seqlen=seqlen, scaling=scaling)
    torch.testing.assert_close(ours.cos, cos[0, :, :32], rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.sin, sin[0, :, :32], rtol=0, atol=2e-5)


def test_ntk_is_dynamic_at_a_fixed_stretch():
    ntk = fnn.RotaryEmbedding(32, scaling={"rope_type": "ntk", "factor": 3.0}, max_seqlen=128)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    torch.testing.assert_close(ntk.cos, fnn.RotaryEmbedding(32, scaling=dynamic, max_seqlen=128).cos)


@pytest.mark.both
def test_rotary_scores_depend_on_distances_alone():
    rotary = fnn.RotaryEmbedding(16, max_seqlen=8)
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 40, 1, 16) for _ in range(2))
    q, k = rotary(q, k)  # longer than the tables, which grow
    assert rotary.cos.shape[0] >= 40
    scores = (q[0, :, 0] @ k[0, :, 0].T).detach()
    for distance in (0, 3, -7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)


def test_rotary_tables_stay_float32_and_out_of_the_state_dict():
    rotary = fnn.RotaryEmbedding(16).to(torch.bfloat16)
    assert rotary.cos.dtype == rotary.sin.dtype == torch.float32
    torch.testing.assert_close(rotary.cos, fnn.RotaryEmbedding(16).cos)
    assert not rotary.state_dict()


def test_rotary_reads_all_of_transformers_rope_parameters():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    scaling = transformers.LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}).rope_parameters
    torch.testing.assert_close(
        fnn.RotaryEmbedding(8, scaling=scaling).cos, fnn.RotaryEmbedding(8, base=5e5, scaling={"type": "linear", "factor": 2.0}).cos
    )
    assert fnn.RotaryEmbedding(32, scaling={"partial_rotary_factor": 0.25}).rotary_dim == 8


def test_dynamic_rotary_follows_each_call_s_length():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    rotary = fnn.RotaryEmbedding(8, max_seqlen=16, scaling=scaling)
    q = torch.randn(4, 16, 1, 8)
    expected, _ = rotary(q, q)
    rotary(*[torch.randn(1, 50, 1, 8)] * 2)
    torch.testing.assert_close(rotary(q, q)[0], expected, rtol=0, atol=0)
    cu = torch.arange(5, dtype=torch.int32) * 16
    packed, _ = rotary(q.flatten(0, 1), q.flatten(0, 1), cu_seqlens=cu, max_seqlen=16)
    torch.testing.assert_close(packed, expected.flatten(0, 1), rtol=0, atol=0)
    with pytest.raises(ValueError, match="RotaryEmbedding: max_seqlen must be given with cu_seqlens where scaling is dynamic"):
        rotary(q.flatten(0, 1), q.flatten(0, 1), cu_seqlens=cu)


def test_rotary_tables_survive_meta_and_inference_mode():
    with torch.device("meta"):
        rotary = fnn.RotaryEmbedding(8, max_seqlen=64)
    rotary.to_empty(device="cpu")
    torch.testing.assert_close(rotary.cos, fnn.RotaryEmbedding(8, max_seqlen=64).cos)
    q = torch.randn(1, 100, 1, 8)
    with torch.inference_mode():
        rotary(q, q)  # they grow
    rotary(q.requires_grad_(), q)[0].sum().backward()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(head_dim=16, rotary_dim=5), r"rotary_dim must be even and at most head_dim = 16, got 5"),
        (dict(head_dim=16, rotary_dim=18), r"rotary_dim must be even and at most head_dim = 16, got 18"),
        (dict(head_dim=16, scaling={"rope_type": "yarn"}), r"rope_type must be one of default, linear, ntk, dynamic, llama3, got 'yarn'"),
        (dict(head_dim=16, scaling={"rope_type": "linear"}), r"scaling must hold factor for rope_type 'linear', got nothing"),
        (dict(head_dim=16, scaling={"type": "linear", "factor": 2.0, "beta": 1}), r"scaling must hold factor for .*, got beta, factor"),
        (dict(head_dim=16, base=1e4, scaling={"rope_theta": 5e5}), r"base must be scaling's rope_theta = 500000.0 or None, got 10000.0"),
    ],
)
def test_rotary_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=f"RotaryEmbedding: {message}"):
        fnn.RotaryEmbedding(**kwargs)


# --------------------------------------------------------------------------------------------------------------------
# Attention.


def naive_attention(module, x, cos=None, sin=None, context=None, causal=True):
    """The same weights, in plain torch."""

    def heads(proj, t, count):
        return proj(t).unflatten(-1, (count, module.head_dim))

    keys = x if context is None else context
    q, k = heads(module.q_proj, x, module.num_heads), heads(module.k_proj, keys, module.num_kv_heads)
    v = heads(module.v_proj, keys, module.num_kv_heads)
    if module.q_norm is not None:
        q, k = (F.rms_norm(t, (module.head_dim,), norm.weight, 1e-6) for t, norm in ((q, module.q_norm), (k, module.k_norm)))
    if cos is not None:
        q, k = fastattn.reference.apply_rotary(q, k, cos, sin)
    left, right = module.window
    out = fastattn.reference.attention(
        q, k, v, causal=causal and context is None, window=(left, right) if context is None else (None, None), softcap=module.softcap,
        sinks=module.sinks,
    )  # fmt: skip
    return module.o_proj(out.flatten(-2))


@pytest.mark.both
@pytest.mark.parametrize(
    "options",
    [
        {}, dict(num_kv_heads=2), dict(num_kv_heads=1, head_dim=24, bias=True), dict(qk_norm=True, window=5), dict(sinks=True, window=(7, 0)),
        dict(softcap=5.0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotary"])
def test_attention_module(options, rotated):
    module = fnn.Attention(64, 4, **options)
    rotary = fnn.RotaryEmbedding(module.head_dim)
    tables = (rotary.cos, rotary.sin) if rotated else ()
    x = torch.randn(2, 20, 64)
    torch.testing.assert_close(module(x, *tables), naive_attention(module, x, *tables), rtol=1e-4, atol=1e-5)


@pytest.mark.both
def test_attention_module_on_packed_sequences_and_contexts():
    module = fnn.Attention(32, 4, 2)
    rotary = fnn.RotaryEmbedding(8)
    x = torch.randn(30, 32)
    cu = torch.tensor([0, 12, 12, 30], dtype=torch.int32)
    packed = module(x, rotary.cos, rotary.sin, cu_seqlens=cu, max_seqlen=18)
    for start, stop in ((0, 12), (12, 30)):
        torch.testing.assert_close(packed[start:stop], module(x[None, start:stop], rotary.cos, rotary.sin)[0], rtol=1e-4, atol=1e-5)
    y, context = torch.randn(2, 3, 32), torch.randn(2, 9, 32)
    torch.testing.assert_close(module(y, context=context), naive_attention(module, y, context=context), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(y, causal=False), naive_attention(module, y, causal=False), rtol=1e-4, atol=1e-5)


@pytest.mark.both
def test_attention_module_on_packed_contexts():
    """Each sequence attends to a context of its own, of any length; projected once or at every call."""
    module = fnn.Attention(32, 4, 2, qk_norm=True)
    xs, contexts = [torch.randn(n, 32) for n in (5, 0, 3)], [torch.randn(n, 32) for n in (2, 4, 9)]
    lengths = {
        "cu_seqlens": torch.tensor([0, 5, 5, 8], dtype=torch.int32), "max_seqlen": 5,
        "cu_seqlens_context": torch.tensor([0, 2, 6, 15], dtype=torch.int32), "max_seqlen_context": 9,
    }  # fmt: skip
    context = torch.cat(contexts)
    packed = module(torch.cat(xs), context=context, **lengths)
    alone = torch.cat([module(x[None], context=c[None])[0] for x, c in zip(xs, contexts) if len(x)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(module(torch.cat(xs), context=module.project_context(context), **lengths), packed)


@pytest.mark.both
def test_attention_module_by_distance_and_with_a_scale():
    module, slopes = fnn.Attention(32, 4, 2, softmax_scale=0.7), torch.tensor([0.5, 0.25, 0.125, 0.0625])
    x = torch.randn(2, 9, 32)
    q, k, v = (proj(x).unflatten(-1, (-1, 8)) for proj in (module.q_proj, module.k_proj, module.v_proj))
    out = fastattn.reference.attention(q, k, v, causal=True, softmax_scale=0.7, alibi_slopes=slopes)
    expected = module.o_proj(out.flatten(-2))
    torch.testing.assert_close(module(x, alibi_slopes=slopes), expected, rtol=1e-4, atol=1e-5)
    cache = fastattn.PagedKVCache(1, 10, 4, 2, 8, dtype=torch.float32, device="cpu")
    ids = [cache.allocate(), cache.allocate()]
    with torch.no_grad():
        for at in (slice(0, 7), slice(7, 9)):
            cache.step(ids, at.stop - at.start)
            torch.testing.assert_close(module(x[:, at], alibi_slopes=slopes, cache=cache), expected[:, at], rtol=1e-4, atol=1e-5)


@pytest.mark.both
@pytest.mark.parametrize("options", [dict(num_kv_heads=2), dict(qk_norm=True, window=5), dict(sinks=True, softcap=5.0)], ids=str)
@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotary"])
def test_attention_module_decodes_through_a_cache(options, rotated):
    """Prompts of different lengths packed, then one token each, then two: what the uncached call says of the same rows."""
    torch.manual_seed(3)
    modules = [fnn.Attention(64, 4, **options) for _ in range(2)]
    kv_heads = modules[0].num_kv_heads
    cache = fastattn.PagedKVCache(2, 30, 4, kv_heads, 16, dtype=torch.float32, device="cpu")
    rotary = fnn.RotaryEmbedding(16)
    tables = (rotary.cos, rotary.sin) if rotated else ()
    sequences = [torch.randn(length + 3, 64) for length in (9, 5)]
    expected = [[module(x[None], *tables)[0] for x in sequences] for module in modules]
    ids = [cache.allocate() for _ in sequences]
    done = [0, 0]
    with torch.no_grad():
        for new in ((9, 5), (1, 1), (2, 2)):
            cache.step(ids, new)
            rows = [x[at : at + n] for x, at, n in zip(sequences, done, new)]
            x = torch.cat(rows) if new[0] != new[1] else torch.stack(rows)
            for layer, module in enumerate(modules):
                got = module(x, *tables, cache=cache, layer_idx=layer)
                wanted = [e[at : at + n] for e, at, n in zip(expected[layer], done, new)]
                torch.testing.assert_close(got.flatten(0, -2), torch.cat(wanted), rtol=1e-4, atol=1e-5)
            done = [at + n for at, n in zip(done, new)]


def test_attention_module_takes_each_token_s_own_table_with_a_cache():
    module, rotary = fnn.Attention(64, 4, 2), fnn.RotaryEmbedding(16)
    cache = fastattn.PagedKVCache(1, 30, 4, 2, 16, dtype=torch.float32, device="cpu")
    x, ids = torch.randn(2, 6, 64), [cache.allocate(), cache.allocate()]
    expected = module(x, rotary.cos, rotary.sin)
    got = []
    with torch.no_grad():
        for at in (slice(0, 4), slice(4, 6)):
            cache.step(ids, at.stop - at.start)
            of_tokens = (table[at].expand(2, -1, -1) for table in (rotary.cos, rotary.sin))
            got.append(module(x[:, at], *of_tokens, cache=cache))
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"PagedKVCache.append: k must have shape \(4, H, D\), or \(2, 2, H, D\) in this step"):
        module(x, rotary.cos, rotary.sin, cache=cache)


def test_attention_loads_llama_s_layer():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="eager"
    )
    theirs, ours = LlamaAttention(config, 0).eval(), fnn.Attention(64, 4, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 10, 64)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(10)[None])
    mask = torch.full((10, 10), float("-inf")).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=(cos, sin), attention_mask=mask)
    torch.testing.assert_close(ours(x, cos[..., :8], sin[..., :8]), expected, rtol=1e-4, atol=1e-5)


def test_attention_drops_in_training_only():
    module = fnn.Attention(32, 2, dropout_p=0.5)
    x = torch.randn(1, 12, 32)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: m(x, cache=object(), context=x), ValueError, "context must be None with a cache, got a tensor"),
        (lambda m, x: m(x, cache=object(), cu_seqlens=x), ValueError, "cu_seqlens must be None with a cache, got a tensor"),
        (lambda m, x: m(x, cache=object(), causal=False), ValueError, "causal must be True with a cache, got False"),
        (lambda m, x: fnn.Attention(16, 2, dropout_p=0.5)(x, cache=object()), ValueError, "dropout_p must be 0 with a cache, or the module in evaluation, got 0.5"),
        (lambda m, x: m(x, torch.zeros(4, 4)), ValueError, "cos and sin must be given together, got only cos"),
        (lambda m, x: m(x, torch.zeros(9, 4), torch.zeros(9, 4), context=x), ValueError, "cos must be None with a context"),
        (lambda m, x: m(x, alibi_slopes=torch.ones(2), context=x), ValueError, "alibi_slopes must be None with a context, got a tensor"),
        (lambda m, x: m(x, context=x, cu_seqlens=x), ValueError, "cu_seqlens and cu_seqlens_context must be given together with a context, got only cu_seqlens"),
        (lambda m, x: m(x, cu_seqlens_context=x), ValueError, "cu_seqlens_context must be None without a context, got a tensor"),
        (lambda m, x: m(x[0]), ValueError, r"x must have shape \(T, E\) with cu_seqlens, \(B, S, E\) without, got \(4, 16\)"),
        (lambda m, x: fnn.Attention(16, 4, 3), ValueError, "num_kv_heads must divide num_heads = 4, got 3"),
        (lambda m, x: fnn.Attention(16, 2, window=0), ValueError, "window must be a pair or a positive int, got 0"),
        (lambda m, x: fnn.Attention(18, 4), ValueError, "hidden_size must be a multiple of num_heads = 4 where head_dim is None, got 18"),
    ],
)
def test_attention_bad_input(call, error, message):
    with pytest.raises(error, match=f"Attention: {message}"):
        call(fnn.Attention(16, 2), torch.randn(2, 4, 16))


# --------------------------------------------------------------------------------------------------------------------
# A Llama-style language model from these modules trains as the same one in plain torch does, on real text.


class PlainNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x, residual):
        residual = residual + x
        return residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight, residual


class PlainAttention(fnn.Attention):
    def forward(self, x, cos, sin):
        q, k, v = (
            proj(x).unflatten(-1, (count, self.head_dim)).transpose(1, 2)
            for proj, count in ((self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads), (self.v_proj, self.num_kv_heads))
        )
        cos, sin = (torch.cat([t, t], -1)[: x.shape[1]] for t in (cos, sin))

        def rotated(t):
            first, second = t.chunk(2, -1)
            return (t * cos + torch.cat([-second, first], -1) * sin).to(t.dtype)

        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (rotated(k), v))
        scores = rotated(q) @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, size, plain):
        super().__init__()
        self.input_layernorm = PlainNorm(size) if plain else fnn.RMSNorm(size, eps=1e-6)
        self.self_attn = (PlainAttention if plain else fnn.Attention)(size, 4, 2)
        self.post_attention_layernorm = PlainNorm(size) if plain else fnn.RMSNorm(size, eps=1e-6)
        self.gate_up_proj = nn.Linear(size, 4 * size, bias=False)
        self.down_proj = nn.Linear(2 * size, size, bias=False)
        self.activation = (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]) if plain else fnn.SwiGLU()

    def forward(self, x, residual, cos, sin):
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, cos, sin), residual)
        return self.down_proj(self.activation(self.gate_up_proj(x))), residual


class LanguageModel(nn.Module):
    """Of bytes: two blocks and a head, its loss by linear_cross_entropy."""

    def __init__(self, plain, size=64):
        super().__init__()
        self.plain = plain
        self.embedding = nn.Embedding(256, size)
        self.blocks = nn.ModuleList(Block(size, plain) for _ in range(2))
        self.norm = PlainNorm(size) if plain else fnn.RMSNorm(size, eps=1e-6)
        self.head = nn.Linear(size, 256, bias=False)
        self.rotary = fnn.RotaryEmbedding(size // 4, max_seqlen=128)

    def forward(self, ids, target):
        x = self.embedding(ids)
        residual = torch.zeros_like(x)
        for block in self.blocks:
            x, residual = block(x, residual, self.rotary.cos, self.rotary.sin)
        x, _ = self.norm(x, residual)
        if self.plain:
            return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())
        return fastattn.linear_cross_entropy(x, self.head.weight, target, chunk_size=100)


def training_losses(plain, dtype, steps):
    from pydoc_data.topics import topics  # Python's own language reference: 700 KB of English

    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = LanguageModel(plain).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        rows = torch.stack([text[start : start + 65] for start in range(step * 520, step * 520 + 520, 130)])
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_a_block_trains_to_the_losses_of_plain_torch():
    ours, plain = training_losses(False, torch.float32, 20), training_losses(True, torch.float32, 20)
    assert plain[-1] < 0.75 * plain[0], "the model does not learn"
    assert (ours - plain).abs().max() < 2e-5


def test_a_block_trains_in_bfloat16_within_its_noise():
    """No farther from plain bf16 than that is from plain fp32."""
    ours, plain = training_losses(False, torch.bfloat16, 20), training_losses(True, torch.bfloat16, 20)
    noise = (plain - training_losses(True, torch.float32, 20)).abs().max()
    assert (ours - plain).abs().max() <= noise


@pytest.mark.interpret
def test_a_block_trains_on_the_kernels():
    ours, plain = training_losses(False, torch.float32, 4), training_losses(True, torch.float32, 4)
    assert (ours - plain).abs().max() < 2e-5
