"""Damaged headers of GGUF and safetensors files: one clear line, or the very numbers that were written."""

from __future__ import annotations

import json
import math
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
from gguf import GGUFValueType, GGUFWriter
from gguf_files import save
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from convert.architecture import architecture_of
from convert.conversion import _open
from convert.output.stored import to_model_layout
from convert.sources.gguf.file import read_header
from convert.weights.rules import plan_conversion
from tide_jax.errors import TideError

EXAMPLES = int(os.environ.get("TIDE_EXAMPLES", "150"))
some = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HIDDEN, VOCAB = 8, 12
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (4, HIDDEN),
    "blk.0.attn_v.weight": (4, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (10, HIDDEN),
    "blk.0.ffn_up.weight": (10, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, 10),
    "output_norm.weight": (HIDDEN,),
}


def write_gguf(path: Path, **changes: Any) -> None:
    """A llama of one layer, with a tokenizer, all in float32; `changes` replace values, None leaves them out."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(10)
    writer.add_head_count(2)
    writer.add_head_count_kv([1])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *"abcdefghi"])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3] + [1] * 9)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    for key, value in changes.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            kind = GGUFValueType.ARRAY if isinstance(value, list) else GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
    save(writer)


def write_safetensors(path: Path) -> None:
    """A llama's only weight file beside its config.json."""
    config = {"num_hidden_layers": 1}
    tiny_llama.save(path.parent, tiny_llama.random_tensors(tiny_llama.CONFIG | config), **config)


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "gguf": ("m.gguf", write_gguf),
    "safetensors": ("model.safetensors", write_safetensors),
}


class Written:
    """A whole file, and what opening it gives."""

    def __init__(self, kind: str, directory: Path) -> None:
        name, write = KINDS[kind]
        self.path = directory / name
        write(self.path)
        self.content = self.path.read_bytes()
        self.reference = self.path if kind == "gguf" else self.path.parent
        self.config: Any = None  # of what was accepted last: what is the same need not be looked at again
        self.infos: Any = None
        self.tensors = self.read()
        assert self.tensors is not None
        self.header = len(self.content) - sum(values.nbytes for values in self.tensors.values())

    def read(self) -> dict[str, np.ndarray] | None:
        """The tensors as a conversion reads them; None where the file is refused, in one line."""
        message, opened = "", False
        tensors = {}
        try:
            source = _open(self.reference)
            opened = True
            if source.config != self.config or source.tensors != self.infos:
                architecture = architecture_of(source)
                config = architecture.config
                to_model_layout(plan_conversion(source.tensors, architecture.rules, config), config)
                assert all(math.isfinite(number) for number in numbers_in(config.to_dict()))
            self.config, self.infos = source.config, source.tensors
            tensors = {name: source.read(name) for name in source.tensors}
            if self.path.suffix == ".gguf":
                source.load_tokenizer()
        except TideError as error:
            message = str(error)
        if message:
            assert len(message.splitlines()) == 1
            assert opened or len(message.replace(str(self.path.parent), "")) <= 300
            return None
        return tensors

    def changed(self, content: bytes | bytearray) -> bool:
        """Writes other bytes and reads them; whether they were accepted, with the same tensors."""
        self.path.write_bytes(content)
        found = self.read()
        if found is None:
            return False
        assert found.keys() == self.tensors.keys()
        for name, values in found.items():
            np.testing.assert_array_equal(values, self.tensors[name], err_msg=name)
        return True


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(request.param, tmp_path_factory.mktemp(request.param))


def test_every_byte_of_a_header(written: Written) -> None:
    """One bit of each byte, another one each run of eight; in thorough runs all eight."""
    accepted = 0
    bits = range(8) if EXAMPLES >= 1000 else range(1)
    for position in range(written.header):
        for bit in bits:
            damaged = bytearray(written.content)
            damaged[position] ^= 1 << (position + bit) % 8
            accepted += written.changed(damaged)
    assert accepted < written.header * len(bits)


edits = st.lists(
    st.tuples(st.sampled_from("soi"), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), max_size=4
)


@some
@given(edits=edits, cut=st.floats(0, 1.2))
@example(edits=[], cut=1.2)
def test_overwritten_inserted_and_missing_bytes(
    written: Written, edits: list[tuple[str, float, bytes]], cut: float
) -> None:
    content = bytearray(written.content)
    for how, place, piece in edits:
        at = int(place * (written.header - len(piece)))
        if how == "s":
            del content[at : at + len(piece)]
        else:
            content[at : at + (len(piece) if how == "o" else 0)] = piece
    content = content if cut > 1 else content[: int(cut * len(content))]
    written.changed(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "__metadata__", "new", "a\nb", "\ud800")


def with_header(content: bytes, text: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written("safetensors", tmp_path_factory.mktemp("shard"))


@some
@given(name=st.sampled_from(NAMES), field=st.sampled_from(("", "shape", "dtype", "data_offsets")), value=json_values)
def test_other_values_in_a_safetensors_header(shard: Written, name: str, field: str, value: Any) -> None:
    (length,) = struct.unpack("<Q", shard.content[:8])
    header = json.loads(shard.content[8 : 8 + length])
    if field and isinstance(header.get(name), dict):
        header[name][field] = value
    else:
        header[name] = value
    shard.changed(with_header(shard.content, json.dumps(header).encode()))


SENSELESS_HEADERS = {
    "deep": b'{"a":' * 100_000,
    "deep lists": b'{"a": ' + b"[" * 100_000,
    "twice": b'{"__metadata__":{"a":"b","a":"c"}}',
    "digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
    "axes": b'{"a":{"dtype":"F32","shape":[' + b"1," * 5000 + b'1],"data_offsets":[0,4]}}',
    "notes": b'{"__metadata__":{"format":7}}',
    "list": b"[]",
    "bytes": b"\xff\xfe",
}


@pytest.mark.parametrize("case", SENSELESS_HEADERS)
def test_senseless_safetensors_headers(shard: Written, case: str) -> None:
    assert not shard.changed(with_header(shard.content, SENSELESS_HEADERS[case]))


def test_a_gap_and_trailing_bytes_in_a_safetensors_file(shard: Written) -> None:
    assert not shard.changed(shard.content + b"\0" * 8)
    (length,) = struct.unpack("<Q", shard.content[:8])
    header = json.loads(shard.content[8 : 8 + length])
    for values in header.values():
        values["data_offsets"] = [place + 8 for place in values["data_offsets"]]
    longer = with_header(shard.content, json.dumps(header).encode())
    start = 8 + struct.unpack("<Q", longer[:8])[0]
    assert not shard.changed(longer[:start] + b"\0" * 8 + longer[start:])


def test_counts_are_checked_before_anything_is_allocated(written: Written) -> None:
    """Every number of four or eight bytes in a header, made huge."""
    tracemalloc.start()
    try:
        for width, value in ((4, 2**31 - 1), (8, 2**40), (8, 2**64 - 1)):
            for position in range(0, written.header - width, 4):
                damaged = bytearray(written.content)
                damaged[position : position + width] = value.to_bytes(width, "little")
                written.changed(damaged)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written("gguf", tmp_path_factory.mktemp("model"))


VALUES = (
    None,
    "",
    "x",
    "x" * 2000,
    "a\nb",
    ["a"],
    [1],
    [0.5],
    [math.nan],
    True,
    -1,
    2**31 - 1,
    0,
    0.5,
    math.nan,
    -math.inf,
)
OTHER_KEYS = (
    "general.alignment",
    "split.count",
    "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.unknown_token_id",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.dimension_count",
    "llama.attention.key_length",
    "llama.expert_count",
    "llama.nextn_predict_layers",
)


def test_other_values_of_gguf_keys(model: Written, tmp_path: Path) -> None:
    keys = [key for key in read_header(Written("gguf", tmp_path).path)[0] if not key.startswith("GGUF.")]
    for key in (*keys, *OTHER_KEYS):
        for value in VALUES:
            if key == "general.alignment" and type(value) is not int:
                continue  # the writer itself needs it
            write_gguf(model.path, **{key: value})
            model.changed(model.path.read_bytes())


def offset_field(content: bytes, name: str) -> int:
    """Where the offset of a tensor is written."""
    at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (axes,) = struct.unpack_from("<I", content, at)
    return at + 4 + 8 * axes + 4


@pytest.mark.parametrize("there", ["blk.0.attn_norm.weight", "blk.0.ffn_up.weight"])
def test_overlapping_gguf_tensors(model: Written, there: str) -> None:
    content = bytearray(model.content)
    theirs, ours = offset_field(model.content, there), offset_field(model.content, "blk.0.ffn_norm.weight")
    content[ours : ours + 8] = content[theirs : theirs + 8]
    model.path.write_bytes(content)
    with pytest.raises(TideError, match=r"is damaged: tensor blk\.0\.ffn_norm\.weight begins at byte \d+, expected"):
        _open(model.path)


def test_a_storage_type_of_which_less_would_do(model: Written) -> None:
    """Half of a short norm's bytes would pass for padding."""
    kind = offset_field(model.content, "output_norm.weight") - 4
    changed = bytearray(model.content)
    changed[kind] = 1  # float16
    assert not model.changed(changed)


def test_bytes_after_the_last_gguf_tensor(model: Written) -> None:
    assert not model.changed(model.content + b"\0" * 64)


def test_a_duplicate_gguf_tensor_name(model: Written) -> None:
    assert not model.changed(model.content.replace(b"blk.0.ffn_up", b"blk.0.attn_q"))
    assert not model.changed(model.content.replace(b"llama.context_length", b"llama.embedding_leng"))
