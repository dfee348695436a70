"""README and pages under docs/: their code runs, their figures are those of docs/figures.json, their links lead on."""

import importlib.util
import json
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

import hfopt
from scripts import figures

ROOT = Path(__file__).parents[1]
WRITTEN = (
    "design.md",
    "families.md",
    "models.md",
)  # by scripts, and the plan of the house: they show no code to run
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in WRITTEN),
]
_BLOCK = re.compile(r"(?P<fragment><!-- fragment -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line and code of each block of Python; those behind `<!-- fragment -->` are not meant to run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in _BLOCK.finditer(text)
        if match["fragment"] is None
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page go on from each other, in a folder where path/to/model is the embedded model."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(hfopt.embedded_model())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "_default_log_level", logging.ERROR)
    module = types.ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)
    for line, code in blocks(page):
        # what transformers and peft have to say about the small model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile("\n" * line + code, page, "exec"), module.__dict__)


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_file(page: Path) -> None:
    text = page.read_text()
    assert figures.filled(text, json.loads(figures.FIGURES.read_text())) == text, "run scripts/figures.py"


def test_a_new_run_takes_the_place_of_older_rows() -> None:
    known = json.loads(figures.FIGURES.read_text())
    row = figures.row_of(known, "decode-bf16") | {"ratio": 9.87}
    report = {
        "configuration": known["runs"][0]["configuration"],
        "rows": {"decode-bf16": row, "load-int8": {}},
    }
    figures.add(known, report, "2030-01-02", "python scripts/bench.py --rows decode-bf16")
    assert [list(run["rows"]) for run in known["runs"]].count(["decode-bf16"]) == 1
    page = figures.filled("<!-- figures:headline -->\nold\n<!-- /figures -->", known)
    assert "**9.9 ×**" in page and "old" not in page and "load-int8" not in page
    assert "2030-01-02" in "".join(figures.runs(known))


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        for target in _LINK.findall(page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", f"{tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Examples" in (tmp_path / "reference" / "hfopt" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="needs the extra docs")
def test_the_notebook_runs() -> None:
    import nbformat

    from scripts import notebook

    before = nbformat.read(notebook.NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in before.cells if cell.cell_type == "code"), "run scripts/notebook.py"
    after = notebook.executed(before)
    plots = [
        output
        for cell in after.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(plots) == 4
