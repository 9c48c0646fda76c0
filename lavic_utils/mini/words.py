"""The words of the mini world: attributes, titles, descriptions, and wordings of dialogues.

The world, its drawings, the mini model's tokenizer and its own training texts all speak from
here, so that one tokenizer knows every word.
"""

from __future__ import annotations

import random
import string

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
PATTERNS = ("plain", "striped", "dotted", "checked")
SHAPES = ("round", "boxy", "tapered")
# Accents never share a word with a main colour: "white" can only ever be said of the accent part.
ACCENTS = ("black", "white", "gray", "turquoise", "lime", "magenta")
ATTRIBUTES = {"colour": COLOURS, "pattern": PATTERNS, "shape": SHAPES, "accent": ACCENTS}

# kind of product -> the part that carries the accent colour
KINDS = {
    "beauty": {"perfume": "stopper", "lipstick": "base", "jar": "lid", "dispenser": "pump"},
    "fashion": {"handbag": "strap", "shoe": "sole", "hat": "band", "dress": "belt"},
    "home": {"mug": "handle", "lamp": "stand", "cushion": "trim", "chair": "legs"},
}
PARTS = {kind: part for kinds in KINDS.values() for kind, part in kinds.items()}
FEATURES = {
    "beauty": (
        "travel vegan gentle organic scented refillable nourishing unscented "
        "hydrating lasting classic premium mild herbal daily soothing"
    ).split(),
    "fashion": (
        "waterproof vintage casual lightweight leather formal washable summer "
        "winter sporty breathable stretchy handmade everyday evening insulated"
    ).split(),
    "home": (
        "ceramic wooden stackable outdoor compact sturdy foldable rustic "
        "modern ergonomic recycled cosy portable nordic antique minimal"
    ).split(),
}
BRANDS = {
    "beauty": ("Velora", "Mirano", "Lumibel", "Opaline", "Sorrel", "Thalis"),
    "fashion": ("Kestrel", "Tandem", "Marlowe", "Pinecrest", "Ardent", "Solano"),
    "home": ("Hearthly", "Oakmere", "Tivoli", "Brindle", "Norrland", "Casella"),
}


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


# ---- dialogues: {kind} and {feature} stand in titles too, {looks} is one to three visual
# properties. `seen` wordings are in every split, `new` ones in a share of the test dialogues only.
OPENINGS = {
    "seen": (
        "hi all, i am looking for a {feature} {kind}.",
        "can anyone recommend a {feature} {kind}?",
        "my old {kind} broke, so i need a {feature} {kind} soon.",
        "i want to buy a {kind}, it should be {feature}.",
        "which {feature} {kind} would you get?",
        "searching for a {kind} for my sister, a {feature} one please.",
        "does a good {feature} {kind} exist?",
        "hello, i need help to find a {kind}. it must be {feature}.",
        "after weeks of searching i still have no {feature} {kind}.",
        "birthday gift idea: a {feature} {kind}. what do you suggest?",
        "help me choose a {kind}, preferably a {feature} one.",
        "we just moved and i would like a {feature} {kind}.",
    ),
    "new": (
        "long time reader, first time asking: where do i get a {feature} {kind}?",
        "a friend told me this is the place to ask about a {kind}, i mean a {feature} model.",
        "wedding season is here and i lack a {feature} {kind}, any tips?",
        "could someone point me to a {kind} that counts as {feature}?",
        "trying to surprise my father with a {feature} {kind} this year.",
    ),
}
LOOKS = {
    "seen": (
        "i would love it {looks}.",
        "ideally {looks}.",
        "it should be {looks}.",
        "i picture something {looks}.",
        "something {looks} would be perfect.",
        "{looks} if possible.",
        "my dream one is {looks}.",
        "about the looks: {looks}.",
        "please only {looks}.",
        "it has to be {looks}, nothing else.",
    ),
    "new": (
        "for my taste it must look {looks}, to be honest.",
        "i saw one that was {looks} and cannot forget it.",
        "the style i am hoping for is {looks}.",
        "bonus points when it comes {looks}.",
        "nothing beats one that is {looks}, right?",
    ),
}
ASK_BACK = (
    "what should it look like?",
    "any idea about the style?",
    "sure, but how should it look?",
    "do you have a look in mind?",
    "tell us more, please.",
    "what are you hoping for?",
    "is there a budget?",
    "happy to help, more details?",
)
WANDER = (
    "i had one for years and it was great.",
    "those are hard to find these days.",
    "same here, i am curious too.",
    "my neighbour has three of them.",
    "the shop near me closed last year.",
    "thanks for asking this.",
    "i always buy mine online.",
    "prices went up a lot lately.",
    "good question, i was about to ask the same.",
)
SEEKER_WANDER = (
    "thank you all for the help.",
    "money is not a problem.",
    "i can wait a few weeks.",
    "sorry, i am new here.",
    "shipping should be fast.",
    "the price does not matter much.",
)
ANSWERS = (
    "you could try this one: {title}.",
    "take a look at {title}.",
    "{title} fits well.",
    "i would get {title}.",
)


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


# An id of the mini world is "B0" and two of these: the form of an ASIN, three tokens.
ID_CHUNKS = _id_chunks()
# Words that prompts and readers may use, and that stand in nothing above.
EXTRA_WORDS = (
    "prefer nice item items an or without on from by brand yes best answer id title describe image "
    "color colour pattern shape part your they he she her his very really also maybe anything "
    "small large big cheap today who why will did been were then than most less least some each "
    "other another different favourite made product products store "
    "Customer Shop Recommend Choose Items Products Choice"
)
