"""Numba: what a machine with another release is told, and which files know its insides."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hfopt.kernels import release
from tests import fresh

ROOT = Path(__file__).parents[1]

# ---- another release --------------------------------------------------------------------------------------------------

_PROGRAM = """
import contextlib, io, json, sys
import hfopt
from hfopt.cli import main
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2))
classes = [type(module) for module in model.modules()]

def error_of(work):
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]

def functional():
    import hfopt.functional

def command(name):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([name])
    return [code, out.getvalue(), err.getvalue()]

print(json.dumps({
    "optimize": error_of(lambda: hfopt.optimize(model)),
    "again": error_of(lambda: hfopt.optimize(model)),
    "explain": error_of(lambda: hfopt.explain(model)),
    "functional": error_of(functional),
    "doctor": command("doctor"),
    "warmup": command("warmup"),
    "untouched": classes == [type(module) for module in model.modules()],
    "numba": "numba" in sys.modules,
}))
"""


def _install_numba(folder: Path, version: str, source: str) -> None:
    """A Numba of this version, which consists of this source."""
    information = folder / f"numba-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: numba\nVersion: {version}\n")
    (folder / "numba.py").write_text(source)


def _check(printed: str, *words: str) -> dict[str, Any]:
    """Each way to the kernels raises a KernelError with these words, and doctor gives them as advice."""
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    for work in ("optimize", "again", "explain", "functional"):
        name, message = found[work]
        assert name == "KernelError"
        assert all(word in message for word in words)
    code, output, errors = found["doctor"]
    assert code == 1 and errors == ""
    (advice,) = [line for line in output.splitlines() if line.startswith("- ") and "numba" in line]
    assert all(word in advice for word in words)
    assert "Cores" in output and "Versions" in output
    code, _, errors = found["warmup"]
    assert code == 2 and "\n" not in errors.strip() and all(word in errors for word in words)
    assert found["untouched"]
    return found


def test_another_release_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    _install_numba(tmp_path, "0.70.1", "raise SystemError('_internal')")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = _check(done.stdout, "numba 0.70.1 is installed", f"numba{release.RANGE}", "pip install")
    assert not found["numba"]


def test_a_release_that_does_not_load_is_a_clear_error(tmp_path: Path) -> None:
    source = "raise ImportError('Numba needs NumPy 2.4 or less. Got NumPy 2.9.')"
    _install_numba(tmp_path, metadata.version("numba"), source)
    printed = fresh.run("import sys; sys.path.insert(0, sys.argv[1])\n" + _PROGRAM, str(tmp_path))
    _check(printed, "numba, which compiles the kernels, cannot be loaded", "needs NumPy 2.4 or less")


def _obstacle_of(version: str) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: version)
        return release.obstacle()


@pytest.mark.parametrize("version", ["0.68.0", "0.68.12", "0.68.2.dev0", "0.68.1+local"])
def test_releases_in_the_range(version: str) -> None:
    assert _obstacle_of(version) is None


@pytest.mark.parametrize("version", ["0.61.2", "0.67.1", "0.68.0rc1", "0.69.0rc1", "0.69.0", "1.0"])
def test_releases_out_of_the_range(version: str) -> None:
    obstacle = _obstacle_of(version)
    assert obstacle is not None and f"numba {version} is installed" in obstacle and release.RANGE in obstacle


def test_no_numba_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    obstacle = release.obstacle()
    assert obstacle is not None and "numba is not installed" in obstacle and release.RANGE in obstacle


def test_the_range_is_that_of_the_package() -> None:
    assert f'"numba{release.RANGE}"' in (ROOT / "pyproject.toml").read_text()


# ---- insides ----------------------------------------------------------------------------------------------------------

KERNELS = ROOT / "hfopt" / "kernels"  # nothing else imports Numba: see test_imports
INSIDERS = {"jit/compiler.py", "jit/disk_cache.py"}
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
    return name.startswith("_") and not name.startswith("__") and name != "_fields"  # of every named tuple


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
    sources = {path.relative_to(KERNELS).as_posix(): path.read_text() for path in KERNELS.rglob("*.py")}
    found = {name: set(_insides(source)) for name, source in sources.items()}
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
