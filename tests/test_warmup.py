"""What `warmup` leaves to be compiled: nothing."""

import json

import pytest

from tests import fresh

# After a warm-up, generates with models of families that have all there is (windows, limits, slopes, sinks, norms of heads,
# rotations), and says which kernels had to be compiled or loaded then. What the second warm-up does includes all that the
# first one does.
_PROGRAM = """
import functools, itertools, json
import torch
import hfopt
from hfopt.kernels.jit import launch as jit
from tests.decoders import made
from tests.test_families_apertus import apertus
from tests.generation_cases import FAMILIES, cache_of, prompts
from tests.reference import DTYPES
from tests.step_cases import MODES
OTHERS = ("gemma2", "gemma3", "bloom", "granite-swa", "olmo", "cohere", "gpt2", "nanochat")
def variants():
    return {f"{f.__module__}.{f.__name__} {s}" for f, l in jit._launches.items() for s in l.dispatcher.signatures}
others = [apertus, *(functools.partial(made, name, vocab_size=512) for name in OTHERS)]
REQUESTS = [*itertools.product(MODES.values(), (9, 60))]
found = []
for quantization, kv_cache in ((None, "int8"), ("int8", "int8")):
    hfopt.warmup(quantization, kv_cache=kv_cache)
    known = variants()
    asked = [*itertools.product(FAMILIES.values(), DTYPES, REQUESTS)]
    if quantization is None:
        asked += itertools.product(others, DTYPES, REQUESTS[-1:])
    for (family, dtype), requests in itertools.groupby(asked, lambda each: each[:2]):
        model = hfopt.optimize(family().to(dtype), kernels="hfopt", quantization=quantization, kv_cache=kv_cache)
        for _, _, (mode, length) in requests:
            given = prompts(2, length)
            result = model.generate(**given, max_new_tokens=5, return_dict_in_generate=True, **mode)
            assert cache_of(result).kv_cache == kv_cache
    found.append([len(known), sorted(variants() - known)])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_nothing_is_left_to_be_compiled() -> None:
    plain, quantized = json.loads(fresh.run(_PROGRAM).splitlines()[-1])
    for n_known, missing in (plain, quantized):
        assert n_known > 0 and missing == []
    assert quantized[0] > plain[0]
