"""What a backend is: a `Call`, the stages of one pass, and their order in forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..options import Options
from . import statistics
from .one_way import Epilogue
from .panel import PLACEHOLDER, Layout, Tiling, kept_elements, kept_panels


class Tensors(NamedTuple):
    """The tensors of one call, detached, on one device."""

    audio: Tensor
    text: Tensor
    radius: Tensor | None
    scale: Tensor
    bias: Tensor | None
    ids: Tensor | None
    weight: Tensor | None


Towers = tuple[Tensor | None, Tensor | None]
"""Of audio and of text; None where a tower is frozen."""


class Call(Epilogue, Protocol):
    """One pass over some rows, text T and audio A, stage by stage.

        sweep_statistics -> finish_statistics        the loss
        start_gradients -> sweep_gradients -> finish_gradients

    `split` > 0: only pairs of a row before it with one from it on, and what they add to sums over
    pairs; the rows' own terms are another call's (distributed.py).
    """

    inputs: Tensors
    layout: Layout
    fused: bool
    """logits are never in memory, so none can be kept"""
    split: int
    T: Tensor
    A: Tensor
    state: Tensor
    """(STATE_ROWS, N): the softmax statistics, the geometry of the rows"""
    unit: Any
    """a 0-d tensor, what sums over pairs are multiples of, or None: 1; after start_gradients"""

    def exponential(self, x: Tensor) -> Tensor:
        """Of the base of log_sums."""

    @property
    def log_sums(self) -> Tensor:
        """(2, 4, N): m and l of the negatives of each direction, so far."""

    @property
    def sums(self) -> Tensor:
        """(ROW_SUMS, N): sums over pairs for each row, so far; after start_gradients."""

    def normalized(self) -> tuple[Tensor, Tensor]:
        """text, audio (N, D) as the products see them, for another call."""

    def new_empty(self, *shape: int) -> Tensor:
        """In the accumulator's dtype."""

    def columns(self, X: Tensor) -> Tensor:
        """Rows (M, D) that are normalised, if asked, as the products see them."""

    def column_code(self, ids: Tensor | None) -> Tensor | None:
        """Ids (M,) of further columns as the epilogue compares them with the rows'."""

    def finish_columns(self, total: Tensor) -> Tensor:
        """Sums of products with weights, (M, .) or (M,), as they are in the gradient."""

    def sweep_statistics(self, kept: Tensor | None) -> None:
        """Sweep 1: `log_sums`; fills `kept` with every tile's logits if it is given."""

    def finish_statistics(self) -> tuple[Tensor, Tensor | None]:
        """The loss; with `options.stats` (6, N): l_t2a, l_a2t, l_svr, l_cons of each row, and
        whether its positive is beaten among the audios and among the texts."""

    def similarity(self) -> Tensor:
        """(2,) float64: sum and count of <t, a> over the negatives, for the statistics."""

    def start_gradients(self, upstream: Tensor | None) -> None:
        """Weights of the rows' terms in the gradient, from what arrives at the loss (None: 1)."""

    def accumulators(self, needs: tuple[bool, ...], out: Towers = (None, None)) -> Towers:
        """Where sweep 2 adds up the gradients of the rows as its products see them: zeros. `out`
        (zeros) where it fits."""

    def sweep_gradients(
        self,
        dA: Tensor | None,
        dT: Tensor | None,
        kept: Tensor | None,
        with_statistics: bool = False,
    ) -> None:
        """Sweep 2: `sums`, and the products into dA, dT. `with_statistics` adds sweep 1."""

    def finish_gradients(
        self, dA: Tensor | None, dT: Tensor | None, out: Towers = (None, None)
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """From sweep 2's dA, dT those of the rows as given, (N, D), written to `out` if given; dR
        in the radius' shape or None; (dk, db)."""


class Route(NamedTuple):
    """A way for batches of up to `largest` pairs (None: of any number), and why it was chosen."""

    way: str
    largest: int | None
    reason: str


class Backend:
    """What dispatch chooses: one way to compute the loss."""

    def call(
        self, inputs: Tensors, options: Options, state: Tensor | None = None, split: int = 0
    ) -> Call:
        """`state`: of an earlier call with these rows."""
        raise NotImplementedError

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        """Length of the buffer that forward leaves for backward; N may be symbolic."""
        raise NotImplementedError

    def forward(
        self, inputs: Tensors, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """loss (or rows of it), the values of SVRStats (or None), state, and `saved`.

        `needs` says which of audio, text, radius, scale, bias will want a gradient.
        """
        call = self.call(inputs, options)
        has_radius, keep = inputs.radius is not None, any(needs)
        N, D = inputs.audio.shape
        size = self.saved_elements(N, D, inputs.audio.dtype, has_radius, options, keep)
        saved = call.new_empty(size)
        if keep and options.gradient_in_forward:
            dA, dT, dR, scalars = split_gradients(saved.zero_(), N, D)
            out = (dA if needs[0] else None, dT if needs[1] else None)
            call.start_gradients(None)
            sums = call.accumulators(needs, out)
            call.sweep_gradients(*sums, None, with_statistics=True)
            *_, radius_gradient, dk_db = call.finish_gradients(*sums, out)
            scalars.copy_(dk_db)
            if radius_gradient is not None:
                dR[: radius_gradient.numel()].copy_(radius_gradient)
        else:
            kept = kept_panels(saved)
            end = 0 if kept is None else call.layout.panel_elements
            saved[end:].zero_()  # no output is undefined
            call.sweep_statistics(kept)
        loss, terms = call.finish_statistics()
        stats = None
        if terms is not None:
            values = statistics.row_values(inputs.radius, inputs.weight, terms, call.state)
            stats = statistics.means(values, N, call.similarity()).to(loss.dtype)
        return loss, stats, call.state, saved

    def backward(
        self,
        inputs: Tensors,
        options: Options,
        needs: tuple[bool, ...],
        upstream: Tensor,
        state: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of audio, text, radius, scale, bias, each in its own dtype, or None."""
        if options.gradient_in_forward:
            gradients = scaled_gradients(inputs, saved, upstream)
            return in_own_dtypes(inputs, needs, *gradients)
        call = self.call(inputs, options, state)
        call.start_gradients(upstream)
        sums = call.accumulators(needs)
        call.sweep_gradients(*sums, kept_panels(saved))
        return in_own_dtypes(inputs, needs, *call.finish_gradients(*sums))


def saved_elements(
    N: Any, D: int, has_radius: bool, options: Options, itemsize: int, keep: bool, tiling: Tiling
) -> Any:
    """Length of the buffer that forward leaves for backward; N may be symbolic.

    Kept panels, or (SigLIP) the gradients themselves, or PLACEHOLDER elements.
    """
    if not keep:
        return PLACEHOLDER
    if options.gradient_in_forward:
        return gradient_elements(N, D)
    return kept_elements(N, options.grams(has_radius), itemsize, tiling, options.workspace)


def gradient_elements(N: Any, D: int) -> Any:
    """Length of a buffer for dA, dT (N, D), dR (N,) and (dk, db), one after the other."""
    return 2 * N * D + N + 2


def split_gradients(saved: Tensor, N: int, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dA, dT (N, D), dR (N,) and (dk, db) as views of SigLIP's `saved`."""
    dA, dT, dR, scalars = saved.split([N * D, N * D, N, 2])
    return dA.view(N, D), dT.view(N, D), dR, scalars


def scaled_gradients(
    inputs: Tensors, saved: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SigLIP's gradients, kept for an upstream gradient of 1, times `upstream`."""
    dA, dT, dR, scalars = (part * upstream for part in split_gradients(saved, *inputs.audio.shape))
    if inputs.radius is not None:
        dR = dR[: inputs.radius.numel()].view(inputs.radius.shape).clone()
    return dA, dT, dR, scalars


def cast_like(gradients: Sequence[Tensor | None], inputs: Tensors) -> tuple[Tensor | None, ...]:
    """Gradients of audio, text, radius, scale, bias, each in its input's dtype."""
    return tuple(
        g if g is None or x is None or g.dtype is x.dtype else g.to(x.dtype)
        for g, x in zip(gradients, inputs[:5], strict=True)
    )


def in_own_dtypes(
    inputs: Tensors,
    needs: tuple[bool, ...],
    dA: Tensor | None,
    dT: Tensor | None,
    dR: Tensor | None,
    scalars: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of audio, text, radius, scale, bias, each in its own dtype and shape; or None."""
    dk, db = (scalars[n].clone() if needs[3 + n] else None for n in range(2))  # share no memory
    return tuple(
        value.to(x.dtype) if need and value is not None and x is not None else None
        for value, x, need in zip((dA, dT, dR, dk, db), inputs[:5], needs, strict=True)
    )
