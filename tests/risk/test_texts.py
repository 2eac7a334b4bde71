"""Where calibration text comes from."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from tide_jax import TideError
from tide_jax.testing import ByteTokenizer, tiny_config
from tide_jax.texts import load_texts, model_text_prompts, model_texts


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, records: list[Any]) -> str:
    return written(path, "\n".join(json.dumps(record) for record in records) + "\n\n")


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    assert list(load_texts(written(tmp_path / "a.txt", "été\n\n  \n two \nlast"))) == ["été", " two ", "last"]


def test_a_path_is_a_source(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "one")
    assert list(load_texts(tmp_path / "a.txt")) == ["one"]


@pytest.mark.parametrize("source", [None, 5, b"a.txt", ["a.txt"], "", "a\0.txt"])
def test_what_is_no_path_is_no_source(source: Any) -> None:
    with pytest.raises(TideError, match=r"text=.* must be a path"):
        load_texts(source)


def test_records_of_a_json_lines_file(tmp_path: Path) -> None:
    records: list[Any] = [
        {"id": 3, "text": "first"},
        {"content": "second"},
        {"question": "why?", "answer": "so"},
        {"question": "alone"},
        "bare",
        {"text": "  "},
    ]
    expected = ["first", "second", "why?\nso", "alone", "bare"]
    assert list(load_texts(jsonl(tmp_path / "a.jsonl", records))) == expected


def test_a_field_of_the_users_choice(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "no", "story": "yes"}])
    assert list(load_texts(source, field="story")) == ["yes"]
    with pytest.raises(TideError, match=r"line 1 has no text field tale; choose one of its fields: text, story"):
        next(load_texts(source, field="tale"))


def test_parquet(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.table({"number": [1, 2, 3], "text": ["one", "", "three"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(load_texts(str(tmp_path / "a.parquet"))) == ["one", "three"]
    with pytest.raises(TideError, match="no text field words"):
        next(load_texts(str(tmp_path / "a.parquet"), field="words"))
    with pytest.raises(TideError, match="the field number holds int, not text"):
        next(load_texts(str(tmp_path / "a.parquet"), field="number"))


def test_damaged_parquet(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(5000)]}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    damaged = written(tmp_path / "a.parquet", content[:4] + bytes(4000) + content[4004:])
    with pytest.raises(TideError, match="can't be read as") as caught:
        list(load_texts(damaged))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", None, "no text file at"),
        ("a.txt", "", "holds no text"),
        ("a.txt", "\n  \n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00bad", "can't be read as .txt"),
        ("a.jsonl", '{"text": "good"', "line 1 is not JSON"),
        ("a.jsonl", "[1, 2]\n", "holds list, expected an object"),
        ("a.jsonl", '{"number": 3}\n', "line 1 has no text field"),
        ("a.jsonl", '{"text": 5}\n', "line 1: the field text holds int, not text"),
        ("a.jsonl", "{}\n", "no text field; choose one of its fields: none"),
        ("a.parquet", b"no parquet at all", "can't be read as parquet"),
        ("a.csv", "text\n", "expected .txt, .jsonl or .parquet"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: str | bytes | None, expected: str) -> None:
    source = str(tmp_path / name) if content is None else written(tmp_path / name, content)
    with pytest.raises(TideError, match=expected) as caught:
        next(load_texts(source))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_hub_data_set_without_a_name() -> None:
    for source in ("hub:", "hub::config"):
        with pytest.raises(TideError, match=r"names no data set; expected hub:NAME"):
            load_texts(source)


def test_a_broken_line_is_reported_by_its_number(tmp_path: Path) -> None:
    texts = load_texts(written(tmp_path / "a.jsonl", '{"text": "good"}\n\n{"text": \n'))
    assert next(texts) == "good"
    with pytest.raises(TideError, match="line 3 is not JSON"):
        next(texts)


class ChatTokenizer(ByteTokenizer):
    """With a template, as instruction-tuned models have."""

    chat_template: Any = "<{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}>"

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ChatTokenizer()], ids=["plain", "chat"])
@pytest.mark.matrix
def test_a_model_writes_its_own_text(tokenizer: ByteTokenizer) -> None:
    model = tiny_model(tiny_config(num_layers=2))
    done: list[int] = []
    texts = model_texts(
        model, tokenizer, 5, max_length=90, batch_size=2, seed=3, progress=lambda stage, n, total: done.append(n)
    )
    assert len(texts) == 5
    assert done == [2, 4, 5]
    for sample in texts:
        assert 0 < sample.start < len(sample.ids) <= 90
        prompt = tokenizer.decode(sample.ids[: sample.start])
        chat = tokenizer.chat_template is not None
        assert prompt.startswith("<") == chat
        assert len(prompt) > 20 or not chat, "the question is in the prompt"
    again = model_texts(model, tokenizer, 5, max_length=90, batch_size=2, seed=3)
    assert [list(sample.ids) for sample in again] == [list(sample.ids) for sample in texts]
    other = model_texts(model, tokenizer, 5, max_length=90, batch_size=2, seed=4)
    assert [list(sample.ids) for sample in other] != [list(sample.ids) for sample in texts]
    with pytest.raises(TideError, match="max_length=2 leaves no room"):
        model_texts(model, tokenizer, 1, max_length=2)


def test_questions_are_in_the_template_of_the_users_choice() -> None:
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = {"default": "no words", "ask": "Q: {{ messages[0].content }} A:"}
    for prompt in itertools.islice(model_text_prompts(tokenizer, chat_template="ask"), 5):
        text = tokenizer.decode(prompt)
        assert re.fullmatch("Q: .{20,} A:", text)
    with pytest.raises(TideError, match="leaves out the user's words"):
        next(model_text_prompts(tokenizer))
    with pytest.raises(TideError, match="has no chat template"):
        next(model_text_prompts(ByteTokenizer(), chat_template="ask"))
