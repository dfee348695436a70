"""The exceptions of hfopt.

    HfoptError
    ├── UnsupportedModel            the model, or a part of it that was asked for, cannot be optimised
    ├── UnsupportedDevice           parameters that are not in CPU memory
    ├── InvalidInput (ValueError)   an argument of the caller is outside what is allowed
    ├── CacheFull (MemoryError)     the keys and values of a request do not fit into memory
    ├── CorruptCheckpoint           a checkpoint folder that cannot be read
    ├── ForkedProcess               a kernel was called in a child of `fork`, where its threads do not exist
    ├── KernelError                 a kernel could not be compiled or run on this machine
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
    """A kernel was called in a forked child, where the threads of its pool do not exist."""


class KernelError(HfoptError, RuntimeError):
    """A kernel could not be compiled or run on this machine."""


class HostError(HfoptError, RuntimeError):
    """In the middle of a request, the installed transformers did something that hfopt is not built for."""
