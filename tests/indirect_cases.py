"""What users of `indirect_access_kv_cache_attention` do, beside a plain twin in float64 that copies its caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfopt.functional import indirect_access_kv_cache_attention

Heads = tuple[int, int, int]  # of queries, of keys and values, channels of one

TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (1e-3, 1e-3)}


def first_layer_past(n_rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """What a user of ipex.llm begins with."""
    dummy = torch.zeros(1, 1, 1, 1, dtype=dtype)
    return (
        torch.zeros(1, 0, 0, 1, dtype=torch.long),
        dummy,
        dummy,
        torch.zeros(2048, n_rows, dtype=torch.long),
    )


_MOST_SCORES = 1 << 20


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale_attn: float, bias: Tensor | None, causal: bool
) -> Tensor:
    """q [rows, n_new, heads, size]; k, v [rows, n, kv heads, size], the last ones of the new tokens; in float64."""
    q, k, v = (each.double().transpose(1, 2) for each in (q, k, v))
    group, n_new, n_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if q.shape[1] > 1 and q.shape[0] * n_new * n_keys > _MOST_SCORES:
        parts = []  # head by head: the scores of all would take gigabytes
        for head in range(q.shape[1]):
            one, own = slice(head, head + 1), slice(head // group, head // group + 1)
            of_q, of_k, of_v = (each.transpose(1, 2) for each in (q[:, one], k[:, own], v[:, own]))
            of_head = bias if bias is None or bias.shape[1] == 1 else bias[:, one]
            parts.append(attention(of_q, of_k, of_v, scale_attn, of_head, causal))
        return torch.cat(parts, 1)
    # queries of a head of keys are rows of one product: 71 copies of the keys would take most of the time
    scores = q.reshape(*k.shape[:2], -1, q.shape[-1]) @ k.transpose(-1, -2) / scale_attn
    scores = scores.reshape(*q.shape[:3], n_keys)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.double()
    if causal:
        order = torch.ones(n_new, n_keys, dtype=torch.bool).tril(n_keys - n_new)
        scores = scores.masked_fill(~order, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num()  # 0 where nothing is seen
    return (weights.reshape(*v.shape[:2], -1, n_keys) @ v).reshape(*q.shape[:3], v.shape[-1])


class Twins:
    """A layer of ours and of the reference, which get the same tokens and reorders."""

    def __init__(
        self,
        n_rows: int,
        heads: Heads,
        dtype: torch.dtype = torch.float32,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self.n_rows, self.heads, self.dtype = n_rows, heads, dtype
        self.function = function or indirect_access_kv_cache_attention
        self.past = first_layer_past(n_rows, dtype)
        self.keys = self.values = torch.empty(n_rows, 0, *heads[1:], dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(n_rows)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    @property
    def length(self) -> int:
        return self.past[0].size(-2)

    def step(self, n_new: int, n_given: int | None = None, causal: bool = True, **options: Any) -> Tensor:
        """So many tokens more in each of the rows, or of their prompts; compares and returns the result."""
        n_given = n_given or self.n_rows
        n_heads, n_kv_heads, size = self.heads
        q = self.random(n_given, n_new, n_heads, size).to(self.dtype)
        k, v = (self.random(n_given, n_new, n_kv_heads, size).to(self.dtype) for _ in range(2))
        copies = self.n_rows // n_given
        self.keys = torch.cat((self.keys, k.double().repeat_interleave(copies, 0)), 1)
        self.values = torch.cat((self.values, v.double().repeat_interleave(copies, 0)), 1)
        out, weights, self.past = self.function(
            q, k, v, size**0.5, self.past, add_casual_mask=causal, **options
        )
        assert weights is None
        bias = options.get("attention_mask")
        alibi = options.get("alibi")
        if alibi is not None:
            n_keys = self.keys.shape[1]
            if alibi.ndim == 1:
                away = torch.arange(n_keys) - torch.arange(n_keys - n_new, n_keys)[:, None]
                alibi = alibi[:, None, None] * away
            elif alibi.ndim == 3:
                alibi = alibi.unflatten(0, (-1, n_heads))
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
            bias = alibi.double() if bias is None else bias.double() + alibi
        keys, values = self.keys[::copies], self.values[::copies]
        expected = attention(q, keys, values, size**0.5, bias, causal)
        assert out.dtype == self.dtype and out.shape == (n_given, n_heads, n_new, size)
        rtol, atol = TOLERANCES[self.dtype]
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
        return out

    def forget(self, length: int) -> None:
        """Take back the tokens from there on."""
        self.past = (torch.empty(1, length, length, 1, device="meta"), *self.past[1:])
        self.keys, self.values = self.keys[:, :length], self.values[:, :length]

    def reorder(self, rows: Tensor) -> None:
        """What the loop of a user does after a step."""
        self.past[3][self.past[0].size(-2) - 1] = rows
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def random_rows(self, n_beams: int) -> Tensor:
        """Beams that go on with others of their prompt."""
        chosen = torch.randint(n_beams, (self.n_rows,), generator=self.generator)
        return torch.arange(self.n_rows) // n_beams * n_beams + chosen
