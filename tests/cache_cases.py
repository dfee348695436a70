"""Two caches that are given the same, and operations on both."""

import copy
import inspect
import pickle
import random
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 24
# for whose mask sizes are asked: three new tokens, or with transformers 4 their positions
_IS_BY_POSITION = "cache_position" in inspect.signature(DynamicLayer.get_mask_sizes).parameters
ASKED: Any = torch.arange(3) if _IS_BY_POSITION else 3


def random_states(
    n_rows: int, n_new: int, dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM
) -> Tensor:
    return torch.randn(n_rows, N_HEADS, n_new, head_dim).to(dtype)


class Pair:
    """A cache of ours and one of transformers'. Untyped, as transformers says that layers may be anything."""

    def __init__(self, ours: Any, theirs: Any, dtype: torch.dtype) -> None:
        self.ours, self.theirs, self.dtype = ours, theirs, dtype

    @property
    def n_rows(self) -> int:
        return self.theirs.layers[0].keys.shape[0]

    def update(self, n_rows: int, n_new: int, layers: range = range(N_LAYERS)) -> None:
        for layer_idx in layers:
            keys, values = random_states(n_rows, n_new, self.dtype), random_states(n_rows, n_new, self.dtype)
            for mine, his in zip(
                self.ours.update(keys, values, layer_idx),
                self.theirs.update(keys, values, layer_idx),
                strict=True,
            ):
                assert torch.equal(mine, his)

    def both(self, method: str, argument: Any) -> None:
        getattr(self.ours, method)(argument)
        getattr(self.theirs, method)(argument)

    def reset(self) -> None:
        self.ours.reset()
        self.theirs.reset()

    def check(self) -> None:
        assert len(self.ours) == len(self.theirs)
        for layer_idx, (mine, his) in enumerate(zip(self.ours.layers, self.theirs.layers, strict=True)):
            assert self.ours.get_seq_length(layer_idx) == self.theirs.get_seq_length(layer_idx)
            assert self.ours.get_mask_sizes(ASKED, layer_idx) == self.theirs.get_mask_sizes(ASKED, layer_idx)
            assert mine.is_initialized == his.is_initialized
            if his.keys is not None:
                assert mine.dtype == his.keys.dtype
                assert mine.keys.dtype == his.keys.dtype
                assert torch.equal(mine.keys, his.keys)
                assert torch.equal(mine.values, his.values)


def operate(pair: Pair, chance: random.Random, operation: str) -> None:
    """Something random of a kind."""
    n_rows, length = pair.n_rows, pair.theirs.get_seq_length()
    if operation in ("update", "append"):
        getattr(pair, operation)(n_rows, chance.choice([1, 1, 1, 2, 5, 40, 70]))
    elif operation == "reorder":
        pair.both("reorder_cache", torch.tensor([chance.randrange(n_rows) for _ in range(n_rows)]))
    elif operation == "repeat":
        if n_rows <= 4:
            pair.both("batch_repeat_interleave", chance.randint(1, 3))
    elif operation == "select":
        chosen = [chance.randrange(-n_rows, n_rows) for _ in range(chance.randint(1, n_rows))]
        pair.both("batch_select_indices", torch.tensor(chosen))
    elif operation == "crop":
        if length > 1:  # transformers 4 takes 0 for a length
            pair.both("crop", -chance.randint(1, min(length - 1, 12)))
    elif operation == "reset":
        if chance.random() < 0.2:
            pair.reset()
            pair.check()
            pair.update(chance.randint(1, 4), chance.randint(1, 10))
    elif operation == "copy":
        pair.ours = copy.deepcopy(pair.ours)
    else:
        assert operation == "pickle"
        pair.ours = pickle.loads(pickle.dumps(pair.ours))
    pair.check()
