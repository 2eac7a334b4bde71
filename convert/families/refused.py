"""Known model types that are not converted, with the reason for the error and for the table of families."""

from __future__ import annotations

_HYBRID = (
    "some of its layers are recurrent, linear attention or convolutions over time, whose state a skipped layer would "
    "leave behind; only decoders made of attention layers convert"
)
_DRAFTER = "it drafts for another model and reads that model's hidden states; it cannot run alone"
_CODEBOOKS = "it predicts several audio codebooks at once instead of one token"


def _types(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


REFUSED: dict[str, str] = {
    **_types(
        "falcon_h1 inkling2_text inkling_text qwen4_exp_text zamba zamba2 zaya",
        _HYBRID,
    ),
    **_types("gemma4_assistant gemma4_unified_assistant", _DRAFTER),
    **_types("musicgen musicgen_melody", _CODEBOOKS),
    "blt": "it reads bytes in patches of varying length through three stacks of layers",
    "cpmant": "its attention is not causal: prompt tokens see each other in both directions",
    "deepseek_v4": "its residual stream is several mixed streams and its attention reads compressed keys",
    "gemma3n_text": "its layers exchange four residual streams and share keys and values between layers",
    "hrm_text": "its two stacks of layers run several times over each token, so its depth is no list of layers",
    "hy_v4": "its residual stream is several mixed streams",
    "longcat_flash": "each of its layers has two attentions and a mixture of experts that bypasses them",
    "mllama_text_model": "some of its layers attend to an image only",
    "prophetnet": "it predicts several future tokens through parallel streams",
    "reformer": "it attends by locality-sensitive hashing and has reversible layers",
    "roc_bert": "it joins embeddings of shape and pronunciation to those of words",
    "xlm": "it predicts the token at a mask that generation appends, which a cache cannot follow",
    "xlnet": "it is a permutation model with two attention streams",
    "xmod": "its layers hold an adapter for each language",
}
