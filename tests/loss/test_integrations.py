"""The adapters against the formulas they replace, and against the libraries where these are."""

import enum
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import rank_cases as cases
import rank_modules as modules
import torch
import torch.nn.functional as F
from ranks import run
from torch import Tensor, nn

import supclap_kernels as sk
from supclap_kernels.integrations import laion_clap, open_clip, sentence_transformers, transformers

N, D = 19, 12


def features(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = (torch.randn(N, D, generator=generator) for _ in range(count))
    return [F.normalize(x, dim=1).requires_grad_() for x in rows]


def same(ours: Any, theirs: Any, leaves: Sequence[Tensor]) -> bool:
    """Values and gradients."""
    results = []
    for loss in (ours, theirs):
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    pairs = zip(*results, strict=True)
    return all(float((x - y).abs().max()) <= 2e-6 * float(y.abs().max()) for x, y in pairs)


def file_of(package: str, path: str) -> ModuleType:
    """One file of a library, without the rest of it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    where = Path(found.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"{package}_loss", where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def symmetric(audio: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(audio))
    logits = scale * audio @ text.t()
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


# -------------------------------------------------------------------------------------- open_clip


def test_open_clip():
    audio, text = features()
    scale = torch.tensor(14.0, requires_grad=True)
    ours = open_clip.ClipLoss()(audio, text, scale)
    assert same(ours, symmetric(audio, text, scale), [audio, text, scale])
    bias = torch.tensor([2.0], requires_grad=True)
    given = open_clip.ClipLoss()(audio, text, scale, bias, output_dict=True)
    loss = given["contrastive_loss"]
    assert torch.equal(loss, ours) and float(torch.autograd.grad(loss, bias)[0]) == 0.0


def test_open_clip_siglip():
    audio, text = features()
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -4.0))
    signs = 2 * torch.eye(N) - 1
    theirs = -F.logsigmoid(signs * (scale * audio @ text.t() + bias)).sum() / N
    ours = open_clip.SigLipLoss()(audio, text, scale, bias)
    assert same(ours, theirs, [audio, text, scale, bias])


def test_against_open_clip():
    library = file_of("open_clip", "loss.py")
    audio, text = features()
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (14.0, -4.0))
    leaves = [audio, text, scale]
    clip = (loss.ClipLoss()(audio, text, scale) for loss in (open_clip, library))
    assert same(*clip, leaves)
    given = (audio, text, scale, bias)
    assert same(open_clip.SigLipLoss()(*given), library.SigLipLoss()(*given), list(given))


def test_open_clips_chunks_change_nothing():
    """Its SigLipLoss takes the size of a chunk, and the memory alone depends on it."""
    given = (*(x.detach() for x in features()), torch.tensor(10.0), torch.tensor(-4.0))
    wanted = open_clip.SigLipLoss()(*given)
    for size in (None, 0, 512):
        assert torch.equal(open_clip.SigLipLoss(chunk_size=size)(*given), wanted)
    with pytest.raises(ValueError, match="chunk_size must be .* got -1"):
        open_clip.SigLipLoss(chunk_size=-1)


def test_support_vectors_are_half_of_the_loss():
    """The scale of the average of two directions, for L_svr as well."""
    audio, text = features()
    loss = open_clip.ClipLoss(radius=sk.StaticRadius(0.2), bilateral="none", alpha=0.7)
    whole = sk.fused_svr_loss(audio, text, 0.2, 14.0, bilateral="none", alpha=0.7)
    assert same(loss(audio, text, torch.tensor(14.0)), 0.5 * whole, [audio, text])
    assert [name for name, _ in loss.named_parameters()] == ["contrast.criterion.radius.radius"]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_gather_modes(local, objective):
    """On three ranks: the value of the mode, and the true gradient once it is averaged."""
    for errors in run(3, cases.gather_modes, local, objective):
        assert max(errors) < 3e-6, errors


# ------------------------------------------------------------------------------------- laion_clap


@pytest.mark.parametrize("kappa", [0, 2.0])
def test_laion_clap(kappa):
    audio, text, audio_mlp, text_mlp = features(4)
    scales = [torch.tensor(x, requires_grad=True) for x in (14.0, 9.0)]
    plain = laion_clap.ClipLoss()(audio, text, scales[0])
    assert same(plain, symmetric(audio, text, scales[0]), [audio, text, scales[0]])
    labels = torch.arange(N)

    def pair(x: Tensor, y: Tensor, scale: Tensor, by: Tensor) -> Tensor:
        weight = torch.exp((by @ by.t()).sum(dim=1) / (kappa * N)).detach() if kappa else None
        logits = scale * x @ y.t()
        both = F.cross_entropy(logits, labels, weight) + F.cross_entropy(logits.t(), labels, weight)
        return both / 2

    first = pair(audio, text_mlp, scales[0], audio)
    theirs = (first + pair(audio_mlp, text, scales[1], text)) / 2
    options = {"mlp_loss": True, "weight_loss_kappa": kappa}
    given = (audio, text, *scales, audio_mlp, text_mlp)
    assert same(laion_clap.ClipLoss(**options)(*given), theirs, list(given))
    library = file_of("laion_clap", "clap_module/loss.py")
    assert same(laion_clap.ClipLoss(**options)(*given), library.ClipLoss(**options)(*given), given)


def test_laion_clap_under_autocast():
    """What is computed here keeps its precision, the weights as well."""
    given = [x.detach() for x in features(4)]
    loss = laion_clap.ClipLoss(mlp_loss=True, weight_loss_kappa=1.0)
    wanted = loss(given[0], given[1], 14.0, 9.0, given[2], given[3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(given[0], given[1], 14.0, 9.0, given[2], given[3]), wanted)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_laion_clap_weighted_over_ranks(local, dtype):
    """Values and averaged gradients of its formula, in which each direction has its own weights."""
    for errors in run(3, modules.weighted_over_ranks, local, dtype):
        assert max(errors) < (3e-6 if dtype == torch.float32 else 1e-2), errors


def test_laion_clap_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="weight_loss_kappa in one process needs mlp_loss=True"):
        laion_clap.ClipLoss(weight_loss_kappa=1.0)
    over = {"weight_loss_kappa": 1.0, "rank": 0, "world_size": 2}
    with pytest.raises(ValueError, match="weight_loss_kappa over ranks needs mlp_loss=False"):
        laion_clap.ClipLoss(mlp_loss=True, **over)
    with pytest.raises(ValueError, match="weight_loss_kappa over ranks .* radius=None"):
        laion_clap.ClipLoss(radius=sk.StaticRadius(), **over)
    with pytest.raises(ValueError, match="use_horovod"):
        laion_clap.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="needs logit_scale_t"):
        laion_clap.ClipLoss(mlp_loss=True)(*features(), 14.0)


# ----------------------------------------------------------------------------------- transformers


def test_transformers():
    audio, text = features()
    scale = torch.tensor([14.0], requires_grad=True)
    outputs = SimpleNamespace(audio_embeds=audio, text_embeds=text)
    ours = transformers.clap_loss(outputs, scale)
    assert same(ours, symmetric(audio, text, scale), [audio, text, scale])
    loss, stats = transformers.clap_loss(outputs, 14.0, radius=0.1, return_stats=True)
    whole = sk.fused_svr_loss(audio, text, 0.1, 14.0)
    assert same(loss, whole / 2, [audio, text]) and stats.radius > 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "radius",
    [sk.StaticRadius(0.2), sk.DynamicRadius(features="summary")],
    ids=["static", "dynamic"],
)
def test_transformers_with_a_radius_module(radius, normalize):
    """Called as SVRLoss calls it."""
    audio, text = features()
    audio, text = (
        (length * x.detach()).requires_grad_() for length, x in ((1.5, audio), (0.7, text))
    )
    outputs = SimpleNamespace(audio_embeds=audio, text_embeds=text)
    ours = transformers.clap_loss(outputs, 14.0, radius=radius, normalize=normalize)
    whole = sk.SVRLoss(radius, normalize=normalize)(audio, text, 14.0)
    assert same(ours, whole / 2, [audio, text, *radius.parameters()])


def test_transformers_model():
    """A tiny random ClapModel: the same embeddings, the symmetric loss of them, and gradients."""
    hub = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 40, "projection_dim": 8,
    }  # fmt: skip
    audio = {
        "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "projection_dim": 8,
        "num_attention_heads": [1, 2], "num_hidden_layers": 2, "spec_size": 64, "num_mel_bins": 16,
        "window_size": 4, "patch_size": 4, "patch_stride": [4, 4], "num_classes": 4,
        "mlp_ratio": 2.0, "enable_fusion": False, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    config = hub.ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    model = hub.ClapModel(config).eval()
    given = {
        "input_ids": torch.randint(3, 50, (3, 7)),
        "input_features": torch.randn(3, 1, 64, 16),
        "is_longer": torch.zeros(3, 1, dtype=torch.bool),
    }
    outputs = model(**given, return_loss=True)
    scale = model.logit_scale_a.exp()
    loss = transformers.clap_loss(outputs, scale)
    logits = outputs.logits_per_audio
    labels = torch.arange(3)
    both = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    assert float((loss - both).abs().detach()) <= 2e-6 * float(both.detach())
    # Its own loss is one direction, twice.
    once = F.cross_entropy(outputs.logits_per_text, labels)
    assert float((outputs.loss - once).abs().detach()) <= 2e-6 * float(once.detach())
    loss.backward()
    assert all(
        p.grad is not None
        for name, p in model.named_parameters()
        if "projection" in name and "fusion" not in name
    )


# -------------------------------------------------------------------------- sentence-transformers


class Columns(nn.Module):
    """A model of sentence-transformers' form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, D)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.layer(features["x"])}


def columns(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(N, 6, generator=generator)} for _ in range(count)]


def test_sentence_transformers():
    model, given = Columns(), columns()
    loss = sentence_transformers.MultipleNegativesSymmetricRankingLoss(model)
    rows = [F.normalize(model(x)["sentence_embedding"], dim=1) for x in given]
    leaves = list(model.parameters())
    assert same(loss(given), symmetric(*rows, torch.tensor(20.0)), leaves)
    with pytest.raises(ValueError, match="anchor, positive, .* got 1"):
        loss(columns(1))
    assert loss.get_config_dict()["scale"] == 20.0


def test_support_vectors_move_the_positives():
    model, given = Columns(), columns()
    options = {"radius": sk.StaticRadius(0.3), "bilateral": "none"}
    loss = sentence_transformers.MultipleNegativesSymmetricRankingLoss(model, **options)
    anchors, positives = (model(x)["sentence_embedding"] for x in given)
    wanted = sk.fused_svr_loss(anchors, positives, 0.3, 20.0, bilateral="none", normalize=True)
    assert same(loss(given), wanted / 2, list(model.parameters()))


def test_against_sentence_transformers():
    model, given = Columns(), columns()
    ours = sentence_transformers.MultipleNegativesSymmetricRankingLoss(model, scale=15.0)
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    theirs = losses.MultipleNegativesSymmetricRankingLoss(model, scale=15.0)
    leaves = list(model.parameters())
    assert same(ours(given), theirs(given, torch.zeros(0)), leaves)


class Kind(str, enum.Enum):
    """As sentence-transformers names its similarities."""

    COSINE = "cosine"
    DOT = "dot"


@pytest.mark.parametrize(
    "fct, normalize",
    [
        (None, True),
        ("cosine", True),
        ("dot", False),
        ("dot_product", False),
        (Kind.COSINE, True),
        (Kind.DOT, False),
        ("cos_sim", True),
        ("dot_score", False),
    ],
)
def test_similarities_of_sentence_transformers(fct, normalize):
    model, given = Columns(), columns()
    loss = sentence_transformers.MultipleNegativesSymmetricRankingLoss(model, 3.0, fct)
    rows = [model(x)["sentence_embedding"] for x in given]
    wanted = sk.fused_svr_loss(*rows, None, 3.0, normalize=normalize) / 2
    assert same(loss(given), wanted, list(model.parameters()))
    assert loss.get_config_dict()["similarity_fct"] == ("cos_sim" if normalize else "dot_score")


def test_similarity_functions_of_the_library():
    util = pytest.importorskip("sentence_transformers.util")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model, given = Columns(), columns()
    ours = sentence_transformers.MultipleNegativesSymmetricRankingLoss
    for fct in (util.cos_sim, util.dot_score, util.pytorch_cos_sim):
        theirs = losses.MultipleNegativesSymmetricRankingLoss(model, 2.0, fct)
        wanted = theirs(given, torch.zeros(0))
        assert same(ours(model, 2.0, fct)(given), wanted, list(model.parameters()))
    for fct in (util.euclidean_sim, "manhattan", lambda a, b: a @ b.t()):
        with pytest.raises(ValueError, match="similarity_fct must be cos_sim .* or dot_score"):
            ours(model, 2.0, fct)
    with pytest.raises(ValueError, match="normalize=False .* similarity_fct"):
        ours(model, 2.0, util.cos_sim, normalize=False)


def test_no_adapter_imports_its_library():
    for module in (laion_clap, open_clip, sentence_transformers, transformers):
        assert len(Path(str(module.__file__)).read_text().splitlines()) <= 150
    code = (
        "import sys; from supclap_kernels.integrations import laion_clap, open_clip, "
        "sentence_transformers, transformers; "
        "assert not {'open_clip', 'laion_clap', 'transformers', 'sentence_transformers'} "
        "& set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
