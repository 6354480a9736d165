"""Work on the rows alone, before, between and after the sweeps, as PyTorch's own operations.

The formulas are those of csrc/cpu/rows.h, in float32 and with the maxima m in base 2 (MATH.md, row
terms). O(N D) work goes through blocks of rows, O(N) work takes all rows at once, as (k, N): the k
directions of the softmax that the loss has, or the text support vectors and the audio ones.
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
    STATE_L,
    STATE_OTHERS,
    STEP_AUDIO,
    STEP_TEXT,
    SUPPORT_AUDIO,
    SUPPORT_ROWS,
    SUPPORT_TEXT,
    TEXT_INVERSE,
    TEXT_ROWS,
    TILE_C,
    C,
)

LARGEST_WEIGHT = 2.0**14
"""Of a weight in its unit: float16 ends at 2^16."""


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> of each row."""
    return (x * y).sum(dim=1)


def length(x: Tensor) -> Tensor:
    """|x_i| of each row, float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def geometry_of(
    t: Tensor, a: Tensor, R: Tensor | None, support: bool, renormalize: bool
) -> dict[int, Tensor | float]:
    """The geometry of some rows (n, width), from differences of the rows themselves: nothing
    cancels. `support`: with that of the support vectors."""
    geometry: dict[int, Tensor | float] = {POSITIVE: dot(t, a)}
    if R is None:
        return geometry
    e = a - t
    r = (dot(e, e) + EPS**2).sqrt()
    geometry[GAP] = r
    if not support:
        return geometry
    c = R / r
    longest = torch.maximum(length(t), length(a))
    literal = (c.abs() > LITERAL_C) | (r < LITERAL_GAP * longest)
    geometry |= {C: c, STEP_TEXT: dot(e, t), STEP_AUDIO: dot(e, a)}
    geometry |= {TEXT_INVERSE: 1.0, AUDIO_INVERSE: 1.0}
    if renormalize:
        text = length(torch.addcmul(t, c[:, None], e))
        audio = length(torch.addcmul(a, c[:, None], e, value=-1.0))
        literal |= torch.minimum(text, audio) < LITERAL_LENGTH * longest
        geometry[TEXT_INVERSE] = text.clamp_min(MIN_LENGTH).reciprocal()
        geometry[AUDIO_INVERSE] = audio.clamp_min(MIN_LENGTH).reciprocal()
    geometry[TILE_C] = c.masked_fill(literal, 0.0)
    geometry[OFFSET] = torch.zeros_like(c).masked_fill(literal, HIDDEN)
    return geometry


class RowTerms(NamedTuple):
    """What belongs to the rows alone in the gradients; (2, N) are of the texts, and of the audios.

    dT += other a + step (a - t) + own t, and dA with t and a exchanged (but for a - t).
    """

    scalars: list[Tensor]
    """dk, db and (with a radius) dR of each row"""
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
        if (
            self.options.normalize
        ):  # as F.normalize: where gaps are small, its roundings are the row
            torch.div(X, length(X).clamp_min(MIN_NORM)[:, None], out=out[:, : self.D])
        else:
            out[:, : self.D] = X

    def prepare_state(self) -> None:
        self.running.zero_()
        self.running[: 2 * SIMILARITY : 2] = HIDDEN
        support, renormalize = self.mode != PLAIN, self.options.renormalize
        for part in self.row_blocks:
            t, a = self.T[part].float(), self.A[part].float()
            R = None if self.R is None else self.R[part]
            for name, values in geometry_of(t, a, R, support, renormalize).items():
                self.geometry[name, part] = values

    # The positives.
    @functools.cached_property
    def positives(self) -> Tensor:
        """(k, N): <t_i, a_i> twice, <t_sup_i, a_i>, and of OTHER_ROWS that or <a_sup_i, t_i>."""
        rows = self.geometry
        s = rows[POSITIVE]
        if self.mode == PLAIN:
            return s.expand(2, self.N)
        x = (s + rows[C] * rows[STEP_AUDIO]) * rows[TEXT_INVERSE]
        if self.mode == ONE_SIDED:
            return torch.stack((s, s, x))
        if self.mode == SHARED:
            return torch.stack((s, s, x, x))
        y = (s - rows[C] * rows[STEP_TEXT]) * rows[AUDIO_INVERSE]
        return torch.stack((s, s, x, y))

    def siglip_logits(self) -> Tensor:
        """(k, N), in nats."""
        assert self.bias is not None
        return self.k * self.positives + self.bias.float()

    def positive_slopes(self) -> Tensor:
        """(k, N): gradient with respect to the positives' logits, omega (p - 1), times alpha for
        support vectors."""
        used = len(self.positives)
        if self.infonce:
            slopes = self.state[STATE_OTHERS:][:used] / self.state[STATE_L:][:used]
        else:
            slopes = self.siglip_logits().neg_().sigmoid_()
            slopes[AUDIO_ROWS] = 0.0
        slopes *= -self.omega
        slopes[SUPPORT_ROWS:] *= self.options.alpha
        return slopes

    # After sweep 1.
    def losses(self) -> Tensor:
        """(k, N): the loss of each direction; fills `state`."""
        used = len(self.positives)
        m, l = self.log_sums[:, :used]
        if not self.infonce:
            losses = l - F.logsigmoid(self.siglip_logits())
            losses[AUDIO_ROWS] = 0.0
            return losses
        z = self.k2 * self.positives
        top = torch.maximum(m, z)
        others = l * (m - top).exp2_()
        total = others + (z - top).exp2_()
        self.state[:used] = top
        self.state[STATE_L:][:used] = total
        self.state[STATE_OTHERS:][:used] = others
        # log(total / exp2(z - top)): exactly 0 without negatives, if exp2 does not overflow.
        above = top - z
        large = (total.log2_() + above) * math.log(2.0)
        near = others.mul_(above.clamp_max(100.0).exp2_()).log1p_()
        return torch.where(above > 100.0, large, near)

    def finish_rows(self, rows: Tensor, terms: Tensor | None) -> None:
        losses = self.losses()
        text, audio = losses[TEXT_ROWS], losses[AUDIO_ROWS]
        loss, support, constraint = text + audio, None, None
        if self.mode != PLAIN:
            support = losses[SUPPORT_ROWS:].sum(dim=0)
            loss.add_(support, alpha=self.options.alpha)
        if self.R is not None:
            constraint = F.relu(self.R - self.geometry[GAP]) + F.relu(-self.R)
            loss.add_(constraint, alpha=self.options.beta)
        if self.inputs.weight is not None:
            loss *= self.inputs.weight
        torch.mul(loss, self.row_scale, out=rows)
        if terms is None:
            return
        beaten = self.log_sums[0, : AUDIO_ROWS + 1] >= self.geometry[PANEL_POSITIVE]
        for n, values in enumerate((text, audio, support, constraint, *beaten)):
            terms[n] = 0.0 if values is None else values

    # Before sweep 2.
    def weights_unit(self) -> Tensor:
        """The power of 2 that weights are multiples of: float16 weights stay in their range."""
        bound = 2.0 / LARGEST_WEIGHT * self.omega.abs().amax()
        if self.mode != PLAIN:  # support vectors add to the weights for an omega of 1
            rows = self.geometry
            inverse = torch.maximum(rows[TEXT_INVERSE], rows[AUDIO_INVERSE])
            support = (1.0 + 2.0 * rows[TILE_C].abs()) * inverse
            literal = rows[OFFSET] != 0.0
            bound *= 1.0 + abs(self.options.alpha) * support.masked_fill(literal, 0.0).amax()
        power = bound.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        return torch.where((bound > 1e-30) & (bound < 1e30), power, 1.0)

    def prepare_factors(self, upstream: Tensor | None) -> None:
        self.omega.fill_(self.row_scale)
        for weight in (upstream, self.inputs.weight):
            if weight is not None:
                self.omega *= weight
        self.unit.copy_(self.weights_unit())
        used = len(self.positives)
        factors = self.factors[DIRECTIONS:][:used]
        factors[:] = self.omega / self.unit
        factors[SUPPORT_ROWS:] *= self.options.alpha
        if self.infonce:
            factors /= self.state[STATE_L:][:used]
            self.factors[:used] = self.state[:used]
        self.slopes = self.positive_slopes()

    # After sweep 2.
    def row_terms(self) -> RowTerms:
        sums, k, unit = self.sums, self.k, self.unit
        per_product = unit / self.k2
        g = self.slopes[TEXT_ROWS] + self.slopes[AUDIO_ROWS]
        dk = sums[BASE] * per_product + g * self.positives[TEXT_ROWS]
        db = sums[BIAS] * unit + g
        other = (k * g).expand(2, self.N)
        if self.R is None:
            return RowTerms([dk, db], other)
        rows, weight = self.geometry, self.options.beta * self.omega
        r = rows[GAP]
        hinge = torch.where(self.R > r, weight, 0.0)
        dR = hinge - torch.where(self.R < 0.0, weight, 0.0)
        if self.mode == PLAIN:
            along = hinge / r
            return RowTerms([dk, db, dR], other, torch.stack((along, -along)))
        c, inverse = rows[C], rows[TEXT_INVERSE : AUDIO_INVERSE + 1]
        slopes = self.slopes[SUPPORT_ROWS:]
        if self.mode != MIRROR:
            slopes = torch.stack((slopes.sum(dim=0), torch.zeros_like(c)))
        support = sums[SUPPORT_TEXT : SUPPORT_AUDIO + 1] * per_product
        support += slopes * self.positives[SUPPORT_ROWS:]
        dk += support.sum(dim=0)
        db += slopes.sum(dim=0)
        # Of a literal row, H and U are in RHO_LITERAL and dT, dA already (literal.py).
        literal = rows[OFFSET] != 0.0
        H = (k * inverse * slopes).masked_fill_(literal, 0.0)
        moved = torch.stack((rows[STEP_AUDIO], -rows[STEP_TEXT]))  # <e, a> and <-e, t>
        rho = k * inverse * sums[RHO_TEXT : RHO_AUDIO + 1] * per_product + H * moved
        sigma = torch.zeros_like(H)
        if self.options.renormalize:
            sigma = (k * inverse * inverse * support).masked_fill_(literal, 0.0)
            rho -= sigma * (c * moved.sum(dim=0) - moved.flip(0))
        rho = (rho.sum(dim=0) + k * unit * sums[RHO_LITERAL]) / r
        along = (c * rho + hinge) / r
        U, tau, d = H.flip(0), sigma.flip(0), 1.0 - c  # of the other tower's support vectors
        step = c * (c * tau - U - d * sigma) + along
        step[1].neg_()
        return RowTerms([dk, db, dR + rho], other + d * H + U - c * tau, step, c * U - d * sigma)

    def finish_towers(
        self, dT: Tensor | None, dA: Tensor | None, text: Tensor | None, audio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        terms, factor = self.row_terms(), self.k * self.unit
        for part in self.row_blocks:
            t, a = self.T[part].float(), self.A[part].float()
            e = t if terms.step is None else a - t
            for n, (total, own, other) in enumerate(((dT, t, a), (dA, a, t))):
                if total is None:
                    continue
                total = total[part].mul_(factor).addcmul_(other, terms.other[n, part, None])
                if terms.step is not None:
                    total.addcmul_(e, terms.step[n, part, None])
                if terms.own is not None:
                    total.addcmul_(own, terms.own[n, part, None])
        for total, X, out in ((dT, self.inputs.text, text), (dA, self.inputs.audio, audio)):
            if total is not None and out is not None:
                self.finish_tower(total[:, : self.D], X, out)
        return terms.scalars[-1], torch.stack(terms.scalars).sum(dim=1, dtype=torch.float64)

    def finish_tower(self, total: Tensor, X: Tensor, out: Tensor) -> None:
        """out (N, D) = total, of the rows X before they were normalised; cast once."""
        if self.options.normalize:
            for part in self.row_blocks:
                out[part] = normalize_gradient(X[part].float(), total[part])
        elif out.data_ptr() != total.data_ptr():
            out.copy_(total)
