"""PrefixCache: keys and values of beginnings of prompts, for the requests that come later."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from hfopt.cache import prefix_file
from hfopt.cache.prefix_state import digest_of, obstacle, state_of
from hfopt.cache.prefix_tree import Found, Parts, PrefixTree
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.host import generator_of

# State of the model, kind of the cache, dtype of what it holds or stands for
Key: TypeAlias = tuple[bytes, str | None, torch.dtype]


class PrefixUse(NamedTuple):
    """What requests have made of a `PrefixCache`: prompts, and tokens of them that were known, or had to be read."""

    prompts: int = 0
    known_tokens: int = 0
    read_tokens: int = 0


class PrefixCache:
    """Keys and values of prompts that have been read, so that the beginning of the next one is not read again.

    For `generate(prefix_cache=...)` of an optimised model, or for all of its requests by `optimize(prefix_cache=...)`: of
    each prompt the longest beginning that an earlier one had too (a system prompt, examples, a document, a chat so far) is
    taken from here, and only the rest goes through the model. Several threads may use one.

    Args:
        model: the causal language model of transformers whose requests it is for.
        max_bytes: of memory for what is held, beside the caches of requests. What was used longest ago goes first.

    Keys and values depend on the weights: after a change of them, or with another adapter, what was read before is not found
    (it is again, once an adapter is switched back). A change is seen by torch's count of writes and by a sample of all
    weights; after one of a few single numbers by `.data`, call `clear`. Requests for which nothing can be kept are answered
    as without it.

    Raises UnsupportedModel for a model whose keys and values do not follow from the tokens before them alone (recurrent
    states, chunks, angles that depend on the length of a text), and InvalidInput for other arguments.

    Example:
        >>> import hfopt, torch
        >>> model = hfopt.load(hfopt.embedded_model())
        >>> prefixes = hfopt.PrefixCache(model, max_bytes=2**26)
        >>> document = torch.arange(2, 102)
        >>> for question in ([5, 7, 9], [6, 4]):
        ...     ids = torch.cat([document, torch.tensor(question)])[None]
        ...     tokens = model.generate(ids, prefix_cache=prefixes, max_new_tokens=4)
        >>> prefixes.use  # the second prompt had two tokens to read
        PrefixUse(prompts=2, known_tokens=100, read_tokens=105)
    """

    def __init__(self, model: nn.Module, *, max_bytes: int = 2**30) -> None:
        generator = generator_of(model) if isinstance(model, nn.Module) else None
        if generator is None:
            raise InvalidInput(f"model is a {type(model).__name__}: a causal language model is needed")
        if type(max_bytes) is not int or max_bytes < 1:
            raise InvalidInput(f"max_bytes = {max_bytes!r}: a number of bytes, at least 1, is needed")
        reason = obstacle(generator)
        if reason is not None:
            raise UnsupportedModel(
                f"beginnings of prompts cannot be kept for {type(generator).__name__}: {reason}"
            )
        # held weakly: the model may be bound to this, and would not be freed
        self._model = weakref.ref(generator)
        self._tree = PrefixTree(max_bytes)
        self._use, self._lock = PrefixUse(), threading.Lock()

    @property
    def max_bytes(self) -> int:
        """Most memory that it takes."""
        assert self._tree.max_bytes is not None
        return self._tree.max_bytes

    @property
    def n_bytes(self) -> int:
        """Memory that it takes now."""
        return self._tree.n_bytes

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds."""
        return self._tree.n_tokens

    @property
    def use(self) -> PrefixUse:
        """What requests have made of it so far."""
        return self._use

    def clear(self) -> None:
        """Forget all prompts."""
        self._tree.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what is held for the model as it is now to a file (safetensors), for `load` in another process.

        Raises InvalidInput where no file can be written.

        Example:
            >>> import hfopt, tempfile, torch
            >>> model = hfopt.load(hfopt.embedded_model())
            >>> prefixes = hfopt.PrefixCache(model)
            >>> tokens = model.generate(torch.arange(2, 102)[None], prefix_cache=prefixes, max_new_tokens=1)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     prefixes.save(f"{folder}/prefixes.safetensors")
            ...     hfopt.PrefixCache(model).load(f"{folder}/prefixes.safetensors")
            100
        """
        model = self.model
        state = state_of(model)
        texts = {key[1:]: self._tree.blocks(key) for key in list(self._tree.roots) if key[0] == state}
        prefix_file.write(os.fspath(path), digest_of(model), texts)

    def load(self, path: str | os.PathLike[str]) -> int:
        """Hold what `save` has written as well, as far as there is room; how many tokens are new.

        Raises InvalidInput where there is no such file, and for one of another model (other weights, settings or adapters)
        or of another version of hfopt's format, and CorruptCheckpoint for one that is damaged; nothing is held of it then.
        """
        model, added = self.model, 0
        for kind, texts in prefix_file.read(os.fspath(path), digest_of(model)).items():
            key = (state_of(model), *kind)
            added += sum(self._tree.add(key, tokens, read) for tokens, read in texts)
        return added

    # ---- for generation ---------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model that it is for. Raises ReferenceError if that is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this PrefixCache is gone: keep it in a variable")
        return model

    def key(self, kv_cache: str | None) -> Key:
        """What keys and values of the model as it is now are held under."""
        return state_of(self.model), kv_cache, self.model.dtype

    def find(self, key: Key, tokens: np.ndarray) -> Found:
        """What is known of the beginning of a prompt, int64 [n]."""
        return self._tree.find(key, tokens)

    def keep(self, key: Key, tokens: np.ndarray, read: Callable[[int, int], list[Parts]]) -> None:
        """Hold a prompt; see `PrefixTree.add`."""
        self._tree.add(key, tokens, read)

    def count(self, prompts: int, known_tokens: int, read_tokens: int) -> None:
        """Note a request."""
        with self._lock:
            before = self._use
            self._use = PrefixUse(
                *(a + b for a, b in zip(before, (prompts, known_tokens, read_tokens), strict=True))
            )

    # A copy, or an unpickled one, is for the copy of the model, and holds nothing: weights are elsewhere there.

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        return _empty(copy.deepcopy(self.model, memo), self.max_bytes)

    def __reduce__(self) -> tuple[Callable[..., PrefixCache], tuple[Any, int]]:
        return _empty, (self.model, self.max_bytes)


def _empty(model: Any, max_bytes: int) -> PrefixCache:
    """One without texts, for a model that may be in the making still."""
    made = PrefixCache.__new__(PrefixCache)
    made._model, made._tree = weakref.ref(model), PrefixTree(max_bytes)
    made._use, made._lock = PrefixUse(), threading.Lock()
    return made
