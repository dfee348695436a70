"""`hfopt bench --plot`: the figures of `--growth` as a roofline, and as latency against context length."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfopt.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".svg", ".png")
# who -> label, colour; told apart without colours by the marker of the series and the lightness
_MODELS = {"stock": ("stock transformers", "#9a9a9a"), "optimized": ("hfopt", "#0b6e4f")}
_LIMIT = "#1a1a1a"


def check_target(file: str) -> None:
    """Raises `InvalidInput` if `file` cannot become a plot: an unknown suffix, no folder, no matplotlib."""
    if Path(file).suffix not in _SUFFIXES:
        raise InvalidInput(f"--plot={file} must end in {' or '.join(_SUFFIXES)}")
    if not Path(file).absolute().parent.is_dir():
        raise InvalidInput(f"--plot={file} cannot be written (there is no such folder)")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput(f'--plot={file} needs matplotlib: pip install "hfopt[plots]"')


def figures_from(file: str) -> dict[str, Any]:
    """Read what an earlier `--growth --json` has written; raises `InvalidInput` for any other file."""
    try:
        report = json.loads(Path(file).read_text())
    except OSError as error:
        raise InvalidInput(f"--from={file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InvalidInput(f"--from={file} is not a JSON file ({error})") from error
    if not isinstance(report, dict) or "growth" not in report:
        raise InvalidInput(f"--from={file} has no figures of `bench --growth --json`")
    return report


def draw(report: dict[str, Any], file: str) -> None:
    """Draw `figure_of` into `file`, .svg or .png; raises `InvalidInput` if it cannot be written."""
    try:
        figure_of(report).savefig(file, dpi=150)
    except OSError as error:
        raise InvalidInput(f"--plot={file} cannot be written ({error.strerror})") from error


def figure_of(report: dict[str, Any]) -> "Figure":
    """Both panels, side by side; `report` as `bench --growth --json` writes it."""
    # not pyplot, which would look for a display
    from matplotlib.figure import Figure

    growth, configuration = report["growth"], report["configuration"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    roofline, latency = figure.subplots(1, 2)
    _draw_roofline(roofline, growth)
    _draw_latency(latency, growth)
    figure.suptitle(
        f"{configuration['shape']} ({configuration['layers']} layers), {configuration['dtype']}, "
        f"{configuration['cpu']}, {configuration['threads']} threads",
        fontsize="medium",
    )
    return figure


def _series(growth: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [line for line in growth["lines"] if line["series"] == name]


def _draw_roofline(axes: "Axes", growth: dict[str, Any]) -> None:
    """Operations per byte against operations per second (https://doi.org/10.1145/1498765.1498785)."""
    from matplotlib.ticker import LogLocator

    bandwidth, rate = growth["bandwidth"], growth["rate"]
    intensities = [line["operations"] / line["bytes"] for line in growth["lines"]]
    ridge = rate / bandwidth
    corners = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
    axes.plot(corners, [min(bandwidth * at, rate) / 1e9 for at in corners], color=_LIMIT, linewidth=1)
    axes.annotate(
        f"{rate / 1e9:,.0f} GFLOP/s (multiply-adds)",
        (corners[-1], rate / 1e9),
        (0, 4),
        textcoords="offset points",
        ha="right",
        fontsize="small",
    )
    axes.annotate(
        f"{bandwidth / 1e9:.0f} GB/s\n(streaming reads)",
        (ridge / 2, rate / 2e9),
        (-6, 4),
        textcoords="offset points",
        ha="right",
        fontsize="small",
    )
    for who, (label, color) in _MODELS.items():
        for name, marker, what in (("batch", "o", "decode, batch"), ("prompt", "s", "prefill")):
            lines = _series(growth, name)
            axes.plot(
                [line["operations"] / line["bytes"] for line in lines],
                [line["operations"] / line[who]["seconds"] / 1e9 for line in lines],
                marker=marker,
                markersize=5,
                linewidth=1,
                color=color,
                label=f"{label}: {what} {_span(lines)}",
            )
    axes.set(
        title="Roofline",
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must be read",
        ylabel="GFLOP/s",
    )
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
    axes.legend(fontsize="small", loc="lower right")


def _span(lines: list[dict[str, Any]]) -> str:
    sizes = [f"{line['size']:,}" for line in lines]
    return " – ".join(dict.fromkeys([sizes[0], sizes[-1]])) if sizes else ""


def _draw_latency(axes: "Axes", growth: dict[str, Any]) -> None:
    lines = _series(growth, "context")
    sizes = [line["size"] for line in lines]
    for who, (label, color) in _MODELS.items():
        axes.plot(
            sizes,
            [line[who]["seconds"] * 1e3 for line in lines],
            marker="o",
            markersize=5,
            color=color,
            label=label,
        )
    axes.plot(
        sizes,
        [line["bytes"] / growth["bandwidth"] * 1e3 for line in lines],
        color=_LIMIT,
        linestyle="--",
        linewidth=1,
        label=f"all weights, keys and values at {growth['bandwidth'] / 1e9:.0f} GB/s",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set(title="Decoding a token, batch 1", xlabel="tokens of context", ylabel="ms")
    axes.legend(fontsize="small")
