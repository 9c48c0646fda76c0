"""doctor: what it reads of a machine, what it prints, and the one command it names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from lavic_utils.__main__ import main
from lavic_utils.config import ROOT, UserError, load_profile
from lavic_utils.repro import doctor, machine

DONE = {"obstacle": None, "trained": 10, "current": 10, "world": True, "model": None}
BIG = {"obstacle": None, "trained": 0, "current": 0, "world": None, "model": None}
NO = {**BIG, "obstacle": "needs an NVIDIA GPU"}
ALL = {"set": True, "files": 11, "of": 11, "catalogue": True, "images": 9, "replications": None}


def given(mini=DONE, paper=BIG, t4=BIG, data=ALL, missing=(), network="the hub is found"):
    return {
        "packages": {"missing": list(missing)},
        "profiles": {"mini": mini, "paper": paper, "t4": t4},
        "data": data,
        "network": network,
    }


@pytest.mark.parametrize(("found", "command"), [
    (given(missing=["torch"]), "python -m pip install -r requirements.lock"),
    (given(mini={**DONE, "obstacle": "needs 2 GiB"}), "python -m lavic_utils table open_source"),
    (given(mini={**DONE, "current": 0}), "python -m lavic_utils reproduce"),
    (given(paper=NO, t4=NO), "make demo"),
    (given(data={**ALL, "files": 7}), "python -m lavic_utils data fetch"),
    (given(data={**ALL, "files": 7}, network="the hub is not found"), "make demo"),
    (given(data={**ALL, "files": 7}, network="not asked"), "python -m lavic_utils data fetch"),
    (given(data={**ALL, "set": False}, network="offline by setting (HF_HUB_OFFLINE)"),
     'export LAVIC_DATA="$PWD/data/reddit-amazon"'),
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
    assert (
        "no NVIDIA GPU" in done.stdout
        and "0 of 11 files" in done.stdout
        and "offline by setting" in done.stdout
    )


def test_without_any_package_one_line_says_what_to_do():
    command = [sys.executable, "-S", "-m", "lavic_utils", "doctor"]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.count("\n") == 1
        and "make install" in done.stderr
    )


def test_json_holds_the_same_facts(capsys, results):
    assert main(["doctor", "--json", "--no-network"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["profiles"]["t4"]["obstacle"] == "needs an NVIDIA GPU" or found["gpus"]
    assert found["profiles"]["mini"]["world"] is not None and found["next"]["command"]


def test_trained_stages_count_as_current_only_with_this_code_and_these_settings(results):
    profile = load_profile("mini")
    now = doctor.key(
        code=doctor.code_hash(only=doctor.NUMBERS), settings=profile.model_dump(mode="json")
    )
    for name, stamp in (
        ("seed42/stage1", now),
        ("seed42/stage2/lavic/home", now),
        ("seed43/stage1", "0" * 16),
    ):
        folder = results.parent / "mini" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(
            json.dumps({"provenance": {"numbers_hash": stamp}}), encoding="utf-8"
        )
    found = doctor.state(profile, {"memory": {"usable": 1.5}, "gpus": []})
    assert (found["trained"], found["current"]) == (3, 2)
    assert found["obstacle"] == "needs 2 GiB of memory, 1.5 can be had"


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
        ("Tesla T4, 15360, 7.5\nNVIDIA H100 80GB HBM3, 81559, 9.0", [(15.0, False), (79.6, True)]),
        ("NVIDIA-SMI has failed", []),
        ("T4, [N/A], 7.5", []),
    ):
        fake.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n", encoding="utf-8")
        fake.chmod(0o755)
        assert [(card["gib"], card["bf16"]) for card in machine.gpus()] == expected


def test_a_gpu_counts_only_where_torch_can_use_it_and_the_profile_fits(monkeypatch):
    import torch

    card = {"name": "Tesla T4", "gib": 14.6, "compute": 7.5, "bf16": False}
    found = {"memory": {"usable": 16}, "gpus": [card], "packages": {"bitsandbytes": False}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch cannot use the GPU" in doctor.obstacle(load_profile("t4"), found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "does not fit" in doctor.obstacle(load_profile("paper"), found)
    assert "bitsandbytes" in doctor.obstacle(load_profile("t4"), found)
    assert (
        doctor.obstacle(load_profile("t4"), {**found, "packages": {"bitsandbytes": True}}) is None
    )
    assert any(
        "capability 7.5: float16" in text
        for _, text in doctor.rows({**doctor.facts(False), "gpus": [card]})
    )


def test_the_network_is_asked_briefly_and_never_where_offline_is_set(monkeypatch):
    def never(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert machine.network().startswith("offline by setting")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert machine.network(ask=False) == "not asked"
    for answer, expected in (
        (lambda *_: [1], "the hub is found"),
        (lambda *_: time.sleep(1) or [], "the hub is not found"),
    ):
        monkeypatch.setattr(socket, "getaddrinfo", answer)
        start = time.monotonic()
        assert machine.network(seconds=0.2) == expected and time.monotonic() - start < 0.8


def test_a_container_limit_counts(monkeypatch):
    monkeypatch.setattr(
        machine,
        "_words",
        lambda *names: {
            "/sys/fs/cgroup/cpu.max": ["50000", "100000"],
            "/sys/fs/cgroup/memory.max": [str(2**29)],
        }.get(names[0], []),
    )
    assert machine.cpu()["usable"] == 0.5 and machine.cpu()["features"] == []
    assert machine.memory()["limit"] == machine.memory()["usable"] == 0.5
