"""Models in files: a folder as Hugging Face lays it out, config.json and safetensors, or the GGUF file of a quantised Llama.

What `save` writes for a model that transformers has too, transformers' `from_pretrained` loads as it is. A model of another make (ALiBi,
post-norm, an encoder) is written under its own names, with model_type "fastattn", and only `load` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import gguf_file, tokenizers
from .config import Config
from .encoder import Encoder, EncoderDecoder
from .families import FAMILIES, Link, family_of
from .files import CheckpointError, optional, read_json, write_atomically
from .transformer import Transformer

NAMES = {"smollm2": gguf_file.find_smollm2}  # models that a package on this machine holds
OWN = "fastattn"  # model_type of what transformers has no name for
CLASSES = {cls.__name__: cls for cls in (Transformer, Encoder, EncoderDecoder)}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Source(Protocol):
    """Where tensors come from, by the names that they have there."""

    where: str
    names: set[str]

    def get(self, name: str) -> Tensor:
        """A tensor on the CPU."""

    def file_of(self, name: str) -> str:
        """The file that has it, for messages."""


# --------------------------------------------------------------------------------------------------------------------
# Saving.


def save(
    model: Transformer | Encoder | EncoderDecoder,
    folder: str | Path,
    tokenizer: tokenizers.Tokenizer | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json, model.safetensors and, where given, the tokeniser's files.

    state: full tensors by parameter name, in place of the model's own, where these are sharded over several devices.

    Each file is written beside its place, flushed to the disk, and renamed into it, the weights last: whenever the process is stopped,
    every file is the old one or the new one, whole.

    Raises: ImportError without safetensors; ValueError for a state that lacks a parameter, or a tokeniser of a larger vocabulary.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"save: tokenizer must have no more ids than the model's {model.config.vocab_size}, got {tokenizer.vocab_size}")
    folder, names = Path(folder), [name for name, _ in model.named_parameters()]  # a tied matrix once
    tensors = dict(model.named_parameters()) if state is None else state
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"save: state must hold every parameter, got none named {missing[0]}")
    family = family_of(model.config) if type(model) is Transformer else None
    own = {"architectures": [type(model).__name__], "model_type": OWN, **model.config.to_dict()}
    content = own if family is None else family.write(model.config)
    content["dtype"] = str(tensors[names[0]].dtype).removeprefix("torch.")
    content |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    theirs: dict[str, Tensor] = {}
    if family is None:
        theirs = {name: tensors[name] for name in names}
    else:
        for link in family.expand(model.config, set(names)):
            theirs |= _to_theirs(link, [tensors[name] for name in link.ours])
    theirs = {name: t.detach().to("cpu", copy=False).contiguous() for name, t in theirs.items()}

    safetensors = optional("safetensors.torch")
    if tokenizer is not None:
        tokenizer.save(folder)
    write_atomically(folder / "config.json", (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(folder / _WEIGHTS, lambda path: _save_file(safetensors, theirs, path))


def _save_file(safetensors: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' own, with the errors and the mode of any other file that is written."""
    try:
        safetensors.save_file(tensors, path, metadata={"format": "pt"})
    except optional("safetensors").SafetensorError as error:  # a full disk, say
        raise OSError(None, str(error), str(path)) from error
    os.umask(umask := os.umask(0))
    path.chmod(0o666 & ~umask)


def _to_theirs(link: Link, ours: list[Tensor]) -> dict[str, Tensor]:
    if "{e}" in link.theirs[0]:  # (E, rows, columns): the rows of each expert, divided evenly among their matrices
        parts = [part for expert in ours[0] for part in expert.chunk(len(link.theirs))]
        return dict(zip(_by_expert(link.theirs, len(ours[0])), parts, strict=True))
    whole = torch.cat(ours) if len(ours) > 1 else ours[0]
    return {link.theirs[0]: whole.T if link.transposed else whole}


def _by_expert(names: tuple[str, ...], num_experts: int) -> list[str]:
    return [name.replace("{e}", str(expert)) for expert in range(num_experts) for name in names]


# --------------------------------------------------------------------------------------------------------------------
# Loading.


def load(
    path_or_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, tokenizers.Tokenizer | None]:
    """A model, in evaluation, and its tokeniser if it has one.

    path_or_name: a folder, a .gguf file, or one of `NAMES`. device: the CPU by default. dtype: by default the file's, float32 for GGUF.

    Raises:
        CheckpointError, a ValueError: a file that is missing, cut short or no such file, or a tensor that is missing, of another shape or
        not known, each by name; an architecture that is not known. ImportError: a library that the file needs.
    """
    path = NAMES[path_or_name]() if path_or_name in NAMES else Path(path_or_name)
    if path.suffix == ".gguf":
        source = gguf_file.GGUFFile(path)
        family, config = source.family, source.config
        return _filled(Transformer, config, family.expand, source, (), device, dtype or torch.float32), source.tokenizer()
    if not path.is_dir():
        raise CheckpointError(f"load: path_or_name must be a folder, a .gguf file or one of {', '.join(NAMES)}, got {str(path_or_name)!r}")
    content = read_json(path / "config.json")
    tokenizer = tokenizers.load(path) if tokenizers.has_tokenizer(path) else None
    source = _Safetensors(path)
    model_type = content.get("model_type")
    if model_type == OWN:
        cls, config = _own(content, path / "config.json")
        return _filled(cls, config, _identity, source, (), device, dtype), tokenizer
    if model_type not in FAMILIES:
        known = ", ".join([*FAMILIES, OWN])
        raise CheckpointError(f"load: {path / 'config.json'}: model_type must be one of {known}, got {model_type!r}")
    family = FAMILIES[model_type]
    source.add_prefix(family.prefix)
    config = family.read(content, str(path / "config.json"))
    return _filled(Transformer, config, family.expand, source, family.ignored, device, dtype), tokenizer


def _own(content: Mapping[str, Any], where: Path) -> tuple[type, Config]:
    (name,) = content.get("architectures") or [None]
    if name not in CLASSES:
        raise CheckpointError(f"load: {where}: architectures must be one of {', '.join(CLASSES)}, got {name!r}")
    not_config = {"architectures", "model_type", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
    try:
        return CLASSES[name], Config.from_dict({key: value for key, value in content.items() if key not in not_config})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"load: {where}: {error}") from error


def _identity(config: Config, names: set[str]) -> Iterator[Link]:
    return (Link((name,), (name,)) for name in sorted(names))


def _filled(
    cls: type, config: Config, links: Any, source: Source, ignored: tuple[str, ...], device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Any:  # fmt: skip
    """A model with the source's tensors, which are read one link at a time."""
    model = cls(config, device="meta")
    parameters = dict(model.named_parameters())
    made = list(links(config, set(parameters)))
    theirs = {name for link in made for name in _names_of(link, config)}
    if missing := sorted(theirs - source.names):
        raise CheckpointError(f"load: {source.where} lacks tensor {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    tied = {"lm_head.weight"} if config.tied_embeddings else set()  # some files hold it twice
    if unknown := sorted(name for name in source.names - theirs - tied if not name.endswith(ignored)):
        raise CheckpointError(f"load: {source.file_of(unknown[0])}: tensor {unknown[0]} has no place in this model")
    model = model.to(dtype or source.get(sorted(theirs)[0]).dtype).to_empty(device=device or "cpu")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for link in made:
            _fill(link, [parameters[name] for name in link.ours], config, source)
    return model.eval()


def _names_of(link: Link, config: Config) -> list[str]:
    return _by_expert(link.theirs, config.num_experts) if "{e}" in link.theirs[0] else list(link.theirs)


@torch.no_grad()
def _fill(link: Link, ours: list[Tensor], config: Config, source: Source) -> None:
    """Copy a link's tensors into its parameters."""
    names = _names_of(link, config)
    if "{e}" in link.theirs[0]:
        places = [part for expert in ours[0] for part in expert.chunk(len(link.theirs))]
    else:
        places = ours
    if len(names) == 1:  # theirs is one, of the rows of all of ours
        shape = (sum(len(p) for p in places), *places[0].shape[1:])
        whole = _checked(source, names[0], shape[::-1] if link.transposed else shape)
        whole = whole.T if link.transposed else whole
        parts = whole.split([len(p) for p in places])
    else:
        parts = [_checked(source, name, tuple(place.shape)) for name, place in zip(names, places, strict=True)]
    for place, part in zip(places, parts, strict=True):
        place.copy_(_apart(part, config.head_dim) if link.paired else part)


def _checked(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = source.get(name)
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"load: {source.file_of(name)}: tensor {name} must have shape {tuple(shape)} by the config, got {tuple(tensor.shape)}"
        )
    return tensor


def _apart(rows: Tensor, head_dim: int) -> Tensor:
    """Of each head's rows (0, D/2), (1, D/2 + 1), … in pairs, the rows in order."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


class _Safetensors:
    """The tensors of a folder's model.safetensors, or of the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._open = optional("safetensors").safe_open
        if (folder / _WEIGHTS).exists():
            files = [folder / _WEIGHTS]
        elif (folder / _INDEX).exists():
            weight_map = read_json(folder / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"load: {folder / _INDEX} must have a weight_map")
            files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            raise CheckpointError(f"load: {folder} must hold {_WEIGHTS} or {_INDEX}")
        self._files, self._at = {}, {}
        for file in files:
            self._files[file] = opened = self._opened(file)
            self._at |= {name: (file, name) for name in opened.keys()}
        self.names = set(self._at)

    def _opened(self, file: Path) -> Any:
        try:
            return self._open(str(file), framework="pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"load: {file} is missing") from error
        except Exception as error:  # safetensors' own is only importable with it
            raise CheckpointError(f"load: {file} must be a whole safetensors file: {error}") from error

    def add_prefix(self, prefix: str) -> None:
        """Call tensors as newer files do, where none has the prefix."""
        if not any(name.startswith(prefix) for name in self._at):
            self._at = {name if name.startswith("lm_head") else prefix + name: at for name, at in self._at.items()}
            self.names = set(self._at)

    def get(self, name: str) -> Tensor:
        file, there = self._at[name]
        try:
            return self._files[file].get_tensor(there)
        except Exception as error:
            raise CheckpointError(f"load: {file}: tensor {there} cannot be read: {error}") from error

    def file_of(self, name: str) -> str:
        return str(self._at[name][0])
