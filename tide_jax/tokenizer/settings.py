"""The settings in tokenizer_config.json that tokenizer.json lacks: special tokens, BOS and EOS, padding side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tide_jax.errors import TideError
from tide_jax.json_files import read_json

_CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Token(BaseModel):
    """A token and how it matches text, as in `tokenizers.AddedToken`; a plain string is also accepted."""

    model_config = ConfigDict(strict=True)

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


_AnyToken = Annotated[Token, BeforeValidator(lambda value: {"content": value} if isinstance(value, str) else value)]
_Side = Literal["left", "right"]


class TokenizerSettings(BaseModel):
    """The fields of tokenizer_config.json that still matter if a tokenizer.json says how to tokenise.

    Left out are the tokenizer's class, the settings of its normaliser and pre-tokenizer, and file names.
    """

    model_config = ConfigDict(strict=True)

    bos_token: _AnyToken | None = None
    eos_token: _AnyToken | None = None
    unk_token: _AnyToken | None = None
    sep_token: _AnyToken | None = None
    pad_token: _AnyToken | None = None
    cls_token: _AnyToken | None = None
    mask_token: _AnyToken | None = None
    extra_special_tokens: list[_AnyToken] | dict[str, _AnyToken] | None = None
    additional_special_tokens: list[_AnyToken] | None = None  # the older name
    added_tokens_decoder: dict[str, _AnyToken] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    padding_side: _Side | None = None
    truncation_side: _Side | None = None
    model_max_length: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)] | None = None
    model_input_names: list[str] | None = None
    split_special_tokens: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output: bool | None = None
    chat_template: Any = None

    def role_tokens(self) -> dict[str, Token]:
        """The special tokens with a role, by transformers' name of the role."""
        tokens = {name: getattr(self, name) for name in _ROLES}
        if isinstance(self.extra_special_tokens, dict):
            tokens |= self.extra_special_tokens
        return {name: token for name, token in tokens.items() if token is not None}

    def extra_tokens(self) -> list[Token]:
        """The special tokens without a role."""
        extra = self.extra_special_tokens
        return (extra if isinstance(extra, list) else []) or self.additional_special_tokens or []

    def added_tokens(self) -> dict[int, Token]:
        """Tokens added to the vocabulary, by id."""
        return {
            int(index): token for index, token in sorted((self.added_tokens_decoder or {}).items(), key=_token_index)
        }


def read_settings(directory: Path) -> TokenizerSettings:
    """The settings of a directory's tokenizer.

    Raises:
      TideError: a file is not a JSON object, or a field has the wrong type.
    """
    values = _read_optional_json(directory / _CONFIG)
    if values.get("added_tokens_decoder") is None:  # files of older versions, only read if the newer field is missing
        values |= _read_optional_json(directory / _SPECIAL_TOKENS)
        if added := _read_optional_json(directory / _ADDED_TOKENS):
            values["added_tokens_decoder"] = {str(index): token for token, index in added.items()}
    try:
        settings = TokenizerSettings.model_validate(values)
        settings.added_tokens()
    except (ValidationError, ValueError) as error:
        raise TideError(
            f"{directory / _CONFIG} has a wrong value at {_first_problem(error)}: correct it, or get the file again"
        ) from error
    return settings


def _read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_index(entry: tuple[str, Any]) -> int:
    return int(entry[0])


def _first_problem(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return f"added_tokens_decoder ({str(error)[:80]})"
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc'][:3]))[:80]} ({problem['msg'][:80]})"
