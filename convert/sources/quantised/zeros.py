"""Finds out how a GPTQ checkpoint stores its zero points: unchanged, or less one.

`checkpoint_format` should tell ("gptq_v2" or "gptq"), but some published files have the wrong label. Reading them by
the label shifts every weight by one step, and nothing else reveals the error. So the stored numbers decide.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from convert.sources.quantised.parts import Stored, unpack_words

logger = logging.getLogger(__name__)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_SAMPLED_MODULES = 8  # number of modules to inspect


def read_zeros(stored: Stored, name: str, bits: int, out: int, less_one: bool) -> np.ndarray:
    """Zero points [groups, out] of a module."""
    words = stored.read_stored(name).view(np.uint32)
    if less_one:  # the one was subtracted from whole words, with carries between numbers
        words = words + np.uint32(_ONES[bits])
    return unpack_words(words, bits)[:, :out]


def is_stored_less_one(
    stored: Stored, modules: Sequence[tuple[dict[str, str], int, int]], symmetric: bool, label: bool
) -> bool:
    """Whether zero points are stored less one.

    With symmetric quantisation the zero point is the middle of the range, so the stored value tells. Otherwise the
    numbers tell: weights are centred on zero, so the mean of the numbers is the zero point, and the wrong reading is
    one step off.

    Args:
      stored: the checkpoint.
      modules: part names, bits and outputs of each quantised module.
      symmetric: whether the configuration says the quantisation is symmetric.
      label: whether the configuration says zero points are stored less one.
    """
    fits_middle = {True: True, False: True}
    offsets: dict[bool, list[float]] = {True: [], False: []}
    variance = 0.0  # of the sampled means
    for parts, bits, out in modules[:_SAMPLED_MODULES]:
        as_stored = read_zeros(stored, parts["qzeros"], bits, out, less_one=False)
        numbers = unpack_words(stored.read_stored(parts["qweight"]).T, bits)
        variance += float(numbers.var()) / numbers.size
        for less_one in fits_middle:
            fits_middle[less_one] &= bool((as_stored == 2 ** (bits - 1) - less_one).all())
            zeros = read_zeros(stored, parts["qzeros"], bits, out, less_one)
            offsets[less_one].append(float(numbers.mean()) - float(zeros.mean()))
    # Use the middle of the range if it fits; otherwise overrule the label only on clear evidence.
    error = math.sqrt(variance) / len(offsets[True])
    steps = {less_one: abs(float(np.mean(values))) for less_one, values in offsets.items()}
    if fits_middle[True] or fits_middle[False]:
        result, is_doubtful = fits_middle[True], False
    else:
        label_is_wrong = error < 0.1 and steps[label] > 0.75 and steps[not label] < 0.25
        result = label != label_is_wrong
        is_doubtful = symmetric or steps[result] > 0.5 + 4 * error
    if result != label:
        logger.warning(
            "%s: config.json says checkpoint_format %s, but the zero points are stored %s and are read that way",
            stored.description,
            *(("'gptq'", "as they are") if label else ("'gptq_v2'", "less one")),
        )
    elif is_doubtful:
        logger.warning(
            "%s: the zero points are neither the middle of the range nor the mean of the numbers, so they are read as "
            "config.json's checkpoint_format says; compare the model's text with the unquantised model's",
            stored.description,
        )
    return result
