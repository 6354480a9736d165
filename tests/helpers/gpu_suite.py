"""What the GPU backends' kernels must satisfy on CPU tensors, wherever they run there: in Triton's
interpreter (tests/interpreter), or compiled for the host (tests/shim)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import core, covering
from torch import Tensor

from supclap_kernels import fused_svr_loss
from supclap_kernels.backends import device_call
from supclap_kernels.testing import (
    Case,
    Inputs,
    Outputs,
    baseline,
    evaluate,
    floors,
    make_inputs,
    truth,
    uninformative,
    violations,
)

BORDER = 64
MODES = [
    {"objective": "infonce", "radius": "none"},
    {"objective": "infonce", "bilateral": "none"},
    {"objective": "infonce", "bilateral": "shared"},
    {"objective": "infonce", "bilateral": "mirror"},
    {"objective": "siglip", "radius": "none"},
    {"objective": "siglip", "bilateral": "none"},
    {"objective": "siglip", "bilateral": "mirror"},
]
OPTIONS: dict[str, tuple[Any, ...]] = {
    "reduction": ("mean", "sum", "none"),
    "renormalize": (False, True),
    "normalize": (False, True),
    "alpha": (1.0, 0.3),
    "beta": (0.0, 0.2),
    "workspace": (0, 2**28),
}
FIELDS: dict[str, tuple[Any, ...]] = {
    "N": (1, 2, 33, 65, 100, 129),
    "D": (3, 16, 48, 64, 100),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "gap": (0.3, 0.02, 0.0),
    "weighted": (False, True),
    "duplicates": (False, True),
    "layout": ("contiguous", "transposed", "offset", "strided"),
}


class Guard:
    """Tensors inside larger buffers of NaN."""

    def __init__(self) -> None:
        self.borders: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * BORDER,), float("nan"), dtype=dtype)
        self.borders += [whole[:BORDER], whole[BORDER + size :]]
        return whole[BORDER : BORDER + size].view(shape)

    def copy(self, x: Tensor | None) -> Tensor | None:
        """The same values with the same strides, and NaN wherever else one could read."""
        if x is None or not x.is_floating_point():
            return x
        span = 1 + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))
        view = self.empty((span,), x.dtype).as_strided(x.shape, x.stride(), BORDER)
        return view.copy_(x)

    def intact(self) -> bool:
        return all(bool(border.isnan().all()) for border in self.borders)


def verify(case: Case, guard: Guard, backend: str, **more: Any) -> None:
    """The acceptance rule. Of one or two rows the baseline's error is a few draws of chance, so
    there the rule looks at several seeds at once."""
    case = replace(case, options={k: v for k, v in case.options.items() if k != "workspace"})
    parts: list[tuple[Outputs, Outputs, Outputs, dict[str, float]]] = []
    for seed in range(4 if case.N < 3 else 1):
        one = replace(case, seed=seed)
        plain = make_inputs(one)
        inputs = Inputs(**{name: guard.copy(x) for name, x in vars(plain).items()})
        exact = truth(one, plain)
        floor = floors(one, plain, exact)
        dull = {"audio", "text"} & set(uninformative(exact, floor))
        assert case.N < 3 or not dull, f"{case}: not informative for {dull}"
        result = evaluate(fused_svr_loss, inputs, **case.options, **more, backend=backend)
        assert all(x is None or torch.equal(x, getattr(plain, n)) for n, x in vars(inputs).items())
        base = baseline(one, plain, case.dtype != torch.float32)
        parts.append((result, exact, base, floor))
    together = [
        {name: torch.cat([torch.atleast_1d(part[n][name]) for part in parts]) for name in exact}
        for n in range(3)
    ]
    largest = {name: max(part[3][name] for part in parts) for name in exact}
    found = violations(*together, largest)
    assert not found, "\n  ".join([f"{backend} {case}:", *found])


def suite(*backends: str, least: int = 30) -> list[Any]:
    """(backend, case, small): `small` says whether the kernels' blocks are small ones."""
    cases = []
    for m, backend in enumerate(backends):
        for n, mode in enumerate(MODES):
            seed = n + 100 * m
            radius = (mode["radius"],) if "radius" in mode else ("scalar", "row")
            for row in covering(
                least, seed, **OPTIONS, **FIELDS, radius=radius, small=(True, False)
            ):
                options = {name: row[name] for name in OPTIONS}
                options |= {k: v for k, v in mode.items() if k != "radius"}
                fields = {name: row[name] for name in (*FIELDS, "radius")}
                if fields["dtype"] == torch.float16:  # the gradient must not overflow
                    fields["gap"] = max(fields["gap"], 0.3 if fields["D"] == 3 else 0.02)
                if fields["N"] < 3:  # the floor does not know R / r = 1500, and a row is a lottery
                    fields["gap"] = max(fields["gap"], 0.02)
                case = Case(**fields, options=options)
                cases.append(pytest.param(backend, case, row["small"], id=f"{backend} {case}"))
    return core(cases)


def accepted(case: Case, inputs: Inputs, backend: str) -> None:
    """The rule on inputs that are not the case's own."""
    exact = truth(case, inputs)
    result = evaluate(fused_svr_loss, inputs, **case.options, backend=backend)
    base = baseline(case, inputs, case.dtype != torch.float32)
    found = violations(result, exact, base, floors(case, inputs, exact))
    assert not found, "\n  ".join([f"{backend} {case}:", *found])


def guarded(monkeypatch: pytest.MonkeyPatch) -> Guard:
    """The working memory of the panel engine inside NaN, too."""
    guard = Guard()
    empty = lambda self, *shape, dtype=torch.float32: guard.empty(shape, dtype)  # noqa: E731
    monkeypatch.setattr(device_call.DeviceCall, "new_empty", empty)
    zeros = lambda self, *shape: guard.empty(shape).zero_()  # noqa: E731
    monkeypatch.setattr(device_call.DeviceCall, "new_zeros", zeros)
    return guard


def check_literal_rows(mode: dict[str, Any], close: list[int], backend: str) -> None:
    """The rows `close`, of 129, are literal."""
    case = Case(N=129, D=20, options={**mode, "renormalize": len(close) == 1})
    inputs = make_inputs(case)
    inputs.audio[close] = inputs.text[close] + 0.02 * inputs.audio[close].flip(1)
    accepted(case, inputs, backend)


def check_float16_range(length: float, scale: float, upstream: float, backend: str) -> None:
    """Weights beyond float16 in gradients that are not: large upstream gradients of a small scale,
    and short rows, whose support vectors are divided by their length."""
    case = Case(N=60, D=16, dtype=torch.float16, scale=scale,
                options={"renormalize": True, "reduction": "sum"})  # fmt: skip
    plain = make_inputs(case)
    moved = {name: (length * getattr(plain, name).float()).half() for name in ("audio", "text")}
    inputs = replace(plain, **moved, radius=length * plain.radius, upstream=torch.tensor(upstream))
    accepted(case, inputs, backend)


SUPPORT_MODES = MODES[1:4] + MODES[5:]
CLOSE = {"one": [5], "twenty": list(range(0, 120, 6))}
RANGES = [(1.0, 1e-3, 1e7), (0.02, 2500.0, 0.1)]


def further_suite(*backends: str) -> list[Any]:
    """(backend, case): calls with further negatives, every pair of options."""
    rows = covering(
        **OPTIONS, radius=("none", "scalar", "row"), objective=("infonce", "siglip"),
        bilateral=("none", "mirror", "shared"), negatives=((7, 64), (129, 0), (0, 1)),
        dtype=(torch.float32, torch.bfloat16), duplicates=(False, True), weighted=(False, True),
        gap=(0.5, 0.02),
    )  # fmt: skip
    fields = ("radius", "negatives", "dtype", "duplicates", "weighted", "gap")
    cases = []
    for n, row in enumerate(rows):
        options = {name: value for name, value in row.items() if name not in fields}
        case = Case(N=90, D=40, options=options, **{name: row[name] for name in fields})
        backend = backends[n % len(backends)]
        cases.append(pytest.param(backend, case, id=f"{backend} {case}"))
    return core(cases)
