"""The LoRA operations against float64, in every form of their arguments, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.errors import InvalidInput
from tests.pairs import pairs_of
from tests.reference import DTYPES, Guarded, assert_same_on_threads

N_ADAPTERS = 4
# (rows, size, rank): of one and two vectors and their rests, ranks of one piece of columns and of several
SHAPES = ((5, 129, 1), (1, 64, 5), (8, 96, 16), (3, 31, 64), (2, 33, 300))
_TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
}


def assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """By torch's own tolerances, relative to the largest value: sums cancel."""
    scale = max(exact.abs().max().item(), 1e-30)
    torch.testing.assert_close(ours.double() / scale, exact / scale, **_TOLERANCES[dtype])


def mapping(n_rows: int) -> Tensor:
    """An adapter for each row, the same for neighbours here and there, and one row without."""
    indices = torch.arange(n_rows, dtype=torch.int32) // 2 % N_ADAPTERS
    indices[n_rows // 2] = -1 if n_rows > 1 else 0
    return indices


def products(rows: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """float64, 0 in rows without an adapter."""
    chosen = weights.double()[indices.clamp(min=0).long()]
    return torch.einsum("bi,boi->bo", rows.double(), chosen) * (indices >= 0)[:, None]


def strided(tensor: Tensor) -> Tensor:
    """The same values as the left half of wider rows."""
    return torch.cat((tensor, torch.full_like(tensor, torch.nan)), -1)[..., : tensor.shape[-1]]


def crossed(tensor: Tensor) -> Tensor:
    """The same values with the last dimension not contiguous."""
    return tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "strided": strided,
    "crossed": crossed,
}


@pytest.mark.parametrize(
    ("dtype", "wide", "shape", "form"), pairs_of(DTYPES, (True, False), SHAPES, FORMS)
)  # fmt: skip
def test_bgmv_shrink(dtype: torch.dtype, wide: bool, shape: tuple[int, int, int], form: str) -> None:
    n_rows, size, rank = shape
    x, a = torch.randn(n_rows, size).to(dtype), torch.randn(N_ADAPTERS, 1, rank, size).to(dtype)
    out_dtype = torch.float32 if wide else dtype
    out = FORMS[form](torch.full((n_rows, rank + 3), 7.0, dtype=out_dtype))
    indices = mapping(n_rows)
    functional.bgmv_shrink(FORMS[form](x), FORMS[form](a), out, indices, 0.5)
    has_adapter = indices >= 0
    exact = 0.5 * products(x, a[:, 0], indices)
    assert_near(out[has_adapter, :rank], exact[has_adapter], out_dtype)
    assert (out[~has_adapter] == 7).all() and (out[:, rank:] == 7).all()


@pytest.mark.parametrize(
    ("dtype", "wide", "shape", "form", "add"), pairs_of(DTYPES, (True, False), SHAPES, FORMS, (True, False))
)
def test_bgmv_expand(
    dtype: torch.dtype, wide: bool, shape: tuple[int, int, int], form: str, add: bool
) -> None:
    n_rows, size, rank = shape
    v, b = (
        torch.randn(n_rows, rank, dtype=torch.float32 if wide else dtype),
        torch.randn(N_ADAPTERS, size, rank).to(dtype),
    )
    before = torch.randn(n_rows, size).to(dtype)
    out, indices = FORMS[form](before), mapping(n_rows)
    functional.bgmv_expand(FORMS[form](v), FORMS[form](b), out, indices, add)
    has_adapter = indices >= 0
    exact = products(v, b, indices) + (before.double() if add else 0)
    assert_near(out[has_adapter], exact[has_adapter], dtype)
    assert torch.equal(out[~has_adapter], before[~has_adapter])


@pytest.mark.parametrize(
    "weight_dtype", (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))
)
def test_expand_into_another_dtype(weight_dtype: torch.dtype) -> None:
    v, b = torch.randn(3, 8), torch.randn(N_ADAPTERS, 41, 8).to(weight_dtype)
    out, indices = torch.randn(3, 41), mapping(3)
    exact = products(v, b, indices) + out.double()
    functional.bgmv_expand(v, b, out, indices)
    assert_near(out, exact, torch.float32)


def test_slices_and_padded_outputs() -> None:
    v, b, indices = torch.randn(4, 6), torch.randn(N_ADAPTERS, 20, 6), mapping(4)
    exact = products(v, b, indices)
    out = torch.ones(4, 50)
    functional.bgmv_expand_slice(v, b, out, indices, 7, 20)
    assert_near(out[:, 7:27], exact + 1, torch.float32)
    assert (out[:, :7] == 1).all() and (out[:, 27:] == 1).all()
    functional.bgmv_expand_slice(v, b, out, indices, 7, 20, add_inputs=False)
    assert_near(out[indices >= 0, 7:27], exact[indices >= 0], torch.float32)
    for width in (13, 33):
        padded = torch.ones(4, width)
        functional.bgmv_expand(v, b, padded, indices)
        common = min(width, 20)
        assert_near(padded[:, :common], exact[:, :common] + 1, torch.float32)
        assert (padded[:, common:] == 1).all()


# segments out of order, one that is empty, one without an adapter, and rows in none
STARTS, LENGTHS, SEGMENTS = (
    torch.tensor([6, 0, 4, 4]),
    torch.tensor([3, 4, 0, 1]),
    torch.tensor([2, 1, 0, -1]),
)
OF_ROWS = torch.tensor([1, 1, 1, 1, -1, -1, 2, 2, 2, -1])


def test_segments_are_rows_of_one_adapter() -> None:
    x, a, b = torch.randn(10, 40), torch.randn(N_ADAPTERS, 8, 40), torch.randn(N_ADAPTERS, 30, 8)
    where = STARTS, LENGTHS.int(), SEGMENTS, 4, 4
    ours, theirs = torch.ones(10, 8), torch.ones(10, 8)
    functional.sgmv_shrink(x, a, ours, *where, 0.25)
    functional.bgmv_shrink(x, a, theirs, OF_ROWS, 0.25)
    assert torch.equal(ours, theirs)
    for add in (True, False):
        ours, theirs = torch.ones(10, 30), torch.ones(10, 30)
        functional.sgmv_expand(x[:, :8], b, ours, *where, add)
        functional.bgmv_expand(x[:, :8], b, theirs, OF_ROWS, add)
        assert torch.equal(ours, theirs)
        ours, theirs = torch.ones(10, 60), torch.ones(10, 60)
        functional.sgmv_expand_slice(x[:, :8], b, ours, *where, 13, 30, add)
        functional.bgmv_expand_slice(x[:, :8], b, theirs, OF_ROWS, 13, 30, add)
        assert torch.equal(ours, theirs)


def test_one_batch_of_the_segments_counts() -> None:
    out = torch.zeros(10, 8)
    functional.sgmv_shrink(
        torch.ones(10, 40), torch.ones(4, 8, 40), out, STARTS, LENGTHS, SEGMENTS, 1, 3, 1.0
    )
    assert (out[6:9] == 40).all() and (out[:6] == 0).all() and (out[9:] == 0).all()


def test_bits_do_not_depend_on_threads() -> None:
    x, a = torch.randn(16, 2048), torch.randn(N_ADAPTERS, 16, 2048)
    b, indices = torch.randn(N_ADAPTERS, 1000, 16), mapping(16)

    def both() -> Tensor:
        v, y = torch.zeros(16, 16), torch.zeros(16, 1000)
        functional.bgmv_shrink(x, a, v, indices)
        functional.bgmv_expand(v, b, y, indices)
        return y

    assert_same_on_threads(both)


def test_nothing_is_written_outside() -> None:
    for rank, width in ((5, 41), (16, 64), (1, 1)):
        v, y = Guarded(torch.float32, 3, rank), Guarded(torch.float32, 3, width)
        indices = torch.tensor([0, 3, 1])
        functional.bgmv_shrink(torch.ones(3, 33), torch.ones(N_ADAPTERS, rank, 33), v.tensor, indices)
        functional.bgmv_expand(v.tensor, torch.ones(N_ADAPTERS, width, rank), y.tensor, indices, False)
        assert (v.tensor == 33).all() and (y.tensor == 33 * rank).all()
        v.check()
        y.check()


def test_output_that_overlaps_the_input() -> None:
    buffer = torch.randn(4, 48)
    x, a = buffer[:, :32].clone(), torch.randn(N_ADAPTERS, 32, 32)
    exact = products(x, a, mapping(4))
    has_adapter = mapping(4) >= 0
    functional.bgmv_shrink(buffer[:, :32], a, buffer[:, 3:35], mapping(4))
    assert_near(buffer[has_adapter, 3:35], exact[has_adapter], torch.float32)


def test_nothing_to_do() -> None:
    none = torch.empty(0, dtype=torch.int64)
    functional.bgmv_shrink(torch.empty(0, 8), torch.ones(4, 2, 8), torch.empty(0, 2), none)
    functional.bgmv_expand(torch.empty(0, 2), torch.ones(4, 8, 2), torch.empty(0, 8), none)
    out = torch.ones(2, 3)
    functional.bgmv_shrink(torch.ones(2, 8), torch.ones(0, 3, 8), out, torch.tensor([-1, -1]))
    functional.bgmv_shrink(torch.ones(2, 8), torch.ones(4, 0, 8), out, torch.tensor([1, 2]))
    functional.bgmv_expand(torch.ones(2, 0), torch.ones(4, 3, 0), out, torch.tensor([1, 2]))
    assert (out == 1).all()
    functional.bgmv_expand(torch.ones(2, 0), torch.ones(4, 3, 0), out, torch.tensor([1, -1]), False)
    assert out.tolist() == [[0, 0, 0], [1, 1, 1]]


def _arguments() -> dict[str, Any]:
    return {
        "input": torch.ones(3, 8),
        "lora_weights": torch.ones(4, 2, 8),
        "output": torch.zeros(3, 2),
        "token_lora_mapping": torch.tensor([0, 1, -1]),
    }


WRONG: list[tuple[str, Any, str]] = [
    ("input", torch.ones(3, 7), r"\[rows, 8\]"),
    ("input", torch.ones(8), r"\[rows, 8\]"),
    ("input", torch.ones(3, 8, dtype=torch.bfloat16), "torch.float32 is needed"),
    ("input", torch.ones(3, 8, device="meta"), "device meta"),
    ("input", [1.0], "a torch.Tensor is needed"),
    ("lora_weights", torch.ones(4, 2, 2, 8), r"\[adapters, rows, columns\]"),
    ("lora_weights", torch.ones(4, 2, 8, dtype=torch.float64), "torch.float64"),
    ("output", torch.zeros(2, 2), "3 rows"),
    ("output", torch.zeros(3, 1), "2 columns"),
    ("output", torch.zeros(3, 1).expand(3, 2), "share memory"),
    ("output", torch.zeros(4).as_strided((3, 2), (1, 1)), "share memory"),
    ("output", torch.zeros(3, 2, dtype=torch.int64), "torch.int64"),
    ("token_lora_mapping", torch.tensor([0, 4, 0]), "has 4: -1 to 3"),
    ("token_lora_mapping", torch.tensor([0, -2, 0]), "has -2"),
    ("token_lora_mapping", torch.tensor([0, 1]), "3"),
    ("token_lora_mapping", torch.tensor([[0, 1, 2]]), r"\[any\] is needed"),
    ("token_lora_mapping", torch.tensor([0.0, 1.0, 2.0]), "int32 or int64"),
    ("token_lora_mapping", [0, 1, 2], "a torch.Tensor is needed"),
    ("scaling", torch.zeros(2), "scaling is a Tensor"),
    ("scaling", float("nan"), "scaling is nan"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_what_is_refused(name: str, value: Any, message: str) -> None:
    functional.bgmv_shrink(**_arguments())
    with pytest.raises(InvalidInput, match=message):
        functional.bgmv_shrink(**_arguments() | {name: value})


def test_freed_memory_is_refused() -> None:
    for name, whole in (("lora_weights", torch.ones(5, 2, 8)), ("output", torch.zeros(4, 2))):
        part = whole[1:]
        whole.untyped_storage().resize_(0)
        with pytest.raises(InvalidInput, match="freed"):
            functional.bgmv_shrink(**_arguments() | {name: part})


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    ((-1, 2, "slice_offset"), (4, 2, "slice_offset"), (0, 3, "slice_size"), ("x", 2, "slice_offset is 'x'")),
)
def test_slices_that_are_refused(offset: Any, size: int, message: str) -> None:
    rows, weights, output = torch.ones(1, 3), torch.ones(4, 2, 3), torch.zeros(1, 5)
    with pytest.raises(InvalidInput, match=message):
        functional.bgmv_expand_slice(rows, weights, output, torch.tensor([0]), offset, size)


@pytest.mark.parametrize(
    ("starts", "lengths", "indices", "batches", "longest", "message"),
    (
        ([0, 1], [2, 1], [0, 1], 2, 2, "b_seq_start_loc has 1"),
        ([0, 2], [2, 2], [0, 1], 2, 2, "b_seq_start_loc has 2"),
        ([-1, 1], [2, 1], [0, 1], 2, 2, "b_seq_start_loc has -1"),
        ([0, 2], [2, -1], [0, 1], 2, 2, "seq_len_tensor has -1"),
        ([0, 2], [2, 1], [0, 1], 2, 1, "max_seq_length, 1"),
        ([0, 2], [2, 1], [0, 4], 2, 2, "lora_indices_tensor has 4"),
        ([0, 2], [2, 1], [0], 2, 2, "batches is 2: 0 to 1"),
        ([0, 2], [2, 1], [0, 1], -1, 2, "batches is -1"),
        ([2**62, 0], [2, 1], [0, 1], 2, 2, "b_seq_start_loc"),
    ),
)
def test_segments_that_are_refused(
    starts: list[int], lengths: list[int], indices: list[int], batches: int, longest: int, message: str
) -> None:
    out = torch.zeros(3, 2)
    where = torch.tensor(starts), torch.tensor(lengths), torch.tensor(indices), batches, longest
    with pytest.raises(InvalidInput, match=message):
        functional.sgmv_shrink(torch.ones(3, 8), torch.ones(4, 2, 8), out, *where, 1.0)
    assert (out == 0).all()
