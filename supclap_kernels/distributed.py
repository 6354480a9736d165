"""The loss stage by stage: over a process group, and with further negatives (further.py).

Every rank has some rows, every pair of rows is computed once.

The N x N problem is cut by rank. A block of the Gram matrix off its diagonal holds the pairs of two
ranks' rows, and one of them computes it: rank r visits r + 1, ..., r + (W - 1) / 2, and where W is
even the ranks r and r + W / 2 share theirs, half of the rows each. So every rank has the same work,
S, Q and K are multiplied out once in the whole group, and the backends' own tiles and kernels do it
(`split` of backends/call.py).

    forward    rows of the visited -> partial log-sum-exps, home -> the loss of each row
    backward   softmax statistics of the visited -> partial gradients, home -> row terms

`exchange="gather"` brings the rows of all visits at once and keeps them for backward; "ring" lets
one visit's rows travel while another is computed, in both passes: O(n D) memory. Gradients: see
collectives.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import dispatch
from .backends import statistics
from .backends.call import Call, Tensors, in_own_dtypes
from .backends.state import STATE_GEOMETRY
from .checks import is_lazy, written_out
from .collectives import LEARNING, Mail, agree, describe, described, everybodys, learning
from .further import Further, FurtherPass, further_of, refuse_misfits_of
from .negatives import Negatives
from .ops import for_autograd, refuse_misfits, refuse_tangents, without_autograd
from .options import Options
from .plan import Plan, Visit, count

Memory = dict[tuple[str, int, int], Tensor]
"""What forward leaves for backward: ("state", 0, 0), ("rows", step, n), ("kept", step, 0)."""


class Pass:
    """Forward or backward of a plan on this rank. What travels has its rows first."""

    def __init__(
        self, plan: Plan, inputs: Tensors, further: Further, memory: Memory | None = None
    ) -> None:
        self.plan, self.inputs, self.memory = plan, inputs, memory or {}
        self.backend = plan.backend
        # Sums: what N divides is not known to a visit.
        within = plan.options._replace(reduction="none" if plan.per_row else "sum")
        self.own: Call = self.backend.call(inputs, within, self.memory.get(("state", 0, 0)))
        # Normalised once: where gaps are tiny, the roundings of a normalised row are its gap.
        self.rows, self.visiting = inputs, within._replace(normalize=False)
        if plan.options.normalize:
            text, audio = self.own.normalized()
            self.rows = inputs._replace(text=text, audio=audio)
        self.ahead = 1 if plan.ring else len(plan.steps)
        self.posted = {step: self.post_rows(step) for step in plan.steps[: self.ahead]}
        self.budget = plan.options.workspace
        self.further = FurtherPass(self.own, further, within, backward=memory is not None)
        self.negatives = torch.zeros(2, dtype=torch.float64, device=inputs.audio.device)

    # What travels.
    def lend(self, step: int, tensors: list[Tensor]) -> tuple[Mail, list[Tensor]]:
        """Own rows of `tensors` (n, ...) to the visitor of a step; the visited's arrive."""
        here, guest, there = self.plan.partners(step)
        mail = Mail(self.plan.group)
        for x in tensors:
            mail.send(guest, x[there.theirs])
        arriving = [mail.receive(here.rank, (count(here.theirs), *x.shape[1:]), x) for x in tensors]
        mail.post()
        return mail, arriving

    def bring(self, step: int, parts: list[Tensor], like: list[Tensor]) -> tuple[Mail, "Arrived"]:
        """Results for the visited's rows home; those for own rows of `like` (n, ...) arrive."""
        here, guest, there = self.plan.partners(step)
        mail = Mail(self.plan.group)
        for x in parts:
            mail.send(here.rank, x)
        arriving = [mail.receive(guest, (count(there.theirs), *x.shape[1:]), x) for x in like]
        mail.post()
        return mail, Arrived(there.theirs, arriving)

    def post_rows(self, step: int) -> tuple[Mail, list[Tensor]]:
        """Lets the rows of a step's visits travel, unless forward kept them."""
        kept = [x for (name, at, _), x in self.memory.items() if (name, at) == ("rows", step)]
        if kept:
            return Mail(self.plan.group), kept
        every = (*self.rows[:2], per_row(self.rows.radius), *self.rows[5:])
        return self.lend(step, [x for x in every if x is not None])

    def call_for(self, visit: Visit, theirs: list[Tensor]) -> Call:
        """Own rows of a visit, then those of the visited."""
        arrived = iter(theirs)
        join = lambda x: None if x is None else torch.cat((x[visit.own], next(arrived)))  # noqa: E731
        rows = self.rows
        audio, text = join(rows.audio), join(rows.text)
        assert audio is not None and text is not None
        radius = rows.radius if per_row(rows.radius) is None else join(rows.radius)
        inputs = rows._replace(
            audio=audio, text=text, radius=radius, ids=join(rows.ids), weight=join(rows.weight)
        )
        return self.backend.call(inputs, self.visiting, split=count(visit.own))

    def tour(
        self,
        compute: Callable[[int, Visit, Call], list[Tensor]],
        add: Callable[[slice, list[Tensor]], None],
        like: list[Tensor],
    ) -> None:
        """All visits. compute(step, visit, call) gives partial results of the call's rows; add(own
        rows, results) takes them in. Rows of the next visit (gather: of all) and results of the
        last one travel while one is computed."""
        mail, arrived = Mail(self.plan.group), Arrived(slice(0, 0), [])
        for step in self.plan.steps:
            if step + self.ahead in self.plan.steps:
                self.posted[step + self.ahead] = self.post_rows(step + self.ahead)
            travel, rows = self.posted.pop(step)
            travel.wait()
            here = self.plan.partners(step)[0]
            results: list[Tensor] = []
            if not self.plan.ring and any(self.plan.needs):
                self.memory |= {("rows", step, n): x for n, x in enumerate(rows)}
            if count(here.theirs):
                call = self.call_for(here, rows)
                partial, split = compute(step, here, call), call.split
                add(here.own, [x[:split] for x in partial])
                results = [x[split:] for x in partial]
            mail.wait()
            add(*arrived)
            mail, arrived = self.bring(step, results, like)
        mail.wait()
        add(*arrived)

    # Forward.
    def kept(self, step: int, call: Call) -> Tensor | None:
        """Room for a call's logits, to be kept for backward if the workspace allows."""
        if call.fused or (self.plan.ring and step > 0):
            return None
        return self.room(("kept", step, 0), call.layout.panel_elements)

    def room(self, name: tuple[str, int, int], elements: int) -> Tensor | None:
        """A part of the workspace that stays until backward, if there is one and it is left."""
        size = elements * self.own.state.element_size()
        if not any(self.plan.needs) or size > self.budget:
            return None
        self.budget -= size
        self.memory[name] = self.own.new_empty(elements)
        return self.memory[name]

    def forward(self) -> tuple[Tensor, Tensor]:
        """The loss, the same on every rank (or of this rank's rows), and the values of SVRStats."""
        own, plan = self.own, self.plan
        own.sweep_statistics(self.kept(0, own))
        self.tour(self.visit_statistics, self.merge, [rows_first(own.log_sums)])
        self.further.statistics(lambda n, elements: self.room(("further", n, 0), elements))
        loss, terms = own.finish_statistics()
        self.memory["state", 0, 0] = own.state
        stats = loss.new_empty(0)
        if terms is not None:
            values = statistics.row_values(self.inputs.radius, self.inputs.weight, terms, own.state)
            negatives = self.negatives + own.similarity() + self.further.similarity()
            total = plan.add_up(torch.cat((values, negatives)))
            stats = statistics.means(total[:-2], sum(plan.sizes), total[-2:]).to(loss.dtype)
        if plan.per_row:
            return loss, stats
        total = plan.add_up(loss.double() if loss.device.type == "cpu" else loss)
        return (total * plan.row_scale).to(loss.dtype), stats

    def visit_statistics(self, step: int, visit: Visit, call: Call) -> list[Tensor]:
        call.sweep_statistics(self.kept(step, call))
        if self.plan.options.stats:
            sides = slice(0, call.split), slice(call.split, len(call.T))
            self.negatives += statistics.negatives_between(call.T, call.A, call.inputs.ids, *sides)
        return [rows_first(call.log_sums)]

    def merge(self, part: slice, results: list[Tensor]) -> None:
        """Join partial (m, l) of the negatives of some own rows."""
        for log_sums in results:
            m, l = self.own.log_sums[..., part]
            m_new, l_new = log_sums.movedim(0, -1)
            if self.plan.options.infonce:
                top = torch.maximum(m, m_new)
                l.mul_(self.own.exponential(m - top))
                l.add_(l_new * self.own.exponential(m_new - top))
                m.copy_(top)
            else:
                torch.maximum(m, m_new, out=m)
                l.add_(l_new)

    # Backward.
    def backward(
        self, upstream: Tensor
    ) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor], list[Tensor | None]]:
        """dA, dT, dR and (dk, db), as `in_own_dtypes` takes them; those of the negatives."""
        own, plan = self.own, self.plan
        lent_rows = [own.state[:STATE_GEOMETRY].t()]
        if plan.per_row:
            lent_rows.append(upstream)
        else:
            upstream = plan.add_up(upstream.to(own.state.dtype, copy=True)) * plan.row_scale
        own.start_gradients(upstream)
        towers = own.accumulators(plan.needs)
        own.sweep_gradients(*towers, self.memory.get(("kept", 0, 0)))
        lent = {step: self.lend(step, lent_rows) for step in plan.steps}

        def visit_gradients(step: int, visit: Visit, call: Call) -> list[Tensor]:
            mail, arrived = lent[step]
            mail.wait()
            both = [torch.cat((x[visit.own], y)) for x, y in zip(lent_rows, arrived, strict=True)]
            call.state[:STATE_GEOMETRY] = both[0].t()
            call.start_gradients(both[1] if plan.per_row else upstream)
            sums = call.accumulators(plan.needs)
            call.sweep_gradients(*sums, self.memory.get(("kept", step, 0)))
            every = results_of(call, sums)
            return every if call.unit is None else [x * call.unit for x in every]

        def add(part: slice, results: list[Tensor]) -> None:
            for total, x in zip(results_of(own, towers), results, strict=False):
                total[part] += x if own.unit is None else x / own.unit

        self.tour(visit_gradients, add, results_of(own, towers))
        for mail, _ in lent.values():
            mail.wait()
        beyond, of_radius = self.further.gradients(
            towers, plan.needs, lambda n: self.memory.get(("further", n, 0))
        )
        dA, dT, dR, scalars = own.finish_gradients(*towers)
        if dR is not None and of_radius is not None:
            dR = dR + (of_radius if dR.ndim else of_radius.sum())
        if dR is not None and not dR.ndim:
            dR = plan.mean(dR)
        return (dA, dT, dR, plan.mean(scalars)), beyond


class Arrived(NamedTuple):
    """Partial results (m, ...) of some rows."""

    rows: slice
    results: list[Tensor]


def rows_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0)


def per_row(x: Tensor | None) -> Tensor | None:
    return x if x is not None and x.ndim else None


def results_of(call: Call, towers: tuple[Tensor | None, Tensor | None]) -> list[Tensor]:
    """Sums over pairs (N, ROW_SUMS), and sums of products (N, D) of the towers that are trained."""
    return [rows_first(call.sums), *(x for x in towers if x is not None)]


class StagedFunction(torch.autograd.Function):
    """loss, stats = apply(*inputs, *further, plan), in eager mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.plan = arguments
        outputs = without_autograd(tensors[0], staged_forward, ctx.plan, *split(tensors))
        loss, stats, memory = outputs
        ctx.names = list(memory)
        ctx.save_for_backward(*tensors, *memory.values())
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if is_lazy(upstream):
            upstream = written_out(upstream)
        # Read once: activation checkpointing unpacks the saved tensors a single time.
        saved, count = ctx.saved_tensors, len(Tensors._fields) + len(Further._fields)
        inputs, further = split(saved[:count])
        if not is_plain(upstream):
            raise RuntimeError(
                "negatives= and group= take one upstream gradient at a time; use "
                "backend='reference'"
            )
        refuse_misfits(inputs)
        refuse_misfits_of(further, inputs)
        memory = dict(zip(ctx.names, saved[count:], strict=True))
        call = (ctx.plan, inputs, further, memory, upstream)
        gradients = without_autograd(upstream, staged_backward, *call)
        places = (*range(5), *(len(inputs) + n for n in range(2)))
        needs = tuple(ctx.needs_input_grad[place] for place in places)
        sources = (*inputs[:5], *further[:2])
        found = for_autograd(gradients, needs, upstream, sources)
        every: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, gradient in zip(places, found, strict=True):
            every[place] = gradient
        return tuple(every)


def split(tensors: Sequence[Any]) -> tuple[Tensors, Further]:
    count = len(Tensors._fields)
    return Tensors(*tensors[:count]), Further(*tensors[count:])


def staged_forward(plan: Plan, inputs: Tensors, further: Further) -> tuple[Tensor, Tensor, Memory]:
    work = Pass(plan, inputs, further)
    return *work.forward(), work.memory


def staged_backward(
    plan: Plan, inputs: Tensors, further: Further, memory: Memory, upstream: Tensor
) -> tuple[Tensor | None, ...]:
    gradients, beyond = Pass(plan, inputs, further, memory).backward(upstream)
    return *in_own_dtypes(inputs, plan.needs[:5], *gradients), *beyond


@torch._disable_dynamo
def staged_loss(
    inputs: Tensors, options: Options, group: Any, exchange: str, negatives: Negatives | None
) -> tuple[Tensor, Tensor]:
    """The loss over a process group of several ranks, after all of them agreed on the call, or of
    one process (None), with further negatives or without."""
    refuse_what_is_not_eager(inputs, negatives)
    way = dispatch.staged_way(inputs, options)
    if not dispatch.is_trusted(way, inputs.audio, inputs.radius is not None, options):
        raise RuntimeError(f"{way} failed its self-check; use backend='reference'")
    if group is not None:
        call = describe(*inputs[:3], *inputs[5:], **options._asdict()) | described(negatives)
        call |= {
            "backend": way,
            "exchange": exchange,
            "bias": inputs.bias is not None,
            **towers_that_learn(inputs),
            **learning(negatives),
        }
        free = ("pairs", "workspace", "audio", "text", *LEARNING)
        of_ranks = agree(group, call, free)
        negatives = everybodys(negatives, group, of_ranks)
        sizes = tuple(rank["pairs"] for rank in of_ranks)
    else:
        of_ranks, sizes = [towers_that_learn(inputs)], (len(inputs.audio),)
    further = further_of(negatives, options.normalize)
    recording = torch.is_grad_enabled()
    every = (*inputs[:5], *further[:2])
    needs = [recording and x is not None and x.requires_grad for x in every]
    for n, name in enumerate(("audio", "text")):  # what one rank needs, all help with
        needs[n] = any(rank[name] for rank in of_ranks)
    backend = dispatch.implementation(way)
    plan = Plan(options, group, exchange == "ring", sizes, tuple(needs), backend)
    return StagedFunction.apply(*inputs, *further, plan)


def refuse_what_is_not_eager(inputs: Tensors, negatives: Negatives | None) -> None:
    """Raises where something other than eager mode looks at the tensors of a call."""
    every = [x for x in (*inputs, *(negatives or ())) if x is not None]
    if forward_ad._current_level >= 0:
        refuse_tangents(inputs)
    if torch._C._are_functorch_transforms_active() or not all(map(is_plain, every)):
        raise RuntimeError(
            "negatives= and group= take plain tensors in eager mode only; use backend='reference'"
        )


def is_plain(x: Tensor) -> bool:
    known = type(x) is Tensor or type(x) is nn.Parameter
    return known and not torch._C._functorch.is_legacy_batchedtensor(x)


def towers_that_learn(inputs: Tensors) -> dict[str, int]:
    recording = torch.is_grad_enabled()
    return {
        name: recording and x.requires_grad
        for name, x in (("audio", inputs.audio), ("text", inputs.text))
    }
