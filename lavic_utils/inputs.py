"""What a run reads: the data folder, its catalogue, the dialogues with their candidate lists, and the base model."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from lavic_utils import data, methods, vision
from lavic_utils.bench import plan
from lavic_utils.config import DOMAINS, Profile, UserError, load_profile, real_data_dir, results_dir
from lavic_utils.provenance import world_dir
from lavic_utils.remote import chat_api as endpoint
from lavic_utils.retrieval import candidate_lists


class Inputs:
    """What one profile and seed reads; results go to `results/<profile>/seed<seed>/`.

    `data_folder`: other data than the profile's own, in the same layout. `lists`: a retrieval method, whose first ten are then
    every dialogue's candidates. The results of either go to a folder of their own. `api`: how a proprietary model is asked.
    """

    def __init__(
        self,
        profile: str | Profile = "mini",
        seed: int | None = None,
        data_folder: Path | None = None,
        api: endpoint.Settings | None = None,
        lists: str | None = None,
    ) -> None:
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        self.seed = self.profile.seed if seed is None else seed
        self.given, self.api = data_folder, api or endpoint.Settings(max_usd=0.0)
        self.lists = methods.find(lists) if lists else None
        if self.lists and self.lists.chooses:
            raise UserError(
                f"{self.lists.name} ranks no catalogue, so it makes no candidate lists; use a retrieval method"
            )
        self._read: dict[tuple[str, str], list[data.Dialogue]] = {}
        self._listed: dict[tuple[str, str], list[data.Dialogue]] = {}
        place = results_dir(self.profile) / (f"data-{self.data_hash}" if data_folder else "")
        self.folder = place / (f"lists-{methods.slug(lists)}" if lists else "") / f"seed{self.seed}"
        self.rank, self.processes = (
            int(os.environ.get(name, value)) for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"))
        )
        if torch.cuda.is_available() and self.processes > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.manual_seed(self.seed)

    @cached_property
    def root(self) -> Path:
        """The data folder: the one given, the mini world (made if absent), or the published data in LAVIC_DATA."""
        if self.given:
            return self.given
        if self.profile.world:
            from lavic_utils.mini.world import make_world

            place = world_dir(self.profile)
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.parent / f".{place.name}.lock"):  # one process makes it
                return make_world(place, self.profile.world)
        found = real_data_dir()
        if found is None:
            raise UserError(
                f"profile {self.profile.name} needs the published data: set LAVIC_DATA to its folder"
            )
        return found

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
        return (
            json.loads(path.read_text(encoding="utf-8"))
            if path.is_file()
            else {"items": {}, "dialogues": {}}
        )

    def as_read(self, domain: str, split: str) -> list[data.Dialogue]:
        """A split's dialogues as they stand in the file."""
        if (domain, split) not in self._read:
            self._read[domain, split] = data.read_dialogues(self.root, domain, split)
        return self._read[domain, split]

    def dialogues(self, domain: str, split: str, order: int = 0) -> list[data.Dialogue]:
        """A split's dialogues. Candidates stand as in the file, or for `order` 1, 2, ... in the order of a seeded shuffle."""
        if self.lists and (domain, split) not in self._listed:
            self._listed[domain, split] = self._with_lists(domain, split)
        found = self._listed[domain, split] if self.lists else self.as_read(domain, split)
        return [shuffled_list(d, self.profile.candidates, order) for d in found] if order else found

    def _with_lists(self, domain: str, split: str) -> list[data.Dialogue]:
        rows, (asins, _) = self.as_read(domain, split), self.domain_catalogue(domain)
        found = candidate_lists(self.lists.order(self, domain, rows), asins, seed=self.seed)
        return [
            d.model_copy(update={self.profile.candidates: tuple(ten)})
            for d, ten in zip(rows, found, strict=True)
        ]

    def _present(self, domains: Sequence[str], splits: Sequence[str]) -> list[tuple[str, str]]:
        return [
            (d, s) for d in domains for s in splits if data.dialogue_file(self.root, d, s).is_file()
        ]

    @cached_property
    def items(self) -> dict[str, list[str]]:
        """Ids that occur in the lists or truths of any domain's dialogues, by split (sorted)."""
        return {
            split: self._ids(
                d for key in self._present(tuple(DOMAINS), (split,)) for d in self.dialogues(*key)
            )
            for split in data.SPLITS
        }

    def _ids(self, rows: Iterable[data.Dialogue]) -> list[str]:
        return sorted(
            {a for d in rows for a in (*getattr(d, self.profile.candidates), *d.gt_items)}
        )

    def domain_catalogue(self, domain: str) -> tuple[list[str], list[str]]:
        """(ids, titles) of a domain's items: those that any of its dialogues lists or has as its truth."""
        asins = self._ids(
            d for key in self._present((domain,), data.SPLITS) for d in self.as_read(*key)
        )
        if missing := [asin for asin in asins if asin not in self.titles]:
            raise UserError(
                f"{self.root}: {len(missing)} items of the {domain} dialogues are not in item2meta_train.json, "
                f"e.g. {missing[0]}; {data.GET_DATA}"
            )
        return asins, [self.titles[asin] for asin in asins]

    def need_training_data(self) -> None:
        """UserError where a file is missing that training reads (cheap: nothing is read)."""
        if self.profile.world and not self.given:
            return
        for path in [
            self.root / "item2meta_train.json",
            *(data.dialogue_file(self.root, d, "train") for d in DOMAINS),
        ]:
            if not path.is_file():
                raise UserError(f"{path}: not there; {data.GET_DATA}")

    @cached_property
    def data_hash(self) -> str:
        return data.data_hash(self.root)

    @cached_property
    def processor(self):
        return vision.load_processor(self.profile)

    def model(self):
        """A fresh base model: adapters change the object they are put on. UserError where the card cannot even answer with it."""
        plan.refuse_here(self.profile, "inference")
        return vision.load_model(self.profile)


def shuffled_list(dialogue: data.Dialogue, which: str, order: int) -> data.Dialogue:
    """The dialogue with its candidates in the order of shuffle number `order`; the same in every process."""
    names = list(getattr(dialogue, which))
    random.Random(f"order-{order}/{dialogue.domain}/{dialogue.split}/{dialogue.line}").shuffle(
        names
    )
    return dialogue.model_copy(update={which: tuple(names)})
