"""Triton kernels of O(N D) work: the rows' geometry before the sweeps, the loss after the first.

`state` (22, N) float32 is what csrc/params.h calls CpuProblem::state and rows, with the
maxima m in base 2. One program owns BLOCK_N rows; embeddings come as operands (`pack_rows`).
"""

import triton
import triton.language as tl

from ... import gradients, reference
from .tile import (
    AUDIO_INVERSE,
    AUDIO_ROWS,
    GAP,
    HIDDEN,
    LOG2E,
    MIRROR,
    OFFSET,
    OTHER_ROWS,
    PANEL_POSITIVE,
    PLAIN,
    POSITIVE,
    SHARED,
    SIMILARITY,
    STATE_GEOMETRY,
    STATE_L,
    STATE_OTHERS,
    STEP_AUDIO,
    STEP_TEXT,
    SUPPORT_ROWS,
    TEXT_INVERSE,
    TEXT_ROWS,
    TILE_C,
    C,
    logit_bias_2,
    logit_scale_2,
    softplus,
)

EPS = tl.constexpr(reference.EPS)
LITERAL_C, LITERAL_GAP = tl.constexpr(gradients.LITERAL_C), tl.constexpr(gradients.LITERAL_GAP)
LITERAL_LENGTH = tl.constexpr(gradients.LITERAL_LENGTH)
MIN_LENGTH, MIN_NORM = tl.constexpr(gradients.MIN_LENGTH), tl.constexpr(gradients.MIN_NORM)
LARGEST_WEIGHT = tl.constexpr(2.0**14)
"""Of a weight in its unit: float16 ends at 2^16."""


@triton.jit(do_not_specialize=["N"])
def pack_rows(
    X, stride_n, stride_d,
    length,  # (N,) float32 or None: what each row is divided by
    out, N, D, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (N, width): the rows X (N, D), of any strides, contiguous and zero beyond D."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i[:, None] < N
    row = i.to(tl.int64)[:, None]
    if length is not None:
        of = tl.load(length + i, mask=i < N, other=1.0)
        of = tl.maximum(of, MIN_NORM, propagate_nan=tl.PropagateNan.ALL)
    for d0 in range(0, width, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        x = tl.load(X + row * stride_n + d * stride_d, mask=inside & (d < D), other=0.0)
        if length is not None:  # as F.normalize: where gaps are small, its roundings are the row
            x = tl.div_rn(x.to(tl.float32), of[:, None])
        tl.store(out + row * width + d, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_pair(T, A, i, inside, d0, width, BLOCK_D: tl.constexpr):
    """t and a (BLOCK_N, BLOCK_D) of the rows i, columns from d0, float32."""
    at = i.to(tl.int64)[:, None] * width + (d0 + tl.arange(0, BLOCK_D))[None, :]
    t = tl.load(T + at, mask=inside[:, None], other=0.0).to(tl.float32)
    return t, tl.load(A + at, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_radius(radius, i, inside, PER_ROW: tl.constexpr):
    if PER_ROW:
        return tl.load(radius + i, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(radius).to(tl.float32) + tl.zeros_like(i).to(tl.float32)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["radius"])
def prepare_rows(
    T, A, radius,  # (N, width), (N,) or () or None
    state, running,  # (22, N), and (10, N) of `merge_statistics`: started
    N, width,
    PER_ROW_RADIUS: tl.constexpr, MODE: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Geometry of the rows, from differences of the rows themselves: nothing cancels."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i < N
    for direction in tl.static_range(SIMILARITY + 1):
        start = 0.0 if direction == SIMILARITY else HIDDEN
        tl.store(running + 2 * direction * N + i, start + tl.zeros_like(i), mask=inside)
        tl.store(running + (2 * direction + 1) * N + i, tl.zeros_like(i), mask=inside)
    rows = state + STATE_GEOMETRY * N + i
    ta = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    ee, et, ea, tt, aa = ta, ta, ta, ta, ta
    for d0 in range(0, width, BLOCK_D):
        t, a = load_pair(T, A, i, inside, d0, width, BLOCK_D)
        e = a - t
        ta += t * a
        ee += e * e
        et += e * t
        ea += e * a
        tt += t * t
        aa += a * a
    tl.store(rows + POSITIVE * N, tl.sum(ta, 1), mask=inside)
    if radius is not None:
        # Exact to rounding: an error of c is one of everything a literal row gives.
        r = tl.sqrt_rn(tl.sum(ee, 1) + EPS * EPS)
        c = tl.div_rn(load_radius(radius, i, inside, PER_ROW_RADIUS), r)
        length = tl.sqrt(tl.maximum(tl.sum(tt, 1), tl.sum(aa, 1)))
        literal = (tl.abs(c) > LITERAL_C) | (r < length * LITERAL_GAP)
        inverse_t = tl.full([BLOCK_N], 1.0, tl.float32)
        inverse_a = inverse_t
        if RENORMALIZE:
            tt, aa = tl.zeros_like(tt), tl.zeros_like(aa)
            for d0 in range(0, width, BLOCK_D):
                t, a = load_pair(T, A, i, inside, d0, width, BLOCK_D)
                step = c[:, None] * (a - t)
                tt += (t + step) * (t + step)
                aa += (a - step) * (a - step)
            length_t, length_a = tl.sqrt_rn(tl.sum(tt, 1)), tl.sqrt_rn(tl.sum(aa, 1))
            literal = literal | (tl.minimum(length_t, length_a) < length * LITERAL_LENGTH)
            inverse_t = tl.div_rn(1.0, tl.maximum(length_t, MIN_LENGTH))
            inverse_a = tl.div_rn(1.0, tl.maximum(length_a, MIN_LENGTH))
        tl.store(rows + GAP * N, r, mask=inside)
        tl.store(rows + C * N, c, mask=inside)
        tl.store(rows + STEP_TEXT * N, tl.sum(et, 1), mask=inside)
        tl.store(rows + STEP_AUDIO * N, tl.sum(ea, 1), mask=inside)
        if MODE != PLAIN:
            tl.store(rows + TILE_C * N, tl.where(literal, 0.0, c), mask=inside)
            tl.store(rows + OFFSET * N, tl.where(literal, HIDDEN, 0.0), mask=inside)
            tl.store(rows + TEXT_INVERSE * N, inverse_t, mask=inside)
            tl.store(rows + AUDIO_INVERSE * N, inverse_a, mask=inside)


@triton.jit
def positive_products(state, i, inside, N, MODE: tl.constexpr):
    """<t_i, a_i>, <t_sup_i, a_i> and <a_sup_i, t_i>; 0 where the mode has none."""
    rows = state + STATE_GEOMETRY * N + i
    s = tl.load(rows + POSITIVE * N, mask=inside, other=0.0)
    x, y = tl.zeros_like(s), tl.zeros_like(s)
    if MODE != PLAIN:
        c = tl.load(rows + C * N, mask=inside, other=0.0)
        inverse = tl.load(rows + TEXT_INVERSE * N, mask=inside, other=0.0)
        x = (s + c * tl.load(rows + STEP_AUDIO * N, mask=inside, other=0.0)) * inverse
        inverse = tl.load(rows + AUDIO_INVERSE * N, mask=inside, other=0.0)
        y = (s - c * tl.load(rows + STEP_TEXT * N, mask=inside, other=0.0)) * inverse
    return s, x, y


@triton.jit
def finish_direction(
    running, state, DIRECTION: tl.constexpr, z, i, inside, N, INFONCE: tl.constexpr
):  # fmt: skip
    """The direction's loss of each row with positive logit z (base 2); fills `state`."""
    m = tl.load(running + 2 * DIRECTION * N + i, mask=inside, other=0.0)
    l = tl.load(running + (2 * DIRECTION + 1) * N + i, mask=inside, other=0.0)
    if INFONCE:
        top = tl.maximum(m, z)
        others = l * tl.exp2(m - top)
        total = others + tl.exp2(z - top)
        # log(total / exp(z - top)): exactly 0 without negatives, if exp2 does not overflow.
        y = others * tl.exp2(tl.minimum(top - z, 100.0, propagate_nan=tl.PropagateNan.ALL))
        loss = tl.where(top - z > 100.0, (tl.log2(total) + (top - z)) / LOG2E, tl.log(1.0 + y))
        tl.store(state + DIRECTION * N + i, top, mask=inside)
        tl.store(state + (STATE_L + DIRECTION) * N + i, total, mask=inside)
        tl.store(state + (STATE_OTHERS + DIRECTION) * N + i, others, mask=inside)
    else:
        loss = l + softplus(-z)
    return loss


@triton.jit(
    do_not_specialize=["N"], do_not_specialize_on_alignment=["scale", "bias", "radius", "weight"]
)
def finish_statistics(
    running, state,
    scale, bias, radius, weight,
    out,  # (N,) float32: the rows' losses times row_scale
    terms,  # (6, N) float32 or None: l_t2a, l_a2t, l_svr, l_cons, and whether the positive is
            # beaten among the audios and among the texts
    N, row_scale, alpha, beta,
    PER_ROW_RADIUS: tl.constexpr, MODE: tl.constexpr, INFONCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The positives join the log-sum-exps of the negatives."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i < N
    k2 = logit_scale_2(scale)
    b = logit_bias_2(bias, INFONCE)
    s, x, y = positive_products(state, i, inside, N, MODE)
    s, x, y = k2 * s + b, k2 * x + b, k2 * y + b
    text = finish_direction(running, state, TEXT_ROWS, s, i, inside, N, INFONCE)
    audio, support, constraint = tl.zeros_like(text), tl.zeros_like(text), tl.zeros_like(text)
    if INFONCE:
        audio = finish_direction(running, state, AUDIO_ROWS, s, i, inside, N, INFONCE)
    if MODE != PLAIN:
        support = finish_direction(running, state, SUPPORT_ROWS, x, i, inside, N, INFONCE)
    if MODE == SHARED:
        support += finish_direction(running, state, OTHER_ROWS, x, i, inside, N, INFONCE)
    if MODE == MIRROR:
        support += finish_direction(running, state, OTHER_ROWS, y, i, inside, N, INFONCE)
    if radius is not None:
        R = load_radius(radius, i, inside, PER_ROW_RADIUS)
        r = tl.load(state + (STATE_GEOMETRY + GAP) * N + i, mask=inside, other=0.0)
        constraint = tl.where(R > r, R - r, 0.0) + tl.where(R < 0.0, -R, 0.0)
        constraint = tl.where(R == R, constraint, R)
    loss = text + audio + beta * constraint
    if MODE != PLAIN:
        loss += alpha * support
    if weight is not None:
        loss *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, loss * row_scale, mask=inside)
    if terms is not None:
        tl.store(terms + i, text, mask=inside)
        tl.store(terms + N + i, audio, mask=inside)
        tl.store(terms + 2 * N + i, support, mask=inside)
        tl.store(terms + 3 * N + i, constraint, mask=inside)
        own = tl.load(state + (STATE_GEOMETRY + PANEL_POSITIVE) * N + i, mask=inside, other=0.0)
        m_text = tl.load(running + 2 * TEXT_ROWS * N + i, mask=inside, other=0.0)
        m_audio = tl.load(running + 2 * AUDIO_ROWS * N + i, mask=inside, other=0.0)
        tl.store(terms + 4 * N + i, (m_text >= own).to(tl.float32), mask=inside)
        tl.store(terms + 5 * N + i, (m_audio >= own).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["upstream", "weight"])
def row_weights(
    upstream, weight,  # (N,) or () or None, (N,) or None
    state,
    omega,  # (N,) float32: weight of the row's loss in the final scalar
    bounds,  # (2, blocks) float32: largest |omega|, and largest weight for an omega of 1
    N, row_scale, alpha,
    PER_ROW: tl.constexpr, MODE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """omega, and what bounds the gradient's weights."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i < N
    w = row_scale + tl.zeros([BLOCK_N], tl.float32)
    if upstream is not None:
        if PER_ROW:
            w *= tl.load(upstream + i, mask=inside, other=0.0).to(tl.float32)
        else:
            w *= tl.load(upstream).to(tl.float32)
    if weight is not None:
        w *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(omega + i, w, mask=inside)
    gain = tl.full([BLOCK_N], 2.0, tl.float32)
    if MODE != PLAIN:
        rows = state + STATE_GEOMETRY * N + i
        c = tl.load(rows + TILE_C * N, mask=inside, other=0.0)
        inverse_t = tl.load(rows + TEXT_INVERSE * N, mask=inside, other=0.0)
        inverse_a = tl.load(rows + AUDIO_INVERSE * N, mask=inside, other=0.0)
        inverse = tl.maximum(inverse_t, inverse_a)
        near = tl.load(rows + OFFSET * N, mask=inside, other=0.0) == 0.0
        gain += tl.where(near, 2.0 * tl.abs(alpha) * (1.0 + 2.0 * tl.abs(c)) * inverse, 0.0)
    at = bounds + tl.program_id(0)
    tl.store(at, tl.max(tl.where(inside, tl.abs(w), 0.0), 0))
    tl.store(at + tl.num_programs(0), tl.max(gain, 0))


@triton.jit(do_not_specialize=["N", "blocks"])
def row_factors(
    state, omega, bounds,
    factors,  # (8, N) float32: m, then omega / (l unit), times alpha for the support vectors
    unit,  # () float32, a power of 2: what the stored weights are multiples of
    N, blocks, alpha,
    MODE: tl.constexpr, INFONCE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What turns a logit into its weight. The unit keeps float16 weights inside their range."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i < N
    largest, gain = 0.0, 0.0
    for n in range(0, blocks):
        largest = tl.maximum(largest, tl.load(bounds + n))
        gain = tl.maximum(gain, tl.load(bounds + blocks + n))
    bound = largest * gain / LARGEST_WEIGHT
    power = (bound.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    one = tl.where((bound > 1e-30) & (bound < 1e30), power, 1.0)
    tl.store(unit, one)
    w = tl.load(omega + i, mask=inside, other=0.0) / one
    for direction in tl.static_range(SIMILARITY):
        used = MODE != PLAIN if direction == SUPPORT_ROWS else True
        used = MODE == SHARED or MODE == MIRROR if direction == OTHER_ROWS else used
        if used:
            f = alpha * w if direction >= SUPPORT_ROWS else w
            if INFONCE:
                m = tl.load(state + direction * N + i, mask=inside, other=0.0)
                f /= tl.load(state + (STATE_L + direction) * N + i, mask=inside, other=1.0)
                tl.store(factors + direction * N + i, m, mask=inside)
            tl.store(factors + (SIMILARITY + direction) * N + i, f, mask=inside)
