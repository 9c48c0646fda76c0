"""The words of the mini world: attributes, titles, descriptions, and wordings of dialogues.

The world, its drawings, the mini model's tokenizer and its own training texts all speak from
`words.yaml`, so that one tokenizer knows every word.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

import yaml

FILE = Path(__file__).with_suffix(".yaml")
_said = yaml.safe_load(FILE.read_text(encoding="utf-8"))

ATTRIBUTES: dict[str, list[str]] = _said["attributes"]  # the looks: name -> words
KINDS: dict[str, dict[str, str]] = _said["kinds"]  # domain -> kind -> part in the accent colour
PARTS = {kind: part for kinds in KINDS.values() for kind, part in kinds.items()}
FEATURES, BRANDS = _said["features"], _said["brands"]  # domain -> words
OPENINGS, LOOKS = _said["openings"], _said["looks"]  # "seen" or "new" -> wordings
ASK_BACK, WANDER = _said["ask_back"], _said["wander"]  # of helpers
SEEKER_WANDER, ANSWERS = _said["seeker_wander"], _said["answers"]
EXTRA_WORDS: str = _said["extra"]


def held_out(looks: dict[str, str]) -> bool:
    """Whether these looks are kept for a world's validation and test items: one pattern in four for
    each colour, shape and accent, so that every value and every pair of values is seen in training,
    and no whole combination of these. The base model and both stages train on the others alone."""
    return sum(values.index(looks[name]) for name, values in ATTRIBUTES.items()) % 4 == 3


def title(facts: dict[str, str]) -> str:
    """A title as the catalogue prints it: only what cannot be seen."""
    return f"{facts['brand']} {facts['feature']} {facts['kind']}"


def description(facts: dict[str, str]) -> str:
    """The looks of an item in one sentence that does not repeat its title."""
    colour, pattern, shape, accent = (facts[name] for name in ATTRIBUTES)
    return f"{colour} and {pattern}, {shape}, with a {accent} {PARTS[facts['kind']]}."


def looks_phrase(wanted: dict[str, str], part: str) -> str:
    """Visual wishes in words: {"colour": "red", "accent": "white"} -> "red, with a white strap"."""
    words = [wanted[name] for name in ("colour", "pattern", "shape") if name in wanted]
    if "accent" in wanted:
        words.append(f"with a {wanted['accent']} {part}")
    return ", ".join(words)


def _id_chunks(count: int = 512) -> list[str]:
    """Distinct strings of four capitals and digits that hold at least one of each."""
    rng, chunks = random.Random(0), []
    while len(chunks) < count:
        chunk = "".join(rng.choices(string.ascii_uppercase + string.digits, k=4))
        if chunk not in chunks and not chunk.isdigit() and not chunk.isalpha():
            chunks.append(chunk)
    return chunks


ID_CHUNKS = _id_chunks()  # an id is "B0" and two of these: the form of an ASIN, three tokens
