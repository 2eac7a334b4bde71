"""How byte-level tokenizers split text into words, by the names in `tokenizer.ggml.pre`.

A name stands for regular expressions. Each one splits the pieces left by those before it, and its matches become words.
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp has the same expressions.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is split into words before byte-level merges.

    Attributes:
      splits: regular expressions, applied one after the other.
      nfc: normalise text to Unicode NFC first.
      ignore_merges: a word that is itself a token is used whole, whatever the merges say.
      add_bos: add a begin-of-sequence token if the file does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _words(digits: str) -> str:
    """The word pattern shared by Llama 3 and Qwen2, which differ in the number of digits per word."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased_words(ending: str, digits: str) -> str:
    """A word pattern that also splits before a capital letter after small ones; `ending` may belong to a word."""
    before, capital, small = r"[^\r\n\p{L}\p{N}]?", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    return (
        f"{before}[{capital}]*[{small}]+{ending}|{before}[{capital}]+[{small}]*{ending}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_DIGIT, _THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BLOOM_WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SEED_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35_WORDS = (  # Qwen2's, but marks belong to letters
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXAONE_MOE_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

_GPT2 = PreTokenizer((_GPT2_WORDS,))
_DIGITS = PreTokenizer((_DIGIT, _GPT2_WORDS))
_LLAMA3 = PreTokenizer((_words(_THREE_DIGITS),), ignore_merges=True, add_bos=True)
_GPT4 = PreTokenizer((_words(_THREE_DIGITS),))
_GPT4O = PreTokenizer((_cased_words(_CONTRACTION, _THREE_DIGITS),))
_QWEN2 = PreTokenizer((_words(_DIGIT),), nfc=True)
_DEEPSEEK3 = PreTokenizer((_THREE_DIGITS, "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_WORDS))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # llama.cpp's choice if a file does not say, whatever the model was trained with.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "exaone4", "mellum", "trillion", "jais", "granite-docling"), _GPT2),
    "olmo": PreTokenizer((_GPT2_WORDS,), nfc=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "command-r": PreTokenizer((_DIGIT, _GPT2_WORDS), nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _GPT4),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _GPT4O),
    "tekken": PreTokenizer((_cased_words("", _DIGIT),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
    "qwen35": PreTokenizer((_QWEN35_WORDS,), nfc=True),
    **dict.fromkeys(("hunyuan", "solar-open"), PreTokenizer((_words(_DIGIT),))),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_WORDS, "[0-9][0-9][0-9]")),
    "bloom": PreTokenizer((_BLOOM_WORDS,)),
    "exaone-moe": PreTokenizer((_EXAONE_MOE_WORDS,)),
    "seed-coder": PreTokenizer((_SEED_WORDS,)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CHINESE,
            _DIGIT,
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, _DIGIT)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
}
