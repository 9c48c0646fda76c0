"""Text retrieval: order, shapes, offline weights. Each check has a wrong case that must fail."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from lavic_utils.config import UserError
from lavic_utils.retrieval import bm25_rank, cosine_rank, sbert_embed, sbert_rank, verify_weights

TITLES = ["Tivoli rustic mug", "Brindle modern lamp", "Norrland portable chair", "Casella cosy cushion"]


def test_bm25_finds_the_words_and_keeps_title_order_without_any() -> None:
    order = bm25_rank(["a modern lamp please", "nothing of that sort", "rustic mug"], TITLES)
    assert order.shape == (3, 4) and order[0, 0] == 1 and order[2, 0] == 0
    assert order[1].tolist() == [0, 1, 2, 3]


def test_sbert_ranks_by_meaning_where_bm25_has_no_word() -> None:
    query = ["something to sit on", "a cup for my coffee"]
    assert sbert_rank(query, TITLES)[:, 0].tolist() == [2, 0]
    assert bm25_rank(query, TITLES)[:, 0].tolist() == [0, 0]  # no word in common: title order, wrong for the first


def test_embeddings_are_normalised_and_follow_the_order_of_the_texts() -> None:
    vectors = sbert_embed(["mug", "a much longer text about lamps", "mug"])
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors[0], vectors[2]) and not np.allclose(vectors[0], vectors[1], atol=0.1)
    assert sbert_embed([]).shape == (0, 384)


def test_float_noise_does_not_reorder_ties_but_a_real_difference_does() -> None:
    query, tied, apart = np.array([[1.0]]), np.array([[0.5], [0.500001]]), np.array([[0.5], [0.51]])
    assert cosine_rank(query, tied).tolist() == [[0, 1]]
    assert cosine_rank(query, apart).tolist() == [[1, 0]]


def test_wrong_or_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        verify_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="sha256"):
        verify_weights(tmp_path)
    assert verify_weights(tmp_path, hashlib.sha256(b"other weights").hexdigest()) == tmp_path
