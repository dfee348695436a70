"""PrefixTree: keys and values of texts that begin alike, in a radix tree of blocks."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hfopt.cache.storage import empty
from hfopt.machine.memory import available_memory

# of some tokens in one layer: [2, n_kv_heads, n_tokens, head_dim], keys then values, and of codes [2, n_kv_heads, n_tokens]
Part: TypeAlias = tuple[Tensor, Tensor | None]
Parts: TypeAlias = list[Part]  # of all layers

_UNCHECKED_BYTES = 1 << 26  # that are too few to ask the system about
_TOKEN_BYTES = 8  # of its number
_SLACK = 4  # a block may hold one column for tokens that it has lost to each four that it has


class Node:
    """A block of tokens behind those of its parent. pins: requests that are reading it."""

    def __init__(self, parent: Node | None, tokens: np.ndarray, parts: Parts) -> None:
        self.parent, self.tokens, self.parts = parent, tokens, parts
        self.children: dict[int, Node] = {}
        self.pins = self.used = 0

    @property
    def n_bytes(self) -> int:
        """Memory of its keys and values, with columns that it does not need any more, and of its tokens."""
        held = (each for part in self.parts for each in part if each is not None)
        return sum(each.untyped_storage().nbytes() for each in held) + self.tokens.nbytes


class Block(NamedTuple):
    """Tokens, int64 [n], and what is held of them; parent: number of the block before it, None at the beginning."""

    parent: int | None
    tokens: np.ndarray
    parts: Parts


class Found(NamedTuple):
    """The known beginning of a text: how many tokens, and blocks of them in their order."""

    length: int
    blocks: list[Parts]

    def parts(self, first: int, end: int) -> Iterator[tuple[int, Parts]]:
        """Place of the first token, and keys and values, of pieces of the tokens [first, end)."""
        start = 0
        for block in self.blocks:
            low, high = max(first - start, 0), min(end - start, n_tokens(block))
            if low < high:
                yield start + low, cut(block, low, high)
            start += n_tokens(block)


class PrefixTree:
    """Texts under keys; what is the same at the beginning of several is there once.

    max_bytes: more is never held; the leaf that was used longest ago goes first, but none that is being read. None: no
    limit, and then parts are held as they are given, not copied. Several threads may use one.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = self.n_tokens = 0
        self.roots: dict[Any, Node] = {}
        self._time = 0
        self._lock = threading.Lock()

    def find(self, key: Any, tokens: np.ndarray) -> Found:
        """What is known of the beginning of `tokens`, int64 [n]; its tensors stay, whatever becomes of the tree."""
        with self._lock:
            path, length = self._walk(key, tokens)
            blocks, left = [], length
            for node in path:
                blocks.append(cut(node.parts, 0, left))
                left -= len(node.tokens)
            return Found(length, blocks)

    def add(self, key: Any, tokens: np.ndarray, read: Callable[[int, int], list[Parts]]) -> int:
        """Hold a text as well, from its beginning on as far as there is room; how many tokens are new.

        Of the machine's memory, no more is taken than there is. read(first, end): keys and values of these of its tokens,
        in pieces that follow each other.
        """
        with self._lock:
            path, length = self._walk(key, tokens)
            for node in path:
                node.pins += 1
        made: list[Parts] = []
        try:
            # outside of the lock, because it takes a while
            if length < len(tokens):
                pieces = read(length, len(tokens))
                made = pieces if self.max_bytes is None else self._in_one(pieces)
        finally:
            with self._lock:
                for node in path:
                    node.pins -= 1
                n_new = 0
                for parts in made:
                    n_new += self._hang(key, tokens, length, parts)
                    length += n_tokens(parts)
        return n_new

    def _in_one(self, pieces: list[Parts]) -> list[Parts]:
        """As many of the tokens as could be held, in one piece of memory of its own; none without memory."""
        assert self.max_bytes is not None
        length = sum(map(n_tokens, pieces))
        token_bytes = sum(map(bytes_of, pieces)) // length
        fitting = min(length, self.max_bytes // (token_bytes + _TOKEN_BYTES))
        n_bytes = fitting * token_bytes
        if not fitting or (n_bytes > _UNCHECKED_BYTES and n_bytes > available_memory()):
            return []
        return [copied(pieces, fitting)]

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            self.roots.clear()
            self.n_bytes = self.n_tokens = 0

    def blocks(self, key: Any) -> list[Block]:
        """All blocks under a key, parents first."""
        with self._lock:
            root = self.roots.get(key)
            waiting: list[tuple[int | None, Node]] = (
                [] if root is None else [(None, each) for each in root.children.values()]
            )
            for number, (_, node) in enumerate(waiting):
                waiting += [(number, child) for child in node.children.values()]
            return [Block(parent, node.tokens, node.parts) for parent, node in waiting]

    def _walk(self, key: Any, tokens: np.ndarray) -> tuple[list[Node], int]:
        """Blocks that a text begins with, the last of which it may leave in the middle, and how many tokens that are."""
        self._time += 1
        node, path, length = self.roots.get(key), [], 0
        while node is not None and length < len(tokens):
            child = node.children.get(int(tokens[length]))
            if child is None:
                break
            child.used = self._time
            n_same = common(child.tokens, tokens[length:])
            path.append(child)
            length += n_same
            if n_same < len(child.tokens):
                break
            node = child
        return path, length

    def _hang(self, key: Any, tokens: np.ndarray, first: int, parts: Parts) -> int:
        """Put a block behind the first tokens of a text, as far as it is not there yet and has room; how many tokens
        that are."""
        end = first + n_tokens(parts)
        path, length = self._walk(key, tokens[:end])
        if length < first or length == end:
            return 0  # the tokens before it are gone, or another thread was quicker
        inside = length - sum(len(each.tokens) for each in path[:-1])
        tail = path[-1].tokens[inside:] if path else tokens[:0]
        for node in path:
            node.pins += 1
        fitting = self._fitting(end - length, len(tail), bytes_of(parts) // (end - first) + _TOKEN_BYTES)
        for node in path:
            node.pins -= 1
        if not fitting:
            return 0
        if fitting < end - first:
            parts = cut(parts, length - first, length - first + fitting)
            parts = parts if self.max_bytes is None else copied([parts], fitting)
        new = tokens[length : length + fitting].copy()
        parent = path[-1] if path else self.roots.setdefault(key, Node(None, new[:0], []))
        if len(tail):
            parent = self._split(parent, inside)
        node = parent.children[int(new[0])] = Node(parent, new, parts)
        node.used = self._time
        self.n_bytes += node.n_bytes
        self.n_tokens += len(new)
        return len(new)

    def _fitting(self, n_new: int, n_split: int, token_bytes: int) -> int:
        """How many of so many new tokens have room beside those that a split copies, when others have gone."""
        if self.max_bytes is None:
            return n_new
        self._make_room((n_new + n_split) * token_bytes)
        return max(min(n_new, (self.max_bytes - self.n_bytes) // token_bytes - n_split), 0)

    def _split(self, node: Node, length: int) -> Node:
        """Cut a block in two, of which the first is returned; the other one stays the object that it was.

        The first stays in its place if that has not become much too large, so that a long text is not moved.
        """
        parent, n_bytes = node.parent, node.n_bytes
        assert parent is not None
        halves = [cut(node.parts, 0, length), cut(node.parts, length, len(node.tokens))]
        if self.max_bytes is not None:
            elements = node.parts[0][0]
            columns = elements.untyped_storage().nbytes() * len(node.tokens) // elements.nbytes
            if (columns - length) * _SLACK > length:
                halves[0] = copied(halves[:1], length)
            halves[1] = copied(halves[1:], len(node.tokens) - length)
        first = Node(parent, node.tokens[:length].copy(), halves[0])
        first.used = node.used
        parent.children[int(first.tokens[0])] = first
        node.parent, node.tokens, node.parts = first, node.tokens[length:].copy(), halves[1]
        first.children[int(node.tokens[0])] = node
        self.n_bytes += first.n_bytes + node.n_bytes - n_bytes
        return first

    def _make_room(self, n_bytes: int) -> None:
        """Let go of blocks until so many bytes more may be held, as far as that can be."""
        assert self.max_bytes is not None
        if self.n_bytes + n_bytes <= self.max_bytes:
            return
        leaves = [
            (node.used, id(node), key, node) for key, root in self.roots.items() for node in _leaves(root)
        ]
        heapq.heapify(leaves)
        while leaves and self.n_bytes + n_bytes > self.max_bytes:
            _, _, key, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            del parent.children[int(node.tokens[0])]
            self.n_bytes -= node.n_bytes
            self.n_tokens -= len(node.tokens)
            if parent.children or parent.pins:
                continue
            if parent.parent is None:
                del self.roots[key]
            else:
                heapq.heappush(leaves, (parent.used, id(parent), key, parent))


def _leaves(root: Node) -> Iterator[Node]:
    """Blocks that nothing hangs from and that nobody reads."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        if node.parent is not None and not node.children and not node.pins:
            yield node


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts have in common at the beginning."""
    n = min(len(one), len(other))
    differ = one[:n] != other[:n]
    return int(differ.argmax()) if differ.any() else n


def cut(parts: Parts, first: int, end: int) -> Parts:
    """Keys and values of the tokens [first, end) among these; no copy."""
    return [
        (elements[:, :, first:end], None if scales is None else scales[:, :, first:end])
        for elements, scales in parts
    ]


def copied(pieces: Sequence[Parts], length: int) -> Parts:
    """Keys and values of the first `length` of tokens that follow each other, in one piece of memory of its own."""

    def copy(layer: Sequence[Tensor]) -> Tensor:
        first, place = layer[0], 0
        made = empty((*first.shape[:2], length, *first.shape[3:]), first.dtype)
        for each in layer:
            end = min(place + each.shape[2], length)
            made[:, :, place:end] = each[:, :, : end - place]
            place = end
        return made

    def part(layer: Sequence[Part]) -> Part:
        scales = [each for _, each in layer if each is not None]
        return copy([elements for elements, _ in layer]), copy(scales) if scales else None

    with torch.inference_mode(False), torch.no_grad():
        return [part(layer) for layer in zip(*pieces, strict=True)]


def n_tokens(parts: Parts) -> int:
    """Tokens that these are keys and values of."""
    return parts[0][0].shape[2]


def bytes_of(parts: Parts) -> int:
    """Memory of these elements."""
    return sum(elements.nbytes + (0 if scales is None else scales.nbytes) for elements, scales in parts)
