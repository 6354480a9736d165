"""What the tests of direct calls on a CPU (loss/test_direct.py) and of the single launch
(shim/test_direct.py) share."""

from typing import Any

import pytest
import torch
from covering import covering

from supclap_kernels import direct
from supclap_kernels.testing import Case, Inputs, evaluate, make_inputs

FIELDS = ("N", "D", "gap", "radius", "weighted", "duplicates", "dtype")


def watch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the loss from now on, whether it went the short way."""
    seen: list[bool] = []
    original = direct.loss_of

    def loss_of(*arguments: Any) -> Any:
        loss = original(*arguments)
        seen.append(loss is not None)
        return loss

    monkeypatch.setattr(direct, "loss_of", loss_of)
    return seen


def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no call goes the short way."""
    monkeypatch.setattr(direct, "loss_of", lambda *_: None)


def every_option(count: int, **fields: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Cases over every pair of options; `fields`: N, D and dtype."""
    return pytest.mark.parametrize(
        "chosen",
        covering(
            count,
            objective=("infonce", "siglip"),
            bilateral=("none", "mirror", "shared"),
            reduction=("mean", "sum"),
            renormalize=(False, True),
            normalize=(False, True),
            alpha=(1.0, 0.3, 0.0),
            beta=(0.0, 0.2),
            radius=("none", "scalar", "row"),
            weighted=(False, True),
            duplicates=(False, True),
            gap=(0.3, 0.02, 0.0),
            **fields,
        ),
        ids=lambda chosen: "-".join(map(str, chosen.values())),
    )


def compare(chosen: dict[str, Any], loss: Any, taken: list[bool], monkeypatch: Any) -> None:
    """Both ways give the same bits, with gradients and without."""
    options = dict(chosen)
    case = Case(**{name: options.pop(name) for name in FIELDS}, options=options)
    inputs = make_inputs(case)
    short, value = evaluate(loss, inputs, **options), without_gradients(loss, inputs, options)
    assert taken == [True, True]
    long_way(monkeypatch)
    long = evaluate(loss, inputs, **options)
    for name, wanted in long.items():
        assert torch.equal(short[name], wanted) and short[name].dtype == wanted.dtype, name
    assert torch.equal(value, without_gradients(loss, inputs, options))


def without_gradients(loss: Any, inputs: Inputs, options: dict[str, Any]) -> Any:
    return loss(**inputs.differentiable(), ids=inputs.ids, weight=inputs.weight, **options)


def compare_frozen(frozen: str, loss: Any, taken: list[bool], monkeypatch: Any) -> None:
    """What is frozen gets no gradient; the others get the same as on the long way."""
    case = Case(N=24, D=32, radius="row", options={"objective": "siglip"})

    def gradients() -> dict[str, Any]:
        inputs = make_inputs(case)
        for name, x in inputs.differentiable().items():
            x.requires_grad_(name != frozen)
        loss(**inputs.differentiable(), **case.options).backward()
        return {name: x.grad for name, x in inputs.differentiable().items()}

    short = gradients()
    long_way(monkeypatch)
    long = gradients()
    assert taken == [True] and short[frozen] is long[frozen] is None
    assert all(torch.equal(short[name], long[name]) for name in short if name != frozen)
