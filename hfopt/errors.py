"""The exceptions of hfopt.

    HfoptError
    ├── UnsupportedModel            the model, or a part of it that was asked for, cannot be optimised
    ├── UnsupportedDevice           parameters that are not in CPU memory
    ├── InvalidInput (ValueError)   an argument of the caller is outside what is allowed
    ├── CacheFull (MemoryError)     the keys and values of a request do not fit into memory
    ├── CorruptCheckpoint           a checkpoint folder that cannot be read
    ├── ForkedProcess               a kernel needs threads that do not exist in a child of `fork`
    ├── RankError                   a process of a group has ended, did not come, or called something else
    ├── KernelError                 the kernels cannot be compiled or run on this machine
    └── HostError                   the installed transformers did what hfopt is not built for, in the middle of a request

Messages name the argument, the value that was given and what is allowed.
"""


class HfoptError(Exception):
    """Base class of everything that hfopt raises on purpose."""


class UnsupportedModel(HfoptError):
    """The model, or a part of it that had to be optimised, cannot be."""


class UnsupportedDevice(HfoptError):
    """A parameter lives on another device than the CPU, or has no storage (`meta`)."""


class InvalidInput(HfoptError, ValueError):
    """An argument is outside what is allowed."""


class CacheFull(HfoptError, MemoryError):
    """The keys and values of a request do not fit into the available memory."""


class CorruptCheckpoint(HfoptError):
    """A checkpoint folder is incomplete or damaged."""


class ForkedProcess(HfoptError, RuntimeError):
    """A kernel needed threads that a forked child lacks, and its OpenMP runtime cannot start new ones.

    With one thread kernels run there as well, and the message says what else helps. It takes a libgomp from before GCC 9,
    or a server that forks without telling Python first; otherwise children have threads of their own.
    """


class KernelError(HfoptError, RuntimeError):
    """A kernel could not be compiled or run on this machine.

    All of them are refused, at `optimize` or the first other use, where Numba is another release than those that they are
    written for (the message names both): they reach into its compiler, which changes. `import hfopt` works there, and
    `hfopt doctor` says the same.
    """


class RankError(HfoptError, RuntimeError):
    """A process of a group has ended, did not come, or called something else; or a group cannot be made of these processes.

    The message names ranks. The group cannot be used any more.
    """


class HostError(HfoptError, RuntimeError):
    """In the middle of a request, the installed transformers did something that hfopt is not built for."""
