"""Process groups where they are easily wrong: subgroups, frozen towers, memory, disagreement."""

import pytest
import rank_corners as corners
from ranks import run

NEAR = 2e-5
EXCHANGES = ["gather", "ring"]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_group_of_other_ranks_than_the_first(exchange):
    assert max(run(3, corners.subgroup, exchange)) < NEAR


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_tower_that_is_frozen_on_one_rank(exchange):
    assert max(run(3, corners.frozen_on_one_rank, exchange)) < NEAR


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_negatives_that_one_rank_trains(backend):
    assert max(run(3, corners.negatives_learned_on_one_rank, backend)) < NEAR


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_backward_lets_go_of_rows_and_panels(exchange):
    assert max(run(3, corners.held_after_backward, exchange)) < 1024


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_option_is_agreed_on(backend):
    for said in run(2, corners.disagree, backend):
        for name, words in said.items():
            if backend == "reference" and name in ("exchange", "backend"):
                continue  # it gathers whatever `exchange` says
            assert name.removeprefix("return_") in words, (name, words)


def test_cached_step_with_data_parallel_towers():
    assert max(run(3, corners.cached_data_parallel)) < NEAR


@pytest.mark.parametrize("features", ["summary", "similarities"])
def test_a_dynamic_radius_in_chunks(features):
    assert max(run(3, corners.radius_over_ranks, features)) < NEAR


def test_open_clips_siglip_with_a_radius_over_ranks():
    assert max(run(3, corners.siglip_with_a_radius)) < NEAR


def test_sentence_transformers_over_ranks():
    assert max(run(3, corners.sentences_over_ranks)) < NEAR
