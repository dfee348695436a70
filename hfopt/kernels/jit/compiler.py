"""What the kernels use of the compilers behind Numba, beyond its public names and those of `llvmlite.ir`.

Of Numba, which may change any of it in the next release (`disk_cache` has the rest):

    numba.core.cgutils            alloca_once, alloca_once_value, for_range, gep_inbounds, get_or_insert_function,
                                  unpack_tuple
    numba.core.codegen            JITCodeLibrary: _optimize_final_module, _finalize_final_module, _finalize_dynamic_globals,
                                  _finalized, _ensure_finalized, get_pointer_to_function, codegen (set_env)
    numba.core.compiler           Compiler and the arguments that njit's pipeline_class is called with
    numba.core.event              Listener (on_start, on_end), register, "numba:compile" with the dispatcher in its data
    numba.core.typing.templates   AbstractTemplate (generic), infer_global, signature
    numba.njit                    pipeline_class, no_cpython_wrapper, no_cfunc_wrapper, forceinline
    types.Dispatcher              get_call_type, dispatcher.get_compile_result; of the result library and fndesc
    numba.np.ufunc (compiled)     get_num_threads, numba_parallel_for and its arguments
    target contexts               codegen, add_linking_libs, declare_function, call_conv.call_function, make_array

Of llvmlite:

    llvmlite.ir.types             _BaseFloatType, _create_instance
    llvmlite.binding              add_symbol, get_host_cpu_features, get_host_cpu_name, llvm_version_info

Elsewhere a target context, which the code generator of an intrinsic gets, is only asked for get_dummy_value,
get_value_type and make_tuple.
"""

from collections.abc import Callable

import llvmlite.ir as ir
import numba
from llvmlite.binding import add_symbol, get_host_cpu_features, get_host_cpu_name, llvm_version_info
from llvmlite.ir.types import _BaseFloatType
from numba import types
from numba.core import event
from numba.core.cgutils import (
    alloca_once,
    alloca_once_value,
    for_range,
    gep_inbounds,
    get_or_insert_function,
    unpack_tuple,
)
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin

__all__ = [
    "BFLOAT",
    "BYTES",
    "I32",
    "INTP",
    "NUMBA_THREADS",
    "add_symbol",
    "alloca_once",
    "alloca_once_value",
    "array_data",
    "call_body",
    "define_operator",
    "emit_call",
    "emit_numba_loop",
    "for_range",
    "gep_inbounds",
    "get_host_cpu_features",
    "get_host_cpu_name",
    "infer_body",
    "link_body",
    "linked",
    "llvm_version_info",
    "tell_compilations",
    "unpack_tuple",
]


INTP = ir.IntType(64)
I32 = ir.IntType(32)
BYTES = ir.IntType(8).as_pointer()

# ---- types and operations ---------------------------------------------------------------------------------------------


class _BFloatType(_BaseFloatType):
    """LLVM's `bfloat`, which llvmlite lacks; no constant of it is ever made."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloatType._create_instance()
BFLOAT = _BFloatType()


def define_operator(op, operand, method):
    """Lets kernels write `op` between two values of a type, for a third; a method of the builder emits it."""

    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            if args == (operand, operand):
                return signature(operand, operand, operand)
            return None

    @lower_builtin(op, operand, operand)
    def lower(context, builder, sig, args):
        return getattr(builder, method)(*args)


def emit_call(builder, name, result, args, **flags):
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(get_or_insert_function(builder.module, function_type, name), args, **flags)


def array_data(context, builder, array_type, array):
    """Address of the first element of an array."""
    return context.make_array(array_type)(context, builder, array).data


# ---- functions that are linked into their callers ---------------------------------------------------------------------


class _NoEnvironment:
    """Stands for the code generator where Numba would tell machine code the address of its environment."""

    @staticmethod
    def set_env(name, env):
        pass


class _LinkedLibrary(JITCodeLibrary):
    """Code that is linked into other code and neither optimised nor run by itself."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0

    @property
    def codegen(self):
        return _NoEnvironment


class _BodyCompiler(Compiler):
    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        library = _LinkedLibrary(targetctx.codegen(), "body")
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


def linked(py_func: Callable, *, inline: bool, **options):
    """A function for compiled callers only: it becomes code of each, always inlined or as LLVM sees fit."""
    if inline:
        options["forceinline"] = True
    return numba.njit(
        pipeline_class=_BodyCompiler, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options
    )(py_func)


def infer_body(typingctx, function, argument_types):
    """Infers the types in a function that was handed to an intrinsic, given those of its arguments; returns that of what it
    returns.
    """
    return function.get_call_type(typingctx, argument_types, {}).return_type


def link_body(context, function, argument_types, returned=types.none):
    """Its compiled form, linked into the code that is being made: for `call_body`."""
    compiled = function.dispatcher.get_compile_result(returned(*argument_types))
    context.add_linking_libs([compiled.library])
    return compiled


def call_body(context, builder, compiled, argument_types, values):
    """Emits a call of what `link_body` returned; returns what the body does."""
    function, returned = context.declare_function(builder.module, compiled.fndesc), compiled.fndesc.restype
    _, value = context.call_conv.call_function(builder, function, returned, argument_types, values)
    return value


# ---- the threading layer ----------------------------------------------------------------------------------------------

NUMBA_THREADS = "get_num_threads"  # of the calling Python thread


def emit_numba_loop(builder, name, run, record, n_threads, n):
    """run(record, first, count) for parts of the n indices, on n_threads of Numba's layer, which shares out "arrays"."""
    words = INTP.as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [BYTES.as_pointer(), words, words, BYTES])
    task = ir.Function(builder.module, function_type, name)
    task.linkage = "internal"
    inner = ir.IRBuilder(task.append_basic_block("entry"))
    positions, counts, _, arguments = task.args
    inner.call(run, [arguments, inner.ptrtoint(inner.load(positions), INTP), inner.load(counts)])
    inner.ret_void()

    data = builder.bitcast(alloca_once_value(builder, record), BYTES)
    # the one "array" starts at address 0 and has steps of 1: a share's address is its first index
    position = alloca_once_value(builder, ir.Constant(BYTES, None))
    step = alloca_once_value(builder, ir.Constant(INTP, 1))
    count = alloca_once_value(builder, n)
    task_address, threads = builder.bitcast(task, BYTES), builder.trunc(n_threads, I32)
    nothing, one = ir.Constant(INTP, 0), ir.Constant(INTP, 1)
    arguments = [task_address, position, count, step, data, nothing, one, threads]
    emit_call(builder, "numba_parallel_for", ir.VoidType(), arguments)


# ---- compilations -----------------------------------------------------------------------------------------------------


class _Listener(event.Listener):
    def __init__(self, tell: Callable[[Callable], None]):
        self._tell = tell

    def on_start(self, event):
        self._tell(event.data["dispatcher"].py_func)

    def on_end(self, event):
        pass


def tell_compilations(tell: Callable[[Callable], None]) -> None:
    """From now on, call `tell` with each Python function that Numba begins to compile."""
    event.register("numba:compile", _Listener(tell))
