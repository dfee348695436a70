"""Every distinct prompt is read once.

`generate` repeats each prompt for its beams or its samples before any loop begins. While the cache is still
waiting to be forked (`copies > 1`), equal rows would write equal keys, so a hook thins what the model is
given to one row per prompt, and another repeats the outputs. What has to be remembered between the two
lives on the cache: several threads may generate with one model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hfopt import host
from hfopt.cache import IndirectCache

# Batch-first arguments of a text decoder. Any other tensor means that rows may differ in a way not seen here.
_BATCH_FIRST = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
_WITHOUT_ROWS = ("logits_to_keep",)


def share_prompts(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: one row per prompt as long as rows are equal; forks the cache where they are not."""
    cache = host.cache_in(kwargs.values())
    if not isinstance(cache, IndirectCache) or cache.copies == 1:
        return None
    tokens = _tokens(kwargs)
    if tokens is not None and len(tokens) == cache.n_rows:
        cache.copies = 1  # `forward` was called past the hooks: every row has keys of its own
        return None
    thinned = None
    is_step = tokens is not None and tokens.shape[1] == 1 and cache.get_seq_length() > 0
    # rows of a decode step are beams now, equal or not, and those with adapters of their own are counted by these
    is_whole = is_step or host.have_own_adapters(module)
    if not (args or is_whole or module.training or torch.compiler.is_compiling()):
        thinned = one_row_per_prompt(kwargs, cache.copies)
    if thinned is not None:
        return args, thinned
    if cache.n_rows:
        cache.fork()
    else:
        cache.copies = 1  # every row brings its own prompt
    return None


def unshare_prompts(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: logits, hidden states and attentions of the thinned rows, repeated for every copy."""
    cache = host.cache_in(kwargs.values())
    if not isinstance(cache, IndirectCache) or cache.copies == 1:
        return None
    n_prompts = len(_tokens(kwargs))
    return repeat_rows(output, n_prompts, cache.copies)


def _tokens(kwargs: dict[str, Any]) -> Any:
    tokens = kwargs.get("input_ids")
    return tokens if tokens is not None else kwargs.get("inputs_embeds")


def one_row_per_prompt(kwargs: dict[str, Any], copies: int) -> dict[str, Any] | None:
    """The arguments of a call with one row in place of each `copies`; None if some of these differ."""
    tokens = _tokens(kwargs)
    if tokens is None or len(tokens) % copies:
        return None
    n_rows = len(tokens)
    thinned = dict(kwargs)
    for name, value in kwargs.items():
        if name in _WITHOUT_ROWS or not isinstance(value, (Tensor, dict, list, tuple)):
            continue
        if name not in _BATCH_FIRST or not isinstance(value, Tensor) or len(value) not in (1, n_rows):
            return None
        if len(value) == 1:
            continue
        groups = value.unflatten(0, (-1, copies))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            return None
        thinned[name] = groups[:, 0].contiguous()
    return thinned


def repeat_rows(output: Any, n_prompts: int, copies: int) -> Any:
    """Outputs of n_prompts rows, of which what has a row for each prompt gets `copies`."""
    if not isinstance(output, dict):
        return _repeat(output, n_prompts, copies)
    for name, value in output.items():
        output[name] = _repeat(value, n_prompts, copies)
    return output


def _repeat(value: Any, n_prompts: int, copies: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat_interleave(copies, dim=0) if value.dim() and len(value) == n_prompts else value
    if type(value) in (tuple, list):
        return type(value)(_repeat(item, n_prompts, copies) for item in value)
    return value
