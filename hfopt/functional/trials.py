"""The calls that are timed to choose between hfopt's kernels and torch's, one for each class of sizes."""

from collections.abc import Callable

import numpy as np
import torch

from hfopt.cache import Appended

from .attention import Mask, attend
from .checks import array_of
from .choice import SCRATCH, Kernels
from .linear import LinearWeights, linear
from .scoring import Scoring

Trial = Callable[[Kernels], None]

_WIDTH = 2048  # of the matrices: 8 or 16 MiB each, more than L2 caches hold
_FEW_ROWS = 16  # up to here reading the weights takes the time
_CONTEXT = 1024  # tokens before a few new ones
_ROWS = 4  # that a few new tokens are read in
_HEAD_DIM = 64


def linear_trial(dtype: torch.dtype, n_rows: int) -> Trial:
    """Gate and up of a feed-forward block; for a few rows several of them, which no cache holds together."""
    matrix = _WIDTH * _WIDTH * dtype.itemsize
    n_pairs = SCRATCH // (2 * matrix) if n_rows <= _FEW_ROWS else 1
    # no random numbers: neither their time nor their effect on the generator is wanted
    pairs = [[_filled(dtype, _WIDTH, _WIDTH) for _ in range(2)] for _ in range(n_pairs)]
    records = [LinearWeights.of(pair, (None, None)) for pair in pairs]
    hidden_states = _filled(dtype, n_rows, _WIDTH)

    def run(by: Kernels) -> None:
        for weights in records:
            linear(hidden_states, weights, activation="silu", gated=True, by=by)

    return run


def attention_trial(dtype: torch.dtype, n_new: int) -> Trial:
    """A prompt of n_new tokens; few of them as in assisted decoding, in several rows after a long context."""
    n_rows, n_past = (_ROWS, _CONTEXT) if n_new < 32 else (1, 0)
    # scores of long prompts are many: fewer heads do
    n_heads, n_kv_heads, head_dim = (32 if n_new < 512 else 8), (8 if n_new < 512 else 2), _HEAD_DIM
    n_keys = n_past + n_new
    appended = Appended(
        prefix=array_of(_filled(dtype, 2, n_rows, n_kv_heads, n_keys, head_dim)),
        suffix=array_of(_filled(dtype, 2, 1, n_kv_heads, 0, head_dim)),
        prefix_len=n_keys,
        suffix_len=0,
        in_suffix=False,
        n_new=n_new,
        prefix_row=np.arange(n_rows, dtype=np.int32),
        table=np.zeros((n_rows, 0), np.int32),
    )
    qkv = _filled(dtype, n_rows, n_new, (n_heads + 2 * n_kv_heads) * head_dim)

    def run(by: Kernels) -> None:
        attend(qkv, appended, Mask("causal"), Scoring(head_dim**-0.5), n_heads, n_kv_heads, head_dim, by=by)

    return run


def _filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.full(shape, 1 / 64, dtype=dtype, device="cpu")


TRIALS: dict[str, Callable[[torch.dtype, int], Trial]] = {
    "linear": linear_trial,
    "attention": attention_trial,
}
