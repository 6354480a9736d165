"""The loss with further negatives (negatives.py): what a pass does beside its own sweeps.

Support vectors are compared with the negatives as they are, row by row, so nothing cancels and no
row is literal; PyTorch makes them of the embeddings and takes their gradient apart again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.call import Call, Tensors, Towers
from .backends.one_way import OneWay
from .backends.state import AUDIO_ROWS, OTHER_ROWS, SUPPORT_ROWS, TEXT_ROWS
from .backends.statistics import negatives_beyond
from .negatives import Negatives
from .options import Options
from .reference import accumulator_dtype, support_vector

SUPPORTS = ("text_support", "audio_support")


class Further(NamedTuple):
    """The negatives (M, D), normalised if asked, and their ids (M,); None where there are none."""

    audio: Tensor | None = None
    text: Tensor | None = None
    audio_ids: Tensor | None = None
    text_ids: Tensor | None = None


def further_of(negatives: Negatives | None, normalize: bool) -> Further:
    """What a pass takes of negatives, with autograd."""
    if negatives is None or not normalize:
        return Further() if negatives is None else Further(*negatives)
    audio, text = (
        None if X is None else F.normalize(X.to(accumulator_dtype(X.dtype)), dim=1)
        for X in (negatives.audio, negatives.text)
    )
    return Further(audio, text, negatives.audio_ids, negatives.text_ids)


def refuse_misfits_of(further: Further, inputs: Tensors) -> None:
    """Raises where an assignment to `data` or to a storage changed negatives after forward."""
    D = inputs.audio.shape[1]
    for rows, ids in ((further.audio, further.audio_ids), (further.text, further.text_ids)):
        if rows is None:
            continue
        fits = rows.ndim == 2 and rows.shape[1] == D
        if not fits or (ids is not None and ids.shape != rows.shape[:1]):
            raise RuntimeError(f"negatives have shape {tuple(rows.shape)} beside columns {D}")
        for x in (rows, ids):
            if x is not None and x.numel() and not x.untyped_storage().nbytes():
                raise RuntimeError("negatives have no memory any more: a storage was resized")


class Part(NamedTuple):
    """Rows against columns; whose they are, by the names of the towers and of `Further`."""

    block: OneWay
    rows: str
    columns: str


class FurtherPass:
    """What negatives add to one pass of a call, between its own sweeps and its finish."""

    def __init__(
        self, call: Call, further: Further, options: Options, backward: bool = False
    ) -> None:
        self.call, self.further, self.options = call, further, options
        self.rows = {"text": call.T, "audio": call.A}
        has_radius = call.inputs.radius is not None
        compared = (
            options.support(has_radius) and further.audio is not None,
            options.mirror(has_radius) and further.text is not None,
        )
        self.supports = [name for name, needed in zip(SUPPORTS, compared, strict=True) if needed]
        self.leaves: list[Tensor] = []
        self.vectors: dict[str, Tensor] = {}
        if self.supports:
            with torch.set_grad_enabled(backward):
                self.leaves = [x.detach().requires_grad_(backward) for x in self.sources()]
                T, A, R = self.leaves
                partners = dict(zip(SUPPORTS, ((T, A), (A, T)), strict=True))
                self.vectors = {
                    name: support_vector(*partners[name], R, options.renormalize)
                    for name in self.supports
                }
            self.rows |= {name: call.columns(x.detach()) for name, x in self.vectors.items()}
        self.columns = {
            side: call.columns(Y)
            for side, Y in (("audio", further.audio), ("text", further.text))
            if Y is not None
        }
        self.parts: list[Part] = []
        self.against("audio", (TEXT_ROWS, "text"), (SUPPORT_ROWS, "text_support"))
        self.against("text", (AUDIO_ROWS, "audio"), (OTHER_ROWS, "audio_support"))
        if options.shared(has_radius):
            self.against("text", (OTHER_ROWS, "audio"))

    def sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """What support vectors are made of: T and A (N, D), R (N,)."""
        call, radius = self.call, self.call.inputs.radius
        assert radius is not None
        N, D = call.inputs.audio.shape
        T, A = (X[:, :D].to(call.state.dtype) for X in (call.T, call.A))
        return T, A, radius.to(call.state.dtype).expand(N)

    def against(self, side: str, *directions: tuple[int, str]) -> None:
        """Adds rows, those that there are, that are compared with the columns of a side."""
        if side not in self.columns:
            return
        code = self.call.column_code(getattr(self.further, f"{side}_ids"))
        tiling, workspace = self.call.layout.tiling, self.options.workspace
        for direction, name in directions:
            if name in self.rows:
                X, Y = self.rows[name], self.columns[side]
                block = OneWay(self.call, direction, X, Y, code, tiling, workspace)
                self.parts.append(Part(block, name, side))

    def statistics(self, keep: Callable[[int, int], Tensor | None]) -> None:
        """Adds the negatives to the rows' log-sum-exps. `keep`: room for so many products of a
        part, or None."""
        like = self.call.new_empty(0)
        for n, part in enumerate(self.parts):
            kept = keep(n, part.block.elements)
            if self.options.infonce or part.block.direction != AUDIO_ROWS:
                part.block.statistics(kept, like)
                continue
            # SigLIP has the audios' rows for their maximum only: what they add is the texts'.
            l = self.call.log_sums[1]
            l[AUDIO_ROWS] = 0.0
            part.block.statistics(kept, like)
            l[TEXT_ROWS] += l[AUDIO_ROWS]

    def weighted_as(self, part: Part) -> int:
        """The direction whose weights a part has: SigLIP's audios have no rows of their own."""
        alone = not self.options.infonce and part.block.direction == AUDIO_ROWS
        return TEXT_ROWS if alone else part.block.direction

    def similarity(self) -> Tensor:
        """(2,) float64: sum and count of <t, a> over these negatives, for the statistics."""
        total = torch.zeros(2, dtype=torch.float64, device=self.call.T.device)
        ids = self.call.inputs.ids
        for side, X in (("audio", self.call.T), ("text", self.call.A)):
            if side in self.columns:
                theirs = getattr(self.further, f"{side}_ids")
                total += negatives_beyond(X, self.columns[side], ids, theirs)
        return total

    def gradients(
        self, towers: Towers, needs: tuple[bool, ...], kept: Callable[[int], Tensor | None]
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Adds to the towers' accumulators, and returns the gradients of the negatives, those that
        are needed, and what the radius (N,) gets. `needs`: as of a plan."""
        like = self.call.new_empty(0)
        of_rows = {"audio": towers[0], "text": towers[1]}
        move = any(needs[:3])  # whether the support vectors' gradient is anybody's
        of_rows |= {name: zeros(self.rows[name], like) if move else None for name in self.supports}
        needed = dict(zip(("audio", "text"), needs[5:], strict=True))
        of_columns = {side: zeros(Y, like) for side, Y in self.columns.items() if needed[side]}
        for n, part in enumerate(self.parts):
            dX, dY = of_rows[part.rows], of_columns.get(part.columns)
            part.block.gradients(dX, dY, kept(n), like, self.weighted_as(part))
        found: list[Tensor | None] = [None, None]
        for n, side in enumerate(needed):
            if side in of_columns:
                given = getattr(self.further, side)
                found[n] = self.call.finish_columns(of_columns[side]).to(given.dtype)
        return found, self.through_support_vectors(towers, of_rows)

    def through_support_vectors(
        self, towers: Towers, of_rows: dict[str, Tensor | None]
    ) -> Tensor | None:
        """Hands the support vectors' gradient on to the towers' accumulators; returns the radius'
        own."""
        if not self.supports or of_rows[self.supports[0]] is None:
            return None
        D = self.leaves[0].shape[1]
        totals = [of_rows[name] for name in self.supports]
        upstream = [x[:, :D] for x in totals if x is not None]
        outputs = [self.vectors[name] for name in self.supports]
        dT, dA, dR = torch.autograd.grad(outputs, self.leaves, upstream)
        for total, gradient in zip(towers, (dA, dT), strict=True):
            if total is not None:
                total[:, :D] += gradient
        return self.call.finish_columns(dR)


def zeros(X: Tensor, like: Tensor) -> Tensor:
    """An accumulator of sums of products with rows like X."""
    return like.new_zeros(X.shape)
