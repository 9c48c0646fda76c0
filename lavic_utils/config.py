"""Configuration, typed and checked: a profile is a YAML file; profiles differ in nothing else."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

PACKAGE = Path(__file__).resolve().parent
# The checkout; for a package installed from a wheel the folder where it is run.
ROOT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()
MOST_BYTES = 200_000  # of a profile's file
MOST = 2**32 - 1  # numpy's largest seed; no size is larger
DOMAINS = {"beauty": "all_beauty", "fashion": "amazon_fashion", "home": "amazon_home"}


class UserError(Exception):
    """Bad input: one clear line (what, where, what to do); the command line exits with code 2."""


# YAML reads `yes` as true, which would count as 1; and 1e-4, without a point, as a text
Real = Annotated[float, BeforeValidator(lambda value: "" if isinstance(value, bool) else value)]
Share = Annotated[Real, Field(ge=0, le=1)]
Some = Annotated[Real, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Place = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f][^\x00-\x1f]*$")]  # a path, or a hub id


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _holds(*names: str) -> AfterValidator:
    """The check of a template: it holds each of these fields once, and no other."""

    def check(text: str) -> str:
        found = [one[1:] for one in Formatter().parse(text) if one[1] is not None]
        if sorted(found, key=str) != sorted([(name, "", None) for name in names], key=str):
            wanted = ", ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"{wanted} must stand in it once each, and no other field")
        text.encode()  # a ValueError where it holds half of a character
        return text

    return AfterValidator(check)


class Prompts(Section):
    """Text templates, each with its fields. `chat` is the model's own form of a conversation, put
    around the message of `describe` and `recommend`."""

    chat: Annotated[str, _holds("message")] = "{message}"
    describe: Annotated[str, _holds("title", "image")]
    recommend: Annotated[str, _holds("dialogue", "candidates")]
    candidate: Annotated[str, _holds("id", "title", "image")]
    candidate_without_image: Annotated[str, _holds("id", "title")]
    answer: Annotated[str, _holds("id")]
    seeker: Annotated[str, _holds("text")]
    helper: Annotated[str, _holds("text")]


class World(Section):
    """Sizes and probabilities of the rendered mini world (none in profiles with real data)."""

    seed: int = Field(7, ge=0, le=MOST, strict=True)
    image_side: int = Field(144, ge=48, le=4096, strict=True)
    train_shards: Count = 2
    shard_items: Annotated[int, Field(ge=64, le=100_000, strict=True)] = 256
    stage1_valid_items: Annotated[int, Field(ge=10, le=100_000, strict=True)] = 170
    train_dialogues: Count = 2400
    valid_dialogues: Count = 150
    test_dialogues: Count = 400
    p_feature_mentioned: Share = 0.85
    p_brand_mentioned: Share = 0.15
    p_properties: tuple[Some, Some, Some] = (0.2, 0.4, 0.4)
    p_several_truths: Share = 0.3
    p_new_wording: Share = 0.3
    p_extra_image: Share = 0.5
    missing_images: int = Field(6, ge=0, le=64, strict=True)
    corrupt_images: int = Field(6, ge=0, le=64, strict=True)

    def of(self, seed: int) -> World:
        """The world of a run's seed: other items, pictures and dialogues, of the same kind."""
        return self.model_copy(update={"seed": self.seed + seed})


class Lora(Section):
    r: Count = 8
    alpha: Count = 32
    dropout: Real = Field(0.1, ge=0, lt=1)


class Stage(Section):
    """What both stages set."""

    # settings of time and memory alone: changing one of them throws no result away
    ONLY_SPEED: ClassVar = ("gradient_checkpointing", "eval_batch_size", "save_minutes")

    lora: Lora = Lora()
    learning_rate: Real = Field(gt=0, le=10)
    weight_decay: Real = Field(1e-5, ge=0, le=1)
    epochs: Count
    batch_size: Count
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    max_length: Annotated[int, Field(ge=16, le=MOST, strict=True)]
    max_new_tokens: Annotated[int, Field(ge=4, le=MOST, strict=True)]
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, le=MOST, strict=True)
    # between checkpoints; None: stage 1 has one an epoch, stage 2 begins an adapter again
    save_minutes: Real | None = Field(None, gt=0)

    def steps(self, rows: int) -> int:
        """Optimiser steps of a whole training on so many rows, in one process."""
        batches = math.ceil(rows / self.batch_size)
        return self.epochs * math.ceil(batches / self.gradient_accumulation)

    def deciding(self) -> dict[str, Any]:
        """The settings that can change a result."""
        return self.model_dump(mode="json", exclude=set(self.ONLY_SPEED))


class Distillation(Stage):
    """Stage 1 (method: visual knowledge self-distillation)."""

    ONLY_SPEED: ClassVar = (*Stage.ONLY_SPEED, "teacher_batch_size", "keep_pixels", "workers")

    teacher_batch_size: Count = 48  # images described at once
    eval_batch_size: Count = 64
    descriptions: Literal["write", "published"] = "write"  # by the base model now, or the data's
    images_per_item: Count | None = None  # the first so many images of an item; None: all
    training_items_only: bool  # leave items of valid and test dialogues out of stage 1
    keep_pixels: bool = False  # in memory, instead of decoding every image in every epoch
    workers: int = Field(
        0, ge=0, le=256, strict=True
    )  # processes that decode images while the card computes


class Recommendation(Stage):
    """Stage 2 (method: recommendation fine-tuning) and inference."""

    eval_batch_size: Count  # prompts answered at once, where none is longer than `max_length`

    def at_once(self, tokens: int) -> int:
        """Prompts of so many tokens in a batch: no more tokens than in a full one, but a prompt."""
        return max(1, self.eval_batch_size * self.max_length // max(tokens, self.max_length))


class Profile(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")  # results go to a folder of it
    tier: Literal["mini run", "full run", "rehearsal"]  # the last is given by the weights
    model: Place  # a folder inside the package, a path, or a hub id
    revision: Place | None = None  # a commit of the hub's repository
    download_gb: Real = Field(0, ge=0)
    models: dict[str, Place] = {}  # method -> a folder of yours with its checkpoint, not the hub's
    quantize_4bit: bool = False
    dtype: Literal["float32", "half"] = "float32"  # half: what `loading.half` says of the card
    seed: int = Field(42, ge=0, le=MOST, strict=True)
    candidates: Literal["candidates_st", "candidates_gpt_large"] = "candidates_st"
    prompts: Prompts
    world: World | None = None
    distillation: Distillation
    recommendation: Recommendation
    arms: dict[str, dict[str, Any]] = {}  # method -> stage 2's settings where it has its own

    @model_validator(mode="after")
    def _known(self) -> Profile:
        for method in self.arms:
            try:
                self.arm(method)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"{method}, {first['loc'][0]}: {first['msg']}") from None
        return self

    def arm(self, method: str) -> Profile:
        """The profile as one method's stage 2 has it."""
        settings = self.recommendation.model_dump() | self.arms.get(method, {})
        return self.model_copy(update={"recommendation": Recommendation(**settings)})

    @property
    def model_path(self) -> str:
        inside = PACKAGE / self.model
        return str(inside) if inside.is_dir() else self.model


class _Loader(yaml.SafeLoader):
    """SafeLoader, but a key that stands twice is refused; the last one would have counted."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = Counter(str(key.value) for key, _ in node.value)
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.YAMLError(f"{twice[0]} stands twice from line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)


def load_profile(name: str = "mini") -> Profile:
    """Read `lavic_utils/profiles/NAME.yaml`, or a path to a YAML file. UserError: file, field."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PACKAGE / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (PACKAGE / "profiles").glob("*.yaml")))
        raise UserError(
            f"profile {name!r} not found at {path}; use one of {known}, or a .yaml file"
        )
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: over {MOST_BYTES} bytes, so no profile; name another file")
    try:
        return Profile.model_validate(yaml.load(path.read_bytes().decode("utf-8"), _Loader))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(top level)"
        field = field if field.isprintable() else ascii(field)
        problem = f"field {field}: {first['msg'].removeprefix('Value error, ')}"
    except Exception as error:  # YAML's constructors raise anything: "2020-99-99", "!!int abc"
        problem = f"not valid YAML ({type(error).__name__}: {' '.join(str(error).split())})"
    raise UserError(f"{path}: {problem}; correct the file")


def show_progress() -> None:
    """Let the package's log, which says how far long work is, appear on stderr."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lavic_utils").setLevel(logging.INFO)


def results_dir(profile: Profile) -> Path:
    """Where everything a run makes goes: `results/<profile>/`, or under LAVIC_RESULTS."""
    return Path(os.environ.get("LAVIC_RESULTS") or ROOT / "results") / profile.name


def real_data_dir() -> Path | None:
    """The folder with the published Reddit-Amazon files (LAVIC_DATA), or None where it is unset."""
    found = os.environ.get("LAVIC_DATA")
    return Path(found) if found else None


def replications_dir() -> Path | None:
    """The folder with answers of real 7B models (LAVIC_REPLICATIONS), or None where it is unset."""
    found = os.environ.get("LAVIC_REPLICATIONS")
    return Path(found) if found else None
