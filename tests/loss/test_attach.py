"""A radius that hangs on the model: found by what handles models, and found again."""

import copy
from typing import NamedTuple

import pytest
import rank_attached as attached
import torch
from rank_attached import Towers, batch
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

import supclap_kernels as sk
from supclap_kernels.attach import dependent


def test_the_model_has_the_radius_and_computes_what_it_did():
    model = Towers()
    before = model(*batch(0))
    names = list(model.state_dict())
    radius = sk.StaticRadius(0.2)
    assert sk.attach_radius(model, radius) is radius
    assert all(torch.equal(x, y) for x, y in zip(model(*batch(0)), before, strict=True))
    assert list(model.state_dict()) == [*names, "supclap_radius.radius"]
    assert any(p is radius.radius for p in model.parameters())
    model.double().eval()
    assert radius.radius.dtype == torch.float64 and not radius.training


def test_attached_again_the_same_comes_back():
    model = Towers()
    radius = sk.attach_radius(model, sk.StaticRadius(0.2))
    assert sk.attach_radius(model, radius) is radius
    assert sk.attach_radius(model, sk.StaticRadius(0.7)) is radius
    assert sk.attach_radius(torch.compile(model, backend="eager"), sk.StaticRadius()) is radius
    assert sk.attach_radius(nn.DataParallel(model), sk.StaticRadius()) is radius
    other = copy.deepcopy(model)
    theirs = sk.attach_radius(other, sk.StaticRadius())
    assert theirs is not radius and torch.equal(theirs.radius, radius.radius)


@pytest.mark.parametrize(
    "other",
    [
        sk.StaticRadius(),
        sk.DynamicRadius(9, hidden=(4, 4)),
        sk.DynamicRadius(8, hidden=(4, 5)),
        sk.DynamicRadius(8, hidden=(4, 4), detach_similarity=True),
    ],
)
def test_another_kind_of_radius_is_refused(other):
    model = Towers()
    sk.attach_radius(model, sk.DynamicRadius(8, hidden=(4, 4)))
    with pytest.raises(ValueError, match="another radius hangs.*detach_radius"):
        sk.attach_radius(model, other)


def test_what_is_no_module_is_refused():
    for given, name in (((Towers(), 0.1), "radius"), ((Towers, sk.StaticRadius()), "model")):
        with pytest.raises(TypeError, match=f"{name} must be a module, got"):
            sk.attach_radius(*given)


def test_detached_the_model_is_as_before():
    model = Towers()
    names = list(model.state_dict())
    assert sk.detach_radius(model) is None
    radius = sk.attach_radius(model, sk.StaticRadius())
    assert sk.detach_radius(torch.compile(model, backend="eager")) is radius
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_checkpoints(kind):
    """With the radius into a model that has one; either way between the two for inference."""
    plain, model = Towers(), Towers()
    radius = sk.attach_radius(model, attached.radius_of(kind))
    with torch.no_grad():
        for p in radius.parameters():
            p.add_(0.25)
    other = Towers()
    theirs = sk.attach_radius(other, attached.radius_of(kind))
    other.load_state_dict(model.state_dict())
    pairs = zip(radius.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    found = plain.load_state_dict(model.state_dict(), strict=False)
    assert all(name.startswith("supclap_radius.") for name in found.unexpected_keys)
    assert other.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []


def test_in_a_sequential():
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    x = torch.randn(2, 4)
    before = model(x)
    radius = sk.attach_radius(model, sk.StaticRadius())
    assert torch.equal(model(x), before)
    assert sk.attach_radius(model, sk.StaticRadius()) is radius
    assert "supclap_radius.radius.radius" in model.state_dict()
    assert sk.detach_radius(model) is radius and len(model) == 2


def test_on_the_meta_device():
    with torch.device("meta"):
        model = Towers()
    assert sk.attach_radius(model, sk.StaticRadius(0.2)).radius.device.type == "cpu"


# ------------------------------------------------------------------------------------- two ranks


SETTINGS = {
    "own rows, static": ("static", False, {}),
    "own rows": ("dynamic", False, {}),
    "all rows, static": ("static", True, {}),
    "all rows": ("dynamic", True, {"gradient_as_bucket_view": True}),
    # It searches what forward returns, and it is the loss that uses the radius.
    "unused looked for": ("dynamic", False, {"find_unused_parameters": True}),
    "static graph": ("dynamic", False, {"find_unused_parameters": True, "static_graph": True}),
}


def run_trained(rank: int, world: int) -> dict[str, list[torch.Tensor]]:
    return {
        name: attached.trained(rank, world, kind, across, **wrapping)
        for name, (kind, across, wrapping) in SETTINGS.items()
    }


def test_copies_stay_equal_under_ddp():
    """With each rank's own loss as well; and with the loss of all rows as in one process."""
    copies = run(2, run_trained)
    for name, (kind, across, _) in SETTINGS.items():
        assert all(torch.equal(x, y) for x, y in zip(*(c[name] for c in copies), strict=True))
        start = attached.radius_of(kind).parameters()
        assert not all(torch.equal(x, y) for x, y in zip(copies[0][name], start, strict=True))
        if across:
            alone = attached.trained(0, 1, kind, False)
            for x, y in zip(copies[0][name], alone, strict=True):
                assert float((x - y).abs().max()) <= 1e-5 * float(1e-2 + y.abs().max())
        if "graph" in name or "unused" in name:
            pairs = zip(copies[0][name], copies[0]["own rows"], strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


def test_outputs_of_any_form_depend_on_the_radius():
    R = nn.Parameter(torch.tensor(0.1))
    x = torch.ones(3, requires_grad=True)
    for output in (x, (x, 1), [x, None], {"x": x, "n": "a"}, Pair(x, 2), {"deep": ({"x": x},)}):
        found = dependent(output, [R])
        assert type(found) is type(output)
        (leaf,) = [t for t in tree_flatten(found)[0] if isinstance(t, torch.Tensor)]
        assert torch.equal(leaf, x)
        gradients = torch.autograd.grad(leaf.sum(), (x, R), allow_unused=True)
        assert torch.equal(gradients[0], torch.ones(3)) and gradients[1] is None
    assert dependent(x.detach(), [R]).grad_fn is None


def test_too_late_for_a_wrapped_model():
    (message,) = run(1, attach_late)
    assert "DistributedDataParallel" in message and "attach the radius first" in message


def attach_late(rank: int, world: int) -> str:
    try:
        sk.attach_radius(DistributedDataParallel(Towers()), sk.StaticRadius())
    except ValueError as error:
        return str(error)
    return "nothing was raised"


# -------------------------------------------------------------------------- sentence-transformers


def sentence_model() -> nn.Module:
    library = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    words = tokenizers.models.WordLevel({"?": 0, "dog": 1, "rain": 2}, unk_token="?")
    embedding = parts.StaticEmbedding(tokenizers.Tokenizer(words), embedding_dim=4)
    return library.SentenceTransformer(modules=[embedding], device="cpu")


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_sentence_transformer_saves_and_resumes_it(kind, safe, tmp_path):
    model = sentence_model()
    plain = model.encode(["dog", "rain"], convert_to_tensor=True)
    radius = sk.attach_radius(model, attached.radius_of(kind))
    assert torch.equal(model.encode(["dog", "rain"], convert_to_tensor=True), plain)
    with torch.no_grad():
        for p in radius.parameters():
            p.add_(0.25)
    model.save_pretrained(str(tmp_path / "checkpoint"), safe_serialization=safe)
    # As its trainer resumes: into a model that was made and attached anew.
    other = sentence_model()
    theirs = sk.attach_radius(other, attached.radius_of(kind))
    classes = {f"{type(m).__module__}.{type(m).__name__}": type(m) for m in other}
    where = str(tmp_path / "checkpoint")
    loaded = type(other)._load_with_module_classes(where, classes, trust_remote_code=False)
    other.load_state_dict(loaded.state_dict())
    # And by hand, from the folder.
    third = type(other)(where, trust_remote_code=True, device="cpu")
    thirds = sk.attach_radius(third, attached.radius_of(kind))
    for found in (theirs, thirds):
        assert type(found) is type(radius)
        pairs = zip(found.parameters(), radius.parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    assert sk.attach_radius(third, attached.radius_of(kind)) is thirds
    # Without it the folder is a plain one.
    assert sk.detach_radius(model) is radius
    model.save_pretrained(str(tmp_path / "final"))
    final = type(other)(str(tmp_path / "final"), device="cpu")
    assert torch.equal(final.encode(["dog", "rain"], convert_to_tensor=True), plain)
