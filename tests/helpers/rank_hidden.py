"""What the ranks do in tests/loss/test_hidden_pairs.py."""

import hidden_pairs
import torch
import torch.distributed as dist
from rank_cases import evaluate_rows, summed


def faults(rank: int, world: int, backend: str, exchange: str) -> list[str]:
    """Batches of which some ranks have a single row, or none that counts."""
    found = []
    for case, inputs, name in hidden_pairs.cases(torch.float32, (world, 9)):
        result = evaluate_rows(inputs, case, dist.group.WORLD, backend, exchange=exchange)
        lines = hidden_pairs.judged(case, summed(inputs, case, world), result)
        found += [f"{case}, {name}: {line}" for line in lines]
    return found
