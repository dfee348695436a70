"""Arrays that an append to the cache hands to kernels, and which of their places are new."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Buffers:
    """The two buffers of a layer until one of them changes, with what `functional` found out about them.

    The scales are those of 8-bit codes. starts: tokens of prefix and suffix that came before the first column of each, and
    are not held any more. checked: (dtype, n_kv_heads, head_dim) that they have been found to have. record: see
    `kernels.cache_record`.
    """

    def __init__(
        self,
        prefix: np.ndarray,
        suffix: np.ndarray,
        prefix_scales: np.ndarray | None = None,
        suffix_scales: np.ndarray | None = None,
        *,
        starts: tuple[int, int] = (0, 0),
    ) -> None:
        self.prefix, self.suffix, self.starts = prefix, suffix, starts
        self.prefix_scales, self.suffix_scales = prefix_scales, suffix_scales
        self.prefix_columns = 0 if prefix is None else prefix.shape[3]
        self.suffix_rows, self.suffix_columns = (0, 0) if suffix is None else suffix.shape[1:4:2]
        self.checked: tuple[torch.dtype, int, int] | None = None
        self.record: Any = None


class Appended(NamedTuple):
    """One layer after room was made for `n_new` tokens a row; the arrays are views of what is stored.

    Token `t` of logical row `r` is `prefix[:, prefix_row[r], :, t]` for `t < prefix_len`; later tokens are
    `suffix[:, table[r, b], :, b]` with `b = t - prefix_len`. The new ones belong into row `r` and the columns
    `[len - n_new, len)`. Columns beyond the length hold arbitrary bits. bfloat16 comes as uint16, float16 as int16; or all
    are int8 codes, to be multiplied by the scale of their token and head.

    In a layer of a window, the buffers begin with later tokens: all columns are less by what `starts` says. No new token
    sees any of the first `skipped` ones, some of which may still be there. A suffix that begins behind so many columns of
    something else (the prefix, where both are one array) has minus that as its start.
    """

    prefix: np.ndarray  # [2, n_prompts, n_kv_heads, columns, head_dim], keys then values
    suffix: np.ndarray  # [2, >= 1, n_kv_heads, columns, head_dim]; no columns as long as there is no suffix
    prefix_len: int  # with the new tokens, if they belong there
    suffix_len: int
    in_suffix: bool  # whether the new tokens belong into the suffix
    n_new: int
    prefix_row: np.ndarray  # int32 [n_rows]
    table: np.ndarray  # int32 [n_rows, >= suffix_len], C-contiguous
    buffers: Buffers | None = None  # if prefix and suffix are those of a cache, which are checked once
    prefix_scales: np.ndarray | None = None  # of codes: float32 [2, n_prompts, n_kv_heads, columns]
    suffix_scales: np.ndarray | None = None
    starts: tuple[int, int] = (0, 0)  # of prefix and suffix
    skipped: int = 0

    @property
    def n_keys(self) -> int:
        """Tokens that a new one may see."""
        return self.prefix_len + self.suffix_len - self.skipped


class AppendedEverywhere(NamedTuple):
    """All layers after room was made in each for new tokens of the same rows, behind the same tokens."""

    first: Appended
    buffers: list[Buffers]  # of each layer
