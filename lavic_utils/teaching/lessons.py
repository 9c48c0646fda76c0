"""What notebooks 03 and 05 show of prompts, targets and differences: small measurements and their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from lavic_utils import style, vision
from lavic_utils.config import DOMAINS
from lavic_utils.data import Dialogue
from lavic_utils.prompts import IMAGE, Candidate, dialogue_text, recommend_message
from lavic_utils.recommendation import Example, Prompter, Read
from lavic_utils.training import pad_left

# Parts of a prompt -> colour: neither methods nor domains, so lightness tells them apart too.
PARTS = {
    "dialogue": style.BLUE,
    "titles": style.SKY,
    "[CLS]": style.VERMILLION,
    "ids": style.ORANGE,
    "request": style.PALE,
}
GROUND = {
    "facecolor": "white",
    "edgecolor": "none",
    "pad": 1.5,
}  # behind words that a line would cross


def prompt_parts(prompter: Prompter, dialogue: Dialogue, candidates: Sequence[str]) -> list[str]:
    """Which of PARTS each token of a prompt belongs to, in the prompt's order ("request": the words and line ends that are
    the same in every prompt). ValueError for a prompt that was shortened, since its text is not the dialogue's."""
    tokenizer, prompts, titles = prompter.tokenizer, prompter.profile.prompts, prompter.titles
    shown = [a for a in candidates if prompter.lengths.get(a)]
    items = [Candidate(a, titles[a], prompter.lengths.get(a, 0)) for a in candidates]
    message = recommend_message(prompts, dialogue.turns, items, IMAGE)
    text, talk = prompts.chat.format(message=message), dialogue_text(prompts, dialogue.turns)
    parts, place = ["request"] * len(text), text.index(talk)
    parts[place : (place := place + len(talk))] = ["dialogue"] * len(talk)
    for asin in candidates:
        form = prompts.candidate if asin in shown else prompts.candidate_without_image
        line = form.format(title=titles[asin], id=asin, image="<image>")
        place = text.index(line, place)
        for part, word in (("titles", titles[asin]), ("ids", asin)):
            start = place + line.index(word)
            parts[start : start + len(word)] = [part] * len(word)
        place += len(line)
    slot, counts = (
        tokenizer.convert_tokens_to_ids("<image>"),
        iter([prompter.lengths[a] for a in shown]),
    )
    encoded = tokenizer(
        text, return_offsets_mapping=True
    )  # a token belongs where its last character stands
    kinds = [
        kind
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        for kind in (
            ["[CLS]"] * next(counts)
            if token == slot
            else [parts[end - 1] if end > start else "request"]
        )
    ]
    if len(kinds) != len(prompter.prompt(dialogue, candidates).ids):
        raise ValueError(
            f"line {dialogue.line}: the prompt was shortened to fit, so its parts cannot be told apart"
        )
    return kinds


def budget_figure(tokens: pd.DataFrame, longest: Mapping[str, int], window: int):
    """Mean tokens of a prompt by part, one stacked bar a domain (`tokens`: domains x PARTS), with the longest prompt of each
    domain (a tick) and the `window` that prompt and answer must fit (dashed)."""
    fig, axis = plt.subplots(figsize=(8.5, 2.4))
    left = pd.Series(0.0, index=tokens.index)
    for part, colour in PARTS.items():
        axis.barh(tokens.index, tokens[part], left=left, color=colour, edgecolor="white")
        for y, domain in enumerate(tokens.index):
            if (width := tokens.loc[domain, part]) > 0.03 * window:
                axis.text(
                    left[domain] + width / 2,
                    y,
                    f"{width:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=style.INK if colour in (style.PALE, style.SKY, style.ORANGE) else "white",
                )
        middle = left.iloc[0] + tokens[part].iloc[0] / 2
        axis.text(middle, -0.5, part, ha="center", va="bottom", fontsize=8, color=style.INK)
        left = left + tokens[part]
    axis.plot(
        [longest[d] for d in tokens.index], range(len(tokens)), "|", color=style.INK, ms=16, mew=1.5
    )
    axis.annotate(
        "longest",
        (longest[tokens.index[-1]], len(tokens) - 1),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        va="center",
    )
    axis.axvline(window, color=style.INK, ls="--", lw=1)
    axis.text(window, -0.5, "window ", ha="right", va="bottom", fontsize=8)
    axis.set(
        xlabel="tokens of a prompt (mean)", xlim=(0, window * 1.02), ylim=(len(tokens) - 0.5, -0.55)
    )
    axis.tick_params(axis="y", length=0)
    fig.tight_layout()
    return fig


def labels_figure(parts: Sequence[str], target: Sequence[str], columns: int = 42):
    """One training example as the loss sees it: a square a token, read like text; prompt tokens pale in their part's colour
    (no loss), the `target`'s in full with their text (the whole loss)."""
    fig, axis = plt.subplots(
        figsize=(9.5, 0.24 * (2 + (len(parts) + len(target) - 1) // columns) + 0.9)
    )
    for i, part in enumerate([*parts, *["target"] * len(target)]):
        y, x = divmod(i, columns)
        colour, alpha = (style.INK, 1.0) if part == "target" else (PARTS[part], 0.35)
        axis.add_patch(
            plt.Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, facecolor=colour, alpha=alpha, lw=0)
        )
    y, x = divmod(len(parts) + len(target) - 1, columns)
    axis.text(
        x + 1.3, y + 0.5, "loss here: " + "  ".join(target), va="center", fontsize=8, weight="bold"
    )
    for i, (part, colour) in enumerate(PARTS.items()):
        axis.add_patch(plt.Rectangle((i * 6, -1.6), 0.9, 0.9, facecolor=colour, alpha=0.35, lw=0))
        axis.text(i * 6 + 1.2, -1.15, part, va="center", fontsize=8)
    axis.set(xlim=(0, columns), ylim=(y + 1.1, -1.8), aspect="equal")
    axis.axis("off")
    return fig


@torch.inference_mode()
def token_losses(model, prompter: Prompter, examples: Sequence[Example]) -> list[list[float]]:
    """-log p of each token of each example's target, given the prompt and the target so far."""
    found: list[list[float]] = []
    for group in vision.batched(examples, prompter.profile.recommendation.eval_batch_size):
        prompts = [prompter.prompt(e.dialogue, e.candidates) for e in group]
        pad = prompter.tokenizer.pad_token_id
        ids = pad_left([p.ids for p in prompts], pad).to(model.device)
        mask = pad_left([[1] * len(p.ids) for p in prompts], 0).to(model.device)
        targets = [prompter.target_ids(e.target) for e in group]
        tables = Read(model, vision.place(model, ids, prompter.tokens(prompts), pad), mask).score(
            [[t] for t in targets]
        )
        found += [(-table[0, : len(t)]).tolist() for table, t in zip(tables, targets, strict=True)]
    return found


def token_figure(losses: Mapping[str, Sequence[float]], tokens: Sequence[str]):
    """Mean loss of each token of a target (`losses`: before and after -> one value a token), tokens named by an example's."""
    fig, axis = plt.subplots(figsize=(6.5, 2.3))
    colours = (style.GRAY, style.method_colour("LaViC"))
    for shift, colour, (name, values) in zip((-0.2, 0.2), colours, losses.items(), strict=True):
        axis.bar(np.arange(len(values)) + shift, values, 0.38, color=colour)
        for x, value in enumerate(values):
            axis.text(
                x + shift, value, f"{value:.2f}", ha="center", va="bottom", fontsize=7, color=colour
            )
        axis.plot([], [], "s", color=colour, label=name)
    axis.legend(fontsize=8, loc="upper right")
    axis.set_xticks(range(len(tokens)), tokens)
    axis.set(xlabel="token of the target (that of one example)", ylabel="mean of $-\\log p$")
    fig.tight_layout()
    return fig


def forest_figure(differences: pd.DataFrame, label: str = "HR@1 of LaViC less that of the other"):
    """Paired differences as dots with their 95 % intervals, one row a comparison, in the other method's colour.

    `differences`: columns domain, "LaViC less", difference, low, high.
    """
    others = list(dict.fromkeys(differences["LaViC less"]))
    fig, axis = plt.subplots(figsize=(8, 0.27 * (len(differences) + len(others)) + 0.7))
    y, ticks = 0.0, {}
    for other in others:
        part = differences[differences["LaViC less"] == other]
        axis.text(
            0.0,
            y,
            f" less {other}",
            color=style.method_colour(other),
            weight="bold",
            fontsize=8.5,
            va="center",
            transform=axis.get_yaxis_transform(),
            bbox=GROUND,
        )
        for row in part.to_dict("records"):
            y += 1
            axis.plot([row["low"], row["high"]], [y, y], color=style.method_colour(other), lw=2)
            axis.plot(row["difference"], y, "o", color=style.method_colour(other), ms=6)
            axis.annotate(
                f"{row['difference']:+.2f}",
                (row["high"], y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
            ticks[y] = row["domain"]
        y += 1
    axis.axvline(0, color=style.INK, lw=1)
    low, high = min(0.0, differences["low"].min()), max(0.0, differences["high"].max())
    axis.set(
        ylim=(y - 0.4, -0.6),
        xlim=(low - 0.3 * (high - low), high + 0.12 * (high - low)),
        xlabel=label,
    )
    axis.set_yticks(list(ticks), ticks.values())
    axis.tick_params(axis="y", length=0)
    fig.tight_layout()
    return fig


def controls_figure(scores: pd.DataFrame, references: Mapping[str, Mapping[str, float]]):
    """HR@1 of a method as trained and under negative controls, with 95 % intervals, one panel a domain.

    `scores`: columns domain, control, HR@1, low, high; `references`: name -> domain -> HR@1 of a dashed line.
    """
    names = list(dict.fromkeys(scores["control"]))
    fig, axes = plt.subplots(1, len(DOMAINS), figsize=(9.5, 2.4), sharey=True, sharex=True)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        part = scores[scores["domain"] == domain].set_index("control").loc[names]
        colours = [style.method_colour("LaViC"), *[style.GRAY] * (len(names) - 1)]
        for y, (colour, row) in enumerate(zip(colours, part.to_dict("records"), strict=True)):
            axis.plot([row["low"], row["high"]], [y, y], color=colour, lw=2)
            axis.plot(row["HR@1"], y, "o", color=colour, ms=7)
            axis.annotate(
                f"{row['HR@1']:.2f}",
                (row["HR@1"], y),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
        for name, values in references.items():
            colour = style.method_colour(name)
            axis.axvline(values[domain], color=colour, ls="--", lw=1)
            axis.text(
                values[domain],
                len(names) - 0.35,
                name.removeprefix("LaViC "),
                color=colour,
                fontsize=7,
                ha="center",
                bbox=GROUND,
            )
        axis.set(
            title=domain,
            xlabel="HR@1 over conversations",
            xlim=(0, None),
            ylim=(len(names) - 0.3, -0.6),
        )
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
    fig.tight_layout()
    return fig
