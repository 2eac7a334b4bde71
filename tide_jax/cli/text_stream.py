"""The text of tokens as they come: all that is written is what decoding all of them at once gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\ufffd"
_CLEANED = 8  # characters at the end of a text that cleaning up spaces may still change
_WINDOW, _KEPT = 64, 16  # tokens decoded at the most at each step, and how many of them when the window moves on


class TextStream:
    """A streamer for `TIDE.generate` that writes text.

    What is written in all is ``tokenizer.decode(tokens, skip_special_tokens=True)`` of the new tokens. Text waits while
    later tokens may change it: characters whose bytes are not all there, and runs of byte tokens, which decode to
    replacement characters as a whole if one byte is wrong.

    Args:
      tokenizer: decodes token ids.
      write: called with each piece of text.
      skip_prompt: the first tokens given are the prompt, which is not written.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any], *, skip_prompt: bool = True) -> None:
        self._tokenizer, self._write, self._prompt_comes = tokenizer, write, skip_prompt
        self._held = _CLEANED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._tokens: list[int] = []
        self._start = 0  # the window's first token
        self._shown = ""  # what of the window's text is written
        self._pieces: list[str] = []
        self._kinds: dict[int, str] = {}

    def put(self, tokens: Any) -> None:
        """Takes token ids, of any shape, and writes the text that they settle."""
        if self._prompt_comes:
            self._prompt_comes = False
            return
        self._tokens += (int(token) for token in np.asarray(tokens).ravel())
        settled = self._settled()
        text = self._decode(self._start, settled)
        ready = text.rstrip(_BROKEN)
        ready = ready[: len(ready) - self._held] if self._held else ready
        if ready.startswith(self._shown) and ready != self._shown:
            self._emit(ready[len(self._shown) :])
            self._shown = ready
        if settled - self._start > _WINDOW:
            self._move_on(text, settled)

    def end(self) -> None:
        """Writes the rest of the text."""
        whole, written = self._decode(0, len(self._tokens)), "".join(self._pieces)
        if whole.startswith(written) and whole != written:
            self._emit(whole[len(written) :])

    def _emit(self, text: str) -> None:
        self._pieces.append(text)
        self._write(text)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _settled(self) -> int:
        """The number of tokens before a run of byte tokens at the end, which the next byte may break."""
        end = len(self._tokens)
        while end > self._start and self._kind(self._tokens[end - 1]) != "text":
            end -= 1
        run = self._tokens[end:]
        return end if any(self._kind(token) == "byte" for token in run) else len(self._tokens)

    def _kind(self, token: int) -> str:
        """ "byte"; "nothing" for a token that is not decoded, such as a special one, and so ends no run; or "text"."""
        if token not in self._kinds:
            spelling = getattr(self._tokenizer, "convert_ids_to_tokens", lambda _: None)(token)
            is_byte = isinstance(spelling, str) and _BYTE.fullmatch(spelling) is not None
            decoded = is_byte or self._tokenizer.decode([token], skip_special_tokens=True)
            self._kinds[token] = "byte" if is_byte else "text" if decoded else "nothing"
        return self._kinds[token]

    def _move_on(self, text: str, settled: int) -> None:
        """Starts the window at a later token, from which the text that follows decodes alike."""
        start = settled - _KEPT
        rest, waiting = self._decode(start, settled), text[len(self._shown) :]
        # A first token may decode otherwise, without its space; what counts is that this text is written already.
        if text.endswith(rest) and rest.endswith(waiting) and len(rest) > len(waiting) + _CLEANED:
            self._start, self._shown = start, rest[: len(rest) - len(waiting)]
