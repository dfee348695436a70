"""The proof of a whole model: it generates as it was and as it is now, and both have to give the same logits.

Modules are proven one by one, the loops on a tiny Llama. What only their meeting in this model shows is seen here: what its
class prepares for each step, what it keeps in its cache or of its prompts, what is different in a layer of another index.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hfopt import generation, host
from hfopt.cache import IndirectCache
from hfopt.distributed.ranks import Ranks
from hfopt.distributed.ring import Ring
from hfopt.errors import ForkedProcess, KernelError
from hfopt.generation import Installed, StepProgram, StepPrograms, Verdict
from hfopt.host import is_capture, vocabulary
from hfopt.patches.probe import allowed
from hfopt.patches.scene import shaken
from hfopt.patches.shadow import shadow
from hfopt.patches.walk import Walk

logger = logging.getLogger(__name__)

# Of the largest logit, and the share of rows and steps that have to be as near: rounding may choose other experts.
_TOLERANCES = {torch.float32: (1e-3, 1.0), torch.bfloat16: (5e-2, 0.75), torch.float16: (7e-3, 0.75)}
_LENGTH, _N_PADDED, _N_NEW, _N_BEAMS = 12, 3, 3, 2
# what the code of others may have been put around
_WRAPPED = ("forward", "_hf_hook")

Logits = tuple[Tensor, ...]


def verdict_on(walk: Walk, model: Any, ranks: Ranks | None = None) -> Verdict:
    """Undo the walk if its modules give this model other logits, and say what that means for its requests.

    model: the part that generates. ranks: the processes that ask together. Raises KernelError and ForkedProcess, which say
    nothing about the model.
    """
    if not walk.swapped_now and generation.is_installed(model):
        return generation.installed(model).verdict
    if not _can_be_asked(model):
        return Verdict()

    def trial(ask: Callable[..., Logits | Exception], **ours: Any) -> "_Trial":
        swapped = shadow(model, is_short=True, is_exact=True)
        return _Trial(ask(original), lambda: ask(unsteady), ask(swapped, **ours))

    original, unsteady = (shadow(model, is_original=True, is_short=True, is_exact=True) for _ in range(2))
    _shake(unsteady)
    if walk.swapped_now and (reason := walk.agree(trial(_read).difference(model))) is not None:
        walk.refuse(f"the model as a whole {reason}")
    asked = _Asked()
    requests = trial(_generated, programs=asked, ranks=ranks)
    if isinstance(requests.expected, Exception):
        return Verdict()
    if (reason := walk.agree(requests.difference(model))) is not None:
        verdict = Verdict(refusal=f"in hfopt's loops, over its cache, it {reason}")
        logger.warning("%s runs in transformers' own loops: %s.", type(model).__name__, verdict.refusal)
        return verdict
    return Verdict(
        obstacle=None
        if asked.steps
        else "its class has other ways to prepare or to make the steps of a request"
    )


def ring_flaw(model: Any, ring: Ring) -> str | None:
    """In words, why prompts of this model are not read by several processes together: one is, and some steps behind it, and
    read alone.
    """
    twin, n_tokens = shadow(model, is_short=True, is_exact=True), 4 * ring.size + 1
    ids = torch.randint(1, vocabulary(model), (2, n_tokens), generator=torch.Generator().manual_seed(7))
    config = twin.config.get_text_config(decoder=True)
    name = host.cache_argument(type(model).forward)
    # of the shortest prompt that would be: angles may be others from some length on
    if not generation.can_share(twin, IndirectCache(config), generation.LEAST_TOGETHER):
        return "its layers or its positions need all tokens of a prompt"

    def read(shares: bool) -> Logits | Exception:
        cache = IndirectCache(config)
        inputs = {"input_ids": ids, "use_cache": True, "return_dict": True, str(name): cache}

        def ask() -> Logits:
            prompt = generation.read_shared(twin, ring, inputs, cache) if shares else twin(**inputs)
            found = [prompt.logits[:, -1]]
            for step in range(ring.size + 1):
                more = {
                    "input_ids": ids[:, step : step + 1],
                    "position_ids": torch.tensor([[n_tokens + step]]),
                }
                found.append(twin(**{**inputs, **more}).logits[:, -1])
            return tuple(found)

        return _outcome(ask)

    expected = read(False)
    if isinstance(expected, Exception):
        return f"it raises {type(expected).__name__}: {str(expected)[:160]}"
    return _Trial(expected, lambda: expected, read(True)).difference(model)


def _can_be_asked(model: Any) -> bool:
    """Whether it continues texts, and by no code but its own."""
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids" or model.device.type != "cpu":
        return False
    return not any(map(_has_code_around, model.modules()))


def _has_code_around(module: nn.Module) -> bool:
    """Whether others have put code around its calls, which may not be for such tokens."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(name in vars(module) for name in _WRAPPED) or not all(map(is_capture, hooks))


class _Asked:
    """In the place of a model's programs: notes whether it is asked for steps, and gives none."""

    def __init__(self) -> None:
        self.steps = 0

    def of(self, model: nn.Module, n_rows: int, n_new: int = 1, kv_cache: str | None = None) -> None:
        self.steps += n_new == 1

    def holds(self, program: StepProgram) -> bool:
        return False


class _Chosen(LogitsProcessor):
    """Scores that follow from the number of the step alone: the same tokens and beams are chosen, whatever the model."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = torch.Generator().manual_seed(input_ids.shape[1])
        return torch.randn(scores.shape, generator=numbers).log_softmax(-1)


def _prompts(model: Any) -> dict[str, Tensor]:
    """Two, one of them padded."""
    ids = torch.randint(1, vocabulary(model), (2, _LENGTH), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :_N_PADDED] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _outcome(ask: Callable[[], Logits]) -> Logits | Exception:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            return ask()
    except (KernelError, ForkedProcess):
        raise
    except Exception as error:  # noqa: BLE001  (whatever a foreign model raises)
        return error


def _read(model: Any) -> Logits | Exception:
    """Logits of the last token of each prompt, [rows, vocabulary]; or what a call without a cache raises."""
    return _outcome(lambda: (model(**_prompts(model), use_cache=False, return_dict=True).logits[:, -1],))


def _generated(
    model: Any, programs: StepPrograms | None = None, ranks: Ranks | None = None
) -> Logits | Exception:
    """Logits of each step of beams behind the prompts, [rows, vocabulary]; or what the request raises.

    programs: for our loops and cache; None for transformers' own.
    """
    # whatever is set in that of the model
    model.generation_config = GenerationConfig(
        max_new_tokens=_N_NEW,
        num_beams=_N_BEAMS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generation.uninstall(model)
    if programs is not None:
        generation.install(model, Installed(programs, ranks=ranks))
    generate = model.generate if programs is not None else functools.partial(type(model).generate, model)
    chosen = LogitsProcessorList([_Chosen()])
    return _outcome(lambda: tuple(generate(**_prompts(model), logits_processor=chosen).logits))


def _shake(model: Any) -> None:
    """Change half of what its tokens look up in the last bit."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: shaken(output))


class _Trial(NamedTuple):
    """What one request gives: with the original modules, with those and inputs shaken in the last bit, with ours."""

    expected: Logits | Exception
    shaken: Callable[[], Logits | Exception]
    found: Logits | Exception

    def difference(self, model: Any) -> str | None:
        """In words, what it does otherwise; None if that cannot be told, because it needs more than tokens, say."""
        if isinstance(self.expected, Exception):
            return None
        if isinstance(self.found, Exception):
            return f"raises {type(self.found).__name__}: {str(self.found)[:160]}"
        if [each.shape for each in self.expected] != [each.shape for each in self.found]:
            return "gives logits of another shape"
        if not all(each.isfinite().all() for each in self.expected):
            return None
        dtype = model.get_input_embeddings().weight.dtype
        tolerance, share = _TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16])
        errors = _errors(self.expected, self.found)
        error = float(errors.quantile(share))
        if error <= tolerance:
            return None
        again = self.shaken()
        noise = 0.0 if isinstance(again, Exception) else float(_errors(self.expected, again).max())
        if error <= allowed(noise):
            return None
        return f"gives logits that differ by {float(errors.max()):.2g} of the largest"


def _errors(expected: Logits, found: Logits) -> Tensor:
    """Of each row and step, as a share of its largest logit."""
    theirs, ours = torch.stack(expected).double(), torch.stack(found).double()
    return (theirs - ours).abs().amax(dim=-1) / theirs.abs().amax(dim=-1)
