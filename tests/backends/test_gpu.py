"""The GPU backends on a GPU. `bash bench/gpu.sh correct` runs these on a machine that has one."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import covering

import supclap_kernels as sk
from supclap_kernels import native
from supclap_kernels.backends import available
from supclap_kernels.testing import (
    Case,
    Inputs,
    baseline,
    check,
    evaluate,
    floors,
    make_inputs,
    truth,
    violations,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = [{}, {"bilateral": "none"}, {"bilateral": "shared"}, {"objective": "siglip"}]
by_mode = pytest.mark.parametrize("options", MODES, ids=str)


@pytest.fixture(params=["triton:panel", "triton:tile", "cuda", "cuda:panel", "cuda:hopper"])
def backend(request):
    """ "cuda": one launch where the batch fits on the chip."""
    if available.state(request.param) != "ok":
        pytest.skip(available.state(request.param))
    return request.param


def run(case: Case, backend: str, **options: Any) -> None:
    if backend == "cuda:hopper" and case.dtype == torch.float32:
        pytest.skip("16 bits only")
    rounded = case.dtype != torch.float32
    check(sk.fused_svr_loss, case, "cuda", rounded_weights=rounded, backend=backend, **options)


@pytest.mark.parametrize(
    "chosen",
    covering(
        80,
        seed=1,  # a case is dull with 0
        objective=("infonce", "siglip"),
        bilateral=("none", "mirror", "shared"),
        reduction=("mean", "sum", "none"),
        renormalize=(False, True),
        normalize=(False, True),
        alpha=(1.0, 0.3),
        beta=(0.0, 0.2),
        radius=("scalar", "row"),
        weighted=(False, True),
        duplicates=(False, True),
        workspace=(0, 2**28),
        dtype=tuple(DTYPES),
        N=(33, 100, 129, 600, 1500),
        D=(48, 100, 512),
        gap=(0.3, 0.05),
        layout=("contiguous", "transposed", "offset", "strided"),
    ),
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_options(chosen, backend, poisoned_memory):
    chosen = dict(chosen)
    fields = {name: chosen.pop(name) for name in
              ("N", "D", "gap", "radius", "weighted", "duplicates", "layout")}  # fmt: skip
    dtype, workspace = DTYPES[chosen.pop("dtype")], chosen.pop("workspace")
    run(Case(dtype=dtype, options=chosen, **fields), backend, workspace=workspace)


@by_mode
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles(backend, options, dtype):
    run(Case(N=4300, D=256, dtype=DTYPES[dtype], options=options), backend, workspace=2**26)


@pytest.mark.parametrize("N", [33, 600, 4300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_support_vectors(backend, N, dtype):
    for objective in ("infonce", "siglip"):
        fields = {"radius": "none", "duplicates": N == 600, "options": {"objective": objective}}
        run(Case(N=N, D=192, dtype=DTYPES[dtype], **fields), backend)


def accepted(case: Case, inputs: Inputs, backend: str) -> None:
    """The rule on inputs that are not the case's own."""
    exact, base = truth(case, inputs), baseline(case, inputs, rounded_weights=True)
    result = evaluate(sk.fused_svr_loss, inputs, **case.options, backend=backend)
    assert not violations(result, exact, base, floors(case, inputs, exact))


@by_mode
@pytest.mark.parametrize("first, second", [("text", "audio"), ("audio", "text")])
@pytest.mark.parametrize("N", [640, 630])
def test_towers_in_either_order_in_memory(backend, options, first, second, N):
    """The Hopper kernels copy whole left operands of both at once, of N = 630 not the last ones."""
    case = Case(N=N, D=192, dtype=torch.bfloat16, options=options)
    inputs = make_inputs(case, "cuda")
    memory = torch.stack([getattr(inputs, tower) for tower in (first, second)])
    inputs = replace(inputs, **{first: memory[0], second: memory[1]})
    if hasattr(native.cuda(), "hopper_copies_whole"):
        p = native.cuda().CudaProblem()
        p.N, p.width, p.dtype = N, 192, 1
        p.give(T=inputs.text.data_ptr(), A=inputs.audio.data_ptr())
        assert native.cuda().hopper_copies_whole(p)
    accepted(case, inputs, backend)


@by_mode
@pytest.mark.parametrize("negative", ["upstream", "some weights"])
def test_signs(backend, options, negative):
    """Where no factor is negative, tiles of the Hopper kernels take their logarithms."""
    case = Case(N=640, D=192, weighted=True, dtype=torch.bfloat16, options=options)
    inputs = make_inputs(case, "cuda")
    if negative == "upstream":
        inputs = replace(inputs, upstream=-inputs.upstream)
    else:
        assert inputs.weight is not None
        inputs.weight[::3] *= -1
    accepted(case, inputs, backend)


@pytest.mark.parametrize("gap", [0.1, 1e-2, 1e-3, 0.0])
def test_gaps(backend, gap):
    for bilateral in ("none", "mirror", "shared"):
        options = {"bilateral": bilateral, "renormalize": gap == 1e-2}
        run(Case(N=700, D=96, gap=gap, radius="row", options=options), backend)


@by_mode
def test_tf32_is_allowed_by_pytorchs_switch(backend, options):
    """Ten bits of the products: as wrong as the closed form under the same switch."""
    if backend == "cuda:hopper":
        pytest.skip("16 bits only")
    case = Case(N=600, D=256, options=options)
    inputs = make_inputs(case, "cuda")
    exact = truth(case, inputs)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        result = evaluate(sk.fused_svr_loss, inputs, **case.options, backend=backend)
        base = baseline(case, inputs, rounded_weights=True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    found = violations(result, exact, base, floors(case, inputs, exact))
    assert not found


@by_mode
def test_bit_equal_when_run_again(backend, options):
    inputs = make_inputs(Case(N=2500, D=128, dtype=torch.bfloat16, options=options), "cuda")
    runs = [
        evaluate(sk.fused_svr_loss, inputs, backend=backend, workspace=2**24, **options)
        for _ in range(4)
    ]
    for other in runs[1:]:
        assert all(torch.equal(x, other[name]) for name, x in runs[0].items())


@by_mode
def test_no_host_synchronisation_and_no_compilation(backend, options, monkeypatch):
    """In the second step, also at another N."""
    triton = pytest.importorskip("triton")

    def step(N: int) -> None:
        case = Case(N=N, D=128, dtype=torch.bfloat16, radius="row", options=options)
        inputs = make_inputs(case, "cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            evaluate(sk.fused_svr_loss, inputs, backend=backend, workspace=2**22, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step(900)
    monkeypatch.setattr(triton.JITFunction, "_do_compile", None, raising=False)
    step(1203)


@by_mode
def test_cuda_graph(backend, options):
    case = Case(N=600, D=128, dtype=torch.bfloat16, options=options)
    inputs = make_inputs(case, "cuda")

    def step() -> dict[str, torch.Tensor]:
        return evaluate(sk.fused_svr_loss, inputs, backend=backend, workspace=2**20, **options)

    for _ in range(3):
        wanted = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for x in result.values():
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, wanted[name]) for name, x in result.items())


@by_mode
def test_make_graphed_callables(backend, options):
    """The module as one graph for forward and one for backward, on new batches."""
    case = Case(N=64, D=128, dtype=torch.bfloat16, options=options)
    first, second = (make_inputs(replace(case, seed=seed), "cuda") for seed in (0, 1))
    objective = sk.SVRLoss(radius=sk.StaticRadius(0.15), backend=backend, **options).cuda()
    numbers = [x for x in (first.logit_scale, first.logit_bias) if x is not None]
    names = [x.detach().requires_grad_() for x in (first.audio, first.text, *numbers)]
    graphed = torch.cuda.make_graphed_callables(objective, tuple(names))
    batch = [x.detach().requires_grad_() for x in (second.audio, second.text, *numbers)]
    leaves = [*batch, *objective.parameters()]
    found = [graphed(*batch)]
    found += torch.autograd.grad(found[0], leaves)
    plain = sk.SVRLoss(radius=sk.StaticRadius(0.15), backend=backend, **options).cuda()
    wanted = [plain(*batch)]
    wanted += torch.autograd.grad(wanted[0], [*batch, *plain.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_on_a_side_stream(backend):
    """Memory that a stream of ours uses must not be given away early."""
    case = Case(N=2500, D=128, dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    wanted = evaluate(sk.fused_svr_loss, inputs, backend=backend, workspace=2**24)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            result = evaluate(sk.fused_svr_loss, inputs, backend=backend, workspace=2**24)
            junk = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
            del junk
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, result[name]) for name, x in wanted.items())


def test_memory_estimate(backend):
    for options in MODES:
        case = Case(N=3000, D=512, dtype=torch.bfloat16, options=options)
        inputs = make_inputs(case, "cuda")
        evaluate(sk.fused_svr_loss, inputs, backend=backend, workspace=2**24, **options)
        torch.cuda.synchronize()
        time.sleep(0.1)  # the thread of the backward pass lets go of its tensors a moment later
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = evaluate(sk.fused_svr_loss, inputs, backend=backend, workspace=2**24, **options)
        peak = torch.cuda.max_memory_allocated() - before
        peak -= sum(result[name].nbytes for name in ("audio", "text"))
        guess = sk.memory_estimate(3000, 512, torch.bfloat16, device="cuda", backend=backend,
                                   workspace=2**24, **options)  # fmt: skip
        assert 0.9 <= guess / peak <= 1.1, (options, guess, peak)


def test_more_than_2_to_the_31_elements():
    """Row kernels at N D >= 2^31; one tile's worth of rows is looked at."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    from supclap_kernels.backends.call import Tensors
    from supclap_kernels.backends.cuda.sweeps import PANEL
    from supclap_kernels.backends.state import POSITIVE, STATE_GEOMETRY
    from supclap_kernels.backends.triton.call import TILE
    from supclap_kernels.options import Options

    N, D = 2**20 + 64, 2048
    audio = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    text = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    radius, scale = torch.tensor(0.1, device="cuda"), torch.tensor(0.01, device="cuda")
    inputs = Tensors(audio, text, radius, scale, None, None, None)
    options = Options(bilateral="none")
    wanted = (audio[-64:].double() * text[-64:].double()).sum(dim=1)
    for backend in (TILE, PANEL):
        rules = backend.tiling(torch.bfloat16)
        call = backend.engine(inputs, options, rules, backend.fused)
        positive = call.state[STATE_GEOMETRY + POSITIVE, -64:].double()
        assert float((positive - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_float16_upstream_of_a_grad_scaler(backend):
    case = Case(N=300, D=64, dtype=torch.float16)
    inputs = make_inputs(case, "cuda")
    scaled = replace(inputs, upstream=torch.tensor(65536.0, device="cuda"))
    result = evaluate(sk.fused_svr_loss, scaled, backend=backend)
    assert all(bool(torch.isfinite(x).all()) for x in result.values())
