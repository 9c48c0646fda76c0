"""How the mini model becomes a base LLaVA: pictures, texts, losses, phases (`make mini-model`).

As for the real model: a vision tower learns words for pictures, a language model learns to choose
and copy ids, a projector joins them and reads patch tokens of the last layer but one. Only then
does the last layer's [CLS] meet word embeddings, as CLIP's meets its text tower: raw [CLS] vectors
mean nothing to the language model, for the same reason as in the paper. All is made up here, from
seeds of its own: no item, dialogue or wording of a mini world.

The shipped weights came from an earlier arrangement of the same phases: same tasks, losses and
steps, other random draws, and some phases in pieces (see their card). This file has not been run
whole.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavic_utils import vision
from lavic_utils.mini import words
from lavic_utils.mini.drawing import draw_product
from lavic_utils.mini.model import PATCH, TILE, WIDTH, build_model, build_processor, known_words

IGNORE = -100
LOOKS = tuple(words.ATTRIBUTES)
DOMAIN_OF = {kind: domain for domain, kinds in words.KINDS.items() for kind in kinds}
NAMED = {"kind": tuple(words.PARTS), **words.ATTRIBUTES}  # what the tower learns to name
PATCHES = (TILE // PATCH) ** 2  # of one tile
SHOWN = {"tile": PATCHES, "few": 5, "picture": 0}  # visual tokens of a candidate; 0: all there are
SIZES = ((144, 144), (144, 144), (144, 144), (144, 72), (72, 144), (144, 108))  # pixels
MEANT = {*words.PARTS, *words.PARTS.values()}.union(
    *words.ATTRIBUTES.values(), *words.FEATURES.values()
)
FILLER = [w for w in known_words() if w.isalpha() and w.islower() and w not in MEANT]


class Learner(nn.Module):
    """The model, small heads that help it to learn and are thrown away, and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.processor, self.pool = build_processor(), None
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
    """So many pictures of made-up products, as the processor's tiles, and what is true of each."""

    def __init__(self, processor, count: int, seed: int) -> None:
        rng, pixels, sizes = Random(f"pool-{seed}"), [], []
        self.seed = seed
        self.facts = [{n: rng.choice(values) for n, values in NAMED.items()} for _ in range(count)]
        self.of_kind = {kind: [] for kind in words.PARTS}
        for number, facts in enumerate(self.facts):
            self.of_kind[facts["kind"]].append(number)
        for some in vision.batched(self.facts, 200):
            tiles, size = vision.pixels(processor, [_picture(rng, facts) for facts in some])
            pixels.append(F.pad(tiles, (0,) * 7 + (5 - tiles.shape[1],)).half())
            sizes.append(size)
        self.pixels = torch.cat(pixels)  # (count, 5, 3, TILE, TILE); tiles of zeros are padding
        self.sizes = torch.cat(sizes)  # (count, 2): height, width
        counted = processor._get_num_multimodal_tokens(image_sizes=self.sizes.tolist())
        self.lengths = counted.num_image_tokens  # full tokens of each picture
        true = [[values.index(f[n]) for n, values in NAMED.items()] for f in self.facts]
        self.labels = torch.tensor(true)  # (count, names): which of the words in NAMED

    def draw(self, rng: Random, kinds: Iterable[str]) -> int:
        """A picture of one of these kinds."""
        return rng.choice(self.of_kind[rng.choice(list(kinds))])


def _picture(rng: Random, facts: dict[str, str]) -> Image.Image:
    stream = io.BytesIO()
    draw_product(facts, rng.choice(SIZES), rng).save(stream, "JPEG", quality=88)
    return Image.open(stream).convert("RGB")


def picture_tokens(learner: Learner, rows: list[int], shown: int, rng: Random) -> list[Tensor]:
    """Projected patch tokens of pictures, (tokens, WIDTH) each: of all tiles, packed as LLaVA does
    (`shown` 0), or so many of the PATCHES of the whole-picture tile, drawn at random."""
    if not rows:
        return []
    pixels, inside = learner.pool.pixels[rows].float(), learner.model.model
    if not shown:
        return vision.full_tokens(learner.model, pixels, learner.pool.sizes[rows])
    hidden = inside.vision_tower(pixels[:, 0], output_hidden_states=True).hidden_states[-2]
    tokens = inside.multi_modal_projector(hidden[:, 1:])  # (rows, PATCHES, WIDTH)
    return [one[sorted(rng.sample(range(PATCHES), shown))] for one in tokens]


# ---------------------------------------------------------------- what it sees: texts
@dataclass
class Row:
    """One training text as tokens; what follows `pictures` is for choices among candidates."""

    ids: list[int]
    labels: list[int]  # IGNORE where nothing is learnt
    pictures: list[int] = field(default_factory=list)  # of the pool, as they appear
    asked: list[int] = field(default_factory=list)  # candidates' tokens: is it asked for? 1 or 0
    chunks: list[int] = field(default_factory=list)  # place of each candidate's first id chunk
    fits: list[bool] = field(default_factory=list)  # does each candidate have all that is asked?
    names: list[str] = field(default_factory=list)  # the candidates' ids


def answered(learner: Learner, prompt: list[int], answer: str) -> Row:
    target = [*learner.encode(" " + answer), learner.tokenizer.eos_token_id]
    return Row(prompt + target, [IGNORE] * len(prompt) + target)


def random_item(rng: Random, pool: Pool, picture: int, feature: str = "") -> dict:
    """A made-up item of a picture: brand, feature, kind, looks, id (asin), picture."""
    facts = pool.facts[picture]
    domain = DOMAIN_OF[facts["kind"]]
    asin = "B0" + rng.choice(words.ID_CHUNKS) + rng.choice(words.ID_CHUNKS)
    feature = feature or rng.choice(words.FEATURES[domain])
    brand = rng.choice(words.BRANDS[domain])
    return {"brand": brand, "feature": feature, "asin": asin, "picture": picture, **facts}


def caption_row(learner: Learner, item: dict, length: int) -> Row:
    """Title and picture (`length` visual tokens) in, a description of the looks out."""
    slots = [learner.image] * length
    prompt = [*learner.encode(words.title(item)), *slots, *learner.encode("\nLooks:")]
    row = answered(learner, prompt, words.description(item))
    row.pictures.append(item["picture"])
    return row


def filler(rng: Random, most: int) -> str:
    return " ".join(rng.choices(FILLER, k=rng.randint(0, most)))


def request_text(rng: Random, facts: list[str], looks: list[str]) -> str:
    """Keywords in random order among filler words, in one or two turns of the seeker."""
    lines = ["Recommend one item."]
    for keywords in [facts + looks] if rng.random() < 0.5 else [facts, looks]:
        if len(lines) > 1 and rng.random() < 0.6:
            lines.append(f"Helper: {filler(rng, 9)}{rng.choice('?.')}")
        pieces = [filler(rng, 6)]
        for word in rng.sample(keywords, len(keywords)):
            pieces.append(word + rng.choice(("", "", ",", ".")))
            pieces.append(filler(rng, 3 if rng.random() < 0.5 else 0))
        lines.append(f"Seeker: {' '.join(filter(None, pieces))}{rng.choice('.?')}")
    return "\n".join(lines) + "\n"


def alike_items(rng: Random, pool: Pool, count: int) -> list[dict]:
    """Candidates of one domain; most look like the first one by title."""
    domain = rng.choice(list(words.KINDS))
    target = random_item(rng, pool, pool.draw(rng, words.KINDS[domain]))
    items = [target]
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
    """Request and candidates in, an id out. Between a candidate's title and id stand its looks in
    words ("text"), nothing ("title": no looks are asked for, so several candidates fit), or visual
    tokens: of the "picture", of its whole-picture "tile", or a "few" of that tile's."""
    encode, items = learner.encode, alike_items(rng, learner.pool, count)
    target = items[0]
    rng.shuffle(items)
    facts, looks = wishes(rng, task)
    named, said = [target[name] for name in facts], [target[name] for name in looks]
    if "accent" in looks:
        said[looks.index("accent")] += " " + words.PARTS[target["kind"]]
    asked = set(encode(" ".join(named + said)))  # tokens
    ids = encode(request_text(rng, named, said) + "Candidates:\n")
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
        row.asked += [int(token in asked) for token in body]
        if task in SHOWN:
            body += [learner.image] * (SHOWN[task] or learner.pool.lengths[item["picture"]])
            row.pictures.append(item["picture"])
        row.chunks.append(len(ids) + len(body) + 1)  # after "B0"
        ids += body + encode(" " + item["asin"]) + encode("\n")
        row.asked += [IGNORE] * (len(ids) - len(row.asked))
    answer = rng.choice([name for name, fit in zip(row.names, row.fits, strict=True) if fit])
    whole = answered(learner, ids + encode("Answer:"), answer)
    row.ids, row.labels = whole.ids, whole.labels
    row.asked += [IGNORE] * (len(row.ids) - len(row.asked))
    return row


# ---------------------------------------------------------------- what it learns: losses
def naming_losses(learner: Learner, rng: Random, count: int) -> tuple[Tensor, Tensor]:
    """Losses of naming kind and looks by [CLS] and by the mean patch; of whole pictures, or (three
    times in ten) by the mean over their crops."""
    crops, pool = rng.random() < 0.3, learner.pool
    rows = rng.sample(range(len(pool.facts)), count // 4 if crops else count)
    tiles = (pool.pixels[rows, 1:] if crops else pool.pixels[rows, :1]).float()
    real = (tiles.flatten(2).abs().amax(-1) > 0).float()  # (rows, tiles)
    tower = learner.model.model.vision_tower(tiles.flatten(0, 1), output_hidden_states=True)
    patches, losses = tower.hidden_states[-2][:, 1:].mean(1), []
    views = ((tower.last_hidden_state[:, 0], learner.name_cls), (patches, learner.name_patches))
    for hidden, heads in views:
        shares = real / real.sum(1, keepdim=True)
        mean = (hidden.unflatten(0, real.shape) * shares[..., None]).sum(1)  # (rows, WIDTH)
        named = zip(heads, pool.labels[rows].T, strict=True)
        losses.append(sum(F.cross_entropy(head(mean), true) for head, true in named))
    return losses[0], losses[1]


def anchor_loss(learner: Learner, rng: Random, count: int) -> Tensor:
    """CLIP's task: the last layer's [CLS] (half of them of crops) meets the sum of its picture's
    word embeddings, which are frozen and drawn at random."""
    rows = rng.sample(range(len(learner.pool.facts)), count)
    tiles = [rng.randrange(3) if rng.random() < 0.5 else 0 for _ in rows]
    target, generator = torch.zeros(count, WIDTH), torch.Generator().manual_seed(5)
    for column, values in enumerate(NAMED.values()):
        anchors = F.normalize(torch.randn(len(values), WIDTH, generator=generator), dim=-1)
        target += 4 * anchors[learner.pool.labels[rows, column]]
    tower = learner.model.model.vision_tower(learner.pool.pixels[rows, tiles].float())
    return (tower.last_hidden_state[:, 0] - target).square().sum(-1).mean()


def outside_loss(model, ids: Tensor, labels: Tensor, chunks: Tensor, hidden: Tensor) -> Tensor:
    """Minus the log of the probability that an answer's first id chunk is any candidate's: in doubt
    between several, a small model otherwise writes a token between them that nobody has.

    ids, labels (rows, length); chunks (candidates, 2): row, position; hidden (rows, length, WIDTH).
    """
    first = (labels != IGNORE).int().argmax(1)  # the answer's "B0", which the chunk follows
    log_p = F.log_softmax(model.lm_head(hidden[torch.arange(len(hidden)), first]), -1)
    mine = torch.zeros_like(log_p, dtype=torch.bool)
    mine[chunks[:, 0], ids[chunks[:, 0], chunks[:, 1]]] = True
    return -log_p.masked_fill(~mine, -torch.inf).logsumexp(-1).mean()


def overlap_loss(model, chunks: list[int]) -> Tensor:
    """Mean squared cosine between embeddings of different id chunks. In doubt between k ids, an
    answer is about the mean of k: where they overlap, a chunk of nobody's scores higher."""
    rows = F.normalize(model.get_input_embeddings().weight[chunks], dim=-1)
    return ((rows @ rows.T).square().sum() - len(chunks)) / (len(chunks) * (len(chunks) - 1))


def text_losses(learner: Learner, rng: Random, rows: list[Row], shown: int, sharpen: bool):
    """Cross-entropy of what is to be written, with the helping heads' losses or, to `sharpen` ids,
    the two losses above. Padding on the right needs no mask under causal attention."""
    model, pad = learner.model, learner.tokenizer.pad_token_id
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], True, pad)  # (rows, longest)
    labels = pad_sequence([torch.tensor(row.labels) for row in rows], True, IGNORE)
    chunks = torch.tensor([(b, place) for b, row in enumerate(rows) for place in row.chunks])
    pictures = [picture for row in rows for picture in row.pictures]
    visual = picture_tokens(learner, pictures, shown, rng)
    embeds = vision.place(model, ids, visual, pad)  # (rows, longest, WIDTH)
    out = model.model.language_model(inputs_embeds=embeds, output_hidden_states=True)
    learnt = labels[:, 1:] != IGNORE
    logits = model.lm_head(out.last_hidden_state[:, :-1][learnt])
    losses = {"answer": F.cross_entropy(logits, labels[:, 1:][learnt])}
    if sharpen:
        every = learner.tokenizer.convert_tokens_to_ids(words.ID_CHUNKS)
        losses["overlap"] = 30 * overlap_loss(model, every)
        if len(chunks):
            outside = outside_loss(model, ids, labels, chunks, out.last_hidden_state)
            losses["outside"] = 2 * outside
        return losses
    second, fourth = out.hidden_states[2], out.hidden_states[4]  # of six layers
    some = torch.tensor(rng.choices(range(ids[:, 1:].numel()), k=512))
    before = model.lm_head(learner.help_before(second[:, 1:].flatten(0, 1)[some]))
    losses["before"] = 0.3 * F.cross_entropy(before, ids[:, :-1].flatten()[some])
    if len(chunks):
        asked = pad_sequence([torch.tensor(row.asked) for row in rows], True, IGNORE)
        said, true = learner.help_asked(second)[..., 0][asked != IGNORE], asked[asked != IGNORE]
        losses["asked"] = 0.5 * F.binary_cross_entropy_with_logits(said, true.float())
        said = learner.help_fits(fourth[chunks[:, 0], chunks[:, 1]])[:, 0]
        fits = torch.tensor([fit for row in rows for fit in row.fits])
        losses["fits"] = F.binary_cross_entropy_with_logits(said, fits.float())
    return losses


# ---------------------------------------------------------------- the phases
@dataclass(frozen=True)
class Phase:
    """What is learnt in `steps` steps of AdamW with a peak learning rate of `rate`."""

    name: str
    steps: int
    rate: float
    trains: str  # parameters with one of these in their names
    mixes: tuple[tuple[float, dict[str, float]], ...] = ()  # each until a share of steps is done
    eased: str = ""  # tasks that begin with 3 and then 5 candidates
    tokens: int = 3000  # of a batch of texts
    sharpen: bool = False
    pictures: int = 0  # of a batch for the tower
    naming: tuple[float, float] = (0, 0)  # weights of the naming losses by [CLS] and by patches
    pool: int = 0


# The tasks' shares of the batches of texts.
COPY = {"copy": 0.3, "text": 0.5, "title": 0.2}
CHOOSE = {"copy": 0.05, "text": 0.75, "title": 0.2}
DESCRIBE = {"caption": 0.45, "tile": 0.12, "picture": 0.08}
DESCRIBE |= {"copy": 0.0175, "text": 0.2625, "title": 0.07}
SEE = DESCRIBE | {"caption": 0.2, "tile": 0.37}
DOUBT = SEE | {"tile": 0.148, "few": 0.222, "text": 0.1575, "title": 0.175}
DESCRIBING = ((1, DESCRIBE),)
TO_SEE = ((0.1, DESCRIBE), (0.85, SEE), (1, DESCRIBE))
# Parameters by their names. LLaVA reads all layers of the tower but the LAST.
LANGUAGE, JOINED = "language_model.", "language_model. multi_modal_projector. image_newline"
LAST = "vision_tower.encoder.layers.3."
READ = "name_ embeddings. pre_layrnorm. encoder.layers.0. encoder.layers.1. encoder.layers.2."
LATE = f"{JOINED} help_ {READ}"
PHASES = (
    # Words for pictures, from [CLS] and, apart, from the mean patch of the layer before.
    Phase("tower", 2200, 1e-3, f"{READ} {LAST}", pictures=192, naming=(1, 1)),
    # Choose an id by words; copy.
    Phase("language", 1600, 2e-3, f"{LANGUAGE} help_", ((0.3, COPY), (1, CHOOSE)), "text title"),
    # Describe and choose by patch tokens; the tower stays as it is.
    Phase("joint", 3750, 1.5e-3, f"{JOINED} help_", TO_SEE, "tile"),
    # The same with the tower, on fresh pictures: makes shapes hold on unseen items.
    Phase("late", 750, 4e-4, LATE, DESCRIBING, tokens=2000, pictures=48, naming=(0, 0.2), pool=1),
    # The last layer's [CLS] meets word embeddings.
    Phase("last", 600, 2e-3, LAST, pictures=256, pool=1),
    # Valid ids: requests that several candidates fit, and losses on ids in place of the heads'.
    Phase("sharpen", 3500, 8e-4, JOINED, ((1, DOUBT),), sharpen=True),
)


def batch_rows(learner: Learner, rng: Random, phase: Phase, done: float) -> tuple[list[Row], int]:
    """Rows of one task, some `phase.tokens` tokens, and how many visual tokens a picture shows."""
    mix = next(mix for until, mix in phase.mixes if done < until)
    task = rng.choices(list(mix), list(mix.values()))[0]
    size, rows = rng.randint(10, 40), []
    while sum(len(row.ids) for row in rows) < phase.tokens:
        if task == "copy":  # random tokens twice: the bare skill of copying
            body = [rng.randrange(5, len(learner.tokenizer)) for _ in range(size)]
            rows.append(Row(body * 2, [IGNORE] * (size + 1) + body[1:]))
        elif task == "caption":
            item = random_item(rng, learner.pool, rng.randrange(len(learner.pool.facts)))
            rows.append(caption_row(learner, item, learner.pool.lengths[item["picture"]]))
        else:
            count = rng.choice((3, 5, 10) if task == "tile" else (3, 5, 10, 10, 10))
            if task in phase.eased.split() and done < 0.4:
                count = 3 if done < 0.25 else 5
            count = {"picture": 3, "few": 10}.get(task, count)
            rows.append(choice_row(learner, rng, task, count))
    return rows, SHOWN.get(task, 0)


def phase_losses(learner: Learner, rng: Random, phase: Phase, done: float) -> dict[str, Tensor]:
    """The weighted losses of one batch, after a share `done` of the phase's steps."""
    losses = {}
    if phase.mixes:
        rows, shown = batch_rows(learner, rng, phase, done)
        losses = text_losses(learner, rng, rows, shown, phase.sharpen)
    if any(phase.naming):
        cls, patches = naming_losses(learner, rng, phase.pictures)
        losses |= {"cls": phase.naming[0] * cls, "patches": phase.naming[1] * patches}
    elif phase.pictures:
        losses["anchors"] = anchor_loss(learner, rng, phase.pictures)
    return losses


def train(folder: Path, phases: Sequence[Phase] = PHASES, pools=(6000, 9000), keep=250) -> Learner:
    """All phases in turn, on pools of so many pictures. Batches depend on phase and step alone, and
    `folder` keeps the state every `keep` steps, so a killed run goes on to the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    file, learner, state = folder / "state.pt", Learner(), {"phase": 0, "step": 0}
    if file.is_file():
        state = torch.load(file, weights_only=True)
        learner.load_state_dict(state["learner"])
    for number in range(state["phase"], len(phases)):
        phase, start = phases[number], state["step"] if number == state["phase"] else 0
        for name, parameter in learner.named_parameters():
            parameter.requires_grad_(any(part in name for part in phase.trains.split()))
        trained = [p for p in learner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.02, betas=(0.9, 0.98))
        if start:
            optimizer.load_state_dict(state["optimizer"])
        if learner.pool is None or learner.pool.seed != phase.pool:
            learner.pool = Pool(learner.processor, pools[phase.pool], phase.pool)
        for step in range(start, phase.steps):
            cosine = (1 + math.cos(math.pi * step / phase.steps)) / 2
            for group in optimizer.param_groups:  # warm-up, then a cosine down to a twentieth
                group["lr"] = phase.rate * min((step + 1) / 150, 0.05 + 0.95 * cosine)
            rng = Random(f"{phase.name}-{step}")
            losses = phase_losses(learner, rng, phase, step / phase.steps)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if (step + 1) % 50 == 0:
                shown = ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
                print(f"{phase.name}, step {step + 1} of {phase.steps}: {shown}", flush=True)
            if (step + 1) % keep == 0 or step + 1 == phase.steps:
                kept = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({"phase": number, "step": step + 1, **kept}, folder / "state.part")
                os.replace(folder / "state.part", file)
    return learner.requires_grad_(False)
