"""doctor: what it reads of a machine, what it prints, and the one command it names."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from lavic_utils import provenance
from lavic_utils.config import ROOT, UserError, load_profile
from lavic_utils.repro import doctor

DONE = {"obstacle": None, "kept": 10, "model": None}
BIG = {"obstacle": None, "kept": 0, "model": None}
NO = {**BIG, "obstacle": "needs an NVIDIA GPU"}
ALL = {"set": True, "files": 11, "of": 11, "images": 9, "replications": 0}


def given(mini=DONE, paper=BIG, t4=BIG, data=ALL, missing=()):
    return {
        "packages": {"missing": list(missing)},
        "profiles": {"mini": mini, "paper": paper, "t4": t4},
        "data": data,
    }


@pytest.mark.parametrize(("found", "command"), [
    (given(missing=["torch"]), "python -m pip install -r requirements.lock"),
    (given(mini={**DONE, "obstacle": "needs 2 GiB"}), "python -m lavic_utils table open_source"),
    (given(mini={**DONE, "kept": 0}), "python -m lavic_utils reproduce"),
    (given(paper=NO, t4=NO), "make demo"),
    (given(data={**ALL, "files": 7}), "python -m lavic_utils data fetch"),
    (given(data={**ALL, "set": False}), 'export LAVIC_DATA="$PWD/data/reddit-amazon"'),
    (given(data={**ALL, "images": 0}), "python -m lavic_utils data crawl"),
    (given(paper={**BIG, "model": "hf download x/y"}), "hf download x/y"),
    (given(), "python -m lavic_utils run LaViC --domain beauty --profile paper"),
    (given(paper=NO), "python -m lavic_utils run LaViC --domain beauty --profile t4"),
    (given(paper=DONE), "python -m lavic_utils table open_source --profile paper"),
])  # fmt: skip
def test_the_next_command_follows_from_the_facts(found, command):
    assert doctor.next_command(found)[0] == command


def test_it_prints_neither_paths_nor_names_and_imports_no_torch(results):
    """In a process of its own: what it imports would otherwise be here already."""
    code = (
        "import sys; from lavic_utils.__main__ import main; assert main(['doctor']) == 0; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = {
        **os.environ,
        "LAVIC_DATA": str(results),
        "PATH": str(results),
        "PYTHONPATH": str(ROOT),
    }
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10  # about 1 s alone; the machine may be busy
    private = [socket.gethostname(), os.environ.get("USER"), str(ROOT), str(results), sys.prefix]
    assert not [word for word in private if word and len(word) > 3 and word in done.stdout]
    assert "next: python -m lavic_utils reproduce" in done.stdout  # LAVIC_RESULTS is empty
    assert "no NVIDIA GPU" in done.stdout and "0 of 11 files" in done.stdout
    assert "an installation takes 2.3 GB" in done.stdout


def test_without_any_package_one_line_says_what_to_do():
    command = [sys.executable, "-S", "-m", "lavic_utils", "doctor"]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.count("\n") == 1
        and "make install" in done.stderr
    )


def test_facts_are_of_this_machine(results):
    found = doctor.facts()
    assert found["profiles"]["t4"]["obstacle"] == "needs an NVIDIA GPU" or found["gpus"]
    assert found["next"]["command"] and found["memory"]["total"] > 0


def test_kept_results_and_too_little_memory_are_said(results):
    for name in ("seed42/stage1", "seed42/stage2/lavic/home", "seed43/stage1"):
        folder = results.parent / "mini" / name
        folder.mkdir(parents=True)
        (folder / "result.json").touch()
    found = doctor.state(load_profile("mini"), {"memory": {"usable": 1.5}, "gpus": []})
    assert (found["kept"], found["model"]) == (3, None)
    assert found["obstacle"] == "needs 2 GiB, 1.5 can be had"


def test_packages_missing_and_different_are_named(tmp_path):
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert (
        doctor.packages(tmp_path)["missing"] == [] == list(doctor.packages(tmp_path)["different"])
    )
    text = (tmp_path / "requirements.lock").read_text(encoding="utf-8")
    (tmp_path / "requirements.lock").write_text(
        text.replace("torch==2.13.0", "torch==2.99.0"), encoding="utf-8"
    )
    table = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(
        table.replace('"bm25s>=0.2",', '"no-such-package",'), encoding="utf-8"
    )
    found = doctor.packages(tmp_path)
    assert found["missing"] == ["no-such-package"] and found["different"] == {
        "torch": ["2.13.0", "2.99.0"]
    }
    with pytest.raises(UserError, match="from a checkout"):
        doctor.packages(tmp_path / "none")


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake = tmp_path / "nvidia-smi"
    for said, expected in (
        (
            "Tesla T4, 15360, 7.5\nNVIDIA H100 80GB HBM3, 81559, 9.0",
            [(15.0, "float16"), (79.6, "bfloat16")],
        ),
        ("NVIDIA-SMI has failed", []),
        ("T4, [N/A], 7.5", []),
    ):
        fake.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n", encoding="utf-8")
        fake.chmod(0o755)
        assert [(card["gib"], card["half"]) for card in doctor.gpus()] == expected


def test_card_and_driver_stand_beside_every_result(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake, here = tmp_path / "nvidia-smi", []
    fake.touch(0o755)
    for said in ("echo 'Tesla T4, 580.95.05'", "echo failed; exit 9"):  # the second has no card
        fake.write_text(f"#!/bin/sh\n{said}\n", encoding="utf-8")
        provenance._gpus.cache_clear()
        here.append(provenance.provenance(load_profile("mini"), 1, "none")["machine"]["gpus"])
    provenance._gpus.cache_clear()
    assert here == [["Tesla T4, 580.95.05"], []]
    assert "bitsandbytes" in provenance.versions()


def test_a_gpu_counts_only_where_torch_can_use_it_and_the_profile_fits(monkeypatch, capsys):
    import torch

    card = {"name": "Tesla T4", "gib": 14.6, "compute": 7.5, "half": "float16"}
    found = {"memory": {"usable": 16}, "gpus": [card], "packages": {"bitsandbytes": False}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch cannot use the GPU" in doctor.obstacle(load_profile("t4"), found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "does not fit" in doctor.obstacle(load_profile("paper"), found)
    assert "requirements-gpu.lock" in doctor.obstacle(load_profile("t4"), found)
    old = {**card, "name": "Tesla V100-SXM2-16GB", "gib": 16.0, "compute": 7.0}
    assert "7.5 and newer" in doctor.obstacle(load_profile("t4"), {**found, "gpus": [old]})
    assert (
        doctor.obstacle(load_profile("t4"), {**found, "packages": {"bitsandbytes": True}}) is None
    )
    doctor.show({**doctor.facts(), "gpus": [card]})
    assert "Tesla T4, 14.6 GiB, compute capability 7.5: float16" in capsys.readouterr().out


def test_a_container_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    free = doctor.memory()["usable"]
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert doctor.memory()["usable"] == pytest.approx(free, abs=1)
    (tmp_path / "memory.max").write_text(f"{2**29}\n", encoding="ascii")
    assert doctor.memory()["usable"] == 0.5
