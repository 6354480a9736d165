"""exp and log1p of the kernels, seen through the loss of two pairs with chosen logits."""

import pytest
import torch

from supclap_kernels import fused_svr_loss, native


@pytest.fixture(params=native.module().isa_running, autouse=True)
def isa(request):
    module = native.module()
    before = module.isa()
    module.set_isa(request.param)
    yield
    module.set_isa(before)


def units_in_last_place(value: torch.Tensor, exact: torch.Tensor) -> float:
    spacing = torch.finfo(value.dtype).eps * exact.abs().double()
    return float(((value.double() - exact.double()).abs() / spacing).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softplus(dtype):
    """SigLIP of one text against many audios: row 0's negatives are softplus of chosen logits."""
    logits = torch.cat([torch.linspace(-80, 80, 301), torch.tensor([-1e-3, 1e-3, 20.0, 21.0])])
    for value in logits.to(dtype):
        audio = torch.stack([torch.zeros(1, dtype=dtype), value.reshape(1)])
        text = torch.tensor([[1.0], [0.0]], dtype=dtype)
        rows = fused_svr_loss(audio, text, None, 1.0, objective="siglip", reduction="none")
        positive = torch.nn.functional.softplus(torch.zeros((), dtype=torch.float64))
        exact = torch.log1p((-value.double().abs()).exp()) + value.double().clamp_min(0) + positive
        assert units_in_last_place(rows[0], exact) < 2.0
