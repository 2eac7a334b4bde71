"""Finds the tokens that end a generation in a GGUF file, by llama.cpp's rules.

Most files name one end token and rely on llama.cpp to recognise the others by their text, whatever their type and the
chat template. The lists and the two exceptions are those of `llama_vocab::impl::load`:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp

If the file names no end token, llama.cpp also takes token 2 ("llama") or 11 ("gpt2"). This module does not: those are
the ids of Llama 2 and Falcon, whose end tokens are in the list anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~[",
    "<|end_of_turn|>",  # OpenChat's; llama.cpp relies on the file's keys for it
})  # fmt: skip
# Fill-in-the-middle tokens that begin another file: a key that may name one, and texts to search in order otherwise.
_FILL_IN_TEXTS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of all tokens that end a generation: first those the file names, then those known by their text.

    Args:
      metadata: the file's key-value pairs.
    """
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    known = _END_TEXTS.union(*_FILL_IN_TEXTS.values())
    ids = {token: index for index, token in enumerate(tokens) if token in known}
    named = [metadata.get(f"tokenizer.ggml.{key}") for key in _KEYS]
    by_text = sorted(index for token, index in ids.items() if token in _END_TEXTS)
    fill_in = [_fill_in_token_id(metadata, key, ids) for key in _FILL_IN_TEXTS]
    ends = dict.fromkeys(end for end in [*named, *by_text, *fill_in] if end is not None)
    for token in _lookalikes(ids):
        ends.pop(ids[token], None)
    return list(ends)


def _fill_in_token_id(metadata: Mapping[str, Any], key: str, ids: Mapping[str, int]) -> int | None:
    return metadata.get(f"tokenizer.ggml.{key}", next((ids[text] for text in _FILL_IN_TEXTS[key] if text in ids), None))


def _lookalikes(ids: Mapping[str, int]) -> list[str]:
    """Tokens in the vocabularies of gpt-oss, Solar Open and Gemma 4 that look like an end but are none."""
    calls = "<|call|>" in ids or "<|calls|>" in ids
    part_of_answer = calls and ("<|return|>" in ids or "<|flush|>" in ids)  # <|end|> closes a message, not the answer
    lookalikes = {"<|end|>": part_of_answer, "</s>": "<|tool_response>" in ids}
    return [token for token, found in lookalikes.items() if found and token in ids]
