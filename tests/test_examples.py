"""The examples in the docstrings of public names: each name has one, and all of them run as they are written."""

import doctest
from typing import Any

import pytest

import hfopt
from hfopt import distributed, functional, generation, modules, quantization
from hfopt.quantization import FORMATS


def is_exception(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


FORMAT_NAMES = ("Int8", "Int4", "NF4", "QuantizationConfig", "register")
PUBLIC: dict[str, Any] = {name: getattr(hfopt, name) for name in hfopt.__all__ if name != "__version__"}
PUBLIC |= {name: getattr(quantization, name) for name in FORMAT_NAMES}
PUBLIC |= {name: getattr(generation, name) for name in generation.__all__ if name.startswith("hf_")}
PUBLIC |= {f"modules.{name}": getattr(modules, name) for name in modules.__all__}
OPERATIONS = (
    "add_layer_norm",
    "add_rms_norm",
    "bgmv_expand",
    "bgmv_expand_slice",
    "bgmv_shrink",
    "causal_conv1d",
    "causal_conv1d_update",
    "fast_layer_norm",
    "gelu_mul",
    "indirect_access_kv_cache_attention",
    "rms_norm",
    "rotary_embedding",
    "selective_scan",
    "selective_state_update",
    "sgmv_expand",
    "sgmv_expand_slice",
    "sgmv_shrink",
    "silu_mul",
    "varlen_attention",
)
PUBLIC |= {f"distributed.{name}": getattr(distributed, name) for name in distributed.__all__}
PUBLIC |= {f"functional.{name}": getattr(functional, name) for name in OPERATIONS}
PUBLIC = {name: thing for name, thing in PUBLIC.items() if not is_exception(thing)}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(autouse=True)
def _known_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """What examples register is forgotten."""
    monkeypatch.setattr(quantization.format, "FORMATS", FORMATS.copy())


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "HfoptConfig":  # from_pretrained quantises from transformers 5 on
        pytest.importorskip("transformers.core_model_loading")
    example = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, {}, name, None, None)
    assert example.examples, f"{name} has no example"
    failed, _ = doctest.DocTestRunner(optionflags=OPTIONS).run(example)
    assert not failed, capsys.readouterr().out
