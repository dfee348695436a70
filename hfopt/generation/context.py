"""Long prompts that processes with a model each read together: which, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfopt import host
from hfopt.cache import IndirectCache, Share

from ._types import Model, Outputs

if TYPE_CHECKING:  # it loads Numba
    from hfopt.distributed.ring import Ring

# Tokens of a prompt; of fewer, what there is to wait for in each layer, and in each step behind it, is more than what is
# saved.
LEAST_TOGETHER = 1024


def can_share(model: Model, cache: IndirectCache, n_tokens: int) -> bool:
    """Whether processes may have the tokens of a prompt and what follows it in parts, in this empty cache of a request.

    It follows from the model, from shapes and settings alone: all processes find the same.
    """
    longest = host.steady_length(
        model.modules()
    )  # other positions of a process would mean other angles there
    return (
        type(cache) is IndirectCache
        and cache.is_new
        and cache.sees_all
        and cache.copies == 1
        and cache.kv_cache is None
        and host.takes_positions(type(model).forward)
        and n_tokens <= (longest if cache.max_length is None else cache.max_length) <= longest
    )


def read_shared(model: Model, ring: Ring, inputs: dict[str, Any], cache: IndirectCache) -> Outputs:
    """The outputs of the model for the last token of a prompt [n_rows, n_tokens] without padding, the same in all processes.

    inputs: of a call of the model for all tokens, with this cache, for which `can_share`.
    """
    ids: Tensor = inputs["input_ids"]
    n_tokens = ids.shape[1]
    chunks = ring.chunks(n_tokens)
    positions = torch.cat([torch.arange(each.start, each.stop, device="cpu") for each in chunks])
    cache.shard(Share(ring, n_tokens, len(positions)))
    given = {"input_ids": ids[:, positions], "position_ids": positions[None], "attention_mask": None}
    outputs = model(**{**inputs, **given})
    return host.causal_output(ring.of_last(outputs.logits[:, -1:].contiguous()), cache)
