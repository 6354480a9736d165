"""Runs whose encoders are tiny ones of the hub, for what is made of them elsewhere."""

from dataclasses import replace

import transformers
from clips import SMALL, settings
from supclap.train import train
from test_encoders import word_tokenizer
from test_hub_encoders import TINY

TEXTS = ["the sound of a dog", "we hear rain close by", "glass"]


def sounds(manifest):
    return [str(manifest.with_name(f"{word}.wav")) for word in ("dog", "rain", "glass")]


def hub_run(manifest, folder, **encoders):
    """Selected on a test set."""
    model = replace(SMALL, **{f"{kind}_encoder": f"hf:{path}" for kind, path in encoders.items()})
    options = {"epochs": 1, "test": manifest, "select_on": "test"}
    return train(settings(manifest, folder / "run", model=model, **options))


def bert_folder(folder):
    config = transformers.BertConfig(**TINY, vocab_size=64, max_position_embeddings=40)
    transformers.BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
