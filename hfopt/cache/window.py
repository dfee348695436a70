"""WindowLayer: a layer whose tokens see a window of those before them, of which it holds no others for long."""

from __future__ import annotations

from hfopt.cache.layer import IndirectLayer
from hfopt.cache.row_map import RowMap, rounded
from hfopt.cache.storage import moved
from hfopt.host import WindowedLayer

# Columns at least between two moves, each of which costs some readings of the window, as a token does one; and an eighth of
# the window, so that a token pays for no more than eight others.
_SLACK = 128


class WindowLayer(IndirectLayer, WindowedLayer):
    """An `IndirectLayer` that answers as transformers' layer of a window does.

    Tokens that no later one sees are left behind when the buffers are full: what is seen moves to the front of others, which
    have room for the window and some slack. The prefix goes when all of its tokens have. `crop` may remove as many tokens as
    came last, and more while there is slack; while past is recorded, none is left behind before it.
    """

    sliding_window: int
    record_past = False

    def __init__(
        self, sliding_window: int, rows: RowMap, n_following: int = 0, *, kv_cache: str | None = None
    ) -> None:
        self._n_plain = 0  # tokens that it has been given as a plain layer
        self._most = rounded(
            sliding_window + max(_SLACK, sliding_window // 8)
        )  # columns, unless more are new
        super().__init__(rows, n_following, kv_cache=kv_cache, sliding_window=sliding_window)

    @property
    def cumulative_length(self) -> int:
        """All tokens that it has been given, by the name that transformers' layer has for them."""
        return self._n_plain if self.prefix is None else self.prefix_len + self.suffix_len

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self._n_plain = length

    def first_seen(self, length: int) -> int:
        return max(length + 1 - self.sliding_window, 0)

    def _first_kept(self) -> int:
        length = self.prefix_len + self.suffix_len
        return max(self.first_seen(self._n_settled if self.record_past else length), sum(self.starts))

    def _drop(self) -> None:
        self._n_settled = 0
        super()._drop()

    def _become_plain(self) -> None:
        length = self.cumulative_length
        super()._become_plain()
        self._n_plain = length

    def _fits(self, n_new: int) -> bool:
        buffers = self.buffers
        widest = max(buffers.prefix_columns, buffers.suffix_columns)
        if not super()._fits(n_new) or (widest > self._most and widest > self._columns_for(n_new)):
            return False
        return self.rows.is_identity or not buffers.prefix_columns or self._first_kept() < self.prefix_len

    def _columns_for(self, n_new: int) -> int:
        """Most columns of a segment that so many new tokens belong into."""
        n_held = self.prefix_len + self.suffix_len - self._first_kept()
        return max(self._most, rounded(n_held + n_new))

    def _make_room(self, n_rows: int, n_new: int) -> None:
        """Let what is still seen begin its buffers."""
        first, most = self._first_kept(), self._columns_for(n_new)
        in_prefix = min(first, self.prefix_len)
        in_suffix, old = first - in_prefix, self.starts
        assert self.prefix is not None and self.suffix is not None
        n_seen, is_identity = self.prefix_len - in_prefix, self.rows.is_identity
        if not is_identity:
            columns = _columns(self.suffix_len - in_suffix + n_new, most)
            kept = slice(in_suffix - old[1], self.suffix_len - old[1])
            given = self.suffix, self.suffix_scales, n_rows
            self.suffix, self.suffix_scales = moved(*given, kept, columns, self.n_following)
            self.starts = old[0], in_suffix
        # behind what may not find memory: beside a suffix it only shrinks
        if is_identity or self.buffers.prefix_columns > self._most or not n_seen:
            columns = _columns(n_seen + n_new, most) if is_identity else (rounded(n_seen), rounded(n_seen))
            kept = slice(in_prefix - old[0], self.prefix_len - old[0])
            given = self.prefix, self.prefix_scales, n_rows if is_identity else 0
            self.prefix, self.prefix_scales = moved(*given, kept, columns, self.n_following)
            self.starts = in_prefix, self.starts[1]

    def cropped_length(self, tokens_to_remove: int) -> int:
        """See `IndirectLayer.cropped_length`. Raises RuntimeError, as transformers does, if what is left would see tokens
        that are not held any more.
        """
        kept = super().cropped_length(tokens_to_remove)
        if kept > 0 and self.first_seen(kept) < sum(self.starts):
            raise RuntimeError(
                f"{self.cumulative_length - kept} tokens cannot be removed: those before them see tokens that have left the "
                f"window of {self.sliding_window}"
            )
        return kept

    def shorten(self, tokens_to_remove: int) -> None:
        super().shorten(tokens_to_remove)
        self._n_settled = self.prefix_len + self.suffix_len
        if not self._n_settled and self.starts != (0, 0):
            self.starts = 0, 0
            self._view()


def _columns(needed: int, most: int) -> tuple[int, int]:
    """How many columns a segment gets, at least and if there is memory."""
    least = rounded(needed)
    return least, max(least, min(rounded(needed * 3 // 2), most))
