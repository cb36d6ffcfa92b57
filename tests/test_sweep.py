"""sweep.py: each run once, what is finished is skipped, a failure stops no other."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import baselines
import runs
import sweep
from settings import RunError, UsageError
from tiny import ROOT, fails
from test_tables import write_run

MINI = ["--data", "waterbirds", "--mini"]
MORE = [*MINI, "--epochs", "5"]                          # a fifth of them is not all


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Runs in an empty folder, with commands that are recorded; a folder in `broken` has this exit status, others leave their files."""
    monkeypatch.chdir(tmp_path)
    called, broken = [], {}

    def call(command, **output):
        script = Path(next(word for word in command if word.endswith(".py"))).name
        out = Path(command[command.index("--out") + 1]) if script == "train.py" else Path(command[command.index("--ckpt") + 1]).parent
        called.append((script, str(out), command))
        if str(out) in broken:
            return subprocess.CompletedProcess(command, broken[str(out)], stderr="error: it broke\n")
        out.mkdir(parents=True, exist_ok=True)
        if script == "groups.py":
            grouped(out, command[command.index("--by") + 1])
        elif script == "train.py":
            of = Path(command[command.index("--groups") + 1]).with_suffix(".json") if "--groups" in command else None
            first = {"step": 0, "images": {"groups": json.loads(of.read_text())["digest"]} if of else {}}
            (out / "log.jsonl").write_text(json.dumps(first) + '\n{"step": 3}\n{"step": 4, "finished": true}\n')
        else:
            write_run(out, *recorded(called, out), report="report-waterbird200.json" if "--data" in command else "report.json")
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(sweep.subprocess, "run", call)
    monkeypatch.setattr(sweep, "run", lambda command: call(command).returncode)
    return called, broken


def grouped(folder, by, content="id,group\n1,right\n2,wrong\n"):
    """Write what groups.py would, of the best.pt that is there."""
    file = folder / f"groups-{by}.csv"
    file.write_text(content)
    best = runs.hash_of(folder / "best.pt") if (folder / "best.pt").is_file() else ""
    said = {"checkpoint": {"file": "best.pt", "sha256": best}, "by": by, "sha256": runs.hash_of(file), "digest": [2, content]}
    file.with_suffix(".json").write_text(json.dumps(said))


def recorded(called, out):
    """The flags that train.py got for this folder."""
    command = next(c for script, folder, c in called if script == "train.py" and folder == str(out))
    flags = command[2:command.index("--out")]
    return flags[len(MINI):]


def test_a_ladder_has_every_method_and_ablations_have_those_of_the_paper():
    assert set(sweep.SETS["ladder"]) == set(baselines.METHODS) - {"early-random"}     # which judges the others
    runs = sweep.plan(["ladder", "ablations", "published"], 2, MINI)
    names = [Path(cfg.out).name for cfg, _ in runs]
    assert len(set(names)) == len(names) and {n[-1] for n in names} == {"0", "1"}
    assert "k4-0" not in names and "k8-0" in names       # the miniature's own K is ifam
    assert [cfg.out for cfg, _ in sweep.plan(["k4"], 1, MINI)] == ["runs/waterbirds-mini-sweep/ifam-0"]
    assert all(cfg.out.startswith("runs/waterbirds-mini-sweep/") for cfg, _ in runs)
    by_name = {Path(cfg.out).name[:-2]: cfg for cfg, _ in runs}
    assert by_name["early-truth"].pooling == by_name["late-truth"].pooling == "mean" and by_name["late-truth-all"].pooling == "mean-all"


def test_a_sweep_trains_evaluates_prints_a_table_and_does_nothing_the_second_time(commands, capsys):
    called, _ = commands
    sweep.main(["ifam", "erm", *MINI, "--seeds", "2", "--leakage", "16"])
    assert [(s, Path(out).name) for s, out, _ in called] == [(s, f"{n}-{seed}") for seed in (0, 1) for n in ("ifam", "erm")
                                                               for s in ("train.py", "evaluate.py")]
    assert all("--resume" not in c for _, _, c in called) and called[1][2][-2:] == ["--leakage", "16"]
    folder = Path("runs/waterbirds-mini-sweep")
    assert "| `erm` | 2 |" in capsys.readouterr().out and "| `ifam` | 2 |" in (folder / "ifam-erm.md").read_text()
    assert len(json.loads((folder / "ifam-erm.json").read_text())["tables"][0]["rows"]) == 2
    called.clear()
    sweep.main(["ifam", "erm", *MINI, "--seeds", "2"])
    assert not called and "ifam-0: finished" in capsys.readouterr().out
    sweep.main(["soft", *MINI, "--no-fitted"])
    assert called[1][2][-3:] == ["--leakage", "500", "--no-fitted"] and "--no-fitted" not in called[0][2]


def test_a_run_that_was_begun_is_resumed_and_one_that_was_trained_and_measured_is_only_measured_again(commands):
    called, _ = commands
    write_run(Path("begun"), "--seed", "0")
    cfg, flags = sweep.plan(["ifam"], 1, MINI)[0]
    assert "--resume" not in sweep.commands(cfg, flags)[0]
    Path(cfg.out).mkdir(parents=True)
    (Path(cfg.out) / "config.json").write_text(Path("begun/config.json").read_text())
    training, measuring = sweep.commands(cfg, flags)
    assert training[-1] == "--resume" and measuring[3].endswith("best.pt")
    (Path(cfg.out) / "report.json").write_text('{"split": "test"}')              # of a checkpoint on the way
    (Path(cfg.out) / "log.jsonl").write_text('{"step": 4, "finished": true}\n{"step": 4, "loss": 1.0}\n')
    assert sweep.commands(cfg, flags) == [training, measuring]
    with open(Path(cfg.out) / "log.jsonl", "a") as log:
        log.write('{"step": 8, "finished": true}\n')
    assert sweep.commands(cfg, flags) == []
    more, = sweep.commands(cfg, flags, also=["waterbird200"])
    assert more[-2:] == ["--data", "waterbird200"]


def test_a_failing_run_stops_no_other_and_the_end_names_it(commands, capsys):
    called, broken = commands
    broken["runs/waterbirds-mini-sweep/erm-0"] = 1
    line = fails(sweep.main, "erm", "ifam", *MINI, status=1)(capsys)
    assert "1 of 2 runs failed" in line and "erm-0" in line
    assert [Path(out).name for s, out, _ in called if s == "evaluate.py"] == ["ifam-0"]


def test_what_the_benchmark_refuses_of_a_set_is_left_out_and_what_was_asked_for_by_name_is_not(commands, capsys):
    called, broken = commands
    broken["runs/waterbirds-mini-sweep/early-found-cls-0"] = 2
    sweep.main(["published", *MINI])
    said = capsys.readouterr()
    assert "left out" in said.err and said.err.count("early-found-cls-0") == 1
    assert "late-truth --pooling mean-all" in said.out and "early-found" not in said.out.split("|", 1)[1]
    line = fails(sweep.main, "published", "early-found-cls", *MINI, status=1)(capsys)
    assert "1 of 4 runs failed" in line and "early-found-cls-0" in line


def test_a_set_that_the_benchmark_refuses_whole_is_an_error(commands, capsys):
    _, broken = commands
    broken.update({f"runs/waterbirds-mini-sweep/{name}-0": 2 for name in sweep.SETS["published"]})
    assert "every run was refused" in fails(sweep.main, "published", *MINI, status=2)(capsys)


def test_a_notebook_gets_its_runs_and_pays_for_them_once(commands, capsys):
    called, _ = commands
    runs = sweep.finished(["ifam", "k8"], MINI, "fast")
    assert runs == {name: Path(f"runs/waterbirds-mini-fast/{name}-0") for name in ("ifam", "k8")}
    for run in runs.values():                            # side by side, but each is trained before it is measured
        training, measuring = (command for _, out, command in called if out == str(run))
        assert "train.py" in training[1] and measuring[-2:] == ["--leakage", "100"]
    shown = capsys.readouterr().err
    assert "training ifam, k8: minutes, but only once" in shown and "100%" in shown       # a bar for both
    called.clear()
    assert sweep.finished(["ifam", "k8"], MINI, "fast") == runs and not called and capsys.readouterr() == ("", "")


def test_the_bar_of_a_notebook_knows_how_far_a_run_is(tmp_path):
    cfg = runs.Config(out=str(tmp_path / "run"), epochs=4)
    (tmp_path / "run").mkdir()
    assert sweep.epochs_done(cfg) == 0
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 0, "config": {"epochs": 4}}\n{"step": 3, "epoch": 1.5}\n{"step": 4, "epoch": 2')
    assert sweep.epochs_done(cfg) == 2


def test_a_notebook_is_told_why_a_run_failed(commands):
    commands[1]["runs/waterbirds-mini-sweep/erm-0"] = 1
    with pytest.raises(RunError, match="erm-0 failed: error: it broke"):
        sweep.finished(["erm"], MINI)


def test_a_benchmark_to_evaluate_on_as_well_is_one_of_the_same_training_data(commands, capsys):
    assert "--also imagenet9" in fails(sweep.main, "ifam", *MINI, "--also", "imagenet9")(capsys) and not commands[0]


def test_a_list_runs_nothing_and_says_what_would_run(commands, capsys):
    called, _ = commands
    sweep.main(["ablations", *MINI, "--list", "--processes", "8"])
    out = capsys.readouterr().out
    assert not called and "--nproc_per_node=8" in out and "--hardness soft" in out and out.count("evaluate.py") == out.count("train.py")


@pytest.mark.parametrize("flags, words", [
    (("lader", *MINI), ("lader", "did you mean ladder?")),
    (("ladder", *MINI, "--epoch", "3"), ("--epoch", "did you mean --epochs?")),
    (("ladder", *MINI, "--seeds", "0"), ("--seeds", "at least 1")),
    (("ladder", *MINI, "--seed", "0"), ("--seed is decided by the sweep",)),
    (("early-truth", "erm", *MINI, "--k", "2"), ("--k", "early-truth")),         # no run of the sweep has it
    (("ladder", *MINI, "--also", "cub"), ("waterbird200",)),
], ids=lambda x: "".join(x[1:] if "waterbirds" in x else x))
def test_bad_flags_are_one_line_before_anything_runs(flags, words, commands, capsys):
    line = fails(sweep.main, *flags)(capsys)
    assert all(word in line for word in words), line
    assert not commands[0]


def test_a_folder_that_holds_other_settings_is_refused(commands, capsys):
    write_run(Path("begun"), "--epochs", "3")
    Path("runs/waterbirds-mini-sweep/ifam-0").mkdir(parents=True)
    Path("begun/config.json").rename("runs/waterbirds-mini-sweep/ifam-0/config.json")
    assert "--epochs 3, not 1" in fails(sweep.main, "ifam", *MINI)(capsys)


@pytest.mark.parametrize("content", ["[]", "{", "3", "\xff\xfe"])
def test_a_folder_whose_settings_are_torn_is_refused(content, commands, capsys):
    Path("runs/waterbirds-mini-sweep/ifam-0").mkdir(parents=True)
    Path("runs/waterbirds-mini-sweep/ifam-0/config.json").write_bytes(content.encode("latin-1"))
    assert "ifam-0/config.json" in fails(sweep.main, "ifam", *MINI)(capsys)


# ---------------------------------------------------------------- runs of two passes
def test_every_objective_comes_with_plain_fine_tuning_and_with_ifam_and_first_passes_come_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                          # whatever runs there are
    for method in ("erm", "ifam"):
        assert {f"{method}{x}" for x in ("", "-balanced", "-reweight", "-group-dro", "-jtt", "-george", "-background-dro", "-swap-true",
                                         "-swap-found")} <= set(sweep.SETS["objectives"])
    assert "ifam-swap-own" in sweep.SETS["objectives"] and "erm-swap-own" not in sweep.SETS["objectives"]
    assert list(sweep.choose(["ifam-jtt", "erm-george", "erm", "erm-background-dro"])) == ["erm-first", "ifam-jtt", "erm", "erm-george", "ifam",
                                                                                           "erm-background-dro"]
    planned = {Path(cfg.out).name: (cfg, typed) for cfg, typed in sweep.plan(["objectives"], 2, MORE)}
    names = list(planned)
    for name, (cfg, typed) in planned.items():
        if cfg.groups:
            first = Path(cfg.groups).parent.name
            assert names.index(first) < names.index(name) and first[-2:] == name[-2:] and typed[typed.index("--groups") + 1] == cfg.groups
            assert sweep.first_pass(cfg) == Path(planned[first][0].out)
    assert planned["erm-jtt-1"][0].groups == planned["ifam-jtt-1"][0].groups == "runs/waterbirds-mini-sweep/erm-first-1/groups-errors.csv"
    assert sweep.first_pass(sweep.plan(["erm"], 1, [*MINI, "--objective", "group-dro", "--groups", "mine.csv"])[0][0]) is None


@pytest.mark.parametrize("flags, epochs, first", [(MORE, 1, "erm-first"), (["--data", "waterbirds"], 18, "erm-first"), (MINI, 1, "erm")])
def test_the_first_model_of_jtt_trains_for_a_fifth_and_is_plain_fine_tuning_where_that_is_all(flags, epochs, first, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (one, _), (two, _) = sweep.plan(["erm-jtt"], 1, flags)
    assert one.epochs == epochs and Path(one.out).name == f"{first}-0" and Path(two.groups).parent == Path(one.out)


def test_a_chain_trains_groups_and_trains_again_and_does_nothing_the_second_time(commands, capsys):
    called, _ = commands
    sweep.main(["erm-jtt", "ifam-background-dro", *MORE])
    assert [(script, Path(out).name) for script, out, _ in called] == [
        ("train.py", "erm-first-0"), ("evaluate.py", "erm-first-0"), ("groups.py", "erm-first-0"), ("train.py", "erm-jtt-0"), ("evaluate.py", "erm-jtt-0"),
        ("train.py", "ifam-0"), ("evaluate.py", "ifam-0"), ("groups.py", "ifam-0"), ("train.py", "ifam-background-dro-0"),
        ("evaluate.py", "ifam-background-dro-0")]
    assert [c[c.index("--by") + 1] for script, _, c in called if script == "groups.py"] == ["errors", "background"]
    assert all("--resume" not in c for _, _, c in called) and "--groups groups-background.csv" in capsys.readouterr().out
    called.clear()
    sweep.main(["erm-jtt", "ifam-background-dro", *MORE])
    assert not called and capsys.readouterr().out.count(": finished") == 4


def test_masktune_goes_on_from_the_run_of_its_method_which_comes_first(commands):
    called, _ = commands
    sweep.main(["ifam-masktune", *MINI, "--seeds", "2"])
    assert [(script, Path(out).name) for script, out, _ in called] == [(s, f"{n}-{seed}") for seed in (0, 1) for n in ("ifam", "ifam-masktune")
                                                                         for s in ("train.py", "evaluate.py")]
    typed = called[2][2]
    assert typed[typed.index("--masktune") + 1] == "runs/waterbirds-mini-sweep/ifam-0"
    (one, _), (two, _) = sweep.plan(["ifam-masktune"], 1, MINI)
    assert runs.differences(runs.plain(vars(one)), two).keys() == {"masktune"} and sweep.first_pass(two) == Path(one.out)


def test_new_last_layers_are_measured_where_they_are_asked_for(commands):
    cfg, flags = sweep.plan(["erm"], 1, MINI)[0]
    measured = sweep.commands(cfg, flags, measure=["--leakage", "2"], retrain=["dfr", "afr"])[1:]
    assert [c[c.index("--leakage") + 2:] for c in measured] == [[], ["--retrain", "dfr"], ["--retrain", "afr"]]
    folder = Path(cfg.out)
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 4, "finished": true}\n')
    for name in ("report", "report-dfr"):
        (folder / f"{name}.json").write_text('{"split": "test"}')
    left, = sweep.commands(cfg, flags, retrain=["dfr", "afr"])
    assert left[-2:] == ["--retrain", "afr"]


def test_groups_of_another_checkpoint_are_made_again_and_a_run_of_other_groups_starts_again(commands):
    called, _ = commands
    (one, _), (cfg, typed) = sweep.plan(["erm-jtt"], 1, MINI)
    first, folder = Path(one.out), Path(cfg.out)
    left = lambda: [Path(c[1]).name + " --resume" * ("--resume" in c) for c in sweep.commands(cfg, typed)]
    first.mkdir(parents=True)
    (first / "best.pt").write_bytes(b"weights")
    (first / "log.jsonl").write_text('{"step": 4, "finished": true}\n')
    assert left() == ["groups.py", "train.py", "evaluate.py"]
    grouped(first, "errors")
    assert left() == ["train.py", "evaluate.py"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(runs.plain(vars(cfg))))
    assert left() == ["train.py --resume", "evaluate.py"]                        # killed before it wrote a line
    content = "id,group\n1,right\n2,wrong\n"
    log = lambda digest: (folder / "log.jsonl").write_text(json.dumps({"step": 0, "images": {"groups": digest}}) + '\n{"step": 4, "finished": true}\n')
    log([2, content])
    (folder / "report.json").write_text('{"split": "test"}')
    assert left() == []
    log([2, "others"])
    assert left() == ["train.py", "evaluate.py"]         # not --resume, which would refuse: the old run is moved aside
    log([2, content])
    (first / "best.pt").write_bytes(b"other weights")
    assert left() == ["groups.py", "train.py", "evaluate.py"]
    grouped(first, "errors")
    assert left() == []                                  # they came out the same
    (first / "groups-errors.csv").write_text("id,group\n1,wrong\n2,wrong\n")
    assert left() == ["groups.py", "train.py", "evaluate.py"]
    grouped(first, "errors")
    (first / "log.jsonl").write_text('{"step": 2}\n')    # best.pt is one on the way
    assert left() == ["groups.py", "train.py", "evaluate.py"]


def test_the_epoch_is_chosen_by_the_worst_group_where_validation_has_groups(commands):
    chosen = lambda name: sweep.plan(["erm-balanced"], 1, ["--data", name, "--mini"])[0][0].select
    assert [chosen(name) for name in ("waterbirds", "metashift", "cub")] == ["worst_group", "accuracy", "accuracy"]


def test_a_run_whose_first_pass_failed_is_left_out_and_the_others_go_on(commands, capsys):
    called, broken = commands
    broken["runs/waterbirds-mini-sweep/erm-first-0"] = 1
    with pytest.raises(RunError, match="2 of 3 runs failed.*erm-first-0, .*erm-jtt-0"):
        sweep.main(["erm-jtt", "erm", *MORE])
    assert "left out, for it needs runs/waterbirds-mini-sweep/erm-first-0" in capsys.readouterr().err
    assert {Path(out).name for _, out, _ in called} == {"erm-first-0", "erm-0"}


def test_a_notebook_gets_chained_runs_in_their_order_and_is_told_which_failed(commands):
    called, broken = commands
    found = sweep.finished(["erm-george", "erm-jtt"], MORE)
    assert list(found) == ["erm", "erm-george", "erm-first", "erm-jtt"]
    order = [(script, Path(out).name) for script, out, _ in called]
    for first, second in (("erm-0", "erm-george-0"), ("erm-first-0", "erm-jtt-0")):
        assert order.index(("train.py", first)) < order.index(("groups.py", first)) < order.index(("train.py", second))
    called.clear()
    assert sweep.finished(["erm-george", "erm-jtt"], MORE) == found and not called
    broken["runs/waterbirds-mini-fresh/erm-0"] = 1
    with pytest.raises(RunError, match="erm-0 failed"):
        sweep.finished(["erm-george"], MINI, "fresh")
    assert not any("erm-george" in out for _, out, _ in called)


# ---------------------------------------------------------------- flags that some methods have
@pytest.mark.parametrize("typed", [["--k", "3"], ["--k=3"]])
def test_a_flag_is_for_the_methods_that_have_it_and_a_line_names_the_others(commands, capsys, typed):
    called, _ = commands
    sweep.main(["erm", "ifam", "pdiscoformer", "frozen", *MINI, *typed, "--epochs", "3", "--no-joint", "--seeds", "2"])
    said = capsys.readouterr().out
    assert said.count(f"{' '.join(typed)}: left out for erm, frozen, which have no such setting\n") == 1
    assert said.count("--no-joint: left out for erm, pdiscoformer, frozen, which") == 1
    flags = {Path(out).name: command for script, out, command in called if script == "train.py"}
    assert {name for name, command in flags.items() if typed[0] in command} == {"ifam-0", "ifam-1", "pdiscoformer-0", "pdiscoformer-1"}
    assert {name for name, command in flags.items() if "--no-joint" in command} == {"ifam-0", "ifam-1"}
    assert all(command[command.index("--epochs") + 1] == "3" and "--mini" in command for command in flags.values())


def test_a_flag_of_one_run_may_come_between_others_and_keeps_its_place(commands):
    chosen = sweep.choose(["erm", "ifam", "k2"])
    assert sweep.share_out(chosen, ["--epochs", "3", "--tau=2", "--lr", "1e-5", "--mini"]) == {
        "erm": ["--epochs", "3", "--lr", "1e-5", "--mini"], **dict.fromkeys(["ifam", "k2"], ["--epochs", "3", "--tau=2", "--lr", "1e-5", "--mini"])}
    assert sweep.share_out(chosen, []) == {"erm": [], "ifam": [], "k2": []}


def test_a_flag_whose_value_is_wrong_is_refused_although_some_methods_lack_it(commands, capsys):
    assert "--k must be at least 1" in fails(sweep.main, "ifam", "erm", *MINI, "--k", "0")(capsys) and not commands[0]


# ---------------------------------------------------------------- reports of the present checkpoint
def test_a_report_of_another_checkpoint_is_made_again(commands):
    cfg, flags = sweep.plan(["ifam"], 1, MINI)[0]
    folder = Path(cfg.out)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(runs.plain(vars(cfg))))
    (folder / "log.jsonl").write_text('{"step": 4, "finished": true}\n')
    (folder / "best.pt").write_bytes(b"weights")
    left = lambda *also: [Path(c[1]).name for c in sweep.commands(cfg, flags, also=also)]
    report = lambda content, name="report.json": (folder / name).write_text(json.dumps(content))
    assert left() == ["evaluate.py"]
    report({"checkpoint": {"file": "best.pt", "sha256": runs.hash_of(folder / "best.pt")}})
    assert left() == [] and left("waterbird200") == ["evaluate.py"]
    report({"checkpoint": {"file": "best.pt", "sha256": runs.hash_of(folder / "best.pt")}}, "report-waterbird200.json")
    assert left("waterbird200") == []
    (folder / "best.pt").write_bytes(b"other weights")
    assert left("waterbird200") == ["evaluate.py"] * 2
    for content in ({"checkpoint": {}}, {"checkpoint": {"sha256": 3}}, {}, [], 3, "torn"):
        report(content)
        assert left() == ["evaluate.py"], content
    (folder / "report.json").write_text('{"checkpoint": ')
    with pytest.raises(UsageError, match="not whole JSON"):           # it may be somebody's: evaluate.py would not replace it
        left()
    report({"split": "test"})                            # from before reports named their checkpoint
    assert left() == []
    os.utime(folder / "report.json", (1, 1))
    assert left() == ["evaluate.py"]
    (folder / "best.pt").unlink()                        # a run that was cleaned up has nothing to measure again
    assert left() == []


# ---------------------------------------------------------------- signals
CHILD = """
import signal, sys, time
def end(number, frame):
    got.append(number)
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, end)
print("ready", flush=True)
while not got:
    time.sleep(0.02)
time.sleep(0.4)
print("saved", len(got), flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("number, status, to_group", [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, False), (signal.SIGINT, 130, True),
                                                      (signal.SIGHUP, 129, False)])
def test_a_signal_is_passed_on_once_and_the_run_is_waited_for(number, status, to_group):
    # whatever the tests run under: nohup and job scripts hand on signals that are ignored
    code = (f"import signal, sys, sweep; signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"sweep.run([sys.executable, '-c', {CHILD!r}]); print('not reached')")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, number)                    # a terminal sends Ctrl-C to the group
    out, err = process.communicate(timeout=60)
    assert out == "saved 1\n" and process.returncode == status
    assert err == f"{number.name}: the run was told, and has ended; the same command goes on from there\n"


def test_a_run_that_ends_by_itself_leaves_the_handlers_as_they_were_and_gives_its_status():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert sweep.run([sys.executable, "-c", "raise SystemExit(5)"]) == 5
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_every_set_can_be_planned_and_a_method_of_no_ladder_keeps_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, runs in sweep.SETS.items():
        assert len(sweep.plan([name], 1, ["--data", "waterbirds", "--mini"])) >= len(runs) - 1          # --k 4 is the default
    (cfg, typed), = sweep.plan(["early-random"], 1, ["--data", "waterbirds", "--mini"])
    assert cfg.out.endswith("/early-random-0") and cfg.method == "early-random" and typed.count("--method") == 1
