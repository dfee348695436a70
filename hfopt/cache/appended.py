"""Arrays that an append to the cache hands to kernels, and which of their places are new."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Buffers:
    """The two buffers of a layer until one of them changes, with what `functional` found out about them.

    The scales are those of 8-bit codes. checked: (dtype, n_kv_heads, head_dim) that they have been found to have. record:
    see `kernels.cache_record`.
    """

    def __init__(
        self,
        trunk: np.ndarray,
        branch: np.ndarray,
        trunk_scales: np.ndarray | None = None,
        branch_scales: np.ndarray | None = None,
    ) -> None:
        self.trunk, self.branch = trunk, branch
        self.trunk_scales, self.branch_scales = trunk_scales, branch_scales
        self.trunk_columns = 0 if trunk is None else trunk.shape[3]
        self.branch_rows, self.branch_columns = (0, 0) if branch is None else branch.shape[1:4:2]
        self.checked: tuple[torch.dtype, int, int] | None = None
        self.record: Any = None


class Appended(NamedTuple):
    """One layer after room was made for `n_new` tokens a row; the arrays are views of what is stored.

    Token `t` of logical row `r` is `trunk[:, trunk_row[r], :, t]` for `t < trunk_len`; later tokens are
    `branch[:, table[r, b], :, b]` with `b = t - trunk_len`. The new ones belong into row `r` and the columns
    `[len - n_new, len)`. Columns beyond the length hold arbitrary bits. bfloat16 comes as uint16; or all are int8 codes, to
    be multiplied by the scale of their token and head.
    """

    trunk: np.ndarray  # [2, n_prompts, n_kv_heads, columns, head_dim], keys then values
    branch: np.ndarray  # [2, >= 1, n_kv_heads, columns, head_dim]; no columns as long as there is no branch
    trunk_len: int  # with the new tokens, if they belong there
    branch_len: int
    in_branch: bool  # whether the new tokens belong into the branch
    n_new: int
    trunk_row: np.ndarray  # int32 [n_rows]
    table: np.ndarray  # int32 [n_rows, >= branch_len], C-contiguous
    buffers: Buffers | None = None  # if trunk and branch are those of a cache, which are checked once
    trunk_scales: np.ndarray | None = None  # of codes: float32 [2, n_prompts, n_kv_heads, columns]
    branch_scales: np.ndarray | None = None


class AppendedEverywhere(NamedTuple):
    """All layers after room was made in each for new tokens of the same rows, behind the same tokens."""

    first: Appended
    buffers: list[Buffers]  # of each layer
