"""Checkpoints in GGUF, llama.cpp's file format, read one tensor at a time.

`GGUFSource` shows such a file as a Hugging Face checkpoint: configuration, tensor names, orientation and tokenizer.
An architecture is one entry of `ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import gguf_tokenizer
from convert.gguf_file import read_header, read_tensor
from tide_jax.errors import TideError
from tide_jax.shards import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        self._metadata, stored = read_header(path)
        name, architecture = _architecture(path, self._metadata)
        factors = stored.pop("rope_freqs.weight", None)
        self._stored = {_hugging_face_name(path, name, key): value for key, value in stored.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(value.shape, value.dtype) for key, value in self._stored.items()
        }
        hyperparameters = _Hyperparameters(path, name, self._metadata)
        divisors = None if factors is None else read_tensor(path, factors)
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
        tensor = read_tensor(self.files[0], self._stored[name])
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
