"""What the ranks do in tests/loss/test_surroundings.py."""

import surroundings
import torch.distributed as dist


def every_call(rank: int, world: int) -> list[str]:
    """What depends on a setting; over the group where there are several ranks."""
    return surroundings.changed(surroundings.calls(dist.group.WORLD if world > 1 else None))
