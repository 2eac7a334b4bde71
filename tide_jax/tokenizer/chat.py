"""Conversations as prompts: a tokenizer's chat template, rendered so that the user's words are in the prompt."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tide_jax.checks import unicode_text
from tide_jax.errors import TideError
from tide_jax.tokenizer.chat_files import DEFAULT, by_name
from tide_jax.tokenizer.template_process import TemplateFailure, TemplateProcess

Message = Mapping[str, Any]
_Content = Callable[[str], Any]
_PROBE = "tideprobe qzjxv"  # words that no template has of its own
_HERE = "CONTINUE-HERE-qzjxv"


def prompt_ids(
    tokenizer: Any, texts: Iterable[str], *, chat_template: str | None = None, raw: bool = False
) -> list[list[int]]:
    """Token ids of prompts, each as a user's message in the chat template where the tokenizer has one.

    Args:
      tokenizer: what `tide_jax.load_tokenizer` gives.
      texts: the prompts.
      chat_template: name of a template, of several; default: "default".
      raw: take the prompts as they are, without a template.

    Raises:
      TideError: as `ChatTemplate`.
    """
    if raw or (chat_template is None and not getattr(tokenizer, "chat_template", None)):
        return [list(tokenizer(unicode_text("the prompt", text))["input_ids"]) for text in texts]
    template = ChatTemplate(tokenizer, chat_template)
    return [template.ids(text) for text in texts]


class ChatTemplate:
    """A tokenizer's chat template.

    Text is what transformers' `apply_chat_template` gives, with three differences. A template that reads a message as
    a list of parts, as those of multimodal models do, gets a list. Whatever is wrong is a TideError, and so is a
    prompt that lacks the user's words. And time and memory have bounds: a template renders in a process of its own.

    Attributes:
      name: which of the tokenizer's templates it is.
      text: the template.
    """

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        """Chooses a template.

        Args:
          tokenizer: what `tide_jax.load_tokenizer` gives.
          name: which template, where there are several; default: "default", or the only one.

        Raises:
          TideError: the tokenizer has no such template.
        """
        self._tokenizer = tokenizer
        self._where = str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
        templates = by_name(getattr(tokenizer, "chat_template", None), self._where)
        self.name = _chosen(templates, name, self._where)
        self.text = templates[self.name]
        self._process = TemplateProcess(self.text)

    def ids(self, message: str) -> list[int]:
        """Token ids of a user's message, ready for the model's answer. Raises TideError as `render` does."""
        text = self.render([{"role": "user", "content": unicode_text("the prompt", message)}])
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """A conversation as text.

        Args:
          messages: mappings with "role" and "content", which is text or a list of parts, as transformers takes them.
          add_generation_prompt: end where the assistant's answer begins.
          continue_final_message: end inside the last message, which the model is to continue.
          variables: what else the template reads, JSON values.

        Raises:
          TideError: the template refuses the conversation, has an error, takes more than 5 seconds, 1 GiB or ten
            million characters, or leaves a user's words out.
        """
        _check(messages, continue_final_message)
        variables = {"add_generation_prompt": add_generation_prompt, **variables}
        try:
            return self._prompt(messages, variables, continue_final_message)
        except TemplateFailure as failure:
            raise TideError(
                f"{self._where}: the chat template {self.name!r} {failure}; correct it, or choose another with "
                "chat_template=NAME"
            ) from failure

    def _prompt(self, messages: Sequence[Message], variables: Mapping[str, Any], continue_final_message: bool) -> str:
        failures = []
        for content, without in self._contents:
            try:
                prompt = self._rendered(messages, content, variables, continue_final_message)
                _check_words(prompt, messages, without)
                return prompt
            except TemplateFailure as failure:
                if failure.out_of_bounds:
                    raise
                failures.append(failure)
        raise failures[0]

    @functools.cached_property
    def _contents(self) -> list[tuple[_Content, str]]:
        """How to pass messages so that the template shows their words, and a prompt without these, squeezed.

        As text where that shows a probe's words, else as a list of parts. Both are left to try where neither does: the
        template may refuse the probe alone.
        """
        tried: list[tuple[_Content, str]] = []
        for content in (_as_text, _as_parts):
            try:
                prompt = self._rendered([{"role": "user", "content": _PROBE}], content, {"add_generation_prompt": True})
            except TemplateFailure as failure:
                if failure.out_of_bounds:
                    raise
                prompt = ""
            squeezed, probe = _squeezed(prompt), _squeezed(_PROBE)
            if content is _as_parts and (f"'text':'{probe}'" in squeezed or f'"text":"{probe}"' in squeezed):
                break  # it writes the list itself, as it would a text
            tried.append((content, squeezed.replace(probe, "\0")))
            if probe in squeezed:
                return tried[-1:]
        return tried

    def _rendered(
        self,
        messages: Sequence[Message],
        content: _Content,
        variables: Mapping[str, Any],
        continue_final_message: bool = False,
    ) -> str:
        passed = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            passed = [*passed[:-1], passed[-1] | {"content": f"{passed[-1]['content']}{_HERE} "}]
        for message in passed:
            if isinstance(message.get("content"), str):
                message["content"] = content(message["content"])
        special = getattr(self._tokenizer, "special_tokens_map", {})
        prompt = self._process.render({**special, "messages": passed, "tools": None, "documents": None, **variables})
        return _until_here(prompt) if continue_final_message else prompt


def _check(messages: Sequence[Message], continue_final_message: bool) -> None:
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise TideError("a conversation is a list of mappings with role and content, and not empty")
    if continue_final_message and not isinstance(messages[-1].get("content"), str):
        raise TideError("the last message holds no text; continue_final_message=True needs some to continue")


def _chosen(templates: Mapping[str, str], name: str | None, where: str) -> str:
    names = _clipped(", ".join(sorted(templates)), 100)
    if not templates:
        raise TideError(f"{where} has no chat template; take prompts as they are")
    if name is None and DEFAULT not in templates and len(templates) > 1:
        raise TideError(f"{where} has several chat templates and no default; choose one with chat_template=: {names}")
    chosen = name or (DEFAULT if DEFAULT in templates else next(iter(templates)))
    if chosen not in templates:
        raise TideError(f"{where} has no chat_template={_clipped(chosen, 40)}; choose one of: {names}")
    return chosen


def _as_text(text: str) -> str:
    return text


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _user_texts(messages: Sequence[Message]) -> list[str]:
    """What users say, in a list of parts too."""
    contents = [message.get("content") for message in messages if message.get("role") == "user"]
    texts: list[str] = [content for content in contents if isinstance(content, str)]
    for parts in contents:
        if isinstance(parts, list):
            texts += [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return texts


def _check_words(prompt: str, messages: Sequence[Message], without: str) -> None:
    """Raises TemplateFailure unless what users say is in the prompt."""
    if lost := [text for text in _user_texts(messages) if not _shows(prompt, text, without)]:
        raise TemplateFailure(f"leaves out the user's words, expected {_clipped(repr(lost[0]), 40)} in the prompt")


def _shows(prompt: str, text: str, without: str) -> bool:
    """Whether a text is in a prompt, in a form that a template may give it: other space or case, quoted for JSON or
    HTML. It has to be there once more than in the prompt `without` it, whose own words may be the same."""
    prompt = _squeezed(prompt)
    return any(not form or prompt.count(form) > without.count(form) for form in map(_squeezed, _forms(text)))


def _forms(text: str) -> Iterator[str]:
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    from markupsafe import escape  # Jinja's own

    yield str(escape(text))


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def _until_here(prompt: str) -> str:
    """The prompt up to the mark; without the space before it where the template trims the message."""
    start = prompt.rfind(_HERE)
    if start < 0:
        raise TemplateFailure("leaves out the last message, which the model is to continue")
    return prompt[:start] if prompt.startswith(f"{_HERE} ", start) else prompt[:start].rstrip()


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
