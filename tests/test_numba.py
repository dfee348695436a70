"""Numba: which files know its insides."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

KERNELS = ROOT / "hfopt" / "kernels"  # nothing else imports Numba: see test_imports
INSIDERS = {"_compiler.py", "_kernel_cache.py"}
PUBLIC_MODULES = ("numba.types", "numba.extending", "numba.config", "numba.errors", "llvmlite.ir")
PUBLIC_NAMES = ("njit", "carray", "threading_layer", "get_num_threads", "set_num_threads", "__version__")
FLAGS = {"nogil", "fastmath", "error_model", "boundscheck"}  # of njit
SYMBOLS = {"numba_parallel_for", "get_num_threads"}  # of Numba's compiled parts, which kernels call by name
RESULTS = {"get_call_type", "get_compile_result", "fndesc"}  # what the compiler returns, and how it is asked
# what the code generator of an intrinsic may ask the context for that it gets
OF_CONTEXTS = {"get_dummy_value", "get_value_type", "make_tuple"}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_inside(name: str) -> bool:
    package, _, rest = name.partition(".")
    if package not in ("numba", "llvmlite") or rest in ("", *PUBLIC_NAMES):
        return False
    return not name.startswith(PUBLIC_MODULES) or any(map(_is_private, rest.split(".")))


def _insides(source: str) -> Iterator[str]:
    """What a file uses of Numba and llvmlite beside their public names."""
    tree = ast.parse(source)
    own = {"self"}  # whose private attributes are the package's
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.ImportFrom():
                own |= {alias.asname or alias.name for alias in node.names}
            case ast.Call(func=ast.Name(id="njit") | ast.Attribute(attr="njit")):
                yield from {keyword.arg for keyword in node.keywords if keyword.arg} - FLAGS
            case ast.Constant(value=str(text)) if text in SYMBOLS:
                yield text
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = _dotted(node.value)
        if owner in ("context", "typingctx", "targetctx"):
            yield from {node.attr} - OF_CONTEXTS
        elif owner.split(".")[0] in ("numba", "llvmlite"):
            names.append(f"{owner}.{node.attr}")
        elif node.attr in RESULTS or (_is_private(node.attr) and owner not in own):
            yield node.attr
    yield from filter(_is_inside, names)


def _overridden(source: str) -> Iterator[str]:
    """Names of the methods in classes whose bases are Numba's."""
    nodes = list(ast.walk(ast.parse(source)))
    theirs = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("numba.core", "llvmlite"))
        for alias in node.names
    }
    for node in nodes:
        if isinstance(node, ast.ClassDef) and theirs & {_dotted(base).split(".")[0] for base in node.bases}:
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            yield from (name for name in methods if not name.startswith("__"))


def test_few_files_know_the_insides_of_numba() -> None:
    found = {path.name: set(_insides(path.read_text())) for path in KERNELS.glob("*.py")}
    assert {name: insides for name, insides in found.items() if insides and name not in INSIDERS} == {}


@pytest.mark.parametrize("name", sorted(INSIDERS))
def test_their_heads_list_what_they_touch(name: str) -> None:
    source = (KERNELS / name).read_text()
    head = ast.get_docstring(ast.parse(source)) or ""
    words = set(re.findall(r"\w+", head))
    touched = {part for each in (*_insides(source), *_overridden(source)) for part in each.split(".")}
    assert touched
    assert touched <= words


@pytest.mark.parametrize(
    "line",
    [
        "from numba.core import cgutils",
        "import numba.core.caching",
        "from llvmlite.binding import add_symbol",
        "from llvmlite.ir.types import _BaseFloatType",
        "import numba; numba.core.event.register",
        "def f(context): context.call_conv",
        "def f(context): context.make_array(1)(context)",
        "launch.dispatcher._cache = None",
        "numba.njit(pipeline_class=object)",
        "emit('numba_parallel_for')",
    ],
)
def test_the_rule_sees(line: str) -> None:
    assert list(_insides(line))
