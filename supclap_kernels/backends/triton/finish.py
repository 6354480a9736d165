"""The Triton kernel after the last sweep: what belongs to the rows alone, and the cast.

The products leave dT, dA without k and in the weights' unit; the positives, the motion of the
support vectors and the constraint need only row sums (MATH.md, row terms; `finish_row` of
csrc/cpu/rows.h).
"""

import triton
import triton.language as tl

from .rows import MIN_NORM, load_pair, load_radius, positive_products
from .tile import (
    AUDIO_INVERSE,
    AUDIO_ROWS,
    BASE,
    BIAS,
    GAP,
    MIRROR,
    OFFSET,
    OTHER_ROWS,
    PLAIN,
    RHO_AUDIO,
    RHO_LITERAL,
    RHO_TEXT,
    SHARED,
    STATE_GEOMETRY,
    STATE_L,
    STATE_OTHERS,
    STEP_AUDIO,
    STEP_TEXT,
    SUPPORT_AUDIO,
    SUPPORT_ROWS,
    SUPPORT_TEXT,
    TEXT_INVERSE,
    TEXT_ROWS,
    C,
    logit_bias_2,
    logit_scale_2,
    sigmoid,
)


@triton.jit
def positive_slope(
    state, DIRECTION: tl.constexpr, z, i, inside, N, INFONCE: tl.constexpr
):  # fmt: skip
    """Gradient of the direction with respect to the logit z (base 2) of its positive, p - 1."""
    if INFONCE:
        others = tl.load(state + (STATE_OTHERS + DIRECTION) * N + i, mask=inside, other=0.0)
        l = tl.load(state + (STATE_L + DIRECTION) * N + i, mask=inside, other=1.0)
        return -tl.div_rn(others, l)
    else:
        return -sigmoid(-z)


@triton.jit
def row_sum(sums, WHICH: tl.constexpr, i, inside, N):
    return tl.load(sums + WHICH * N + i, mask=inside, other=0.0)


@triton.jit
def row_terms(
    state, sums, omega, unit, scale, bias, radius, scalars, i, inside, N, alpha, beta,
    PER_ROW_RADIUS: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Coefficients of t, a and e = a - t in dT, and in dA; writes dk, db and dR of each row."""
    k = tl.load(scale).to(tl.float32)
    k2 = logit_scale_2(scale)
    b = logit_bias_2(bias, INFONCE)
    one = tl.load(unit)
    product = one / k2  # of sums of slope times logit: slope times inner product
    w = tl.load(omega + i, mask=inside, other=0.0)
    s, x, y = positive_products(state, i, inside, N, MODE)
    g = positive_slope(state, TEXT_ROWS, k2 * s + b, i, inside, N, INFONCE)
    if INFONCE:
        g += positive_slope(state, AUDIO_ROWS, k2 * s + b, i, inside, N, INFONCE)
    g *= w
    dk = row_sum(sums, BASE, i, inside, N) * product + g * s
    db = row_sum(sums, BIAS, i, inside, N) * one + g
    zero = tl.zeros_like(g)
    c, hinge, dR, along, H, U = zero, zero, zero, zero, zero, zero
    sigma_t, sigma_a, rho = zero, zero, zero
    if radius is not None:
        R = load_radius(radius, i, inside, PER_ROW_RADIUS)
        r = tl.load(state + (STATE_GEOMETRY + GAP) * N + i, mask=inside, other=1.0)
        hinge = tl.where(R > r, beta * w, 0.0)
        dR = hinge - tl.where(R < 0.0, beta * w, 0.0)
    if MODE != PLAIN:
        rows = state + STATE_GEOMETRY * N + i
        c = tl.load(rows + C * N, mask=inside, other=0.0)
        et = tl.load(rows + STEP_TEXT * N, mask=inside, other=0.0)
        ea = tl.load(rows + STEP_AUDIO * N, mask=inside, other=0.0)
        n_t = tl.load(rows + TEXT_INVERSE * N, mask=inside, other=0.0)
        h = positive_slope(state, SUPPORT_ROWS, k2 * x + b, i, inside, N, INFONCE)
        if MODE == SHARED:
            h += positive_slope(state, OTHER_ROWS, k2 * x + b, i, inside, N, INFONCE)
        h *= alpha * w
        # Of a literal row, H and U are in RHO_LITERAL and dT, dA already (literal.py).
        near = tl.load(rows + OFFSET * N, mask=inside, other=0.0) == 0.0
        H = tl.where(near, k * n_t * h, 0.0)
        support = row_sum(sums, SUPPORT_TEXT, i, inside, N) * product + h * x
        rho = k * n_t * row_sum(sums, RHO_TEXT, i, inside, N) * product + H * ea
        if RENORMALIZE:
            sigma_t = tl.where(near, k * n_t * n_t * support, 0.0)
            rho -= sigma_t * (et + c * (ea - et))
        dk += support
        db += h
        if MODE == MIRROR:
            n_a = tl.load(rows + AUDIO_INVERSE * N, mask=inside, other=0.0)
            u = positive_slope(state, OTHER_ROWS, k2 * y + b, i, inside, N, INFONCE)
            u *= alpha * w
            U = tl.where(near, k * n_a * u, 0.0)
            support = row_sum(sums, SUPPORT_AUDIO, i, inside, N) * product + u * y
            rho += k * n_a * row_sum(sums, RHO_AUDIO, i, inside, N) * product - U * et
            if RENORMALIZE:
                sigma_a = tl.where(near, k * n_a * n_a * support, 0.0)
                rho -= sigma_a * (c * (ea - et) - ea)
            dk += support
            db += u
        rho = tl.div_rn(rho + k * one * row_sum(sums, RHO_LITERAL, i, inside, N), r)
    if radius is not None:
        dR += rho
        along = tl.div_rn(c * rho + hinge, r)
    tl.store(scalars + i, dk, mask=inside)
    tl.store(scalars + N + i, db, mask=inside)
    tl.store(scalars + 2 * N + i, dR, mask=inside)
    d = 1.0 - c
    t_t = c * U - d * sigma_t
    t_a = k * g + d * H + U - c * sigma_a
    t_e = c * c * sigma_a - c * U - d * c * sigma_t + along
    a_t = k * g + H + d * U - c * sigma_t
    a_a = c * H - d * sigma_a
    a_e = c * H - c * c * sigma_t + d * c * sigma_a - along
    return t_t, t_a, t_e, a_t, a_a, a_e


@triton.jit
def mixed_rows(
    total, T, A, of_t, of_a, of_e, factor, i, inside, d0, width, BLOCK_D: tl.constexpr
):  # fmt: skip
    """factor total + of_t t + of_a a + of_e e, columns from d0."""
    t, a = load_pair(T, A, i, inside, d0, width, BLOCK_D)
    at = total + i.to(tl.int64)[:, None] * width + (d0 + tl.arange(0, BLOCK_D))[None, :]
    g = factor * tl.load(at, mask=inside[:, None], other=0.0)
    return g + of_t[:, None] * t + of_a[:, None] * a + of_e[:, None] * (a - t)


@triton.jit
def finish_side(
    total, X, stride_n, stride_d, out, T, A, of_t, of_a, of_e, factor, i, inside, D, width,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (N, D) = `mixed_rows`, cast once; NORMALIZE: of the rows X before they were divided by
    their lengths."""
    row = i.to(tl.int64)[:, None]
    if NORMALIZE:
        along = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        square = along
        for d0 in range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)[None, :]
            at = X + row * stride_n + d.to(tl.int64) * stride_d
            x = tl.load(at, mask=inside[:, None] & (d < D), other=0.0).to(tl.float32)
            g = mixed_rows(total, T, A, of_t, of_a, of_e, factor, i, inside, d0, width, BLOCK_D)
            along += g * x
            square += x * x
        length = tl.sqrt_rn(tl.sum(square, 1))
        length = tl.maximum(length, MIN_NORM, propagate_nan=tl.PropagateNan.ALL)
        inward = tl.sum(along, 1) / length / length
    for d0 in range(0, width, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        inner = inside[:, None] & (d < D)
        g = mixed_rows(total, T, A, of_t, of_a, of_e, factor, i, inside, d0, width, BLOCK_D)
        if NORMALIZE:
            at = X + row * stride_n + d.to(tl.int64) * stride_d
            x = tl.load(at, mask=inner, other=0.0).to(tl.float32)
            g = (g - inward[:, None] * x) / length[:, None]
        tl.store(out + row * D + d, g.to(out.dtype.element_ty), mask=inner)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["scale", "bias", "radius", "out_text", "out_audio"],
)
def finish_gradients(
    T, A,  # (N, width) operands
    text, text_n, text_d, audio, audio_n, audio_d,  # the rows as given, and their strides
    state, sums, omega, unit, scale, bias, radius,
    dT, dA,  # (N, width) float32 or None: frozen
    out_text, out_audio,  # (N, D), any float dtype; without NORMALIZE may be dT, dA if width is D
    scalars,  # (3, N) float32: dk, db and dR of each row
    N, D, width, alpha, beta,
    PER_ROW_RADIUS: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
    RENORMALIZE: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows as given, from the sweeps' sums."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i < N
    t_t, t_a, t_e, a_t, a_a, a_e = row_terms(
        state, sums, omega, unit, scale, bias, radius, scalars, i, inside, N, alpha, beta,
        PER_ROW_RADIUS, MODE, INFONCE, RENORMALIZE,
    )  # fmt: skip
    factor = tl.load(scale).to(tl.float32) * tl.load(unit)
    if dT is not None:
        finish_side(
            dT, text, text_n, text_d, out_text, T, A, t_t, t_a, t_e, factor, i, inside, D, width,
            NORMALIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if dA is not None:
        finish_side(
            dA, audio, audio_n, audio_d, out_audio, T, A, a_t, a_a, a_e, factor, i, inside, D,
            width, NORMALIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
