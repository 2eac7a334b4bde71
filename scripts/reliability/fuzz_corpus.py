"""Builds tiny intact checkpoints of every kind, with the tests' writers, for scripts that damage them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

KINDS: dict[str, str] = {
    "hf": "load",
    "tokenizer": "tokenizer",
    "gguf": "load",
    "converted": "load",
    "quantised": "load",
    "routers": "routers",
    "adapter": "adapter",
}
"""How to open each kind; see `fuzz_worker`."""
_FAMILIES = ("gemma3_text", "qwen3", "mixtral", "gpt2", "deepseek_v3", "gpt_oss")
_QUANTISED = (
    "gptq, activation order",
    "awq",
    "bitsandbytes, nf4 twice",
    "fp8, blocks cut off",
    "compressed, packed zeros",
)
_SETTINGS: dict[str, Any] = {"num_hidden_layers": 2, "n_layer": 2}


def build(directory: Path) -> None:
    """Writes ``directory/KIND/NAME`` for every kind; the base of routers and adapters is ``directory/base``."""
    directory.mkdir(parents=True, exist_ok=True)
    base = _llama(directory / "hf" / "llama")
    _sharded(directory / "hf" / "sharded")
    _families(directory / "hf")
    _tokenizer(directory / "tokenizer" / "bpe")
    _gguf(directory / "gguf")
    _quantised(directory / "quantised")
    _converted(base, directory)
    _adapter(base, directory)


def bpe() -> Any:
    """A small byte-level tokenizer with a chat template."""
    from test_gguf_tokenizer import bpe_metadata

    from convert.sources.gguf.tokenizer import load_tokenizer

    return load_tokenizer(bpe_metadata(), 64)


def _tokenizer(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    bpe().save_pretrained(directory)
    _json(directory / "config.json", {"model_type": "llama", "vocab_size": 320})
    _json(directory / "generation_config.json", {"eos_token_id": [2], "temperature": 0.6, "do_sample": True})


def _llama(directory: Path) -> Path:
    import tiny_llama

    settings = tiny_llama.CONFIG | {"vocab_size": 320, "max_position_embeddings": 64}
    tiny_llama.save(directory, tiny_llama.random_tensors(settings), **settings, rope_theta=500.0, rms_norm_eps=1e-5)
    bpe().save_pretrained(directory)
    _json(directory / "generation_config.json", {"eos_token_id": [2], "bos_token_id": 1, "repetition_penalty": 1.1})
    return directory


def _sharded(directory: Path) -> None:
    import tiny_llama

    tiny_llama.save_sharded(directory)


def _families(directory: Path) -> None:
    """Builds other architectures, if torch is installed."""
    try:
        import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return
    from convert.parity.tiny import save_tiny, tiny_config

    for name in _FAMILIES:
        fields = vars(tiny_config(name))
        save_tiny(name, directory / name, **_fewer_layers(fields))


def _fewer_layers(fields: dict[str, Any]) -> dict[str, Any]:
    fewer = {name: count for name, count in _SETTINGS.items() if name in fields}
    return fewer | ({"layer_types": fields["layer_types"][:2]} if fields.get("layer_types") else {})


def _gguf(directory: Path) -> None:
    from gguf_files import write_model
    from test_gguf_tokenizer import bpe_metadata, write_with_tokenizer

    makers: dict[str, Callable[[Path], Any]] = {
        "llama": lambda path: write_with_tokenizer(path, bpe_metadata()),
        "qwen2": lambda path: write_model(path, "qwen2", tied=False),
    }
    for name, make in makers.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        make(directory / name / "model.gguf")


def _quantised(directory: Path) -> None:
    from test_quantised import CASES, save

    for number, case in enumerate(_QUANTISED):
        quantise, settings, _ = CASES[case]
        save(directory / f"{number}-{settings.get('quant_method', 'other')}", quantise, settings)


def _converted(base: Path, directory: Path) -> None:
    import dataclasses

    import tide_jax
    from convert import convert
    from tide_jax.exits.router import RouterMetadata, model_identity
    from tide_jax.testing import random_routers

    convert(base, directory / "converted" / "llama")
    convert(directory / "hf" / "sharded", directory / "converted" / "sharded")
    convert(base, directory / "base")
    model = tide_jax.load(directory / "base")
    values = model_identity(model) | {"config": {"checkpoint_interval": 1}}
    for name, options in {"plain": {}, "affine": {"affine": True, "translator_rank": 2, "model": model}}.items():
        routers = random_routers(model.config, interval=1, **options)
        routers = dataclasses.replace(routers, metadata=RouterMetadata.from_dict(values))
        (directory / "routers" / name).mkdir(parents=True, exist_ok=True)
        routers.save(directory / "routers" / name / "routers.safetensors")


def _adapter(base: Path, directory: Path) -> None:
    from test_lora import Q, linear, pair, save_adapter

    config = json.loads((base / "config.json").read_text())
    a, b = pair(config["num_attention_heads"] * config["head_dim"], config["hidden_size"])
    (directory / "adapter").mkdir(parents=True, exist_ok=True)
    save_adapter(directory / "adapter" / "lora", {k: np.asarray(v) for k, v in linear(Q, a, b).items()})


def _json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
