"""Encoders that people use: audio towers of transformers, text towers pooled as their folder says,
encoders of one's own; tiny random ones, saved as the hub has them."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import log_of, settings
from interface_cases import close
from supclap import hub, hub_audio
from supclap.batches import pad_features
from supclap.config import ModelConfig
from supclap.errors import UserError
from supclap.evaluate import evaluate_run
from supclap.model import SupclapModel, load_model
from supclap.train import train
from test_encoders import WORDS, word_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS = (0.2, 0.5, 1.1)
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


# ------------------------------------------------------------------------------------------- audio


def audio_folder(kind, folder):
    """A tiny model with its extractor."""
    torch.manual_seed(0)
    t = transformers
    convolutions = {
        "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (160, 2),
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
        "num_feat_extract_layers": 2,
    }  # fmt: skip
    made = {
        "audio-spectrogram-transformer": lambda: (
            t.ASTModel(t.ASTConfig(**TINY, max_length=120, num_mel_bins=128)),
            t.ASTFeatureExtractor(max_length=120, num_mel_bins=128),
        ),
        "whisper": lambda: (
            t.WhisperModel(t.WhisperConfig(
                d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64,
                max_source_positions=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            )),
            t.WhisperFeatureExtractor(chunk_length=2),
        ),
        "wav2vec2": lambda: (
            t.Wav2Vec2Model(t.Wav2Vec2Config(**TINY, **convolutions)), t.Wav2Vec2FeatureExtractor()
        ),
        "hubert": lambda: (
            t.HubertModel(t.HubertConfig(**TINY, **convolutions)), t.Wav2Vec2FeatureExtractor()
        ),
    }  # fmt: skip
    model, extractor = made[kind]()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model.eval(), extractor


def expected_of(kind, model, extractor, wave):
    """What the model itself makes of one clip alone."""
    inputs = extractor(wave, sampling_rate=16_000, return_tensors="pt")
    if kind == "audio-spectrogram-transformer":
        return model(**inputs).pooler_output[0]
    if kind != "whisper":
        return model(**inputs).last_hidden_state[0].mean(dim=0)
    states = model.encoder(**inputs).last_hidden_state[0]
    frames = inputs["input_features"][0]
    same = (frames == frames[:, -1:]).all(dim=0).tolist()
    silent = next(n for n, _ in enumerate(same) if all(same[n:]))  # where only padding is left
    return states[: (silent + 2) // 2].mean(dim=0)


KINDS = ("audio-spectrogram-transformer", "whisper", "wav2vec2", "hubert")


@pytest.mark.parametrize("kind", KINDS)
def test_an_audio_tower_is_the_model_itself(kind, tmp_path):
    model, extractor = audio_folder(kind, tmp_path)
    encoder = hub.audio_encoder(str(tmp_path)).eval()
    assert isinstance(encoder, hub_audio.HubAudio) and encoder.width == 16
    rng = np.random.default_rng(0)
    waves = [rng.normal(size=int(16_000 * s)).astype(np.float32) * 0.1 for s in SECONDS]
    features = [encoder.front_end(wave) for wave in waves]
    with torch.no_grad():
        together = encoder(*pad_features(features))
        for wave, row in zip(waves, together, strict=True):
            assert close(row, expected_of(kind, model, extractor, wave), 1e-4)
    assert together.std(dim=0).max() > 1e-3
    if kind in hub_audio.FRAMES:  # what only pads is not kept
        assert [len(x) for x in features] == sorted(len(x) for x in features)
        whole = extractor(waves[0], sampling_rate=16_000, return_tensors="pt")
        assert len(features[0]) < 0.5 * max(next(iter(whole.values())).shape[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_such_a_tower(kind, manifest, tmp_path):
    audio_folder(kind, tmp_path / "tower")
    model = ModelConfig(
        audio_encoder=f"hf:{tmp_path / 'tower'}", width=32, heads=2, embed_dim=16, max_seconds=1.0
    )
    run = train(settings(manifest, tmp_path / "run", model=model, epochs=12, lr=3e-3))
    losses = [line["loss"] for line in log_of(run)]
    assert sum(losses[-3:]) < sum(losses[:3])
    shutil.rmtree(tmp_path / "tower")
    metrics, _ = evaluate_run(run, manifest)
    assert 0 < metrics["t2a"]["R@10"] <= 1
    assert load_model(run).audio.encoder.front_end.key


def test_half_precision_is_raised_for_good(manifest, tmp_path):
    model, _ = audio_folder("whisper", tmp_path / "tower")
    model.half().save_pretrained(tmp_path / "tower")
    settings_of_model = ModelConfig(
        audio_encoder=f"hf:{tmp_path / 'tower'}", width=32, heads=2, embed_dim=16, max_seconds=1.0
    )
    run = train(settings(manifest, tmp_path / "run", model=settings_of_model, epochs=1))
    path = run / "audio_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    loaded = load_model(run)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert evaluate_run(run, manifest)[0]["t2a"]["R@10"] > 0


def test_what_is_heard_of_a_long_or_a_tiny_clip(tmp_path):
    _, extractor = audio_folder("audio-spectrogram-transformer", tmp_path)
    front_end = hub.audio_encoder(str(tmp_path)).front_end
    assert front_end.seconds == extractor.max_length / 100 == 1.2
    assert len(front_end(np.ones(100, dtype=np.float32))) >= 1


def test_a_kind_that_is_unknown(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        UserError, match="model type 'bert'; known are ced, clap, audio-spec.*hubert"
    ):
        hub.audio_encoder(str(tmp_path))


# -------------------------------------------------------------------------------------------- text


def bert_folder(folder):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **TINY)
    transformers.BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("prompt", ["", "the sound of "])
def test_pooling_is_that_of_sentence_transformers(mode, prompt, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(bert_folder(tmp_path / "bert")))
    prompts = {"prompts": {"query": prompt}, "default_prompt_name": "query"} if prompt else {}
    theirs = SentenceTransformer(
        modules=[transformer, Pooling(16, pooling_mode=mode)], device="cpu", **prompts
    )
    theirs.save_pretrained(str(tmp_path / "model"))
    sentences = ["a dog", "the sound of rain", "rain"]
    name = f"hf:{tmp_path / 'model'}"
    ours = SupclapModel(ModelConfig(width=32, heads=2, text_encoder=name)).eval()
    ours.keep_encoders(tmp_path / "run")
    expected = torch.from_numpy(theirs.encode(sentences))
    for encoder in (ours.text.encoder, hub.text_encoder(str(tmp_path / "run/text_encoder"), False)):
        encoder.load_state_dict(ours.text.encoder.state_dict())
        with torch.no_grad():
            found = encoder.eval()(*encoder.tokenizer(sentences, ["eng"] * 3))
        assert close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({}, 38),
        ({"sentence_bert_config.json": {"max_seq_length": 6}}, 6),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, 38),
        ({"tokenizer_config.json": {"model_max_length": 7}}, 7),
        ({"tokenizer_config.json": {"model_max_length": 40}}, 40),  # all of its positions
        ({"tokenizer_config.json": {"model_max_length": 999}}, 40),
    ],
)
def test_how_many_tokens_are_read(files, tokens, tmp_path):
    config = transformers.BertConfig(**TINY, vocab_size=64, max_position_embeddings=40)
    transformers.BertModel(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    for name, said in files.items():
        path = tmp_path / name
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | said))
    assert hub.text_encoder(str(tmp_path)).tokenizer.most == tokens


@pytest.mark.parametrize(
    "text", ["{broken", "[]", '{"max_seq_length": "6"}', '{"max_seq_length": -1}']
)
def test_a_folder_that_says_nonsense(text, tmp_path):
    config = transformers.BertConfig(**TINY, vocab_size=64, max_position_embeddings=40)
    transformers.BertModel(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(text)
    with pytest.raises(UserError, match="sentence_bert_config|max_seq_length"):
        hub.text_encoder(str(tmp_path))


def test_a_real_text_encoder(manifest, tmp_path):
    """MiniLM as published, from its folder: the vectors of sentence-transformers, and a run."""
    package = pytest.importorskip("all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "minilm"
    zipfile.ZipFile(package.get_model_zip_path()).extractall(folder)
    encoder = hub.text_encoder(str(folder)).eval()
    texts = ["a dog barks", "rain falls on a tin roof, and a bird sings", "one two " * 300]
    ids, mask = encoder.tokenizer(texts, ["eng"] * 3)
    assert mask.sum(dim=1).tolist()[2] == 256  # as its folder says
    with torch.no_grad():
        ours = torch.nn.functional.normalize(encoder(ids, mask), dim=1)
    theirs = torch.from_numpy(SentenceTransformer(str(folder)).encode(texts))
    assert (ours - theirs).abs().max() < 1e-5
    model = ModelConfig(width=32, heads=2, embed_dim=32, text_encoder=f"hf:{folder}")
    run = train(settings(manifest, tmp_path / "run", model=model, freeze="text", lr=1e-2))
    losses = [line["loss"] for line in log_of(run)]
    assert losses[-1] < losses[0]
    kept = load_model(run).text.encoder
    assert kept.tokenizer.most == 256 and kept.pooling == "mean"


@pytest.mark.parametrize("key, known", [
    ("pooling_mode_cls_token", "cls"), ("pooling_mode_mean_tokens", "mean"),
    ("pooling_mode_lasttoken", "lasttoken"), ("pooling_mode_max_tokens", None),
    ("pooling_mode_mean_sqrt_len_tokens", None),
])  # fmt: skip
def test_pooling_as_earlier_versions_wrote_it(key, known, tmp_path):
    assert hub.pooling_of(tmp_path, "--text-encoder") == "mean"
    path = tmp_path / hub.POOLING
    path.parent.mkdir()
    others = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    settings = others | {"word_embedding_dimension": 16, key: True, "include_prompt": True}
    path.write_text(json.dumps(settings))
    if known:
        assert hub.pooling_of(tmp_path, "--text-encoder") == known
    else:
        with pytest.raises(UserError, match="known are mean, cls, lasttoken"):
            hub.pooling_of(tmp_path, "--text-encoder")


# ------------------------------------------------------------------------------------ of one's own

OWN = """
import torch


class Loudness(torch.nn.Module):
    projects, width = False, 4

    class front_end:
        sample_rate, seconds, key = 8_000, 30.0, "loudness"

        def __new__(cls, wave):
            return torch.from_numpy(wave[:: 80]).abs()[:, None]

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, features, lengths):
        return features.sum(dim=(1, 2))[:, None] / lengths[:, None] * self.scale


def build():
    return Loudness()
"""


def test_the_example_of_ones_own(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2] / "examples")
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x != ""])
    model = ModelConfig(audio_encoder="py:own_encoder:build", width=32, heads=2, embed_dim=16)
    run = train(settings(manifest, tmp_path / "run", model=model, epochs=8, lr=1e-2))
    losses = [line["loss"] for line in log_of(run)]
    assert losses[-1] < losses[0]
    encoder = load_model(run).audio.encoder
    waves = [torch.randn(n, 1) for n in (100, 400, 3_000, 16_000)]
    with torch.no_grad():
        together = encoder(*pad_features(waves))
        for wave, row in zip(waves, together, strict=True):
            assert close(encoder(*pad_features([wave]))[0], row, 1e-5)


def test_an_encoder_of_ones_own(manifest, tmp_path, monkeypatch):
    (tmp_path / "own_loudness.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", str(tmp_path))])
    model = ModelConfig(audio_encoder="py:own_loudness:build", width=32, heads=2, embed_dim=16)
    run = train(settings(manifest, tmp_path / "run", model=model, epochs=2))
    moved = load_model(run).audio.encoder.scale
    assert not torch.equal(moved, torch.ones(4)) and evaluate_run(run, manifest)[0]
    for name, text in (
        ("py:own_loudness:nothing", "nothing"), ("py:no_such_module:build", "no_such_module"),
        ("py:own_loudness", "own_loudness"), ("py:", "py:"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=text):
            SupclapModel(ModelConfig(audio_encoder=name))
