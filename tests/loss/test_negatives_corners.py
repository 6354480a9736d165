"""Further negatives of another kind, or changed; what takes none."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import supclap_kernels as sk
from supclap_kernels import Negatives
from supclap_kernels.testing import Case, make_inputs


def test_negatives_that_are_negated_in_name_only(monkeypatch):
    monkeypatch.setattr("supclap_kernels.backends.cpu.call.multiplies_itself", lambda: True)
    inputs = make_inputs(Case(N=9, D=8, radius="none", negatives=(5, 6)))
    a, t, x = inputs.audio, inputs.text, inputs.audio_negatives
    wanted = sk.fused_svr_loss(a, t, None, 9.0, negatives=Negatives(-x))
    found = sk.fused_svr_loss(a, t, None, 9.0, negatives=Negatives(torch._neg_view(x)))
    assert torch.equal(found, wanted)


def test_ids_of_another_layout():
    inputs = make_inputs(Case(N=9, D=8, radius="none", duplicates=True, negatives=(5, 6)))
    arguments = {"logit_scale": 9.0, "ids": inputs.ids}
    more = inputs.negatives({})["negatives"]
    strided = more._replace(audio_ids=torch.stack((more.audio_ids,) * 2, dim=1)[:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [
            sk.fused_svr_loss(inputs.audio, inputs.text, **arguments, negatives=x)
            for x in (more, strided)
        ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("change", ["weight", "ids", "rows", "storage"])
def test_what_was_changed_behind_autograds_back(change):
    inputs = make_inputs(
        Case(N=9, D=8, radius="none", weighted=True, duplicates=True, negatives=(5, 6))
    )
    audio = inputs.audio.requires_grad_()
    negatives = inputs.negatives({})["negatives"]
    more = {"ids": inputs.ids, "weight": inputs.weight, "negatives": negatives}
    loss = sk.fused_svr_loss(audio, inputs.text, None, 9.0, **more, workspace=0)
    if change == "weight":
        inputs.weight.data = torch.ones(2)
    if change == "ids":
        negatives.audio_ids.data = torch.zeros(2, dtype=torch.int64)
    if change == "rows":
        negatives.audio.data = torch.zeros(5, 6)
    if change == "storage":
        negatives.text.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has shape|have shape|no memory"):
        loss.backward()


def test_only_eager_mode():
    inputs = make_inputs(Case(N=9, D=8, radius="none", negatives=(5, 6)))
    negatives = inputs.negatives({})["negatives"]
    a = inputs.audio.clone().requires_grad_()

    def loss(a, **options):
        return sk.fused_svr_loss(a, inputs.text, None, 9.0, negatives=negatives, **options)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(RuntimeError, match="eager mode only"):
            loss(mode.from_tensor(a))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.grad(loss)(a)
    rows = loss(a, reduction="none")
    with pytest.raises(RuntimeError, match="one upstream gradient"):
        torch.autograd.grad(rows, a, torch.eye(9), is_grads_batched=True)


def test_debugging_looks_at_them(monkeypatch):
    inputs = make_inputs(Case(N=9, D=8, radius="none", negatives=(5, 6)))
    inputs.text_negatives[0, 0] = float("nan")
    monkeypatch.setenv("SUPCLAP_DEBUG", "1")
    with pytest.raises(ValueError, match="negatives.text has 1 values that are NaN"):
        sk.fused_svr_loss(inputs.audio, inputs.text, None, 9.0, **inputs.negatives({}))


@pytest.mark.parametrize("negatives", [(-1, 0), (3,), (1.5, 0), (1, 2, 3)])
def test_estimates_of_what_cannot_be(negatives):
    with pytest.raises(ValueError, match="two numbers of rows"):
        sk.memory_estimate(8, 8, negatives=negatives)
