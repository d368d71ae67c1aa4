"""The architectures whose files are read and written: what each calls a config's fields and a model's tensors. Tables, and little else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .config import Config
from .files import CheckpointError


@dataclass(frozen=True)
class Link:
    """Tensors here and the same numbers in a file: cat(ours) = cat(theirs), over rows. {i} is a layer; {e} an expert, stacked here.

    transposed: a file has matrices as (columns, rows), as GPT-2's. paired: the rows of each head that rotary embedding turns together lie
    side by side in a file, as in llama.cpp's; here half a head apart.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False
    paired: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture.

    model_type, architecture: what config.json calls it, and transformers its class.
    fields: their name of each config field that they have too. fixed: the others that are not as a `Config`'s defaults.
    constants: keys of theirs that must have one of these values, where a config has them; the first is written.
    defaults: values of their keys that a config may leave out.
    more: (theirs → further fields, config → further keys of theirs), what is no renaming.
    links: how tensors are called; those apply whose `ours` a model has. ignored: ends of names in a file that nothing here needs.
    prefix: of their names, which old files lack.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    links: tuple[Link, ...]
    constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: tuple[Callable[[Mapping[str, Any]], dict], Callable[[Config], dict]] = (lambda theirs: {}, lambda config: {})
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = "model."

    def read(self, theirs: Mapping[str, Any], where: str) -> Config:
        """The config of a config.json's content. Raises: CheckpointError by the key's name; where: the file."""
        for key, allowed in self.constants.items():
            if key in theirs and theirs[key] not in allowed:
                raise CheckpointError(f"load: {where}: {key} must be one of {', '.join(map(repr, allowed))}, got {theirs[key]!r}")
        theirs = {**self.defaults, **theirs}
        if missing := sorted(key for key in self.fields.values() if key not in theirs):
            raise CheckpointError(f"load: {where} lacks {', '.join(missing)}")
        try:
            return Config(**{ours: theirs[key] for ours, key in self.fields.items()} | dict(self.fixed) | self.more[0](theirs))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"load: {where}: {type(error).__name__}: {error}") from error

    def write(self, config: Config) -> dict[str, Any]:
        """A config.json's content."""
        theirs = {key: getattr(config, ours) for ours, key in self.fields.items()}
        theirs |= {key: allowed[0] for key, allowed in self.constants.items()} | self.more[1](config)
        return {"architectures": [self.architecture], "model_type": self.model_type, **theirs}

    def covers(self, config: Config) -> bool:
        """Whether a config.json of this family says all that the config does."""
        try:
            return _resolved(self.read(self.write(config), self.model_type)) == _resolved(config)
        except (CheckpointError, ArithmeticError):
            return False

    def expand(self, config: Config, names: set[str]) -> Iterator[Link]:
        """The links of a model that has tensors of these names, layer by layer."""
        for link in self.links:
            layers = range(config.num_layers) if "{i}" in link.ours[0] else range(1)
            for i in layers:
                ours, theirs = (tuple(name.replace("{i}", str(i)) for name in side) for side in (link.ours, link.theirs))
                if ours[0] in names:
                    yield dataclasses.replace(link, ours=ours, theirs=theirs)


def _resolved(config: Config) -> Config:
    """Two configs of the same model are equal in this form."""
    windows = tuple(config.layer_window(i) for i in range(config.num_layers))
    unused = {} if config.num_experts else {"top_k": 1, "load_balancing_coef": 0.0, "z_loss_coef": 0.0}
    return dataclasses.replace(config, window=windows, **unused)


# --------------------------------------------------------------------------------------------------------------------
# What is no renaming, by topic: fields of theirs, and theirs of a config.


def _rope_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling; transformers 5 keeps both in rope_parameters."""
    rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return {"rope_theta": float(theta), "rope_scaling": None if rope == {"rope_type": "default"} else rope}


def _to_rope(config: Config) -> dict[str, Any]:
    scaling = config.rope_scaling or {"rope_type": "default"}
    theirs = {"rope_parameters": {**scaling, "rope_theta": config.rope_theta}, "rope_theta": config.rope_theta}
    return theirs | ({"rope_scaling": dict(scaling)} if config.rope_scaling else {})  # the last two for transformers 4


def _llama_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    bias, mlp_bias = (theirs.get(key, False) for key in ("attention_bias", "mlp_bias"))
    if bias != mlp_bias:
        raise ValueError(f"attention_bias and mlp_bias must be equal, got {bias} and {mlp_bias}")
    return _rope_of(theirs) | {"bias": bias}


def _to_llama(config: Config) -> dict[str, Any]:
    return _to_rope(config) | {"attention_bias": config.bias, "mlp_bias": config.bias}


def _sliding_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return _rope_of(theirs) | {"window": theirs.get("sliding_window")}


def _to_sliding(config: Config) -> dict[str, Any]:
    return _to_rope(config) | {"sliding_window": config.layer_window(0)}


def _mixtral_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return _sliding_of(theirs) | {"z_loss_coef": theirs.get("router_z_loss_coef", 0.0)}


def _to_mixtral(config: Config) -> dict[str, Any]:
    return _to_sliding(config) | ({"router_z_loss_coef": config.z_loss_coef} if config.z_loss_coef else {})


def _gemma_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    windows = {"sliding_attention": theirs["sliding_window"], "full_attention": None}
    types = theirs.get("layer_types") or list(windows) * theirs["num_hidden_layers"]  # they alternate
    scalar = theirs["query_pre_attn_scalar"]
    return _rope_of(theirs) | {
        "window": _shortest([windows[layer] for layer in types[: theirs["num_hidden_layers"]]]),
        "softmax_scale": None if scalar == theirs["head_dim"] else scalar**-0.5,
        "softcap": theirs["attn_logit_softcapping"] or 0.0,
        "final_softcap": theirs["final_logit_softcapping"] or 0.0,
    }


def _shortest(windows: list[int | None]) -> int | tuple[int | None, ...] | None:
    """What repeats in these, or what they all are."""
    period = next(p for p in range(1, len(windows) + 1) if all(w == windows[i % p] for i, w in enumerate(windows)))
    return windows[0] if period == 1 else tuple(windows[:period])


def _to_gemma(config: Config) -> dict[str, Any]:
    windows = [config.layer_window(i) for i in range(config.num_layers)]
    return _to_rope(config) | {
        "sliding_window": next((w for w in windows if w is not None), 4096),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        "query_pre_attn_scalar": config.head_dim if config.softmax_scale is None else round(config.softmax_scale**-2),
        "attn_logit_softcapping": config.softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
    }


# --------------------------------------------------------------------------------------------------------------------
# Names.


def _modules(names: Mapping[str | tuple[str, ...], str], **options: Any) -> tuple[Link, ...]:
    """Links of both parameters of each module here to those of a module of theirs. Vectors are not transposed."""
    links = []
    for ours, theirs in names.items():
        ours = (ours,) if isinstance(ours, str) else ours
        links.append(Link(tuple(f"{name}.weight" for name in ours), (f"{theirs}.weight",), **options))
        links.append(Link(tuple(f"{name}.bias" for name in ours), (f"{theirs}.bias",)))
    return tuple(links)


_EMBEDDINGS = {"embedding": "model.embed_tokens", "norm": "model.norm", "unembedding": "lm_head"}
_ATTENTION = {
    f"layers.{{i}}.attention.{name}": f"model.layers.{{i}}.self_attn.{name}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
}
_PRE_NORMS = {
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
}
_FOUR_NORMS = {
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention_out_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "layers.{i}.mlp_out_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_MLP = {f"layers.{{i}}.mlp.{name}": f"model.layers.{{i}}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
_EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"
_EXPERTS = (
    Link(("layers.{i}.moe.gate.weight",), ("model.layers.{i}.block_sparse_moe.gate.weight",)),
    Link(("layers.{i}.moe.experts.gate_up_proj",), (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight")),
    Link(("layers.{i}.moe.experts.down_proj",), (f"{_EXPERT}.w2.weight",)),
)

_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "intermediate_size": "intermediate_size",
    "max_seqlen": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings",
    "dropout": "attention_dropout", "init_std": "initializer_range",
}  # fmt: skip
_DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "initializer_range": 0.02,
}  # fmt: skip
_SILU = {"hidden_act": ("silu",)}
_LLAMA_LINKS = _modules(_EMBEDDINGS | _ATTENTION | _PRE_NORMS | _MLP)

LLAMA = Family(
    "llama", "LlamaForCausalLM", _FIELDS, {}, _LLAMA_LINKS, {**_SILU, "pretraining_tp": (1,)}, _DEFAULTS, (_llama_of, _to_llama),
)  # fmt: skip
MISTRAL = Family(
    "mistral", "MistralForCausalLM", _FIELDS, {}, _LLAMA_LINKS, _SILU, _DEFAULTS | {"sliding_window": 4096}, (_sliding_of, _to_sliding),
)  # fmt: skip
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", _FIELDS, {"qk_norm": True}, _LLAMA_LINKS,
    {**_SILU, "attention_bias": (False,), "use_sliding_window": (False,)}, _DEFAULTS | {"head_dim": 128}, (_rope_of, _to_rope),
)  # fmt: skip
MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM",
    _FIELDS | {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok", "load_balancing_coef": "router_aux_loss_coef"}, {},
    _modules(_EMBEDDINGS | _ATTENTION | _PRE_NORMS) + _EXPERTS, {**_SILU, "router_jitter_noise": (0.0,)},
    _DEFAULTS | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
    (_mixtral_of, _to_mixtral),
)  # fmt: skip
GEMMA2 = Family(
    "gemma2", "Gemma2ForCausalLM", _FIELDS, {"norm_offset": 1.0, "norm_position": "both", "activation": "geglu", "embedding_scale": None},
    _modules(_EMBEDDINGS | _ATTENTION | _FOUR_NORMS | _MLP),
    {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "use_bidirectional_attention": (None, False)},
    _DEFAULTS | {
        "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    (_gemma_of, _to_gemma),
)  # fmt: skip
GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    {
        "vocab_size": "vocab_size", "hidden_size": "n_embd", "num_layers": "n_layer", "num_heads": "n_head", "intermediate_size": "n_inner",
        "max_seqlen": "n_positions", "norm_eps": "layer_norm_epsilon", "tied_embeddings": "tie_word_embeddings", "dropout": "resid_pdrop",
        "init_std": "initializer_range",
    },
    {"positions": "learned", "norm": "layer", "activation": "gelu", "bias": True},
    _modules({
        "embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm": "transformer.ln_f", "unembedding": "lm_head",
        "layers.{i}.attention_norm": "transformer.h.{i}.ln_1", "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
    }) + _modules({
        tuple(f"layers.{{i}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")): "transformer.h.{i}.attn.c_attn",
        "layers.{i}.attention.o_proj": "transformer.h.{i}.attn.c_proj",
        "layers.{i}.mlp.up_proj": "transformer.h.{i}.mlp.c_fc", "layers.{i}.mlp.down_proj": "transformer.h.{i}.mlp.c_proj",
    }, transposed=True),
    {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,), "add_cross_attention": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "resid_pdrop": 0.1, "initializer_range": 0.02},
    (lambda theirs: {}, lambda config: {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout}),
    ("attn.bias", "attn.masked_bias"), "transformer.",
)  # fmt: skip

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN3, MIXTRAL, GEMMA2)}


def family_of(config: Config) -> Family | None:
    """The first family whose files say all that the config does; None if there is none."""
    return next((family for family in FAMILIES.values() if family.covers(config)), None)
