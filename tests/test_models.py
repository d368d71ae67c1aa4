"""The transformer: presets, packed, padded and cached forwards, the loss, the three arrangements, against plain torch in float64."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.models import PRESETS, Config, Encoder, EncoderDecoder, Transformer
from fastattn.models.positions import alibi_slopes, positions_of, sinusoidal
from fastattn.testing.budget import check_budget

TINY = [name for name in PRESETS if name.endswith("-tiny")]
SMALL = dict(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_seqlen=64, init_std=0.2)
# What a config can say, each at least once.
CONFIGS = {
    **{name: Config.preset(name, **SMALL, **({"window": 5} if "mistral" in name else {})) for name in TINY if "gemma" not in name},
    "gemma": Config.preset("gemma-tiny", **SMALL | {"window": (5, None), "softcap": 4.0, "final_softcap": 3.0}),
    "sinusoidal-post": Config(**SMALL, positions="sinusoidal", norm_position="post", norm="layer", activation="gelu", bias=True),
    "alibi-mqa": Config(**SMALL | {"num_heads": 3, "head_dim": 10}, num_kv_heads=1, positions="alibi", tied_embeddings=False),
    "qk-norm-llama3": Config(
        **SMALL, num_kv_heads=2, qk_norm=True, softmax_scale=0.3, rope_theta=5e5,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    ),
}  # fmt: skip


def make(config, cls=Transformer, seed=0):
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():  # norms and biases that are not what they start as
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --------------------------------------------------------------------------------------------------------------------
# The same model in plain torch, of the same parameters, in their dtype.


def plain_norm(config, norm, x):
    if config.norm == "layer":
        return F.layer_norm(x, (config.hidden_size,), norm.weight, norm.bias, config.norm_eps)
    return F.rms_norm(x, (config.hidden_size,), None, config.norm_eps) * (norm.weight + config.norm_offset)


def plain_attention(config, layer, attention, x, keys, causal, positions_matter=True):
    q, k, v = (proj(t).unflatten(-1, (-1, config.head_dim)) for proj, t in ((attention.q_proj, x), (attention.k_proj, keys), (attention.v_proj, keys)))
    if config.qk_norm:
        q, k = (F.rms_norm(t, (config.head_dim,), n.weight, config.norm_eps) for t, n in ((q, attention.q_norm), (k, attention.k_norm)))
    rotary = config.positions == "rotary" and positions_matter
    if rotary:
        table = fastattn.nn.RotaryEmbedding(config.head_dim, base=config.rope_theta, scaling=config.rope_scaling)
        q, k = fastattn.reference.apply_rotary(q, k, table.cos.to(q.dtype), table.sin.to(q.dtype))
    window = config.layer_window(layer) if positions_matter else None
    sides = (None if window is None else window - 1, None if window is None or causal else window - 1)
    slopes = alibi_slopes(config.num_heads).to(q.dtype) if config.positions == "alibi" and positions_matter else None
    out = fastattn.reference.attention(
        q, k, v, causal=causal, window=sides, softcap=config.softcap, softmax_scale=config.softmax_scale, alibi_slopes=slopes
    )
    return attention.o_proj(out.flatten(-2))


def plain_feed_forward(config, block, x):
    if block.moe is None:
        up = block.mlp.up_proj(x)
        gate = {"swiglu": F.silu, "geglu": lambda t: F.gelu(t, approximate="tanh")}.get(config.activation)
        return block.mlp.down_proj(F.gelu(up, approximate="tanh") if gate is None else gate(block.mlp.gate_proj(x)) * up)
    moe, tokens = block.moe, x.flatten(0, -2)
    weights, chosen = (tokens @ moe.gate.weight.T).softmax(-1).topk(config.top_k)
    weights, out = weights / weights.sum(-1, keepdim=True), torch.zeros_like(tokens)
    for t, token in enumerate(tokens):
        for weight, e in zip(weights[t], chosen[t]):
            gate, up = (moe.experts.gate_up_proj[e] @ token).chunk(2)
            out[t] += weight * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
    return out.view(x.shape)


def plain_sublayers(config, i, block, causal, context):
    def attention(x):
        return plain_attention(config, i, block.attention, x, x, causal)

    def cross_attention(x):
        return plain_attention(config, i, block.cross_attention, x, context, False, positions_matter=False)

    def feed_forward(x):
        return plain_feed_forward(config, block, x)

    cross = [] if context is None else [(block.cross_norm, block.cross_out_norm, cross_attention)]
    return [(block.attention_norm, block.attention_out_norm, attention), *cross, (block.mlp_norm, block.mlp_out_norm, feed_forward)]


def plain_hidden(model, tokens, causal=True, context=None):
    config, places = model.config, torch.arange(tokens.shape[1])
    x = model.embedding(tokens) * config.embedding_scale
    if config.positions == "learned":
        x = x + model.position_embedding(places)
    elif config.positions == "sinusoidal":
        x = x + sinusoidal(places, config.hidden_size).to(x.dtype)
    for i, block in enumerate(model.layers):
        for norm, out_norm, sublayer in plain_sublayers(config, i, block, causal, context):
            if config.norm_position == "pre":
                x = x + sublayer(plain_norm(config, norm, x))
            elif config.norm_position == "post":
                x = plain_norm(config, norm, x + sublayer(x))
            else:
                x = x + plain_norm(config, out_norm, sublayer(plain_norm(config, norm, x)))
    return x if config.norm_position == "post" else plain_norm(config, model.norm, x)


def plain_head(model, hidden):
    logits, cap = hidden @ model.head_weight.T, model.config.final_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


def in_float64(model):
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.double().eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_plain_torch(name):
    check_logits_and_gradients(name, make(CONFIGS[name]), torch.randint(61, (2, 14)))


def check_logits_and_gradients(name, model, tokens, device="cpu"):
    ours, twin = copy.deepcopy(model).to(device), in_float64(model)
    naive, exact = (plain_head(m, plain_hidden(m, tokens)) for m in (model, twin))
    check_budget(f"{name} logits", ours(tokens.to(device)), naive, exact)
    labels = torch.randint(61, tokens.shape).masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    loss = ours.loss(tokens.to(device), labels.to(device))
    losses = [F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for logits in (naive, exact)]
    check_budget(f"{name} loss", loss, *losses)
    names = [parameter for parameter, _ in model.named_parameters()]
    grads = [torch.autograd.grad(value, list(m.parameters())) for value, m in ((loss, ours), (losses[0], model), (losses[1], twin))]
    for parameter, *three in zip(names, *grads):
        check_budget(f"{name} d{parameter}", *three)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["moe-tiny", "gemma", "alibi-mqa"])
def test_logits_and_gradients_of_the_kernels(name, launches):
    check_logits_and_gradients(name, make(dataclasses.replace(CONFIGS[name], num_layers=1)), torch.randint(61, (1, 7)))
    assert launches.count > 10


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_on_a_gpu(name):
    check_logits_and_gradients(name, make(CONFIGS[name]), torch.randint(61, (2, 14)), "cuda")
    check_packed_padded_cached(make(CONFIGS[name]).cuda(), (11, 1, 14))


# --------------------------------------------------------------------------------------------------------------------
# One model, called in several ways.


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_padded_is_cached(name):
    check_packed_padded_cached(make(CONFIGS[name]), (11, 1, 14))


@pytest.mark.interpret
def test_packed_is_padded_is_cached_on_the_kernels(launches):
    check_packed_padded_cached(make(dataclasses.replace(CONFIGS["mistral-tiny"], num_layers=1)), (6, 1))
    assert launches.count > 10


def check_packed_padded_cached(model, lengths):
    device = model.embedding.weight.device
    sequences = [torch.randint(61, (length,), device=device) for length in lengths]
    with torch.no_grad():
        alone = torch.cat([model(t[None])[0] for t in sequences])
        padded = model(torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True))
        padded = torch.cat([row[:length] for row, length in zip(padded, lengths)])
        cu_seqlens = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int()
        packed = model(torch.cat(sequences), cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
        for result in (padded, packed):
            torch.testing.assert_close(result, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached(model, sequences), alone, rtol=1e-4, atol=1e-5)


def cached(model, sequences):
    """Logits through a cache: all of the prompts but five tokens packed, then one token each of those that have more, then the rest."""
    cache = model.new_cache(20, page_size=4)
    ids, parts = [cache.allocate() for _ in sequences], [[] for _ in sequences]
    for take in (lambda left: max(left - 5, 1), lambda left: min(left, 1), lambda left: left):
        rows = [t[cache.length(id) :] for id, t in zip(ids, sequences)]
        new = [take(len(row)) if len(row) else 0 for row in rows]
        cache.step(ids, new)
        logits = model(torch.cat([row[:n] for row, n in zip(rows, new)]), cache=cache)
        for part, of_sequence in zip(parts, logits.split(new)):
            part.append(of_sequence)
    return torch.cat([torch.cat(part) for part in parts])


def test_a_cached_step_may_be_a_batch():
    model, tokens = make(CONFIGS["gpt2-tiny"]), torch.randint(61, (2, 9))
    cache = model.new_cache(10, 4)
    ids = [cache.allocate(), cache.allocate()]
    with torch.no_grad():
        parts = []
        for at in (slice(0, 6), slice(6, 9)):
            cache.step(ids, at.stop - at.start)
            parts.append(model(tokens[:, at], cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tiny", "moe-tiny", "gemma"])
def test_checkpointing_changes_no_gradient(name):
    model, tokens = make(CONFIGS[name]).train(), torch.randint(61, (2, 12))
    grads = []
    for model.checkpointing in (False, True):
        grads.append(torch.autograd.grad(model.loss(tokens[:, :-1], tokens[:, 1:]), list(model.parameters())))
    for kept, again in zip(*grads):
        assert torch.equal(kept, again)


def test_dropout_draws_the_same_under_checkpointing():
    model, tokens = make(Config(**SMALL, dropout=0.3)).train(), torch.randint(61, (2, 12))
    grads = []
    for model.checkpointing in (False, True):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(model.loss(tokens[:, :-1], tokens[:, 1:]), list(model.parameters())))
    assert all(map(torch.equal, *grads))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_loss_reductions_and_auxiliary_losses():
    model, tokens = make(CONFIGS["moe-tiny"]), torch.randint(61, (2, 12))
    labels = torch.randint(61, (2, 12)).masked_fill(torch.rand(2, 12) < 0.4, -100)
    count = (labels != -100).sum()
    each, mean = model.loss(tokens, labels, reduction="none"), model.loss(tokens, labels)
    assert each.shape == labels.shape and not each[labels == -100].any()
    torch.testing.assert_close(each.sum() / count, mean)
    model.train()  # what the routers did now counts
    auxes = []
    hooks = [layer.moe.register_forward_hook(lambda module, args, out: auxes.append(out[1])) for layer in model.layers]
    trained = model.loss(tokens, labels)
    expected = torch.stack([0.01 * aux.load_balancing_loss for aux in auxes]).mean()
    torch.testing.assert_close(trained - mean, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(model.loss(tokens, labels, reduction="sum"), count * trained)
    assert len(hooks) == 2


def test_layers_show_the_residual_stream_to_hooks():
    model, seen = make(CONFIGS["llama-tiny"]), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    hidden = model.hidden(torch.randint(61, (1, 5)))
    torch.testing.assert_close(model.norm(seen[-1]), hidden)
    assert all(out.shape == (1, 5, 32) for out in seen)


def test_a_model_compiles_whole():
    model, tokens = make(dataclasses.replace(CONFIGS["moe-tiny"], num_layers=1)), torch.randint(61, (2, 12))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:]), model.loss(tokens[:, :-1], tokens[:, 1:]))


def test_half_precision_and_autocast():
    tokens = torch.randint(61, (2, 12))
    for name in ("moe-tiny", "sinusoidal-post", "alibi-mqa", "gemma"):
        model = make(CONFIGS[name])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        assert loss.dtype == torch.float32
        exact = model.loss(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
        half = model.to(torch.bfloat16)(tokens)
        assert half.dtype == torch.bfloat16 and half.isfinite().all()


# --------------------------------------------------------------------------------------------------------------------
# Encoder, and encoder with decoder.


@pytest.mark.parametrize("name", ["llama-tiny", "mistral-tiny", "alibi-mqa", "sinusoidal-post"])
def test_an_encoder_sees_both_ways_and_no_padding(name):
    encoder = make(CONFIGS[name], Encoder)
    tokens = torch.randint(61, (2, 13))
    mask = torch.ones(2, 13)
    mask[0, :4] = 0  # padding before a sequence
    mask[1, 9:] = 0  # and after one
    twin = in_float64(encoder)
    kept = [tokens[0, 4:], tokens[1, :9]]
    naive, exact = (torch.cat([plain_head(m, plain_hidden(m, t[None], causal=False))[0] for t in kept]) for m in (encoder, twin))
    logits = encoder(tokens, attention_mask=mask)
    check_budget("masked", logits[mask.bool()], naive, exact)
    assert not encoder.hidden(tokens, attention_mask=mask)[mask == 0].any()
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    check_budget("packed", encoder(torch.cat(kept), cu_seqlens=cu_seqlens), naive, exact)
    labels = tokens.masked_fill(torch.rand(2, 13) < 0.7, -100)
    expected = [F.cross_entropy(logits, labels[mask.bool()]) for logits in (naive, exact)]
    check_budget("loss", encoder.loss(tokens, labels, attention_mask=mask), *expected)
    each = encoder.loss(tokens, labels, attention_mask=mask, reduction="none")
    torch.testing.assert_close(each.sum() / ((labels != -100) & mask.bool()).sum(), expected[0])


@pytest.mark.parametrize("name", ["llama-tiny", "gemma", "sinusoidal-post", "alibi-mqa", "moe-tiny"])
def test_encoder_and_decoder_against_plain_torch(name):
    model = make(CONFIGS[name], EncoderDecoder)
    twin = in_float64(model)
    sources, targets = [torch.randint(61, (n,)) for n in (9, 4)], [torch.randint(61, (n,)) for n in (3, 8)]

    def plain(m):
        context = [plain_hidden(m.encoder, t[None], causal=False) for t in sources]
        return torch.cat([plain_head(m.decoder, plain_hidden(m.decoder, t[None], context=c))[0] for t, c in zip(targets, context)])

    pad = torch.nn.utils.rnn.pad_sequence
    source, target = pad(sources, batch_first=True), pad(targets, batch_first=True)
    masks = {
        f"{name}_mask": pad([torch.ones_like(t) for t in rows], batch_first=True) for name, rows in (("source", sources), ("target", targets))
    }
    padded = model(source, target, **masks)[masks["target_mask"].bool()]
    cu_seqlens = {f"cu_seqlens_{name}": torch.tensor(cu, dtype=torch.int32) for name, cu in (("source", [0, 9, 13]), ("target", [0, 3, 11]))}
    packed = model(torch.cat(sources), torch.cat(targets), **cu_seqlens)
    naive, exact = plain(model), plain(twin)
    check_budget("padded", padded, naive, exact)
    check_budget("packed", packed, naive, exact)
    labels = torch.randint(61, target.shape)
    of_labels = labels[masks["target_mask"].bool()]
    losses = [F.cross_entropy(logits, of_labels) for logits in (naive, exact)]
    check_budget("loss", model.loss(source, target, labels, **masks), *losses)
    grads = torch.autograd.grad(model.loss(source, target, labels, **masks), list(model.parameters()), allow_unused=True)
    expected = torch.autograd.grad(losses[0], list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(grads, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.interpret
def test_encoder_and_decoder_on_the_kernels(launches):
    model = make(dataclasses.replace(CONFIGS["llama-tiny"], num_layers=1), EncoderDecoder)
    source, target = torch.randint(61, (1, 6)), torch.randint(61, (1, 4))
    naive, exact = (
        plain_head(m.decoder, plain_hidden(m.decoder, target, context=plain_hidden(m.encoder, source, causal=False)))
        for m in (model, in_float64(model))
    )
    check_budget("logits", model(source, target), naive, exact)
    assert launches.count > 10


def test_an_encoder_decoder_writes_what_its_logits_say():
    model = make(CONFIGS["llama-tiny"], EncoderDecoder)
    source, mask = torch.randint(61, (3, 9)), torch.ones(3, 9)
    mask[1, 5:] = 0
    expected = []
    with torch.no_grad():
        for tokens, kept in zip(source, mask.bool()):
            written = [1]
            for _ in range(12):  # all of it again for every token
                written.append(int(model(tokens[kept][None], torch.tensor([written]))[0, -1].argmax()))
            expected.append(written[1:])
    options = {"source_mask": mask, "bos_id": 1, "max_new_tokens": 12}
    assert model.generate(source, eos_id=-1, **options) == expected
    end = expected[0][5]
    until = [row[: row.index(end)] if end in row else row for row in expected]
    assert model.generate(source, eos_id=end, **options) == until
    with pytest.raises(ValueError, match="EncoderDecoder.generate: max_new_tokens must be at least 1, got 0"):
        model.generate(source, bos_id=1, eos_id=2, max_new_tokens=0)


# --------------------------------------------------------------------------------------------------------------------
# Positions, counts, initial weights.


def test_positions():
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert positions_of(torch.zeros(7), cu_seqlens).tolist() == [0, 1, 2, 0, 1, 0, 1]  # the last two are past every sequence
    assert positions_of(torch.zeros(2, 3)).tolist() == [[0, 1, 2]]
    table = sinusoidal(torch.arange(50), 16)
    angle = 7 / 10000 ** (2 * 3 / 16)
    torch.testing.assert_close(table[7, [3, 11]], torch.tensor([math.sin(angle), math.cos(angle)]))
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    torch.testing.assert_close(alibi_slopes(6), 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0, 1.0, 3.0]))


def test_alibi_goes_beyond_max_seqlen_and_others_do_not():
    tokens = torch.randint(61, (1, 70))
    assert make(CONFIGS["alibi-mqa"])(tokens).isfinite().all()
    model = make(CONFIGS["llama-tiny"])
    with pytest.raises(ValueError, match="Transformer: tokens must be of sequences no longer than max_seqlen = 64, got 70"):
        model(tokens)
    cache = model.new_cache(20, 4)
    cache.step([cache.allocate()], 70)
    with pytest.raises(ValueError, match="max_seqlen = 64, got 70"):
        model(tokens, cache=cache)


def test_counts_are_those_of_the_published_models():
    """Of real sizes, on no device."""
    millions = {"gpt2": 124.4, "llama": 8030.3, "mistral": 7241.7, "gemma": 2614.3, "moe": 46702.8}
    for name, count in millions.items():
        model = Transformer(Config.preset(name), device="meta")
        assert round(model.num_parameters() / 1e6, 1) == count
    active = model.flops_per_token(1) / 6e6  # Mixtral's two experts and everything else but the embedding: 12.88 billion
    assert 12_600 < active < 12_900


def test_flops_per_token():
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("llama-tiny", "gpt2-tiny", "mistral-tiny"):
        model = make(CONFIGS[name])
        tokens = torch.randint(61, (1, 48))
        with FlopCounterMode(display=False) as counter:
            model(tokens)  # forward alone, a third of it
        vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # which the formula counts as matrices
        assert counter.get_total_flops() == pytest.approx(48 * (model.flops_per_token(48) / 3 - 2 * vectors), rel=1e-6)


def test_initial_weights():
    torch.manual_seed(0)
    model = Transformer(Config.preset("llama-tiny")).requires_grad_(False)
    assert model.layers[0].attention.q_proj.weight.std() == pytest.approx(0.02, rel=0.05)
    assert model.layers[1].mlp.down_proj.weight.std() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    torch.manual_seed(0)
    again = Transformer(Config.preset("llama-tiny"))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    tokens = torch.randint(256, (2, 65))
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(model.config.vocab_size), rel=0.02)


@pytest.mark.parametrize("name", ["llama-tiny", "moe-tiny"])
def test_a_model_learns(name):
    torch.manual_seed(0)
    model = Transformer(Config.preset(name, **SMALL | {"init_std": 0.05}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(33).repeat(4, 1) + torch.arange(4)[:, None]  # each token is one more than the last
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# --------------------------------------------------------------------------------------------------------------------
# Configs, and what is refused.


def test_configs_come_back_from_dicts():
    import json

    for config in (*CONFIGS.values(), *map(Config.preset, PRESETS)):
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config.preset("gemma").layer_window(0) == 4096 and Config.preset("gemma").layer_window(25) is None


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(hidden_size=30), ValueError, "hidden_size must be a multiple of num_heads = 4 where head_dim is None, got 30"),
        (dict(num_kv_heads=3), ValueError, "num_kv_heads must divide num_heads = 4, got 3"),
        (dict(num_layers=0), ValueError, "num_layers must be positive, got 0"),
        (dict(vocab_size=1.5), TypeError, "vocab_size must be an int, got 1.5"),
        (dict(positions="none"), ValueError, "positions must be one of 'rotary', 'learned', 'sinusoidal', 'alibi', got 'none'"),
        (dict(norm_position="mid"), ValueError, "norm_position must be one of 'pre', 'post', 'both', got 'mid'"),
        (dict(head_dim=7), ValueError, "head_dim must be even with rotary positions, got 7"),
        (dict(num_experts=1), ValueError, "num_experts must be 0 or at least top_k = 2, got 1"),
        (dict(num_experts=4, bias=True), ValueError, "bias must be False with experts, got True"),
        (dict(num_experts=4, activation="gelu"), ValueError, "activation must be gated with experts, got 'gelu'"),
        (dict(window=0), ValueError, "window must be None, a positive int or a tuple of these, got 0"),
        (dict(window=()), ValueError, "window must be None, a positive int or a tuple of these, got "),
        (dict(dropout=1.0), ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (dict(norm="layer", norm_offset=1.0), ValueError, "norm_offset must be 0 with layer norms, got 1.0"),
        (dict(rope_scaling={"rope_type": "yarn"}), ValueError, "rope_scaling must have a rope_type of default, linear, ntk, llama3, got 'yarn'"),
        (dict(bias=1), TypeError, "bias must be True or False, got 1"),
    ],
)
def test_config_bad_input(changes, error, message):
    with pytest.raises(error, match=f"Config: {message}"):
        Config(**SMALL | changes)


def test_presets_and_fields_by_name():
    with pytest.raises(ValueError, match="Config.preset: name must be one of gpt2, llama, .*moe-tiny, got 'bert'"):
        Config.preset("bert")
    with pytest.raises(ValueError, match="Config: there is no field hidden; there are activation, bias, "):
        Config.from_dict({"hidden": 1})
    with pytest.raises(ValueError, match="Config: hidden_size, num_layers, num_heads must be given"):
        Config.from_dict({"vocab_size": 10})


def stepped(model, new):
    cache = model.new_cache(4)
    cache.step([cache.allocate()], new)
    return cache


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, t: m(t.float()), TypeError, "Transformer: tokens must be an int64 or int32 tensor, got torch.float32"),
        (lambda m, t: m([1, 2]), TypeError, "Transformer: tokens must be an int64 or int32 tensor, got list"),
        (lambda m, t: m(t[0]), ValueError, r"Transformer: tokens must have shape \(T,\) with cu_seqlens, \(B, S\) without, got \(9,\)"),
        (lambda m, t: m(t, cache=m.new_cache(4)), ValueError, "Transformer: cache must have a current step"),
        (lambda m, t: m(t, cache=stepped(m, 3)), ValueError, "Transformer: tokens must be the 3 of the cache's current step, got 18"),
        (lambda m, t: m(t + 61), ValueError, r"Transformer: tokens must lie in \[0, 61\), got "),
        (lambda m, t: m(t - 61), ValueError, r"Transformer: tokens must lie in \[0, 61\), got -"),
    ],
)
def test_model_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(make(CONFIGS["llama-tiny"]), torch.randint(61, (2, 9)))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda e, m, t: e(t, attention_mask=t[:, :3]), ValueError, r"Encoder: a mask must have the tokens' shape \(B, S\), got \(2, 3\) for \(2, 9\)"),
        (lambda e, m, t: e(t, attention_mask=t, cu_seqlens=t), ValueError, "Encoder: a mask and cu_seqlens must not be given together"),
        (lambda e, m, t: e.new_cache(3), NotImplementedError, "Encoder: there is no cache where tokens see those after them"),
        (lambda e, m, t: m(t, t[:1]), ValueError, "EncoderDecoder: target must hold as many sequences as source, 2, got 1"),
        (lambda e, m, t: m(t, t[0]), ValueError, r"EncoderDecoder: target must have shape \(T,\) with cu_seqlens, \(B, S\) without"),
        (lambda e, m, t: m.loss(t, t, t, mask=t), TypeError, "EncoderDecoder.loss: there is no option mask"),
    ],
)
def test_encoder_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(make(CONFIGS["llama-tiny"], Encoder), make(CONFIGS["llama-tiny"], EncoderDecoder), torch.randint(61, (2, 9)))
