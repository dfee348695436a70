"""What the building blocks refuse: each wrong argument by its name, before anything is read or written."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional import LinearWeights
from hfopt.modules import (
    FastLayerNorm,
    GatedMLPMOE,
    LinearAdd,
    LinearSilu,
    LinearSiluMul,
    RMSNorm,
    RotaryEmbedding,
)

SIZE, HEAD = 40, 16
Given = dict[str, Any]


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def _linear(width: int = SIZE) -> nn.Linear:
    return nn.Linear(width, SIZE).requires_grad_(False)


def _moe(dtype: torch.dtype = torch.float32) -> GatedMLPMOE:
    return GatedMLPMOE(_ones(4, 16, SIZE).to(dtype), _ones(4, SIZE, 8).to(dtype))


def _norm_arguments() -> Given:
    return {
        "residual": _ones(2, SIZE),
        "x": _ones(2, SIZE),
        "weight": _ones(SIZE),
        "bias": _ones(SIZE),
        "eps": 1e-5,
    }


def _rotary_arguments() -> Given:
    heads = {"query": _ones(2, 3, 4, HEAD), "key": _ones(2, 3, 2, HEAD)}
    tables = {"sin": _ones(5, HEAD // 2), "cos": _ones(5, HEAD // 2)}
    return {
        **heads,
        **tables,
        "rotary_dim": HEAD,
        "rotary_half": True,
        "position_ids": torch.tensor([0, 1, 4]),
    }


def _moe_arguments() -> Given:
    return {
        "hidden_states": _ones(3, SIZE),
        "use_grouped_topk": True,
        "top_k": 2,
        "router_logits": _ones(3, 4),
        "renormalize": True,
        "topk_group": 1,
        "num_expert_group": 2,
        "e_score_correction_bias": _ones(4),
    }


BLOCKS: dict[str, tuple[Callable[..., Any], Callable[[], Given]]] = {
    "silu_mul": (
        functional.silu_mul,
        lambda: {"x": _ones(2, SIZE), "y": _ones(2, SIZE), "out": _ones(2, SIZE)},
    ),
    "gelu_mul": (
        functional.gelu_mul,
        lambda: {"x": _ones(2, SIZE), "y": _ones(2, SIZE), "approximate": "tanh"},
    ),
    "add_rms_norm": (functional.add_rms_norm, _norm_arguments),
    "add_layer_norm": (functional.add_layer_norm, lambda: {**_norm_arguments(), "add_back": True}),
    "rms_norm": (
        RMSNorm.apply_function,
        lambda: {"hidden_states": _ones(2, SIZE), "weight": _ones(SIZE), "eps": 1e-5},
    ),
    "fast_layer_norm": (
        FastLayerNorm.apply_function,
        lambda: {
            "hidden_states": _ones(2, 4, 10),
            "normalized_shape": (4, 10),
            "weight": _ones(4, 10),
            "bias": _ones(4, 10),
            "eps": 1e-5,
        },
    ),
    "RMSNorm": (RMSNorm(SIZE), lambda: {"x": _ones(2, SIZE)}),
    "RMSNorm in inference": (torch.no_grad()(RMSNorm(SIZE)), lambda: {"x": _ones(2, SIZE)}),
    "FastLayerNorm": (FastLayerNorm(SIZE, 1e-5, _ones(SIZE)), lambda: {"x": _ones(2, SIZE)}),
    "LinearSilu": (LinearSilu(_linear()), lambda: {"x": _ones(2, SIZE)}),
    "LinearSiluMul": (LinearSiluMul(_linear()), lambda: {"x": _ones(2, SIZE), "y": _ones(2, SIZE)}),
    "LinearAdd": (LinearAdd(_linear()), lambda: {"x": _ones(2, SIZE), "y": _ones(2, SIZE)}),
    "LinearAdd with gradients": (
        LinearAdd(nn.Linear(SIZE, SIZE)),
        lambda: {"x": _ones(2, SIZE), "y": _ones(2, SIZE)},
    ),
    "rotary_embedding": (functional.rotary_embedding, _rotary_arguments),
    "RotaryEmbedding": (
        RotaryEmbedding(32, HEAD),
        lambda: {
            "x": _ones(2, 3, 4 * HEAD),
            "position_ids": torch.tensor([0, 1, 4]),
            "num_head": 4,
            "head_dim": HEAD,
            "offset": 8,
            "rotary_ndims": HEAD,
            "seq_len": 5,
        },
    ),
    "GatedMLPMOE": (_moe(), _moe_arguments),
}
TENSORS = [
    (block, name)
    for block, (_, arguments) in BLOCKS.items()
    for name, each in arguments().items()
    if isinstance(each, Tensor)
]


def _refused(block: str, name: str, wrong: Any) -> None:
    """The error begins with the name, and no other tensor has been written."""
    function, arguments = BLOCKS[block]
    given, before = arguments() | {name: wrong}, arguments()
    with pytest.raises((InvalidInput, TypeError), match=rf"^{name}\b"):
        function(**given)
    for each, value in before.items():
        assert each == name or not isinstance(value, Tensor) or torch.equal(given[each], value)


def _resized(tensor: Tensor, n_bytes: int) -> Tensor:
    tensor.untyped_storage().resize_(n_bytes)
    return tensor


def _smaller(tensor: Tensor) -> Tensor:
    return _resized(tensor, tensor.nbytes - tensor.itemsize)


def _smaller_strided(tensor: Tensor) -> Tensor:
    """The same shape, each second element."""
    wide = torch.ones(*tensor.shape, 2, dtype=tensor.dtype)
    return _resized(wide[..., 0], wide.nbytes - 2 * wide.itemsize)


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a storage made smaller": _smaller,
    "a storage made smaller under strides": _smaller_strided,
    "a freed storage": lambda tensor: _resized(tensor, 0),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "a list": lambda tensor: tensor.tolist(),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_right_arguments_are_accepted(block: str) -> None:
    function, arguments = BLOCKS[block]
    function(**arguments())


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize(("block", "name"), TENSORS)
def test_a_wrong_tensor_is_named(block: str, name: str, how: str) -> None:
    _refused(block, name, WRONG[how](BLOCKS[block][1]()[name]))


NUMBERS = {
    "eps": (math.nan, math.inf, -1, 1e300, "x", [1], torch.zeros(2), True),
    "approximate": ([1], "x", None),
    "add_back": (torch.zeros(2), "x", math.nan, None, 2),
    "normalized_shape": (1.5, (4, "x"), (10, 4)),
    "rotary_dim": (None, "x", [1], 7, 2**70),
    "rotary_half": ("x", math.nan, None, torch.zeros(2)),
    "num_head": (None, "x", 1.5, 0),
    "head_dim": ("x", None, [1]),
    "offset": (2, None),
    "rotary_ndims": ("x", HEAD - 2),
    "seq_len": ("x", 1e300),
    "top_k": (None, "x", True, 0, 5),
    "renormalize": ("x", None),
    "use_grouped_topk": ("x", math.nan),
    "num_expert_group": ("x", 1.5, 3),
    "topk_group": ("x", 0),
}


@pytest.mark.parametrize(
    ("block", "name", "wrong"),
    [
        (block, name, wrong)
        for block, (_, arguments) in BLOCKS.items()
        for name in arguments()
        for wrong in NUMBERS.get(name, ())
    ],
)
def test_a_wrong_number_is_named(block: str, name: str, wrong: Any) -> None:
    _refused(block, name, wrong)


def test_a_key_that_is_refused_leaves_the_query_as_it_was() -> None:
    _refused("rotary_embedding", "key", _ones(1, 3, 2, HEAD).expand(2, 3, 2, HEAD))


@pytest.mark.parametrize("name", ("y", "out"))
def test_shapes_are_checked_before_copies(name: str) -> None:
    _refused("silu_mul", name, _ones(2, 1).expand(2, 2**40))


@pytest.mark.parametrize("block", ("add_rms_norm", "add_layer_norm", "rms_norm", "fast_layer_norm"))
def test_strided_weights_are_read(block: str) -> None:
    function, arguments = BLOCKS[block]
    given, strided = arguments(), arguments()
    for name in {"weight", "bias"} & given.keys():
        given[name] = torch.randn(given[name].shape)
        strided[name] = given[name][..., None].expand(*given[name].shape, 3).clone()[..., 1]
        assert not strided[name].is_contiguous()
    assert torch.equal(function(**given), function(**strided))


@pytest.mark.parametrize("place", ("weight", "bias"))
@pytest.mark.parametrize("uses", (0, 1))
def test_weights_that_lose_memory_are_refused(place: str, uses: int) -> None:
    linear = _linear()
    block = LinearAdd(linear)
    for _ in range(uses):
        block(_ones(2, SIZE), _ones(2, SIZE))
    _smaller(getattr(linear, place))
    with pytest.raises(InvalidInput, match=rf"^{place} of shape .* its storage has been made smaller"):
        block(_ones(2, SIZE), _ones(2, SIZE))


def test_records_of_weights_that_lose_memory_are_stale() -> None:
    weight = _ones(SIZE, SIZE)
    record = LinearWeights.of([weight], [None])
    assert record.reads([weight], [None])
    _smaller(weight)
    assert not record.reads([weight], [None])
    with pytest.raises(InvalidInput, match=r"^weights\[0\] of shape .* its storage has been made smaller"):
        LinearWeights.of([weight], [None])


@pytest.mark.parametrize("name", ("W13", "W2", "W3"))
@pytest.mark.parametrize("how", ("a storage made smaller", "a freed storage", "meta", "sparse"))
def test_weights_of_experts_are_checked(name: str, how: str) -> None:
    weights = {"W13": _ones(4, 8, SIZE), "W2": _ones(4, SIZE, 8), "W3": _ones(4, 8, SIZE)}
    with pytest.raises(InvalidInput, match=r"^W"):
        GatedMLPMOE(**weights | {name: WRONG[how](weights[name])})


@pytest.mark.parametrize("uses", (0, 1))
def test_weights_of_experts_that_lose_memory_are_refused(uses: int) -> None:
    moe, given = _moe(), _moe_arguments()
    for _ in range(uses):
        moe(**given)
    _smaller(moe.W2)
    with pytest.raises(InvalidInput, match=r"^W2 of shape .* its storage has been made smaller"):
        moe(**given)


def test_experts_on_another_device_are_refused() -> None:
    moe = GatedMLPMOE(torch.ones(4, 16, SIZE, device="meta"), torch.ones(4, SIZE, 8, device="meta"))
    with pytest.raises(InvalidInput, match=r"^hidden_states is on device cpu: meta is needed"):
        moe(**_moe_arguments())


@pytest.mark.parametrize("how", ("a freed storage", "a storage made smaller", "meta", "complex"))
@pytest.mark.parametrize("name", ("weights", "experts"))
def test_what_a_routing_function_gives_is_checked(name: str, how: str) -> None:
    found = {"weights": _ones(3, 2), "experts": torch.tensor([[0, 1]] * 3)}
    found[name] = WRONG[how](found[name])
    given = _moe_arguments() | {"use_grouped_topk": False}
    with pytest.raises(InvalidInput, match=f"^custom_routing_function.*{name}"):
        _moe()(**given, custom_routing_function=lambda **_: (found["weights"], found["experts"]))


def test_callers_may_be_compiled_for_any_size() -> None:
    compiled = torch.compile(lambda x, weight: functional.rms_norm(x, weight, 1e-5), backend="eager")
    for size in (SIZE, SIZE + 1, SIZE + 2):
        x, weight = torch.randn(2, size), torch.randn(size)
        assert torch.equal(functional.rms_norm(x, weight, 1e-5), compiled(x, weight))
