"""The sentence encoders of the retrieval rows: which checkpoint, how one vector is made of its tokens, and a cache of vectors.

Sources of the poolings: SimCSE, README of princeton-nlp/SimCSE; BLaIR, blair/README of hyp1231/AmazonReviews2023.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lavic_utils.config import UserError
from lavic_utils.hub import HubModel, Unavailable
from lavic_utils.provenance import key
from lavic_utils.retrieval import MAX_TOKENS, SBERT_SHA256, sbert_embed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH = 64
CHUNK = 4096  # texts between two writes of the cache: what a killed run loses
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Encoder:
    """`model` None: the packaged all-MiniLM-L6-v2. `pooling`: "mean" of the last layer's tokens, its [CLS] ("cls"), or that
    [CLS] through the checkpoint's own dense layer and tanh ("pooler"). A text's tokens after `max_tokens` are cut off."""

    model: HubModel | None
    pooling: Literal["mean", "cls", "pooler"]
    max_tokens: int


ENCODERS = {
    "SBERT": Encoder(None, "mean", MAX_TOKENS),
    # a plain language model, never trained for sentences: the mean is our choice, the usual one
    "RoBERTa-Large": Encoder(
        HubModel("FacebookAI/roberta-large", "722cf37b1afa9454edce342e7895e588b6ff1d59", 1.4), "mean", 512),
    # the supervised checkpoint, which its authors read through the pooler; the commit is the hub's conversion to safetensors
    # of 96d164d9950b72f4ce179cb1eb3414de0910953f, the authors' last, which holds pickled weights only
    "SimCSE-Large": Encoder(
        HubModel("princeton-nlp/sup-simcse-roberta-large", "b55c7c5d9aeb13bc4b59059285e93260b32611df", 1.4), "pooler", 512),
    "BLaIR-Base": Encoder(
        HubModel("hyp1231/blair-roberta-base", "88adfe2b621cb202dee9aabb19b59de8f622844c", 0.5), "cls", 512),
}  # fmt: skip


def _place(encoder: Encoder) -> tuple[str, torch.dtype]:
    """Device and precision. The packaged encoder made the mini world's lists: the same numbers everywhere, so the CPU."""
    if encoder.model is None or not torch.cuda.is_available():
        return "cpu", torch.float32
    return (
        "cuda",
        torch.float16,
    )  # bf16's error in a cosine is nine times this one's, and a plain RoBERTa's lie close together


def _folder_hash(folder: Path) -> str:
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name} in it; a checkpoint is config.json, {WEIGHTS} and its tokenizer's files"
            )
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".safetensors")
    ):
        with path.open("rb") as file:
            digest.update(
                f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode()
            )
    return digest.hexdigest()


def _identity(encoder: Encoder, folder: Path | None) -> str:
    """Key of all that makes a vector besides the text."""
    hub = f"{encoder.model.id}@{encoder.model.revision}" if encoder.model else SBERT_SHA256
    return key(
        weights=_folder_hash(folder) if folder else hub,
        pooling=encoder.pooling,
        max_tokens=encoder.max_tokens,
        dtype=str(_place(encoder)[1]),
    )


@functools.lru_cache(maxsize=1)
def _load(encoder: Encoder, folder: Path | None, identity: str) -> SentenceTransformer:
    """The encoder's model, one at a time in memory. `identity` is there to load a changed folder again."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers.utils import cached_file, logging

    logging.disable_progress_bar()
    source, revision = (str(folder), None) if folder else encoder.model.source()
    device, dtype = _place(encoder)
    common = {"revision": revision, "trust_remote_code": False}
    pooler = (
        {
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "pooler_output"}
            },
            "module_output_name": "sentence_embedding",
        }
        if encoder.pooling == "pooler"
        else {}
    )
    try:
        with safe_open(cached_file(source, WEIGHTS, revision=revision), "np") as weights:
            names = list(weights.keys())
        tokens = Transformer(
            source,
            model_kwargs={**common, "dtype": dtype},
            processor_kwargs=common,
            config_kwargs=common,
            **pooler,
        )
    except (OSError, ValueError, SafetensorError) as error:
        why = f"cannot be loaded as a sentence encoder: {str(error).splitlines()[0]}"
        if folder:
            raise UserError(f"{folder}: {why}") from None
        raise Unavailable(
            f"{source} ({encoder.model.gigabytes:g} GB) {why}; try: {encoder.model.command}"
        ) from None
    if pooler and not any(
        "pooler.dense" in name for name in names
    ):  # would be drawn at random, differently in each run
        raise UserError(
            f"{source}: {WEIGHTS} has no pooler, which this encoder's vectors come from; is it another model?"
        )
    config = tokens.auto_model.config
    first = (
        config.pad_token_id + 1 if config.model_type == "roberta" else 0
    )  # RoBERTa counts positions from there
    tokens.max_seq_length = min(
        encoder.max_tokens, tokens.max_seq_length, config.max_position_embeddings - first
    )
    modules = (
        [tokens] if pooler else [tokens, Pooling(tokens.get_embedding_dimension(), encoder.pooling)]
    )
    return SentenceTransformer(modules=modules, device=device)


def _encode(encoder: Encoder, folder: Path | None, identity: str, texts: list[str]) -> np.ndarray:
    if encoder.model is None and folder is None:
        return sbert_embed(texts)
    found = _load(encoder, folder, identity).encode(
        texts, batch_size=BATCH, show_progress_bar=False
    )
    vectors = np.asarray(
        found, dtype=np.float32
    )  # lengths in full precision, whatever the model's was
    if not np.isfinite(vectors).all():
        raise UserError(
            f"{folder or encoder.model.id}: the encoder's vectors are not all finite; wrong weights?"
        )
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _checksum(keys: np.ndarray, vectors: np.ndarray) -> str:
    return hashlib.sha256(keys.tobytes() + vectors.tobytes()).hexdigest()


def _read(path: Path) -> dict[bytes, np.ndarray]:
    """Vectors by their text's sha256; none where the file is absent or not as it was written."""
    try:
        with safe_open(path, "np") as file:
            keys, vectors = file.get_tensor("keys"), file.get_tensor("vectors")
            intact = file.metadata()["sha256"] == _checksum(keys, vectors)
    except (OSError, SafetensorError, KeyError, TypeError):
        return {}
    return {k.tobytes(): v for k, v in zip(keys, vectors, strict=True)} if intact else {}


def _write(path: Path, known: dict[bytes, np.ndarray]) -> None:
    keys, vectors = (
        np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32),
        np.stack(list(known.values())),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(
        {"keys": keys, "vectors": vectors}, part, metadata={"sha256": _checksum(keys, vectors)}
    )
    os.replace(part, path)


def embed(
    texts: Sequence[str], name: str, folder: str | Path | None = None, cache: Path | None = None
) -> np.ndarray:
    """Embeddings of the encoder `name`, L2-normalised: float32 array (texts, dimension). Equal texts are encoded once.

    `folder`: a local checkpoint instead of the hub's or the package's. `cache`: a folder with one file for each encoder and
    setting; what it holds is not encoded again, and needs no model. Half precision on a GPU, float32 on a CPU.
    Raises hub.Unavailable, or UserError for a folder that holds no such checkpoint.
    """
    encoder, folder = ENCODERS[name], Path(folder) if folder else None
    identity = _identity(encoder, folder)
    path = cache and Path(cache) / f"{name.lower()}-{identity}.safetensors"
    known = _read(path) if path else {}
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    new = {k: text for k, text in zip(keys, texts, strict=True) if k not in known}
    step = CHUNK if path else max(1, len(new))
    for part in (list(new)[i : i + step] for i in range(0, len(new), step)):
        known |= zip(part, _encode(encoder, folder, identity, [new[k] for k in part]), strict=True)
        if path:
            _write(path, known)
    return (
        np.stack([known[k] for k in keys]) if keys else _encode(encoder, folder, identity, [""])[:0]
    )
