"""Edges of a run: who owns its folder, how it ends, what it refuses, what is saved. Each claim was a fault once."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ROOT, TINY, fails
from tiny import train as run

import runs
import settings
import train
from settings import UsageError, parse


def start(*flags, **how):
    """train.py as a process of its own, its output in one pipe."""
    command = [sys.executable, ROOT / "train.py", *TINY, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def until_it_trains(folder, process):
    """Wait for the first line of a step in its log."""
    while process.poll() is None and (not (folder / "log.jsonl").is_file() or '"loss"' not in (folder / "log.jsonl").read_text()):
        time.sleep(0.02)
    assert process.poll() is None, process.stdout.read()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("edges") / "run")


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


# ---------------------------------------------------------------- processes and signals
def test_a_run_belongs_to_one_process_and_the_second_names_the_first(tmp_path):
    folder = tmp_path / "run"
    first = start("--epochs", 50, "--log-every", 1, "--out", folder)
    until_it_trains(folder, first)
    for flags in ((), ("--resume",)):
        second = start("--epochs", 50, "--out", folder, *flags)
        assert second.wait(120) == 2
        assert f"in use by process {first.pid}" in second.stdout.read()
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["run"]         # nothing was moved aside
    first.kill()
    first.wait()
    with runs.owned(folder, new=False):                  # the lock of a killed process is free
        pass


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_resuming_gives_the_same_weights(tmp_path, number, status):
    flags = ("--epochs", 4, "--log-every", 1, "--save-every", 1000)
    process = start(*flags, "--out", tmp_path / "stopped")
    until_it_trains(tmp_path / "stopped", process)
    process.send_signal(number)
    assert process.wait(120) == status
    assert "go on with --resume" in process.stdout.read()
    lines = runs.read_log(tmp_path / "stopped" / "log.jsonl")
    saved = runs.read_checkpoint(tmp_path / "stopped" / "last.pt")["step"]
    assert saved == max(x["step"] for x in lines if "loss" in x) < 16            # nothing that was computed is lost
    done = subprocess.run([sys.executable, ROOT / "train.py", *TINY, *map(str, flags), "--out", tmp_path / "stopped", "--resume"],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    whole = start(*flags, "--out", tmp_path / "whole")
    assert whole.wait(120) == 0, whole.stdout.read()
    one, other = (runs.read_checkpoint(tmp_path / name / "last.pt") for name in ("stopped", "whole"))
    assert all(torch.equal(one["model"][name], x) for name, x in other["model"].items())


def test_a_closed_pipe_does_not_end_a_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, ROOT / "train.py", *TINY, "--log-every", "1", "--out", tmp_path / "run"], stdout=writer,
                          stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["finished"]


def test_a_rank_without_a_world_is_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    run(tmp_path / "run")
    assert (tmp_path / "run" / "best.pt").is_file() and "images" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line_with_its_own_reason(capsys):
    def denied():
        raise PermissionError(13, "Permission denied", "/somewhere/x.pt")
    assert fails(lambda flags: denied(), status=1)(capsys) == "error: /somewhere/x.pt: Permission denied\n"

    def bus_error():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
    assert "--shm-size" in fails(lambda flags: bus_error(), status=1)(capsys)


# ---------------------------------------------------------------- folders and files
def test_files_of_something_else_are_not_written_into(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    line = fails(train.main, *TINY, "--out", folder)(capsys)
    assert "thesis.tex" in line and [p.name for p in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("spoil, says", [
    (lambda state: state.update(step="seven"), "step is 'seven'"), (lambda state: state.update(step=-5), "step is -5"),
    (lambda state: state.update(step=999), "step 999 of 4"), (lambda state: state.pop("optimizer"), "no state of the optimizer"),
    (lambda state: state.update(config=None), "expected an object of settings"),
    (lambda state: state["config"].update(tau=0), "--tau must be above 0"), (lambda state: state["config"].update(k=[4]), "k is [4]"),
    (lambda state: state["config"].update(data="mars"), "unknown --data 'mars'"), (lambda state: state["config"].pop("method"), "method is missing"),
    (lambda state: state["config"].update(method="mars"), "unknown --method 'mars'"), (lambda state: state.update(best=3), "best is 3"),
    (lambda state: state["optimizer"].update(param_groups=[]), "does not fit its own settings")])
def test_a_checkpoint_that_was_edited_is_refused_by_the_name_of_what_is_wrong(copied, capsys, spoil, says):
    state = torch.load(copied / "last.pt")
    spoil(state)
    torch.save(state, copied / "last.pt")
    assert says in fails(train.main, *TINY, "--out", copied, "--resume")(capsys)


@pytest.mark.parametrize("text, says", [
    ("", "not whole JSON"), ("[1, 2]", "expected an object"), ('{"k": "four"}', "k is 'four', expected int"), ('{"k": true}', "k is True"),
    ('{"tau": NaN}', "finite"), ('{"size": 0}', "--size"), ('{"data": "mars"}', "unknown --data")])
def test_settings_of_another_run_are_checked_like_typed_ones(tmp_path, capsys, text, says):
    (tmp_path / "config.json").write_text(text)
    line = fails(train.main, "--config", tmp_path / "config.json", "--out", tmp_path / "run")(capsys)
    assert says in line and str(tmp_path / "config.json") in line


def test_a_run_without_a_checkpoint_is_resumed_only_with_whole_settings(copied, capsys):
    (copied / "last.pt").unlink()
    for text in ("[]", "{", '{"tau": "hot"}'):
        (copied / "config.json").write_text(text)
        assert "config.json" in fails(train.main, *TINY, "--out", copied, "--resume")(capsys)


def test_settings_of_another_run_start_a_run_and_typed_ones_replace_them(trained):
    cfg = parse(runs.Config, "", ["--config", str(trained / "config.json"), "--seed", "7"], runs.preset, runs.read_settings)
    then = json.loads((trained / "config.json").read_text())
    assert cfg.seed == 7 and cfg.out == "runs/waterbirds-mini" and not cfg.resume
    assert runs.differences(then, cfg) == {"seed": (0, 7)}


def test_a_torn_last_line_of_a_log_is_dropped_and_another_is_named(copied, capsys):
    log = copied / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 4, "lo')
    assert [json.dumps(x) for x in runs.read_log(log)] == whole.splitlines()
    log.write_text("\n" + whole)                         # a blank line means nothing
    assert len(runs.read_log(log)) == len(whole.splitlines())
    lines = whole.splitlines()
    log.write_text("\n".join([lines[0], "<html>", *lines[1:]]))
    assert "line 2" in fails(train.main, *TINY, "--out", copied, "--resume")(capsys)


def test_a_resumed_run_notices_other_images(copied, capsys):
    state = torch.load(copied / "last.pt")
    state["images"]["train"] = [65, state["images"]["train"][1]]
    torch.save(state, copied / "last.pt")
    assert "with 65 images in train, and now there are 64" in fails(train.main, *TINY, "--out", copied, "--resume")(capsys)
    state["images"]["train"] = [64, "0" * 16]
    torch.save(state, copied / "last.pt")
    assert "64 others" in fails(train.main, *TINY, "--out", copied, "--resume")(capsys)


def test_settings_are_compared_before_any_data_are_touched(copied, capsys, monkeypatch):
    monkeypatch.setattr(train, "open_data", lambda *_: pytest.fail("data were opened"))
    assert "was started with --data waterbirds" in fails(train.main, "--data", "metashift", "--mini", "--out", copied, "--resume")(capsys)


def test_temporary_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    import platform
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, living = (tmp_path / f".x.json.{pid}@{platform.node()}" for pid in (dead.pid, os.getppid()))
    old.touch(), living.touch()
    settings.write_json(tmp_path / "x.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([living.name, "x.json"])


def test_a_file_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UsageError, match="--force"):
        settings.may_write(tmp_path / "x.json", lambda path: "decision" in json.loads(path.read_text()))
    settings.may_write(tmp_path / "x.json", lambda path: False, force=True)
    settings.may_write(tmp_path / "new.json", lambda path: False)
    for path in (tmp_path, tmp_path / "nowhere" / "x.json"):
        with pytest.raises(UsageError):
            settings.may_write(path, lambda path: True)


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize("flags, says", [
    (("--weight-class2", 0, "--method", "erm"), "weight 0"),
    (("--no-shaping", "--no-stage1-class", "--weight-class2", 0), "weight 0"), (("--size", 8), "3 x 3"),
    (("--size", 100000), "GiB"), (("--batch", 10 ** 9), "GiB"), (("--registers", 10 ** 30), "at most"), (("--k", 10 ** 9), "at most"),
    (("--epochs", 10 ** 30), "at most"), (("--seed", 2 ** 70), "below"), (("--micro", -1), "at least"), (("--lr", "nan"), "finite"),
    (("--clip", "inf"), "finite"), (("--ou", "x"), "unknown flag --ou"), (("--root", ""), "--root")])
def test_numbers_that_no_run_can_have_are_refused_before_it_begins(tmp_path, capsys, flags, says):
    line = fails(train.main, *TINY, "--out", tmp_path / "run", *flags)(capsys)
    assert says in line and not list(tmp_path.iterdir())


def test_absurdly_many_workers_become_as_many_as_there_are_cores(capsys):
    cfg = runs.Config(workers=10 ** 20)
    assert cfg.workers <= max(4, os.cpu_count()) and "--workers" in capsys.readouterr().out


def test_without_clipping_the_gradient_is_as_it_is(tmp_path):
    norm = lambda out: runs.read_log(out / "log.jsonl")[1]["gradient_norm"]
    free, tight = (run(tmp_path / str(clip), "--clip", clip, "--log-every", 1, "--limit", 16) for clip in (0, 1e9))
    assert norm(free) == norm(tight) > 0
    one, other = (runs.read_checkpoint(out / "last.pt")["model"] for out in (free, tight))
    assert all(torch.equal(one[name], x) for name, x in other.items())
    assert not torch.equal(one["selector.prototypes"], train.build_model(parse(runs.Config, "", TINY, runs.preset), torch.device("cpu"), 2).state_dict()["selector.prototypes"])


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    out = tmp_path / "run"
    line = fails(train.main, *TINY, "--out", out, "--lr", 1e300, "--limit", 16, status=1)(capsys)          # one step
    assert "are not finite" in line
    for name in ("last.pt", "best.pt"):
        assert not (out / name).is_file()


def test_a_good_checkpoint_survives_weights_that_overflow(copied):
    cfg = runs.Config(**runs.read_settings(copied / "config.json"), out=str(copied))
    before, state = (copied / "last.pt").read_bytes(), torch.load(copied / "last.pt")
    state["model"]["selector.prototypes"][0, 0] = float("nan")
    part = torch.nn.ParameterDict({"x": torch.nn.Parameter(torch.tensor([float("inf")]))})
    with pytest.raises(settings.RunError, match="no longer finite"):
        runs.save(copied / "last.pt", 0, cfg, 9, {}, {"model": part})
    assert (copied / "last.pt").read_bytes() == before


def test_the_rates_of_the_log_are_those_that_were_used(tmp_path):
    out = run(tmp_path / "run", "--warmup", 100, "--log-every", 1)
    first = runs.read_log(out / "log.jsonl")[1]["lr"]
    cfg = parse(runs.Config, "", [*TINY], runs.preset)
    scale = (cfg.batch / 16) ** 0.5
    assert first["backbone, warmed up"] == pytest.approx(cfg.lr * scale / 100)
    assert first["heads, warmed up"] == pytest.approx(cfg.lr_heads * scale / 100) and first["heads"] == pytest.approx(cfg.lr_heads * scale)
    assert first["prototypes"] == pytest.approx(cfg.lr_prototypes * scale)


def test_the_moving_average_warms_up(tmp_path):
    out = run(tmp_path / "run", "--ema", 0.9999)
    state = runs.read_checkpoint(out / "last.pt")
    name = "selector.prototypes"
    begun = train.build_model(parse(runs.Config, "", TINY, runs.preset), torch.device("cpu"), 2).state_dict()[name]
    moved, followed = (state["model"][name] - begun).norm(), (state["ema"][name] - begun).norm()
    assert followed > 0.5 * moved                        # with 0.9999 from the start it would be 0.0002 of it
    assert runs.read_log(out / "log.jsonl")[-1]["ema_decay"] == pytest.approx(4 / 13)


def test_fp16_that_learns_nothing_is_a_failure(tmp_path, capsys, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, init_scale=2.0 ** 120, enabled=enabled))
    line = fails(train.main, *TINY, "--limit", 8, "--batch", 8, "--amp", "fp16", "--out", tmp_path / "run", status=1)(capsys)
    assert "every step was skipped" in line and not (tmp_path / "run" / "best.pt").is_file()
