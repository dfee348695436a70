"""A call of one of several bodies, by its number."""

from collections.abc import Callable, Sequence

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.jit import compiler

UNKNOWN = -1  # what a switch returns for a number that is not one of a body


def switch(bodies: Sequence[Callable | None], needs: Sequence[int | None]):
    """An intrinsic (number, given, arguments) -> int64 that calls a body.

    It returns what bodies[number](*arguments) does, 0 if that is nothing or None stands there, and UNKNOWN for any other
    number. needs: the place in the tuple `given` of what a body needs. Where None stands there, it is not compiled, and its
    number is unknown.
    """

    @intrinsic
    def call_one(typingctx, number, given, arguments):
        argument_types, known = tuple(arguments), {}
        for n, (body, place) in enumerate(zip(bodies, needs, strict=True)):
            if place is not None and given[place] is types.none:
                continue
            if body is None:
                known[n] = None, types.none
            else:
                function = types.Dispatcher(body)
                known[n] = function, compiler.infer_body(typingctx, function, argument_types)

        def codegen(context, builder, sig, args):
            values = compiler.unpack_tuple(builder, args[2], len(argument_types))
            outcome = compiler.alloca_once_value(builder, ir.Constant(compiler.INTP, UNKNOWN))
            done = builder.append_basic_block("done")
            cases = builder.switch(args[0], done)
            for n, (function, returned) in known.items():
                block = builder.append_basic_block(f"case.{n}")
                cases.add_case(ir.Constant(compiler.INTP, n), block)
                builder.position_at_end(block)
                value = ir.Constant(compiler.INTP, 0)
                if function is not None:
                    compiled = compiler.link_body(context, function, argument_types, returned)
                    result = compiler.call_body(context, builder, compiled, argument_types, values)
                    value = value if returned is types.none else result
                builder.store(value, outcome)
                builder.branch(done)
            builder.position_at_end(done)
            return builder.load(outcome)

        return types.int64(types.int64, given, arguments), codegen

    return call_one
