"""The loss of a model with a language modelling head, without the logits in memory where nobody needs them.

transformers' forward computes logits, then from them the loss, and returns both. Here, in a forward that is to skip the logits, the head
is called as ever (so that whatever gathers its weight does), computes `fastattn.linear_cross_entropy` of the hidden states that it is
given, and returns the logits of no token; the class's own forward does everything before and after that.

When logits are skipped. What callers rely on is that `logits` is there; nobody reads them in a training step. So a forward with labels
skips them in training mode and nowhere else, and its output has `logits=None`. `skip_logits=True` or `False` in the call says otherwise. A
tuple (return_dict=False) keeps its logits, since what comes after would take their place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class Head(NamedTuple):
    """Where a model's head is, and how its loss is made.

    path: of the nn.Linear, from the model. shifted: labels are the input's own tokens, each to be predicted from those before it, and
    options of `loss_function` hold; else labels lie under their logits, and plain cross-entropy is in the logits' dtype. bias: of a buffer
    (1, V) that the model adds to the logits. forced: arguments that labels bring with them.
    """

    path: str
    shifted: bool = True
    bias: str | None = None
    forced: dict[str, Any] = {}


CAUSAL = Head("lm_head")
MODELS: dict[str, Head] = {
    **{
        f"transformers.models.{model}.modeling_{model}.{name}": CAUSAL
        for model, name in (
            ("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("mixtral", "MixtralForCausalLM"),
            ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM"),
            ("gemma2", "Gemma2ForCausalLM"), ("gemma3", "Gemma3ForCausalLM"), ("gpt_oss", "GptOssForCausalLM"),
            ("gpt2", "GPT2LMHeadModel"),
        )
    },
    "transformers.models.bert.modeling_bert.BertForMaskedLM": Head("cls.predictions.decoder", shifted=False),
    "transformers.models.t5.modeling_t5.T5ForConditionalGeneration": Head("lm_head", shifted=False),
    "transformers.models.bart.modeling_bart.BartForConditionalGeneration": Head(
        "lm_head", shifted=False, bias="final_logits_bias", forced={"use_cache": False}
    ),
}  # fmt: skip


def _float32_loss(x: Tensor) -> AbstractContextManager:
    """transformers' causal loss is float32 whatever the logits are. So is fastattn's under autocast, which to a half-precision x changes
    nothing else."""
    return nullcontext() if x.dtype == torch.float32 else torch.autocast(x.device.type, x.dtype)


def _reduced(loss_of: Callable[..., Tensor], num_items_in_batch: Tensor | int | None) -> Tensor:
    """The mean, or the sum over as many items as several batches have together (gradient accumulation)."""
    if num_items_in_batch is None:
        return loss_of(reduction="mean")
    loss = loss_of(reduction="sum")
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss by `fastattn.cross_entropy`: float32, of logits as they are, without a float32 copy."""
    target = _shifted(labels, ignore_index) if shift_labels is None else shift_labels
    logits, target = logits.reshape(-1, vocab_size), target.reshape(-1).to(logits.device)

    def loss_of(reduction: str) -> Tensor:
        with _float32_loss(logits):
            return cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    return _reduced(loss_of, num_items_in_batch)


# --------------------------------------------------------------------------------------------------------------------
# The two forwards.


class Request:
    """What one forward of a model asks of its head, and the answer."""

    def __init__(
        self, target: Tensor, shifted: bool, bias: Tensor | None, softcap: float, num_items: Tensor | int | None, ignore_index: int
    ):
        self.target, self.shifted, self.bias, self.softcap = target, shifted, bias, softcap
        self.num_items, self.ignore_index = num_items, ignore_index
        self.loss: Tensor | None = None

    def answer(self, head: nn.Linear, hidden: Tensor) -> None:
        bias = head.bias
        if self.bias is not None:
            added = self.bias[0].to(hidden.dtype)
            bias = added if bias is None else bias + added

        def loss_of(reduction: str) -> Tensor:
            with _float32_loss(hidden) if self.shifted else nullcontext():
                return linear_cross_entropy(
                    hidden, head.weight, self.target.to(hidden.device), linear_bias=bias, ignore_index=self.ignore_index,
                    reduction=reduction, softcap=self.softcap,
                )  # fmt: skip

        self.loss = _reduced(loss_of, self.num_items)


def head_forward(swap: Any, hidden: Tensor) -> Tensor:
    """The linear layer; with a request, its answer and the logits of no token."""
    request = swap.request
    if request is not None:
        request.answer(swap.module, hidden)
        hidden = hidden[..., :0, :]
    return type(swap.module).forward(swap.module, hidden)


def model_forward(swap: Any, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
    """The class's forward, or the same without logits: see the module. Not from two threads at once.

    Raises: ValueError for skip_logits=True where there are no labels, or a tuple is asked for, or part of the logits.
    """
    model, head = swap.module, MODELS[full_name(type(swap.module))]
    kwargs = {**dict(zip(swap.names, args)), **kwargs}
    hindrance = _hindrance(model, head, kwargs)
    if skip_logits and hindrance:
        raise ValueError(f"{type(model).__name__}: skip_logits must be False where {hindrance}, got True")
    if hindrance or not (model.training if skip_logits is None else skip_logits):
        return type(model).forward(model, **kwargs)

    request = _request(model, head, kwargs)
    kwargs = {**kwargs, **head.forced, "labels": None}
    head_swap = model.get_submodule(head.path).forward
    head_swap.request = request
    try:
        output = type(model).forward(model, **kwargs)
    finally:
        head_swap.request = None
    loss = request.loss
    if output.get("aux_loss") is not None:  # of a mixture's router, which the class adds where it sees labels
        loss = loss + model.router_aux_loss_coef * output.aux_loss.to(loss.device)
    return type(output)(loss=loss, **{name: value for name, value in output.items() if name != "logits"})


def _hindrance(model: nn.Module, head: Head, kwargs: dict[str, Any]) -> str | None:
    """Why this forward must not skip its logits, or None."""
    if kwargs.get("labels") is None:
        return "there are no labels"
    if not (model.config.return_dict if kwargs.get("return_dict") is None else kwargs["return_dict"]):
        return "return_dict is False"
    logits_to_keep = kwargs.get("logits_to_keep", 0)
    if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
        return "logits_to_keep is given"
    if head.shifted and model.loss_function is not causal_lm_loss:
        return "the model has been given another loss_function"
    if not hasattr(model.get_submodule(head.path).forward, "request"):
        return "the forward of its head has been wrapped"
    return None


def _request(model: nn.Module, head: Head, kwargs: dict[str, Any]) -> Request:
    """What the head is to compute. A decoder that was given labels alone is given its input, which the class would make of them."""
    labels = kwargs["labels"]
    if model.config.is_encoder_decoder and kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
        kwargs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    bias = getattr(model, head.bias) if head.bias else None
    if not head.shifted:
        return Request(labels, False, bias, 0.0, None, -100)
    ignore_index, target = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
    target = _shifted(labels, ignore_index) if target is None else target
    softcap = getattr(model.config, "final_logit_softcapping", None) or 0.0
    return Request(target, True, bias, softcap, kwargs.get("num_items_in_batch"), ignore_index)


def full_name(module_class: type) -> str:
    return f"{module_class.__module__}.{module_class.__qualname__}"


def unfit_model(model: nn.Module, head: Head) -> str | None:
    """Why the loss of this model, whose class is in the table, must stay as it is; or None."""
    try:
        linear = model.get_submodule(head.path)
    except AttributeError:
        return f"it has no {head.path}"
    if type(linear) is not nn.Linear:
        return f"its {head.path} is not an nn.Linear"
    if "forward" in vars(linear):
        return f"the forward of its {head.path} has been replaced already"
    if head.shifted and model.loss_function is not ForCausalLMLoss:
        return "its loss_function is not transformers' ForCausalLMLoss"
    return None
