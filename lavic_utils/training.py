"""What both training stages share: adapters (made, checked, saved, loaded), the Trainer and its arguments.

A stage is a module whose `forward(batch)` is its mathematics: `distillation.Student`, `recommendation.Recommender`. PEFT and the
Trainer wrap that module, so autocast and DDP hold all of it.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lavic_utils import vision
from lavic_utils.config import Lora, UserError


class Stage(nn.Module):
    """A LLaVA-NeXT (`llava`) inside the mathematics of a stage, which a subclass's `forward(batch)` holds. What else PEFT and
    the Trainer ask of a model (its configuration, dtype, checkpointing) is asked of the one inside."""

    def __init__(self, llava) -> None:
        super().__init__()
        self.llava, self.name_or_path = llava, llava.name_or_path

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("llava"), name)


def lora_config(lora: Lora, target: str) -> LoraConfig:
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target)


def trainable_names(model) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def add_adapter(model, lora: Lora, target: str):
    """The model (a LLaVA-NeXT, or a stage around one) with a fresh adapter in float32 on every linear layer that `target`
    names, ready to train. The layers are put into the model given, which can still be asked and generate by itself. Raises
    RuntimeError where anything else would be trained."""
    tuned = get_peft_model(model, lora_config(lora, target))
    check_trainable(tuned, target)
    kernel = vision.attention(model.dtype)
    if kernel != "sdpa":
        model.set_attn_implementation(kernel)
    return tuned


def check_trainable(tuned, target: str) -> None:
    """Exactly A and B of every layer that `target` names are trained; RuntimeError with examples otherwise."""
    layers = [name for name, layer in tuned.named_modules() if isinstance(layer, LoraLayer) and re.fullmatch(target, name)]
    expected = {f"{name}.lora_{side}.default.weight" for name in layers for side in "AB"}
    wrong = sorted(expected ^ set(trainable_names(tuned)))
    if wrong or not expected:
        raise RuntimeError(f"trained and intended parameters differ in {len(wrong)} of {len(expected)} names: {wrong[:3]}")


def save_adapter(tuned, folder: Path) -> None:
    """A standard peft folder, which `PeftModel.from_pretrained` opens on a LLaVA-NeXT: no name says that a stage was around it.
    Raises UserError where some B is still zero: that layer was never trained."""
    tensors = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    zero = [name for name, p in tensors.items() if "lora_B" in name and not p.any()]
    if zero:
        raise UserError(f"{folder}: {len(zero)} LoRA B are zero after training (first: {zero[0]}), so nothing was learnt there; "
                        "raise the learning rate or the number of examples")
    config = copy.copy(tuned.peft_config["default"])
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.save_pretrained(folder)
    plain = {name.replace("base_model.model.llava.", "base_model.model."): p.contiguous() for name, p in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", {"format": "pt"})


def load_adapter(model, folder: Path):
    """The model with the adapter in `folder`, frozen and in eval mode (a PeftModel; `merged` gives a plain one).

    Raises UserError unless the file holds every adapter weight of this model and nothing else: keys have changed across
    versions of the libraries, and a weight that is not found would silently stay as initialised.
    """
    file, again = folder / "adapter_model.safetensors", "run the stage that makes it again"
    if not file.is_file():
        raise UserError(f"{file}: there is no adapter; {again}")
    try:
        tuned = PeftModel.from_pretrained(model, folder)
        with safe_open(file, "pt") as stored:
            found = set(stored.keys())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: not an adapter of this model ({' '.join(str(error).split())[:120]}); {again}") from None
    wanted = set(get_peft_model_state_dict(tuned))
    if found != wanted:
        first = sorted(found ^ wanted)[0]
        raise UserError(f"{file}: {len(wanted - found)} adapter weights are missing and {len(found - wanted)} are unexpected "
                        f"(first: {first}); {again}")
    return tuned.eval().requires_grad_(False)


def merged(tuned):
    """A plain model with the adapter in its weights where that is exact to rounding (float32); half precision would round
    what was learnt and 4 bits would lose it, so there the adapter stays beside them."""
    return tuned.merge_and_unload() if tuned.dtype == torch.float32 else tuned


def training_arguments(folder: Path, stage, seed: int, dtype: torch.dtype, **more) -> TrainingArguments:
    """What both stages share: AdamW, constant settings of the profile, no reporting. On a card a model in half precision
    (`dtype`, see `vision.dtype`) trains under autocast in the same, one in float32 without.

    AdamW on plain float32 adapters everywhere: they have 21 million parameters at most, so that paged or 8-bit states
    would save 0.1 GB of 8. Checkpointing is non-reentrant: the other kind needs inputs that carry gradients.
    """
    cuda = torch.cuda.is_available()
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}
                     } if stage.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=str(folder), learning_rate=stage.learning_rate, weight_decay=stage.weight_decay,
        per_device_train_batch_size=stage.batch_size, gradient_accumulation_steps=stage.gradient_accumulation,
        num_train_epochs=stage.epochs, max_grad_norm=1.0, seed=seed, data_seed=seed,
        bf16=cuda and dtype == torch.bfloat16, fp16=cuda and dtype == torch.float16,
        optim="adamw_torch_fused", logging_nan_inf_filter=False, use_cpu=not cuda, ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False, remove_unused_columns=False, report_to=[], disable_tqdm=True, logging_strategy="steps",
        lr_scheduler_type=stage.schedule, warmup_steps=stage.warmup_steps, label_names=["labels"],
        dataloader_pin_memory=cuda, **checkpointing, **more)


class StageTrainer(Trainer):
    """What both stages share: a broken run stops; a killed one goes on as if nothing had been. A stage's loss is a mean over
    rows, and of accumulated batches the Trainer takes the mean."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self.add_callback(Finite(self.accelerator))
        self.add_callback(Resumed(self))

    def fit(self, folder: Path) -> None:
        """Train, from the newest whole checkpoint if there is one, and leave the adapter in `folder`. Of several processes
        the first alone writes."""
        made = Path(self.args.output_dir)
        if self.is_world_process_zero():
            remove_broken(made)
        self.accelerator.wait_for_everyone()
        self.train(resume_from_checkpoint=get_last_checkpoint(made) if made.is_dir() else None)
        if self.is_world_process_zero():
            save_adapter(self.model, folder)
        self.accelerator.wait_for_everyone()  # nobody reads the checkpoints any more: they may be removed

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so that trainer_state.json, which comes next, is last

    def _save_checkpoint(self, model, trial) -> None:
        self.state.stateful_callbacks[Resumed.__name__] = {
            "loss": self.accelerator.gather(self._tr_loss).mean().item(), "since": self._globalstep_last_logged}
        super()._save_checkpoint(model, trial)


def remove_broken(folder: Path) -> None:
    """Remove the checkpoints that a kill left half-written: those without a whole trainer_state.json, which is written last."""
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)


class Resumed(TrainerCallback):
    """What the Trainer itself forgets in a resumed run: the losses since the last log, whose mean the next log shows, and
    where the best checkpoint is now (it keeps the path of the first run)."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        if kept := state.stateful_callbacks.get(Resumed.__name__):
            self.trainer._tr_loss += kept["loss"]
            self.trainer._globalstep_last_logged = kept["since"]
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")


class Reseeded(TrainerCallback):
    """Every epoch's random state follows from seed and epoch alone, so that the order of rows is the same in a resumed run
    and in every process."""

    def on_epoch_begin(self, args, state, control, **_):
        torch.manual_seed(args.seed + int(state.epoch or 0))


class Finite(TrainerCallback):
    """Stops a run that half precision has broken: a loss that is no number, or steps skipped again and again because
    gradients overflow at every loss scale (a scale is found within some 16 steps)."""

    def __init__(self, accelerator) -> None:
        self.accelerator, self.skipped = accelerator, 0

    def on_step_end(self, args, state, control, **_):
        self.skipped += bool(self.accelerator.optimizer_step_was_skipped)
        if self.skipped > 20 + state.global_step // 10:
            raise UserError(f"training stopped at step {state.global_step}: {self.skipped} steps were skipped because float16 "
                            "gradients overflow; lower the learning rate, or use a card that computes in bfloat16")

    def on_log(self, args, state, control, logs, **_):
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0)):
                raise UserError(f"training stopped at step {state.global_step}: {name} is {logs[name]}; "
                                "lower the learning rate, or use dtype float32 or a card that computes in bfloat16")
