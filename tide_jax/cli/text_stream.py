"""Streams the text of tokens as they arrive; the pieces add up to the text of all tokens decoded at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\ufffd"
_CLEANUP_CHARACTERS = 8  # characters at the end of a text that the clean-up of spaces may still change
_WINDOW_TOKENS, _KEPT_TOKENS = 64, 16  # most tokens decoded at each step, and tokens kept when the window moves


class TextStream:
    """A streamer for `TIDE.generate` that writes text.

    In total it writes ``tokenizer.decode(tokens, skip_special_tokens=True)`` of the new tokens. It holds back text that
    later tokens may change: characters whose bytes are incomplete, and runs of byte tokens, which decode to replacement
    characters as a whole if one byte is wrong.

    Args:
      tokenizer: decodes token ids.
      write: called with each piece of text.
      skip_prompt: the first tokens are the prompt, which is not written.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any], *, skip_prompt: bool = True) -> None:
        self._tokenizer, self._write, self._expects_prompt = tokenizer, write, skip_prompt
        self._held_characters = _CLEANUP_CHARACTERS if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._tokens: list[int] = []
        self._start = 0  # the window's first token
        self._shown = ""  # the part of the window's text that is already written
        self._pieces: list[str] = []
        self._kinds: dict[int, str] = {}

    def put(self, tokens: Any) -> None:
        """Takes token ids of any shape, and writes the text that can no longer change."""
        if self._expects_prompt:
            self._expects_prompt = False
            return
        self._tokens += (int(token) for token in np.asarray(tokens).ravel())
        stable_length = self._stable_length()
        text = self._decode(self._start, stable_length)
        # Incomplete characters, and spaces that the clean-up may still change, wait for later tokens.
        ready = text.rstrip(_BROKEN)
        ready = ready[: len(ready) - self._held_characters] if self._held_characters else ready
        if ready.startswith(self._shown) and ready != self._shown:
            self._emit(ready[len(self._shown) :])
            self._shown = ready
        if stable_length - self._start > _WINDOW_TOKENS:
            self._move_window(text, stable_length)

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

    def _stable_length(self) -> int:
        """Number of tokens before a run of byte tokens at the end, which the next byte may invalidate."""
        end = len(self._tokens)
        while end > self._start and self._token_kind(self._tokens[end - 1]) != "text":
            end -= 1
        run = self._tokens[end:]
        return end if any(self._token_kind(token) == "byte" for token in run) else len(self._tokens)

    def _token_kind(self, token: int) -> str:
        """Kind of a token: "byte", "text", or "nothing".

        "nothing" is a token without text, such as a special one; it does not end a run of bytes.
        """
        if token not in self._kinds:
            spelling = getattr(self._tokenizer, "convert_ids_to_tokens", lambda _: None)(token)
            is_byte = isinstance(spelling, str) and _BYTE.fullmatch(spelling) is not None
            decoded = is_byte or self._tokenizer.decode([token], skip_special_tokens=True)
            self._kinds[token] = "byte" if is_byte else "text" if decoded else "nothing"
        return self._kinds[token]

    def _move_window(self, text: str, stable_length: int) -> None:
        """Moves the window's start to a later token, if the text from there decodes the same."""
        start = stable_length - _KEPT_TOKENS
        rest, waiting = self._decode(start, stable_length), text[len(self._shown) :]
        # A window's first token may decode differently, without its space. That is harmless if its text is already
        # written.
        if text.endswith(rest) and rest.endswith(waiting) and len(rest) > len(waiting) + _CLEANUP_CHARACTERS:
            self._start, self._shown = start, rest[: len(rest) - len(waiting)]
