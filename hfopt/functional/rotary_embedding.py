"""Rotary position embedding of queries and keys by tables of cosines and sines."""

from typing import NamedTuple

import torch
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import address_of, check_floats, plain_address
from .gradients import without_gradients
from .rotary import ROTATIONS, Angles, turn
from .scalars import flag, integer
from .strided import Output


@without_gradients
def rotary_embedding(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn the first rotary_dim channels of each head by the angles of its token, in place (https://arxiv.org/abs/2104.09864).

    `(a, b) -> (a cos - b sin, b cos + a sin)` for channels i and i + rotary_dim / 2 (rotary_half: Llama, GPT-NeoX) or
    2i and 2i + 1 (GPT-J). In float32, rounded once. It carries no gradient.

    Args:
        query: [tokens, heads, head_dim] or [batch, tokens, heads, head_dim], float32, bfloat16 or float16, of any strides
            (parts of a fused projection are turned where they are); it is written to.
        key: the same with heads of its own number.
        sin: floats of the angles [..., rotary_dim / 2], or [..., rotary_dim] with each of them twice: the second half of
            channels like the first if rotary_half, else channel 2i + 1 like 2i. `...` is [tokens], or [batch or 1, tokens]
            for four dimensions, perhaps with a 1 for the heads; or, with position_ids, [positions].
        cos: the same.
        rotary_dim: channels that turn, an even number.
        rotary_half: which channels turn together.
        position_ids: integers, which rows of sin and cos to take: [tokens], or [batch or 1, tokens] for four dimensions.

    Returns:
        query and key.

    Raises:
        InvalidInput: for any other dtype, shape or device, for positions that sin and cos do not hold, and for queries and
            keys that are expanded.

    >>> import torch
    >>> from hfopt.functional import rotary_embedding
    >>> query, key = torch.ones(1, 3, 4, 16), torch.ones(1, 3, 2, 16)
    >>> angles = torch.outer(torch.arange(3.0), 10000 ** (-torch.arange(8) / 8))
    >>> query, key = rotary_embedding(query, key, angles.sin(), angles.cos(), 16, True)
    >>> query.shape
    torch.Size([1, 3, 4, 16])
    """
    rotary_dim, rotary_half = integer("rotary_dim", rotary_dim), flag("rotary_half", rotary_half)
    shapes = _shape_of("query", query, query, rotary_dim), _shape_of("key", key, query, rotary_dim)
    n_rows, n_tokens = (1, *shapes[0][:-2])[-2:]
    rows = None if position_ids is None else _Rows.of(position_ids, n_rows, n_tokens)
    sizes = n_rows, n_tokens, len(shapes[0]), rows, rotary_dim, rotary_half
    sines, sin_at, n_sin_rows = _angles("sin", sin, *sizes)
    cosines, cos_at, n_cos_rows = _angles("cos", cos, *sizes)
    if n_sin_rows != n_cos_rows:
        raise InvalidInput(f"sin has angles of {n_sin_rows} rows: those of cos, {n_cos_rows}, are needed")
    kind = ROTATIONS["half" if rotary_half else "interleaved"]
    angles = Angles((sines, cosines), cos_at, sin_at, n_cos_rows, rotary_dim, kind)
    # both before either is written
    of_query = Output("query", query, shapes[0], None, sines, cosines, trailing=2)
    of_key = Output("key", key, shapes[1], None, sines, cosines, trailing=2)
    for each, output, (*_, n_heads, head_dim) in zip((query, key), (of_query, of_key), shapes, strict=True):
        if each.numel():
            at = output.address, n_rows, n_tokens, output.step
            turn(each.dtype, *at, n_heads, head_dim, angles)
        output.finish()
    return query, key


def _shape_of(name: str, tensor: Tensor, query: Tensor, rotary_dim: int) -> torch.Size:
    if not isinstance(tensor, Tensor):
        check_floats(name, tensor)
    shape = tensor.shape
    if len(shape) not in (3, 4) or shape[:-2] != query.shape[:-2]:
        allowed = "[tokens, heads, head_dim] or [batch, tokens, heads, head_dim], as of query,"
        raise InvalidInput(f"{name} has shape {tuple(shape)}: {allowed} is needed")
    if rotary_dim % 2 or not 0 < rotary_dim <= shape[-1]:
        raise InvalidInput(
            f"rotary_dim is {rotary_dim}: an even number up to head_dim, {shape[-1]}, is needed"
        )
    return shape


class _Rows(NamedTuple):
    """Positions of tokens, and the least and the largest of them."""

    positions: Tensor  # int64 [tokens], [1, tokens] or [rows, tokens]
    least: int = 0
    most: int = -1

    @classmethod
    def of(cls, position_ids: Tensor, n_rows: int, n_tokens: int) -> "_Rows":
        positions = check_positions("position_ids", position_ids)
        if tuple(positions.shape) not in ((n_tokens,), (1, n_tokens), (n_rows, n_tokens)):
            raise InvalidInput(
                f"position_ids has shape {tuple(positions.shape)}: [1 or {n_rows}, {n_tokens}] is needed"
            )
        return cls(positions, *extremes(positions)) if positions.numel() else cls(positions)

    def read(self, name: str, table: Tensor) -> Tensor:
        """Those of a table, [positions, angles]."""
        size = table.shape[-1]
        n_positions = max(table.shape[:-1])
        if table.numel() != n_positions * size:
            raise InvalidInput(
                f"{name} has shape {tuple(table.shape)}: [positions, angles] is needed with position_ids"
            )
        if self.least < 0 or self.most >= n_positions:
            raise InvalidInput(
                f"position_ids holds {self.least if self.least < 0 else self.most}: "
                f"0 to {n_positions - 1} are allowed by {name}"
            )
        if table.ndim > 2:
            table = table.reshape(n_positions, size)
        if self.positions.numel() == 1:
            return table.narrow(0, self.least, 1)
        return table.index_select(0, self.positions.flatten())


def extremes(positions: Tensor) -> tuple[int, int]:
    """The least and the largest of them; one at least."""
    if positions.numel() == 1:
        return (int(positions),) * 2
    least, most = positions.aminmax()
    return int(least), int(most)


def _angles(
    name: str,
    table: Tensor,
    n_rows: int,
    n_tokens: int,
    ndim: int,
    rows: _Rows | None,
    rotary_dim: int,
    rotary_half: bool,
) -> tuple[Tensor, int, int]:
    """(float32 [1 or batch, tokens, angles], its address, how many rows) as `Angles` has them; ndim: that of query."""
    address = plain_address(table, torch.float32)
    if not address:
        check_floats(name, table)
        address_of(name, table)
    shape = table.shape
    size = shape[-1] if shape else 0
    if len(shape) < 2 or size not in (rotary_dim, rotary_dim // 2):
        raise InvalidInput(
            f"{name} has shape {tuple(shape)}: [..., {rotary_dim}] or [..., {rotary_dim // 2}] is needed"
        )
    if rows is None:
        found, n_found = table, _rows_of(name, shape, n_rows, n_tokens, ndim)
    else:
        found = rows.read(name, table)
        n_found = len(rows.positions) if rows.positions.ndim == 2 else 1
    if rotary_half:
        if size != rotary_dim:
            found = torch.cat((found, found), -1)
    elif size == rotary_dim:
        if not torch.equal(found[..., ::2], found[..., 1::2]):
            raise InvalidInput(
                f"{name} has other angles for channels 2i and 2i + 1: rotary_half=False needs each of them twice in turn"
            )
        found = found[..., ::2]
    if found is not table or not address:
        found = found.to(torch.float32).contiguous()
        address = found.data_ptr()
    return found, address, n_found


def _rows_of(name: str, shape: torch.Size, n_rows: int, n_tokens: int, ndim: int) -> int:
    """Number of rows of a table of this shape, 1 or n_rows."""
    of_tokens = (
        shape[:-2] if len(shape) == ndim and shape[-2] == 1 else shape[:-1]
    )  # without that of the heads
    n_found = 1 if len(of_tokens) == 1 else of_tokens[0]
    if len(of_tokens) not in (1, 2) or of_tokens[-1] != n_tokens or n_found not in (1, n_rows):
        raise InvalidInput(
            f"{name} has shape {tuple(shape)}: angles of {n_tokens} tokens in 1 or {n_rows} rows are needed"
        )
    return n_found


def check_positions(name: str, positions: Tensor) -> Tensor:
    """The positions as int64; raises `InvalidInput` unless they are integers on the CPU."""
    if not isinstance(positions, Tensor):
        raise InvalidInput(f"{name} is a {type(positions).__name__}: a torch.Tensor is needed")
    is_integer = not (positions.is_floating_point() or positions.is_complex())
    if positions.layout is not torch.strided:
        raise InvalidInput(f"{name} has layout {positions.layout}: torch.strided is needed")
    if not positions.is_cpu or not is_integer or positions.dtype is torch.bool:
        raise InvalidInput(
            f"{name} is {positions.dtype} on {positions.device}: integers in CPU memory are needed"
        )
    address_of(name, positions)
    return positions.long()
