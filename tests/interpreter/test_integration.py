"""The GPU backends as operators, in Triton's interpreter.

Run in a process with TRITON_INTERPRET=1 (tests/backends/test_triton.py starts it).
"""

from dataclasses import replace

import pytest
import torch
from gpu_integration import (  # noqa: F401 - tests
    test_a_frozen_tower_costs_the_others_nothing,
    test_a_large_upstream_gradient_reaches_half_precision,
    test_hidden_pairs,
    test_nan_and_infinity_are_not_hidden,
    test_one_column_expanded,
    test_one_pair_costs_nothing,
    test_opcheck,
    test_pytorchs_settings_do_not_matter,
    test_scales,
    test_siglip_without_a_bias_under_other_settings,
    test_stats_are_those_of_the_specification,
    test_vectors_of_any_stride,
)
from gpu_suite import accepted
from integration_cases import fused, same

import supclap_kernels as sk
from supclap_kernels import dispatch
from supclap_kernels.testing import Case, make_inputs


@pytest.mark.parametrize("options", [{}, {"objective": "siglip"}, {"bilateral": "none"}])
def test_bit_equal_when_run_again_and_when_panels_are_kept(options):
    """300 rows in three tiles a side: two of them in flight."""
    case = Case(N=300, D=16, radius="row", options=options)
    inputs = make_inputs(case)
    runs = [fused(case, inputs, backend="panel", workspace=w) for w in (0, 0, 2**19, 2**28)]
    assert same(runs[0], runs[1])
    # Tiles of one side, kept or not; larger tiles add in another order.
    assert sk.memory_estimate(300, 16, backend="panel", workspace=0) > 0
    assert not same(runs[0], runs[3])


def test_positives_far_below_the_negatives(backend):
    """Each audio is another text: exp2 of the difference of such logits would overflow."""
    case = Case(N=40, D=16, scale=600.0)
    inputs = make_inputs(case)
    accepted(case, replace(inputs, audio=inputs.text.roll(1, dims=0)), backend)


def test_which_backend_is_chosen():
    available = dispatch.available_backends()
    assert available["panel"] == available["triton"] == "ok"
    assert dispatch.choose("auto", "cpu")[0] == "cpu"
    assert dispatch.choose("auto", "cuda")[0] == "reference"
    with pytest.raises(RuntimeError, match="float64"):
        x = torch.randn(4, 8, dtype=torch.float64)
        sk.fused_svr_loss(x, x, backend="panel")
