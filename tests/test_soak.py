"""Long runs: many threads on one model, and memory over many steps."""

import threading

import pytest
import torch

import hfopt
from hfopt.machine import env
from tests.generation_cases import llama

pytestmark = pytest.mark.slow


def test_eight_threads_on_one_model() -> None:
    model = llama()
    prompts = [torch.randint(1, 200, (1 + index % 3, 5 + 3 * index)) for index in range(8)]
    settings = [{"num_beams": 1 + index % 4, "max_new_tokens": 40, "do_sample": False} for index in range(8)]

    def run(index: int) -> torch.Tensor:
        ids = prompts[index]
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, pad_token_id=0, eos_token_id=None, **settings[index])

    expected = [run(index) for index in range(8)]
    hfopt.optimize(model)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(run(index), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_does_not_grow_with_requests() -> None:
    model = hfopt.optimize(llama())
    ids = torch.randint(1, 200, (2, 20))

    def requests(number: int) -> None:
        for _ in range(number):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=3,
                max_new_tokens=50,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )

    requests(20)
    before = env.resident_memory()
    requests(60)  # 3,000 steps
    assert env.resident_memory() - before < 3 << 20
