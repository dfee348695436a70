"""Elementary functions of vectors: range reduction and a polynomial, or a rational approximation."""

from hfopt.kernels.jit.compiler import emit_call
from hfopt.kernels.simd.constants import INTEGERS, LOG2_E
from hfopt.kernels.simd.types import F32X, I32X, emit_fence, emit_fma, emit_polynomial, splat_float, splat_int
from hfopt.kernels.simd.vector import elementwise


def emit_exp(builder, x):
    """e^x = 2^n e^r, |r| <= ln(2)/2, e^r by a minimax polynomial; 0 below -87.3, inf above 88.7, NaN kept."""
    shifted = emit_fence(builder, emit_fma(builder, x, splat_float(LOG2_E), splat_float(INTEGERS)))
    n = builder.fsub(shifted, splat_float(INTEGERS))
    r = emit_fma(builder, n, splat_float(-0.693359375), x)
    r = emit_fma(builder, n, splat_float(2.12194440e-4), r)
    p = emit_polynomial(
        builder,
        r,
        [
            1.381459878757596e-3,
            8.368716575205326e-3,
            4.166838899254799e-2,
            1.666652113199234e-1,
            4.999999403953552e-1,
            1.0,
            1.0,
        ],
    )
    # n is added to the exponent, which has room: where n is 128, p is below 1, and where it is -126, not
    exponent = builder.shl(builder.bitcast(shifted, I32X), splat_int(23))
    p = builder.bitcast(builder.add(builder.bitcast(p, I32X), exponent), F32X)
    p = builder.select(builder.fcmp_ordered("<", x, splat_float(-87.33)), splat_float(0.0), p)
    beyond = builder.fmul(x, splat_float(float("inf")))
    return builder.select(builder.fcmp_unordered(">", x, splat_float(88.72)), beyond, p)


def emit_tanh(builder, x):
    """Cephes tanhf: 1 - 2 / (e^2|x| + 1) with the sign of x, and an odd polynomial below 0.625."""
    size = emit_call(builder, "llvm.fabs.v16f32", F32X, [x])
    grown = emit_exp(builder, builder.fmul(size, splat_float(2.0)))
    quotient = builder.fdiv(splat_float(2.0), builder.fadd(grown, splat_float(1.0)))
    far = builder.fsub(splat_float(1.0), quotient)
    far = emit_call(builder, "llvm.copysign.v16f32", F32X, [far, x])
    square = builder.fmul(x, x)
    p = emit_polynomial(
        builder,
        square,
        [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1],
    )
    near = emit_fma(builder, builder.fmul(x, square), p, x)
    return builder.select(builder.fcmp_unordered("<", size, splat_float(0.625)), near, far)


_TANH_NUMERATOR = [1.335465489e-8, 2.060907619e-5, 3.495587681e-3, 0.1338102523, 0.9999999794]
_TANH_DENOMINATOR = [7.776555219e-7, 3.285634144e-4, 2.587698040e-2, 0.4671434082, 1.0]


def emit_quick_tanh(builder, x):
    """x P(x^2) / Q(x^2) on |x| <= 9, fitted for the least relative error, which is 6 ulp; NaN kept."""
    for bound, beyond in ((9.0, ">"), (-9.0, "<")):
        limit = splat_float(bound)
        x = builder.select(builder.fcmp_ordered(beyond, x, limit), limit, x)
    square = builder.fmul(x, x)
    top = builder.fmul(x, emit_polynomial(builder, square, _TANH_NUMERATOR))
    return builder.fdiv(top, emit_polynomial(builder, square, _TANH_DENOMINATOR))


_ERF_NUMERATOR = [
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
]
_ERF_DENOMINATOR = [
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
]


def emit_erf(builder, x):
    """Rational minimax approximation of Eigen (erf for float): x P(x^2) / Q(x^2) on |x| <= 4, NaN kept."""
    bounded = emit_call(builder, "llvm.maxnum.v16f32", F32X, [x, splat_float(-4.0)])
    bounded = emit_call(builder, "llvm.minnum.v16f32", F32X, [bounded, splat_float(4.0)])
    square = builder.fmul(bounded, bounded)
    top = builder.fmul(bounded, emit_polynomial(builder, square, _ERF_NUMERATOR))
    value = builder.fdiv(top, emit_polynomial(builder, square, _ERF_DENOMINATOR))
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


exp = elementwise(emit_exp, "e^x.")
tanh = elementwise(emit_tanh, "Hyperbolic tangent.")
quick_tanh = elementwise(emit_quick_tanh, "The same, less exactly, in half the time.")
erf = elementwise(emit_erf, "Error function.")
