"""LoRA adapters merged on the way in: against the formulas, and against PEFT where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import random_tensors, save

import convert.__main__
from convert import convert as convert_checkpoint
from convert import open_model
from convert.sources.huggingface import HuggingFaceSource
from convert.sources.lora import LoRASource
from convert.sources.open import open_source
from tide_jax.errors import TideError
from tide_jax.model.decoder import parameters
from tide_jax.tokenizer.chat_files import chat_templates

Q, DOWN, EMBED, HEAD = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
)
RNG = np.random.default_rng(3)


def pair(outputs: int, inputs: int, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Low-rank matrices A [r, in] and B [out, r]."""
    a, b = RNG.standard_normal((rank, inputs)), RNG.standard_normal((outputs, rank))
    return a.astype(np.float32), b.astype(np.float32)


def linear(module: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    return {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}


def save_adapter(directory: Path, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    """A PEFT directory; a setting of None is left out."""
    directory.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "bias": "none", "target_modules": ["q_proj"]} | settings
    (directory / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / ADAPTER_FILE)
    return directory


ADAPTER_FILE = "adapter_model.safetensors"


def refusal(source: Path, adapter: Path) -> str:
    """The message a merge is refused with: one line."""
    with pytest.raises(TideError) as caught:
        LoRASource(HuggingFaceSource(source), adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_reads(adapter: Path, source: Path, **expected: np.ndarray) -> None:
    """Exactly the tensors given differ from the base's, and they are what was given."""
    merged = LoRASource(HuggingFaceSource(source), adapter)
    for name, value in random_tensors().items():
        found = merged.read(name)
        if name in expected:
            np.testing.assert_allclose(found, expected.pop(name), rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(found, value, err_msg=name)
    assert not expected


# ---- against the formulas ----


def test_low_rank_products_are_added(source: Path, tmp_path: Path) -> None:
    (a, b), (c, d) = pair(18, 12), pair(12, 10)
    adapter = save_adapter(tmp_path / "adapter", linear(Q, a, b) | linear(DOWN, c, d))
    base = random_tensors()
    expected = {
        f"{Q}.weight": base[f"{Q}.weight"] + 2.5 * b @ a,
        f"{DOWN}.weight": base[f"{DOWN}.weight"] + 2.5 * d @ c,
    }
    assert_reads(adapter, source, **expected)


def test_products_in_blocks_of_rows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.sources.lora._BLOCK_ROWS", 5)
    a, b = pair(18, 12)
    adapter = save_adapter(tmp_path / "adapter", linear(Q, a, b))
    assert_reads(adapter, source, **{f"{Q}.weight": random_tensors()[f"{Q}.weight"] + 2.5 * b @ a})


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 5 / 3**0.5),
        ({"alpha_pattern": {"q_proj": 9}}, 3.0),
        ({"alpha_pattern": {"proj": 9}}, 5 / 3),
        ({"alpha_pattern": {r"model\.layers\.\d+\.self_attn\..*": 12, "q_proj": 1}}, 4.0),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "r": 7}, 5 / 3),
        ({"lora_alpha": 1.5}, 0.5),
    ],
)
def test_scales(settings: dict[str, Any], scale: float, source: Path, tmp_path: Path) -> None:
    a, b = pair(18, 12, 3)
    adapter = save_adapter(tmp_path / "adapter", linear(Q, a, b), **({"r": 3} | settings))
    assert_reads(adapter, source, **{f"{Q}.weight": random_tensors()[f"{Q}.weight"] + scale * b @ a})


def test_embeddings_are_transposed(source: Path, tmp_path: Path) -> None:
    a, b = pair(12, 19)
    names = (f"base_model.model.{EMBED}.lora_embedding_{letter}" for letter in "AB")
    adapter = save_adapter(tmp_path / "adapter", dict(zip(names, (a, b), strict=True)))
    base = random_tensors()[f"{EMBED}.weight"]
    assert_reads(adapter, source, **{f"{EMBED}.weight": base + 2.5 * (b @ a).T})


def test_weight_decomposed(source: Path, tmp_path: Path) -> None:
    a, b = pair(18, 12)
    magnitude = RNG.uniform(1, 2, 18).astype(np.float32)
    tensors = linear(Q, a, b) | {f"base_model.model.{Q}.lora_magnitude_vector": magnitude}
    adapter = save_adapter(tmp_path / "adapter", tensors, use_dora=True)
    summed = random_tensors()[f"{Q}.weight"] + 2.5 * b @ a
    expected = magnitude[:, None] * summed / np.linalg.norm(summed, axis=1, keepdims=True)
    assert_reads(adapter, source, **{f"{Q}.weight": expected})
    del tensors[f"base_model.model.{Q}.lora_magnitude_vector"]
    assert "lacks the magnitude vector" in refusal(source, save_adapter(adapter, tensors, use_dora=True))


def test_whole_tensors_are_replaced(source: Path, tmp_path: Path) -> None:
    norm, head = RNG.standard_normal(12).astype(np.float32), RNG.standard_normal((19, 12)).astype(np.float32)
    tensors = {"base_model.model.model.norm.weight": norm, "base_model.model.lm_head.weight": head}
    adapter = save_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm", "lm_head"])
    assert_reads(adapter, source, **{"model.norm.weight": norm, "lm_head.weight": head})


def test_biases(tmp_path: Path) -> None:
    settings = {"attention_bias": True}
    biases = {
        f"model.layers.{i}.self_attn.{name}.bias": RNG.standard_normal(size).astype(np.float32)
        for i in range(2)
        for name, size in (("q_proj", 18), ("k_proj", 6), ("v_proj", 6), ("o_proj", 12))
    }
    source = HuggingFaceSource(save(tmp_path / "source", random_tensors() | biases, **settings))
    new, added = (RNG.standard_normal(18).astype(np.float32) for _ in range(2))
    first = f"base_model.model.{Q}"
    tensors = linear(Q, *pair(18, 12)) | {f"{first}.base_layer.bias": new, f"{first}.lora_B.bias": added}
    merged = LoRASource(source, save_adapter(tmp_path / "adapter", tensors, bias="all", lora_bias=True))
    np.testing.assert_allclose(merged.read(f"{Q}.bias"), new + 2.5 * added, rtol=1e-6)
    plain = {f"base_model.model.{DOWN.replace('mlp.down', 'self_attn.o')}.bias": new[:12]}
    merged = LoRASource(source, save_adapter(tmp_path / "adapter", plain, bias="all"))
    np.testing.assert_array_equal(merged.read("model.layers.0.self_attn.o_proj.bias"), new[:12])


@pytest.mark.parametrize("indices", [[3, 17], {"embed_tokens": [3, 17]}])
def test_single_tokens(indices: Any, source: Path, tmp_path: Path) -> None:
    rows = RNG.standard_normal((2, 12)).astype(np.float32)
    tensors = {f"base_model.model.{EMBED}.token_adapter.trainable_tokens_delta": rows}
    adapter = save_adapter(tmp_path / "adapter", tensors, trainable_token_indices=indices)
    expected = random_tensors()[f"{EMBED}.weight"]
    expected[[3, 17]] = rows
    assert_reads(adapter, source, **{f"{EMBED}.weight": expected})


def test_sums_are_not_rounded_before_they_are_stored(tmp_path: Path) -> None:
    tensors = random_tensors(dtype=ml_dtypes.bfloat16)
    source = HuggingFaceSource(save(tmp_path / "source", tensors))
    a, b = pair(18, 12)
    merged = LoRASource(source, save_adapter(tmp_path / "adapter", linear(Q, a, b)))
    assert merged.tensors[f"{Q}.weight"].dtype == "BF16"
    exact = tensors[f"{Q}.weight"].astype(np.float32) + 2.5 * b @ a
    np.testing.assert_allclose(merged.read(f"{Q}.weight"), exact, rtol=1e-6)


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): value for name, value in random_tensors().items()}
    source = HuggingFaceSource(save(tmp_path / "source", tensors))
    a, b = pair(18, 12)
    merged = LoRASource(source, save_adapter(tmp_path / "adapter", linear(Q, a, b)))
    name = f"{Q}.weight".removeprefix("model.")
    np.testing.assert_allclose(merged.read(name), tensors[name] + 2.5 * b @ a, rtol=1e-5, atol=1e-6)


# ---- tied heads, new tokens ----


def tied(directory: Path) -> Path:
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    return save(directory, tensors, tie_word_embeddings=True)


def test_an_adapter_may_change_one_of_two_tied_tensors(tmp_path: Path) -> None:
    source = tied(tmp_path / "source")
    base = random_tensors()[f"{EMBED}.weight"]
    a, b = pair(12, 19)
    names = (f"base_model.model.{EMBED}.lora_embedding_{letter}" for letter in "AB")
    embedding = dict(zip(names, (a, b), strict=True))
    found = parameters(open_model(source, adapter=save_adapter(tmp_path / "embedding", embedding)))
    np.testing.assert_allclose(found["embed.kernel"], base + 2.5 * (b @ a).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["head.kernel"], base)
    found = parameters(open_model(source, adapter=save_adapter(tmp_path / "head", linear(HEAD, b=a.T, a=b.T))))
    np.testing.assert_allclose(found["head.kernel"], base + 2.5 * (b @ a).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["embed.kernel"], base)


@pytest.mark.parametrize("kind", ["kept", "rows", "ensured"])
def test_a_tied_pair_stays_tied(kind: str, tmp_path: Path) -> None:
    a, b = pair(12, 19)
    prefix = f"base_model.model.{EMBED}"
    tensors, settings = {
        "kept": (linear(Q, *pair(18, 12)), {}),
        "rows": ({f"{prefix}.token_adapter.trainable_tokens_delta": a[:, :12]}, {"trainable_token_indices": [0, 1]}),
        "ensured": (
            {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b} | linear(HEAD, b.T, a.T),
            {"ensure_weight_tying": True},
        ),
    }[kind]
    model = open_model(tied(tmp_path / "source"), adapter=save_adapter(tmp_path / "adapter", tensors, **settings))
    assert "head.kernel" not in parameters(model)
    assert bool(jnp.all(model.embed.kernel[...] == random_tensors()[f"{EMBED}.weight"])) == (kind == "kept")


@pytest.mark.parametrize("tie", [True, False])
def test_more_tokens_than_the_base_has(tie: bool, tmp_path: Path) -> None:
    source = tied(tmp_path / "source") if tie else save(tmp_path / "source")
    longer = RNG.standard_normal((21, 12)).astype(np.float32)
    tensors = {f"base_model.model.{name}.weight": longer for name in (EMBED, HEAD)}
    adapter = save_adapter(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens", "lm_head"])
    convert_checkpoint(source, tmp_path / "out", adapter=adapter)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 21
    found = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["embed.kernel"], longer)
    assert ("head.kernel" in found) != tie


# ---- what the user meets ----


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair(18, 12)
    adapter = save_adapter(tmp_path / "adapter", linear(Q, a, b), base_model_name_or_path=str(source))
    (adapter / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    (source / "tokenizer_config.json").write_text('{"of": "the base"}')
    assert convert.__main__.main([str(source), str(tmp_path / "out"), "--adapter", str(adapter), "--json"]) == 0
    assert str(adapter) in json.loads(capsys.readouterr().out)["source"]
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source_sha256"].keys() == {"model.safetensors", ADAPTER_FILE}
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "the adapter"}'
    q = load_file(tmp_path / "out" / "model.safetensors")["layers.1.attention.q.kernel"]
    expected = random_tensors()[f"{Q}.weight"] + 2.5 * b @ a
    np.testing.assert_allclose(q.reshape(18, 12), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"tokenizer_config.json": '{"chat_template": "adapter"}'}, {"default": "adapter"}),
        ({"chat_template.jinja": "adapter"}, {"default": "adapter"}),
        ({"tokenizer_config.json": "{}"}, {"default": "base", "rag": "base"}),
    ],
)
def test_the_adapters_chat_template_comes_first(
    files: dict[str, str], expected: dict[str, str], source: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", linear(Q, *pair(18, 12)))
    for name, text in files.items():
        (adapter / name).write_text(text)
    (source / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (source / name).write_text("base")
    convert_checkpoint(source, tmp_path / "out", adapter=adapter)
    assert chat_templates(tmp_path / "out") == expected


def test_an_adapter_is_no_checkpoint(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path / "adapter", {}, base_model_name_or_path="someone/base")
    assert convert.__main__.main([str(adapter), str(tmp_path / "out")]) == 2
    expected = f"{adapter} is an adapter, not a checkpoint: convert its base someone/base, with --adapter {adapter}"
    assert capsys.readouterr().err == f"error: {expected}\n"
    save_adapter(adapter, {}, base_model_name_or_path=str(source))
    with pytest.raises(TideError, match=r"convert its base .*source \(which is a directory here\), with"):
        open_source(adapter)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("tensors", "settings", "reason"),
    [
        (linear("model.layers.7.self_attn.q_proj", *pair(18, 12)), {}, "layers.7.self_attn.q_proj.weight, which the"),
        (
            {"base_model.model.score.weight": np.zeros((2, 12), np.float32)},
            {},
            "belongs to score.weight, which the base",
        ),
        (
            {f"base_model.model.{Q}.lora_C.weight": np.zeros((2, 2), np.float32)},
            {},
            "lora_C.weight, which the base does",
        ),
        (
            linear(Q, *pair(12, 18)),
            {},
            "[2, 18] and its pair [12, 2] do not multiply to model.layers.1.self_attn.q_proj",
        ),
        (linear(Q, *pair(18, 12, 3)), {}, "of rank 3, expected 2 as its adapter_config.json says"),
        ({f"base_model.model.{Q}.lora_A.weight": np.zeros((2, 12), np.float32)}, {}, "without its counterpart"),
        ({"base_model.model.model.norm.weight": np.zeros(13, np.float32)}, {}, "has shape [13], expected [12]"),
        (
            {f"base_model.model.{HEAD}.weight": np.zeros((21, 13), np.float32)},
            {},
            "has shape [21, 13], expected [19, 12]",
        ),
        (
            {f"base_model.model.{EMBED}.token_adapter.trainable_tokens_delta": np.zeros((2, 12), np.float32)},
            {"trainable_token_indices": [1, 19]},
            "expected token ids below 19",
        ),
        ({}, {"peft_type": "IA3"}, "an adapter of type 'IA3', only LORA is supported"),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base's weights"),
        ({}, {"layer_replication": [[0, 2]], "use_qalora": True}, "uses layer_replication, use_qalora, which is not"),
        (linear(Q, *pair(18, 12)), {"r": "two"}, "r='two' must be a whole number"),
        (linear(Q, *pair(18, 12)), {"alpha_pattern": {"(": 2}}, "invalid alpha_pattern"),
        (
            linear(Q, *pair(18, 12)),
            {"alpha_pattern": {"(.|..|...)+(.|..)+[A-Z]": 2}},
            "alpha_pattern (regex timed",
        ),
        (linear(Q, *pair(18, 12)), {"alpha_pattern": ["q_proj"]}, "invalid alpha_pattern"),
    ],
)
def test_refused(
    tensors: dict[str, np.ndarray], settings: dict[str, Any], reason: str, source: Path, tmp_path: Path
) -> None:
    assert reason in refusal(source, save_adapter(tmp_path / "adapter", tensors, **settings))


def test_no_adapter_there(source: Path, tmp_path: Path) -> None:
    assert "has no adapter_config.json" in refusal(source, source)
    adapter = save_adapter(tmp_path / "adapter", {})
    (adapter / ADAPTER_FILE).rename(adapter / "adapter_model.bin")
    assert "only adapter_model.bin: safetensors are needed" in refusal(source, adapter)
    with pytest.raises(TideError, match="absent does not exist: expected an adapter directory or a hub id"):
        open_model(source, adapter=tmp_path / "absent")


# ---- against transformers, and PEFT ----


@pytest.mark.parametrize("tie", [True, False])
def test_the_merged_model_is_verified(tie: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = tied(tmp_path / "source") if tie else save(tmp_path / "source")
    a, b = pair(12, 19)
    embedding = {f"base_model.model.{EMBED}.lora_embedding_A": a, f"base_model.model.{EMBED}.lora_embedding_B": b}
    adapter = save_adapter(tmp_path / "adapter", linear(Q, *pair(18, 12)) | embedding)
    assert convert_checkpoint(source, tmp_path / "out", adapter=adapter, verify=True).verification is not None


_PEFT_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 1},
            "alpha_pattern": {"v_proj": 11, "up": 3},
            "use_rslora": True,
        },
    ),
    "biases": ("llama", {}, {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "biases of its own": ("llama", {}, {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True}),
    "dora": ("llama", {}, {"target_modules": ["k_proj", "o_proj", "embed_tokens"], "use_dora": True}),
    "embeddings": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "gate_proj"]}),
    "scaled embeddings": ("gemma3_text", {"tie_word_embeddings": False}, {"target_modules": ["embed_tokens"]}),
    "modules to save": (
        "llama",
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    ),
    "single tokens": ("llama", {"tie_word_embeddings": True}, {"trainable_token_indices": [1, 9]}),
    "conv1d": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "all"}),
    "conv1d and head": ("gpt2", {"tie_word_embeddings": False}, {"target_modules": ["c_proj", "lm_head"]}),
    "conv1d dora": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "fused": ("gpt_neox", {}, {"target_modules": ["query_key_value", "dense"]}),
    "tied, ensured": (
        "llama",
        {"tie_word_embeddings": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied head": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "tied embedding": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}),
    "tied, saved": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("case", _PEFT_CASES)
@pytest.mark.filterwarnings("ignore")  # of PEFT's and its imports'
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    """Of PEFT's model before and after `merge_and_unload`, which gives something else where weights are tied."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from convert.parity.tiny import save_tiny

    model_type, overrides, settings = _PEFT_CASES[case]
    base = save_tiny(
        model_type, tmp_path / "source", num_hidden_layers=2 if model_type != "gemma3_text" else 6, **overrides
    )
    base.requires_grad_(False)
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj"], "init_lora_weights": False, **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tied = "lm_head" in name and settings.get("ensure_weight_tying")
                parameter.add_(0 if tied else 0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    tokens = np.arange(4, 34).reshape(2, 15)

    def logits(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(tokens)).logits.numpy()

    expected = logits(model)
    with model.disable_adapter():
        unchanged = logits(model)
    merged = expected if "tied" in case else logits(model.merge_and_unload())
    ours = open_model(tmp_path / "source", "float32", adapter=tmp_path / "adapter")
    found = np.asarray(ours(jnp.asarray(tokens, jnp.int32), jnp.tile(jnp.arange(15, dtype=jnp.int32), (2, 1))))
    spread = np.ptp(expected)
    assert np.abs(unchanged - expected).max() > 0.1 * spread, "the adapter hardly changes anything"
    assert np.abs(found - expected).max() < 2e-5 * spread
    assert np.abs(found - merged).max() < 2e-5 * spread
