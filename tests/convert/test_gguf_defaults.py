"""What a GGUF file means that leaves a key out, or says something senseless: llama.cpp's default, or one clear line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_converter import RECIPES, convert_to_gguf

pytest.importorskip("torch", reason="makes the checkpoints")

from test_gguf_architectures import CASES

from convert.parity.tiny import save_tiny
from convert.sources.gguf import defaults as gguf_defaults
from convert.sources.gguf.architectures import ARCHITECTURES
from convert.sources.gguf.defaults import BY_ARCHITECTURE, COMMON, REQUIRED
from convert.sources.gguf.file import StoredTensor, read_model
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.kinds import HYPERPARAMETERS
from tide_jax.errors import TideError

# Keys from which nothing is read; and those that say nothing new in some architectures.
SAY_NOTHING = {"vocab_size", "rope.dimension_sections", "n_deepstack_layers", "rope.scaling.finetuned"}
TOLD_OTHERWISE = {
    "attention.head_count": {"mamba", "mamba2"},
    "attention.layer_norm_epsilon": {"nemotron_h", "nemotron_h_moe"},
    "attention.layer_norm_rms_epsilon": {"nemotron"},
    "feed_forward_length": {"mamba", "mamba2"},
    "expert_shared_feed_forward_length": {"ernie4_5-moe", "hunyuan-moe", "exaone-moe", "granite"},
}
Model = tuple[str, dict[str, Any], dict[str, StoredTensor]]
RECIPES_ONCE = {RECIPES[recipe].arch: (recipe, *rest) for recipe, *rest in reversed(CASES)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Architecture, pairs and tensors of a tiny model in a file, by its recipe."""

    @functools.cache
    def made(recipe: str) -> Model:
        _, model_type, fields = next(case for case in CASES if case[0] == recipe)
        path = tmp_path_factory.mktemp("gguf")
        save_tiny(model_type, path / "hf", **fields)
        convert_to_gguf(path / "hf", path / "m.gguf", recipe)
        _, metadata, tensors = read_model(path / "m.gguf")
        return metadata["general.architecture"], metadata, tensors

    return made


def config_of(made: Model, **changes: Any) -> dict[str, Any] | str:
    """The configuration of a file with some keys changed, left out where None; or the message of its refusal."""
    name, metadata, tensors = made
    pairs = metadata | {f"{name}.{key}": value for key, value in changes.items()}
    pairs = {key: value for key, value in pairs.items() if value is not None}
    message = ""
    try:
        hp = Hyperparameters(Path("m.gguf"), name, pairs, tensors)
        config = ARCHITECTURES[name].config(hp)
        hp.check_all_taken()
    except TideError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) <= 300
    return message or config


def keys_of(made: Model) -> list[str]:
    return [key.removeprefix(f"{made[0]}.") for key in made[1] if key.startswith(f"{made[0]}.")]


@pytest.mark.matrix(keep=13)
@pytest.mark.parametrize("recipe", sorted(recipe for recipe, *_ in RECIPES_ONCE.values()))
def test_a_missing_key_means_the_default_or_is_required(recipe: str, model: Callable[[str], Model]) -> None:
    made = model(recipe)
    name, metadata, tensors = made
    whole = config_of(made)
    for key in keys_of(made):
        found = config_of(made, **{key: None})
        if key in SAY_NOTHING or name in TOLD_OTHERWISE.get(key, ()):
            assert found == whole, key
            continue
        entry = BY_ARCHITECTURE.get(name, {}).get(key, COMMON.get(key, REQUIRED))
        if entry is REQUIRED:
            assert isinstance(found, str), key
            assert f"lacks {name}.{key}, which every such file has" in found
            continue
        rest = {other: value for other, value in metadata.items() if other != f"{name}.{key}"}
        if callable(entry) and isinstance(found, str) and " lacks " in found:
            continue  # a default that the other values do not give
        default = gguf_defaults.default_value(Hyperparameters(Path("m.gguf"), name, rest, tensors), key)
        if default is not None:
            assert found == config_of(made, **{key: default}), key


SENSELESS = ("", "x", [], [1, 2.5], True, -1, 2**31, 2**63, 0.5, -0.5, float("nan"), float("inf"), 1e300)


@pytest.mark.parametrize("recipe", sorted(recipe for recipe, *_ in RECIPES_ONCE.values()))
def test_senseless_values_are_refused_in_one_line_or_harmless(recipe: str, model: Callable[[str], Model]) -> None:
    made = model(recipe)
    for key in keys_of(made):
        for value in (*SENSELESS, [value for value in SENSELESS if value != ""]):
            config_of(made, **{key: value})
        if key in HYPERPARAMETERS and key != "rope.dimension_sections":
            for value in ("x" if key != "tensor_data_layout" else 3, float("nan"), -1, [-1, "x"]):
                assert isinstance(config_of(made, **{key: value}), str), (key, value)


def test_every_default_has_a_type_and_a_range() -> None:
    keys = set(COMMON).union(*BY_ARCHITECTURE.values())
    assert keys - set(HYPERPARAMETERS) == set()
    assert set(BY_ARCHITECTURE) <= set(ARCHITECTURES)


def caps(attention: float | None, final: float | None) -> dict[str, Any]:
    return {"attn_logit_softcapping": attention, "final_logit_softcapping": final}


NOT_IN_BAMBA = (
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "expert_shared_feed_forward_length",
    "expert_count",
)
GROUPS = {"expert_group_count": None, "expert_group_used_count": None}
# By llama.cpp's source, not by the table: recipe, what is changed or left out, what config.json has then.
KNOWN: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("llama", {"rope.freq_base": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama", {"attention.head_count_kv": None}, {"num_key_value_heads": 6}),
    (
        "llama",
        dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count")),
        {"head_dim": 8},
    ),
    ("gemma2", {"attention.sliding_window": None, **caps(None, None)}, {"sliding_window": 4096, **caps(50.0, 30.0)}),
    ("gemma2", caps(0.0, 0.0), caps(None, None)),
    ("gemma3", {"attention.sliding_window": None}, {"sliding_window": None}),
    ("gemma3", caps(None, None), caps(None, None)),
    ("gemma4", {"final_logit_softcapping": None}, {"final_logit_softcapping": 30.0}),
    ("mpt", {"attention.clamp_kqv": 0.0}, {}),
    ("granite", {"residual_scale": None, "embedding_scale": 0.0}, {"residual_multiplier": 1.0}),
    ("granite", {"attention.scale": None}, {"attention_multiplier": 8**-0.5}),
    ("minicpm", {"embedding_scale": None, "logit_scale": None}, {"embedding_multiplier": 12.0}),
    ("stablelm", {"use_parallel_residual": None}, {"use_parallel_residual": False}),
    ("glm4moe", {"expert_gating_func": None, **GROUPS}, {"n_group": 1, "topk_group": 1}),
    ("deepseek2", {"expert_gating_func": None, **GROUPS}, {"model_type": "deepseek_v2", "n_group": 1}),
    ("deepseek2", {"expert_weights_scale": None}, {"routed_scaling_factor": 1.0}),
    ("falcon", {"attention.head_count_kv": None}, {"num_kv_heads": 6, "multi_query": False}),
    ("exaone4", {"attention.sliding_window": None}, {"sliding_window": None}),
    ("mamba", {"ssm.dt_b_c_rms": None}, {"model_type": "mamba"}),
    ("mamba", {"ssm.dt_b_c_rms": True}, {"model_type": "falcon_mamba", "mixer_rms_eps": 1e-6}),
    ("lfm2", {"attention.head_count_kv": None}, {"layer_types": ["full_attention"] * 5}),
    ("granitehybrid", dict.fromkeys(NOT_IN_BAMBA), {"model_type": "bamba"}),
    ("granitehybrid", {"rope.scaling.finetuned": None}, {"position_embedding_type": "rope"}),
    ("nemotron_h_moe", {"expert_gating_func": None}, {"norm_topk_prob": True}),
    (
        "qwen3next",
        {"full_attention_interval": None},
        {"layer_types": ["linear_attention"] * 3 + ["full_attention", "linear_attention"]},
    ),
)


@pytest.mark.parametrize(("recipe", "changes", "expected"), KNOWN, ids=lambda value: str(value)[:40])
def test_defaults_are_those_of_llama_cpp(
    recipe: str, changes: dict[str, Any], expected: dict[str, Any], model: Callable[[str], Model]
) -> None:
    config = config_of(model(recipe), **changes)
    assert isinstance(config, dict), config
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("gpt-oss", "attention.sliding_window"),
        ("cohere2", "attention.sliding_window"),
        ("command-r", "logit_scale"),
        ("granite", "logit_scale"),
        ("gptneox", "use_parallel_residual"),
        ("mpt", "attention.max_alibi_bias"),
        ("exaone", "attention.layer_norm_rms_epsilon"),
        ("llama4", "expert_feed_forward_length"),
        ("dbrx", "attention.layer_norm_epsilon"),
        ("mixtral", "feed_forward_length"),
        ("qwen2", "feed_forward_length"),
        ("glm4moe", "feed_forward_length"),
        ("mamba2", "ssm.group_count"),
        ("jamba", "ssm.inner_size"),
        ("falcon-h1", "ssm.group_count"),
        ("lfm2", "shortconv.l_cache"),
        ("lfm2moe", "expert_gating_func"),
        ("nemotron_h_moe", "expert_shared_feed_forward_length"),
    ],
)
def test_keys_that_llama_cpp_requires_are_required(recipe: str, key: str, model: Callable[[str], Model]) -> None:
    found = config_of(model(recipe), **{key: None, "attention.layer_norm_epsilon": None})
    assert isinstance(found, str)
    assert " lacks " in found


def test_experts_are_together_as_wide_as_the_dense_layer(model: Callable[[str], Model]) -> None:
    made = model("qwen2moe")
    used = made[1]["qwen2moe.expert_used_count"]
    changes = {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None}
    config = config_of(made, **changes, feed_forward_length=20 * used)
    assert isinstance(config, dict)
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (20, 20 * used)


@pytest.mark.parametrize(
    ("recipe", "changes", "problem"),
    [
        ("mamba", {"ssm.inner_size": 100}, "ssm.inner_size=100: not supported, expected a multiple of 48"),
        ("mamba2", {"ssm.time_step_rank": 7}, "ssm.inner_size=96: not supported, expected a multiple of 7 heads"),
        ("lfm2", {"attention.head_count_kv": [0, 2, 0, 3, 0]}, "attention.head_count_kv differs between attention"),
        ("lfm2", {"attention.head_count_kv": [0, 2, 0, 2]}, "attention.head_count_kv lists 4 layers, expected 5"),
        ("lfm2", {"attention.head_count": 0}, "attention.head_count=0: not supported, expected 1 or more"),
        ("llama", {"attention.head_count_kv": 0}, "llama.attention.head_count_kv=0: "),
        ("jamba", {"attention.head_count_kv": [2, 2, 0, 0, 2]}, "the layers with attention are not periodic"),
        ("qwen35", {"ssm.group_count": 3}, "ssm.time_step_rank=4: not supported, expected"),
        ("falcon-h1", {"ssm.time_step_rank": 9}, "ssm.inner_size=56: not supported, expected a multiple of 9 heads"),
    ],
)
def test_sizes_of_recurrent_layers_that_do_not_fit_are_refused(
    recipe: str, changes: dict[str, Any], problem: str, model: Callable[[str], Model]
) -> None:
    assert problem in str(config_of(model(recipe), **changes))


def test_an_attention_factor_is_not_ignored(model: Callable[[str], Model]) -> None:
    assert "rope.scaling.attn_factor=1.5" in str(config_of(model("llama"), **{"rope.scaling.attn_factor": 1.5}))


def test_yarn_uses_the_context_length_if_the_original_one_is_missing(model: Callable[[str], Model]) -> None:
    changes = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "context_length": 640}
    config = config_of(model("llama"), **changes, **{"rope.scaling.original_context_length": None})
    assert isinstance(config, dict)
    assert config["rope_parameters"]["original_max_position_embeddings"] == 640


@pytest.mark.parametrize("count", [4, 6, 2**16 - 1])
def test_a_wrong_number_of_layers(count: int, model: Callable[[str], Model]) -> None:
    found = config_of(model("qwen2"), block_count=count)
    assert f"expected block_count={count}" in str(found)
