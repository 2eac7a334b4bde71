"""Multimodal checkpoints: their text decoder converts, and what belongs to other parts is left out by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convert import convert
from convert.sources.text_model import text_decoder
from tide_jax.model.files.checkpoint import load_config

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

_TEXT: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "eos_token_id": 3,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 48,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
_PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}
_THREE_D = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_MARKS = {
    "image_token_id": 198,
    "video_token_id": 197,
    "vision_start_token_id": 196,
    "vision_end_token_id": 195,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {"rope_parameters": _THREE_D}, {}, _MARKS),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {"rope_parameters": _THREE_D}, {}, _MARKS),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"rope_parameters": _THREE_D}, {}, _MARKS),
    "mistral3": ("Mistral3ForConditionalGeneration", {"model_type": "mistral"}, _PIXTRAL, {"image_token_index": 198}),
    "llava": (
        "LlavaForConditionalGeneration",
        {"model_type": "llama"},
        {"model_type": "clip_vision_model"},
        {"image_token_index": 198},
    ),
    "smolvlm": ("SmolVLMForConditionalGeneration", {"model_type": "llama"}, {}, {"image_token_id": 198}),
}


def save(model_type: str, directory: Path) -> None:
    import transformers

    name, text, vision, marks = CASES[model_type]
    parts = {"text_config": _TEXT | text, "vision_config": _VISION | vision}
    config = transformers.AutoConfig.for_model(model_type, **parts, **marks)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(directory)


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", CASES)
def test_the_text_decoder_converts(model_type: str, tmp_path: Path) -> None:
    save(model_type, tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "converted", verify=True)
    assert report.verification is not None
    assert report.verification.logit_range > 1
    assert f"(the text decoder of {model_type})" in report.source
    assert any("vision" in name or "visual" in name for name in report.ignored)
    assert set(report.ignored.values()) == {f"belongs to another part of the multimodal {model_type}"}
    assert load_config(tmp_path / "converted").num_layers == 4


class Whole:
    """A source that has a configuration and no tensors."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.description = config, "here"
        self.tensors: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}
        self.files: list[Path] = []


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize(
    "outer, inner",
    [
        ({}, {}),
        ({"eos_token_id": [5, 106], "pad_token_id": 4, "bos_token_id": 6}, {}),
        ({"eos_token_id": [5, 106]}, {"eos_token_id": 9, "pad_token_id": 8}),
        ({}, {"eos_token_id": [9, 11], "pad_token_id": 8}),
        ({"eos_token_id": None}, {"eos_token_id": 9}),
        ({"eos_token_id": 0}, {"eos_token_id": 9}),
    ],
)
@pytest.mark.parametrize("model_type", [*CASES, "gemma3", "gemma3n", "idefics3", "paligemma", "llama4", "internvl"])
def test_token_ids_are_those_that_generate_takes(outer: dict[str, Any], inner: dict[str, Any], model_type: str) -> None:
    from transformers import CONFIG_MAPPING, GenerationConfig

    text = CASES[model_type][1] if model_type in CASES else {}
    config = {"model_type": model_type, "text_config": _TEXT | {"eos_token_id": None} | text | inner, **outer}
    expected = GenerationConfig.from_model_config(CONFIG_MAPPING[model_type].from_dict(dict(config)))
    decoder = text_decoder(Whole(config))  # type: ignore[arg-type]
    assert "the text decoder of" in decoder.description
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert decoder.config.get(key) == getattr(expected, key), key
