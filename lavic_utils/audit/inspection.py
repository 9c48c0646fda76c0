"""What the published data holds, counted: tokens of the 7B model, lists, ids, repeats.

Counts only: no text of the data leaves these functions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lavic_utils import data, report
from lavic_utils.config import DOMAINS, Prompts, UserError
from lavic_utils.prompts import dialogue_text

# An image of five tiles: one [CLS] a tile; 577 tokens a tile (paper, section 4.1)
CLS_TOKENS, FULL_TOKENS = 5, 2885
CATALOGUE = "item2meta_train.json"
WINDOWS = (2048, 4096)  # the training length of the paper's settings; the context its text names
FORMS = {"B and nine": re.compile(r"B[A-Z0-9]{9}"), "ISBN-10": re.compile(r"[0-9]{9}[0-9X]")}
FACTS = ("domain", "split", "turns", "truths", "repeats_truth", "names_truth", "repeats_context")
FACTS += ("st", "gpt", "shared", "words", "ids", "spoken")


@cache
def _mistral():
    import mistral_common
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    folder = Path(mistral_common.__file__).parent / "data"
    return SentencePieceTokenizer(str(folder / "tokenizer.model.v1"))


def mistral_tokens(texts: Iterable[str]) -> np.ndarray:
    """Length of each text in tokens of Mistral-7B (v1, the language model of LLaVA-v1.6), without
    start and end."""
    lengths = [len(_mistral().encode(text, bos=False, eos=False)) for text in texts]
    return np.array(lengths, dtype=int)


def present(root: Path | str) -> list[tuple[str, str]]:
    """(domain, split) of the dialogue files that are there; UserError where none is."""
    every = [(domain, split) for domain in DOMAINS for split in data.SPLITS]
    found = [one for one in every if data.dialogue_file(root, *one).is_file()]
    if not found:
        raise UserError(f"{root}: no dialogue file; {data.GET_DATA}")
    return found


def facts(root: Path | str) -> pd.DataFrame:
    """One row a dialogue of every split present (FACTS): `truths` (distinct), `repeats_truth`,
    `names_truth` (an id of the ground truth stands in the dialogue), `repeats_context` (an earlier
    row of any split of the domain has the same turns), `st` and `gpt` (the list holds a
    ground-truth item), `shared` (candidates in both lists, of 10), `words` (split at white space),
    `ids` (of lists, truth and dialogue), `spoken` (the turns)."""
    rows, seen = [], set()
    for domain, split in present(root):
        for d in data.read_dialogues(root, domain, split):
            truth, named = set(d.gt_items), set(d.context_items)
            st, gpt = set(d.candidates_st), set(d.candidates_gpt_large)
            row = (domain, split, len(d.turns), len(truth), len(truth) < len(d.gt_items))
            row += (bool(truth & named), (domain, d.context) in seen)
            row += (bool(truth & st), bool(truth & gpt), len(st & gpt))
            words = sum(len(text.split()) for _, text in d.turns)
            rows.append((*row, words, truth | st | gpt | named, d.turns))
            seen.add((domain, d.context))
    return pd.DataFrame(rows, columns=FACTS)


def dialogue_table(root: Path | str, prompts: Prompts) -> pd.DataFrame:
    """`facts`, with the `tokens` of each dialogue's turns as the prompt writes them."""
    table = facts(root)
    texts = [dialogue_text(prompts, turns) for turns in table.pop("spoken")]
    return table.assign(tokens=mistral_tokens(texts))


def real_data_summary(root: Path | str) -> list[dict[str, Any]]:
    """Figures of every dialogue file present; UserError where there is none. `ids`: distinct ones
    of lists, truths and dialogues, `odd_id_share` of them are not B and nine."""
    rows = []
    for (domain, split), part in facts(root).groupby(["domain", "split"], sort=False):
        ids = set().union(*part["ids"])
        odd = sum(not FORMS["B and nine"].fullmatch(one) for one in ids)
        row = {"domain": domain, "split": split, "conversations": len(part)}
        row |= {"turns": int(part["turns"].sum()), "pairs": int(part["truths"].sum())}
        row |= {"words_median": part["words"].median(), "words_max": int(part["words"].max())}
        row |= {"words_p95": float(np.percentile(part["words"], 95))}
        row |= {"recall_st": part["st"].mean(), "recall_gpt_large": part["gpt"].mean()}
        row |= {"ids": len(ids), "odd_id_share": odd / len(ids)}
        row |= {"repeated_gt_rows": int(part["repeats_truth"].sum())}
        rows.append(row | {"gt_mentioned_rows": int(part["names_truth"].sum())})
    return rows


def table_1(root: Path | str) -> pd.DataFrame:
    """Table 1 of the paper beside what the files here hold, one row a domain: conversations, turns,
    items (distinct ids of lists, truths and dialogues) and images (links the catalogue gives for
    these items; None without the catalogue), and which splits are here and which are not."""
    catalogue = data.read_catalogue(root) if (Path(root) / CATALOGUE).is_file() else None
    here, every, rows = present(root), facts(root), []
    for domain, published in report.published()["dataset"].items():
        part = every[every["domain"] == domain]
        ids, images = set().union(*part["ids"]), None
        if catalogue is not None:
            images = sum(len(catalogue[one].images) for one in ids if one in catalogue)
        counted = {"conversations": len(part), "turns": part["turns"].sum(), "items": len(ids)}
        counted["images"] = images
        row = {"domain": domain}
        row |= {f"{name}_published": published[name] for name in counted}
        row |= {f"{name}_here": value for name, value in counted.items()}
        there = [split for split in data.SPLITS if (domain, split) in here]
        row["splits_here"] = ", ".join(there)
        row["splits_absent"] = ", ".join(split for split in data.SPLITS if split not in there)
        rows.append(row)
    return pd.DataFrame(rows).astype({"images_here": "Int64"})


def titles(root: Path | str) -> tuple[list[str], str]:
    """Titles to measure prompts with, and where they are from: the catalogue's, or those of stage
    1's validation items (other items of the same shop) where the catalogue is not there."""
    if (Path(root) / CATALOGUE).is_file():
        items, source = data.read_catalogue(root).values(), "the catalogue's"
    else:
        items = data.read_stage1_valid(root)
        source = "those of stage 1's validation items, as the catalogue is not there"
    return sorted({item.title for item in items}), source


def prompt_lengths(
    root: Path | str, table: pd.DataFrame, prompts: Prompts, seed: int = 0
) -> pd.DataFrame:
    """Tokens of each dialogue's whole prompt, ten candidates in it: with titles only, with 5 [CLS]
    an item, with 2,885 tokens an item. Titles are drawn at random from `titles(root)`: the sum over
    ten varies little."""
    rng, lengths = random.Random(seed), mistral_tokens(titles(root)[0]).tolist()
    drawn = np.array([sum(rng.choices(lengths, k=10)) for _ in range(len(table))])
    frame = prompts.recommend.format(dialogue="", candidates="")
    candidate = prompts.candidate_without_image.format(title="", id="B000000000")
    frame_tokens, candidate_tokens = mistral_tokens([frame, candidate])
    bare = 1 + table["tokens"] + frame_tokens + drawn + 10 * candidate_tokens  # 1: the start token
    found = table[["domain", "split"]].copy()
    found["titles only"] = bare
    found["5 [CLS] an item"] = bare + 10 * CLS_TOKENS
    found["2,885 tokens an item"] = bare + 10 * FULL_TOKENS
    return found
