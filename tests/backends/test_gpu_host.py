"""The GPU backends without a GPU: passes on CPU tensors, with the kernels' launches left out."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from allocations import traced

import supclap_kernels as sk
from supclap_kernels import dispatch, native
from supclap_kernels.backends import available
from supclap_kernels.backends.call import Tensors
from supclap_kernels.backends.footprint import peak_bytes
from supclap_kernels.options import MIRROR, PLAIN, WAYS, Options
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
    "bfloat16": {"dtype": torch.bfloat16, "normalize": True, "renormalize": True},
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
    guess = peak_bytes(backend, *sizes, Options(**case.options))
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
    guess = peak_bytes(backend, 700, 512, torch.float32, True, Options(**case.options))
    assert 0.9 <= guess / measured(case, backend) <= 1.1


@pytest.fixture
def hopper(monkeypatch):
    """As if there were two GPUs, the second one of Hopper, and everything were built."""
    launchers = SimpleNamespace(
        hopper_tile=None, CudaProblem=SimpleNamespace, single_limit=lambda problem, side: 100
    )
    monkeypatch.setattr(available, "triton", lambda: "ok")
    monkeypatch.setattr(available, "cuda", lambda: "ok")
    monkeypatch.setattr(available, "capability", lambda index: (9, 0) if index == 1 else (8, 0))
    monkeypatch.setattr(native, "cuda", lambda: launchers)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    dispatch.remembered_routes.cache_clear()
    yield launchers
    dispatch.remembered_routes.cache_clear()


def ways(backend: str, device: str, dtype: torch.dtype, mode: int, **more) -> dict[str, int | None]:
    routes = dispatch.routes(backend, torch.device(device), dtype, 64, mode, True, **more)
    return {route.way: route.largest for route in routes}


def test_auto_takes_what_was_measured(hopper):
    """On Hopper the CUDA kernels, and Triton's for large batches of the plain InfoNCE."""
    half, single = torch.bfloat16, torch.float32
    assert ways("auto", "cuda:1", half, MIRROR) == {"cuda:single": 100, "cuda:hopper": None}
    assert ways("auto", "cuda:1", half, PLAIN) == {"cuda:single": 100, "triton:tile": None}
    assert ways("auto", "cuda:1", single, PLAIN) == {"cuda:single": 100, "cuda:panel": None}
    assert ways("auto", "cuda:1", single, MIRROR) == {"cuda:single": 100, "cuda:panel": None}
    assert ways("cuda", "cuda:1", half, PLAIN) == {"cuda:single": 100, "cuda:panel": None}
    assert ways("auto", "cuda:0", half, MIRROR) == {"reference": None}
    assert ways("auto", "cuda:1", torch.float64, MIRROR) == {"reference": None}
    del hopper.hopper_tile  # compiled for other targets
    dispatch.remembered_routes.cache_clear()
    assert ways("auto", "cuda:1", half, MIRROR) == {"reference": None}


def test_every_way_has_a_name(hopper):
    for name in WAYS:
        if name.startswith("cpu"):
            continue
        largest = 100 if "single" in name else None
        assert ways(name, "cuda:1", torch.bfloat16, MIRROR) == {name: largest}
    assert ways("panel", "cuda:0", torch.float32, MIRROR) == {"cuda:panel": None}
    assert ways("triton", "cuda:0", torch.float32, MIRROR) == {"triton:tile": None}
    with pytest.raises(RuntimeError, match="no Hopper GPU"):
        ways("cuda:hopper", "cuda:0", torch.bfloat16, MIRROR)
    with pytest.raises(RuntimeError, match="takes float16 and bfloat16"):
        ways("cuda:hopper", "cuda:1", torch.float32, MIRROR)


def test_a_group_takes_no_single_launch(hopper):
    staged = ways("auto", "cuda:1", torch.bfloat16, MIRROR, staged=True)
    assert staged == {"cuda:hopper": None}
    with pytest.raises(RuntimeError, match="one launch for the batch of one process"):
        ways("cuda:single", "cuda:1", torch.bfloat16, MIRROR, staged=True)


def test_explain_names_the_way_of_a_call(hopper):
    call = {"device": "cuda:1", "dtype": torch.bfloat16, "D": 64}
    assert sk.explain(**call, N=24).startswith("cuda:single: ")
    assert sk.explain(**call, N=101).startswith("cuda:hopper: ")
    assert sk.explain(**call, N=101, radius=False).startswith("triton:tile: ")
    assert sk.explain(**call, N=101, radius=False, objective="siglip").startswith("cuda:panel: ")
    assert sk.explain(**call).startswith("cuda:single up to N = 100: one launch")
    assert "; then cuda:hopper: measured fastest on an H200" in sk.explain(**call)
    assert "not compared" in sk.explain(**{**call, "dtype": torch.float32}, N=101)
