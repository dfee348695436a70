"""IndirectLayer: the keys and values of one layer, in a trunk and a branch."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hfopt.cache.codes import dequantised, quantised
from hfopt.cache.row_map import RowMap, rounded
from hfopt.errors import CacheFull, InvalidInput
from hfopt.host import DynamicLayer
from hfopt.machine.memory import advise_huge_pages, available_memory

Layout: TypeAlias = tuple[int, int, torch.dtype]  # (n_kv_heads, head_dim, dtype)

_UNCHECKED_BYTES = 1 << 26  # growth that is too small to ask the system about
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # those with a numpy view
_CROPS_TO_LENGTH = "tokens_to_remove" not in inspect.signature(DynamicLayer.crop).parameters  # transformers 4


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


class IndirectLayer(DynamicLayer):
    """A layer whose rows read their keys and values through a `RowMap`.

    While `trunk` is None it is a plain `DynamicLayer`. It turns into one for whatever the buffers cannot hold
    (keys and values of different shapes, other devices, tensors that autograd records, keys assigned from
    outside), and back with the next tokens that they can.
    """

    _keys: Tensor | None
    _values: Tensor | None

    def __init__(self, rows: RowMap, n_following: int = 0, *, kv_cache: str | None = None) -> None:
        self.rows = rows
        self.n_following = n_following  # layers that will need the same room in the same step
        self.kv_cache = kv_cache
        self._drop()
        super().__init__()

    def _drop(self) -> None:
        self.trunk: Tensor | None = None
        self.branch: Tensor | None = None
        self.trunk_scales: Tensor | None = None
        self.branch_scales: Tensor | None = None
        self.trunk_len = self.branch_len = 0
        self._layout: Layout | None = None
        self._keys = self._values = None
        self._view()

    def _view(self) -> None:
        parts = self.trunk, self.branch, self.trunk_scales, self.branch_scales
        self.buffers = Buffers(*(_bits(part) for part in parts))

    # What is stored

    @property
    def keys(self) -> Tensor | None:
        """[n_rows, n_kv_heads, length, head_dim]; a view while rows read their own trunk row, else a copy, as of codes."""
        return self._keys if self.trunk is None else self._gathered(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._become_plain()
        self._keys = keys

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._values if self.trunk is None else self._gathered(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._become_plain()
        self._values = values

    def _gathered(self, which: int) -> Tensor:
        assert self.trunk is not None and self.branch is not None and self._layout is not None
        elements = self._read(self.trunk[which], self.branch[which])
        if self.trunk_scales is None or self.branch_scales is None:
            return elements
        scales = self._read(self.trunk_scales[which], self.branch_scales[which])
        return dequantised(elements, scales, self._layout[2])

    def _read(self, trunk: Tensor, branch: Tensor) -> Tensor:
        """What the rows read of [rows, n_kv_heads, columns, ...]."""
        rows, trunk = self.rows, trunk[:, :, : self.trunk_len]
        if rows.is_identity:
            return trunk
        trunk = trunk.index_select(0, torch.from_numpy(rows.trunk_row))
        if self.branch_len == 0:
            return trunk
        table = torch.from_numpy(rows.table[:, : self.branch_len].astype(np.int64))
        # the two indices bring [n_rows, branch_len] to the front
        gathered = branch[table, :, torch.arange(self.branch_len)]
        return torch.cat([trunk, gathered.transpose(1, 2)], dim=2)

    def _become_plain(self) -> None:
        if self.trunk is not None:
            keys, values = self.keys, self.values
            self._drop()
            self._keys, self._values = keys, values

    def _plain_layout(self) -> Layout | None:
        return None if self._keys is None or self._values is None else _layout(self._keys, self._values)

    @property
    def n_rows(self) -> int:
        """Rows of `keys`, in a layer that has tokens."""
        return self.rows.n_rows if self._keys is None else self._keys.shape[0]

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.trunk is None else self.trunk_len + self.branch_len

    # New tokens

    def append(self, n_rows: int, n_new: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Appended:
        """See `IndirectCache.append`."""
        if n_rows != self.rows.n_rows or self._layout != (n_kv_heads, head_dim, dtype):
            self._admit(n_rows, n_new, (n_kv_heads, head_dim, dtype))
        rows = self.rows
        if rows.is_identity:
            length = self.trunk_len + n_new
            if length > self.buffers.trunk_columns:
                self.trunk, self.trunk_scales = self._grown(self.trunk, self.trunk_scales, n_rows, length)
                self._view()
            self.trunk_len = length
        else:
            length = self.branch_len + n_new
            if length > self.buffers.branch_columns or n_rows > self.buffers.branch_rows:
                self.branch, self.branch_scales = self._grown(self.branch, self.branch_scales, n_rows, length)
                self._view()
            if length > rows.n_branch:
                rows.extend(length)
            self.branch_len = length
        return Appended(
            self.buffers.trunk,
            self.buffers.branch,
            self.trunk_len,
            self.branch_len,
            not rows.is_identity,
            n_new,
            rows.trunk_row,
            rows.table,
            self.buffers,
            self.buffers.trunk_scales,
            self.buffers.branch_scales,
        )

    def newest(self) -> list[Tensor]:
        """Keys and values of the last token, in place: [2, n_rows, n_kv_heads, head_dim], and the scales of codes."""
        rows = self.rows
        if rows.is_identity:
            parts, length = (self.trunk, self.trunk_scales), self.trunk_len
        else:
            parts, length = (self.branch, self.branch_scales), self.branch_len
        return [part[:, : rows.n_rows, :, length - 1] for part in parts if part is not None]

    def has_room(self, n_new: int, layout: Layout) -> bool:
        """Whether the buffers have this layout, and columns for so many more tokens of each row."""
        rows, buffers = self.rows, self.buffers
        if self._layout != layout:
            return False
        if rows.is_identity:
            return self.trunk_len + n_new <= buffers.trunk_columns
        return self.branch_len + n_new <= buffers.branch_columns and rows.n_rows <= buffers.branch_rows

    def _admit(self, n_rows: int, n_new: int, layout: Layout) -> None:
        """What an append seldom meets: the first tokens in the buffers, or arguments that do not fit."""
        length = self.get_seq_length()
        if self.trunk is not None or length > 0:
            stored = (self.n_rows, self._layout if self.trunk is not None else self._plain_layout())
            if stored != (n_rows, layout):
                raise InvalidInput(
                    f"n_rows = {n_rows}, (n_kv_heads, head_dim, dtype) = {layout}: "
                    f"this layer has tokens of {stored[0]} rows and {stored[1] or 'another shape'}"
                )
        if self.trunk is not None:
            return

        dtype = layout[2]
        if dtype not in _DTYPES:
            raise InvalidInput(f"dtype = {dtype}: allowed are {', '.join(map(str, _DTYPES))}")
        trunk, trunk_scales = self._grown(*self._no_columns(n_rows, layout), n_rows, length + n_new)
        if length > 0 and self._keys is not None and self._values is not None:
            known = torch.stack([self._keys.detach(), self._values.detach()])
            _write(trunk, trunk_scales, n_rows, 0, known)
        if self.rows.n_rows == 0:
            self.rows.start(n_rows)
        elif not self.rows.is_identity or self.rows.n_rows != n_rows:
            self.rows = RowMap(n_rows)
        self._drop()
        self.trunk, self.trunk_scales = trunk, trunk_scales
        self.branch, self.branch_scales = self._no_columns(1, layout)
        self.trunk_len, self._layout = length, layout
        self.dtype, self.device, self.is_initialized = dtype, trunk.device, True
        self._view()

    def _no_columns(self, n_rows: int, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Room for no token."""
        n_kv_heads, head_dim, dtype = layout
        shape = 2, n_rows, n_kv_heads, 0
        if self.kv_cache is None:
            return _empty((*shape, head_dim), dtype), None
        return _empty((*shape, head_dim), torch.int8), _empty(shape, torch.float32)

    def _grown(
        self, buffer: Tensor | None, scales: Tensor | None, n_rows: int, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """A buffer, and its scales if it has some, for more rows or columns, with the same content."""
        assert buffer is not None
        _, old_rows, n_kv_heads, old_columns, head_dim = buffer.shape
        n_rows = max(n_rows, old_rows)
        vector_bytes = head_dim * buffer.element_size() + (0 if scales is None else scales.element_size())
        column_bytes = 2 * n_rows * n_kv_heads * vector_bytes
        old_bytes = buffer.nbytes + (0 if scales is None else scales.nbytes)

        def needed(n_columns: int) -> int:
            added = n_columns * column_bytes - old_bytes
            return n_columns * column_bytes + self.n_following * added

        least = max(rounded(length), old_columns)
        n_columns = max(least, rounded(old_columns * 3 // 2)) if length > old_columns else old_columns
        if needed(n_columns) > _UNCHECKED_BYTES and needed(n_columns) > (available := available_memory()):
            n_columns = least
            if needed(n_columns) > available:
                raise CacheFull(
                    f"keys and values of {length:,} tokens in {n_rows:,} rows need "
                    f"{needed(n_columns):,} bytes more; {available:,} bytes are available"
                )

        def moved(part: Tensor) -> Tensor:
            grown = _empty((2, n_rows, n_kv_heads, n_columns, *part.shape[4:]), part.dtype)
            grown[:, :old_rows, :, :old_columns] = part
            return grown

        return moved(buffer), None if scales is None else moved(scales)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.tensor([], dtype=self.dtype, device=self.device)
        self.values = torch.tensor([], dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `IndirectCache.update`.

        Each call dequantises all codes, in memory of several times their size: a step costs as much again as reading a cache
        of floats. Only attention that is not ours calls it (modules that were not swapped, or hand over to their
        class, as for `output_attentions`); a copy that stayed would take the memory that codes are there to save.
        """
        # While autograd records, writing in place would change what it has saved.
        layout = None if torch.is_grad_enabled() else _layout(key_states, value_states)
        if self.trunk is not None:
            fits = layout == self._layout
        else:
            fits = layout is not None and (self.get_seq_length() == 0 or layout == self._plain_layout())
        if not fits:
            self._become_plain()
            return super().update(key_states, value_states, *args, **kwargs)

        n_rows, n_kv_heads, n_new, head_dim = key_states.shape
        in_branch = self.append(n_rows, n_new, n_kv_heads, head_dim, key_states.dtype).in_branch
        if in_branch:
            buffer, scales, length = self.branch, self.branch_scales, self.branch_len
        else:
            buffer, scales, length = self.trunk, self.trunk_scales, self.trunk_len
        assert buffer is not None
        if scales is None:
            buffer[0, :n_rows, :, length - n_new : length] = key_states
            buffer[1, :n_rows, :, length - n_new : length] = value_states
        else:
            _write(buffer, scales, n_rows, length - n_new, torch.stack([key_states, value_states]))
        return self._gathered(0), self._gathered(1)

    # The rest of DynamicLayer, on a map of its own: other layers must not see it

    def own_rows(self) -> None:
        """Leave the map that is shared with other layers."""
        self.rows = self.rows.cut(self.branch_len)

    def _rearrange(self, method: str, argument: Any) -> None:
        if self.trunk is None:
            getattr(super(), method)(argument)
        elif self.get_seq_length() > 0:
            self.own_rows()
            getattr(self.rows, method)(argument)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rearrange("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rearrange("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rearrange("batch_select_indices", indices)

    def crop(self, tokens_to_remove: int) -> None:
        if self.trunk is None:
            super().crop(tokens_to_remove)
        else:
            self.shorten(tokens_to_remove)
            self.own_rows()

    def shorten(self, tokens_to_remove: int) -> None:
        """`crop`, leaving it to the caller to settle the map."""
        length = self.get_seq_length()
        if _CROPS_TO_LENGTH and tokens_to_remove >= 0:
            kept = min(tokens_to_remove, length)
        elif tokens_to_remove <= 0:
            kept = max(length + tokens_to_remove, 0)
        else:
            raise InvalidInput(
                f"tokens_to_remove = {tokens_to_remove}: give minus the number of tokens to remove"
            )
        self.trunk_len = min(self.trunk_len, kept)
        self.branch_len = kept - self.trunk_len

    def reset(self) -> None:
        self._drop()
        self.is_initialized = False
        super().reset()

    def offload(self) -> None:
        if self.trunk is None:
            super().offload()

    def prefetch(self) -> None:
        if self.trunk is None:
            super().prefetch()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()


def _layout(keys: Tensor, values: Tensor) -> Layout | None:
    """The layout of keys and values that the buffers can hold, else None."""
    if (
        keys.shape != values.shape
        or keys.dtype != values.dtype
        or keys.dtype not in _DTYPES
        or keys.device.type != "cpu"
        or values.device.type != "cpu"
        or type(keys) is not Tensor
        or type(values) is not Tensor
    ):
        return None
    return keys.shape[1], keys.shape[3], keys.dtype


def _write(buffer: Tensor, scales: Tensor | None, n_rows: int, first: int, stored: Tensor) -> None:
    """Keys and values [2, n_rows, n_kv_heads, n_new, head_dim] to the columns from `first` on."""
    columns = slice(first, first + stored.shape[3])
    if scales is None:
        buffer[:, :n_rows, :, columns] = stored
    else:
        buffer[:, :n_rows, :, columns], scales[:, :n_rows, :, columns] = quantised(stored)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # An inference tensor could not be written to any more after the caller has left `torch.inference_mode`.
    with torch.inference_mode(False):
        buffer = torch.empty(shape, dtype=dtype, device="cpu")
    if not torch.compiler.is_compiling():  # a traced buffer has no address yet
        advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer


def _bits(buffer: Tensor | None) -> Any:
    if buffer is None:
        return None
    return (buffer.view(torch.uint16) if buffer.dtype == torch.bfloat16 else buffer).numpy()
