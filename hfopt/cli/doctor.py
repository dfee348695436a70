"""`hfopt doctor`: what this machine offers, whether the kernels work on it, advice for each problem."""

import argparse
import os
from collections.abc import Iterator, Sequence

from packaging.version import Version

from hfopt import generation, host
from hfopt.bench import roofline
from hfopt.console.output import progress, say, show_table
from hfopt.errors import InvalidInput
from hfopt.machine import env
from hfopt.machine.cores import cores_of_process, fit_threads
from hfopt.words import counted

from . import doctor_ranks
from .ranks import add_tensor_parallel

_OLDEST = {"transformers": host.OLDEST}

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hfopt doctor`."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        dest="together",
        help="where processes that have a model together run, and how long their sums take",
    )
    add_tensor_parallel(parser, "with --distributed: start N processes (default: 2)", default=2)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if the kernels cannot be loaded, or one fails its self-test."""
    if args.together:
        return doctor_ranks.run(args)
    if args.tp is not None:
        raise InvalidInput("--tp needs --distributed")
    obstacle = env.kernel_obstacle()
    if obstacle is not None:
        _show(_machine())
        _give([obstacle, *_advice(env.busy_cores())])
        return 1
    # here, because these load Numba, which no other command needs at once
    from hfopt.functional import choice
    from hfopt.kernels import selftest

    fit_threads()  # as `optimize` does
    busy = env.busy_cores()  # before the tests add their own work
    with progress("Testing the kernels (the first time on a machine they are compiled)"):
        results = selftest.run()
    with progress("Measuring the memory bandwidth and the thread pool"):
        bandwidth = roofline.BandwidthMeter().measure()
        pool = roofline.launch_cost()
    _show([*_machine(), *_kernels(bandwidth, *pool)])
    show_table(
        ["kernel", "result", "detail"],
        [[name, "ok" if passed else "FAILED", detail] for name, passed, detail in results],
    )
    say("")
    show_table(
        [f'kernels="auto" with {counted(env.threads(), "thread")}', "takes", "torch's time / hfopt's"],
        [[each.label, *each.outcome] for each in choice.choices()],
    )
    with progress("Holding the loops of generate against transformers' own"):
        refused = generation.prove()
    say("")
    show_table(
        [f"generate of transformers {host.installed()}", "runs in", "what differed"],
        [
            [mode, "transformers' loop" if mode in refused else "hfopt's loop", refused.get(mode, "")]
            for mode in generation.MODES
        ],
    )
    advice = [*_advice(busy), *_kernel_advice()]
    if refused:
        advice.append(
            f"{generation.in_words(refused)} Tokens are right, and slower: a newer hfopt may know this release."
        )
    failed = [name for name, passed, _ in results if not passed]
    if failed:
        advice.append(
            f"These kernels fail here: {', '.join(failed)}. Delete the cache folder and try again; "
            "NUMBA_CPU_NAME=generic compiles portable ones."
        )
    say("")
    _give(advice)
    return 1 if failed else 0


def _give(advice: Sequence[str]) -> None:
    for line in advice or ["No problem found."]:
        say(f"- {line}")


def _machine() -> list[list[str]]:
    """Facts that are known without the kernels."""
    cores = cores_of_process()
    return [
        ["CPU", env.cpu_model()],
        ["Cores", str(cores)],
        ["Threads", str(env.threads())],
        ["OpenMP runtimes", "\n".join(env.openmp_copies()) or "none"],
        ["Versions", ", ".join(f"{name} {version}" for name, version in env.versions().items())],
    ]


def _kernels(bandwidth: float, launch: float, rested_launch: float) -> list[list[str]]:
    folder, state = env.cache_folder()
    return [
        ["Kernels for", env.target_cpu()],
        ["CPU path", env.cpu_path()],
        ["Features", _known_features()],
        ["Threading layer", env.threading_layer()],
        [
            "Thread pool",
            f"an empty launch takes {launch * 1e6:.1f} µs, after a rest {rested_launch * 1e6:.0f} µs; {_waiting()}",
        ],
        ["Kernel cache", f"{folder or 'none'}: {state}"],
        ["Memory bandwidth", f"{bandwidth / 1e9:.1f} GB/s"],
    ]


def _show(rows: list[list[str]]) -> None:
    for name, value in rows:
        say(f"{name:<18}" + value.replace("\n", "\n" + " " * 18))
    say("")


def _waiting() -> str:
    """Say what the threads do between two launches."""
    settings = [f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ]
    if settings:
        return f"idle threads wait as {', '.join(settings)} says"
    return f"idle threads spin for a while, then sleep (the default: {' and '.join(_WAITING)} are not set)"


def _known_features() -> str:
    """The features that kernels or the reader of a report may ask about, of the compilation target."""
    wanted = ("avx2", "fma", "f16c", "avx512", "amx", "neon", "sve", "bf16", "dotprod", "i8mm")
    return " ".join(sorted(name for name in env.features() if name.startswith(wanted))) or "none"


def _advice(busy: float) -> Iterator[str]:
    cores, threads = cores_of_process(), env.threads()
    if threads > cores.usable:
        yield f"{threads} threads, {cores}: set OMP_NUM_THREADS={cores.usable}."
    elif threads < cores.usable:
        yield f"Only {threads} of {cores.usable} usable cores are used: set OMP_NUM_THREADS={cores.usable}."
    if busy > 0.5 * cores.usable:
        yield (
            f"Other work keeps {busy:.1f} cores busy, and spinning threads then cost much: "
            "stop it, or set OMP_WAIT_POLICY=PASSIVE."
        )
    if len(env.openmp_copies()) > 1 and "OMP_WAIT_POLICY" not in os.environ and threads > 1:
        yield (
            "torch and numba have an OpenMP runtime each; that is usual and harmless on quiet machines. "
            "If steps take unevenly long, set OMP_WAIT_POLICY=PASSIVE."
        )
    for package, oldest in _OLDEST.items():
        version = env.versions()[package]
        if version != "not installed" and Version(version) < Version(oldest):
            yield f"{package} {version} is older than {oldest}, the oldest that works: upgrade it."


def _kernel_advice() -> Iterator[str]:
    if env.threading_layer() == "workqueue":
        yield "Numba found no OpenMP, and its own thread pool is slow: install libgomp (with gcc), or tbb."
    folder, state = env.cache_folder()
    if folder is None:
        yield f"Every process compiles all kernels ({state}): set HFOPT_CACHE_DIR to a folder of your own."
    if env.cpu_path() == "portable":
        yield "No AVX2 or AVX-512: kernels run in their portable form, which may be no faster than torch."
