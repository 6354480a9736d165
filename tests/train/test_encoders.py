"""CED and the models of the hub, from tiny random ones saved to disk in the hub's format."""

import json
import shutil

import numpy as np
import pytest
import torch
from clips import log_of, near, settings
from safetensors.torch import load_file, save_file
from supclap.batches import pad_features
from supclap.ced import CED, CHUNK, NAMES, PATCH, SIZES
from supclap.cli import main
from supclap.config import ModelConfig
from supclap.errors import UserError
from supclap.evaluate import evaluate_run
from supclap.model import SupclapModel, load_model
from supclap.train import train

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("supclap.hub")

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------- CED


def small_ced(seed=0):
    torch.manual_seed(seed)
    model = CED(width=16, heads=2, layers=2)
    model.init_bn.running_mean.normal_(-30, 5)
    model.init_bn.running_var.uniform_(100, 300)
    return model.eval()


def test_ced_does_not_hear_padding():
    model = small_ced()
    clips = [
        20 * torch.randn(frames, 64) - 30 for frames in (3, 16, 40, 41, 300, CHUNK, 1500, 2300)
    ]
    with torch.no_grad():
        together = model(*pad_features(clips))
        for row, clip in enumerate(clips):
            alone = model(*pad_features([clip]))[0]
            assert (alone - together[row]).abs().max() < 1e-5, len(clip)
    assert together.shape == (8, 16) and together.std(dim=0).min() > 1e-3


def test_ced_normalises_by_the_corpus_and_in_training_as_in_evaluation():
    torch.manual_seed(0)
    model, clips = CED(width=16, heads=2, layers=1), [9 * torch.randn(n, 64) - 40 for n in (50, 90)]
    model.set_statistics(lambda: clips)
    frames = torch.cat(clips)
    assert (model.init_bn.running_mean - frames.mean(dim=0)).abs().max() < 1e-3
    assert (model.init_bn.running_var - frames.var(dim=0, correction=0)).abs().max() < 1e-2
    batch = pad_features(clips)
    trained = model.train()(*batch)
    assert torch.equal(trained, model.eval()(*batch))
    assert (model.init_bn.running_mean - frames.mean(dim=0)).abs().max() < 1e-3
    trained.sum().backward()
    assert model.init_bn.weight.grad.abs().max() > 0


def test_ced_sees_time_and_frequency():
    model, clip = small_ced(), 20 * torch.randn(64, 64) - 30
    with torch.no_grad():
        vectors = model(*pad_features([clip, clip.roll(32, 0), clip.roll(16, 1)]))
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3 < (vectors[0] - vectors[2]).abs().max()


def published(model):
    """Weights under the names of `mispeech/ced-*`, with a tagging head beside them."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("patch."):
            name = name.replace("patch.", "patch_embed.proj.")
        name = {"time": "time_pos_embed", "frequency": "freq_pos_embed"}.get(name, name)
        for theirs, ours in NAMES.items():
            if theirs.startswith("."):
                name = name.replace(ours, theirs)
        state[f"encoder.{name}"] = tensor.clone()
    state |= {"outputlayer.0.weight": torch.ones(16), "outputlayer.1.weight": torch.ones(527, 16)}
    return state


def test_published_ced_by_the_description(tmp_path):
    """Written here once more, with einsum and without masks, on a clip of whole patches."""
    model, clip = small_ced(), 20 * torch.randn(5 * PATCH, 64) - 30
    state = published(model)
    assert {name.split(".")[1] for name in state if name.startswith("encoder.")} == {
        "init_bn", "patch_embed", "time_pos_embed", "freq_pos_embed", "blocks", "norm"
    }  # fmt: skip
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": "ced", "name": "x", "embed_dim": 16, "num_heads": 2, "depth": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = hub.audio_encoder(str(tmp_path)).eval()
    with torch.no_grad():
        ours = encoder(*pad_features([clip]))[0]

    s = {name.removeprefix("encoder."): x.double() for name, x in state.items()}
    x = (clip.double() - s["init_bn.running_mean"]) / (s["init_bn.running_var"] + 1e-5).sqrt()
    x = x * s["init_bn.weight"] + s["init_bn.bias"]
    patches = x.view(5, PATCH, 4, PATCH).permute(2, 0, 3, 1)  # frequency, time, bin, frame
    x = torch.einsum("ftbn,wbn->ftw", patches, s["patch_embed.proj.weight"][:, 0])
    x = x + s["patch_embed.proj.bias"] + s["time_pos_embed"][0, :, 0, :5].T
    x = (x + s["freq_pos_embed"][0, :, :, 0].T[:, None]).reshape(20, 16)

    def norm(x, name):
        return torch.nn.functional.layer_norm(
            x, (16,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6
        )

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    for n in range(2):
        block = f"blocks.{n}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(20, 3, 2, 8).unbind(1)
        weights = (torch.einsum("ihd,jhd->hij", q, k) / 8**0.5).softmax(dim=2)
        mixed = torch.einsum("hij,jhd->ihd", weights, v).reshape(20, 16)
        x = x + linear(mixed, f"{block}.attn.proj")
        hidden = torch.nn.functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    assert (ours - norm(x, "norm").mean(dim=0)).abs().max() < 1e-5


def test_sizes_by_name():
    w = 192  # two norms for the bins, patches, positions, blocks, the last norm
    parameters = 2 * 64 + 257 * w + 67 * w + 12 * (12 * w * w + 13 * w) + 2 * w
    assert sum(p.numel() for p in CED(*SIZES["tiny"]).parameters()) == parameters
    model = SupclapModel(ModelConfig(audio_encoder="ced-tiny"))
    assert model.audio.encoder.width == 192 and len(model.audio.encoder.blocks) == 12
    with pytest.raises(UserError, match="ced-tiny, ced-mini, ced-small, ced-base, hf:NAME"):
        SupclapModel(ModelConfig(audio_encoder="ced-huge"))


# ----------------------------------------------------------------------------------- transformers

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "the", "sound", "of", "a", "we", "hear", "close", "by"]
WORDS += ["dog", "rain", "door", "bird", "train", "glass", "river", "crowd", "clock"]


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


def clap_folder(folder, fusion=False):
    torch.manual_seed(0)
    text = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 12,
            "max_position_embeddings": 40}  # fmt: skip
    audio = {"patch_embeds_hidden_size": 8, "hidden_size": 32, "depths": [1, 1, 1],
             "num_attention_heads": [1, 2, 2], "projection_dim": 12, "num_mel_bins": 64,
             "spec_size": 128, "window_size": 4, "enable_fusion": fusion}  # fmt: skip
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    model = transformers.ClapModel(config).eval()
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    transformers.ClapFeatureExtractor(
        truncation="fusion" if fusion else "rand_trunc", max_length_s=1, sampling_rate=16_000,
        hop_length=160,
    ).save_pretrained(folder)  # fmt: skip
    return model


@pytest.mark.parametrize("fusion", [False, True])
def test_clap(manifest, tmp_path, fusion):
    """Embeddings are the model's own; training starts from them; a run loads without the hub."""
    theirs = clap_folder(tmp_path / "clap", fusion)
    name = f"hf:{tmp_path / 'clap'}"
    ours = SupclapModel(ModelConfig(audio_encoder=name, text_encoder=name)).eval()
    tokens = word_tokenizer()(["the sound of a dog"], return_tensors="pt")
    wave = np.sin(np.arange(12_000) / 9).astype(np.float32)
    front = ours.audio.encoder.front_end
    assert front.sample_rate == 16_000
    inputs = front.extractor(wave, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        text = ours.text(*ours.text.encoder.tokenizer(["the sound of a dog"], ["eng"]))
        audio = ours.audio(*pad_features([front(wave)]))
        inputs["input_features"] = inputs["input_features"].float()
        inputs["is_longer"] = torch.tensor([[False]])  # the extractor says so of a random clip
        outputs = theirs(**tokens, **inputs)
    assert (text - outputs.text_embeds).abs().max() < 1e-6
    assert (audio - outputs.audio_embeds).abs().max() < 1e-6

    model = ModelConfig(audio_encoder=name, text_encoder=name, max_seconds=1.0)
    run = train(settings(manifest, tmp_path / "run", batch_size=9, model=model, freeze="audio"))
    (tmp_path / "clap").rename(tmp_path / "gone")
    metrics, _ = evaluate_run(run, manifest)
    assert 0 <= metrics["t2a"]["R@1"] <= 1
    state, before = load_model(run).state_dict(), ours.state_dict()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    assert moved and all(name.startswith("text.") for name in moved)


def test_any_text_encoder_and_published_ced(manifest, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    (tmp_path / "ced").mkdir()
    save_file(published(small_ced()), tmp_path / "ced/model.safetensors")
    kind = {"model_type": "ced", "embed_dim": 16, "num_heads": 2, "depth": 2}
    (tmp_path / "ced/config.json").write_text(json.dumps(kind))
    model = ModelConfig(
        audio_encoder=f"hf:{tmp_path / 'ced'}", text_encoder=f"hf:{tmp_path / 'bert'}", embed_dim=24
    )
    run = train(
        settings(manifest, tmp_path / "run", model=model, freeze="text", epochs=20, lr=1e-2)
    )
    log = log_of(run)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    theirs = load_file(tmp_path / "bert/model.safetensors")
    ours = load_model(run).text.encoder.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for name in ("bert", "ced"):  # a run that begins from this one needs its folder alone
        shutil.rmtree(tmp_path / name)
    options = {"model": model, "init": run, "epochs": 1, "lr": 1e-9}
    again = load_model(train(settings(manifest, tmp_path / "again", **options))).state_dict()
    for name, tensor in load_model(run).state_dict().items():
        assert near(again[name].double(), tensor.double())


def sonar_folder(folder):
    """An M2M100 encoder with an NLLB tokenizer, as SONAR's text encoder is published."""
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    torch.manual_seed(0)
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁sound", "▁of", "▁a", "▁dog", "▁rain"]
    tokenizer = transformers.NllbTokenizer(
        vocab={word: n for n, word in enumerate(vocabulary)}, merges=[], src_lang="eng_Latn"
    )
    tokenizer.save_pretrained(folder)
    config = transformers.M2M100Config(
        vocab_size=len(tokenizer) + 8, d_model=16, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=32, max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    M2M100Encoder(config).save_pretrained(folder)


def test_sonar_with_a_language_for_each_caption(tmp_path, capsys):
    sonar_folder(tmp_path)
    encoder = hub.text_encoder(str(tmp_path)).eval()
    assert "CC-BY-NC-4.0" in capsys.readouterr().out
    tokens = encoder.tokenizer
    assert tokens.code("eng") == "eng_Latn" and tokens.code("zho") == "zho_Hans"
    assert tokens.code("fra_Latn") == "fra_Latn"
    ids, mask = tokens(["the dog", "the sound of rain", "the dog"], ["eng", "eng", "deu"])
    assert ids.shape == mask.shape and mask.sum(dim=1)[0] < mask.sum(dim=1)[1]
    code = tokens.tokenizer.convert_tokens_to_ids
    assert code("eng_Latn") in ids[0] and code("deu_Latn") in ids[2]
    with torch.no_grad():
        vectors = encoder(ids, mask)
        for row in range(3):
            length = int(mask[row].sum())
            states = encoder.model(ids[row : row + 1, :length]).last_hidden_state
            assert (states[0].mean(dim=0) - vectors[row]).abs().max() < 1e-5
    assert (vectors[0] - vectors[2]).abs().max() > 1e-4
    with pytest.raises(UserError, match="no language 'xxx'; it has .*eng_Latn"):
        tokens(["x"], ["xxx"])


def test_a_model_that_cannot_be_had_is_explained(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ["train", "--data", str(manifest), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--text-encoder", "hf:nobody/nothing"]) == 2
    message = capsys.readouterr().err
    assert "--text-encoder hf:nobody/nothing" in message
    assert "pass its folder: --text-encoder hf:/path/to/it" in message
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name, expected in (
        (f"hf:{tmp_path}", "model type 'bert'; known are ced, clap"),
        ("wav2vec", "--audio-encoder wav2vec: known are builtin"),
    ):
        assert main([*arguments, "--audio-encoder", name]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "ced", "name": "ced-tiny"}')
    assert main([*arguments, "--audio-encoder", f"hf:{tmp_path}"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
