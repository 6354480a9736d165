"""The closed form: loss and every gradient from dense matrices, without autograd.

These are the identities the kernels implement, with the same symbols (derivation: MATH.md):

    S = T A^T    Q = A A^T    K = T T^T    X = S + c (Q - S)   <t_sup_i, a_j>    c = R / r
    Y = S^T + c (K - S^T)   <a_sup_i, t_j>, mirror only
    G, H, U      gradient of the loss with respect to S, X and Y
    dT = W A + (V_T + V_T^T) T + ...,   dA = W^T T + (V_A + V_A^T) A + ...
    W  = G + (1 - c) H + ((1 - c) U)^T,   V_A = c H,   V_T = c U
    rho_i = sum_j (H_ij (Q_ij - S_ij) + U_ij (K_ij - S_ji)) / r_i       dR = rho + hinge - ...

Rows with a tiny gap (`is_literal`) would lose digits in Q - S: their support vector is taken
literally.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .negatives import Negatives, columns_of
from .reference import accumulator_dtype, gap_and_direction, kept_pairs

LITERAL_C, LITERAL_GAP, LITERAL_LENGTH = 2.0, 1 / 8, 0.1
"""Bounds of `is_literal`."""
MIN_LENGTH = 1e-7
"""Support vectors shorter than this are divided by it when put back on the sphere."""
MIN_NORM = 1e-12
"""Rows shorter than this are divided by it when they are normalised."""


class Gradients(NamedTuple):
    """Gradients in the accumulator's dtype: (N, D), (N, D), (N,), 0-d, 0-d; (Ma, D) and (Mt, D) of
    the negatives, or None."""

    audio: Tensor
    text: Tensor
    radius: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    audio_negatives: Tensor | None = None
    text_negatives: Tensor | None = None


def is_literal(c: Tensor, r: Tensor, T: Tensor, A: Tensor, renormalize: bool) -> Tensor:
    """(N,) bool: rows whose Q - S cancels so much that the support vector is taken literally.

    These have a large c = R / r, a gap r (N,) that is small beside the rows, or (renormalize) a
    support vector that is short beside them.
    """
    length = torch.maximum(T.norm(dim=1), A.norm(dim=1))
    literal = (c.abs() > LITERAL_C) | (r < LITERAL_GAP * length)
    if renormalize:
        step = c[:, None] * (A - T)
        shortest = torch.minimum((T + step).norm(dim=1), (A - step).norm(dim=1))
        literal |= shortest < LITERAL_LENGTH * length
    return literal


def normalize_gradient(X: Tensor, dX: Tensor) -> Tensor:
    """Gradient of x / |x| for each row: the part of dX that is tangent to the sphere, over |x|."""
    norm = torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_min(MIN_NORM)
    X = X / norm
    return (dX - (dX * X).sum(dim=1, keepdim=True) * X) / norm


def product_of(X: Tensor, Y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """X @ Y of float32 numbers that `dtype` holds, too, as the device multiplies those: the tensor
    cores of a GPU sum 16-bit products in float32, but do not round to nearest.
    """
    if dtype is None or dtype.itemsize != 2 or not X.is_cuda:
        return X @ Y
    return torch.mm(X.to(dtype), Y.to(dtype), out_dtype=torch.float32)


def row_direction(
    L: Tensor, keep: Tensor, infonce: bool, positives: bool = True
) -> tuple[Tensor, Tensor]:
    """Loss of each row (N,) of the logits L (N, .), and its gradient with respect to L.

    The positives are on the diagonal. Their p - 1 is minus the sum of the others' p: nothing
    cancels.
    """
    eye = torch.eye(*L.shape, dtype=torch.bool, device=L.device) & positives
    if infonce:
        m = L.masked_fill(~keep, float("-inf")).amax(dim=1, keepdim=True)
        e = (L - m).exp().masked_fill(~keep, 0.0)
        others = e.masked_fill(eye, 0.0)
        l = e.sum(dim=1, keepdim=True)
        grad = others / l
        grad.diagonal().copy_(-others.sum(dim=1) / l[:, 0])
        return l[:, 0].log() + (m[:, 0] - L.diagonal()), grad
    z = torch.where(eye, -L, L)
    sign = 1.0 - 2.0 * eye.to(L.dtype)
    return (-F.logsigmoid(-z) * keep).sum(dim=1), sign * z.sigmoid() * keep


@without_autocast
def loss_and_gradients(
    audio: Tensor,
    text: Tensor,
    radius: float | Tensor | None = None,
    logit_scale: float | Tensor = 1 / 0.07,
    logit_bias: float | Tensor | None = None,
    *,
    objective: str = "infonce",
    bilateral: str = "mirror",
    alpha: float = 1.0,
    beta: float = 0.0,
    normalize: bool = False,
    renormalize: bool = True,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    upstream: Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
    negatives: Negatives | None = None,
) -> tuple[Tensor, Gradients]:
    """The loss and its gradients for an upstream gradient (default: ones).

    `radius` (N,), 0-d, float or None; its gradient is returned per row. `weights_dtype` rounds the
    weights of the gradient products (never the positive's), as the 16-bit paths of the kernels do,
    and says how a GPU multiplies: the precision contract.
    """
    dtype = accumulator_dtype(audio.dtype)
    number: dict[str, Any] = {"dtype": dtype, "device": audio.device}
    T, A = text.detach().to(dtype), audio.detach().to(dtype)
    N, infonce = len(T), objective == "infonce"
    k = torch.as_tensor(logit_scale, **number).detach()
    b = torch.as_tensor(0.0 if logit_bias is None else logit_bias, **number).detach()
    w = torch.ones(N, **number) if weight is None else weight.detach().to(dtype)
    scale = 1.0 / N if reduction == "mean" else 1.0
    omega = scale * w  # weight of row i in the gradient
    omega = omega if upstream is None else omega * upstream.to(dtype)
    keep = kept_pairs(N, ids, T.device)
    raw_T, raw_A = T, A
    if normalize:
        T, A = F.normalize(T, dim=1), F.normalize(A, dim=1)
        if weights_dtype is not None:
            T, A = T.to(weights_dtype).to(dtype), A.to(weights_dtype).to(dtype)

    with torch.no_grad():
        further = {
            side: columns_of(negatives, side, ids, dtype, normalize) for side in ("audio", "text")
        }
    if normalize and weights_dtype is not None:
        further = {
            side: columns and columns._replace(rows=columns.rows.to(weights_dtype).to(dtype))
            for side, columns in further.items()
        }
    d_further: dict[str, Tensor | None] = {
        side: None if columns is None else torch.zeros_like(columns.rows)
        for side, columns in further.items()
    }

    def rounded(M: Tensor, X: Tensor) -> Tensor:
        """M @ X with the weights rounded to `weights_dtype`, in a unit (a power of 2) that keeps
        float16 inside its range.
        """
        if weights_dtype is None:
            return M @ X
        unit = torch.exp2(M.abs().max().clamp_min(1e-30).log2().floor() - 13)
        return product_of((M / unit).to(weights_dtype).to(dtype), X, weights_dtype) * unit

    def product(M: Tensor, X: Tensor) -> Tensor:
        """`rounded`, but for the weights of the positives."""
        diagonal = M.diagonal().clone()
        return rounded(M - torch.diag(diagonal), X) + diagonal[:, None] * X

    dk = db = torch.zeros_like(k)

    def direction(
        L: Tensor, X: Tensor, side: str, factor: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows X (N, D), whose products with their columns are L (N, N), against these and the
        negatives of a side: the losses, the gradient with respect to k L, and what the negatives
        give to X. Their own gradient is added to d_further. `factor`: of the losses."""
        nonlocal dk, db
        columns = further[side]
        if columns is None:
            loss, grad = row_direction(k * L + (0.0 if infonce else b), keep, infonce)
            return loss, factor * (omega[:, None] * grad), torch.zeros_like(X)
        if weights_dtype is not None:
            X = X.to(weights_dtype).to(dtype)
        more = product_of(X, columns.rows.t(), weights_dtype)
        counted = torch.ones_like(more, dtype=torch.bool) if columns.keep is None else columns.keep
        z = k * torch.cat((L, more), dim=1) + (0.0 if infonce else b)
        loss, grad = row_direction(z, torch.cat((keep, counted), dim=1), infonce)
        grad = factor * (omega[:, None] * grad)
        return loss, grad[:, : len(L)], beyond(grad[:, len(L) :], more, X, side)

    def beyond(grad: Tensor, products: Tensor, X: Tensor, side: str) -> Tensor:
        """Takes the gradient with respect to the logits (N, M) of rows X and a side's negatives."""
        nonlocal dk, db
        columns, total = further[side], d_further[side]
        assert columns is not None and total is not None
        dk, db = dk + (grad * products).sum(), db + grad.sum()
        total += rounded(k * grad.t(), X)
        return rounded(k * grad, columns.rows)

    S = product_of(T, A.t(), weights_dtype)
    S.diagonal().copy_((T * A).sum(dim=1))
    rows, G, dT = direction(S, T, "audio")
    dA = torch.zeros_like(A)
    if infonce:
        l_a2t, G_a2t, dA = direction(S.t(), A, "text")
        rows, G = rows + l_a2t, G + G_a2t.t()
    elif further["text"] is not None:
        columns = further["text"]
        products = product_of(A, columns.rows.t(), weights_dtype)
        counted = torch.ones_like(products) if columns.keep is None else columns.keep
        loss, grad = row_direction(k * products + b, counted.bool(), infonce, positives=False)
        rows, dA = rows + loss, beyond(omega[:, None] * grad, products, A, "text")
    dk, db = dk + (G * S).sum(), db + G.sum()
    W = k * G
    rho = torch.zeros_like(w)

    def support_term(
        X: Tensor, Y: Tensor, side: str, gram: Tensor, cross: Tensor, both: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support vectors s_i = x_i + c_i (y_i - x_i) against Y, of a side; gram = Y Y^T, cross = X
        Y^T.

        Adds to dk, db and rho; returns the row losses, H = dL/d<s_i, y_j>, and the gradient of what
        does not pass through Y's products: dX and dY of the rows' own geometry.
        """
        nonlocal dk, db, rho
        step = Y - X
        s = X + c[:, None] * step
        norm = torch.ones_like(c)
        if renormalize:
            norm = torch.linalg.vector_norm(s, dim=1).clamp_min(MIN_LENGTH)
        diff = gram - cross
        diff.diagonal().copy_((step * Y).sum(dim=1))
        Ss = cross + c[:, None] * diff
        Ss[literal] = s[literal] @ Y.t()
        L = Ss / norm[:, None]
        loss, H, beside = direction(L, s / norm[:, None], side, alpha)
        straight = torch.zeros_like(Y)  # what the negatives give to Y itself
        if both:
            loss2, H2, straight = direction(L.t(), Y, "text", alpha)
            loss, H = loss + loss2, H + H2.t()
        dk, db = dk + (H * L).sum(), db + H.sum()
        H = k * H / norm[:, None]
        beside = beside / norm[:, None]
        ds = torch.zeros_like(s)
        ds[literal] = H[literal] @ Y  # literal rows: the gradient of s, literally
        sigma = torch.zeros_like(c)
        if renormalize:
            sigma = ((H * Ss).sum(dim=1) + (beside * s).sum(dim=1)) / norm.square()
        v = step / r[:, None]
        part = torch.where(literal, (ds * v).sum(dim=1), (H * diff).sum(dim=1) / r)
        rho = rho + part + (beside * v).sum(dim=1) - sigma * (v * s).sum(dim=1)
        own = ds + beside - sigma[:, None] * s
        dX, dY = (1.0 - c)[:, None] * own, c[:, None] * own + straight
        dY = dY + H[literal].t() @ s[literal]
        return loss, H.masked_fill(literal[:, None], 0.0), dX, dY

    hinge = torch.zeros_like(w)
    dR = torch.zeros_like(w)
    if radius is not None:
        R = torch.as_tensor(radius, **number).detach().expand(N)
        r, u = gap_and_direction(T, A)
        c = R / r
        literal = is_literal(c, r, T, A, renormalize)
        Q = product_of(A, A.t(), weights_dtype)
        svr, H, dX, dY = support_term(T, A, "audio", Q, S, bilateral == "shared" and infonce)
        W = W + (1.0 - c)[:, None] * H
        V = c[:, None] * H
        dT, dA = dT + dX, dA + dY + product(V + V.t(), A)
        if bilateral == "mirror":
            K = product_of(T, T.t(), weights_dtype)
            svr2, U, dX, dY = support_term(A, T, "text", K, S.t(), False)
            W = W + ((1.0 - c)[:, None] * U).t()
            V = c[:, None] * U
            svr, dA, dT = svr + svr2, dA + dX, dT + dY + product(V + V.t(), T)
        rows = rows + alpha * svr + beta * (F.relu(R - r) + F.relu(-R))
        hinge = beta * omega * (R > r)
        along = (c * rho + hinge)[:, None] * u  # all that lies along the pulling direction
        dT, dA = dT + along, dA - along
        dR = rho + hinge - beta * omega * (R < 0)
    dT, dA = dT + product(W, A), dA + product(W.t(), T)
    if normalize:
        dT, dA = normalize_gradient(raw_T, dT), normalize_gradient(raw_A, dA)
    rows = w * rows
    loss = rows if reduction == "none" else rows.sum() * scale
    if normalize:
        for side, total in d_further.items():
            if total is not None and negatives is not None:
                raw = negatives.of(side)[0]
                assert raw is not None
                d_further[side] = normalize_gradient(raw.detach().to(dtype), total)
    return loss, Gradients(dA, dT, dR, dk, db, d_further["audio"], d_further["text"])
