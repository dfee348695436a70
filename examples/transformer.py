"""The blocks of the transformer: each in plain PyTorch, and beside it the block of hfopt that replaces it.

Read it from top to bottom; `python examples/transformer.py` runs every pair and prints how far its two sides are apart.

Sections are those of Vaswani et al., "Attention Is All You Need" (https://arxiv.org/abs/1706.03762), unless another paper is
named. Tensors are [batch, tokens, heads, head_dim], or [batch, tokens, hidden] between the blocks. A mask is True where a
query may look. What hfopt has is for inference: no gradients.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfopt.functional import rotary_embedding, varlen_attention
from hfopt.modules import (
    FastLayerNorm,
    IndirectAccessKVCacheAttention,
    Linear2SiluMul,
    LinearAdd,
    LinearRelu,
    PagedAttention,
    RMSNorm,
)

# ── Attention ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / √head_dim) V in every head (3.2.1), over the keys that are `seen` [.., queries, keys].

    As many heads of keys as of queries is multi-head attention. One head of keys for all is multi-query attention (Shazeer,
    https://arxiv.org/abs/1911.02150); one for each group of heads is grouped-query attention (Ainslie et al.,
    https://arxiv.org/abs/2305.13245). Both read less memory in each step of generation.
    """
    group = query.size(2) // key.size(2)
    key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.size(-1))
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_queries: Tensor,
    n_keys: Tensor,
    causal: bool,
    window: int | None,
) -> Tensor:
    """The same without padding: [tokens of all rows, heads, head_dim]; `n_queries` and `n_keys` are those of each row."""
    starts_q, starts_k = (F.pad(n.cumsum(0), (1, 0)).int() for n in (n_queries, n_keys))
    out = torch.empty_like(query)
    longest = int(n_queries.max()), int(n_keys.max())
    scale = query.size(-1) ** -0.5
    left = (
        -1 if window is None else window - 1
    )  # the keys before its own that a query sees; -1 is all of them
    varlen_attention(
        *(query, key, value, out, starts_q, starts_k, None, *longest, 0.0, scale),
        *(False, causal, False, None),
        window_size_left=left,
    )
    return out


# ── Masks ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def padding_mask(lengths: Tensor, n_keys: int) -> Tensor:
    """[batch, 1, 1, keys]: the first `lengths` keys of each row are text, what follows is padding."""
    return (torch.arange(n_keys) < lengths[:, None])[:, None, None, :]


def causal_mask(n_queries: int, n_keys: int, window: int | None = None) -> Tensor:
    """[queries, keys]: the last queries of a text see what stands before them and themselves (3.2.3).

    With a `window`, only so many of the newest: sliding-window attention (Beltagy et al., https://arxiv.org/abs/2004.05150).
    """
    query = torch.arange(n_keys - n_queries, n_keys)[:, None]
    key = torch.arange(n_keys)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def additive(seen: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """The mask as IndirectAccessKVCacheAttention takes it, [batch, 1, queries, keys]: what is added to the scores."""
    zero = torch.zeros(n_rows, 1, *seen.shape[-2:], dtype=dtype)
    return zero.masked_fill(~seen, torch.finfo(dtype).min)


# ── Positions ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def sinusoidal(n_tokens: int, hidden: int) -> Tensor:
    """[tokens, hidden]: sin(p / 10000^(2i / hidden)) in channel 2i, cos of the same in channel 2i + 1 (3.5).

    A table that is added to embeddings: there is nothing to replace.
    """
    angle = torch.arange(n_tokens)[:, None] / 10000 ** (torch.arange(0, hidden, 2) / hidden)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def rotary_angles(n_tokens: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """[tokens, head_dim / 2]: position p turns pair i of channels by p · base^(-2i / head_dim)."""
    return torch.arange(n_tokens)[:, None] * base ** (-torch.arange(0, head_dim, 2) / head_dim)


def rotary(x: Tensor, angle: Tensor, halves: bool) -> Tensor:
    """(a, b) → (a cos − b sin, b cos + a sin) for each pair of channels: q · k depends on the distance of two tokens.

    Su et al., https://arxiv.org/abs/2104.09864, pair neighbours (GPT-J); Llama pairs channel i with i + head_dim / 2.
    """
    sin, cos = angle.sin()[:, None].to(x.dtype), angle.cos()[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1) if halves else (x[..., ::2], x[..., 1::2])
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.cat(turned, dim=-1) if halves else torch.stack(turned, dim=-1).flatten(-2)


# ── Norms and feed-forward blocks ───────────────────────────────────────────────────────────────────────────────────────


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias (Ba et al., https://arxiv.org/abs/1607.06450); FastLayerNorm."""
    centred = x.float() - x.float().mean(dim=-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (scaled * weight + bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² + eps) · weight (Zhang and Sennrich, https://arxiv.org/abs/1910.07467); RMSNorm."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


class FeedForward(nn.Module):
    """relu(x W₁ + b₁) W₂ + b₂ (3.3)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class FastFeedForward(nn.Module):
    """x + FeedForward(x): the activation and the residual are done while the products are at hand."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.up, self.down = LinearRelu(plain.up), LinearAdd(plain.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x), x)


class GatedFeedForward(nn.Module):
    """(silu(x W_gate) · x W_up) W_down: SwiGLU (Shazeer, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FastGatedFeedForward(nn.Module):
    """x + GatedFeedForward(x): both projections of x in one call."""

    def __init__(self, plain: GatedFeedForward) -> None:
        super().__init__()
        self.gated, self.down = Linear2SiluMul(plain.gate, plain.up), LinearAdd(plain.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gated(x), x)


# ── Multi-head attention and its cache ──────────────────────────────────────────────────────────────────────────────────


class Cache:
    """Keys and values of all tokens so far: a step of generation computes those of its new tokens alone."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            old_key, old_value = self.layers[layer]
            self.layers[layer] = torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1)
        return self.layers[layer]

    def reorder(self, beam_idx: Tensor) -> None:
        """Beams go on from other beams: all that they have read is copied."""
        self.layers = [(key[beam_idx], value[beam_idx]) for key, value in self.layers]


def empty_past(n_rows: int, dtype: torch.dtype) -> list[Tensor]:
    """What IndirectAccessKVCacheAttention begins with; it returns what the next step is to bring.

    [0] has the length of the text as its last size but one, [1] and [2] hold keys and values, and [3] says for every token
    and row which row wrote it: to reorder beams is one line of [3], and nothing is copied.
    """
    return [torch.zeros(1, 0, 0, 1, dtype=torch.long), *torch.zeros(2, 1, 1, 1, 1, dtype=dtype),
            torch.zeros(1, n_rows, dtype=torch.long)]  # fmt: skip


class MultiHeadAttention(nn.Module):
    """Concat(head₁ … head_h) W_O, headᵢ = Attention(x W_Q, source W_K, source W_V) (3.2.2).

    The source is x itself, or in cross attention what the encoder says.
    """

    def __init__(self, hidden: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // n_heads
        self.query, self.output = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.key, self.value = (nn.Linear(hidden, n_kv_heads * self.head_dim) for _ in range(2))

    def heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.head_dim))

    def forward(
        self, x: Tensor, source: Tensor, seen: Tensor, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        query, key, value = (
            self.heads(self.query, x),
            self.heads(self.key, source),
            self.heads(self.value, source),
        )
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return self.output(attention(query, key, value, seen).flatten(-2))


# ── Encoder ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block; after each, what went in is added and normalised (3.1)."""

    def __init__(self, hidden: int, n_heads: int, n_kv_heads: int, inner: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(hidden, n_heads, n_kv_heads)
        self.feed_forward = FeedForward(hidden, inner)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.norms[0](x + self.attention(x, x, seen))
        return self.norms[1](x + self.feed_forward(x))


class Encoder(nn.Module):
    """Layers over embeddings that know their positions; `lengths` are the tokens of each row before its padding."""

    def __init__(self, n_layers: int, hidden: int, n_heads: int, n_kv_heads: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(hidden, n_heads, n_kv_heads, inner) for _ in range(n_layers))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x + sinusoidal(*x.shape[1:]).to(x.dtype)
        seen = padding_mask(lengths, x.size(1))
        for layer in self.layers:
            x = layer(x, seen)
        return x


def fast_norm(norm: nn.LayerNorm) -> FastLayerNorm:
    return FastLayerNorm(norm.normalized_shape, norm.eps, norm.weight, norm.bias)


class FastEncoder(nn.Module):
    """The same layers on the tokens of all rows in one matrix, [tokens, hidden]: no work for padding."""

    def __init__(self, plain: Encoder) -> None:
        super().__init__()
        self.plain = plain
        self.outputs = nn.ModuleList(LinearAdd(layer.attention.output) for layer in plain.layers)
        self.feed_forwards = nn.ModuleList(FastFeedForward(layer.feed_forward) for layer in plain.layers)
        self.norms = nn.ModuleList(nn.ModuleList(map(fast_norm, layer.norms)) for layer in plain.layers)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        is_text = padding_mask(lengths, x.size(1))[:, 0, 0]
        x = (x + sinusoidal(*x.shape[1:]).to(x.dtype))[is_text]
        parts = zip(self.plain.layers, self.outputs, self.feed_forwards, self.norms, strict=True)
        for layer, output, feed_forward, (first, second) in parts:
            own = layer.attention
            query, key, value = (own.heads(linear, x) for linear in (own.query, own.key, own.value))
            attended = packed_attention(query, key, value, lengths, lengths, causal=False, window=None)
            x = first(output(attended.flatten(-2), x))
            x = second(feed_forward(x))
        return x


# ── Decoder ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class DecoderLayer(nn.Module):
    """An encoder's layer whose tokens see only what stands before them, with cross attention in between (3.1)."""

    def __init__(self, hidden: int, n_heads: int, n_kv_heads: int, inner: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(hidden, n_heads, n_kv_heads)
        self.cross = MultiHeadAttention(hidden, n_heads, n_kv_heads)
        self.feed_forward = FeedForward(hidden, inner)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))


class Decoder(nn.Module):
    """Layers over the tokens of the answer; `memory` is what the encoder said, `lengths` are its tokens in each row.

    With a cache, x is only what the cache does not hold yet. `window` makes its self-attention a sliding window.
    """

    def __init__(self, n_layers: int, hidden: int, n_heads: int, n_kv_heads: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(hidden, n_heads, n_kv_heads, inner) for _ in range(n_layers))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        lengths: Tensor,
        cache: Cache | None = None,
        window: int | None = None,
    ) -> Tensor:
        n_past = cache.layers[0][0].size(1) if cache is not None and cache.layers else 0
        n_all = n_past + x.size(1)
        x = x + sinusoidal(n_all, x.size(2))[n_past:].to(x.dtype)
        seen, seen_of_memory = causal_mask(x.size(1), n_all, window), padding_mask(lengths, memory.size(1))
        for i, layer in enumerate(self.layers):
            x = layer.norms[0](x + layer.attention(x, x, seen, cache, i))
            x = layer.norms[1](x + layer.cross(x, memory, seen_of_memory))
            x = layer.norms[2](x + layer.feed_forward(x))
        return x


class FastDecoderLayer(nn.Module):
    """The layer with a cache that rows share, and with the memory's keys and values computed once."""

    def __init__(self, plain: DecoderLayer) -> None:
        super().__init__()
        self.plain = plain
        self.attend = IndirectAccessKVCacheAttention()
        self.output, self.cross_output = LinearAdd(plain.attention.output), LinearAdd(plain.cross.output)
        self.feed_forward = FastFeedForward(plain.feed_forward)
        self.norms = nn.ModuleList(map(fast_norm, plain.norms))

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor], lengths: Tensor, mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        own, cross = self.plain.attention, self.plain.cross
        query, key, value = (own.heads(linear, x) for linear in (own.query, own.key, own.value))
        divisor = math.sqrt(own.head_dim)
        attended, _, past = self.attend(query, key, value, divisor, layer_past=past, attention_mask=mask)
        x = self.norms[0](self.output(attended.transpose(1, 2).flatten(-2), x))
        query = cross.heads(cross.query, x)
        n_queries = torch.full_like(lengths, x.size(1))
        attended = packed_attention(
            query.flatten(0, 1), *memory, n_queries, lengths, causal=False, window=None
        )
        x = self.norms[1](self.cross_output(attended.view_as(query).flatten(-2), x))
        return self.norms[2](self.feed_forward(x)), past


class FastDecoder(nn.Module):
    """`memory` is what FastEncoder returns. `start` begins an answer; each call goes on with it."""

    def __init__(self, plain: Decoder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FastDecoderLayer(layer) for layer in plain.layers)

    def start(self, memory: Tensor, lengths: Tensor) -> None:
        crosses = [layer.plain.cross for layer in self.layers]
        self.memory = [
            (cross.heads(cross.key, memory), cross.heads(cross.value, memory)) for cross in crosses
        ]
        self.lengths = lengths
        self.past = [empty_past(len(lengths), memory.dtype) for _ in self.layers]

    def forward(self, x: Tensor, window: int | None = None) -> Tensor:
        n_past = self.past[0][0].size(-2)
        n_all = n_past + x.size(1)
        x = x + sinusoidal(n_all, x.size(2))[n_past:].to(x.dtype)
        mask = additive(causal_mask(x.size(1), n_all, window), len(x), x.dtype)
        for i, layer in enumerate(self.layers):
            x, self.past[i] = layer(x, self.memory[i], self.lengths, mask, self.past[i])
        return x

    def reorder(self, beam_idx: Tensor) -> None:
        for past in self.past:
            past[3][past[0].size(-2) - 1] = beam_idx


# ── All pairs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HEADS = {"multi-head": 8, "grouped-query": 2, "multi-query": 1}
HIDDEN, N_HEADS, HEAD_DIM, INNER = 64, 8, 8, 256
N_TOKENS, LENGTHS = 12, torch.tensor([12, 7, 1])


def paged_step(query: Tensor, key: Tensor, value: Tensor, block_size: int = 16) -> Tensor:
    """The last token of each row over a cache of blocks, as servers keep it (Kwon et al., https://arxiv.org/abs/2309.06180).

    Row i may use blocks 2i and 2i + 1: the table says which, and a token's slot is its block and its place in that block.
    """
    n_rows, n_tokens, n_kv_heads, head_dim = key.shape
    caches = torch.zeros(2, 2 * n_rows, n_kv_heads, block_size, head_dim, dtype=key.dtype)
    tables = torch.arange(2 * n_rows, dtype=torch.int32).view(n_rows, 2)
    slots = (tables[:, :1] * block_size + torch.arange(n_tokens)).flatten().int()
    PagedAttention.reshape_and_cache(key.flatten(0, 1), value.flatten(0, 1), *caches, slots)
    n_heads = query.size(2)
    head_of = torch.arange(n_heads, dtype=torch.int32) // (n_heads // n_kv_heads)
    out = torch.empty_like(query[:, -1])
    lengths = torch.full((n_rows,), n_tokens, dtype=torch.int32)
    PagedAttention.single_query_cached_kv_attention(
        out, query[:, -1], *caches, head_of, head_dim**-0.5, tables, lengths, block_size, n_tokens, None
    )
    return out


def stack(cls: type[nn.Module], n_kv_heads: int, dtype: torch.dtype) -> nn.Module:
    return cls(2, HIDDEN, N_HEADS, n_kv_heads, INNER).to(dtype).eval()


def attention_pairs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    is_text = padding_mask(LENGTHS, N_TOKENS)[:, 0, 0]
    for name, n_kv_heads in HEADS.items():
        query = torch.randn(3, N_TOKENS, N_HEADS, HEAD_DIM).to(dtype)
        key, value = torch.randn(2, 3, N_TOKENS, n_kv_heads, HEAD_DIM).to(dtype)
        packed = query[is_text], key[is_text], value[is_text], LENGTHS, LENGTHS
        padding = padding_mask(LENGTHS, N_TOKENS)
        for kind, causal, window in (("", False, None), (", causal", True, None), (", window of 4", True, 4)):
            seen = padding & causal_mask(N_TOKENS, N_TOKENS, window) if causal else padding
            expected = attention(query, key, value, seen)[is_text]
            yield f"{name} attention{kind}", expected, packed_attention(*packed, causal, window)
        last = attention(query[:, -1:], key, value)[:, 0]
        yield f"{name} attention, cache of blocks", last, paged_step(query, key, value)


def block_pairs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    x = torch.randn(3, N_TOKENS, HIDDEN).to(dtype)
    weight, bias = torch.randn(2, HIDDEN).to(dtype)
    yield "layer norm", layer_norm(x, weight, bias, 1e-5), FastLayerNorm((HIDDEN,), 1e-5, weight, bias)(x)
    yield "RMS norm", rms_norm(x, weight, 1e-6), RMSNorm(HIDDEN, 1e-6, weight)(x)
    plain = FeedForward(HIDDEN, INNER).to(dtype)
    yield "feed-forward block", x + plain(x), FastFeedForward(plain)(x)
    gated = GatedFeedForward(HIDDEN, INNER).to(dtype)
    yield "gated feed-forward block", x + gated(x), FastGatedFeedForward(gated)(x)
    angle = rotary_angles(N_TOKENS, HEAD_DIM)
    for halves in (True, False):
        query, key = torch.randn(2, 3, N_TOKENS, N_HEADS, HEAD_DIM).to(dtype)
        expected = rotary(torch.cat([query, key], dim=-2), angle, halves)
        rotary_embedding(
            query, key, angle.sin(), angle.cos(), HEAD_DIM, halves, torch.arange(N_TOKENS).expand(3, -1)
        )
        yield (
            f"rotary positions, {'halves' if halves else 'neighbours'}",
            expected,
            torch.cat([query, key], dim=-2),
        )


def stack_pairs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """An answer is begun with 5 tokens, goes on with 3, then token by token, while beams change places."""
    text, answer = (torch.randn(3, n_tokens, HIDDEN).to(dtype) for n_tokens in (N_TOKENS, 10))
    is_text = padding_mask(LENGTHS, N_TOKENS)[:, 0, 0]
    for name, n_kv_heads in HEADS.items():
        encoder, decoder = stack(Encoder, n_kv_heads, dtype), stack(Decoder, n_kv_heads, dtype)
        memory, fast_memory = encoder(text, LENGTHS), FastEncoder(encoder)(text, LENGTHS)
        yield f"{name} encoder", memory[is_text], fast_memory
        for window in (None, 4):
            cache, fast = Cache(), FastDecoder(decoder)
            fast.start(memory[is_text], LENGTHS)
            for new in answer.split([5, 3, 1, 1], dim=1):
                # beams of one prompt change places; here each row has a prompt of its own, whose memory stays
                expected = decoder(new, memory, LENGTHS, cache, window)
                kind = "" if window is None else f", window of {window}"
                yield f"{name} decoder{kind}, {new.size(1)} new tokens", expected, fast(new, window)
                cache.reorder(torch.tensor([1, 1, 0]))
                fast.reorder(torch.tensor([1, 1, 0]))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    for pairs in (attention_pairs, block_pairs, stack_pairs):
        for name, plain, fast in pairs(torch.float32):
            torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
            print(f"{name:50} largest difference {(fast - plain).abs().max():.1e}")


if __name__ == "__main__":
    main()
