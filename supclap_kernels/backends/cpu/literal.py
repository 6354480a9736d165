"""Rows with a small gap, whose support vectors are taken literally, in float64.

Where c = R / r or 1 / r is large, Q - S loses digits that c and 1 / r multiply. Such rows are rare
(text and audio nearly equal), the tiles skip their support vectors, and this module multiplies them
out: s_i against every row.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...gradients import MIN_LENGTH
from ...options import Options
from ...reference import EPS
from ..state import BIAS, HIDDEN, OTHER_ROWS, RHO_LITERAL, SUPPORT_AUDIO, SUPPORT_ROWS, SUPPORT_TEXT

CHUNK_COPIES = 8
"""float64 values alive for each logit of a chunk: product, logit, slope, and what makes them."""
CHUNK_ROWS = 64
"""Literal rows at a time, at least, whatever the workspace."""
BLOCK_ROWS = 4096
"""Rows of the embeddings that are raised to float64 at a time."""


def wide_blocks(Y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Y in float64, block of rows by block of rows."""
    for start in range(0, len(Y), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        yield block, Y[block].double()


class LiteralRows:
    """The literal rows `index` (f,) of one call; `code` (N,) marks equal ids, or None.

    `split` > 0: only pairs of a row before it with one from it on, and no positives.
    """

    def __init__(
        self,
        T: Tensor,
        A: Tensor,
        index: Tensor,
        R: Tensor,
        k: float,
        b: float,
        code: Tensor | None,
        options: Options,
        mirror: bool,
        shared: bool,
        split: int = 0,
    ) -> None:
        # Rows at a time: what the workspace holds, but enough to pay for raising the embeddings.
        self.size = max(CHUNK_ROWS, options.workspace // (CHUNK_COPIES * 8 * len(T)))
        self.index, self.code, self.k, self.b = index, code, k, b if not options.infonce else 0.0
        self.second = torch.arange(len(T), device=T.device) >= split if split else None
        self.infonce, self.shared, self.renormalize = options.infonce, shared, options.renormalize
        t, a = T[index].double(), A[index].double()
        self.step = a - t
        self.r = (self.step.square().sum(dim=1) + EPS**2).sqrt()
        self.c = R[index].double() / self.r
        moved = self.c[:, None] * self.step
        # Support vectors, the rows they are compared with, the sign of their direction.
        sides = [(t + moved, A, 1.0), (a - moved, T, -1.0)][: 2 if mirror else 1]
        ones = torch.ones_like(self.c)
        # ... and 1 / length.
        self.sides = [
            (s, Y, sign, 1.0 / s.norm(dim=1).clamp_min(MIN_LENGTH) if options.renormalize else ones)
            for s, Y, sign in sides
        ]

    def chunks(
        self, s: Tensor, Y: Tensor, inverse: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, products <s, y> / |s| and logits (n, N) of s (f, D); pairs left out are -inf."""
        for start in range(0, len(s), self.size):
            rows = slice(start, min(start + self.size, len(s)))
            literal = self.index[rows]
            product = torch.cat([s[rows] @ block.t() for _, block in wide_blocks(Y)], dim=1)
            product *= inverse[rows, None]
            z = self.k * product + self.b
            z.scatter_(1, literal[:, None], float("-inf"))
            if self.code is not None:
                z.masked_fill_(self.code[literal][:, None] == self.code[None, :], float("-inf"))
            if self.second is not None:
                z.masked_fill_(self.second[literal][:, None] == self.second[None, :], float("-inf"))
            yield rows, product, z

    def statistics(self, running: Tensor) -> None:
        """Put the literal rows' (m, l) of the negatives into `running` (2, directions, N),
        float64."""
        m, l = running
        for direction, (s, Y, _, inverse) in enumerate(self.sides, start=SUPPORT_ROWS):
            for rows, _, z in self.chunks(s, Y, inverse):
                literal = self.index[rows]
                if not self.infonce:
                    l[direction, literal] = -F.logsigmoid(-z).sum(dim=1)
                    continue
                top = z.amax(dim=1).clamp_min(HIDDEN)
                m[direction, literal] = top
                l[direction, literal] = (z - top[:, None]).exp().sum(dim=1)
                if self.shared:
                    new = torch.maximum(m[OTHER_ROWS], z.amax(dim=0).clamp_min(HIDDEN))
                    l[OTHER_ROWS] = l[OTHER_ROWS] * (m[OTHER_ROWS] - new).exp() + (
                        z - new
                    ).exp().sum(dim=0)
                    m[OTHER_ROWS] = new

    def positive_slopes(self, direction: int, state: Tensor, f: Tensor) -> Tensor:
        """(f,): gradient with respect to the logits of the literal rows' positives."""
        if self.infonce:
            others = state[2]
            h = -f[direction] * others[direction]
            return (h - f[OTHER_ROWS] * others[OTHER_ROWS] if self.shared else h)[self.index]
        s, Y, _, inverse = self.sides[direction - SUPPORT_ROWS]
        z = self.k * inverse * (s * Y[self.index].double()).sum(dim=1) + self.b
        return -f[direction, self.index] * (-z).sigmoid()

    def gradients(
        self,
        state: Tensor,
        factors: Tensor,
        gap: Tensor,
        sums: Tensor,
        dT: Tensor | None,
        dA: Tensor | None,
    ) -> None:
        """Add the literal rows' SVR gradient to dT, dA (N, D; None: frozen) and to `sums`.

        state (3, directions, N): m, l, l without the positive; factors (2, directions, N): m, and
        the upstream weight over l; gap (N,): r as `finish_gradients` reads it; sums (ROW_SUMS, N).
        """
        m, f = factors.double()
        for direction, (s, Y, sign, inverse) in enumerate(self.sides, start=SUPPORT_ROWS):
            dX, dY = (dT, dA) if sign > 0 else (dA, dT)
            v = sign * self.step / self.r[:, None]
            positive = self.positive_slopes(direction, state.double(), f)
            for rows, product, z in self.chunks(s, Y, inverse):
                literal = self.index[rows]
                if self.infonce:
                    h = (z - m[direction, literal][:, None]).exp() * f[direction, literal][:, None]
                    if self.shared:
                        h = h + (z - m[OTHER_ROWS]).exp() * f[OTHER_ROWS]
                else:
                    h = z.sigmoid() * f[direction, literal][:, None]
                support = SUPPORT_TEXT if sign > 0 else SUPPORT_AUDIO
                sums[support, literal] += (h * product).sum(dim=1)
                sums[BIAS, literal] += h.sum(dim=1)
                if self.second is None:
                    h.scatter_(1, literal[:, None], positive[rows, None])
                H = self.k * inverse[rows, None] * h
                # The gradient of s / |s|, and then of s: the part tangent to the sphere.
                ds = torch.zeros_like(s[rows])
                for block, y in wide_blocks(Y):
                    ds += H[:, block] @ y  # [n, BLOCK_ROWS] @ [BLOCK_ROWS, D]
                    if dY is not None:
                        dY[block] += (H[:, block].t() @ s[rows]).to(dY.dtype)
                if self.renormalize:
                    unit = s[rows] * inverse[rows, None]
                    ds -= (ds * unit).sum(dim=1, keepdim=True) * unit
                sums[RHO_LITERAL, literal] += (ds * v[rows]).sum(dim=1) * gap[literal]
                if dX is not None:
                    dX[literal] += ((1.0 - self.c[rows, None]) * ds).to(dX.dtype)
                if dY is not None:
                    dY[literal] += (self.c[rows, None] * ds).to(dY.dtype)
