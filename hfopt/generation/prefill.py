"""The prompt by a program, in place of a call of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from hfopt import host
from hfopt.cache import IndirectCache

from ._types import Model, Outputs
from .decoding import LOOKS_INSIDE, PROGRAMS, are_near, has_hooks, wanted
from .prompt import share_prompts, unshare_prompts

if TYPE_CHECKING:
    from hfopt.functional import Mask
    from hfopt.program.program import Program

_READ = {"input_ids", "position_ids", "attention_mask"}
_FIXED = {"logits_to_keep": 1, "use_cache": True, "return_dict": True}
# Multiply-adds in one call, which Ctrl-C does not interrupt: half a second to one on two cores. A longer prompt takes the
# modules no longer.
_MOST_WORK = 1 << 37


class Prefill:
    """A model as the prefill of GenerationMixin uses it: calls go to its program where that gives what its modules would."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Outputs:
        outputs = self._run(inputs) if self._is_plain(inputs) else None
        return self._model(**inputs) if outputs is None else outputs

    def _is_plain(self, inputs: dict[str, Any]) -> bool:
        """Whether a call asks for no more than the logits of the last token of a text, from a model that just reads it."""
        model = self._model
        given = host.cache_given(inputs)
        if PROGRAMS not in model.__dict__ or given is None or not isinstance(given[1], IndirectCache):
            return False
        if given[0] != host.cache_argument(type(model).forward) or not host.knows_causal_output():
            return False
        if any(inputs.get(name) is not value for name, value in _FIXED.items()):
            return False
        others = inputs.keys() - _FIXED.keys() - _READ - {given[0]}
        if not all(inputs[name] is None or (name in LOOKS_INSIDE and not inputs[name]) for name in others):
            return False
        return not wanted(model) and not has_hooks(model)

    def _run(self, inputs: dict[str, Any]) -> Outputs | None:
        """None if modules have to do it, with nothing changed but what they change first."""
        model, cache = self._model, host.cache_in(inputs.values())
        assert isinstance(cache, IndirectCache)
        shared = share_prompts(model, (), inputs)
        given = inputs if shared is None else shared[1]
        text = _Text.of(given, cache.get_seq_length())
        if text is None:
            return None
        programs, (n_rows, n_new) = model.__dict__[PROGRAMS], text.tokens.shape
        program = programs.of(model, n_rows, n_new, cache.kv_cache)
        if program is None or len(cache.layers) != program.n_layers:
            return None
        logits = text.read(program, cache)
        if logits is None:
            return None
        outputs = host.causal_output(logits, cache)
        return unshare_prompts(model, (), given, outputs) or outputs


class _Text(NamedTuple):
    """New tokens [n_rows, n_new] behind n_past others, their positions [1 or n_rows, n_new], and which tokens are seen."""

    tokens: Tensor
    positions: Tensor
    seen: Tensor | None  # [n_rows, n_past + n_new]
    n_past: int

    @classmethod
    def of(cls, inputs: dict[str, Any], n_past: int) -> _Text | None:
        """None if the arguments have another form."""
        tokens, positions, seen = (
            inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask")
        )
        if not _is_matrix(tokens) or not _is_matrix(positions) or not (seen is None or _is_matrix(seen)):
            return None
        n_rows, n_new = tokens.shape
        if positions.shape not in ((1, n_new), (n_rows, n_new)) or not are_near(positions, n_past + n_new):
            return None
        if seen is not None and seen.shape != (n_rows, n_past + n_new):
            return None
        if seen is not None and not bool((seen != 0).any(dim=1).all()):
            return None  # what a token sees that sees nothing depends on the kind of attention
        return cls(tokens, positions, seen, n_past)

    def read(self, program: Program, cache: IndirectCache) -> Tensor | None:
        """Logits [n_rows, 1, n_logits]; None, with nothing changed, for a long text, and if layers hold different tokens."""
        # not at the top, because `import hfopt` must not load Numba
        from hfopt.program import run

        n_rows, n_new = self.tokens.shape
        listing, n_keys = program.listing, self.n_past + n_new
        work = n_rows * n_new * (listing.n_bytes + n_keys * listing.cached_bytes) // program.dtype.itemsize
        if work > _MOST_WORK:
            return None
        layout = program.n_kv_heads, program.head_dim, program.dtype
        appended = cache.append_everywhere(n_rows, n_new, *layout)
        if appended is None:
            return None
        tokens, positions = (
            each.numpy().astype(np.int64, copy=False) for each in (self.tokens, self.positions)
        )
        try:
            return run.prefill(program, tokens, positions, appended, self._mask())
        except BaseException:  # its columns have not been written
            if self.n_past:
                cache.crop(-n_new)
            else:
                cache.reset()
            raise

    def _mask(self) -> Mask:
        """What transformers makes of `seen`, in the form that `prepare_mask` gives it."""
        from hfopt.functional import Mask

        if self.seen is None or bool((self.seen != 0).all()):
            return Mask("causal")
        n_new, n_keys = self.tokens.shape[1], self.seen.shape[1]
        causal = torch.ones(n_new, n_keys, dtype=torch.bool).tril_(self.n_past)
        seen = (self.seen != 0)[:, None] & causal
        return Mask("bytes", seen.contiguous().view(torch.uint8).numpy())


def _is_matrix(value: Any) -> TypeGuard[Tensor]:
    return type(value) is Tensor and value.is_cpu and value.dim() == 2 and value.numel() > 0


def prefill(
    model: Model, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Outputs:
    """The model's own prefill, of which only the logits of the last token are promised."""
    is_first = not generation_config.is_assistant
    arguments = input_ids, generation_config, model_kwargs
    theirs = getattr(GenerationMixin, host.PREFILL)
    if host.PREFILL in model.__dict__ or getattr(type(model), host.PREFILL) is not theirs:
        return getattr(model, host.PREFILL)(*arguments, is_first_iteration=is_first)
    stand_in: Any = Prefill(model)
    return theirs(stand_in, *arguments, is_first_iteration=is_first)
