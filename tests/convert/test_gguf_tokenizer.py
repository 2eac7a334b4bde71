"""Tokenizers built from GGUF metadata: byte-level BPE and SentencePiece."""

from __future__ import annotations

import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from gguf_files import smollm2, write_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from convert.architecture import architecture_of
from convert.sources.gguf.pretokenizers import PRE_TOKENIZERS
from convert.sources.gguf.source import GGUFSource
from convert.sources.gguf.tokenizer import build_tokenizer, token_ids
from tide_jax.errors import TideError

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello world 123, été!",
    "It's 2024-05-17; they'LL pay 1234567 euros.",
    "  two  spaces\n\n\ttabs\r\n",
    "日本語 and 🎉 ½ x²",
    "cafe\u0301",
    "",
    "<|im_start|>user\nhi <|im_end|> there",
]
CORPUS = ["Hello world, they said it's 1234 and the world's a stage.", "the tide comes in, the tide goes out again"] * 3
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


# -------------------------------------------------------------------------------------------------- byte-level tokens


def trained_bpe() -> tuple[list[str], list[str]]:
    """Vocabulary, specials first, and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


def bpe_metadata(pre: str | None = "smollm", **changes: Any) -> dict[str, Any]:
    tokens, merges = trained_bpe()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def add_metadata(writer: GGUFWriter, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        add = {str: writer.add_string, list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](key, value)


def write_with_tokenizer(path: Path, metadata: dict[str, Any]) -> GGUFSource:
    write_model(path, extra=lambda writer: add_metadata(writer, metadata))
    return GGUFSource(path)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", None])
def test_byte_level_round_trip(tmp_path: Path, pre: str | None) -> None:
    tokenizer = write_with_tokenizer(tmp_path / "m.gguf", bpe_metadata(pre)).load_tokenizer()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.model_max_length == 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert set(tokenizer("a").keys()) == {"input_ids", "attention_mask"}


def test_qwen2_normalises_and_otherwise_round_trips(tmp_path: Path) -> None:
    tokenizer = write_with_tokenizer(tmp_path / "m.gguf", bpe_metadata("qwen2")).load_tokenizer()
    for text in TEXTS:
        expected = "caf\u00e9" if text == "cafe\u0301" else text
        assert tokenizer.decode(tokenizer(text).input_ids) == expected


@pytest.mark.parametrize("pre, name", [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_byte_level_ids_are_those_of_the_transformers_class(pre: str, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    metadata = bpe_metadata(pre)
    ours = build_tokenizer(metadata)
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = getattr(transformers, name)(vocab=vocabulary, merges=merges)
    theirs.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    for text in TEXTS + CORPUS:
        assert ours.encode(text).ids == theirs(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("said", [{}, {"tokenizer.ggml.pre": ""}])
def test_a_file_that_does_not_name_its_pretokenizer(said: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """It is cut as llama.cpp does: punctuation first, then GPT-2's words, then digits by threes; with a warning."""
    unsaid = build_tokenizer(bpe_metadata(None) | said)
    assert len(caplog.records) == 1
    assert "does not say how its tokenizer splits text (tokenizer.ggml.pre)" in caplog.text
    words = [word for word, _ in unsaid.pre_tokenizer.pre_tokenize_str("It's 12345 ok!\n\nx")]
    assert words == ["It", "'", "s", "Ġ", "123", "45", "Ġok", "!", "Ċ", "Ċ", "x"]
    caplog.clear()
    assert build_tokenizer(bpe_metadata("default")).to_str() == unsaid.to_str()
    assert not caplog.records


@pytest.mark.parametrize(
    "pre, words",
    [
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġok", "!", "Ċ"]),
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġok", "!", "Ċ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġok", "!Ċ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġok", "!Ċ"]),
    ],
)
def test_words(pre: str, words: list[str]) -> None:
    tokenizer = build_tokenizer(bpe_metadata(pre))
    assert tokenizer.pre_tokenizer is not None
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 ok!\n")] == words


@pytest.mark.parametrize(
    "pre, words",
    [
        ("mpt", "It|'s|ĠHTMLTag|'s|Ġ12345|Ġa|,|Ġb|!|ĊĊ"),
        ("command-r", "It|'s|ĠHTMLTag|'s|Ġ|1|2|3|4|5|Ġa|,|Ġb|!|ĊĊ"),
        ("glm4", "It|'s|ĠHTMLTag|'s|Ġ|123|45|Ġa|,|Ġb|!ĊĊ"),
        ("gpt-4o", "It's|ĠHTMLTag's|Ġ|123|45|Ġa|,|Ġb|!ĊĊ"),
        ("tekken", "It|'s|ĠHTMLTag|'s|Ġ|1|2|3|4|5|Ġa|,|Ġb|!ĊĊ"),
        ("falcon", "It|'|s|ĠHTMLTag|'|s|Ġ|123|45|Ġa|,|Ġb|!|ĊĊ"),
        ("bloom", "It's|ĠHTMLTag's|Ġ12345|Ġa|,|Ġb|!ĊĊ"),
        ("exaone-moe", "It|'s|ĠHTMLTag|'s|Ġ|1|2|3|4|5|Ġa|,|Ġb|!Ċ|Ċ"),
        ("qwen35", "It|'s|ĠHTMLTag|'s|Ġ|1|2|3|4|5|Ġa|,|Ġb|!ĊĊ"),
        ("lfm2", "It|'s|ĠHTMLTag|'s|Ġ|123|45|Ġa|,|Ġb|!ĊĊ"),
        ("seed-coder", "It|'s|ĠHTMLTag|'s|Ġ|1|2|3|4|5|Ġa|,|Ġb|!|ĊĊ"),
        ("deepseek-llm", "It|'|s|ĠHTMLTag|'|s|Ġ|1|2|3|4|5|Ġa|,|Ġb|!|Ċ|Ċ"),
        ("deepseek-v3", "It|'s|ĠHTMLTag|'s|Ġ|123|45|Ġa|,|Ġb|!ĊĊ"),
    ],
)
def test_words_are_those_of_llama_cpp(pre: str, words: str) -> None:
    """What llama.cpp makes of the same text."""
    tokenizer = build_tokenizer(bpe_metadata(pre))
    assert tokenizer.pre_tokenizer is not None
    found = tokenizer.pre_tokenizer.pre_tokenize_str("It's HTMLTag's 12345 a, b!\n\n")
    assert "|".join(word for word, _ in found) == words


@pytest.mark.parametrize("pre, words", [("qwen2", 2), ("qwen35", 1)])
def test_marks_belong_to_words_of_qwen35(pre: str, words: int) -> None:
    tokenizer = build_tokenizer(bpe_metadata(pre))
    assert tokenizer.pre_tokenizer is not None
    assert len(tokenizer.pre_tokenizer.pre_tokenize_str("\u0915\u093f")) == words


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_words_of_any_text_lose_nothing(pre: str) -> None:
    tokenizer = build_tokenizer(bpe_metadata(pre))
    for text in TEXTS:
        normal = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, False) == normal


def test_begin_token_is_added_where_the_file_asks() -> None:
    for pre, changes, expected in [
        ("smollm", {}, False),
        ("smollm", {"add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ]:
        ids = build_tokenizer(bpe_metadata(pre, **changes)).encode("Hello").ids
        assert (ids[0] == 1) is expected, (pre, changes)
    both = build_tokenizer(bpe_metadata(add_bos_token=True, add_eos_token=True))
    assert both.encode("Hello").ids[0 :: len(both.encode("Hello").ids) - 1] == [1, 2]


def test_user_defined_tokens_match_whole_but_are_not_special() -> None:
    metadata = bpe_metadata()
    types = [*metadata["tokenizer.ggml.token_type"]]
    types[1] = 4
    tokenizer = build_tokenizer(metadata | {"tokenizer.ggml.token_type": types})
    ids = tokenizer.encode("a<|im_start|>b<|im_end|>").ids
    assert 1 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<|im_start|>b"


def test_side_files_load_with_auto_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = write_with_tokenizer(tmp_path / "m.gguf", bpe_metadata(add_bos_token=True))
    (tmp_path / "out").mkdir()
    source.write_side_files(tmp_path / "out")
    again, first = AutoTokenizer.from_pretrained(tmp_path / "out"), source.load_tokenizer()
    for text in TEXTS:
        assert again(text).input_ids == first(text).input_ids
    assert again.chat_template == TEMPLATE
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2} == source.generation_config


def test_chat_template_renders(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    tokenizer = write_with_tokenizer(tmp_path / "m.gguf", bpe_metadata()).load_tokenizer()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


LLAMA_CPP_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
    "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("token", LLAMA_CPP_ENDS)
def test_a_generation_ends_where_it_ends_in_llama_cpp(token: str, kind: int) -> None:
    """Whatever the token's type, with and without a chat template; and the token is found whole in a text."""
    metadata = bpe_metadata(eos_token_id=1)
    metadata["tokenizer.ggml.tokens"][0] = "<|startoftext|>"
    metadata["tokenizer.ggml.tokens"][2] = token
    metadata["tokenizer.ggml.token_type"][2] = kind
    assert token_ids(metadata)["eos_token_id"] == [1, 2]
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode(f"a{token}").ids[-1] == 2
    assert tokenizer.decode([2], skip_special_tokens=True) == ""
    del metadata["tokenizer.chat_template"]
    assert token_ids(metadata)["eos_token_id"] == [1, 2]


def test_the_end_tokens_that_a_file_names_come_first() -> None:
    ends = {"eos_token_id": 7, "eot_token_id": 2, "eom_token_id": 9, "fim_pad_token_id": 8}
    assert token_ids(bpe_metadata(**ends))["eos_token_id"] == [7, 2, 9, 0, 8]


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (["<|end|>", "<|return|>", "<|call|>"], [1, 2]),  # gpt-oss
        (["<|end|>", "<|flush|>", "<|calls|>"], [1, 2]),  # Solar Open
        (["<|end|>", "<|return|>", "<|start|>"], [0, 1]),
        (["<|end|>", "<|call|>", "<|start|>"], [0, 1]),
        (["</s>", "<|tool_response>", "<turn|>"], [1, 2]),  # Gemma 4
        (["</s>", "<turn|>", "<s>"], [0, 1]),
        (["<fim-pad>", "<|fim_pad|>", "<s>"], [1]),  # one token has each role
    ],
)
def test_tokens_that_only_look_like_an_end(tokens: list[str], expected: list[int]) -> None:
    metadata = bpe_metadata()
    del metadata["tokenizer.ggml.eos_token_id"]
    metadata["tokenizer.ggml.tokens"][:3] = tokens
    assert token_ids(metadata)["eos_token_id"] == (expected if len(expected) > 1 else expected[0])


def test_named_chat_templates(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    metadata = bpe_metadata() | {"tokenizer.chat_template.rag": "r", "tokenizer.chat_templates": ["rag"]}
    source = write_with_tokenizer(tmp_path / "m.gguf", metadata)
    assert source.load_tokenizer().chat_template == {"default": TEMPLATE, "rag": "r"}
    (tmp_path / "out").mkdir()
    source.write_side_files(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {"default": TEMPLATE, "rag": "r"}
    with pytest.raises(TideError, match=r"m\.gguf has tokenizer\.chat_template=5: Input should be a valid string"):
        write_with_tokenizer(tmp_path / "m.gguf", bpe_metadata() | {"tokenizer.chat_template": 5})


def test_end_ids_reach_the_model(tmp_path: Path) -> None:
    for changes, expected in [
        ({"eos_token_id": 0}, [0, 2]),
        ({"eos_token_id": 2}, [2, 0]),
        ({"eos_token_id": 1, "eot_token_id": 2}, [1, 2, 0]),
    ]:
        for template in ({}, {"tokenizer.chat_template": "no turns"}):
            source = write_with_tokenizer(tmp_path / "m.gguf", bpe_metadata(**changes) | template)
            assert source.generation_config["eos_token_id"] == source.config["eos_token_id"] == expected
            assert list(architecture_of(source).config.eos_token_ids) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"pre": "kimi-k2"}, "pre='kimi-k2'"),
        ({"model": "rwkv"}, "model='rwkv'"),
        ({"tokens": []}, "no vocabulary"),
        ({"tokens": ["a"] * 2, "token_type": [1, 1]}, "1 duplicates"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"merges": ["qqq zzz"]}, "inconsistent"),
        ({"bos_token_id": 9999, "add_bos_token": True}, "bos_token_id=9999"),
    ],
)
def test_tokenizers_that_cannot_be_built_are_refused_by_name(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError) as caught:
        build_tokenizer(bpe_metadata(**changes))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ SentencePiece tokens

PIECES = ["▁t", "he", "▁the", "ti", "de", "tide", "▁tide", "in", "▁a", "▁▁", "an", "and", "▁and", "er", "es", "▁▁▁▁"]


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    letters = list("▁abcdefghijklmnopqrstuvwxyz'.,")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's rule, slowly: join the neighbours whose whole scores best, leftmost first, until none do."""
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list("▁" + text.replace(" ", "▁"))
    while pairs := [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]:
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out: list[int] = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


SENTENCES = ["the tide and the sand", "  the   tides\nin 12 été 🎉", "A tide", "'tis the end, and then an and."]


@pytest.mark.parametrize("text", SENTENCES)
def test_sentencepiece_ids(text: str) -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build_tokenizer(metadata)
    ids = tokenizer.encode(text).ids
    assert ids == [1, *sentencepiece_ids(text, metadata)]
    assert tokenizer.decode(ids) == text


def test_sentencepiece_ids_are_those_of_the_transformers_class() -> None:
    from transformers import LlamaTokenizer

    metadata = sentencepiece_metadata()
    ours = build_tokenizer(metadata)
    merges = [tuple(merge) for merge in json.loads(ours.to_str())["model"]["merges"]]
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges)
    for text in SENTENCES:
        if not text.startswith(" "):  # that class folds a leading space into its prefix
            assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids


def test_sentencepiece_without_space_prefix() -> None:
    tokenizer = build_tokenizer(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.encode("tide").tokens == ["tide"]
    assert tokenizer.decode(tokenizer.encode(" tide").ids) == " tide"


def test_gemma4_has_merges_instead_of_scores() -> None:
    changes = {"model": "gemma4", "add_space_prefix": False, "merges": ["h e", "▁ t", "▁t he"]}
    tokenizer = build_tokenizer(sentencepiece_metadata(**changes) | {"tokenizer.ggml.scores": []})
    ids = tokenizer.encode("he the the é").ids
    assert tokenizer.decode(ids) == "he the the é"
    assert tokenizer.encode("he the é").tokens == ["<s>", "he", "▁the", "▁", "<0xC3>", "<0xA9>"]


def test_sentencepiece_settings_not_supported_are_refused() -> None:
    with pytest.raises(TideError, match="remove_extra_whitespaces"):
        build_tokenizer(sentencepiece_metadata(remove_extra_whitespaces=True))
    with pytest.raises(TideError, match="scores has 1 entries"):
        build_tokenizer(sentencepiece_metadata(scores=[0.0]))


# -------------------------------------------------------------------------------------------------------- a real model


def test_smollm2_tokenizer() -> None:
    source = smollm2()
    tokenizer = source.load_tokenizer()
    assert tokenizer("Hello world 123").input_ids == [19556, 905, 216, 33, 34, 35]
    assert len(tokenizer) == source.config["vocab_size"] == 49152
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_smollm2_chat_template() -> None:
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    messages = [{"role": "user", "content": "hi"}]
    chat = smollm2().load_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
