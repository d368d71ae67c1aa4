"""The same transformer in plain torch: torch's linear layers and norms, a softmax over the whole score matrix, F.cross_entropy of whole logits,
a loop over experts. It has fastattn.models.Transformer's parameters by name, and its `loss`; nothing of fastattn but the config is in it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainTransformer(nn.Module):
    """Of any config; a copy of `parameters`, by name. `loss` takes packed sequences."""

    checkpointing = False

    def __init__(self, config, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.names = config, list(parameters)
        self.values = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in parameters.values())

    def loss(self, tokens, labels, *, cu_seqlens, max_seqlen, reduction):
        of = dict(zip(self.names, self.values))
        sequences = [slice(*ends) for ends in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
        hidden, balance = zip(*(self._hidden(of, tokens[s]) for s in sequences))
        logits = torch.cat(hidden) @ of.get("unembedding.weight", of["embedding.weight"]).T
        cap = self.config.final_softcap
        logits = cap * torch.tanh(logits / cap) if cap else logits
        loss = F.cross_entropy(logits.float(), labels, reduction=reduction)
        if self.config.num_experts and self.training:
            loss = loss + self.config.load_balancing_coef * _balance(balance, self.config) * (labels != -100).sum()
        return loss

    def _hidden(self, of: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        config, routed = self.config, []
        places = torch.arange(len(tokens))
        x = of["embedding.weight"][tokens] * config.embedding_scale
        if config.positions == "learned":
            x = x + of["position_embedding.weight"][: len(tokens)]
        if config.positions == "sinusoidal":
            angles = places[:, None] / 10000 ** (torch.arange(0, config.hidden_size, 2) / config.hidden_size)
            x = x + torch.cat([angles.sin(), angles.cos()], 1)
        for i in range(config.num_layers):
            layer = {name.removeprefix(f"layers.{i}."): value for name, value in of.items() if name.startswith(f"layers.{i}.")}
            for norm, sublayer in (("attention", self._attend), ("mlp", self._feed_forward)):
                h = x if config.norm_position == "post" else self._norm(layer, f"{norm}_norm", x)
                out = sublayer(layer, h, i, routed)
                out = self._norm(layer, f"{norm}_out_norm", out) if config.norm_position == "both" else out
                x = self._norm(layer, f"{norm}_norm", x + out) if config.norm_position == "post" else x + out
        return (x if config.norm_position == "post" else self._norm(of, "norm", x)), routed

    def _norm(self, of, name, x):
        config, weight = self.config, of[f"{name}.weight"]
        if config.norm == "layer":
            return F.layer_norm(x, weight.shape, weight, of.get(f"{name}.bias"), config.norm_eps)
        return F.rms_norm(x, weight.shape, weight + config.norm_offset, config.norm_eps)

    def _attend(self, of, x, i, routed):
        config, S = self.config, len(x)
        q, k, v = (_linear(of, f"attention.{n}_proj", x).view(S, -1, config.head_dim).transpose(0, 1) for n in "qkv")
        places = torch.arange(S)
        if config.positions == "rotary":
            q, k = (_rotate(t, places, config.rope_theta) for t in (q, k))
        k, v = (t.repeat_interleave(config.num_heads // config.num_kv_heads, 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) * (config.softmax_scale or config.head_dim**-0.5)
        distance = places[:, None] - places
        if config.positions == "alibi":
            scores = scores - torch.tensor([2 ** (-8 * (h + 1) / config.num_heads) for h in range(config.num_heads)])[:, None, None] * distance
        if config.softcap:
            scores = config.softcap * torch.tanh(scores / config.softcap)
        hidden = (distance < 0) | (distance >= (config.layer_window(i) or S))
        out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        return _linear(of, "attention.o_proj", out.transpose(0, 1).reshape(S, -1))

    def _feed_forward(self, of, x, i, routed):
        config = self.config
        if not config.num_experts:
            up = _linear(of, "mlp.up_proj", x)
            gate = None if config.activation == "gelu" else _linear(of, "mlp.gate_proj", x)
            return _linear(of, "mlp.down_proj", _activate(config, gate, up))
        probs = _linear(of, "moe.gate", x).softmax(-1)
        weights, experts = probs.topk(config.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        routed.append((probs, experts))
        out = torch.zeros_like(x)
        for e in range(config.num_experts):
            rows, slot = (experts == e).nonzero(as_tuple=True)
            gate, up = (x[rows] @ of["moe.experts.gate_up_proj"][e].T).chunk(2, -1)
            made = _activate(config, gate, up) @ of["moe.experts.down_proj"][e].T
            out = out.index_add(0, rows, made * weights[rows, slot, None])
        return out


def _linear(of, name, x):
    return F.linear(x, of[f"{name}.weight"], of.get(f"{name}.bias"))


def _activate(config, gate, up):
    if config.activation == "gelu":
        return F.gelu(up, approximate="tanh")
    return up * (F.silu(gate) if config.activation == "swiglu" else F.gelu(gate, approximate="tanh"))


def _rotate(x, places, base):
    """Of each head's halves, number j of the first and of the second are turned together, by place / base^(2j/D)."""
    half = x.shape[-1] // 2
    angles = places[:, None] / base ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def _balance(routed, config):
    """Experts times the sum over them of the share of slots they got times their mean probability (Fedus et al.), mean over layers."""
    losses = []
    for layer in range(config.num_layers):
        probs = torch.cat([of_sequence[layer][0] for of_sequence in routed])
        experts = torch.cat([of_sequence[layer][1] for of_sequence in routed])
        share = F.one_hot(experts, config.num_experts).float().mean((0, 1))
        losses.append(config.num_experts * config.top_k * (share * probs.mean(0)).sum())
    return torch.stack(losses).mean()
