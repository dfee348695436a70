"""The prompt by a program, in place of a call of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache import IndirectCache
from ._types import Model, Outputs
from .decoding import LOOKS_INSIDE, PROGRAMS, has_hooks, wanted
from .prompt import share_prompts, unshare_prompts

if TYPE_CHECKING:
    from ..functional import Mask, Program

_READ = {"input_ids", "past_key_values", "position_ids", "attention_mask"}
_FIXED = {"logits_to_keep": 1, "use_cache": True, "return_dict": True}
_MASKS = (
    "sdpa",
    "eager",
)  # implementations of attention whose mask is what `_mask` says, in one form or another
# Multiply-adds in one call, which Ctrl-C does not interrupt: half a second on two cores. In a longer prompt, what Python
# does between the modules is less than a hundredth.
_MOST_WORK = 1 << 36


class Prefill:
    """A model as `GenerationMixin._prefill` uses it: calls go to its program where that gives what its modules would."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Outputs:
        outputs = self._run(inputs)
        return self._model(**inputs) if outputs is None else outputs

    def _run(self, inputs: dict[str, Any]) -> Outputs | None:
        model, cache = self._model, inputs.get("past_key_values")
        if PROGRAMS not in model.__dict__ or not isinstance(cache, IndirectCache):
            return None
        if not _is_plain(inputs) or wanted(model) or has_hooks(model):
            return None
        if model.config._attn_implementation not in _MASKS or not getattr(model.config, "is_causal", True):
            return None
        given = dict(inputs)
        shared = share_prompts(model, (), given)
        if shared is not None:
            given = shared[1]
        tokens, positions, seen = (
            given.get(name) for name in ("input_ids", "position_ids", "attention_mask")
        )
        n_past = cache.get_seq_length()
        if not _fit(tokens, positions, seen, n_past):
            return None
        n_rows, n_new = tokens.shape
        programs = model.__dict__[PROGRAMS]
        program = programs.of(model, n_rows, n_new, is_first=True)
        if program is None or not programs.is_proven(program):
            return None
        if len(cache.layers) != program.n_layers or _work(program, n_rows, n_new, n_past) > _MOST_WORK:
            return None
        logits = _prefill(program, cache, tokens, positions, seen)
        if logits is None:
            return None
        outputs = CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return unshare_prompts(model, (), given, outputs) or outputs


def prefill(
    model: Model, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Outputs:
    """`model._prefill`, by a program if it can be; of the logits, only those of the last token are promised."""
    is_first = not generation_config.is_assistant
    arguments = input_ids, generation_config, model_kwargs
    if "_prefill" in model.__dict__ or type(model)._prefill is not GenerationMixin._prefill:
        return model._prefill(*arguments, is_first_iteration=is_first)
    return GenerationMixin._prefill(Prefill(model), *arguments, is_first_iteration=is_first)


def _is_plain(inputs: dict[str, Any]) -> bool:
    """Whether a call asks for no more than the logits of the last token of a text."""
    if any(inputs.get(name) is not value for name, value in _FIXED.items()):
        return False
    others = inputs.keys() - _FIXED.keys() - _READ
    return all(name in LOOKS_INSIDE and not inputs[name] for name in others)


def _fit(tokens: Any, positions: Any, seen: Any, n_past: int) -> bool:
    """Whether the arguments are such that the model reads them as the program does."""
    if type(tokens) is not Tensor or tokens.dim() != 2 or not tokens.numel() or not tokens.is_cpu:
        return False
    if type(positions) is not Tensor or positions.dim() != 2 or not positions.is_cpu:
        return False
    n_rows, n_new = tokens.shape
    if positions.shape not in ((1, n_new), (n_rows, n_new)) or int(positions.min()) < 0:
        return False
    return seen is None or (type(seen) is Tensor and seen.is_cpu and seen.shape == (n_rows, n_past + n_new))


def _work(program: Program, n_rows: int, n_new: int, n_past: int) -> int:
    """Multiply-adds, about."""
    listing = program.listing
    token = listing.n_bytes + (n_past + n_new) * listing.cached_bytes
    return n_rows * n_new * token // program.dtype.itemsize


def _prefill(
    program: Program, cache: IndirectCache, tokens: Tensor, positions: Tensor, seen: Tensor | None
) -> Tensor | None:
    """Logits [n_rows, 1, n_logits]; None, with nothing changed, if the cache cannot take tokens of all layers at once."""
    # not at the top, because `import hfopt` must not load Numba
    from .. import functional

    n_rows, n_new = tokens.shape
    n_past = cache.get_seq_length()
    layout = program.n_kv_heads, program.head_dim, program.dtype
    appended = cache.append_everywhere(n_rows, n_new, *layout)
    if appended is None:
        return None
    mask = _mask(seen, n_new, n_past)
    arrays = (each.numpy().astype(np.int64, copy=False) for each in (tokens, positions))
    try:
        return functional.prefill(program, *arrays, appended, mask)
    except BaseException:  # its columns have not been written
        if n_past:
            cache.crop(-n_new)
        else:
            cache.reset()
        raise


def _mask(seen: Tensor | None, n_new: int, n_past: int) -> Mask:
    """What transformers makes of a mask of tokens, in the form that `prepare_mask` gives it."""
    from ..functional import Mask

    if seen is None or bool((seen != 0).all()):
        return Mask("causal")
    causal = torch.ones(n_new, n_past + n_new, dtype=torch.bool).tril_(n_past)
    return Mask("bytes", ((seen != 0)[:, None] & causal).view(torch.uint8).numpy())
