"""Work on the rows alone, before, between and after the sweeps, as PyTorch's own operations.

The formulas are those of csrc/cpu/rows.h, in float32 and with the maxima m in base 2 (MATH.md, row
terms). O(N D) work goes through blocks of rows, O(N) work takes all rows at once, as (k, N): the k
directions of the softmax that the loss has, or (2, N): the texts' side and the audios'.
Nothing is read back from the device.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...gradients import (
    LITERAL_C,
    LITERAL_GAP,
    LITERAL_LENGTH,
    MIN_LENGTH,
    MIN_NORM,
    normalize_gradient,
)
from ...options import MIRROR, ONE_SIDED, PLAIN, SHARED
from ...reference import EPS
from .. import tile_sizes
from ..device_call import DeviceCall, logit_scale_2
from ..state import (
    AUDIO_INVERSE,
    AUDIO_ROWS,
    BASE,
    BIAS,
    DIRECTIONS,
    GAP,
    HIDDEN,
    OFFSET,
    PANEL_POSITIVE,
    POSITIVE,
    RHO_AUDIO,
    RHO_LITERAL,
    RHO_TEXT,
    SIMILARITY,
    STATE_GEOMETRY,
    STEP_AUDIO,
    STEP_TEXT,
    SUPPORT_AUDIO,
    SUPPORT_ROWS,
    SUPPORT_TEXT,
    TEXT_INVERSE,
    TILE_C,
    C,
)

LN2 = math.log(2.0)
LARGEST_WEIGHT = 2.0**14
"""Of a weight in its unit: float16 ends at 2^16."""


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> of each row."""
    return (x * y).sum(dim=1)


def length(x: Tensor) -> Tensor:
    """|x_i| of each row, float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def gap(ee: Tensor) -> Tensor:
    """r from |a - t|^2."""
    return (ee + EPS**2).sqrt()


def support_geometry(t: Tensor, a: Tensor, R: Tensor, renormalize: bool) -> Tensor:
    """(PANEL_POSITIVE, n): the geometry of some rows (n, width), from differences of the rows
    themselves: nothing cancels."""
    e = a - t
    ee, et = dot(e, e), dot(e, t)
    r = gap(ee)
    c = R / r
    longest = torch.maximum(length(t), length(a))
    literal = (c.abs() > LITERAL_C) | (r < LITERAL_GAP * longest)
    text = audio = torch.ones_like(c)
    if renormalize:
        text = length(torch.addcmul(t, c[:, None], e))
        audio = length(torch.addcmul(a, c[:, None], e, value=-1.0))
        literal |= torch.minimum(text, audio) < LITERAL_LENGTH * longest
        text, audio = (x.clamp_min(MIN_LENGTH).reciprocal() for x in (text, audio))
    geometry = {
        GAP: r,
        C: c,
        TILE_C: c.masked_fill(literal, 0.0),
        OFFSET: torch.zeros_like(c).masked_fill_(literal, HIDDEN),
        TEXT_INVERSE: text,
        AUDIO_INVERSE: audio,
        POSITIVE: dot(t, a),
        STEP_TEXT: et,
        STEP_AUDIO: et + ee,
    }
    return torch.stack([geometry[n] for n in range(PANEL_POSITIVE)])


class RowTerms(NamedTuple):
    """Coefficients (2, N) of the rows themselves in the gradients, of the texts and the audios:
    dT += other a + step (a - t) + own t, and dA with t and a exchanged."""

    other: Tensor
    step: Tensor | None = None
    own: Tensor | None = None


class RowCall(DeviceCall):
    """A call whose work on the rows alone is PyTorch's."""

    @functools.cached_property
    def k(self) -> Tensor:
        return self.inputs.scale.float()

    @functools.cached_property
    def k2(self) -> Tensor:
        return logit_scale_2(self.inputs.scale)

    @functools.cached_property
    def R(self) -> Tensor | None:
        """(N,) float32"""
        radius = self.inputs.radius
        return None if radius is None else radius.float().expand(self.N)

    @property
    def geometry(self) -> Tensor:
        return self.state[STATE_GEOMETRY:]

    @property
    def row_blocks(self) -> list[slice]:
        rows = max(1, tile_sizes.ROW_ELEMENTS // self.width)
        return [slice(start, start + rows) for start in range(0, self.N, rows)]

    def pack_rows(self, X: Tensor, out: Tensor) -> None:
        out[:, self.D :] = 0.0
        if self.options.normalize:  # as F.normalize: small gaps are made of its roundings
            torch.div(X, length(X).clamp_min(MIN_NORM)[:, None], out=out[:, : self.D])
        else:
            out[:, : self.D] = X

    def prepare_state(self) -> None:
        self.running.zero_()
        self.running[: 2 * SIMILARITY : 2] = HIDDEN
        for part in self.row_blocks:
            t, a, rows = self.T[part].float(), self.A[part].float(), self.geometry[:, part]
            if self.mode != PLAIN and self.R is not None:
                renormalize = self.options.renormalize
                rows[:PANEL_POSITIVE] = support_geometry(t, a, self.R[part], renormalize)
                continue
            rows[POSITIVE] = dot(t, a)
            if self.R is not None:
                rows[GAP] = gap((a - t).square_().sum(dim=1))

    @functools.cached_property
    def moved(self) -> Tensor:
        """(2, N): <e, a> and <-e, t>, which the motion of the support vectors adds to <t, a>."""
        return torch.stack((self.geometry[STEP_AUDIO], -self.geometry[STEP_TEXT]))

    @functools.cached_property
    def inverse(self) -> Tensor:
        """(2, N): 1 / length of the support vectors; 0 for literal rows (literal.py)."""
        literal = self.geometry[OFFSET] != 0.0
        return self.geometry[TEXT_INVERSE : AUDIO_INVERSE + 1].masked_fill(literal, 0.0)

    @functools.cached_property
    def positives(self) -> Tensor:
        """(k, N): inner products. <t_i, a_i> twice, <t_sup_i, a_i>, and of OTHER_ROWS that (shared)
        or <a_sup_i, t_i> (mirror)."""
        s = self.geometry[POSITIVE].expand(2, self.N)
        if self.mode == PLAIN:
            return s
        inverse = self.geometry[TEXT_INVERSE : AUDIO_INVERSE + 1]
        x, y = torch.addcmul(s, self.geometry[C], self.moved) * inverse
        support = {ONE_SIDED: (x,), SHARED: (x, x), MIRROR: (x, y)}
        return torch.stack((*s, *support[self.mode]))

    def siglip_logits(self) -> Tensor:
        """(k, N): of the positives, in nats."""
        assert self.bias is not None
        return self.k * self.positives + self.bias.float()

    @property
    def softmax(self) -> Tensor:
        """(3, k, N): m, l and l without the positive, in `state`."""
        rows = self.state[:STATE_GEOMETRY].view(3, DIRECTIONS, self.N)
        return rows[:, : len(self.positives)]

    # After sweep 1.
    def losses(self) -> Tensor:
        """(k, N): of each direction; fills `softmax`."""
        m, l = self.log_sums[:, : len(self.positives)]
        if not self.infonce:
            losses = l - F.logsigmoid(self.siglip_logits())
            losses[AUDIO_ROWS] = 0.0
            return losses
        top, total, others = self.softmax
        z = self.k2 * self.positives
        torch.maximum(m, z, out=top)
        torch.mul(l, (m - top).exp2_(), out=others)
        torch.add(others, (z - top).exp2_(), out=total)
        # log(total / exp2(z - top)): exactly 0 without negatives, and exp2 does not overflow.
        above = top - z
        power = above.clamp_max(100.0)
        losses = (others * power.exp2()).log1p_()
        return losses.add_(above - power, alpha=LN2)

    def finish_rows(self, rows: Tensor, terms: Tensor | None) -> None:
        losses = self.losses()
        loss, support, constraint = losses[:SUPPORT_ROWS].sum(dim=0), None, None
        if self.mode != PLAIN:
            support = losses[SUPPORT_ROWS:].sum(dim=0)
            loss.add_(support, alpha=self.options.alpha)
        if self.R is not None:
            constraint = (self.R - self.geometry[GAP]).clamp_min_(0.0) - self.R.clamp_max(0.0)
            loss.add_(constraint, alpha=self.options.beta)
        if self.inputs.weight is not None:
            loss *= self.inputs.weight
        torch.mul(loss, self.row_scale, out=rows)
        if terms is None:
            return
        beaten = self.log_sums[0, :SUPPORT_ROWS] >= self.geometry[PANEL_POSITIVE]
        for n, values in enumerate((*losses[:SUPPORT_ROWS], support, constraint, *beaten)):
            terms[n] = 0.0 if values is None else values

    # Before sweep 2.
    def weights_unit(self) -> Tensor:
        """The power of 2 that weights are multiples of: float16 weights stay in their range."""
        bound = self.omega.abs().amax() * (2.0 / LARGEST_WEIGHT)
        if self.mode != PLAIN:
            support = (self.geometry[TILE_C].abs() + 0.5) * self.inverse
            bound *= 1.0 + 2.0 * abs(self.options.alpha) * support.amax()
        power = bound.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        return torch.where((bound > 1e-30) & (bound < 1e30), power, 1.0)

    def prepare_factors(self, upstream: Tensor | None) -> None:
        """Also `slopes` (k, N), the gradient with respect to the positives' logits: omega (p - 1),
        times alpha for the support vectors."""
        self.omega.fill_(self.row_scale)
        for weight in (upstream, self.inputs.weight):
            if weight is not None:
                self.omega *= weight
        self.unit.copy_(self.weights_unit())
        used = len(self.positives)
        weights = self.omega.repeat(used, 1)
        weights[SUPPORT_ROWS:] *= self.options.alpha
        if self.infonce:
            top, total, others = self.softmax
            weights /= total
            self.slopes = -others * weights
            self.factors[:used] = top
        else:
            self.slopes = -weights * self.siglip_logits().neg_().sigmoid_()
            self.slopes[AUDIO_ROWS] = 0.0
        torch.div(weights, self.unit, out=self.factors[DIRECTIONS:][:used])

    # After sweep 2.
    @functools.cached_property
    def support_slopes(self) -> Tensor:
        """(2, N): `slopes` of the text support vectors, and of the audio ones (0 but in mirror)."""
        slopes = self.slopes[SUPPORT_ROWS:]
        if self.mode == MIRROR:
            return slopes
        return torch.stack((slopes.sum(dim=0), torch.zeros_like(self.omega)))

    def scalars(self) -> list[Tensor]:
        """dk and db, float64."""
        totals = self.sums.sum(dim=1, dtype=torch.float64) * self.unit
        products = totals[BASE] + totals[SUPPORT_TEXT] + totals[SUPPORT_AUDIO]
        positives = torch.stack((self.slopes * self.positives, self.slopes))
        dk, db = positives.sum(dim=(1, 2), dtype=torch.float64)
        return [dk + products / self.k2, db + totals[BIAS]]

    def row_terms(self) -> tuple[RowTerms, Tensor]:
        """Also dR of each row; 0 without a radius."""
        other = (self.k * self.slopes[:SUPPORT_ROWS].sum(dim=0)).expand(2, self.N)
        if self.R is None:
            return RowTerms(other), torch.zeros_like(self.omega)
        r, weight = self.geometry[GAP], self.options.beta * self.omega
        hinge = weight * (self.R > r)
        dR = hinge - weight * (self.R < 0.0)
        if self.mode == PLAIN:
            return RowTerms(other, (hinge / r).expand(2, self.N)), dR
        c, sums = self.geometry[C], self.sums * (LN2 * self.unit)  # k / k2 = log(2)
        # (2, N): H of the text support vectors, U of the audio ones; flip exchanges them.
        slopes = self.k * self.support_slopes
        H = slopes * self.inverse
        rho = self.inverse * sums[RHO_TEXT : RHO_AUDIO + 1] + H * self.moved
        V = c * H.flip(0)
        own, step = V, -V
        if self.options.renormalize:
            support = slopes * self.positives[SUPPORT_ROWS:]
            support += sums[SUPPORT_TEXT : SUPPORT_AUDIO + 1]
            sigma = self.inverse.square() * support
            rho -= sigma * (c * self.moved.sum(dim=0) - self.moved.flip(0))
            V += c * sigma
            own, step = V - sigma, c.square() * sigma.sum(dim=0) - V
        rho = (rho.sum(dim=0) + self.k2 * sums[RHO_LITERAL]) / r
        step += (c * rho + hinge) / r
        return RowTerms(other + H.sum(dim=0) - V.flip(0), step, own), dR + rho

    def finish_towers(
        self, dT: Tensor | None, dA: Tensor | None, text: Tensor | None, audio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        terms, dR = self.row_terms()
        self.add_row_terms(dT, dA, terms)
        for total, X, out in ((dT, self.inputs.text, text), (dA, self.inputs.audio, audio)):
            if total is not None and out is not None:
                self.finish_tower(total[:, : self.D], X, out)
        return dR, torch.stack((*self.scalars(), dR.sum(dtype=torch.float64)))

    def add_row_terms(self, dT: Tensor | None, dA: Tensor | None, terms: RowTerms) -> None:
        factor = self.k * self.unit
        for part in self.row_blocks:
            t, a = self.T[part].float(), self.A[part].float()
            e = t if terms.step is None else a - t
            for n, (total, own, other) in enumerate(((dT, t, a), (dA, a, t))):
                if total is None:
                    continue
                total = total[part].mul_(factor).addcmul_(other, terms.other[n, part, None])
                if terms.step is not None:
                    total.addcmul_(e, terms.step[n, part, None], value=1.0 - 2.0 * n)
                if terms.own is not None:
                    total.addcmul_(own, terms.own[n, part, None])

    def finish_tower(self, total: Tensor, X: Tensor, out: Tensor) -> None:
        """out (N, D) = total, of the rows X before they were normalised; cast once."""
        if self.options.normalize:
            for part in self.row_blocks:
                out[part] = normalize_gradient(X[part].float(), total[part])
        elif out.data_ptr() != total.data_ptr():
            out.copy_(total)
