"""Known model types that are not converted, with the reason for the error and for the table of families."""

from __future__ import annotations

_DRAFTER = "it drafts for another model and reads that model's hidden states; it cannot run alone"
_CODEBOOKS = "it predicts several audio codebooks at once instead of one token"


def _types(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


REFUSED: dict[str, str] = {
    **_types("gemma4_assistant gemma4_unified_assistant", _DRAFTER),
    **_types("musicgen musicgen_melody", _CODEBOOKS),
    "blt": "it reads bytes in patches of varying length through three stacks of layers",
    "cpmant": "its attention is not causal: prompt tokens see each other in both directions",
    "deepseek_v4": "its residual stream is several mixed streams and its attention reads compressed keys",
    "gemma3n_text": "its layers exchange four residual streams and share keys and values between layers",
    "hrm_text": "its two stacks of layers run several times over each token, so its depth is no list of layers",
    "hy_v4": "its residual stream is several mixed streams",
    "inkling2_text": "its layers attend to outputs of earlier blocks of layers instead of reading one residual stream",
    "inkling_text": "it convolves keys, values and the outputs of both sublayers over tokens, beside its attention",
    "mllama_text_model": "some of its layers attend to an image only",
    "prophetnet": "it predicts several future tokens through parallel streams",
    "qwen4_exp_text": "its residual stream is several mixed streams, and layers add embeddings of groups of tokens",
    "reformer": "it attends by locality-sensitive hashing and has reversible layers",
    "roc_bert": "it joins embeddings of shape and pronunciation to those of words",
    "xlm": "it predicts the token at a mask that generation appends, which a cache cannot follow",
    "xlnet": "it is a permutation model with two attention streams",
    "xmod": "its layers hold an adapter for each language",
    "zaya": "its attention convolves queries and keys over tokens, and routers read the router of the layer before",
}
