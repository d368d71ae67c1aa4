"""A request's text as its tokens come, and where it ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastattn.scheduler import Request

from .tokenizers import StreamDecoder


class StopStrings:
    """Text up to the first of some strings, as it comes: what `push` and `finish` return, joined, is all that stands before it.

    Text that may be the beginning of a stop string is held back until it is known not to be, so nothing of one is ever returned.

    Args: stops, not empty each.

    Attributes: found: one has been seen; nothing is returned from there on.

    Example:
        >>> stop = StopStrings(["END"])
        >>> stop.push("to E"), stop.push("at, EN"), stop.push("D it"), stop.found
        ('to ', 'Eat, ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """More text. Returns what of all that was held back is certain to come before a stop."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The end of the text, at which what was held back is no stop."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The most characters that end the text and begin the stop, fewer than all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(eq=False, kw_only=True)
class TextRequest(Request):
    """A request of `fastattn.models.generation`.

    max_new_tokens: the answer's. random: its own numbers, so that what is drawn does not depend on the other requests. decoder, None
    without a tokeniser, and stop: the answer's text. draft_probs: (k, V) the distributions that `draft` was drawn from.
    reason: why the answer ended, None while it goes on.
    """

    max_new_tokens: int
    random: random.Random
    stop: StopStrings
    decoder: StreamDecoder | None = None
    draft_probs: Tensor | None = None
    reason: str | None = None

    def extend(self, token: int, stop_tokens: frozenset[int], min_new_tokens: int) -> str:
        """Add a token to the answer, and say in `reason` if it ends there. Returns the text that is certain now."""
        self.tokens.append(token)
        count = len(self.tokens) - self.prompt_length
        text = ""
        if self.decoder is not None and token not in stop_tokens:
            text = self.decoder.push(token)
            text = self.stop.push(text) if count > min_new_tokens else text
        if token in stop_tokens:
            self.reason = "stop token"
        elif self.stop.found:
            self.reason = "stop string"
        elif count >= self.max_new_tokens:
            self.reason = "length"
        if self.reason is not None and self.decoder is not None:
            text += self.stop.push(self.decoder.finish())
            text += self.stop.finish()
        return text
