"""How time and memory grow: with candidates, dialogue length, entire tokens, and the size of the catalogue.

Prompts are synthetic and longer than the mini model was trained for (its positions are rotary, without a table), so
this is speed only. One prompt at a time, from stored visual tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from lavic_utils import data, store, vision
from lavic_utils.bench_model import DOMAIN, Bench, peak_bytes, spread, timed
from lavic_utils.direct import autocast
from lavic_utils.recommendation import Example, Prompter, answer, collator

REPEATS = 3
MIB = 2**20


def uncut(bench: Bench, visual: dict[str, Tensor]) -> Prompter:
    """A prompter that has room for everything."""
    profile = bench.run.profile
    roomy = profile.recommendation.model_copy(update={"max_length": 10**6})
    return Prompter(bench.run.processor.tokenizer, profile.model_copy(update={"recommendation": roomy}), bench.run.titles,
                    visual)


def series(bench: Bench, how, what: str, points: Sequence[int]) -> list[dict]:
    """One record a point: seconds of a training step and of an answer, and the step's peak memory.

    `how` makes the visual tokens (`vision.cls_tokens` or `vision.full_tokens`); `what` grows: "candidates", or "words"
    of dialogue beside ten candidates.
    """
    most = max(points) if what == "candidates" else 10
    images = {a: data.open_image(data.image_file(bench.run.root, a)) for a in bench.run.items["test"]}
    names = [a for a, image in images.items() if image is not None][:most]
    visual = {}
    for group in vision.batched(names, 50):
        visual |= vision.encode(bench.model, group, *vision.pixels(bench.run.processor, [images[a] for a in group]), how)
    prompter, model = uncut(bench, visual), bench.tuned()
    dialogue, found = bench.run.dialogues(DOMAIN, "test")[0], []
    words = " ".join(text for _, text in dialogue.turns).split()
    for point in (points[0], *points):  # the first, twice: it warms up
        candidates = tuple(islice(cycle(names), point if what == "candidates" else 10))
        context = dialogue.context if what == "candidates" else (
            f"<submission>{' '.join(islice(cycle(words), point))}</submission>\n")
        shown = dialogue.model_copy(update={"context": context, bench.which: candidates})
        batch = bench.moved(collator(prompter)([prompter.row(Example(shown, candidates, candidates[0]))]))

        def step(batch=batch) -> None:
            with autocast(model.dtype):
                loss = model(**batch)["loss"]
            loss.backward()
            model.zero_grad()

        def reply(shown=shown) -> None:
            answer(bench.model, prompter, [shown], bench.which, scored=False)
        found.append({what: point, "prompt_tokens": batch["input_ids"].shape[1],
                      "training_peak_mib": round(peak_bytes(step) / MIB, 2),
                      "answer_peak_mib": round(peak_bytes(reply) / MIB, 2),
                      "training_seconds": spread([timed(step) for _ in range(REPEATS)]),
                      "answer_seconds": spread([timed(reply) for _ in range(REPEATS)])})
    return found[1:]


def catalogue(hidden: int, sizes: Sequence[int], tiles: int = 5) -> list[dict]:
    """A store of synthetic vectors: seconds to write, to open (verified), to read whole, and to look up the ten items of a
    dialogue (files just written, so in the system's cache)."""
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder, names = Path(name), [f"B0{i:08d}" for i in range(size)]
            tokens = {name: torch.randn(tiles, hidden) for name in names}

            def opened(folder=folder, names=names, tokens=tokens) -> store.Store:
                shards = store.fill(folder, {name: Path(name) for name in names},
                                    lambda: lambda files: [tokens[file.name] for file in files])
                return store.Store(folder, shards, {name: name for name in names})
            writing, ten = timed(opened), names[::size // 10][:10]
            one = opened()
            lookup = spread([timed(lambda one=one, ten=ten: [one[name] for name in ten]) for _ in range(5)])
            if not torch.equal(one[ten[-1]], tokens[ten[-1]]):
                raise RuntimeError(f"a store of {size} items gives back other vectors than were put in")
            size_mib = sum(file.stat().st_size for file in folder.iterdir()) / MIB
            found.append({"items": size, "mib": round(size_mib, 1), "write_seconds": round(writing, 4),
                          "load_seconds": spread([timed(lambda one=one: [v.clone() for v in one.values()]) for _ in range(5)]),
                          "open_seconds": spread([timed(opened) for _ in range(5)]), "lookup_ten_seconds": lookup})
    return found


def growth(bench: Bench, candidates: Sequence[int], words: Sequence[int], catalogues: Sequence[int]) -> dict:
    return {"note": "synthetic prompts, speed only; one prompt at a time; peak memory: the most bytes of tensors held at once "
                    "beyond those held before (weights and stored vectors), by torch's own count of allocations; the resident "
                    "memory of a process on a CPU can be about twice that",
            "candidates_cls": series(bench, vision.cls_tokens, "candidates", candidates),
            "candidates_entire": series(bench, vision.full_tokens, "candidates", candidates),
            "dialogue_cls": series(bench, vision.cls_tokens, "words", words),
            "catalogue": catalogue(bench.model.config.text_config.hidden_size, catalogues)}
