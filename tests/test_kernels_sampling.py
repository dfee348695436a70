"""Argmax, and log-softmax with top-k over beams, against torch; the self-test."""

import numpy as np
import pytest
import torch

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional.sampling import argmax_allowed
from hfopt.kernels import sampling, selftest
from tests.reference import DTYPES, Guarded, assert_same_on_threads, like

# below, at and above four vectors and a block of logits
SIZES = (1, 7, 41, 63, 64, 65, 1023, 1024, 1025, 2048, 50257)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_argmax(dtype: torch.dtype, size: int) -> None:
    logits = torch.randn(5, size).to(dtype)  # with equals in bfloat16
    assert torch.equal(functional.argmax(logits), logits.double().argmax(-1))
    assert torch.equal(functional.argmax(logits[2]), logits[2].double().argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_of_what_is_allowed(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for size, n_words in ((1000, 40), (3000, 94), (3000, 20), (5, 1)):
        logits = torch.randn(6, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        logits[1, size // 2] = torch.nan
        flags = rng.random((6, n_words, 32)) < 0.3
        flags[2], flags[3] = False, True
        bits = np.packbits(flags.reshape(6, -1), axis=1, bitorder="little").view(np.int32)
        allowed = np.zeros((6, size), bool)
        allowed[:, : 32 * n_words] = flags.reshape(6, -1)[:, :size]
        logits[4, allowed[4]] = -torch.inf
        limited = torch.where(torch.from_numpy(allowed) | logits.isnan(), logits.double(), -torch.inf)
        expected = limited.argmax(-1).numpy()
        expected[~(allowed.any(1) | logits.isnan().any(1).numpy())] = -1
        assert argmax_allowed(logits, bits).tolist() == expected.tolist()
    for bad in (bits[:2], bits.astype(np.int64), bits[:, :0], bits[0], np.asfortranarray(np.tile(bits, 2))):
        with pytest.raises(InvalidInput, match="bits is"):
            argmax_allowed(logits, bad)
    with pytest.raises(InvalidInput, match="logits has shape"):
        argmax_allowed(logits[0], bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_of_values_that_are_not_finite(dtype: torch.dtype) -> None:
    logits = torch.full((5, 3000), -torch.inf, dtype=dtype)
    logits[1, 100], logits[1, 2500] = torch.inf, torch.nan
    logits[2, 7] = logits[2, 2000] = 1.0
    logits[3, 2100] = logits[3, 2600] = torch.nan
    logits[4, 2999] = torch.inf
    assert functional.argmax(logits).tolist() == [0, 2500, 7, 2100, 2999]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "n_beams"), ((1, 1), (3, 1), (2, 4)))
@pytest.mark.parametrize(
    ("size", "k"),
    # and as many blocks as candidates, one less and one more
    ((7, 7), (41, 8), (1023, 3), (1024, 3), (1025, 3), (2048, 3), (3072, 3), (3073, 3), (50257, 8)),
)
def test_log_softmax_top_k(dtype: torch.dtype, groups: int, n_beams: int, size: int, k: int) -> None:
    logits = (4 * torch.randn(groups * n_beams, size)).to(dtype)
    running = -5 * torch.rand(groups * n_beams)
    scores, places = functional.log_softmax_top_k(logits, running, k, n_beams)
    exact = (torch.log_softmax(logits.double(), -1) + running.double()[:, None]).view(groups, -1)
    torch.testing.assert_close(scores.double(), exact.topk(k).values, rtol=0, atol=4e-6)
    # each place holds its score, there are no two of the same, and equals come in order
    torch.testing.assert_close(scores.double(), exact.gather(1, places), rtol=0, atol=4e-6)
    assert all(len(set(row.tolist())) == k for row in places)
    falling = scores[:, 1:] < scores[:, :-1]
    assert (falling | ((scores[:, 1:] == scores[:, :-1]) & (places[:, 1:] > places[:, :-1]))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_scores_the_first_ones_win(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 2500, dtype=dtype)
    _, places = functional.log_softmax_top_k(logits, torch.zeros(4), 5, 2)
    assert places.tolist() == [[0, 1, 2, 3, 4]] * 2
    logits[:, 1100] = 1.0
    _, places = functional.log_softmax_top_k(logits, torch.zeros(4), 4, 2)
    assert places.tolist() == [[1100, 3600, 0, 1]] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_in_many_blocks_come_in_order(dtype: torch.dtype) -> None:
    logits = torch.randint(3, (4, 20000)).to(dtype)
    logits[:, ::7] = 4.0
    logits[2, 5000:5003] = logits[3, 19999] = 5.0
    running = torch.tensor([0.0, 1.0, 0.0, -3.0])
    for k in (1, 8, 25):
        scores, places = functional.log_softmax_top_k(logits, running, k, 2)
        everything, _ = functional.log_softmax_top_k(logits, running, 2 * 20000, 2)
        assert torch.equal(scores, everything[:, :k])
        exact = torch.log_softmax(logits.double(), -1) + running.double()[:, None]
        assert torch.equal(places, exact.view(2, -1).argsort(descending=True, stable=True)[:, :k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_of_a_small_vocabulary(dtype: torch.dtype) -> None:
    logits, running = torch.randn(2, 5).to(dtype), torch.randn(2)
    scores, places = functional.log_softmax_top_k(logits, running, 10, 2)
    assert sorted(places[0].tolist()) == list(range(10))
    assert scores.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (2600, 9000))  # as many blocks as candidates, and more
def test_scores_that_are_not_finite(dtype: torch.dtype, size: int) -> None:
    logits = torch.full((4, size), -torch.inf, dtype=dtype)
    logits[0, 2500] = 1.0  # a logits processor has left one token
    logits[1, 7] = torch.nan
    logits[2, 8] = torch.inf
    scores, places = functional.log_softmax_top_k(logits, torch.zeros(4), 3)
    assert scores[0].tolist() == [0.0, -torch.inf, -torch.inf]
    assert places[0].tolist() == [2500, 0, 1]
    assert scores[1:].isnan().all()  # as torch.log_softmax: one NaN or inf, or nothing but -inf, spoils a row
    assert places[1:].tolist() == [[0, 1, 2]] * 3

    running = torch.tensor([-torch.inf, 0.0])  # a beam that does not exist yet
    logits = torch.randn(2, size).to(dtype)
    _, places = functional.log_softmax_top_k(logits, running, 3, 2)
    assert (places >= size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    logits, running = torch.randn(8, 50257).to(dtype), torch.randn(8)
    assert_same_on_threads(lambda: functional.log_softmax_top_k(logits, running, 8, 4)[0])
    assert_same_on_threads(lambda: functional.log_softmax_top_k(logits, running, 8, 4)[1])
    assert_same_on_threads(lambda: functional.argmax(logits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_outside(dtype: torch.dtype) -> None:
    logits, running = torch.randn(4, 41).to(dtype), torch.zeros(4)
    scores, places, best = Guarded(torch.float32, 2, 9), Guarded(torch.int64, 2, 9), Guarded(torch.int64, 4)
    rows = (like(dtype), logits.data_ptr(), 4, 41)
    lists = (scores.tensor.data_ptr(), places.tensor.data_ptr())
    sampling.log_softmax_top_k(*rows, running.data_ptr(), 9, 2, *lists)
    sampling.argmax(*rows, best.tensor.data_ptr())
    for array in (scores, places, best):
        array.check()
    assert torch.equal(best.tensor, logits.double().argmax(-1))
    assert torch.equal(places.tensor, functional.log_softmax_top_k(logits, running, 9, 2)[1])


def test_selftest_passes() -> None:
    results = selftest.run()
    assert results
    assert [result for result in results if not result[1]] == []
