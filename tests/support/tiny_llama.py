"""A tiny Llama or Mixtral checkpoint on disk, made with numpy alone, for tests that break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import convert
from tide_jax.errors import TideError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 10,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "eos_token_id": [2, 5],
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the checkpoint of a configuration, Mixtral's where it has experts."""
    d, f, v, hd = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    if experts := config.get("num_local_experts"):
        moe = {"w1": (f, d), "w3": (f, d), "w2": (d, f)}
        layer["block_sparse_moe.gate"] = (experts, d)
        layer |= {f"block_sparse_moe.experts.{e}.{name}": shape for e in range(experts) for name, shape in moe.items()}
    else:
        layer |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    outside = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    layers = range(config["num_hidden_layers"])
    return outside | {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in layer.items()}


def random_tensors(config: dict[str, Any] = CONFIG, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights, a different number in every place."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes(config).items()}


def save(directory: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """Writes config.json and one safetensors file; a setting of None leaves it out of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in (CONFIG | config).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(random_tensors() if tensors is None else tensors, directory / "model.safetensors")
    return directory


def save_sharded(directory: Path, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """The same in two shards with an index."""
    save(directory)
    (directory / "model.safetensors").unlink()
    tensors = random_tensors() if tensors is None else tensors
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def refusal(*args: Any, **kwargs: Any) -> str:
    """The message `convert` refuses with; one line, and nothing is left behind."""
    destination = Path(kwargs.pop("destination", None) or Path(args[0]).parent / "out")
    with pytest.raises(TideError) as caught:
        convert(args[0], destination, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(destination.parent.glob(".*")), "a partial directory was left"
    return message
