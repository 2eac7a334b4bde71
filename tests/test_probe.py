"""Probing: models in no table are found out from their own code, or refused by the first layer that differs."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert.probe import probe
from convert.probe_rules import from_json, to_json
from convert.reader import open_source
from convert.tiny import save_tiny
from tide_jax.errors import TideError

torch = pytest.importorskip("torch")

TOLERANCE = 2e-5
_CONFIGURATION = """
    from transformers import PretrainedConfig

    class AcmeConfig(PretrainedConfig):
        model_type = "acme_lm"

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
"""
_HEAD = """
    import torch, math
    import torch.nn.functional as F
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput
    from .configuration_acme import AcmeConfig

    class AcmeLM(PreTrainedModel):
        config_class = AcmeConfig

        def __init__(self, config):
            super().__init__(config)
            self.net = Net(config)
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, ids, **kwargs):
            return CausalLMOutput(logits=self.net(ids))
"""
_LLAMA_LIKE = """
    class Scale(nn.Module):
        def __init__(self, dim, fuzz):
            super().__init__()
            self.g, self.fuzz = nn.Parameter(torch.ones(dim)), fuzz

        def forward(self, x):
            return self.g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.fuzz))

    class Mixer(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.nh, self.nk, self.hd = c.n_heads, c.n_groups, c.dim // c.n_heads
            self.wqkv = nn.Linear(c.dim, (self.nh + 2 * self.nk) * self.hd, bias=False)
            self.back = nn.Linear(c.dim, c.dim, bias=False)
            self.base = c.rotary_base

        def turn(self, x):
            f = self.base ** (-torch.arange(0, self.hd, 2).float() / self.hd)
            angles = torch.outer(torch.arange(x.shape[2]).float(), f)
            z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
            return torch.view_as_real(z).flatten(-2)

        def forward(self, x):
            b, t, d = x.shape
            rep = self.nh // self.nk
            qkv = self.wqkv(x).view(b, t, self.nk, rep + 2, self.hd)
            q = qkv[..., :rep, :].reshape(b, t, self.nh, self.hd).transpose(1, 2)
            k, v = (qkv[..., rep + i, :].transpose(1, 2).repeat_interleave(rep, 1) for i in (0, 1))
            y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
            return self.back(y.transpose(1, 2).reshape(b, t, d))

    class Block(nn.Module):
        def __init__(self, c, index):
            super().__init__()
            self.n1, self.n2 = Scale(c.dim, c.fuzz), Scale(c.dim, c.fuzz)
            self.mixer = Mixer(c)
            self.ff = nn.ModuleDict({
                "w1": nn.Linear(c.dim, c.ffn, bias=False),
                "w3": nn.Linear(c.dim, c.ffn, bias=False),
                "w2": nn.Linear(c.ffn, c.dim, bias=False),
            })
            self.twist = index == c.twisted_layer

        def forward(self, x):
            x = x + self.mixer(self.n1(x))
            h = self.n2(x)
            x = x + self.ff["w2"](F.silu(self.ff["w1"](h)) * self.ff["w3"](h))
            return torch.tanh(x) if self.twist else x

    class Net(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.tok_emb = nn.Embedding(c.n_vocab, c.dim)
            self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
            self.norm_out = Scale(c.dim, c.fuzz)
            self.output = nn.Linear(c.dim, c.n_vocab, bias=False)

        def forward(self, ids):
            x = self.tok_emb(ids)
            for block in self.blocks:
                x = block(x)
            return self.output(self.norm_out(x))
"""
_GPT_LIKE = """
    class Block(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
            self.query, self.key, self.value, self.proj = (nn.Linear(c.dim, c.dim) for _ in range(4))
            self.fc_in, self.fc_out = nn.Linear(c.dim, 3 * c.dim), nn.Linear(3 * c.dim, c.dim)
            self.nh = c.n_heads

        def attend(self, x):
            b, t, d = x.shape
            q, k, v = (p(x).view(b, t, self.nh, -1).transpose(1, 2) for p in (self.query, self.key, self.value))
            scores = q @ k.transpose(2, 3) / math.sqrt(d // self.nh)
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))

        def forward(self, x):
            x = x + self.attend(self.norm1(x))
            return x + self.fc_out(F.gelu(self.fc_in(self.norm2(x))))

    class Net(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.words = nn.Embedding(c.n_vocab, c.dim)
            self.places = nn.Parameter(torch.zeros(1, c.block_size, c.dim))
            self.stack = nn.Sequential(*(Block(c) for _ in range(c.n_layers)))
            self.last = nn.LayerNorm(c.dim)

        def forward(self, ids):
            x = self.stack(self.words(ids) + self.places[:, : ids.shape[1]])
            return self.last(x) @ self.words.weight.T
"""
_SIZES = {"n_vocab": 97, "dim": 48, "n_layers": 3, "n_heads": 6, "n_groups": 2, "ffn": 80, "block_size": 40}
_EXTRA = {"rotary_base": 5000.0, "fuzz": 1e-4, "twisted_layer": -1}


def save_custom(directory: Path, network: str, **changes: Any) -> Path:
    """A checkpoint that brings its own code, whose running leaves the file `ran` beside it."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir()
    config = {
        "model_type": "acme_lm",
        "architectures": ["AcmeLM"],
        "auto_map": {"AutoConfig": "configuration_acme.AcmeConfig", "AutoModelForCausalLM": "modeling_acme.AcmeLM"},
    }
    (directory / "config.json").write_text(json.dumps(config | _SIZES | _EXTRA | changes))
    (directory / "configuration_acme.py").write_text(textwrap.dedent(_CONFIGURATION))
    ran = f"    open({str(directory / 'ran')!r}, 'w').close()\n"
    # The model uses Net when it is made, so the two may come in either order.
    (directory / "modeling_acme.py").write_text(textwrap.dedent(_HEAD) + textwrap.dedent(network) + textwrap.dedent(ran))
    hf = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(hf, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(w.shape, generator=generator) * (1.5 * 48**-0.5 if w.ndim > 1 else 0.3) + (w.ndim == 1)
        for name, w in model.state_dict().items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "ran").unlink()
    return directory


def test_a_renamed_llama_with_its_own_code_is_found_out(tmp_path: Path) -> None:
    probed = probe(open_source(save_custom(tmp_path / "acme", _LLAMA_LIKE)), trust_remote_code=True)
    config = probed.config
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 8)
    assert (config.norm, config.norm_eps, config.activation, config.max_positions) == ("rms", 1e-4, "silu", 40)
    rope = config.attention_types[0].rope
    assert rope is not None and (rope.theta, rope.interleaved) == (5000.0, True)
    assert probed.report["relative"] < TOLERANCE


def test_a_gpt_with_its_own_code_is_found_out(tmp_path: Path) -> None:
    probed = probe(open_source(save_custom(tmp_path / "acme_gpt", _GPT_LIKE)), trust_remote_code=True)
    config = probed.config
    assert (config.norm, config.positions, config.learned_positions) == ("layer", "learned", 40)
    assert config.tie_embeddings and config.qkv_bias and config.mlp_bias and not config.mlp_gated
    assert config.activation == "gelu"
    assert probed.report["relative"] < TOLERANCE
