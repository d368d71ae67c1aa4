"""The name for `model.generate_batch`: what it registers and takes back, what it refuses, and its decode path over pages."""

import copy
import inspect

import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers")

import torch  # noqa: E402  (the skip comes first)
import transformers.modeling_flash_attention_utils as hub  # noqa: E402
import transformers_matrix as matrix  # noqa: E402
from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

from fastattn import reference  # noqa: E402
from fastattn.integrations import transformers as on_transformers  # noqa: E402
from fastattn.integrations.transformers import continuous_batching  # noqa: E402
from fastattn.testing.budget import check_budget  # noqa: E402

NAME = on_transformers.FLASH_NAME


@pytest.fixture(autouse=True)
def registered():
    on_transformers.register(continuous_batching=True)
    yield
    on_transformers.register(continuous_batching=True)


def registries() -> list[dict]:
    found = [AttentionInterface, AttentionMaskInterface]
    if hasattr(on_transformers.experts.hub, "ALL_EXPERTS_FUNCTIONS"):
        found.append(type(on_transformers.experts.hub.ALL_EXPERTS_FUNCTIONS))
    return [dict(registry._global_mapping) for registry in found]


def test_unregister_restores_what_was_there():
    gpt_oss = transformers.models.gpt_oss.modeling_gpt_oss.GptOssPreTrainedModel
    on_transformers.unregister()
    before = registries(), hub._lazy_imports, gpt_oss._compatible_flash_implementations
    assert not any("fastattn" in registry for registry in before[0])
    on_transformers.register()
    assert hub._lazy_imports is before[1]
    assert NAME not in AttentionInterface._global_mapping
    on_transformers.register(continuous_batching=True)
    on_transformers.register(continuous_batching=True)
    assert hub._lazy_imports is not before[1]
    assert hub._lazy_imports(NAME)[:2] == (continuous_batching.flash_attn_func, continuous_batching.flash_attn_varlen_func)
    matrix.built("llama").set_attn_implementation(NAME)
    assert hub._loaded_implementation == NAME
    matrix.built("llama").set_attn_implementation("eager")
    on_transformers.unregister()
    assert (registries(), hub._lazy_imports, gpt_oss._compatible_flash_implementations) == before
    assert hub._loaded_implementation is None
    with pytest.raises(ValueError, match="not supported|Could not find|kernels"):
        matrix.built("llama").set_attn_implementation("fastattn")


def test_unregister_leaves_what_others_registered_since():
    on_transformers.unregister()
    on_transformers.register()
    AttentionInterface.register("fastattn", print)
    on_transformers.unregister()
    assert AttentionInterface._global_mapping.pop("fastattn") is print
    AttentionInterface.register("fastattn", print)
    on_transformers.register()
    on_transformers.unregister()
    assert AttentionInterface._global_mapping.pop("fastattn") is print


def test_unregister_refuses_where_lazy_imports_was_replaced_since(monkeypatch):
    with monkeypatch.context() as patches:
        patches.setattr(hub, "_lazy_imports", lambda *args: None)
        with pytest.raises(RuntimeError, match="unregister: transformers.modeling_flash_attention_utils._lazy_imports must be the one that register"):
            on_transformers.unregister()
    on_transformers.unregister()


def test_other_names_are_imported_as_before():
    with pytest.raises((ImportError, ValueError, RuntimeError)):
        hub._lazy_imports("flash_attention_3")


def test_what_the_wrapper_cannot_do_is_refused_by_name():
    model = copy.deepcopy(matrix.built("gpt2"))
    model.set_attn_implementation(NAME)
    message = 'fastattn_flash2: GPT2Attention in float32 must run with attn_implementation="fastattn" .or in half precision.'
    with pytest.raises(ValueError, match=message):
        model(**matrix.inputs("gpt2"))
    layer, q = matrix.built("t5").encoder.block[0].layer[0].SelfAttention, torch.randn(1, 4, 5, 8)
    message = 'fastattn_flash2: T5Attention must run with attn_implementation="fastattn", got a position_bias'
    with pytest.raises(ValueError, match=message):
        continuous_batching.attention_forward(layer, q, q, q, None, position_bias=torch.zeros(1, 4, 5, 5))


def test_gpt2_in_half_precision():
    model = copy.deepcopy(matrix.built("gpt2")).bfloat16()
    naive = matrix.padded(model, "gpt2", "left")["logits"]
    truth = matrix.padded(copy.deepcopy(model).double(), "gpt2", "left")["logits"]
    model.set_attn_implementation(NAME)
    check_budget("gpt2 bf16", matrix.padded(model, "gpt2", "left")["logits"], naive, truth)


@pytest.mark.parametrize("sinks", [None, torch.randn(4)], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 2])  # the wrapper hands it on where it is smaller than the number of new keys
def test_decoding_over_pages(sinks, window):
    """transformers' fast path, which it takes on CUDA: the wrapper hands over pages, and the function appends to them."""
    torch.manual_seed(0)
    lengths, page_size = [7, 0, 19], 4
    caches = [torch.randn(12, page_size, 2, 8) for _ in range(2)]
    pages = torch.randperm(12)
    table = torch.stack([pages[[0, 1, 0, 0, 0]], pages[[2, 0, 0, 0, 0]], pages[[3, 4, 5, 6, 7]]]).int()
    q, (k, v) = torch.randn(1, 3, 4, 8), (torch.randn(1, 3, 2, 8) for _ in range(2))
    ends = torch.tensor([0, *(n + 1 for n in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    before = [cache.clone() for cache in caches]
    if "k_cache" in inspect.signature(hub._flash_attention_forward).parameters:
        out = hub._flash_attention_forward(
            q, k, v, None, query_length=3, is_causal=True, softmax_scale=0.3, sliding_window=window, cu_seq_lens_q=torch.arange(4).int(),
            cu_seq_lens_k=ends, max_length_q=1, max_length_k=20, attn_implementation=NAME, block_table=table, k_cache=caches[0],
            v_cache=caches[1], s_aux=sinks,
        )  # fmt: skip
    else:  # transformers below 5.20 has it elsewhere
        new, options = [t.transpose(0, 1) for t in (q, k, v)], {"softmax_scale": 0.3, "causal": True, "s_aux": sinks}
        options["window_size"] = (-1, -1) if window is None else (window - 1, window - 1)
        out = continuous_batching.flash_attn_with_kvcache(
            new[0], *caches, *new[1:], cache_seqlens=ends.diff() - 1, block_table=table, **options
        ).transpose(0, 1)
    assert out.shape == q.shape
    for i, n in enumerate(lengths):
        whole = [torch.cat([old[table[i]].flatten(0, 1)[:n], new[0, i : i + 1]])[None] for old, new in zip(before, (k, v))]
        options = {"softmax_scale": 0.3, "causal": True, "sinks": sinks, "window": (None if window is None else window - 1, None)}
        expected = reference.attention(q[:, i : i + 1], *whole, **options)
        torch.testing.assert_close(out[0, i], expected[0, 0], atol=1e-5, rtol=1e-5)
        for cache, new in zip(caches, (k, v)):
            assert torch.equal(cache[table[i, n // page_size], n % page_size], new[0, i])
