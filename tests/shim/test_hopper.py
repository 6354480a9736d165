"""csrc/cuda/gram.cuh against the specification: what takes the larger batches on Hopper."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu_integration import test_stats_are_those_of_the_specification as check_stats
from gpu_suite import SUPPORT_MODES, Case, Guard, guarded, suite, verify

from supclap_kernels import fused_svr_loss
from supclap_kernels.backends import gpu_hopper, gpu_single, tiles
from supclap_kernels.testing import baseline, evaluate, floors, make_inputs, truth, violations

WIDE = (torch.bfloat16, torch.float16)


def narrowed(case: Case, n: int) -> Case:
    return case if case.dtype in WIDE else replace(case, dtype=WIDE[n % 2], gap=max(case.gap, 0.02))


CASES = [row.values[1] for row in suite("cuda", least=48)]
SUITE = [narrowed(case, n) for n, case in enumerate(CASES) if case.radius != "none"]


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, device: None) -> Iterator[Guard]:
    """Nothing fits on the chip; tile pairs of 128; working memory inside NaN."""
    monkeypatch.setattr(gpu_hopper, "WANTED", True)
    monkeypatch.setattr(gpu_single, "limit_of", lambda *_: 0)
    monkeypatch.setattr(tiles, "GPU_TILE", 128)
    guard = guarded(monkeypatch)
    yield guard
    assert guard.intact()


@pytest.mark.parametrize("n", range(len(SUITE)), ids=map(str, SUITE))
def test_options(n, guard, device):
    device.vary(n)
    verify(SUITE[n], guard, "cuda", workspace=SUITE[n].options["workspace"])


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
def test_many_steps_and_rounds(mode, guard, device):
    """More operands than stages, and several tiles for each team of a block."""
    device.set(2, 1, 0)
    verify(Case(N=270, D=330, dtype=torch.bfloat16, options=mode), guard, "cuda", workspace=0)


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
def test_statistics(mode, guard):
    check_stats(Case(N=140, D=20, dtype=torch.bfloat16, gap=0.1, options=mode), "cuda")


PLAIN = [
    {"radius": "row", "options": {"renormalize": True}},
    {"gap": 0.05, "radius": "row"},
    {"gap": 0.05, "radius": "row", "duplicates": True},
    {"scale": 100.0, "weighted": True},
    {"scale": 100.0, "gap": 0.05, "radius": "row", "options": {"renormalize": True}},
]


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
@pytest.mark.parametrize("fields", PLAIN, ids=str)
def test_tiles_without_a_hidden_pair(mode, fields, guard, device):
    """Also far rows, equal ids here and there, and logits far apart among them."""
    device.set(2, 1, 0)
    options = {**fields.get("options", {}), **mode}
    case = Case(N=290, D=40, dtype=torch.bfloat16, **{**fields, "options": options})
    verify(case, guard, "cuda", workspace=0)


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
def test_logits_too_far_apart_for_one_reference(mode, guard, device):
    """Audios on the other side of the sphere: all of their column is 2^-400 of its neighbours."""
    device.set(2, 1, 0)
    fields = {"N": 290, "D": 40, "gap": 0.05, "radius": "row", "scale": 200.0}
    case = Case(dtype=torch.bfloat16, options=mode, **fields)
    inputs = make_inputs(case)
    inputs.audio[5::37] *= -1
    exact, base = truth(case, inputs), baseline(case, inputs, rounded_weights=True)
    result = evaluate(fused_svr_loss, inputs, backend="cuda", workspace=0, **mode)
    assert not violations(result, exact, base, floors(case, inputs, exact))


@pytest.mark.parametrize("mode", SUPPORT_MODES, ids=str)
def test_tile_pairs_of_several_tiles_each_way(mode, guard, device, monkeypatch):
    """A pair on the diagonal has tiles without a hidden pair, too; they take rows only."""
    device.set(3, 1, 0)
    monkeypatch.setattr(tiles, "GPU_TILE", 256)
    case = Case(N=300, D=40, dtype=torch.bfloat16, gap=0.1, radius="row", options=mode)
    verify(case, guard, "cuda", workspace=2**26)
