"""IndirectLayer: the keys and values of one layer, in a prefix and a suffix."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hfopt.cache.appended import Appended, Buffers
from hfopt.cache.codes import dequantised
from hfopt.cache.row_map import RowMap, gathered
from hfopt.cache.storage import DTYPES, Layout, Segment, bits, grown, layout_of, no_columns, write
from hfopt.errors import InvalidInput
from hfopt.host import DynamicLayer

_CROPS_TO_LENGTH = "tokens_to_remove" not in inspect.signature(DynamicLayer.crop).parameters  # transformers 4


class IndirectLayer(DynamicLayer):
    """A layer whose rows read their keys and values through a `RowMap`.

    While `prefix` is None it is a plain `DynamicLayer`. It turns into one for whatever the buffers cannot hold
    (keys and values of different shapes, other devices, tensors that autograd records, keys assigned from
    outside), and back with the next tokens that they can.
    """

    _keys: Tensor | None
    _values: Tensor | None

    def __init__(
        self, rows: RowMap, n_following: int = 0, *, kv_cache: str | None = None, **kwargs: Any
    ) -> None:
        self.rows = rows
        self.n_following = n_following  # layers that will need the same room in the same step
        self.kv_cache = kv_cache
        self._drop()
        super().__init__(**kwargs)

    def _drop(self) -> None:
        self.prefix: Tensor | None = None
        self.suffix: Tensor | None = None
        self.prefix_scales: Tensor | None = None
        self.suffix_scales: Tensor | None = None
        self.prefix_len = self.suffix_len = 0
        self.starts = 0, 0  # tokens of prefix and suffix that are not held any more
        self._layout: Layout | None = None
        self._keys = self._values = None
        self._view()

    def _view(self) -> None:
        prefix, suffix, *scales = map(
            bits, (self.prefix, self.suffix, self.prefix_scales, self.suffix_scales)
        )
        self.buffers = Buffers(prefix, suffix, *scales, starts=self.starts)

    def first_seen(self, length: int) -> int:
        """The first token that those behind so many others see."""
        return 0

    def _first_kept(self) -> int:
        """The first token that `keys` and `values` are promised to hold."""
        return 0

    # What is stored

    @property
    def keys(self) -> Tensor | None:
        """[n_rows, n_kv_heads, length, head_dim]; a view while rows read their own prefix row, else a copy, as of codes."""
        return self._keys if self.prefix is None else self._gathered(0, self._first_kept())

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._become_plain()
        self._keys = keys

    @property
    def values(self) -> Tensor | None:
        """Values in the form of `keys`."""
        return self._values if self.prefix is None else self._gathered(1, self._first_kept())

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._become_plain()
        self._values = values

    def seen(self, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values from a token on."""
        return self._gathered(0, first), self._gathered(1, first)

    def _gathered(self, which: int, first: int) -> Tensor:
        assert self.prefix is not None and self.suffix is not None and self._layout is not None
        elements = self._read(self.prefix[which], self.suffix[which], first)
        if self.prefix_scales is None or self.suffix_scales is None:
            return elements
        scales = self._read(self.prefix_scales[which], self.suffix_scales[which], first)
        return dequantised(elements, scales, self._layout[2])

    def _read(self, prefix: Tensor, suffix: Tensor, first: int) -> Tensor:
        """Gather what the rows read of [rows, n_kv_heads, columns, ...], from token `first` on."""
        rows, starts, ends = self.rows, self.starts, (self.prefix_len, self.suffix_len)
        in_prefix = min(first, ends[0])
        in_suffix = first - in_prefix
        prefix = prefix[:, :, in_prefix - starts[0] : ends[0] - starts[0]]
        if rows.is_identity:
            return prefix
        table = rows.table[:, in_suffix : ends[1]]
        return gathered(prefix, suffix[:, :, in_suffix - starts[1] :], rows.prefix_row, table)

    def _become_plain(self) -> None:
        if self.prefix is not None:
            keys, values = self.keys, self.values
            self._drop()
            self._keys, self._values = keys, values

    def _plain_layout(self) -> Layout | None:
        return None if self._keys is None or self._values is None else layout_of(self._keys, self._values)

    @property
    def n_rows(self) -> int:
        """Rows of `keys`, in a layer that has tokens."""
        return self.rows.n_rows if self._keys is None else self._keys.shape[0]

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.prefix is None else self.prefix_len + self.suffix_len

    def adopt(self, segment: Segment, length: int, layout: Layout) -> None:
        """See `IndirectCache.adopt`."""
        self._drop()
        self.prefix, self.prefix_scales = segment
        self.suffix, self.suffix_scales = no_columns(1, layout, self.kv_cache)
        self.prefix_len, self._layout = length, layout
        self.dtype, self.device, self.is_initialized = layout[2], segment[0].device, True
        self._view()

    # New tokens

    def append(self, n_rows: int, n_new: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Appended:
        """See `IndirectCache.append`."""
        if n_rows != self.rows.n_rows or self._layout != (n_kv_heads, head_dim, dtype):
            self._admit(n_rows, n_new, (n_kv_heads, head_dim, dtype))
        rows, skipped = self.rows, self.first_seen(self.prefix_len + self.suffix_len)
        if not self._fits(n_new):
            self._make_room(n_rows, n_new)
            self._view()
        if rows.is_identity:
            self.prefix_len += n_new
        else:
            self.suffix_len += n_new
            if self.suffix_len > rows.n_suffix:
                rows.extend(self.suffix_len)
        return self.appended(n_new, skipped)

    def appended(self, n_new: int, skipped: int) -> Appended:
        """The layer as its last n_new tokens have left it, which see none of the first `skipped` ones."""
        rows = self.rows
        return Appended(
            self.buffers.prefix,
            self.buffers.suffix,
            self.prefix_len,
            self.suffix_len,
            not rows.is_identity,
            n_new,
            rows.prefix_row,
            rows.table,
            self.buffers,
            self.buffers.prefix_scales,
            self.buffers.suffix_scales,
            self.starts,
            skipped,
        )

    def _fits(self, n_new: int) -> bool:
        """Whether the buffers are right for so many more tokens of each row."""
        rows, buffers, starts = self.rows, self.buffers, self.starts
        if rows.is_identity:
            return self.prefix_len + n_new <= buffers.prefix_columns + starts[0]
        has_rows = rows.n_rows <= buffers.suffix_rows
        return self.suffix_len + n_new <= buffers.suffix_columns + starts[1] and has_rows

    def _make_room(self, n_rows: int, n_new: int) -> None:
        if self.rows.is_identity:
            length = self.prefix_len + n_new
            self.prefix, self.prefix_scales = self._grown(self.prefix, self.prefix_scales, n_rows, length)
        else:
            length = self.suffix_len + n_new
            self.suffix, self.suffix_scales = self._grown(self.suffix, self.suffix_scales, n_rows, length)

    def newest(self) -> list[Tensor]:
        """Keys and values of the last token, in place: [2, n_rows, n_kv_heads, head_dim], and the scales of codes."""
        rows = self.rows
        if rows.is_identity:
            parts, length = (self.prefix, self.prefix_scales), self.prefix_len - self.starts[0]
        else:
            parts, length = (self.suffix, self.suffix_scales), self.suffix_len - self.starts[1]
        return [part[:, : rows.n_rows, :, length - 1] for part in parts if part is not None]

    def has_room(self, n_new: int, layout: Layout) -> bool:
        """Whether the buffers have this layout, and columns for so many more tokens of each row."""
        return self._layout == layout and self._fits(n_new)

    def _admit(self, n_rows: int, n_new: int, layout: Layout) -> None:
        """Prepare for what an append seldom meets: the first tokens in the buffers, or arguments that do not fit."""
        length = self.get_seq_length()
        if self.prefix is not None or length > 0:
            stored = (self.n_rows, self._layout if self.prefix is not None else self._plain_layout())
            if stored != (n_rows, layout):
                raise InvalidInput(
                    f"n_rows = {n_rows}, (n_kv_heads, head_dim, dtype) = {layout}: "
                    f"this layer has tokens of {stored[0]} rows and {stored[1] or 'another shape'}"
                )
        if self.prefix is not None:
            return

        dtype = layout[2]
        if dtype not in DTYPES:
            raise InvalidInput(f"dtype = {dtype}: allowed are {', '.join(map(str, DTYPES))}")
        known = None
        if length > 0 and self._keys is not None and self._values is not None:
            known = torch.stack([self._keys.detach(), self._values.detach()])
        n_known = 0 if known is None else known.shape[3]
        prefix, prefix_scales = self._grown(
            *no_columns(n_rows, layout, self.kv_cache), n_rows, n_known + n_new
        )
        if known is not None:
            write(prefix, prefix_scales, n_rows, 0, known)
        if self.rows.n_rows == 0:
            self.rows.start(n_rows)
        elif not self.rows.is_identity or self.rows.n_rows != n_rows:
            self.rows = RowMap(n_rows)
        self._drop()
        self.prefix, self.prefix_scales = prefix, prefix_scales
        self.suffix, self.suffix_scales = no_columns(1, layout, self.kv_cache)
        self.prefix_len, self.starts, self._layout = length, (length - n_known, 0), layout
        self.dtype, self.device, self.is_initialized = dtype, prefix.device, True
        self._view()

    def _grown(self, buffer: Tensor | None, scales: Tensor | None, n_rows: int, length: int) -> Segment:
        assert buffer is not None
        return grown(buffer, scales, n_rows, length, self.n_following)

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
        layout = None if torch.is_grad_enabled() else layout_of(key_states, value_states)
        if self.prefix is not None:
            fits = layout == self._layout
        else:
            fits = layout is not None and (self.get_seq_length() == 0 or layout == self._plain_layout())
        if not fits:
            self._become_plain()
            return super().update(key_states, value_states, *args, **kwargs)

        n_rows, n_kv_heads, n_new, head_dim = key_states.shape
        appended = self.append(n_rows, n_new, n_kv_heads, head_dim, key_states.dtype)
        if appended.in_suffix:
            buffer, scales, length = self.suffix, self.suffix_scales, self.suffix_len - self.starts[1]
        else:
            buffer, scales, length = self.prefix, self.prefix_scales, self.prefix_len - self.starts[0]
        assert buffer is not None
        if scales is None:
            buffer[0, :n_rows, :, length - n_new : length] = key_states
            buffer[1, :n_rows, :, length - n_new : length] = value_states
        else:
            write(buffer, scales, n_rows, length - n_new, torch.stack([key_states, value_states]))
        return self.seen(appended.skipped)

    # The rest of DynamicLayer, on a map of its own: other layers must not see it

    def own_rows(self) -> None:
        """Leave the map that is shared with other layers."""
        self.rows = self.rows.cut(self.suffix_len)

    def _rearrange(self, method: str, argument: Any) -> None:
        if self.prefix is None:
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
        if self.prefix is None:
            super().crop(tokens_to_remove)
        else:
            self.shorten(tokens_to_remove)
            self.own_rows()

    def shorten(self, tokens_to_remove: int) -> None:
        """`crop`, leaving it to the caller to settle the map."""
        kept = self.cropped_length(tokens_to_remove)
        self.prefix_len = min(self.prefix_len, kept)
        self.suffix_len = kept - self.prefix_len

    def cropped_length(self, tokens_to_remove: int) -> int:
        """Tokens that `crop` leaves; raises `InvalidInput` for a number that is not minus what is to be removed."""
        length = self.get_seq_length()
        if _CROPS_TO_LENGTH and tokens_to_remove >= 0:
            return min(tokens_to_remove, length)
        if tokens_to_remove <= 0:
            return max(length + tokens_to_remove, 0)
        raise InvalidInput(
            f"tokens_to_remove = {tokens_to_remove}: give minus the number of tokens to remove"
        )

    def reset(self) -> None:
        self._drop()
        self.is_initialized = False
        super().reset()

    def offload(self) -> None:
        if self.prefix is None:
            super().offload()

    def prefetch(self) -> None:
        if self.prefix is None:
            super().prefetch()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()
