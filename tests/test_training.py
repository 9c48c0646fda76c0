"""What both stages share, on a random tiny model: adapters checked when saved and loaded,
checkpointing, accumulation, runs that half precision broke, models that cannot be had."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from peft.utils import save_and_load
from PIL import Image
from safetensors.torch import load_file, save_file
from stand_ins import trainable_names
from transformers import TrainerCallback, TrainerControl, TrainerState

from lavic_utils import callbacks, loading, provenance, training, vision
from lavic_utils import distillation as dist
from lavic_utils import recommendation as rec
from lavic_utils.config import PACKAGE, ROOT, Lora, UserError, load_profile
from lavic_utils.mini import model as minimodel

LORA = Lora(r=4, alpha=8, dropout=0.0)


def trained(model, target=rec.LANGUAGE_LINEAR):
    torch.manual_seed(3)
    tuned = training.add_adapter(model, LORA, target)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return tuned


IDS = torch.arange(5, 45)[None]


# ---------------------------------------------------------------- adapters
@pytest.mark.parametrize("target", [dist.VISION_LINEAR, rec.LANGUAGE_LINEAR])
def test_a_saved_adapter_comes_back_whole(model, processor, tmp_path, target):
    tuned = trained(model, target).eval()
    training.save_adapter(tuned, tmp_path)
    fresh = training.load_adapter(minimodel.build_model(processor, seed=1), tmp_path)
    ours = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in fresh.named_parameters() if "lora_" in n}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not trainable_names(fresh) and not fresh.training


def test_an_adapter_names_its_base_and_has_a_filled_card(model, processor, tmp_path):
    """Never a path of this machine; what it was made of and how well it does, as the hub shows."""
    adapter = tmp_path / "mini" / "seed1" / "stage2" / "adapter"
    model.name_or_path = str(PACKAGE / "mini_model")
    tuned = trained(model)
    training.save_adapter(tuned, adapter)
    result = {"log": [{"step": 1, "loss": 3.5}, {"step": 2, "loss": 1.25}]}
    about = provenance.provenance(load_profile("mini"), 1, "d4ta")
    provenance.write_json(adapter.parent / "result.json", {"provenance": about, "result": result})
    before = provenance.folder_hash(adapter)
    provenance.write_card(adapter.parent, **{"HR@1, test": 0.125})
    assert provenance.folder_hash(adapter) == before  # no stage that reads it is made again
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "mini_model"
    for row in ("tier | mini run", "data hash | d4ta", "loss | 1.25", "HR@1, test | 0.125"):
        assert f"| {row} |" in card
    written = "".join(p.read_text(encoding="utf-8") for p in adapter.glob("*.[jm][sd]*"))
    assert str(ROOT) not in written and str(tmp_path) not in written
    model.name_or_path = "someone/their-model"
    training.save_adapter(tuned, adapter)
    assert '"someone/their-model"' in (adapter / "adapter_config.json").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error:Could not find a config file")
def test_nobody_asks_the_hub_for_the_model_that_an_adapter_changes(
    processor, tmp_path, monkeypatch
):
    """Neither where checkpoints and adapters are saved nor where one is loaded."""
    asked = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *a: asked.append(a))
    tuned, options = student(processor, tmp_path, 2, 1)
    tuned.get_base_model().llava.name_or_path = "someone/their-model"
    options["args"].save_strategy = "steps"
    training.StageTrainer(**options).fit(tmp_path / "adapter")
    assert list(tmp_path.glob("2/checkpoint-*/adapter_model.safetensors"))
    base = minimodel.build_model(processor, seed=1)
    fresh = training.load_adapter(base, tmp_path / "adapter")
    assert fresh.peft_config["default"].base_model_name_or_path == "someone/their-model"
    assert asked == []
    with pytest.warns(UserWarning, match="Could not find a config file"):
        save_and_load.get_peft_model_state_dict(fresh)  # negative control: as peft does it
    assert asked == [("someone/their-model", "config.json")]


def test_tensorboard_is_told_where_its_folder_is_named(tmp_path, monkeypatch):
    def reports() -> list[str]:
        settings = load_profile("mini").distillation
        return training.training_arguments(tmp_path, settings, 1, torch.float32).report_to

    monkeypatch.setattr(training, "is_tensorboard_available", lambda: True)
    assert reports() == []
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    assert reports() == ["tensorboard"]
    monkeypatch.setattr(training, "is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match="TENSORBOARD_LOGGING_DIR is set, but tensorboard is not"):
        reports()  # before hours of training without a curve


def spoil(folder, change):
    weights = change(load_file(folder / "adapter_model.safetensors"))
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: dict(list(w.items())[1:]), "1 adapter weights are missing and 0 are unexpected"),
        (
            lambda w: w | {"base_model.model.extra.lora_A.weight": torch.zeros(2)},
            "missing and 1 are unexpected",
        ),
        (
            lambda w: {
                k.replace("base_model.model.model", "base_model.model"): v for k, v in w.items()
            },
            "84 adapter weights",
        ),
        (
            lambda w: {k: v[:, :3].contiguous() for k, v in w.items()},
            "not an adapter of this model",
        ),
    ],
)
def test_a_wrong_adapter_is_one_clear_line(model, processor, tmp_path, change, said):
    training.save_adapter(trained(model), tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(UserError, match=said) as error:
        training.load_adapter(minimodel.build_model(processor, seed=1), tmp_path)
    assert "\n" not in str(error.value)


def test_peft_itself_takes_an_adapter_with_a_missing_weight(model, processor, tmp_path):
    training.save_adapter(trained(model), tmp_path)
    spoil(tmp_path, lambda w: dict(list(w.items())[1:]))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(
            minimodel.build_model(processor, seed=1), tmp_path
        )  # why load_adapter exists


def test_no_adapter_is_one_clear_line(model, tmp_path):
    with pytest.raises(UserError, match="there is no adapter"):
        training.load_adapter(model, tmp_path)


def test_an_adapter_that_learnt_nothing_is_not_saved(model, tmp_path):
    with pytest.raises(UserError, match="84|42 LoRA B are zero"):
        training.save_adapter(
            training.add_adapter(model, LORA, rec.LANGUAGE_LINEAR), tmp_path / "a"
        )
    assert not (tmp_path / "a").exists()


def test_adapters_are_merged_in_float32_only(model, processor):
    tuned = trained(model).eval()
    with torch.inference_mode():
        before = tuned(input_ids=IDS).logits
        plain = training.merged(tuned)
        assert not isinstance(plain, PeftModel) and torch.allclose(
            plain(input_ids=IDS).logits, before, atol=1e-4
        )
    low = trained(minimodel.build_model(processor, seed=1).to(torch.bfloat16))
    assert training.merged(low) is low
    assert {p.dtype for n, p in low.named_parameters() if "lora_" in n} == {torch.float32}


# ---------------------------------------------------------------- checkpointing
def gradients(model, **checkpointing) -> tuple[dict, int]:
    """Gradients of one step, and the bytes that autograd kept for the way back."""
    tuned = trained(model).train()
    if checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = (
            tuned(inputs_embeds=tuned.get_input_embeddings()(IDS.repeat(4, 1)))
            .logits.square()
            .mean()
        )
    if loss.requires_grad:
        loss.backward()
    return (
        {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None},
        sum(size for place, size in kept.items() if place not in weights),
    )


def test_checkpointing_keeps_less_and_changes_nothing(processor):
    fresh = [
        minimodel.build_model(processor, seed=seed).requires_grad_(False) for seed in (1, 1, 2)
    ]
    plain, most = gradients(fresh[0])
    ours, least = gradients(fresh[1], use_reentrant=False)
    assert len(plain) == 84 and plain.keys() == ours.keys()
    assert all(torch.allclose(plain[n], ours[n], atol=1e-7) for n in plain) and least < most / 2
    other, _ = gradients(fresh[2], use_reentrant=False)
    assert not any(torch.allclose(plain[n], other[n], atol=1e-7) for n in plain)  # negative control


# ---------------------------------------------------------------- the Trainer
def student(processor, tmp_path, batch: int, accumulation: int):
    torch.manual_seed(0)
    profile = load_profile("mini")
    stage = profile.distillation.model_copy(
        update={
            "batch_size": batch,
            "gradient_accumulation": accumulation,
            "epochs": 1,
            "lora": LORA,
            "warmup_steps": 0,
            "schedule": "constant",
        }
    )
    base = minimodel.build_model(processor, seed=1).requires_grad_(False)
    rows = []
    for i in range(4):
        Image.linear_gradient("L").rotate(90 * i).resize((96, 96)).convert("RGB").save(
            tmp_path / f"{i}.png"
        )
        rows.append(
            dist.Picture(
                str(i), "Velora jar", tmp_path / f"{i}.png", "red and plain" + ", round" * i
            )
        )
    profile = profile.model_copy(update={"distillation": stage})
    tuned = training.add_adapter(dist.Student(base), LORA, dist.VISION_LINEAR)
    arguments = training.training_arguments(
        tmp_path / f"{batch}", stage, 0, torch.float32, save_strategy="no", logging_steps=1
    )
    return tuned, dict(
        model=tuned,
        processing_class=processor.tokenizer,
        train_dataset=rows,
        args=arguments,
        data_collator=dist.StudentCollator(
            base, processor, profile, dist.Pictures(processor, True)
        ),
    )


def test_accumulated_batches_equal_one_batch(processor, tmp_path):
    def once(kind, batch, accumulation):
        tuned, options = student(processor, tmp_path, batch, accumulation)
        trainer = kind(**options)
        trainer.train()
        first = trainer.state.log_history[0]
        return first["loss"], first["grad_norm"]

    whole, parts = once(training.StageTrainer, 4, 1), once(training.StageTrainer, 1, 4)
    assert parts == pytest.approx(whole, rel=1e-4)

    class Added(training.StageTrainer):
        loss_is_scaled_for_ga = True  # control: the four batches are added up

    assert once(Added, 1, 4)[1] == pytest.approx(4 * whole[1], rel=1e-3)


def test_a_student_of_mean_patches_trains_all_layers_but_the_last(processor, tmp_path):
    """The last layer makes no patch tokens; with it in, `save_adapter` would find B still zero."""
    rows = student(processor, tmp_path, 2, 1)[1]["train_dataset"]
    quick = {"batch_size": 2, "epochs": 1, "warmup_steps": 0, "lora": LORA}
    profile = load_profile("mini")
    stage = profile.distillation.model_copy(update=quick)
    profile = profile.model_copy(update={"distillation": stage})
    for folder, how in (("mean", vision.patch_tokens), ("cls", vision.cls_tokens)):
        base = minimodel.build_model(processor, seed=1).eval().requires_grad_(False)
        about = profile, base, processor, rows, rows, tmp_path / folder, 0, None, how
        assert dist.distil(*about)[0]["valid_loss"] > 0
        saved = load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")
        last = base.config.vision_config.num_hidden_layers - 1
        layers = {i for i in range(last + 1) if any(f".layers.{i}." in name for name in saved)}
        assert layers == set(range(last + (how is vision.cls_tokens)))


@pytest.mark.parametrize("released", [True, False])
def test_a_trained_model_goes_with_its_last_user(processor, tmp_path, monkeypatch, released):
    """In autocast, as on a card: which puts the model in a circle with its own `forward`, and the
    stage's whole mathematics, the vision tower too, under half precision."""
    tuned, options = student(processor, tmp_path, 2, 1)
    options["args"].mixed_precision = "bf16"
    first, under = "vision_tower.encoder.layers.0.mlp.fc1", []
    layer = tuned.get_base_model().llava.model.get_submodule(first)
    layer.register_forward_pre_hook(lambda *_: under.append(torch.is_autocast_enabled("cpu")))
    if not released:  # negative control
        monkeypatch.setattr(training.StageTrainer, "release", lambda self: None)
    gc.collect()
    gc.disable()
    try:
        training.StageTrainer(**options).fit(tmp_path / "adapter")
        assert under == [True, True] and (tmp_path / "adapter").is_dir()
        alive = weakref.ref(tuned)
        del tuned, options, layer
        assert (alive() is None) is released
    finally:
        gc.enable()


def test_worker_processes_change_no_loss(processor, tmp_path):
    def losses(workers: int) -> list[float]:
        _, options = student(processor, tmp_path, 2, 1)
        options["args"].dataloader_num_workers = workers
        options["args"].dataloader_persistent_workers = workers > 0
        trainer = training.StageTrainer(**options)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    alone = losses(0)
    assert len(alone) == 2 and losses(2) == alone and alone[0] != alone[1]


def test_checkpoints_come_by_minutes_with_a_log_but_not_where_an_epoch_ends(monkeypatch):
    def saved(minutes: float | None, logging_steps: int = 1) -> list[int]:
        one = SimpleNamespace(gather=lambda flag: flag, device="cpu")
        saves, now, steps = callbacks.Saves(minutes, one), [0.0], []
        monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
        saves.on_train_begin(None, TrainerState(), None)
        for step in range(1, 21):  # half a minute each; 10 an epoch
            now[0] += 30
            state = TrainerState(global_step=step, max_steps=20, num_train_epochs=2)
            control = TrainerControl(should_log=step % logging_steps == 0)
            saves.on_step_end(None, state, control)
            if control.should_save:
                steps.append(step)
                saves.on_save(None, SimpleNamespace(is_world_process_zero=False), None)
        return steps

    assert saved(None) == [] and saved(2) == [4, 8, 12, 16]
    assert saved(2, logging_steps=3) == [6, 12, 18] and saved(5) == [11]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("logged", [True, False])
def test_a_stopped_run_ends_with_the_log_and_adapter_of_a_whole_one(
    processor, tmp_path, monkeypatch, logged
):
    """Four steps an epoch, a log every three: one of them would span the checkpoint at step 4."""
    if not logged:  # negative control
        monkeypatch.setattr(callbacks.Saves, "on_epoch_end", lambda *_, **__: None)

    def fit(folder, *callbacks) -> list[float]:
        folder.mkdir(exist_ok=True)
        options = student(processor, folder, 1, 1)[1]
        args = options["args"]
        args.num_train_epochs, args.logging_steps, args.save_strategy = 2, 3, "epoch"
        trainer = training.StageTrainer(1e-6, callbacks=list(callbacks), **options)
        trainer.fit(folder / "adapter")
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", Stop())
    assert {p.name for p in tmp_path.glob("stopped/1/*")} == {"checkpoint-3", "checkpoint-4"}
    assert (fit(tmp_path / "stopped") == whole) is logged
    one, other = (load_file(p) for p in sorted(tmp_path.glob("*/adapter/*.safetensors")))
    assert one and all(torch.equal(one[name], other[name]) for name in one)


def test_an_epochs_training_loss_is_the_mean_over_its_steps():
    log = [{"step": 2, "loss": 1.0}, {"step": 3, "loss": 4.0}, {"epoch": 1.0, "eval_loss": 0.0}]
    log += [{"step": 6, "loss": 3.0}, {"epoch": 2.0, "eval_loss": 0.0}]
    assert [row["train_loss"] for row in dist.epoch_history(log)] == [2.0, 3.0]


def test_how_far_a_stage_is_stands_in_the_log_and_nowhere_else(
    processor, tmp_path, caplog, capfd, monkeypatch
):
    def lines() -> list[str]:
        _, options = student(processor, tmp_path, 1, 1)
        options["eval_dataset"] = options["train_dataset"]
        trainer = training.StageTrainer(**options)
        trainer.train()
        trainer.evaluate()
        return [record.getMessage() for record in caplog.records if "left" in record.getMessage()]

    monkeypatch.setattr(callbacks, "QUIET", 0)
    caplog.set_level(logging.WARNING, "lavic_utils")  # as in a notebook
    assert lines() == [] and "left" not in "".join(capfd.readouterr())
    with caplog.at_level(logging.INFO, "lavic_utils"):
        found = lines()
    assert len(found) == 5 and found[0].startswith(f"{tmp_path.parent.name}/{tmp_path.name}, ")
    assert "steps: 2 of 4, loss " in found[1] and found[3].endswith("0:00:00 left")
    assert "validation: 1 of 1, 0:00:00 left" in found[4]
    monkeypatch.setattr(callbacks, "QUIET", 60)
    caplog.clear()
    with caplog.at_level(logging.INFO, "lavic_utils"):
        assert lines() == []  # not more often than that


def guard(skipped: bool):
    return callbacks.Finite(SimpleNamespace(optimizer_step_was_skipped=skipped))


def test_a_broken_run_stops_with_one_line():
    state, control = TrainerState(global_step=30), TrainerControl()
    guard(False).on_log(None, state, control, {"loss": 0.5, "eval_loss": 1.0})
    with pytest.raises(UserError, match="step 30: loss is nan"):
        guard(False).on_log(None, state, control, {"loss": float("nan")})
    with pytest.raises(UserError, match="eval_loss is inf"):
        guard(False).on_log(None, state, control, {"eval_loss": float("inf")})
    searching = guard(True)
    for _ in range(20):  # finding a loss scale is no failure
        searching.on_step_end(None, state, control)
    with pytest.raises(UserError, match="float16 gradients overflow"):
        for _ in range(10):
            searching.on_step_end(None, state, control)


def test_a_nan_loss_stops_a_real_run(processor, tmp_path):
    tuned, options = student(processor, tmp_path, 2, 1)
    for name, p in tuned.named_parameters():
        if "lora_A" in name:
            p.data.fill_(float("nan"))
    with pytest.raises(UserError, match="step 1: loss is nan"):
        training.StageTrainer(**options).train()


@pytest.mark.parametrize(
    ("name", "capability", "precision"),
    [
        ("mini", (9, 0), (False, False)),
        ("mini", (7, 5), (False, False)),
        ("paper", (9, 0), (True, False)),
        ("paper", (7, 5), (False, True)),
        ("paper", None, (False, False)),
    ],
)
def test_float32_on_a_card_trains_without_autocast(
    monkeypatch, tmp_path, name, capability, precision
):
    """A faked card: `bf16` and `fp16` follow the profile's dtype; the processor has neither."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(training, "TrainingArguments", lambda **options: SimpleNamespace(**options))
    profile = load_profile(name)
    found = training.training_arguments(tmp_path, profile.distillation, 0, loading.dtype(profile))
    assert (found.bf16, found.fp16) == precision and found.use_cpu is (capability is None)


def test_an_adapter_of_a_stage_is_saved_as_the_models_own(model, processor, tmp_path):
    """Trained around a `Recommender`, opened by peft alone on a LLaVA-NeXT; the model given answers
    with it, too."""
    plain = model(input_ids=IDS).logits
    tuned = training.add_adapter(rec.Recommender(model), LORA, rec.LANGUAGE_LINEAR)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    training.save_adapter(tuned, tmp_path)
    opened = PeftModel.from_pretrained(minimodel.build_model(processor, seed=1).eval(), tmp_path)
    expected = model.eval()(input_ids=IDS).logits
    assert torch.equal(opened(input_ids=IDS).logits, expected) and not torch.allclose(
        expected, plain, atol=1e-3
    )
    assert not any("llava" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


# ---------------------------------------------------------------- the 7B profiles
@pytest.mark.parametrize("name", ["t4", "paper"])
def test_the_7b_profiles_name_a_pinned_model_and_the_papers_batch(name):
    profile = load_profile(name)
    assert profile.model == "llava-hf/llava-v1.6-mistral-7b-hf" and len(profile.revision) == 40
    one, two = profile.distillation, profile.recommendation
    assert (
        one.batch_size * one.gradient_accumulation == 4
        and two.batch_size * two.gradient_accumulation == 1
    )
    assert (
        two.gradient_checkpointing
        and one.workers > 0 < one.save_minutes == two.save_minutes <= 15
        and profile.dtype == "half"
        and profile.quantize_4bit is (name == "t4")
    )


def test_a_model_that_cannot_be_had_is_one_line_with_size_and_command(monkeypatch):
    monkeypatch.setattr("lavic_utils.hub.HubModel.cached", lambda self: False)
    for load in (loading.load_model, loading.load_processor):
        with pytest.raises(UserError, match=r"15.1 GB.*hf download .*52320fb52229"):
            load(load_profile("paper"))


def test_four_bits_without_a_card_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"requirements-gpu\.lock"):
        loading.load_model(load_profile("t4"))


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_half_precision_follows_the_card(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert loading.half() == dtype


def test_the_mini_profile_keeps_its_settings():
    profile = load_profile("mini")
    assert (
        json.loads(profile.model_dump_json())["dtype"] == "float32"
        and profile.distillation.teacher_batch_size == 48
    )
    assert (
        profile.distillation.eval_batch_size == 64
        and not profile.recommendation.gradient_checkpointing
    )
