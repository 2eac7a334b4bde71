"""Damages checkpoint files with one seeded generator: bytes, JSON, safetensors, GGUF, templates, mixed files."""

from __future__ import annotations

import copy
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Change = Callable[[Random, bytes], bytes]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, math.inf, -math.inf, math.nan),
    *(2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63)),
    *("", "0", "1", "64", "nan", "llama", "gpt2", "../../etc/passwd", "/etc/passwd", "x" * 100_000, "\u0000", "\ud83d"),
    *([], {}, [[]], [0], [-1], [None], ["a"], {"": None}, {"a": {"b": 1}}, [1] * 5000),
)
"""Replacement values: other types, signs and sizes, and values that are not numbers."""
KEYS = (
    *("partial_rotary_factor", "hidden_activation", "rms_norm_eps", "head_dim", "sliding_window", "rope_scaling"),
    *("rope_theta", "rope_parameters", "tie_word_embeddings", "is_causal", "layer_types", "attention_bias", "auto_map"),
    *("eos_token_id", "quantization_config", "architectures", "model_type", "num_local_experts", "text_config"),
)
TEMPLATES = (
    *("{{ messages }", "{% for m in messages %}", "{% raise %}", "{{ undefined.of.nothing }}", "{{ 1 / 0 }}"),
    "{{ raise_exception('no ' * 500) }}",
    "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | tojson | length }}",
    "{{ messages[9].content }}",
    "(" * 3000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
)
_INTEGERS = (0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
_NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, -1e30, 65504.0, 1e-30)


def mutate(rng: Random, folder: Path, others: list[Path]) -> str:
    """Changes one or two files of a folder in place; returns which and how.

    Args:
      rng: source of every choice.
      folder: a checkpoint.
      others: folders to take a file from.
    """
    told = []
    for _ in range(1 if rng.random() < 0.85 else 2):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            break
        told.append(_mutate_file(rng, rng.choice(files), folder, others))
    return "; ".join(told)


def _mutate_file(rng: Random, file: Path, folder: Path, others: list[Path]) -> str:
    if rng.random() < 0.06:
        return _mix(rng, file, folder, others)
    name, change = rng.choice(list(_changes(file)))
    file.write_bytes(change(rng, file.read_bytes()))
    return f"{file.relative_to(folder)}: {name}"


def _mix(rng: Random, file: Path, folder: Path, others: list[Path]) -> str:
    """Removes a file, or replaces it by another checkpoint's."""
    found = [path for other in others for path in sorted(other.rglob(file.name)) if path.is_file()]
    if not found or rng.random() < 0.3:
        file.unlink()
        return f"{file.relative_to(folder)}: removed"
    chosen = rng.choice(found)
    shutil.copyfile(chosen, file)
    return f"{file.relative_to(folder)}: that of {chosen.parent.name}"


def _changes(file: Path) -> Iterator[tuple[str, Change]]:
    """Yields names and changes for a file; those of its format come several times, to outnumber plain byte changes."""
    yield from BYTES.items()
    if file.suffix == ".json":
        for _ in range(3):
            yield from JSON.items()
    if file.suffix == ".safetensors":
        for _ in range(2):
            yield from SAFETENSORS.items()
    if file.suffix == ".gguf":
        for _ in range(3):
            yield from GGUF.items()
    if file.suffix == ".jinja":
        yield "hostile template", lambda rng, _: rng.choice(TEMPLATES).encode()
    if file.name == "tokenizer_config.json":
        for _ in range(4):
            yield "hostile template", _hostile_template


# ---- bytes ----


def flip_bits(rng: Random, data: bytes) -> bytes:
    """Flips one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: Random, data: bytes) -> bytes:
    """Cuts the file short."""
    return data[: rng.randrange(len(data) + 1)]


def overwrite(rng: Random, data: bytes) -> bytes:
    """Overwrites a stretch with zeros, ones or noise."""
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 64, 1024))
    fill = rng.choice((b"\0" * size, b"\xff" * size, rng.randbytes(size)))
    return data[:start] + fill[: max(0, len(data) - start)] + data[start + size :]


def insert(rng: Random, data: bytes) -> bytes:
    """Inserts a stretch, from the file itself or random."""
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 3, 16, 256))
    begin = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice((rng.randbytes(size), data[begin : begin + size])) + data[start:]


BYTES: dict[str, Change] = {"bits": flip_bits, "cut": truncate, "overwritten": overwrite, "inserted": insert}


# ---- JSON ----


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every container in a value with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def change_value(rng: Random, value: Any) -> None:
    """Removes, replaces, renames or retypes one item of a JSON value, in place."""
    places = list(_places(value))[:20_000]
    if not places:
        return
    container, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[rng.choice(KEYS)] = rng.choice(VALUES)
    elif how == 2:
        other, name = rng.choice(places)
        container[key] = copy.deepcopy(other[name])
    elif how == 3 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
        container[key] = _other_number(rng, container[key])
    elif how == 4:
        container[key] = rng.choice((str(container[key])[:1000], [container[key]], {"value": container[key]}))
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))


def _other_number(rng: Random, number: float) -> float:
    return rng.choice((-number, number + 1, number - 1, number * 2, number * 1_000_003, number / 3, float(number)))


def _changed_json(rng: Random, data: bytes) -> bytes:
    try:
        value = json.loads(data)
        change_value(rng, value)
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # already broken or nested too deep
        return flip_bits(rng, data)


def _nested(rng: Random, data: bytes) -> bytes:
    """Replaces the whole file or a value by brackets nested thousands deep."""
    depth = rng.choice((500, 2_000, 100_000))
    deep = rng.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth))
    colon = data.find(b":", rng.randrange(len(data) + 1))
    return deep if colon < 0 else data[: colon + 1] + deep + b"," + data[colon + 1 :]


def _duplicated(rng: Random, data: bytes) -> bytes:
    """Duplicates a key in the object."""
    start = data.find(b"{")
    keys = [part.split(b'"')[-2] for part in data.split(b":")[:-1] if part.count(b'"') >= 2]
    if start < 0 or not keys:
        return data
    value = json.dumps(rng.choice(VALUES)).encode("utf-8", "surrogatepass")
    return data[: start + 1] + b'"' + rng.choice(keys) + b'":' + value + b"," + data[start + 1 :]


JSON: dict[str, Change] = {"value": _changed_json, "nested": _nested, "key twice": _duplicated}


def _hostile_template(rng: Random, data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    template = rng.choice(TEMPLATES)
    named = [{"name": rng.choice(("default", "tool_use", 7)), "template": template}]
    value["chat_template"] = rng.choice((template, template, named, {"a": template}))
    return json.dumps(value).encode()


# ---- safetensors ----


def _with_header(change: Callable[[Random, Any], None]) -> Change:
    def run(rng: Random, data: bytes) -> bytes:
        try:
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
        except (ValueError, struct.error):
            return flip_bits(rng, data)
        change(rng, header)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return run


def _change_tensor(rng: Random, header: Any) -> None:
    """Changes a tensor's dtype, shape, offsets or name."""
    names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    if not names:
        return
    name, other = rng.choice(names), rng.choice(names)
    entry, how = header[name], rng.randrange(5)
    if how == 0:
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "BOOL", "C64", "", 7))
    elif how == 1 and isinstance(entry.get("shape"), list):
        entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [], [2**40, 2**40], [0], [-1]))
    elif how == 2:
        entry["data_offsets"] = rng.choice((header[other].get("data_offsets"), [0, 2**62], [-4, 4], [8, 0]))
    elif how == 3:
        header[name], header[other] = header[other], header[name]
    else:
        header[name + rng.choice(("", ".", ".weight", "x"))] = header.pop(name)


def _header_length(rng: Random, data: bytes) -> bytes:
    return struct.pack("<Q", rng.choice((*_INTEGERS, len(data), max(0, len(data) - 8)))) + data[8:]


def _weights(rng: Random, data: bytes) -> bytes:
    """Writes NaN, infinity or a far too large number into the body, or all over it."""
    start = 8 + struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    if not start < len(data) - 4:
        return flip_bits(rng, data)
    number = struct.pack("<f", rng.choice(_NUMBERS))
    count = rng.choice((1, 1, 4, (len(data) - start) // 4))
    at = start + 4 * rng.randrange(max(1, (len(data) - start) // 4 - count + 1))
    return data[:at] + number * count + data[at + 4 * count :]


SAFETENSORS: dict[str, Change] = {
    "header value": _with_header(change_value),
    "tensor": _with_header(_change_tensor),
    "header length": _header_length,
    "weights": _weights,
}


# ---- GGUF ----


def _gguf_integer(rng: Random, data: bytes) -> bytes:
    """Replaces a length, count, type or number in the first kilobytes."""
    kind = rng.choice(("<I", "<Q"))
    size = struct.calcsize(kind)
    at = rng.randrange(max(1, min(len(data), 4096) - size))
    return data[:at] + struct.pack(kind, rng.choice(_INTEGERS) % 2 ** (8 * size)) + data[at + size :]


def _gguf_metadata(rng: Random, data: bytes) -> bytes:
    """Replaces the type or value after a key, located by the end of the key's name."""
    names = (b"_count", b"_length", b"_eps", b"_base", b"_epsilon", b"_rms_epsilon", b"head_count_kv", b"token_id")
    found = [i + len(name) for name in names if (i := data.find(name)) >= 0]
    if not found:
        return flip_bits(rng, data)
    at, kind = rng.choice(found), rng.randrange(3)
    if kind == 0:  # the type of the value
        return data[:at] + struct.pack("<I", rng.randrange(14)) + data[at + 4 :]
    value = struct.pack("<f", rng.choice(_NUMBERS)) if kind == 1 else struct.pack("<I", rng.choice(_INTEGERS) % 2**32)
    return data[: at + 4] + value + data[at + 8 :]


def _gguf_key(rng: Random, data: bytes) -> bytes:
    """Renames a key, so that it is missing."""
    names = [
        name for name in (b"llama.", b"qwen2.", b"gemma2.", b"tokenizer.ggml.", b"general.", b"blk.") if name in data
    ]
    if not names:
        return flip_bits(rng, data)
    name = rng.choice(names)
    starts = [i for i in range(len(data)) if data.startswith(name, i)][:200]
    at = rng.choice(starts) + len(name)
    return data[:at] + b"zz" + data[at + 2 :]


GGUF: dict[str, Change] = {"integer": _gguf_integer, "metadata": _gguf_metadata, "key": _gguf_key}
