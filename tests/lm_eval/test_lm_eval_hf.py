"""lm-eval's model "tide" against its model "hf": random splits of text, special tokens that stop, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_llama import CONFIG, random_tensors, save

import tide_jax
from convert import convert

pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval", reason="needs `pip install tide_jax[eval]`")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from tide_jax.lm_eval.model import TideLM  # noqa: E402

CONTEXT, NEW = 96, 16
SPECIAL = ["<bos>", "<eos>", "<pad>", "<|eot_id|>"]
TEXT = (
    "The volcano  erupted.\n\nThe lava ran down the valley; the village was empty, the children were safe.\n"
    "def area(r):\n    return 3.14159 * r ** 2\n\nÉté à Naïve-sur-Mer: 12,50 €. 日本語 🌋🌋 <|eot_id|> the end "
)
RULES: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 2},
    "new tokens at least": {"min_new_tokens": 9},
    "a least length": {"min_length": 20},
    "bad words": {"bad_words_ids": [[40], [50, 51, 52]] + [[i, i] for i in range(4, 330)]},
    "suppressed": {"suppress_tokens": list(range(4, 200, 2))},
    "suppressed at first": {"begin_suppress_tokens": list(range(4, 200))},
    "a forced end": {"forced_eos_token_id": 77},
}


class Files(NamedTuple):
    """A checkpoint as transformers reads it, and the same one converted."""

    source: Path
    converted: Path


def make_files(folder: Path, *, adds_bos: bool = False, **generation: Any) -> Files:
    """A random Llama with a byte-level BPE tokenizer whose merges cross words and lines, and special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(BPE())
    pieces = pre_tokenizers.Split(Regex(r"\s?\S+\s?|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Sequence([pieces, level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator([TEXT] * 4, trainer)
    if adds_bos:
        tokens.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    changes: dict[str, Any] = {
        "vocab_size": tokens.get_vocab_size(),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 1,
    }
    tensors = random_tensors(CONFIG | changes)
    save(folder / "source", {name: (0.3 * t).astype(np.float32) for name, t in tensors.items()}, **changes)
    special: Any = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, extra_special_tokens=["<|eot_id|>"], **special)
    fast.save_pretrained(folder / "source")
    if generation:
        (folder / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | generation))
    convert(folder / "source", folder / "converted")
    return Files(folder / "source", folder / "converted")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("plain"))


def hf(files: Files, **arguments: Any) -> HFLM:
    return HFLM(str(files.source), dtype="float32", device="cpu", batch_size=1, **arguments)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("a_task", i, 1)) for i, args in enumerate(arguments)]


def random_pairs(count: int) -> list[tuple[str, str]]:
    """Contexts and continuations cut out of the text anywhere, within words, characters of several bytes and spaces."""
    rng = np.random.default_rng(0)
    cuts = [sorted(rng.integers(0, len(TEXT) + 1, 3).tolist()) for _ in range(count)]
    short = [(TEXT[a : a + 25][: b - a], TEXT[b : b + 12][: c - b]) for a, b, c in cuts]
    tight = [(TEXT[a : a + 20], TEXT[a + 20 : a + 21]) for a in range(0, len(TEXT) - 21, 3)]
    return short + tight


@pytest.mark.matrix
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.slow
def test_scores_of_random_splits(tmp_path: Path, adds_bos: bool, add_bos_token: bool | None) -> None:
    made = make_files(tmp_path, adds_bos=adds_bos)
    theirs = hf(made, add_bos_token=add_bos_token)
    ours = TideLM(str(made.converted), batch_size=16, add_bos_token=add_bos_token)
    whole, merged = [], []
    for pair in random_pairs(60):
        try:
            context, tokens = theirs._encode_pair(*pair) if pair[0] else ([0], theirs.tok_encode(pair[1]))
            (whole if context and tokens else merged).append(pair)
        except AssertionError:
            merged.append(pair)
    assert len(whole) > 40
    assert len(merged) > 5, "some continuations merge into their contexts"
    for pair in merged:
        with pytest.raises(AssertionError if pair[1] or pair[0] else IndexError):
            theirs.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)
        with pytest.raises(tide_jax.TideError, match="has no token of its own") as error:
            ours.loglikelihood(requests("loglikelihood", whole[0], pair), disable_tqdm=True)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) <= 300
    wanted, found = (lm.loglikelihood(requests("loglikelihood", *whole), disable_tqdm=True) for lm in (theirs, ours))
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in wanted], rtol=2e-5, atol=2e-4)
    assert [g for _, g in found] == [g for _, g in wanted]
    texts = [(TEXT,), (TEXT[5:30],)]
    wanted, found = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in (theirs, ours))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-4)
    greedy = {"until": ["\n\n"], "max_gen_toks": 6}
    prompts = [(text, greedy) for text in ("The volcano", "<bos>The lava", "<eos>def area")]
    wanted, found = (lm.generate_until(requests("generate_until", *prompts)) for lm in (theirs, ours))
    assert found == wanted


PROMPTS = ("The volcano erupted", "def area(r):\n ", "Été à", "the end the end the end the")


def both(theirs: HFLM, ours: TideLM, **arguments: Any) -> list[str]:
    """The texts of the model "hf", which must be ours."""
    settings = {"until": ["\n\n\n"], "max_gen_toks": NEW, "do_sample": False} | arguments
    prompts = [(prompt, settings) for prompt in PROMPTS]
    wanted, found = (
        lm.generate_until(requests("generate_until", *prompts), disable_tqdm=True) for lm in (theirs, ours)
    )
    assert found == wanted, arguments
    return found


@pytest.mark.slow
def test_every_rule_as_a_generation_argument(files: Files) -> None:
    theirs, ours = hf(files), TideLM(str(files.converted))
    plain = both(theirs, ours)
    for name, rules in RULES.items():
        assert both(theirs, ours, **rules) != plain or name in ("a least length", "new tokens at least"), name


@pytest.mark.matrix
@pytest.mark.parametrize("name", RULES)
def test_every_rule_in_a_file(name: str, tmp_path: Path) -> None:
    made = make_files(tmp_path, **RULES[name], do_sample=True, temperature=0.6, top_k=3)
    theirs, ours = hf(made), TideLM(str(made.converted))
    both(theirs, ours)
    if name == "repetition penalty":  # arguments override the file
        both(theirs, ours, repetition_penalty=1.0)


def test_special_tokens_stop_texts(tmp_path: Path) -> None:
    """Few tokens are allowed, so that special ones come up; none of them is in the decoded text."""
    allowed = [1, 3, 40, 80, 120, 200, 260, 300]
    vocab = 4 + 256 + 80
    made = make_files(tmp_path, suppress_tokens=[i for i in range(vocab) if i not in allowed])
    theirs, ours = hf(made), TideLM(str(made.converted))
    plain = both(theirs, ours)
    stopped = both(theirs, ours, until=["<|eot_id|>"])
    assert stopped != plain
    assert all("<" not in text for text in stopped)
    assert all(long.startswith(short) for long, short in zip(plain, stopped, strict=True))
    for until in (["<eos>"], ["nothing", "<|eot_id|>\n"], []):
        both(theirs, ours, until=until)
    both(theirs, ours, min_new_tokens=12)


def test_sampling_takes_the_files_dials(tmp_path: Path, files: Files) -> None:
    """With one token to choose from, draws are greedy; and 50 where nobody says otherwise, as transformers has it."""
    made = make_files(tmp_path, do_sample=True, temperature=0.6, top_k=1)
    theirs, ours = hf(made), TideLM(str(made.converted))
    greedy = both(theirs, ours)
    assert both(theirs, ours, do_sample=True, temperature=1.0) == greedy
    sampled = {"until": [], "max_gen_toks": NEW, "do_sample": True, "temperature": 1.0}
    prompts = [(prompt, sampled) for prompt in PROMPTS]
    named = [(prompt, sampled | {"top_k": 50}) for prompt in PROMPTS]
    lm = TideLM(str(files.converted))
    assert lm.generate_until(requests("generate_until", *prompts)) == lm.generate_until(
        requests("generate_until", *named)
    )


def test_add_bos_token_is_true_or_false(files: Files) -> None:
    with pytest.raises(tide_jax.TideError, match="add_bos_token='yes' must be True or False"):
        TideLM(str(files.converted), add_bos_token="yes")
