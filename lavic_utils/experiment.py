"""One profile with one seed: what it reads, and the result of each stage, made once and kept.

A stage is known by what it reads: its own settings, the content of its inputs, the hash of what the
stage before it left. Its code, the library versions and the seconds it took stand beside the result
(`stage` says what follows from a change of those). Nothing is ever deleted: a result that is made
again moves the old one aside, and checkpoints stay until their stage is done.

Of several processes (`accelerate launch`) all train; the first alone does the rest and writes.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from torch import Tensor

from lavic_utils import data, distillation, methods, recommendation, store, training, vision
from lavic_utils.config import (
    DOMAINS,
    Profile,
    UserError,
    load_profile,
    real_data_dir,
    results_dir,
)
from lavic_utils.evaluation import Score, score
from lavic_utils.provenance import (
    code_of,
    file_hash,
    folder_hash,
    key,
    provenance,
    versions,
    world_dir,
    write_json,
    write_text,
)
from lavic_utils.retrieval import candidate_lists

if TYPE_CHECKING:
    from lavic_utils.remote.chat_api import Settings

QUICK = 600  # seconds: a stage that took less is made again when its code has changed
BEGUN = "begun.json"  # in the folder of a stage under way: whose checkpoints stand there


class Experiment:
    """What one profile and seed reads, and the stages' results in `results/<profile>/seed<seed>/`.

    `data_folder`: other data than the profile's own, in the same layout. `lists`: a retrieval
    method, whose first ten are then every dialogue's candidates. The results of either go to a
    folder of their own. `api`: how a proprietary model is asked (None: it costs nothing, so never).
    `force`: make every stage that is asked for again, whatever is kept.
    """

    def __init__(
        self,
        profile: str | Profile = "mini",
        seed: int | None = None,
        data_folder: Path | None = None,
        api: Settings | None = None,
        lists: str | None = None,
        force: bool = False,
    ) -> None:
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        self.seed = self.profile.seed if seed is None else seed
        self.data_folder, self.api, self.force = data_folder, api, force
        self.lists = methods.find(lists) if lists else None
        if self.lists and self.lists.chooses:
            raise UserError(
                f"{self.lists.name} ranks no catalogue, so it makes no candidate lists; use a "
                "retrieval method"
            )
        self.rank = int(os.environ.get("RANK", "0"))
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._dialogues: dict[tuple[str, str, bool], list[data.Dialogue]] = {}
        self._pictures: dict[str, list[distillation.Picture]] = {}
        self._made: set[Path] = set()  # the stages that `force` has made again already
        self._scanned: dict[str, list] = {}

    def prepare(self) -> Experiment:
        """Render the mini world if it is not there, seed torch, and choose this process's card."""
        if self.profile.world and not self.data_folder:
            from lavic_utils.mini.world import make_world

            place = world_dir(self.profile)
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.parent / f".{place.name}.lock"):  # one process makes it
                make_world(place, self.profile.world)
        if torch.cuda.is_available() and self.processes > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.manual_seed(self.seed)
        return self

    # ------------------------------------------------------------ what is read
    @cached_property
    def root(self) -> Path:
        """The data folder: the one given, the mini world, or the published data (LAVIC_DATA)."""
        if self.data_folder:
            return self.data_folder
        if self.profile.world:
            if not world_dir(self.profile).is_dir():
                raise UserError(
                    f"{world_dir(self.profile)}: the mini world is not there; call prepare(), or "
                    "run `python -m lavic_utils world`"
                )
            return world_dir(self.profile)
        found = real_data_dir()
        if found is None:
            raise UserError(
                f"profile {self.profile.name} needs the published data: set LAVIC_DATA to it"
            )
        return found

    @property
    def place(self) -> Path:
        """Where results of this data and these lists go, whatever the seed."""
        place = results_dir(self.profile)
        if self.data_folder:
            place = place / f"data-{self.data_hash}"
        return place / f"lists-{methods.slug(self.lists.name)}" if self.lists else place

    @property
    def folder(self) -> Path:
        return self.place / f"seed{self.seed}"

    @cached_property
    def data_hash(self) -> str:
        return data.data_hash(self.root)

    @cached_property
    def catalogue(self) -> dict[str, data.Item]:
        return data.read_catalogue(self.root)

    @cached_property
    def titles(self) -> dict[str, str]:
        return {asin: item.title for asin, item in self.catalogue.items()}

    @cached_property
    def facts(self) -> dict:
        """What the mini world knows of its items and dialogues (empty for real data)."""
        path = self.root / "mini_facts.json"
        if not path.is_file():
            return {"items": {}, "dialogues": {}}
        return json.loads(path.read_text(encoding="utf-8"))

    def dialogues(
        self, domain: str, split: str, order: int = 0, as_read: bool = False
    ) -> list[data.Dialogue]:
        """A split's dialogues. Candidates stand as in the file (`as_read`, or without `lists`), for
        `order` 1, 2, ... in the order of a seeded shuffle."""
        listed = self.lists is not None and not as_read
        if (domain, split, listed) not in self._dialogues:
            found = data.read_dialogues(self.root, domain, split)
            if listed:
                asins, _ = self.domain_catalogue(domain)
                ranked = self.lists.order(self, domain, found)
                tens = candidate_lists(ranked, asins, seed=self.seed)
                for i, ten in enumerate(tens):
                    update = {self.profile.candidates: tuple(ten)}
                    found[i] = found[i].model_copy(update=update)
            self._dialogues[domain, split, listed] = found
        found = self._dialogues[domain, split, listed]
        return [shuffled_list(d, self.profile.candidates, order) for d in found] if order else found

    def _ids(self, domains: Iterable[str], split: str, as_read: bool = False) -> set[str]:
        """Ids that the lists or truths of these domains' dialogues name."""
        found: set[str] = set()
        for domain in domains:
            if data.dialogue_file(self.root, domain, split).is_file():
                for dialogue in self.dialogues(domain, split, as_read=as_read):
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
            asins |= self._ids([domain], split, as_read=True)
        if missing := sorted(asins - set(self.titles)):
            raise UserError(
                f"{self.root}: {len(missing)} items of the {domain} dialogues are not in "
                f"item2meta_train.json, e.g. {missing[0]}; {data.GET_DATA}"
            )
        return sorted(asins), [self.titles[asin] for asin in sorted(asins)]

    def need_training_data(self) -> None:
        """UserError where a file is missing that training reads (cheap: nothing is read)."""
        if self.profile.world and not self.data_folder:
            return
        files = [data.dialogue_file(self.root, domain, "train") for domain in DOMAINS]
        for path in [self.root / "item2meta_train.json", *files]:
            if not path.is_file():
                raise UserError(f"{path}: not there; {data.GET_DATA}")

    @cached_property
    def processor(self):
        return vision.load_processor(self.profile)

    def model(self):
        """A fresh base model: adapters change the object they are put on."""
        return vision.load_model(self.profile)

    def base(self) -> dict:
        """What of the base model decides a result: its content (or hub revision) and precision."""
        profile = self.profile
        return {
            "model": folder_hash(profile.model_path) or [profile.model, profile.revision],
            "dtype": profile.dtype,
            "quantize_4bit": profile.quantize_4bit,
            "chat": profile.prompts.chat,
        }

    # ------------------------------------------------------------ keeping results
    def stamp(self) -> dict:
        processes = {"processes": self.processes} if self.processes > 1 else {}
        return {**provenance(self.profile, self.seed, self.data_hash), **processes}

    def stage(
        self,
        name: str,
        folder: Path,
        code: str,
        reads: Mapping,
        make: Callable[[], dict],
        together: bool = False,
    ) -> dict:
        """The result of `make`, kept as `folder/result.json` under a key of what the stage `reads`.

        Where the code of the module `code` (or a library's version) has changed since, what took
        less than QUICK seconds is made again, so that an edit is seen; what took longer is kept and
        one line says what changed. Of several processes the first makes it, or (`together`) all of
        them do, and the first one's result is everybody's.
        """
        path, wanted = folder / "result.json", key(stage=name, **reads)
        made_by = {"code": code_of(code), "versions": versions()}
        found = None if self.force and path not in self._made else _kept(path, wanted, made_by)
        if found is None:
            begun = {"key": wanted, "processes": self.processes, "made_by": made_by}
            started = _begin(folder, begun) if self.rank == 0 else 0.0
            result = make() if together or self.rank == 0 else {}
            if self.rank == 0:
                about = {"seconds": round(time.time() - started, 1), "made_by": made_by}
                stored = {"key": wanted, **about, "provenance": self.stamp(), "result": result}
                write_json(path, stored)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                (folder / BEGUN).unlink(missing_ok=True)
            self._made.add(path)
        while (found := found or _kept(path, wanted, made_by)) is None:
            time.sleep(0.2)  # no barrier: describing images may take longer than one waits
        return found["result"]

    def scan(self, paths: Iterable[Path]) -> dict[Path, str | None]:
        """sha256 of image files, None for one that is missing or cannot be decoded. Kept in
        `images.json`: a file is looked at again only where its size or time has changed."""
        file, found, known = self.place / "images.json", {}, self._scanned
        if not known and file.is_file():
            known.update(json.loads(file.read_text(encoding="utf-8")))
        before = len(known)
        for path in paths:
            name, about = f"{path.parent.name}/{path.name}", path.stat() if path.is_file() else None
            mark = about and [about.st_size, about.st_mtime_ns]
            if mark and known.get(name, [None])[0] != mark:
                readable = data.open_image(path) is not None
                known.pop(name, None)
                known[name] = [mark, file_hash(path) if readable else None]
                before = -1
            found[path] = known[name][1] if mark else None
        if len(known) != before and self.rank == 0:
            write_json(file, known)
        return found

    # ------------------------------------------------------------ stage 1
    def pictures(self, split: str) -> list[distillation.Picture]:
        """Readable stage-1 images of the training items, or of the separate validation items."""
        if split not in self._pictures:
            self._pictures[split] = self._find_pictures(split)
        return self._pictures[split]

    def _find_pictures(self, split: str) -> list[distillation.Picture]:
        settings, rows, found = self.profile.distillation, [], []
        if split == "valid":
            rows = [(v.asin, v.k, v.title) for v in data.read_stage1_valid(self.root)]
        else:
            chosen = self.items["train"] if settings.training_items_only else sorted(self.titles)
            for asin in chosen:
                for k in range(len(self.catalogue[asin].images)):
                    rows.append((asin, k, self.titles[asin]))
        for asin, k, title in rows:
            path = data.image_file(self.root, asin, k)
            if settings.images_per_item is not None and k >= settings.images_per_item:
                continue
            if settings.descriptions == "published" and not self.published.get(path.name):
                continue
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

    def teach(self) -> dict[str, list[str]]:
        """The teacher's descriptions of the training and validation images: the base model's from
        full tokens, or, where the profile says so, those that the data comes with."""
        settings, splits = self.profile.distillation, ("train", "valid")
        if settings.descriptions == "published":
            return {s: [self.published[p.path.name] for p in self.pictures(s)] for s in splits}

        def make() -> dict:
            model, read = self.model(), distillation.Pictures(self.processor, keep=False)
            found: dict[str, list[str]] = {}
            for split in splits:
                found[split] = []
                for group in vision.batched(self.pictures(split), 256):
                    titles, pixels = [p.title for p in group], [read(p.path) for p in group]
                    found[split] += distillation.describe(
                        model, self.processor, self.profile, titles, pixels
                    )
            return found

        reads = {
            "base": self.base(),
            "prompt": self.profile.prompts.describe,
            "max_new_tokens": settings.max_new_tokens,
            "pictures": [self.contents(self.pictures(split)) for split in splits],
        }
        return self.stage("teacher", self.place / "teacher", "distillation", reads, make)

    def taught(self, split: str) -> list[distillation.Picture]:
        """The pictures of a split with what the teacher said of them."""
        found = []
        for picture, text in zip(self.pictures(split), self.teach()[split], strict=True):
            found.append(distillation.Picture(picture.asin, picture.title, picture.path, text))
        return found

    def accuracy(
        self, model, how: Callable, rows: Sequence[distillation.Picture]
    ) -> dict[str, float]:
        """Attribute accuracy of descriptions from `how` (full or [CLS] tokens); mini world only."""
        from lavic_utils.mini.accuracy import attribute_accuracy

        titles, pixels = [p.title for p in rows], [self.read_picture(p.path) for p in rows]
        texts = distillation.describe(model, self.processor, self.profile, titles, pixels, how)
        return attribute_accuracy(texts, [self.facts["items"][p.asin] for p in rows])

    @cached_property
    def read_picture(self) -> distillation.Pictures:
        return distillation.Pictures(self.processor, keep=self.profile.distillation.keep_pixels)

    def distil(self) -> dict:
        """Stage 1. Returns its history by epoch and, on the mini world, attribute accuracies on
        unseen items; the student's adapter stays in `seed<seed>/stage1/adapter`."""
        folder, mini = self.folder / "stage1", bool(self.facts["items"])
        train, valid = self.taught("train"), self.taught("valid")

        def measure(model) -> dict[str, float]:
            found = self.accuracy(model, vision.cls_tokens, valid[::8])
            return {f"accuracy_{name}": value for name, value in found.items()}

        def make() -> dict:
            history = distillation.distil(
                self.profile,
                self.model(),
                self.processor,
                train,
                valid,
                folder,
                self.seed,
                measure if mini else None,
            )
            found = {"history": history, "train_images": len(train), "valid_images": len(valid)}
            if mini:
                found["accuracy"] = self._accuracies(valid, folder)
            return found

        reads = {
            "base": self.base(),
            "prompt": self.profile.prompts.describe,
            "settings": self.profile.distillation.deciding(),
            "seed": self.seed,
            "pictures": [self.contents(train), self.contents(valid)],
        }
        return self.stage("distil", folder, "distillation", reads, make, together=True)

    def _accuracies(
        self, valid: Sequence[distillation.Picture], folder: Path
    ) -> dict[str, dict[str, float]]:
        """What can be read off each kind of visual tokens, on items never trained on."""
        from lavic_utils.mini.accuracy import attribute_accuracy

        base, truths = self.model(), [self.facts["items"][p.asin] for p in valid]
        teacher = attribute_accuracy([p.description for p in valid], truths)
        raw = self.accuracy(base, vision.cls_tokens, valid)
        student = distillation.load_student(base, folder)
        distilled = self.accuracy(student, vision.cls_tokens, valid)
        return {"teacher (full tokens)": teacher, "raw [CLS]": raw, "distilled [CLS]": distilled}

    # ------------------------------------------------------------ visual tokens
    def image_files(self, splits: Sequence[str]) -> dict[str, Path]:
        """Item -> its first image's file, of all items of these splits' dialogues."""
        return {a: data.image_file(self.root, a) for split in splits for a in self.items[split]}

    def student_adapter(self) -> Path:
        self.distil()
        return self.folder / "stage1" / "adapter"

    def visual(
        self, tokens: str | None, splits: Sequence[str] = ("train", "test")
    ) -> Mapping[str, Tensor] | None:
        """Visual tokens of every dialogue item with a readable first image: "distilled" or "base"
        [CLS], or "full" (None: none). Each image is encoded once and its vectors read from a
        `store.Store`, which other seeds share where the key is the same."""
        if tokens is None:
            return None
        paths = self.image_files(splits)
        if tokens == "full" and not self.profile.world:  # a 7B model's take 47 MB an item
            return vision.lazy_full_tokens(self.model(), self.processor, paths)
        adapter = self.student_adapter() if tokens == "distilled" else None

        def encoder() -> store.Encode:
            model = training.load_adapter(self.model(), adapter) if adapter else self.model()
            how = vision.full_tokens if tokens == "full" else vision.cls_tokens
            return vision.file_encoder(model, self.processor, how)

        name = store.key_of(
            self.profile.model_path,
            self.profile.revision,
            adapter,
            self.processor,
            vision.dtype(self.profile),
            "full" if tokens == "full" else "cls",
        )
        return store.open_store(self.place / "tokens" / name, paths, encoder)

    def visual_reads(self, tokens: str | None, split: str) -> dict:
        """What `visual` reads, for the key of a stage that uses it."""
        if tokens is None:
            return {"tokens": None}
        files = self.image_files((split,))
        scanned = self.scan(files.values())
        images = {asin: scanned[path] for asin, path in files.items()}
        adapter = folder_hash(self.student_adapter()) if tokens == "distilled" else None
        return {"tokens": tokens, "images": key(images=images), "adapter": adapter}

    # ------------------------------------------------------------ stage 2 and inference
    def prompter(
        self, visual: Mapping[str, Tensor] | None, window: int | None = None
    ) -> recommendation.Prompter:
        tokenizer = self.processor.tokenizer
        return recommendation.Prompter(tokenizer, self.profile, self.titles, visual, window)

    def asked(self, dialogues: Sequence[data.Dialogue]) -> dict:
        """What of dialogues, their candidates and the profile decides what a model is asked."""
        which, rows = self.profile.candidates, []
        for d in dialogues:
            names = getattr(d, which)
            rows.append([d.line, d.context, names, [self.titles.get(a) for a in names]])
        return {
            "dialogues": key(rows=rows),
            "prompts": self.profile.prompts.model_dump(),
            "settings": self.profile.recommendation.deciding(),
        }

    def tune(self, method: str, domain: str) -> dict:
        """Stage 2 of one trained method and domain: its loss log, its number of examples, what
        prompts that were too long lost (`cut`), and the items without a readable image (`images`);
        the adapter stays in `seed<seed>/stage2/<method>/<domain>/adapter`."""
        variant, folder = methods.find(method), self.tuned_folder(method, domain)
        dialogues = self.dialogues(domain, "train")
        examples = recommendation.training_examples(dialogues, self.profile.candidates, self.seed)
        examples = examples[: round(len(examples) * variant.examples)]

        def make() -> dict:
            visual = variant.visual(self, "train")
            prompter = self.prompter(visual)
            log = recommendation.fine_tune(
                self.profile, self.model(), prompter, examples, folder, self.seed
            )
            images = visual.counted if isinstance(visual, store.Store) else None
            cut = prompter.cut
            return {"log": log, "examples": len(examples), "cut": cut, "images": images}

        reads = {
            "base": self.base(),
            "asked": self.asked(dialogues),
            "seed": self.seed,
            "examples": key(rows=[[e.dialogue.line, e.candidates, e.target] for e in examples]),
            "visual": self.visual_reads(variant.tokens, "train"),
            "tiles": variant.tiles,
        }
        return self.stage("tune", folder, "recommendation", reads, make, together=True)

    def tuned_folder(self, method: str, domain: str) -> Path:
        return self.folder / "stage2" / methods.slug(method) / domain

    def tuned(self, method: str, domain: str):
        """The base model with a trained method's adapter, merged where that is exact."""
        self.tune(method, domain)
        adapter = self.tuned_folder(method, domain) / "adapter"
        return training.merged(training.load_adapter(self.model(), adapter)).eval()

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
        """A method's answers to a split, kept: `rows`, one record a dialogue (the fields of
        `recommendation.Answer`, and its `line`), and `cost`. `control` changes the visual tokens at
        inference (a negative control, called `name`); with it, or in another `order` of the
        candidates, only free generation is read. `limit`: the first so many dialogues, not kept
        (and of several processes known to the first alone)."""
        chosen = methods.find(method)
        part = f"{domain}_{split}" + (f"_order{order}" if order else "")
        folder = self.folder / "answers" / methods.slug(chosen.name + name) / part
        dialogues = self.dialogues(domain, split, order)[:limit]

        def make() -> dict:
            chosen.prepare(self, domain, split)
            if self.rank:
                return {}
            start = time.monotonic()
            scored = control is None and not order
            found = chosen.answer(self, domain, split, dialogues, control, scored)
            rows = []
            for dialogue, answer in zip(dialogues, found, strict=True):
                rows.append({"line": dialogue.line, **asdict(answer)})
            return {"rows": rows, "cost": cost(found, time.monotonic() - start)}

        if limit is not None:
            return make()
        reads = {
            "method": chosen.reads(self, domain, split),
            "asked": self.asked(dialogues),
            "control": name,
        }
        return self.stage("answers", folder, "methods", reads, make, together=True)

    def answers(self, method: str, domain: str, split: str = "test", **how) -> list[dict]:
        """The `rows` of `answered`."""
        return self.answered(method, domain, split, **how)["rows"]

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
        or "scored"; `keep(i)` chooses dialogues."""
        dialogues = self.dialogues(domain, split)
        rows = self.answers(method, domain, split) if rows is None else rows
        kept = [i for i in range(len(dialogues)) if keep(i)]
        chooses = methods.find(method).chooses
        lists = [rows[i]["candidates"] for i in kept] if chooses else None
        truths = [dialogues[i].gt_items for i in kept]
        return score([rows[i][reading] for i in kept], truths, lists)


# ------------------------------------------------------------ keeping results: the files
def _kept(path: Path, wanted: str, made_by: Mapping) -> dict | None:
    """A stage's file, if it is of this key and need not be made again for a change of code."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("key") != wanted:
        return None
    if found["made_by"] == made_by:
        return found
    if found["seconds"] < QUICK:
        return None
    changed = []
    for kind in ("code", "versions"):
        old, new = found["made_by"][kind], made_by[kind]
        changed += sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    print(
        f"{path.parent.name}: kept ({found['seconds'] / 3600:.1f} h of work), though "
        f"{', '.join(changed)} changed since; `run --force` makes it again"
    )
    return found


def _begin(folder: Path, begun: Mapping) -> float:
    """Before a stage is made: what stands in its folder goes on if it is the same stage under way,
    and is moved aside, never deleted, if it is anything else. Returns when the stage was begun."""
    place = folder / BEGUN
    if place.is_file():
        found = json.loads(place.read_text(encoding="utf-8"))
        started, last = found["started"], folder.stat().st_mtime
        if (folder / "checkpoints").is_dir():
            last = max(last, (folder / "checkpoints").stat().st_mtime)
        same = {name: found[name] for name in begun} == dict(begun)
        costly = last - started >= QUICK and found["key"] == begun["key"]
        if same or (costly and found["processes"] == begun["processes"]):
            return started
    if folder.is_dir() and any(folder.iterdir()):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
            number += 1
        folder.rename(aside)
    started = time.time()
    write_text(place, json.dumps({**begun, "started": started}))
    return started


def shuffled_list(dialogue: data.Dialogue, which: str, order: int) -> data.Dialogue:
    """The dialogue with its candidates in the order of shuffle number `order`, everywhere alike."""
    names = list(getattr(dialogue, which))
    place = f"order-{order}/{dialogue.domain}/{dialogue.split}/{dialogue.line}"
    random.Random(place).shuffle(names)
    return dialogue.model_copy(update={which: tuple(names)})


def cost(answers: Sequence[recommendation.Answer], seconds: float) -> dict[str, float]:
    """What answering took: seconds in all (training and encoding apart, loading the model in),
    tokens, dollars, and the peak memory so far of the process (of the GPU, where there is one)."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 2),
        "dialogues": len(answers),
        "prompt_tokens": sum(a.prompt_tokens for a in answers),
        "new_tokens": sum(a.new_tokens for a in answers),
        "usd": sum(a.usd for a in answers),
        "peak_mb": round(peak / 2**20),
    }


# ------------------------------------------------------------ negative controls
def shuffled(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every item shows another item's image (a fixed rotation of the sorted ids)."""
    names = sorted(visual)
    turned = names[len(names) // 2 :] + names[: len(names) // 2]
    return {a: visual[b] for a, b in zip(names, turned, strict=True)}


def zeroed(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Visual tokens of the same number that carry nothing."""
    return {asin: torch.zeros_like(tokens) for asin, tokens in visual.items()}
