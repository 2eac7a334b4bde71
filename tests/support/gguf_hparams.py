"""config.json as llama.cpp's converter looks at it."""

from __future__ import annotations

from typing import Any


class HParams(dict[str, Any]):
    """config.json with the converter's way to look things up: the first of several names."""

    def find(self, *names: str, default: Any = None) -> Any:
        return next((self[name] for name in names if self.get(name) is not None), default)

    @property
    def heads(self) -> int:
        return self.find("num_attention_heads", "n_head", "n_heads")

    @property
    def kv_heads(self) -> int:
        return self.find("num_key_value_heads", "num_kv_heads", default=self.heads)

    @property
    def layers(self) -> int:
        return self.find("num_hidden_layers", "n_layer", "n_layers") or len(self["layers_block_type"])

    @property
    def hidden(self) -> int:
        return self.find("hidden_size", "n_embd", "d_model")

    @property
    def head_dim(self) -> int:
        return self.find("head_dim", default=self.hidden // self.heads)

    @property
    def rope(self) -> dict[str, Any]:
        """Of layers that see all tokens."""
        rope = self.get("rope_parameters") or {}
        return rope.get("full_attention", rope)
