"""`memory_estimate` of the GPU backends against what they allocate: their passes on CPU tensors,
with the kernels' launches left out."""

import pytest
import torch
from test_memory import traced

from supclap_kernels.options import Options
from supclap_kernels.testing import Case, make_inputs

triton = pytest.importorskip("triton")
gpu = pytest.importorskip("supclap_kernels.backends.gpu")

CASES = {
    "mirror": {},
    "plain": {"radius": "none"},
    "one-sided": {"bilateral": "none"},
    "siglip": {"objective": "siglip"},
    "per row": {"reduction": "none"},
    "normalize": {"normalize": True},
    "narrow": {"D": 100},
    "kept": {"workspace": 2**28},
    "one tile": {"N": 120},
}


@pytest.fixture
def no_launches(monkeypatch):
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)


def measured(case: Case, backend) -> int:
    """Bytes at the peak of forward and backward beyond inputs and returned gradients."""
    given, options = make_inputs(case), Options(**case.options)
    inputs = gpu.Inputs(given.audio, given.text, given.radius, given.logit_scale, given.logit_bias,
                        given.ids, given.weight)  # fmt: skip
    needs = (True, True, given.radius is not None, True, False)

    def step():
        _, _, state, saved = backend.forward(inputs, options, needs)
        return backend.backward(inputs, options, needs, given.upstream, state, saved)

    step()
    trace, gradients = traced(step)
    return trace.peak - sum(g.numel() * g.element_size() for g in gradients)


@pytest.mark.parametrize("backend", [gpu.PANEL, gpu.TRITON], ids=["panel", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_estimate_within_a_tenth(name, backend, no_launches):
    options = {"workspace": 2**17, **CASES[name]}
    fields = {n: options.pop(n) for n in ("N", "D", "radius") if n in options}
    case = Case(**{"N": 700, "D": 512, **fields}, options=options)
    found = measured(case, backend)
    sizes = (case.N, case.D, torch.float32, case.radius != "none")
    guess = backend.memory(*sizes, Options(**case.options))
    assert 0.9 <= guess / found <= 1.1, f"{case}: estimated {guess}, measured {found} bytes"
