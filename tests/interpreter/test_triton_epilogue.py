"""The Triton epilogues of the panel engine, tile pair by tile pair, against dense matrices.

Run in a process with TRITON_INTERPRET=1 (tests/backends/test_triton.py starts it).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from supclap_kernels.backends.triton import merge, panel
from supclap_kernels.backends.triton import tile as tiles
from supclap_kernels.testing import Outputs, violations

PLAIN, ONE_SIDED, SHARED, MIRROR = (
    mode.value for mode in (tiles.PLAIN, tiles.ONE_SIDED, tiles.SHARED, tiles.MIRROR)
)
LOG2E = tiles.LOG2E.value
BLOCK_I, BLOCK_J = 16, 32
N, D, LD = 90, 24, 64
SCALE, BIAS = 9.0, -4.0


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A tensor of NaN inside a larger buffer of NaN, and that buffer."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 128,), float("nan"))
    return whole[64 : 64 + size].view(shape), whole


def intact(*buffers: Tensor) -> bool:
    return all(bool(x[:64].isnan().all()) and bool(x[-64:].isnan().all()) for x in buffers)


def accept(result: Outputs, exact: Outputs, base: Outputs) -> None:
    """The acceptance rule; base is the same dense computation in float32, z at most 40."""
    u = torch.finfo(torch.float32).eps / 2
    floor = {name: u * (2 * (1 + 40) + 1) * float(x.abs().max()) for name, x in exact.items()}
    assert all(floor.values()), "a case without values"
    found = violations(result, exact, base, floor)
    assert not found, "\n".join(found)


class Dense:
    """Logits, slopes and weights of a whole problem, (N, N), from the definitions."""

    def __init__(self, mode: int, infonce: bool, with_ids: bool, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        T, A = (F.normalize(torch.randn(N, D, generator=generator), dim=1) for _ in "ta")
        self.T, self.A, self.mode, self.infonce = T, A, mode, infonce
        self.svr, self.mirror = mode != PLAIN, mode == MIRROR
        self.rows = torch.zeros(10, N)
        self.rows[2] = 0.5 * torch.randn(N, generator=generator)
        self.rows[4:6] = torch.rand(2, N, generator=generator) + 0.5
        self.rows[2:4, N // 2] = torch.tensor([0.0, -1e30])  # a row that the tiles skip
        self.factors = torch.rand(8, N, generator=generator) + 0.1
        self.factors[:4] = 0.3 * SCALE * LOG2E  # m near the logits
        self.ids = torch.arange(N) // 2 if with_ids else None
        self.keep = ~torch.eye(N, dtype=torch.bool)
        if self.ids is not None:
            self.keep &= self.ids[:, None] != self.ids[None, :]

        T, A, rows, m, f = (x.to(dtype) for x in (T, A, self.rows, *self.factors.split(4)))
        c, nt, na = (rows[n][:, None] for n in (2, 4, 5))
        S, Q, K = T @ A.t(), A @ A.t(), T @ T.t()
        DX, DY = Q - S, K - S.t()
        X, Y = (S + c * DX) * nt, (S.t() + c * DY) * na
        self.logits = [self.logit(S), self.logit(S.t()), self.logit(X, skip=True)]
        self.logits.append(self.logit(Y, skip=True) if self.mirror else self.logits[2].t())
        g, a2t, h, u = (self.slope(z, m[d], f[d]) for d, z in enumerate(self.logits))
        if infonce:
            g = g + a2t.t()
        if mode == SHARED:
            h = h + u.t()
        self.W = g + self.svr * (1 - c) * h * nt + self.mirror * ((1 - c) * u * na).t()
        V_A, V_T = c * h * nt, c * u * na
        self.V_A, self.V_T = V_A + V_A.t(), V_T + V_T.t()
        k2 = SCALE * LOG2E
        self.base, self.bias = k2 * g * S, g + self.svr * h + self.mirror * u.t()
        self.own_sums = {2: k2 * h * DX, 4: k2 * h * X} if self.svr else {}
        self.own_sums |= {3: k2 * u * DY, 5: k2 * u * Y} if self.mirror else {}

    def logit(self, products: Tensor, skip: bool = False) -> Tensor:
        keep = self.keep & (self.rows[3] == 0)[:, None] if skip else self.keep
        logits = SCALE * products + (0 if self.infonce else BIAS)
        return logits.masked_fill(~keep, float("-inf"))

    def slope(self, logits: Tensor, m: Tensor, f: Tensor) -> Tensor:
        p = (logits - m[:, None] / LOG2E).exp() if self.infonce else logits.sigmoid()
        return p * f[:, None]

    def blocks(self, S: Tensor, P: Tensor | None, Q: Tensor, K: Tensor) -> list[Tensor]:
        """Those that a panel of this mode has, in its order."""
        exist = (True, P is not None, self.svr, self.mirror)
        return [x for x, there in zip((S, P, Q, K), exist, strict=True) if there and x is not None]

    def panel(self, i: slice, j: slice) -> Tensor:
        """What the library's products put into a panel; NaN is its padding."""
        T, A = self.T, self.A
        products = [x[i] @ y[j].t() for x, y in ((T, A), (A, T), (A, A), (T, T))]
        products = self.blocks(products[0], None if i == j else products[1], *products[2:])
        result = torch.full((len(products), LD, LD), float("nan"))
        for block, product in zip(result, products, strict=True):
            block[: len(product), : product.shape[1]] = product
        return result

    def statistics(self, i: slice, j: slice) -> Outputs:
        """Sums of exp (SigLIP: softplus) of rows i over columns j, for each direction."""
        used = 4 if self.mode in (SHARED, MIRROR) else 3 if self.svr else 2
        parts = {str(d): z[i, j] for d, z in enumerate(self.logits[:used])}
        if self.infonce:
            return {d: z.exp().sum(dim=1) for d, z in parts.items()}
        return {d: F.softplus(z).sum(dim=1) for d, z in parts.items()}

    def similarity(self, i: slice, j: slice) -> Outputs:
        """Sum of the logits (base 2, no bias) of what counts, and how much does."""
        z = SCALE * LOG2E * self.T @ self.A.t()
        both = [(z, i, j)] + [(z.t(), i, j)] * (i != j)
        keep = self.keep[i, j].to(z.dtype)
        total = sum((x[a, b] * keep).sum(dim=1) for x, a, b in both)
        return {"sum": total, "count": len(both) * keep.sum(dim=1)}

    def weights(self, i: slice, j: slice) -> Outputs:
        """The weights' blocks, and the sums of rows i and columns j."""
        pair = i != j
        parts = self.blocks(self.W[i, j], self.W.t()[i, j] if pair else None,
                            self.V_A[i, j], self.V_T[i, j])  # fmt: skip
        outputs = {f"block {n}": x for n, x in enumerate(parts)}
        for n, x in enumerate((self.base, self.bias)):  # those of a pair are all with its rows
            outputs[f"row {n}"] = x[i, j].sum(dim=1) + pair * x[j, i].sum(dim=0)
        for n, x in self.own_sums.items():
            outputs[f"row {n}"] = x[i, j].sum(dim=1)
            if pair:
                outputs[f"column {n}"] = x[j, i].sum(dim=1)
        return outputs


@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "pair"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize(
    "mode, infonce",
    [(PLAIN, True), (ONE_SIDED, True), (SHARED, True), (MIRROR, True)]
    + [(PLAIN, False), (ONE_SIDED, False), (MIRROR, False)],
)
def test_one_panel(mode, infonce, with_ids, diagonal):
    exact, base = (Dense(mode, infonce, with_ids, x) for x in (torch.float64, torch.float32))
    i, j = slice(0, 40), slice(0, 40) if diagonal else slice(40, 90)
    ni, nj = i.stop - i.start, j.stop - j.start
    grid = (-(-ni // BLOCK_I), -(-nj // BLOCK_J))
    products = base.panel(i, j)
    state = torch.cat((torch.full((12, N), float("nan")), base.rows))
    inputs = (products, state, base.ids, torch.tensor(SCALE), torch.tensor(BIAS))
    place = (N, i.start, ni, j.start, nj, LD, LD * LD)
    constants = (BLOCK_I, BLOCK_J, diagonal, mode, infonce, True)

    (part_i, whole_i), (part_j, whole_j) = guarded(5, 2, grid[1], ni), guarded(5, 2, grid[0], nj)
    panel.panel_statistics[grid](*inputs, part_i, part_j, *place, *constants)
    assert intact(whole_i, whole_j)
    for part, own, other in ((part_i, i, j), (part_j, j, i))[: 2 - diagonal]:
        wanted = exact.statistics(own, other)
        assert bool(part[len(wanted) : 4].isnan().all())
        result = {}
        for d in wanted:
            m, l = part[int(d)]
            result[d] = (l * torch.exp2(m) if infonce else l).sum(dim=0)
        accept(result, wanted, base.statistics(own, other))
    assert not diagonal or bool(part_j.isnan().all())
    similarity = [x.similarity(i, j) for x in (exact, base)]
    accept(dict(zip(("sum", "count"), part_i[4].sum(dim=1), strict=True)), *similarity)
    if diagonal:
        product = SCALE * LOG2E * (base.T * base.A).sum(dim=1)[i]
        found = state[-1, i] - (0.0 if infonce else BIAS * LOG2E)
        accept({"positive": found}, {"positive": product.double()}, {"positive": product})

    out, whole_out = guarded(*products.shape)
    (sums_i, whole_i), (sums_j, whole_j) = guarded(6, grid[1], ni), guarded(6, grid[0], nj)
    results = (None, None, base.factors, out, sums_i, sums_j)
    panel.panel_weights[grid](*inputs, *results, *place, *constants)
    assert intact(whole_i, whole_j, whole_out)
    found = {f"block {n}": x[:ni, :nj] for n, x in enumerate(out)}
    found |= {f"row {n}": x for n, x in enumerate(sums_i.sum(dim=1))}
    found |= {f"column {n}": x for n, x in enumerate(sums_j.sum(dim=1))}
    accept(found, exact.weights(i, j), base.weights(i, j))


@pytest.mark.parametrize("slots", [3, 11])
@pytest.mark.parametrize("infonce", [True, False])
def test_merge(infonce, slots):
    """All slots, a few at once; only the rows and directions that were asked for; a row that is
    all hidden so far takes over what comes."""
    count, first, block = 21, 5, (4, 8)
    generator = torch.Generator().manual_seed(1)
    part = 20 * torch.rand(5, 2, slots, count, generator=generator)
    running = 20 * torch.rand(5, 2, N, generator=generator)
    running[:, 0, first], running[:, 1, first] = -1e30, 0.0
    part[1] = float("nan")  # a direction without partials
    before = running.clone()
    grid = (-(-count // block[1]), 5)
    merge.merge_statistics[grid](part, running, slots, count, first, N, 0b11101, infonce, *block)
    rows = slice(first, first + count)
    outside = torch.ones(N, dtype=torch.bool)
    outside[rows] = False
    assert torch.equal(running[:, :, outside], before[:, :, outside])
    assert torch.equal(running[1], before[1])
    for d in (0, 2, 3):
        wanted = []
        for dtype in (torch.float64, torch.float32):
            m = torch.cat((part[d, 0], before[d, :1, rows])).to(dtype)
            l = torch.cat((part[d, 1], before[d, 1:, rows])).to(dtype)
            top = m.amax(dim=0)
            l = l * torch.exp2(m - top) if infonce else l
            wanted.append({"m": top, "l": l.sum(dim=0)})
        accept({"m": running[d, 0, rows], "l": running[d, 1, rows]}, *wanted)
    sums = [torch.cat((part[4].to(t), before[4, :, None, rows].to(t)), 1).sum(1)
            for t in (torch.float64, torch.float32)]  # fmt: skip
    accept({"sums": running[4][:, rows]}, *({"sums": x} for x in sums))
