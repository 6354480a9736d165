"""What a backend is: a `Call`, the stages of one pass, and their order in forward and backward."""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..options import Options
from . import contract
from .contract import Inputs, split_gradients
from .panel import Layout, kept_panels

Towers = tuple[Tensor | None, Tensor | None]
"""Of audio and of text; None where a tower is frozen."""


class Call(Protocol):
    """One pass over some rows, text T and audio A, stage by stage.

        sweep_statistics -> finish_statistics        the loss
        start_gradients -> sweep_gradients -> finish_gradients

    `split` > 0: only pairs of a row before it with one from it on, and what they add to sums over
    pairs; the rows' own terms are another call's (distributed.py).
    """

    inputs: Inputs
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
        """(SUMS, N): sums over pairs for each row, so far; after start_gradients."""

    def normalized(self) -> tuple[Tensor, Tensor]:
        """text, audio (N, D) as the products see them, for another call."""

    def new_empty(self, *shape: int) -> Tensor:
        """In the accumulator's dtype."""

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


class Backend:
    """What dispatch calls."""

    def call(
        self, inputs: Inputs, options: Options, state: Tensor | None = None, split: int = 0
    ) -> Call:
        """`state`: of an earlier call with these rows."""
        raise NotImplementedError

    def saved_elements(
        self, N: Any, D: int, dtype: torch.dtype, has_radius: bool, options: Options, keep: bool
    ) -> Any:
        """Length of the buffer that forward leaves for backward; N may be symbolic."""
        raise NotImplementedError

    def memory(self, N: int, D: int, dtype: torch.dtype, has_radius: bool, options: Options) -> int:
        """Bytes at the peak of forward and backward, beyond the inputs and the returned
        gradients."""
        raise NotImplementedError

    def forward(
        self, inputs: Inputs, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """loss (or rows of it), the values of SVRStats (or None), state, and `saved`.

        `needs` says which of audio, text, radius, scale, bias will want a gradient.
        """
        call, has_radius, keep = self.call(inputs, options), inputs.radius is not None, any(needs)
        N, D = inputs.audio.shape
        size = self.saved_elements(N, D, inputs.audio.dtype, has_radius, options, keep)
        saved = call.new_empty(size)
        if keep and options.gradient_in_forward:
            dA, dT, dR, scalars = split_gradients(saved.zero_(), N, D)
            out = (dA if needs[0] else None, dT if needs[1] else None)
            call.start_gradients(None)
            sums = call.accumulators(needs, out)
            call.sweep_gradients(*sums, None, with_statistics=True)
            *_, dR_given, dk_db = call.finish_gradients(*sums, out)
            scalars.copy_(dk_db)
            if dR_given is not None:
                dR[: dR_given.numel()].copy_(dR_given)
        else:
            kept = kept_panels(saved)
            end = 0 if kept is None else call.layout.panel_elements
            saved[end:].zero_()  # no output is undefined
            call.sweep_statistics(kept)
        loss, terms = call.finish_statistics()
        stats = None
        if terms is not None:
            values = contract.row_values(inputs, terms, call.state)
            stats = contract.statistics(values, N, call.similarity()).to(loss.dtype)
        return loss, stats, call.state, saved

    def backward(
        self,
        inputs: Inputs,
        options: Options,
        needs: tuple[bool, ...],
        upstream: Tensor,
        state: Tensor,
        saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of audio, text, radius, scale, bias, each in its own dtype, or None."""
        if options.gradient_in_forward:
            gradients = contract.reduced_gradients(inputs, saved, upstream)
            return contract.returned(inputs, needs, *gradients)
        call = self.call(inputs, options, state)
        call.start_gradients(upstream)
        sums = call.accumulators(needs)
        call.sweep_gradients(*sums, kept_panels(saved))
        return contract.returned(inputs, needs, *call.finish_gradients(*sums))
