"""Loads the model a probe is measured against: transformers' class for a checkpoint, or the checkpoint's own code.

Code inside a checkpoint runs only if the user trusts it explicitly.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.quiet import quiet_transformers
from convert.sources.base import Source
from tide_jax.errors import TideError

_AUTO_CLASS = "AutoModelForCausalLM"
_SMALL_WINDOW = 7
_NOT_WINDOW_WORDS = ("layer", "pattern", "stride")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A loaded float32 model that defines what a checkpoint computes.

    Attributes:
      model: the PyTorch module.
      origin: origin of its code, for the report.
      hf: its configuration object.
      windows: maps the small size of each attention window, chosen to be visible in a short row, to its true size.
    """

    model: Any
    origin: str
    hf: Any
    windows: Mapping[int, int]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [T, V] of one row of tokens [T]."""
        import torch

        ids = torch.tensor(tokens[None], dtype=torch.int64)
        with torch.no_grad():
            out = self.model(ids, **_forward_arguments(self.model, ids))
        logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        if logits is None:
            logits = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or logits.shape[1] != len(tokens):
            raise TideError(f"{self.origin} does not give logits [B, T, V] of every token, so nothing can be compared")
        return logits[0].float().numpy()


def _forward_arguments(model: Any, ids: Any) -> dict[str, Any]:
    """Required arguments of a model's forward besides tokens, and `use_cache=False` if it has that argument."""
    import torch

    parameters = dict(list(inspect.signature(model.forward).parameters.items())[1:])
    arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            if "mask" in name:
                arguments[name] = torch.ones_like(ids)
            elif "pos" in name:
                arguments[name] = torch.arange(ids.shape[1])[None]
    return arguments


def load_reference(source: Source, *, trust_remote_code: bool, small_windows: bool) -> Reference:
    """Loads the model of a checkpoint whose type is in no table.

    Args:
      source: a Hugging Face directory.
      trust_remote_code: run the Python code in the checkpoint.
      small_windows: shrink attention windows that are longer than a short row, so that their effect is visible.

    Raises:
      TideError: there is no code for the model, it is not trusted, or it does not load this checkpoint.
    """
    code = _choose_code(source, trust_remote_code)
    try:
        hf = code.config()
        windows = _shrink_windows(hf) if small_windows else {}
        model, missing = code.model(hf)
    except TideError:
        raise
    except Exception as error:  # the checkpoint's own code may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TideError(f"{code.name} cannot load {source.description} to probe it: {reason}") from error
    if missing:
        raise TideError(
            f"{code.name} does not fit {source.description}: {len(missing)} of its weights are not in the checkpoint "
            f"({', '.join(sorted(missing)[:3])}), so it cannot say what the model computes"
        )
    return Reference(model.float().eval(), code.name, hf, windows)


class _KnownClass:
    """A model class of the installed transformers."""

    def __init__(self, source: Source, name: str, model_class: Any) -> None:
        self.source, self.name, self.model_class = source, name, model_class
        self.directory = source.files[0].parent

    def config(self) -> Any:
        values = {name: value for name, value in self.source.config.items() if name != "model_type"}
        return self.model_class.config_class.from_dict(values)

    def model(self, hf: Any) -> tuple[Any, set[str]]:
        """The model, and the names of its weights that the checkpoint lacks."""
        return self.load(self.model_class, hf)

    def load(self, model_class: Any, hf: Any, **options: Any) -> tuple[Any, set[str]]:
        import torch

        directory: Any = self.directory
        if getattr(self.source, "rewritten", False):  # has a merged adapter or dequantised weights
            directory, options = None, options | {"state_dict": _tensors(self.source)}
        options |= {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        with quiet_transformers():
            model, info = model_class.from_pretrained(directory, config=hf, **options)
        return model, set(info["missing_keys"])


class _KnownType(_KnownClass):
    """A model type of the installed transformers."""

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.directory, trust_remote_code=False)

    def model(self, hf: Any) -> tuple[Any, set[str]]:
        return self.load(self.model_class, hf, trust_remote_code=False)


class _OwnCode(_KnownType):
    """The checkpoint's own Python code, which the user trusts."""

    def __init__(self, source: Source, reference: str) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(source, f"the checkpoint's {reference}", AutoModelForCausalLM)
        self.reference = reference

    def config(self) -> Any:
        from transformers import AutoConfig, PretrainedConfig

        if "AutoConfig" in self.source.config["auto_map"]:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=True)
        config_class = getattr(self._own_class(), "config_class", None) or PretrainedConfig
        return config_class.from_dict(dict(self.source.config))

    def model(self, hf: Any) -> tuple[Any, set[str]]:
        if getattr(self.source, "rewritten", False):
            return self._build_and_copy(hf)
        try:
            return self.load(self.model_class, hf, trust_remote_code=True)
        except Exception as first:  # code for other versions of transformers, or independent of it
            try:
                return self._build_and_copy(hf)
            except Exception:
                raise first from None

    def _own_class(self) -> Any:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(self.reference, str(self.directory))

    def _build_and_copy(self, hf: Any) -> tuple[Any, set[str]]:
        """Builds the module and copies the checkpoint's tensors into it by name."""
        model, tensors = self._own_class()(hf), _tensors(self.source)
        model.load_state_dict(tensors, strict=False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = {parameters[name].data_ptr() for name in tensors if name in parameters}
        return model, {name for name, parameter in parameters.items() if parameter.data_ptr() not in loaded}


def _tensors(source: Source) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(source.read(name).astype(np.float32)) for name in source.tensors}


def _choose_code(source: Source, trust_remote_code: bool) -> _KnownClass:
    """Chooses the source of a checkpoint's modelling code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = source.config
    model_type, own = values.get("model_type"), (values.get("auto_map") or {}).get(_AUTO_CLASS)
    known = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if own is not None and not known and not trust_remote_code:
        raise TideError(
            f"{source.description} contains its own Python code ({own}): read that code; if you trust it, run "
            "'tide-jax convert SRC DST --trust-remote-code'"
        )
    _require_torch(source)
    import transformers

    if known:
        return _KnownType(source, f"transformers' {model_type}", transformers.AutoModelForCausalLM)
    if own is not None:
        return _OwnCode(source, own)
    names = [name for name in values.get("architectures") or [] if isinstance(name, str)]
    for name in names:
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            return _KnownClass(source, f"transformers' {name}", found)
    classes = f"architectures {', '.join(names)}" if names else "any architectures"
    raise TideError(
        f"the installed transformers knows neither it nor {classes}, and {source.description} contains no code of its "
        "own"
    )


def _require_torch(source: Source) -> None:
    missing = [name for name in ("torch", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise TideError(
            f"{source.description} can only be converted by running its own model in PyTorch: run `pip install "
            f"{' '.join(missing)}` first"
        )


def _shrink_windows(hf: Any) -> dict[int, int]:
    """Gives each window longer than a few tokens its own short length; returns the true lengths by short ones."""
    cut: dict[int, int] = {}
    for part in (hf, *(getattr(hf, name, None) for name in getattr(hf, "sub_configs", {}))):
        for name, value in vars(part).items() if part is not None else ():
            is_window = ("window" in name or "chunk" in name) and not any(word in name for word in _NOT_WINDOW_WORDS)
            if is_window and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                small = next((s for s, v in cut.items() if v == value), min(value, _SMALL_WINDOW + 2 * len(cut)))
                cut[small] = value
                setattr(part, name, small)
    return cut
