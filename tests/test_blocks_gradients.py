"""Blocks where gradients are recorded, under autocast, and beside what they were not made for."""

import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hfopt
from hfopt import functional, modules
from hfopt.errors import InvalidInput

X = torch.randn(2, 5, 4, 16)
ENDS = torch.tensor([0, 5])
SLOTS = torch.arange(5)


def _varlen(q: Tensor) -> Tensor:
    absent = {
        "alibi_slopes": None,
        "pdropout": 0.0,
        "zero_tensors": False,
        "return_softmax": False,
        "gen_": None,
    }
    lengths = {"seqlen_q": ENDS, "seqlen_k": ENDS, "max_seqlen_q": 5, "max_seqlen_k": 5}
    given: Any = {**absent, **lengths, "softmax_scale": None, "is_causal": True}
    return functional.varlen_attention(q[0], X[1], X[1], torch.empty_like(X[0]), **given)


def _stored(key: Tensor) -> None:
    caches = torch.zeros(2, 1, 4, 16, 16)
    modules.PagedAttention.reshape_and_cache(key[0], X[1], caches[0], caches[1], SLOTS)


def _rotated(query: Tensor) -> Any:
    angles = torch.randn(2, 2, 5, 8)
    return functional.rotary_embedding(query, X.clone(), angles[0], angles[1], 16, True)


def _indirect(query: Tensor) -> Any:
    return functional.indirect_access_kv_cache_attention(query, X, X, 4.0)


ATTENTION: dict[str, Callable[[Tensor], Any]] = {
    "silu_mul": lambda x: functional.silu_mul(x, X),
    "gelu_mul": lambda x: functional.gelu_mul(X, x),
    "add_rms_norm": lambda x: functional.add_rms_norm(x, X, torch.ones(16), None, 1e-6),
    "add_layer_norm": lambda x: functional.add_layer_norm(X, x, torch.ones(16), None, 1e-6),
    "rms_norm": lambda x: functional.rms_norm(x, torch.ones(16), 1e-6),
    "rotary_embedding": _rotated,
    "RotaryEmbedding": lambda x: modules.RotaryEmbedding(8, 16)(x, torch.arange(5), 4, 16, 8, 16),
    "varlen_attention": _varlen,
    "reshape_and_cache": _stored,
    "indirect": _indirect,
    "bgmv_shrink": lambda x: functional.bgmv_shrink(
        x[0, :, 0], torch.ones(1, 2, 16), torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
    ),
    "causal_conv1d": lambda x: functional.causal_conv1d(x[0], torch.ones(4, 3)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_a_gradient_that_would_be_lost_is_an_error(name: str) -> None:
    with pytest.raises(InvalidInput, match="needs a gradient"):
        ATTENTION[name](X.clone().requires_grad_() * 1)
    with torch.no_grad():
        ATTENTION[name](X.clone().requires_grad_() * 1)


def test_parameters_of_a_model_in_inference_are_no_such_thing() -> None:
    weight = nn.Parameter(torch.ones(16))
    assert not functional.rms_norm(X, weight, 1e-6).requires_grad


@pytest.mark.parametrize("kind", (modules.RMSNorm, modules.FastLayerNorm))
def test_weights_of_float32_beside_16_bits(kind: Any) -> None:
    weight, x = torch.randn(16), X.bfloat16()
    norm = kind(16, 1e-6, weight)
    reference = nn.functional.rms_norm if kind is modules.RMSNorm else nn.functional.layer_norm
    expected = reference(x.float(), (16,), weight, eps=1e-6)
    with torch.no_grad():
        assert norm(x).dtype is torch.bfloat16
        torch.testing.assert_close(norm(x).float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        norm(x).float(), expected, rtol=1e-2, atol=1e-2
    )  # torch's, since the weight needs a gradient


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: modules.RMSNorm(64, weight=torch.ones(32)), "weight has shape"),
        (lambda: modules.FastLayerNorm(64, 1e-5, torch.ones(64), torch.ones(32)), "bias has shape"),
    ),
)
def test_what_does_not_fit_is_refused_when_it_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_a_sum_of_dtypes_under_autocast() -> None:
    linear, x, y = nn.Linear(16, 8), torch.randn(3, 16), torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(modules.LinearAdd(linear)(x, y), linear(x) + y)


def test_a_request_under_autocast_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = hfopt.optimize(AutoModelForCausalLM.from_pretrained(hfopt.embedded_model()))
    ids = torch.tensor([[1, 2, 3]])
    with caplog.at_level(logging.WARNING, "hfopt"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert "autocast" not in caplog.text
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.generate(ids, max_new_tokens=2, do_sample=False)
    assert "torch.autocast" in caplog.text


@pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # peft asks transformers for what it names otherwise by now
def test_an_adapter_is_not_merged_into_packed_weights() -> None:
    model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    hfopt.optimize(adapted.eval(), quantization="int8")
    ids = torch.tensor([[1, 2, 3]])
    before = adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with pytest.raises(InvalidInput, match="before quantising"):
        adapted.merge_and_unload()
    assert torch.equal(adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False), before)
