"""Processes that run a command together: started here, or by torchrun."""

import argparse
import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from hfopt.console.arguments import positive
from hfopt.console.output import silence
from hfopt.errors import HfoptError, InvalidInput, RankError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Ctrl-C ends them at once and without a word, while they import too
_RANK = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); from hfopt.cli import main; sys.exit(main())"
_FAILED, _WRONG = 1, 2  # exit codes


def add_tensor_parallel(parser: argparse.ArgumentParser, what: str, default: int = 1) -> None:
    """The flag --tp; where `together` is set, the command may run in ranks, as many as `default` unless the flag says it."""
    parser.add_argument("--tp", type=positive, metavar="N", help=what)
    parser.set_defaults(n_ranks=default)


def n_ranks() -> int:
    """Of torchrun's processes, of which this is one; 1 if it is none."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if "RANK" in os.environ and size.isdigit() else 1


def start(n: int, arguments: Sequence[str]) -> int:
    """Let n processes run the same command line; the exit code of the one that failed first, whose message is printed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # what has happened is said below
    with tempfile.TemporaryDirectory(prefix="hfopt-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-c", _RANK, *arguments)
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            return _tell(error.failures)
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _tell(failures: "dict[int, ProcessFailure]") -> int:
    """Print why a command has failed; its exit code."""
    said = {rank: _message(each) for rank, each in failures.items()}
    # those who say that another one is gone, and those who were ended because of it, are not the cause
    causes = [rank for rank in said if not said[rank].startswith((RankError.__name__, signal.SIGTERM.name))]
    rank = min(causes or said)
    sys.stderr.write(f"hfopt: rank {rank}: {said[rank].partition(': ')[2]}\n")
    code = failures[rank].exitcode
    return code if code > 0 else _FAILED


def _message(failure: "ProcessFailure") -> str:
    """What a process has said at its end, behind the kind of it."""
    if isinstance(failure.message, dict):
        return str(failure.message["message"])
    if failure.exitcode < 0:
        return f"{failure.signal_name()}: it has been ended by {failure.signal_name()}"
    return f"exit: it has ended with {failure.exitcode}"


def run_as_rank(function: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command in one of several processes, of which the first one alone prints; the exit code.

    What goes wrong is told to torchrun, which says it once.
    """
    if os.environ["RANK"] != "0":
        silence()
    try:
        if args.tp not in (None, n_ranks()):
            raise InvalidInput(f"--tp {args.tp}: torchrun has started {n_ranks()} processes")
        code = function(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 (told, and raised nowhere else)
        code = _WRONG if isinstance(error, HfoptError) else _FAILED
        _record(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo may wait for a rank that is gone


def _record(error: Exception) -> None:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if not isinstance(error, HfoptError):
        traceback.print_exception(error)
    elif "TORCHELASTIC_ERROR_FILE" not in os.environ:
        sys.stderr.write(f"hfopt: rank {os.environ['RANK']}: {error}\n")
    get_error_handler().record_exception(error)
