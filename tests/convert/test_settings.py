"""Which keys of a config.json are obeyed: those that transformers' model reads, and no others."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from convert import open_model
from convert.architecture import decoder_config
from convert.configuration.undeclared import HEAD_DIM, HEAD_DIM_OF_ROTATION
from convert.families import FAMILIES
from convert.parity.measure import measure_parity
from convert.parity.reference import random_batch
from convert.parity.tiny import VOCAB, _random_model, save_tiny, tiny_config
from convert.verify import TOLERANCE
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig

torch = pytest.importorskip("torch")

TYPES = [model_type for model_type in FAMILIES if not model_type.endswith("_vl_text")]  # models of their own
_WORDS = re.compile(r"\w+")
_CODE = Path(__file__).parents[2] / "convert"
_READERS = [_CODE / "configuration" / "rope.py", *_CODE.glob("families/*.py")]
READ_HERE = {word for path in _READERS for word in _WORDS.findall(path.read_text(encoding="utf-8"))}
"""Every word in the code that reads configurations: a key that is none of them cannot be obeyed."""
KNOWN = {name for kind in FAMILIES for name in vars(CONFIG_MAPPING[kind]()) if name in READ_HERE}
MEANT = {
    "attention_chunk_size",
    "clip_qkv",
    "decoder_vocab_size",
    "dtype",
    "first_k_dense_replace",
    "head_dim",
    "layer_types",
    "mlp_layer_types",
    "model_type",
    "moe_shared_expert_intermediate_size",
    "n_embed",
    "num_experts",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_theta",
    "rotary_dim",
    "torch_dtype",
}
"""Keys that transformers' classes understand without declaring them: they check them, or turn them into others."""
HARMLESS = {
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "_heterogeneity_spec",
    "_is_quantized",
    "_name_or_path",
    "_output_attentions",
    "_rope_type_labels",
    "attention_chunk_size",
    "auto_map",
    "decoder",
    "generator",
    "gradient_checkpointing",
    "init_std",
    "initializer_factor",
    "initializer_range",
    "is_causal",
    "kv_sharing_modes",
    "layer_types",
    "nemo_final_size",
    "number_of_conv_states",
    "output_cross_attentions",
    "output_router_logits",
    "quantization_config",
    "sliding_window",
    "text_config",
    "text_encoder",
    "tie_word_embeddings",
    "vision_aspect_ratio",
    "vision_feature_layer",
    "vision_feature_select_strategy",
}
"""What every model asks for beside its layers' settings: how to cache, initialise and tie, parts, remote code."""
OF_ROPE = {"partial_rotary_factor", "rope_theta", "rope_parameters", "original_max_position_embeddings"}


class Settings:
    """A source without weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.description = json.loads(json.dumps(config)), "a checkpoint"
        self.generation_config: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}


def settings(model_type: str) -> dict[str, Any]:
    """The config.json of a tiny model."""
    return json.loads(tiny_config(model_type).to_json_string(use_diff=False)) | {"model_type": model_type}


def read(config: dict[str, Any]) -> DecoderConfig:
    source: Any = Settings(config)
    return decoder_config(source)


def declared(model_type: str) -> set[str]:
    kind = CONFIG_MAPPING[model_type]
    return {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map) | set(vars(kind()))


OLDER_NAMES = {
    "nemotron_h": {
        f"mamba_{name}"
        for name in (
            "n_groups",
            "d_conv",
            "expand",
            "dt_min",
            "dt_max",
            "dt_limit",
            "dt_init_floor",
            "conv_bias",
            "chunk_size",
        )
    }
}
"""Keys that a class takes for declared ones, without declaring them."""


@pytest.mark.matrix(keep=66)
@pytest.mark.parametrize("value", [3, 0.37, "relu", True, None])
@pytest.mark.parametrize("model_type", TYPES)
def test_keys_that_a_family_does_not_declare_change_nothing(model_type: str, value: Any) -> None:
    kind = CONFIG_MAPPING[model_type]
    fixed = {name for name in KNOWN if isinstance(inspect.getattr_static(kind, name, None), property)}
    known = declared(model_type) | OLDER_NAMES.get(model_type, set())
    strays = dict.fromkeys(KNOWN - known - MEANT - fixed, value)
    assert len(strays) > 50
    config = settings(model_type)
    assert read(config | strays | config) == read(config)


@pytest.mark.matrix(keep=51)
@pytest.mark.parametrize("model_type", TYPES)
def test_undeclared_keys_that_models_read_are_listed(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs transformers' model and looks at what it asks its configuration for."""
    config = tiny_config(model_type)
    found: set[str] = set()
    get = PreTrainedConfig.__getattribute__

    def recording(self: Any, name: str) -> Any:
        kind = type(self)
        if kind is type(config) and name not in names and name[:2] != "__" and not hasattr(kind, name):
            found.add(name)
        return get(self, name)

    names = {field.name for field in dataclasses.fields(config)} | set(type(config).attribute_map)
    if type(config) not in _models():
        pytest.skip("transformers has no causal language model of this type by itself")
    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", recording)
    with torch.no_grad():
        _random_model(config).eval()(input_ids=torch.tensor([[5, 6, 7, 8]]))
    read_by_model = found - HARMLESS - OF_ROPE - set(vars(type(config)()))
    expected = {"head_dim"} if model_type in HEAD_DIM | HEAD_DIM_OF_ROTATION else set()
    assert read_by_model == expected


def _models() -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "mixtral", "deepseek_v2"])
def test_logits_with_stray_keys_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_tiny(model_type, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    strays = {"partial_rotary_factor": 0.5, "hidden_activation": "relu", "rms_norm_eps": 0.5, "logit_scale": 3.0}
    strays |= {
        "layer_norm_eps": 0.4,
        "final_logit_softcapping": 0.2,
        "attention_multiplier": 2.0,
        "rope_interleave": True,
    }
    file.write_text(json.dumps(strays | config))
    tokens = random_batch(VOCAB).tokens[:1]
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        expected = reference(input_ids=torch.tensor(tokens)).logits.numpy()
    found = np.asarray(open_model(tmp_path, "float32")(tokens))
    assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected)


@pytest.mark.parametrize("model_type", ["qwen2", "granite"])
def test_an_undeclared_head_dim_is_obeyed_where_the_model_reads_it(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, head_dim=12, num_hidden_layers=2)
    assert measure_parity(tmp_path).problems == ()


@pytest.mark.parametrize(
    "model_type, keys, reason",
    [
        ("llama", {"is_causal": False}, "llama with is_causal=False is not supported"),
        ("gpt2", {"is_causal": 0}, "gpt2 with is_causal=0 is not supported"),
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 9}}}, "per_layer_config of intermediate_size"),
        ("gemma4_text", {"per_layer_config": {"5": {"sliding_window": 3}}}, "per_layer_config of sliding_window"),
        (
            "apertus",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is not supported for rope_type 'llama3'",
        ),
        ("solar_open", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("gpt_neox", {"head_dim": 6}, "gpt_neox with head_dim=6 is not supported, only head_dim=8"),
    ],
)
def test_keys_that_every_model_of_transformers_obeys_are_refused_by_name(
    model_type: str, keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TideError, match=re.escape(reason)):
        read(settings(model_type) | keys)


def test_keys_named_like_methods_and_constants_of_the_class_change_nothing() -> None:
    config = settings("llama")
    names = [name for name in dir(PreTrainedConfig) if name not in declared("llama") and not name.startswith("rope_")]
    kept = {name for name in names if isinstance(inspect.getattr_static(PreTrainedConfig, name), property)}
    strays = dict.fromkeys(set(names) - kept - {"model_type", "per_layer_config"}, 5)
    strays["attribute_map"] = {"hidden_size": "vocab_size"}
    assert read(config | strays) == read(config)
