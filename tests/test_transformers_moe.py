"""Hugging Face mixtures of experts on fastattn: logits and every gradient within the error budget of eager's, whole models and every class
of experts that transformers has."""

import copy
import importlib
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import torch  # noqa: E402  (the skip comes first)
from torch import nn  # noqa: E402

from fastattn.integrations import transformers as on_transformers  # noqa: E402
from fastattn.integrations.transformers import experts as on_experts  # noqa: E402
from fastattn.testing.budget import check_budget  # noqa: E402

hub = pytest.importorskip("transformers.integrations.moe", reason="needs a transformers with a registry of experts")
on_transformers.register()

# Large random weights, as in test_transformers.py: the experts have to matter to the logits.
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral(num_layers: int, **options):
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, **options}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, num_hidden_layers=num_layers, **options))


def qwen3_moe(num_layers: int):
    options = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**COMMON, num_hidden_layers=num_layers, **options))


def gpt_oss(num_layers: int):
    options = {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**COMMON, num_hidden_layers=num_layers, **options))


def nemotron_h(num_layers: int):
    """Experts without a gate, relu² between their products."""
    options = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24}
    config = transformers.NemotronHConfig(**COMMON, hybrid_override_pattern="*E" * num_layers, **options)
    return transformers.NemotronHForCausalLM(config)


MODELS = {  # and what fastattn.moe is to compute of each; None where the module computes it itself, between two grouped products
    "mixtral": (mixtral, ("swiglu", "concatenated")),
    "mixtral_gelu_tanh": (lambda n: mixtral(n, hidden_act="gelu_pytorch_tanh"), ("geglu", "concatenated")),
    "mixtral_gelu": (lambda n: mixtral(n, hidden_act="gelu"), None),
    "qwen3_moe": (qwen3_moe, ("swiglu", "concatenated")),
    "gpt_oss": (gpt_oss, ("clamped_swiglu", "interleaved")),
    "nemotron_h": (nemotron_h, None),
}


def tiny(name: str, num_layers: int = 2, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = MODELS[name][0](num_layers).to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("sinks", "_bias")):  # zeros otherwise
            nn.init.normal_(parameter)
    return model


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "_apply_gate")]


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def results(model, experts: str, attention: str = "eager") -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter that has one."""
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    model.zero_grad()
    logits = model(tokens()).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def check_all(name: str, ours: dict, naive: dict, ref64: dict) -> None:
    assert ours.keys() == naive.keys() == ref64.keys()
    for key, expected in ref64.items():
        check_budget(f"{name} {key}", ours[key], naive[key], expected.double())  # some models' logits are float32 whatever the model


@pytest.mark.parametrize("attention", ["eager", "fastattn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_parameter_gradients(name, dtype, attention):
    # In bf16 one layer: what the first rounds differently can change what the second one's router chooses.
    model = tiny(name, 1 if dtype == torch.bfloat16 else 2, dtype)
    assert {on_experts.known_gate(experts) for experts in experts_of(model)} == {MODELS[name][1]}
    ref64, naive = results(copy.deepcopy(model).double(), "eager"), results(model, "eager")
    ours = results(model, "fastattn", attention)
    assert any("experts" in key for key in ours)
    check_all(name, ours, naive, ref64)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])  # every option of fastattn.moe, and the path around it
def test_the_kernels_compute_the_same(name, launches):
    model = tiny(name, 1)
    ref64, naive = results(copy.deepcopy(model).double(), "eager"), results(model, "eager")
    check_all(name, results(model, "fastattn"), naive, ref64)
    assert launches.count > 0


def test_the_models_would_notice_their_experts(monkeypatch):
    """The comparison above means something: with the experts' output a hundredth off, it fails."""
    model, right = tiny("mixtral"), on_experts.moe
    ref64, naive = results(copy.deepcopy(model).double(), "eager"), results(model, "eager")
    monkeypatch.setattr(on_experts, "moe", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check_all("mixtral", results(model, "fastattn"), naive, ref64)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_generate_writes_the_same_tokens(name):
    model, texts = tiny(name), []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        model.set_experts_implementation(implementation)
        texts.append(model.generate(tokens(), max_new_tokens=12, do_sample=False))
    assert torch.equal(*texts)


def test_both_by_keyword():
    config = transformers.MixtralConfig(**COMMON, num_hidden_layers=1, num_local_experts=4)
    options = {"attn_implementation": "fastattn", "experts_implementation": "fastattn"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    assert model.config._attn_implementation == model.config._experts_implementation == "fastattn"


# --------------------------------------------------------------------------------------------------------------------
# One layer's experts.


class AnyConfig:
    """A small config of any model: a size for whatever is asked."""

    hidden_act, hidden_activation, mlp_hidden_act = "silu", "gelu_pytorch_tanh", "relu2"
    swiglu_limit, swiglu_alpha, moe_latent_size = 7.0, 1.702, None
    rms_norm_eps = post_norm_eps = 1e-5
    _experts_implementation = "eager"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        sizes = {"expert": 5, "intermediate": 12, "hidden": 16}
        return next((size for word, size in sizes.items() if word in name), 1.0)


def experts_classes() -> list[type]:
    """Every class of experts in transformers that takes an implementation."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found += [
                c for c in vars(module).values()
                if isinstance(c, type) and c.__module__ == module.__name__ and hasattr(c, "_apply_gate")
            ]  # fmt: skip
    return found


def randomised(experts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def inputs_of(experts: nn.Module, num_tokens: int = 9, top_k: int = 2) -> list[torch.Tensor]:
    hidden_size = (experts.gate_up_proj if experts.has_gate else experts.up_proj).shape[1 if experts.is_transposed else 2]
    x, weights = 3 * torch.randn(num_tokens, hidden_size), torch.rand(num_tokens, top_k)
    return [x, torch.stack([torch.randperm(experts.num_experts)[:top_k] for _ in range(num_tokens)]), weights]


def run_experts(experts: nn.Module, implementation: str, inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    experts = copy.deepcopy(experts).to(dtype)
    experts.config._experts_implementation = implementation
    x, index, weights = inputs
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weights)]
    out = experts(leaves[0], index, leaves[1])
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype))
    grads = {name: p.grad for name, p in experts.named_parameters()}
    return {"out": out.detach(), "dx": leaves[0].grad, "dweights": leaves[1].grad, **grads}


def check_experts(experts: nn.Module, dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs_of(experts)]
    rounded = copy.deepcopy(experts).to(dtype)  # so that all three have the same numbers
    # not eager: one class's computes in float32 whatever the dtype, and only there
    ours, naive = (run_experts(rounded, implementation, inputs, dtype) for implementation in ("fastattn", "batched_mm"))
    check_all(type(experts).__name__, ours, naive, run_experts(rounded, "eager", inputs, torch.float64))


def test_every_class_of_experts():
    """All of transformers' own, each by the gate it has: none is computed as something else."""
    gates = {}
    for experts_class in experts_classes():
        try:
            experts = randomised(experts_class(AnyConfig()))
        except TypeError:  # it wants more than a config
            continue
        gates[experts_class.__name__] = on_experts.known_gate(experts)
        for dtype in (torch.float32, torch.bfloat16):
            check_experts(experts, dtype)
    assert len(gates) > 30
    assert gates["MixtralExperts"] == gates["Qwen3MoeExperts"] == gates["DeepseekV3Experts"] == ("swiglu", "concatenated")
    assert gates["GptOssExperts"] == ("clamped_swiglu", "interleaved")
    assert gates["NemotronHExperts"] is None


def odd_experts() -> dict[str, nn.Module]:
    """Experts that look like ones that `fastattn.moe` computes, and are not."""
    config = AnyConfig()
    mixtral_class = type(experts_of(mixtral(1))[0])
    gpt_oss_class = type(experts_of(gpt_oss(1))[0])

    class OtherGate(mixtral_class):
        def _apply_gate(self, gate_up):
            return super()._apply_gate(gate_up).clamp(-1, 1)

    class Interleaved(mixtral_class):
        def _apply_gate(self, gate_up):
            return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

    class Normed(mixtral_class):
        def __init__(self, config):
            super().__init__(config)
            self.has_post_expert_norm, self.post_expert_norm = True, nn.LayerNorm(self.hidden_dim)

    found = {"gate": OtherGate(config), "layout": Interleaved(config), "act": mixtral_class(config), "flag": mixtral_class(config)}
    found["act"].act_fn = nn.GELU()
    found["flag"].is_concatenated = False
    found |= {"alpha": gpt_oss_class(config), "limit": gpt_oss_class(config)}
    found["alpha"].alpha, found["limit"].limit = 1.5, 2.0
    if hasattr(found["act"], "has_post_expert_norm"):
        found["norm"] = Normed(config)
    return {name: randomised(experts) for name, experts in found.items()}


def test_in_doubt_the_module_computes_its_gate():
    for name, experts in odd_experts().items():
        assert on_experts.known_gate(experts) is None, name
        inputs = inputs_of(experts)
        ours, theirs = (run_experts(experts, i, inputs, torch.float32) for i in ("fastattn", "batched_mm"))
        for key, value in theirs.items():
            assert (ours[key] - value).norm() <= 1e-5 * value.norm(), (name, key)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_expert_parallel_sentinels(name):
    """Two ranks of two experts each; ids of the other rank's are num_experts. Their outputs and gradients sum to the whole's."""
    whole = randomised(experts_of(tiny(name, 1))[0])
    inputs = inputs_of(whole, num_tokens=40)
    expected, parts = run_experts(whole, "fastattn", inputs, torch.float32), []
    for first in (0, 2):
        local = copy.deepcopy(whole)
        local.num_experts, local._is_expert_parallel = 2, True
        for parameter_name, parameter in whole.named_parameters():
            setattr(local, parameter_name, nn.Parameter(parameter[first : first + 2].detach().clone()))
        x, index, weights = inputs
        mine = (index >= first) & (index < first + 2)
        parts.append(run_experts(local, "fastattn", [x, torch.where(mine, index - first, 2), weights], torch.float32))
        assert not parts[-1]["dweights"][~mine].any()
    for key, value in expected.items():
        both = [part[key] for part in parts]
        torch.testing.assert_close(sum(both) if key in ("out", "dx", "dweights") else torch.cat(both), value, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])
def test_no_tokens(name):
    experts = randomised(experts_of(tiny(name, 1))[0])
    inputs = [torch.randn(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2)]
    assert not any(t.any() for t in run_experts(experts, "fastattn", inputs, torch.float32).values())


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])
def test_dtypes_that_differ(name):
    """Hidden states of another dtype than the weights, and autocast: as transformers' own grouped product has it."""
    experts = randomised(experts_of(tiny(name, 1))[0])
    x, index, weights = inputs_of(experts)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        outs = []
        for implementation in ("fastattn", "eager"):
            module = copy.deepcopy(experts).to(dtype if implementation == "fastattn" else torch.float32)
            module.config._experts_implementation = implementation
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and implementation == "fastattn"):
                outs.append(module(x, index, weights))
        assert outs[0].dtype == x.dtype
        assert (outs[0] - outs[1]).norm() < 2e-2 * outs[1].norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_compiles_in_one_graph(name):
    experts = randomised(experts_of(tiny(name, 1))[0])
    experts.config._experts_implementation = "fastattn"
    torch.compiler.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, index, weights = inputs_of(experts)
    grads = []
    for module in (compiled, experts):
        leaf = x.clone().requires_grad_()
        out = module(leaf, index, weights)
        grads.append((out, *torch.autograd.grad(out.square().sum(), [leaf, experts.down_proj])))
    for ours, expected in zip(*grads):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_a_transformers_without_a_registry(monkeypatch):
    monkeypatch.setattr(on_experts, "hub", None)
    on_transformers.register()
    assert on_experts.known_gate(experts_of(tiny("mixtral", 1))[0]) is None
