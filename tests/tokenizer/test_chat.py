"""Chat templates: the user's words are in the prompt, and whatever else happens is one line."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_styles import CHATML, EITHER, PARTS, SMOLVLM, TEXT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tide_jax.tokenizer.template_process
from tide_jax import TideError
from tide_jax.tokenizer.chat import ChatTemplate, prompt_ids
from tide_jax.tokenizer.files import read_tokenizer

EXAMPLES = int(os.environ.get("TIDE_EXAMPLES", "25"))
CONVERSATION = [
    {"role": "user", "content": "What is\n\ta <tide>?  "},
    {"role": "assistant", "content": '<think>hm</think>\nWater & "moon".'},
    {"role": "user", "content": "Why 'twice' a day?"},
]


def byte_tokenizer(template: Any = None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


def as_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.mark.parametrize("name", [*TEXT, *EITHER, *PARTS])
def test_prompts_are_those_of_transformers(name: str) -> None:
    tokenizer = byte_tokenizer((TEXT | EITHER | PARTS)[name])
    template = ChatTemplate(tokenizer)
    for messages in (CONVERSATION[:1], CONVERSATION):
        passed = as_parts(messages) if name in PARTS else messages
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "enable_thinking": False}):
            expected = tokenizer.apply_chat_template(passed, tokenize=False, **options)
            assert template.render(messages, **options) == expected  # type: ignore[arg-type]
            assert template.render(passed, **options) == expected  # type: ignore[arg-type]
        ids = tokenizer.apply_chat_template(passed[:1], add_generation_prompt=True)["input_ids"]
        assert template.ids(messages[0]["content"]) == ids


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "mistral", "smolvlm", "qwen2-vl"])
def test_a_last_message_to_continue(name: str) -> None:
    tokenizer = byte_tokenizer((TEXT | EITHER | PARTS)[name])
    for messages in (CONVERSATION[:2], [*CONVERSATION, {"role": "assistant", "content": " Because  "}]):
        passed = as_parts(messages) if name in PARTS else messages
        options = {"add_generation_prompt": False, "continue_final_message": True}
        expected = tokenizer.apply_chat_template(passed, tokenize=False, **options)
        assert ChatTemplate(tokenizer).render(messages, **options) == expected


@pytest.fixture(scope="module")
def styles() -> dict[str, tuple[ChatTemplate, PreTrainedTokenizerFast]]:
    tokenizers = {name: byte_tokenizer(text) for name, text in (TEXT | EITHER | PARTS).items()}
    return {name: (ChatTemplate(tokenizer), tokenizer) for name, tokenizer in tokenizers.items()}


@given(text=st.text(max_size=60), name=st.sampled_from([*TEXT, *EITHER, *PARTS]))
@example("a", "llama-3")
@example("user", "chatml")
@example("\x1c\x85 ẞŉ\u2028İ", "upper")
@example('"\n\\u00e9é', "json")
@example("<&'\">", "html")
@example("[{'type': 'text', \"type\": \"text\"}]", "smolvlm")
@settings(derandomize=True, deadline=None, max_examples=8 * EXAMPLES)
def test_any_text_is_in_the_prompt(
    styles: dict[str, tuple[ChatTemplate, PreTrainedTokenizerFast]], text: str, name: str
) -> None:
    template, tokenizer = styles[name]
    messages = [{"role": "user", "content": text}]
    passed = as_parts(messages) if name in PARTS else messages
    expected = tokenizer.apply_chat_template(passed, tokenize=False, add_generation_prompt=True)
    assert template.render(messages) == expected


# ------------------------------------------------------------------------------------------------------------- faults

LOST = {
    "no message": "You are helpful.",
    "cut": "{{ messages[0].content[:8] }}",
    "in its own words": "Tell me: what is a tide? {{ messages[0].rol }}",
    "a list of parts as Python writes it": "{% if messages[0].content is string %}{% else %}{{ messages }}{% endif %}",
    "other key": "{% for m in messages %}{{ m.text }}{% endfor %}",
    "assistants only": "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
    "other parts": "{% for m in messages %}{% for p in m.content %}{{ p.value }}{% endfor %}{% endfor %}",
}
BROKEN = {
    "refuses": ("{{ raise_exception('not\nthis') }}", "TemplateError: not this"),
    "refuses with an object": ("{{ raise_exception({'a': 1}) }}", "TemplateError: {'a': 1}"),
    "undefined": ("{{ messages.first.content }}", "UndefinedError"),
    "syntax": ("{% for m in messages %}\n{{ m.content }", "TemplateSyntaxError in line 2"),
    "unknown tag": ("{% render messages %}", "TemplateSyntaxError"),
    "unknown filter": ("{{ messages | shout }}", "shout"),
    "another file": ("{% include 'secret' %}", "TypeError: no loader"),
    "internals": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "internals on a namespace": ("{% set n = namespace(_a=1) %}", "SecurityError"),
    "changes the messages": ("{{ messages.append(1) }}", "SecurityError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep": ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "RecursionError"),
    "type": ("{{ messages + 1 }}", "TypeError"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "wide range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
}
ENDLESS = {
    "loops": "{% for a in range(9**5) %}" * 3 + "{% endfor %}" * 3,
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filter": "{{ lipsum(10 ** 9) }}",
    "billion laughs": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | pprint }}",
}
HUGE = {
    "text": ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "10000000 characters"),
    "multiplied": ("{{ 'x' * 10 ** 11 }}", "1 GiB of memory"),
    "replaced": ("{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}", "1 GiB of memory"),
    "formatted": ("{{ '%099999999999d' % 1 }}", "1 GiB of memory"),
    "padded": ("{{ 'x'.ljust(10 ** 11) }}", "1 GiB of memory"),
    "doubled": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "1 GiB",
    ),
    "indented": ("{{ messages | tojson(indent=10 ** 11) }}", "1 GiB of memory"),
    "listed": ("{% set x = [0] * 10 ** 10 %}", "1 GiB of memory"),
}


def refusal(template: str, text: str = "What is a tide?") -> str:
    with pytest.raises(TideError) as caught:
        ChatTemplate(byte_tokenizer(template)).ids(text)
    message = str(caught.value)
    assert len(message) <= 300
    assert message.isprintable(), "one line"
    assert "the tokenizer: the chat template 'default' " in message
    assert "correct it, or choose another" in message
    return message


@pytest.mark.parametrize("name", LOST)
def test_lost_words_are_an_error(name: str) -> None:
    assert "leaves out the user's words, expected 'What is a tide?' in the prompt" in refusal(LOST[name])


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_with_an_error(name: str) -> None:
    template, expected = BROKEN[name]
    assert expected in refusal(template)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tide_jax.tokenizer.template_process, "_CPU_SECONDS", 0)
    assert "takes longer than 5 seconds" in refusal(ENDLESS[name])


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_writes_too_much(name: str) -> None:
    template, expected = HUGE[name]
    assert expected in refusal(template)


def test_a_slow_machine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tide_jax.tokenizer.template_process, "_WALL_SECONDS", 0.5)
    assert "takes longer" in refusal(ENDLESS["loops"])


def test_a_template_goes_on_after_one_text_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tide_jax.tokenizer.template_process, "_CPU_SECONDS", 0)
    loop = "{% if messages[0].content == 'loop' %}" + ENDLESS["loops"] + "{% endif %}{{ messages[0].content }}"
    template = ChatTemplate(byte_tokenizer(loop))
    for _ in range(2):
        assert template.render([{"role": "user", "content": "hello"}]) == "hello"
        with pytest.raises(TideError, match="takes longer"):
            template.render([{"role": "user", "content": "loop"}])


@pytest.mark.slow
def test_an_interrupted_template_starts_anew() -> None:
    """The answer that was not waited for is not taken for the next one."""
    wait = "{% if messages[0].content == 'wait' %}" + ENDLESS["loops"] + "{% endif %}{{ messages[0].content }}"
    template = ChatTemplate(byte_tokenizer(wait))
    assert template.render([{"role": "user", "content": "hello"}]) == "hello"
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "wait"}])
    timer.join()
    assert template.render([{"role": "user", "content": "again"}]) == "again"


@given(data=st.data(), name=st.sampled_from([*TEXT, *EITHER, *PARTS]))
@settings(derandomize=True, deadline=None, max_examples=EXAMPLES)
def test_a_damaged_template_is_refused_or_shows_the_words(data: st.DataObject, name: str) -> None:
    text = (TEXT | EITHER | PARTS)[name]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 20, len(text))))
    damaged = text[:start] + data.draw(st.text(max_size=5)) + text[end:]
    template = ChatTemplate(byte_tokenizer(damaged or "x"))
    try:
        prompt, message = template.render(CONVERSATION[:1]), None
    except TideError as error:
        prompt, message = "", str(error)
    if message is None:
        assert all(word in prompt.lower() for word in ("what", "is", "tide"))
    else:
        assert len(message) <= 300
        assert message.isprintable()


@pytest.mark.parametrize(
    "messages", [[], ["hello"], [{"role": "user"}], [{"role": "user", "content": {1, 2}}], [{"content": "hello"}]]
)
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(TideError) as caught:
        ChatTemplate(byte_tokenizer(CHATML)).render(messages)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- files and choices


def saved(directory: Path, files: dict[str, Any]) -> PreTrainedTokenizerFast:
    directory.mkdir()
    byte_tokenizer().save_pretrained(directory)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            content = json.loads(path.read_text()) | content
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_tokenizer(directory)


JINJA, LEGACY, CONFIG, RAG = (
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "additional_chat_templates/rag.jinja",
)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({JINJA: "j"}, "j"),
        ({LEGACY: {"chat_template": "l"}}, "l"),
        ({CONFIG: {"chat_template": "c"}}, "c"),
        ({"processor_config.json": {"chat_template": "p"}}, "p"),
        ({CONFIG: {"chat_template": "c"}, LEGACY: {"chat_template": "l"}}, "c"),
        ({CONFIG: {"chat_template": "c"}, JINJA: "j"}, "j"),
        ({LEGACY: {"chat_template": "l"}, JINJA: "j"}, "j"),
        ({LEGACY: {"chat_template": "l"}, RAG: "r"}, {"default": "l", "rag": "r"}),
        ({CONFIG: {"chat_template": "c"}, RAG: "r"}, {"default": "c", "rag": "r"}),
        ({JINJA: "j", RAG: "r"}, {"default": "j", "rag": "r"}),
        ({RAG: "r"}, {"rag": "r"}),
        ({CONFIG: {"chat_template": [{"name": "default", "template": "d"}]}}, "d"),
        (
            {CONFIG: {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}},
            {"default": "d", "tool_use": "t"},
        ),
        ({LEGACY: {"chat_template": None}}, None),
    ],
)
def test_all_template_files_are_read(tmp_path: Path, files: dict[str, Any], expected: Any) -> None:
    assert saved(tmp_path / "model", files).chat_template == expected


@pytest.mark.parametrize(
    "files, expected",
    [
        ({LEGACY: {"chat_template": 5}}, "chat_template.json: chat_template is not text"),
        ({LEGACY: {"chat_template": [1]}}, "chat_template.json: chat_template is not text"),
        ({LEGACY: {"chat_template": [{"name": "a"}]}}, "chat_template.json: chat_template is not text"),
        ({LEGACY: {"chat_template": {"a": 1}}}, "chat_template.json: chat_template is not text"),
        ({LEGACY: "{"}, "chat_template.json"),
        ({LEGACY: [1]}, "chat_template.json"),
        ({CONFIG: {"chat_template": 5}}, "tokenizer_config.json: chat_template is not text"),
    ],
)
def test_a_file_without_a_template_is_named(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError) as caught:
        saved(tmp_path / "model", files)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "model", {RAG: "r"})
    (tmp_path / "model" / RAG).write_bytes(b"\xff\xfe")
    with pytest.raises(TideError, match=r"rag\.jinja can't be read|no tokenizer that transformers can load"):
        read_tokenizer(tmp_path / "model")


def test_the_user_chooses_among_several() -> None:
    echo = "[{{ messages[0].content }}]"
    two = byte_tokenizer({"default": CHATML, "rag": echo})
    assert ChatTemplate(two).text == ChatTemplate(two, "default").text == CHATML
    assert ChatTemplate(two, "rag").text == echo
    assert ChatTemplate(byte_tokenizer({"rag": echo})).name == "rag"
    assert prompt_ids(two, ["a"], chat_template="rag") == [two("[a]")["input_ids"]]
    with pytest.raises(TideError, match="has no chat_template=nope; choose one of: default, rag"):
        ChatTemplate(two, "nope")
    with pytest.raises(TideError, match=r"several chat templates and no default; choose one .*: rag, tool"):
        ChatTemplate(byte_tokenizer({"tool": CHATML, "rag": echo}))
    with pytest.raises(TideError, match="has no chat template"):
        ChatTemplate(byte_tokenizer(), "rag")


def test_prompts_as_they_are() -> None:
    for tokenizer, raw in ((byte_tokenizer(), False), (byte_tokenizer("{{ broken"), True)):
        assert prompt_ids(tokenizer, ["a b", "c"], raw=raw) == [tokenizer(t)["input_ids"] for t in ("a b", "c")]


def test_the_tokenizers_directory_is_named(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "model", {JINJA: "{{ broken"})
    with pytest.raises(TideError, match=f"^{tmp_path / 'model'}: the chat template 'default' can't be rendered"):
        ChatTemplate(tokenizer).ids("hello")


def test_templates_travel_with_a_conversion_and_an_export(source: Path, tmp_path: Path) -> None:
    from convert import convert, export

    byte_tokenizer().save_pretrained(source)
    (source / LEGACY).write_text(json.dumps({"chat_template": SMOLVLM}))
    (source / RAG).parent.mkdir()
    (source / RAG).write_text(CHATML)
    convert(source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "exported")
    for directory in (source, tmp_path / "converted", tmp_path / "exported"):
        tokenizer = tide_jax.load_tokenizer(directory)
        assert tokenizer.chat_template == {"default": SMOLVLM, "rag": CHATML}
        assert "a tide" in tokenizer.decode(ChatTemplate(tokenizer).ids("What is a tide?"))
