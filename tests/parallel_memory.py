"""What loading a part of a model takes of a process's own memory; see `tests.ranks`."""

import gc
import os
import re
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import hfopt

_SECONDS = 0.005  # from look to look


def save(folder: Path, **sizes: int) -> None:
    """A Llama in bfloat16."""
    names: Any = {"vocab_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    names |= sizes
    config = LlamaConfig(**names, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.save_pretrained(folder, max_shard_size="100MB")


def growth(small: str, folder: str, options: dict[str, Any]) -> int:
    """Bytes, beside pages of files, that the process takes at the peak."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    hfopt.load(small, tensor_parallel=True, **options)  # imports, and kernels
    gc.collect()
    before = peak = _own_memory()
    loaded = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not loaded.wait(_SECONDS):
            peak = max(peak, _own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    model: Any = hfopt.load(folder, tensor_parallel=True, **options)
    loaded.set()
    watching.join()
    assert not model.hfopt.left
    return max(peak, _own_memory()) - before


def _own_memory() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
