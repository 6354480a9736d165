"""The loss over a process group: every rank has some rows, every pair of rows is computed once.

The N x N problem is cut by rank. A block of the Gram matrix off its diagonal holds the pairs of two
ranks' rows, and one of them computes it: rank r visits r + 1, ..., r + (W - 1) / 2, and where W is
even the ranks r and r + W / 2 share theirs, half of the rows each. So every rank has the same work,
S, Q and K are multiplied out once in the whole group, and the backends' own tiles and kernels do it
(`split` in backends/panel.py).

    forward    rows of the visited -> partial log-sum-exps, home -> the loss of each row
    backward   softmax statistics of the visited -> partial gradients, home -> row terms

`exchange="gather"` brings the rows of all visits at once and keeps them for backward; "ring" lets
one visit's rows travel while another is computed, in both passes: O(n D) memory. Gradients: see
collectives.py.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch
from .backends.contract import GAP, POSITIVE, STATISTICS, Inputs
from .collectives import Mail, mean_over_ranks
from .options import Options


class Visit(NamedTuple):
    """Rows `own` of a rank with rows `theirs` of another."""

    rank: int
    own: slice
    theirs: slice

    @property
    def empty(self) -> bool:
        return self.own.start == self.own.stop or self.theirs.start == self.theirs.stop


def visit(rank: int, step: int, sizes: list[int]) -> Visit:
    """The visit of `rank` in a step, 1 ... W / 2."""
    other = (rank + step) % len(sizes)
    own, theirs = slice(0, sizes[rank]), slice(0, sizes[other])
    if 2 * step == len(sizes):  # both visit each other
        if rank < other:
            theirs = slice(0, sizes[other] // 2)
        else:
            own = slice(sizes[rank] // 2, sizes[rank])
    return Visit(other, own, theirs)


def rows_of(inputs: Inputs, part: slice) -> list[Tensor]:
    """What a visitor needs of some rows."""
    every = (inputs.text, inputs.audio, per_row(inputs.radius), inputs.ids, inputs.weight)
    return [x[part].contiguous() for x in every if x is not None]


def per_row(x: Tensor | None) -> Tensor | None:
    return x if x is not None and x.ndim else None


def joined(inputs: Inputs, part: slice, theirs: list[Tensor]) -> Inputs:
    """Rows `part` of the inputs, then those of `rows_of` another rank."""
    found = iter(theirs)
    join = lambda x: None if x is None else torch.cat((x[part], next(found)))  # noqa: E731
    text, audio = join(inputs.text), join(inputs.audio)
    radius = join(inputs.radius) if per_row(inputs.radius) is not None else inputs.radius
    assert text is not None and audio is not None
    return inputs._replace(
        text=text, audio=audio, radius=radius, ids=join(inputs.ids), weight=join(inputs.weight)
    )


def negatives_between(call: Any, I: slice, J: slice) -> Tensor:
    """(2,) float64: sum and count of <t, a> over the negatives between rows I and J of a call, each
    way if they differ. In O(N D): all pairs less those of equal ids."""
    total = torch.zeros(2, dtype=torch.float64, device=call.T.device)
    code = torch.arange(len(call.T), device=call.T.device)
    if call.inputs.ids is not None:
        code = torch.unique(call.inputs.ids, return_inverse=True)[1]
    for texts, audios in ((I, J),) if I == J else ((I, J), (J, I)):
        T, A = call.T[texts].double(), call.A[audios].double()
        groups = T.new_zeros(2, len(code), T.shape[1])
        groups[0].index_add_(0, code[texts], T)
        groups[1].index_add_(0, code[audios], A)
        counts = [code[part].bincount(minlength=len(code)).double() for part in (texts, audios)]
        total[0] += T.sum(0) @ A.sum(0) - (groups[0] * groups[1]).sum()
        total[1] += len(T) * len(A) - counts[0] @ counts[1]
    return total


class GroupCall:
    """One loss over a group, on one rank: forward, then backward any number of times."""

    def __init__(
        self, inputs: Inputs, options: Options, group: Any, ring: bool, sizes: list[int],
        needs: tuple[bool, ...],
    ) -> None:  # fmt: skip
        self.inputs, self.options, self.group, self.ring = inputs, options, group, ring
        self.sizes, self.needs = sizes, needs
        self.rank, self.N = dist.get_rank(group), sum(sizes)
        self.steps = range(1, len(sizes) // 2 + 1)
        # Sums: what N divides is not known to a visit.
        self.within = options._replace(reduction="none" if self.per_row else "sum")
        self.backend = dispatch.backend_for(inputs.audio, options)
        self.calls: dict[int, Any] = {}
        self.kept: dict[int, Tensor] = {}
        self.budget = options.workspace
        self.similarity = torch.zeros(2, dtype=torch.float64, device=inputs.audio.device)

    @property
    def per_row(self) -> bool:
        return self.options.reduction == "none"

    @property
    def row_scale(self) -> float:
        return 1.0 / self.N if self.options.reduction == "mean" else 1.0

    def partners(self, step: int) -> tuple[Visit, int, Visit]:
        """This rank's visit of a step; who visits this rank in it, and that visit."""
        guest = (self.rank - step) % len(self.sizes)
        return visit(self.rank, step, self.sizes), guest, visit(guest, step, self.sizes)

    # Who is there.
    def call_for(self, visit: Visit, rows: list[Tensor]) -> Any:
        inputs = joined(self.rows, visit.own, rows)
        return self.backend.call(inputs, self.visiting, split=visit.own.stop - visit.own.start)

    def post_rows(self, step: int) -> tuple[Mail, list[Tensor]]:
        """Lets the rows of a step's visits travel: those of the visited, as they will arrive."""
        mail = Mail(self.group)
        here, guest, there = self.partners(step)
        if not there.empty:
            for x in rows_of(self.rows, there.theirs):
                mail.send(guest, x)
        found = []
        if not here.empty:
            count = here.theirs.stop - here.theirs.start
            for x in rows_of(self.rows, slice(0, 0)):
                found.append(mail.receive(here.rank, (count, *x.shape[1:]), x))
        mail.post()
        return mail, found

    def visits(self) -> Iterator[tuple[int, Visit, Any]]:
        """Each step with this rank's visit and its call (None: nothing to compute), while the rows
        of the next are on their way, or of all that follow. Step 0: the own rows."""
        whole = Visit(self.rank, *(slice(0, len(self.inputs.audio)),) * 2)
        if len(self.calls) == len(self.steps):  # kept from forward
            yield 0, whole, self.own
            for step in self.steps:
                yield step, self.partners(step)[0], self.calls[step]
            return
        ahead = 1 if self.ring else len(self.steps)
        posted = {step: self.post_rows(step) for step in self.steps[:ahead]}
        yield 0, whole, self.own
        for step in self.steps:
            if step + ahead in self.steps:
                posted[step + ahead] = self.post_rows(step + ahead)
            mail, rows = posted.pop(step)
            mail.wait()
            here = self.partners(step)[0]
            call = None if here.empty else self.call_for(here, rows)
            if not self.ring and any(self.needs):
                self.calls[step] = call
            yield step, here, call

    def panels(self, step: int, call: Any) -> Tensor | None:
        """Room for a call's logits, to be kept for backward if the workspace allows."""
        if call.fused or not any(self.needs) or (self.ring and step > 0):
            return None
        elements = call.layout.panel_elements
        size = elements * call.state.element_size()
        if size > self.budget:
            return None
        self.budget -= size
        self.kept[step] = call.state.new_empty(elements)
        return self.kept[step]

    # Forward.
    def forward(self) -> tuple[Tensor, Tensor]:
        """The loss, the same on every rank (or of this rank's rows), and the values of SVRStats."""
        self.own = self.backend.call(self.inputs, self.within)
        # Normalised once: where gaps are tiny, the roundings of a normalised row are its gap.
        self.rows, self.visiting = self.inputs, self.within._replace(normalize=False)
        if self.options.normalize:
            text, audio = self.own.normalized()
            self.rows = self.inputs._replace(text=text, audio=audio)
        home: list[tuple[int, Visit, Tensor]] = []
        for step, here, call in self.visits():
            if call is None:
                continue
            call.sweep_statistics(self.panels(step, call))
            if step == 0:
                continue
            split = call.split
            if self.options.stats:
                self.similarity += negatives_between(call, slice(0, split), slice(split, None))
            self.merge(here.own, call.log_sums[..., :split])
            home.append((step, here, call.log_sums[..., split:].contiguous()))
        mail, arrived = Mail(self.group), []
        for _, here, part in home:
            mail.send(here.rank, part)
        for step in self.steps:
            _, guest, there = self.partners(step)
            if not there.empty:
                like, count = self.own.log_sums, there.theirs.stop - there.theirs.start
                shape = (*like.shape[:-1], count)
                arrived.append((there.theirs, mail.receive(guest, shape, like)))
        mail.post()
        mail.wait()
        for rows, log_sums in arrived:
            self.merge(rows, log_sums)
        loss, terms = self.own.finish_statistics()
        stats = loss.new_empty(0) if terms is None else self.statistics(terms)
        if self.per_row:
            return loss, stats
        total = loss.double() if loss.device.type == "cpu" else loss
        dist.all_reduce(total, group=self.group)
        return (total * self.row_scale).to(loss.dtype), stats

    def merge(self, part: slice, log_sums: Tensor) -> None:
        """Join partial (m, l) of the negatives of some own rows."""
        m, l = self.own.log_sums[..., part]
        m_new, l_new = log_sums
        if self.options.infonce:
            top = torch.maximum(m, m_new)
            l.mul_(self.own.exponential(m - top))
            l.add_(l_new * self.own.exponential(m_new - top))
            m.copy_(top)
        else:
            torch.maximum(m, m_new, out=m)
            l.add_(l_new)

    def statistics(self, terms: Tensor) -> Tensor:
        """(11,): the values of SVRStats, over all ranks' rows."""
        own, whole = self.own, slice(0, len(self.inputs.audio))
        given = terms[:4] if self.inputs.weight is None else terms[:4] * self.inputs.weight
        rows = own.state[STATISTICS:]
        nan = torch.full_like(rows[POSITIVE], math.nan)
        geometry = (nan, nan, nan)
        if self.inputs.radius is not None:
            R = self.inputs.radius.expand_as(nan)
            geometry = (R, rows[GAP], 1.0 - R / rows[GAP])
        every = torch.stack([*given, *(1.0 - terms[4:]), rows[POSITIVE], *geometry])
        similarity = self.similarity + negatives_between(own, whole, whole)
        total = torch.cat((every.double().sum(dim=1), similarity))
        dist.all_reduce(total, group=self.group)
        means = total[:-2] / self.N
        return torch.cat((means[:7], total[-2:-1] / total[-1:], means[7:])).to(own.state.dtype)

    # Backward.
    def exchange_statistics(self, upstream: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """For each step the softmax statistics (12, m) of the visited, and what arrives at their
        rows (m,) if that differs."""
        mail, found = Mail(self.group), {}
        state = self.own.state[:STATISTICS]
        rows = upstream if self.per_row else upstream.new_empty(0)
        for step in self.steps:
            here, guest, there = self.partners(step)
            if not there.empty:
                mail.send(guest, state[:, there.theirs])
                mail.send(guest, rows[there.theirs])
            if not here.empty:
                count = here.theirs.stop - here.theirs.start
                theirs = mail.receive(here.rank, (STATISTICS, count), state)
                found[step] = theirs, mail.receive(here.rank, (count * self.per_row,), rows)
        mail.post()
        mail.wait()
        return found

    def backward(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dA, dT, dR and (dk, db), as `contract.returned` takes them."""
        own, needs = self.own, self.needs[:2]
        if not self.per_row:
            upstream = upstream.to(own.state.dtype, copy=True)
            dist.all_reduce(upstream, group=self.group)
            upstream = upstream * self.row_scale
        own.start_gradients(upstream)
        towers = own.accumulators(needs)
        statistics = self.exchange_statistics(upstream)
        mail, arrived = Mail(self.group), Arrived(slice(0, 0), [])
        for step, here, call in self.visits():
            if step == 0:
                own.sweep_gradients(towers[1], towers[0], self.kept.get(0))
                continue
            parts: list[Tensor] = []
            if call is not None:
                parts = self.visited(step, here, call, statistics[step], upstream, towers)
            mail.wait()  # one step's partial gradients travel while the next is computed
            self.add(towers, arrived)
            mail, arrived = self.post_gradients(step, parts, towers)
        mail.wait()
        self.add(towers, arrived)
        dA, dT, dR, scalars = own.finish_gradients(*towers)
        if dR is not None and not dR.ndim:
            dR = mean_over_ranks(dR, self.group)
        return dA, dT, dR, mean_over_ranks(scalars, self.group)

    def visited(
        self, step: int, here: Visit, call: Any, statistics: tuple[Tensor, Tensor],
        upstream: Tensor, towers: list[Tensor | None],
    ) -> list[Tensor]:  # fmt: skip
        """Adds this rank's part of a visit's gradients; returns the other one's: sums, towers."""
        theirs, rows = statistics
        call.state[:STATISTICS] = torch.cat((self.own.state[:STATISTICS, here.own], theirs), dim=1)
        if self.per_row:
            upstream = torch.cat((upstream[here.own], rows))
        call.start_gradients(upstream)
        partial = call.accumulators(self.needs[:2])
        call.sweep_gradients(partial[1], partial[0], self.kept.get(step))
        every = [call.sums.t(), *(x for x in partial if x is not None)]
        if call.unit is not None:
            every = [x * call.unit for x in every]
        split = call.split
        self.add(towers, Arrived(here.own, [x[:split] for x in every]))
        return [x[split:].contiguous() for x in every]

    def post_gradients(
        self, step: int, parts: list[Tensor], towers: list[Tensor | None]
    ) -> tuple[Mail, "Arrived"]:
        here, guest, there = self.partners(step)
        mail, found = Mail(self.group), []
        for x in parts:
            mail.send(here.rank, x)
        if not there.empty:
            count = there.theirs.stop - there.theirs.start
            for like in (self.own.sums.t(), *(x for x in towers if x is not None)):
                found.append(mail.receive(guest, (count, like.shape[1]), like))
        mail.post()
        return mail, Arrived(there.theirs, found)

    def add(self, towers: list[Tensor | None], arrived: "Arrived") -> None:
        """Partial sums and gradients to those of some own rows."""
        totals = [self.own.sums.t(), *(x for x in towers if x is not None)]
        for total, x in zip(totals, arrived.parts, strict=False):
            total[arrived.rows] += x if self.own.unit is None else x / self.own.unit


class Arrived(NamedTuple):
    """Partial sums (m, SUMS) and gradients (m, D) of some rows."""

    rows: slice
    parts: list[Tensor]
