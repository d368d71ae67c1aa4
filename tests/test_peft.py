"""Adapters, accelerate and gradient checkpointing: models on fastattn, and fastattn.nn itself, train as they do on eager attention."""

from __future__ import annotations

import copy
import os

import pytest
from conftest import INTERPRETING

if INTERPRETING:  # spares that process the imports
    pytest.skip("compiled: runs in the process without TRITON_INTERPRET", allow_module_level=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

import torch  # noqa: E402  (the skips come first)
from torch import Tensor, nn  # noqa: E402

from fastattn.integrations import transformers as on_transformers  # noqa: E402
from fastattn.nn import Attention, LinearCrossEntropyLoss, MoE, MultiheadAttention, RMSNorm, SwiGLU  # noqa: E402

on_transformers.register()

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)),
}
ATTENTION = ["q_proj", "v_proj", "o_proj"]


def model_of(name: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    if name == "mixtral":
        model.set_experts_implementation(implementation)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # which a padded token would have to predict, that sees nothing here and everything in eager attention
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(model: nn.Module, **options: object) -> nn.Module:
    """Both factors of each adapter other than 0, as in the middle of a training."""
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def close(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert grad is not None and grad.abs().max() > 0, name
        scale = float(grad.abs().max())
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("name", MODELS)
def test_lora_gradients_match_eager(name):
    """Of adapters around attention's projections, and for a mixture around the experts' matrices too."""
    options = {"target_modules": ATTENTION}
    if name == "mixtral":
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    found = {}
    for implementation in ("eager", "fastattn"):
        model = adapted(model_of(name, implementation), **options)
        loss = model(**batch()).loss
        loss.backward()
        found[implementation] = loss.detach(), gradients(model)
    torch.testing.assert_close(found["fastattn"][0], found["eager"][0])
    close(found["fastattn"][1], found["eager"][1])
    assert all("lora_" in key for key in found["fastattn"][1])
    assert name == "llama" or any("experts" in key for key in found["fastattn"][1])


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(use_reentrant):
    """Within a model whose attention drops: the recomputation drops the same, so that gradients are those without, bit for bit."""
    found = []
    for enabled in (False, True):
        model = model_of("llama", "fastattn").train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        model = adapted(model, target_modules=ATTENTION)
        if enabled:
            model.enable_input_require_grads()  # a frozen embedding would cut reentrant checkpoints off
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(5)
        model(**batch(), use_cache=False).loss.backward()
        found.append(gradients(model))
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


def test_accelerates_loop_trains_as_on_eager():
    """prepare, accumulate, backward, clip_grad_norm_: four steps over two batches."""

    def losses(implementation: str) -> list[float]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adapted(model_of("llama", implementation), target_modules=ATTENTION)
        rows = [{key: t[i] for key, t in batch().items()} for i in (0, 1, 1, 0)]
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), 1e-2), torch.utils.data.DataLoader(rows, batch_size=2)
        )
        found = []
        for _ in range(4):
            for inputs in loader:
                with accelerator.accumulate(model):
                    loss = model(**inputs).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                found.append(loss.item())
        return found

    eager, ours = losses("eager"), losses("fastattn")
    assert ours == pytest.approx(eager, rel=1e-3) and ours[-1] < ours[0]


# --------------------------------------------------------------------------------------------------------------------
# Adapters around modules of fastattn.nn.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = RMSNorm(16), RMSNorm(16), Attention(16, 4, 2)
        self.gate_proj, self.up_proj, self.down_proj, self.act = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16), SwiGLU()
        self.moe, self.bidirectional = MoE.mixtral(16, 8, 4), MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.norm2(self.attn(self.norm1(x)), x)
        x = x + self.down_proj(self.act(self.gate_proj(y), self.up_proj(y)))
        x = x + self.moe(x)[0]
        return x + self.bidirectional(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["bidirectional"]},
        {"target_parameters": ["moe.experts.gate_up_proj", "moe.experts.down_proj"]},
    ],
    ids=["projections", "multi-head attention", "experts"],
)  # fmt: skip
def test_adapters_around_modules(options):
    """What is adapted is used: the adapters get gradients, merged they give the same, and without them the block is what it was."""
    block, x = Block(), torch.randn(2, 5, 16)
    before = block(x)
    model = adapted(copy.deepcopy(block), **options)
    out = model(x)
    assert (out - before).abs().max() > 0.1
    out.square().sum().backward()
    grads = gradients(model)
    assert grads and all("lora_" in name and grad is not None and grad.abs().max() > 0 for name, grad in grads.items())
    with model.disable_adapter():
        torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.merge_and_unload()(x), out.detach(), rtol=1e-4, atol=1e-4)


def test_an_adapted_head_is_no_linear_layer():
    """Of which the loss would read the weight and leave the adapter out, without a word."""
    loss, x = LinearCrossEntropyLoss(16, 7), torch.randn(3, 16)
    model = adapted(loss, target_modules=["linear"])
    with pytest.raises(TypeError, match=r"LinearCrossEntropyLoss: linear must have torch.nn.Linear's forward, .* got peft.*Linear"):
        model(x, torch.tensor([0, 1, 2]))
    merged = model.merge_and_unload()
    expected = nn.functional.cross_entropy(merged.linear(x), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(merged(x, torch.tensor([0, 1, 2])), expected)
