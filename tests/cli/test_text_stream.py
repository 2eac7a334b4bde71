"""Streamed text is the text that decoding all tokens at once gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tiny_tokenizers import KINDS, byte_level, odd_texts, tokenizer_json
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tide_jax.cli.text_stream import TextStream
from tide_jax.testing import ByteTokenizer

CODE = "def f(x):\n    if x:\n        return [\n            1,\n        ]\n\n\n    # done 🎉\n\treturn 0\n"
TEXTS = (
    CODE,
    CODE * 20,
    " leading",
    "trailing \n ",
    "🎉🏳️‍🌈👩‍👩‍👧 日本語\n  안녕 🎉 . , ' n't 's",
    "",
    "\n",
    " ",
    "\n  \n    \n",
)


def load(kind: str, *, clean: bool = False) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(kind)),
        bos_token="<s>",
        clean_up_tokenization_spaces=clean,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=clean,
    )


def streamed(tokenizer: object, tokens: list[int], prompt: list[int]) -> list[str]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(np.array([prompt]))
    for token in tokens:
        stream.put(np.array([token], np.int32))
    stream.end()
    return pieces


def check(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> None:
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(streamed(tokenizer, tokens, [1, 2, 3])) == whole, tokens


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_gives_the_whole_text(kind: str, clean: bool) -> None:
    tokenizer = load(kind, clean=clean)
    for text in (*TEXTS, *odd_texts()):
        check(tokenizer, tokenizer(text)["input_ids"])


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_so_does_nonsense(kind: str, clean: bool) -> None:
    """A model may write any token after any other: half characters, special tokens between bytes, unknown ids."""
    tokenizer = load(kind, clean=clean)
    rng = random.Random(0)
    size = len(tokenizer)
    for length in (1, 2, 3, 5, 8, 13, 300):
        for _ in range(12):
            check(tokenizer, rng.choices(range(size + 3), k=length))
            few = rng.choices(range(size), k=3)
            check(tokenizer, rng.choices(few, k=length))


def test_broken_bytes_undo_a_run_of_byte_tokens() -> None:
    tokenizer = load("llama2")
    tokens = tokenizer.convert_tokens_to_ids(["a", "<0xC3>", "<0xA9>", "<s>", "<0xFF>", "in", "<0xC3>", "<0xA9>"])
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a\ufffd\ufffd\ufffdiné"
    check(tokenizer, tokens)


def test_text_comes_in_pieces_and_soon() -> None:
    """Nothing waits for a space or a line's end: a piece for each token of plain text."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(words))
    tokens = tokenizer("the tide goes out")["input_ids"] * 40
    assert len(streamed(tokenizer, tokens, [1])) == len(tokens)
    emoji = tokenizer("🚀")["input_ids"]
    assert len(emoji) > 1
    assert streamed(tokenizer, emoji, [1]) == ["🚀"]


def test_the_prompt_is_written_where_asked_for() -> None:
    pieces: list[str] = []
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, pieces.append, skip_prompt=False)
    stream.put(np.array([tokenizer.encode("once ")]))
    stream.put(np.array(tokenizer.encode("é", add_special_tokens=False)[:1]))
    assert pieces == ["once "]
    stream.put(np.array(tokenizer.encode("é", add_special_tokens=False)[1:]))
    stream.end()
    assert pieces == ["once ", "é"]
