"""Scoring: reading answers, HR@1 over both denominators, VR, intervals, and what the real files hold.

An invalid or missing answer is a miss and stays in every denominator. A ground-truth id that a row repeats counts once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.stats import binomtest

from lavic_utils.config import DOMAINS, UserError
from lavic_utils.data import SPLITS, Dialogue, dialogue_file, read_dialogues, read_rows

# An ASIN is B and 9 more, with a digit somewhere (so "BREATHABLE" is none); books carry an ISBN-10 instead. No boundary
# is asked for after the id: a model that writes on past it ("B00HO5EE9W0HO") has still answered.
ASIN = re.compile(r"(?<![A-Z0-9])(?:B(?=[A-Z]{0,8}[0-9])[A-Z0-9]{9}|[0-9]{9}[0-9X])")
USUAL_ID = re.compile(r"B[A-Z0-9]{9}")
LISTS = ("candidates_st", "candidates_gpt_large")
VARIANTS = {"title+image": "_st2", "title": "_st_noimg", "image": "_st_notitle"}


def parse_answer(text: str) -> str | None:
    """The first item id in an answer, or None."""
    match = ASIN.search(text)
    return match.group() if match else None


@dataclass(frozen=True)
class Score:
    """HR@1 and VR of one run. `pairs`: distinct (conversation, ground-truth id); `ci95`: Wilson, of the ratio over
    conversations; `valid` and `validity_ratio`: None for retrieval."""

    conversations: int
    pairs: int
    hits: int
    valid: int | None
    hit_ratio_pairs: float
    hit_ratio_conversations: float
    validity_ratio: float | None
    ci95: tuple[float, float]

    def row(self, method: str, domain: str, seed: int) -> dict[str, Any]:
        """One row of a metrics table; `ci95` is [low, high]."""
        return {
            "method": method,
            "domain": domain,
            "seed": seed,
            **asdict(self),
            "ci95": list(self.ci95),
        }


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    interval = binomtest(int(hits), int(trials)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def score(
    answers: Sequence[str | None],
    truths: Sequence[Sequence[str]],
    candidates: Sequence[Sequence[str]] | None = None,
) -> Score:
    """Score parsed answers, one a conversation. `candidates` None (retrieval): VR is None. ValueError: lengths differ,
    nothing to score, or a conversation without ground truth."""
    count = len(answers)
    if len(truths) != count or (candidates is not None and len(candidates) != count):
        raise ValueError(
            f"{count} answers, {len(truths)} truths"
            + (f", {len(candidates)} candidate lists" if candidates is not None else "")
        )
    if not count or not all(truths):
        raise ValueError(
            "no answer to score" if not count else "a conversation without a ground-truth item"
        )
    if any(isinstance(one, str) for one in (*truths, *(candidates or ()))):
        raise ValueError("a string stands where a list of ids is expected")
    pairs = sum(len(set(truth)) for truth in truths)
    hits = sum(answer in truth for answer, truth in zip(answers, truths, strict=True))
    valid = (
        None
        if candidates is None
        else sum(a in ten for a, ten in zip(answers, candidates, strict=True))
    )
    return Score(
        count,
        pairs,
        hits,
        valid,
        hits / pairs,
        hits / count,
        None if valid is None else valid / count,
        wilson(hits, count),
    )


def candidate_recall(dialogues: Sequence[Dialogue], which: str = "candidates_st") -> float:
    """Share of dialogues whose list `which` holds a ground-truth item: the ceiling of HR@1 over conversations."""
    if which not in LISTS or not dialogues:
        raise ValueError(f"which must be one of {LISTS}, and there must be dialogues")
    return sum(bool(set(d.gt_items) & set(getattr(d, which))) for d in dialogues) / len(dialogues)


def paired_difference(
    a_hits: Sequence[bool], b_hits: Sequence[bool], seed: int = 0
) -> tuple[float, float, float]:
    """HR@1 of a minus b on the same conversations in the same order: (mean, low, high), 95 % bootstrap percentiles.

    Resamples conversations 10,000 times; the differences are -1, 0 or 1, so their counts are multinomial (exact).
    """
    a, b = np.asarray(a_hits), np.asarray(b_hits)
    if (
        a.shape != b.shape
        or a.ndim != 1
        or not a.size
        or not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    ):
        raise ValueError("two equally long, not empty lists of True and False are expected")
    n, difference = a.size, a.astype(int) - b.astype(int)
    shares = [float((difference == value).mean()) for value in (1, -1, 0)]
    draws = np.random.default_rng(seed).multinomial(n, shares, size=10_000)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, (2.5, 97.5))
    return float(difference.mean()), float(low), float(high)


def summary_by_seed(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One line a method and domain from rows of `Score.row`: seeds, mean, min and max of HR@1 over conversations, mean
    of HR@1 over pairs and of VR, pooled conversations and hits, and two 95 % Wilson intervals of HR@1.

    `pooled_low/high` takes every (seed, dialogue) for an independent trial. Seeds answer the same test dialogues, whose
    outcomes go together, so for "how would new dialogues go?" it is too narrow. `low/high` therefore puts the mean
    ratio over the dialogues of one seed only: right if seeds always agree on a dialogue, else too wide, so it is the
    safe one. Neither covers what all dialogues share in one seed (a good or bad training run): see min and max.
    """
    table = pd.DataFrame([dict(row) for row in rows])
    if table.empty or table.duplicated(["method", "domain", "seed"]).any():
        raise ValueError("no rows" if table.empty else "a method, domain and seed stand twice")
    return pd.DataFrame(
        [
            _over_seeds(str(method), str(domain), part)
            for (method, domain), part in table.groupby(["method", "domain"], sort=False)
        ]
    )


def _over_seeds(method: str, domain: str, part: pd.DataFrame) -> dict[str, Any]:
    ratio, hits, total = (
        part["hit_ratio_conversations"],
        int(part["hits"].sum()),
        int(part["conversations"].sum()),
    )
    dialogues = int(part["conversations"].min())
    low, high = wilson(round(hits / total * dialogues), dialogues)
    pooled_low, pooled_high = wilson(hits, total)
    vr = pd.to_numeric(part["validity_ratio"]).mean()
    return {
        "method": method,
        "domain": domain,
        "seeds": len(part),
        "mean": ratio.mean(),
        "min": ratio.min(),
        "max": ratio.max(),
        "hit_ratio_pairs": part["hit_ratio_pairs"].mean(),
        "validity_ratio": vr,
        "pooled_conversations": total,
        "pooled_hits": hits,
        "low": low,
        "high": high,
        "pooled_low": pooled_low,
        "pooled_high": pooled_high,
    }


class Answered(Dialogue):
    """A test dialogue with a real model's raw answer and the id (or None) that its authors read from it."""

    recommended: str | None = Field(alias="recommended_st")
    response: str = Field(alias="response_st")


def read_replications(folder: Path | str) -> dict[tuple[str, str], list[Answered]]:
    """(domain, variant) -> answered test dialogues, of the files present; variants: title+image, title, image.

    Source: Lottotpk/graphRAG_multimodal, folder LaViC/data. UserError where no file is there or a row is bad.
    """
    paths = {
        (domain, variant): Path(folder) / name / f"test_results_candidates{end}.jsonl"
        for domain, name in DOMAINS.items()
        for variant, end in VARIANTS.items()
    }
    present = {key: path for key, path in paths.items() if path.is_file()}
    found = {
        key: read_rows(path, Answered, domain=key[0], split="test") for key, path in present.items()
    }
    if not found:
        raise UserError(
            f"{folder}: no answer file, e.g. all_beauty/test_results_candidates_st2.jsonl; set "
            "LAVIC_REPLICATIONS to LaViC/data of Lottotpk/graphRAG_multimodal"
        )
    return found


def score_answered(rows: Sequence[Answered]) -> Score:
    """Score raw answers (`response`) with `parse_answer` against the candidates they were given."""
    return score(
        [parse_answer(r.response) for r in rows],
        [r.gt_items for r in rows],
        [r.candidates_st for r in rows],
    )


def _summary(domain: str, split: str, dialogues: list[Dialogue]) -> dict[str, Any]:
    words = [sum(len(text.split()) for _, text in d.turns) for d in dialogues]
    candidates = {one for d in dialogues for which in LISTS for one in getattr(d, which)}
    ids = candidates | {one for d in dialogues for one in d.gt_items}
    return {
        "domain": domain,
        "split": split,
        "conversations": len(dialogues),
        "turns": sum(len(d.turns) for d in dialogues),
        "pairs": sum(len(set(d.gt_items)) for d in dialogues),
        "words_median": float(np.median(words)),
        "words_p95": float(np.percentile(words, 95)),
        "words_max": max(words),
        "candidate_ids": len(candidates),
        "recall_st": candidate_recall(dialogues, "candidates_st"),
        "recall_gpt_large": candidate_recall(dialogues, "candidates_gpt_large"),
        "odd_id_share": sum(not USUAL_ID.fullmatch(one) for one in ids) / len(ids),
        "repeated_gt_rows": sum(len(set(d.gt_items)) < len(d.gt_items) for d in dialogues),
        "gt_mentioned_rows": sum(bool(set(d.gt_items) & set(d.context_items)) for d in dialogues),
    }


def real_data_summary(
    root: Path | str, set_aside: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Figures of every dialogue file present; UserError where there is none. Words: of all turns, split at white space;
    `candidate_ids`: distinct, of both lists; `odd_id_share`: of distinct candidates and truths, not B[A-Z0-9]{9}.
    A list `set_aside` takes bad rows (a file of which no row is left has no figures); without it they are an error."""
    keys = [(domain, split) for domain in DOMAINS for split in SPLITS]
    present = [key for key in keys if dialogue_file(root, *key).is_file()]
    if not present:
        raise UserError(
            f"{root}: no dialogue file, e.g. all_beauty/test.jsonl; set LAVIC_DATA to the published files "
            "(repository jeon185/LaViC)"
        )
    read = {key: read_dialogues(root, *key, set_aside) for key in present}
    return [_summary(*key, dialogues) for key, dialogues in read.items() if dialogues]
