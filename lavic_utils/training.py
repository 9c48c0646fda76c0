"""What both training stages share: batches, the loss, adapters, and the Trainer.

A stage is a module whose `forward(batch)` is its mathematics: `distillation.Student`,
`recommendation.Recommender`. PEFT and the Trainer wrap it, so autocast and DDP hold all of it.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import get_last_checkpoint

from lavic_utils.callbacks import Finite, Progress, Saves, remove_broken
from lavic_utils.config import Lora, UserError

IGNORE = -100  # the label of a token that is not scored


# ------------------------------------------------------------ batches and the loss
def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest): targets end together, and generation continues from the last column."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])


def mean_row_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of each row's mean token cross-entropy: a batch equals the mean of its rows.
    logits (batch, kept, vocabulary) of the last `kept` positions; labels (batch, kept - 1), IGNORE
    where not scored. ValueError for a row without a target."""
    predicted = logits[:, :-1].float().flatten(0, 1)  # position i predicts token i + 1
    token_loss = F.cross_entropy(predicted, labels.flatten(), ignore_index=IGNORE, reduction="none")
    counts = (labels != IGNORE).sum(1)
    if (counts == 0).any():
        raise ValueError("a row has no target token left; its prompt was cut wrongly")
    return (token_loss.view(labels.shape).sum(1) / counts).mean()


def target_loss(llava, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """`mean_row_loss` of the targets, by the language model on placed embeddings (batch, length,
    hidden size). Logits are kept from the batch's first target position on only."""
    labels, mask = labels.to(embeds.device), mask.to(embeds.device)
    first = max(1, int((labels != IGNORE).any(0).int().argmax()))
    kept = labels.shape[1] - first + 1
    out = llava(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=kept)
    return mean_row_loss(out.logits, labels[:, first:])


class Stage(nn.Module):
    """A LLaVA-NeXT (`llava`) inside the mathematics of a stage, which a subclass's `forward` holds.
    What else PEFT and the Trainer ask of a model is asked of the one inside."""

    def __init__(self, llava) -> None:
        super().__init__()
        self.llava = llava

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("llava"), name)


# ------------------------------------------------------------ adapters
def lora_config(lora: Lora, target: str) -> LoraConfig:
    sizes = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return LoraConfig(**sizes, target_modules=target)


def add_adapter(model, lora: Lora, target: str):
    """The model (a LLaVA-NeXT, or a stage around one) with a fresh float32 adapter on every linear
    layer that `target` names, put into the model given, which can still be asked by itself.
    ValueError where it names none."""
    return get_peft_model(model, lora_config(lora, target))


def save_adapter(tuned, folder: Path) -> None:
    """A standard peft folder, which `PeftModel.from_pretrained` opens on a LLaVA-NeXT. UserError
    where some B is still zero: nothing was learnt there."""
    tensors = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    zero = [name for name, p in tensors.items() if "lora_B" in name and not p.any()]
    if zero:
        raise UserError(
            f"{folder}: {len(zero)} LoRA B are zero after training (first: {zero[0]}), so nothing "
            "was learnt there; raise the learning rate or the number of examples"
        )
    config = copy.copy(tuned.peft_config["default"])
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    base = tuned.get_base_model().name_or_path
    config.base_model_name_or_path = (
        Path(base).name if Path(base).is_dir() else base
    )  # never a path
    config.save_pretrained(folder)
    plain = {}  # no name says that a stage was around the model
    for name, tensor in tensors.items():
        plain[name.replace("base_model.model.llava.", "base_model.model.")] = tensor.contiguous()
    save_file(plain, folder / "adapter_model.safetensors", {"format": "pt"})


def load_adapter(model, folder: Path):
    """The model with the adapter in `folder`, frozen and in eval mode (a PeftModel). UserError
    unless the file holds every adapter weight of this model and nothing else: keys change across
    versions of the libraries, and one not found would silently stay as initialised."""
    file, again = folder / "adapter_model.safetensors", "run the stage that makes it again"
    if not file.is_file():
        raise UserError(f"{file}: there is no adapter; {again}")
    try:
        tuned = PeftModel.from_pretrained(model, folder)
        with safe_open(file, "pt") as stored:
            found = set(stored.keys())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{folder}: not an adapter of this model ({why}); {again}") from None
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    if found != wanted:
        raise UserError(
            f"{file}: {len(wanted - found)} adapter weights are missing and {len(found - wanted)} "
            f"are unexpected (first: {sorted(found ^ wanted)[0]}); {again}"
        )
    return tuned.eval().requires_grad_(False)


def merged(tuned):
    """A plain model with the adapter in its weights where that is exact (float32); half precision
    would round what was learnt and 4 bits would lose it: there the adapter stays beside them."""
    return tuned.merge_and_unload() if tuned.dtype == torch.float32 else tuned


# ------------------------------------------------------------ the Trainer
def training_arguments(folder: Path, stage, seed: int, dtype, **more) -> TrainingArguments:
    """AdamW and the profile's settings. On a card a model in half precision (`dtype`) trains under
    autocast in the same, one in float32 without."""
    cuda = torch.cuda.is_available()
    seen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if seen and not is_tensorboard_available():
        why = "is set, but tensorboard is not installed: pip install tensorboard, or unset it"
        raise UserError(f"TENSORBOARD_LOGGING_DIR {why}")
    if stage.gradient_checkpointing:
        more["gradient_checkpointing"] = True  # the reentrant kind needs inputs with gradients
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return TrainingArguments(
        output_dir=str(folder),
        optim="adamw_torch_fused",
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup_steps,
        max_grad_norm=1.0,
        num_train_epochs=stage.epochs,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        seed=seed,
        data_seed=seed,
        bf16=cuda and dtype == torch.bfloat16,
        fp16=cuda and dtype == torch.float16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        report_to="tensorboard" if seen else "none",
        disable_tqdm=True,
        **more,
    )


class StageTrainer(Trainer):
    """transformers' Trainer, but a broken run stops, and a killed one goes on as if nothing had
    been: it ends with the same adapter and log, to the bit. `save_minutes`: between checkpoints."""

    def __init__(self, save_minutes: float | None = None, **options) -> None:
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self.add_callback(Finite(self.accelerator))
        self.add_callback(Progress(Path(self.args.output_dir).parent))
        self.add_callback(Saves(save_minutes, self.accelerator))

    def fit(self, folder: Path) -> None:
        """Train, from the newest whole checkpoint if there is one, and leave the adapter in
        `folder`. Of several processes the first alone writes."""
        made = Path(self.args.output_dir)
        if self.is_world_process_zero():
            remove_broken(made)
        self.accelerator.wait_for_everyone()
        gc.freeze()  # the Trainer collects garbage often: what was there before it is left alone
        try:
            self.train(resume_from_checkpoint=get_last_checkpoint(made) if made.is_dir() else None)
            if self.is_world_process_zero():
                save_adapter(self.model, folder)
            self.accelerator.wait_for_everyone()  # nobody reads the checkpoints any more
        finally:
            gc.unfreeze()
            self.release()

    def release(self) -> None:
        """Leave the model as it was given: nothing of the training holds on to it, so it goes from
        memory with its last user."""
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.model.__dict__.pop(name, None)  # autocast around `forward`: the model in a circle
        self.model.zero_grad()
        self.accelerator.free_memory()
        self.optimizer = self.lr_scheduler = self.model_wrapped = None

    def floating_point_ops(self, inputs) -> int:
        return 0  # nobody reads them, and every step would count the model's parameters

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so trainer_state.json, which comes next, is last
