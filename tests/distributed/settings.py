"""What the ranks do in tests/test_surroundings.py."""

import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import surroundings


def every_call(rank: int, world: int) -> list[str]:
    """What depends on a setting; over the group where there are several ranks."""
    return surroundings.changed(surroundings.calls(dist.group.WORLD if world > 1 else None))
