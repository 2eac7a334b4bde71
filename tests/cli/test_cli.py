"""The command line: calibrate, generate and inspect on a tiny converted model, and one line for whatever is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import CONFIG, random_tensors, save

import convert.__main__
import tide_jax
import tide_jax.cli.main
from convert import convert as convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("<unk>", "the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "it", "ran", "to", "big", "red", "sun")
TEXT = "the cat sat on a mat and saw the big red dog\nit ran to the sun and the cat saw it\n" * 50
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of four layers with a tokenizer of words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    deep = {"num_hidden_layers": 4, "eos_token_id": None}
    save(folder / "source", random_tensors(CONFIG | deep), **deep)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "source")
    convert_checkpoint(folder / "source", folder / "converted")
    return folder / "converted"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def calibration(model: Path, text: Path) -> tuple[Path, dict[str, Any]]:
    """A router file made by the command line, and what the command printed."""
    routers = text.parent / "routers.safetensors"
    options = ["--checkpoint-interval", "1", "--bottleneck", "4", "--min-layers", "1", "--max-length", "16", "--json"]
    options += ["--exit-head-steps", "5"]
    arguments = ["calibrate", model, "--text", text, "--output", routers, *options]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = tide_jax.cli.main.main(list(map(str, arguments)))
    assert code == 0
    return routers, json.loads(output.getvalue())


def printed(capsys: Capture, *arguments: Any) -> str:
    """Standard output of a command that succeeds."""
    assert tide_jax.cli.main.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys: Capture, *arguments: Any, main: Any = tide_jax.cli.main.main) -> str:
    """What a command that fails prints: one line on standard error and nothing else."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


# ---- what works ----


def test_calibrate_generate_inspect(model: Path, calibration: tuple[Path, dict[str, Any]], capsys: Capture) -> None:
    routers, report = calibration
    assert report["output"] == str(routers)
    assert report["bytes"] == routers.stat().st_size
    generate = ("generate", model, "--prompt", "the cat", "--prompt", "it ran to", "--routers", routers)
    dials = ("--exit-threshold", "0", "--min-layers", "1", "--max-new-tokens", "5", "--json")
    out = json.loads(printed(capsys, *generate, *dials))
    assert [len(row["tokens"]) for row in out["outputs"]] == [5, 5]
    assert [row["prompt"] for row in out["outputs"]] == ["the cat", "it ran to"]
    assert out["stats"]["layers_per_token"] < 4
    full = json.loads(printed(capsys, *generate, *dials, "--mode", "full"))
    assert {layer for row in full["outputs"] for layer in row["exit_layers"]} == {3}
    facts = json.loads(printed(capsys, "inspect", model, "--checkpoint-interval", "1", "--routers", routers, "--json"))
    assert facts["exit_points"] == facts["routers"]["exit_points"] == [0, 1, 2]
    assert facts["routers"]["data"] == str(routers.parent / "text.txt")


def test_text_for_people(model: Path, capsys: Capture) -> None:
    generate = ("generate", model, "--prompt", "the cat", "--max-new-tokens", "4")
    whole = printed(capsys, *generate, "--no-stream")
    assert printed(capsys, *generate) == whole
    assert "4 of width 12" in printed(capsys, "inspect", model)


def test_the_same_seed_draws_the_same(model: Path, capsys: Capture) -> None:
    draw = ("generate", model, "--prompt", "the cat", "--max-new-tokens", "6", "--temperature", "1", "--no-stream")
    assert printed(capsys, *draw, "--seed", 2**63 - 1) == printed(capsys, *draw, "--seed", 2**63 - 1)


def chatty(model: Path, folder: Path, template: str, **named: str) -> Path:
    """The model with chat templates."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    for name, text in named.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return folder


def test_a_chat_template_shows_the_prompt(model: Path, tmp_path: Path, capsys: Capture) -> None:
    parts = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    chat = chatty(model, tmp_path / "chat", parts, dog="dog ran {{ messages[0].content }}")
    options = ("--max-new-tokens", 4, "--json")

    def tokens(*arguments: Any) -> Any:
        return json.loads(printed(capsys, "generate", chat, *arguments, *options))["outputs"][0]["tokens"]

    assert tokens("--prompt", "the cat") == tokens("--prompt", "the cat", "--raw")
    raw = tokens("--prompt", "dog ran the cat", "--raw")
    assert tokens("--prompt", "the cat", "--chat-template", "dog") == raw


@pytest.mark.parametrize(
    "template, command, expected",
    [
        ("{{ x", "generate --prompt cat", "chat: the chat template 'default' can't be rendered (TemplateSyntaxError"),
        ("red sun", "generate --prompt cat", "leaves out the user's words, expected 'cat'"),
        ("red sun", "calibrate --text self --output {out}", "leaves out the user's words"),
        ("red sun", "generate --prompt cat --chat-template rag", "no --chat-template rag; choose one of: default, dog"),
        ("red sun", "calibrate --text self --output {out} --chat-template rag", "no --chat-template rag; choose one"),
        ("red sun", "generate --prompt cat --raw --chat-template dog", "leave --chat-template out"),
        (
            "red sun",
            "calibrate --text {text} --output {out} --chat-template dog",
            "--chat-template only applies to --text self",
        ),
    ],
)
def test_a_chat_template_of_no_use_is_one_line(
    template: str, command: str, expected: str, model: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Found out before the weights are read."""
    chat = chatty(model, tmp_path / "chat", template, dog="{{ messages[0].content }}")
    for weights in chat.glob("*.safetensors"):
        weights.unlink()
    name, *options = command.format(text=text, out=tmp_path / "routers.safetensors").split()
    assert expected in refusal(capsys, name, chat, *options)
    assert not (tmp_path / "routers.safetensors").exists()


def test_convert_is_a_command(source: Path, tmp_path: Path, capsys: Capture) -> None:
    main = convert.__main__.main
    assert "would write" in printed(capsys, "convert", source, tmp_path / "out", "--dry-run")
    assert main([str(source), str(tmp_path / "out"), "--json", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"


# ---- what is wrong ----

_PROMPT = ("--prompt", "the cat")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no command": ((), "COMMAND"),
    "an unknown command": (("fly",), "fly"),
    "an unknown option": (("inspect", "MODEL", "--colour"), "--colour"),
    "a word for a number": (("generate", "MODEL", *_PROMPT, "--top-k", "many"), "--top-k"),
    "nothing there": (("inspect", "/nowhere/at/all"), "/nowhere/at/all"),
    "an empty prompt": (("generate", "MODEL", "--prompt", ""), "the prompt is empty"),
    "a second prompt that is empty": (("generate", "MODEL", *_PROMPT, "--prompt", ""), "prompt 2 is empty"),
    "no name of a source": (("convert", "", "OUT"), "source '' must be a path"),
    "no name of a destination": (("convert", "MODEL", ""), "destination '' must be a path"),
    "no name of an export": (("export", "MODEL", ""), "destination '' must be a path"),
    "a prompt that is no UTF-8": (
        ("generate", "MODEL", "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")),
        "--prompt is not valid text: its character 3, '\\udce9', is not Unicode",
    ),
    "a second prompt that is no UTF-8": (
        ("generate", "MODEL", *_PROMPT, "--prompt", "\ud800"),
        "--prompt 2 is not valid",
    ),
    "a threshold above 1": (("generate", "MODEL", *_PROMPT, "--exit-threshold", "1.5"), "--exit-threshold 1.5"),
    "a cache strategy without routers": (
        ("generate", "MODEL", *_PROMPT, "--kv-strategy", "recompute"),
        "--kv-strategy says how tokens exit; it needs --routers",
    ),
    "a threshold without routers": (
        ("generate", "MODEL", *_PROMPT, "--exit-threshold", "0.9"),
        "--exit-threshold says how tokens exit; it needs --routers",
    ),
    "a least depth without routers": (
        ("generate", "MODEL", *_PROMPT, "--min-layers", "2"),
        "--min-layers says how tokens exit; it needs --routers",
    ),
    "an interval without routers": (
        ("generate", "MODEL", *_PROMPT, "--checkpoint-interval", "2"),
        "--checkpoint-interval checks a router file; it needs --routers",
    ),
    "a rank above the width": (
        ("calibrate", "MODEL", "--text", "TEXT", "--output", "OUT", "--exit-head-rank", "13"),
        "--exit-head-rank 13 exceeds the model's width of 12",
    ),
    "a threshold below 0": (("generate", "MODEL", *_PROMPT, "--exit-threshold", "-0.5"), "--exit-threshold -0.5"),
    "more layers than there are": (
        ("generate", "MODEL", *_PROMPT, "--routers", "ROUTERS", "--min-layers", "5"),
        "--min-layers 5",
    ),
    "exits without routers": (
        ("generate", "MODEL", *_PROMPT, "--mode", "exit", "--max-new-tokens", "999"),
        "--mode exit needs --routers",
    ),
    "drafts without lossless": (
        ("generate", "MODEL", *_PROMPT, "--draft", "int8", "--mode", "full"),
        "--draft says who drafts; it needs --mode lossless",
    ),
    "no new tokens": (("generate", "MODEL", *_PROMPT, "--max-new-tokens", "0"), "--max-new-tokens 0"),
    "a negative temperature": (("generate", "MODEL", *_PROMPT, "--temperature", "-1"), "--temperature -1.0"),
    "a huge top-k": (("generate", "MODEL", *_PROMPT, "--top-k", "9" * 30), "--top-k 9999"),
    "a negative seed": (("generate", "MODEL", *_PROMPT, "--seed", "-1"), "--seed"),
    "a huge seed": (("calibrate", "MODEL", "--text", "TEXT", "--output", "OUT", "--seed", str(2**63)), "--seed"),
    "a missing router file": (("generate", "MODEL", *_PROMPT, "--routers", "FOLDER/none"), "no router file at"),
    "a corrupt router file": (("generate", "MODEL", *_PROMPT, "--routers", "TEXT"), "text.txt is damaged"),
    "routers to inspect that are none": (("inspect", "MODEL", "--routers", "TEXT"), "text.txt is damaged"),
    "another interval": (
        ("generate", "MODEL", *_PROMPT, "--routers", "ROUTERS", "--checkpoint-interval", "2"),
        "a router every 1 layers, expected every 2",
    ),
    "an unknown dtype": (("generate", "MODEL", *_PROMPT, "--dtype", "int8"), "--dtype 'int8'"),
    "an empty text": (("calibrate", "MODEL", "--text", "EMPTY", "--output", "OUT"), "holds no text"),
    "no text": (("calibrate", "MODEL", "--text", "FOLDER/none.txt", "--output", "OUT"), "no text file at"),
    "no folder to write to": (("calibrate", "MODEL", "--text", "TEXT", "--output", "FOLDER/a/b"), "can't write"),
    "a folder to write": (("calibrate", "MODEL", "--text", "TEXT", "--output", "FOLDER"), "it is a directory"),
    "a place that is a device": (
        ("calibrate", "MODEL", "--text", "TEXT", "--output", "/proc/a"),
        "can't write /proc/a",
    ),
    "a mesh that is none": (("generate", "MODEL", *_PROMPT, "--mesh", "4"), "--mesh '4' must be DATAxMODEL"),
    "more devices than there are": (("generate", "MODEL", *_PROMPT, "--mesh", "1x64"), "--mesh 1x64 needs 64 devices"),
    "processes without a mesh": (("generate", "MODEL", *_PROMPT, "--distributed"), "--distributed needs --mesh"),
    "a process that is alone": (("generate", "MODEL", *_PROMPT, "--process-id", "1"), "it needs --distributed"),
    "processes that can't be joined": (
        ("generate", "MODEL", *_PROMPT, "--mesh", "1x1", "--distributed"),
        "give each of them --coordinator HOST:PORT",
    ),
    "no samples": (("calibrate", "MODEL", "--text", "TEXT", "--output", "OUT", "--samples", "0"), "--samples 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(
    case: str, model: Path, text: Path, calibration: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Capture
) -> None:
    arguments, expected = WRONG[case]
    (tmp_path / "empty.txt").write_text("\n \n")
    places = {"MODEL": model, "TEXT": text, "ROUTERS": calibration[0], "EMPTY": tmp_path / "empty.txt"}
    places |= {"OUT": tmp_path / "out.safetensors"}
    filled = [str(places.get(a, a)).replace("FOLDER", str(tmp_path)) for a in arguments]
    assert expected in refusal(capsys, *filled)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_bad_input_to_convert(source: Path, tmp_path: Path, capsys: Capture) -> None:
    main, out = convert.__main__.main, tmp_path / "out"
    assert "absent does not exist" in refusal(capsys, tmp_path / "absent", out, main=main)
    assert "required: DST; see 'python -m convert --help'" in refusal(capsys, source, main=main)
    assert "invalid choice: 'int8'" in refusal(capsys, "convert", source, out, "--dtype", "int8")
    broken = save(tmp_path / "broken", model_type="a\nb")
    assert "model_type 'a" in refusal(capsys, broken, out, main=main)


@pytest.mark.parametrize("main", [tide_jax.cli.main.main, convert.__main__.main])
def test_an_interrupted_conversion(
    main: Any, source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.output.writer.ShardWriter.write", interrupt)
    command = ["convert"] if main is tide_jax.cli.main.main else []
    assert main([*command, str(source), str(tmp_path / "out")]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("> /dev/full", 2, "error: the output cannot be read or written (No space left on device)\n"),
        ("| true", 141, ""),
    ],
)
def test_output_that_cannot_be_written(model: Path, output: str, code: int, message: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    command = f"set -o pipefail; {sys.executable} -m tide_jax.cli inspect {model} --json {output}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (run.returncode, run.stderr) == (code, message)


def run_in_shell(command: str, output: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command of the command line in a process of its own, with a shell's redirections."""
    line = f"set -o pipefail; {sys.executable} -m tide_jax.cli {command} {output}"
    # Unbuffered, argparse would swallow the errors of --help.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run(["bash", "-c", line], capture_output=True, check=False, cwd=ROOT, env=inherited | environment)
    assert b"Traceback" not in run.stderr + run.stdout
    assert b"Exception ignored" not in run.stderr
    return run


@pytest.mark.parametrize("stream", ["", "--no-stream"])
@pytest.mark.slow
def test_output_that_cannot_hold_the_text(model: Path, stream: str, tmp_path: Path) -> None:
    """Characters that the output's encoding lacks are replaced."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    shutil.copytree(model, tmp_path / "model")
    emoji = Tokenizer(WordLevel({chr(0x1F300 + i): i for i in range(len(WORDS))}, unk_token=chr(0x1F300)))
    emoji.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    command = f"generate {tmp_path / 'model'} --prompt \U0001f301 --max-new-tokens 4 {stream}"
    run = run_in_shell(command, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (run.returncode, run.stdout) == (0, b"? ? ? ?\n"), run.stderr


@pytest.mark.parametrize(
    ("command", "output", "code", "message"),
    [
        ("inspect MODEL", ">&-", 2, b"error: standard output is closed: send it to a file, or to /dev/null"),
        ("convert SOURCE OUT", "<&- >&-", 2, b"error: standard output is closed"),
        ("--help", "| true", 141, b""),
        ("inspect nowhere", "2>/dev/full", 2, b""),
    ],
)
def test_closed_and_full_streams(
    command: str, output: str, code: int, message: bytes, model: Path, source: Path, tmp_path: Path
) -> None:
    places = {"MODEL": model, "SOURCE": source, "OUT": tmp_path / "out"}
    run = run_in_shell(" ".join(str(places.get(word, word)) for word in command.split()), output)
    assert (run.returncode, run.stdout) == (code, b"")
    assert run.stderr.startswith(message)
    assert run.stderr.count(b"\n") == bool(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_closed_standard_error_gets_into_no_file(source: Path, tmp_path: Path, model: Path) -> None:
    """The first file that is opened would get its number, and libraries print to that number."""
    run = run_in_shell(f"convert {source} {tmp_path / 'out'} --json", "<&- 2>&-")
    assert run.returncode == 0
    assert json.loads(run.stdout)["destination"] == str(tmp_path / "out")
    config = tide_jax.load(tmp_path / "out").config
    assert config == tide_jax.load(source).config
    run = run_in_shell(f"generate {model} --prompt the --max-new-tokens 2 --json", "2>/dev/full")
    assert len(json.loads(run.stdout)["outputs"]) == 1
