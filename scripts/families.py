"""Families of decoders that hfopt knows whole: what of each is a program, and how it compares to stock on a small shape.

    python scripts/families.py                                a line for each
    python scripts/families.py --names gemma3 gpt2            these only
    python scripts/families.py --markdown docs/families.md    a page of them

Models are those of `tests/decoders.py`; for the ratio they are wider (hidden size 512, 8 layers). The ratio is stock's time
for a token in float32 over hfopt's, medians of --repeats turns in one process, with as many threads as torch takes.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

import hfopt
from hfopt.errors import HfoptError
from hfopt.words import dtype_name
from tests.decoders import DECODERS, made
from tests.model_types import config, prompts, random_model

_FORMATS = ("int8", "int4", "nf4")
_N_NEW = 32
# fields of configurations by what they are for, of the shape that is timed
_WIDE: dict[str, int] = {
    "hidden_size": 512, "n_embd": 512, "d_model": 512, "num_hidden_layers": 8, "n_layer": 8, "n_layers": 8, "num_layers": 8,
    "num_attention_heads": 8, "n_head": 8, "n_heads": 8, "num_heads": 8, "attention_heads": 8, "head_dim": 64,
    "intermediate_size": 1536, "ffn_dim": 1536, "n_inner": 1536, "ffn_hidden_size": 1536, "word_embed_proj_dim": 512,
    "vocab_size": 8192,
}  # fmt: skip


def _has_program(name: str, **options: Any) -> bool:
    try:
        model = made(name).to(options.pop("to", torch.float32))
        hfopt.optimize(model, strict=True, **options)
        model.generate(**prompts(), max_new_tokens=4, do_sample=False)
    except HfoptError:
        return False
    return True


def _window(name: str) -> str:
    windows = {hfopt.explain(hfopt.optimize(made(name))).window}
    return ", ".join(f"{each}" for each in windows if each) or "–"


def _seconds(model: Any, n_new: int) -> float:
    begin = time.perf_counter()
    model.generate(**prompts(), min_new_tokens=n_new, max_new_tokens=n_new, do_sample=False)
    return time.perf_counter() - begin


def _ratio(name: str, repeats: int) -> float:
    """Stock's time of a token over hfopt's, in turn."""
    model_type, fields = DECODERS[name]
    known = {**vars(config(model_type)), **fields}
    changes: dict[str, Any] = {key: each for key, each in _WIDE.items() if key in known and key not in fields}
    for kinds in ("layer_types", "attention_types"):
        if known.get(kinds):
            changes[kinds] = (known[kinds] * 2)[:8] if kinds == "layer_types" else [[["global", "local"], 4]]
    # the generic shape has half as many heads and layers
    changes |= {key: [*each, *each] for key, each in fields.items() if isinstance(each, list)}
    changes |= {key: 2 * fields[key] for key in ("num_kv_heads",) if key in fields}
    settings = config(model_type, **{**fields, **changes})
    stock, ours = random_model(settings), hfopt.optimize(random_model(settings))

    def token(model: Any) -> float:
        return (_seconds(model, _N_NEW) - _seconds(model, 1)) / (_N_NEW - 1)

    token(stock), token(ours)
    return statistics.median(token(stock) / token(ours) for _ in range(repeats))


def _row(name: str, repeats: int) -> list[str]:
    program = _has_program(name)
    formats = [each for each in _FORMATS if _has_program(name, quantization=each)]
    halves = [dtype_name(each) for each in (torch.bfloat16, torch.float16) if _has_program(name, to=each)]
    cache = _has_program(name, kv_cache="int8")
    try:
        ratio = f"{_ratio(name, repeats):.1f} ×"
    except Exception as error:  # noqa: BLE001  (sizes that do not go together)
        ratio = f"not made ({type(error).__name__})"
    words = [
        "yes" if program else "no",
        ", ".join(halves),
        ", ".join(formats),
        "yes" if cache else "no",
        _window(name),
    ]
    return [name, *words, ratio]


_HEAD = ["family", "program", "16 bits", "packed weights", "8-bit cache", "window", "a token, stock / hfopt"]
_PAGE = """# Families

Decoders that hfopt knows whole, with transformers {version}: written by `python scripts/families.py --markdown
docs/families.md` from the models of `tests/decoders.py`, which `tests/test_decoders.py` holds against transformers in all
modes of `generate`. The ratio is that of a small random model in float32 (hidden size 512, 8 layers, {threads} threads),
medians of {repeats} turns in one process: it shows that a family is fast, not how fast yours will be. A window of 8 is that
of the tiny model. Gemma 4, Apertus and others that have tests of their own, and types that are programs without a record,
are in [models.md](models.md).

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--names", nargs="+", metavar="NAME", help="these instead of all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.names or DECODERS:
        rows.append(_row(name, arguments.repeats))
        print("  ".join(rows[-1]), flush=True)
    if arguments.markdown:
        lines = [f"| {' | '.join(row)} |" for row in (_HEAD, ["---"] * len(_HEAD), *rows)]
        page = _PAGE.format(
            version=transformers.__version__, threads=torch.get_num_threads(), repeats=arguments.repeats
        )
        arguments.markdown.write_text(page + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
