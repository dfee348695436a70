"""The stairs of the house: which part may import which, and what `import hfopt` loads."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hfopt"

# Part of the package (a module or a folder) -> the parts that it may import. A new part needs a line here.
ALLOWED = {
    "errors": set(),
    "host": set(),
    "private_file": {"kernels._jit"},
    "_linux": set(),
    "_memory": {"_linux"},
    "_numba": set(),
    "shapes": set(),
    "limits": {"kernels._jit", "kernels.peak"},
    "embedded": set(),
    "quantization": {"errors"},
    "kernels": {"errors", "_numba"},
    "env": {"errors", "kernels", "_linux"},
    "_cache_rows": {"errors", "kernels"},
    "_cache_codes": {"errors"},
    "_cache_layer": {"errors", "host", "kernels", "_cache_codes", "_cache_rows", "_memory"},
    "cache": {"errors", "host", "kernels", "_cache_codes", "_cache_rows", "_cache_layer"},
    "functional": {"errors", "kernels", "_cache_codes", "cache", "env", "_memory", "private_file"},
    "modules": {"errors", "functional", "cache"},
    "patches": {"errors", "host", "functional", "cache", "modules", "quantization"},
    "progress": {"kernels"},
    "generation": {"errors", "host", "functional", "cache", "private_file", "progress"},
    "model_proof": {"errors", "generation", "host", "patches"},
    "report": {"errors", "model_proof", "env", "functional", "patches", "generation", "progress"},
    "calibration": {"errors", "quantization", "progress"},
    "optimize": {
        "_cache_codes",
        "model_proof",
        "errors",
        "calibration",
        "env",
        "functional",
        "patches",
        "generation",
        "quantization",
        "quantizer",
        "report",
        "progress",
    },
    "warmup": {"functional", "optimize", "progress", "quantization"},
    "conversion": {"errors"},
    "checkpoint": {"errors", "_memory", "conversion"},
    "config": {"errors", "quantization"},
    "packed_files": {"errors", "checkpoint", "quantization", "patches"},
    "quantizer": {
        "_memory",
        "errors",
        "checkpoint",
        "config",
        "conversion",
        "packed_files",
        "quantization",
        "patches",
    },
    "weights": {"errors", "checkpoint", "config", "conversion", "packed_files", "quantization", "patches"},
    "load": {
        "errors",
        "host",
        "_cache_codes",
        "calibration",
        "checkpoint",
        "config",
        "quantization",
        "quantizer",
        "weights",
        "optimize",
        "progress",
    },
    "save": {"errors", "quantizer"},
    "__init__": {
        "errors",
        "host",
        "cache",
        "config",
        "embedded",
        "generation",
        "load",
        "optimize",
        "quantizer",
        "report",
        "save",
        "warmup",
    },
    # the public names of hfopt, and what describes the machine
    "cli": {
        "__init__",
        "errors",
        "host",
        "env",
        "limits",
        "shapes",
        "quantization",
        "functional",
        "cache",
        "generation",
        "kernels.selftest",
        "kernels._jit",
    },
}
# Foreign packages that only some parts may import.
ONLY_IN = {
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "rich": {"cli"},
    "matplotlib": {"cli"},
    "torch": set(ALLOWED) - {"kernels"},
}
ONLY_IN["transformers"] = ONLY_IN["torch"]

SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(source: Path) -> str:
    return source.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def imported(source: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth; `from a import b` is a and a.b."""
    package = ("hfopt", *source.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def own_parts(source: Path) -> set[str]:
    """Parts of the package that a file imports; a public name of `hfopt` itself counts as `__init__`."""
    parts = set()
    for name in imported(source):
        first, _, rest = name.partition(".")
        if first == "hfopt" and rest:
            part = rest.split(".")[0]
            is_part = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
            parts.add(part if is_part else "__init__")
    return parts


def test_every_part_has_its_rule() -> None:
    assert {part_of(source) for source in SOURCES} <= set(ALLOWED)


def test_imports_go_one_way() -> None:
    wrong = {}
    for source in SOURCES:
        allowed = ALLOWED[part_of(source)] | {part_of(source)}
        for other in own_parts(source) - allowed:
            inner = {name for name in imported(source) if name.startswith(f"hfopt.{other}")}
            permitted = {f"hfopt.{name}" for name in allowed if name.startswith(f"{other}.")}
            if not permitted or not inner <= permitted | {f"hfopt.{other}"}:
                wrong[f"{source.relative_to(PACKAGE)} imports {other}"] = sorted(inner)
    assert wrong == {}


def test_foreign_packages_stay_in_their_parts() -> None:
    wrong = [
        f"{source.relative_to(PACKAGE)} imports {package}"
        for source in SOURCES
        for package in {name.split(".")[0] for name in imported(source)} & set(ONLY_IN)
        if part_of(source) not in ONLY_IN[package]
    ]
    assert wrong == []


def test_the_rules_see_relative_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "cache.py").touch()
    source = tmp_path / "kernels" / "bad.py"
    source.write_text(
        "def f():\n    from .. import cache\n    import numba.core\n    from ..cache import x\n"
    )
    assert own_parts(source) == {"cache"}
    assert "numba.core" in imported(source)


def test_importing_the_package_loads_neither_numba_nor_kernels_and_starts_no_thread() -> None:
    """Threads would be missing in a process that is forked after the import."""
    code = (
        "import os, sys, torch, transformers\n"
        "before = len(os.listdir('/proc/self/task')) if sys.platform == 'linux' else 0\n"
        "import hfopt\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('numba', 'llvmlite', 'rich', 'matplotlib')"
        " or name.startswith('hfopt.kernels')])\n"
        "print(len(os.listdir('/proc/self/task')) - before if sys.platform == 'linux' else 0)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split("\n") == ["[]", "0", ""]
