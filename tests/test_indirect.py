"""Attention of beams over a cache that is not moved, against caches that are copied."""

import copy
import math
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from hfopt import functional
from hfopt.cache import storage
from hfopt.errors import CacheFull, InvalidInput
from hfopt.functional import indirect_access_kv_cache_attention as attend
from hfopt.modules import IndirectAccessKVCacheAttention
from tests.indirect_cases import TOLERANCES, Heads, Twins, attention, first_layer_past
from tests.pairs import pairs_of
from tests.reference import DTYPES

SIZES = (24, 64, 70, 96, 128, 256)
GROUPS = ((4, 4), (8, 2), (8, 1), (71, 1))  # 1, 4, 8 and 71 heads of queries for one of keys
SMALL: Heads = (4, 2, 24)


@pytest.mark.parametrize(
    ("dtype", "size", "group", "n_beams", "thin"), pairs_of(DTYPES, SIZES, GROUPS, (1, 4), (True, False))
)
def test_long_histories(
    dtype: torch.dtype, size: int, group: tuple[int, int], n_beams: int, thin: bool
) -> None:
    """Two prompts, and beams that go on with each other; caches grow from 64 tokens on."""
    twins = Twins(2 * n_beams, (*group, size), dtype)
    twins.step(30, 2 if thin else None)
    for _ in range(40):
        twins.reorder(twins.random_rows(n_beams))
        twins.step(1)
    assert twins.past[1].shape == twins.past[2].shape == (128, 2 * n_beams, group[1], size)
    assert twins.past[3].shape == (130, 2 * n_beams)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "size", "group", "n_prompt"), pairs_of(DTYPES, SIZES, GROUPS, (1, 8, 1025, 4096))
)
def test_long_prompts(dtype: torch.dtype, size: int, group: tuple[int, int], n_prompt: int) -> None:
    twins = Twins(4, (*group, size), dtype)
    twins.step(n_prompt, 1)
    for _ in range(100):
        twins.reorder(twins.random_rows(4))
        twins.step(1)


def test_a_thousand_steps() -> None:
    twins = Twins(4, (2, 1, 24))
    twins.step(3, 1)
    for step in range(1000):
        twins.reorder(twins.random_rows(4))
        if step % 97 == 0:
            twins.step(1)
        else:  # the twin alone would take most of the time
            x = twins.random(4, 1, 2, 24)
            k, v = twins.random(2, 4, 1, 1, 24)
            twins.keys, twins.values = torch.cat((twins.keys, k), 1), torch.cat((twins.values, v), 1)
            twins.past = attend(x, k, v, 1.0, twins.past)[2]
    twins.step(1)
    assert twins.past[1].shape[0] == 1024 and twins.length == 3 + 1000 + 1


def test_rows_may_leave_their_prompts() -> None:
    """What a copy of the caches would do."""
    for thin in (2, 4):
        twins = Twins(4, SMALL)
        twins.step(5, thin)
        for _ in range(8):
            twins.reorder(torch.randint(4, (4,), generator=twins.generator))
            twins.step(1)


def test_greedy_rows_need_no_reorder() -> None:
    for n_rows in (1, 3):
        twins = Twins(n_rows, SMALL)
        for n_new in (5, 1, 1, 70, 1):
            twins.step(n_new)
    twins = Twins(4, SMALL)  # nor do beams
    twins.step(5, 2)
    for n_new in (1, 1, 3, 1):
        twins.step(n_new)


@pytest.mark.parametrize("n_given", (2, 8))
def test_chunks_of_prompts_and_of_guesses(n_given: int) -> None:
    twins = Twins(8, SMALL)
    for n_new in (7, 1, 130, 3):
        twins.step(n_new, n_given)
    for n_new in (1, 5, 1, 300, 2):
        twins.reorder(twins.random_rows(4))
        twins.step(n_new)
        twins.step(n_new)


def test_tokens_are_taken_back() -> None:
    """As those that were guessed wrongly are: the carrier says how many are left."""
    for n_given in (1, 4):
        twins = Twins(4, SMALL)
        twins.step(6, n_given)
        twins.step(5, n_given)
        twins.forget(8)
        twins.step(1, n_given)
        for n_kept in (1, 2, 4):
            twins.reorder(twins.random_rows(4))
            twins.step(5)
            twins.past[3][twins.length - 1] = 3  # which goes with the tokens before it
            twins.forget(twins.length - 5 + n_kept)
            twins.step(2)


def _mask(seen: Tensor, n_new: int, dtype: torch.dtype, hidden: float = -torch.inf) -> Tensor:
    """[rows, 1, n_new, n_keys] of what rows see."""
    seen = seen[:, None, None].expand(-1, 1, n_new, -1)
    return seen if dtype is torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden)


def _visible(out: Tensor, seen: Tensor) -> Tensor:
    return out[seen[:, None, -out.shape[2] :].expand(-1, out.shape[1], -1)]


@pytest.mark.parametrize("dtype", (torch.bool, *DTYPES, torch.float64))
def test_left_padding(dtype: torch.dtype) -> None:
    twins = Twins(8, SMALL)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, :4] = seen[1, :1] = False
    twins.step(9, 2, attention_mask=_mask(seen, 9, dtype))
    seen = seen.repeat_interleave(4, 0)
    for n_new in (1, 1, 3, 1):
        twins.reorder(twins.random_rows(4))
        seen = torch.cat((seen, torch.ones(8, n_new, dtype=torch.bool)), 1)
        twins.step(n_new, attention_mask=_mask(seen, n_new, dtype))


@pytest.mark.parametrize(
    ("dtype", "hidden"),
    ((torch.float32, torch.finfo(torch.float32).min), (torch.bfloat16, -1e9), (torch.float16, -6e4)),
)
def test_minimum_of_the_dtype_hides(dtype: torch.dtype, hidden: float) -> None:
    """Whatever keys and values are; tokens of the padding itself, which see no other token, get 0."""
    twins = Twins(2, SMALL)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, :4] = False
    q, k, v = (twins.random(2, 9, n, 24) for n in (4, 2, 2))
    k[0, :4], v[0, :4] = torch.inf, torch.nan
    out, _, _ = attend(q, k, v, 3.0, attention_mask=_mask(seen, 9, dtype, hidden))
    k, v = (each.masked_fill(~seen[:, :, None, None], 0) for each in (k, v))
    expected = attention(q, k, v, 3.0, _mask(seen, 9, torch.bool), True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert not out[0, :, :4].any()
    # and equal scores, however low, are equal weights where there are no others
    x = twins.random(2, 1, 2, 24)
    out, _, _ = attend(x, x, x.expand(-1, -1, 2, -1), 3.0, attention_mask=torch.full((1, 1, 1, 1), -1e9))
    torch.testing.assert_close(out, x.transpose(1, 2))


def _alibi(n_heads: int) -> Tensor:
    return 2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("alibi", "rounded", "random", "hides"))
def test_masks_of_each_head(kind: str, dtype: torch.dtype) -> None:
    """As Bloom, MPT and Falcon hand them over, and any other."""
    n_heads = 8
    twins = Twins(4, (n_heads, 2, 32), dtype)

    def mask(n_rows: int, n_new: int) -> Tensor:
        n_keys = twins.length + n_new
        if kind == "random":
            return 3 * twins.random(n_rows, n_heads, n_new, n_keys)
        if kind == "hides":
            return (twins.random(1, n_heads, 1, n_keys) < 0.5) | (torch.arange(n_keys) >= n_keys - n_new)
        bias = _alibi(n_heads)[:, None, None] * torch.arange(n_keys)
        bias = bias + _mask(
            torch.arange(n_keys)[None] > 1, n_new, torch.float32, -1e9 if n_new < 9 else -torch.inf
        )
        return bias.to(dtype if kind == "rounded" else torch.float32).expand(n_rows, -1, -1, -1)

    twins.step(300, 1, attention_mask=mask(1, 300))
    for n_new in (1, 1, 4, 1):
        twins.reorder(twins.random_rows(4))
        twins.step(n_new, attention_mask=mask(4, n_new))


@pytest.mark.parametrize("padded", (False, True))
def test_alibi(padded: bool) -> None:
    """Slopes, or a bias in three or four dimensions."""
    n_heads, size = 4, 24
    slopes = _alibi(n_heads)
    results = []
    for form in (1, 3, 4):
        twins = Twins(4, (n_heads, 4, size))
        for n_new, n_given in ((5, 2), (1, 4), (3, 4)):
            n_keys = twins.length + n_new
            alibi = slopes
            if form > 1:
                alibi = (slopes[:, None, None] * torch.arange(n_keys)).expand(n_given, -1, -1, -1)
            if form == 3:
                alibi = alibi.flatten(0, 1)
            mask = _mask(torch.arange(n_keys)[None] > 0, 1, torch.bool) if padded else None
            results.append(twins.step(n_new, n_given, alibi=alibi, attention_mask=mask))
            twins.reorder(twins.random_rows(2))
    for one, other in zip(results[:3], results[3:6], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_new", (1, 4))
@pytest.mark.parametrize("shape", ((1, 1, 1), (3, 1, 1), (1, 4, 1), (1, 1, 4), (3, 4, 4)))
@pytest.mark.parametrize("biased", (False, True))
def test_masks_are_broadcast(shape: tuple[int, int, int], n_new: int, biased: bool) -> None:
    twins = Twins(3, SMALL)
    twins.step(6)
    n_keys = 6 + n_new
    shape = *shape[:2], min(shape[2], n_new)
    mask = twins.random(*shape, n_keys)
    if not biased:
        mask = mask < 0.3
        mask[..., 0] = True
    for causal in (True, False):
        twins.forget(6)
        twins.step(n_new, causal=causal, attention_mask=mask)
    twins.forget(6)
    twins.step(n_new, causal=False)


def test_strided_inputs() -> None:
    """Heads of a fused projection, and in another order."""
    qkv = torch.randn(2, 5, 8, 24)
    q, k, v = qkv.split((4, 2, 2), 2)
    expected = attend(q.contiguous(), k.contiguous(), v.contiguous(), 5.0)[0]
    assert torch.equal(attend(q, k, v, 5.0)[0], expected)
    alone = q[:1].expand(2, -1, -1, -1)
    assert torch.equal(attend(alone, k, v, 5.0)[0][0], expected[0])
    q, k, v = (each.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for each in (q, k, v))
    assert torch.equal(attend(q, k, v, 5.0)[0], expected)


def _bytes(tensor: Tensor) -> Tensor:
    """A copy, also of what nobody has written, which may be NaN."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


# ---- the state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    (
        copy.deepcopy,
        lambda past: pickle.loads(pickle.dumps(past)),
        lambda past: tuple(each.clone() for each in past),
        lambda past: tuple(each.contiguous() for each in past),
        lambda past: list(past),
        lambda past: (*past[:3], past[3].t().contiguous().t()),
        lambda past: (past[0], past[1], past[2].clone(), past[3]),
    ),
)
def test_copies_of_the_state(copied: Any) -> None:
    twins = Twins(4, SMALL)
    twins.step(5, 2)
    for _ in range(3):
        twins.reorder(twins.random_rows(2))
        twins.step(1)
        kept = twins.past
        before = [_bytes(each) for each in kept[1:3]]
        twins.past = copied(twins.past)
        twins.step(2)
        if twins.past[1].data_ptr() != kept[1].data_ptr():
            assert all(map(torch.equal, before, map(_bytes, kept[1:3])))


def test_the_state_takes_no_memory_of_its_own() -> None:
    twins = Twins(4, SMALL)
    twins.step(700, 1)
    carrier, keys, values, beam_idx = twins.past
    assert carrier.shape == (1, 700, 700, 1) and carrier.dtype == torch.long
    assert carrier.untyped_storage().nbytes() == 8
    # the next call finds the buffer, and writes into it
    twins.step(1)
    assert twins.past[1].data_ptr() == keys.data_ptr() and twins.past[2].data_ptr() == values.data_ptr()
    assert twins.past[3].data_ptr() == beam_idx.data_ptr()
    # a prompt is stored once
    assert keys.untyped_storage().nbytes() == 2 * keys.numel() * 4


@pytest.mark.parametrize(
    ("text_max_length", "n_prompt", "capacities"),
    ((0, 5, (64, 128)), (90, 5, (64, 90, 180)), (80, 70, (80, 160)), (50, 70, (192,))),
)
def test_growth(text_max_length: int, n_prompt: int, capacities: tuple[int, ...]) -> None:
    attention = IndirectAccessKVCacheAttention(text_max_length)
    twins = Twins(4, SMALL, function=attention)
    twins.step(n_prompt, 1)
    for capacity in capacities:
        assert twins.past[1].shape[0] == capacity
        twins.reorder(twins.random_rows(4))
        twins.step(capacity + 1 - twins.length)
    twins.reorder(twins.random_rows(4))
    twins.step(5 * twins.past[1].shape[0] // 2)  # several times as many at once
    twins.reorder(twins.random_rows(4))
    twins.step(1)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(4, SMALL)
    twins.step(60, 1)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "available_memory", lambda: 0)
        patched.setattr(storage, "_UNCHECKED_BYTES", 0)
        x = torch.randn(4, 100, 4, 24)
        with pytest.raises(CacheFull, match="bytes more; 0 bytes are available"):
            attend(x, x[:, :, :2], x[:, :, :2], 1.0, twins.past)
    twins.reorder(twins.random_rows(4))
    twins.step(1)


def test_a_cache_of_float8_keeps_the_dtype_of_the_keys() -> None:
    twins = Twins(4, SMALL, torch.bfloat16)
    dummy = torch.zeros(1, 1, 1, 1).to(torch.float8_e5m2)
    twins.past = (twins.past[0], dummy, dummy, twins.past[3])
    twins.step(5, 1)
    assert twins.past[1].dtype == torch.bfloat16
    twins.step(1)


def test_inference_mode_and_gradients() -> None:
    twins = Twins(4, SMALL)
    with torch.inference_mode():
        twins.step(5, 1)
    twins.reorder(twins.random_rows(4))
    twins.step(70)
    with torch.inference_mode():
        twins.reorder(twins.random_rows(4))
        twins.step(1)
    x = torch.randn(4, 1, 2, 24, requires_grad=True)
    with pytest.raises(InvalidInput, match="query needs a gradient"):
        attend(x.repeat(1, 1, 2, 1), x, x * 2, torch.tensor(3.0), twins.past)
    with torch.no_grad():
        attend(x.repeat(1, 1, 2, 1), x, x * 2, torch.tensor(3.0), twins.past)


def test_a_compiled_caller() -> None:
    x = torch.randn(2, 6, 2, 64)

    def attended(x: Tensor) -> Tensor:
        return 2 * attend(x, x, x, 4.0)[0]

    with torch.no_grad():
        assert torch.equal(torch.compile(attended, backend="eager")(x), attended(x))


def test_requests_of_threads_on_one_module() -> None:
    attention = IndirectAccessKVCacheAttention()
    failures: list[Exception] = []

    def work(n_rows: int) -> None:
        try:
            for _ in range(3):
                twins = Twins(n_rows, SMALL, function=attention)
                twins.step(20, 1)
                for _ in range(60):
                    twins.reorder(twins.random_rows(n_rows))
                    twins.step(1)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n_rows,)) for n_rows in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- cross attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size", "group", "n_new", "n_keys"),
    pairs_of(DTYPES, (24, 64), ((4, 4), (8, 2)), (1, 3, 40), (1, 33)),
)
def test_cross_attention(
    dtype: torch.dtype, size: int, group: tuple[int, int], n_new: int, n_keys: int
) -> None:
    keys, values = torch.randn(2, 3, n_keys, group[1], size).to(dtype)
    q = torch.randn(3, n_new, group[0], size).to(dtype)
    carrier, beam_idx = torch.zeros(1, 7, 7, 1), torch.zeros(9, 3, dtype=torch.long)
    past: Any = carrier, keys, values, beam_idx
    mask = torch.rand(3, 1, 1, n_keys) < 0.5
    mask[..., 0] = True
    rtol, atol = TOLERANCES[dtype]
    for seq_info in (-1, torch.tensor(-1)):
        for given in (None, mask):
            out, _, past = attend(q, None, None, 5.0, past, attention_mask=given, seq_info=seq_info)
            expected = attention(q, keys, values, 5.0, given, causal=False)
            torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
            assert past[0] is carrier and past[3] is beam_idx
            assert torch.equal(past[1], keys) and torch.equal(past[2], values)
    held = past[1].data_ptr()
    assert attend(q, None, None, 5.0, past, seq_info=-1)[2][1].data_ptr() == held


# ---- what is refused -------------------------------------------------------------------------------------------------

_X = torch.zeros(4, 1, 4, 24)
_K = torch.zeros(4, 1, 2, 24)


def _freed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.zeros(*shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def _short(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.zeros(*shape, dtype=dtype)
    tensor.untyped_storage().resize_(8)
    return tensor


WRONG: dict[str, dict[str, Any]] = {
    "query": {"query": torch.zeros(4, 1, 96)},
    "query has dtype": {"query": _X.double()},
    "query is a ndarray": {"query": _X.numpy()},
    "query is on device meta": {"query": _X.to("meta")},
    "query of shape": {"query": _freed(4, 1, 4, 24)},
    "its storage has been made smaller": {"query": _short(4, 1, 4, 24)},
    "none of which is 0": {"query": torch.zeros(4, 0, 4, 24)},
    "query has 3 rows": {"query": _X[:3], "key": _K[:3], "value": _K[:3]},
    "they have become 4 beams": {"query": _X[:2], "key": _K[:2], "value": _K[:2]},
    "key has dtype": {"key": _K.bfloat16()},
    "key or value is None": {"key": None},
    "key has shape": {"key": _K[:2]},
    "key has 3 heads": {"key": torch.zeros(4, 1, 3, 24)},
    "value has shape": {"value": torch.zeros(4, 1, 2, 16)},
    "value of shape": {"value": _freed(4, 1, 2, 24)},
    "scale_attn is 0": {"scale_attn": 0},
    "scale_attn is nan": {"scale_attn": torch.nan},
    "scale_attn is 'x'": {"scale_attn": "x"},
    "scale_attn is a Tensor": {"scale_attn": torch.ones(2)},
    "head_mask is a Tensor": {"head_mask": torch.ones(4)},
    "text_max_length is -1": {"text_max_length": -1},
    "text_max_length is 2.0": {"text_max_length": 2.0},
    "seq_info is -2": {"seq_info": -2},
    "seq_info is 'x'": {"seq_info": "x"},
    "seq_info is inf": {"seq_info": math.inf},
    "add_casual_mask is a Tensor": {"add_casual_mask": torch.zeros(2)},
    "layer_past has 129 tokens": {"seq_info": 129},
    "attention_mask is": {"attention_mask": "mask"},
    "attention_mask has dtype": {"attention_mask": torch.zeros(4, 1, 1, 9, dtype=torch.long)},
    "attention_mask has shape": {"attention_mask": torch.zeros(4, 1, 1, 8)},
    "attention_mask has shape (9,)": {"attention_mask": torch.zeros(9)},
    "attention_mask has shape (2": {"attention_mask": torch.zeros(2, 1, 1, 9)},
    "attention_mask has shape (4, 2": {"attention_mask": torch.zeros(4, 2, 1, 9)},
    "attention_mask has shape (4, 1, 2": {"attention_mask": torch.zeros(4, 1, 2, 9)},
    "attention_mask of shape": {"attention_mask": _freed(4, 1, 1, 9)},
    "alibi has shape (3,)": {"alibi": torch.ones(3)},
    "alibi has dtype": {"alibi": torch.ones(4).double()},
    "alibi has shape (3, 1, 9)": {"alibi": torch.ones(3, 1, 9)},
    "alibi is int": {"alibi": 3},
    "slopes has": {"alibi": torch.full((4,), torch.nan)},
}


def _state() -> tuple[Tensor, ...]:
    """Of 2 prompts with 2 beams each, 6 and 2 tokens."""
    _, _, past = attend(
        _X[:2].expand(-1, 6, -1, -1), *(_K[:2].expand(-1, 6, -1, -1),) * 2, 5.0, first_layer_past(4)
    )
    for _ in range(2):
        _, _, past = attend(_X, _K, _K, 5.0, past)
    return past


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    past = _state()
    before = [_bytes(each) for each in past[1:]]
    arguments: dict[str, Any] = {
        "query": _X,
        "key": _K + 1,
        "value": _K + 1,
        "scale_attn": 5.0,
        "layer_past": past,
    }
    with pytest.raises(InvalidInput) as error:
        attend(**arguments | WRONG[message])
    assert message in str(error.value)
    assert all(map(torch.equal, before, map(_bytes, past[1:])))  # nothing was written


def _with(place: int, tensor: object) -> Any:
    return lambda past: (*past[:place], tensor, *past[place + 1 :])


def _written(row: int, value: int) -> Any:
    def change(past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        past[3][row, 0] = value
        return past

    return change


WRONG_PASTS: dict[str, Any] = {
    "layer_past is no": lambda past: past[:3],
    "layer_past[0] is no tensor": _with(0, 8),
    "layer_past has 9": _with(0, torch.zeros(9 << 40, 1, device="meta")),
    "key_cache is a NoneType": _with(1, None),
    "key_cache has shape (64, 4": _with(1, torch.zeros(64, 4, 3, 24)),
    "key_cache has shape (8,)": _with(1, torch.zeros(8)),
    "key_cache has dtype torch.bfloat16": _with(1, torch.zeros(64, 4, 2, 24).bfloat16()),
    "key_cache has dtype torch.float8_e5m2": _with(1, torch.zeros(64, 4, 2, 24).to(torch.float8_e5m2)),
    "key_cache of shape": _with(1, _freed(64, 4, 2, 24)),
    "key_cache of shape (64, 4, 2, 24) has lost memory": _with(1, _short(64, 4, 2, 24)),
    "value_cache has shape": _with(2, torch.zeros(63, 4, 2, 24)),
    "beam_idx has shape (64, 4)": _with(3, torch.zeros(64, 4, dtype=torch.long)),
    "beam_idx is torch.int32": _with(3, torch.zeros(66, 4, dtype=torch.int32)),
    "beam_idx is None": _with(3, None),
    "beam_idx of shape": _with(3, _freed(66, 4, dtype=torch.long)),
    "beam_idx ends with 6 tokens of 3 prompts": _written(65, 3),
    "beam_idx ends with 6 tokens of 0 prompts": _written(65, 0),
    "beam_idx ends with -1 tokens": _written(64, -1),
    "beam_idx has rows that are not there": _written(7, 4),
    "beam_idx has rows that are": _written(5, -1),
    "beam_idx has rows": _written(6, 1 << 40),
}


@pytest.mark.parametrize("message", WRONG_PASTS)
def test_wrong_pasts(message: str) -> None:
    kept = _state()
    past = WRONG_PASTS[message](kept)
    before = _bytes(kept[1])
    with pytest.raises(InvalidInput) as error:
        attend(_X, _K + 1, _K + 1, 5.0, past)
    assert message in str(error.value)
    assert torch.equal(_bytes(kept[1]), before)


def test_wrong_first_calls() -> None:
    for past in (_with(3, None)(first_layer_past(4)), _with(3, torch.zeros(4).long())(first_layer_past(4))):
        with pytest.raises(InvalidInput, match="beam_idx"):
            attend(_X, _K, _K, 5.0, past)
    with pytest.raises(InvalidInput, match="query has 4 rows: a divisor of the 6"):
        attend(_X, _K, _K, 5.0, first_layer_past(6))
    with pytest.raises(InvalidInput, match="seq_info is 3"):
        attend(_X, _K, _K, 5.0, seq_info=3)
    with pytest.raises(InvalidInput, match="text_max_length is True"):
        IndirectAccessKVCacheAttention(True)


def test_wrong_cross_attention() -> None:
    keys = torch.zeros(4, 7, 2, 24)
    carrier, beam_idx = torch.zeros(1, 0, 0, 1), torch.zeros(1, 4).long()
    for message, caches in {
        "key_cache has shape (3": (keys[:3], keys),
        "key_cache has 3 heads": (torch.zeros(4, 7, 3, 24),) * 2,
        "value_cache has shape": (keys, keys[:, :6]),
        "value_cache has dtype": (keys, keys.half()),
        "key_cache is a NoneType": (None, None),
    }.items():
        with pytest.raises(InvalidInput) as error:
            attend(_X, None, None, 5.0, (carrier, *caches, beam_idx), seq_info=-1)  # type: ignore[arg-type]
        assert message in str(error.value)
    with pytest.raises(InvalidInput, match="layer_past is None"):
        attend(_X, None, None, 5.0, seq_info=-1)


def test_a_random_past_harms_nobody() -> None:
    """Whatever is written where users can write: an error, or a result over what the cache holds."""
    generator = torch.Generator().manual_seed(0)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    for _ in range(300):
        _, *caches, beam_idx = _state()
        beam_idx[random(0, 66, 2)] = random(-5, 9, 2, 4)
        carrier = torch.empty(int(random(0, 70, 1)), 1)
        n_new = int(random(1, 140, 1))
        x, k = torch.ones(4, n_new, 4, 24), torch.ones(4, n_new, 2, 24)
        try:
            out, _, past = attend(x, k, k, 5.0, (carrier, *caches, beam_idx))
        except InvalidInput:
            continue
        assert out.shape == (4, 4, n_new, 24) and past[0].size(-2) >= n_new


def test_public_names() -> None:
    assert functional.indirect_access_kv_cache_attention is attend
    attention = IndirectAccessKVCacheAttention()
    assert attention.text_max_length == 2048 and repr(attention).endswith("(text_max_length=2048)")
    assert IndirectAccessKVCacheAttention.apply_function is attend
