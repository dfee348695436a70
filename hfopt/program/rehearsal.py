"""The rehearsal of a program: random tokens go through it and through the model's modules, and must come out the same.

A prompt and a token behind it go through the first layers, a token behind a long text through all of them, and through the
first ones once more behind one that is longer than every window, if that is not: what a decoder does only there (another
scale, a window) shows in no first step.
"""

import inspect
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from hfopt import host
from hfopt.cache import IndirectCache
from hfopt.errors import ForkedProcess, KernelError
from hfopt.functional import Mask
from hfopt.patches.adapters import readable_names
from hfopt.patches.shadow import shadow
from hfopt.program.adapters import AdaptedProgram, Choice
from hfopt.program.decoder import build
from hfopt.program.program import Program

_FAR = 4096  # positions
_MAX_BYTES = 32 << 20  # in the cache of the long text
_N_LAST_BITS = 4
_N_PROMPT, _N_PADDED = 20, 2
_MAX_PROMPT = 64  # tokens; longer windows are outgrown by a token alone
_N_BEYOND = 2  # tokens that have left a window
_N_RACED, _RACES = 16, 3
_RACED_BYTES = 1 << 30  # of weights, beside the reading of which what comes with modules hardly counts
# whatever the configuration asks for
_OPTIONAL = {"logits_to_keep": 1, "output_attentions": False, "output_hidden_states": False}


def difference(model: nn.Module, program: Program, kv_cache: str | None = None) -> str | None:
    """In words, what this program of a model gives otherwise than the modules; None if nothing.

    kv_cache: of the caches that it is tried with. Raises KernelError and ForkedProcess, which say nothing about the model.
    """
    if host.cache_argument(type(model).forward) is None:
        return "its forward has no argument that is known as its cache"
    generator = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            short, long = shadow(model, is_short=True), shadow(model)
            for each in (*short.modules(), *long.modules()):
                if host.is_adapted(each):  # all of them at once, whatever is switched on
                    host.switch_on(each, readable_names(each, program.dtype))
            first = _Stage(short, build(short), kv_cache, generator)
            whole = _Stage(long, program, kv_cache, generator)
            n_past = max(1, min(whole.farthest, program.max_keys, _MAX_BYTES // whole.token_bytes) - 1)
            longest = _longest_window(model, program)
            tried = [first.near(), whole.far(n_past)]
            if longest > n_past:
                tried.append(first.far(longest + _N_BEYOND))
            for name, theirs, ours in itertools.chain(*tried):
                if theirs.dtype is not ours.dtype or theirs.shape != ours.shape:
                    return f"it gives {name} of another kind than its modules"
                if not (_are_equal(theirs, ours) or (not program.is_exact and _are_close(theirs, ours))):
                    return f"it gives other {name} than its modules"
    except (KernelError, ForkedProcess):
        raise
    except Exception as error:  # noqa: BLE001  (whatever a foreign forward raises)
        return f"it could not be tried ({type(error).__name__}: {error})"
    return None


def is_quicker(model: nn.Module, program: Program, kv_cache: str | None = None) -> bool:
    """Whether a program reads a few tokens in less time than the modules, though torch's kernels are quicker than its own:
    between kernels, modules take time too. Not measured for large models, nor with adapters.
    """
    if program.adapted or program.listing.n_bytes > _RACED_BYTES:
        return False
    generator, seconds = torch.Generator().manual_seed(1), []
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        stage = _Stage(shadow(model), program, kv_cache, generator)
        for _ in range(_RACES + 1):  # the first pair compiles
            seconds.append(stage.race(_N_RACED))
    ours, theirs = map(min, zip(*seconds[1:], strict=True))
    return ours < theirs


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by what two ways to compute a tanh do."""
    return torch.allclose(one, other, rtol=_N_LAST_BITS * torch.finfo(one.dtype).eps, atol=0)


def _longest_window(model: Any, program: Program) -> int:
    """The longest one that a text may outgrow, 0 if there is none."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", sys.maxsize)
    longest = min(longest, program.max_keys - _N_BEYOND)
    return max((window for window in program.windows if window < longest), default=0)


_Parts: TypeAlias = tuple[str, Tensor, Tensor]  # what it is, by the modules, by the program


class _Stage(NamedTuple):
    """A model and its program, and what they are told."""

    model: Any
    program: Program
    kv_cache: str | None
    generator: torch.Generator

    def near(self) -> Iterator[_Parts]:
        """A prompt of two rows, one of them padded, and one more token in each."""
        beyond = (window + _N_BEYOND for window in self.program.windows if window < _MAX_PROMPT)
        n_prompt = max([_N_PROMPT, *beyond])
        seen = torch.ones(2, n_prompt + 1, dtype=torch.bool)
        seen[1, :_N_PADDED] = False
        theirs, ours = self._cache(), self._cache()
        positions = (
            (seen.cumsum(1) - 1).clamp(0, self._n_indices - 1)
            if self._takes_positions
            else torch.arange(n_prompt + 1).expand(2, -1)
        )
        tokens = self._tokens(2, n_prompt)
        expected = self._call(theirs, tokens, positions[:, :n_prompt], seen[:, :n_prompt])
        mask = seen[:, None, :n_prompt] & torch.ones(n_prompt, n_prompt, dtype=torch.bool).tril()
        hidden = Mask("bytes", mask.contiguous().view(torch.uint8).numpy())
        appended = ours.append_everywhere(2, n_prompt, self.program.layouts)
        assert appended is not None, "an empty cache takes a prompt"
        given = tokens.numpy(), positions[:, :n_prompt].numpy(), appended, hidden
        yield "logits of a prompt", expected, self._adapted.prefill(*given)
        yield from self._step(theirs, ours, positions[:, n_prompt:], seen, "of a step")
        for their, our in zip(theirs.layers, ours.layers, strict=True):
            for one, other in ((their.keys, our.keys), (their.values, our.values)):
                assert one is not None and other is not None
                held = seen[:, -one.shape[2] :]
                yield "keys and values", one.transpose(1, 2)[held], other.transpose(1, 2)[held]

    def far(self, n_past: int) -> Iterator[_Parts]:
        """One more token behind a text of so many, far from its beginning."""
        program = self.program
        cache = self._cache()
        for layer_idx, (n_heads, head_dim, dtype) in enumerate(program.layouts):
            keys, values = torch.randn(2, 1, n_heads, n_past, head_dim, generator=self.generator).to(dtype)
            cache.update(keys, values, layer_idx)
        seen = torch.ones(1, n_past + 1, dtype=torch.bool)
        seen[0, 0] = False
        # at a break, angles become others; in order, because those of a model may follow from the longest text so far
        far = min(_FAR, self._n_indices) - 1
        for position in sorted((far, *program.breaks.first_beyond)) if self._takes_positions else (n_past,):
            yield from self._step(cache, None, torch.tensor([[position]]), seen, "behind a long text")
            cache.crop(-1)

    def race(self, n_new: int) -> tuple[float, float]:
        """Seconds that so many tokens of a prompt take the program, and the modules."""
        tokens, positions = self._tokens(1, n_new), torch.arange(n_new)[None]
        theirs, ours = self._cache(), self._cache()
        begin = time.perf_counter()
        appended = ours.append_everywhere(1, n_new, self.program.layouts)
        assert appended is not None, "an empty cache takes a prompt"
        self.program.prefill(tokens.numpy(), positions.numpy(), appended, Mask("causal"))
        middle = time.perf_counter()
        self._call(theirs, tokens, positions, torch.ones(1, n_new, dtype=torch.bool))
        return middle - begin, time.perf_counter() - middle

    def _step(
        self, theirs: IndirectCache, ours: IndirectCache | None, positions: Tensor, seen: Tensor, where: str
    ) -> Iterator[_Parts]:
        """One more token a row; ours: the program's cache, None if it takes that of the modules after them."""
        n_rows = len(seen)
        tokens = self._tokens(n_rows, 1)
        expected = self._call(theirs, tokens, positions, seen)
        written = [each.clone() for each in theirs.newest()]
        if ours is None:
            theirs.crop(-1)
            ours = theirs
        appended = ours.append_everywhere(n_rows, 1, self.program.layouts)
        assert appended is not None, "an even cache takes a step"
        given = tokens[:, 0].numpy(), positions[:, 0].numpy(), appended, seen.numpy().astype(np.uint8)
        yield f"logits {where}", expected, self._adapted.steps(n_rows).logits(*given)
        for one, other in zip(written, ours.newest(), strict=True):
            yield f"keys and values {where}", one, other

    @property
    def _adapted(self) -> AdaptedProgram:
        """The program with the adapters of the modules."""
        return AdaptedProgram(self.program, Choice.of(self.program, everything=True))

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of a token in all layers."""
        return sum(
            2 * n_heads * head_dim * dtype.itemsize for n_heads, head_dim, dtype in self.program.layouts
        )

    @property
    def _takes_positions(self) -> bool:
        return host.takes_positions(type(self.model).forward)

    @property
    def _n_indices(self) -> int:
        """Tokens and positions below this are in all tables."""
        return min(len(table) for table in self.program.tables if not table.grows)

    @property
    def farthest(self) -> int:
        """Tokens of a long text, which has no more columns than there are positions where those are the same."""
        return _FAR if self._takes_positions else min(_FAR, self._n_indices)

    def _tokens(self, *shape: int) -> Tensor:
        return torch.randint(self._n_indices, shape, generator=self.generator)

    def _cache(self) -> IndirectCache:
        config = self.model.config.get_text_config(decoder=True)
        cache = IndirectCache(config, kv_cache=self.kv_cache)
        del cache.layers[len(self.program.layouts) :]
        return cache

    def _call(self, cache: IndirectCache, tokens: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Logits of the last token, by the modules."""
        forward = type(self.model).forward
        parameters = inspect.signature(forward).parameters.values()
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        named = {each.name for each in parameters}
        outputs = self.model(
            input_ids=tokens,
            attention_mask=seen.long(),
            use_cache=True,
            return_dict=True,
            **{str(host.cache_argument(forward)): cache},
            **({"position_ids": positions} if self._takes_positions else {}),
            **{name: value for name, value in _OPTIONAL.items() if takes_any or name in named},
        )
        logits: Tensor = outputs.logits
        return logits[:, -1:]
