"""One run of one profile with one seed: each stage's result, made once and kept.

Every stage stores its result with a key made of all that can change it (code that makes numbers, profile, data,
seed, inputs); a stage whose key is unchanged is read back, one that was killed half-way has no key and is made again.
Of several processes (`accelerate launch`) all train; the first alone does the rest and writes, the others wait for it.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lavic_utils import data, distillation, methods, recommendation, store, training, vision
from lavic_utils.bench import plan
from lavic_utils.config import DOMAINS, UserError
from lavic_utils.evaluation import Score, score
from lavic_utils.hub import fingerprint
from lavic_utils.inputs import Inputs
from lavic_utils.provenance import (
    NUMBERS,
    code_hash,
    key,
    provenance,
    versions,
    write_json,
    write_text,
)

BEGUN = "begun"  # in the folder of a stage under way: the key its checkpoints are of


class Run(Inputs):
    """The stages of one profile and seed, and their results. Folders: `results/<profile>/seed<seed>/...`."""

    # ------------------------------------------------------------ keeping results
    def key(self, **what) -> str:
        parts = {
            "code": code_hash(only=NUMBERS),
            "data": self.data_hash,
            "seed": self.seed,
            "lists": self.lists and [self.lists.name, self.lists.identity(self)],
            "model": fingerprint(self.profile.model_path),
            "profile": self.profile.model_dump(mode="json"),
            "versions": versions(),
        }
        return key(**parts | what)

    def stamp(self) -> dict:
        processes = {"processes": self.processes} if self.processes > 1 else {}
        return {**provenance(self.profile, self.seed, self.data_hash), **processes}

    def kept(self, folder: Path, make: Callable[[], dict], together: bool = False, **what) -> dict:
        """The result of `make` stored as `folder/result.json` beside its provenance; made again if its key changed.

        Of several processes the first makes it, or (`together`) all of them do, and the first one's result is everybody's.
        Checkpoints in `folder` are continued from if they are of this key and number of processes, and gone in the end.
        """
        path, wanted = folder / "result.json", self.key(**what)
        if (stored := _stored(path, wanted)) is None:
            if self.rank == 0:
                _begin(folder, f"{wanted} {self.processes}")
            found = make() if together or self.rank == 0 else {}
            if self.rank == 0:
                write_json(path, {"key": wanted, "provenance": self.stamp(), "result": found})
        if self.rank == 0:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / BEGUN).unlink(missing_ok=True)
        while (stored := stored or _stored(path, wanted)) is None:
            time.sleep(0.2)  # no barrier: describing images may take longer than one waits
        return stored["result"]

    # ------------------------------------------------------------ stage 1
    def pictures(self, split: str) -> list[distillation.Picture]:
        """Readable stage-1 images of the training items, or of the separate validation items."""
        stage = self.profile.distillation
        if split == "valid":
            rows = [(v.asin, v.k, v.title) for v in data.read_stage1_valid(self.root)]
        else:
            chosen = self.items["train"] if stage.training_items_only else sorted(self.titles)
            rows = [
                (a, k, self.titles[a]) for a in chosen for k in range(len(self.catalogue[a].images))
            ]
        rows = [
            row for row in rows if stage.images_per_item is None or row[1] < stage.images_per_item
        ]
        found = [distillation.Picture(a, t, data.image_file(self.root, a, k)) for a, k, t in rows]
        if stage.descriptions == "published":
            found = [p for p in found if self.published.get(p.path.name)]
        return [p for p in found if data.open_image(p.path) is not None]

    @cached_property
    def published(self) -> dict[str, str]:
        """Image file -> the description that stands in the data."""
        rows = [*data.stage1_rows(self.catalogue.values()), *data.read_stage1_valid(self.root)]
        return {row.image_name: row.description for row in rows}

    def teach(self) -> dict[str, list[str]]:
        """The teacher's descriptions of the training and validation images: the base model's from full tokens, or those that
        the data comes with, where the profile says so."""
        if self.profile.distillation.descriptions == "published":
            return {
                split: [self.published[p.path.name] for p in self.pictures(split)]
                for split in ("train", "valid")
            }

        def make() -> dict:
            plan.refuse_here(self.profile, "teacher")
            model, read = self.model(), distillation.Pictures(self.processor, keep=False)
            found = {}
            for split in ("train", "valid"):
                rows = self.pictures(split)
                found[split] = []
                for group in vision.batched(rows, 256):
                    found[split] += distillation.describe(
                        model,
                        self.processor,
                        self.profile,
                        [r.title for r in group],
                        [read(r.path) for r in group],
                    )
            return found

        return self.kept(
            self.folder.parent / "teacher", make, stage="teacher", seed=None
        )  # the same words whatever the seed

    def taught(self, split: str) -> list[distillation.Picture]:
        texts = self.teach()[split]
        return [
            distillation.Picture(p.asin, p.title, p.path, t)
            for p, t in zip(self.pictures(split), texts, strict=True)
        ]

    def accuracy(self, model, how, rows: Sequence[distillation.Picture]) -> dict[str, float]:
        """Attribute accuracy of descriptions from `how` (full tokens or [CLS]); mini world only."""
        texts = distillation.describe(
            model,
            self.processor,
            self.profile,
            [r.title for r in rows],
            [self.read_picture(r.path) for r in rows],
            how,
        )
        return distillation.attribute_accuracy(texts, [self.facts["items"][r.asin] for r in rows])

    @cached_property
    def read_picture(self) -> distillation.Pictures:
        return distillation.Pictures(self.processor, keep=self.profile.distillation.keep_pixels)

    def distil(self) -> dict:
        """Stage 1. Returns its history by epoch and, on the mini world, attribute accuracies on unseen items."""
        folder = self.folder / "stage1"

        def make() -> dict:
            plan.refuse_here(self.profile, "distillation")
            train, valid = self.taught("train"), self.taught("valid")
            watched = valid[::8]
            measure = (
                (
                    lambda m: {
                        f"accuracy_{k}": v
                        for k, v in self.accuracy(m, vision.cls_tokens, watched).items()
                    }
                )
                if self.facts["items"]
                else None
            )
            history = distillation.train_student(
                self.profile, self.model(), self.processor, train, valid, folder, self.seed, measure
            )
            found = {"history": history, "train_images": len(train), "valid_images": len(valid)}
            if self.facts["items"]:
                base, truths = self.model(), [self.facts["items"][p.asin] for p in valid]
                found["accuracy"] = {
                    "teacher (full tokens)": distillation.attribute_accuracy(
                        [p.description for p in valid], truths
                    ),
                    "raw [CLS]": self.accuracy(base, vision.cls_tokens, valid),
                }
                student = distillation.load_student(self.profile, base, folder)
                found["accuracy"]["distilled [CLS]"] = self.accuracy(
                    student, vision.cls_tokens, valid
                )
            return found

        return self.kept(folder, make, together=True, stage="distil")

    def visual(
        self, tokens: str | None, splits: Sequence[str] = ("train", "test")
    ) -> Mapping[str, Tensor] | None:
        """Visual tokens of every dialogue item with a readable first image: "distilled" or "base" [CLS], or "full".

        Each image is encoded once and its vectors read from a `store.Store`, which other seeds share where the key is the same.
        """
        if tokens is None:
            return None
        paths = {a: data.image_file(self.root, a) for split in splits for a in self.items[split]}
        if (
            tokens == "full" and not self.profile.world
        ):  # a 7B model's are 47 MB an item: encoded when asked for, never stored
            return vision.lazy_full_tokens(self.model(), self.processor, paths)
        adapter = None
        if tokens == "distilled":
            self.distil()
            adapter = self.folder / "stage1" / "adapter"

        def encoder() -> store.Encode:
            model = training.load_adapter(self.model(), adapter) if adapter else self.model()
            return vision.file_encoder(
                model, self.processor, vision.full_tokens if tokens == "full" else vision.cls_tokens
            )

        name = store.key_of(
            self.profile.model_path,
            self.profile.revision,
            adapter,
            self.processor,
            vision.dtype(self.profile),
            "full" if tokens == "full" else "cls",
        )
        return store.open_store(self.folder.parent / "tokens" / name, paths, encoder)

    # ------------------------------------------------------------ stage 2 and inference
    def prompter(
        self, visual: Mapping[str, Tensor] | None, window: int | None = None
    ) -> recommendation.Prompter:
        return recommendation.Prompter(
            self.processor.tokenizer, self.profile, self.titles, visual, window
        )

    def tune(self, method: str, domain: str) -> dict:
        """Stage 2 of one trained method and domain: its loss log, its number of examples, what prompts that were too long lost
        (`cut`), and the items without a readable image (`images`); the adapter stays in `folder/adapter`."""
        variant, folder = (
            methods.find(method),
            self.folder / "stage2" / methods.slug(method) / domain,
        )

        def make() -> dict:
            plan.refuse_here(self.profile, "recommendation")
            which = self.profile.candidates
            examples = recommendation.training_examples(
                self.dialogues(domain, "train"), which, self.seed
            )
            examples = examples[: round(len(examples) * variant.examples)]
            visual = variant.visual(self, "train")
            prompter = self.prompter(visual)
            _, log = recommendation.train_recommender(
                self.profile, self.model(), prompter, examples, folder, self.seed
            )
            images = visual.counted if isinstance(visual, store.Store) else None
            return {"log": log, "examples": len(examples), "cut": prompter.cut, "images": images}

        return self.kept(folder, make, together=True, stage="tune", method=method, domain=domain)

    def tuned(self, method: str, domain: str):
        """The base model with a trained method's adapter, merged where that is exact: it would round in fewer bits."""
        self.tune(method, domain)
        folder = self.folder / "stage2" / methods.slug(method) / domain / "adapter"
        return training.merged(training.load_adapter(self.model(), folder)).eval()

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
        """A method's answers to a split, kept: `rows`, one record a dialogue (see `recommendation.Answer`, and its `line`),
        and `cost`. `control` changes the visual tokens at inference (a negative control, called `name`); with it, or in
        another `order` of the candidates, only free generation is read. `limit`: the first so many dialogues, not kept (and
        of several processes known to the first alone)."""
        chosen = methods.find(method)
        folder = (
            self.folder
            / "answers"
            / methods.slug(method + name)
            / f"{domain}_{split}{f'_order{order}' if order else ''}"
        )

        def make() -> dict:
            dialogues = self.dialogues(domain, split, order)[:limit]
            chosen.prepare(self, domain, split)
            if self.rank:
                return {}
            start = time.monotonic()
            found = chosen.answer(
                self, domain, split, dialogues, control, scored=control is None and not order
            )
            rows = [{"line": d.line, **asdict(a)} for d, a in zip(dialogues, found, strict=True)]
            return {"rows": rows, "cost": cost(found, time.monotonic() - start)}

        if limit is not None:
            return make()
        return self.kept(
            folder,
            make,
            together=True,
            stage="answers",
            method=chosen.name,
            domain=domain,
            split=split,
            name=name,
            order=order,
            identity=chosen.identity(self),
        )

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
        """HR@1 and VR of a method's answers; `reading` is "recommended" (generated), "constrained" or "scored"."""
        dialogues = self.dialogues(domain, split)
        rows = self.answers(method, domain, split) if rows is None else rows
        kept = [i for i in range(len(dialogues)) if keep(i)]
        lists = [rows[i]["candidates"] for i in kept] if methods.find(method).chooses else None
        return score([rows[i][reading] for i in kept], [dialogues[i].gt_items for i in kept], lists)


def run_method(
    run: Run,
    method: str,
    domain: str,
    split: str = "test",
    order: int = 0,
    limit: int | None = None,
    out: Path | None = None,
) -> str:
    """Answer a split with one method, write the answers file, and say where it is. UserError where the method cannot run here.

    Of several processes the first writes and says; the others return "".
    The file holds each row as published, with `recommended_<key>`, `response_<key>` and `candidates_<key>`; the key is "st" (or
    "gpt_large") for a method that chooses, else the method's own, and its list the ten it ranks first.
    """
    chosen = methods.find(method)
    if domain not in DOMAINS or split not in data.SPLITS:
        raise UserError(
            f"no dialogues {domain}/{split}; use one of {', '.join(DOMAINS)} and of {', '.join(data.SPLITS)}"
        )
    if why := chosen.reason(run):
        raise UserError(f"{chosen.name}: {why}")
    found = run.answered(chosen.name, domain, split, order=order, limit=limit)
    if run.rank:
        return ""
    key = (
        run.profile.candidates.removeprefix("candidates_")
        if chosen.chooses
        else methods.slug(chosen.name)
    )
    part = (
        f"{domain}_{split}"
        + (f"_order{order}" if order else "")
        + (f"_first{limit}" if limit else "")
    )
    out = (
        out
        or run.folder.parent
        / "answers"
        / f"{methods.slug(chosen.name)}_{part}_seed{run.seed}.jsonl"
    )
    lines = [
        json.dumps(
            {
                **d.model_dump(exclude={"domain", "split", "line"}),
                f"candidates_{key}": a["candidates"],
                f"recommended_{key}": a["recommended"],
                f"response_{key}": a["response"],
            }
        )
        + "\n"
        for d, a in zip(run.dialogues(domain, split), found["rows"], strict=False)
    ]
    write_text(out, "".join(lines))
    spent = found["cost"]
    return (
        f"{chosen.name}, {domain}/{split}: {len(lines)} answers in {spent['seconds']:g} s, "
        f"{sum(a['refused'] > 0 for a in found['rows'])} prompts refused as too long, ${spent['usd']:.4f}\n{out}\n"
        f"score them: python -m lavic_utils evaluate {out}"
    )


def _stored(path: Path, wanted: str) -> dict | None:
    """A stage's file, if it is there and of this key."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("key") == wanted else None


def _begin(folder: Path, wanted: str) -> None:
    """Before a stage is made: no result of another key (it would outlive the files that are now replaced) and no checkpoint
    of another key."""
    (folder / "result.json").unlink(missing_ok=True)
    begun = folder / BEGUN
    if not begun.is_file() or begun.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_text(begun, wanted)


def cost(answers: Sequence[recommendation.Answer], seconds: float) -> dict[str, float]:
    """What answering took: seconds in all (training and encoding apart, loading the model in), tokens, dollars, and the
    peak memory of the process (of the GPU, where there is one) so far."""
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {
        "seconds": round(seconds, 2),
        "dialogues": len(answers),
        "prompt_tokens": sum(a.prompt_tokens for a in answers),
        "new_tokens": sum(a.new_tokens for a in answers),
        "usd": sum(a.usd for a in answers),
        "peak_mb": round(peak / 2**20),
    }


def shuffled(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Negative control: every item shows another item's image (a fixed rotation of the sorted ids)."""
    names = sorted(visual)
    return {
        a: visual[b]
        for a, b in zip(names, names[len(names) // 2 :] + names[: len(names) // 2], strict=True)
    }


def zeroed(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Negative control: visual tokens of the same number that carry nothing."""
    return {a: torch.zeros_like(v) for a, v in visual.items()}
