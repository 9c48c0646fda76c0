"""One profile with one seed: what it reads, and its stages, each made once and kept.

A stage is known by what it reads (`keeping`): its own settings, the content of its inputs, the hash
of what the stage before it left. Of several processes (`accelerate launch`) all train; the first
alone does the rest and writes.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavic_utils import (
    callbacks,
    data,
    distillation,
    loading,
    methods,
    recommendation,
    store,
    training,
    vision,
)
from lavic_utils.config import (
    DOMAINS,
    Profile,
    UserError,
    World,
    load_profile,
    real_data_dir,
    results_dir,
    show_progress,
)
from lavic_utils.evaluation import Score, hits, score
from lavic_utils.keeping import Images, Written, made_once
from lavic_utils.provenance import file_hash, folder_hash, key, locked, provenance, world_dir

if TYPE_CHECKING:
    from lavic_utils.remote.chat_api import Settings


def once(method: Callable) -> Callable:
    """An Experiment keeps the method's answer: what a stage reads is hashed once, not each time."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def remembered(self, *args, **how):
        given = signature.bind(self, *args, **how)
        given.apply_defaults()  # however a call spells its arguments, they are the same question
        place = (method.__name__, *given.args[1:])
        if place not in self._remembered:
            self._remembered[place] = method(self, *args, **how)
        return self._remembered[place]

    return remembered


class Titles(dict):
    """Item id -> title; UserError for an id that dialogues name and the catalogue lacks."""

    def __missing__(self, asin: str) -> str:
        why = f"dialogues name item {asin}, which is not in it; {data.GET_DATA}"
        raise UserError(f"item2meta_train.json: {why}")


class Experiment:
    """What one profile and seed reads, and the stages' results in `results/<profile>/seed<seed>/`.

    `data_folder`: other data than the profile's own, in the same layout, with results in a folder
    of their own. `api`: how a proprietary model is asked (None: it costs nothing, so never).
    `force`: make every stage that is asked for again, whatever is kept.
    """

    def __init__(
        self,
        profile: str | Profile = "mini",
        seed: int | None = None,
        data_folder: Path | None = None,
        api: Settings | None = None,
        force: bool = False,
    ) -> None:
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        if loading.stand_in(self.profile):
            self.profile = self.profile.model_copy(update={"tier": "rehearsal"})
        self.seed = self.profile.seed if seed is None else seed
        for field in ("arms", "models"):
            for method in getattr(self.profile, field):
                if (known := methods.find(method).name) != method:
                    where = f"profile {self.profile.name}, {field}"
                    raise UserError(f"{where}: write {known!r}, not {method!r}")
        self.data_folder, self.api, self.force = data_folder, api, force
        self.rank, self.processes = _process()
        self._remembered: dict[tuple, Any] = {}
        self._files: dict[Path, Mapping] = {}  # folder of a stage -> hashes of what it left there

    def prepare(self) -> Experiment:
        """Render the mini world if it is not there, seed torch, and choose this process's card."""
        if self.world:
            from lavic_utils.mini.world import make_world, stands

            place = world_dir(self.profile, self.seed)
            if not stands(place, self.world):  # no lock: others' worlds may be read-only
                with locked(place):
                    make_world(place, self.world)
        if torch.cuda.is_available() and self.processes > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.manual_seed(self.seed)
        if not self.profile.world:
            show_progress()  # of a 7B model's hours, in a notebook too
        return self

    def of_seed(self, seed: int) -> Experiment:
        """The same with another seed."""
        return Experiment(self.profile, seed, self.data_folder, self.api)

    # ------------------------------------------------------------ what is read
    @cached_property
    def root(self) -> Path:
        """The data folder: the one given, the mini world, or the published data (LAVIC_DATA)."""
        if self.data_folder:
            return self.data_folder
        if not self.profile.world:
            if found := real_data_dir():
                return found
            needs = f"profile {self.profile.name} needs the published data"
            raise UserError(f"{needs}: set LAVIC_DATA to it")
        place = world_dir(self.profile, self.seed)
        if not place.is_dir():
            raise UserError(f"{place}: the mini world is not there; call prepare()")
        return place

    @property
    def place(self) -> Path:
        """Where results of this data go, whatever the seed."""
        place = results_dir(self.profile)
        if self.data_folder:
            place = place / f"data-{data.data_hash(self.root)}"  # pictures are in stages' keys
        return place

    @property
    def folder(self) -> Path:
        """Where results of this seed go."""
        return self.place / f"seed{self.seed}"

    @property
    def world(self) -> World | None:
        """The mini world of this seed; None where the data are others."""
        drawn = self.profile.world and not self.data_folder
        return self.profile.world.of(self.seed) if drawn else None

    @property
    def of_data(self) -> Path:
        """Where results that depend on the data alone go: each seed has a mini world of its own."""
        return self.folder if self.world else self.place

    @cached_property
    def data_hash(self) -> str:
        """Of the data's texts, and of the pictures that they list and that can be read."""
        listed = [(a, k) for a, item in self.catalogue.items() for k in range(len(item.images))]
        if (self.root / "item2meta_valid.jsonl").is_file():
            listed += [(row.asin, row.k) for row in data.read_stage1_valid(self.root)]
        pictures = self.scan([data.image_file(self.root, *one) for one in listed])
        found = sorted((path.name, content) for path, content in pictures.items() if content)
        return key(texts=data.data_hash(self.root), pictures=found)

    @cached_property
    def catalogue(self) -> dict[str, data.Item]:
        return data.read_catalogue(self.root)

    @cached_property
    def titles(self) -> dict[str, str]:
        return Titles((asin, item.title) for asin, item in self.catalogue.items())

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Item -> its kind of product, the last of its categories ("" where it has none)."""
        return {asin: (item.categories or ("",))[-1] for asin, item in self.catalogue.items()}

    @cached_property
    def facts(self) -> dict:
        """What the mini world knows of its items and dialogues (empty for real data)."""
        path = self.root / "mini_facts.json"
        if not path.is_file():
            return {"items": {}, "dialogues": {}}
        return json.loads(path.read_text(encoding="utf-8"))

    def dialogues(self, domain: str, split: str, order: int = 0) -> list[data.Dialogue]:
        """A split's dialogues; `order` 1, 2, ...: with candidates in the order of a shuffle."""
        found = self._read(domain, split)
        if not order:
            return found
        which, shuffled = self.profile.candidates, []
        for dialogue in found:
            names = list(getattr(dialogue, which))
            random.Random(f"order-{order}/{domain}/{split}/{dialogue.line}").shuffle(names)
            shuffled.append(dialogue.model_copy(update={which: tuple(names)}))
        return shuffled

    @once
    def _read(self, domain: str, split: str) -> list[data.Dialogue]:
        """A split's dialogues as in the file."""
        return data.read_dialogues(self.root, domain, split)

    def _ids(self, domains: Iterable[str], split: str) -> set[str]:
        """Ids that the lists or truths of these domains' dialogues name."""
        found: set[str] = set()
        for domain in domains:
            if data.dialogue_file(self.root, domain, split).is_file():
                for dialogue in self._read(domain, split):
                    found.update(getattr(dialogue, self.profile.candidates), dialogue.gt_items)
        return found

    @cached_property
    def items(self) -> dict[str, list[str]]:
        """Ids that occur in the lists or truths of any domain's dialogues, by split (sorted)."""
        return {split: sorted(self._ids(DOMAINS, split)) for split in data.SPLITS}

    def domain_catalogue(self, domain: str) -> tuple[list[str], list[str]]:
        """(ids, titles) of a domain's items: those that any of its dialogues lists or wants."""
        asins: set[str] = set()
        for split in data.SPLITS:
            asins |= self._ids([domain], split)
        return sorted(asins), [self.titles[asin] for asin in sorted(asins)]

    def need_training_data(self) -> None:
        """UserError where a file is missing that training reads (cheap: nothing is read)."""
        if self.world:
            return
        files = [data.dialogue_file(self.root, domain, "train") for domain in DOMAINS]
        for path in [self.root / "item2meta_train.json", *files]:
            if not path.is_file():
                raise UserError(f"{path}: not there; {data.GET_DATA}")

    @cached_property
    def processor(self):
        return loading.load_processor(self.profile)

    def model(self):
        """A fresh base model: adapters change the object they are put on."""
        return loading.load_model(self.profile)

    def base(self) -> dict:
        """What of the base model decides a result: its content (or hub revision) and precision."""
        profile = self.profile
        model = folder_hash(profile.model_path) or [profile.model, profile.revision]
        precision = {"dtype": profile.dtype, "quantize_4bit": profile.quantize_4bit}
        return {"model": model, **precision, "chat": profile.prompts.chat}

    # ------------------------------------------------------------ keeping results
    def stamp(self) -> dict:
        processes = {"processes": self.processes} if self.processes > 1 else {}
        about = provenance(self.profile, self.seed, self.data_hash)
        return {**about, "world": self.world and self.world.seed, **processes}

    def stage(
        self,
        name: str,
        folder: Path,
        module: str,
        reads: Mapping,
        make: Callable[[], dict],
        together: bool = False,
    ) -> dict:
        """The result of `make`, which runs code of `module`, kept in `folder` under a key of what
        the stage `reads`; `together`: all processes make it."""
        force = self.force and folder not in self._files  # once
        process = self.rank, self.processes
        wanted = key(stage=name, **reads)
        found = made_once(folder, wanted, module, make, self.stamp, process, force, together)
        self._files[folder] = found["files"]
        return found["result"]

    def adapter(self, folder: Path) -> Path:
        """The adapter that a stage left; UserError where another process has replaced it since."""
        for name, content in self._files.get(folder, {}).items():
            if file_hash(folder / name) != content:
                why = "another process has made this stage anew meanwhile"
                raise UserError(f"{folder}: {why}; run the same command again")
        return folder / "adapter"

    @cached_property
    def scan(self) -> Callable[[Iterable[Path]], dict[Path, str | None]]:
        """`keeping.Images.hashes`: image files -> sha256, None for what cannot be read."""
        return Images(self.of_data / "images.json").hashes

    def readable(self, paths: Mapping[str, Path]) -> dict[str, Path]:
        """Those of the image files (item id -> file) that can be decoded."""
        found = self.scan(paths.values())
        return {asin: path for asin, path in paths.items() if found[path]}

    # ------------------------------------------------------------ stage 1
    @once
    def pictures(self, split: str) -> list[distillation.Picture]:
        """Readable stage-1 images of the training items, or of the separate validation items."""
        settings, rows, found = self.profile.distillation, [], []
        if split == "valid":
            rows = [(v.asin, v.k, v.title) for v in data.read_stage1_valid(self.root)]
        else:
            chosen = self.items["train"] if settings.training_items_only else sorted(self.titles)
            for asin in chosen:
                for k in range(len(self.catalogue[asin].images)):
                    rows.append((asin, k, self.titles[asin]))
        for asin, k, title in rows:
            path, most = data.image_file(self.root, asin, k), settings.images_per_item
            described = settings.descriptions == "write" or self.published.get(path.name)
            if described and (most is None or k < most):
                found.append(distillation.Picture(asin, title, path))
        readable = self.scan([picture.path for picture in found])
        return [picture for picture in found if readable[picture.path]]

    @cached_property
    def published(self) -> dict[str, str]:
        """Image file -> the description that stands in the data."""
        rows = [*data.stage1_rows(self.catalogue.values()), *data.read_stage1_valid(self.root)]
        return {row.image_name: row.description for row in rows}

    def contents(self, pictures: Sequence[distillation.Picture]) -> str:
        """One hash of titles, image files and descriptions."""
        images = self.scan([p.path for p in pictures])
        return key(rows=[[p.asin, p.title, images[p.path], p.description] for p in pictures])

    @once
    def teach(self) -> dict[str, list[str]]:
        """The teacher's descriptions of the training and validation images: the base model's from
        full tokens, or, where the profile says so, those that the data comes with."""
        settings, splits = self.profile.distillation, ("train", "valid")
        if settings.descriptions == "published":
            return {s: [self.published[p.path.name] for p in self.pictures(s)] for s in splits}
        folder = self.of_data / "teacher"

        def make() -> dict:
            self.need_room("teacher")
            model, read = self.model(), distillation.Pictures(self.processor, keep=False)
            rows = [picture for split in splits for picture in self.pictures(split)]
            written = Written(folder / "checkpoints" / "descriptions.jsonl")
            pace = callbacks.Pace("descriptions", len(rows), len(written.texts))
            for some in vision.batched(rows[len(written.texts) :], settings.teacher_batch_size):
                written.add(self._described(model, vision.full_tokens, some, read))
                pace.at(len(written.texts))
            first = len(self.pictures("train"))
            return {"train": written.texts[:first], "valid": written.texts[first:]}

        reads = {
            "base": self.base(),
            "prompt": self.profile.prompts.describe,
            "max_new_tokens": settings.max_new_tokens,
            "pictures": [self.contents(self.pictures(split)) for split in splits],
        }
        return self.stage("teacher", folder, "distillation", reads, make)

    @once
    def taught(self, split: str) -> list[distillation.Picture]:
        """The pictures of a split with what the teacher said of them."""
        pairs = zip(self.pictures(split), self.teach()[split], strict=True)
        return [replace(picture, description=text) for picture, text in pairs]

    def accuracy(self, model, how: Callable, rows: Sequence[distillation.Picture]) -> dict:
        """Attribute accuracy of descriptions from `how` (full or [CLS] tokens); mini world only."""
        return self._attributes(self._described(model, how, rows, self.read_picture), rows)

    def _described(self, model, how: Callable, rows, read: distillation.Pictures) -> list[str]:
        titles, pixels = [p.title for p in rows], [read(p.path) for p in rows]
        return distillation.describe(model, self.processor, self.profile, titles, pixels, how)

    def _attributes(self, texts: Sequence[str], rows: Sequence[distillation.Picture]) -> dict:
        from lavic_utils.mini.accuracy import attribute_accuracy

        return attribute_accuracy(texts, [self.facts["items"][p.asin] for p in rows])

    @cached_property
    def read_picture(self) -> distillation.Pictures:
        return distillation.Pictures(self.processor, keep=self.profile.distillation.keep_pixels)

    @once
    def distil(self, kind: str = "cls") -> dict:
        """Stage 1. Returns its history by epoch and, on the mini world, attribute accuracies on
        unseen items; the student's adapter stays in `seed<seed>/stage1/adapter`. `kind`: another
        one of `vision.TOKENS` than the paper's, of one token a tile."""
        how, folder = vision.TOKENS[kind], self.student_folder(kind)
        name, mini = "[CLS]" if kind == "cls" else kind, bool(self.facts["items"])
        train, valid = self.taught("train"), self.taught("valid")

        def measure(model) -> dict[str, float]:
            found = self.accuracy(model, how, valid[::8])
            return {f"accuracy_{name}": value for name, value in found.items()}

        def make() -> dict:
            self.need_room("distillation")
            given = self.processor, train, valid, folder, self.seed, measure if mini else None, how
            history = distillation.distil(self.profile, self.model(), *given)
            found = {"history": history, "train_images": len(train), "valid_images": len(valid)}
            if mini:  # what can be read off each kind of visual tokens, on items never trained on
                base, texts = self.model(), [p.description for p in valid]
                read = {"teacher (full tokens)": self._attributes(texts, valid)}
                read[f"raw {name}"] = self.accuracy(base, how, valid)
                student = distillation.load_student(base, folder)
                read[f"distilled {name}"] = self.accuracy(student, how, valid)
                found["accuracy"] = read
            return found

        reads = {
            "base": self.base(),
            "prompt": self.profile.prompts.describe,
            "settings": self.profile.distillation.deciding(),
            "seed": self.seed,
            "pictures": [self.contents(train), self.contents(valid)],
            **({} if kind == "cls" else {"kind": kind}),
        }
        return self.stage("distil", folder, "distillation", reads, make, together=True)

    def student_folder(self, kind: str = "cls") -> Path:
        return self.folder / ("stage1" if kind == "cls" else f"stage1_{kind}")

    # ------------------------------------------------------------ visual tokens
    def image_files(self, splits: Sequence[str]) -> dict[str, Path]:
        """Item -> its first image's file, of all items of these splits' dialogues."""
        return {a: data.image_file(self.root, a) for split in splits for a in self.items[split]}

    def student(self, tokens: str) -> Path | None:
        """The adapter of stage 1 where visual tokens are distilled ones; None for the base's."""
        if not tokens.startswith("distilled"):
            return None
        self.distil(kind_of(tokens))
        return self.adapter(self.student_folder(kind_of(tokens)))

    def visual(
        self,
        tokens: str | None,
        splits: Sequence[str] = ("train", "test"),
        model: Callable | None = None,
    ) -> Mapping[str, Tensor] | None:
        """Visual tokens of every dialogue item with a readable first image: "distilled" or "base"
        [CLS], "full" (None: none), or another of `vision.TOKENS`, as it comes or "distilled" (as in
        "distilled mean"). They are read from a `store.Store`, where each image is encoded once; but
        a 7B model's full tokens, 47 MB an item, are encoded when they are asked for, by what
        `model` then returns (a model at hand; stage 2 leaves its vision side as it is)."""
        if tokens is None:
            return None
        paths = self.image_files(splits)
        if tokens == "full" and not self.profile.world:
            model = model or functools.cache(self.model)
            return vision.lazy_full_tokens(model, self.processor, self.readable(paths))
        profile, kind, adapter = self.profile, kind_of(tokens), self.student(tokens)

        def encoder() -> store.Encode:
            model = training.load_adapter(self.model(), adapter) if adapter else self.model()
            return vision.file_encoder(model, self.processor, vision.TOKENS[kind])

        base = profile.model_path, profile.revision, adapter, self.processor
        name = store.key_of(*base, loading.dtype(profile), kind)
        return store.open_store(self.place / "tokens" / name, paths, encoder)

    @once
    def visual_reads(self, tokens: str | None, split: str) -> dict:
        """What `visual` reads, for the key of a stage that uses it."""
        if tokens is None:
            return {"tokens": None}
        files, adapter = self.image_files((split,)), self.student(tokens)
        scanned = self.scan(files.values())
        images = key(images={asin: scanned[path] for asin, path in files.items()})
        return {"tokens": tokens, "images": images, "adapter": adapter and folder_hash(adapter)}

    # ------------------------------------------------------------ stage 2 and inference
    def prompter(
        self,
        visual: Mapping[str, Tensor] | None,
        window: int | None = None,
        profile: Profile | None = None,
    ) -> recommendation.Prompter:
        tokenizer, profile = self.processor.tokenizer, profile or self.profile
        return recommendation.Prompter(tokenizer, profile, self.titles, visual, window)

    def need_room(self, stage: str, tokens: Callable[[], int] | None = None) -> None:
        """UserError where a stage of `bench.memory`, about to begin, does not fit what is free on
        this machine's card; `tokens`: counts the longest prompt."""
        from lavic_utils.bench.plan import refuse_now

        refuse_now(self.profile, stage, tokens)

    def asked(self, dialogues: Sequence[data.Dialogue], method: str) -> dict:
        """What of dialogues, their candidates and a method's settings decides what it is asked."""
        rows = []
        for d in dialogues:
            names = getattr(d, self.profile.candidates)
            rows.append([d.line, d.context, names, [self.titles[a] for a in names]])
        return {
            "dialogues": key(rows=rows),
            "prompts": self.profile.prompts.model_dump(),
            "settings": self.profile.arm(method).recommendation.deciding(),
        }

    @once
    def tune(self, method: str, domain: str) -> dict:
        """Stage 2 of one trained method and domain, its adapter in `tuned_folder`. Returns its loss
        log, how many examples and steps, what too long prompts lost (`cut`), items without a
        readable image (`images`), and on the mini world LaViC's HR@1 on the way (`curve`)."""
        variant, folder = methods.find(method), self.tuned_folder(method, domain)
        profile = self.profile.arm(variant.name)
        dialogues = self.dialogues(domain, "train")
        examples = recommendation.training_examples(dialogues, self.profile.candidates, self.seed)
        shown = [[e.dialogue.line, e.candidates, e.target, self.titles[e.target]] for e in examples]

        def make() -> dict:
            visual = variant.visual(self, "train", lambda: model)
            self.need_room(variant.stages[-2])
            model = self.model()
            prompter, on_step = self.prompter(visual, profile=profile), None
            if self.profile.world and variant.name == "LaViC":
                look, valid = self.prompter(variant.visual(self, "valid")), "valid"

                def on_step() -> dict[str, float]:
                    asked = model, look, self.dialogues(domain, valid), self.profile.candidates
                    rows = [asdict(answer) for answer in recommendation.generate_answers(*asked)]
                    found = {}
                    for reading in ("recommended", "scored"):
                        s = self.score(method, domain, reading, rows, split=valid)
                        found[reading] = s.hit_ratio_conversations
                    return found

            given = profile, model, prompter, examples, folder, self.seed, on_step
            log = recommendation.fine_tune(*given)
            return {
                "log": [entry for entry in log if "loss" in entry],
                "curve": [entry for entry in log if "scored" in entry],
                "examples": len(examples),
                "steps": profile.recommendation.steps(len(examples)),
                "cut": prompter.cut,
                "images": visual.counted if isinstance(visual, store.Store) else None,
            }

        reads = {
            "base": self.base(),
            "asked": self.asked(dialogues, variant.name),
            "seed": self.seed,
            "examples": key(rows=shown),
            "visual": self.visual_reads(variant.tokens, "train"),
            "tiles": variant.tiles,
        }
        return self.stage("tune", folder, "recommendation", reads, make, together=True)

    def tuned_folder(self, method: str, domain: str) -> Path:
        return self.folder / "stage2" / methods.slug(method) / domain

    def tuned(self, method: str, domain: str):
        """The base model with a trained method's adapter, merged where that is exact."""
        self.tune(method, domain)
        adapter = self.adapter(self.tuned_folder(method, domain))
        return training.merged(training.load_adapter(self.model(), adapter)).eval()

    @once
    def answered(
        self,
        method: str,
        domain: str,
        split: str = "test",
        control: methods.Control | None = None,
        name: str = "",
        order: int = 0,
        limit: int | None = None,
    ) -> dict:
        """A method's answers to a split, kept: `rows`, one a dialogue (a `recommendation.Answer`'s
        fields and the `line`), and `cost`. `control` changes the visual tokens (a negative control,
        called `name`), `order` shuffles the candidates. `limit`: the first so many dialogues, not
        kept (of several processes, the first alone knows them)."""
        chosen = methods.find(method)
        part = f"{domain}_{split}" + (f"_order{order}" if order else "")
        folder = self.folder / "answers" / methods.slug(chosen.name + name) / part
        dialogues = self.dialogues(domain, split, order)[:limit]
        asked = self.asked(dialogues, chosen.name)

        def make() -> dict:
            chosen.prepare(self, domain, split)
            if self.rank:
                return {}
            start = time.monotonic()
            found = chosen.answer(self, domain, split, dialogues, control)
            pairs = zip(dialogues, found, strict=True)
            rows = [{"line": dialogue.line, **asdict(answer)} for dialogue, answer in pairs]
            return {"rows": rows, "cost": cost(found, time.monotonic() - start)}

        if limit is not None or chosen.family == "proprietary":
            return make()  # `chat_api` keeps what was answered; the rest is asked again
        reads = {"method": chosen.reads(self, domain, split), "control": name, "asked": asked}
        return self.stage("answers", folder, "methods", reads, make, together=True)

    def answers(self, method: str, domain: str, split: str = "test", **how) -> list[dict]:
        """The `rows` of `answered`."""
        return self.answered(method, domain, split, **how)["rows"]

    def targets(self, domain: str, split: str = "test") -> list[str]:
        """The target item of each dialogue, with the seed of a world of its own: what an interval
        or a test draws whole."""
        own = f"{self.seed}/" if self.world else ""
        return [own + d.gt_items[0] for d in self.dialogues(domain, split)]

    def hits(
        self,
        method: str,
        domain: str,
        reading: str = "recommended",
        rows: list[dict] | None = None,
        split: str = "test",
    ) -> list[bool]:
        """Whether each dialogue's answer, read so, is one of its ground-truth items."""
        rows = self.answers(method, domain, split) if rows is None else rows
        wanted = [d.gt_items for d in self.dialogues(domain, split)]
        return hits([row[reading] for row in rows], wanted)

    def score(
        self,
        method: str,
        domain: str,
        reading: str = "recommended",
        rows: list[dict] | None = None,
        keep: Callable[[int], bool] = lambda i: True,
        split: str = "test",
    ) -> Score:
        """HR@1 and VR of a method's answers; `reading` is "recommended" (generated), "constrained"
        or "scored"; `keep(i)` chooses dialogues; `ci95` is over target items."""
        rows = self.answers(method, domain, split) if rows is None else rows
        dialogues, targets = self.dialogues(domain, split), self.targets(domain, split)
        triples = list(zip(rows, dialogues, targets, strict=True))
        chosen = [triple for i, triple in enumerate(triples) if keep(i)]
        lists = [row["candidates"] for row, *_ in chosen] if methods.find(method).chooses else None
        named, truths = [row[reading] for row, *_ in chosen], [d.gt_items for _, d, _ in chosen]
        return score(named, truths, lists, [target for *_, target in chosen])


def kind_of(tokens: str) -> str:
    """The kind of `vision.TOKENS` that a method's visual tokens are."""
    return {"distilled": "cls", "base": "cls"}.get(tokens) or tokens.removeprefix("distilled ")


# ------------------------------------------------------------ processes, and what an answer costs
def _process() -> tuple[int, int]:
    """(this process's rank, number of processes), as `accelerate launch` sets them."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    launched = count == "1" or {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"} <= set(os.environ)
    named = rank.isdecimal() and count.isdecimal() and int(rank) < int(count) < 2**16
    if not (named and launched):
        why = f"RANK={rank!r} and WORLD_SIZE={count!r} are of no `accelerate launch`"
        raise UserError(f"{why}; unset both, or start with it")
    return int(rank), int(count)


def cost(answers: Sequence[recommendation.Answer], seconds: float) -> dict[str, float]:
    """What answering took: seconds in all (training and encoding apart, loading the model in),
    tokens, dollars, and the peak memory so far of the process (of the GPU, where there is one)."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    about = {"seconds": round(seconds, 2), "dialogues": len(answers)}
    for name in ("prompt_tokens", "new_tokens", "usd"):
        about[name] = sum(getattr(answer, name) for answer in answers)
    return {**about, "peak_mb": round(peak / 2**20)}


# ------------------------------------------------------------ negative controls
def shuffled(visual: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Every item shows the image of another of its kind (item -> kind of product), by a fixed
    rotation of the sorted ids; one alone of its kind shows its own."""
    groups: dict[str, list[str]] = {}
    for asin in sorted(visual):
        groups.setdefault(kinds[asin], []).append(asin)
    found = {}
    for names in groups.values():
        turned = names[len(names) // 2 :] + names[: len(names) // 2]
        found |= {a: visual[b] for a, b in zip(names, turned, strict=True)}
    return found


def zeroed(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Visual tokens of the same number that carry nothing."""
    return {asin: torch.zeros_like(tokens) for asin, tokens in visual.items()}
