"""Choosing tokens: in one kernel where it can read the logits, in torch elsewhere.

The kernels are imported at the first call, because `import hfopt` must not load Numba.
"""

import numpy as np
import torch
from torch import Tensor

from hfopt import host
from hfopt.words import DTYPES

_FEW = 1 << 17  # logits of which numpy has the largest before a kernel has begun


def _is_readable(logits: Tensor) -> bool:
    return logits.is_cpu and logits.dtype in DTYPES and logits.stride(-1) == 1


def argmax(logits: Tensor) -> Tensor:
    """The first index of the largest logit of each row: [n_rows, n_tokens] to int64 [n_rows]."""
    if not _is_readable(logits):
        return torch.argmax(logits, dim=-1)
    if logits.dtype is torch.float32 and logits.numel() <= _FEW and not logits.requires_grad:
        # its first of equals and its NaN are torch's
        return torch.from_numpy(logits.numpy().argmax(-1))
    from hfopt.functional.sampling import argmax as kernel

    return kernel(logits)


def argmax_allowed(logits: Tensor, bits: np.ndarray) -> np.ndarray | None:
    """`argmax` among the tokens whose bits are set, -1 where none is; None if the kernel cannot read the logits.

    [n_rows, n_tokens] and int32 [n_rows, words] to int64 [n_rows].
    """
    if not _is_readable(logits):
        return None
    from hfopt.functional.sampling import argmax_allowed as kernel

    return kernel(logits, bits)


def drawn(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A token of each row by its probability: [n_rows, n_tokens] to int64 [n_rows]. generator: torch's own if None."""
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(1)


def continuations(logits: Tensor, beam_scores: Tensor, n_candidates: int) -> tuple[Tensor, Tensor]:
    """The best of `beam_scores + log_softmax(logits)` over all beams of a prompt, best first.

    logits [n_prompts * num_beams, n_tokens], beam_scores float32 [n_prompts, num_beams]
    -> scores float32 and beam * n_tokens + token int64, both [n_prompts, n_candidates].

    Which of equal scores come first, and which of them are left out, is for torch.topk to say: it follows from its
    algorithm alone.
    """
    n_scores = beam_scores.shape[1] * logits.shape[1]
    if _is_readable(logits):
        from hfopt.functional.sampling import log_softmax_top_k

        # one more than wanted tells whether the last one has an equal
        n_best = min(n_candidates + 1, n_scores)
        scores, places = log_softmax_top_k(logits, beam_scores.flatten(), n_best, beam_scores.shape[1])
        found = scores.numpy()
        if (found[:, :-1] > found[:, 1:]).all():
            return scores[:, :n_candidates], places[:, :n_candidates]
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return select(log_probs, beam_scores, n_candidates, do_sample=False)


def select(
    log_probs: Tensor, beam_scores: Tensor, n_candidates: int, do_sample: bool
) -> tuple[Tensor, Tensor]:
    """`continuations` from log-probabilities that processors have seen; or a sample without replacement.

    One search over all beams, as in transformers: where a processor leaves fewer tokens than candidates, the
    order among equal scores decides what is returned.
    """
    total = (log_probs.view(*beam_scores.shape, -1) + beam_scores[:, :, None]).flatten(1)
    if not do_sample:
        return torch.topk(total, n_candidates)
    top = torch.multinomial(torch.softmax(total, dim=-1), num_samples=n_candidates)
    scores = total.gather(1, top)
    if not host.sorts_samples():
        return scores, top
    scores, order = scores.sort(dim=-1, descending=True)
    return scores, top.gather(1, order)
