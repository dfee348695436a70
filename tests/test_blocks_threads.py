"""Several threads use one instance of a block at once: each gets what it would get alone."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

from hfopt.modules import (
    FastLayerNorm,
    GatedMLPMOE,
    IndirectAccessKVCacheAttention,
    Linear2SiluMul,
    LinearAdd,
    LinearSiluMul,
    RMSNorm,
    RotaryEmbedding,
)

N_THREADS, N_CALLS = 6, 8
HIDDEN = 64

Call = Callable[[int], Tensor]  # the number of tokens, from which all else follows


def drawn(n_tokens: int, *sizes: int) -> Tensor:
    return torch.randn(1, n_tokens, *sizes, generator=torch.Generator().manual_seed(n_tokens))


def of_linear() -> Call:
    """One block after the other, all of them on one Linear."""
    linear, other = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    gated, add, mul = Linear2SiluMul(linear, other), LinearAdd(linear), LinearSiluMul(other)

    def call(n_tokens: int) -> Tensor:
        x = drawn(n_tokens, HIDDEN)
        return mul(add(gated(x), x), x)

    return call


def of_norms() -> Call:
    rms, layer = RMSNorm(HIDDEN), FastLayerNorm(HIDDEN, 1e-5, torch.randn(HIDDEN))
    return lambda n_tokens: layer(rms(drawn(n_tokens, HIDDEN)) + 1)


def of_experts() -> Call:
    moe = GatedMLPMOE(torch.randn(4, 2 * 32, HIDDEN) / 8, torch.randn(4, HIDDEN, 32) / 8)
    return lambda n_tokens: moe(drawn(n_tokens, HIDDEN)[0], False, 2, drawn(n_tokens, 4)[0], True)


def of_rotations(kind: dict[str, object]) -> Callable[[], Call]:
    """Positions are so far apart that tables grow, and lengths such that each call has frequencies of its own."""

    def make() -> Call:
        rope = RotaryEmbedding(512, 32, extra_rope_config=kind)

        def call(n_tokens: int) -> Tensor:
            positions = torch.arange(n_tokens) + n_tokens * (n_tokens % 7) * 4
            return rope(drawn(n_tokens, 4, 32), positions, 4, 32, 16, 32)

        return call

    return make


def of_past() -> Call:
    """Each call is a text of its own: a prompt, beams, and some steps."""
    attend = IndirectAccessKVCacheAttention()

    def call(n_tokens: int) -> Tensor:
        zeros = torch.zeros(1, 1, 1, 1)
        past = (torch.zeros(1, 0, 0, 1), zeros, zeros, torch.zeros(1, 3, dtype=torch.long))
        x = drawn(n_tokens, 2, 32)
        outs = []
        for step in range(4):
            out, _, past = attend(x, x, x, 5.0, past)
            past[3][past[0].size(-2) - 1] = torch.tensor([step % 3, 1, 0])
            outs.append(out.flatten())
            x = torch.cat([drawn(n_tokens + 100 * step + row, 2, 32)[:, :1] for row in range(3)])
        return torch.cat(outs)

    return call


MAKE: dict[str, Callable[[], Call]] = {
    "linear": of_linear,
    "norms": of_norms,
    "experts": of_experts,
    "rotations, a table": of_rotations({"rope_type": "linear", "factor": 8.0}),
    "rotations, of each length": of_rotations({"rope_type": "dynamic", "factor": 8.0}),
    "past": of_past,
}


@pytest.mark.parametrize("name", MAKE)
def test_threads_share_a_block(name: str) -> None:
    numbers = [[1 + 5 * thread + 7 * call for call in range(N_CALLS)] for thread in range(N_THREADS)]
    torch.manual_seed(0)
    together = MAKE[name]()
    torch.manual_seed(0)
    alone = MAKE[name]()
    start = Barrier(N_THREADS)

    def run(mine: list[int]) -> list[Tensor]:
        start.wait()
        with torch.inference_mode():
            return [together(number) for number in mine]

    with ThreadPoolExecutor(N_THREADS) as pool:
        results = list(pool.map(run, numbers))  # the first calls of this instance are these
    with torch.inference_mode():
        for mine, given in zip(numbers, results, strict=True):
            for number, result in zip(mine, given, strict=True):
                torch.testing.assert_close(
                    result, alone(number), rtol=1e-5, atol=1e-5, msg=f"{number} tokens"
                )
