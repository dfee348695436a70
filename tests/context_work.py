"""What each of several processes does with a model that each has, and prompts that they share; see `tests.ranks`."""

import copy
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

import hfopt
from hfopt.cache import IndirectCache
from hfopt.distributed import ring
from hfopt.errors import InvalidInput, RankError
from hfopt.generation import prefill

_SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {"num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 24}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gptj": ("GPTJConfig", {"rotary_dim": 8}),
    "phi3": ("Phi3Config", _GQA),
    "neox": ("GPTNeoXConfig", {"intermediate_size": 96}),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "sliding_window": None}),
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
# what needs a whole prompt: a window, a bias that counts keys, angles that follow from the longest text
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 64}),
    "bloom": ("BloomConfig", {}),
    "dynamic": ("LlamaConfig", {**_GQA, "max_position_embeddings": 512, "rope_scaling": _DYNAMIC}),
}
N_TOKENS = 1061  # of a prompt: a number that no number of chunks divides
STEPS = {"max_new_tokens": 50, "min_new_tokens": 50, "pad_token_id": 0}


def model_of(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    kind, more = {**FAMILIES, **ALONE}[name]
    config = getattr(transformers, kind)(**{**_SIZES, **more, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prompt(n_rows: int = 1, n_tokens: int = N_TOKENS) -> Tensor:
    return torch.randint(5, 900, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


@contextmanager
def shared() -> Iterator[list[IndirectCache]]:
    """Caches of prompts that are read together in the block."""
    found, theirs = [], prefill.read_shared

    def noted(model: Any, ring: Any, inputs: Any, cache: IndirectCache) -> Any:
        found.append(cache)
        return theirs(model, ring, inputs, cache)

    prefill.read_shared = noted
    try:
        yield found
    finally:
        prefill.read_shared = theirs


class Scores(LogitsProcessor):
    """Keeps what it is given in each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.float().clone())
        return scores


def _requests(model: Any) -> list[Tensor]:
    """Tokens of a greedy search, of one with two rows and a mask of ones, of samples."""
    found = [model.generate(prompt(), **STEPS, do_sample=False)]
    two = prompt(2, N_TOKENS + 2)
    found.append(model.generate(two, attention_mask=torch.ones_like(two), **STEPS, do_sample=False))
    torch.manual_seed(3)
    return [*found, model.generate(prompt(), **STEPS, do_sample=True, top_k=20)]


def tokens_are_theirs(name: str) -> tuple[list[bool], list[list[tuple[int, int]]]]:
    """Of each request and once more, and of the restored model; tokens that each layer of each cache has held, and all."""
    model = model_of(name)
    expected = _requests(model)
    hfopt.optimize(model, context_parallel=True)
    said = f"{dist.get_world_size()} processes read prompts of 1,024 tokens and more together"
    assert model.hfopt.together == said
    with shared() as caches:
        ours, again = _requests(model), _requests(model)
    hfopt.restore(model)
    theirs = _requests(model)
    kinds = zip(expected, ours, again, theirs, strict=True)
    held = [[(layer.prefix_len, layer.get_seq_length()) for layer in cache.layers] for cache in caches]
    return [all(torch.equal(first, other) for other in others) for first, *others in kinds], held


def scores(dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each step of a request in float32, in this dtype, and in this dtype by all processes together."""
    kept, tokens = [], None
    model = model_of("llama", dtype)
    for ask in (model_of("llama"), model, hfopt.optimize(model, context_parallel=True, **options)):
        processor = Scores()
        # the same tokens for all
        steps = [processor] if tokens is None else [processor, _Given(tokens)]
        with shared() as caches:
            found = ask.generate(prompt(), **STEPS, do_sample=False, logits_processor=steps)
        tokens = found if tokens is None else tokens
        kept.append(torch.stack(processor.seen).nan_to_num(neginf=0.0))  # tokens that no step may choose
    assert len(caches) == 1
    return kept[0], kept[1], kept[2]


class _Given(LogitsProcessor):
    """Lets these tokens be chosen."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.tokens[:, input_ids.shape[1]]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def each_reads_all(name: str) -> tuple[bool, bool]:
    """Whether a model that needs whole prompts is told apart, and its tokens are theirs."""
    expected = model_of(name).generate(prompt(), **STEPS, do_sample=False)
    model = hfopt.optimize(model_of(name), context_parallel=True)  # dynamic angles follow from texts before
    assert f"each of {dist.get_world_size()} processes reads all prompts" in str(model.hfopt)
    with shared() as caches:
        found = model.generate(prompt(), **STEPS, do_sample=False)
    return not caches, torch.equal(expected, found)


def whole_requests() -> list[tuple[bool, bool]]:
    """Of requests that each process does for itself: whether it does, and whether tokens are theirs."""
    model = model_of("llama")
    mask = torch.ones(2, N_TOKENS, dtype=torch.long)
    mask[0, :3] = 0
    kinds: list[tuple[Tensor, dict[str, Any]]] = [
        (prompt(1, 400), {}),
        (prompt(2), {"attention_mask": mask}),
        (prompt(), {"num_beams": 3}),
        (prompt(), {"prefill_chunk_size": 256}),
    ]
    expected = [model.generate(ids, **STEPS, **more, do_sample=False) for ids, more in kinds]
    hfopt.optimize(model, context_parallel=True)
    found = []
    for (ids, more), tokens in zip(kinds, expected, strict=True):
        with shared() as caches:
            ours = model.generate(ids, **STEPS, **more, do_sample=False)
        found.append((not caches, torch.equal(ours, tokens)))
    given: list[dict[str, Any]] = [
        {str(hfopt.host.REQUEST_CACHE): IndirectCache(model.config)},
        {"return_dict_in_generate": True},
        {"prefix_cache": hfopt.PrefixCache(model)},
    ]
    for more in given:
        with shared() as caches:
            ours = model.generate(prompt(), **STEPS, **more, do_sample=False)
        ours = ours.sequences if "return_dict_in_generate" in more else ours
        plain = model.generate(prompt(), **STEPS, do_sample=False)
        found.append((not caches, torch.equal(ours, plain)))
    return found


def other_settings() -> list[bool]:
    """Whether tokens are theirs with eager attention, with guesses, with 8-bit weights; of a prompt behind a shorter one."""
    found = []
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (("eager", {}), ("sdpa", {"speculation": "lookup"}))
    for attention, options in kinds:
        model = model_of("llama", attn_implementation=attention)
        expected = [model.generate(prompt(1, n), **STEPS, do_sample=False) for n in (N_TOKENS, 1500)]
        hfopt.optimize(model, context_parallel=True, **options)
        with shared() as caches:
            ours = [model.generate(prompt(1, n), **STEPS, do_sample=False) for n in (N_TOKENS, 1500)]
        found.append(
            len(caches) == 2 and all(torch.equal(*each) for each in zip(expected, ours, strict=True))
        )
    model = model_of("llama")
    hfopt.optimize(model, context_parallel=True, quantization="int8")
    alone = hfopt.optimize(model_of("llama"), quantization="int8")
    expected = alone.generate(prompt(), **STEPS, do_sample=False)
    found.append(torch.equal(model.generate(prompt(), **STEPS, do_sample=False), expected))
    return found


def declined() -> tuple[bool, bool]:
    """Whether a model with attention of its own, which stores keys as it likes, is told apart, and its tokens are theirs."""
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("OwnAttention", (type(attention),), {"forward": _own_forward})
    expected = model.generate(prompt(), **STEPS, do_sample=False)
    hfopt.optimize(model, context_parallel=True)
    with shared() as caches:
        found = model.generate(prompt(), **STEPS, do_sample=False)
    return not caches, torch.equal(expected, found)


def _own_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return super(type(self), self).forward(hidden_states * 1.5, *args, **kwargs)


def copied() -> bool:
    """Whether a copy of a model shares prompts too."""
    model = hfopt.optimize(model_of("llama"), context_parallel=True)
    with shared() as caches:
        found = [each.generate(prompt(), **STEPS, do_sample=False) for each in (model, copy.deepcopy(model))]
    return len(caches) == 2 and torch.equal(*found)


def refused() -> list[str]:
    """What is said of a model that does not generate, and of requests that are not the same."""
    model = hfopt.optimize(model_of("llama"), context_parallel=True)
    said = []
    for ask in (
        lambda: hfopt.optimize(model_of("llama").model, context_parallel=True),
        lambda: model.generate(prompt() + dist.get_rank()),
    ):
        try:
            ask()
        except InvalidInput as error:
            said.append(str(error))
    return said


def one_is_killed(layers: int) -> tuple[str, float]:
    """What another process says of one that is killed in a prompt, after so many layers, and seconds after that."""
    model = hfopt.optimize(model_of("llama", num_hidden_layers=4), context_parallel=True)
    model.generate(prompt(), **STEPS)
    theirs, times = ring.attend, [0.0]

    def attend(*args: Any, **more: Any) -> Tensor:
        times.append(time.monotonic())
        if dist.get_rank() == 1 and len(times) > 2 * layers:
            os.kill(os.getpid(), signal.SIGKILL)
        return theirs(*args, **more)

    ring.attend = attend
    try:
        model.generate(prompt(), **STEPS)
    except RankError as error:
        return str(error), time.monotonic() - times[-1]
    return "nothing", 0.0
