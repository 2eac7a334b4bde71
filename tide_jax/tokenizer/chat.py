"""Turns conversations into prompts with a tokenizer's chat template, and checks that they contain the user's words."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tide_jax.checks import unicode_text
from tide_jax.errors import TideError
from tide_jax.tokenizer.chat_files import DEFAULT, templates_by_name
from tide_jax.tokenizer.template_process import TemplateFailure, TemplateProcess

Message = Mapping[str, Any]
_Content = Callable[[str], Any]
_PROBE = "tideprobe qzjxv"  # words that no template contains
_END_MARK = "CONTINUE-HERE-qzjxv"


def prompt_ids(
    tokenizer: Any, texts: Iterable[str], *, chat_template: str | None = None, raw: bool = False
) -> list[list[int]]:
    """Token ids of prompts; each is a user's message in the chat template, if the tokenizer has one.

    Args:
      tokenizer: from `tide_jax.load_tokenizer`.
      texts: the prompts.
      chat_template: name of the template if there are several; default: "default".
      raw: uses the prompts unchanged, without a template.

    Raises:
      TideError: as `ChatTemplate`.
    """
    if raw or (chat_template is None and not getattr(tokenizer, "chat_template", None)):
        return [list(tokenizer(unicode_text("the prompt", text))["input_ids"]) for text in texts]
    template = ChatTemplate(tokenizer, chat_template)
    return [template.ids(text) for text in texts]


class ChatTemplate:
    """A tokenizer's chat template.

    It renders the same text as transformers' `apply_chat_template`, with three differences. A template that reads a
    message as a list of parts, as those of multimodal models do, gets a list. Every error is a TideError, and so is a
    prompt that lacks the user's words. Time and memory are limited, because a template renders in its own process.

    Attributes:
      name: the template's name.
      text: the template.
    """

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        """Chooses a template.

        Args:
          tokenizer: from `tide_jax.load_tokenizer`.
          name: the template's name if there are several; default: "default", or the only one.

        Raises:
          TideError: the tokenizer has no such template.
        """
        self._tokenizer = tokenizer
        self._where = str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
        templates = templates_by_name(getattr(tokenizer, "chat_template", None), self._where)
        self.name = _choose_template(templates, name, self._where)
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
          messages: mappings with "role" and "content", as in transformers; the content is text or a list of parts.
          add_generation_prompt: ends where the assistant's answer begins.
          continue_final_message: ends inside the last message, which the model will continue.
          variables: other variables of the template, JSON values.

        Raises:
          TideError: the template refuses the conversation, has an error, takes more than 5 seconds, 1 GiB or ten
            million characters, or leaves out a user's words.
        """
        _check_messages(messages, continue_final_message)
        variables = {"add_generation_prompt": add_generation_prompt, **variables}
        try:
            return self._render_prompt(messages, variables, continue_final_message)
        except TemplateFailure as failure:
            raise TideError(
                f"{self._where}: the chat template {self.name!r} {failure}; correct it, or choose another with "
                "chat_template=NAME"
            ) from failure

    def _render_prompt(
        self, messages: Sequence[Message], variables: Mapping[str, Any], continue_final_message: bool
    ) -> str:
        # Try the forms of content that the probe allows, and report the first failure.
        failures = []
        for content, baseline in self._content_forms:
            try:
                prompt = self._render(messages, content, variables, continue_final_message)
                _check_user_words(prompt, messages, baseline)
                return prompt
            except TemplateFailure as failure:
                if failure.out_of_bounds:
                    raise
                failures.append(failure)
        raise failures[0]

    @functools.cached_property
    def _content_forms(self) -> list[tuple[_Content, str]]:
        """Functions that convert a message's content for the template, each with a squeezed prompt without the message.

        A probe decides: text if the prompt then contains the probe's words, otherwise a list of parts. If neither
        works, both are returned to be tried, because the template may refuse only the probe.
        """
        candidates: list[tuple[_Content, str]] = []
        for content in (_as_text, _as_parts):
            try:
                prompt = self._render([{"role": "user", "content": _PROBE}], content, {"add_generation_prompt": True})
            except TemplateFailure as failure:
                if failure.out_of_bounds:
                    raise
                prompt = ""
            normalised, probe = _normalise(prompt), _normalise(_PROBE)
            if content is _as_parts and (f"'text':'{probe}'" in normalised or f'"text":"{probe}"' in normalised):
                break  # the template printed the list itself, as if it were text
            candidates.append((content, normalised.replace(probe, "\0")))
            if probe in normalised:
                return candidates[-1:]
        return candidates

    def _render(
        self,
        messages: Sequence[Message],
        content: _Content,
        variables: Mapping[str, Any],
        continue_final_message: bool = False,
    ) -> str:
        prepared = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            # Mark the end of the last message, to cut the prompt there.
            prepared = [
                *prepared[:-1],
                prepared[-1] | {"content": f"{prepared[-1]['content']}{_END_MARK} "},
            ]
        for message in prepared:
            if isinstance(message.get("content"), str):
                message["content"] = content(message["content"])
        special = getattr(self._tokenizer, "special_tokens_map", {})
        prompt = self._process.render({**special, "messages": prepared, "tools": None, "documents": None, **variables})
        return _cut_at_mark(prompt) if continue_final_message else prompt


def _check_messages(messages: Sequence[Message], continue_final_message: bool) -> None:
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise TideError("a conversation must be a list of mappings with role and content that is not empty")
    if continue_final_message and not isinstance(messages[-1].get("content"), str):
        raise TideError("the last message holds no text; continue_final_message=True needs text to continue")


def _choose_template(templates: Mapping[str, str], name: str | None, where: str) -> str:
    names = _clip(", ".join(sorted(templates)), 100)
    if not templates:
        raise TideError(f"{where} has no chat template; pass the prompts without one")
    if name is None and DEFAULT not in templates and len(templates) > 1:
        raise TideError(f"{where} has several chat templates and no default; choose one with chat_template=: {names}")
    chosen = name or (DEFAULT if DEFAULT in templates else next(iter(templates)))
    if chosen not in templates:
        raise TideError(f"{where} has no chat_template={_clip(chosen, 40)}; choose one of: {names}")
    return chosen


def _as_text(text: str) -> str:
    return text


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _user_texts(messages: Sequence[Message]) -> list[str]:
    """Everything that users say, including text in lists of parts."""
    contents = [message.get("content") for message in messages if message.get("role") == "user"]
    texts: list[str] = [content for content in contents if isinstance(content, str)]
    for parts in contents:
        if isinstance(parts, list):
            texts += [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return texts


def _check_user_words(prompt: str, messages: Sequence[Message], baseline: str) -> None:
    """Raises TemplateFailure unless the prompt contains everything that users say."""
    if lost := [text for text in _user_texts(messages) if not _contains_text(prompt, text, baseline)]:
        raise TemplateFailure(f"leaves out the user's words, expected {_clip(repr(lost[0]), 40)} in the prompt")


def _contains_text(prompt: str, text: str, baseline: str) -> bool:
    """Whether a prompt contains a text in any form that a template may give it.

    Forms are other white space or case, and quoting for JSON or HTML. The text must occur once more than in
    `baseline`, the prompt without it, because the template's own words may be the same.
    """
    prompt = _normalise(prompt)
    return any(not form or prompt.count(form) > baseline.count(form) for form in map(_normalise, _quoted_forms(text)))


def _quoted_forms(text: str) -> Iterator[str]:
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    from markupsafe import escape  # Jinja's own

    yield str(escape(text))


def _normalise(text: str) -> str:
    return "".join(text.split()).casefold()


def _cut_at_mark(prompt: str) -> str:
    """The prompt up to the mark, without the space before it if the template trims the message."""
    start = prompt.rfind(_END_MARK)
    if start < 0:
        raise TemplateFailure("leaves out the last message, which the model is to continue")
    return prompt[:start] if prompt.startswith(f"{_END_MARK} ", start) else prompt[:start].rstrip()


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
