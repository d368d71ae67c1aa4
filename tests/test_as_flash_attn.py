"""`import flash_attn` as fastattn.flash_attn: what resolves and comes back, and the modules of flash-attn's other paths."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastattn.flash_attn as ours
from fastattn import reference
from fastattn.flash_attn import flash_attn_interface as interface
from fastattn.flash_attn.layers import rotary
from fastattn.flash_attn.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from fastattn.flash_attn.ops import rms_norm as of_rms_norm
from fastattn.flash_attn.ops.triton import layer_norm as norms
from fastattn.integrations import as_flash_attn
from fastattn.ops.attention import dropout_keep

# --------------------------------------------------------------------------------------------------------------------
# The name.

PATHS = {
    "flash_attn": "flash_attn_func flash_attn_varlen_qkvpacked_func flash_attn_with_kvcache __version__",
    "flash_attn.flash_attn_interface": "flash_attn_func _flash_attn_forward _wrapped_flash_attn_varlen_backward",
    "flash_attn.bert_padding": "index_first_axis pad_input unpad_input",
    "flash_attn.layers.rotary": "RotaryEmbedding apply_rotary_emb apply_rotary_emb_func apply_rotary_emb_kv_ apply_rotary_emb_qkv_",
    "flash_attn.losses.cross_entropy": "CrossEntropyLoss cross_entropy_loss",
    "flash_attn.ops.rms_norm": "RMSNorm rms_norm",
    "flash_attn.ops.triton.cross_entropy": "cross_entropy_loss",
    "flash_attn.ops.triton.layer_norm": "RMSNorm layer_norm_fn rms_norm_fn",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A flash-attn as if installed."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9.9'\n")
    (package / "only_there.py").write_text("x = 1\n")
    metadata = tmp_path / "flash_attn-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


@pytest.mark.parametrize("path", PATHS)
def test_paths_resolve(path):
    with as_flash_attn():
        module = importlib.import_module(path)
        assert module is importlib.import_module(f"fastattn.{path}")
        assert importlib.util.find_spec(path) is not None
        assert not [name for name in PATHS[path].split() if not hasattr(module, name)]
    assert path not in sys.modules


def test_what_is_there_by_attribute_too():
    with as_flash_attn():
        import flash_attn

        assert flash_attn is ours and flash_attn.layers.rotary is rotary
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.ops\.fused_dense"):
            import flash_attn.ops.fused_dense
    kept = flash_attn.flash_attn_func  # bound meanwhile
    assert kept is ours.flash_attn_func


def test_an_installed_one_comes_back(installed):
    import flash_attn
    import flash_attn.only_there as there

    before = flash_attn
    alias = as_flash_attn()
    import flash_attn

    assert flash_attn is ours and importlib.metadata.version("flash-attn") == ours.__version__
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.only_there")
    alias.undo()
    alias.undo()
    import flash_attn

    assert flash_attn is before and sys.modules["flash_attn.only_there"] is there
    assert importlib.metadata.version("flash-attn") == "9.9"


def test_an_installed_one_that_was_not_imported_is_found_afterwards(installed):
    with as_flash_attn():
        assert importlib.import_module("flash_attn") is ours
    assert importlib.import_module("flash_attn").__version__ == "9.9"


def test_nesting_and_exceptions():
    outer, inner = as_flash_attn(), as_flash_attn()
    outer.undo()
    assert sys.modules["flash_attn"] is ours
    inner.undo()
    assert "flash_attn" not in sys.modules
    with pytest.raises(KeyError), as_flash_attn():
        raise KeyError
    assert "flash_attn" not in sys.modules


def test_metadata():
    """What libraries ask before they import; asked by transformers in the way of its is_flash_attn_2_available."""
    meta_path = list(sys.meta_path)
    with as_flash_attn():
        for name in ("flash-attn", "flash_attn", "Flash_Attn"):
            assert importlib.metadata.version(name) == ours.__version__ == "2.8.3"
        assert importlib.metadata.metadata("flash-attn")["Name"] == "flash-attn"
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        assert importlib.metadata.version("torch") == torch.__version__ or "+" in torch.__version__
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("flash-attn-3")
    assert sys.meta_path == meta_path
    assert "flash_attn" not in importlib.metadata.packages_distributions()


def test_transformers_takes_it_for_flash_attention_2(monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers.utils import import_utils

    available = inspect.unwrap(import_utils.is_flash_attn_2_available)
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)

    def forget():
        """The packages that there are: newer versions look once, when they are asked, older ones when they are imported."""
        if hasattr(import_utils, "_package_distribution_mapping"):
            import_utils._package_distribution_mapping.cache_clear()
        else:
            monkeypatch.setattr(import_utils, "PACKAGE_DISTRIBUTION_MAPPING", importlib.metadata.packages_distributions())

    forget()
    assert not available()
    with as_flash_attn():
        forget()
        assert available()
    forget()


# --------------------------------------------------------------------------------------------------------------------
# The private functions.

SCORES = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SAVED = "dout q k v out softmax_lse dq dk dv"
SIGNATURES = {
    "_flash_attn_forward": f"q k v {SCORES} return_softmax",
    "_flash_attn_varlen_forward": f"q k v {LENGTHS} {SCORES} return_softmax block_table leftpad_k seqused_k zero_tensors",
    "_flash_attn_backward": f"{SAVED} {SCORES} deterministic rng_state",
    "_flash_attn_varlen_backward": f"{SAVED} {LENGTHS} {SCORES} deterministic rng_state zero_tensors",
}
DEFAULTS = {
    "_flash_attn_varlen_forward": dict(
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
        seqused_k=None, zero_tensors=False,
    ),
    "_flash_attn_backward": {"rng_state": None},
    "_flash_attn_varlen_backward": {"rng_state": None, "zero_tensors": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_private_signatures_are_flash_attn_2_8s(name):
    """ring-flash-attention reads them with inspect to fill in what it does not pass."""
    spec = inspect.getfullargspec(getattr(interface, name))
    assert spec.args == SIGNATURES[name].split() and not spec.kwonlyargs
    defaults = spec.defaults or ()
    assert dict(zip(spec.args[len(spec.args) - len(defaults) :], defaults)) == DEFAULTS.get(name, {})
    assert getattr(interface, f"_wrapped{name}") is getattr(interface, name)


def dense(batch=2, seqlen_q=7, seqlen_k=10, heads=4, kv_heads=2, dtype=torch.float32):
    shapes = [(batch, seqlen_q, heads, 8), (batch, seqlen_k, kv_heads, 8), (batch, seqlen_k, kv_heads, 8)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
OPTIONS = [  # causal, window_left, window_right, softcap, alibi
    (True, -1, -1, 0.0, None),
    (False, 3, 2, 2.0, None),
    (True, -1, -1, 0.0, SLOPES),
]


@pytest.mark.both
@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window-softcap", "alibi"])
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_private_forward_and_backward(layout, options, launches):
    causal, left, right, softcap, slopes = options
    scores = (0.0, 0.4, causal, left, right, softcap, slopes)
    if layout == "dense":
        lengths, cu = (), {}
        tensors = dense()
        forward, backward = interface._flash_attn_forward, interface._flash_attn_backward
    else:
        q, k, v = dense(batch=1, seqlen_q=9, seqlen_k=12)
        tensors = [q[0], k[0], v[0]]
        lengths = (torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 7, 12], dtype=torch.int32), 5, 7)
        cu = dict(cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1])
        forward, backward = interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward
    out, lse, probabilities, rng_state = forward(*tensors, *lengths, *scores, False)
    inputs = [t.clone().requires_grad_() for t in tensors]
    expected, expected_lse = reference.attention(
        *inputs, causal=causal, window=(left, right), softmax_scale=0.4, softcap=softcap, alibi_slopes=slopes, return_lse=True, **cu
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert probabilities.numel() == 0 and rng_state.shape == (2,)
    dout = torch.randn_like(out)
    grads = [torch.full_like(t, float("nan")) for t in tensors]
    softmax_d = backward(dout, *tensors, out, lse, *grads, *lengths, *scores, False, rng_state)
    torch.testing.assert_close(softmax_d, (dout * out).sum(-1).transpose(-1, -2))
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs, dout)):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    assert launches is None or launches.count >= 2


@pytest.mark.both
@pytest.mark.parametrize("dropout_p, softcap", [(0.0, 0.0), (0.0, 3.0), (0.25, 0.0)])
def test_blocks_of_keys_add_up(dropout_p, softcap):
    """Ring attention: forward block by block, merge, and a backward block by block with the output and LSE over all keys."""
    q, k, v = dense(seqlen_k=14)
    scores = (dropout_p, 0.5, False, -1, -1, softcap, None)
    blocks = [(k[:, s], v[:, s]) for s in (slice(0, 6), slice(6, 14))]
    parts = [interface._flash_attn_forward(q, *block, *scores, False) for block in blocks]
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    out = sum(part[0] * (part[1] - lse).exp().transpose(1, 2)[..., None] for part in parts)

    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    rows, keys, values = (t.repeat_interleave(4 // t.shape[2], 2).transpose(1, 2) for t in inputs)
    logits = rows @ keys.transpose(2, 3) * 0.5
    weights = torch.softmax(softcap * torch.tanh(logits / softcap) if softcap else logits, -1)
    if dropout_p:
        keep = [dropout_keep(part[3][:1], 2, 4, 7, block[0].shape[1], dropout_p) for part, block in zip(parts, blocks)]
        weights = weights * torch.cat(keep, -1) / (1 - dropout_p)
    expected = (weights @ values).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    dout = torch.randn_like(out)
    dq, dkv = torch.zeros_like(q), []
    for block, part in zip(blocks, parts):
        grads = [torch.empty_like(t) for t in (q, *block)]
        interface._flash_attn_backward(dout, q, *block, out, lse, *grads, *scores, False, part[3])
        dq += grads[0]
        dkv.append(grads[1:])
    found = [dq, *(torch.cat(side, 1) for side in zip(*dkv))]
    for grad, wanted in zip(found, torch.autograd.grad(expected, inputs, dout)):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_dropped_probabilities_and_the_state():
    q, k, v = dense(seqlen_q=33, seqlen_k=40)
    out, _, probabilities, state = interface._flash_attn_forward(q, k, v, 0.3, 0.4, False, -1, -1, 0.0, None, True)
    assert probabilities.shape == (2, 4, 33, 40)
    kept = probabilities.clamp(min=0) / (1 - 0.3)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, 2)), rtol=1e-3, atol=1e-4)
    assert torch.equal(dropout_keep(state[:1], 2, 4, 33, 40, 0.3), ~probabilities.signbit())
    with pytest.raises(ValueError, match="_flash_attn_backward: rng_state must be the forward's with dropout, got None"):
        interface._flash_attn_backward(out, q, k, v, out, state.new_zeros(2, 4, 33).float(), None, None, None, 0.3, 0.4, False, -1, -1, 0.0, None, False)


@pytest.mark.parametrize("table", [False, True], ids=["packed", "pages"])
def test_varlen_forward_over_used_keys_and_padding(table):
    q, k, v = (t[0] for t in dense(batch=1, seqlen_q=5, seqlen_k=12))
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 8, 12], dtype=torch.int32)
    used, leftpad = torch.tensor([6, 4], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    cache = (k, v)
    options = dict(seqused_k=used, leftpad_k=leftpad)
    if table:
        cache = (k.unflatten(0, (3, 4)), v.unflatten(0, (3, 4)))
        options["block_table"] = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    out, lse, *_ = interface._flash_attn_varlen_forward(q, *cache, cu_q, cu_k, 3, 8, 0.0, 0.4, True, **options)
    cu_used = torch.tensor([0, 5, 9], dtype=torch.int32)
    keys, values = (torch.cat([t[1:6], t[8:12]]) for t in (k, v))
    expected, expected_lse = reference.attention(
        q, keys, values, causal=True, softmax_scale=0.4, cu_seqlens_q=cu_q, cu_seqlens_k=cu_used, return_lse=True
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    with pytest.raises(NotImplementedError, match="dropout_p is not supported with block_table, leftpad_k or seqused_k"):
        interface._flash_attn_varlen_forward(q, *cache, cu_q, cu_k, 3, 8, 0.1, 0.4, True, **options)


# --------------------------------------------------------------------------------------------------------------------
# layers.rotary


def rotated(x, cos, sin, positions, interleaved):
    """x (B, S, H, D) by rows `positions` (B, S) of the tables."""
    half = cos.shape[-1]
    first, second = (x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]) if interleaved else (x[..., :half], x[..., half : 2 * half])
    c, s = cos[positions][:, :, None], sin[positions][:, :, None]
    pair = first * c - second * s, second * c + first * s
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, x[..., 2 * half :]], -1)


ANGLES = torch.arange(20)[:, None] / 10.0 ** torch.arange(3)
OFFSETS = {"none": 0, "int": 5, "each": torch.tensor([2, 11], dtype=torch.int32)}


@pytest.mark.both
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_apply_rotary_emb(inplace, offset, interleaved):
    cos, sin, offset = ANGLES.cos(), ANGLES.sin(), OFFSETS[offset]
    leaf = torch.randn(2, 4, 3, 8, requires_grad=True)
    positions = torch.arange(4) + (offset[:, None] if torch.is_tensor(offset) else torch.full((2, 1), offset))
    expected = rotated(leaf, cos, sin, positions.expand(2, 4), interleaved)
    x = leaf * 1.0
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, inplace, offset)
    assert (out is x) == inplace
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(o, leaf, dout)[0] for o in (out, expected)))


def test_apply_rotary_emb_packed():
    cos, sin = ANGLES.cos(), ANGLES.sin()
    x = torch.randn(2, 4, 3, 8)
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    for offset in OFFSETS.values():
        packed = rotary.apply_rotary_emb(x.flatten(0, 1), cos, sin, seqlen_offsets=offset, cu_seqlens=cu_seqlens, max_seqlen=4)
        torch.testing.assert_close(packed.view_as(x), rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=offset))


@pytest.mark.parametrize("form", ["qkv", "gqa", "own-tables", "kv"])
def test_rotary_of_packed_projections(form):
    cos, sin = ANGLES.cos(), ANGLES.sin()
    positions = torch.arange(4).expand(2, 4)
    leaf = torch.randn(2, 4, 2 if form == "kv" else 3, 4, 8, requires_grad=True)
    parts = [rotated(t, cos, sin, positions, False) for t in leaf.unbind(2)]
    tables, options, shape = (cos, sin), {}, leaf.shape
    if form == "own-tables":
        tables = (cos, sin, sin, cos)
        parts[1] = rotated(leaf[:, :, 1], sin, cos, positions, False)
    if form == "gqa":
        options, shape = {"num_heads_q": 4}, (2, 4, 12, 8)
    if form == "kv":
        expected, function = torch.stack([parts[0], leaf[:, :, 1]], 2), rotary.apply_rotary_emb_kv_
    else:
        expected, function = torch.stack([*parts[:2], leaf[:, :, 2]], 2), rotary.apply_rotary_emb_qkv_
    x = (leaf * 1.0).view(shape)
    out = function(x, *tables, **options)
    assert out is x
    torch.testing.assert_close(out.view_as(expected), expected)
    dout = torch.randn_like(expected)
    found = torch.autograd.grad(out, leaf, dout.view_as(out))[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaf, dout)[0])


def test_rotary_module():
    module = rotary.RotaryEmbedding(6, base=100.0)
    assert not module.state_dict()
    qkv = torch.randn(2, 4, 3, 2, 8)
    angles = torch.arange(9)[:, None] / 100.0 ** (torch.arange(0, 6, 2) / 6)
    positions = torch.arange(5, 9).expand(2, 4)
    expected = torch.stack([rotated(t, angles.cos(), angles.sin(), positions, False) for t in qkv[:, :, :2].unbind(2)], 2)
    q, kv = module(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=5)
    out = module(qkv.clone(), seqlen_offset=5)
    torch.testing.assert_close(out[:, :, :2], expected)
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])
    assert torch.equal(q, out[:, :, 0]) and torch.equal(kv, out[:, :, 1:])
    assert torch.equal(module(qkv.clone(), seqlen_offset=torch.tensor([5, 5]), max_seqlen=9), out)
    half = module.bfloat16()(qkv.bfloat16(), seqlen_offset=5)
    assert half.dtype == torch.bfloat16 and module._cos_cached.dtype == torch.bfloat16
    torch.testing.assert_close(module._cos_cached[:9], angles.cos().bfloat16())
    with pytest.raises(NotImplementedError, match="scale_base"):
        rotary.RotaryEmbedding(8, scale_base=512)
    with pytest.raises(ValueError, match="max_seqlen must be given"):
        rotary.RotaryEmbedding(8)(qkv, seqlen_offset=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="qkv must have shape"):
        rotary.apply_rotary_emb_qkv_(qkv.flatten(2, 3), angles.cos(), angles.sin())


# --------------------------------------------------------------------------------------------------------------------
# losses.cross_entropy, ops.rms_norm, ops.triton.layer_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_loss(dtype):
    logits = torch.randn(6, 50).to(dtype).requires_grad_()
    labels = torch.tensor([3, -100, 0, 49, 7, 7])
    scaled = logits.float() * 2.0
    plain = F.cross_entropy(scaled, labels, reduction="none", label_smoothing=0.1)
    z = (0.01 * scaled.logsumexp(-1).square()).masked_fill(labels == -100, 0)
    options = dict(label_smoothing=0.1, logit_scale=2.0, lse_square_scale=0.01)
    losses, z_losses = cross_entropy_loss(logits, labels, **options)
    assert losses.dtype == z_losses.dtype == torch.float32 and not z_losses.requires_grad
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(losses, plain + z, rtol=rtol, atol=rtol)
    torch.testing.assert_close(z_losses, z, rtol=rtol, atol=rtol)
    found, wanted = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (losses, plain + z))
    torch.testing.assert_close(found, wanted, rtol=2 * rtol, atol=rtol)
    for reduction, expected in {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 5}.items():
        module = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)
        torch.testing.assert_close(module(logits, labels)[0], expected)
    assert torch.equal(CrossEntropyLoss(reduction="mean")(logits, labels), cross_entropy_loss(logits, labels)[0].sum() / 5)
    with pytest.raises(NotImplementedError, match="process_group"):
        cross_entropy_loss(logits, labels, process_group=object())
    with pytest.raises(NotImplementedError, match="reduction must be"):
        CrossEntropyLoss(reduction="max")


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_norm_functions(is_rms_norm):
    x, residual, weight, bias = torch.randn(3, 20), torch.randn(3, 20, dtype=torch.float64).float(), torch.randn(20), torch.randn(20)
    bias = None if is_rms_norm else bias
    function = norms.rms_norm_fn if is_rms_norm else norms.layer_norm_fn

    def expected(h):
        return F.rms_norm(h, (20,), weight, 1e-6) if is_rms_norm else F.layer_norm(h, (20,), weight, bias, 1e-6)

    torch.testing.assert_close(function(x, weight, bias), expected(x))
    torch.testing.assert_close(function(x, weight, bias, residual), expected(x + residual))
    y, stream = function(x.bfloat16(), weight, bias, residual, prenorm=True)
    torch.testing.assert_close(stream, x.bfloat16().float() + residual)
    torch.testing.assert_close(y, expected(stream).bfloat16())
    y, stream = function(x.bfloat16(), weight, bias, prenorm=True, residual_in_fp32=True, out_dtype=torch.float32)
    assert y.dtype == stream.dtype == torch.float32 and torch.equal(stream, x.bfloat16().float())
    y, stream = function(x, weight, bias, dropout_p=0.5, prenorm=True)
    assert (stream == 0).any() and torch.equal(stream[stream != 0], 2 * x[stream != 0])
    torch.testing.assert_close(y, expected(stream))
    for name in ("x1", "weight1", "bias1", "rowscale", "return_dropout_mask", "out", "residual_out"):
        with pytest.raises(NotImplementedError, match=f"_norm_fn: {name} is not supported"):
            function(x, weight, bias, **{name: True if name == "return_dropout_mask" else x})


def test_rms_norm_module():
    x, residual = torch.randn(3, 20), torch.randn(3, 20)
    for centred in (False, True):
        module = norms.RMSNorm(20, zero_centered_weight=centred)
        torch.testing.assert_close(module(x), F.rms_norm(x, (20,), None, 1e-5))
        y, stream = module(x, residual, prenorm=True)
        torch.testing.assert_close(y, F.rms_norm(x + residual, (20,), None, 1e-5))
        assert torch.equal(stream, x + residual)
    torch.testing.assert_close(of_rms_norm.rms_norm(x, module.weight + 1, 1e-5), module(x))
    assert norms.RMSNorm(20, dropout_p=0.5).eval()(x).equal(norms.RMSNorm(20)(x))


def test_needs_no_transformers():
    from test_layering import imported, modules

    free = {"__init__", "flash_attn_alias", "torch_sdpa", "liger"}
    own = ((module, path) for module, path in modules("fastattn.integrations") if path.parent.name == "integrations")
    names = {path.stem: {name for _, name in imported(module, path)} for module, path in own}
    assert free <= names.keys()
    assert not [stem for stem in free if any(name.partition(".")[0] == "transformers" for name in names[stem])]


def test_walks_every_module():
    """A module that is added to fastattn.flash_attn has the other name as well."""
    with as_flash_attn():
        names = {name for name in sys.modules if name.partition(".")[0] == "flash_attn"}
    assert len(names) == len(list(Path(ours.__file__).parent.rglob("*.py")))
