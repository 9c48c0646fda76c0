"""Scoring: the id that an answer names, HR@1 over both denominators, VR, intervals, paired tests.

Dialogues about one target item stand or fall together: intervals and tests draw whole items anew.
An invalid or missing answer is a miss, in every denominator; a truth given twice counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from lavic_utils.data import Dialogue

# B and 9 more, a digit among them, or a book's ISBN-10; text may follow it ("B00HO5EE9W0HO").
ASIN = re.compile(r"(?<![A-Z0-9])(?:B(?=[A-Z]{0,8}[0-9])[A-Z0-9]{9}|[0-9]{9}[0-9X])")


def parse_answer(text: str, candidates: Sequence[str] = ()) -> str | None:
    """The id that an answer names, or None: the first candidate, or the first text that has the
    form of an ASIN or ISBN-10, whichever comes first: who skips an invented id for a candidate
    named later credits a model for listing ids, and blinds VR. A candidate of another form
    ("item17") must begin a word, and text may follow, but no digit after a digit and no letter
    after a letter: "item170" names no "item17". Case counts."""
    patterns = []
    for one in sorted(candidates, key=len, reverse=True):  # "item1a" is tried before "item1"
        if not ASIN.fullmatch(one):
            same_kind = "[0-9]" if one[-1:].isdigit() else "[A-Za-z]"
            patterns.append(rf"(?<![A-Za-z0-9]){re.escape(one)}(?!{same_kind})")
    match = re.search("|".join([*patterns, ASIN.pattern]), text)
    return match.group() if match else None


@dataclass(frozen=True)
class Score:
    """HR@1 and VR of one run. `pairs`: distinct (conversation, ground-truth id); `ci95` is of the
    ratio over conversations; `valid` and `validity_ratio`: None for retrieval."""

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
        about = {"method": method, "domain": domain, "seed": seed}
        return {**about, **asdict(self), "ci95": list(self.ci95)}


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion; all from 0 to 1 where nothing was tried."""
    if not trials:
        return 0.0, 1.0
    interval = binomtest(int(hits), int(trials)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def hits(answers: Sequence[str | None], truths: Sequence[Sequence[str]]) -> list[bool]:
    """For each conversation, whether its answer is one of its ground-truth items."""
    return [answer in truth for answer, truth in zip(answers, truths, strict=True)]


def score(
    answers: Sequence[str | None],
    truths: Sequence[Sequence[str]],
    candidates: Sequence[Sequence[str]] | None = None,
    targets: Sequence[str] | None = None,
) -> Score:
    """HR@1 and VR, the paper's two measures, of parsed answers, one a conversation. `candidates`
    None (retrieval): VR is None. `ci95`: Wilson's, or a bootstrap over the conversations' `targets`
    (`clustered`). ValueError: lengths differ, nothing to score, or a conversation without ground
    truth."""
    count, lists = len(answers), truths if candidates is None else candidates
    if not count or len(truths) != count or len(lists) != count:
        raise ValueError(f"{count} answers, {len(truths)} truths, {len(lists)} candidate lists")
    if not all(truths) or any(isinstance(one, str) for one in (*truths, *lists)):
        raise ValueError("a conversation without truth, or a string instead of a list of ids")
    hit = hits(answers, truths)
    right, valid = sum(hit), None
    if targets is None:
        interval = wilson(right, count)
    elif 0 < right < count:
        interval = clustered(hit, targets)
    else:  # drawing anew tells nothing: as if each item were one trial
        items = len(set(targets))
        interval = wilson(items if right else 0, items)
    if candidates is not None:
        valid = sum(answer in ten for answer, ten in zip(answers, candidates, strict=True))
    pairs = sum(len(set(truth)) for truth in truths)
    return Score(
        conversations=count,
        pairs=pairs,
        hits=right,
        valid=valid,
        hit_ratio_pairs=right / pairs,
        hit_ratio_conversations=right / count,
        validity_ratio=None if valid is None else valid / count,
        ci95=interval,
    )


def candidate_recall(dialogues: Sequence[Dialogue], which: str = "candidates_st") -> float:
    """Share of dialogues whose list `which` holds a ground-truth item: the ceiling of HR@1 over
    conversations."""
    return sum(bool(set(d.gt_items) & set(getattr(d, which))) for d in dialogues) / len(dialogues)


def clustered(
    values: Sequence[float], targets: Sequence[Any], seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap percentiles (10,000 resamples) of the mean of `values`, one a conversation,
    where all conversations about one target item are drawn together."""
    sums, sizes = Counter(), Counter(targets)
    for value, target in zip(values, targets, strict=True):
        sums[target] += int(value)
    kinds = Counter((sizes[target], sums[target]) for target in sizes)  # items alike count together
    order = sorted(kinds, key=lambda kind: (kind[0], -abs(kind[1]), -kind[1]))
    shares = [kinds[kind] / len(sizes) for kind in order]
    draws = np.random.default_rng(seed).multinomial(len(sizes), shares, size=10_000)
    size, total = np.array(order).T
    low, high = np.percentile((draws @ total) / (draws @ size), (2.5, 97.5))
    return float(low), float(high)


def paired_difference(
    a_hits: Sequence[bool],
    b_hits: Sequence[bool],
    seed: int = 0,
    targets: Sequence[Any] | None = None,
) -> tuple[float, float, float]:
    """HR@1 of a minus b on the same conversations in the same order: (mean, low, high), the 95 %
    interval `clustered` by the conversations' `targets` (None: each its own). ValueError unless the
    lists are equally long, and not empty."""
    a, b = np.asarray(a_hits), np.asarray(b_hits)
    if a.shape != b.shape or not a.size or not np.isin([a, b], (0, 1)).all():
        raise ValueError("two equally long, not empty lists of True and False are expected")
    difference = a.astype(int) - b.astype(int)
    return float(difference.mean()), *clustered(difference, targets or range(a.size), seed)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: of two methods on the same conversations, a alone is
    right in `only_a`, b alone in `only_b`. 1 where the two never differ."""
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flip(differences: Sequence[int], targets: Sequence[Any]) -> float:
    """Two-sided p of two methods being equally good: the differences of hits are summed by target
    item, and each item's sum is as likely to have the other sign (exact). Where every conversation
    has a target of its own it is McNemar's exact test."""
    sums = Counter()
    for difference, target in zip(differences, targets, strict=True):
        sums[target] += int(difference)
    sizes = [abs(total) for total in sums.values() if total]
    reach = sum(sizes)
    chance = np.zeros(2 * reach + 1)  # of each total from -reach to reach
    chance[reach] = 1.0
    for size in sizes:
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(sums.total())
    return min(1.0, float(chance[far].sum()))
