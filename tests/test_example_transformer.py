"""Each block of examples/transformer.py against the block of hfopt that replaces it, in all dtypes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples import transformer

Pairs = Callable[[torch.dtype], Iterator[tuple[str, Tensor, Tensor]]]
PAIRS = [transformer.attention_pairs, transformer.block_pairs, transformer.stack_pairs]


def run(pairs: Pairs, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    torch.manual_seed(1)
    with torch.inference_mode():
        return [(name, plain.float(), fast.float()) for name, plain, fast in pairs(dtype)]


@pytest.mark.parametrize("pairs", PAIRS)
def test_float32_agrees(pairs: Pairs) -> None:
    for name, plain, fast in run(pairs, torch.float32):
        error = (fast - plain).abs().max() / plain.abs().max()
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", PAIRS)
def test_half_precision_is_as_near_to_float32_as_pytorch(pairs: Pairs, dtype: torch.dtype) -> None:
    for (name, exact, _), (_, plain, fast) in zip(run(pairs, torch.float32), run(pairs, dtype), strict=True):
        assert (fast - exact).norm() <= 1.5 * (plain - exact).norm(), name


@torch.inference_mode()
def test_the_plain_side_is_what_pytorch_has() -> None:
    """Attention, norms and both stacks of the original transformer against torch.nn's own."""
    query, key, value = torch.randn(3, 2, 7, 4, 16)
    seen = transformer.causal_mask(7, 7)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    own = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(transformer.attention(query, key, value, seen), own)
    x, weight, bias = torch.randn(5, 64), torch.randn(64), torch.randn(64)
    own = torch.nn.functional.layer_norm(x, (64,), weight, bias, 1e-5)
    torch.testing.assert_close(transformer.layer_norm(x, weight, bias, 1e-5), own)
    torch.testing.assert_close(
        transformer.rms_norm(x, weight, 1e-6), nn.functional.rms_norm(x, (64,), weight, 1e-6)
    )


def copy_attention(into: nn.MultiheadAttention, plain: transformer.MultiHeadAttention) -> None:
    parts = plain.query, plain.key, plain.value
    assert into.in_proj_weight is not None
    into.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    into.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    into.out_proj.load_state_dict(plain.output.state_dict())


@torch.inference_mode()
def test_the_plain_stacks_are_what_pytorch_has() -> None:
    sizes = 2, transformer.HIDDEN, 8, 8, transformer.INNER
    encoder, decoder = transformer.Encoder(*sizes).eval(), transformer.Decoder(*sizes).eval()
    settings: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    text, answer = torch.randn(3, 12, transformer.HIDDEN), torch.randn(3, 6, transformer.HIDDEN)
    is_padding = ~transformer.padding_mask(transformer.LENGTHS, 12)[:, 0, 0]
    memory = encoder(text, transformer.LENGTHS)
    expected = text + transformer.sinusoidal(12, transformer.HIDDEN)
    for layer in encoder.layers:
        own = nn.TransformerEncoderLayer(transformer.HIDDEN, 8, transformer.INNER, **settings).eval()
        copy_attention(own.self_attn, layer.attention)
        for theirs, ours in zip((own.norm1, own.norm2), layer.norms, strict=True):
            theirs.load_state_dict(ours.state_dict())
        own.linear1.load_state_dict(layer.feed_forward.up.state_dict())
        own.linear2.load_state_dict(layer.feed_forward.down.state_dict())
        expected = own(expected, src_key_padding_mask=is_padding)
    torch.testing.assert_close(memory[~is_padding], expected[~is_padding], rtol=1e-5, atol=1e-5)
    expected = answer + transformer.sinusoidal(6, transformer.HIDDEN)
    for layer in decoder.layers:
        other = nn.TransformerDecoderLayer(transformer.HIDDEN, 8, transformer.INNER, **settings).eval()
        copy_attention(other.self_attn, layer.attention)
        copy_attention(other.multihead_attn, layer.cross)
        for theirs, ours in zip((other.norm1, other.norm2, other.norm3), layer.norms, strict=True):
            theirs.load_state_dict(ours.state_dict())
        other.linear1.load_state_dict(layer.feed_forward.up.state_dict())
        other.linear2.load_state_dict(layer.feed_forward.down.state_dict())
        unseen = ~transformer.causal_mask(6, 6)
        expected = other(expected, memory, tgt_mask=unseen, memory_key_padding_mask=is_padding)
    ours = decoder(answer, memory, transformer.LENGTHS)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    cache = transformer.Cache()
    steps = [decoder(new, memory, transformer.LENGTHS, cache) for new in answer.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), ours, rtol=1e-5, atol=1e-5)


def test_it_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    transformer.main()
    assert len(capsys.readouterr().out.splitlines()) > 40
