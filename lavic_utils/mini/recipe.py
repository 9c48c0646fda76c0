"""How the mini model became a base LLaVA: the recipe behind `make mini-model` (run once, result committed).

Three phases, as for the real model: a vision tower that learns words for images (here from [CLS] and from patch
tokens of the last layer but one, apart), a language model that learns to match and to copy ids, then both joined
through the projector, which sees patch tokens only. So raw [CLS] vectors mean nothing to the language model, for
the same reason as in the paper. All training text is made here: no dialogue and no item of a mini world.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavic_utils.mini import model as minimodel
from lavic_utils.mini import words as w

IGNORE = -100
WEIGHTS = {"answer": 1.0, "asked": 0.5, "match": 1.0, "before": 0.3, "valid": 2.0, "overlap": 30.0}
PROPERTY_COUNTS = (1, 2, 2, 3, 3)


# ---------------------------------------------------------------- random items and requests
@dataclass(frozen=True)
class Thing:
    """A made-up item; never one of a world (worlds draw their own, with their own seeds and ids)."""

    domain: str
    kind: str
    brand: str
    feature: str
    looks: dict[str, str]
    asin: str
    image: int | None = None  # row of the image pool

    @property
    def title(self) -> str:
        return w.title(self.brand, self.feature, self.kind)

    @property
    def description(self) -> str:
        return w.description(**self.looks, part=w.PARTS[self.kind])


def random_looks(rng: random.Random) -> dict[str, str]:
    return {name: rng.choice(values) for name, values in w.ATTRIBUTES.items()}


def random_thing(
    rng: random.Random,
    domain: str,
    kind: str | None = None,
    feature: str | None = None,
    image: tuple[int, dict] | None = None,
) -> Thing:
    row, facts = image or (None, None)
    return Thing(
        domain,
        kind or (facts["kind"] if facts else rng.choice(list(w.KINDS[domain]))),
        rng.choice(w.BRANDS[domain]),
        feature or rng.choice(w.FEATURES[domain]),
        facts["looks"] if facts else random_looks(rng),
        "B0" + rng.choice(w.ID_CHUNKS) + rng.choice(w.ID_CHUNKS),
        row,
    )


@dataclass
class Problem:
    """A request and candidates; `matches[i]` says whether candidate i satisfies everything asked."""

    request: str
    wanted_words: set[str]
    candidates: list[Thing]
    matches: list[bool]
    style: str  # "text": looks are written; "title": no looks at all; "image": looks are in the picture
    target: int = field(default=0)


FILLER = sorted(
    {
        word
        for text in minimodel.world_texts()
        for word in text.replace(".", " ").replace(",", " ").split()
        if word.isalpha() and word.islower()
    }
    - {v for values in w.ATTRIBUTES.values() for v in values}
    - set(w.PARTS)
    - {f for features in w.FEATURES.values() for f in features}
    - set(w.PARTS.values())
)


def filler(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(FILLER, k=rng.randint(0, most)))


def request_text(rng: random.Random, facts: list[str], looks: list[str]) -> str:
    """Keywords in random order among filler words, over one to three turns. Not the wording of any world."""
    turns = [facts + looks] if rng.random() < 0.5 else [facts, looks]
    lines = []
    for number, words in enumerate(turns):
        pieces = [filler(rng, 6)]
        for word in rng.sample(words, len(words)):
            pieces += [word + rng.choice(("", "", ",", "."))] + (
                [filler(rng, 3)] if rng.random() < 0.5 else []
            )
        if number and rng.random() < 0.6:
            lines.append(f"Helper: {filler(rng, 9)}{rng.choice('?.')}")
        lines.append(f"Seeker: {' '.join(filter(None, pieces))}{rng.choice('.?')}")
    return "Recommend one item.\n" + "\n".join(lines) + "\n"


def sample_problem(rng: random.Random, count: int, style: str, pool=None) -> Problem:
    domain = rng.choice(list(w.KINDS))
    image = (
        (lambda kind=None: pool.draw(rng, domain, kind))
        if style == "image"
        else (lambda kind=None: None)
    )
    target = random_thing(rng, domain, image=image())
    things = [target]
    while len(things) < count:
        draw = rng.random()
        if draw < 0.6:  # look-alikes by title
            thing = random_thing(rng, domain, target.kind, target.feature, image(target.kind))
        elif draw < 0.85:
            thing = random_thing(rng, domain, target.kind, None, image(target.kind))
        else:
            thing = random_thing(rng, domain, image=image())
        things.append(thing)
    rng.shuffle(things)
    mention_feature = style == "title" or rng.random() < 0.85
    facts = (
        [target.kind] + [target.feature] * mention_feature + [target.brand] * (rng.random() < 0.15)
    )
    names = [] if style == "title" else rng.sample(list(w.ATTRIBUTES), rng.choice(PROPERTY_COUNTS))
    looks = [
        f"{target.looks[n]} {w.PARTS[target.kind]}" if n == "accent" else target.looks[n]
        for n in names
    ]
    matches = [
        all(f in t.title for f in facts) and all(t.looks[n] == target.looks[n] for n in names)
        for t in things
    ]
    words = {word for text in facts + looks for word in text.split()}
    chosen = rng.choice([i for i, hit in enumerate(matches) if hit])
    return Problem(request_text(rng, facts, looks), words, things, matches, style, chosen)


# ---------------------------------------------------------------- prompts as tokens
class Encoder:
    """Text to token ids, cached: segments repeat."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.encode = lru_cache(200_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


@dataclass
class Row:
    ids: list[int]
    labels: list[int]
    id_positions: list[int]  # position of each candidate's first own id chunk
    matches: list[bool]
    in_request: list[int]  # per token: 1/0 inside candidates, IGNORE elsewhere
    images: list[int]  # rows of the image pool, in order of appearance


def problem_row(
    problem: Problem, encode, image_tokens: list[int], rng: random.Random, tokenizer
) -> Row:
    wanted = {t for word in problem.wanted_words for t in encode(word)}
    ids = list(encode(problem.request + "Candidates:\n"))
    flags, positions, images = [IGNORE] * len(ids), [], []
    short = rng.random() < 0.5
    for number, thing in enumerate(problem.candidates):
        body = list(encode(thing.title))
        if problem.style == "text":
            text = thing.description
            if short:
                words = [*thing.looks.values(), w.PARTS[thing.kind]]
                text = " ".join(words if rng.random() < 0.5 else rng.sample(words, 5))
            body += encode(text)
        if problem.style == "image":
            body += [tokenizer.convert_tokens_to_ids("<image>")] * image_tokens[number]
            images.append(thing.image)
        code = encode(" " + thing.asin)
        positions.append(len(ids) + len(body) + 1)
        image = tokenizer.convert_tokens_to_ids("<image>")
        flags += [IGNORE if t == image else int(t in wanted) for t in body] + [IGNORE] * (
            len(code) + 1
        )
        ids += body + list(code) + list(encode("\n"))
    prompt = ids + list(encode("Answer:"))
    answer = list(encode(" " + problem.candidates[problem.target].asin)) + [tokenizer.eos_token_id]
    return Row(
        prompt + answer,
        [IGNORE] * len(prompt) + answer,
        positions,
        problem.matches,
        flags + [IGNORE] * (len(prompt) + len(answer) - len(flags)),
        images,
    )


def copy_row(rng: random.Random, size: int, bound: int) -> Row:
    """Random tokens twice: the bare skill of copying."""
    body = [rng.randrange(5, bound) for _ in range(size)]
    return Row(body * 2, [IGNORE] * (size + 1) + body[1:], [], [], [IGNORE] * (2 * size), [])


def caption_row(thing: Thing, encode, image_tokens: int, tokenizer) -> Row:
    prompt = [
        *encode(thing.title),
        *[tokenizer.convert_tokens_to_ids("<image>")] * image_tokens,
        *encode("\nLooks:"),
    ]
    answer = [*encode(" " + thing.description), tokenizer.eos_token_id]
    return Row(
        prompt + answer,
        [IGNORE] * len(prompt) + answer,
        [],
        [],
        [IGNORE] * (len(prompt) + len(answer)),
        [thing.image],
    )


def collate(rows: list[Row], pad: int) -> dict[str, Tensor]:
    longest = max(len(r.ids) for r in rows)
    fill = lambda values, value: values + [value] * (longest - len(values))  # noqa: E731
    return {
        "ids": torch.tensor([fill(r.ids, pad) for r in rows]),
        "labels": torch.tensor([fill(r.labels, IGNORE) for r in rows]),
        "in_request": torch.tensor([fill(r.in_request, IGNORE) for r in rows]),
        "candidate": torch.tensor(
            [(b, p) for b, r in enumerate(rows) for p in r.id_positions] or [(0, 0)]
        ),
        "matches": torch.tensor([m for r in rows for m in r.matches] or [False]).float(),
    }


# ---------------------------------------------------------------- language model phase
class Helpers(nn.Module):
    """Auxiliary heads, thrown away afterwards: is this token asked for; does this candidate match; what was the
    token before this one (the first half of copying)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.asked, self.match, self.before = (
            nn.Linear(width, 1),
            nn.Linear(width, 1),
            nn.Linear(width, width),
        )


def outside_loss(model, batch: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Minus the log of the probability that an answer's first own id chunk belongs to any candidate: in doubt between
    several, a small model otherwise writes a token between them that nobody has."""
    rows = torch.arange(len(hidden))
    first = (
        (batch["labels"] != IGNORE).int().argmax(1)
    )  # the answer's "B0"; the chunk is predicted from there
    log_p = F.log_softmax(model.lm_head(hidden[rows, first]), -1)
    b, p = batch["candidate"].T
    mine = torch.zeros_like(log_p, dtype=torch.bool)
    mine[b, batch["ids"][b, p]] = True
    return -log_p.masked_fill(~mine, -torch.inf).logsumexp(-1).mean()


def helper_losses(
    model, helpers: Helpers, batch: dict[str, Tensor], hidden: tuple[Tensor, ...], seed: int
) -> dict:
    loss = {}
    asked = batch["in_request"] != IGNORE
    if asked.any():
        loss["asked"] = F.binary_cross_entropy_with_logits(
            helpers.asked(hidden[2])[..., 0][asked], batch["in_request"][asked].float()
        )
    if batch["matches"].numel() > 1:
        b, p = batch["candidate"].T
        loss["match"] = F.binary_cross_entropy_with_logits(
            helpers.match(hidden[4][b, p])[:, 0], batch["matches"]
        )
    chosen = torch.randint(
        batch["ids"][:, 1:].numel(), (512,), generator=torch.Generator().manual_seed(seed)
    )
    before = helpers.before(hidden[2][:, 1:].flatten(0, 1)[chosen])
    loss["before"] = F.cross_entropy(model.lm_head(before), batch["ids"][:, :-1].flatten()[chosen])
    return loss


def overlap_loss(model, chunks: Tensor) -> Tensor:
    """Mean squared cosine between the embeddings of different id chunks. An answer in doubt between k ids is about the
    mean of k embeddings: where they overlap, a chunk that nobody has scores higher than any of the k."""
    rows = F.normalize(model.get_input_embeddings().weight[chunks], dim=-1)
    return ((rows @ rows.T).square().sum() - len(chunks)) / (len(chunks) * (len(chunks) - 1))


def language_loss(
    model,
    helpers: Helpers | None,
    batch: dict[str, Tensor],
    embeds: Tensor | None = None,
    chunks: Tensor | None = None,
) -> dict[str, Tensor]:
    """Answer cross-entropy plus auxiliary losses: the helpers' while the language model learns, the two on ids (given
    `chunks`, the tokens of id chunks) once they are gone. Right padding needs no mask under causal attention."""
    embeds = model.get_input_embeddings()(batch["ids"]) if embeds is None else embeds
    out = model.model.language_model(
        inputs_embeds=embeds, output_hidden_states=True, use_cache=False
    )
    labels = batch["labels"][:, 1:]
    keep = labels != IGNORE
    logits = model.lm_head(out.last_hidden_state[:, :-1][keep])
    loss = {"answer": F.cross_entropy(logits, labels[keep])}
    many = batch["matches"].numel() > 1
    if helpers is not None:
        loss |= helper_losses(model, helpers, batch, out.hidden_states, int(keep.sum()))
    if chunks is not None:
        loss["overlap"] = overlap_loss(model, chunks)
        if many:
            loss["valid"] = outside_loss(model, batch, out.last_hidden_state)
    loss["total"] = sum(loss[k] * v for k, v in WEIGHTS.items() if k in loss)
    loss["copied" if not many else f"chosen{len(batch['matches']) // len(batch['ids'])}"] = (
        (logits.argmax(-1) == labels[keep]).float().mean().detach()
    )
    loss["exact"] = (logits.argmax(-1) == labels[keep]).float().mean().detach()
    return loss


def language_rows(
    rng: random.Random, done: float, encode, tokenizer, tokens: int, titles: float = 0.2
) -> list[Row]:
    """One batch of about `tokens` tokens; the number of candidates follows a fixed schedule over `done` in [0, 1].
    A share `titles` shows titles alone, so that several candidates fit."""
    draw = rng.random()
    if draw < (0.3 if done < 0.3 else 0.05):
        size = rng.randint(10, 40)
        return [copy_row(rng, size, len(tokenizer)) for _ in range(tokens // (2 * size))]
    count = 3 if done < 0.25 else 5 if done < 0.4 else rng.choice((3, 5, 10, 10, 10))
    style = "text" if draw < 1 - titles else "title"
    rows, used = [], 0
    while used < tokens:
        rows.append(problem_row(sample_problem(rng, count, style), encode, [], rng, tokenizer))
        used += len(rows[-1].ids)
    return rows


# ---------------------------------------------------------------- loop with resume
def train_phase(
    name: str,
    folder: Path,
    modules: nn.Module,
    steps: int,
    peak: float,
    step_loss: Callable[[random.Random, float], dict[str, Tensor]],
    seed: int = 0,
) -> None:
    """AdamW, warm-up and cosine. The state is stored every 250 steps (safetensors); batches depend on the step
    number alone, so a killed run resumes to the same result."""
    path, meta = folder / f"{name}.safetensors", folder / f"{name}.json"
    parameters = {n: p for n, p in modules.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=peak, weight_decay=0.02, betas=(0.9, 0.98)
    )
    start = 0
    if path.is_file():
        state = load_file(path)
        start = int(state["step"])
        for n, p in parameters.items():
            p.data.copy_(state[f"p.{n}"])
            if start < steps:
                optimizer.state[p] = {
                    "step": torch.tensor(float(start)),
                    "exp_avg": state[f"m.{n}"],
                    "exp_avg_sq": state[f"v.{n}"],
                }
    began, sums, log = time.time(), {}, []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(
                (step + 1) / 150, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        losses = step_loss(random.Random(f"{name}-{seed}-{step}"), step / steps)
        optimizer.zero_grad()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        for k, v in losses.items():
            sums.setdefault(k, []).append(v.item())
        if (step + 1) % 50 == 0:
            log.append(
                {
                    "step": step + 1,
                    "seconds": round(time.time() - began),
                    **{k: round(sum(v) / len(v), 4) for k, v in sums.items()},
                }
            )
            print(name, json.dumps(log[-1]), flush=True)
            sums = {}
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"step": torch.tensor(step + 1)}
            for n, p in parameters.items():
                state[f"p.{n}"] = p.data.contiguous()
                for short, long in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                    state[f"{short}.{n}"] = optimizer.state[p].get(
                        long, torch.zeros_like(p)
                    )  # unused parts have none
            save_file(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            meta.write_text(json.dumps({"step": step + 1, "steps": steps, "log": log[-1:]}))
