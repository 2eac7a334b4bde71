"""Settings of generation: tokens of transformers' `generate` under every rule, and where settings come from."""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG, random_tensors, refusal, save
from tiny_models import random_prompts

import tide_jax
from convert import convert, open_model
from tide_jax import TIDE, ExitConfig, TideError
from tide_jax.generation.choice import choose
from tide_jax.generation.sampling import filter_logits, make_sampling
from tide_jax.model.files.checkpoint import fingerprint
from tide_jax.model.generation_settings import NOTHING_SAID, SETTINGS, GenerationSettings, settings_from
from tide_jax.testing import random_routers

EXAMPLES = int(os.environ.get("TIDE_EXAMPLES", "12"))
VOCAB, NEW, EOS = 23, 14, [2, 5]
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 3, "max_position_embeddings": 64, "eos_token_id": EOS}
PROMPTS = [[7, 8, 9, 7, 8], [11], [3, 4, 3, 4, 3, 4, 3], [13, 1, 17, 6, 6, 6, 6, 6, 6]]
RULES: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.8},
    "a reward for repetition": {"repetition_penalty": 0.6},
    "no n-gram of one": {"no_repeat_ngram_size": 1},
    "no n-gram of two": {"no_repeat_ngram_size": 2},
    "no n-gram of three": {"no_repeat_ngram_size": 3},
    "n-grams longer than any row": {"no_repeat_ngram_size": 40},
    "bad words": {"bad_words_ids": [[7], [2], [8, 9], [6, 6, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]},
    "all pairs of a few": {"bad_words_ids": [[a, b] for a in range(9) for b in range(11)]},
    "a least length": {"min_length": 9},
    "new tokens at least": {"min_new_tokens": 6},
    "new tokens go first": {"min_new_tokens": 0, "min_length": 40},
    "a forced first token": {"forced_bos_token_id": 9},
    "a forced first token, suppressed first": {"forced_bos_token_id": 9, "begin_suppress_tokens": [9, 4, 12]},
    "a forced last token": {"forced_eos_token_id": 17},
    "a forced last token of two": {"forced_eos_token_id": [19, 5]},
    "suppressed": {"suppress_tokens": list(range(0, VOCAB, 2))},
    "suppressed at first": {"begin_suppress_tokens": list(range(VOCAB // 2))},
    "suppressed beside forced": {"forced_eos_token_id": [17, 19], "suppress_tokens": [17, 3]},
    "everything": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[4], [9, 9], [11, 3, 2]],
        "min_new_tokens": 5,
        "forced_eos_token_id": [2],
        "suppress_tokens": [6, 20],
        "begin_suppress_tokens": [7, 8],
    },
}


def random_rules(seed: int) -> dict[str, Any]:
    """A random choice of rules."""
    rng = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(1, most)).tolist()

    drawn = {
        "repetition_penalty": float(rng.uniform(0.5, 2.5)),
        "no_repeat_ngram_size": int(rng.integers(1, 5)),
        "bad_words_ids": [ids(4) for _ in range(rng.integers(1, 40))],
        "min_length": int(rng.integers(1, 16)),
        "min_new_tokens": int(rng.integers(0, 10)),
        "forced_bos_token_id": int(rng.integers(VOCAB)),
        "forced_eos_token_id": int(rng.integers(VOCAB)),
        "suppress_tokens": ids(12),
        "begin_suppress_tokens": ids(12),
    }
    rules = {name: value for name, value in drawn.items() if rng.random() < 0.4}
    forced = [name for name in ("forced_bos_token_id", "forced_eos_token_id") if name in rules]
    for name in forced:
        if rules[name] in rules.get("suppress_tokens", []):  # transformers refuses to
            del rules[name]
    return rules


def write(folder: Path, **generation: Any) -> Path:
    """A tiny Llama whose logits lie close together, so that rules matter."""
    tensors = {name: (0.3 * t).astype(np.float32) for name, t in random_tensors(CONFIG | SIZES).items()}
    save(folder, tensors, **SIZES)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS} | generation))
    return folder


@functools.cache
def engine() -> TIDE:
    """The model without settings of its own, and routers that let many tokens leave."""
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(write(Path(folder) / "source"))
    routers = random_routers(model.config, interval=1, affine=True, translator_rank=2)
    return TIDE(model, routers, ExitConfig(exit_threshold=0.5, min_layers=0))


@functools.cache
def theirs() -> Any:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        return AutoModelForCausalLM.from_pretrained(write(Path(folder) / "source"), dtype="float32").eval()


def expected(rules: dict[str, Any], prompts: list[list[int]] = PROMPTS, **config: Any) -> list[list[int]]:
    """What transformers makes, one row at a time: its batches count padding as tokens."""
    import torch

    rows = []
    for prompt in prompts:
        out = theirs().generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **rules, **config
        )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def found(engine: TIDE, prompts: list[list[int]] = PROMPTS, **arguments: Any) -> list[list[int]]:
    out = engine.generate(prompts, **({"max_new_tokens": NEW, "mode": "full"} | arguments))
    return [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]


@pytest.mark.slow
def test_the_tests_models_end_in_many_ways() -> None:
    rows = found(engine())
    assert rows == expected({})
    assert len({len(row) for row in rows}) > 1, "some rows end, others do not"
    changed = [name for name, rules in RULES.items() if expected(rules) != rows]
    assert len(changed) >= len(RULES) - 3, sorted(set(RULES) - set(changed))


@pytest.mark.matrix(keep=5)
@pytest.mark.parametrize("name", RULES)
def test_rules_are_those_of_transformers(name: str) -> None:
    assert found(engine(), **RULES[name]) == expected(RULES[name])


@pytest.mark.slow
def test_random_rules_are_those_of_transformers() -> None:
    rng, different = np.random.default_rng(0), 0
    for seed in range(EXAMPLES):
        rules = random_rules(seed)
        # Not the padding: transformers takes it for what it is, and masks it.
        prompts = [rng.integers(1, 8, n).tolist() for n in rng.integers(1, 12, 3)]
        wanted = expected(rules, prompts)
        assert found(engine(), prompts, **rules) == wanted, rules
        different += wanted != expected({}, prompts)
    assert different > EXAMPLES / 2


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["everything", "no n-gram of two", "bad words", "a least length"])
def test_files_arguments_and_configurations_say_the_same(name: str, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    wanted = expected(RULES[name])
    source = write(tmp_path / "source", **RULES[name])
    convert(source, tmp_path / "out")
    for place in (source, tmp_path / "out"):
        assert found(TIDE(tide_jax.load(place))) == wanted
    assert found(engine(), generation_config=RULES[name]) == wanted
    assert found(engine(), generation_config=GenerationConfig(**RULES[name])) == wanted


def test_arguments_override_what_a_checkpoint_says(tmp_path: Path) -> None:
    own = TIDE(open_model(write(tmp_path / "source", **RULES["everything"] | {"min_length": 9})))
    off = {
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "bad_words_ids": [],
        "min_new_tokens": 0,
        "forced_eos_token_id": [],
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
    }
    assert found(own, **off) == found(engine())
    assert found(own, generation_config=off) == found(engine())
    assert found(own, generation_config=off | {"no_repeat_ngram_size": 2}, no_repeat_ngram_size=1) == expected(
        {"no_repeat_ngram_size": 1}
    )
    assert found(own, repetition_penalty=2.0) == expected(RULES["everything"] | {"repetition_penalty": 2.0})


# ------------------------------------------------------------------------------------- exits, streaming, padding, seeds


def processed(logits: np.ndarray, row: list[int], prompt: int, rules: dict[str, Any]) -> np.ndarray:
    """One row's logits after transformers' processors, in its order."""
    import torch
    import transformers as t

    end, length = EOS, prompt + NEW
    made = {
        "repetition_penalty": t.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": t.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: t.NoBadWordsLogitsProcessor(words, end),
        "min_new_tokens": lambda n: t.MinNewTokensLengthLogitsProcessor(prompt, n, end),
        "forced_eos_token_id": lambda ids: t.ForcedEOSTokenLogitsProcessor(length, ids),
        "suppress_tokens": t.SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda ids: t.SuppressTokensAtBeginLogitsProcessor(ids, prompt),
    }
    scores = torch.tensor(logits)[None]
    for name, make in made.items():
        if name in rules:
            scores = make(rules[name])(torch.tensor([row]), scores)
    return scores[0].numpy()


@pytest.mark.parametrize("kv_strategy", ["propagate", "recompute"])
@pytest.mark.parametrize("name", ["everything", "no n-gram of two", "bad words"])
@pytest.mark.matrix(keep=2)
def test_rules_apply_to_tokens_that_exit(name: str, kv_strategy: str) -> None:
    """The scoring call defines the logits; transformers' processors and an argmax make the tokens of them."""
    pytest.importorskip("torch")
    own, rules = engine().with_config(kv_strategy=kv_strategy), RULES[name]
    out = own.generate(PROMPTS, max_new_tokens=NEW, **rules)
    assert len(np.unique(out.exit_layers[out.exit_layers >= 0])) > 1
    for prompt, tokens, length in zip(PROMPTS, out.tokens, out.lengths, strict=True):
        row = [*prompt, *tokens[:length].tolist()]
        logits = np.asarray(own([row], prompt_lengths=len(prompt)).logits[0])
        for at in range(len(prompt), len(row)):
            assert row[at] == processed(logits[at - 1], row[:at], len(prompt), rules).argmax()


@pytest.mark.matrix
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("mode", ["full", "exit", "lossless"])
def test_streams_and_single_rows_are_the_batch(mode: str, sampled: bool) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "mode": mode} | RULES["everything"]
    if sampled:
        options |= {"temperature": 1.5, "key": jax.random.key(3)}
    whole = engine().generate(PROMPTS, **options)
    steps = list(engine().stream(PROMPTS, **options))
    assert np.stack([s.tokens for s in steps], axis=1).tolist() == whole.tokens.tolist()
    if mode != "full":
        assert (whole.tokens.tolist() == engine().generate(PROMPTS, **options | {"mode": "full"}).tokens.tolist()) == (
            mode == "lossless"
        )
    if not sampled:
        rows = [row[:n].tolist() for row, n in zip(whole.tokens, whole.lengths, strict=True)]
        assert rows == [found(engine(), [prompt], **options)[0] for prompt in PROMPTS]


def test_values_of_rules_do_not_recompile() -> None:
    rules = {"no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4]], "min_new_tokens": 2}
    options = {"max_new_tokens": NEW, "mode": "full"}
    engine().generate(PROMPTS, **options, **rules)
    others = [
        {"no_repeat_ngram_size": 4},
        {"bad_words_ids": [[1], [2, 3], [4, 5, 6]]},
        {"no_repeat_ngram_size": 3, "suppress_tokens": [1, 2], "forced_eos_token_id": 5, "min_length": 3},
    ]
    for other in others:
        assert engine().generate(PROMPTS, **options, **other).stats.compile_time == 0.0, other
    engine().generate(PROMPTS, **options, min_new_tokens=2)
    assert engine().generate(PROMPTS, **options, suppress_tokens=[4]).stats.compile_time == 0.0


# ---------------------------------------------------------------------------------------------------- sampling's dials

DIALS = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02}


def test_greedy_is_the_default_whatever_the_file_says(tmp_path: Path) -> None:
    own = TIDE(open_model(write(tmp_path / "source", **DIALS)))
    assert found(own) == found(engine()) == found(own, temperature=0) == found(own, do_sample=False)
    key = jax.random.key(1)
    asked = found(own, do_sample=True, key=key)
    dials = {name: value for name, value in DIALS.items() if name != "do_sample"}
    assert asked == found(engine(), **dials, key=key) != found(engine(), do_sample=True, key=key)
    assert found(own, temperature=1.5, key=key) == found(engine(), **dials | {"temperature": 1.5}, key=key)
    assert found(own, do_sample=True, top_k=0, key=key) == found(engine(), **dials | {"top_k": 0}, key=key)
    assert found(engine(), generation_config=DIALS, key=key) == asked
    with pytest.raises(TideError, match="needs key="):
        own.generate(PROMPTS, do_sample=True)


def test_sampling_alone_takes_temperature_one() -> None:
    key = jax.random.key(1)
    assert found(engine(), do_sample=True, key=key) == found(engine(), temperature=1.0, key=key)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["everything", "no n-gram of two", "suppressed"])
def test_rules_come_before_the_filters_of_sampling(name: str) -> None:
    """The distribution of a first token: transformers' processors, then our filters, which have a test of their own."""
    pytest.importorskip("torch")
    rules, rows = RULES[name], 400
    prompt = PROMPTS[2]
    logits = np.asarray(engine()([prompt], mode="full").logits[0, -1])
    kept = filter_logits(jnp.asarray(processed(logits, prompt, len(prompt), rules)[None]), make_sampling(1.3, top_k=6))
    chances = np.asarray(jax.nn.softmax(kept[0]))
    out = engine().generate(
        [prompt] * rows, max_new_tokens=NEW, mode="full", temperature=1.3, top_k=6, key=jax.random.key(0), **rules
    )
    counts = np.bincount(out.tokens[:, 0], minlength=VOCAB)
    assert (counts[chances == 0] == 0).all()
    assert (np.abs(counts / rows - chances) < 5 * np.sqrt(chances / rows) + 1e-9).all()


# ------------------------------------------------------------------------------------------------- what files may hold


def test_what_is_not_supported_is_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = {"num_beams": 4, "typical_p": 0.9, "guidance_scale": 1.5, "sequence_bias": [[[3], -2.0]], "top_k": -1}
    quiet = {"typical_p": 1.0, "num_beams": 1, "length_penalty": 2.0, "transformers_version": "5.0", "do_sample": True}
    source = write(tmp_path / "source", **said)
    convert(source, tmp_path / "out")
    for place in (source, tmp_path / "out"):
        caplog.clear()
        own = TIDE(tide_jax.load(place))
        found(own), found(own)
        (record,) = caplog.records
        assert all(name in record.message for name in said), record.message
        assert "\n" not in record.message
    caplog.clear()
    found(TIDE(tide_jax.load(write(tmp_path / "quiet", **quiet))))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found(engine(), generation_config={"num_beams": 2})
    assert [r.message for r in caplog.records] == [
        "generation_config: generation settings not supported and ignored: num_beams=2"
    ]


BAD: list[tuple[str, Any]] = [
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.5),
    ("repetition_penalty", "1.2"),
    ("repetition_penalty", float("nan")),
    ("repetition_penalty", True),
    ("no_repeat_ngram_size", -1),
    ("no_repeat_ngram_size", 2.5),
    ("no_repeat_ngram_size", 2**63),
    ("bad_words_ids", 7),
    ("bad_words_ids", [7]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [["x"]]),
    ("min_length", -3),
    ("min_new_tokens", "5"),
    ("forced_bos_token_id", "a"),
    ("forced_eos_token_id", ["a"]),
    ("suppress_tokens", 5),
    ("suppress_tokens", [1.5]),
    ("begin_suppress_tokens", {"a": 1}),
    ("temperature", "warm"),
    ("top_p", [0.5]),
]


@pytest.mark.parametrize("name, value", BAD)
def test_senseless_settings_are_named(name: str, value: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source", **{name: value})
    message = refusal(source)
    assert "generation_config.json" in message
    assert f"{name}=" in message
    assert len(message) <= 300 + len(str(source))
    for arguments in ({name: value}, {"generation_config": {name: value}}):
        with pytest.raises(TideError, match=f"{name}=") as error:
            found(engine(), **arguments)
        assert "\n" not in str(error.value)


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    outside = {"suppress_tokens": [-1, 5000], "bad_words_ids": [[5000], [3, 5000]]}
    assert found(engine(), **outside) == found(engine())


def test_arguments_that_do_not_exist_and_that_contradict() -> None:
    for arguments, said in (
        ({"penalty_alpha": 0.6}, "no argument penalty_alpha"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0 is greedy"),
        ({"generation_config": 5}, "generation_config is int"),
    ):
        with pytest.raises(TideError, match=said):
            found(engine(), **arguments)


def test_settings_survive_a_conversion_and_are_no_part_of_a_models_identity(tmp_path: Path) -> None:
    source = write(tmp_path / "source", **RULES["everything"] | DIALS | {"num_beams": 3})
    convert(source, tmp_path / "out")
    loaded = tide_jax.load(tmp_path / "out")
    assert loaded.config.generation == open_model(source).config.generation
    assert loaded.config.generation.unsupported == ("num_beams=3",)
    assert loaded.config.generation.suppress_tokens == (6, 20)
    assert fingerprint(loaded) == fingerprint(engine().model)


def test_every_setting_has_a_rule_or_a_dial_here() -> None:
    tried = set().union(*RULES.values()) | set(DIALS) | {"min_length"}
    assert set(SETTINGS) <= tried
    assert settings_from({}, "nothing") == NOTHING_SAID == GenerationSettings()
    assert choose(NOTHING_SAID).settings == NOTHING_SAID


def test_a_budget_of_new_tokens_in_a_configuration() -> None:
    two = {"max_new_tokens": 2, "eos_token_id": []}
    assert [len(row) for row in found(engine(), generation_config=two, max_new_tokens=None)] == [2] * 4
    long = random_prompts((3,), vocab=VOCAB)
    config = {"max_new_tokens": 2, "eos_token_id": [], "pad_token_id": 1}
    assert len(found(engine(), long, generation_config=config, max_new_tokens=3)[0]) == 3
