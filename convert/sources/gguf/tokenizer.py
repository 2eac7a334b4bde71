"""Builds tokenizers from GGUF metadata.

A GGUF file has the vocabulary, merges or scores, and token types, but not the normalizer and the pre-tokenizer. These
follow from the names in `tokenizer.ggml.model` and `tokenizer.ggml.pre`. Keys and token types:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from convert.sources.gguf.ends import end_token_ids
from convert.sources.gguf.pretokenizers import PRE_TOKENIZERS
from tide_jax.errors import TideError
from tide_jax.tokenizer.chat_files import DEFAULT, templates_by_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def load_tokenizer(metadata: Mapping[str, Any], max_length: int | None) -> PreTrainedTokenizerFast:
    """Builds the transformers tokenizer described by a GGUF file, with special tokens and chat template.

    Args:
      metadata: the file's key-value pairs.
      max_length: the model's context length, which becomes `model_max_length`; None if the file does not say.

    Raises:
      TideError: the file has no vocabulary, or the kind of tokenizer is not supported.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _tokens(metadata)
    special = {name: _token(metadata, tokens, key) for name, key in _SPECIAL_IDS.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(metadata),
        chat_template=_chat_template(metadata),
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values for generation_config.json in the file: `bos_token_id`, `eos_token_id` and `pad_token_id`.

    A model ends at every token at which llama.cpp ends: `eos_token_id` is one id or a list, the end of sequence first.
    """
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_IDS.items()}
    ends = end_token_ids(metadata)
    values = {
        "bos_token_id": ids["bos_token"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["pad_token"],
    }
    return {name: value for name, value in values.items() if value is not None}


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The file's template, or several by name."""
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    templates = templates_by_name(metadata.get(key), key) | templates_by_name(named, key)
    return templates if set(templates) - {DEFAULT} else templates.get(DEFAULT)


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the `tokenizers.Tokenizer` of a GGUF file's metadata.

    Raises:
      TideError: the file has no vocabulary, or the kind of tokenizer is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise TideError(
            f"tokenizer.ggml.model={kind!r} is not supported, expected one of {', '.join(_BUILDERS)}; "
            "pass a Hugging Face tokenizer of the same model instead"
        )
    try:
        tokenizer = _BUILDERS[kind](metadata)
    except TideError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception, for example for merges of unknown tokens
        reason = " ".join(str(error).split())
        raise TideError(
            f"the GGUF file's vocabulary is inconsistent ({reason}); expected merges of its own tokens: "
            "get the file again"
        ) from error
    _add_tokens(tokenizer, metadata)
    return tokenizer


def _byte_level_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if not name:
        name = "default"
        logger.warning(
            "the GGUF file does not say how its tokenizer splits text (tokenizer.ggml.pre), so llama.cpp's default is "
            "used, which may not be the model's; get a newer file, or pass a Hugging Face tokenizer"
        )
    if name not in PRE_TOKENIZERS:
        raise TideError(
            f"tokenizer.ggml.pre={name!r} is not known, expected one of {', '.join(PRE_TOKENIZERS)}; "
            "pass a Hugging Face tokenizer of the same model instead"
        )
    pre = PRE_TOKENIZERS[name]
    merges = [_split_merge(merge) for merge in metadata.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if template := _special_token_template(metadata, add_bos=pre.add_bos):
        steps.append(template)
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    # A leading space belongs to the token: the separator is the first space after it.
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            raise TideError(
                f"tokenizer.ggml.{key} is not supported with the 'llama' tokenizer; "
                "pass a Hugging Face tokenizer of the same model instead"
            )
    return _space_marked_bpe(metadata, _merges_from_scores(metadata))


def _gemma4(metadata: Mapping[str, Any]) -> Tokenizer:
    return _space_marked_bpe(metadata, [_split_merge(merge) for merge in metadata.get("tokenizer.ggml.merges", ())])


def _space_marked_bpe(metadata: Mapping[str, Any], merges: list[tuple[str, str]]) -> Tokenizer:
    """BPE over the whole text, with spaces replaced by a mark; unknown characters fall back to bytes."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_vocabulary(metadata),
            merges=merges,
            unk_token=_token(metadata, _tokens(metadata), "unknown_token_id"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    # Prepended again after each special token, as in llama.cpp and the tokenizer.json files of Llama 2.
    prepend = [normalizers.Prepend(_SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if template := _special_token_template(metadata, add_bos=True):
        tokenizer.post_processor = template
    return tokenizer


def _merges_from_scores(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All ways to join two tokens to a third, sorted by the result's score (best first), its id, the halves' ids."""
    vocabulary = _vocabulary(metadata)
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(vocabulary):
        raise TideError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary)} tokens, expected one for each: "
            "get the file again"
        )
    types = _token_types(metadata, len(vocabulary))
    merges = [
        (-scores[index], index, vocabulary[token[:cut]], vocabulary[token[cut:]])
        for token, index in vocabulary.items()
        if types[index] == _NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokens = _tokens(metadata)
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(merges)]


def _special_token_template(metadata: Mapping[str, Any], add_bos: bool) -> processors.TemplateProcessing | None:
    """Adds begin and end tokens if the file asks for them; `add_bos` applies if it does not say."""
    tokens = _tokens(metadata)
    begin = _token(metadata, tokens, "bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    end = _token(metadata, tokens, "eos_token_id") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if begin is None and end is None:
        return None

    def sequence(name: str, segment: int) -> list[str]:
        return [f"{part}:{segment}" for part in (begin, name, end) if part is not None]

    return processors.TemplateProcessing(
        single=sequence("$A", 0),
        pair=sequence("$A", 0) + sequence("$B", 1),
        special_tokens=[(token, tokens.index(token)) for token in {begin, end} if token is not None],
    )


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Makes control and user-defined tokens match as a whole in text; only control tokens are special.

    As in llama.cpp, a token that ends a generation is a control token whatever its type, because a chat template may
    write it.
    """
    tokens = _tokens(metadata)
    ends = set(end_token_ids(metadata))
    types = [_CONTROL if i in ends else kind for i, kind in enumerate(_token_types(metadata, len(tokens)))]
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise TideError(
            "the GGUF file has no vocabulary (tokenizer.ggml.tokens); pass a Hugging Face tokenizer of the same model"
        )
    return tokens


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = _tokens(metadata)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise TideError(
            f"tokenizer.ggml.tokens has {len(tokens) - len(vocabulary)} duplicates, expected distinct tokens: "
            "get the file again"
        )
    return vocabulary


def _token_types(metadata: Mapping[str, Any], count: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * count)
    if len(types) != count:
        raise TideError(
            f"tokenizer.ggml.token_type has {len(types)} entries for {count} tokens, expected one for each: "
            "get the file again"
        )
    return types


def _token(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    """The token named by a `tokenizer.ggml.*_id` key, None if the file has no such key."""
    index = metadata.get(f"tokenizer.ggml.{key}")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise TideError(f"tokenizer.ggml.{key}={index} is outside the {len(tokens)} tokens: get the file again")
    return tokens[index]


_BUILDERS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece, "gemma4": _gemma4}
