"""Probing: models in no table are found out from their own code, or refused by the first layer that differs."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import convert
from convert.architecture import decoder_config
from convert.exporting import export
from convert.parity.tiny import save_tiny
from convert.probe.decoder import decoder_of
from convert.probe.rules import from_json
from convert.probe.run import probe
from convert.sources.open import open_source
from convert.weights.rules import plan_conversion
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig

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
            self.twist = index == getattr(c, 'twisted_layer', -1)

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
_MIXTURE = """
    class Block(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.ln_a, self.ln_b = nn.LayerNorm(c.dim, bias=False), nn.LayerNorm(c.dim, bias=False)
            self.qk, self.vee = nn.Linear(c.dim, 2 * c.dim, bias=False), nn.Linear(c.dim, c.dim, bias=False)
            self.o, self.nh = nn.Linear(c.dim, c.dim, bias=False), c.n_heads
            self.moe = Choice(c)

        def attend(self, x):
            b, t, d = x.shape
            q, k = self.qk(x).view(b, t, 2, self.nh, -1).permute(2, 0, 3, 1, 4)
            v = self.vee(x).view(b, t, self.nh, -1).transpose(1, 2)
            near = torch.ones(t, t).tril() * torch.ones(t, t).triu(1 - self.window)
            mask = near.log()
            return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, d))

        def forward(self, x):
            return x + self.attend(self.ln_a(x)) + self.moe(self.ln_b(x))

    class Choice(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.chooser, self.k = nn.Linear(c.dim, 5, bias=False), c.num_selected
            self.bank = nn.ModuleList(Expert(c) for _ in range(5))

        def forward(self, x):
            flat = x.view(-1, x.shape[-1])
            weights, chosen = self.chooser(flat).softmax(-1).topk(self.k)
            out = torch.zeros_like(flat)
            for e, expert in enumerate(self.bank):
                row, place = (chosen == e).nonzero(as_tuple=True)
                out[row] += weights[row, place, None] * expert(flat[row])
            return 1.5 * out.view_as(x)

    class Expert(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.both, self.down = nn.Linear(c.dim, 2 * c.ffn), nn.Linear(c.ffn, c.dim)

        def forward(self, x):
            up, gate = self.both(x).chunk(2, -1)
            return self.down(F.gelu(gate, approximate="tanh") * up)

    class Net(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.table, self.rows = nn.Embedding(c.n_vocab, c.dim), nn.ModuleList(Block(c) for _ in range(c.n_layers))
            for i, row in enumerate(self.rows):
                row.window = 10**6 if i == 1 else c.attention_window
            self.final, self.head = nn.LayerNorm(c.dim, bias=False), nn.Linear(c.dim, c.n_vocab)

        def forward(self, ids):
            x = self.table(ids) * 7.0
            for row in self.rows:
                x = row(x)
            return 20.0 * torch.tanh(self.head(self.final(x)) / 20.0)
"""
_WITHOUT_MODULES = """
    def rms(x, gain):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + gain)

    class Block(nn.Module):
        def __init__(self, c):
            super().__init__()
            d, f, weight = c.dim, c.ffn, lambda *shape: nn.Parameter(torch.zeros(*shape))
            self.wq, self.wk, self.wv, self.wo = weight(d, d), weight(d, d // 3), weight(d, d // 3), weight(d, d)
            self.up, self.up_b, self.down, self.down_b = weight(f, d), weight(f), weight(d, f), weight(d)
            self.g1, self.g2, self.nh = weight(d), weight(d), c.n_heads

        def forward(self, x):
            b, t, d = x.shape
            h = rms(x, self.g1)
            q, k, v = ((h @ w).view(b, t, -1, d // self.nh).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
            x = x + 0.4 * (y.transpose(1, 2).reshape(b, t, d) @ self.wo)
            h = F.relu(rms(x, self.g2) @ self.up.T + self.up_b).square()
            return x + 0.4 * F.linear(h, self.down, self.down_b)

    class Net(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.emb, self.gain = nn.Parameter(torch.zeros(c.n_vocab, c.dim)), nn.Parameter(torch.zeros(c.dim))
            self.stack = nn.ModuleList(Block(c) for _ in range(c.n_layers))

        def forward(self, ids):
            x = F.embedding(ids, self.emb)
            for block in self.stack:
                x = block(x)
            return rms(x, self.gain) @ self.emb.T
"""
_OF_TORCH = """
    class Net(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.emb, self.pos = nn.Embedding(c.n_vocab, c.dim), nn.Parameter(torch.zeros(c.block_size, c.dim))
            layer = nn.TransformerEncoderLayer(c.dim, c.n_heads, c.ffn, activation="gelu", batch_first=True)
            self.enc, self.out = nn.TransformerEncoder(layer, c.n_layers), nn.Linear(c.dim, c.n_vocab, bias=False)

        def forward(self, ids):
            t = ids.shape[1]
            x = self.emb(ids) * math.sqrt(48) + self.pos[:t]
            return self.out(self.enc(x, mask=nn.Transformer.generate_square_subsequent_mask(t), is_causal=True))
"""
_CONFIG: dict[str, Any] = {
    "model_type": "acme_lm",
    "architectures": ["AcmeLM"],
    "auto_map": {"AutoConfig": "configuration_acme.AcmeConfig", "AutoModelForCausalLM": "modeling_acme.AcmeLM"},
    "tie_word_embeddings": False,
}
_SIZES = {"n_vocab": 97, "dim": 48, "n_layers": 3, "n_heads": 6, "n_groups": 2, "ffn": 80, "block_size": 40}
_NUMBERS = {"rotary_base": 5000.0, "fuzz": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies a checkpoint's code before it runs it; here not to the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", list(sys.path))
        yield


def save_custom(directory: Path, network: str, **changes: Any) -> Path:
    """A checkpoint that brings its own code, whose running leaves the file `ran` beside it."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(_CONFIG | _SIZES | _NUMBERS | changes))
    (directory / "configuration_acme.py").write_text(textwrap.dedent(_CONFIGURATION))
    ran = f"open({str(directory / 'ran')!r}, 'w').close()\n"
    (directory / "modeling_acme.py").write_text(textwrap.dedent(_HEAD) + textwrap.dedent(network) + ran)
    hf = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(hf, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(w.shape, generator=generator) * (1.5 * 48**-0.5 if w.ndim > 1 else 0.3) + float(w.ndim == 1)
        for name, w in model.state_dict().items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "ran").unlink()
    return directory


def test_a_renamed_llama_with_its_own_code_is_probed(tmp_path: Path) -> None:
    probed = probe(open_source(save_custom(tmp_path / "acme", _LLAMA_LIKE)), trust_remote_code=True)
    config = probed.config
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 8)
    assert (config.norm, config.norm_eps, config.activation, config.max_positions) == ("rms", 1e-4, "silu", 40)
    rope = config.attention_types[0].rope
    assert rope is not None
    assert (rope.theta, rope.interleaved) == (5000.0, True)
    assert probed.report["verification"]["relative"] < TOLERANCE


def test_a_gpt_with_its_own_code_is_probed(tmp_path: Path) -> None:
    probed = probe(open_source(save_custom(tmp_path / "acme_gpt", _GPT_LIKE)), trust_remote_code=True)
    config = probed.config
    assert (config.norm, config.positions, config.learned_positions) == ("layer", "learned", 40)
    assert (config.qkv_bias, config.mlp_bias, config.mlp_gated) == (True, True, False)
    assert (config.activation, config.tie_embeddings) == ("gelu", True)
    assert probed.report["verification"]["relative"] < TOLERANCE


def test_a_mixture_with_its_own_code_is_probed(tmp_path: Path) -> None:
    source = save_custom(tmp_path / "acme_mix", _MIXTURE, attention_window=30, num_selected=2, cap=20.0)
    probed = probe(open_source(source), trust_remote_code=True)
    config = probed.config
    assert (config.parallel_residual, config.shared_norm) == (True, False)
    assert (config.positions, config.embedding_scale, config.logit_softcap) == ("none", 7.0, 20.0)
    assert [config.layer_type(i).window for i in range(3)] == [30, None, 30]  # seen though the row was shorter
    assert config.moe is not None
    assert (config.moe.experts_per_token, config.moe.renormalise, config.moe.scale) == (2, False, pytest.approx(1.5))
    assert probed.report["verification"]["relative"] < TOLERANCE


def test_code_without_modules_is_probed(tmp_path: Path) -> None:
    probed = probe(open_source(save_custom(tmp_path / "acme_raw", _WITHOUT_MODULES)), trust_remote_code=True)
    config = probed.config
    assert (config.activation, config.norm_unit_offset, config.residual_scale) == ("relu2", True, 0.4)
    assert config.attention_types[0].scale == 0.3
    assert probed.report["verification"]["relative"] < TOLERANCE


def test_the_transformer_of_torch_is_probed(tmp_path: Path) -> None:
    probed = probe(open_source(save_custom(tmp_path / "acme_torch", _OF_TORCH)), trust_remote_code=True)
    assert (probed.config.norm_placement, probed.config.final_norm) == ("residual", False)
    assert probed.report["verification"]["relative"] < TOLERANCE


def test_own_code_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    source = save_custom(tmp_path / "untrusted", _GPT_LIKE)
    with pytest.raises(TideError, match=r"contains its own Python code \(modeling_acme.AcmeLM\).*--trust-remote-code"):
        probe(open_source(source))
    assert not (source / "ran").exists()


def test_an_unknown_computation_is_refused_naming_its_layer(tmp_path: Path) -> None:
    source = save_custom(tmp_path / "twisted", _LLAMA_LIKE, twisted_layer=1)
    with pytest.raises(TideError, match=r"layer 1 diverges first: .* differs by \d\.\de[-+]\d+ of the range") as raised:
        probe(open_source(source), trust_remote_code=True)
    assert "\n" not in str(raised.value)


def test_a_known_class_under_a_new_model_type_is_probed(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "acme_lm"}))
    probed = probe(open_source(tmp_path))
    assert (probed.config.model_type, probed.config.qkv_bias) == ("acme_lm", True)
    assert probed.report["measured_against"] == "transformers' Qwen2ForCausalLM"
    assert probed.report["verification"]["relative"] < TOLERANCE


def test_a_checkpoint_without_reference_code_is_refused(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    path = tmp_path / "config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"model_type": "acme_lm", "architectures": ["AcmeLM"]}))
    with pytest.raises(TideError, match=r"nor architectures AcmeLM, and .* contains no code of its own"):
        probe(open_source(tmp_path))
    path.write_text(json.dumps(known | {"model_type": "acme_lm", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(TideError, match="transformers' GPT2LMHeadModel"):
        probe(open_source(tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", ["gpt2", "phi", "glm", "gemma3_text", "mixtral", "youtu"])
def test_probing_a_family_gives_its_table_entry(tmp_path: Path, model_type: str) -> None:
    save_tiny(model_type, tmp_path)
    source = open_source(tmp_path)
    probed, known = probe(source), decoder_config(source)
    same_gelu = {"gelu_pytorch_tanh": "gelu_new"}
    expected = dataclasses.replace(
        known,
        activation=same_gelu.get(known.activation, known.activation),
        eos_token_ids=(),
        pad_token_id=None,
    )
    assert probed.config == expected
    assert probed.report["verification"]["relative"] < TOLERANCE


def test_a_wrong_guess_is_never_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> DecoderConfig:
        return dataclasses.replace(decoder_of(*args), norm_eps=1e-2)

    monkeypatch.setattr("convert.probe.run.decoder_of", wrong)
    save_tiny("llama", tmp_path)
    with pytest.raises(TideError, match=r"logits differ by .*: layer 0 diverges first"):
        probe(open_source(tmp_path))


def test_a_probed_weight_map_can_be_kept_and_written_back_through(tmp_path: Path) -> None:
    source = open_source(save_custom(tmp_path / "kept", _LLAMA_LIKE))
    probed = probe(source, trust_remote_code=True)
    rules = from_json(json.loads(json.dumps(probed.report["weight_map"])))
    assert [(rule.pattern, rule.targets, rule.reason) for rule in rules] == [
        (rule.pattern, rule.targets, rule.reason) for rule in probed.rules
    ]
    for name, pieces in plan_conversion(source.tensors, rules, probed.config).by_source().items():
        tensor = source.read(name)
        views = [piece.take(tensor, probed.config) for piece in pieces]
        assert all(np.shares_memory(view, tensor) for view in views)
        assert sum(view.size for view in views) == tensor.size


def test_a_probed_model_converts_verifies_and_exports(tmp_path: Path) -> None:
    source = save_custom(tmp_path / "whole", _MIXTURE, attention_window=30, num_selected=2, cap=20.0)
    report = convert(source, tmp_path / "converted", dtype="bfloat16", verify=True, trust_remote_code=True)
    assert report.probed is not None
    assert report.verification is not None
    assert report.verification.relative < TOLERANCE
    export(tmp_path / "converted", tmp_path / "back")
    back, there = (open_source(directory) for directory in (tmp_path / "back", source))
    assert set(back.tensors) == set(there.tensors)
    for name in there.tensors:
        np.testing.assert_array_equal(back.read(name), there.read(name).astype(back.read(name).dtype))


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    source = save_custom(tmp_path / "left", _LLAMA_LIKE, twisted_layer=2)
    for trusted, reason in ((False, "--trust-remote-code"), (True, "layer 2 diverges first")):
        with pytest.raises(TideError, match=reason):
            convert(source, tmp_path / "converted", trust_remote_code=trusted)
        assert not (tmp_path / "converted").exists()
