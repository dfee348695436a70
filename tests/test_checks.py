"""Tokens that a program checks in one call, against as many steps of the same program, bit by bit."""

from typing import Any

import numpy as np
import pytest
import torch

from hfopt.cache import IndirectCache
from hfopt.errors import InvalidInput
from hfopt.generation import installed
from hfopt.kernels.linear.rows import ROW_LIMIT
from hfopt.program.program import Program
from hfopt.program.run import Run
from tests.generation_cases import FAMILIES, Model, llama, mistral, one_thread
from tests.reference import DTYPES
from tests.speculation_cases import pair
from tests.step_cases import bits, programs_of, proven_family

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

_PAST = 20


def _program(model: Model, kv_cache: str | None = None) -> Program:
    with torch.no_grad():
        program = programs_of(model).of(model, 1, 1, kv_cache)
    assert isinstance(program, Program)
    return program


def _steps(program: Program, cache: Any, tokens: np.ndarray, first: int, mask: np.ndarray) -> torch.Tensor:
    """Logits of steps, [n_rows, n_new, n_logits]; tokens: [n_rows, n_new]."""
    run, logits = program.steps(len(tokens)), []
    for place, column in enumerate(tokens.T):
        appended = cache.append_everywhere(len(tokens), 1, program.layouts)
        positions = np.full(len(tokens), first + place)
        logits.append(run.logits(column.copy(), positions, appended, mask).clone())
    return torch.cat(logits, 1)


def _assert_same(model: Model, program: Program, kv_cache: str | None = None, n_past: int = _PAST) -> None:
    rng = np.random.default_rng(0)
    for n_rows in (1, 3):
        one, other = (
            IndirectCache(model.config.get_text_config(decoder=True), kv_cache=kv_cache) for _ in range(2)
        )
        mask = np.ones((n_rows, n_past + 76), np.uint8)
        if not (program.has_slopes or program.has_ranks):
            mask[-1, :3] = 0
        past = rng.integers(0, 100, (n_rows, n_past))
        for cache in (one, other):
            _steps(program, cache, past, 0, mask)
        length = n_past
        for n_new in (2, 5, 12, 17):
            n_new = min(n_new, program.most_checked(n_rows, length))
            if n_new == 1:
                continue
            tokens = rng.integers(0, 100, (n_rows, n_new))
            expected = _steps(program, one, tokens, length, mask)
            appended = other.append_everywhere(n_rows, n_new, program.layouts)
            assert appended is not None
            checked = program.checks(n_rows, n_new).logits(tokens, np.full(n_rows, length), appended, mask)
            assert torch.equal(bits(expected), bits(checked)), f"{n_new} tokens of {n_rows} rows"
            for theirs, ours in zip(one.layers, other.layers, strict=True):
                assert torch.equal(bits(theirs.keys), bits(ours.keys))
                assert torch.equal(bits(theirs.values), bits(ours.values))
            length += n_new


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_families(name: str, dtype: torch.dtype) -> None:
    model = proven_family(name, dtype)
    _assert_same(model, _program(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 24), (6, 2, 64), (8, 2, 32), (9, 1, 64), (17, 1, 32), (40, 2, 96)])
def test_numbers_of_heads_and_of_keys(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Checks that end in other chunks of keys than they begin, and such of which a span has several."""
    n_heads, n_kv_heads, size = heads
    sizes = {"num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads, "head_dim": size}
    sizes["hidden_size"] = 8 * n_heads
    _, model = pair(llama, **sizes, max_position_embeddings=1 << 14)
    model.to(dtype)
    for n_past in (58, 180, 64 * 128 // n_kv_heads - 6 if heads == (8, 2, 32) else 250):
        _assert_same(model, _program(model), n_past=n_past)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_windows(dtype: torch.dtype) -> None:
    _, model = pair(mistral, sliding_window=9)
    model.to(dtype)
    _assert_same(model, _program(model), n_past=30)
    _assert_same(model, _program(model, "int8"), "int8", n_past=30)


def test_as_many_as_have_the_bits_of_steps() -> None:
    program = _program(proven_family("llama"))
    assert program.most_checked(1, 5) == ROW_LIMIT and program.most_checked(9, 5) == ROW_LIMIT // 9
    assert program.most_checked(2 * ROW_LIMIT, 5) == 1
    angles = _program(proven_family("phi4_mini")) if "phi4_mini" in FAMILIES else None
    if angles is not None:
        (last, *_) = angles.breaks.lengths
        assert angles.most_checked(1, last - 3) == 3


def test_bad_input() -> None:
    _, model = pair(llama)
    program = _program(model)
    assert installed(model).programs is not None
    cache = IndirectCache(model.config)
    run = program.checks(2, 3)
    positions = np.zeros(2, np.int64)

    def call(tokens: Any, positions: Any = positions, n_new: int = 3, run: Run = run) -> None:
        appended = cache.append_everywhere(2, n_new, program.layouts)
        assert appended is not None
        try:
            run.logits(tokens, positions, appended)
        finally:
            cache.crop(-n_new)

    good = np.zeros((2, 3), np.int64)
    call(good)
    for tokens in (good[:, :2], good[:1], good.astype(np.int32), good[:, 0]):
        with pytest.raises(InvalidInput, match="tokens is"):
            call(tokens)
    with pytest.raises(InvalidInput, match="positions is"):
        call(good, np.zeros((2, 3), np.int64))
    with pytest.raises(InvalidInput, match="appended has 2 tokens: 3 are needed"):
        call(good[:, :2], n_new=2)
    with pytest.raises(InvalidInput, match="of a prompt"):
        call(good, run=Run(program, 2, 3))
    for bad in (-1, 10**6):
        with pytest.raises(InvalidInput, match="no such rows"):
            call(np.array([[0, 0, bad], [0, 0, 0]]))
    with pytest.raises(InvalidInput, match="scratch is for 3 tokens"):
        run.choose(np.zeros(2, np.int64), positions, cache.append_everywhere(2, 1, program.layouts))  # type: ignore[arg-type]
