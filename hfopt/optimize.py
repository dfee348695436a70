"""optimize() and restore(): check, plan, apply; and the way back."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from hfopt import generation
from hfopt.cache import PrefixCache
from hfopt.cache.codes import check_kv_cache
from hfopt.calibration import Calibration, Calibrator
from hfopt.checkpoints.hf_quantizer import declare
from hfopt.errors import InvalidInput, UnsupportedDevice, UnsupportedModel
from hfopt.host import sharding_of
from hfopt.machine import env
from hfopt.machine.cores import fit_threads
from hfopt.progress import compile_progress, progress
from hfopt.quantization import Format, InputStatistics, QuantizationConfig, config_of
from hfopt.report import Report
from hfopt.streaming import detach
from hfopt.words import DTYPES, dtypes_in_words

if TYPE_CHECKING:
    from hfopt.distributed.ranks import Ranks
    from hfopt.distributed.ring import Ring
    from hfopt.functional import Kernels
    from hfopt.generation import Verdict
    from hfopt.patches.walk import Walk
    from hfopt.program.programs import Programs

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
    kernels: Literal["auto", "hfopt", "torch"] = "auto",
    quantization: str | Mapping[str, Any] | Format | QuantizationConfig | None = None,
    keep_original: bool = False,
    kv_cache: str | None = None,
    calibration: Calibration | None = None,
    speculation: Literal["lookup"] | None = None,
    prefix_cache: PrefixCache | None = None,
    context_parallel: bool = False,
) -> Model:
    """Make a model generate faster on the CPU, in place; it is returned, with its report as `model.hfopt`.

    Args:
        model: a causal language model of transformers. Of other modules, known parts are swapped.
        dtype: converts the weights first (float32, bfloat16 or float16); None leaves them as they are.
        strict: raise UnsupportedModel unless the whole decoder runs as one program, and all loops are hfopt's.
        kernels: whose kernels compute linear layers, and attention of several new tokens. "auto" takes torch's where a
            timing on this machine has shown them to be faster; with "hfopt" results have the same bits at any number of
            threads. Everything else, quantised layers too, always runs in hfopt's.
        quantization: a format for the weights of Linears ("int8", "int4", "nf4", or one from `hfopt.quantization`), or a
            `QuantizationConfig` that also says what becomes of the head. Each float weight is freed as soon as it is packed.
        keep_original: the float weights stay in memory, so that `restore` can bring them back.
        kv_cache: "int8" lets `generate` cache keys and values as 8-bit codes, with a scale for each token and head: half
            the memory and traffic of 16-bit floats. None: as they are. A cache that is given to `generate` stays what it is.
        calibration: texts like those that the model is for, which it reads so that weights are rounded with regard to the
            inputs that they meet: a list of strings, for the tokenizer in the model's own folder, or of token ids (lists or
            tensors). Longer ones than 512 tokens are cut into pieces.
        speculation: "lookup" lets greedy search and sampling guess tokens from the text so far, and check several in one
            reading of the weights, as `generate(prompt_lookup_num_tokens=...)` does for one request. Tokens stay what they
            are. How many are guessed follows from what checks cost and how many guesses were right.
        prefix_cache: where all requests find what earlier prompts began with, unless `generate` is given another one.
        context_parallel: the ranks of torch.distributed, processes of one machine that have the whole model each, share
            prompts of 1,024 tokens and more: each reads, and keeps in its cache, its share of the tokens. All ranks make the
            same calls. docs/context_parallel.md has the requests in which each rank does everything.

    Without `quantization` no weight is copied, and `restore` undoes all but the conversion. Harmless when repeated.
    Raises InvalidInput, RankError (ranks that cannot share memory), UnsupportedDevice (parameters outside CPU memory),
    UnsupportedModel and KernelError (another Numba than the kernels are written for); no class has changed then.

    Where torch has more threads than fit into what the affinity mask and the cgroup quota leave, the first call in a process
    lowers their number and logs it, unless OMP_NUM_THREADS or `torch.set_num_threads` has said how many.

    Example:
        >>> import hfopt
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
        >>> tokenizer = AutoTokenizer.from_pretrained(hfopt.embedded_model())
        >>> model = hfopt.optimize(model, quantization="int8")
        >>> inputs = tokenizer("Return a list of the", return_tensors="pt")
        >>> tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        >>> print(tokenizer.decode(tokens[0], skip_special_tokens=True))
        Return a list of the...
    """
    memory = env.resident_memory()
    with _collections_paused(), torch.device("cpu"):  # the default may be another one
        from hfopt.functional.choice import check_kernels
        from hfopt.model_proof import verdict_on
        from hfopt.patches.packing import Packing
        from hfopt.patches.sharding import give_back_parts
        from hfopt.patches.walk import Walk
        from hfopt.program.programs import Programs

        _check(model, dtype)
        fit_threads()
        check_kernels("kernels", kernels)
        check_kv_cache(kv_cache)
        generator = generation.generator_of(model)
        lookup = generation.lookup_of(speculation)
        for name, given in (("kv_cache", kv_cache), ("speculation", speculation)):
            if given is not None and generator is None:
                raise InvalidInput(f"{name} = {given!r}: {type(model).__name__} does not generate")
        generation.check_prefix_cache(generator, prefix_cache)
        config = None if quantization is None else config_of(quantization)
        if calibration is not None and config is None:
            raise InvalidInput("calibration is for quantization, which is None")
        calibrator = None if calibration is None else Calibrator(model, calibration)
        if dtype is not None:
            _convert(model, dtype)
        ranks = _together(model, kernels, context_parallel=context_parallel)
        agreed = () if ranks is None else (ranks.agree,)
        packing = None if config is None else Packing(model, config)
        walk, programs = Walk(model, *agreed), Programs(kernels, kv_cache, *agreed)
        with compile_progress(), nullcontext() if ranks is None else ranks.patient():
            walk.apply()
            verdict = None if generator is None else verdict_on(walk, generator, ranks)
    try:
        if strict:
            _check_whole(walk, programs, verdict)
        if generator is not None:
            verdict = verdict or generation.Verdict()
            ring = _ring(generator, verdict, ranks) if ranks is not None and context_parallel else None
            state = generation.Installed(programs, kv_cache, verdict, lookup, prefix_cache, ranks, ring)
            generation.install(generator, state)
        batches: Iterable[Mapping[str, InputStatistics | None]] = ()
        if packing is not None:
            linears = packing.linears
            batches = [dict.fromkeys(linears)] if calibrator is None else calibrator.measure(linears)
    except BaseException:
        walk.undo()
        give_back_parts(model)
        raise
    walk.use(kernels)
    if packing is not None:
        # last, because there is no way back from here
        with progress("hfopt quantises weights", len(packing)) as advance:
            for batch in batches:
                packing.apply(batch, advance, keep_original=keep_original)
        if generator is not None:
            declare(generator)
    left = {} if packing is None else packing.left
    with compile_progress():
        report = Report.of(walk, is_applied=True, memory_before=memory, left=left)
    model.__dict__["hfopt"] = report
    logger.info("%s: swapped %s", report.model_class, report.counts)
    return model


def restore(model: Model) -> Model:
    """Undo `optimize`: the same classes, methods and hooks as before, nothing left behind; returns the model.

    Works on copies and on unpickled models too, and is harmless where there is nothing to undo. Raises
    UnsupportedModel if another library has changed the class of a module since, and if float weights are gone because the
    model was quantised without keep_original.

    Example:
        >>> import hfopt
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
        >>> model = hfopt.optimize(model, quantization="int4", keep_original=True)
        >>> type(hfopt.restore(model).lm_head)
        <class 'torch.nn.modules.linear.Linear'>
    """
    from hfopt.patches.packing import check_originals, unpack
    from hfopt.patches.sharding import give_back_parts
    from hfopt.patches.walk import restore_classes

    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
    check_originals(model)
    restore_classes(model)
    detach(model)
    unpack(model)
    give_back_parts(model)
    for module in model.modules():
        if isinstance(module.__dict__.get("hfopt"), Report):
            del module.__dict__["hfopt"]
        if isinstance(module, PreTrainedModel):
            declare(module)
            generation.uninstall(module)
    return model


@contextmanager
def _collections_paused() -> Iterator[None]:
    """No run of the garbage collector in the block.

    Loading Numba makes hundreds of thousands of objects that live on, and a collector that goes through all of torch's
    and transformers' every so often meanwhile takes a third of the time of the first `optimize`.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check(model: nn.Module, dtype: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        hint = ": pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        hint = ": hfopt.load reads one from a folder" if isinstance(model, str | Path) else hint
        raise InvalidInput(f"model is a {type(model).__name__}, a torch.nn.Module is needed{hint}")
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"dtype = {dtype!r}: {dtypes_in_words('None')} is allowed")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "cpu" or (parameter.is_meta and _is_offloaded(model, name)):
            continue
        where = "has no storage (meta device)" if parameter.is_meta else f"is on {parameter.device}"
        raise UnsupportedDevice(f"parameter {name} {where}: all parameters have to be in CPU memory")


def _together(model: nn.Module, kernels: Kernels, *, context_parallel: bool) -> Ranks | None:
    """The processes that transformers has split the model over, once its layers are ours; None if there are none, or if
    they stay what they are. context_parallel: all processes, each of which has a whole model.
    """
    from hfopt.distributed.ranks import Ranks
    from hfopt.functional.choice import settle
    from hfopt.patches.sharding import ranks_of, take_parts

    ranks = _with_whole_models(model) if context_parallel else ranks_of(model)
    if ranks is None:
        sharding = sharding_of(model)
        if sharding is None:
            return None
        if isinstance(sharding, str):
            logger.warning("%s stays split as it is: %s.", type(model).__name__, sharding)
            return None
        ranks = Ranks(sharding.group)
        with ranks.patient():
            flaw = take_parts(model, sharding, ranks)
        if flaw is not None:
            logger.warning("%s stays split as it is: %s.", type(model).__name__, flaw)
            return None
    if kernels == "auto":
        with ranks.patient():
            settle(next(model.parameters()).dtype, ranks.first)
    return ranks


def _with_whole_models(model: nn.Module) -> Ranks:
    """All processes, for `context_parallel`; raises InvalidInput if there are none, or none that have all of the model."""
    from hfopt.distributed.ranks import Ranks
    from hfopt.patches.sharding import ranks_of

    generator = generation.generator_of(model)
    if generator is None:
        raise InvalidInput(f"context_parallel: {type(model).__name__} does not generate")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise InvalidInput(
            "context_parallel: torch.distributed is not initialised: call init_process_group first"
        )
    if ranks_of(model) is not None or sharding_of(model) is not None:
        raise InvalidInput(f"context_parallel: {type(model).__name__} is split over processes already")
    known = generation.installed(generator)
    if known.ring is not None and known.ranks is not None and not known.ranks.shared.is_over:
        return known.ranks
    ranks = Ranks(None)
    if ranks.shared.size != ranks.size:
        raise InvalidInput(f"context_parallel: the {ranks.size} ranks are on more than one machine")
    return ranks


def _ring(generator: Any, verdict: Verdict | None, ranks: Ranks) -> Ring:
    """What reads long prompts of this model together, or, with a warning, does not."""
    from hfopt.distributed.ring import Ring
    from hfopt.model_proof import ring_flaw

    ring = Ring(ranks)
    flaw = (verdict and (verdict.refusal or verdict.obstacle)) or ring_flaw(generator, ring)
    ring.refusal = ranks.agree(flaw)
    if ring.refusal is not None:
        logger.warning("Each process reads all prompts of %s: %s.", type(generator).__name__, ring.refusal)
    return ring


def _is_offloaded(model: nn.Module, name: str) -> bool:
    """Whether accelerate brings this parameter into memory when it is needed."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if "_hf_hook" in model.get_submodule(path).__dict__:
            return True
    return False


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and saved buffers; tables that modules compute for themselves keep their precision."""
    from hfopt.modules.quantized import QuantizedLinear

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.to(dtype)
            continue
        tensors: list[Any] = list(module._parameters.values())
        computed = module._non_persistent_buffers_set
        tensors += [value for name, value in module._buffers.items() if name not in computed]
        for tensor in tensors:
            if tensor is not None and tensor.is_floating_point() and tensor.dtype is not dtype:
                tensor.data = tensor.data.to(dtype)


def _check_whole(walk: Walk, programs: Programs, verdict: Verdict | None) -> None:
    """Raises UnsupportedModel unless all of the model is hfopt's. verdict: on its requests, if it generates."""
    from hfopt.program.decoder import obstacle

    generator = generation.generator_of(walk.model)
    reason = obstacle(generator or walk.model)
    if reason is not None:
        refused = [f"{path or 'the model'} ({why})" for path, why in walk.refused().items()]
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        words = f"could not swap {', '.join(refused[:3])}{more}: " if refused else ""
        raise UnsupportedModel(f"strict: {words}{reason}")
    if generator is None:
        return
    if loops := generation.refusals():
        raise UnsupportedModel(f"strict: {generation.in_words(loops)}")
    reason = next(filter(None, verdict or ()), None) or programs.refutation(generator)
    if reason is not None:
        raise UnsupportedModel(f"strict: decode steps go module by module: {reason}")
