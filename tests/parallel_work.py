"""What each of several processes does with a model that they have together; see `tests.ranks`."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import hfopt
from hfopt.errors import InvalidInput, RankError, UnsupportedModel
from hfopt.host import can_split, split_options
from hfopt.patches.tensor_plan import plan_for

_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {"num_key_value_heads": 4, "intermediate_size": 352}
_BIASES = {"attention_bias": True, "mlp_bias": True}
# name -> class of a configuration, and what it is given
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"vocab_size": 1000, **_GQA, "tie_word_embeddings": True}),
    # a vocabulary and a feed-forward block that do not divide
    "uneven": ("LlamaConfig", {"vocab_size": 1001, **_GQA, "intermediate_size": 353, **_BIASES}),
    # fewer heads of keys than there may be processes
    "few": ("LlamaConfig", {"vocab_size": 1000, **_GQA, "num_key_value_heads": 2}),
    "gptj": ("GPTJConfig", {"vocab_size": 1000, "rotary_dim": 8}),
    "opt": ("OPTConfig", {"vocab_size": 1000, "ffn_dim": 352, "word_embed_proj_dim": 128}),
    "qwen3": ("Qwen3Config", {"vocab_size": 1000, **_GQA, "head_dim": 16}),
    "mistral": ("MistralConfig", {"vocab_size": 1000, **_GQA, "sliding_window": 16}),
    "phi3": ("Phi3Config", {"vocab_size": 1000, **_GQA}),
    "gemma3": ("Gemma3TextConfig", {"vocab_size": 1000, **_GQA, "head_dim": 16, "sliding_window": 16}),
    "neox": ("GPTNeoXConfig", {"vocab_size": 1000, "intermediate_size": 352}),
}
PROMPT = torch.randint(5, 900, (2, 23), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(PROMPT)
MASK[0, :3] = 0
STEPS = {"max_new_tokens": 50, "min_new_tokens": 50, "pad_token_id": 0}


def model_of(
    name: str, dtype: torch.dtype = torch.float32, edit: Callable[[Any], None] = lambda model: None
) -> Any:
    """A model of random weights, which may be edited, split over the processes by transformers."""
    kind, settings = FAMILIES[name]
    config = getattr(transformers, kind)(**{**_SIZES, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    edit(model)
    folders: list[str | None] = [None]
    if dist.get_rank() == 0:
        folders = [tempfile.mkdtemp()]
        model.save_pretrained(folders[0])
    dist.broadcast_object_list(folders)
    n = dist.get_world_size()
    options: Any = split_options(None if can_split(model, n) else plan_for(model), n)
    return AutoModelForCausalLM.from_pretrained(str(folders[0]), dtype=dtype, **options).eval()


def _requests(model: Any) -> list[Tensor]:
    """Tokens of a greedy search, of beams, of samples, with padding; of guesses."""
    given = {"input_ids": PROMPT, "attention_mask": MASK, **STEPS}
    found = [
        model.generate(**given, do_sample=False),
        model.generate(**given, do_sample=False, num_beams=4, num_return_sequences=2),
    ]
    torch.manual_seed(3)
    found.append(model.generate(**given, do_sample=True, num_return_sequences=3))
    guesses = {"prompt_lookup_num_tokens": 5, "do_sample": False}
    return [*found, model.generate(PROMPT[1:], **STEPS, **guesses)]


def tokens_are_theirs(name: str) -> list[bool]:
    """Of each way to choose tokens, and whether each step is a program's; of the requests once more, and restored."""
    model = model_of(name)
    expected = _requests(model)
    hfopt.optimize(model, strict=True)
    assert str(dist.get_world_size()) in model.hfopt.together
    ours, again = _requests(model), _requests(model)
    hfopt.restore(model)
    theirs = _requests(model)
    kinds = zip(expected, ours, again, theirs, strict=True)
    return [all(torch.equal(first, other) for other in others) for first, *others in kinds]


def logits(name: str, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """Of each step of a request, twice."""
    model = hfopt.optimize(model_of(name, dtype), strict=True, **options)
    assert bool(model.hfopt.quantized) == ("quantization" in options)
    found = []
    for _ in range(2):
        outputs = model.generate(
            PROMPT,
            attention_mask=MASK,
            **STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(torch.stack(outputs.logits).float())
    return found


def largest(tokens: list[int]) -> Tensor:
    """What greedy search chooses where these tokens have the largest logits, equal ones."""

    def edit(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight[tokens] = 0
            model.lm_head.bias[tokens] = 50

    model = hfopt.optimize(model_of("gptj", edit=edit), strict=True)
    return model.generate(PROMPT, max_new_tokens=6, eos_token_id=None, do_sample=False)[:, PROMPT.shape[1] :]


def different_requests() -> list[str]:
    """What is said of tokens, settings and random numbers that are not the same in all processes."""
    model, rank = hfopt.optimize(model_of("llama")), dist.get_rank()
    said = []
    requests: list[Callable[[], Any]] = [
        lambda: model.generate(PROMPT + rank, **STEPS),
        lambda: model.generate(PROMPT, max_new_tokens=2 + rank),
        lambda: (torch.manual_seed(rank), model.generate(PROMPT, **STEPS, do_sample=True)),
    ]
    for request in requests:
        try:
            request()
        except InvalidInput as error:
            said.append(str(error))
    model.generate(PROMPT, **STEPS)  # goes on as ever
    return said


def one_is_killed(after: int) -> tuple[str, float]:
    """What another one says of a process that is killed after so many steps of a request, and seconds after that."""
    model = hfopt.optimize(model_of("llama"))
    last = [0.0]

    def steps(ids: Tensor, scores: Tensor) -> Tensor:
        last[0] = time.monotonic()
        if dist.get_rank() == 1 and ids.shape[1] == PROMPT.shape[1] + after:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores

    try:
        model.generate(PROMPT, **STEPS, logits_processor=[steps])
    except RankError as error:
        return str(error), time.monotonic() - last[0]
    return "nothing", 0.0


def parts_are_not_saved() -> str:
    """What is said of a quantised model that is saved."""
    model = hfopt.optimize(model_of("llama"), quantization="int8")
    assert len(model.hfopt.quantized) == 15
    try:
        model.state_dict()
    except UnsupportedModel as error:
        return str(error)
    return "nothing"


def until_killed() -> str:
    """What a process says whose partner is killed at some time: while it loads, proves, reads a prompt, or makes steps."""
    try:
        model = hfopt.optimize(model_of("llama"))
        while True:
            model.generate(PROMPT, **STEPS, do_sample=False)
    except (RankError, RuntimeError) as error:  # of ours, or of gloo in what transformers and torch do
        return f"{type(error).__name__}: {error}"


def saved() -> bool:
    """Whether what is saved of an optimised model is the whole of it."""
    model, folders = model_of("uneven"), [tempfile.mkdtemp()]
    expected = model(PROMPT).logits
    hfopt.optimize(model)
    dist.broadcast_object_list(folders)
    model.save_pretrained(folders[0])
    dist.barrier()
    whole = AutoModelForCausalLM.from_pretrained(Path(folders[0]))
    return bool(torch.allclose(whole(PROMPT).logits, expected, atol=1e-5))


def from_disk(folder: str, share: float) -> tuple[Tensor, int, int]:
    """Tokens by a part of a model that stays on disk, but for a share of it; bytes of it that a step reads, and of all."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) // dist.get_world_size()
    budget = {"cpu": int(share * size)}
    model: Any = hfopt.load(folder, tensor_parallel=True, device_map="disk", max_memory=budget)
    use = hfopt.explain(model).disk
    assert use is not None
    return _requests(model)[0], use.step, size
