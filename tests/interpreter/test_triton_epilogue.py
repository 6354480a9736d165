"""The Triton epilogues of the panel engine, tile pair by tile pair, against dense float64 matrices.

Run in a process with TRITON_INTERPRET=1 (tests/test_triton.py starts it).
"""

import pytest
import torch
from torch import Tensor

from supclap_kernels.backends import triton_epilogue as epilogue
from supclap_kernels.backends.triton_tiles import LOG2E, MIRROR, NONE, ONE_SIDED, SHARED

MODES = {
    mode.value: name
    for mode, name in zip(
        (NONE, ONE_SIDED, SHARED, MIRROR), ("none", "one-sided", "shared", "mirror"), strict=True
    )
}
BLOCK_I, BLOCK_J = 16, 32
K, B = 9.0, -4.0


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A tensor of NaN inside a larger buffer of NaN, and that buffer."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 128,), float("nan"))
    return whole[64 : 64 + size].view(shape), whole


def intact(whole: Tensor) -> bool:
    return bool(whole[:64].isnan().all()) and bool(whole[-64:].isnan().all())


class Dense:
    """Logits and slopes of a whole problem, (N, N) float64, from the definitions."""

    def __init__(self, N: int, mode: int, infonce: bool, with_ids: bool) -> None:
        normal = {"generator": torch.Generator().manual_seed(N), "dtype": torch.float32}
        T, A = (torch.nn.functional.normalize(torch.randn(N, 24, **normal), dim=1) for _ in "ta")
        self.T, self.A, self.mode, self.infonce = T, A, mode, infonce
        self.rows = torch.zeros(10, N)
        self.rows[2], self.rows[4:6] = (
            0.5 * torch.randn(N, **normal),
            torch.rand(2, N, **normal) + 0.5,
        )
        self.rows[3, N // 2] = -1e30  # one row that the tiles skip
        self.rows[2, N // 2] = 0.0
        self.ids = torch.arange(N) // 2 if with_ids else None
        self.keep = ~torch.eye(N, dtype=torch.bool)
        if with_ids:
            self.keep &= self.ids[:, None] != self.ids[None, :]
        c, nt, na = (self.rows[n].double() for n in (2, 4, 5))
        used = self.rows[3] == 0
        S, Q, G = (x.double() @ y.double().t() for x, y in ((T, A), (A, A), (T, T)))
        self.S, self.DX, self.DY = S, Q - S, G - S.t()
        self.X, self.Y = (
            (S + c[:, None] * self.DX) * nt[:, None],
            (S.t() + c[:, None] * self.DY) * na[:, None],
        )
        self.logits = [self.masked(S), self.masked(S.t()), self.masked(self.X, used)]
        self.logits.append(
            self.masked(self.Y, used) if mode == MIRROR.value else self.logits[2].t()
        )
        self.factors = torch.rand(8, N, **normal) + 0.1
        for d in range(4):  # m near the logits
            self.factors[d] = (LOG2E.value * K) * 0.3
        p = [self.slope(L, self.factors[d], self.factors[4 + d]) for d, L in enumerate(self.logits)]
        self.g = p[0] + (p[1].t() if infonce else 0)
        self.h = p[2] + (p[3].t() if mode == SHARED.value else 0)
        self.u = p[3]
        h, u = self.h * nt[:, None], self.u * na[:, None]
        svr, mirror = mode != NONE.value, mode == MIRROR.value
        self.W = self.g + svr * (1 - c[:, None]) * h + mirror * ((1 - c[:, None]) * u).t()
        self.V_A, self.V_T = (c[:, None] * h, c[:, None] * u)

    def masked(self, products: Tensor, used: Tensor | None = None) -> Tensor:
        logits = K * products + (0 if self.infonce else B)
        keep = self.keep if used is None else self.keep & used[:, None]
        return logits.masked_fill(~keep, float("-inf"))

    def slope(self, logits: Tensor, m: Tensor, f: Tensor) -> Tensor:
        if self.infonce:
            return (logits - m.double()[:, None] / LOG2E.value).exp() * f.double()[:, None]
        return logits.sigmoid() * f.double()[:, None]

    def panel(self, i: slice, j: slice, ld: int) -> Tensor:
        """What the library's products put into a panel; NaN where nothing may be read."""
        pairs = [(self.T, self.A)] + [(self.A, self.T)] * (i != j)
        pairs += [(self.A, self.A)] * (self.mode != NONE.value) + [(self.T, self.T)] * (
            self.mode == MIRROR.value
        )
        result = torch.full((len(pairs), ld, ld), float("nan"))
        for block, (x, y) in zip(result, pairs, strict=True):
            block[: i.stop - i.start, : j.stop - j.start] = x[i] @ y[j].t()
        return result


def close(value: Tensor, exact: Tensor) -> bool:
    """All within 3e-5 of the largest; NaN is close to nothing."""
    largest = float(exact.abs().max())
    return largest > 0 and bool(((value.double() - exact).abs() <= 3e-5 * largest).all())


def cases():
    for mode in MODES:
        for infonce in (True, False):
            if infonce or MODES[mode] != "shared":
                for with_ids in (False, True):
                    for diagonal in (True, False):
                        yield mode, infonce, with_ids, diagonal


@pytest.mark.parametrize(
    "mode, infonce, with_ids, diagonal",
    list(cases()),
    ids=str,
)
def test_one_panel(mode, infonce, with_ids, diagonal):
    dense = Dense(90, mode, infonce, with_ids)
    i, j = slice(0, 40), slice(0, 40) if diagonal else slice(40, 90)
    ni, nj, ld = i.stop - i.start, j.stop - j.start, 64
    grid = (-(-ni // BLOCK_I), -(-nj // BLOCK_J))
    panel = dense.panel(i, j, ld)
    scale, bias = torch.tensor(K), torch.tensor(B)
    place = (
        len(dense.T),
        i.start,
        ni,
        j.start,
        nj,
        ld,
        ld * ld,
        BLOCK_I,
        BLOCK_J,
        diagonal,
        mode,
        infonce,
    )
    used = [True, True, mode != NONE.value, mode in (SHARED.value, MIRROR.value)]

    (part_i, whole_i), (part_j, whole_j) = guarded(4, 2, grid[1], ni), guarded(4, 2, grid[0], nj)
    epilogue.panel_statistics[grid](
        panel, dense.rows, dense.ids, scale, bias, part_i, part_j, *place
    )
    assert intact(whole_i) and intact(whole_j)
    for part, own, other in ((part_i, i, j), (part_j, j, i)):
        if part is part_j and diagonal:
            assert bool(part.isnan().all())
            continue
        for d in range(4):
            if not used[d]:
                assert bool(part[d].isnan().all())
                continue
            m, l = part[d].double()
            L = dense.logits[d][own, other]
            if infonce:
                assert close((m / LOG2E.value + l.log()).logsumexp(dim=0).exp(), L.exp().sum(dim=1))
            else:
                assert close(l.sum(dim=0), torch.nn.functional.softplus(L).sum(dim=1))

    outs, whole_out = guarded(*panel.shape)
    (sums_i, whole_i), (sums_j, whole_j) = guarded(6, grid[1], ni), guarded(6, grid[0], nj)
    arguments = (panel, dense.rows, dense.ids, scale, bias, dense.factors, outs, sums_i, sums_j)
    epilogue.panel_weights[grid](*arguments, *place)
    assert intact(whole_i) and intact(whole_j) and intact(whole_out)
    V_A, V_T = dense.V_A + dense.V_A.t(), dense.V_T + dense.V_T.t()
    wanted = [dense.W[i, j]] + [dense.W.t()[i, j]] * (not diagonal)
    wanted += [V_A[i, j]] * (mode != NONE.value) + [V_T[i, j]] * (mode == MIRROR.value)
    for block, exact in zip(outs[:, :ni, :nj], wanted, strict=True):
        assert close(block, exact)

    k2 = K * LOG2E.value
    both = not diagonal  # base and bias of a pair are all with its rows
    svr, mirror = mode != NONE.value, mode == MIRROR.value
    per_pair = [dense.g * dense.S, dense.g + svr * dense.h + mirror * dense.u.t()]
    rows_only = [dense.h * dense.DX, dense.u * dense.DY, dense.h * dense.X, dense.u * dense.Y]
    exists = [True, True, svr, mirror, svr, mirror]
    for n in range(6):
        unit = 1 if n == 1 else k2
        if n < 2:
            exact = per_pair[n][i, j].sum(dim=1) + (per_pair[n][j, i].sum(dim=0) if both else 0)
            assert close(sums_i[n].double().sum(dim=0), unit * exact)
        elif exists[n]:
            assert close(sums_i[n].double().sum(dim=0), unit * rows_only[n - 2][i, j].sum(dim=1))
            if not diagonal:
                assert close(
                    sums_j[n].double().sum(dim=0), unit * rows_only[n - 2][j, i].sum(dim=1)
                )


@pytest.mark.parametrize("infonce", [True, False])
def test_merge(infonce):
    """Slots in order, only the rows and the directions that were asked for; a row that is all
    hidden so far takes over what comes."""
    slots, count, first, N, block = 3, 21, 5, 30, 8
    normal = {"generator": torch.Generator().manual_seed(1)}
    part = 20 * torch.rand(4, 2, slots, count, **normal)
    running = 20 * torch.rand(8, N, **normal)
    running[:4, first], running[4:, first] = -1e30, 0.0
    part[1] = float("nan")  # a direction without partials
    before = running.clone()
    grid = (-(-count // block), 4)
    epilogue.merge_statistics[grid](part, running, slots, count, first, N, 0b1101, infonce, block)
    rows = slice(first, first + count)
    outside = torch.ones(N, dtype=torch.bool)
    outside[rows] = False
    assert torch.equal(running[:, outside], before[:, outside])
    assert torch.equal(running[[1, 5]], before[[1, 5]])
    for d in (0, 2, 3):
        m = torch.cat((part[d, 0], before[None, d, rows])).double()
        l = torch.cat((part[d, 1], before[None, 4 + d, rows])).double()
        assert torch.equal(running[d, rows].double(), m.amax(dim=0))
        total = (l * torch.exp2(m - m.amax(dim=0))).sum(dim=0) if infonce else l.sum(dim=0)
        assert close(running[4 + d, rows], total)
