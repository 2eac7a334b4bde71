"""Tokenizers on disk: token ids are those of tokenizer.json, the rest is what tokenizer_config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_gguf_tokenizer import bpe_metadata, sentencepiece_metadata, write_with_tokenizer
from tiny_llama import save
from tiny_tokenizers import KINDS, SPECIALS, odd_texts, save_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import tide_jax
from convert import convert
from tide_jax.errors import TideError

CLASSES = (
    *(None, "GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizer", "NoSuchClass"),
    *("PreTrainedTokenizerFast", "TokenizersBackend", "BertTokenizer", "T5Tokenizer", "GPTNeoXTokenizer", "XTokenizer"),
)
MODEL_TYPES = (None, "llama", "qwen2", "gemma", "mistral", "gpt2", "deepseek_v3", "t5", "no_such_type")
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"add_prefix_space": True, "legacy": False},
    {"add_prefix_space": False, "legacy": True, "do_lower_case": True},
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "sp_model_kwargs": {}},
    {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True, "rstrip": True, "normalized": True}},
    {"added_tokens_decoder": {"1": {"content": "<s>", "lstrip": True, "rstrip": True, "special": True}}},
    {"fix_mistral_regex": True, "add_bos_token": False, "add_eos_token": False, "use_default_system_prompt": False},
)


def write(directory: Path, name: str, values: Any) -> None:
    (directory / name).write_text(json.dumps(values), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ the ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_file_whatever_the_class(kind: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, kind)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = [encoding.ids for encoding in file.encode_batch(list(odd_texts()))]
    for number, name in enumerate(CLASSES):
        for model_type in MODEL_TYPES[number % 2 :: 2]:
            settings = SETTINGS[(number + MODEL_TYPES.index(model_type)) % len(SETTINGS)]
            write(tmp_path, "tokenizer_config.json", {"tokenizer_class": name} | settings)
            write(tmp_path, "config.json", {"model_type": model_type, "tokenizer_class": name})
            tokenizer = tide_jax.load_tokenizer(tmp_path)
            assert tokenizer(list(odd_texts()))["input_ids"] == expected, (name, model_type, settings)


def test_the_ids_outlive_a_conversion(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    save_tokenizer(source, "smollm")
    write(source, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"})
    convert(source, tmp_path / "out")
    found, file = tide_jax.load_tokenizer(tmp_path / "out"), Tokenizer.from_file(str(source / "tokenizer.json"))
    assert [found(text)["input_ids"] for text in odd_texts()] == [file.encode(text).ids for text in odd_texts()]
    assert found.eos_token == "</s>"


def test_a_text_is_never_cut_short(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "gpt2")
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole = file.encode("the tide goes out again").ids
    file.enable_truncation(3)
    file.enable_padding(length=64)
    file.save(str(tmp_path / "tokenizer.json"))
    assert tide_jax.load_tokenizer(tmp_path)("the tide goes out again")["input_ids"] == whole


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES])


# What the tokenizer.json of a published model has, by the name that GGUF knows it by.
PUBLISHED: dict[str, tuple[pre_tokenizers.PreTokenizer, normalizers.Normalizer | None, bool]] = {
    "gpt-2": (_GPT2, None, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), None, False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), None, True),
    "qwen2": (_split(r"\p{N}"), normalizers.NFC(), False),
}


def published(metadata: dict[str, Any], pre: str) -> Tokenizer:
    """A GGUF file's vocabulary under the pre-tokenizer of the model's tokenizer.json."""
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=PUBLISHED[pre][2]))
    tokenizer.pre_tokenizer, normalizer, _ = PUBLISHED[pre]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    control = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in control if kind == 3])
    return tokenizer


@pytest.mark.parametrize("pre", PUBLISHED)
def test_gguf_cuts_as_the_models_own_file(pre: str, tmp_path: Path) -> None:
    metadata = bpe_metadata(pre, add_bos_token=False)
    file = published(metadata, pre)
    (tmp_path / "hf").mkdir()
    file.save(str(tmp_path / "hf" / "tokenizer.json"))
    write(tmp_path / "hf", "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    write_with_tokenizer(tmp_path / "m.gguf", metadata)
    from_gguf, from_file = tide_jax.load_tokenizer(tmp_path / "m.gguf"), tide_jax.load_tokenizer(tmp_path / "hf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    converted = tide_jax.load_tokenizer(tmp_path / "out")
    for text in odd_texts():
        expected = file.encode(text).ids
        assert from_gguf(text)["input_ids"] == from_file(text)["input_ids"] == expected, text
        assert converted(text)["input_ids"] == expected, text


def test_smollm2_cuts_as_its_own_file(tmp_path: Path) -> None:
    from gguf_files import smollm2

    metadata = smollm2()._metadata
    file = published(metadata, "smollm")
    file.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>"})
    write(tmp_path, "config.json", {"model_type": "llama"})
    from_file, from_gguf = tide_jax.load_tokenizer(tmp_path), smollm2().load_tokenizer()
    assert from_file.tokenize("Steps:\n\n1.") == ["Steps", ":", "ĊĊ", "1", "."]
    for text in odd_texts():
        assert from_file(text)["input_ids"] == from_gguf(text)["input_ids"] == file.encode(text).ids, text


# --------------------------------------------------------------------------------- what tokenizer_config.json decides


@pytest.mark.parametrize("kind", ["smollm", "llama2", "words"])
@pytest.mark.parametrize("begin", [None, False, True])
@pytest.mark.parametrize("end", [None, False, True])
def test_ends_are_those_asked_for(kind: str, begin: bool | None, end: bool | None, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    for written in ("", "<s>:0 ", "<|im_start|>:0 "):
        save_tokenizer(tmp_path, kind)
        file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ids = {token: file.token_to_id(token) for token in SPECIALS}
        plain = file.encode("the tide").ids
        file.post_processor = TemplateProcessing(single=f"{written}$A:0", special_tokens=list(ids.items()))
        file.save(str(tmp_path / "tokenizer.json"))
        before = file.encode("the tide").ids[: len(file.encode("the tide").ids) - len(plain)]
        settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": begin, "add_eos_token": end}
        write(tmp_path, "tokenizer_config.json", settings)
        bos = ids["<s>"]
        if begin is not None and (before[:1] == [bos]) != begin:
            before = [bos, *before] if begin else before[1:]
        after = [ids["</s>"]] if end else []
        tokenizer = tide_jax.load_tokenizer(tmp_path)
        assert tokenizer("the tide")["input_ids"] == [*before, *plain, *after]
        assert tokenizer("the tide", add_special_tokens=False)["input_ids"] == plain
        pair = tokenizer("the tide", "the tide")["input_ids"]
        assert (len(pair) - 2 * len(plain)) % max(1, len(before) + len(after)) == 0
        tokenizer.save_pretrained(tmp_path / "saved")
        assert tide_jax.load_tokenizer(tmp_path / "saved")("the tide")["input_ids"] == [*before, *plain, *after]


def test_roles_sides_and_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "smollm")
    size = len(tide_jax.load_tokenizer(tmp_path))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_start|>", "lstrip": False},
        "pad_token": "<new>",
        "additional_special_tokens": ["<unk>", "tide"],
        "image_token": "<image>",
        "padding_side": "left",
        "model_max_length": 77,
        "chat_template": "from the settings",
        "added_tokens_decoder": {str(size): {"content": "<declared>", "special": False}},
    }
    write(tmp_path, "tokenizer_config.json", settings)
    tokenizer = tide_jax.load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token) == (1, 4, None)
    assert tokenizer.convert_tokens_to_ids(["<declared>", "<new>"]) == [size, size + 1]
    assert tokenizer.pad_token_id == size + 1
    assert tokenizer.extra_special_tokens == ["<unk>", "tide"]
    assert {1, 4, size + 1} <= set(tokenizer.all_special_ids)
    assert (
        tokenizer.decode(tokenizer("<s>a<declared>tide<new>")["input_ids"], skip_special_tokens=True) == "a<declared>"
    )
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
    assert tokenizer.chat_template == "from the settings"
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert tide_jax.load_tokenizer(tmp_path).chat_template == "from the file"


def test_older_files_name_the_special_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "smollm")
    size = len(tide_jax.load_tokenizer(tmp_path))
    write(tmp_path, "special_tokens_map.json", {"eos_token": {"content": "</s>", "lstrip": False}})
    write(tmp_path, "added_tokens.json", {"<tool>": size, "<elsewhere>": size + 7})
    tokenizer = tide_jax.load_tokenizer(tmp_path)
    assert tokenizer.eos_token_id == 2
    assert tokenizer.convert_tokens_to_ids("<tool>") == size
    assert len(tokenizer) == size + 1


# -------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read as a tokenizer"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json cannot be read as a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a JSON list"),
        ("tokenizer_config.json", '{"bos_token": 3}', "wrong value at bos_token"),
        ("tokenizer_config.json", '{"bos_token": {"content": null}}', "wrong value at bos_token"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "wrong value at add_bos_token"),
        ("tokenizer_config.json", '{"padding_side": "middle"}', "wrong value at padding_side"),
        ("tokenizer_config.json", '{"model_max_length": -4}', "wrong value at model_max_length"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "wrong value at added_tokens_decoder"),
        ("tokenizer_config.json", '{"extra_special_tokens": 5}', "wrong value at extra_special_tokens"),
        ("special_tokens_map.json", '{"eos_token": []}', "wrong value at eos_token"),
    ],
)
def test_damaged_files_are_one_line(name: str, content: str, expected: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "gpt2")
    (tmp_path / name).write_text(content)
    with pytest.raises(TideError, match=expected) as caught:
        tide_jax.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_folder_without_a_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    """transformers makes a tokenizer of one special token of these."""
    for model_type in ("llama", "qwen2", "gpt2", "t5"):
        write(tmp_path, "config.json", {"model_type": model_type})
        with pytest.raises(TideError, match=r"put (its )?tokenizer\.json there"):
            tide_jax.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "packages"), [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_other_vocabularies_say_what_to_install(
    content: bytes, packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(content)
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(TideError, match=f"tokenizer.model, which needs .*pip install {packages}"):
        tide_jax.load_tokenizer(tmp_path)


def test_tokenizers_alone(tmp_path: Path) -> None:
    """Folders and GGUF files that hold a tokenizer and no model."""
    from gguf import GGUFWriter
    from test_gguf_tokenizer import add_metadata

    assert tide_jax.load_tokenizer(save_tokenizer(tmp_path / "folder", "gpt2")).decode([5]) == "!"
    writer = GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    add_metadata(writer, sentencepiece_metadata())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert tide_jax.load_tokenizer(tmp_path / "vocabulary.gguf").convert_ids_to_tokens(1) == "<s>"


# ------------------------------------------------------------------------------------- code that a checkpoint brings

_CODE = """
import pathlib
pathlib.Path(__file__).with_name("it_ran").touch()
from transformers import PreTrainedTokenizerFast
class TideTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["own.TideTokenizer", None]}, ["own.TideTokenizer", None]])
@pytest.mark.parametrize("named", ["TideTokenizer", "LlamaTokenizer"])
def test_code_of_a_checkpoint_is_not_run(
    auto_map: Any, named: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does anything ask on the terminal whether to run it, where somebody might type y."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    (source / "own.py").write_text(_CODE)
    write(source, "tokenizer_config.json", {"tokenizer_class": named, "auto_map": auto_map})
    convert(source, tmp_path / "out")
    for place in (source, tmp_path / "out"):
        with pytest.raises(TideError, match=r"tokenizer\.json there") as caught:
            tide_jax.load_tokenizer(place)
        assert len(str(caught.value)) <= 300 + len(str(place))
        save_tokenizer(place, "gpt2")
        assert tide_jax.load_tokenizer(place).tokenize("tide")
        assert not (place / "it_ran").exists()
    assert asked == []
