"""What people wrap around a loss: checkpoints, functional transforms, export, DTensor."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import supclap_kernels as sk
from supclap_kernels import ops
from supclap_kernels.backends.call import Tensors


def rows(N: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.randn(N, 8, generator=generator) for _ in range(2))
    return audio.requires_grad_(), text.requires_grad_()


def loss(audio: Tensor, text: Tensor, backend: str = "auto") -> Tensor:
    return sk.fused_svr_loss(audio, text, 0.1, normalize=True, backend=backend)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    audio, text = rows()
    wanted = torch.autograd.grad(loss(audio, text), (audio, text))
    checkpoint(loss, audio, text, use_reentrant=reentrant).backward()
    assert torch.equal(audio.grad, wanted[0]) and torch.equal(text.grad, wanted[1])


def test_functional_gradient_is_a_clear_error():
    audio, text = (x.detach() for x in rows())
    with pytest.raises(RuntimeError, match=r"torch\.func .* backend='reference'"):
        torch.func.grad(loss)(audio, text)
    found = torch.func.grad(lambda x: loss(x, text, "reference"))(audio)
    leaf = audio.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf, text), leaf)
    assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


def test_vmap():
    """Over a batch of batches, without gradients."""
    audio, text = (x.detach() for x in rows())
    several = torch.stack([audio, audio.flip(0), 2.0 * audio])
    found = torch.func.vmap(loss, in_dims=(0, None))(several, text)
    assert torch.equal(found, torch.stack([loss(x, text) for x in several]))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = sk.SVRLoss(sk.StaticRadius(0.1), normalize=True)

    def forward(self, audio: Tensor, text: Tensor) -> Tensor:
        return self.loss(audio, text, 10.0)


def test_export():
    """One program for every batch size."""
    model, given = Model(), tuple(x.detach() for x in rows())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {0: batch}))
    for N in (11, 5, 40):
        audio, text = (x.detach() for x in rows(N))
        with torch.no_grad():
            assert torch.equal(program.module()(audio, text), model(audio, text))


class Watch(TorchDispatchMode):
    """Notes the operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        return [name.split("::")[1] for name in self.seen if name.startswith("supclap_kernels")]


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_what_watches_operators_sees_them(needs_gradient):
    """Modes, forward and backward on their own; the numbers are those of the direct calls."""
    audio, text = (x.requires_grad_(needs_gradient) for x in rows())
    plain = loss(audio, text)
    with Watch() as forward:
        watched = loss(audio, text)
    assert forward.ours() == ["svr_loss"] and torch.equal(plain, watched)
    if not needs_gradient:
        return
    wanted = torch.autograd.grad(plain, (audio, text), retain_graph=True)
    seen = {}
    for name, value in {"plain": plain, "watched": watched}.items():
        with Watch() as backward:
            found = torch.autograd.grad(value, (audio, text))
        seen[name] = backward.ours()
        assert all(map(torch.equal, found, wanted))
    # What the operators need of forward is not there after a direct call.
    assert seen == {"plain": ["svr_loss", "svr_loss_backward"], "watched": ["svr_loss_backward"]}


class Marked(Tensor):
    """A tensor of another kind."""


def test_tensors_of_another_kind_take_the_operators():
    audio, text = (x.detach() for x in rows())
    assert not ops.watched(Tensors(audio, nn.Parameter(text), None, audio.sum(), None, None, None))
    assert ops.watched(
        Tensors(audio.as_subclass(Marked), text, None, audio.sum(), None, None, None)
    )
    found = loss(audio.as_subclass(Marked), text)
    assert torch.equal(torch.as_tensor(found).as_subclass(Tensor), loss(audio, text))


def test_fake_tensors():
    """Shapes without numbers, in eager mode."""
    audio, text = (x.detach() for x in rows())
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x).requires_grad_() for x in (audio, text)]
        gradients = torch.autograd.grad(loss(*fakes), fakes)
    assert [x.shape for x in gradients] == [audio.shape, text.shape]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_is_an_error_and_never_a_constant():
    """torch.jit cannot record the operators' options: it must not record their result instead."""
    with torch.no_grad(), pytest.raises(RuntimeError, match="Tracing a list of bool"):
        torch.jit.trace(loss, tuple(x.detach() for x in rows()), check_trace=False)
