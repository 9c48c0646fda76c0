"""How many descriptions name the true looks of an item of the mini world."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lavic_utils.mini.words import ATTRIBUTES


def attribute_accuracy(
    texts: Sequence[str], facts: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """Shares of texts in [0, 1]: by attribute, those whose first word of this kind is the true one;
    "all": those that hold all four true words. `facts`: the true words, one item a text (otherwise
    ValueError)."""
    right = dict.fromkeys([*ATTRIBUTES, "all"], 0)
    for text, truth in zip(texts, facts, strict=True):
        said = re.findall(r"\w+", text)
        for name, words in ATTRIBUTES.items():
            of_kind = [word for word in said if word in words]
            right[name] += of_kind[:1] == [truth[name]]
        right["all"] += all(truth[name] in said for name in ATTRIBUTES)
    return {name: count / len(facts) for name, count in right.items()}
