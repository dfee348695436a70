"""load(): a model from a checkpoint, quantised while it is read, and optimised."""

from __future__ import annotations

import copy
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import accelerate
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hfopt.cache.codes import check_kv_cache
from hfopt.calibration import Calibration, Calibrator
from hfopt.checkpoints.foreign import READERS
from hfopt.checkpoints.hf_config import HfoptConfig
from hfopt.checkpoints.reader import FLOATS, Checkpoint
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from hfopt.host import Config, can_split, split_options
from hfopt.machine.cores import fit_threads
from hfopt.optimize import optimize
from hfopt.patches.tensor_plan import plan_for
from hfopt.progress import progress
from hfopt.streaming import attach, settle
from hfopt.words import DTYPES, dtype_name, dtypes_in_words, in_words

if TYPE_CHECKING:
    from hfopt.quantization import Format, QuantizationConfig

logger = logging.getLogger(__name__)

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_MODEL = ("attn_implementation", "trust_remote_code")
# While a model is made empty, torch's default dtype and how modules take parameters are others, for all threads
_BUILDING = threading.Lock()


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    quantization: str | Format | QuantizationConfig | Mapping[str, Any] | None = None,
    kv_cache: str | None = None,
    speculation: Literal["lookup"] | None = None,
    calibration: Calibration | None = None,
    tensor_parallel: bool = False,
    device_map: Literal["cpu", "disk"] = "cpu",
    max_memory: Mapping[str, int | str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model from safetensors, optimised; beside the result it takes less than 1 GB of memory.

    Args:
        path_or_id: a folder or an id of the Hub. It may hold floats, what `hfopt.save` wrote, or layers that GPTQ, AWQ or
            compressed-tensors have quantised; those are packed for hfopt's kernels with every integer as it was.
        dtype: float32, bfloat16 or float16, of what is not quantised, or its name. None or "auto": that of the checkpoint.
        quantization: what to turn linear layers into that the checkpoint holds as floats, while they are read: a format or
            its name ("int8", "int4", "nf4"), or a config that says so for parts of the model. None: nothing.
        kv_cache, speculation: as in `optimize`.
        calibration: as for `hfopt.optimize`. The model that has been quantised without it reads the texts, and then the
            checkpoint is read a second time.
        tensor_parallel: split the layers over the processes that torchrun has started, each of which reads its own part: a
            checkpoint of floats, by the plan of transformers, or that of hfopt where it has none.
        device_map: "disk" for a model that is larger than memory: its layers are read from the files while others are
            computed, over and over, but for those that fit into memory. The files must hold what kernels read, floats of
            this dtype or (in one process) what `hfopt.save` wrote, and must not change while the model lives.
        max_memory: {"cpu": bytes, or "8GiB"}, with device_map="disk": how much of the weights is in memory at a time, in
            each process. None: four fifths of what is available, shared out.
        kwargs: revision, token, cache_dir, subfolder, local_files_only, force_download and proxies, of the Hub;
            attn_implementation and trust_remote_code.

    Weights that need no conversion stay in the pages of their file.
    Raises InvalidInput for arguments, max_memory that is too little among them, UnsupportedModel for checkpoints that hfopt
    does not read, or not from disk, and CorruptCheckpoint where a file is damaged, tensors are missing, have another shape
    than the configuration says, or hold NaN or Inf.

    Example:
        >>> import hfopt
        >>> model = hfopt.load(hfopt.embedded_model(), quantization="int8", kv_cache="int8")
        >>> model.hfopt.quantized[0].path, model.hfopt.quantized[0].format
        ('model.layers.0.self_attn.q_proj', "Int8(group=None, compute='int8', symmetric=True)")
    """
    from hfopt.checkpoints.fill import Weights
    from hfopt.checkpoints.hf_quantizer import declare

    if not isinstance(path_or_id, str | os.PathLike):
        raise InvalidInput(f"path_or_id={path_or_id!r}: a folder or an id of the Hub is needed")
    source = os.fspath(path_or_id)
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else {dtype_name(each): each for each in DTYPES}.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"dtype = {dtype!r}: {dtypes_in_words('None')} is allowed")
    check_kv_cache(kv_cache)
    if unknown := sorted(kwargs.keys() - {*_HUB, *_MODEL}):
        raise InvalidInput(
            f"load has no arguments {unknown}; beside its own there are {sorted((*_HUB, *_MODEL))}"
        )
    budget = _budget(device_map, max_memory)
    on_disk = device_map == "disk"
    wanted = None if quantization is None else HfoptConfig.of(quantization)
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}

    config = _config(source, {**hub, **trust})
    stored = _stored_quantization(source, config)
    checkpoint = Checkpoint(source, hub)
    dtype = dtype or _dtype_of(source, config, checkpoint)
    options = trust | {n: kwargs[n] for n in _MODEL[:1] if n in kwargs}
    if tensor_parallel:
        if stored or calibration is not None:
            raise UnsupportedModel(
                f"{source}: tensor_parallel is for checkpoints of floats, without calibration"
            )
        empty = _empty_model(source, config, dtype, options)
        if on_disk:
            Weights(empty, checkpoint, dtype, stored, wanted, on_disk=True)  # checks that they can stay
        model = _split_model(source, empty, dtype, {**hub, **options}, by_rows=on_disk)
        if on_disk:
            attach(model, budget, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        optimize(model, quantization=quantization, kv_cache=kv_cache, speculation=speculation, strict=on_disk)
        settle(model)
        return model
    model = _empty_model(source, config, dtype, options)
    fit_threads()  # before the kernels that pack
    weights = Weights(model, checkpoint, dtype, stored, wanted, on_disk=on_disk)
    calibrator = None
    if calibration is not None:
        if not weights.quantised:
            raise InvalidInput("calibration is for quantization, and nothing is to be quantised")
        calibrator = Calibrator(model, calibration, **hub, **trust)
    weights.fill()
    _load_generation_config(model, source, hub)
    declare(model)
    if on_disk:
        attach(model, budget)
    optimize(model.eval(), kv_cache=kv_cache, speculation=speculation, strict=on_disk)
    settle(model)
    if calibrator is not None:
        batches = calibrator.measure({path: weights.linears[path] for path in weights.quantised})
        with progress("hfopt quantises weights", len(weights.quantised)) as advance:
            for batch in batches:
                weights.quantise_again(batch, advance)
    report: Any = model.hfopt
    model.__dict__["hfopt"] = replace(report, left=weights.left)
    return model


def _budget(device_map: str, max_memory: Mapping[str, int | str] | None) -> int | None:
    """Bytes of memory for weights; None if nothing is said."""
    if device_map not in ("cpu", "disk"):
        raise InvalidInput(f"device_map = {device_map!r}: 'cpu' or 'disk' is allowed")
    if max_memory is None:
        return None
    try:
        ((device, size),) = max_memory.items()
        budget = int(accelerate.utils.convert_file_size_to_int(size))
    except (AttributeError, TypeError, ValueError):
        device, budget = "", 0
    if device != "cpu" or budget < 1 or device_map != "disk":
        raise InvalidInput(
            f"max_memory = {max_memory!r}, device_map = {device_map!r}: {{'cpu': bytes or '8GiB'}} is allowed, with 'disk'"
        )
    return budget


def _config(source: str, options: dict[str, Any]) -> Config:
    try:
        return AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # of the file's values too, which may be any
        reason = in_words(error)
        if os.path.isdir(source):
            raise CorruptCheckpoint(f"{source}: its config.json cannot be used ({reason})") from error
        raise InvalidInput(
            f"path_or_id={source!r} is neither a folder nor an id of the Hub that can be loaded ({reason})"
        ) from error


def _stored_quantization(source: str, config: Config) -> dict[str, Any]:
    """The quantization_config of a checkpoint, empty where there is none."""
    found = getattr(config, "quantization_config", None) or {}
    stored = dict(found) if isinstance(found, Mapping) else found.to_dict()
    method, known = stored.get("quant_method"), sorted(("hfopt", *READERS))
    if stored and method not in known:
        raise UnsupportedModel(
            f"{source}: quant_method={method!r} of its quantization_config is not among {known}"
        )
    return stored


def _dtype_of(source: str, config: Config, checkpoint: Checkpoint) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if dtype is None:
        found = (FLOATS[stored.dtype] for stored in checkpoint.tensors.values() if stored.dtype in FLOATS)
        dtype = next(found, torch.float32)
    if dtype in DTYPES:
        return dtype
    logger.warning("%s holds %s, which hfopt has no kernels for: it becomes bfloat16", source, dtype)
    return torch.bfloat16


def _empty_model(source: str, config: Config, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """The model on the device `meta`, but for buffers: those that no file holds are right at once."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with _BUILDING, accelerate.init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except Exception as error:
        raise UnsupportedModel(
            f"{source} is no causal language model of transformers ({in_words(error)})"
        ) from error
    _keep_in_float32(model, dtype)
    model.tie_weights()  # moving a parameter to `meta` has parted it from the other names it had
    model.config._name_or_path = source
    return model


def _split_model(
    source: str, empty: PreTrainedModel, dtype: torch.dtype, options: dict[str, Any], *, by_rows: bool
) -> PreTrainedModel:
    """The part that this one of torchrun's processes has of the model, read by transformers.

    empty: the model without weights. by_rows: as in `plan_for`, whatever plan transformers has.
    """
    from hfopt.distributed.placement import begin_ranks  # here, because it loads Numba

    size = int(os.environ.get("WORLD_SIZE", "0"))
    if size < 1:
        raise InvalidInput(
            "tensor_parallel=True needs processes: start the script with torchrun --nproc-per-node N"
        )
    begin_ranks()  # before memory is taken
    split = split_options(
        None if can_split(empty, size) and not by_rows else plan_for(empty, by_rows=by_rows), size
    )
    if split is None:
        raise UnsupportedModel("tensor_parallel=True: the installed transformers splits no models")
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options, **split)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"{source} cannot be split over {size} processes ({in_words(error)})"
        ) from error
    found: PreTrainedModel = model.eval()
    return found


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep in float32 what must not be of this dtype by the model's class, as `from_pretrained` does."""
    kept: list[str] = [] if dtype is torch.float32 else [*(model._keep_in_fp32_modules_strict or ())]
    if dtype is torch.float16:
        kept += model._keep_in_fp32_modules or ()
    for pattern in kept:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search(pattern.replace("*", ".*"), name) and tensor.is_floating_point():
                tensor.data = tensor.data.float()


def _load_generation_config(model: PreTrainedModel, source: str, hub: dict[str, Any]) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        logger.info("%s has no generation_config.json: generation is as its config.json says", source)
