"""Operations by torch's kernels: what stock computes, and within the accuracy rules of ours."""

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import functional
from hfopt.cache import Appended
from hfopt.cli import main
from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.functional import LinearWeights, Mask, Scoring, choice
from hfopt.functional.activation import ACTIVATIONS
from hfopt.kernels.linear.rows import ROW_LIMIT
from hfopt.patches.replacement import Replacement
from hfopt.program import programs
from tests import reference
from tests.generation_cases import FAMILIES, gptj, llama, prompts
from tests.reference import DTYPES, assert_as_exact_as_torch, bits

# the functions of these names hide the modules
linear_file: Any = importlib.import_module("hfopt.functional.linear")
attention_file: Any = importlib.import_module("hfopt.functional.attention")

# just below, at and above the first size of every class
ROWS = sorted(
    {size for each in choice.CLASSES["linear"] for size in (each.first - 1, each.first, each.first + 1)}
)
NEW_TOKENS = sorted(
    {size for each in choice.CLASSES["attention"] for size in (each.first - 1, each.first, each.first + 1)}
)
EPILOGUES: dict[str, dict[str, Any]] = {
    "one": {"sizes": (35,)},
    "one with bias and residual": {"sizes": (35,), "biased": (True,), "n_residuals": 1},
    "three, of which two have biases": {"sizes": (32, 7, 9), "biased": (True, False, True)},
    "two residuals": {"sizes": (16, 5), "n_residuals": 2},
    "gated": {"sizes": (33, 33), "activation": "silu", "gated": True},
    "gated with biases and a residual": {
        "sizes": (20, 20), "biased": (True, True), "activation": "gelu", "gated": True, "n_residuals": 1,
    },
    "gated without activation": {"sizes": (20, 20), "gated": True},
    **{name: {"sizes": (21,), "biased": (True,), "activation": name} for name in ACTIVATIONS},
}  # fmt: skip


@pytest.fixture
def torch_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_measure", lambda operation, dtype, size: [0.5] * choice.PAIRS)
    monkeypatch.setattr(programs, "is_quicker", lambda *arguments: False)


@pytest.fixture
def torchs_attention(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens of each call of torch's attention by ours."""
    calls: list[int] = []
    inner = attention_file._attend_in_torch

    def attend(qkv: Tensor, *arguments: Any) -> Tensor | None:
        calls.append(qkv.shape[1])
        return inner(qkv, *arguments)

    monkeypatch.setattr(attention_file, "_attend_in_torch", attend)
    return calls


# ---- linear ------------------------------------------------------------------------------------------------


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activation: str | None,
    gated: bool,
    residuals: list[Tensor],
) -> Tensor:
    act: Callable[[Tensor], Tensor] = ACTIVATIONS[activation] if activation else lambda y: y
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    y = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, -1))
    for residual in residuals:
        y = y + residual
    return y


def _double(tensors: list[Any]) -> list[Any]:
    return [None if each is None else each.double() for each in tensors]


def _error(result: Tensor, exact: Tensor) -> float:
    """Root mean square."""
    return (result.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_linear(dtype: torch.dtype, epilogue: str, torch_is_faster: None) -> None:
    case = {
        "biased": (False,) * 3,
        "n_residuals": 0,
        "activation": None,
        "gated": False,
        **EPILOGUES[epilogue],
    }
    sizes, activation, gated = case["sizes"], case["activation"], case["gated"]
    weights = [_random(dtype, size, 41) / 4 for size in sizes]
    biases = [
        _random(dtype, size) if biased else None for size, biased in zip(sizes, case["biased"], strict=False)
    ]
    record = LinearWeights.of(weights, biases)
    options: Any = {"activation": activation, "gated": gated}
    for rows in ROWS:
        x = _random(dtype, rows, 41)
        width = sizes[0] if gated else sum(sizes)
        residuals = [_random(dtype, rows, width) for _ in range(case["n_residuals"])]
        stock = _linear(x, weights, biases, activation, gated, residuals)
        exact = _linear(x.double(), _double(weights), _double(biases), activation, gated, _double(residuals))
        by_torch = functional.linear(x, record, **options, residuals=residuals, by="torch")
        assert torch.equal(by_torch, stock)
        by_hfopt = functional.linear(x, record, **options, residuals=residuals, by="hfopt")
        assert by_hfopt.shape == by_torch.shape
        if rows:
            # half a rounding of the largest value, where torch is exact
            rounding = exact.abs().max().item() * torch.finfo(dtype).eps / 2
            assert _error(by_hfopt, exact) <= max(2 * _error(stock, exact), rounding)
        automatic = functional.linear(x, record, **options, residuals=residuals, by="auto")
        assert torch.equal(automatic, by_torch)


def test_linear_takes_leading_dimensions_and_leaves_its_inputs_alone() -> None:
    weight, bias, x, residual = (
        torch.randn(6, 10),
        torch.randn(6),
        torch.randn(2, 3, 10),
        torch.randn(2, 3, 6),
    )
    weight.requires_grad_()
    before = residual.clone()
    record = LinearWeights.of([weight], [bias])
    y = functional.linear(x, record, residuals=[residual], by="torch")
    assert torch.equal(y, (F.linear(x, weight, bias) + residual).detach()) and not y.requires_grad
    assert torch.equal(residual, before)


def test_the_rows_of_all_leading_dimensions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def takes_torch(by: str, operation: str, dtype: torch.dtype, size: int) -> bool:
        asked.append(size)
        return False

    monkeypatch.setattr(linear_file, "takes_torch", takes_torch)
    record = LinearWeights.of([torch.randn(6, 10), torch.randn(6, 10)], [None, None])
    functional.linear(torch.randn(2, 3, 10), record, by="auto")
    functional.linear(torch.randn(2, 3, 10), record, gated=True, by="auto")
    functional.linear(torch.randn(10), record, by="auto")
    assert asked == [6, 6, 1]


# ---- attention ---------------------------------------------------------------------------------------------

SIZE = 24
# (query heads, key heads), rows, rows of the prefix, which of them each row reads, tokens of the suffix
LAYOUTS: dict[str, tuple[tuple[int, int], int, int, list[int], int]] = {
    "a row": ((2, 1), 1, 1, [0], 0),
    "rows in order": ((4, 4), 2, 2, [0, 1], 0),
    "rows in another order": ((4, 2), 3, 3, [2, 0, 1], 0),
    "fewer rows than are stored": ((4, 2), 2, 3, [0, 1], 0),
    "beams of two prompts": ((4, 2), 4, 2, [0, 0, 1, 1], 5),
}


def _scene(
    layout: str, dtype: torch.dtype, n_new: int, n_past: int
) -> tuple[Tensor, Appended, tuple[int, int, int]]:
    """Queries and a cache with n_past tokens before the new ones; NaN in its unused columns."""
    (n_heads, n_kv_heads), n_rows, n_stored, rows, suffix_len = LAYOUTS[layout]
    prefix_len = n_past + n_new - suffix_len
    prefix = _random(dtype, 2, n_stored, n_kv_heads, prefix_len + 3, SIZE)
    suffix = _random(dtype, 2, n_rows, n_kv_heads, suffix_len + 2 if suffix_len else 0, SIZE)
    prefix[:, :, :, prefix_len:] = torch.nan
    suffix[:, :, :, suffix_len:] = torch.nan
    appended = Appended(
        bits(prefix), bits(suffix), prefix_len, suffix_len, suffix_len > 0, n_new,
        np.array(rows, np.int32), torch.randint(n_rows, (n_rows, suffix_len + 2), dtype=torch.int32).numpy(),
    )  # fmt: skip
    return (
        _random(dtype, n_rows, n_new, (n_heads + 2 * n_kv_heads) * SIZE),
        appended,
        (n_heads, n_kv_heads, SIZE),
    )


def _attend(qkv: Tensor, appended: Appended, mask: Mask, heads: tuple[int, int, int], by: Any) -> Tensor:
    return functional.attend(qkv, appended, mask, Scoring(SIZE**-0.5), *heads, by=by)


def _masks(n_rows: int, n_new: int, n_keys: int) -> list[tuple[Mask, Tensor]]:
    """Each kind of mask and what it shows: all, causal, the first row padded on the left, holes."""
    causal = torch.ones(n_rows, n_new, n_keys, dtype=torch.bool).tril(n_keys - n_new)
    padded = causal.clone()
    padded[0, :, : n_keys - n_new + 1] = False  # the first new token sees nothing
    holes = causal & (torch.rand(causal.shape) < 0.6)
    bytes_ = [(Mask("bytes", 2 * seen.to(torch.uint8).numpy()), seen) for seen in (padded, holes)]
    return [(Mask("none"), torch.ones_like(causal)), (Mask("causal"), causal), *bytes_]


def _check(qkv: Tensor, appended: Appended, heads: tuple[int, int, int], mask: Mask, seen: Tensor) -> Tensor:
    q = qkv[..., : heads[0] * SIZE].unflatten(-1, (heads[0], SIZE)).transpose(1, 2)
    keys, values = (each[: len(q)] for each in reference.gathered(appended, qkv.dtype))
    theirs = reference.attention(q, keys, values, seen, Scoring(SIZE**-0.5))
    exact = reference.attention(q.double(), keys.double(), values.double(), seen, Scoring(SIZE**-0.5))
    result = _attend(qkv, appended, mask, heads, "torch")
    assert result.is_contiguous()
    assert_as_exact_as_torch(result, theirs.transpose(1, 2).flatten(2), exact.transpose(1, 2).flatten(2))
    assert not result[~seen.any(-1)].any()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_past", [0, 40])
def test_attention(dtype: torch.dtype, layout: str, n_past: int, torchs_attention: list[int]) -> None:
    qkv, appended, heads = _scene(layout, dtype, 9, n_past)
    for mask, seen in _masks(qkv.shape[0], 9, n_past + 9):
        by_torch = _check(qkv, appended, heads, mask, seen)
        by_hfopt = _attend(qkv, appended, mask, heads, "hfopt")
        torch.testing.assert_close(by_torch.float(), by_hfopt.float(), atol=2e-2, rtol=2e-2)
    assert torchs_attention == [9] * 4


@pytest.mark.parametrize("n_new", NEW_TOKENS)
def test_attention_at_the_boundaries(n_new: int, torch_is_faster: None, torchs_attention: list[int]) -> None:
    qkv, appended, heads = _scene("a row", torch.bfloat16, n_new, 3)
    (_, causal) = _masks(1, n_new, n_new + 3)[1]
    results = {by: _attend(qkv, appended, Mask("causal"), heads, by) for by in ("auto", "torch", "hfopt")}
    torch.testing.assert_close(results["hfopt"].float(), results["torch"].float(), atol=2e-2, rtol=2e-2)
    assert torch.equal(results["auto"], results["torch"])
    assert torchs_attention == ([] if n_new == 1 else [n_new] * 2)
    if n_new > 1:
        _check(qkv, appended, heads, Mask("causal"), causal)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])  # a key, a value
def test_what_a_mask_hides_does_not_spread(value: float, which: int) -> None:
    qkv, appended, heads = _scene("a row", torch.float32, 9, 0)
    clean = [_attend(qkv, appended, mask, heads, "torch") for mask, _ in _masks(1, 9, 9)]
    appended.prefix[which, 0, 0, 6, 3] = value
    hidden = torch.ones(1, 9, 9, dtype=torch.bool)
    hidden[..., 6] = False
    padded = _attend(qkv, appended, Mask("bytes", hidden.to(torch.uint8).numpy()), heads, "torch")
    assert padded.isfinite().all()
    causal = _attend(qkv, appended, Mask("causal"), heads, "torch")
    torch.testing.assert_close(causal[:, :6], clean[1][:, :6])
    if value != value:
        assert causal[:, 6:].isnan().any(-1).all()
        assert _attend(qkv, appended, Mask("none"), heads, "torch").isnan().any(-1).all()


@pytest.mark.parametrize(
    "changes", [{"prefix_row": [0, 2]}, {"prefix_row": [-1, 0]}, {"table": [[0, 2, 0]] * 2}]
)
def test_rows_that_the_cache_has_not_are_refused(changes: dict[str, Any]) -> None:
    prefix, suffix = np.zeros((2, 2, 1, 9, SIZE), np.float32), np.zeros((2, 2, 1, 4, SIZE), np.float32)
    rows = {"prefix_row": [0, 1], "table": [[0, 1, 0]] * 2, **changes}
    prefix_row, table = (np.array(each, np.int32) for each in rows.values())
    appended = Appended(prefix, suffix, 5, 3, True, 2, prefix_row, table)
    for by in ("hfopt", "torch"):
        with pytest.raises(InvalidInput, match="that the cache has not"):
            _attend(torch.randn(2, 2, 3 * SIZE), appended, Mask("causal"), (1, 1, SIZE), by)


# ---- models ------------------------------------------------------------------------------------------------


def _kernels(model: nn.Module) -> set[str]:
    return {module._hfopt.kernels for module in model.modules() if isinstance(module, Replacement)}


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_float32(
    family: str, num_beams: int, kernels: Any, torch_is_faster: None, torchs_attention: list[int]
) -> None:
    model = FAMILIES[family]()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "num_beams": num_beams}
    stock = model.generate(**prompts(), **options)
    hfopt.optimize(model, kernels=kernels)
    assert torch.equal(model.generate(**prompts(), **options), stock)
    assert torchs_attention == [9] * 2  # the prompt, once a layer


MODELS: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    "llama, an activation that kernels lack": lambda: llama(hidden_act="mish"),
    "gptj, an activation that kernels lack": lambda: gptj(activation_function="mish"),
}


@pytest.mark.parametrize("name", MODELS)
def test_with_torchs_kernels_every_linear_layer_is_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hfopt.optimize(MODELS[name](), kernels="torch")
    monkeypatch.setattr(linear_file, "prepare_threads", None)  # what ours would call next
    model.generate(**prompts(), max_new_tokens=2, do_sample=False)
    assert all(each.kernels is None for each in choice.choices())


def test_the_same_logits_where_hfopt_only_calls_torch() -> None:
    model, inputs = llama().bfloat16(), prompts()
    with torch.no_grad():
        stock = model(**inputs).logits
        hfopt.optimize(model, kernels="torch")
        by_torch = model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    spread = stock[seen].float().abs().max()
    assert (by_torch[seen].float() - stock[seen].float()).abs().max() < 0.05 * spread


def test_hfopts_own_kernels_give_the_same_bits_at_any_number_of_threads() -> None:
    model = hfopt.optimize(llama().bfloat16(), kernels="hfopt")
    results = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        with torch.no_grad():
            results.append(model(**prompts()).logits)
    assert torch.equal(*results)


def test_the_argument_reaches_every_module_and_its_copies() -> None:
    model = hfopt.optimize(llama(), kernels="torch")
    assert _kernels(model) == _kernels(copy.deepcopy(model)) == {"torch"}
    assert _kernels(pickle.loads(pickle.dumps(model))) == {"torch"}
    assert _kernels(hfopt.optimize(model)) == {"auto"}
    assert _kernels(hfopt.optimize(model, kernels="hfopt")) == {"hfopt"}
    hfopt.restore(model)
    assert _kernels(model) == set()


def test_optimizing_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_measure", None)
    for family in FAMILIES.values():
        hfopt.explain(family())
        hfopt.optimize(family())
    assert not choice._used


@pytest.mark.parametrize("wrong", ["onednn", "", None, True])
def test_a_wrong_argument_is_refused_before_anything_changes(wrong: Any) -> None:
    model = llama()
    with pytest.raises(InvalidInput, match=r"kernels = .*'auto', 'hfopt', 'torch' are allowed"):
        hfopt.optimize(model, dtype=torch.bfloat16, kernels=wrong)
    assert _kernels(model) == set() and model.dtype is torch.float32 and "hfopt" not in vars(model)


def test_a_failure_leaves_the_earlier_setting() -> None:
    model = hfopt.optimize(gptj(), kernels="torch")
    hfopt.restore(model.transformer.h[0].mlp)
    model.transformer.h[0].mlp.fc_in = nn.Sequential(model.transformer.h[0].mlp.fc_in)
    with pytest.raises(UnsupportedModel):
        hfopt.optimize(model, strict=True, kernels="hfopt")
    assert _kernels(model) == {"torch"}


# ---- reports -----------------------------------------------------------------------------------------------


def test_explain_shows_what_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {"linear": [0.5] * 5, "attention": []}
    monkeypatch.setattr(choice, "_measure", lambda operation, dtype, size: ratios[operation])
    model = hfopt.optimize(llama())
    assert "all sizes" in str(model.hfopt)
    inputs = prompts(n_rows=2, length=20)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    n_threads = torch.get_num_threads()
    lines = [" ".join(line.split()) for line in str(hfopt.explain(model)).splitlines()]
    assert lines[-6].startswith(f"auto with {n_threads} threads kernels torch's time / hfopt's")
    assert lines[-4:] == [
        "linear, float32, 2-8 rows torch 0.50",
        f"linear, float32, 33-{ROW_LIMIT} rows torch 0.50",
        "attention, float32, 2-31 new tokens hfopt not measurable",
        "other sizes not needed yet",
    ]
    report = hfopt.explain(model).to_dict()
    assert report["kernels"] == "auto"
    assert {
        "operation": "linear", "dtype": "float32", "sizes": "2-8 rows", "kernels": "torch", "ratio": 0.5,
    } in report["choices"]  # fmt: skip


@pytest.mark.parametrize("kernels", ["hfopt", "torch"])
def test_explain_names_the_kernels_that_the_user_chose(kernels: Any) -> None:
    text = str(hfopt.explain(hfopt.optimize(llama(), kernels=kernels)))
    assert f"; kernels {kernels};" in text and "not needed yet" not in text


def test_parts_may_have_settings_of_their_own() -> None:
    model = hfopt.optimize(llama(), kernels="hfopt")
    hfopt.optimize(model.model.layers[0], kernels="torch")
    assert hfopt.explain(model).kernels == "hfopt, torch"


def test_doctor_shows_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    functional.linear(torch.randn(1, 4), LinearWeights.of([torch.randn(3, 4)], [None]), by="auto")
    assert main(["doctor"]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "| linear, float32, 1 row | hfopt | 2.00 |" in rows
    assert "| attention, bfloat16, 768 new tokens and more | not needed yet | |" in rows


def test_warmup_leaves_nothing_to_be_timed() -> None:
    hfopt.warmup()
    assert all(each.ratio == 2.0 for each in choice.choices())
