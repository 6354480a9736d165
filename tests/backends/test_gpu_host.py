"""The GPU backends without a GPU: passes on CPU tensors, with the kernels' launches left out."""

import pytest
import torch
from allocations import traced

from supclap_kernels.backends.call import Tensors
from supclap_kernels.backends.footprint import peak_bytes, whole_pass
from supclap_kernels.options import Options
from supclap_kernels.testing import Case, make_inputs

triton = pytest.importorskip("triton")
gpu = pytest.importorskip("supclap_kernels.backends.triton.call")

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
    "bfloat16": {"dtype": torch.bfloat16, "normalize": True, "renormalize": False},
    "short rows": {"N": 2000, "D": 3},
    "short normalized rows": {"D": 100, "normalize": True},
}


@pytest.fixture
def no_launches(monkeypatch):
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)


def measured(case: Case, backend) -> int:
    """Bytes at the peak of forward and backward beyond inputs and returned gradients."""
    given, options = make_inputs(case), Options(**case.options)
    inputs = Tensors(given.audio, given.text, given.radius, given.logit_scale, given.logit_bias,
                        given.ids, given.weight)  # fmt: skip
    needs = (True, True, given.radius is not None, True, False)

    def step():
        _, _, state, saved = backend.forward(inputs, options, needs)
        return backend.backward(inputs, options, needs, given.upstream, state, saved)

    step()
    trace, gradients = traced(step)
    return trace.peak - sum(g.numel() * g.element_size() for g in gradients if g is not None)


@pytest.mark.parametrize("backend", [gpu.PANEL, gpu.TILE], ids=["panel", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_estimate_within_a_tenth(name, backend, no_launches):
    options = {"workspace": 2**17, **CASES[name]}
    fields = {n: options.pop(n) for n in ("N", "D", "radius", "dtype") if n in options}
    case = Case(**{"N": 700, "D": 512, **fields}, options=options)
    found = measured(case, backend)
    sizes = (case.N, case.D, case.dtype, case.radius != "none")
    chosen = Options(**case.options)
    guess = peak_bytes(whole_pass(backend, chosen), *sizes, chosen)
    assert 0.9 <= guess / found <= 1.1, f"{case}: estimated {guess}, measured {found} bytes"


def test_tuned_blocks_are_opt_in(tmp_path, monkeypatch):
    from supclap_kernels.backends.tile_sizes import Blocks
    from supclap_kernels.backends.triton.call import kernel_blocks

    request = (True, False, 1, True, torch.bfloat16, 90)
    shipped = kernel_blocks(*request)
    file = tmp_path / "tiles.json"
    file.write_text('{"tile_statistics 1 True bfloat16 90": [64, 64, 32, 4, 2, 1]}')
    monkeypatch.setenv("SUPCLAP_TILES", str(file))
    assert kernel_blocks(*request) == Blocks(64, 64, 32, 4, 2, 1) != shipped
    assert kernel_blocks(*request[:-1], 80) == kernel_blocks(*request[:-1], 86)
    bad = tmp_path / "bad.json"
    bad.write_text('{"tile_statistics 1 True bfloat16 90": [96, 64]}')
    monkeypatch.setenv("SUPCLAP_TILES", str(bad))
    with pytest.raises(ValueError, match="must divide 128"):
        kernel_blocks(*request)


def test_rows_for_tf32_are_rounded_not_cut():
    """10 bits, ties away from zero, as `cvt.rna` has them; zeros, signs, infinity and NaN stay."""
    X = torch.cat((torch.randn(1000), torch.tensor([0.0, -0.0, 1 + 2**-11, -3.5, float("inf")])))
    rounded = gpu.rounded_to_tf32(X)
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert bool(gpu.rounded_to_tf32(nan).isnan().all())
    mantissa, exponent = torch.frexp(X.double()[:-1])
    nearest = torch.ldexp(
        (mantissa * 2**11).abs().add(0.5).floor() * mantissa.sign(), exponent - 11
    )
    assert torch.equal(rounded[:-1].double(), nearest) and rounded[-1] == float("inf")


@pytest.mark.parametrize("backend", [gpu.PANEL, gpu.TILE], ids=["panel", "triton"])
def test_estimate_counts_rounded_rows(backend, no_launches, monkeypatch):
    monkeypatch.setattr(gpu, "precision", lambda dtype: "tf32")
    case = Case(N=700, D=512, options={"workspace": 2**17})
    chosen = Options(**case.options)
    guess = peak_bytes(whole_pass(backend, chosen), 700, 512, torch.float32, True, chosen)
    assert 0.9 <= guess / measured(case, backend) <= 1.1
