"""What radius modules are made of: checkpoints of any age, a fresh start, sharding."""

import pytest
import rank_modules as modules
import torch
from interface_cases import A, T
from ranks import run
from torch import nn

import supclap_kernels as sk

KINDS = {
    "static": lambda: sk.StaticRadius(0.3),
    "summary": lambda: sk.DynamicRadius(init=0.3, features="summary"),
    "similarities": lambda: sk.DynamicRadius(6, init=0.3),
}
every_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS.keys())


def test_one_number_is_stored_and_handed_out():
    module = sk.StaticRadius(0.3)
    R = module(A, T, 9.0)
    assert module.radius.shape == (1,) and R.shape == ()
    (3.0 * R).backward()
    assert torch.equal(module.radius.grad, torch.tensor([3.0]))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_checkpoints_of_either_shape_load(shape, dtype, assign):
    state = {"radius.radius": torch.full(shape, 0.7, dtype=dtype)}
    module = sk.SVRLoss(sk.StaticRadius())
    module.load_state_dict(state, assign=assign)
    R = module.radius(A, T, 9.0)
    wanted = torch.tensor(0.7, dtype=dtype).to(dtype if assign else torch.float32)
    assert module.radius.radius.shape == (1,) and R.shape == () and bool(R == wanted)
    assert R.dtype == wanted.dtype
    assert state["radius.radius"].shape == shape
    whole = nn.Sequential(module)
    whole.load_state_dict({f"0.{name}": x for name, x in state.items()})
    again = sk.SVRLoss(sk.StaticRadius())
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.radius(A, T, 9.0), R.to(again.radius.radius.dtype))


def test_a_checkpoint_that_is_no_radius_is_refused():
    for wrong in (torch.ones(2), torch.ones(1, 1)):
        with pytest.raises(RuntimeError, match="size mismatch for radius"):
            sk.StaticRadius().load_state_dict({"radius": wrong})
    with pytest.raises(RuntimeError, match="Missing key"):
        sk.StaticRadius().load_state_dict({})


@every_kind
@pytest.mark.parametrize("outermost_first", [False, True])
def test_built_without_memory_and_reset(build, outermost_first):
    """As trainers do it, in either order: `apply`, or one module after the other."""
    torch.manual_seed(0)
    wanted = build()
    with torch.device("meta"):
        module = nn.Sequential(sk.SVRLoss(build()))
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)  # whatever was there
    torch.manual_seed(0)
    found = list(module.modules())
    for part in found if outermost_first else found[::-1]:
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert torch.equal(module[0].radius(A, T, 9.0).expand(6), torch.full((6,), 0.3))
    assert module.state_dict().keys() == {f"0.radius.{name}" for name in wanted.state_dict()}


@every_kind
def test_a_reset_is_a_new_start(build):
    """With the random numbers of one that is built anew."""
    torch.manual_seed(3)
    wanted = build()
    module = build()
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(3)
    module.reset_parameters()
    for name, x in wanted.state_dict().items():
        assert torch.equal(module.state_dict()[name], x), name


def test_the_networks_first_weights_are_what_they_were():
    """The layers take the same random numbers as before they could be reset."""
    torch.manual_seed(5)
    module = sk.DynamicRadius(6)
    after = torch.rand(3)
    torch.manual_seed(5)
    first, _, middle = nn.Linear(6, 256), nn.Linear(64, 1), nn.Linear(256, 64)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(module.network[0].weight, first.weight)
    assert torch.equal(module.network[2].weight, middle.weight)
    assert float(module.network[4].weight.abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", ["model", "loss", "radius"])
def test_fully_sharded_with_the_loss_inside(kind, wrapped):
    for errors in run(2, modules.sharded_with_loss, kind, wrapped):
        assert max(errors) < 2e-5, errors
