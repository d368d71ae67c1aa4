"""What a page of `fastattn explain` says is what the model does, and a browser shows it."""

from __future__ import annotations

import base64
import json
import math
import re

import pytest
import torch

from fastattn import models
from fastattn.cli import main
from fastattn.models import inspection
from fastattn.models.explain import MOST_TOKENS, explain, measure
from fastattn.nn import Attention, RotaryEmbedding

TEXT = "the cat sat </script> on thé mat"


def tiny(preset: str = "llama-tiny", **changes) -> models.Transformer:
    return models.Transformer(models.Config.preset(preset, **{"vocab_size": 259, "num_layers": 3, "hidden_size": 64, **changes})).eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny()


@pytest.fixture(scope="module")
def measured(model):
    return measure(model, models.ByteTokenizer(), TEXT, name="a tiny one")


@pytest.mark.parametrize("options", [
    {}, {"window": 5}, {"softcap": 2.0, "softmax_scale": 0.3}, {"sinks": True}, {"qk_norm": True, "num_kv_heads": 1},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_attention_weights_are_those_that_make_the_output(options, positions):
    torch.manual_seed(1)
    module = Attention(32, 4, **{"num_kv_heads": 2, **options})
    if module.sinks is not None:
        torch.nn.init.normal_(module.sinks)
    for parameter in module.parameters():
        parameter.data.mul_(3)
    x, rotary = torch.randn(2, 11, 32), RotaryEmbedding(8)
    places = {"rotary": {"cos": rotary.cos, "sin": rotary.sin}, "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])}, "none": {}}[positions]
    weights = inspection.attention_weights(module, x, **places)
    _, v = module.project_context(x)
    out = torch.einsum("bnij,bjnd->bind", weights, v.repeat_interleave(4 // module.num_kv_heads, 2)).flatten(-2)
    torch.testing.assert_close(module.o_proj(out), module(x, **places), atol=2e-5, rtol=1e-4)
    total = weights.sum(-1)
    assert (weights.triu(1) == 0).all() and (total <= 1 + 1e-5).all()
    assert torch.allclose(total, torch.ones(())) == (module.sinks is None)
    if "window" in options:
        assert (weights.tril(-5) == 0).all()


def test_a_bidirectional_layer_has_weights_on_both_sides():
    module, x = Attention(32, 4), torch.randn(1, 6, 32)
    weights = inspection.attention_weights(module, x, causal=False)
    assert (weights > 0).all() and torch.allclose(weights.sum(-1), torch.ones(()))


def test_a_trace_is_the_models_own_pass_and_leaves_nothing_behind(model):
    tokens = torch.randint(259, (9,))
    model.train()
    seen = inspection.trace(model, tokens)
    assert model.training and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()
    assert seen.stream.shape == (4, 9, 64) and [w.shape for w in seen.attention] == [(4, 9, 9)] * 3 and seen.experts == [None] * 3
    torch.testing.assert_close(inspection.logit_lens(model, seen.stream[-1]), torch.log_softmax(model(tokens[None])[0], -1))
    torch.testing.assert_close(seen.stream[0], model.embedding.weight[tokens])


def test_hooks_go_where_the_model_raises(model):
    with pytest.raises(ValueError, match="max_seqlen"):
        inspection.trace(model, torch.zeros(300, dtype=torch.int64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"trace: tokens must have shape \(S,\)"):
        inspection.trace(model, torch.zeros(0, dtype=torch.int64))


def test_experts_are_those_that_the_router_chose():
    model, tokens = tiny("moe-tiny"), torch.randint(259, (7,))
    layer, inputs = model.layers[1], []
    layer.moe.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    chosen = inspection.trace(model, tokens).experts[1]
    logits = layer.moe.gate(inputs[0].view(7, -1))
    assert chosen.sort().values.equal(logits.topk(2).indices.sort().values.to(chosen.dtype))


@pytest.mark.parametrize(("kind", "offset"), [("previous token", 1), ("same token", 0), ("induction", 31), ("duplicate token", 32), ("first token", None)])
def test_a_head_of_one_kind_is_found(kind, offset, model, monkeypatch):
    """Heads that do one thing alone: read the token `offset` back, where there is one."""

    def one_kind(model, tokens):
        length = len(tokens)
        weights = torch.zeros(2, length, length)
        for i in range(length):
            weights[1, i, 0 if offset is None or i < offset else i - offset] = 1.0
            weights[0, i, : i + 1] = 1 / (i + 1)
        return inspection.Trace(tokens, attention=[weights])

    monkeypatch.setattr(inspection, "trace", one_kind)
    scores = inspection.head_scores(model, one_kind(model, torch.arange(40)))[0]
    assert scores[kind][1] >= 0.99
    assert inspection.kind_of_head({name: float(score[1]) for name, score in scores.items()}) == kind
    assert inspection.kind_of_head({name: float(score[0]) for name, score in scores.items()}) is None


def test_one_token_is_enough_for_a_page(model):
    page = measure(model, models.ByteTokenizer(), "x")
    assert all(math.isfinite(score) for layer in page["heads"]["layers"] for scores in layer["scores"] for score in scores.values())


def test_nearest_is_by_cosine_and_leaves_out_what_it_is_told_to(model):
    ids, cosines = inspection.nearest(model, 5 * model.embedding.weight[[7, 9]], 3)
    assert ids[:, 0].tolist() == [7, 9] and torch.allclose(cosines[:, 0], torch.ones(()))
    ids, _ = inspection.nearest(model, model.embedding.weight[[7, 9]], 3, torch.tensor([[7], [9]]))
    assert 7 not in ids[0] and 9 not in ids[1]


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny", "gemma-tiny", "moe-tiny"])
def test_parts_add_up(preset):
    model = tiny(preset, tied_embeddings=False)
    parts = inspection.parameters_by_part(model)
    assert sum(parts.values()) == model.num_parameters()
    assert parts["attention"] == sum(p.numel() for layer in model.layers for p in layer.attention.parameters() if p.dim() == 2 or preset == "gpt2-tiny")
    assert ("experts" in parts) == (preset == "moe-tiny") and parts["embedding"] == parts["unembedding"] == 259 * 64


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal", "alibi"])
def test_positions_have_a_picture(positions):
    _, picture = inspection.position_picture(tiny(positions=positions), 20)
    assert picture.shape[0] == 20 and picture.abs().max() <= 1 + 1e-5


def test_what_is_measured_is_what_the_model_gives(model, measured):
    ids = list(TEXT.encode())
    probs = torch.softmax(model(torch.tensor([ids]))[0], -1)
    assert [token["id"] for token in measured["tokens"]] == ids and "".join(token["text"] for token in measured["tokens"][:12]) == TEXT[:12]
    assert measured["tokens"][TEXT.encode().index(0xC3)]["text"] == "⟨195⟩"  # half a character

    listed = measured["sampling"]["tokens"]
    assert listed[0][1] == pytest.approx(float(probs[-1].max().log()), abs=1e-3)
    rest = sum(count * math.exp(value) for value, count in measured["sampling"]["rest"])
    assert sum(math.exp(value) for _, value in listed) + rest == pytest.approx(1, abs=2e-2)
    assert [p for _, p in measured["stream"]["lens"][-1][3]] == pytest.approx(probs[3].topk(5).values.tolist(), abs=1e-4)

    weights = torch.frombuffer(bytearray(base64.b64decode(measured["heads"]["layers"][2]["weights"])), dtype=torch.uint8).view(4, len(ids), -1) / 255
    assert (weights - inspection.trace(model, torch.tensor(ids)).attention[2]).abs().max() <= 0.5 / 255 + 1e-6
    cache = measured["cache"]
    assert cache["bytes_per_token"] == sum(t[0, 0].nbytes for both in (model.new_cache(1).k_cache, model.new_cache(1).v_cache) for t in both)
    assert cache["with_cache"][-1] == pytest.approx(256 * model.flops_per_token(256) / 3)
    exact = sum(n * model.flops_per_token(n) / 3 for n in range(1, 257))
    assert cache["without_cache"][-1] == pytest.approx(exact, rel=0.02)


def test_rare_tokens_are_counted_by_logit(monkeypatch, model):
    monkeypatch.setattr("fastattn.models.explain.LISTED", 50)
    sampling = measure(model, models.ByteTokenizer(), TEXT)["sampling"]
    assert len(sampling["tokens"]) == 50 and sum(count for _, count in sampling["rest"]) == 209
    total = sum(math.exp(v) for _, v in sampling["tokens"]) + sum(n * math.exp(v) for v, n in sampling["rest"])
    assert total == pytest.approx(1, abs=5e-2)


def test_a_word_is_compared_with_itself_in_another_sentence(model):
    found = measure(model, models.ByteTokenizer(), "a", compared=("bank", "the bank", "the bank"))["embeddings"]["compared"]
    assert found["between"] == pytest.approx([1] * 4, abs=1e-4) and found["to_static"][0] == found["to_static"][1]
    assert found["to_static"][0][0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("text", "options", "message"), [
    ("", {}, f"explain: text must have 1 to {MOST_TOKENS} tokens, got 0"),
    ("x" * 97, {}, f"explain: text must have 1 to {MOST_TOKENS} tokens, got 97"),
    ("x", {"compared": ("bank", "no such", "the bank")}, "explain: compared must be a word and two sentences that have it"),
])  # fmt: skip
def test_errors_name_the_argument(text, options, message, model):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(model, models.ByteTokenizer(), text, **options)


def test_a_foreign_vocabulary_is_refused():
    with pytest.raises(ValueError, match="explain: tokenizer must have at most the model's 256 tokens, got 259"):
        measure(tiny(vocab_size=256), models.ByteTokenizer(), "x")


def test_the_command_writes_a_page(model, tmp_path, capsys):
    models.save(model, tmp_path / "model", models.ByteTokenizer())
    assert main(["explain", TEXT, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 1  # the text's own is escaped
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))
    assert data["text"] == TEXT and data["name"] == str(tmp_path / "model")
    assert main(["explain", TEXT, "--model", str(tmp_path / "none"), "--out", str(tmp_path / "other.html")]) == 1
    assert "fastattn explain: " in capsys.readouterr().err and not (tmp_path / "other.html").exists()


@pytest.mark.parametrize(("scheme", "width", "preset"), [("light", 1200, "llama-tiny"), ("dark", 390, "moe-tiny")])
def test_a_browser_shows_it(scheme, width, preset, browser, tmp_path):
    torch.manual_seed(0)
    model, path = tiny(preset), tmp_path / "page.html"
    path.write_text(explain(model, models.ByteTokenizer(), TEXT))
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    tab, errors = context.new_page(), []
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(path.as_uri())
    size = len(TEXT.encode())
    assert tab.locator("#tokens .token").count() == tab.locator("#reads .token").count() == size
    assert tab.locator("#heads canvas").count() == 4 and tab.locator("#pattern").evaluate("c => [c.width, c.height]") == [size, size]
    assert tab.locator("#lens tr").count() == 1 + 4 and tab.locator("#kinds tr").count() == 1 + len(inspection.KINDS)
    assert tab.locator("#experts tr").count() == (4 if preset == "moe-tiny" else 0)
    assert tab.locator("svg polyline").count() == 3 + 2 + 1 + 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) > 380) == (scheme == "light")

    tab.locator("#tokens .token").nth(2).click()
    assert tab.locator("#reads-of").inner_text() == "e" and tab.locator("#tokens .chosen").count() == 1
    tab.locator("#heads .head").nth(3).click()
    assert tab.locator("#head-title").inner_text().endswith("head 4")
    tab.locator("#layer").fill("0")
    assert tab.locator("#layer-out").inner_text() == "1 of 3"

    tab.locator("#top-k").fill("0")  # one token is left, and drawn
    assert tab.locator("#kept").inner_text().startswith("1 token is left") and tab.locator("#probs .number").first.inner_text() == "100 %"
    assert len(set(tab.locator("#drawn .word").all_inner_texts())) == 1 and tab.locator("#drawn .word").count() == 12
    tab.locator("#top-k").fill("10")
    shares = []
    for temperature in ("0.1", "1", "2"):
        tab.locator("#temperature").fill(temperature)
        shares.append(float(tab.locator("#probs .fill").first.evaluate("f => parseFloat(f.style.width)")))
    assert shares[0] > shares[1] > shares[2]
    tab.locator("#top-p").fill("0.05")
    assert int(re.match(r"[\d,]+", tab.locator("#kept").inner_text()).group().replace(",", "")) < 259
    assert not errors
    context.close()


def test_what_is_no_decoder_or_not_finite_is_refused():
    config = models.Config.preset("llama-tiny", num_layers=1, hidden_size=32)
    with pytest.raises(ValueError, match="explain: model must be a decoder-only language model, got Encoder"):
        measure(models.Encoder(config), models.ByteTokenizer(), "x")
    model = models.Transformer(config)
    model.layers[0].mlp.down_proj.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="explain: model must compute finite numbers"):
        measure(model, models.ByteTokenizer(), "x")
