"""What each token of a prompt is, and how surprised a model is by each token of its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from lavic_utils import vision
from lavic_utils.data import Dialogue
from lavic_utils.figures import style
from lavic_utils.prompts import Candidate, dialogue_text, recommend_message
from lavic_utils.recommendation import Example, Prompter

# Parts of a prompt -> colour: neither methods nor domains, so lightness tells them apart too.
PARTS = {
    "dialogue": style.BLUE,
    "titles": style.SKY,
    "[CLS]": style.VERMILLION,
    "ids": style.ORANGE,
    "request": style.PALE,
}
DARK = ("dialogue", "[CLS]")  # the parts whose numbers are written in white


def prompt_parts(prompter: Prompter, dialogue: Dialogue, candidates: Sequence[str]) -> list[str]:
    """Which of PARTS each token of a prompt belongs to, in the prompt's order.

    "request" is what stands in every prompt: fixed words and line ends. ValueError for a prompt
    that was shortened, since its text is not the dialogue's.
    """
    prompts, titles, tokenizer = prompter.profile.prompts, prompter.titles, prompter.tokenizer
    shown = [a for a in candidates if prompter.lengths.get(a)]
    items = [Candidate(a, titles[a], prompter.lengths.get(a, 0)) for a in candidates]
    message = recommend_message(prompts, dialogue.turns, items, image="<image>")
    text = prompts.chat.format(message=message)
    of_character = ["request"] * len(text)

    def mark(part: str, words: str, after: int) -> int:
        """Note the first `words` after a place as this part, and return where they end."""
        start = text.index(words, after)
        end = start + len(words)
        of_character[start:end] = [part] * len(words)
        return end

    place = mark("dialogue", dialogue_text(prompts, dialogue.turns), 0)
    for asin in candidates:  # a profile may write title or id first
        place = max(mark("titles", titles[asin], place), mark("ids", asin, place))

    slot = tokenizer.convert_tokens_to_ids("<image>")
    cls_counts = iter([prompter.lengths[a] for a in shown])
    encoded, parts = tokenizer(text, return_offsets_mapping=True), []
    for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if token == slot:
            parts += ["[CLS]"] * next(cls_counts)
        else:  # a token belongs where its last character stands
            parts.append(of_character[end - 1] if end > start else "request")
    if len(parts) != len(prompter.prompt(dialogue, candidates).ids):
        raise ValueError(
            f"line {dialogue.line}: the prompt was shortened to fit, so its parts cannot be told"
        )
    return parts


def budget_figure(tokens: pd.DataFrame, longest: Mapping[str, int], window: int):
    """Mean tokens of a prompt by part, one stacked bar a domain (`tokens`: domains x PARTS).

    Ticks mark the `longest` prompt of each domain, a dashed line the `window` that prompt and
    answer must fit.
    """
    fig, axis = plt.subplots(figsize=(8.5, 2.4))
    left = pd.Series(0.0, index=tokens.index)
    for part, colour in PARTS.items():
        axis.barh(tokens.index, tokens[part], left=left, color=colour, edgecolor="white")
        middles = left + tokens[part] / 2
        for y, (middle, width) in enumerate(zip(middles, tokens[part], strict=True)):
            if width > 0.03 * window:
                look = {"fontsize": 8, "color": "white" if part in DARK else style.INK}
                axis.text(middle, y, f"{width:.0f}", ha="center", va="center", **look)
        axis.text(middles.iloc[0], -0.5, part, ha="center", va="bottom", fontsize=8)
        left = left + tokens[part]
    ends, last = [longest[domain] for domain in tokens.index], len(tokens) - 1
    axis.plot(ends, range(len(tokens)), "|", color=style.INK, ms=16, mew=1.5)
    style.note(axis, "longest", ends[-1], last, right=4, fontsize=8, va="center")
    axis.axvline(window, color=style.INK, ls="--", lw=1)
    axis.text(window, -0.5, "window ", ha="right", va="bottom", fontsize=8)
    axis.set(xlabel="tokens of a prompt (mean)", xlim=(0, window * 1.02), ylim=(last + 0.5, -0.55))
    axis.tick_params(axis="y", length=0)
    fig.tight_layout()
    return fig


def labels_figure(parts: Sequence[str], target: Sequence[str], columns: int = 42):
    """One training example as the loss sees it: a square a token, read like text.

    Prompt tokens are pale in their part's colour (no loss); the `target`'s are dark, and their
    text stands beside them (the whole loss).
    """
    total = len(parts) + len(target)
    last_row, last_column = divmod(total - 1, columns)
    fig, axis = plt.subplots(figsize=(9.5, 0.24 * (2 + last_row) + 0.9))

    def square(x: float, y: float, colour: str, alpha: float) -> None:
        axis.add_patch(plt.Rectangle((x, y), 0.9, 0.9, facecolor=colour, alpha=alpha, lw=0))

    for i in range(total):
        y, x = divmod(i, columns)
        colour, alpha = (PARTS[parts[i]], 0.35) if i < len(parts) else (style.INK, 1.0)
        square(x + 0.05, y + 0.05, colour, alpha)
    words = "loss here: " + "  ".join(target)
    axis.text(last_column + 1.3, last_row + 0.5, words, va="center", fontsize=8, weight="bold")
    for i, (part, colour) in enumerate(PARTS.items()):
        square(i * 6, -1.6, colour, 0.35)
        axis.text(i * 6 + 1.2, -1.15, part, va="center", fontsize=8)
    axis.set(xlim=(0, columns), ylim=(last_row + 1.1, -1.8), aspect="equal")
    axis.axis("off")
    return fig


@torch.inference_mode()
def token_losses(model, prompter: Prompter, examples: Sequence[Example]) -> list[list[float]]:
    """-log p of each token of each example's target, given the prompt and the target so far."""
    found, pad = [], prompter.tokenizer.pad_token_id
    for example in examples:
        row = prompter.row(example)
        visual = [prompter.visual[asin] for asin in row["visual"]]
        ids = torch.tensor([row["input_ids"]], device=model.device)
        logits = model(inputs_embeds=vision.place(model, ids, visual, pad)).logits[0]
        first = ids.shape[1] - len(prompter.target_ids(example.target))  # where the target begins
        losses = F.cross_entropy(logits[first - 1 : -1].float(), ids[0, first:], reduction="none")
        found.append(losses.tolist())
    return found


def token_figure(losses: Mapping[str, Sequence[float]], tokens: Sequence[str]):
    """Mean loss of each token of a target, before and after (`losses`: name -> one a token).

    `tokens` names them, by those of one example.
    """
    fig, axis = plt.subplots(figsize=(6.5, 2.3))
    colours = (style.GRAY, style.method_colour("LaViC"))
    for shift, colour, (name, values) in zip((-0.2, 0.2), colours, losses.items(), strict=True):
        places = np.arange(len(values)) + shift
        axis.bar(places, values, 0.38, color=colour)
        for x, value in zip(places, values, strict=True):
            look = {"ha": "center", "va": "bottom", "fontsize": 7, "color": colour}
            axis.text(x, value, f"{value:.2f}", **look)
        axis.plot([], [], "s", color=colour, label=name)
    axis.legend(fontsize=8, loc="upper right")
    axis.set_xticks(range(len(tokens)), tokens)
    axis.set(xlabel="token of the target (that of one example)", ylabel="mean of $-\\log p$")
    fig.tight_layout()
    return fig
