"""Checkpoints in GGUF, llama.cpp's file format, read one tensor at a time.

`GGUFSource` shows such a file as a Hugging Face checkpoint: configuration, tensor names, orientation and tokenizer.
An architecture is one entry of `ARCHITECTURES`. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from convert import gguf_tokenizer
from tide_jax.errors import TideError
from tide_jax.shards import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# numpy dtypes of the value types 0 to 7 and 10 to 12; 8 is a string, 9 an array.
_SCALAR_DTYPES = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8")
_SCALARS = dict(zip((*range(8), 10, 11, 12), _SCALAR_DTYPES, strict=True))


# ---------------------------------------------------------------------------------------------------- the file format


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file: torch shape, storage type, absolute offset and size in bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class _Cursor:
    """Reads little-endian values one after the other; raises ValueError where the file ends too early."""

    def __init__(self, data: np.ndarray, position: int) -> None:
        self.data = data
        self.position = position

    def values(self, dtype: str, count: int) -> np.ndarray:
        raw = self.take(count * np.dtype(dtype).itemsize)
        return np.frombuffer(raw, dtype)

    def take(self, size: int) -> bytes:
        if self.position + size > len(self.data):
            raise ValueError("it ends inside its header")
        raw = self.data[self.position : self.position + size].tobytes()
        self.position += size
        return raw

    def integer(self, width: int = 4) -> int:
        return int.from_bytes(self.take(width), "little")

    def string(self) -> str:
        return self.take(self.integer(8)).decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.FLOAT32:
            # The shortest decimal of this float32 is the number that was meant: 1e-05, not 9.999999747378752e-06.
            return float(str(self.values("<f4", 1)[0]))
        if kind != GGUFValueType.ARRAY:
            return self.values(_SCALARS[kind], 1).item()
        item, count = GGUFValueType(self.integer()), self.integer(8)
        if item == GGUFValueType.ARRAY:
            raise ValueError("it holds an array of arrays")
        if item == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return self.values(_SCALARS[item], count).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, torch shape, number of the storage type, and offset from the start of the data section."""
        name = self.string()
        extents = self.values("<u8", self.integer()).tolist()
        return name, tuple(reversed(extents)), self.integer(), self.integer(8)


def _map_file(path: Path) -> np.ndarray:
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise TideError(f"{path} can't be read ({error}); expected a GGUF file: check the path") from error
    magic = data[:4].tobytes()
    if magic != b"GGUF":
        raise TideError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'; check the path")
    version = int.from_bytes(data[4:8].tobytes(), "little")
    if version not in (2, 3):
        raise TideError(
            f"{path} is GGUF version {version}, expected 2 or 3 in little-endian order: convert the model again"
        )
    return data


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Key-value pairs and tensor locations. Raises TideError for anything but a whole GGUF file."""
    data = _map_file(path)
    cursor = _Cursor(data, position=8)
    try:
        tensor_count, pair_count = cursor.integer(8), cursor.integer(8)
        metadata = {}
        for _ in range(pair_count):
            key = cursor.string()
            metadata[key] = cursor.value(GGUFValueType(cursor.integer()))
        headers = [cursor.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        start = math.ceil(cursor.position / alignment) * alignment
    except (ValueError, TypeError, ArithmeticError) as error:
        raise TideError(
            f"{path} is truncated or damaged ({error}), expected a whole GGUF file: get it again"
        ) from error
    tensors = {
        name: _locate(path, name, shape, kind, start + offset, len(data)) for name, shape, kind, offset in headers
    }
    return metadata, tensors


def _locate(path: Path, name: str, shape: tuple[int, ...], number: int, offset: int, file_size: int) -> _Stored:
    kind = _storage_type(path, name, number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise TideError(
            f"{path} is damaged: tensor {name} of shape {shape} can't be {kind.name}, blocks of {block}: get it again"
        )
    size = math.prod(shape) // block * block_bytes
    if offset + size > file_size:
        raise TideError(
            f"{path} is truncated: tensor {name} ends at byte {offset + size}, the file at {file_size}: get it again"
        )
    return _Stored(shape, kind, offset, size)


def _storage_type(path: Path, name: str, number: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(number)
        if kind not in _PLAIN:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise TideError(
            f"{path}: tensor {name} is stored as {_type_name(number)}, which can't be dequantised; "
            "expected F32, F16, BF16 or a quantisation such as Q8_0 or Q4_K: use another file of this model"
        ) from error
    return kind


def _type_name(number: int) -> str:
    known = {kind.value: kind.name for kind in GGMLQuantizationType}
    return known.get(number, f"type {number}")


def _load(path: Path, stored: _Stored) -> np.ndarray:
    """One tensor: as it is stored if that is floating point, else dequantised to float32."""
    # A plain read: mapped pages would count as memory used, and only one tensor at a time is to be held.
    raw = np.fromfile(path, np.uint8, stored.size, offset=stored.offset)
    if stored.kind in _PLAIN:
        return raw.view(_PLAIN[stored.kind]).reshape(stored.shape)
    return dequantize(raw.reshape(*stored.shape[:-1], -1), stored.kind)


# ----------------------------------------------------------------------------------------------------- architectures


class _Hyperparameters:
    """The file's `<architecture>.*` values, each taken once, so that what nobody took is known."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.path = path
        prefix = f"{architecture}."
        self.architecture = architecture
        self._left = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}

    def take(self, key: str, default: Any = None) -> Any:
        """A value, one number where the file lists the same one for each layer; TideError where they differ."""
        value = self._left.pop(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.refuse(f"{key} differs between layers, expected one value")
        return value[0]

    def need(self, key: str) -> Any:
        value = self.take(key)
        if value is None:
            raise TideError(f"{self.path} lacks {self.architecture}.{key}, expected in every such file: get it again")
        return value

    def refuse(self, what: str) -> TideError:
        return TideError(f"{self.path}: {self.architecture}.{what}; use the model's Hugging Face checkpoint instead")

    def check_all_taken(self) -> None:
        if self._left:
            raise self.refuse(f"{', '.join(sorted(self._left))}: not supported, expected only known settings")


def _decoder_config(hp: _Hyperparameters, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """The part of a Hugging Face config.json that Llama and its relatives share."""
    if experts := hp.take("expert_count", 0):
        raise hp.refuse(f"expert_count={experts}: mixtures of experts are not supported in GGUF")
    hidden, heads = hp.need("embedding_length"), hp.need("attention.head_count")
    head_dim = hp.take("attention.key_length", hidden // heads)
    context = hp.need("context_length")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := hp.take(key, head_dim)) != head_dim:
            raise hp.refuse(f"{key}={width}: expected the head width {head_dim}")
    if (window := hp.take("attention.sliding_window", 0)) and window < context:
        raise hp.refuse(f"attention.sliding_window={window}: not supported, expected attention to all tokens")
    if not hp.take("attention.causal", True):
        raise hp.refuse("attention.causal=false: expected a decoder")
    for key in ("expert_used_count", "vocab_size", "tensor_data_layout"):
        hp.take(key)
    config = {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": hp.need("feed_forward_length"),
        "num_hidden_layers": hp.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": hp.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": hp.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "rope_parameters": _rope(hp, rope_factors, head_dim),
    }
    hp.check_all_taken()
    return config


def _rope(hp: _Hyperparameters, factors: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": hp.take("rope.freq_base", 10000.0)}
    hp.take("rope.scaling.finetuned")
    factor = hp.take("rope.scaling.factor", hp.take("rope.scale_linear", 1.0))
    # llama.cpp reads a factor without a type as linear.
    kind = hp.take("rope.scaling.type", "linear")
    original = hp.take("rope.scaling.original_context_length")
    if factors is not None and not np.all(factors == 1.0):
        if factor not in (0.0, 1.0):
            raise hp.refuse(f"rope.scaling.factor={factor}: not supported together with rope_freqs.weight")
        return rope | _llama3(hp, rope["rope_theta"], factors, head_dim, original or 8192)
    if kind == "none" or factor in (0.0, 1.0):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        betas = {name: hp.take(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        given = {name: value for name, value in betas.items() if value is not None}
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **given,
        }
    raise hp.refuse(
        f"rope.scaling.type={kind!r}: not supported, expected none, linear or yarn with original_context_length"
    )


def _llama3(hp: _Hyperparameters, theta: float, factors: np.ndarray, head_dim: int, original: int) -> dict[str, Any]:
    """The parameters of Llama 3.1's rotary scaling that lead to the divisors [head_dim / 2] in `rope_freqs.weight`.

    Only the stretch factor differs between published models; the band edges are always 1 and 4. Raises TideError
    for divisors that no stretch factor explains.
    """
    low, high, factor = 1.0, 4.0, float(str(np.float32(factors.max())))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - kept) / factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise hp.refuse("rope: rope_freqs.weight doesn't follow Llama 3's rotary scaling, expected such factors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture maps to a Hugging Face model.

    Attributes:
      model_class: the transformers class, for `architectures`.
      config: hyperparameters and rotary divisors -> config.json without vocabulary and token ids.
      block: GGUF module name inside `blk.N.` -> Hugging Face module name inside `model.layers.N.`.
      permuted: llama.cpp reordered the rows of q and k, from halves that rotate together to neighbours.
    """

    model_class: str
    config: Callable[[_Hyperparameters, np.ndarray | None], dict[str, Any]]
    block: Mapping[str, str]
    permuted: bool = False


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _decoder_config, _BLOCK, permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", _decoder_config, _BLOCK),
    "qwen3": Architecture("Qwen3ForCausalLM", _decoder_config, _BLOCK | _QK_NORM),
}


# ------------------------------------------------------------------------------------------------------------- source


class GGUFSource:
    """A GGUF file seen as a Hugging Face checkpoint; see `convert.reader.Source`.

    Attributes:
      description: file, architecture and storage types.
      config: config.json of the matching transformers model.
      generation_config: token ids to begin, end and pad with.
      tensors: shape (torch's ``[out, in]``) and dtype name of what `read` returns, under Hugging Face names.
      files: the one file.

    Raises:
      TideError: not a GGUF file, damaged, one part of many, or of an architecture or quantisation not supported.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.files = [path]
        self._metadata, stored = _read_header(path)
        name, architecture = _architecture(path, self._metadata)
        factors = stored.pop("rope_freqs.weight", None)
        self._stored = {_hugging_face_name(path, name, key): value for key, value in stored.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(value.shape, value.kind.name if value.kind in _PLAIN else "F32")
            for key, value in self._stored.items()
        }
        hyperparameters = _Hyperparameters(path, name, self._metadata)
        divisors = None if factors is None else _load(path, factors)
        try:
            self.config = architecture.config(hyperparameters, divisors)
            self.generation_config = gguf_tokenizer.token_ids(self._metadata)
        except (TypeError, ArithmeticError) as error:  # a string for a number, no heads at all
            raise TideError(
                f"{path} has senseless metadata ({error}), expected a language model: get it again"
            ) from error
        self.config |= self._vocabulary_config(path) | self.generation_config
        self.config |= {"model_type": name, "architectures": [architecture.model_class]}
        self._row_heads = self._permuted_heads() if architecture.permuted else {}
        kinds = sorted({value.kind.name for value in stored.values()})
        self.description = f"{path} (GGUF, {name}, {len(self.tensors)} tensors in {', '.join(kinds)})"

    def read(self, name: str) -> np.ndarray:
        """One tensor, freshly read: float32, float16 or bfloat16 as stored, float32 if it was quantised.

        Raises:
          TideError: the file has no tensor of that name.
        """
        if name not in self._stored:
            raise TideError(f"{self.files[0]} has no tensor {name}, expected one of its {len(self.tensors)} names")
        tensor = _load(self.files[0], self._stored[name])
        heads = self._row_heads.get(name.split(".", 3)[-1])
        return tensor if heads is None else _halves_from_neighbours(tensor, heads)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer in the file. Raises TideError where its kind is not supported."""
        return gguf_tokenizer.load_tokenizer(self._metadata, self.config["max_position_embeddings"])

    def write_side_files(self, directory: Path) -> None:
        """Writes tokenizer files and generation_config.json. Raises TideError as `load_tokenizer` does."""
        self.load_tokenizer().save_pretrained(directory)
        text = json.dumps(self.generation_config, indent=2) + "\n"
        (directory / "generation_config.json").write_text(text, encoding="utf-8")

    def _vocabulary_config(self, path: Path) -> dict[str, Any]:
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise TideError(f"{path} has no token_embd.weight, expected a whole language model: get another file")
        return {
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self.tensors,
        }

    def _permuted_heads(self) -> dict[str, int]:
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        return {f"self_attn.{name}.{kind}": count for name, count in heads.items() for kind in ("weight", "bias")}


def _architecture(path: Path, metadata: Mapping[str, Any]) -> tuple[str, Architecture]:
    if (parts := metadata.get("split.count", 1)) > 1:
        raise TideError(
            f"{path} is one of {parts} parts, expected a whole model: join them with llama-gguf-split --merge"
        )
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise TideError(
            f"{path} has the GGUF architecture {name!r}, supported are {', '.join(ARCHITECTURES)}; "
            "use the model's Hugging Face checkpoint instead"
        )
    return name, ARCHITECTURES[name]


def _hugging_face_name(path: Path, architecture: str, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    number, _, module = rest.partition(".")
    block = ARCHITECTURES[architecture].block
    if prefix != "blk" or module not in block:
        raise TideError(
            f"{path}: tensor {name} is not known in the architecture {architecture}; "
            "use the model's Hugging Face checkpoint instead"
        )
    return f"model.layers.{number}.{block[module]}.{kind}"


def _halves_from_neighbours(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k: rows [heads, half, 2] back to [heads, 2, half], flattened.

    llama.cpp rotates neighbouring rows of a head together, transformers row i with row ``i + half``.
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
