"""How surprised a model is by each token of its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from lavic_utils import vision
from lavic_utils.figures import style
from lavic_utils.recommendation import Example, Prompter


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
    fig, axis = plt.subplots(figsize=(6.5, 2.2))
    colours = (style.GRAY, style.method_colour("LaViC"))
    for shift, colour, (name, values) in zip((-0.2, 0.2), colours, losses.items(), strict=True):
        bars = axis.bar(np.arange(len(values)) + shift, values, 0.38, color=colour, label=name)
        axis.bar_label(bars, fmt="%.2f", color=colour)
    axis.legend(loc="upper right")
    axis.set_xticks(range(len(tokens)), tokens)
    axis.set(xlabel="token of the target (that of one example)", ylabel="mean of $-\\log p$")
    fig.tight_layout()
    return fig
