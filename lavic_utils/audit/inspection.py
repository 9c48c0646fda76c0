"""What the published data holds, counted: lengths in the 7B model's own tokens, lists, ids, repeats, tiles (notebook 01).

Counts only: no text of the data leaves these functions.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from lavic_utils import data
from lavic_utils.config import DOMAINS, PACKAGE, Prompts, UserError
from lavic_utils.prompts import dialogue_text
from lavic_utils.provenance import write_json, write_text

CLS_TOKENS, FULL_TOKENS = (
    5,
    2885,
)  # an image of five tiles: one [CLS] a tile; 577 tokens a tile (paper, section 4.1)
WINDOWS = (2048, 4096)  # the training length of the paper's settings; the context its text names
GRID = [
    [336, 672],
    [672, 336],
    [672, 672],
    [1008, 336],
    [336, 1008],
]  # LLaVA-v1.6's pinpoints, (height, width)
FORMS = {"B and nine": re.compile(r"B[A-Z0-9]{9}"), "ISBN-10": re.compile(r"[0-9]{9}[0-9X]")}


@cache
def _mistral():
    import mistral_common
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(
        str(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
    )


def mistral_tokens(texts: Iterable[str]) -> np.ndarray:
    """Length of each text in tokens of Mistral-7B (v1, the language model of LLaVA-v1.6), without start and end."""
    return np.array(
        [len(_mistral().encode(text, bos=False, eos=False)) for text in texts], dtype=int
    )


def present(root: Path | str, splits: Sequence[str] = data.SPLITS) -> list[tuple[str, str]]:
    """(domain, split) of the dialogue files that are there; UserError where none is."""
    found = [(d, s) for d in DOMAINS for s in splits if data.dialogue_file(root, d, s).is_file()]
    if not found:
        raise UserError(f"{root}: no dialogue file; {data.GET_DATA}")
    return found


def table_1(root: Path | str, set_aside: list | None = None) -> pd.DataFrame:
    """Table 1 of the paper beside what the files here hold, one row a domain: conversations, turns, items (distinct ids of
    lists, truths and dialogues) and images (links the catalogue gives for these items; None without the catalogue), and
    which splits are here and which are not. `set_aside` as in `data.read_dialogues`."""
    published = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))["dataset"]
    catalogue = (
        data.read_catalogue(root) if (Path(root) / "item2meta_train.json").is_file() else None
    )
    here, rows = present(root), []
    for domain in DOMAINS:
        splits = [split for name, split in here if name == domain]
        dialogues = [
            d for split in splits for d in data.read_dialogues(root, domain, split, set_aside)
        ]
        ids = {
            one
            for d in dialogues
            for one in (*d.candidates_st, *d.candidates_gpt_large, *d.gt_items, *d.context_items)
        }
        images = (
            None
            if catalogue is None
            else sum(len(catalogue[one].images) for one in ids if one in catalogue)
        )
        counted = {
            "conversations": len(dialogues),
            "turns": sum(len(d.turns) for d in dialogues),
            "items": len(ids),
            "images": images,
        }
        rows.append(
            {
                "domain": domain,
                **{f"{name}_published": published[domain][name] for name in counted},
                **{f"{name}_here": value for name, value in counted.items()},
                "splits_here": ", ".join(splits),
                "splits_absent": ", ".join(split for split in data.SPLITS if split not in splits),
            }
        )
    return pd.DataFrame(rows).astype({"images_here": "Int64"})


def dialogue_table(root: Path | str, prompts: Prompts) -> pd.DataFrame:
    """One row a dialogue of every split present: `tokens` of its turns as the prompt writes them, `truths` (distinct),
    `repeats_truth`, `names_truth` (an id of the ground truth stands in the dialogue), `repeats_context` (an earlier row
    of any split of the domain has the same turns), `st` and `gpt` (the list holds a ground-truth item), `shared`
    (candidates in both lists, of 10)."""
    rows, seen = [], set()
    for domain, split in present(root):
        for d in data.read_dialogues(root, domain, split):
            truth, again = set(d.gt_items), (domain, d.context) in seen
            seen.add((domain, d.context))
            rows.append(
                {
                    "domain": domain,
                    "split": split,
                    "turns": len(d.turns),
                    "truths": len(truth),
                    "text": dialogue_text(prompts, d.turns),
                    "repeats_truth": len(truth) < len(d.gt_items),
                    "names_truth": bool(truth & set(d.context_items)),
                    "repeats_context": again,
                    "st": bool(truth & set(d.candidates_st)),
                    "gpt": bool(truth & set(d.candidates_gpt_large)),
                    "shared": len(set(d.candidates_st) & set(d.candidates_gpt_large)),
                }
            )
    table = pd.DataFrame(rows)
    table.insert(2, "tokens", mistral_tokens(table.pop("text")))
    return table


def titles(root: Path | str) -> tuple[list[str], str]:
    """Titles to measure prompts with, and where they are from: the catalogue's, or those of stage 1's validation items
    (other items of the same shop) where the catalogue is not there."""
    if (Path(root) / "item2meta_train.json").is_file():
        return sorted(
            {item.title for item in data.read_catalogue(root).values()}
        ), "the catalogue's titles"
    return (
        sorted({row.title for row in data.read_stage1_valid(root)}),
        "titles drawn from stage 1's validation items, as the catalogue is not there",
    )


def prompt_lengths(
    root: Path | str, table: pd.DataFrame, prompts: Prompts, seed: int = 0
) -> pd.DataFrame:
    """Tokens of each dialogue's whole prompt, ten candidates in it: with titles only, with 5 [CLS] an item, with 2,885
    tokens an item. Titles are drawn at random from `titles(root)`: the sum over ten varies little."""
    rng, lengths = random.Random(seed), mistral_tokens(titles(root)[0])
    line = mistral_tokens([prompts.candidate_without_image.format(title="", id="B000000000")])[0]
    frame = (
        mistral_tokens([prompts.recommend.format(dialogue="", candidates="")])[0] + 1
    )  # the start token
    listed = (
        np.array([sum(rng.choices(list(lengths), k=10)) for _ in range(len(table))]) + 10 * line
    )
    bare = table["tokens"].to_numpy() + frame + listed
    return pd.DataFrame(
        {
            "domain": table["domain"],
            "split": table["split"],
            "titles only": bare,
            "5 [CLS] an item": bare + 10 * CLS_TOKENS,
            "2,885 tokens an item": bare + 10 * FULL_TOKENS,
        }
    )


def overflow(lengths: pd.DataFrame, windows: Sequence[int] = WINDOWS) -> pd.DataFrame:
    """Share of test prompts longer than each window, by domain and kind of prompt."""
    test = lengths[lengths["split"] == "test"].drop(columns="split")
    shares = {
        window: (test.set_index("domain") > window).groupby("domain", sort=False).mean()
        for window in windows
    }
    return pd.concat(shares, names=["window"])


def list_table(table: pd.DataFrame) -> pd.DataFrame:
    """By domain and split: recall of both lists, which is the ceiling of HR@1 over conversations; the ceiling over
    (distinct) ground-truth items, since a conversation has one answer; overlap of the lists."""
    groups = table.groupby(["domain", "split"], sort=False)
    pairs = groups["truths"].sum()
    return pd.DataFrame(
        {
            "conversations": groups.size(),
            "recall, candidates_st": groups["st"].mean(),
            "recall, candidates_gpt_large": groups["gpt"].mean(),
            "ceiling over items, st": groups["st"].sum() / pairs,
            "ceiling over items, gpt_large": groups["gpt"].sum() / pairs,
            "candidates in both lists": groups["shared"].mean(),
        }
    )


def id_tokens(root: Path | str) -> pd.DataFrame:
    """One row a distinct id of lists, truths and dialogues: its `form` and the `tokens` it needs."""
    ids = {
        one
        for domain, split in present(root)
        for d in data.read_dialogues(root, domain, split)
        for one in (*d.candidates_st, *d.candidates_gpt_large, *d.gt_items, *d.context_items)
    }
    rows = [
        {
            "form": next((name for name, form in FORMS.items() if form.fullmatch(one)), "other"),
            "tokens": count,
        }
        for one, count in zip(sorted(ids), mistral_tokens(sorted(ids)), strict=True)
    ]
    return pd.DataFrame(rows)


def id_table(root: Path | str) -> pd.DataFrame:
    """`id_tokens` by form: how many ids, and the tokens that one needs (least, median, most)."""
    return (
        id_tokens(root)
        .groupby("form")["tokens"]
        .agg(ids="size", least="min", median="median", most="max")
    )


def tile_table(sizes: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Tiles (and so [CLS] tokens) that the real processor makes of an image of (height, width) pixels."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return pd.DataFrame(
        [
            {
                "height": h,
                "width": w,
                "height / width": round(h / w, 2),
                "tiles": image_size_to_num_patches([h, w], GRID, 336),
            }
            for h, w in sizes
        ]
    )


def save_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> list[str]:
    """Each table as NAME.csv and NAME.json (rows, and what they are); the names written."""
    for name, frame in tables.items():
        plain = frame.reset_index()
        write_text(
            folder / f"{name}.csv",
            plain.to_csv(index=False, lineterminator="\n", float_format="%.6g"),
        )
        rows = json.loads(plain.to_json(orient="records"))
        write_json(folder / f"{name}.json", {"tier": "counts of the real files", "rows": rows})
    return [f"{name}.{end}" for name in tables for end in ("csv", "json")]
