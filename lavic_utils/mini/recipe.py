"""How the mini model becomes a base LLaVA: pictures, texts, losses, phases (`make mini-model`).

It learns what LLaVA can do before LaViC comes. A vision tower names what it sees, as CLIP's does; a
language model follows requests among candidates in words and copies ids; a projector joins the two,
to describe pictures and to choose among a few by all their patch tokens; at last the tower's last
layer, unread by LLaVA, moves its [CLS] into a space of its own, as CLIP's is. Never met: a [CLS]
through the projector, ten candidates with visual tokens, an item, dialogue or wording of a mini
world, or the looks of its validation and test items (`words.held_out`). Lists come in many forms.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavic_utils import loading, vision
from lavic_utils.mini import words
from lavic_utils.mini.drawing import draw_product
from lavic_utils.mini.model import PATCH, TILE, WIDTH, build_model, build_processor, known_words
from lavic_utils.training import IGNORE

TOKENS, PICTURES = 3000, 192  # of a batch of texts, and of one for the tower
LOOKS = tuple(words.ATTRIBUTES)
NAMED = {"kind": tuple(words.PARTS), **words.ATTRIBUTES}  # what the tower learns to name
PATCHES = (TILE // PATCH) ** 2  # of one tile
SHOWN = {"tile": PATCHES, "picture": 0}  # visual tokens of a candidate; 0: all there are
# Forms of a request: opening, speakers, heading, what stands between a candidate and its id.
FORM = (
    ("Recommend one item.\n", "Choose the best product.\n", ""),
    (("Seeker", "Helper"), ("Customer", "Shop")),
    ("Candidates:\n", "Items:\n", "Products:\n"),
    ("", "", " ID:", " id", " is"),
)
CUES = ("Answer:", "Answer:", "Choice:", "ID:")  # the answer follows
SIZES = ((144, 144), (144, 144), (144, 144), (144, 72), (72, 144), (144, 108))  # pixels
MEANT = {*words.PARTS, *words.PARTS.values()}.union(
    *words.ATTRIBUTES.values(), *words.FEATURES.values()
)
FILLER = [w for w in known_words() if w.isalpha() and w.islower() and w not in MEANT]


class Learner(nn.Module):
    """The model, small heads that help it to learn (later thrown away), and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.processor, self.pool, self.seconds = build_processor(), None, 0.0
        self.tokenizer = self.processor.tokenizer
        self.image = self.tokenizer.convert_tokens_to_ids("<image>")
        self.model = build_model(self.processor, seed=0)
        # words for a picture, from the last layer's [CLS] and from the mean patch of the one before
        self.name_cls = nn.ModuleList(nn.Linear(WIDTH, len(v)) for v in NAMED.values())
        self.name_patches = nn.ModuleList(nn.Linear(WIDTH, len(v)) for v in NAMED.values())
        # is this token asked for; does this candidate fit; which token came before this one
        self.help_asked, self.help_fits = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)
        self.help_before = nn.Linear(WIDTH, WIDTH)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------- what it sees: pictures
class Pool:
    """So many pictures of made-up products, as the processor's tiles, and what is true of each.
    `held_out`: of the looks that are kept for a world's test items, or (False) of all others."""

    def __init__(self, processor, count: int, seed: int, held_out: bool = False) -> None:
        rng, pixels, sizes, self.facts = Random(f"pool-{seed}"), [], [], []
        while len(self.facts) < count:
            facts = {name: rng.choice(values) for name, values in NAMED.items()}
            if words.held_out(facts) == held_out:
                self.facts.append(facts)
        self.of_kind = {kind: [] for kind in words.PARTS}
        for number, facts in enumerate(self.facts):
            self.of_kind[facts["kind"]].append(number)
        for some in vision.batched(self.facts, 200):
            pictures = []
            for facts in some:
                stream = io.BytesIO()
                draw_product(facts, rng.choice(SIZES), rng).save(stream, "JPEG", quality=88)
                pictures.append(Image.open(stream).convert("RGB"))
            tiles, size = vision.pixels(processor, pictures)
            pixels.append(F.pad(tiles, (0,) * 7 + (5 - tiles.shape[1],)).half())
            sizes.append(size)
        self.pixels = torch.cat(pixels)  # (count, 5, 3, TILE, TILE); tiles of zeros are padding
        self.sizes = torch.cat(sizes)  # (count, 2): height, width
        counted = processor._get_num_multimodal_tokens(image_sizes=self.sizes.tolist())
        self.lengths = counted.num_image_tokens  # full tokens of each picture
        true = [[values.index(f[n]) for n, values in NAMED.items()] for f in self.facts]
        self.labels = torch.tensor(true)  # (count, names): which of the words in NAMED

    def draw(self, rng: Random, kinds: Iterable[str]) -> int:
        return rng.choice(self.of_kind[rng.choice(list(kinds))])


def picture_tokens(learner: Learner, rows: list[int], shown: int) -> list[Tensor]:
    """Projected patch tokens of pictures, (tokens, WIDTH) each: of all tiles, packed as LLaVA does
    (`shown` 0), or the PATCHES of the whole-picture tile."""
    if not rows:
        return []
    pixels, inside = learner.pool.pixels[rows].to(learner.model.device).float(), learner.model.model
    if not shown:
        return vision.full_tokens(learner.model, pixels, learner.pool.sizes[rows])
    hidden = inside.vision_tower(pixels[:, 0], output_hidden_states=True).hidden_states[-2]
    return list(inside.multi_modal_projector(hidden[:, 1:]))  # (rows, PATCHES, WIDTH)


# ---------------------------------------------------------------- what it sees: texts
@dataclass
class Row:
    """One training text as tokens; what follows `pictures` is for choices among candidates."""

    ids: list[int]
    labels: list[int]  # IGNORE where nothing is learnt
    pictures: list[int] = field(default_factory=list)  # of the pool, as they appear
    asked: list[int] = field(default_factory=list)  # candidates' tokens: is it asked for? 1 or 0
    chunks: list[int] = field(default_factory=list)  # place of each candidate's first id chunk
    known: list[int] = field(default_factory=list)  # place where all of a candidate has been read
    fits: list[bool] = field(default_factory=list)  # does each candidate have all that is asked?
    names: list[str] = field(default_factory=list)  # the candidates' ids


def answered(learner: Learner, prompt: list[int], answer: str) -> Row:
    target = [*learner.encode(" " + answer), learner.tokenizer.eos_token_id]
    return Row(prompt + target, [IGNORE] * len(prompt) + target)


def random_item(rng: Random, pool: Pool, picture: int, feature: str = "") -> dict:
    """A made-up item of a picture: brand, feature, kind, looks, id (asin), picture."""
    facts = pool.facts[picture]
    domain = next(name for name, kinds in words.KINDS.items() if facts["kind"] in kinds)
    asin = "B0" + rng.choice(words.ID_CHUNKS) + rng.choice(words.ID_CHUNKS)
    feature = feature or rng.choice(words.FEATURES[domain])
    brand = rng.choice(words.BRANDS[domain])
    return {"feature": feature, "brand": brand, "asin": asin, "picture": picture, **facts}


def caption_row(learner: Learner, item: dict, length: int) -> Row:
    """Title and picture (`length` visual tokens) in, a description of the looks out."""
    prompt = learner.encode(words.title(item)) + [learner.image] * length
    row = answered(learner, prompt + learner.encode("\nLooks:"), words.description(item))
    row.pictures.append(item["picture"])
    return row


def filler(rng: Random, most: int) -> str:
    return " ".join(rng.choices(FILLER, k=rng.randint(0, most)))


def request_text(rng: Random, speakers: tuple, facts: list[str], looks: list[str]) -> str:
    """Keywords in random order among filler words, in one or two turns of the seeker."""
    (seeker, helper), lines = speakers, []
    for keywords in [facts + looks] if rng.random() < 0.5 else [facts, looks]:
        if lines and rng.random() < 0.6:
            lines.append(f"{helper}: {filler(rng, 9)}{rng.choice('?.')}\n")
        pieces = [filler(rng, 6)]
        for word in rng.sample(keywords, len(keywords)):
            pieces.append(word + rng.choice(("", "", ",", ".")))
            pieces.append(filler(rng, 3 if rng.random() < 0.5 else 0))
        lines.append(f"{seeker}: {' '.join(filter(None, pieces))}{rng.choice('.?')}\n")
    return "".join(lines)


def alike_items(rng: Random, pool: Pool, count: int) -> list[dict]:
    """Candidates of one domain; most look like the first one by title."""
    domain = rng.choice(list(words.KINDS))
    items = [target := random_item(rng, pool, pool.draw(rng, words.KINDS[domain]))]
    while len(items) < count:
        draw = rng.random()
        picture = pool.draw(rng, [target["kind"]] if draw < 0.85 else words.KINDS[domain])
        items.append(random_item(rng, pool, picture, target["feature"] if draw < 0.6 else ""))
    return items


def wishes(rng: Random, task: str) -> tuple[list[str], list[str]]:
    """What a request names: (facts of titles, looks)."""
    facts = ["kind"]
    if task == "title" or rng.random() < 0.85:
        facts.append("feature")
    if rng.random() < 0.15:
        facts.append("brand")
    return facts, [] if task == "title" else rng.sample(LOOKS, rng.choice((1, 2, 2, 3, 3)))


def choice_row(learner: Learner, rng: Random, task: str, count: int) -> Row:
    """Request and candidates in, an id out. Beside a title stand the looks in words ("text"),
    nothing ("title": only titles are asked for, so several candidates fit), or the patch tokens of
    the whole "picture" or of its first "tile"."""
    encode, items = learner.encode, alike_items(rng, learner.pool, count)
    opening, speakers, heading, gap = (rng.choice(some) for some in FORM)
    id_first, cue, target = rng.random() < 0.2, rng.choice(CUES), items[0]
    rng.shuffle(items)
    facts, looks = wishes(rng, task)
    named, said = [target[name] for name in facts], [target[name] for name in looks]
    if "accent" in looks:
        said[looks.index("accent")] += " " + words.PARTS[target["kind"]]
    asked = set(encode(" ".join(named + said)))  # tokens
    ids = encode(opening + request_text(rng, speakers, named, said) + heading)
    short = rng.random() < 0.5
    row = Row([], [], asked=[IGNORE] * len(ids))
    for item in items:
        row.fits.append(all(item[name] == target[name] for name in facts + looks))
        row.names.append(item["asin"])
        body = encode(words.title(item))
        if task == "text":
            keywords = [*(item[name] for name in LOOKS), words.PARTS[item["kind"]]]
            if rng.random() < 0.5:
                rng.shuffle(keywords)
            body += encode(" ".join(keywords) if short else words.description(item))
        if task in SHOWN:
            body += [learner.image] * (SHOWN[task] or learner.pool.lengths[item["picture"]])
            row.pictures.append(item["picture"])
        marks = [int(token in asked) for token in body]
        name = encode(" " + item["asin"])
        parts = [(name, None), (encode(gap) if gap else [], None), (body, marks)]
        for tokens, wanted in parts if id_first else reversed(parts):
            if tokens is name:
                row.chunks.append(len(ids) + 1)  # after "B0"
            ids += tokens
            row.asked += wanted or [IGNORE] * len(tokens)
        row.known.append(len(ids) if id_first else row.chunks[-1])
        ids += encode("\n")
        row.asked += [IGNORE]
    answer = rng.choice([name for name, fit in zip(row.names, row.fits, strict=True) if fit])
    whole = answered(learner, ids + encode(cue), answer)
    row.ids, row.labels = whole.ids, whole.labels
    row.asked += [IGNORE] * (len(row.ids) - len(row.asked))
    return row


# ---------------------------------------------------------------- what it learns: losses
def naming_loss(learner: Learner, rng: Random) -> dict[str, Tensor]:
    """Losses of naming kind and looks, from the last layer's [CLS] and from the mean patch of the
    layer before, which LLaVA reads; of whole pictures or (three times in ten) the mean of crops."""
    crops, pool, device = rng.random() < 0.3, learner.pool, learner.model.device
    rows = rng.sample(range(len(pool.facts)), PICTURES // 4 if crops else PICTURES)
    tiles = (pool.pixels[rows, 1:] if crops else pool.pixels[rows, :1]).to(device).float()
    real = (tiles.flatten(2).abs().amax(-1) > 0).float()  # (rows, tiles)
    tower = learner.model.model.vision_tower(tiles.flatten(0, 1), output_hidden_states=True)
    views = {"cls": (tower.last_hidden_state[:, 0], learner.name_cls)}
    views["patches"] = (tower.hidden_states[-2][:, 1:].mean(1), learner.name_patches)
    shares, losses = real / real.sum(1, keepdim=True), {}
    for view, (hidden, heads) in views.items():
        mean = (hidden.unflatten(0, real.shape) * shares[..., None]).sum(1)  # (rows, WIDTH)
        named = zip(heads, pool.labels[rows].T.to(device), strict=True)
        losses[view] = sum(F.cross_entropy(head(mean), true) for head, true in named)
    return losses


def anchor_loss(learner: Learner, rng: Random) -> dict[str, Tensor]:
    """CLIP's task: the last layer's [CLS] (half of them of crops) meets the sum of its picture's
    word embeddings, drawn at random once, which an untaught language model cannot read."""
    pool, device = learner.pool, learner.model.device
    rows = rng.sample(range(len(pool.facts)), PICTURES)
    tiles = [rng.randrange(3) if rng.random() < 0.5 else 0 for _ in rows]
    target, generator = torch.zeros(PICTURES, WIDTH), torch.Generator().manual_seed(5)
    for column, values in enumerate(NAMED.values()):
        anchors = F.normalize(torch.randn(len(values), WIDTH, generator=generator), dim=-1)
        target += 4 * anchors[pool.labels[rows, column]]
    tower = learner.model.model.vision_tower(pool.pixels[rows, tiles].to(device).float())
    error = tower.last_hidden_state[:, 0] - target.to(device)
    return {"anchors": error.square().sum(-1).mean()}


def text_losses(learner: Learner, rng: Random, rows: list[Row], shown: int) -> dict[str, Tensor]:
    """Cross-entropy of what is to be written, and the helping heads' losses. Padding on the right
    needs no mask under causal attention."""
    model, pad, device = learner.model, learner.tokenizer.pad_token_id, learner.model.device
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], True, pad).to(device)
    labels = pad_sequence([torch.tensor(row.labels) for row in rows], True, IGNORE).to(device)
    visual = picture_tokens(learner, [one for row in rows for one in row.pictures], shown)
    embeds = vision.place(model, ids, visual, pad)  # (rows, longest, WIDTH)
    out = model.model.language_model(inputs_embeds=embeds, output_hidden_states=True)
    learnt = labels[:, 1:] != IGNORE
    logits = model.lm_head(out.last_hidden_state[:, :-1][learnt])
    losses = {"answer": F.cross_entropy(logits, labels[:, 1:][learnt])}
    second, fourth = out.hidden_states[2], out.hidden_states[4]  # of six layers
    some = rng.choices(range(ids[:, 1:].numel()), k=512)
    before = model.lm_head(learner.help_before(second[:, 1:].flatten(0, 1)[some]))
    losses["before"] = 0.3 * F.cross_entropy(before, ids[:, :-1].flatten()[some])
    if any(row.known for row in rows):
        asked = pad_sequence([torch.tensor(row.asked) for row in rows], True, IGNORE).to(device)
        said, true = learner.help_asked(second)[..., 0][asked != IGNORE], asked[asked != IGNORE]
        losses["asked"] = 0.5 * F.binary_cross_entropy_with_logits(said, true.float())
        known = torch.tensor([(b, place) for b, row in enumerate(rows) for place in row.known])
        said = learner.help_fits(fourth[known[:, 0], known[:, 1]])[:, 0]
        fits = torch.tensor([fit for row in rows for fit in row.fits], device=device)
        losses["fits"] = F.binary_cross_entropy_with_logits(said, fits.float())
    return losses


# ---------------------------------------------------------------- the phases
@dataclass(frozen=True)
class Phase:
    """`steps` steps of AdamW with a peak learning rate of `rate`, and `tasks`, each with its share
    of the batches (of some TOKENS, or of so many PICTURES)."""

    name: str
    steps: int
    rate: float
    trains: tuple[str, ...]  # parameters with one of these in their names
    tasks: dict[str, float]
    eased: tuple[str, ...] = ()  # tasks that begin with 3 and then 5 candidates


LANGUAGE = ("language_model.", "help_")
JOINED = (*LANGUAGE, "multi_modal_projector.", "image_newline")
CHOOSE = {"copy": 0.15, "text": 0.65, "title": 0.2}
COPY = {"copy": 0.5, "text": 0.35, "title": 0.15}
SEE = {"caption": 0.3, "tile": 0.3, "picture": 0.08, "copy": 0.02, "text": 0.23, "title": 0.07}
DOUBT = {"caption": 0.15, "tile": 0.3, "picture": 0.05, "copy": 0.05, "text": 0.15, "title": 0.3}
PHASES = (
    Phase("tower", 2400, 1e-3, ("vision_tower.", "name_"), {"name": 1.0}),
    Phase("language", 1600, 2e-3, LANGUAGE, CHOOSE, eased=("text", "title")),
    Phase("copy", 500, 1.5e-3, LANGUAGE, COPY),
    Phase("joint", 2000, 1.5e-3, JOINED, SEE, eased=("tile",)),
    Phase("doubt", 400, 1e-3, JOINED, DOUBT),  # more requests that several candidates fit
    Phase("last layer", 600, 2e-3, ("vision_tower.encoder.layers.3.",), {"anchor": 1.0}),
)


def batch_rows(learner: Learner, rng: Random, phase: Phase, done: float) -> tuple[list[Row], int]:
    """Rows of one task, some TOKENS, and how many visual tokens a picture shows."""
    task = rng.choices(list(phase.tasks), list(phase.tasks.values()))[0]
    size, rows = rng.randint(10, 40), []
    while sum(len(row.ids) for row in rows) < TOKENS:
        if task == "copy":  # random tokens twice: the bare skill of copying
            body = [rng.randrange(5, len(learner.tokenizer)) for _ in range(size)]
            rows.append(Row(body * 2, [IGNORE] * (size + 1) + body[1:]))
        elif task == "caption":
            item = random_item(rng, learner.pool, rng.randrange(len(learner.pool.facts)))
            rows.append(caption_row(learner, item, learner.pool.lengths[item["picture"]]))
        else:
            count = rng.choice((3, 5) if task in SHOWN else (3, 5, 10, 10, 10))
            if task in phase.eased and done < 0.4:
                count = 3 if done < 0.25 else 5
            rows.append(choice_row(learner, rng, task, 3 if task == "picture" else count))
    return rows, SHOWN.get(task, 0)


def phase_losses(learner: Learner, rng: Random, phase: Phase, done: float) -> dict[str, Tensor]:
    """The weighted losses of one batch, after a share `done` of the phase's steps."""
    if "name" in phase.tasks:
        return naming_loss(learner, rng)
    if "anchor" in phase.tasks:
        return anchor_loss(learner, rng)
    rows, shown = batch_rows(learner, rng, phase, done)
    return text_losses(learner, rng, rows, shown)


def train(folder: Path, phases: Sequence[Phase] = PHASES, keep: int = 200) -> Learner:
    """All phases in turn. Batches depend on phase and step alone, and `folder` keeps the state
    every `keep` steps, so a killed run goes on to the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)  # sums, and so the weights, depend on it
    file, learner = folder / "state.pt", Learner().to(loading.device())
    state = {"phase": 0, "step": 0, "seconds": 0.0}
    if file.is_file():
        state = torch.load(file, weights_only=True)
        learner.load_state_dict(state["learner"])
    learner.pool, began = Pool(learner.processor, 15000, 0), time.monotonic() - state["seconds"]
    for number in range(state["phase"], len(phases)):
        phase, start = phases[number], state["step"] if number == state["phase"] else 0
        for name, parameter in learner.named_parameters():
            parameter.requires_grad_(any(part in name for part in phase.trains))
        trained = [p for p in learner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.02, betas=(0.9, 0.98))
        if start:
            optimizer.load_state_dict(state["optimizer"])
        for step in range(start, phase.steps):
            cosine = (1 + math.cos(math.pi * step / phase.steps)) / 2
            for group in optimizer.param_groups:  # warm-up, then a cosine down to a twentieth
                group["lr"] = phase.rate * min((step + 1) / 150, 0.05 + 0.95 * cosine)
            rng, done = Random(f"{phase.name}-{step}"), step / phase.steps
            losses = phase_losses(learner, rng, phase, done)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if (step + 1) % 50 == 0:
                shown = ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
                print(f"{phase.name}, step {step + 1} of {phase.steps}: {shown}", flush=True)
            if (step + 1) % keep == 0 or step + 1 == phase.steps:
                state = {"phase": number, "step": step + 1, "seconds": time.monotonic() - began}
                state |= {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, folder / "state.part")
                (folder / "state.part").replace(file)
    learner.seconds = state["seconds"]
    return learner.requires_grad_(False)
