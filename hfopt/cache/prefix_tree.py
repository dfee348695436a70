"""PrefixTree: keys and values of texts that begin alike, in a radix tree of blocks."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hfopt.machine.memory import available_memory

# of some tokens in one layer: [2, n_kv_heads, n_tokens, head_dim], keys then values, and of codes [2, n_kv_heads, n_tokens]
Part: TypeAlias = tuple[Tensor, Tensor | None]
Parts: TypeAlias = list[Part]  # of all layers

_BLOCK = 256  # tokens at most, of which a split copies some


class Node:
    """A block of tokens behind those of its parent. pins: requests that are reading it."""

    def __init__(self, parent: Node | None, tokens: np.ndarray, parts: Parts) -> None:
        self.parent, self.tokens, self.parts = parent, tokens, parts
        self.children: dict[int, Node] = {}
        self.pins = self.used = 0

    @property
    def n_bytes(self) -> int:
        """Memory of its keys and values, and of its tokens."""
        return bytes_of(self.parts) + self.tokens.nbytes


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
            n_tokens = block[0][0].shape[2]
            low, high = max(first - start, 0), min(end - start, n_tokens)
            if low < high:
                yield start + low, cut(block, low, high)
            start += n_tokens


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

    def add(self, key: Any, tokens: np.ndarray, read: Callable[[int, int], Parts]) -> int:
        """Hold a text as well, from its beginning on as far as there is room; how many tokens are new.

        Of the machine's memory, no more is taken than there is. read(first, end): keys and values of these of its tokens.
        """
        with self._lock:
            path, length = self._walk(key, tokens)
            for node in path:
                node.pins += 1
        made: list[tuple[int, Parts]] = []
        try:
            # outside of the lock, because it takes a while
            for first in range(length, len(tokens), _BLOCK):
                parts = read(first, min(first + _BLOCK, len(tokens)))
                size = bytes_of(parts) + 8 * _BLOCK
                if self.max_bytes is not None and (
                    (len(made) + 1) * size > self.max_bytes or size > available_memory()
                ):
                    break
                made.append((first, parts if self.max_bytes is None else copied(parts)))
        finally:
            with self._lock:
                for node in path:
                    node.pins -= 1
                n_new = sum(self._hang(key, tokens, first, parts) for first, parts in made)
        return n_new

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
        """Put a block behind the first tokens of a text, or what is not there yet; how many tokens that are."""
        path, length = self._walk(key, tokens[: first + parts[0][0].shape[2]])
        n_known = length - first
        if n_known < 0 or length == first + parts[0][0].shape[2]:
            return 0  # the tokens before it are gone, or another thread was quicker
        if n_known:
            parts = cut(parts, n_known, parts[0][0].shape[2])
            parts = parts if self.max_bytes is None else copied(parts)
        new = tokens[length : first + n_known + parts[0][0].shape[2]].copy()
        for node in path:
            node.pins += 1
        has_room = self._make_room(bytes_of(parts) + new.nbytes)
        for node in path:
            node.pins -= 1
        if not has_room:
            return 0
        parent = path[-1] if path else self.roots.setdefault(key, Node(None, new[:0], []))
        inside = length - sum(len(each.tokens) for each in path[:-1])
        if path and inside < len(parent.tokens):
            parent = self._split(parent, inside)
        node = parent.children[int(new[0])] = Node(parent, new, parts)
        node.used = self._time
        self.n_bytes += node.n_bytes
        self.n_tokens += len(new)
        return len(new)

    def _split(self, node: Node, length: int) -> Node:
        """Cut a block in two, of which the first is returned; the other one stays the object that it was."""
        parent = node.parent
        assert parent is not None
        halves = [cut(node.parts, 0, length), cut(node.parts, length, len(node.tokens))]
        if self.max_bytes is not None:
            halves = [copied(each) for each in halves]
        first = Node(parent, node.tokens[:length].copy(), halves[0])
        first.used = node.used
        parent.children[int(first.tokens[0])] = first
        node.parent, node.tokens, node.parts = first, node.tokens[length:].copy(), halves[1]
        first.children[int(node.tokens[0])] = node
        return first

    def _make_room(self, n_bytes: int) -> bool:
        """Let go of blocks until so many bytes more may be held; False if that cannot be."""
        if self.max_bytes is None:
            return True
        if self.n_bytes + n_bytes <= self.max_bytes:
            return True
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
        return self.n_bytes + n_bytes <= self.max_bytes


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


def joined(pieces: Sequence[Parts]) -> Parts:
    """Keys and values of tokens that follow each other."""
    if len(pieces) == 1:
        return pieces[0]
    return [
        (
            torch.cat([elements for elements, _ in layer], 2),
            None
            if layer[0][1] is None
            else torch.cat([scales for _, scales in layer if scales is not None], 2),
        )
        for layer in zip(*pieces, strict=True)
    ]


def copied(parts: Parts) -> Parts:
    """The same in memory of its own."""
    with torch.inference_mode(False), torch.no_grad():
        return [(_copy(elements), None if scales is None else _copy(scales)) for elements, scales in parts]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def bytes_of(parts: Parts) -> int:
    """Memory of these elements."""
    return sum(elements.nbytes + (0 if scales is None else scales.nbytes) for elements, scales in parts)
