"""Rows with a tiny gap, whose support vectors are taken literally.

Where c = R / r is large, Q - S loses digits that c multiplies. Such rows are rare (text and audio nearly equal), the
tiles skip their support vectors, and this module multiplies them out: s_i against every row, as eager PyTorch would.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Options

CHUNK_ELEMENTS = 1 << 19
"""Elements of one chunk's logits."""


class FarRows:
    """The far rows `index` (f,) of one call; `code` (N,) marks equal ids, or None."""

    def __init__(
        self,
        T: Tensor,
        A: Tensor,
        index: Tensor,
        c: Tensor,
        r: Tensor,
        inverse: tuple[Tensor, Tensor],
        k: float,
        b: float,
        code: Tensor | None,
        options: Options,
        mirror: bool,
        shared: bool,
    ) -> None:
        self.T, self.A, self.index = T, A, index
        self.c, self.r = c[index], r[index]
        self.inverse = (inverse[0][index], inverse[1][index])
        self.k, self.b, self.code = k, b if not options.infonce else 0.0, code
        self.infonce, self.mirror, self.shared = options.infonce, mirror, shared
        self.step = A[index] - T[index]
        moved = self.c[:, None] * self.step
        self.supports = [(0, T[index] + moved, A), (1, A[index] - moved, T)][: 2 if mirror else 1]

    def chunks(self, side: int, s: Tensor, Y: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of the logits of support vectors s (f, D) against Y (N, D); pairs left out are -inf."""
        size = max(1, CHUNK_ELEMENTS // len(Y))
        for start in range(0, len(s), size):
            rows = slice(start, min(start + size, len(s)))
            own = self.index[rows]
            z = self.k * self.inverse[side][rows, None] * (s[rows] @ Y.t()) + self.b
            z.scatter_(1, own[:, None], float("-inf"))
            if self.code is not None:
                z.masked_fill_(self.code[own][:, None] == self.code[None, :], float("-inf"))
            yield rows, z

    def statistics(self, running: Tensor, lowest: float) -> None:
        """Put the far rows' pairs (m, l) of the negatives into `running` (2, directions, N), float64."""
        m, l = running
        for side, s, Y in self.supports:
            for rows, z in self.chunks(side, s, Y):
                own, direction = self.index[rows], 2 + side
                if not self.infonce:
                    l[direction, own] = -F.logsigmoid(-z).sum(dim=1).to(l.dtype)
                    continue
                top = z.amax(dim=1).clamp_min(lowest)
                m[direction, own] = top.to(m.dtype)
                l[direction, own] = (z - top[:, None]).exp().sum(dim=1).to(l.dtype)
                if self.shared:
                    top = z.amax(dim=0).clamp_min(lowest)
                    new = torch.maximum(m[3], top.to(m.dtype))
                    part = (z - top).exp().sum(dim=0).to(l.dtype)
                    l[3] = l[3] * (m[3] - new).exp() + part * (top.to(m.dtype) - new).exp()
                    m[3] = new

    def gradients(
        self, factors: Tensor, sums: Tensor, rows_of: dict[str, int], dT: Tensor | None, dA: Tensor | None
    ) -> None:
        """Add the far rows' negatives to dT, dA (N, D; None: frozen) and to `sums` (float64, see csrc/params.h).

        factors (2, directions, N): m, and the upstream weight over l.
        """
        m, f = factors
        for side, s, Y in self.supports:
            dX, dY = (dT, dA) if side == 0 else (dA, dT)
            v = (self.step if side == 0 else -self.step) / self.r[:, None]
            for rows, z in self.chunks(side, s, Y):
                own, direction = self.index[rows], 2 + side
                if self.infonce:
                    h = (z - m[direction, own][:, None]).exp() * f[direction, own][:, None]
                    if self.shared:
                        h = h + (z - m[3]).exp() * f[3]
                else:
                    h = z.sigmoid() * f[direction, own][:, None]
                H = self.k * self.inverse[side][rows, None] * h  # [f, N]
                ds = H @ Y  # [f, N] @ [N, D]
                product = self.inverse[side][rows] * (s[rows] @ Y.t() * h).sum(dim=1)
                name = "support_text" if side == 0 else "support_audio"
                sums[rows_of[name], own] += product.to(sums.dtype)
                sums[rows_of["bias"], own] += h.sum(dim=1).to(sums.dtype)
                sums[rows_of["rho_far"], own] += (ds * v[rows]).sum(dim=1).to(sums.dtype)
                if dX is not None:
                    dX[own] += (1.0 - self.c[rows, None]) * ds
                if dY is not None:
                    dY[own] += self.c[rows, None] * ds
                    dY.addmm_(H.t(), s[rows])  # [N, f] @ [f, D]
