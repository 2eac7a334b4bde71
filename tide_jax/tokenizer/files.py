"""Loads tokenizers from disk. If there is a tokenizer.json, it alone determines how text becomes token ids.

transformers would rebuild the normaliser and pre-tokenizer from the class that tokenizer_config.json or the model type
names, and then tokenise differently from the file.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tide_jax.errors import TideError
from tide_jax.tokenizer.chat_files import add_chat_templates

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import PostProcessor

    from tide_jax.tokenizer.settings import Token, TokenizerSettings

logger = logging.getLogger(__name__)
_FILE = "tokenizer.json"
_INPUTS = ["input_ids", "attention_mask"]  # no token types, which a decoder does not use
_COPIED_SETTINGS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
# Vocabularies in other formats, and the modules that transformers needs to read them.
_OTHER_VOCABULARIES: dict[str, tuple[str, ...]] = {
    "vocab.json": (),
    "vocab.txt": (),
    "tekken.json": (),
    "*.model": ("sentencepiece", "google.protobuf"),
}
_UNIVERSAL_FILES = {"tekken.json", "tokenizer.model", "tiktoken.model"}  # by every tokenizer class
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # some tiktoken files are called tokenizer.model
_PACKAGES = {"google.protobuf": "protobuf"}
_REASON_CHARACTERS = 100  # characters shown of a library's message


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer in a directory: a `PreTrainedTokenizerFast` if the directory has a tokenizer.json.

    Token ids are those of tokenizer.json. tokenizer_config.json determines the special tokens and their roles, whether
    a text begins with BOS and ends with EOS, the padding side and the chat template. No code in the directory runs.

    Raises:
      TideError: there is no tokenizer, its files are damaged, or they need a package that is not installed.
    """
    try:
        tokenizer = (
            _read_tokenizer_json(directory) if (directory / _FILE).is_file() else _build_from_vocabulary(directory)
        )
        return add_chat_templates(tokenizer, directory)
    except TideError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception, and transformers whatever its parsers raise
        raise _load_error(directory, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # from Rust code in `tokenizers`
            raise
        raise _load_error(directory, error) from error


# ---- tokenizer.json ----


def _read_tokenizer_json(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    from tide_jax.tokenizer.settings import read_settings

    settings = read_settings(directory)
    passed = {name: getattr(settings, name) for name in _COPIED_SETTINGS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / _FILE),
        name_or_path=str(directory),
        model_input_names=settings.model_input_names or _INPUTS,
        **{name: value for name, value in passed.items() if value is not None},
    )
    _add_missing_tokens(tokenizer.backend_tokenizer, settings, directory)
    for name, token in settings.role_tokens().items():
        setattr(tokenizer, name, token.content)
    if extra := settings.extra_tokens():
        tokenizer.extra_special_tokens = [token.content for token in extra]
    _set_bos_and_eos(tokenizer, settings)
    return tokenizer


def _add_missing_tokens(backend: Tokenizer, settings: TokenizerSettings, directory: Path) -> None:
    """Adds tokens that tokenizer_config.json declares and tokenizer.json lacks, and makes tokens with roles special.

    Tokens in tokenizer.json still match text as that file says.
    """
    for index, token in settings.added_tokens().items():
        if backend.token_to_id(token.content) is not None:
            continue
        if index != backend.get_vocab_size(with_added_tokens=True):
            logger.warning("%s: %s is not token %d in tokenizer.json and is left out", directory, token.content, index)
            continue
        backend.add_tokens([_to_added_token(token)])
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in [*settings.role_tokens().values(), *settings.extra_tokens()]:
        if token.content not in known:
            backend.add_special_tokens([_to_added_token(token)])
        elif not known[token.content].special:
            backend_token = known[token.content]
            backend_token.special = True
            backend.add_special_tokens([backend_token])


def _to_added_token(token: Token) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(**token.model_dump())


def _set_bos_and_eos(tokenizer: Any, settings: TokenizerSettings) -> None:
    """Adds or removes BOS and EOS as tokenizer_config.json requires, if tokenizer.json does otherwise."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = _tokens_around_text(tokenizer)
    first, last = before, after
    if bos is not None and settings.add_bos_token is not None and (before[:1] == [bos]) != settings.add_bos_token:
        first = [bos, *before] if settings.add_bos_token else before[1:]
    if eos is not None and settings.add_eos_token is not None and (after[-1:] == [eos]) != settings.add_eos_token:
        last = [*after, eos] if settings.add_eos_token else after[:-1]
    if (first, last) != (before, after):
        tokenizer.backend_tokenizer.post_processor = _post_processor(tokenizer.backend_tokenizer, first, last)


def _tokens_around_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that tokenizer.json adds before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in added:  # the vocabulary lacks the letter "a"
        cut = len(ids) - (ids[-1:] == [tokenizer.eos_token_id])
        return ids[:cut], ids[cut:]
    first, last = added.index(0), len(added) - added[::-1].index(0)
    return ids[:first], ids[last:]


def _post_processor(backend: Tokenizer, before: list[int], after: list[int]) -> PostProcessor:
    from tokenizers.processors import TemplateProcessing

    ends = {name: ids for name, ids in (("before", before), ("after", after)) if ids}
    parts = {"before": "before" in ends, "text": True, "after": "after" in ends}

    def sequence(text: str, segment: int) -> list[str]:
        return [f"{text if name == 'text' else name}:{segment}" for name, is_present in parts.items() if is_present]

    tokens = [
        {"id": name, "ids": ids, "tokens": [backend.id_to_token(index) for index in ids]} for name, ids in ends.items()
    ]
    return TemplateProcessing(
        single=sequence("$A", 0), pair=sequence("$A", 0) + sequence("$B", 1), special_tokens=tokens
    )


# ---- other files ----


def _build_from_vocabulary(directory: Path) -> Any:
    """A tokenizer that transformers builds from a vocabulary in another format; imports torch if it is installed."""
    vocabularies = _other_vocabularies(directory)
    if vocabularies and all(vocabularies.values()):
        path, missing = next(iter(vocabularies.items()))
        raise TideError(
            f"{directory} has its tokenizer in {path.name}, which needs packages that are not installed: "
            f"run `pip install {' '.join(missing)}`, or put its tokenizer.json there"
        )
    from transformers import AutoTokenizer

    # Without trust_remote_code=False, transformers asks on the terminal whether to run code from the directory.
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    names = set(tokenizer.vocab_files_names.values())
    # If the class finds no file, transformers builds a tokenizer with only special tokens.
    if names and not any(path.name in names | _UNIVERSAL_FILES for path in vocabularies):
        raise TideError(
            f"{directory} holds no tokenizer: {type(tokenizer).__name__} reads {', '.join(sorted(names))}; put its "
            "tokenizer.json there"
        )
    return tokenizer


def _other_vocabularies(directory: Path) -> dict[Path, list[str]]:
    """Vocabulary files in other formats, each with the packages it needs that are not installed."""
    missing_packages = {}
    for pattern, needed in _OTHER_VOCABULARIES.items():
        for path in sorted(directory.glob(pattern)):
            modules = ("tiktoken",) if pattern == "*.model" and _is_tiktoken(path) else needed
            missing_packages[path] = [_PACKAGES.get(name, name) for name in modules if not _is_installed(name)]
    return missing_packages


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.fullmatch(file.readline(1024)) is not None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _load_error(directory: Path, error: BaseException) -> TideError:
    """The error for a tokenizer that could not be built."""
    reason = " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__
    if (directory / _FILE).is_file():
        return TideError(f"{directory / _FILE} cannot be read as a tokenizer ({reason}): get the file again")
    if "trust_remote_code" in str(error):
        return TideError(
            f"{directory} has a tokenizer in Python code of its own, which is not run: put a tokenizer.json there, or "
            "load it with transformers' AutoTokenizer and trust_remote_code=True and pass token ids"
        )
    return TideError(
        f"{directory} has no tokenizer that transformers can load ({reason}): put its tokenizer.json there"
    )
