"""Figures of the README and of the pages under docs/, all from one file: docs/figures.json.

    python scripts/figures.py                      write them into the marked places
    python scripts/figures.py --check              say which places differ; exit code 1 if any
    python scripts/bench.py --json bench.json
    python scripts/figures.py --add bench.json     take a run over (of --growth too), then write

A place begins with `<!-- figures:NAME -->` and ends with `<!-- /figures -->`; NAME is a key of `PLACES`. A row that a new
run has measured takes the place of the older one, and each row keeps the machine, versions, date and command of its run.
"""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hfopt.bench.rows import ROWS

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures.json"
GROWTH_PLOT = ROOT / "docs" / "growth.svg"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PLACE = re.compile(r"(<!-- figures:(?P<name>[\w-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)
_VERSIONS = ("torch", "transformers", "numba")
_KEPT = ("title", "quantization", "stock", "optimized", "ratio")
# rows of the README, in its words
_HEADLINE = {
    "decode-bf16": "bfloat16: a token",
    "decode-bf16-8k": "bfloat16: a token behind 8,192 others",
    "decode-bf16-b8": "bfloat16: a token of 8 sequences",
    "decode-int8": "8-bit weights: a token (stock: bfloat16)",
    "decode-int4": "4-bit weights: a token (stock: bfloat16)",
    "decode-f32": "float32: a token",
    "decode-f16": "float16: a token",
    "prefill-bf16": "bfloat16: a prompt of 512 tokens",
}

Figures = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """A table of Markdown; `right`: the columns of numbers."""
    line = ["---:" if column in right else "---" for column in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, line, *rows)]


def seconds(value: float) -> str:
    """In milliseconds, with three digits or so."""
    return f"{value * 1e3:,.{2 if value < 0.01 else 1 if value < 1 else 0}f} ms"


def measured(figures: Figures) -> set[str]:
    """Names of the rows that there are figures of."""
    return {name for run in figures["runs"] for name in run["rows"]}


def run_of(figures: Figures, row: str) -> int:
    """The number, from 1, of the run that a row comes from."""
    return next(number for number, run in enumerate(figures["runs"], 1) if row in run["rows"])


def row_of(figures: Figures, row: str) -> Figures:
    """What was measured for a row."""
    return figures["runs"][run_of(figures, row) - 1]["rows"][row]


def headline(figures: Figures) -> Iterator[str]:
    """The table of the README."""
    rows = [
        [
            words,
            seconds(row_of(figures, name)["stock"]["seconds"]),
            f"**{seconds(row_of(figures, name)['optimized']['seconds'])}**",
            f"**{row_of(figures, name)['ratio']:.1f} ×**",
            versions(figures["runs"][run_of(figures, name) - 1])["transformers"],
        ]
        for name, words in _HEADLINE.items()
        if name in measured(figures)
    ]
    head = ["Llama-3.2-1B shape, 512 prompt tokens", "stock", "hfopt", "", "transformers"]
    yield from table(head, rows, right=(1, 2, 3, 4))


def everything(figures: Figures) -> Iterator[str]:
    """All rows of the benchmark."""
    names = [name for name in ROWS if name in measured(figures)]
    yield from table(
        ["row", "what", "stock", "hfopt", "ratio", "of the limit, stock / hfopt", "run"],
        [[f"`{name}`", *_cells(row_of(figures, name)), f"{run_of(figures, name)}"] for name in names],
        right=(2, 3, 4, 5, 6),
    )


def _cells(row: Figures) -> list[str]:
    stock, ours = row["stock"], row["optimized"]
    shares = " / ".join(f"{each['limit']:.0%}" if "limit" in each else "–" for each in (stock, ours))
    shares = "" if shares == "– / –" else shares
    if "over_one" in ours:
        words = [f"{each['over_one']:.2f} ×" for each in (stock, ours)]
        return [row["title"], *words, "", shares]
    return [
        row["title"],
        seconds(stock["seconds"]),
        seconds(ours["seconds"]),
        f"{row['ratio']:.2f} ×",
        shares,
    ]


def runs(figures: Figures) -> Iterator[str]:
    """Where and how each run was measured."""
    for number, run in enumerate(figures["runs"], 1):
        yield f"{number}. {described(run)}"


def machine(figures: Figures) -> Iterator[str]:
    """The machine of the runs, in a sentence for the README."""
    machines = {
        f"{run['configuration']['cpu']} ({run['configuration']['cpu path']})" for run in figures["runs"]
    }
    cores = figures["runs"][0]["configuration"]["cores"]
    dates = [run["date"] for run in figures["runs"]]
    days = sorted({min(dates), max(dates)})
    yield (
        f"Random weights on {' and '.join(sorted(machines))}, {cores}; stock and hfopt in turn in one process, "
        f"{' to '.join(days)}."
    )


def versions(run: Figures) -> dict[str, str]:
    """Versions of packages by name."""
    words = run["configuration"]["versions"].split()
    return dict(zip(words[::2], words[1::2], strict=True))


def described(run: Figures) -> str:
    """Day, machine, versions and command of a run."""
    machine, known = run["configuration"], versions(run)
    named = ", ".join(f"{name} {known[name]}" for name in _VERSIONS if name in known)
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return (
        f"{run['date']}, {machine['cpu']} ({machine['cpu path']}), {machine['cores']}, {threads}, {named}: "
        f"`{run['command']}`{run.get('note', '')}"
    )


def formats(figures: Figures) -> Iterator[str]:
    """What the formats of weights cost."""
    rows = [
        [
            f"`{each['format']}`",
            each["scales"],
            f"{each['divergence']:.4f}",
            f"{each['perplexity']:+.2%}",
            f"{each['calibrated']['divergence']:.4f}",
            f"{each['calibrated']['perplexity']:+.2%}",
        ]
        for each in figures["accuracy"]["formats"]
    ]
    head = ["format", "scales", "KL to float32", "perplexity", "calibrated: KL", "calibrated: perplexity"]
    yield from table(head, rows, right=(2, 3, 4, 5))


def growth(figures: Figures) -> Iterator[str]:
    """The cost of a step, or of a prompt, as one thing grows; how it was measured."""
    if "growth" not in figures:
        return
    yield f"![A roofline, and the latency of a token against the length of the context]({GROWTH_PLOT.name})"
    yield ""
    rows = [
        [
            line["title"],
            seconds(line["stock"]["seconds"]),
            seconds(line["optimized"]["seconds"]),
            f"{line['ratio']:.2f} ×",
            f"{line['stock']['limit']:.0%} / {line['optimized']['limit']:.0%}",
        ]
        for line in figures["growth"]["growth"]["lines"]
    ]
    head = ["what grows", "stock", "hfopt", "ratio", "of the limit, stock / hfopt"]
    yield from table(head, rows, right=(1, 2, 3, 4))
    yield ""
    yield described(figures["growth"])


PLACES: dict[str, Callable[[Figures], Iterator[str]]] = {
    "headline": headline,
    "rows": everything,
    "runs": runs,
    "machine": machine,
    "formats": formats,
    "growth": growth,
}


def filled(text: str, figures: Figures) -> str:
    """A page with what the figures say in its marked places; an unknown name raises KeyError."""

    def place(match: re.Match[str]) -> str:
        lines = "\n".join(PLACES[match["name"]](figures))
        return f"{match[1]}\n{lines}\n\n{match[3]}"

    return _PLACE.sub(place, text)


def add(figures: Figures, report: Figures, date: str, command: str) -> None:
    """Take over what `bench --json` has written: its rows go out of older runs, and runs without rows go."""
    if "growth" in report:
        figures["growth"] = {key: report[key] for key in ("configuration", "growth")} | {
            "date": date, "command": command
        }  # fmt: skip
        return
    rows = {
        name: {key: row[key] for key in _KEPT if key in row}
        for name, row in report["rows"].items()
        if name in ROWS
    }
    for run in figures["runs"]:
        run["rows"] = {name: row for name, row in run["rows"].items() if name not in rows}
    run = {"date": date, "command": command, "configuration": report["configuration"], "rows": rows}
    figures["runs"] = [*(one for one in figures["runs"] if one["rows"]), run]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a place is not up to date"
    )
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="take over what `scripts/bench.py --json` has written"
    )
    parser.add_argument(
        "--command",
        default="python scripts/bench.py",
        help="with --add: how it was measured (default: %(default)s)",
    )
    parser.add_argument(
        "--date", default=f"{datetime.date.today()}", help="with --add: the day of it (default: today)"
    )
    args = parser.parse_args(arguments)
    figures = json.loads(FIGURES.read_text())
    if args.add is not None:
        add(figures, json.loads(args.add.read_text()), args.date, args.command)
        FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
        _draw(figures)
    stale = []
    for page in PAGES:
        text = page.read_text()
        new = filled(text, figures)
        if new != text:
            stale.append(page)
            if not args.check:
                page.write_text(new)
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'is not what docs/figures.json says' if args.check else 'written'}")
    return 1 if args.check and stale else 0


def _draw(figures: Figures) -> None:
    """The plot of the growth, where it has been measured."""
    if "growth" in figures:
        from hfopt.bench import plot  # here, because only this needs matplotlib

        plot.draw(figures["growth"], f"{GROWTH_PLOT}")


if __name__ == "__main__":
    sys.exit(main())
