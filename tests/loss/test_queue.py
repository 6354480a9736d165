"""A queue of past embeddings."""

import pytest
import torch

import supclap_kernels as sk
from supclap_kernels import Negatives
from supclap_kernels.testing import Case, make_inputs


def pairs(n, start=0):
    x = torch.arange(start, start + n, dtype=torch.float32)[:, None].expand(n, 3)
    return x, -x


def test_a_queue_is_first_in_first_out():
    queue = sk.Queue(5)
    assert queue.negatives() is None and len(queue) == 0
    for start, n, expected in ((0, 2, [0, 1]), (2, 2, [0, 1, 2, 3]), (4, 3, [2, 3, 4, 5, 6])):
        queue.push(*pairs(n, start))
        held = queue.negatives()
        assert held.audio[:, 0].tolist() == expected == (-held.text[:, 0]).tolist()
        assert held.audio_ids is None
    queue.push(*pairs(9, 20))
    assert queue.negatives().audio[:, 0].tolist() == [24, 25, 26, 27, 28] and len(queue) == 5
    queue.clear()
    assert queue.negatives() is None


def test_a_queue_keeps_values_and_no_graph():
    queue, (audio, text) = sk.Queue(4), pairs(2)
    audio = audio.clone().requires_grad_()
    queue.push(audio, text, torch.tensor([7, 8]))
    with torch.no_grad():
        audio.zero_()
    held = queue.negatives()
    assert held.audio[:, 0].tolist() == [0, 1] and not held.audio.requires_grad
    assert held.audio_ids.tolist() == held.text_ids.tolist() == [7, 8]
    assert held.audio.untyped_storage().nbytes() == held.audio.nbytes


def test_a_queue_is_saved(tmp_path):
    queue = sk.Queue(4)
    queue.push(*pairs(3), torch.tensor([1, 2, 3]))
    queue.double()
    torch.save(queue.state_dict(), tmp_path / "state.pt")
    other = sk.Queue(4)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name in ("audio", "text", "ids"):
        assert torch.equal(getattr(other, name), getattr(queue, name))
        assert getattr(other, name).dtype == getattr(queue, name).dtype
    shorter = sk.Queue(2)
    shorter.load_state_dict(queue.state_dict())
    assert shorter.ids.tolist() == [2, 3] and len(shorter) == 2
    other.load_state_dict(sk.Queue(4).state_dict())
    assert len(other) == 0
    assert "size=4, filled=3" in repr(queue)


def test_a_queue_in_training():
    """The same pair seen again is no negative of itself, by its id."""
    inputs = make_inputs(Case(N=6, D=8, radius="none"))
    arguments, ids = (inputs.audio, inputs.text, None, 9.0), torch.arange(6)
    queue = sk.Queue(12)
    queue.push(inputs.audio, inputs.text, ids)
    plain = sk.fused_svr_loss(*arguments, ids=ids)
    again = sk.fused_svr_loss(*arguments, ids=ids, negatives=queue.negatives())
    forgotten = sk.fused_svr_loss(*arguments, negatives=Negatives(*queue.negatives()[:2]))
    assert plain < again < forgotten


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "3"])
def test_a_size_that_cannot_be(size):
    with pytest.raises(ValueError, match="positive number of pairs"):
        sk.Queue(size)


def test_what_cannot_be_pushed():
    queue = sk.Queue(4)
    with pytest.raises(ValueError, match="must both be"):
        queue.push(torch.zeros(2, 3), torch.zeros(3, 3))
    for ids in (torch.arange(3), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids must be int64 of shape"):
            queue.push(*pairs(2), ids)
    with pytest.raises(ValueError, match="one dtype and one width"):
        queue.push(pairs(2)[0], pairs(2)[1].half())
    queue.push(*pairs(2))
    with pytest.raises(ValueError, match="one dtype and one width"):
        queue.push(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="with every batch"):
        queue.push(*pairs(2), torch.tensor([1, 2]))
    assert len(queue) == 2
