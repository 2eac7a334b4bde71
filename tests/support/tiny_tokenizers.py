"""Small tokenizers of every kind that checkpoints bring, and odd texts for them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>"]
_CORPUS = [
    "Steps:\n\n1. Hello world, they said it's 1234 and the world's a stage.",
    "    def tide(in, out):\n        return [in for in in out]\n\n\n\tthe tide goes out again",
    "Été à la plage, 日本語のテキスト, 한국어, naïve café, emoji 🎉🎉 and 👩‍👩‍👧",
] * 4
_PIECES = (
    *(
        "Steps:",
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "\t",
        " ",
        "  ",
        "    ",
        "        ",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\u2581",
    ),
    *("1", "12", "123", "1234567", "3.14", "½", "x²", "١٢٣", "Ⅷ", "Hello", "world", "HTMLTag", "it's", "they'LL", "'S"),
    *("def f(x):", "return", "{", "}", "()", "//", "/*", "...", "!?", "--", "\\n", "café", "cafe\u0301", "İ", "ß", "ﬁ"),
    *(
        "日本語",
        "テキスト",
        "한국어",
        "안녕",
        "مرحبا",
        "हिन्दी",
        "🎉",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "\U0001f468\U0001f3fd",
        "e\u0301\u0323",
    ),
    *(
        "<s>",
        "</s>",
        "<pad>",
        "<|im_start|>",
        "<s",
        "|>",
        "<unk>",
        "\x00",
        "\x7f",
        "\ufffd",
        "\ufeff",
        "<0x0A>",
        "##ing",
    ),
)


@functools.cache
def odd_texts(count: int = 200) -> tuple[str, ...]:
    """Texts that tokenizers cut in different ways: every piece alone, then pieces at random."""
    rng = random.Random(0)
    drawn = ["".join(rng.choices(_PIECES, k=rng.randint(2, 9))) for _ in range(count - len(_PIECES))]
    return (*_PIECES, *drawn)


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def byte_level(
    pre: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None, prefix_space: bool = False
) -> Tokenizer:
    """Byte-level BPE whose words `pre` cuts."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    return _trained(tokenizer, trainer)


def smollm() -> Tokenizer:
    """SmolLM2's: single digits, then GPT-2's words."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]))


def gpt2(prefix_space: bool = False) -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space), prefix_space=prefix_space)


def split(digits: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Llama 3's and Qwen2's: words of a regular expression, then bytes."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), rest]), normalizer)


def llama2(prefix_space: bool = True) -> Tokenizer:
    """Llama 2's: merges over the whole text, spaces as a mark, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    ascii_only = ["".join(c for c in text if ord(c) < 128) for text in _CORPUS]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(ascii_only, trainer)
    # The bytes belong to the model, and match no text.
    model = tokenizer.model
    fresh = Tokenizer(model)
    fresh.normalizer, fresh.decoder = tokenizer.normalizer, tokenizer.decoder
    fresh.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return fresh


def metaspace(scheme: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Unigram tokens over words that begin with the mark of a space."""
    tokenizer = Tokenizer(models.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    return _trained(tokenizer, trainer)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False))


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(tokenizer, trainers.WordLevelTrainer(vocab_size=60, special_tokens=SPECIALS, show_progress=False))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "smollm": smollm,
    "gpt2": gpt2,
    "gpt2 with a space in front": lambda: gpt2(prefix_space=True),
    "llama3": lambda: split(r"\p{N}{1,3}"),
    "qwen2": lambda: split(r"\p{N}", normalizers.NFC()),
    "lower case": lambda: split(r"\p{N}", normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "llama2": llama2,
    "llama2 without a space in front": lambda: llama2(prefix_space=False),
    "unigram": lambda: metaspace("always"),
    "unigram, first": lambda: metaspace("first", normalizers.NFKC()),
    "unigram, never": lambda: metaspace("never", normalizers.Strip()),
    "word pieces": word_piece,
    "words": words,
}


@functools.cache
def tokenizer_json(kind: str) -> str:
    """The tokenizer.json of a kind."""
    return KINDS[kind]().to_str()


def save_tokenizer(directory: Path, kind: str) -> Path:
    """A folder with a tokenizer.json of this kind and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    return directory
