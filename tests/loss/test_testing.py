"""The acceptance rule itself: it accepts the baseline and rejects every mutant."""

import pytest
import torch

from supclap_kernels import svr_loss_reference
from supclap_kernels.testing import (
    MUTANTS,
    Case,
    baseline,
    check,
    floors,
    make_inputs,
    truth,
    uninformative,
    violations,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("float64", "float32", "float16", "bfloat16")
CASE = Case(N=96, D=48, radius="row")


def judged(dtype: torch.dtype):
    case = Case(N=96, D=48, radius="row", dtype=dtype)
    inputs = make_inputs(case)
    exact = truth(case, inputs)
    base = baseline(case, inputs, rounded_weights=dtype == torch.bfloat16)
    return exact, base, floors(case, inputs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_baseline_is_accepted(dtype):
    exact, base, floor = judged(dtype)
    assert not uninformative(exact, floor)
    assert not violations(base, exact, base, floor)


@pytest.mark.parametrize("side", ["audio", "text"])
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_mutant_is_rejected(dtype, mutant, side):
    exact, base, floor = judged(dtype)
    wrong = {**base, side: MUTANTS[mutant](base[side])}
    found = violations(wrong, exact, base, floor)
    assert found and all(reason.startswith(side) for reason in found)


def test_wrong_shape_and_dtype_are_rejected():
    exact, base, floor = judged(torch.float32)
    for wrong in (base["audio"][:-1], base["audio"].double()):
        found = violations({**base, "audio": wrong}, exact, base, floor)
        assert len(found) == 1 and "wanted torch.float32 (96, 48)" in found[0]


def test_case_without_information_is_refused():
    with pytest.raises(AssertionError, match="not informative for .*audio"):
        check(svr_loss_reference, Case(N=8, D=64, radius="none", scale=1e4))


@pytest.mark.xfail(strict=True, reason="a planted bug: the check must fail")
@pytest.mark.parametrize("bug", ["scale", "sign of the radius", "one-sided"])
def test_planted_bug_is_caught(bug):
    def wrong(audio, text, radius, scale, bias, **options):
        if bug == "scale":
            scale = scale * 1.001
        if bug == "sign of the radius":
            radius = -radius
        if bug == "one-sided":
            options["bilateral"] = "none"
        return svr_loss_reference(audio, text, radius, scale, bias, **options)

    check(wrong, CASE)
