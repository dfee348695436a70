"""Rotary position embedding of queries and keys by tables of cosines and sines."""

import torch
from torch import Tensor

from hfopt.errors import InvalidInput

from .checks import address_of, check_floats
from .gradients import without_gradients
from .rotary import rotate
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
    for name, each in (("query", query), ("key", key)):
        check_floats(name, each)
        shape = each.shape
        if len(shape) not in (3, 4) or shape[:-2] != query.shape[:-2]:
            allowed = "[tokens, heads, head_dim] or [batch, tokens, heads, head_dim], as of query,"
            raise InvalidInput(f"{name} has shape {tuple(shape)}: {allowed} is needed")
        if rotary_dim % 2 or not 0 < rotary_dim <= shape[-1]:
            raise InvalidInput(
                f"rotary_dim is {rotary_dim}: an even number up to head_dim, {shape[-1]}, is needed"
            )
    rotation = "half" if rotary_half else "interleaved"
    sines = _angles("sin", sin, query, position_ids, rotary_dim, rotary_half)
    cosines = _angles("cos", cos, query, position_ids, rotary_dim, rotary_half)
    # both before either is written
    outputs = [
        Output(name, each, each.shape, each.dtype, sines, cosines, trailing=2)
        for name, each in (("query", query), ("key", key))
    ]
    for each, output in zip((query, key), outputs, strict=True):
        *_, n_tokens, n_heads, head_dim = each.shape
        if each.numel():
            tokens = output.rows.view(-1, n_tokens, n_heads * head_dim)
            rotate(tokens, cosines, sines, n_heads, head_dim, rotation)
        output.finish()
    return query, key


def _angles(
    name: str,
    table: Tensor,
    query: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    rotary_half: bool,
) -> Tensor:
    """[1 or batch, tokens, angles] as `rotate` takes them."""
    check_floats(name, table)
    address_of(name, table)
    size = table.shape[-1] if table.ndim else 0
    if table.ndim < 2 or size not in (rotary_dim, rotary_dim // 2):
        raise InvalidInput(
            f"{name} has shape {tuple(table.shape)}: [..., {rotary_dim}] or [..., {rotary_dim // 2}] is needed"
        )
    if position_ids is None:
        found = _of_tokens(name, table, query)
    else:
        found = _at_positions(name, table, query, position_ids)
    if rotary_half:
        return found if size == rotary_dim else torch.cat((found, found), -1)
    if size == rotary_dim // 2:
        return found
    if not torch.equal(found[..., ::2], found[..., 1::2]):
        raise InvalidInput(
            f"{name} has other angles for channels 2i and 2i + 1: rotary_half=False needs each of them twice in turn"
        )
    return found[..., ::2]


def _of_tokens(name: str, table: Tensor, query: Tensor) -> Tensor:
    n_rows, n_tokens = (1, *query.shape[:-2])[-2:]
    *shape, size = table.shape
    if table.ndim == query.ndim and shape[-1] == 1:
        shape = shape[:-1]  # without that of the heads
    if len(shape) == 1:
        shape = [1, *shape]
    if len(shape) != 2 or shape[1] != n_tokens or shape[0] not in (1, n_rows):
        raise InvalidInput(
            f"{name} has shape {tuple(table.shape)}: angles of {n_tokens} tokens in 1 or {n_rows} rows are needed"
        )
    return table.reshape(*shape, size)


def _at_positions(name: str, table: Tensor, query: Tensor, position_ids: Tensor) -> Tensor:
    n_rows, n_tokens = (1, *query.shape[:-2])[-2:]
    positions = check_positions("position_ids", position_ids)
    if tuple(positions.shape) not in {(n_tokens,), (1, n_tokens), (n_rows, n_tokens)}:
        raise InvalidInput(
            f"position_ids has shape {tuple(positions.shape)}: [1 or {n_rows}, {n_tokens}] is needed"
        )
    n_positions = max(table.shape[:-1])
    if table.numel() != n_positions * table.shape[-1]:
        raise InvalidInput(
            f"{name} has shape {tuple(table.shape)}: [positions, angles] is needed with position_ids"
        )
    if positions.numel():
        least, most = (int(each) for each in positions.aminmax())
        if least < 0 or most >= n_positions:
            raise InvalidInput(
                f"position_ids holds {least if least < 0 else most}: 0 to {n_positions - 1} are allowed by {name}"
            )
    return table.reshape(n_positions, -1)[positions.reshape(-1, n_tokens)]


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
