"""The stairs of the house: which part may import which, and what `import hfopt` loads."""

import ast
import functools
import sys
from pathlib import Path

import pytest

from tests import fresh

PACKAGE = Path(__file__).parents[1] / "hfopt"

# Part of the package (a module of the root, or a folder) -> the parts that it imports: these and no others.
IMPORTS: dict[str, set[str]] = {
    "embedded": set(),
    "errors": set(),
    "host": set(),
    "words": set(),
    "kernels": {"errors"},
    "progress": {"kernels"},
    "quantization": {"errors", "host"},
    "machine": {"errors", "kernels"},
    "save": {"checkpoints", "errors"},
    "streaming": {"errors", "host", "machine"},
    "chat": {"cache", "errors", "host", "words"},
    "cache": {"errors", "host", "machine"},
    "warmup": {"functional", "optimize", "quantization", "words"},
    "calibration": {"errors", "host", "progress", "quantization", "words"},
    "model_proof": {"cache", "distributed", "errors", "generation", "host", "patches"},
    "checkpoints": {"errors", "host", "machine", "modules", "quantization", "words"},
    "console": {"cache", "errors", "host", "quantization", "words"},
    "distributed": {"cache", "errors", "functional", "kernels", "machine", "words"},
    "functional": {"cache", "errors", "kernels", "machine", "quantization", "words"},
    "generation": {"distributed", "cache", "errors", "functional", "host", "machine", "progress", "words"},
    "modules": {"distributed", "errors", "functional", "host", "quantization", "words"},
    "patches": {
        "distributed",
        "cache",
        "errors",
        "functional",
        "host",
        "modules",
        "quantization",
        "streaming",
        "words",
    },
    "program": {
        "distributed",
        "cache",
        "errors",
        "functional",
        "host",
        "kernels",
        "modules",
        "patches",
        "streaming",
        "words",
    },
    "cli": {
        "bench",
        "console",
        "distributed",
        "errors",
        "functional",
        "generation",
        "host",
        "kernels",
        "machine",
        "words",
    },
    "__main__": {"cli"},
    "report": {
        "errors",
        "functional",
        "generation",
        "host",
        "machine",
        "model_proof",
        "patches",
        "program",
        "streaming",
        "words",
    },
    "load": {
        "distributed",
        "patches",
        "cache",
        "calibration",
        "checkpoints",
        "errors",
        "host",
        "machine",
        "optimize",
        "progress",
        "quantization",
        "streaming",
        "words",
    },
    "__init__": {
        "cache",
        "chat",
        "checkpoints",
        "embedded",
        "errors",
        "generation",
        "host",
        "load",
        "optimize",
        "report",
        "save",
        "warmup",
    },
    "bench": {
        "cache",
        "console",
        "errors",
        "functional",
        "generation",
        "host",
        "kernels",
        "machine",
        "modules",
        "program",
        "quantization",
        "words",
    },
    "optimize": {
        "host",
        "distributed",
        "cache",
        "calibration",
        "checkpoints",
        "errors",
        "functional",
        "generation",
        "machine",
        "model_proof",
        "modules",
        "patches",
        "program",
        "progress",
        "quantization",
        "report",
        "streaming",
        "words",
    },
}
# Foreign packages that only some parts may import.
ONLY_IN = {
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "rich": {"cli", "console"},
    "matplotlib": {"bench"},
    "torch": set(IMPORTS) - {"kernels"},
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


def test_each_part_imports_what_it_may_and_no_rule_is_stale() -> None:
    found: dict[str, set[str]] = {}
    for source in SOURCES:
        found.setdefault(part_of(source), set()).update(own_parts(source) - {part_of(source)})
    assert found == IMPORTS


def test_imports_go_one_way() -> None:
    below: set[str] = set()
    while below != IMPORTS.keys():
        free = {part for part, imports in IMPORTS.items() if imports <= below} - below
        assert free, f"these import each other: {sorted(IMPORTS.keys() - below)}"
        below |= free


def test_rooms_files_and_functions_are_small() -> None:
    rooms = {file.name for file in PACKAGE.glob("*.py")} - {"__main__.py"}  # a door
    assert len(rooms) <= 12 and len(list((PACKAGE / "cli").glob("*.py"))) <= 10
    for source in SOURCES:
        text = source.read_text()
        assert len(text.splitlines()) <= 350, source
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
                first = node.body[1 if has_docstring else 0].lineno
                assert node.end_lineno is not None and node.end_lineno - first < 80, f"{source}: {node.name}"


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
        "import sys\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('numba', 'llvmlite', 'rich', 'matplotlib')"
        " or name.startswith('hfopt.kernels')])\n"
        "print(n_threads_of_import)\n"
    )
    assert fresh.run(code) == "[]\n0\n"
