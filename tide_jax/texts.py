"""Sources of calibration text: a file, a hub data set, or the model itself."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tide_jax.calibration.collect import Sample
from tide_jax.checks import path_like
from tide_jax.engine import TIDE
from tide_jax.errors import TideError, first_line
from tide_jax.model.decoder import Decoder
from tide_jax.tokenizer.chat import ChatTemplate

logger = logging.getLogger(__name__)

_FIELDS = ("text", "content", "question", "prompt", "document", "sentence")
_PARQUET_ROWS = 256  # rows decoded at once
_QUESTIONS = (
    "Explain {} to a curious child.",
    "Write a short story about {}.",
    "What are the advantages and disadvantages of {}?",
    "Give me five practical tips about {}.",
    "Summarise the history of {} in one paragraph.",
    "Write a friendly email to a colleague about {}.",
    "How does {} work? Answer step by step.",
    "What should a beginner know about {}?",
)
_TOPICS = (
    "volcanoes", "public libraries", "baking bread", "electric cars", "the Roman Empire", "learning a language",
    "the immune system", "chess", "recycling", "job interviews", "photosynthesis", "the stock market", "gardening",
    "black holes", "sleep", "Python programming", "the French Revolution", "running a marathon", "coral reefs",
    "solar energy", "jazz music", "saving money", "earthquakes", "time zones",
)  # fmt: skip
_OPENERS = ("The", "In", "It is", "One of the", "When", "A", "This", "After", "There are", "How to")


def load_texts(source: str | os.PathLike[str], *, field: str | None = None) -> Iterator[str]:
    """Texts from a local file (.txt: one per line; .jsonl; .parquet) or a hub data set, one at a time.

    Args:
      source: a path, or ``hub:NAME[:CONFIG[:SPLIT]]`` (split "train" by default, streamed).
      field: column or key with the text; by default the first of the usual names that is present.

    Raises:
      TideError: the file is missing, empty or not in the format of its suffix, or the data set can't be loaded.
    """
    path_like("text", source)  # "text" is the command line's name for it
    source = os.fspath(source)
    texts = _read_hub(source[4:], field) if source.startswith("hub:") else _read_file(Path(source).expanduser(), field)
    try:
        first = next(texts)
    except StopIteration:
        raise TideError(f"{source} holds no text; pass a file with at least one non-empty line or record") from None
    return itertools.chain([first], texts)


def model_texts(
    model: Decoder,
    tokenizer: Any,
    count: int,
    *,
    max_length: int = 256,
    batch_size: int = 8,
    temperature: float = 1.0,
    min_p: float = 0.1,
    seed: int = 0,
    chat_template: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Sample]:
    """Text that the model writes itself, as samples; this matches what it will run on when it generates.

    If the tokenizer has a chat template, the texts are answers to everyday questions, otherwise continuations of common
    openings. Prompts are marked as input only.

    Args:
      count: number of texts.
      max_length: tokens per text, prompt included.
      batch_size: texts generated at once.
      temperature, min_p: sampling; variety needs a temperature above 0.
      seed: determines all randomness.
      chat_template: name of the template for the questions if there are several; default: "default".

    Raises:
      TideError: `max_length` leaves no room, or the chat template cannot ask a question; see `tide_jax.tokenizer.chat`.
    """
    engine, key, batch_size = TIDE(model), jax.random.key(seed), min(batch_size, count)
    prompts = list(itertools.islice(model_text_prompts(tokenizer, seed=seed, chat_template=chat_template), count))
    texts: list[Sample] = []
    for start in range(0, count, batch_size):
        batch = prompts[start : start + batch_size]
        count_in_batch = len(batch)
        batch += batch[:1] * (batch_size - count_in_batch)  # pads the last batch, so that all have one compiled shape
        max_new_tokens = max_length - max(len(p) for p in batch)
        if max_new_tokens < 1:
            raise TideError(f"max_length={max_length} leaves no room after the prompts; raise it")
        out = engine.generate(
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=0,  # for variety, override the checkpoint's own dials
            top_p=1.0,
            min_p=min_p,
            key=jax.random.fold_in(key, start),
        )
        for prompt, tokens, length in zip(batch[:count_in_batch], out.tokens, out.lengths, strict=False):
            texts.append(Sample([*prompt, *(int(t) for t in tokens[:length])], start=len(prompt)))
        if progress is not None:
            progress("model writes its own text", len(texts), count)
    return texts


def model_text_prompts(tokenizer: Any, *, seed: int = 0, chat_template: str | None = None) -> Iterator[list[int]]:
    """Endless token ids of prompts that `model_texts` lets a model answer or continue."""
    rng = np.random.default_rng(seed)
    if chat_template is not None or getattr(tokenizer, "chat_template", None):
        template = ChatTemplate(tokenizer, chat_template)
        pairs = [question.format(topic) for question in _QUESTIONS for topic in _TOPICS]
        while True:
            for i in rng.permutation(len(pairs)):
                yield template.ids(pairs[i])
    while True:
        for i in rng.permutation(len(_OPENERS)):
            yield list(tokenizer(_OPENERS[i])["input_ids"])


def _read_file(path: Path, field: str | None) -> Iterator[str]:
    readers = {".txt": _read_lines, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise TideError(f"{path} is not a text source: expected .txt, .jsonl or .parquet, or hub:NAME for a data set")
    if not path.is_file():
        raise TideError(f"there is no text file at {path}; check the path")
    try:
        yield from (text for text in readers[path.suffix](path, field) if text.strip())
    except (UnicodeDecodeError, OSError) as error:
        raise TideError(f"{path} can't be read as {path.suffix} text ({first_line(error)})") from error


def _read_lines(path: Path, field: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file)


def _read_json_lines(path: Path, field: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
                raise TideError(f"{path} line {number} is not JSON ({error}); correct the line") from error
            yield record if isinstance(record, str) else _record_text(record, field, f"{path} line {number}")


def _read_parquet(path: Path, field: str | None) -> Iterator[str]:
    import pyarrow  # slow to import, and only needed here
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                yield from (_record_text(row, field, str(path)) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise TideError(f"{path} can't be read as parquet ({first_line(error)})") from error


def _read_hub(name: str, field: str | None) -> Iterator[str]:
    import datasets

    repository, config, split = (*name.split(":"), "", "")[:3]
    if not repository:
        raise TideError("hub: names no data set; expected hub:NAME[:CONFIG[:SPLIT]]")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        for row in rows:
            if (text := _record_text(row, field, name)).strip():
                yield text
    except (OSError, ValueError) as error:
        if isinstance(error, TideError):
            raise
        raise TideError(f"data set {name} can't be loaded ({first_line(error)}); pass a local file") from error


def _record_text(record: Any, field: str | None, where: str) -> str:
    if not isinstance(record, dict):
        raise TideError(f"{where} holds {type(record).__name__}, expected an object with a text field")
    usual = [name for name in _FIELDS if name in record]
    name = field or next((name for name in usual if isinstance(record[name], str)), usual[0] if usual else None)
    if name is None or name not in record:
        missing = f"text field {field}" if field else "text field"
        raise TideError(f"{where} has no {missing}; choose one of its fields: {', '.join(map(str, record)) or 'none'}")
    if not isinstance(record[name], str):
        raise TideError(
            f"{where}: the field {name} holds {type(record[name]).__name__}, not text; choose another field"
        )
    if name == "question" and isinstance(record.get("answer"), str):
        return f"{record['question']}\n{record['answer']}"
    return record[name]
