"""Beginnings of prompts that are not read again: those that are known, and those that rows of a request have in common.

Keys and values of a token follow from it and those before it. So the columns of a new cache that hold known ones are filled,
and the model is called for the rest: for what several rows have in common once, in a cache of one row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from hfopt import host
from hfopt.cache import IndirectCache, Layout
from hfopt.cache.prefix import Key, PrefixCache
from hfopt.cache.prefix_rows import blank, buffers_of, held, layouts_of, put
from hfopt.cache.prefix_state import obstacle
from hfopt.cache.prefix_tree import Found, Parts, PrefixTree, n_tokens

from ._types import Model, Outputs
from .conditions import LOOKS_INSIDE, has_flags, has_hooks
from .prefix_plan import LEAST_SHARED, best_column, common_to_all, shared
from .prompt import one_row_per_prompt
from .state import installed

_LEAST_KNOWN = 16  # tokens; fewer are read as quickly as they are looked up
_READ = ("input_ids", "position_ids", "attention_mask")
_GIVEN = {*_READ, "use_cache", "return_dict", "logits_to_keep"}

Read = Callable[[dict[str, Any]], Outputs]  # calls the model


class Request(NamedTuple):
    """The request that runs in this thread. has_own_cache: nobody but its loop sees its cache."""

    prefix_cache: PrefixCache | None = None
    has_own_cache: bool = False


_NO_REQUEST = Request()
_request: ContextVar[Request] = ContextVar("hfopt_prefixes", default=_NO_REQUEST)


@contextmanager
def request(prefix_cache: PrefixCache | None, *, has_own_cache: bool) -> Iterator[None]:
    """In the block, prompts of this thread begin as these say."""
    token = _request.set(Request(prefix_cache, has_own_cache))
    try:
        yield
    finally:
        _request.reset(token)


def is_private() -> bool:
    """Whether the request of this thread takes no beginnings from anywhere, over a cache that nobody else sees."""
    return _request.get() == Request(has_own_cache=True)


class Prompts:
    """The prompts of a request whose cache is empty: rows of tokens, each behind its padding.

    tokens: int64 [n] of each prompt; pads: columns of padding before it. inputs: of a call of the model that would read them
    all, `one_row` of them for each prompt. moves: whether columns may be in another order than the caller's.
    """

    def __init__(
        self,
        model: Model,
        inputs: dict[str, Any],
        one_row: dict[str, Any],
        tokens: list[np.ndarray],
        moves: bool,
    ) -> None:
        given: Any = host.cache_given(inputs)
        self._cache_name, self._cache = given
        self._model, self._inputs, self._one_row, self._tokens = model, inputs, one_row, tokens
        self._length = int(inputs["input_ids"].shape[1])
        self._pads = [self._length - len(each) for each in tokens]
        # more than one, where one new token would be taken for a step of each copy
        self._ends = [len(each) - (2 if self._cache.copies > 1 else 1) for each in tokens]
        self._moves, self._dtype = moves, model.dtype
        self._prefix_cache = _request.get().prefix_cache
        self._key: Key | None = None
        self._tree = PrefixTree()  # of this request: what is known, and what is read alone
        self._trunk = self._column = self._n_known = self._n_read = 0
        self.mask: Tensor | None = None

    @classmethod
    def of(cls, model: Model, inputs: dict[str, Any], *, moves: bool) -> "Prompts | None":
        """The prompts in the arguments of a call; None where there is nothing to gain, or more to know than tokens."""
        ids, given, asked = inputs.get("input_ids"), host.cache_given(inputs), _request.get()
        if given is None or not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.is_cpu:
            return None
        if asked.prefix_cache is None and (len(ids) == 1 or ids.shape[1] <= LEAST_SHARED):
            return None
        cache = given[1]
        if not isinstance(cache, IndirectCache) or not cache.is_new or not _is_plain(model, inputs, given[0]):
            return None
        one_row = inputs if cache.copies == 1 else one_row_per_prompt(inputs, cache.copies)
        if one_row is None:
            return None
        tokens = _without_padding(model, one_row)
        return None if tokens is None else cls(model, inputs, one_row, tokens, moves and asked.has_own_cache)

    def begin(self, read: Read) -> dict[str, Any]:
        """Fill the first columns of the cache; the arguments of a call for all others.

        mask: over all columns as they are now, None if that is the caller's still.
        """
        known = self._find_known()
        for text in shared(self._tokens, self._ends):
            if len(text) - self._tree.find(None, text).length >= LEAST_SHARED:
                self._read_alone(text, read)
        found = self._found()
        if not any(each.length for each in found):
            self._count(known)
            return self._inputs
        column = best_column(self._pads, [each.length for each in found], self._length)
        for text, pad, each in zip(self._tokens, self._pads, found, strict=True):
            if pad + each.length < column:
                self._read_alone(text[: column - pad], read)
        found = self._found()
        self._column = column
        self._trunk = self._trunk_of(found)
        self._fill(self._cache, found, self._pads, self._trunk, column, self._length)
        self._count(known)
        return self._rest(column)

    def keep(self) -> None:
        """Hold the prompts for later requests, when they have been read."""
        cache, prefix_cache, model = self._cache, self._prefix_cache, self._model
        if prefix_cache is None or prefix_cache.key(cache.kv_cache) != self._key:
            return  # nobody knows with which weights they were read
        if cache.n_rows != len(self._tokens) or not cache.is_even(cache.n_rows):
            return
        if cache.get_seq_length() != self._length or any(
            layer.dtype is not model.dtype for layer in cache.layers
        ):
            return
        for row, (tokens, pad) in enumerate(zip(self._tokens, self._pads, strict=True)):
            if len(tokens) >= _LEAST_KNOWN:
                prefix_cache.keep(self._key, tokens, self._reader(row, tokens, pad))

    def _reader(self, row: int, tokens: np.ndarray, pad: int) -> Callable[[int, int], list[Parts]]:
        n_filled = max(self._column - pad, self._trunk, 0)
        found = self._tree.find(None, tokens[:n_filled])

        def read(first: int, end: int) -> list[Parts]:
            pieces = [parts for _, parts in found.parts(first, min(end, n_filled))]
            begin = max(first, n_filled)
            if begin < end:
                pieces.append(held(self._cache, row, pad + begin, pad + end))
            return pieces

        return read

    def _find_known(self) -> list[int]:
        """Take over what earlier requests have left; how many tokens of each prompt that are."""
        if self._prefix_cache is None:
            return [0] * len(self._tokens)
        key = self._key = self._prefix_cache.key(self._cache.kv_cache)
        known = []
        for tokens, end in zip(self._tokens, self._ends, strict=True):
            found = self._prefix_cache.find(key, tokens[:end])
            fits = found.length >= _LEAST_KNOWN and len(found.blocks[0]) == len(self._cache.layers)
            known.append(found.length if fits else 0)
            if fits:
                self._tree.add(None, tokens[: found.length], _reader_of(found))
        return known

    def _found(self) -> list[Found]:
        each = zip(self._tokens, self._ends, strict=True)
        return [self._tree.find(None, tokens[:end]) for tokens, end in each]

    def _read_alone(self, text: np.ndarray, read: Read) -> None:
        """Read a beginning of some prompts, as far as it is not known, in a cache of one row."""
        found = self._tree.find(None, text)
        cache = self._cache.emptied(self._model.config.get_text_config(decoder=True))
        cache.copies = 1
        self._fill(cache, [found], [0], 0, found.length, len(text))
        inputs = {**self._one_row, "input_ids": torch.from_numpy(text[found.length :].copy())[None]}
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = torch.arange(
                found.length, len(text), dtype=inputs["position_ids"].dtype
            )[None]
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = inputs["attention_mask"].new_ones(1, len(text))
        read({**inputs, self._cache_name: cache})
        self._n_read += len(text) - found.length
        if not cache.is_even(1) or cache.get_seq_length() != len(text):
            return  # it is not stored in a form that can be taken over
        self._dtype = cache.layers[0].dtype
        self._tree.add(None, text, lambda first, end: [held(cache, 0, first, end)])

    def _trunk_of(self, found: list[Found]) -> int:
        """Tokens that all rows read in one place of the cache, before their padding; 0 if each row has its own.

        Of one row, those that lie in one place already.
        """
        if len(self._tokens) > 1:
            trunk = min(common_to_all(self._tokens), *(each.length for each in found))
            is_shared = not any(self._pads) or self._may_have_gaps()
        else:
            trunk = n_tokens(found[0].blocks[0])
            is_shared = self._may_have_gaps() and buffers_of(found[0].blocks[0]) is not None
        return trunk if trunk >= LEAST_SHARED and is_shared else 0

    def _may_have_gaps(self) -> bool:
        """Whether it makes no difference in which columns keys are, and kernels read them anywhere."""
        model, cache = self._model, self._cache
        if not self._moves or not cache.sees_all:
            return False
        programs = installed(model).programs
        program = None if programs is None else programs.at_all(model, cache.kv_cache)
        return program is not None and program.ignores_columns

    def _fill(
        self, cache: IndirectCache, found: list[Found], pads: list[int], trunk: int, column: int, length: int
    ) -> None:
        """Write what is known into the columns before `column`, with zeros as padding: first the trunk, in one row.

        length: columns that there will be in the end.
        """
        if not column:
            return
        block = next(each.blocks[0] for each in found if each.length)
        layouts = layouts_of(block, self._dtype)
        if trunk:
            self._begin_with(cache, list(found[0].parts(0, trunk)), trunk, layouts)
            cache.share(len(found))
        if column > trunk:
            # with room for what is read next, or the buffers would have to grow at once
            cache.append_everywhere(len(found), length - trunk, layouts)
            cache.crop(column - length)
            for row, (each, pad) in enumerate(zip(found, pads, strict=True)):
                if pad:
                    blank(cache, row, trunk, min(trunk + pad, column))
                for place, parts in each.parts(trunk, column - pad):
                    put(cache, row, pad + place, parts)

    def _begin_with(
        self, cache: IndirectCache, pieces: list[tuple[int, Parts]], trunk: int, layouts: list[Layout]
    ) -> None:
        """Let the cache begin with one row of these tokens: where they are, if that is one place, and nobody can write there
        by way of the cache."""
        buffers = buffers_of(pieces[0][1]) if len(pieces) == 1 and self._moves else None
        if buffers is not None and all(
            elements.dtype is (torch.int8 if scales is not None else layout[2])
            for (elements, scales), layout in zip(buffers, layouts, strict=True)
        ):
            cache.adopt(buffers, trunk, layouts)
            return
        cache.append_everywhere(1, trunk, layouts)
        for place, parts in pieces:
            put(cache, 0, place, parts)

    def _rest(self, column: int) -> dict[str, Any]:
        """The arguments of a call for the columns from this one on."""
        rest = dict(self._inputs)
        rest["input_ids"] = rest["input_ids"][:, column:].contiguous()
        if rest.get("position_ids") is not None:
            rest["position_ids"] = rest["position_ids"][:, column:].contiguous()
        if self._trunk and any(self._pads):
            mask = self._inputs["attention_mask"]
            trunk = mask.new_ones(len(mask), self._trunk)
            hidden = torch.tensor(self._pads).repeat_interleave(len(mask) // len(self._pads))[:, None]
            behind = torch.arange(self._length - self._trunk) >= hidden
            self.mask = rest["attention_mask"] = torch.cat([trunk, behind.to(mask.dtype)], 1)
        return rest

    def _count(self, known: list[int]) -> None:
        if self._prefix_cache is None:
            return
        lengths = [len(tokens) for tokens in self._tokens]
        filled = [max(self._column - pad, self._trunk, 0) for pad in self._pads]
        n_known = sum(map(min, known, filled))
        left = sum(length - n for length, n in zip(lengths, filled, strict=True))
        self._prefix_cache.count(len(lengths), n_known, self._n_read + left)


def _reader_of(found: Found) -> Callable[[int, int], list[Parts]]:
    return lambda first, end: [parts for _, parts in found.parts(first, end)]


def _is_plain(model: Model, inputs: dict[str, Any], cache_name: str) -> bool:
    """Whether a call asks for no more than to read a text, and keys and values follow from its tokens."""
    others = inputs.keys() - _GIVEN - {cache_name}
    if not all(inputs[name] is None or (name in LOOKS_INSIDE and not inputs[name]) for name in others):
        return False
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or any(getattr(model.config, name, False) for name in LOOKS_INSIDE):
        return False
    if _global_forward_hooks or _global_forward_pre_hooks or has_hooks(model):
        return False  # they may change what is read, or count calls
    modules = iter(model.modules())
    next(modules)
    return (
        not any(each._forward_hooks or each._forward_pre_hooks for each in modules)
        and obstacle(model) is None
    )


def _without_padding(model: Model, inputs: dict[str, Any]) -> list[np.ndarray] | None:
    """The tokens of each row; None unless padding is on the left alone, and positions count tokens from 0."""
    ids, positions, mask = (inputs.get(name) for name in _READ)
    assert isinstance(ids, Tensor)
    n_rows, length = ids.shape
    pads = torch.zeros(n_rows, dtype=torch.long)
    if mask is not None:
        if type(mask) is not Tensor or mask.shape != ids.shape or not has_flags(mask):
            return None
        seen = mask != 0
        if not bool(seen[:, -1].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
            return None
        pads = length - seen.sum(1)
    counted = torch.arange(length) - pads[:, None]
    if positions is None or not host.takes_positions(type(model).forward):
        if bool(pads.any()):
            return None  # how they are counted is the model's affair
    elif positions.shape not in ((1, length), (n_rows, length)) or bool(
        ((positions != counted) & (counted >= 0)).any()
    ):
        return None
    rows = ids.long().numpy()
    return [row[pad:] for row, pad in zip(rows, pads.tolist(), strict=True)]
