"""Models for the command line: from a checkpoint, or of a given shape with random weights."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfopt.console.shapes import SHAPES
from hfopt.errors import CorruptCheckpoint, InvalidInput
from hfopt.host import Config
from hfopt.words import first_line, in_words

# A prime: rows of a matrix that is filled with repetitions of the block then begin at different places in it.
_BLOCK = 1_048_573
_SCALE = 0.02
_TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


def load(model_id: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a checkpoint folder or hub id; weights from safetensors.

    Raises `CorruptCheckpoint` for a folder that is incomplete or damaged, `InvalidInput` for an id that
    cannot be loaded.
    """
    with _named_errors(model_id):
        _find(model_id, trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_id,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            output_loading_info=True,
        )
    model, info = loaded
    for key, fault in (("missing_keys", "lacks"), ("mismatched_keys", "has a wrong size for")):
        # mismatches are tuples of a name and both sizes
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in info[key])
        if names:
            raise CorruptCheckpoint(f"{model_id} {fault} {len(names)} weights, {names[0]} among them")
    return model.eval()


def load_tokenizer(model_id: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; raises as `load` does."""
    folder = Path(model_id)
    # without files, transformers makes an empty tokenizer of some classes
    if (folder / "config.json").is_file() and not any(
        each for name in _TOKENIZERS for each in folder.glob(name)
    ):
        raise CorruptCheckpoint(f"{model_id} has no tokenizer: files such as tokenizer.json are missing")
    with _named_errors(model_id):
        _find(model_id, trust_remote_code)
        return AutoTokenizer.from_pretrained(model_id, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _named_errors(model_id: str) -> Iterator[None]:
    """Whatever is raised while something of a checkpoint is loaded as one line that names it."""
    try:
        yield
    except Exception as error:
        reason = in_words(error)
        if Path(model_id).is_dir():
            raise CorruptCheckpoint(f"{model_id} cannot be loaded ({reason})") from error
        raise InvalidInput(
            f"model_id={model_id!r} is neither a folder nor a loadable hub id ({reason})"
        ) from error


def _find(model_id: str, trust_remote_code: bool) -> None:
    """Raises what `config.json` is missing with.

    The rest is looked for file by file, and without a network each of them takes half a minute not to be found.
    """
    AutoConfig.from_pretrained(model_id, trust_remote_code=trust_remote_code)


def named_config(name: str, n_layers: int | None = None) -> Config:
    """The configuration of one of `SHAPES` or of a `config.json`, with `n_layers` layers if that is given."""
    fields: dict[str, Any]
    if name in SHAPES:
        fields = dict(SHAPES[name])
    elif Path(name).is_file():
        try:
            fields = json.loads(Path(name).read_text())
        except ValueError as error:
            raise CorruptCheckpoint(f"{name} is not a JSON file ({first_line(error)})") from error
    else:
        raise InvalidInput(f"{name!r} is neither a config.json nor one of the shapes {', '.join(SHAPES)}")
    try:
        config = AutoConfig.for_model(**fields)
    except (TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{name} is not the configuration of a known model ({first_line(error)})"
        ) from error
    if n_layers is not None:
        config.num_hidden_layers = n_layers
    return config


def random_model(config: Config, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, quickly: norms at one, the rest repetitions of a random block."""
    with accelerate.init_empty_weights(include_buffers=False):
        # a model keeps the object, and `optimize` may write to it
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(_BLOCK, generator=generator).mul_(_SCALE).to(dtype).repeat(2)
    filled: dict[int, nn.Parameter] = {}
    offset = 0
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            # a weight that two modules share is one parameter, and stays one
            if id(empty) not in filled:
                filled[id(empty)] = _filled(
                    empty, block[offset:], is_norm=empty.ndim == 1 and name == "weight"
                )
                offset = (offset + 7919) % _BLOCK
            setattr(module, name, filled[id(empty)])
    model.tie_weights()
    # fixed lengths: no token ends a text
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _filled(empty: nn.Parameter, block: torch.Tensor, is_norm: bool) -> nn.Parameter:
    values = torch.empty(empty.shape, dtype=empty.dtype)
    if is_norm:
        values.fill_(1.0)
    else:
        flat = values.view(-1)
        done = min(_BLOCK, flat.numel())
        flat[:done] = block[:done]
        while done < flat.numel():
            more = min(done, flat.numel() - done)
            flat[done : done + more] = flat[:more]
            done += more
    return nn.Parameter(values, requires_grad=empty.requires_grad)
