"""What float16 has of its own: values that overflow, and what a report says of it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import hfopt
from hfopt.functional import rms_norm
from hfopt.functional.linear import LinearWeights, linear
from hfopt.machine import env
from tests.generation_cases import FAMILIES, Model, llama, one_thread, prompts

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

HALF = torch.float16
LARGEST = torch.finfo(HALF).max
PROMPTS = prompts(3, 12)


@pytest.mark.parametrize("n_rows", [1, 3, 70])
def test_results_are_infinite_where_those_of_torch_are(n_rows: int) -> None:
    x, weight = 60 * torch.randn(n_rows, 41).to(HALF), 100 * torch.randn(35, 41).to(HALF)
    found = linear(x, LinearWeights.of([weight], [None]))
    exact = x.double() @ weight.double().T
    assert 0 < int(found.isinf().sum()) < found.numel() and not found.isnan().any()
    # but for those so near the limit that the order of a sum decides
    sure = (exact.abs() - 65520).abs() > 32
    assert torch.equal(found.isinf()[sure], (exact.abs() > 65520)[sure])
    assert torch.equal(found.isinf()[sure], (x @ weight.T).isinf()[sure])


def test_squares_and_partial_results_do_not_overflow() -> None:
    x = torch.tensor([[LARGEST, LARGEST, -LARGEST, -LARGEST, 1.0] * 8])
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(x.to(HALF), torch.ones(40, dtype=HALF), 1e-6), expected.to(HALF))
    # the sums pass the largest float16 and come back, as torch's do, which adds up in float32 too
    weight = torch.ones(1, 40, dtype=HALF)
    assert float(linear(x.to(HALF), LinearWeights.of([weight], [None]))) == float(x.sum())


def _last_linear(model: Model) -> Any:
    """The output of the last feed-forward block, behind which no token sees another."""
    return [
        module for name, module in model.named_modules() if name.endswith(("down_proj", "fc_out", "fc2"))
    ][-1]


def _logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model(**PROMPTS).logits.float()


class _Forced(LogitsProcessor):
    """Lets the tokens of the prompts be the next ones."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        following = PROMPTS["input_ids"].roll(-1, 1)[:, input_ids.shape[1] - 1]
        return torch.zeros_like(scores).scatter(1, following[:, None], 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_overflows_where_its_stock_does(family: str) -> None:
    stock = FAMILIES[family]()
    outputs: list[Tensor] = []
    hook = _last_linear(stock).register_forward_hook(lambda module, args, output: outputs.append(output))
    _logits(stock)
    hook.remove()
    largest = outputs[0].flatten(0, -2).abs().amax(-1).sort().values[12:-6]
    # some of the tokens overflow, and none nearly
    gap = int((largest[1:] / largest[:-1]).argmax())
    _last_linear(stock).weight.data *= 65520 / float(largest[gap : gap + 2].mean())
    stock = stock.to(HALF)
    model = hfopt.optimize(copy.deepcopy(stock))
    expected, found = _logits(stock), _logits(model)
    assert expected.isnan().any() and expected.isfinite().any()
    assert torch.equal(found.isnan(), expected.isnan())
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for length in (7, 11):
        given = {name: each[:, :length] for name, each in PROMPTS.items()}
        result = model.generate(
            **given, max_new_tokens=13 - length, logits_processor=LogitsProcessorList([_Forced()]), **options
        )
        steps = torch.stack(result.logits, dim=1)
        assert torch.equal(steps.isnan(), expected[:, length - 1 :].isnan())


@pytest.mark.parametrize("has_products", [True, False])
def test_the_report_says_when_bfloat16_would_be_faster(
    has_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "has_bfloat16_products", lambda: has_products)
    for dtype in (HALF, torch.bfloat16):
        report = hfopt.explain(hfopt.optimize(llama().to(dtype)))
        assert (report.advice is not None) == (has_products and dtype is HALF)
        assert ("8 significant bits" in str(report)) == (report.advice is not None)
        assert report.to_dict()["advice"] == report.advice
