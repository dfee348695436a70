"""What `warmup` leaves to be compiled: nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# After a warm-up, generates with models of all families, and says which kernels had to be compiled or loaded then.
_PROGRAM = """
import itertools, json, sys
import torch
import hfopt
from hfopt.kernels import _jit
from tests.generation_cases import FAMILIES, prompts
from tests.step_cases import MODES
quantization, kv_cache = json.loads(sys.argv[1])
hfopt.warmup(quantization, kv_cache=kv_cache)
def variants():
    return {f"{f.__module__}.{f.__name__} {s}" for f, l in _jit._launches.items() for s in l.dispatcher.signatures}
known = variants()
for family, dtype in itertools.product(FAMILIES.values(), (torch.float32, torch.bfloat16)):
    model = hfopt.optimize(family().to(dtype), kernels="hfopt", quantization=quantization, kv_cache=kv_cache)
    for mode, length in itertools.product(MODES.values(), (9, 60)):
        given = prompts(2, length)
        result = model.generate(**given, max_new_tokens=5, return_dict_in_generate=True, **mode)
        assert result.past_key_values.kv_cache == kv_cache
print(json.dumps([len(known), sorted(variants() - known)]))
"""


@pytest.mark.parametrize("arguments", [(None, "int8"), ("int8", "int8")], ids=str)
def test_nothing_is_left_to_be_compiled(arguments: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(arguments)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    n_known, missing = json.loads(done.stdout.splitlines()[-1])
    assert n_known > 0 and missing == []
