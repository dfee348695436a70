"""Rotary embeddings: all kinds against transformers, tables that grow, and queries and keys turned in place."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.modules import RotaryEmbedding
from tests import reference
from tests.block_cases import assert_near
from tests.pairs import pairs_of
from tests.reference import DTYPES

SIZE, LONGEST, FIRST = 24, 256, 64
_FACTORS = [1.0 + i / 10 for i in range(SIZE // 2)]
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": FIRST,
        **_LLAMA3,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": FIRST},
    "yarn, all keys": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": FIRST, "mscale": 0.7},
        **{"mscale_all_dim": 1.1, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    },
    "yarn, attention factor": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": FIRST},
        "attention_factor": 1.25,
    },
    "longrope": {
        **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": FIRST},
        **{"short_factor": _FACTORS, "long_factor": [2 * each for each in _FACTORS]},
    },
}


def _theirs(kind: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """cos, sin [1 or rows, tokens, size] of positions, by the module of transformers, which has seen no text yet."""
    settings = {key: value for key, value in KINDS[kind].items() if value is not None}
    sizes: dict[str, Any] = {
        **{"hidden_size": 2 * SIZE, "num_attention_heads": 2, "max_position_embeddings": LONGEST},
        "original_max_position_embeddings": FIRST,
    }
    config = LlamaConfig(**sizes)
    config.rope_theta = 10000.0
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {"rope_type": "default", **settings, "rope_theta": 10000.0}
    else:
        config.rope_scaling = settings or None
    rotary = LlamaRotaryEmbedding(config)
    return lambda positions: rotary(torch.zeros(1), positions)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    """In float64, by angles [.., size] whose second half is the first again."""
    if kind == "interleaved":
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    return reference.rotate(x.double(), cos, sin, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", (0, FIRST - 3, FIRST + 20, LONGEST - 5, LONGEST + 3))
def test_angles_of_all_kinds(kind: str, first: int) -> None:
    rope, n_tokens = RotaryEmbedding(LONGEST, SIZE, 10000, None, KINDS[kind]), 5
    positions = torch.arange(first, first + n_tokens)[None]
    x = torch.randn(2, n_tokens, 4, SIZE)
    if first + n_tokens > rope.frequencies.limit:
        with pytest.raises(InvalidInput, match="position_ids holds"):
            rope(x, positions, 4, SIZE, SIZE // 2, SIZE)
        return
    exact = _turned(x, *_theirs(kind)(positions), "half")
    assert_near(rope(x, positions, 4, SIZE, SIZE // 2, SIZE), exact)
    assert_near(rope(x, first, 4, SIZE, SIZE // 2, SIZE), exact)
    exact = _turned(x, *_theirs(kind)(positions), "interleaved")
    assert_near(rope(x, positions, 4, SIZE, 1, SIZE), exact)


@pytest.mark.parametrize("kind", ("dynamic", "longrope"))
def test_the_length_of_the_text(kind: str) -> None:
    rope, length = RotaryEmbedding(LONGEST, SIZE, extra_rope_config=KINDS[kind]), LONGEST
    length += 40 if kind == "dynamic" else 0
    x, positions = torch.randn(1, length, 1, SIZE), torch.arange(length)[None]
    whole = rope(x, positions, 1, SIZE, SIZE // 2, SIZE)
    assert_near(whole, _turned(x, *_theirs(kind)(positions), "half"))
    part = rope(x[:, :3], positions[:, :3], 1, SIZE, SIZE // 2, SIZE, seq_len=length)
    assert torch.equal(part, whole[:, :3])
    alone = rope(x[:, :3], positions[:, :3], 1, SIZE, SIZE // 2, SIZE)
    assert not torch.allclose(alone, whole[:, :3])
    assert_near(alone, _turned(x[:, :3], *_theirs(kind)(positions[:, :3]), "half"))


def test_names_of_kinds() -> None:
    x = torch.randn(1, 3, 1, SIZE)
    for kind in ("linear", "yarn", "longrope", "llama3", "dynamic"):
        old = {("type" if key == "rope_type" else key): value for key, value in KINDS[kind].items()}
        if kind == "longrope":
            old["type"] = "su"
        found = [
            RotaryEmbedding(LONGEST, SIZE, extra_rope_config=each)(x, 100, 1, SIZE, 1, SIZE)
            for each in (old, KINDS[kind])
        ]
        assert torch.equal(*found)


def test_what_a_yarn_leaves_out_follows() -> None:
    x, yarn = torch.randn(1, 3, 1, SIZE), KINDS["yarn"]
    without = {key: value for key, value in yarn.items() if key != "factor"}
    short = {key: value for key, value in yarn.items() if key != "original_max_position_embeddings"}
    expected = RotaryEmbedding(LONGEST, SIZE, extra_rope_config=yarn)(x, 100, 1, SIZE, 1, SIZE)
    for length, given in ((LONGEST, without), (FIRST, short), (LONGEST, {**without, "mscale": None})):
        rope = RotaryEmbedding(length, SIZE, extra_rope_config=given)
        assert torch.equal(rope(x, 100, 1, SIZE, 1, SIZE), expected)


def test_tables_are_made_once_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    rope, made = RotaryEmbedding(1 << 14, SIZE), []
    angles = type(rope.frequencies).angles

    def counted(self: Any, variant: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        made.append(len(positions))
        return angles(self, variant, positions)

    monkeypatch.setattr(type(rope.frequencies), "angles", counted)
    x = torch.randn(1, 1, 1, SIZE)
    for position in range(0, 1 << 14, 37):
        rope(x, position, 1, SIZE, SIZE // 2, SIZE)
    assert len(made) <= 7 and made == sorted(made) and made[-1] == 1 << 14
    for again in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert torch.equal(again(x, 9, 1, SIZE, SIZE // 2, SIZE), rope(x, 9, 1, SIZE, SIZE // 2, SIZE))
    rope.to(torch.bfloat16)
    assert_near(rope(x, 5000, 1, SIZE, 1, SIZE), RotaryEmbedding(1 << 14, SIZE)(x, 5000, 1, SIZE, 1, SIZE))


@pytest.mark.parametrize("kind", list(KINDS))
def test_tables_are_in_the_memory_of_the_cpu(kind: str) -> None:
    """Whatever torch's default device is while they are made: they stay when it is another one again."""
    settings = KINDS[kind] or None
    rope, known = (RotaryEmbedding(LONGEST, SIZE, extra_rope_config=settings) for _ in range(2))
    x = torch.randn(1, 2, 1, SIZE)
    for position in (5, FIRST + 9):
        expected = known(x, position, 1, SIZE, SIZE // 2, SIZE)
        with torch.device("meta"):
            assert torch.equal(rope(x, position, 1, SIZE, SIZE // 2, SIZE), expected)
        assert torch.equal(rope(x, position, 1, SIZE, SIZE // 2, SIZE), expected)


# ---- forms of the input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "offset", "head_dim", "flat", "ids", "laid_out"),
    pairs_of(
        DTYPES, (1, SIZE // 2), (SIZE, 70), (False, True), ("rows", "shared", "start"), ("plain", "turned")
    ),
)
def test_forms(dtype: torch.dtype, offset: int, head_dim: int, flat: bool, ids: str, laid_out: str) -> None:
    x = torch.randn(2, 7, 3, head_dim).to(dtype)
    positions = {
        "rows": torch.stack((torch.arange(7), torch.arange(7) * 5)),
        "shared": torch.tensor([[3, 1, 4, 1, 5, 9, 2]], dtype=torch.int32),
        "start": torch.tensor([11]),
    }[ids]
    where = torch.arange(11, 18)[None] if ids == "start" else positions
    given = x.flatten(2) if flat else x
    if laid_out == "turned":
        given = given.transpose(0, 1).contiguous().transpose(0, 1)
    before = given.clone()
    found = RotaryEmbedding(512, SIZE)(given, positions, 3, head_dim, offset, SIZE)
    assert found.shape == x.shape and torch.equal(given, before)
    kind = "interleaved" if offset == 1 else "half"
    assert_near(found, _turned(x, *_theirs("default")(where), kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_a_fused_projection(dtype: torch.dtype, kv_heads: int) -> None:
    x = torch.randn(2, 5, (4 + 2 * kv_heads) * 32).to(dtype)
    query, key, value = RotaryEmbedding(512, SIZE)(
        x, torch.arange(5)[None], 4, 32, SIZE // 2, SIZE, num_concats=3
    )
    assert query.shape == (2, 5, 4, 32) and key.shape == value.shape == (2, 5, kv_heads, 32)
    parts = x.view(2, 5, -1, 32).split((4, kv_heads, kv_heads), 2)
    angles = _theirs("default")(torch.arange(5)[None])
    assert_near(query, _turned(parts[0], *angles, "half"))
    assert_near(key, _turned(parts[1], *angles, "half"))
    assert torch.equal(value, parts[2])


def test_no_tokens() -> None:
    rope = RotaryEmbedding(512, SIZE)
    for shape in ((2, 0, 3, SIZE), (0, 4, 3, SIZE)):
        for offset in (1, SIZE // 2):
            found = rope(
                torch.empty(shape), torch.zeros(1, shape[1], dtype=torch.long), 3, SIZE, offset, SIZE
            )
            assert found.shape == shape


# ---- queries and keys in place -----------------------------------------------------------------------------------------


def _laid_heads(x: Tensor, layout: str) -> Tensor:
    """The same heads: as they are, in a fused projection, with another order of dimensions, or of each second channel."""
    if layout == "fused":
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., 1:-2, :] = x
        return wide[..., 1:-2, :]
    if layout == "heads first":
        return x.transpose(-3, -2).clone(memory_format=torch.contiguous_format).transpose(-3, -2)
    if layout == "steps":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    return x.clone()


@pytest.mark.parametrize(
    ("dtype", "half", "dims", "whole", "ids", "layout", "kv_heads"),
    pairs_of(
        DTYPES,
        (True, False),
        (3, 4),
        (True, False),
        (True, False),
        ("plain", "fused", "heads first", "steps"),
        (4, 1),
    ),
)
def test_queries_and_keys(
    dtype: torch.dtype, half: bool, dims: int, whole: bool, ids: bool, layout: str, kv_heads: int
) -> None:
    around = (6,) if dims == 3 else (2, 6)
    query, key = torch.randn(*around, 4, 70).to(dtype), torch.randn(*around, kv_heads, 70).to(dtype)
    table = torch.randn(50, SIZE // 2)
    sin, cos = table.sin(), table.cos()
    positions = torch.randint(0, 50, around) if ids else None
    at = torch.arange(6) if positions is None else positions
    shape = (-1, 6, SIZE // 2)
    exact_cos, exact_sin = (
        torch.cat((each, each), -1) for each in (cos[at].view(shape), sin[at].view(shape))
    )
    if whole:
        sin, cos = (
            torch.cat((each, each), -1) if half else each.repeat_interleave(2, -1) for each in (sin, cos)
        )
    if not ids:
        sin, cos = sin[:6], cos[:6]
    given = _laid_heads(query, layout), _laid_heads(key, layout)
    found = functional.rotary_embedding(*given, sin, cos, SIZE, half, positions)
    assert found[0] is given[0] and found[1] is given[1]
    for ours, before in zip(found, (query, key), strict=True):
        heads = before.view(-1, 6, *before.shape[-2:])
        exact = _turned(heads, exact_cos, exact_sin, "half" if half else "interleaved")
        assert_near(ours, exact.view(before.shape))
    if layout == "fused":
        around_it = given[0]._base
        assert around_it is not None and around_it[..., 0, :].isnan().all()
        assert around_it[..., -2:, :].isnan().all()


def test_shapes_of_angles() -> None:
    query, key = torch.randn(2, 6, 4, SIZE), torch.randn(2, 6, 2, SIZE)
    angles = torch.randn(2, 6, SIZE // 2)
    for shared in (False, True):
        rows = angles[:1] if shared else angles
        forms = [rows, rows[:, :, None], *([rows[0]] if shared else [])]
        turned = [
            RotaryEmbedding.apply_function(query.clone(), key.clone(), each.sin(), each.cos(), SIZE, True)
            for each in forms
        ]
        for ours in turned[1:]:
            assert torch.equal(ours[0], turned[0][0]) and torch.equal(ours[1], turned[0][1])
    tokens = angles[0]
    three = [
        functional.rotary_embedding(query[0].clone(), key[0].clone(), each.sin(), each.cos(), SIZE, True)[0]
        for each in (tokens, tokens[None], tokens[:, None])
    ]
    assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])


def test_angles_in_the_memory_of_queries() -> None:
    query, key = torch.randn(6, 4, SIZE), torch.randn(6, 1, SIZE)
    cos = sin = query[:, 0]
    expected = functional.rotary_embedding(query.clone(), key.clone(), sin.clone(), cos.clone(), SIZE, True)
    found = functional.rotary_embedding(query, key, sin, cos, SIZE, True)
    assert torch.equal(found[0], expected[0])


_Q, _K, _A = torch.ones(6, 4, SIZE), torch.ones(6, 2, SIZE), torch.ones(6, SIZE)
_IDS = torch.zeros(6, dtype=torch.long)


def _apply(**change: Any) -> Any:
    given = {"query": _Q.clone(), "key": _K.clone(), "sin": _A, "cos": _A, "rotary_dim": SIZE}
    return functional.rotary_embedding(**{**given, "rotary_half": True, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"query": torch.ones(6, SIZE)}, "query has shape"),
        ({"key": torch.ones(5, 2, SIZE)}, "key has shape"),
        ({"key": torch.ones(1, 6, 2, SIZE)}, "key has shape"),
        ({"query": torch.ones(6, 4, SIZE).double()}, "query has dtype"),
        ({"key": torch.ones(6, 1, SIZE).expand(6, 2, SIZE)}, "key has strides"),
        ({"rotary_dim": SIZE + 2}, "rotary_dim is 26"),
        ({"rotary_dim": 3}, "rotary_dim is 3"),
        ({"rotary_dim": 0}, "rotary_dim is 0"),
        ({"sin": torch.ones(6, 5)}, "sin has shape"),
        ({"cos": torch.ones(SIZE)}, "cos has shape"),
        ({"cos": torch.ones(5, SIZE)}, "cos has shape"),
        ({"sin": torch.ones(6, SIZE).long()}, "sin has dtype"),
        ({"sin": torch.ones(6, SIZE // 2)}, None),
        ({"rotary_half": False, "cos": torch.randn(6, SIZE)}, "cos has other angles"),
        ({"position_ids": _IDS + 6}, "position_ids holds 6: 0 to 5 are allowed"),
        ({"position_ids": _IDS - 1}, "position_ids holds -1"),
        ({"position_ids": _IDS[:5]}, "position_ids has shape"),
        ({"position_ids": _IDS.float()}, "position_ids is torch.float32"),
        ({"position_ids": [0] * 6}, "position_ids is a list"),
        ({"position_ids": _IDS, "sin": torch.ones(2, 6, SIZE)}, "sin has shape"),
    ),
)
def test_wrong_queries_and_angles(change: dict[str, Any], message: str | None) -> None:
    if message is None:
        _apply(**change)
        return
    with pytest.raises(InvalidInput, match=message):
        _apply(**change)


_X = torch.ones(1, 3, 2, SIZE)


def _forward(x: Tensor = _X, ids: Any = 0, heads: int = 2, size: int = SIZE, *rest: Any, **more: Any) -> Any:
    return RotaryEmbedding(100, SIZE)(x, ids, heads, size, *(rest or (1, SIZE)), **more)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: _forward(ids=98), "position_ids holds 100: 0 to 99 are allowed"),
        (lambda: _forward(ids=-1), "position_ids holds -1"),
        (lambda: _forward(ids=torch.tensor([[0, 1 << 40, 2]])), "position_ids holds 1099511627776"),
        (lambda: _forward(ids=torch.arange(4)), "position_ids has shape"),
        (lambda: _forward(ids=torch.zeros(2, 3).long()), "position_ids has shape"),
        (lambda: _forward(ids=torch.zeros(1, 3)), "position_ids is torch.float32"),
        (lambda: _forward(ids=None), "position_ids is a NoneType"),
        (lambda: _forward(x=torch.ones(3, 2 * SIZE)), "x has shape"),
        (lambda: _forward(heads=3), "x has shape"),
        (lambda: _forward(x=_X.flatten(2), heads=3), "x has shape"),
        (lambda: _forward(x=_X.long()), "x has dtype"),
        (lambda: _forward(_X, 0, 2, SIZE, 2, SIZE), "offset is 2: 1 or rotary_ndims // 2, 12"),
        (lambda: _forward(_X, 0, 2, SIZE, 1, 12), "rotary_ndims is 12"),
        (lambda: _forward(seq_len=101), "seq_len is 101: 0 to 100"),
        (lambda: _forward(num_concats=2), "num_concats is 2"),
        (lambda: _forward(x=_X.flatten(2), num_concats=3), "x has shape"),
        (lambda: _forward(x=torch.ones(1, 3, 8 * SIZE), num_concats=3), "x has 3 heads of keys"),
        (lambda: RotaryEmbedding(0, SIZE), "max_position_embeddings is 0"),
        (lambda: RotaryEmbedding(100, 7), "pos_embd_dim is 7"),
        (lambda: RotaryEmbedding(100, SIZE, -1.0), "base is -1.0"),
        (lambda: RotaryEmbedding(100, SIZE, extra_rope_config={"type": "ntk"}), "rope_type 'ntk'"),
        (lambda: RotaryEmbedding(100, SIZE, extra_rope_config={"type": "linear"}), "has no factor"),
        (lambda: RotaryEmbedding(100, SIZE, extra_rope_config={"type": "yarn"}), "neither factor nor"),
        (
            lambda: RotaryEmbedding(100, SIZE, extra_rope_config={"type": "linear", "factor": 0.0}),
            "factor is 0.0",
        ),
        (
            lambda: RotaryEmbedding(
                100, SIZE, extra_rope_config={**KINDS["longrope"], "long_factor": [1.0] * 3}
            ),
            "long_factor is 3: 12 numbers are needed",
        ),
    ),
)
def test_wrong_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call()
