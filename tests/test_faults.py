"""Faults on purpose: kill -9 at random moments, a disk that is full, one of two processes that dies. `pytest -m faults`.

Each run is compared with one that nothing happened to, bit for bit. Minutes on two cores; .ci/run leaves it out.
"""
import hashlib
import os
import random
import resource
import subprocess
import sys
import time

import pytest
import torch
from tiny import ROOT, TINY, torchrun

import runs

pytestmark = pytest.mark.faults
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FLAGS = [*TINY, "--epochs", "6", "--log-every", "1", "--save-every", "2", "--ema", "0.9"]


def train(out, *flags, **how):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *FLAGS, "--out", str(out), *flags], env=ENVIRONMENT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **how)


def finish(out):
    """Run to the end, from wherever the run is."""
    process = train(out, *["--resume"] * (out / "config.json").is_file())
    assert process.wait(300) == 0, process.stderr.read()


def assert_same_weights(one, other):
    for name in ("last.pt", "best.pt"):
        first, second = (runs.read_checkpoint(folder / name) for folder in (one, other))
        assert first["step"] == second["step"] and first["best"] == second["best"]
        for part in ("model", "ema"):
            assert all(torch.equal(first[part][key], x) for key, x in second[part].items()), (name, part)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    start = time.monotonic()
    finish(out)
    return out, time.monotonic() - start


@pytest.mark.parametrize("moment", range(10))
def test_training_killed_at_a_random_moment_resumes_to_the_same_weights(whole, tmp_path, moment):
    out, seconds = whole
    process = train(tmp_path / "run")
    time.sleep(random.Random(moment).uniform(0.3, 1) * seconds)
    process.kill()
    process.wait()
    finish(tmp_path / "run")
    assert_same_weights(tmp_path / "run", out)


def digest(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_drawing_killed_at_random_moments_leaves_nothing_that_counts_as_data(tmp_path):
    command = [sys.executable, "-m", "miniature", "--data", "metashift", "--train", "240", "--test", "60", "--out"]
    start = time.monotonic()
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    for moment in range(10):
        process = subprocess.Popen([*command, tmp_path / "killed"], cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(random.Random(moment).uniform(0.2, 0.95) * seconds)
        process.kill()
        process.wait()
        assert all(p.name.startswith(".") or digest(p) == digest(tmp_path / "whole" / p.name)
                   for p in (tmp_path / "killed").glob("*"))
    subprocess.run([*command, tmp_path / "killed"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_full_disk_ends_in_one_line_and_the_earlier_checkpoint_survives(whole, tmp_path):
    out = tmp_path / "run"
    process = train(out)
    while not (out / "last.pt").is_file():
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = (out / "last.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))      # a checkpoint has 14 MB
    full = train(out, "--resume", preexec_fn=limit)
    assert full.wait(300) == 1
    line = full.stderr.read()
    assert line.count("\n") == 1 and "Traceback" not in line, line
    assert (out / "last.pt").read_bytes() == before
    finish(out)
    assert_same_weights(out, whole[0])


def test_pictures_cut_off_by_a_full_disk_are_no_miniature(tmp_path):
    command = [sys.executable, "-m", "miniature", "--data", "waterbirds", "--train", "40", "--val", "8", "--test", "8",
               "--out", tmp_path]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_one_of_two_processes_dies_and_both_resume_to_the_same_weights(tmp_path):
    command = ["train.py", *FLAGS]
    assert torchrun(2, *command, "--out", tmp_path / "whole").wait(300) == 0
    process = torchrun(2, *command, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "last.pt").is_file():
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), 9)
    assert process.wait(120) != 0
    assert torchrun(2, *command, "--out", tmp_path / "run", "--resume").wait(300) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
