"""Choosing tokens from logits."""

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels import sampling as kernels

from .checks import ELEMENTS, check_array, check_rows, prepare_threads


def argmax(logits: Tensor) -> Tensor:
    """Index of the largest value of the last dimension, the first of equals; a NaN counts as the largest.

    logits [..., vocabulary], its last dimension contiguous, of one of `DTYPES`; returns int64 [...].
    Raises `InvalidInput`.
    """
    logits, address = check_rows("logits", logits)
    size = logits.shape[-1]
    if size == 0:
        raise InvalidInput(f"logits has shape {tuple(logits.shape)}: a vocabulary of at least 1 is needed")
    out = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    n_rows = out.numel()
    if n_rows:
        prepare_threads()
        kernels.argmax(ELEMENTS[logits.dtype], address, n_rows, size, out.data_ptr())
    return out


def argmax_allowed(logits: Tensor, bits: np.ndarray) -> np.ndarray:
    """`argmax` of logits with -inf for tokens that are not allowed; -1 in rows without any that is.

    logits [n_rows, vocabulary], its last dimension contiguous, of one of `DTYPES`; bits int32 [n_rows, words], contiguous:
    token t is allowed if bit t % 32 of word t // 32 is set, and not beyond the words. Returns int64 [n_rows]. Raises
    `InvalidInput`.
    """
    logits, address = check_rows("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InvalidInput(f"logits has shape {tuple(logits.shape)}: [rows, a vocabulary] is needed")
    n_rows, size = logits.shape
    is_right = bits.dtype == np.int32 and bits.ndim == 2 and bits.flags.c_contiguous
    if not is_right or len(bits) != n_rows or bits.shape[1] == 0:
        given = f"{bits.dtype} {bits.shape}"
        raise InvalidInput(f"bits is {given}: int32 {(n_rows, 'words')}, contiguous, is needed")
    out = np.empty(n_rows, np.int64)
    if n_rows:
        prepare_threads()
        kernels.argmax_allowed(ELEMENTS[logits.dtype], address, n_rows, size, bits, out.ctypes.data)
    return out


def log_softmax_top_k(
    logits: Tensor, running_scores: Tensor, k: int, n_beams: int = 1
) -> tuple[Tensor, Tensor]:
    """The k best of log_softmax(logits) + running_scores over each group of n_beams rows.

    logits [groups * n_beams, vocabulary], its last dimension contiguous, of one of `DTYPES`;
    running_scores float32 [groups * n_beams]. Returns (scores float32 [groups, k], best first; places int64
    [groups, k], beam * vocabulary + token): what `torch.topk` gives for the flattened groups, of equal
    scores the first ones. Raises `InvalidInput`.
    """
    logits, address = check_rows("logits", logits)
    if logits.ndim != 2:
        raise InvalidInput(f"logits has shape {tuple(logits.shape)}: [rows, vocabulary] is needed")
    n_rows, size = logits.shape
    if n_beams < 1 or n_rows % n_beams:
        raise InvalidInput(f"n_beams is {n_beams}: a divisor of the number of rows, {n_rows}, is needed")
    if not 1 <= k <= n_beams * size:
        raise InvalidInput(f"k is {k}: 1 to {n_beams * size} is allowed")
    running = check_array("running_scores", running_scores, (n_rows,), torch.float32)
    groups = n_rows // n_beams
    scores = logits.new_empty(groups, k, dtype=torch.float32)
    places = logits.new_empty(groups, k, dtype=torch.int64)
    if n_rows:
        prepare_threads()
        kernels.log_softmax_top_k(
            ELEMENTS[logits.dtype],
            address,
            n_rows,
            size,
            running,
            k,
            n_beams,
            scores.data_ptr(),
            places.data_ptr(),
        )
    return scores, places
