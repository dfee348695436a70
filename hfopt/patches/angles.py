"""Angles of rotary embeddings: as a call hands them down, and as tables by position for a program."""

import functools
import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.host import rotary as host_rotary
from hfopt.patches.rotation import Rotation, are_taken_as_they_are, as_taken

Rotary = tuple[torch.Tensor | None, torch.Tensor | None]
# (cache, number of tokens in it, dtype) -> cos and sin of the new tokens
Angles = Callable[[IndirectCache, int, torch.dtype], Rotary]

_CHUNK = 1024  # positions whose angles are computed at once


@dataclass(frozen=True)
class AngleTables:
    """cos and sin by position, float32 [n, angles] each.

    key: equal for attentions that share them. build(n): both with at least n rows, or as many as there are. limit: rows that
    there are at most. breaks: lengths of a text beyond which a model takes other angles for all that it reads from there on;
    last: one beyond which it takes others for each length. build(n) gives those of a text of n tokens.
    """

    key: Hashable
    build: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    limit: int | None = None
    breaks: tuple[int, ...] = ()
    last: int | None = None


def remembered(
    cache: IndirectCache,
    tag: str,
    tensor: torch.Tensor,
    moment: tuple[int | None, ...],
    build: Callable[[], Any],
) -> Any:
    """`build()`, shared by the layers of one step.

    The cache remembers by identity alone; `moment` tells steps apart that write into one tensor.
    """
    moment = (*moment, -1 if tensor.is_inference() else tensor._version)
    entry: list[Any] = cache.memo(tag, tensor, lambda: [moment, build()])
    if entry[0] != moment:
        entry[:] = [moment, build()]
    return entry[1]


def moment_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when somebody writes into a tensor, or gives it other memory."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def is_pair(position_embeddings: Any) -> bool:
    """Whether these are two tensors, as models hand angles down."""
    return (
        type(position_embeddings) is tuple
        and len(position_embeddings) == 2
        and all(type(each) is torch.Tensor for each in position_embeddings)
    )


def handed_down(cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation) -> Angles:
    """Angles that the model has computed for all layers."""

    def rotary(cache: IndirectCache, n_past: int, dtype: torch.dtype) -> Rotary:
        if rotation == "none":
            return None, None
        is_plain = cos.dtype is torch.float32 and cos.is_contiguous() and sin.is_contiguous()
        if is_plain and are_taken_as_they_are(rotation):
            return cos, sin

        def build() -> Rotary:
            return as_taken(rotation, cos, sin)

        found: Rotary = remembered(cache, f"rotary {rotation}", cos, (n_past,), build)
        return found

    return rotary


def are_angles(cos: torch.Tensor, n_rows: int, n_new: int) -> bool:
    """Whether there is a vector of angles for each new token: what transformers broadcasts may have one for all."""
    shape = cos.shape
    return cos.is_floating_point() and len(shape) == 3 and shape[0] in (1, n_rows) and shape[1] == n_new


def computed_tables(
    rotary: Any, dtype: torch.dtype, rotation: Rotation, layer_type: str | None
) -> AngleTables | None:
    """What a rotary module of transformers computes for each position, for layers of a type where it has several; None if
    they are not for this rotation. Raises UnsupportedModel if that depends on more.
    """
    if rotation == "none":
        return None
    kind = host_rotary.kind_of(rotary, layer_type)
    if kind is None:
        name = getattr(rotary, "rope_type", type(rotary).__name__)
        raise UnsupportedModel(f"rotary embedding {name!r} depends on more than a token's position")

    def build(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        n_positions = _CHUNK * -(-n // _CHUNK)
        ends = kind.breaks if kind.last is None else (*kind.breaks, kind.last)
        n_positions = min([n_positions, *(each for each in ends if n <= each)])
        if kind.last is not None and n > kind.last:
            n_positions = n
        twin = host_rotary.twin(rotary)  # some write into their buffers
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = host_rotary.angles(
                twin,
                torch.empty(0, dtype=dtype, device="cpu"),
                torch.arange(n_positions, device="cpu")[None],
                layer_type,
            )
        return as_taken(rotation, cos[0], sin[0])

    key = rotation, layer_type if host_rotary.takes_types(rotary) else None
    return AngleTables(key, build, breaks=kind.breaks, last=kind.last)


def stored_tables(table: torch.Tensor, key: Hashable, dtype: torch.dtype) -> AngleTables:
    """What a table [positions, 2 angles] holds, sin beside cos."""
    return AngleTables(
        key, lambda n: look_up(table, torch.arange(len(table), device="cpu"), dtype), limit=len(table)
    )


def look_up(table: Any, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of these positions; raises InvalidInput for one that the table has not."""
    lowest, highest = position_ids.aminmax()
    if lowest < 0 or highest >= table.shape[0]:
        raise InvalidInput(
            f"position_ids: {int(lowest if lowest < 0 else highest)} is outside the model's positions,"
            f" 0 to {table.shape[0] - 1}"
        )
    # the module rounds to its own dtype first
    sin, cos = table[position_ids].to(dtype).float().chunk(2, dim=-1)
    return cos.contiguous(), sin.contiguous()


def looked_up(table: torch.Tensor, positions: torch.Tensor, key: int | None) -> Angles:
    """Angles out of the layer's own table; key: tells different tables apart, where layers have their own."""

    def rotary(cache: IndirectCache, n_past: int, dtype: torch.dtype) -> Rotary:
        build = functools.partial(look_up, table, positions, dtype)
        found: Rotary = remembered(cache, "rotary", positions, (n_past, key), build)
        return found

    return rotary


def digest_of(table: torch.Tensor) -> int:
    """A number that differs for tables of other contents."""
    digest = hashlib.blake2b(repr((table.dtype, table.shape)).encode(), digest_size=16)
    contents: Any = table.detach().contiguous().view(torch.uint8).numpy()
    digest.update(contents)
    return int.from_bytes(digest.digest(), "little")
