"""LaViC, plainly: both stages and the answers in one file, of torch and transformers alone.

Nothing is imported from the package. What this trains, in float32, without dropout, row by row,
from a given fresh adapter and in a given order, the package must train too: `test_reference.py`
holds losses, likelihoods and answers of the two against each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

IMAGE = "<image>"


class Lora(nn.Module):
    """A frozen linear layer and its adapter: W x + (alpha / r) B A x; B begins at zero."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.linear, self.scale, self.a = linear, scale, nn.Parameter(a.clone())
        self.b = nn.Parameter(torch.zeros(linear.out_features, len(a)))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.a.T @ self.b.T)


class Lavic:
    """The model of a folder, and a profile's `prompts`, `distillation` and `recommendation`, as
    plain dicts."""

    def __init__(self, folder, profile: dict) -> None:
        self.prompts, self.one, self.two = (
            profile[name] for name in ("prompts", "distillation", "recommendation")
        )
        self.model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = LlavaNextImageProcessorPil.from_pretrained(folder)
        self.image_token = self.tokenizer.convert_tokens_to_ids(IMAGE)

    def add(self, fresh: dict[str, torch.Tensor], stage: dict) -> list[nn.Parameter]:
        """Put adapters on the layers that `fresh` names, with these A; what is trained."""
        scale, found = stage["lora"]["alpha"] / stage["lora"]["r"], []
        for name, a in fresh.items():
            parent, _, last = name.rpartition(".")
            layer = Lora(self.model.get_submodule(name), a, scale)
            setattr(self.model.get_submodule(parent), last, layer)
            found += [layer.a, layer.b]
        return found

    # ------------------------------------------------------------ what the model reads
    def cls(self, image) -> torch.Tensor:
        """A picture's visual tokens: the projected [CLS] of each tile, (tiles, hidden size)."""
        tiles = self.images([image], return_tensors="pt")["pixel_values"][0]
        inner = self.model.model
        return inner.multi_modal_projector(inner.vision_tower(tiles).last_hidden_state[:, 0])

    def ids(self, text: str, start: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=start).input_ids

    def embed(self, ids: list[int], visual: list[torch.Tensor]) -> torch.Tensor:
        """(1, length, hidden size), the rows of `visual` where the image token stands."""
        at = torch.tensor(ids)
        slots = at == self.image_token
        embeds = self.model.get_input_embeddings()(at.masked_fill(slots, 0))
        if visual:
            embeds = embeds.index_put((slots.nonzero()[:, 0],), torch.cat(visual))
        return embeds[None]

    def loss(
        self, prompt: list[int], target: list[int], visual: list[torch.Tensor]
    ) -> torch.Tensor:
        """Mean of -log p over the target's tokens."""
        logits = self.model(inputs_embeds=self.embed(prompt + target, visual)).logits[0]
        return F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(target))

    def chat(self, message: str) -> list[int]:
        return self.ids(self.prompts["chat"].format(message=message), start=True)

    def end(self, text: str) -> list[int]:
        return [*self.ids(text), self.tokenizer.eos_token_id]

    def description(self, title: str, tiles: int, said: str) -> tuple[list[int], list[int]]:
        """Stage 1: (prompt, target)."""
        asked = self.prompts["describe"].format(title=title, image=IMAGE * tiles)
        return self.chat(asked), self.end(said)

    def request(self, turns, items, visual: dict) -> list[int]:
        """Stage 2: the prompt of a dialogue, [(role, text)], and items, [(id, title)]. Where it is
        too long, comments leave, the oldest first, and then the oldest words."""
        room, turns = self.two["max_length"] - self.two["max_new_tokens"], list(turns)
        while len(ids := self._request(turns, items, visual)) > room:
            comments = [i for i, (role, _) in enumerate(turns[:-1]) if role != "seeker"]
            if comments:
                turns.pop(comments[0])
                continue
            role, text = turns.pop(0)
            if rest := text.split()[1:]:
                turns.insert(0, (role, " ".join(rest)))
        return ids

    def _request(self, turns, items, visual: dict) -> list[int]:
        dialogue = "".join(self.prompts[role].format(text=text) for role, text in turns)
        lines = ""
        for asin, title in items:
            form = self.prompts["candidate" if asin in visual else "candidate_without_image"]
            lines += form.format(id=asin, title=title, image=IMAGE)
        found, shown = [], [asin for asin, _ in items if asin in visual]
        for token in self.chat(
            self.prompts["recommend"].format(dialogue=dialogue, candidates=lines)
        ):
            many = len(visual[shown.pop(0)]) if token == self.image_token else 1
            found += [token] * many
        return found

    # ------------------------------------------------------------ the two stages
    def fit(self, trained: list[nn.Parameter], stage: dict, batches: list, loss_of) -> list[float]:
        """A step of AdamW a batch of rows; the loss of each step."""
        how = {"lr": stage["learning_rate"], "weight_decay": stage["weight_decay"]}
        optimizer, losses = torch.optim.AdamW(trained, **how), []
        for batch in batches:
            if callable(batch):  # an epoch is over
                batch()
                continue
            loss = torch.stack([loss_of(i) for i in batch]).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def distil(self, rows, valid, epochs: list[list[list[int]]], fresh: dict) -> tuple[list, list]:
        """Stage 1 on rows of (picture, title, description): the losses of all steps and, by epoch,
        of validation; the epoch with the lowest stays. `epochs`: batches of indices of `rows`."""
        trained, kept = self.add(fresh, self.one), []

        def loss_of(row):
            visual = self.cls(row[0])
            return self.loss(*self.description(row[1], len(visual), row[2]), [visual])

        def epoch_ends():
            with torch.no_grad():
                mean = torch.stack([loss_of(row) for row in valid]).mean().item()
            kept.append((mean, [p.detach().clone() for p in trained]))

        batches = [batch for epoch in epochs for batch in (*epoch, epoch_ends)]
        losses = self.fit(trained, self.one, batches, lambda i: loss_of(rows[i]))
        best = min(kept, key=lambda one: one[0])[1]
        for parameter, value in zip(trained, best, strict=True):
            parameter.data.copy_(value)
            parameter.requires_grad_(False)
        return losses, [mean for mean, _ in kept]

    @torch.no_grad()
    def look(self, pictures: dict) -> dict[str, torch.Tensor]:
        """Item -> its visual tokens, constants from here on."""
        return {asin: self.cls(image) for asin, image in pictures.items()}

    def recommend(self, rows, visual: dict, batches: list[list[int]], fresh: dict) -> list[float]:
        """Stage 2 on rows of (turns, items, right id): the loss of each step."""

        def loss_of(i: int):
            turns, items, right = rows[i]
            prompt = self.request(turns, items, visual)
            target = self.end(self.prompts["answer"].format(id=right))
            return self.loss(prompt, target, [visual[a] for a, _ in items if a in visual])

        return self.fit(self.add(fresh, self.two), self.two, batches, loss_of)

    @torch.no_grad()
    def answer(self, turns, items, visual: dict) -> tuple[str, list[float]]:
        """What it writes, and the mean log-likelihood of each item's id."""
        prompt = self.request(turns, items, visual)
        looks, means = [visual[asin] for asin, _ in items if asin in visual], []
        for asin, _ in items:
            target = self.end(self.prompts["answer"].format(id=asin))
            means.append(-self.loss(prompt, target, looks).item())
        how = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        out = self.model.generate(
            inputs_embeds=self.embed(prompt, looks),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=self.two["max_new_tokens"],
            **how,
        )
        return self.tokenizer.decode(out[0], skip_special_tokens=True).strip(), means
