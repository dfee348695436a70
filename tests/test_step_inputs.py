"""Programs and steps refuse what does not fit, and write nowhere else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt.cache import AppendedEverywhere, Buffers, IndirectCache
from hfopt.errors import InvalidInput
from hfopt.functional import Epilogue, LinearWeights, Norm, Scoring
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import NONE, Instruction
from hfopt.kernels.linear.blocks import RESIDUALS
from hfopt.kernels.linear.rows import ROW_LIMIT
from hfopt.program.builder import Builder, Value
from hfopt.program.program import Program, Table
from hfopt.program.run import Run
from tests.generation_cases import (
    CACHE,
    FAMILIES,
    one_thread,
    prompts,
)
from tests.reference import DTYPES
from tests.step_cases import bits, programs_of, proven, proven_family

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

HEADS = (4, 2, 8)  # of queries, of keys, channels
SIZE = HEADS[0] * HEADS[2]
WIDTH = (HEADS[0] + 2 * HEADS[1]) * HEADS[2]
N_TOKENS, N_LOGITS = 19, 23


def weights(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> LinearWeights:
    return LinearWeights.of([torch.randn(shape).to(dtype) for shape in shapes], [None] * len(shapes))


def begun() -> tuple[Builder, Value]:
    builder = Builder(torch.float32)
    return builder, builder.look_up(Table(torch.randn(N_TOKENS, SIZE)), "tokens")


def layered(builder: Builder, x: Value, layer: int) -> Value:
    qkv = builder.linear(x, weights((WIDTH, SIZE), dtype=builder.dtype))
    builder.rotate_and_store(qkv, layer, HEADS, "none", None)
    attended = builder.attend(qkv, layer, HEADS, Scoring(0.3))
    return builder.linear(attended, weights((SIZE, SIZE), dtype=builder.dtype), Epilogue(residuals=(x,)))


def head(builder: Builder, x: Value) -> Value:
    builder.take_last(x)
    return builder.linear(x, weights((N_LOGITS, SIZE), dtype=builder.dtype))


def program(n_layers: int = 2, dtype: torch.dtype = torch.float32) -> Program:
    builder = Builder(dtype)
    x = builder.look_up(Table(torch.randn(N_TOKENS, SIZE).to(dtype)), "tokens")
    for layer in range(n_layers):
        x = layered(builder, x, layer)
    return builder.program(head(builder, x), n_layers)


def append(cache: IndirectCache, n_rows: int, n_layers: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    return [cache.append(layer, n_rows, 1, *HEADS[1:], dtype) for layer in range(n_layers)]


def everywhere(appended: Any) -> AppendedEverywhere:
    """What `append_everywhere` makes of such layers."""
    return AppendedEverywhere(appended[0], [Buffers(each.prefix, each.suffix) for each in appended])


def step(**arguments: Any) -> Tensor:
    """A step whose layers are given one by one."""
    appended, run = arguments.pop("appended"), arguments.pop("run")
    found: Tensor = run.logits(
        appended=appended if isinstance(appended, AppendedEverywhere) else everywhere(appended), **arguments
    )
    return found


def given(n_rows: int = 3) -> dict[str, Any]:
    """Arguments of a step that are right."""
    cache = IndirectCache()
    return {
        "run": Run(program(), n_rows),
        "tokens": np.arange(n_rows, dtype=np.int64),
        "positions": np.arange(n_rows, dtype=np.int64),
        "appended": append(cache, n_rows),
        "mask": np.ones((n_rows, 1), np.uint8),
    }


def test_what_is_right() -> None:
    assert step(**given()).shape == (3, 1, N_LOGITS)


# ---- programs ----------------------------------------------------------------------------------------------

_BFLOAT = torch.bfloat16


def _rotate(builder: Builder, x: Value, rotation: str, *tables: Tensor) -> None:
    qkv = builder.linear(x, weights((WIDTH, SIZE)))
    angles = [builder.look_up(Table(each), "positions") for each in tables]
    builder.rotate_and_store(qkv, 0, HEADS, rotation, tuple(angles) or None)  # type: ignore[arg-type]


def _attend(builder: Builder, x: Value, *heads: int) -> None:
    builder.attend(builder.linear(x, weights((WIDTH, SIZE))), 0, heads, Scoring(1.0))  # type: ignore[arg-type]


def _norm(weight: torch.Tensor) -> Norm:
    return Norm("rms", weight, None, 1e-5)


def _norm_of_another_dtype(builder: Builder, x: Value) -> None:
    other = builder.look_up(Table(torch.randn(N_TOKENS, SIZE).to(_BFLOAT)), "tokens")
    builder.norm(other, Norm("rms", torch.ones(SIZE), None, 1e-5))


def _linear_of_another_dtype(builder: Builder, x: Value) -> None:
    other = builder.look_up(Table(torch.randn(N_TOKENS, SIZE).to(_BFLOAT)), "tokens")
    builder.linear(other, weights((8, SIZE)))


def _residual_of_another_dtype(builder: Builder, x: Value) -> None:
    other = builder.look_up(Table(torch.randn(N_TOKENS, SIZE).to(_BFLOAT)), "tokens")
    builder.linear(x, weights((SIZE, SIZE)), Epilogue(residuals=(other,)))


REFUSED: dict[str, Callable[[Builder, Value], Any]] = {
    "norm weight size": lambda b, x: b.norm(x, Norm("rms", torch.ones(SIZE - 1), None, 1e-5)),
    "norm weight dtype": lambda b, x: b.norm(x, Norm("rms", torch.ones(SIZE, dtype=_BFLOAT), None, 1e-5)),
    "norm weight strides": lambda b, x: b.norm(x, Norm("rms", torch.ones(2 * SIZE)[::2], None, 1e-5)),
    "norm weight meta": lambda b, x: b.norm(x, Norm("rms", torch.ones(SIZE, device="meta"), None, 1e-5)),
    "norm bias size": lambda b, x: b.norm(x, Norm("layer", None, torch.ones(SIZE + 1), 1e-5)),
    "norm input dtype": _norm_of_another_dtype,
    "linear size": lambda b, x: b.linear(x, weights((8, SIZE + 1))),
    "linear dtype": lambda b, x: b.linear(x, weights((8, SIZE), dtype=_BFLOAT)),
    "linear input dtype": _linear_of_another_dtype,
    "residual size": lambda b, x: b.linear(x, weights((8, SIZE)), Epilogue(residuals=(x,))),
    "residual dtype": _residual_of_another_dtype,
    "too many residuals": lambda b, x: b.linear(
        x, weights((SIZE, SIZE)), Epilogue(residuals=[x] * (len(RESIDUALS) + 1))
    ),
    "activation": lambda b, x: b.linear(x, weights((8, SIZE)), Epilogue("sine")),
    "gate alone": lambda b, x: b.linear(x, weights((8, SIZE)), Epilogue(gated=True)),
    "gate and up differ": lambda b, x: b.linear(x, weights((8, SIZE), (10, SIZE)), Epilogue(gated=True)),
    "heads to normalise that are not there": lambda b, x: b.norm_heads(x, _norm(torch.ones(8)), 16, 3, 8),
    "heads to normalise of another size": lambda b, x: b.norm_heads(x, _norm(torch.ones(8)), 0, 1, 7),
    "head norm dtype": lambda b, x: b.norm_heads(x, _norm(torch.ones(8, dtype=_BFLOAT)), 0, 1, 8),
    "no limit": lambda b, x: b.clamp(x, 0.0),
    "an infinite limit": lambda b, x: b.softcap(x, torch.inf),
    "scale and residual differ": lambda b, x: b.scale(x, 2.0, b.linear(x, weights((8, SIZE)))),
    "heads and size": lambda b, x: _attend(b, x, 4, 2, 7),
    "heads and groups": lambda b, x: _attend(b, x, 2, 3, 8),
    "no heads": lambda b, x: _attend(b, x, 8, 0, 8),
    "negative heads": lambda b, x: _attend(b, x, -4, -2, -8),
    "rotation": lambda b, x: _rotate(b, x, "spiral"),
    "no angles": lambda b, x: _rotate(b, x, "half"),
    "angles for none": lambda b, x: _rotate(b, x, "none", *[torch.randn(5, 8)] * 2),
    "angles beyond a head": lambda b, x: _rotate(b, x, "half", *[torch.randn(5, 10)] * 2),
    "pairs beyond a head": lambda b, x: _rotate(b, x, "interleaved", *[torch.randn(5, 5)] * 2),
    "odd angles": lambda b, x: _rotate(b, x, "half", *[torch.randn(5, 5)] * 2),
    "angles differ": lambda b, x: _rotate(b, x, "half", torch.randn(5, 8), torch.randn(5, 6)),
    "angles of another dtype": lambda b, x: _rotate(b, x, "half", *[torch.randn(5, 8).to(_BFLOAT)] * 2),
    "added size": lambda b, x: b.add_looked_up(Table(torch.randn(5, SIZE - 1)), "positions", x),
    "added dtype": lambda b, x: b.add_looked_up(Table(torch.randn(5, SIZE).to(_BFLOAT)), "positions", x),
    "table of one dimension": lambda b, x: b.look_up(Table(torch.randn(5)), "tokens"),
    "table of integers": lambda b, x: b.look_up(Table(torch.ones(5, 5, dtype=torch.long)), "tokens"),
    "table with strides": lambda b, x: b.look_up(Table(torch.randn(5, 5).t()), "tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operands_that_do_not_fit(name: str) -> None:
    builder, x = begun()
    with pytest.raises(InvalidInput):
        REFUSED[name](builder, x)


@pytest.mark.parametrize("layers", [(0,), (0, 0), (0, 2), (1, 2), (0, 1, 2), (-1, 0)])
def test_layers_are_cached_once_each(layers: tuple[int, ...]) -> None:
    builder, x = begun()
    with pytest.raises(InvalidInput):
        for layer in layers:
            x = layered(builder, x, layer)
        builder.program(head(builder, x), 2)


def test_nothing_follows_what_makes_the_logits() -> None:
    builder, x = begun()
    logits = head(builder, layered(builder, x, 0))
    builder.norm(logits, Norm("rms", torch.ones(N_LOGITS), None, 1e-5))
    with pytest.raises(InvalidInput, match="rms_norm is the last"):
        builder.program(logits, 1)


def test_logits_are_of_the_last_tokens() -> None:
    builder, x = begun()
    x = layered(builder, x, 0)
    with pytest.raises(InvalidInput, match="the last tokens"):
        builder.program(x, 1)


def test_logits_that_are_scaled() -> None:
    builder = Builder(torch.float32)
    table, matrix = Table(torch.randn(N_TOKENS, SIZE)), weights((N_LOGITS, SIZE))
    x = layered(builder, builder.look_up(table, "tokens"), 0)
    builder.take_last(x)
    logits = builder.scale(builder.linear(x, matrix), 3.0, divide=True)
    arguments = given() | {"appended": append(IndirectCache(), 3, 1)}
    scaled = step(**{**arguments, "run": Run(builder.program(logits, 1), 3)})
    written = builder._written.pop()
    plain = step(**{**arguments, "run": Run(builder.program(written.operands["IN"], 1), 3)})
    assert torch.equal(scaled, plain / 3)


@pytest.mark.parametrize("grown", [torch.zeros(8, 5), torch.zeros(8, 4).to(_BFLOAT), torch.zeros(4, 8).t()])
def test_a_table_that_grows_into_something_else(grown: Tensor) -> None:
    table = Table(torch.zeros(2, 4), lambda n: grown)
    assert len(table.reach(2)) == 2
    with pytest.raises(InvalidInput):
        table.reach(3)


# ---- instructions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", kernels.INSTRUCTIONS, ids=lambda each: each.name)
def test_rows_of_instructions(instruction: Instruction) -> None:
    own = {name: place + 7 for place, name in enumerate(instruction.columns)}
    row = kernels.row_of(instruction, SIZE=5, **own)
    assert len(row) == kernels.COLUMNS and kernels.INSTRUCTIONS[row[0]] is instruction
    assert row[1:].tolist()[: 4 + len(own)] == [NONE, NONE, 5, 0, *own.values()]
    with pytest.raises(InvalidInput, match="needed"):
        kernels.row_of(instruction, **own, another=1)
    for name in own:
        with pytest.raises(InvalidInput, match=name):
            kernels.row_of(instruction, **{other: 1 for other in own if other != name})


_QUANTIZED = kernels.INSTRUCTIONS.index(kernels.QUANTIZED_LINEAR)


@pytest.mark.parametrize("number", [-1, len(kernels.INSTRUCTIONS), 1 << 40, -(1 << 62), _QUANTIZED])
def test_an_operation_that_there_is_not(number: int) -> None:
    """Nor one over quantised weights in a program without formats. Nothing is written."""
    arguments = given()
    built = arguments["run"].program
    code = built.code.copy()
    code[5, 0] = number
    run = Run(built._replace(code=code), 3)
    run._arena[:] = 0xA5
    stored = [each.prefix.copy() for each in arguments["appended"]]
    with pytest.raises(InvalidInput, match=f"instruction 5 has operation {number}:"):
        step(**{**arguments, "run": run})
    assert (run._arena == 0xA5).all()
    for before, after in zip(stored, arguments["appended"], strict=True):
        assert np.array_equal(before.view(np.uint8), after.prefix.view(np.uint8))


# ---- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [-1, 0])
def test_rows_of_scratch(n_rows: int) -> None:
    with pytest.raises(InvalidInput, match="n_rows"):
        Run(program(), n_rows)


def _replaced(appended: Any, which: int = 0, **changes: Any) -> Any:
    return [each._replace(**changes) if place == which else each for place, each in enumerate(appended)]


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fewer tokens": lambda a: {"tokens": a["tokens"][:1]},
    "more tokens": lambda a: {"tokens": np.arange(4)},
    "tokens of two dimensions": lambda a: {"tokens": a["tokens"][:, None]},
    "tokens of another type": lambda a: {"tokens": a["tokens"].astype(np.int32)},
    "fewer positions": lambda a: {"positions": a["positions"][:1]},
    "positions of another type": lambda a: {"positions": a["positions"].astype(np.float64)},
    "a mask of fewer rows": lambda a: {"mask": a["mask"][:1]},
    "a mask of fewer keys": lambda a: {"mask": a["mask"][:, :0]},
    "a mask of another type": lambda a: {"mask": a["mask"].astype(np.int64)},
    "a mask of more dimensions": lambda a: {"mask": a["mask"][:, None]},
    "no layers": lambda a: {"appended": AppendedEverywhere(a["appended"][0], [])},
    "fewer layers": lambda a: {"appended": a["appended"][:1]},
    "more layers": lambda a: {"appended": a["appended"] * 2},
    "other rows": lambda a: {"appended": append(IndirectCache(), 2)},
    "another dtype": lambda a: {"appended": append(IndirectCache(), 3, dtype=_BFLOAT)},
    "other heads": lambda a: {
        "appended": [IndirectCache().append(0, 3, 1, 1, 8, torch.float32) for _ in range(2)]
    },
    "another size": lambda a: {
        "appended": [IndirectCache().append(0, 3, 1, 2, 4, torch.float32) for _ in range(2)]
    },
    "several tokens": lambda a: {"appended": [each._replace(n_new=2) for each in a["appended"]]},
    "longer than stored": lambda a: {"appended": [each._replace(prefix_len=65) for each in a["appended"]]},
    "negative length": lambda a: {"appended": [each._replace(prefix_len=-1) for each in a["appended"]]},
    "nothing stored": lambda a: {"appended": [each._replace(prefix_len=0) for each in a["appended"]]},
    "no suffix": lambda a: {
        "appended": [each._replace(in_suffix=True, suffix_len=1) for each in a["appended"]]
    },
    "fewer rows of one layer": lambda a: {
        "appended": _replaced(a["appended"], 1, prefix=a["appended"][1].prefix[:, :2].copy())
    },
    "fewer columns of one layer": lambda a: {
        "appended": _replaced(a["appended"], 1, prefix=a["appended"][1].prefix[:, :, :, :0].copy())
    },
    "rows of another type": lambda a: {
        "appended": [each._replace(prefix_row=each.prefix_row.astype(np.int64)) for each in a["appended"]]
    },
    "a row that is not there": lambda a: {
        "appended": _replaced(a["appended"], prefix_row=np.array([0, 1, 3], np.int32))
    },
    "a negative row": lambda a: {
        "appended": _replaced(a["appended"], prefix_row=np.array([0, -1, 2], np.int32))
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_a_step_refuses(name: str) -> None:
    arguments = given()
    stored = [each.prefix.copy() for each in arguments["appended"]]
    with pytest.raises(InvalidInput):
        step(**{**arguments, **WRONG[name](arguments)})
    for before, after in zip(stored, arguments["appended"], strict=True):
        assert np.array_equal(before.view(np.uint8), after.prefix.view(np.uint8))
    # and goes on with what is right
    assert step(**arguments).isfinite().all()


@pytest.mark.parametrize("index", [-1, N_TOKENS, 1 << 40, -(1 << 62)])
def test_tokens_outside_the_table(index: int) -> None:
    arguments = given()
    with pytest.raises(InvalidInput, match="no such rows"):
        step(**{**arguments, "tokens": np.array([1, index, 2])})


@pytest.mark.parametrize(
    "name, position",
    # the angles of llama are computed as far as they are needed
    [
        ("gptj", -1),
        ("gptj", 96),
        ("gptj", 1 << 40),
        ("opt", -1),
        ("opt", 96),
        ("opt", 1 << 40),
        ("llama", -1),
    ],
)
def test_positions_outside_the_tables(name: str, position: int) -> None:
    model = proven_family(name)
    built = programs_of(model)._made.program
    cache = IndirectCache(model.config)
    appended = [cache.append(layer, 1, 1, *layout) for layer, layout in enumerate(built.layouts)]
    with pytest.raises(InvalidInput, match="no such rows"):
        Run(built, 1).logits(np.array([1]), np.array([position]), everywhere(appended))


@pytest.mark.parametrize("name", ["gptj", "opt"])
def test_requests_past_the_positions(name: str) -> None:
    model = proven_family(name)
    with pytest.raises(InvalidInput, match="position"):
        model.generate(**prompts(2), max_new_tokens=120, do_sample=False)


def test_a_token_that_the_embedding_has_not() -> None:
    """A head that is larger than the embedding; the cache is left as it was before the step."""
    model = FAMILIES["llama"]()
    model.lm_head = torch.nn.Linear(64, 400).eval()
    with torch.no_grad():
        model.lm_head.bias[3] = 1e3
        proven(model)
        model.lm_head.bias[300] = 1e4
    cache = IndirectCache(model.config)
    with pytest.raises(InvalidInput, match="no such rows"):
        model.generate(**prompts(1, 4), **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    assert cache.get_seq_length() == 4


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 3, 8, ROW_LIMIT, ROW_LIMIT + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_written_around_arena_and_logits(
    name: str, dtype: torch.dtype, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = proven_family(name, dtype)
    built: Program = programs_of(model)._made.program
    cache = IndirectCache(model.config)
    results = []
    for is_guarded in (False, True):
        appended = [cache.append(layer, n_rows, 1, *layout) for layer, layout in enumerate(built.layouts)]
        run = Run(built, n_rows)
        arena, guard = built.row_bytes * n_rows, 256
        size = arena + run.scratch_bytes
        memory = np.full(size + 2 * guard + 64, 0xA5, np.uint8)
        n_bytes = n_rows * built.n_logits * dtype.itemsize
        logits = np.full(n_bytes + 2 * guard, 0xA5, np.uint8)
        first = -(-(memory.ctypes.data + guard) // 64) * 64 - memory.ctypes.data
        with monkeypatch.context() as patch:
            if is_guarded:
                run.arena = memory.ctypes.data + first
                run.scratch = run.arena + arena
                out = torch.from_numpy(logits)[guard : guard + n_bytes].view(dtype)
                # what `logits` makes
                patch.setattr(torch, "empty", lambda shape, dtype, device, out=out: out.view(shape))
            tokens = np.arange(n_rows)
            positions = np.arange(n_rows, dtype=np.int64)
            results.append(run.logits(tokens, positions, everywhere(appended)).clone())
        if is_guarded:
            assert (memory[:first] == 0xA5).all() and (memory[first + size :] == 0xA5).all()
            assert (logits[:guard] == 0xA5).all() and (logits[guard + n_bytes :] == 0xA5).all()
            assert not (logits[guard : guard + n_bytes] == 0xA5).all()
        for layer in cache.layers:
            layer.crop(-1)
    assert torch.equal(bits(results[0]), bits(results[1]))


def test_columns_behind_the_cache_stay() -> None:
    arguments = given(2)
    for each in arguments["appended"]:
        each.prefix[:] = 7.0
    step(**arguments)
    for each in arguments["appended"]:
        assert (each.prefix[:, :, :, 1:] == 7.0).all() and not (each.prefix[:, :, :, :1] == 7.0).any()


def test_infinite_and_hidden() -> None:
    """What a mask hides may be anything."""
    arguments = given(2)
    first = step(**arguments)
    cache = IndirectCache()
    append(cache, 2)
    for layer in cache.layers:
        layer.prefix[:] = torch.nan
    arguments["appended"] = append(cache, 2)
    arguments["mask"] = np.array([[0, 1], [0, 1]], np.uint8)
    assert torch.equal(bits(step(**arguments)), bits(first))
