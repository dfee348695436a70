"""Tensors that no kernel may see are refused with the argument's name, its value, and what is allowed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import Appended, IndirectCache
from hfopt.errors import HfoptError, InvalidInput
from hfopt.functional import Mask, Scoring
from hfopt.modules import MambaMixer

SIZE = 24
HEADS = (4, 2, SIZE)
WIDTH = 8 * SIZE


def _appended(n_rows: int = 2, n_new: int = 3, dtype: torch.dtype = torch.float32) -> Appended:
    return IndirectCache().append(0, n_rows, n_new, 2, SIZE, dtype)


def _attend(qkv: Tensor, appended: Appended | None = None, mask: Mask | None = None) -> Tensor:
    return functional.attend(qkv, appended or _appended(), mask or Mask("causal"), Scoring(0.2), *HEADS)


def _rotate(qkv: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, kind: str = "half") -> None:
    angles = torch.ones(1, 3, SIZE)
    functional.rotate_and_store(
        qkv, angles if cos is None else cos, angles if sin is None else sin, _appended(), *HEADS, kind
    )


def _norm_heads(qkv: Tensor, weight: Tensor, first: int = SIZE, count: int = 3, size: int = SIZE) -> None:
    functional.norm_heads(qkv, functional.Norm("rms", weight, None, 1e-5), first, count, size)


_ANGLES = torch.ones(1, 3, SIZE)
OPERATIONS: dict[str, tuple[Callable[[Tensor], object], tuple[int, ...]]] = {
    "rms_norm": (lambda x: functional.rms_norm(x, torch.ones(41), 1e-5), (2, 41)),
    "rms_norm weight": (lambda w: functional.rms_norm(torch.ones(2, 41), w, 1e-5), (41,)),
    "layer_norm": (lambda x: functional.layer_norm(x, None, None, 1e-5), (2, 41)),
    "layer_norm bias": (lambda b: functional.layer_norm(torch.ones(2, 41), None, b, 1e-5), (41,)),
    "silu_mul": (lambda x: functional.silu_mul(x, torch.ones(2, 41)), (2, 41)),
    "silu_mul y": (lambda y: functional.silu_mul(torch.ones(2, 41), y), (2, 41)),
    "add_rms_norm": (lambda x: functional.add_rms_norm(None, x, None, None, 1e-5), (2, 41)),
    "add_rms_norm residual": (
        lambda r: functional.add_rms_norm(r, torch.ones(2, 41), None, None, 1e-5),
        (2, 41),
    ),
    "norm_heads": (lambda x: _norm_heads(x, torch.ones(SIZE)), (2, 3, WIDTH)),
    "norm_heads weight": (lambda w: _norm_heads(torch.ones(2, WIDTH), w), (SIZE,)),
    "clamp": (lambda x: functional.clamp(x, 0.3), (2, 41)),
    "softcap": (lambda x: functional.softcap(x, 0.3), (2, 41)),
    "rotate": (lambda x: functional.rotate(x, _ANGLES, _ANGLES, 3, SIZE, "half"), (2, 3, WIDTH)),
    "rotate cos": (
        lambda cos: functional.rotate(torch.ones(2, 3, WIDTH), cos, _ANGLES, 3, SIZE, "half"),
        (1, 3, SIZE),
    ),
    "scale": (lambda x: functional.scale(x, 0.3), (2, 41)),
    "scale residual": (lambda r: functional.scale(torch.ones(2, 41), 0.3, residual=r), (2, 41)),
    "attend": (_attend, (2, 3, WIDTH)),
    "rotate_and_store": (_rotate, (2, 3, WIDTH)),
    "rotate_and_store cos": (lambda cos: _rotate(torch.ones(2, 3, WIDTH), cos=cos), (1, 3, SIZE)),
    "argmax": (functional.argmax, (2, 41)),
    "log_softmax_top_k": (lambda x: functional.log_softmax_top_k(x, torch.zeros(2), 3), (2, 41)),
    "log_softmax_top_k running": (lambda r: functional.log_softmax_top_k(torch.ones(2, 41), r, 3), (2,)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_right_tensor_is_accepted(name: str) -> None:
    operation, shape = OPERATIONS[name]
    operation(torch.ones(shape))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.int64, torch.bool, torch.complex64))
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    operation, shape = OPERATIONS[name]
    with pytest.raises(InvalidInput, match=rf"has dtype {dtype}: torch.float32"):
        operation(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_without_memory(name: str) -> None:
    operation, shape = OPERATIONS[name]
    with pytest.raises(InvalidInput, match="is on device meta: only tensors in CPU memory"):
        operation(torch.ones(shape, device="meta"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_whose_memory_is_freed(name: str) -> None:
    operation, shape = OPERATIONS[name]
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(InvalidInput, match="has no memory: its storage has been freed"):
        operation(tensor)


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_whose_storage_is_made_smaller(name: str) -> None:
    operation, shape = OPERATIONS[name]
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(tensor.nbytes - 4)
    with pytest.raises(InvalidInput, match="has lost memory: its storage has been made smaller"):
        operation(tensor)


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_with_a_negative_bit(name: str) -> None:
    operation, shape = OPERATIONS[name]
    with pytest.raises(InvalidInput, match="has its negative bit set"):
        operation(torch._neg_view(torch.ones(shape)))


# what of theirs kernels cannot read is copied
_COPIED = (
    "rms_norm",
    "rms_norm weight",
    "layer_norm",
    "layer_norm bias",
    "silu_mul",
    "silu_mul y",
    "add_rms_norm",
    "add_rms_norm residual",
)


@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if name not in _COPIED and not name.endswith(" cos")]
)
def test_transposed_tensors(name: str) -> None:
    operation, shape = OPERATIONS[name]
    strided = torch.ones(*shape, 2)[..., 0]
    with pytest.raises(InvalidInput, match="has strides"):
        operation(strided)


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_layouts_and_types(name: str) -> None:
    operation, shape = OPERATIONS[name]
    with pytest.raises(InvalidInput, match=r"has layout torch.sparse_coo: torch.strided is needed"):
        operation(torch.ones(shape).to_sparse())
    with pytest.raises(InvalidInput, match=r"is a ndarray: a torch.Tensor is needed"):
        operation(np.ones(shape, np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    (
        lambda: functional.rms_norm(torch.ones(2, 41), torch.ones(40), 1e-5),
        lambda: functional.rms_norm(torch.ones(2, 41), torch.ones(1, 41), 1e-5),
        lambda: _norm_heads(torch.ones(2, 41), torch.ones(3, 41), 0, 1, 41),
        lambda: _norm_heads(torch.ones(2, 41), torch.ones(1, 1, 41), 0, 1, 41),
        lambda: _norm_heads(torch.ones(()), torch.ones(1), 0, 1, 1),
        lambda: functional.norm(torch.ones(2, 3, 41), functional.Norm("rms", torch.ones(2, 41), None, 1e-5)),
        lambda: functional.rotate(torch.ones(2, WIDTH), _ANGLES, _ANGLES, 3, SIZE, "half"),
        lambda: functional.rotate(torch.ones(2, 3, WIDTH), _ANGLES, _ANGLES, 9, SIZE, "half"),
        lambda: functional.rotate(torch.ones(2, 3, WIDTH), _ANGLES, _ANGLES[:, :2], 3, SIZE, "half"),
        lambda: functional.scale(torch.ones(2, 41), 0.3, residual=torch.ones(41)),
        lambda: functional.layer_norm(torch.ones(2, 41), None, torch.ones(42), 1e-5),
        lambda: functional.rms_norm(torch.ones(()), torch.ones(1), 1e-5),
        lambda: _attend(torch.ones(2, 3, WIDTH - 1)),
        lambda: _attend(torch.ones(2, 4, WIDTH)),
        lambda: _attend(torch.ones(3, 3, WIDTH)),
        lambda: _attend(torch.ones(6, WIDTH)),
        lambda: _rotate(torch.ones(2, 3, WIDTH), cos=torch.ones(3, 3, SIZE)),
        lambda: _rotate(torch.ones(2, 3, WIDTH), cos=torch.ones(1, 2, SIZE)),
        lambda: _rotate(torch.ones(2, 3, WIDTH), cos=torch.ones(3, SIZE)),
        lambda: _rotate(torch.ones(2, 3, WIDTH), sin=torch.ones(1, 3, SIZE - 2)),
        lambda: functional.log_softmax_top_k(torch.ones(41), torch.ones(1), 3),
        lambda: functional.log_softmax_top_k(torch.ones(2, 41), torch.ones(3), 3),
        lambda: functional.argmax(torch.ones(2, 0)),
    ),
)
def test_other_shapes(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidInput, match=r"has shape|has strides"):
        call()


def test_mixed_dtypes() -> None:
    x = torch.ones(2, 41, dtype=torch.bfloat16)
    for call in (
        lambda: functional.rms_norm(torch.ones(2, 41), torch.ones(41).bfloat16(), 1e-5),
        lambda: _norm_heads(x, torch.ones(41), 0, 1, 41),
        lambda: functional.scale(x, 0.3, residual=torch.ones(2, 41)),
        lambda: _attend(torch.ones(2, 3, WIDTH, dtype=torch.bfloat16)),
    ):
        with pytest.raises(InvalidInput, match="dtype"):
            call()


@pytest.mark.parametrize("angles", (25, 26, 48))
def test_angles_that_do_not_fit(angles: int) -> None:
    with pytest.raises(InvalidInput, match=rf"cos has {angles} angles: .* an even number up to 24"):
        _rotate(torch.ones(2, 3, WIDTH), cos=torch.ones(1, 3, angles))


def test_rotations() -> None:
    with pytest.raises(InvalidInput, match="rotation is 'full': 'none', 'half', 'interleaved' are allowed"):
        _rotate(torch.ones(2, 3, WIDTH), kind="full")
    with pytest.raises(InvalidInput, match="cos is None: rotation 'half' needs it"):
        functional.rotate_and_store(torch.ones(2, 3, WIDTH), None, None, _appended(), *HEADS, "half")


@pytest.mark.parametrize("heads", ((-SIZE, 1), (0, -1), (0, 9), (6 * SIZE, 3), (WIDTH - SIZE + 1, 1)))
def test_heads_to_norm(heads: tuple[int, int]) -> None:
    qkv = torch.randn(2, WIDTH)
    before = qkv.clone()
    with pytest.raises(InvalidInput, match=f"heads of {SIZE} begin at channel .*: there are {WIDTH}"):
        _norm_heads(qkv, torch.ones(SIZE), *heads)
    assert torch.equal(qkv, before)


def test_an_rms_norm_has_no_bias() -> None:
    with pytest.raises(InvalidInput, match="bias is a Tensor"):
        functional.norm(torch.ones(2, 41), functional.Norm("rms", None, torch.ones(41), 1e-5))


@pytest.mark.parametrize("limit", (0.0, -1.0, torch.inf, torch.nan, None))
@pytest.mark.parametrize("operation", (functional.clamp, functional.softcap))
def test_limits(operation: Callable[..., object], limit: float) -> None:
    with pytest.raises(InvalidInput, match=r"limit is .*: a positive finite number is needed"):
        operation(torch.ones(2, 41), limit)


@pytest.mark.parametrize("rotation", ("none", "full"))
def test_rotations_without_a_cache(rotation: str) -> None:
    with pytest.raises(InvalidInput, match="half and interleaved are allowed"):
        functional.rotate(torch.ones(2, 3, WIDTH), _ANGLES, _ANGLES, 3, SIZE, rotation)


@pytest.mark.parametrize("heads", ((4, 3, SIZE), (0, 2, SIZE), (4, 0, SIZE), (4, 2, 0), (-4, -2, SIZE)))
def test_heads(heads: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidInput, match="n_heads a multiple of n_kv_heads"):
        functional.attend(torch.ones(2, 3, WIDTH), _appended(), Mask("causal"), Scoring(0.2), *heads)


@pytest.mark.parametrize(
    "change",
    (
        {"prefix_len": 10**6},
        {"prefix_len": -1},
        {"suffix_len": 1},
        {"prefix": np.zeros((2, 2, 3, 9, SIZE), np.float32)},
        {"prefix": np.zeros((2, 2, 2, 9, SIZE), np.float64)},
        {"prefix": np.zeros((2, 2, 2, 9, 2 * SIZE), np.float32)[..., ::2]},
        {"prefix_row": np.zeros(3, np.int32)},
        {"prefix_row": np.zeros(2, np.int64)},
        {"table": np.zeros((1, 9), np.int32)},
    ),
)
@pytest.mark.parametrize("known", (False, True))
def test_caches_that_do_not_fit(change: dict[str, Any], known: bool) -> None:
    appended = _appended()
    if known:
        _attend(torch.ones(2, 3, WIDTH), appended)
    with pytest.raises(InvalidInput):
        _attend(torch.ones(2, 3, WIDTH), appended._replace(**change))
    _attend(torch.ones(2, 3, WIDTH), appended)


def test_known_caches_of_another_layout() -> None:
    appended = _appended()
    _attend(torch.ones(2, 3, WIDTH), appended)
    for qkv, heads in (
        (torch.ones(2, 3, WIDTH), (6, 1, SIZE)),
        (torch.ones(2, 3, WIDTH), (8, 4, SIZE // 2)),
        (torch.ones(2, 3, WIDTH, dtype=torch.bfloat16), HEADS),
    ):
        with pytest.raises(InvalidInput, match=r"appended\.prefix has"):
            functional.attend(qkv, appended, Mask("causal"), Scoring(0.2), *heads)


@pytest.mark.parametrize("change", ({"prefix_len": 10**6}, {"prefix_len": 2}, {"in_suffix": True}))
def test_no_room_for_new_tokens(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="appended ends at column"):
        functional.rotate_and_store(
            torch.ones(2, 3, WIDTH), None, None, _appended()._replace(**change), *HEADS, "none"
        )


@pytest.mark.parametrize(
    "mask",
    (
        Mask("unsupported"),
        Mask("bytes"),
        Mask("bytes", np.ones((2, 3, 4), np.uint8)),
        Mask("bytes", np.ones((2, 3, 3), bool)),
        Mask("bytes", np.ones((2, 3, 6), np.uint8)[..., ::2]),
    ),
)
def test_masks(mask: Mask) -> None:
    with pytest.raises(InvalidInput, match="mask"):
        _attend(torch.ones(2, 3, WIDTH), mask=mask)


@pytest.mark.parametrize(("k", "n_beams"), ((0, 1), (-1, 1), (42, 1), (83, 2), (3, 0), (3, 3), (3, -1)))
def test_numbers_of_candidates_and_beams(k: int, n_beams: int) -> None:
    with pytest.raises(InvalidInput, match=r"k is|n_beams is"):
        functional.log_softmax_top_k(torch.ones(2, 41), torch.zeros(2), k, n_beams)


def test_errors_belong_to_the_family() -> None:
    assert issubclass(InvalidInput, HfoptError)
    assert issubclass(InvalidInput, ValueError)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: functional.silu_mul(x, x),
        lambda x: functional.add_rms_norm(x, x, None, None, 1e-6),
        lambda x: functional.add_layer_norm(None, x, None, None, 1e-6),
        lambda x: MambaMixer.causal_conv1d_fn(x[None], x[:, :2])[0],
        lambda x: MambaMixer.causal_conv1d_update(x, x[:, :, None].clone(), x[0, :, None][:, [0, 0]]),
        lambda x: MambaMixer.selective_scan_fn(x[None], x[None], x[:, :2], x[None, :2], x[None, :2]),
        lambda x: MambaMixer.selective_state_update(
            x[:, :, None].clone(), x, x, x[0, :, None], x[:, :1], x[:, :1]
        ),
    ],
)
def test_results_stand_beside_their_inputs(operation: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(3, 8)
    known = operation(x)
    with torch.device("meta"):  # where torch would put what is made from sizes alone
        result = operation(x)
    assert torch.equal(result, known)
