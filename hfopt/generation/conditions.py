"""When requests of a model take prompts and steps from a program."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfopt import host
from hfopt.cache import IndirectCache

from ._types import Model
from .prompt import share_prompts, unshare_prompts
from .proof import refusals
from .state import Verdict, installed

_OWN_HOOKS = (share_prompts, unshare_prompts)
LOOKS_INSIDE = ("output_attentions", "output_hidden_states")
_NEAR = 1 << 14  # positions that programs may make angles for, however few tokens there are


def obstacle(model: Model) -> str | None:
    """In words, why requests of this model take no steps from a program, whatever its modules are."""
    if not any(words not in refusals() for words in host.MODES.values()):
        return "transformers' own loops run"
    verdict = installed(model).verdict
    if verdict != Verdict():
        return verdict.refusal or verdict.obstacle
    if has_hooks(model):
        return "the model has hooks"
    name = wanted(model)
    return None if name is None else f"its configuration has {name}"


def has_hooks(model: Model) -> bool:
    """Whether code of others runs around calls of the model itself."""
    hooks = (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
    return any(hook not in _OWN_HOOKS for hook in hooks)


def wanted(model: Model) -> str | None:
    """What the configuration asks of each call that a program does not give."""
    return next((name for name in LOOKS_INSIDE if getattr(model.config, name, False)), None)


def are_near(position_ids: Tensor, n_keys: int) -> bool:
    """Whether a program can have a row of a table for each position: others may be negative, or anywhere beyond the keys."""
    if position_ids.dtype not in (torch.int64, torch.int32):
        return False
    first, last = position_ids.aminmax()
    return bool(first >= 0 and last < max(n_keys, _NEAR))


def has_gaps(mask: np.ndarray | None) -> bool:
    """Whether keys are hidden behind one that is seen; mask: [n_rows, keys], 0 for what is hidden."""
    return mask is not None and bool((np.diff((mask != 0).astype(np.int8), axis=1) < 0).any())


def has_flags(mask: Tensor | None) -> bool:
    """Whether a mask is of 0 and 1 in integers, whose sums are exact; None is."""
    return mask is None or not (mask.is_floating_point() or bool((mask.long() >> 1).any()))


def positions_of(model: Model, given: Any, n_past: int, n_new: int) -> Any:
    """Positions of n_new tokens behind n_past others: those given, or, for a model that takes none, their columns."""
    if host.takes_positions(type(model).forward):
        return given
    return torch.arange(n_past, n_past + n_new, device="cpu")[None] if given is None else None


def spans(mask: Tensor | None, cache: IndirectCache) -> bool:
    """Whether a mask [n_rows, keys] is over what the cache holds and one token more; None is over all that there is."""
    return mask is None or mask.shape == (cache.n_rows * cache.copies, cache.get_seq_length() + 1)
