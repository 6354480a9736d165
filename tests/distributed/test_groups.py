"""Modules over process groups: built before the group, copied, saved, printed."""

import copy
import pickle

import pytest
import rank_modules as modules
import torch
from interface_cases import A, T
from rank_corners import Columns
from ranks import run

import supclap_kernels as sk
from supclap_kernels.integrations import open_clip, sentence_transformers


def test_modules_older_than_the_group(tmp_path):
    for changed in run(2, modules.built_early, str(tmp_path / "store")):
        assert not changed


def test_copies_with_the_default_group():
    for changed in run(2, modules.copied):
        assert not changed


def test_copies_with_a_group_of_some_ranks():
    found = run(3, modules.subgroup)
    assert not [way for changed, _ in found for way in changed]
    criterion = pickle.loads(found[0][1])
    for module in (criterion, pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        with pytest.raises(ValueError, match="was not saved .* set `group`"):
            module(A, T, 14.0)
        module.group = None
        assert torch.equal(module(A, T, 14.0), sk.fused_svr_loss(A, T, 0.1, 14.0))


def test_a_world_size_that_does_not_fit(tmp_path):
    found = run(2, modules.misfits) + run(2, modules.misfits_later, str(tmp_path / "store"))
    assert all("do not fit the process group" in said for said in found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_group_that_is_not_there(backend):
    calls = {
        "module": lambda: sk.SVRLoss(group="world", backend=backend)(A, T, 14.0),
        "function": lambda: sk.fused_svr_loss(A, T, group="world", backend=backend),
        "reference": lambda: sk.svr_loss_reference(A, T, group="world"),
        "radius": lambda: sk.DynamicRadius(features="summary")(A, T, 14.0, group="world"),
        "adapter": lambda: open_clip.ClipLoss(rank=0, world_size=2)(A, T, 14.0),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="init_process_group"):
            call()


def test_what_a_group_may_be():
    with pytest.raises(ValueError, match="'world' or None, got 'all'"):
        sk.SVRLoss(group="all")
    with pytest.raises(ValueError, match="'world' or None, got 'all'"):
        sk.fused_svr_loss(A, T, group="all")
    with pytest.raises(TypeError, match="process group .* got int"):
        sk.SVRLoss(group=3)
    criterion = sk.SVRLoss()
    assert criterion.group is None and "group=None" in repr(criterion)
    with pytest.raises(TypeError, match="process group .* got object"):
        criterion.group = object()


def test_gathering_in_a_single_process_is_its_own_rows():
    loss = sentence_transformers.MultipleNegativesSymmetricRankingLoss
    given = [{"x": A}, {"x": T}]
    assert torch.equal(loss(Columns(), gather_across_devices=True)(given), loss(Columns())(given))
