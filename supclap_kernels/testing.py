"""How a backend is judged: inputs, truth, baseline, and one acceptance rule for all of them.

    truth     the specification in float64 on the inputs as rounded to their dtype
    baseline  the dense computation under the precision contract of MATH.md, in the same dtype
    floor     2 u (1 + z) g + u t: u unit roundoff of the accumulator, z largest |logit|,
              g size of the output if nothing cancelled, t largest |truth| (its own rounding)

A result is accepted when it is finite and its error (rms, maximum, worst row) is at most 2 times
the baseline's (3 for the loss) plus the floor. A case counts only if it is informative:
max |truth| > 100 floor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradients import loss_and_gradients
from .negatives import Negatives
from .reference import accumulator_dtype, gap_and_direction, svr_loss_reference

Outputs = dict[str, Tensor]
DIFFERENTIABLE = ("audio", "text", "radius", "logit_scale", "logit_bias")
NEGATIVES = ("audio_negatives", "text_negatives")


@dataclass(frozen=True)
class Case:
    """One call of the loss. `gap` is the rough distance of the closest pairs; `spread` how far the
    rest are.
    """

    N: int = 37
    D: int = 19
    dtype: torch.dtype = torch.float32
    gap: float = 0.5
    seed: int = 0
    scale: float = 1 / 0.07
    radius: str = "scalar"
    """"none", "scalar" or "row"."""
    weighted: bool = False
    duplicates: bool = False
    """whether some pairs share an id"""
    layout: str = "contiguous"
    """"contiguous", "transposed", "offset", or "strided"."""
    negatives: tuple[int, int] = (0, 0)
    """how many further audios and texts there are; with `duplicates` they have ids, too"""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value}" for name, value in self.options.items())
        parts = [
            f"N={self.N} D={self.D} {str(self.dtype).rsplit('.', 1)[-1]}",
            f"gap={self.gap} R={self.radius}",
        ]
        parts += ["weighted"] * self.weighted + ["ids"] * self.duplicates
        parts += [f"negatives={self.negatives}"] * any(self.negatives)
        return " ".join([*parts, named, "" if self.layout == "contiguous" else self.layout]).strip()


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; `upstream` is the gradient that arrives at the loss."""

    audio: Tensor
    text: Tensor
    radius: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None
    ids: Tensor | None
    weight: Tensor | None
    upstream: Tensor
    audio_negatives: Tensor | None = None
    text_negatives: Tensor | None = None
    audio_ids: Tensor | None = None
    text_ids: Tensor | None = None

    def differentiable(self) -> dict[str, Tensor]:
        names = (*DIFFERENTIABLE, *NEGATIVES)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def negatives(self, leaves: dict[str, Tensor]) -> dict[str, Negatives]:
        """The argument of this name, made of `leaves` where these have it; nothing without any."""
        audio, text = (leaves.get(name, getattr(self, name)) for name in NEGATIVES)
        if audio is None and text is None:
            return {}
        return {"negatives": Negatives(audio, text, self.audio_ids, self.text_ids)}

    def to(self, dtype: torch.dtype) -> "Inputs":
        changed = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if value is not None and value.is_floating_point()
        }
        return replace(self, **changed)


def laid_out(X: Tensor, layout: str) -> Tensor:
    """The same values in other memory: not contiguous, not aligned."""
    if layout == "transposed":
        return X.t().contiguous().t()
    if layout == "offset":
        return torch.cat((X.new_zeros(1), X.flatten()))[1:].view(X.shape)
    if layout == "strided":
        return torch.stack((X, X), dim=2).flatten(1)[:, ::2]
    return X.contiguous()


def equal_ids(N: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, max(1, N // 2), (N,), generator=generator, device="cpu")


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Embeddings in a cone, as trained encoders give them: the softmax is neither flat nor
    saturated.
    """
    generator = torch.Generator("cpu").manual_seed(case.seed)
    normal: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    single: dict[str, Any] = {"dtype": accumulator_dtype(case.dtype), "device": "cpu"}
    N, D = case.N, case.D
    cone = F.normalize(torch.randn(1, D, **normal), dim=1)
    T = F.normalize(1.5 * cone + F.normalize(torch.randn(N, D, **normal), dim=1), dim=1)
    # Every other pair has the gap asked for, the rest a large one.
    width = torch.full((N, 1), max(case.gap, 0.6), dtype=torch.float32, device="cpu")
    width[::2] = case.gap
    A = F.normalize(T + width * F.normalize(torch.randn(N, D, **normal), dim=1), dim=1)
    if case.options.get("normalize"):
        T, A = 1.7 * T, 0.6 * A
    siglip = case.options.get("objective") == "siglip"
    radius = None
    if case.radius == "scalar":
        radius = torch.tensor(0.15, **single)
    if case.radius == "row":
        radius = (0.2 + 0.4 * torch.randn(N, **normal)).to(**single)
    per_row = case.options.get("reduction") == "none"
    upstream = torch.rand(N, **normal) + 0.5 if per_row else torch.tensor(1.3, **single)
    inputs = Inputs(
        laid_out(A.to(case.dtype), case.layout),
        laid_out(T.to(case.dtype), case.layout),
        radius,
        torch.tensor(case.scale, **single),
        torch.tensor(-8.0, **single) if siglip else None,
        equal_ids(N, generator) if case.duplicates else None,
        (torch.rand(N, **normal) + 0.5).to(**single) if case.weighted else None,
        upstream.to(**single),
    )
    for side, M in zip(("audio", "text"), case.negatives, strict=True):
        if not M:
            continue
        X = F.normalize(1.5 * cone + F.normalize(torch.randn(M, D, **normal), dim=1), dim=1)
        X = 1.3 * X if case.options.get("normalize") else X
        more = {f"{side}_negatives": laid_out(X.to(case.dtype), case.layout)}
        if case.duplicates:
            most = max(1, N // 2)
            more[f"{side}_ids"] = torch.randint(0, most, (M,), generator=generator, device="cpu")
        inputs = replace(inputs, **more)
    moved = {name: value.to(device) for name, value in vars(inputs).items() if value is not None}
    return replace(inputs, **moved)


def evaluate(loss_function: Callable[..., Tensor], inputs: Inputs, **options: Any) -> Outputs:
    """Loss and gradients of `loss_function` (the signature of `fused_svr_loss`) by autograd."""
    leaves = {
        name: value.detach().requires_grad_() for name, value in inputs.differentiable().items()
    }
    arguments = (leaves.get(name) for name in DIFFERENTIABLE)
    options |= inputs.negatives(leaves)
    loss = loss_function(*arguments, ids=inputs.ids, weight=inputs.weight, **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()), inputs.upstream.to(loss.dtype))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def truth(case: Case, inputs: Inputs) -> Outputs:
    """The specification in float64."""
    return evaluate(svr_loss_reference, inputs.to(torch.float64), **case.options)


def baseline(case: Case, inputs: Inputs, rounded_weights: bool = False) -> Outputs:
    """Eager PyTorch in the accumulator's dtype, gradients cast to the input's.

    float64: the dense closed form, since eager PyTorch is the truth there. `rounded_weights`: the
        dense closed form with
    weights rounded to the input's dtype, as a bfloat16 product rounds them.
    """
    wide = inputs.to(accumulator_dtype(case.dtype))
    if not rounded_weights and case.dtype != torch.float64:
        result = evaluate(svr_loss_reference, wide, **case.options)
    else:
        arguments = (getattr(wide, name) for name in DIFFERENTIABLE)
        loss, g = loss_and_gradients(
            *arguments,
            ids=inputs.ids,
            weight=wide.weight,
            upstream=wide.upstream,
            weights_dtype=case.dtype if rounded_weights else None,
            **case.options,
            **wide.negatives({}),
        )
        result = {"loss": loss, **g._asdict()}
        if inputs.radius is not None and inputs.radius.ndim == 0:
            result["radius"] = g.radius.sum()
    for name, value in inputs.differentiable().items():
        result[name] = result[name].to(value.dtype)
    return {name: result[name] for name in ("loss", *inputs.differentiable())}


def floors(case: Case, inputs: Inputs, exact: Outputs) -> dict[str, float]:
    """2 u (1 + z) g + u t for each output."""
    wide = inputs.to(torch.float64)
    T, A = wide.text, wide.audio
    if case.options.get("normalize"):
        T, A = F.normalize(T, dim=1), F.normalize(A, dim=1)
    k, N = float(wide.logit_scale.abs()), case.N
    z = k * float(T.norm(dim=1).max() * A.norm(dim=1).max())
    z += 0.0 if inputs.logit_bias is None else float(inputs.logit_bias.abs())
    mean = case.options.get("reduction", "mean") == "mean"
    omega = wide.upstream if wide.weight is None else wide.upstream * wide.weight
    omega = omega.expand(N) / (N if mean else 1)
    terms = 2.0 + (case.radius != "none") * 2.0 * abs(case.options.get("alpha", 1.0))
    element = float(torch.cat((T, A)).square().mean().sqrt())
    if case.options.get("objective") == "siglip":  # the slopes of a row do not add up to one
        assert wide.logit_bias is not None
        mass = (wide.logit_scale * T @ A.t() + wide.logit_bias).sigmoid().sum(dim=1)
        terms *= max(1.0, float(mass.max()))
    row, total = terms * float(omega.abs().max()), terms * float(omega.abs().sum())
    size = {
        "audio": k * row * element,
        "text": k * row * element,
        "audio_negatives": k * row * element,
        "text_negatives": k * row * element,
        "radius": k * (row if case.radius == "row" else total),
        "logit_scale": total,
        "logit_bias": total,
        "loss": total if case.options.get("reduction") != "none" else row,
    }
    u = torch.finfo(accumulator_dtype(case.dtype)).eps / 2
    units = dict.fromkeys(exact, u)
    if case.dtype == torch.float64 and wide.radius is not None:
        # Truth and baseline are one computation here, so nothing else carries the rounding of
        # a - t: c = R / r times it is in the logits, and 1 / r times that in the gradients.
        r, _ = gap_and_direction(T, A)
        c, near = (wide.radius / r).abs(), 1 + T.norm(dim=1) / r
        units = dict.fromkeys(exact, u * (1 + float((c * near).max())))
        units["loss"] = u * (1 + float(c.max()))
    largest = {name: float(value.abs().max()) for name, value in exact.items()}
    return {name: units[name] * (2 * (1 + z) * size[name] + largest[name]) for name in exact}


def errors(value: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """rms, maximum and worst row (rms of a row) of value - exact."""
    difference = (value.double() - exact.double()).reshape(len(value) if value.ndim else 1, -1)
    square = difference.square()
    return (
        float(square.mean().sqrt()),
        float(difference.abs().max()),
        float(square.mean(dim=1).max().sqrt()),
    )


def violations(
    result: Outputs, exact: Outputs, base: Outputs, floor: dict[str, float]
) -> list[str]:
    """Why the result is not accepted; empty if it is."""
    reasons = []
    for name, wanted in exact.items():
        value = result[name]
        if value.shape != wanted.shape or value.dtype != base[name].dtype:
            reasons.append(
                f"{name}: {value.dtype} {tuple(value.shape)}, "
                f"wanted {base[name].dtype} {tuple(wanted.shape)}"
            )
            continue
        if not bool(torch.isfinite(value).all()):
            reasons.append(f"{name}: not finite")
            continue
        factor = 3.0 if name == "loss" else 2.0
        for measure, error, allowed in zip(
            ("rms", "maximum", "worst row"),
            errors(value, wanted),
            errors(base[name], wanted),
            strict=True,
        ):
            bound = factor * allowed + floor[name]
            if not error <= bound:
                reasons.append(
                    f"{name}: {measure} error {error:.3g} above {bound:.3g} "
                    f"(baseline {allowed:.3g}, floor {floor[name]:.3g}, "
                    f"largest value {float(wanted.abs().max()):.3g})"
                )
    return reasons


def uninformative(exact: Outputs, floor: dict[str, float]) -> list[str]:
    """Outputs whose true values are so small that the floor would accept anything."""
    return [
        name for name, value in exact.items() if not float(value.abs().max()) > 100 * floor[name]
    ]


def check(
    loss_function: Callable[..., Tensor],
    case: Case,
    device: str = "cpu",
    rounded_weights: bool = False,
    **options: Any,
) -> None:
    """Raise AssertionError unless `loss_function(..., **case.options, **options)` passes the rule
    on this case.
    """
    inputs = make_inputs(case, device)
    exact = truth(case, inputs)
    floor = floors(case, inputs, exact)
    dull = uninformative(exact, floor)
    assert not dull, f"{case}: not informative for {', '.join(dull)}"
    result = evaluate(loss_function, inputs, **case.options, **options)
    reasons = violations(result, exact, baseline(case, inputs, rounded_weights), floor)
    assert not reasons, "\n  ".join([f"{case}:", *reasons])


def _changed(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def mutate(gradient: Tensor) -> Tensor:
        result = gradient.clone()
        change(result)
        return result

    return mutate


def _negate_largest(gradient: Tensor) -> None:
    flat = gradient.view(-1)
    flat[flat.abs().argmax()] *= -1


MUTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all zero": torch.zeros_like,
    "sign": torch.neg,
    "times 1.05": lambda gradient: gradient * 1.05,
    "halved": lambda gradient: gradient * 0.5,
    "last tile missing": _changed(lambda gradient: gradient[-16:].zero_()),
    "last 16 columns missing": _changed(lambda gradient: gradient[:, -16:].zero_()),
    "one wrong row": _changed(lambda gradient: gradient[len(gradient) // 2].mul_(1.5)),
    "label off by one": lambda gradient: gradient.roll(1, dims=0),
    "one wrong element": _changed(_negate_largest),
    "one NaN": _changed(lambda gradient: gradient.view(-1)[-1:].fill_(float("nan"))),
}
"""Wrong versions of an (N, D) gradient, each of which the rule must reject."""
