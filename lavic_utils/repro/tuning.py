"""`tune`: every trained arm over the same few learning rates, judged on validation.

The search is kept as `results/<profile>/tuning.json`; what it chooses goes into the profile, by
hand, as `arms`. Each training is a stage like any other: a killed search goes on.
"""

from __future__ import annotations

from dataclasses import replace

from lavic_utils import methods
from lavic_utils.config import Profile, UserError, results_dir
from lavic_utils.experiment import Experiment
from lavic_utils.provenance import write_kept

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
DOMAIN = "beauty"  # one of three: what it chooses holds for all
ARMS = ("LaViC", "LaViC w/o self-distillation", "LaViC w/o images", "Entire tokens (5x577)")
RULE = (
    f"highest mean of the two readings on {DOMAIN}; of those within one conversation of it, "
    "the lowest learning rate"
)


def tune(profile: Profile) -> list[str]:
    """Train every arm with every rate on DOMAIN, write the table, and say for each arm which
    rate it chooses and which one the profile has. UserError where that would take days."""
    if not profile.world:
        raise UserError(f"profile {profile.name}: only the mini world is searched; take mini")
    trials, own = {}, dict(profile.arms)
    for arm in ARMS:
        for rate in RATES:
            trial = replace(methods.find(arm), name=f"{arm} at {rate:g}")
            methods.EXTENDED[trial.name] = trial
            own[trial.name] = profile.arms.get(arm, {}) | {"learning_rate": rate}
            trials[arm, rate] = trial.name
    run = Experiment(profile.model_copy(update={"arms": own})).prepare()
    rows, said = [], []
    for arm in ARMS:
        tried = [measured(run, trials[arm, rate], arm, rate) for rate in RATES]
        best = choose(tried)
        rows += [row | {"chosen": row is best} for row in tried]
        rate, has = best["setting"]["learning_rate"], profile.arm(arm).recommendation.learning_rate
        said.append(
            f"{arm}: {rate:g} is chosen on validation (HR@1 {best['hit_ratio']:.3f} by generating, "
            f"{best['hit_ratio_scored']:.3f} by scoring); the profile has {has:g}"
        )
    path = results_dir(profile) / "tuning.json"
    write_kept(path, {"provenance": run.stamp(), "rule": RULE, "rows": rows})
    return [*said, str(path)]


def choose(tried: list[dict]) -> dict:
    """What RULE chooses among the rows of one arm, which stand in the order of their rates."""
    means = [(row["hit_ratio"] + row["hit_ratio_scored"]) / 2 for row in tried]
    least = max(means) - 1.001 / tried[0]["conversations"]
    return next(row for row, mean in zip(tried, means, strict=True) if mean >= least)


def measured(run: Experiment, trial: str, arm: str, rate: float) -> dict:
    """A row of the table: validation HR@1 by both readings over DOMAIN's conversations, and the
    optimiser steps."""
    steps, right = run.tune(trial, DOMAIN)["steps"], {}
    for reading in ("recommended", "scored"):
        right[reading] = run.hits(trial, DOMAIN, reading, split="valid")
    generated, scored = (sum(found) / len(found) for found in right.values())
    row = {"arm": arm, "domain": DOMAIN, "setting": {"learning_rate": rate}, "steps": steps}
    row |= {"conversations": len(right["scored"]), "hit_ratio": generated}
    return row | {"hit_ratio_scored": scored}
