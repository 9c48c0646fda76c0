"""Beyond the paper (`reproduce --extended`): how many visual tokens an image, how long a list.

Two questions for the mini world alone. The frontier: what do descriptions and recommendations need
of a picture, and does one vector a tile need self-distillation? The lists: what does compression
buy where there are more candidates? Rows go to `extended.json`, with more fields than metrics.json.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lavic_utils import experiment, loading, methods, recommendation, report, training, vision
from lavic_utils.config import results_dir
from lavic_utils.data import Dialogue
from lavic_utils.experiment import Experiment

# In the order of the tokens an image has.
FRONTIER = (
    "LaViC w/o images",
    "LaViC, one [CLS]",
    methods.RAW,
    "LaViC",
    f"{methods.RAW}, mean of patches",
    "LaViC, mean of patches",
    f"{methods.RAW}, 4 patches a tile",
    "Entire tokens (5x577)",
)
COUNTS = (20, 50)  # beside the ten of every dialogue
COMPARED = ("LaViC", "LaViC w/o images")


@dataclass(frozen=True)
class Longer(methods.Trained):
    """A method as it was trained on lists of ten, asked with `count` candidates in the model's
    whole context window; what does not fit is dropped by the policy for long prompts."""

    of: str = "LaViC"
    count: int = 20

    def reads(self, run, domain, split):
        return [self.count, methods.find(self.of).reads(run, domain, split)]

    def trained(self, run, domain):
        return methods.find(self.of).trained(run, domain)

    def answer(self, run, domain, split, dialogues, control=None):
        model, profile = run.tuned(self.of, domain), run.profile.arm(self.of)
        window = {"max_length": loading.context_window(model.config)}
        settings = profile.recommendation.model_copy(update=window)
        wide = profile.model_copy(update={"recommendation": settings})
        prompter = run.prompter(self.visual(run, split), profile=wide)
        longer, which = lists(run, domain, split, dialogues, self.count), run.profile.candidates
        return recommendation.generate_answers(model, prompter, longer, which)


def lists(
    run: Experiment, domain: str, split: str, dialogues: Sequence[Dialogue], count: int
) -> list[Dialogue]:
    """The dialogues with `count` candidates: their ten, and the next that retrieval by title finds
    among the items of the split's lists, all in a seeded order."""
    which, asins = run.profile.candidates, run.domain_catalogue(domain)[0]
    pool = {asin for d in run.dialogues(domain, split) for asin in getattr(d, which)}
    found = []
    ranked = methods.find("SBERT").order(run, domain, dialogues)
    for dialogue, best_first in zip(dialogues, ranked, strict=True):
        names = list(getattr(dialogue, which))
        nearest = [asins[int(i)] for i in best_first]
        names += [a for a in nearest if a in pool and a not in names][: count - len(names)]
        random.Random(f"lists/{domain}/{split}/{dialogue.line}").shuffle(names)
        found.append(dialogue.model_copy(update={which: tuple(names)}))
    return found


def longer(method: str, count: int) -> str:
    """The name of a method asked with longer lists, made known to `methods.find`."""
    chosen = methods.find(method)
    name = f"{method}, {count} candidates"
    about = {"inputs": chosen.inputs, "family": "extended", "tokens": chosen.tokens}
    methods.EXTENDED[name] = Longer(name, **about, of=method, count=count)
    return name


def accuracy(run: Experiment, method: methods.Trained) -> float | None:
    """The share of looks that the model can say of unseen items from these visual tokens alone."""
    if method.tokens is None:
        return None
    kind, adapter = experiment.kind_of(method.tokens), run.student(method.tokens)
    model = training.load_adapter(run.model(), adapter) if adapter else run.model()

    def how(*images):
        return [tokens[: method.tiles] for tokens in vision.TOKENS[kind](*images)]

    return run.accuracy(model, how, run.taught("valid"))["all"]


def measure(run: Experiment) -> None:
    """Train what is not trained yet, and put the rows of both questions into extended.json."""
    rows = []
    for name in FRONTIER:
        method = methods.find(name)
        sizes = vision.lengths(method.visual(run, "test") or {}).values()
        about = {"tokens": sum(sizes) / max(1, len(sizes)), "accuracy": accuracy(run, method)}
        if name in COMPARED:
            about |= {"candidates": 10, "of": name}
        rows += [row | about for row in report.scored_rows(run, [name])]
    for count in COUNTS:
        for name in COMPARED:
            more = {"candidates": count, "of": name}
            rows += [row | more for row in report.scored_rows(run, [longer(name, count)])]
    report.upsert_metrics(results_dir(run.profile) / "extended.json", rows, run.stamp())
