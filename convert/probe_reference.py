"""The model a probe is measured against: transformers' class for a checkpoint, or the checkpoint's own code.

Code that lies in a checkpoint runs only when it is trusted explicitly.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.reader import Source
from convert.verify import require_torch
from tide_jax.errors import TideError

_AUTO = "AutoModelForCausalLM"
_SMALL_WINDOW = 7
_NO_WINDOWS = ("layer", "pattern", "stride")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A loaded model, in float32, that says what a checkpoint computes.

    Attributes:
      model: the PyTorch module.
      route: where its code came from, for the report.
      hf: its configuration object.
      windows: the true size of each attention window, by the small one it was given to be seen in a short row.
    """

    model: Any
    route: str
    hf: Any
    windows: Mapping[int, int]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [T, V] of one row of tokens [T]."""
        import torch

        ids = torch.tensor(tokens[None], dtype=torch.int64)
        with torch.no_grad():
            out = self.model(ids, **_arguments(self.model, ids))
        logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        if logits is None:
            logits = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or logits.shape[1] != len(tokens):
            raise TideError(f"{self.route} does not give logits [B, T, V] of every token, so nothing can be compared")
        return logits[0].float().numpy()


def _arguments(model: Any, ids: Any) -> dict[str, Any]:
    """What a model's forward needs besides tokens, and no cache."""
    import torch

    taken = dict(list(inspect.signature(model.forward).parameters.items())[1:])
    given = {name: False for name in ("use_cache",) if name in taken}
    for name, parameter in taken.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            if "mask" in name:
                given[name] = torch.ones_like(ids)
            elif "pos" in name:
                given[name] = torch.arange(ids.shape[1])[None]
    return given


def load_reference(source: Source, *, trust_remote_code: bool, small_windows: bool) -> Reference:
    """Loads the model of a checkpoint that is in no table.

    Args:
      source: a Hugging Face directory.
      trust_remote_code: run the Python code the checkpoint brings.
      small_windows: attention windows longer than a short row are cut to a few tokens, so that they can be seen.

    Raises:
      TideError: no code for the model is at hand, it is not trusted, or it does not load this checkpoint.
    """
    require_torch()
    build = _route(source, trust_remote_code)
    try:
        hf = build.config()
        windows = _cut_windows(hf) if small_windows else {}
        model, missing = build.model(hf)
    except TideError:
        raise
    except Exception as error:  # the checkpoint's own code may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TideError(f"{build.name} cannot load {source.description} to probe it: {reason}") from error
    if missing:
        raise TideError(
            f"{build.name} does not fit {source.description}: {len(missing)} of its weights are not in the checkpoint "
            f"({', '.join(sorted(missing)[:3])}), so it cannot say what the model computes"
        )
    return Reference(model.float().eval(), build.name, hf, windows)


class _KnownClass:
    """A model class of the installed transformers."""

    def __init__(self, directory: Path, values: Mapping[str, Any], name: str, model_class: Any) -> None:
        self.directory, self.values, self.name, self.model_class = directory, values, name, model_class

    def config(self) -> Any:
        return self.model_class.config_class.from_dict({k: v for k, v in self.values.items() if k != "model_type"})

    def model(self, hf: Any) -> tuple[Any, set[str]]:
        return _from_pretrained(self.model_class, self.directory, config=hf)


class _KnownType(_KnownClass):
    """A model type of the installed transformers."""

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.directory, trust_remote_code=False)

    def model(self, hf: Any) -> tuple[Any, set[str]]:
        return _from_pretrained(self.model_class, self.directory, config=hf, trust_remote_code=False)


class _OwnCode(_KnownType):
    """The checkpoint's own Python code, which the user trusts."""

    def __init__(self, source: Source, reference: str) -> None:
        from transformers import AutoModelForCausalLM

        directory = source.files[0].parent
        super().__init__(directory, source.config, f"the checkpoint's {reference}", AutoModelForCausalLM)
        self.source, self.reference = source, reference

    def config(self) -> Any:
        from transformers import AutoConfig, PretrainedConfig

        if "AutoConfig" in self.values["auto_map"]:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=True)
        return (getattr(self._own_class(), "config_class", None) or PretrainedConfig).from_dict(dict(self.values))

    def model(self, hf: Any) -> tuple[Any, set[str]]:
        try:
            return _from_pretrained(self.model_class, self.directory, config=hf, trust_remote_code=True)
        except Exception as first:  # code written for other versions of transformers, or for none
            try:
                return self._by_hand(hf)
            except Exception:
                raise first from None

    def _own_class(self) -> Any:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(self.reference, str(self.directory))

    def _by_hand(self, hf: Any) -> tuple[Any, set[str]]:
        """Makes the module and copies the checkpoint's tensors into it by their names."""
        import torch

        model = self._own_class()(hf)
        tensors = {name: torch.from_numpy(self.source.read(name).astype(np.float32)) for name in self.source.tensors}
        model.load_state_dict(tensors, strict=False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = {parameters[name].data_ptr() for name in tensors if name in parameters}
        return model, {name for name, parameter in parameters.items() if parameter.data_ptr() not in loaded}


def _route(source: Source, trust_remote_code: bool) -> _KnownClass:
    """Where the modelling code of a checkpoint is to be had."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values, directory = source.config, source.files[0].parent
    model_type, auto_map = values.get("model_type"), values.get("auto_map") or {}
    names = [name for name in values.get("architectures") or [] if isinstance(name, str)]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        name = f"transformers' {model_type}"
        return _KnownType(directory, values, name, transformers.AutoModelForCausalLM)
    if _AUTO in auto_map:
        if not trust_remote_code:
            raise TideError(
                f"{source.description}: model_type {model_type!r} is not supported, and the checkpoint brings its own "
                f"Python code ({auto_map[_AUTO]}): read that code, then pass --trust-remote-code to run and probe it"
            )
        return _OwnCode(source, auto_map[_AUTO])
    for name in names:
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            return _KnownClass(directory, values, f"transformers' {name}", found)
    classes = f"architectures {', '.join(names)}" if names else "no architectures"
    raise TideError(
        f"{source.description}: model_type {model_type!r} is not supported, and nothing says what it computes: the "
        f"installed transformers knows neither it nor {classes}, and the checkpoint brings no code of its own"
    )


def _from_pretrained(model_class: Any, directory: Path, **options: Any) -> tuple[Any, set[str]]:
    """A model and the names of its weights that the checkpoint does not have."""
    import torch

    model, info = model_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    return model, set(info["missing_keys"])


def _cut_windows(hf: Any) -> dict[int, int]:
    """Gives every window longer than a few tokens a short length, a different one for each; returns the true ones."""
    cut: dict[int, int] = {}
    for part in (hf, *(getattr(hf, name, None) for name in getattr(hf, "sub_configs", {}))):
        for name, value in vars(part).items() if part is not None else ():
            is_window = ("window" in name or "chunk" in name) and not any(word in name for word in _NO_WINDOWS)
            if is_window and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                small = next((s for s, v in cut.items() if v == value), min(value, _SMALL_WINDOW + 2 * len(cut)))
                cut[small] = value
                setattr(part, name, small)
    return cut
