"""save(): a model as a folder of safetensors that `load` and `from_pretrained` read by mapping its files into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hfopt.checkpoints.hf_quantizer import declare
from hfopt.errors import InvalidInput


def save(model: PreTrainedModel, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write a model, quantised or not, to a folder; `model.save_pretrained(folder, **kwargs)`, which does the same.

    A quantised layer is saved as it is, bit by bit, with its format in `config.json`. The files are read again by
    `hfopt.load(folder)` and, once hfopt has been imported, by transformers' `from_pretrained(folder)`.

    Raises InvalidInput for anything but a model of transformers, and where there can be no folder.

    Example:
        >>> import hfopt, tempfile
        >>> model = hfopt.load(hfopt.embedded_model(), quantization="nf4")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hfopt.save(model, folder)
        ...     again = hfopt.load(folder)
        >>> again.hfopt.quantized == model.hfopt.quantized
        True
    """
    if not isinstance(model, PreTrainedModel):
        raise InvalidInput(f"model is a {type(model).__name__}: a model of transformers is needed")
    if not isinstance(folder, str | os.PathLike) or os.path.isfile(folder):
        raise InvalidInput(f"folder={folder!r} is no folder, and none can be made there")
    declare(model)
    model.save_pretrained(folder, **kwargs)
    # a file that an earlier model has left would be taken for the weights of this one
    single, index = Path(folder, SAFE_WEIGHTS_NAME), Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    if single.exists() and index.exists():
        min(single, index, key=lambda file: file.stat().st_mtime_ns).unlink()
