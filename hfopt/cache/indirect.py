"""IndirectCache: a `transformers` cache in which rows share keys and values, and reordering moves none.

A layer holds two buffers. The *prefix* has the tokens that were read before rows diverged, one row per prompt;
the *suffix* has those after that, one row per logical row (a beam, say): the two segments of
https://arxiv.org/abs/2401.05391. A `RowMap`, one for all layers, names the physical row in which a logical
row finds its prefix and each of its suffix tokens, so a step of beam search rewrites some integers, no more.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from hfopt.cache.appended import Appended, AppendedEverywhere, Buffers
from hfopt.cache.codes import KV_CACHES, check_kv_cache
from hfopt.cache.layer import IndirectLayer
from hfopt.cache.row_map import RowMap
from hfopt.cache.sharded import ShardedLayer, Share
from hfopt.cache.storage import Layout, Segment
from hfopt.cache.window import WindowLayer
from hfopt.errors import InvalidInput
from hfopt.host import Config, holding, window_of

__all__ = ["KV_CACHES", "Appended", "AppendedEverywhere", "Buffers", "IndirectCache"]

T = TypeVar("T")


class IndirectCache(DynamicCache):
    """A `DynamicCache` whose reordering moves no key and no value, and whose rows can share a prompt.

    Args:
        config: of the model; names the layers. Those that are neither full attention nor of a window stay transformers' own.
        copies: rows that each prompt is for (`num_beams` or `num_return_sequences`). Above 1, the rows that
            arrive first are prompts; `fork`, or the first update of `copies` times as many rows, makes
            `copies` rows of each.
        max_length: tokens that it is meant for; layers of a window as long are no others than those without. (Longer texts
            are right too, and then more is kept than the window.) Those of a shorter one keep little more than the window.
        kv_cache: "int8" stores keys and values as 8-bit codes with a scale for each token and head, in half the memory of
            bfloat16; None as they are.

    Raises `InvalidInput` if `copies` is below 1, and for another `kv_cache`.

    Example:
        >>> import hfopt, torch
        >>> cache = hfopt.IndirectCache(copies=4)
        >>> prompt, step = torch.randn(1, 2, 5, 16), torch.randn(4, 2, 1, 16)  # [rows, heads, tokens, channels]
        >>> with torch.no_grad():
        ...     keys, values = cache.update(prompt, prompt, layer_idx=0)
        ...     keys, values = cache.update(step, step, layer_idx=0)
        >>> keys.shape  # four rows, which share the prompt in memory
        torch.Size([4, 2, 6, 16])
        >>> cache.reorder_cache(torch.tensor([3, 3, 0, 1]))  # moves none of them
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        copies: int = 1,
        kv_cache: str | None = None,
        max_length: int | None = None,
    ) -> None:
        if copies < 1:
            raise InvalidInput(f"copies = {copies}: at least 1 is needed")
        check_kv_cache(kv_cache)
        super().__init__(config=config)
        self.copies, self.kv_cache, self.max_length = copies, kv_cache, max_length
        self._rows = RowMap()
        self._memo: dict[str, tuple[Tensor, Any]] = {}
        self.layers: list[Any]
        self.layer_class_to_replicate: Any
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = functools.partial(IndirectLayer, self._rows, kv_cache=kv_cache)
        self.layers = holding(self.layers)
        length = sys.maxsize if max_length is None else max_length
        windows = [window_of(layer) for layer in self.layers]
        kinds = [None if window is None else min(window, length) for window in windows]
        for index, (kind, window) in enumerate(zip(kinds, windows, strict=True)):
            made = (self._rows, kinds[index + 1 :].count(kind))
            if kind is not None and kind == length:
                self.layers[index] = IndirectLayer(*made, kv_cache=kv_cache)
            elif window is not None:
                self.layers[index] = WindowLayer(window, *made, kv_cache=kv_cache)

    def shard(self, share: Share) -> None:
        """Let this empty cache, whose layers all see everything, be for one prompt that several processes have."""
        n = len(self.layers)
        self.layers = [ShardedLayer(share, self._rows, n - 1 - index) for index in range(n)]

    @property
    def is_sharded(self) -> bool:
        """Whether other processes have some of its tokens."""
        return bool(self.layers) and isinstance(self.layers[0], ShardedLayer)

    def emptied(self, config: Config) -> IndirectCache:
        """A new cache of this kind, for as many copies, with nothing in it."""
        return IndirectCache(config, copies=self.copies, kv_cache=self.kv_cache, max_length=self.max_length)

    @property
    def n_rows(self) -> int:
        """Logical rows (prompts, until they are forked); 0 while the cache is empty."""
        return next((layer.n_rows for layer in self._indirect() if layer.get_seq_length() > 0), 0)

    def _indirect(self) -> Iterator[IndirectLayer]:
        return (layer for layer in self.layers if isinstance(layer, IndirectLayer))

    def append(
        self, layer_idx: int, n_rows: int, n_new: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Appended:
        """Make room for `n_new` tokens a row in a layer, and count them as stored. The caller writes them.

        Raises `InvalidInput` for rows, heads or a dtype that do not fit what is stored, and `CacheFull`,
        before anything is changed, if the buffers would grow beyond the available memory.
        """
        if layer_idx >= len(self.layers) and self.layer_class_to_replicate is not None:
            self.layers += [self.layer_class_to_replicate() for _ in range(layer_idx + 1 - len(self.layers))]
        layer = self.layers[layer_idx]
        if not isinstance(layer, IndirectLayer):
            raise InvalidInput(f"layer_idx = {layer_idx}: only `update` extends a {type(layer).__name__}")
        if self.copies > 1:
            self._fork_for(n_rows)
        return layer.append(n_rows, n_new, n_kv_heads, head_dim, dtype)

    def append_everywhere(
        self, n_rows: int, n_new: int, layouts: Sequence[Layout]
    ) -> AppendedEverywhere | None:
        """`append` tokens in every layer; None, with nothing changed, unless all hold the same tokens and rows, or none.

        layouts: (n_kv_heads, head_dim, dtype) of each layer. Raises as `append`, and if there are other layers.
        """
        if len(layouts) != len(self.layers):
            raise InvalidInput(f"layouts are {len(layouts)}: the cache has {len(self.layers)} layers")
        if self.copies > 1:
            self._fork_for(n_rows)
        if not self.is_even(n_rows) and not self.is_new:
            return None
        layers = self.layers
        have_room = all(map(IndirectLayer.has_room, layers, repeat(n_new), layouts))
        first = layers[0].append(n_rows, n_new, *layouts[0])
        for layer, layout in zip(layers[1:], layouts[1:], strict=True):
            if have_room:
                layer.prefix_len, layer.suffix_len = first.prefix_len, first.suffix_len
            else:
                layer.append(n_rows, n_new, *layout)
        return AppendedEverywhere(first, [layer.buffers for layer in layers])

    def adopt(self, segments: Sequence[Segment], length: int, layouts: Sequence[Layout]) -> None:
        """Let one row of an empty cache begin with as many tokens that others hold, and read them where they are.

        segments: contiguous buffers of one row for each layer, of these layouts, with as many columns or more. They are
        never written to: what comes behind them goes into the suffix.
        """
        self._rows.start(1)
        self._rows.is_identity = False
        for layer, segment, layout in zip(self._indirect(), segments, layouts, strict=True):
            layer.adopt(segment, length, layout)

    def n_keys(self, layer_idx: int, n_new: int) -> int:
        """Tokens that attention of so many more in this layer is over."""
        length = self.get_seq_length(layer_idx)
        skipped = self.layers[layer_idx].first_seen(length) if layer_idx < len(self.layers) else 0
        return length + n_new - int(skipped)

    def is_even(self, n_rows: int) -> bool:
        """Whether all layers have buffers with the same tokens, at least one, of the same n_rows rows."""
        rows, layers = self._rows, self.layers
        if not layers or not isinstance(layers[0], IndirectLayer):
            return False
        prefix_len, suffix_len = layers[0].prefix_len, layers[0].suffix_len
        for layer in layers:
            if not isinstance(layer, IndirectLayer) or layer.rows is not rows or layer.prefix is None:
                return False
            if layer.prefix_len != prefix_len or layer.suffix_len != suffix_len:
                return False
        return prefix_len > 0 and rows.n_rows == n_rows

    @property
    def is_new(self) -> bool:
        """Whether all layers have room for the first tokens of the same rows."""
        rows, layers = self._rows, self.layers
        are_ours = all(isinstance(layer, IndirectLayer) and layer.rows is rows for layer in layers)
        return bool(layers) and are_ours and not any(layer.get_seq_length() for layer in layers)

    @property
    def sees_all(self) -> bool:
        """Whether no layer has a window."""
        return all(type(layer) is IndirectLayer for layer in self.layers)

    def share(self, n_rows: int) -> None:
        """Let so many rows go on from the one that there is, each of which may be for several copies still."""
        self._rearrange("batch_repeat_interleave", n_rows)

    def newest(self) -> list[Tensor]:
        """Views of the last token that every layer of an even cache holds, [2, n_rows, n_kv_heads, head_dim] and scales."""
        return [part for layer in self._indirect() for part in layer.newest()]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [n_rows, n_kv_heads, n_new, head_dim], and return all keys and all values of the layer.

        For attention code that knows nothing of prefixes. A view as long as every row reads its own prefix row,
        gathered after that, and dequantised from codes. Raises as `append`.
        """
        if self.copies > 1:
            self._fork_for(key_states.shape[0])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def fork(self) -> None:
        """Make `copies` rows of each prompt, side by side. Does nothing while empty, or a second time."""
        if self.copies > 1 and self.n_rows > 0:
            repeats, self.copies = self.copies, 1
            self.batch_repeat_interleave(repeats)

    def _fork_for(self, n_rows: int) -> None:
        if n_rows == self.n_rows * self.copies:
            self.fork()

    def memo(self, tag: str, tensor: Tensor | None, build: Callable[[], T]) -> T:
        """`build()`, remembered under `tag` while `tensor` is the very same object (for None, not at all)."""
        entry = self._memo.get(tag)
        if entry is not None and entry[0] is tensor:
            return entry[1]
        built = build()
        if tensor is None:
            self._memo.pop(tag, None)
        else:
            self._memo[tag] = (tensor, built)
        return built

    def _settled(self) -> list[RowMap]:
        """The maps in use, after every layer whose suffix is shorter than its companions' has got its own.

        Columns that only some layers have filled would otherwise be reordered before the others fill them.
        """
        stored = [layer for layer in self._indirect() if layer.prefix is not None]
        companions: dict[int, list[IndirectLayer]] = {}
        for layer in stored:
            companions.setdefault(id(layer.rows), []).append(layer)
        for layers in companions.values():
            rows = layers[0].rows
            rows.n_suffix = max(layer.suffix_len for layer in layers)
            for layer in layers:
                if layer.suffix_len < rows.n_suffix:
                    layer.own_rows()
        return list({id(layer.rows): layer.rows for layer in stored if layer.get_seq_length() > 0}.values())

    def _rearrange(self, method: str, argument: Any) -> None:
        if self.is_even(self._rows.n_rows):
            self._rows.n_suffix = self.layers[0].suffix_len
            getattr(self._rows, method)(argument)
            return
        for rows in self._settled():
            getattr(rows, method)(argument)
        for layer in self.layers:
            if not isinstance(layer, IndirectLayer) or layer.prefix is None:
                getattr(layer, method)(argument)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r continues row `beam_idx[r]`."""
        if self.copies > 1 and beam_idx.shape[0] == self.n_rows:
            self.copies = 1  # every beam brought a prompt of its own
        self.fork()
        self._rearrange("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` rows, side by side."""
        self.fork()
        self._rearrange("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.fork()
        self._rearrange("batch_select_indices", indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every row.

        Raises RuntimeError, with nothing changed, if a layer of a window no longer has what those before them see.
        """
        for layer in self._indirect():
            if layer.prefix is not None:
                layer.cropped_length(tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, IndirectLayer) and layer.prefix is not None:
                layer.shorten(tokens_to_remove)
            else:
                layer.crop(tokens_to_remove)
        self._settled()

    def reset(self) -> None:
        """Forget all tokens and release their memory."""
        super().reset()
        self._memo.clear()
        self._rows.start(0)
        for layer in self._indirect():
            layer.rows = self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}
