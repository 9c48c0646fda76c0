"""Sentence encoders on tiny random models: pooling against transformers' own forward, and what
cannot be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaModel,
)

from lavic_utils import retrieval
from lavic_utils.config import UserError
from lavic_utils.hub import HubModel, Unavailable
from lavic_utils.retrieval import ENCODERS, embed, rank, sbert_embed

TEXTS = [
    "a modern lamp",
    "rustic mug",
    "I look for a chair that folds, light enough to carry to the beach, not blue",
    "mug",
]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "initializer_range": 0.5,
}
HUB = [name for name, encoder in ENCODERS.items() if encoder.model]


def save_roberta(folder: Path, seed: int = 0) -> Path:
    """A random RoBERTa, files as on the hub: vocab.json and merges.txt, no tokenizer.json."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator(
        TEXTS, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    tokens.save_model(str(folder))
    RobertaModel(RobertaConfig(vocab_size=tokens.get_vocab_size(), **SIZES)).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    torch.manual_seed(1)
    folder.mkdir()
    words = sorted({word for text in TEXTS for word in re.findall(r"\w+|,", text.lower())})
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), encoding="utf-8"
    )
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=5 + len(words), **SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    return save_roberta(tmp_path / "roberta")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that any model was asked to encode since the test began."""
    seen, encode = [], SentenceTransformer.encode

    def watch(self, inputs, **how):
        seen.extend(inputs)
        return encode(self, inputs, **how)

    monkeypatch.setattr(SentenceTransformer, "encode", watch)
    return seen


@torch.inference_mode()
def forward(folder: Path, pooling: str, mask: bool = True) -> np.ndarray:
    """transformers' own forward of all TEXTS in one padded batch, pooled by hand."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].bool().all()
    if not mask:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    out, real = model(**batch), batch["attention_mask"][:, :, None]
    pooled = {
        "mean": (out.last_hidden_state * real).sum(1) / real.sum(1),
        "cls": out.last_hidden_state[:, 0],
        "pooler": out.pooler_output,
    }[pooling]
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


@pytest.mark.parametrize(
    ("save", "name"), [(save_bert, "SBERT"), *((save_roberta, name) for name in HUB)]
)
def test_pooling_is_transformers_own_forward_and_no_other_pooling(
    save: Callable, name: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model")
    vectors = embed(TEXTS, name, folder)
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for pooling in ("mean", "cls", "pooler"):
        assert np.allclose(vectors, forward(folder, pooling), atol=1e-5) == (
            pooling == ENCODERS[name].pooling
        )
    assert not np.allclose(
        vectors, forward(folder, ENCODERS[name].pooling, mask=False), atol=1e-3
    )  # padding is left out


@pytest.mark.parametrize("name", HUB)
def test_batches_and_order_change_nothing(
    name: str, roberta: Path, monkeypatch: pytest.MonkeyPatch, encoded: list
) -> None:
    vectors = embed([*TEXTS, TEXTS[0]], name, roberta)
    assert encoded == TEXTS and np.array_equal(vectors[0], vectors[4])  # equal texts: once
    monkeypatch.setattr(retrieval, "BATCH", 1)
    assert np.allclose(embed(TEXTS[::-1], name, roberta), vectors[3::-1], atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)


@pytest.mark.parametrize(("name", "token"), [("SBERT", "[MASK]"), *((name, "<s>") for name in HUB)])
def test_a_control_tokens_name_in_a_title_is_text(name: str, token: str, roberta: Path) -> None:
    folder = None if name == "SBERT" else roberta
    embed(TEXTS, name, folder)
    encoder = ENCODERS[name]
    model = retrieval._load(encoder, folder, retrieval._files(folder))
    control = model.tokenizer.convert_tokens_to_ids(token)

    def inside() -> list[int]:  # between the encoder's own first and last token
        return model.tokenize([f"a {token} mug"])["input_ids"][0, 1:-1].tolist()

    assert control not in inside()
    model.tokenizer.split_special_tokens = False
    assert control in inside()  # negative control
    retrieval._load.cache_clear()


def test_long_texts_are_cut_where_the_encoder_or_the_model_ends(
    roberta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, longer = "mug " * 200, "mug " * 300
    assert np.array_equal(
        *embed([long, longer], "BLaIR-Base", roberta)
    )  # 64 tokens: the model's 66 positions less two
    monkeypatch.setitem(ENCODERS, "BLaIR-Base", retrieval.Encoder(None, "cls", 8))
    short, cut, other = embed(
        ["mug " * 8 + "lamp", "mug " * 8 + "chair", "chair " + "mug " * 8], "BLaIR-Base", roberta
    )
    assert np.array_equal(short, cut) and not np.allclose(short, other, atol=1e-3)


def test_the_packaged_encoder_gives_the_numbers_it_always_gave() -> None:
    model = SentenceTransformer(str(retrieval.packaged_encoder()), device="cpu")
    model.max_seq_length = 128
    made = model.encode(TEXTS, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    assert np.array_equal(sbert_embed(TEXTS), made)  # bit by bit: the mini world's lists
    assert sbert_embed([]).shape == embed([], "SBERT").shape == (0, 384)


def test_another_checkpoint_in_the_same_place_is_loaded_anew(roberta: Path) -> None:
    old = embed(TEXTS, "RoBERTa-Large", roberta)
    save_roberta(roberta, seed=2)
    new = embed(TEXTS, "RoBERTa-Large", roberta)
    assert not np.allclose(new, old, atol=1e-3)
    assert np.allclose(new, forward(roberta, "mean"), atol=1e-5)


def test_close_similarities_are_told_apart_but_not_the_packaged_encoders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = {"query": [1.0, 0], "first": [0.5, 0], "second": [0.500002, 0]}
    monkeypatch.setattr(
        retrieval, "embed", lambda texts, *_: np.array([vectors[text] for text in texts])
    )
    assert rank("RoBERTa-Large", ["query"], ["first", "second"]).tolist() == [[1, 0]]
    assert rank("SBERT", ["query"], ["first", "second"]).tolist() == [[0, 1]]


def test_half_precision_only_where_the_processor_has_it(
    roberta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert retrieval._place(ENCODERS["BLaIR-Base"]) == ("cpu", torch.float32)
    embed(TEXTS, "BLaIR-Base", roberta)
    model = retrieval._load(ENCODERS["BLaIR-Base"], roberta, retrieval._files(roberta))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert retrieval._place(ENCODERS["BLaIR-Base"]) == ("cuda", torch.float16)
    assert retrieval._place(ENCODERS["SBERT"]) == ("cpu", torch.float32)


def test_half_precision_vectors_have_length_one(
    roberta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = embed(TEXTS, "RoBERTa-Large", roberta)
    retrieval._load.cache_clear()
    monkeypatch.setattr(retrieval, "_place", lambda encoder: ("cpu", torch.bfloat16))
    half = embed(TEXTS, "RoBERTa-Large", roberta)
    assert half.dtype == np.float32 and np.allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    assert np.allclose(half, full, atol=0.1) and not np.allclose(half, full, atol=1e-5)
    retrieval._load.cache_clear()


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_does_not_give_is_named_with_its_size_and_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ENCODERS[name].model
    assert re.fullmatch("[0-9a-f]{40}", model.revision)
    monkeypatch.setattr(HubModel, "cached", lambda self: False)
    with pytest.raises(
        Unavailable, match=re.escape(f"{model.id} ({model.gigabytes:g} GB)")
    ) as refused:
        rank(name, ["a mug"], TEXTS)
    assert model.command in str(refused.value) and model.revision in model.command
    stopped = replace(model, id="nobody/nothing")
    monkeypatch.setitem(ENCODERS, name, replace(ENCODERS[name], model=stopped))
    monkeypatch.setattr(
        HubModel, "cached", lambda self: True
    )  # a download that stopped after config.json
    with pytest.raises(Unavailable, match=re.escape(stopped.command)):
        rank(name, ["a mug"], TEXTS)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_pooler(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in stored.items() if "pooler" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def _own_code(folder: Path) -> None:
    (folder / "own.py").write_text(
        "raise SystemExit('code of a checkpoint was run')", encoding="utf-8"
    )
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(own), encoding="utf-8")


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_no_weights, "no model.safetensors"),
        (_no_pooler, "no pooler"),
        (_own_code, "cannot be loaded"),
        (_garbage, "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_such_checkpoint_is_refused(
    spoil: Callable, why: str, roberta: Path
) -> None:
    assert embed(TEXTS, "SimCSE-Large", roberta).shape == (4, 16)
    spoil(roberta)
    with pytest.raises(UserError, match=why) as refused:
        embed(TEXTS, "SimCSE-Large", roberta)
    assert str(roberta) in str(refused.value) and "\n" not in str(refused.value)
    if spoil is _no_pooler:
        assert embed(TEXTS, "BLaIR-Base", roberta).shape == (4, 16)  # which needs none


def test_vectors_that_are_no_numbers_are_refused(roberta: Path) -> None:
    stored = load_file(roberta / "model.safetensors")
    stored["encoder.layer.1.output.dense.bias"][:] = np.nan
    save_file(stored, roberta / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not all finite"):
        embed(TEXTS, "RoBERTa-Large", roberta)
