"""Tensors that are not what they were in forward, and numbers at the end of their range."""

import pytest
import torch
from interface_cases import close
from torch.nn.functional import normalize

import supclap_kernels as sk

N, D = 24, 16
WAYS = ("auto", "cpu:small", "cpu:panel")


def leaves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        normalize(torch.randn(N, D, generator=generator), dim=1).requires_grad_() for _ in range(2)
    ]


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("again", [False, True], ids=["first backward", "second backward"])
def test_another_layout_of_the_same_values(backend, again):
    """Assigned to `data`, which autograd does not see."""
    audio, text = leaves()
    weight, radius = torch.rand(N), torch.rand(N, requires_grad=True)
    given = (audio, text, radius)
    loss = sk.fused_svr_loss(*given, 5.0, weight=weight, backend=backend)
    wanted = torch.autograd.grad(loss, given, retain_graph=True)
    if not again:
        loss = sk.fused_svr_loss(*given, 5.0, weight=weight, backend=backend)
    for x in (audio, text):
        x.data = x.data.t().contiguous().t()
    for x in (weight, radius):
        x.data = torch.stack([x.data, -x.data], dim=1)[:, 0]
    found = torch.autograd.grad(loss, given)
    for x, y in zip(found, wanted, strict=True):
        assert close(x, y, 1e-5)


@pytest.mark.parametrize("backend", WAYS)
def test_another_shape_or_no_memory_is_an_error(backend):
    """... in a backward that reads the tensors again; the kernels do not ask."""
    audio, text = leaves()
    loss = sk.fused_svr_loss(audio, text, 0.1, backend=backend, reduction="none").sum()
    text.data = torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match=r"text has shape \(1, 1\) beside audio \(24, 16\)"):
        loss.backward()
    audio, text = leaves()
    loss = sk.fused_svr_loss(audio, text, 0.1, backend=backend)
    torch.autograd.grad(loss, text, retain_graph=True)
    text.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="text has no memory any more"):
        torch.autograd.grad(loss, text)


def test_an_operator_refuses_what_does_not_fit():
    audio, text = (x.detach() for x in leaves())
    options = sk.options.Options()
    arguments = (None, torch.tensor(14.0), None, None, None, (False,) * 5, *options)
    for wrong in (text[:3], text[:, :3], text[0]):
        with pytest.raises(RuntimeError, match="text has shape"):
            torch.ops.supclap_kernels.svr_loss(audio, wrong, *arguments)


@pytest.mark.parametrize(
    "rows, dtype, options",
    [
        (300, torch.float32, {}),
        (N, torch.bfloat16, {}),
        (N, torch.float32, {"reduction": "none"}),
        (N, torch.float32, {}),
        (N, torch.float32, {"return_stats": True}),
    ],
)
def test_batched_upstream_gradients(rows, dtype, options):
    """`is_grads_batched`, as torch.autograd.functional.jacobian(vectorize=True) asks."""
    audio = torch.randn(rows, 8, dtype=dtype).requires_grad_()
    loss = sk.fused_svr_loss(audio, torch.randn(rows, 8, dtype=dtype), 0.1, **options)
    loss = loss[0] if options.get("return_stats") else loss
    upstream = torch.randn(3, *loss.shape)
    found = torch.autograd.grad(loss, audio, upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(loss, audio, x, retain_graph=True)[0] for x in upstream]
    assert torch.equal(found[0], torch.stack(single))


@pytest.mark.parametrize("backend", ["cpu:small", "cpu:panel"])
@pytest.mark.parametrize("objective", ["infonce", "siglip"])
@pytest.mark.parametrize("radius", [None, 0.3])
@pytest.mark.parametrize("size", [3e3, 1e4, 1e5, 1e8])
def test_logits_without_a_fraction(backend, objective, radius, size):
    """Rows so long that a float32 logit is off by more than 1: the loss is still finite, and right
    to its own digits."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        audio, text = (size * torch.randn(64, 64, generator=generator) for _ in range(2))
        call = (audio.requires_grad_(), text.requires_grad_(), radius)
        losses = [
            sk.fused_svr_loss(*call, objective=objective, backend=name)
            for name in (backend, "reference")
        ]
        assert close(*losses, 1e-4)
        for x, y in zip(*(torch.autograd.grad(loss, call[:2]) for loss in losses), strict=True):
            assert (x - y).norm() <= 1e-2 * y.norm()
