"""Rotary position embedding: tables of angles for all kinds of RoPE, and queries and keys turned by them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional.checks import address_of, check_floats, plain_address
from hfopt.functional.gradients import without_gradients
from hfopt.functional.rotary import Angles, turn
from hfopt.functional.rotary_embedding import check_positions, extremes
from hfopt.functional.scalars import integer
from hfopt.modules.frequencies import Frequencies

_FIRST_ROWS = 512  # of a table


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (https://arxiv.org/abs/2104.09864): pairs of channels turn by `position * frequency`.

    Frequencies are those of transformers: `base^(-2i / pos_embd_dim)`, scaled by kind. Tables of cosines and sines are made
    once in float32 and grow geometrically.

    Args:
        max_position_embeddings: positions that the model knows. With a `factor` in extra_rope_config (but for "llama3"
            and "longrope", whose models count it in) that many times as many are allowed.
        pos_embd_dim: channels of a head that turn.
        base: of the frequencies.
        backbone: taken for compatibility; nothing depends on it.
        extra_rope_config: the kind by its `rope_type` (or `type`) with what that needs: "default"; "linear" and "dynamic"
            with factor; "llama3" with factor, low_freq_factor, high_freq_factor and original_max_position_embeddings;
            "yarn" with factor or original_max_position_embeddings, and attention_factor, beta_fast, beta_slow, mscale,
            mscale_all_dim and truncate if they are not the usual ones; "longrope" with short_factor, long_factor and
            original_max_position_embeddings, and factor or attention_factor.

    "dynamic" has other frequencies for each length of a text beyond max_position_embeddings, "longrope" for texts beyond
    original_max_position_embeddings: they follow from this call alone, its largest position or seq_len, and keys that were
    turned earlier stay.

    Raises `InvalidInput` (a `ValueError`) for other numbers and names.

    >>> import torch
    >>> from hfopt.modules import RotaryEmbedding
    >>> rope = RotaryEmbedding(2048, 64, extra_rope_config={"rope_type": "linear", "factor": 4.0})
    >>> query = torch.randn(1, 7, 8, 64)
    >>> rope(query, torch.arange(7)[None], 8, 64, 32, 64).shape
    torch.Size([1, 7, 8, 64])
    >>> query, key, value = rope(torch.randn(1, 7, 16 * 64), torch.arange(7)[None], 8, 64, 32, 64, None, 3)
    >>> key.shape
    torch.Size([1, 7, 4, 64])
    """

    def __init__(
        self,
        max_position_embeddings: int,
        pos_embd_dim: int,
        base: float = 10000,
        backbone: str | None = None,
        extra_rope_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.frequencies = Frequencies.of(
            max_position_embeddings, pos_embd_dim, base, dict(extra_rope_config or {})
        )
        # attributes, not buffers: a conversion of the model to bfloat16 leaves them float32
        self._tables: dict[tuple[int | None, str], tuple[Tensor, Tensor]] = {}

    @without_gradients
    def forward(
        self,
        x: Tensor,
        position_ids: Tensor | int,
        num_head: int,
        head_dim: int,
        offset: int,
        rotary_ndims: int,
        seq_len: int | None = None,
        num_concats: int | None = None,
    ) -> Any:
        """Turn heads by the angles of their positions; x stays as it is.

        Args:
            x: [batch, tokens, num_head, head_dim] or [batch, tokens, num_head * head_dim]; with num_concats
                [batch, tokens, (num_head + 2 * kv_heads) * head_dim], the heads of queries, keys and values.
            position_ids: integers [batch or 1, tokens], [tokens], or one, that of the first token.
            num_head: heads of x, or of the queries in it.
            head_dim: channels of a head.
            offset: 1 turns channels 2i and 2i + 1 together (GPT-J), rotary_ndims // 2 channels i and i + rotary_ndims / 2
                (Llama).
            rotary_ndims: channels that turn: pos_embd_dim. The others are copied.
            seq_len: length of the text, if it is more than the largest position and 1.
            num_concats: 3, where x is a fused projection; else None.

        Returns:
            [batch, tokens, num_head, head_dim]; with num_concats (query, key, value), parts of one tensor.
        """
        num_head, head_dim = integer("num_head", num_head), integer("head_dim", head_dim)
        offset, rotary_ndims = integer("offset", offset), integer("rotary_ndims", rotary_ndims)
        seq_len = None if seq_len is None else integer("seq_len", seq_len)
        n_kv_heads = _check_x(x, num_head, head_dim, num_concats)
        n_rows, n_tokens = x.shape[:2]
        size = self.frequencies.size
        if rotary_ndims != size or size > head_dim:
            raise InvalidInput(
                f"rotary_ndims is {rotary_ndims}: pos_embd_dim, {size}, is needed, and a head_dim of as many"
            )
        if offset not in (1, size // 2):
            raise InvalidInput(f"offset is {offset!r}: 1 or rotary_ndims // 2, {size // 2}, is allowed")
        rotation = "interleaved" if offset == 1 else "half"
        cos, sin = self._angles(position_ids, n_rows, n_tokens, seq_len, rotation)
        angles = Angles.of(cos, sin, n_rows, n_tokens, head_dim, rotation)
        out = x.clone(memory_format=torch.contiguous_format)
        n_heads = num_head + 2 * n_kv_heads
        if out.numel():
            at = out.data_ptr(), n_rows, n_tokens, n_heads * head_dim
            turn(out.dtype, *at, num_head + n_kv_heads, head_dim, angles)
        heads = out if out.ndim == 4 else out.view(n_rows, n_tokens, n_heads, head_dim)
        return heads if num_concats is None else heads.split((num_head, n_kv_heads, n_kv_heads), dim=2)

    @classmethod
    def apply_function(
        cls,
        query: Tensor,
        key: Tensor,
        sin: Tensor,
        cos: Tensor,
        rotary_dim: int,
        rotary_half: bool,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn query and key in place by tables of one's own; see `functional.rotary_embedding`."""
        return functional.rotary_embedding(query, key, sin, cos, rotary_dim, rotary_half, position_ids)

    def _angles(
        self, position_ids: Tensor | int, n_rows: int, n_tokens: int, seq_len: int | None, rotation: str
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or n_rows, n_tokens, angles] as `functional.rotate` takes them."""
        first, positions = _read_positions(position_ids, n_rows, n_tokens)
        if not n_tokens or not n_rows:
            empty = torch.empty(
                1, n_tokens, self.frequencies.size // (1 if rotation == "half" else 2), device="cpu"
            )
            return empty, empty
        if positions is None:
            least, most = first, first + n_tokens - 1
        else:
            least, most = extremes(positions)
        length = self.frequencies.check_length(least, most, seq_len)
        variant = self.frequencies.variant(length)
        if self.frequencies.is_for_one_length(variant):
            where = torch.arange(first, most + 1, device="cpu")[None] if positions is None else positions
            return self._made(variant, where, rotation)
        cos, sin = self._table(variant, most + 1, rotation)
        if positions is None:
            return cos.narrow(1, first, n_tokens), sin.narrow(1, first, n_tokens)
        rows, shape = positions.flatten(), (*positions.shape, cos.shape[2])
        return cos.index_select(1, rows).view(shape), sin.index_select(1, rows).view(shape)

    def _table(self, variant: int | None, n_positions: int, rotation: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, positions, angles] of that many positions or more."""
        known = self._tables.get((variant, rotation))
        if known is not None and known[0].shape[1] >= n_positions:
            return known
        wanted = max(n_positions, _FIRST_ROWS, 2 * known[0].shape[1] if known is not None else 0)
        cos, sin = self._made(
            variant, torch.arange(min(wanted, self.frequencies.limit), device="cpu"), rotation
        )
        self._tables[variant, rotation] = made = cos[None], sin[None]
        return made

    def _made(self, variant: int | None, positions: Tensor, rotation: str) -> tuple[Tensor, Tensor]:
        with torch.device("cpu"):  # where transformers makes them by the default of the moment
            cos, sin = self.frequencies.angles(variant, positions)
        return (
            (cos, sin)
            if rotation == "interleaved"
            else (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
        )

    def extra_repr(self) -> str:
        return str(self.frequencies)


def _check_x(x: Tensor, num_head: int, head_dim: int, num_concats: int | None) -> int:
    """Number of heads of keys in x; raises `InvalidInput` for a shape that does not fit."""
    if not plain_address(x, None):
        check_floats("x", x)
        address_of("x", x)
    if num_concats is not None and integer("num_concats", num_concats) != 3:
        raise InvalidInput(f"num_concats is {num_concats}: None or 3 is allowed")
    if num_head < 1 or head_dim < 1:
        raise InvalidInput(f"num_head is {num_head} and head_dim is {head_dim}: positive numbers are needed")
    shape = tuple(x.shape)
    if len(shape) == 4 and num_concats is None:
        if shape[2:] != (num_head, head_dim):
            raise InvalidInput(f"x has shape {shape}: [batch, tokens, {num_head}, {head_dim}] is needed")
        return 0
    width = shape[-1] if len(shape) == 3 else -1
    n_more, rest = divmod(width - num_head * head_dim, 2 * head_dim)
    if width < 0 or rest or (n_more < 1 if num_concats else n_more != 0):
        allowed = f"(num_head + 2 * kv_heads) * {head_dim}" if num_concats else f"{num_head} * {head_dim}"
        raise InvalidInput(f"x has shape {shape}: [batch, tokens, {allowed}] is needed, num_head {num_head}")
    if num_concats and num_head % n_more:
        raise InvalidInput(f"x has {n_more} heads of keys beside num_head {num_head}: a divisor is needed")
    return n_more


def _read_positions(position_ids: Any, n_rows: int, n_tokens: int) -> tuple[int, Tensor | None]:
    """(the first position, None) where they count up from one, or (0, positions [1 or n_rows, n_tokens])."""
    if isinstance(position_ids, int):
        return integer("position_ids", position_ids), None
    positions = check_positions("position_ids", position_ids)
    if positions.numel() == 1 and positions.ndim <= 2:
        return int(positions), None
    if positions.ndim == 1 and len(positions) == n_tokens:
        positions = positions[None]
    if positions.ndim != 2 or positions.shape[1] != n_tokens or positions.shape[0] not in (1, n_rows):
        raise InvalidInput(
            f"position_ids has shape {tuple(positions.shape)}: [1 or {n_rows}, {n_tokens}], or one position, is needed"
        )
    return 0, positions
