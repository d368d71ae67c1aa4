"""The other two arrangements of the same blocks: an encoder, whose tokens see each other both ways, and an encoder with a decoder, which
writes while it attends to what the encoder read. Padding is packed away before the first layer, so that no token of it is ever computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.kv_cache import PagedKVCache

from .config import Config
from .transformer import Block, Transformer


class Encoder(Transformer):
    """A bidirectional encoder with a masked-token head: it says what each token may be, from those on both sides.

    Trained on texts some of whose tokens are replaced by a mask token: labels are the tokens that were there, −100 elsewhere. With a
    window of W a token sees W − 1 tokens on either side. The rest is `Transformer`'s, but that there is no cache.

    Example:
        >>> encoder = Encoder(Config.preset("llama-tiny"))
        >>> tokens, mask = torch.randint(256, (2, 10)), torch.ones(2, 10)
        >>> encoder(tokens, attention_mask=mask).shape  # (2, 10, V)
    """

    causal = False

    def hidden(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Hidden states (…, H) after the last norm.

        Args:
            tokens, cu_seqlens, max_seqlen: as `Transformer.hidden` takes them.
            attention_mask: (B, S), of which true or 1 is a token and false or 0 padding, on either side; its hidden states are 0. Counting
                the tokens waits for the device.

        Raises: ValueError for a mask of another shape, or together with cu_seqlens.
        """
        if attention_mask is None:
            return super().hidden(tokens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        mask, cu_seqlens_packed = _packing(tokens, attention_mask, cu_seqlens, type(self).__name__)
        hidden = super().hidden(tokens[mask], cu_seqlens=cu_seqlens_packed, max_seqlen=tokens.shape[1])
        return hidden.new_zeros(*tokens.shape, hidden.shape[-1]).masked_scatter(mask[..., None], hidden)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of each token: labels, tokens' shape, are what should stand there, −100 where nothing is asked. As
        `Transformer.loss`; with an attention_mask padding counts as −100."""
        if attention_mask is None:
            return super().loss(tokens, labels, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, reduction=reduction)
        mask, cu_seqlens_packed = _packing(tokens, attention_mask, cu_seqlens, type(self).__name__)
        packed = {"cu_seqlens": cu_seqlens_packed, "max_seqlen": tokens.shape[1], "reduction": reduction}
        loss = super().loss(tokens[mask], labels[mask], **packed)
        return loss if reduction != "none" else loss.new_zeros(tokens.shape).masked_scatter(mask, loss)

    def new_cache(self, *args: Any, **kwargs: Any) -> PagedKVCache:
        raise NotImplementedError(f"{type(self).__name__}: there is no cache where tokens see those after them")


class Decoder(Transformer):
    """A causal stack whose blocks also attend to a context; the second half of an `EncoderDecoder`, which calls it."""

    def _make_block(self, layer_idx: int, **made: Any) -> Block:
        return Block(self.config, layer_idx, cross_attention=True, **made)


class EncoderDecoder(nn.Module):
    """A sequence to sequence model: the encoder reads the source, both ways; the decoder writes the target, one token after another, and in
    every block attends to all of the source.

    Args:
        config: of both, which share one embedding. device, dtype: of the parameters; torch's defaults.

    Attributes: encoder, decoder, config.

    Sources and targets are (B, S), padding said by a mask as `Encoder` takes it, or packed (T,) with cu_seqlens; both of one kind.

    Example:
        >>> model = EncoderDecoder(Config.preset("llama-tiny"))
        >>> source, target = torch.randint(256, (2, 10)), torch.randint(256, (2, 7))
        >>> model.loss(source, target[:, :-1], target[:, 1:]).backward()
        >>> answers = model.generate(source, bos_id=0, eos_id=1, max_new_tokens=7)
    """

    def __init__(self, config: Config, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config, device, dtype), Decoder(config, device, dtype)
        self.decoder.embedding = self.encoder.embedding
        self.encoder.unembedding = None  # the decoder alone makes logits

    @property
    def checkpointing(self) -> bool:
        """As `Transformer.checkpointing`, of both."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = value

    def forward(self, source: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Logits of the token after each of target's: (…, V). Options: `hidden`'s."""
        return self.decoder.head(self.hidden(source, target, **options))

    def hidden(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cu_seqlens_source: Tensor | None = None,
        max_seqlen_source: int | None = None,
        cu_seqlens_target: Tensor | None = None,
        max_seqlen_target: int | None = None,
    ) -> Tensor:
        """Hidden states (…, H) after the decoder's last norm, 0 at padding.

        Args:
            source, target: (B, S_s) and (B, S_t), or (T_s,) and (T_t,), each with its cu_seqlens (N + 1,).
            source_mask, target_mask: (B, S), as `Encoder.hidden` takes it. max_seqlen_…: the longest of packed sequences, if known.

        Raises: ValueError for what does not fit together.
        """
        packed_source = _packed(source, source_mask, cu_seqlens_source, max_seqlen_source, "source")
        tokens, cu_seqlens, max_seqlen, mask = _packed(target, target_mask, cu_seqlens_target, max_seqlen_target, "target")
        hidden, _ = self._decode(packed_source, tokens, cu_seqlens, max_seqlen)
        if target.dim() == 1:
            return hidden
        if mask is None:
            return hidden.view(*target.shape, -1)
        return hidden.new_zeros(*target.shape, hidden.shape[-1]).masked_scatter(mask[..., None], hidden)

    def _decode(self, source: tuple[Any, ...], tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> tuple[Tensor, list[Any]]:
        """Packed hidden states, and what the routers of both halves did."""
        source_tokens, cu_seqlens_source, max_seqlen_source, _ = source
        if len(cu_seqlens_source) != len(cu_seqlens):
            counts = len(cu_seqlens_source) - 1, len(cu_seqlens) - 1
            raise ValueError(f"EncoderDecoder: target must hold as many sequences as source, {counts[0]}, got {counts[1]}")
        context, auxes = self.encoder._hidden(source_tokens, cu_seqlens_source, max_seqlen_source, None)
        of_layers = {
            "context": context, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "cu_seqlens_context": cu_seqlens_source,
            "max_seqlen_context": max_seqlen_source,
        }  # fmt: skip
        hidden, more = self.decoder._hidden(tokens, cu_seqlens, max_seqlen, None, [of_layers] * self.config.num_layers)
        return hidden, auxes + more

    def loss(
        self, source: Tensor, target: Tensor, labels: Tensor, *, reduction: str = "mean", **options: Any
    ) -> Tensor:
        """Teacher-forced cross-entropy: at each of target's tokens, of the one that follows it, labels, −100 where there is none to learn.
        Options: `hidden`'s masks and lengths. Auxiliary losses as in `Transformer.loss`, over the layers of both halves."""
        names = ("cu_seqlens", "max_seqlen")
        packed_source = _packed(source, options.pop("source_mask", None), *(options.pop(f"{n}_source", None) for n in names), "source")
        tokens, cu_seqlens, max_seqlen, mask = _packed(
            target, options.pop("target_mask", None), *(options.pop(f"{n}_target", None) for n in names), "target"
        )
        if options:
            raise TypeError(f"EncoderDecoder.loss: there is no option {', '.join(options)}")
        hidden, auxes = self._decode(packed_source, tokens, cu_seqlens, max_seqlen)
        packed_labels = labels.flatten() if mask is None else labels[mask]
        loss = self.decoder._loss(hidden, packed_labels, auxes, reduction)
        if reduction != "none":
            return loss
        return loss.view(target.shape) if mask is None else loss.new_zeros(target.shape).masked_scatter(mask, loss)

    @torch.no_grad()
    def generate(
        self, source: Tensor, *, bos_id: int, eos_id: int, max_new_tokens: int, source_mask: Tensor | None = None
    ) -> list[list[int]]:
        """The likeliest token after each, from bos_id until eos_id or max_new_tokens: a list of ids a sequence, without either.

        source: (B, S_s), source_mask as elsewhere. The decoder's own keys and values are kept in a paged cache, and the source's are made
        once, before the first token: a step computes one token a sequence. The batch runs until its last sequence has ended.

        Raises: ValueError for max_new_tokens below 1 or beyond config.max_seqlen.
        """
        if max_new_tokens < 1:
            raise ValueError(f"EncoderDecoder.generate: max_new_tokens must be at least 1, got {max_new_tokens}")
        if self.config.positions != "alibi" and max_new_tokens > self.config.max_seqlen:
            limit = f"max_seqlen = {self.config.max_seqlen}"
            raise ValueError(f"EncoderDecoder.generate: max_new_tokens must be at most {limit}, got {max_new_tokens}")
        if source.shape[0] == 0:
            return []
        packed, cu_seqlens_source, max_seqlen_source, _ = _packed(source, source_mask, None, None, "source")
        context, _ = self.encoder._hidden(packed, cu_seqlens_source, max_seqlen_source, None)
        batch = source.shape[0]
        of_layers = {
            "cu_seqlens": torch.arange(batch + 1, dtype=torch.int32, device=source.device), "max_seqlen": 1,
            "cu_seqlens_context": cu_seqlens_source, "max_seqlen_context": max_seqlen_source,
        }  # fmt: skip
        contexts = [{"context": layer.cross_attention.project_context(context), **of_layers} for layer in self.decoder.layers]
        cache = self.decoder.new_cache(batch * -(-max_new_tokens // 16))
        ids = [cache.allocate() for _ in range(batch)]
        tokens = source.new_full((batch,), bos_id)
        written: list[Tensor] = []
        ended = torch.zeros(batch, dtype=torch.bool, device=source.device)
        for _ in range(max_new_tokens):
            cache.step(ids, 1)
            hidden, _ = self.decoder._hidden(tokens, None, None, cache, contexts)
            tokens = self.decoder.head(hidden).argmax(-1)
            written.append(tokens)
            ended |= tokens == eos_id
            if ended.all():
                break
        return [row[: row.index(eos_id)] if eos_id in row else row for row in torch.stack(written, 1).tolist()]

    def num_parameters(self) -> int:
        """All of them, the shared embedding once."""
        return sum(p.numel() for p in self.parameters())


def _packing(tokens: Tensor, mask: Tensor, cu_seqlens: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """The mask as bool, and the cu_seqlens of the tokens that it leaves."""
    if cu_seqlens is not None:
        raise ValueError(f"{name}: a mask and cu_seqlens must not be given together, got both")
    if mask.shape != tokens.shape or tokens.dim() != 2:
        raise ValueError(f"{name}: a mask must have the tokens' shape (B, S), got {tuple(mask.shape)} for {tuple(tokens.shape)}")
    mask = mask.bool()
    return mask, F.pad(mask.sum(1).cumsum(0, dtype=torch.int32), (1, 0))


def _packed(
    tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, name: str
) -> tuple[Tensor, Tensor, int | None, Tensor | None]:
    """(T,) tokens of either form, their cu_seqlens and, if known, longest length, and the bool mask where there is one."""
    name = f"EncoderDecoder: {name}"
    if tokens.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"{name} must have shape (T,) with cu_seqlens, (B, S) without, got {tuple(tokens.shape)}")
    if mask is not None:
        mask, cu_seqlens = _packing(tokens, mask, cu_seqlens, name)
        return tokens[mask], cu_seqlens, tokens.shape[1], mask
    if cu_seqlens is not None:
        return tokens, cu_seqlens, max_seqlen, None
    batch, seqlen = tokens.shape
    return tokens.flatten(), seqlen * torch.arange(batch + 1, dtype=torch.int32, device=tokens.device), seqlen, None
