"""csrc/cuda/hopper against the specification: what takes the larger batches on Hopper."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_integration import test_stats_are_those_of_the_specification as check_stats
from gpu_suite import MODES, Case, Guard, guarded, suite, verify
from torch.nn.functional import normalize

from supclap_kernels import fused_svr_loss
from supclap_kernels.backends import tile_sizes
from supclap_kernels.testing import (
    Inputs,
    baseline,
    evaluate,
    floors,
    make_inputs,
    truth,
    violations,
)

WIDE = (torch.bfloat16, torch.float16)


def narrowed(case: Case, n: int) -> Case:
    return case if case.dtype in WIDE else replace(case, dtype=WIDE[n % 2], gap=max(case.gap, 0.02))


CASES = [row.values[1] for row in suite("cuda", least=48)]
SUITE = [narrowed(case, n) for n, case in enumerate(CASES)]
by_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def case_of(mode: dict[str, str], options: dict[str, Any] | None = None, **fields: Any) -> Case:
    """With bfloat16 embeddings; without a radius where the mode has none."""
    chosen = {name: value for name, value in mode.items() if name != "radius"}
    if "radius" in mode:
        fields["radius"] = mode["radius"]
    return Case(dtype=torch.bfloat16, options={**(options or {}), **chosen}, **fields)


def check(case: Case, inputs: Inputs, workspace: int) -> None:
    """Inputs that no case describes, against the specification."""
    exact, base = truth(case, inputs), baseline(case, inputs, rounded_weights=True)
    options = {"backend": "cuda:hopper", "workspace": workspace, **case.options}
    result = evaluate(fused_svr_loss, inputs, **options)
    assert not violations(result, exact, base, floors(case, inputs, exact))


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, device: None) -> Iterator[Guard]:
    """Tile pairs of 128; working memory inside NaN."""
    monkeypatch.setattr(tile_sizes, "GPU_TILE", 128)
    guard = guarded(monkeypatch)
    yield guard
    assert guard.intact()


@pytest.mark.parametrize("n", range(len(SUITE)), ids=map(str, SUITE))
def test_options(n, guard, device):
    device.vary(n)
    verify(SUITE[n], guard, "cuda:hopper", workspace=SUITE[n].options["workspace"])


@by_mode
def test_many_steps_and_rounds(mode, guard, device):
    """More operands than stages, and several tiles for each team of a block."""
    device.set(2, 1, 0)
    verify(case_of(mode, N=270, D=330), guard, "cuda:hopper", workspace=0)


@by_mode
def test_statistics(mode, guard):
    check_stats(case_of(mode, N=140, D=20, gap=0.1), "cuda:hopper")


PLAIN = [
    {"radius": "row", "options": {"renormalize": False}},
    {"gap": 0.05, "radius": "row"},
    {"gap": 0.05, "radius": "row", "duplicates": True},
    {"scale": 100.0, "weighted": True},
    {"scale": 100.0, "gap": 0.05, "radius": "row", "options": {"renormalize": False}},
]


@by_mode
@pytest.mark.parametrize("fields", PLAIN, ids=str)
def test_tiles_without_a_hidden_pair(mode, fields, guard, device):
    """Also literal rows, equal ids here and there, and logits far apart among them."""
    device.set(2, 1, 0)
    verify(case_of(mode, N=290, D=40, **fields), guard, "cuda:hopper", workspace=0)


@by_mode
def test_logits_too_far_apart_for_one_reference(mode, guard, device):
    """Audios on the other side of the sphere: all of their column is 2^-400 of its neighbours."""
    device.set(2, 1, 0)
    fields = {"N": 290, "D": 40, "gap": 0.05, "radius": "row", "scale": 200.0}
    case = case_of(mode, **fields)
    inputs = make_inputs(case)
    inputs.audio[5::37] *= -1
    check(case, inputs, workspace=0)


@by_mode
@pytest.mark.parametrize("negative", ["upstream", "some weights", "scale", "alpha"])
def test_signs(mode, negative, guard, device):
    """Of the factors, and of the logits' scale: tiles without a hidden pair take logarithms."""
    device.set(2, 1, 0)
    options = {"alpha": -0.5} if negative == "alpha" else {}
    scale = -14.0 if negative == "scale" else 14.0
    case = case_of(mode, options, N=290, D=40, gap=0.05, weighted=True, scale=scale)
    inputs = make_inputs(case)
    assert inputs.weight is not None
    if negative == "upstream":
        inputs = replace(inputs, upstream=-inputs.upstream)
    if negative == "some weights":
        inputs.weight[::3] *= -1
    check(case, inputs, workspace=0)


@by_mode
def test_tile_pairs_of_several_tiles_each_way(mode, guard, device, monkeypatch):
    """A pair on the diagonal has tiles without a hidden pair, too; they take rows only."""
    device.set(3, 1, 0)
    monkeypatch.setattr(tile_sizes, "GPU_TILE", 256)
    case = case_of(mode, N=300, D=40, gap=0.1, radius="row")
    verify(case, guard, "cuda:hopper", workspace=2**26)


@by_mode
@pytest.mark.parametrize("order", [("text", "audio"), ("audio", "text")], ids=str)
@pytest.mark.parametrize("N", [160, 150], ids=str)
def test_towers_in_either_order_in_memory(mode, order, N, guard, device):
    """Their rows as given, which one copy takes of both; of N = 150 not the last ones."""
    device.set(2, 1, 0)
    case = case_of(mode, N=N, D=192, gap=0.1)
    inputs = make_inputs(case)
    memory = torch.stack([getattr(inputs, tower) for tower in order])
    inputs = replace(inputs, **dict(zip(order, memory, strict=True)))
    check(case, inputs, workspace=0)


ALONE = [mode for mode in MODES if "radius" in mode]
by_alone = pytest.mark.parametrize("mode", ALONE, ids=str)


@by_alone
@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("fields", [{}, {"duplicates": True}, {"scale": 200.0}], ids=str)
def test_places_without_a_hidden_pair(mode, fields, side, guard, device, monkeypatch):
    """64 x 256 of one product, on the diagonal as well."""
    device.set(2, 1, 0)
    monkeypatch.setattr(tile_sizes, "GPU_TILE", side)
    case = case_of(mode, N=530, D=40, gap=0.05, seed=1, **fields)
    check(case, make_inputs(case), workspace=2**26)


@by_alone
@pytest.mark.parametrize("tower", ["audio", "text"])
def test_places_with_logits_too_far_apart(mode, tower, guard, device, monkeypatch):
    """All rows close together but a few, on the other side: all of their logits are 2^-200 of the
    others', which are good. They are rows of one product, columns of the other."""
    device.set(2, 1, 0)
    monkeypatch.setattr(tile_sizes, "GPU_TILE", 256)
    case = case_of(mode, N=530, D=40, gap=0.05, scale=80.0)
    inputs = make_inputs(case)
    for x in (inputs.audio, inputs.text):
        x.copy_(normalize(0.3 * x.float() + 40**-0.5, dim=1))
    getattr(inputs, tower)[5::37] *= -1
    check(case, inputs, workspace=2**26)
