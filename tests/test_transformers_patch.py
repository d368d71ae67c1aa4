"""`patch` and `unpatch`: every row of the table against the class's own forward, what is left and why, copies, and the loss without logits."""

import copy
import inspect
import pickle
import types

import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers")

import torch  # noqa: E402  (the skip comes first)
import transformers_matrix as matrix  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from fastattn.integrations import transformers as on_transformers  # noqa: E402
from fastattn.integrations.transformers import replacements  # noqa: E402
from fastattn.integrations.transformers.loss import full_name  # noqa: E402
from fastattn.testing.budget import check_budget  # noqa: E402

patch, unpatch = on_transformers.patch, on_transformers.unpatch


def fresh(family: str) -> nn.Module:
    return copy.deepcopy(matrix.built(family))


def first(model: nn.Module, name: str) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__ == name)


def logits(model: nn.Module, family: str) -> torch.Tensor:
    return matrix.logits(model, family)["logits"]


# --------------------------------------------------------------------------------------------------------------------
# The table.

SWAPPED = {  # what a report must say, without the functions' names
    "llama": {"LlamaRMSNorm": 5, "LlamaAttention": 2, "LlamaMLP": 2, "LlamaForCausalLM": 1},
    "mistral": {"MistralRMSNorm": 5, "MistralAttention": 2, "MistralMLP": 2, "MistralForCausalLM": 1},
    "qwen2": {"Qwen2RMSNorm": 5, "Qwen2Attention": 2, "Qwen2MLP": 2, "Qwen2ForCausalLM": 1},
    "qwen3": {"Qwen3RMSNorm": 9, "Qwen3Attention": 2, "Qwen3MLP": 2, "Qwen3ForCausalLM": 1},
    "qwen3_moe": {"Qwen3MoeRMSNorm": 9, "Qwen3MoeAttention": 2, "Qwen3MoeExperts": 2, "Qwen3MoeForCausalLM": 1},
    "gemma2": {"Gemma2RMSNorm": 9, "Gemma2Attention": 2, "Gemma2MLP": 2, "Gemma2ForCausalLM": 1},
    "gemma3": {"Gemma3RMSNorm": 13, "Gemma3Attention": 2, "Gemma3MLP": 2, "Gemma3ForCausalLM": 1},
    "mixtral": {"MixtralRMSNorm": 5, "MixtralAttention": 2, "MixtralExperts": 2, "MixtralForCausalLM": 1},
    "gpt_oss": {"GptOssRMSNorm": 5, "GptOssAttention": 2, "GptOssExperts": 2, "GptOssForCausalLM": 1},
    "gpt2": {"LayerNorm": 5, "GPT2LMHeadModel": 1},
    "bert": {"LayerNorm": 6, "BertForMaskedLM": 1},
    "bart": {"LayerNorm": 12, "BartForConditionalGeneration": 1},
    "t5": {"T5LayerNorm": 12, "T5DenseGatedActDense": 4, "T5ForConditionalGeneration": 1},
    "vit": {"LayerNorm": 5},
}
LEFT = {
    "gpt_oss": {"GptOssMLP": 2},
    "gpt2": {"GPT2MLP": 2},
    "bert": {"BertIntermediate": 2},
    "vit": {"ViTMLP": 2, "ViTForImageClassification": 1},
}


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_the_report_counts_what_was_swapped(family):
    model = fresh(family)
    report = patch(model)
    assert {line.module: line.count for line in report.swapped} == SWAPPED[family]
    assert {line.module: line.count for line in report.left} == LEFT.get(family, {})
    assert all(line.by and not line.reason for line in report.swapped)
    assert all(line.reason and not line.by for line in report.left)
    assert patch(model) == report  # again, which changes nothing
    assert sum("forward" in vars(module) for module in model.modules()) == sum(SWAPPED[family].values()) + ("loss" in str(report.swapped))


def test_a_report_is_a_table():
    text = str(patch(fresh("gpt_oss")))
    lines = text.splitlines()
    assert lines[0] == "GptOssForCausalLM: 10 forwards on fastattn, 2 left"
    assert len(lines) == 6
    assert "rms_norm" in text and "apply_rotary" in text and "left: a router around experts" in text


def test_every_row_is_used_by_a_family():
    used = {full_name(type(module)) for family in matrix.FAMILIES for module in matrix.built(family).modules()}
    unused = {name.rpartition(".")[2] for name in replacements.TABLE.keys() - used}
    assert unused == {"Qwen3MoeMLP", "T5DenseActDense"}  # a dense layer among mixtures, and T5's first version: tried by themselves


def modules_to_try() -> dict[str, nn.Module]:
    """One module of each class that the table swaps for a function of tensors alone."""
    found = {}
    for family in matrix.FAMILIES:
        for module in matrix.built(family).modules():
            row = replacements.TABLE.get(full_name(type(module)))
            if row and row.part in ("norm", "mlp") and row.forward:
                found.setdefault(type(module).__name__, module)
    config = matrix.built("qwen3_moe").config
    found["Qwen3MoeMLP"] = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeMLP(config)
    for act in ("gelu", "gelu_python", "gelu_new", "gelu_fast", "silu"):
        found[f"LlamaMLP {act}"] = copy.deepcopy(found["LlamaMLP"])
        found[f"LlamaMLP {act}"].act_fn = transformers.activations.ACT2FN[act]
    return found


def compute(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = module(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype))
    return {"out": out.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_each_row_computes_what_the_class_does(dtype):
    for name, module in modules_to_try().items():
        module = copy.deepcopy(module).to(dtype)
        width = next(module.parameters()).shape[-1]
        x = 3 * torch.randn(7, width).to(dtype)
        naive, truth = compute(module, x), compute(copy.deepcopy(module).double(), x.double())
        report = patch(module)
        assert report.swapped and not report.left, name
        for key, value in compute(module, x).items():
            assert value.dtype == naive[key].dtype, (name, key)
            check_budget(f"{name} {key}", value, naive[key], truth[key].double())


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_t5_norm_meets_other_dtypes(x_dtype, weight_dtype):
    """T5's last linear layers stay in float32, and what they add to the stream makes it float32."""
    norm = copy.deepcopy(first(matrix.built("t5"), "T5LayerNorm")).to(weight_dtype)
    x = torch.randn(5, 32).to(x_dtype)
    naive, truth = compute(norm, x), compute(copy.deepcopy(norm).double(), x.double())
    patch(norm)
    ours = compute(norm, x)
    assert ours["out"].dtype == naive["out"].dtype
    check_budget("t5 norm", ours["out"], naive["out"], truth["out"])


def test_t5_in_half_precision_keeps_its_float32_layers():
    mlp = copy.deepcopy(first(matrix.built("t5"), "T5DenseGatedActDense")).to(torch.bfloat16)
    mlp.wo.float()
    x = torch.randn(5, 32).bfloat16()
    naive, truth = mlp(x), copy.deepcopy(mlp).double()(x.double())
    patch(mlp)
    assert mlp(x).dtype == naive.dtype == torch.float32
    check_budget("t5 mlp", mlp(x), naive, truth)


@pytest.mark.parametrize("heads_first", [True, False])
def test_rotary_takes_either_layout(heads_first):
    module = transformers.models.llama.modeling_llama
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    angles = torch.randn(2, 6, 4)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    if not heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    dim = 1 if heads_first else 2
    for ours, theirs in zip(
        replacements.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=dim), module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=dim)
    ):
        torch.testing.assert_close(ours, theirs)


# --------------------------------------------------------------------------------------------------------------------
# What is left.


class MyNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1


class OtherNorm(nn.Module):
    def forward(self, x):
        return x


def reasons(module: nn.Module) -> dict[str, str]:
    return {line.module: line.reason for line in patch(module).left}


def test_a_subclass_is_left():
    model = fresh("llama")
    model.model.norm.__class__ = MyNorm
    expected = logits(model, "llama")
    report = patch(model)
    assert {line.module: line.count for line in report.swapped}["LlamaRMSNorm"] == 4
    assert [line.reason for line in report.left] == ["a subclass of LlamaRMSNorm may compute something else"]
    torch.testing.assert_close(logits(model, "llama"), expected, atol=1e-4, rtol=0)


def test_what_is_not_as_the_row_expects_is_left(monkeypatch):
    model = fresh("llama")
    norm, mlp, attention = (first(model, f"Llama{part}") for part in ("RMSNorm", "MLP", "Attention"))

    wrapped = copy.deepcopy(norm)
    wrapped.forward = types.MethodType(lambda self, x: x, wrapped)
    assert reasons(wrapped) == {"LlamaRMSNorm": "its forward has been replaced already"}

    matrix_weight = copy.deepcopy(norm)
    matrix_weight.weight = nn.Parameter(torch.ones(2, 32))
    assert reasons(matrix_weight) == {"LlamaRMSNorm": "its weight is not a vector"}

    renamed = copy.deepcopy(norm)
    del renamed.variance_epsilon
    assert reasons(renamed) == {"LlamaRMSNorm": "it has no number variance_epsilon"}

    relu = copy.deepcopy(mlp)
    relu.act_fn = nn.ReLU()
    assert reasons(relu) == {"LlamaMLP": "its activation is ReLU"}

    fused = copy.deepcopy(mlp)
    del fused.up_proj
    assert reasons(fused) == {"LlamaMLP": "it has no up_proj"}

    t5 = transformers.models.t5.modeling_t5.T5DenseActDense(matrix.built("t5").config)
    assert reasons(t5) == {"T5DenseActDense": "it has no gate"}
    assert reasons(OtherNorm()) == {"OtherNorm": "no row of the table is for its class"}
    assert reasons(copy.deepcopy(norm).double()) == {"LlamaRMSNorm": "it is in float64"}
    assert set(reasons(copy.deepcopy(matrix.built("llama", torch.float64))).values()) == {"it is in float64"}

    with monkeypatch.context() as patches:
        patches.setattr(type(norm), "forward", OtherNorm.forward)
        assert "its class's forward has been replaced by" in reasons(copy.deepcopy(norm))["LlamaRMSNorm"]
    with monkeypatch.context() as patches:
        patches.setattr(transformers.models.llama.modeling_llama, "apply_rotary_pos_emb", OtherNorm.forward)
        assert reasons(copy.deepcopy(attention)) == {"LlamaAttention": "its apply_rotary_pos_emb is not transformers' own"}


def test_a_loss_that_is_not_the_classes_is_left():
    model = fresh("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    assert reasons(model) == {"LlamaForCausalLM": "its loss_function is not transformers' ForCausalLMLoss"}
    model = fresh("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    assert reasons(model) == {"LlamaForCausalLM": "its lm_head is not an nn.Linear"}
    model = fresh("llama")
    model.lm_head.forward = types.MethodType(nn.Linear.forward, model.lm_head)
    assert reasons(model) == {"LlamaForCausalLM": "the forward of its lm_head has been replaced already"}


# --------------------------------------------------------------------------------------------------------------------
# Undoing, and copies.


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "t5", "bert"])
def test_unpatch_restores_everything(family):
    model = fresh(family)
    before, results = [dict(vars(module)) for module in model.modules()], logits(model, family)
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    patch(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    if family != "bert":  # on the CPU, layer_norm is torch's
        assert not torch.equal(logits(model, family), results)
    unpatch(model)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert torch.equal(logits(model, family), results)
    unpatch(model)  # nothing is left to undo


def test_unpatch_refuses_where_a_forward_was_wrapped_since():
    model = fresh("llama")
    patch(model)
    mine = model.model.norm.forward
    model.model.norm.forward = lambda x: mine(x)
    with pytest.raises(ValueError, match="unpatch: the forward of model.norm must be the one that patch put there, got"):
        unpatch(model)
    assert isinstance(model.forward, on_transformers.patching.Swap)
    model.model.norm.forward = mine
    unpatch(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "t5"])
def test_copies_are_patched_and_stand_alone(family, copied):
    model = fresh(family)
    patch(model)
    results = logits(model, family)
    twin = copied(model)
    assert torch.equal(logits(twin, family), results)
    assert patch(twin) == patch(model)
    swaps = [module.forward for module in twin.modules() if "forward" in vars(module)]
    assert swaps and {id(swap.module) for swap in swaps} <= {id(module) for module in twin.modules()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, family), results)
    unpatch(twin)
    assert "forward" not in vars(twin) and "forward" in vars(model)


def test_hooks_hidden_states_and_signature():
    model, seen = fresh("llama"), []
    expected = model(**matrix.inputs("llama"), output_hidden_states=True).hidden_states
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    patch(model)
    assert inspect.signature(model.forward) == inspect.signature(types.MethodType(type(model).forward, model))
    hidden = model(**matrix.inputs("llama"), output_hidden_states=True).hidden_states
    assert seen == [hidden[-1].shape]
    for ours, theirs in zip(hidden, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_weights_may_change_after_patching():
    """Nothing of a module is kept: loaded, cast and replaced weights count."""
    model, other = fresh("gemma2"), fresh("gemma2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    patch(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, "gemma2"), logits(other, "gemma2"), atol=1e-4, rtol=1e-4)
    assert logits(model.bfloat16(), "gemma2").dtype == torch.bfloat16


def test_gradient_checkpointing():
    model = fresh("qwen3")
    expected = matrix.gradients(model, "qwen3")
    patch(model)
    model.gradient_checkpointing_enable()
    for name, grad in matrix.gradients(model, "qwen3").items():
        torch.testing.assert_close(grad, expected[name], atol=1e-4, rtol=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# The loss.

TRAINED = ["llama", "gemma2", "qwen3_moe", "gpt2", "bert", "bart", "t5"]


def batch(family: str) -> dict[str, torch.Tensor]:
    return {**matrix.inputs(family, "right"), "labels": matrix.labels(family)}


@pytest.mark.parametrize("family", TRAINED)
def test_when_logits_are_skipped(family):
    model = fresh(family)
    expected = model(**batch(family))
    patch(model)
    for training, skip, skipped in (
        (True, None, True), (True, False, False), (True, True, True), (False, None, False), (False, True, True),
    ):  # fmt: skip
        out = model.train(training)(**batch(family), **({} if skip is None else {"skip_logits": skip}))
        assert (out.logits is None) == ("logits" not in out) == skipped
        torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-5)
        assert out.loss is out[0] is out.to_tuple()[0]
        if family in ("bart", "t5"):  # the decoder's input is then made of the labels
            alone = {name: value for name, value in batch(family).items() if not name.startswith("decoder")}
            model.train(not skipped)  # the other way
            torch.testing.assert_close(model(**alone).loss, model.train(training)(**alone).loss)
        if not skipped:
            torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-4)
    as_tuple = model.train()(**batch(family), return_dict=False)
    torch.testing.assert_close(as_tuple[1], expected.logits, atol=1e-4, rtol=1e-4)
    without = {name: value for name, value in batch(family).items() if name != "labels"}
    if family not in ("bart", "t5"):
        assert model(**without).logits is not None


def test_arguments_by_position():
    model = fresh("gpt2")
    patch(model)
    given = batch("gpt2")
    out = model(given["input_ids"], None, given["attention_mask"], labels=given["labels"], skip_logits=True)
    torch.testing.assert_close(out.loss, model(**given).loss)


def test_skipping_logits_where_it_cannot_be_done():
    model = fresh("llama")
    patch(model)
    given = batch("llama")
    for options, why in (
        ({"labels": None}, "there are no labels"),
        ({"return_dict": False}, "return_dict is False"),
        ({"logits_to_keep": 3}, "logits_to_keep is given"),
    ):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM: skip_logits must be False where {why}, got True"):
            model(**{**given, **options}, skip_logits=True)
    out = model.train()(given["input_ids"], shift_labels=given["labels"])  # transformers looks for labels, and at nothing else
    assert out.loss is None and out.logits is not None
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: inner(hidden)
    assert model(**given).logits is not None
    with pytest.raises(ValueError, match="the forward of its head has been wrapped"):
        model(**given, skip_logits=True)
    model.lm_head.forward = inner
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    assert model(**given).logits is not None
    with pytest.raises(ValueError, match="the model has been given another loss_function"):
        model(**given, skip_logits=True)


@pytest.mark.parametrize("skip", [True, False], ids=["skipped", "kept"])
def test_options_of_the_loss(skip):
    model, given = fresh("llama"), batch("llama")
    shifted = given["labels"].roll(-1, 1)
    options = [
        {"num_items_in_batch": 13},
        {"num_items_in_batch": torch.tensor(13)},
        {"shift_labels": shifted},
        {"labels": given["labels"].masked_fill(given["labels"] == -100, 5), "ignore_index": 5},
    ]
    expected = [model(**{**given, **option}).loss for option in options]
    patch(model)
    for option, loss in zip(options, expected):
        torch.testing.assert_close(model(**{**given, **option}, skip_logits=skip).loss, loss)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_the_router_loss_is_added(family):
    model, given = fresh(family), {**batch(family), "output_router_logits": True}
    expected = model(**given)
    patch(model)
    out = model.train()(**given)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)


def test_a_causal_loss_in_half_precision_is_float32():
    model = fresh("llama").bfloat16()
    expected = model(**batch("llama")).loss
    assert expected.dtype == torch.float32
    truth = copy.deepcopy(model).double()(**batch("llama")).loss
    patch(model)
    for skip in (True, False):
        loss = model(**batch("llama"), skip_logits=skip).loss
        assert loss.dtype == torch.float32
        check_budget("bf16 loss", loss, expected, truth.double())


class Largest(TorchDispatchMode):
    """The largest tensor that any operator gives, by elements over the vocabulary."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocab_size:
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return out


@pytest.mark.parametrize("family", TRAINED)
def test_skipped_logits_are_nowhere(family):
    """Forward and backward: no operator gives a tensor of logits of any token."""
    model = fresh(family)
    patch(model)
    given = batch(family)
    for skip, rows in ((False, 34), (True, 32)):  # 34 tokens at least; 32: the head's weight as a linear layer sees it
        with Largest(64) as largest:
            model(**given, skip_logits=skip).loss.backward()
        assert largest.rows >= rows if not skip else largest.rows <= rows, (skip, largest.rows)


def test_training_compiles_in_one_graph():
    model = fresh("llama").train()
    patch(model)
    model.set_attn_implementation("eager")
    given = batch("llama")
    expected = model(**given).loss
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**given)
    out.loss.backward()
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())
