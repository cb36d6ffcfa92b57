"""The promise: bad input is one line that says what, where and what to do, exit status 2 or 1, and nothing is written.

A table of (command, status, words) for every script, in this process. What needs data or a trained model is tested
beside them: test_run_edges, test_data_edges, test_weights, test_intervene, test_sweep, test_tables.
"""
import os
import subprocess
import sys

import pytest
from tiny import ROOT, fails

import compose
import data
import evaluate
import groups
import intervene
import miniature.__main__ as miniature
import predict
import speed
import sweep
import train
from measure import figures, tables
from miniature import pretrain

HUGE, FILE = 10 ** 30, "notes.txt"                       # a file that is there, of somebody else
MINI = ("--data", "waterbirds", "--mini")
PROMISE = [
    # train.py
    (train, ("--data", "waterbird"), 2, "did you mean waterbirds"), (train, ("--data", ""), 2, "--data is empty"),
    (train, ("--epohcs", 3), 2, "did you mean --epochs"), (train, ("--ep", 3), 2, "unknown flag --ep"),
    (train, ("--epochs", "many"), 2, "invalid int"), (train, (*MINI, "--epochs", HUGE), 2, "at most"),
    (train, (*MINI, "--registers", HUGE), 2, "at most"), (train, (*MINI, "--micro", -1), 2, "at least 0"),
    (train, (*MINI, "--tau", 0), 2, "above 0"), (train, (*MINI, "--lr", "inf"), 2, "finite"), (train, (*MINI, "--lr", "nan"), 2, "finite"),
    (train, (*MINI, "--ema", 1), 2, "below 1"), (train, (*MINI, "--clip", -1), 2, "at least 0"), (train, (*MINI, "--k", 0), 2, "at least 1"),
    (train, (*MINI, "--backgrounds", 0), 2, "at least 1"), (train, (*MINI, "--backgrounds", HUGE), 2, "at most 4096"), (train, (*MINI, "--k", HUGE), 2, "at most 4096"),
    (train, (*MINI, "--method", "erm", "--backgrounds", 3), 2, "means nothing to"), (train, (*MINI, "--background", 3), 2, "did you mean --backgrounds"),
    (train, (*MINI, "--presence-window", -1), 2, "at least 0"), (train, (*MINI, "--presence-window", 13), 2, "12 x 12 patches"),
    (train, (*MINI, "--presence-window", 1.5), 2, "invalid int"), (train, (*MINI, "--method", "late-truth", "--presence-window", 2), 2, "means nothing to"),
    (train, (*MINI, "--no-shaping", "--presence-window", 2), 2, "means nothing with --no-shaping"),
    (train, (*MINI, "--root", "elsewhere"), 2, "leave out --root"), (train, (*MINI, "--method", "erm", "--k", 3), 2, "means nothing to"),
    (train, (*MINI, "--no-shaping", "--weight-entropy", 1), 2, "means nothing with --no-shaping"),
    (train, (*MINI, "--no-stage1-class", "--weight-class1", 1), 2, "means nothing with --no-stage1-class"),
    (train, (*MINI, "--method", "early-random", "--k", 3), 2, "means nothing to"), (train, (*MINI, "--method", "early-randm"), 2, "did you mean early-random"),
    (train, (*MINI, "--head", "norm"), 2, "means nothing to --method ifam"), (train, (*MINI, "--method", "erm", "--head", "norms"), 2, "did you mean norm"),
    (train, (*MINI, "--method", "late-truth", "--mask-with", "pixels"), 2, "means nothing to"), (train, (*MINI, "--method", "early-random", "--head", "norm"), 2, "means nothing to"),
    (train, (*MINI, "--method", "early-truth", "--finder", "head"), 2, "only to early-found, late-found"), (train, (*MINI, "--method", "erm", "--mask-rule", "centre"), 2, "means nothing to"),
    (train, (*MINI, "--method", "early-truth", "--mask-rule", "center"), 2, "did you mean centre"), (train, (*MINI, "--method", "late-truth", "--find-in", "view"), 2, "means nothing to"),
    (train, (*MINI, "--method", "early-found", "--find-in", "view", "--mask-rule", "centre"), 2, "means nothing with --find-in view"),
    (train, (*MINI, "--method", "aim", "--probe-norm"), 2, "only to ep"), (train, (*MINI, "--method", "ep", "--probe-norm", "--batch", 1), 2, "one alone"),
    (train, (*MINI, "--method", "ep", "--probe-norm", "--batch", 9, "--micro", 4), 2, "one alone"),
    (train, ("--data", "imagenet", "--draft"), 2, "need all of their pixels"), (train, (*MINI, "--method", "early-truth", "--draft"), 2, "means nothing to"),
    (train, (*MINI, "--film", -1), 2, "at least 0"), (train, (*MINI, "--method", "erm", "--film", 2), 2, "means nothing to"),
    (train, (*MINI, "--method", "frozen", "--checkpoint"), 2, "means nothing to"), (train, (*MINI, "--checkpoint", 1), 2, "unknown flag"),
    (train, ("--data", "imagenet9"), 2, "for evaluation only"), (train, ("--data", "cub", "--root", FILE), 2, FILE),
    (train, ("--data", "cub", "--root", "nowhere"), 2, "CUB_200_2011.tgz"), (train, (*MINI, "--config", "nowhere.json"), 2, "no such file"),
    (train, (*MINI, "--config", FILE), 2, "not whole JSON"), (train, (*MINI, "--config", "."), 2, "directory"),
    (train, (*MINI, "--out", f"{FILE}/run", "--limit", 16, "--epochs", 1, "--batch", 8), 1, FILE),
    (train, (*MINI, "--resume", "--out", "nowhere"), 2, "no run at nowhere"), (train, (*MINI, "--weights", "nowhere.pt"), 2, "no such file"),
    (train, (*MINI, "--weights", FILE), 2, FILE), (train, (*MINI, "--arch", "b", "--size", 98, "--weights", "mini"), 2, "--arch"),
    (train, (*MINI, "--device", "abacus"), 2, "--device abacus"), (train, (*MINI, "--size", 100), 2, "not a multiple"),
    (train, (*MINI, "--arch", "7b16"), 2, "--arch 7b16 is refused"), (train, (*MINI, "--arch", "s16", "--size", 96, "--weights", "dinov2"), 2, "--weights dinov3"),
    (train, (*MINI, "--arch", "mini-rotary"), 2, "add --arch mini"), (train, (*MINI, "--selector-weights", "nowhere.pt"), 2, "no such file"),
    (train, (*MINI, "--weights", "dinov3"), 2, "add --arch s16"), (train, (*MINI, "--method", "erm", "--selector-weights", "mini"), 2, "means nothing to"),
    (train, (*MINI, "--size", 8), 2, "3 x 3"), (train, (*MINI, "--batch", 100000, "--micro", 8), 2, "larger than the training set"),
    (train, ("--data", "folder"), 2, "--root"), (train, ("--data", "folder", "--root", FILE), 2, "not a folder"), (train, ("--data", "folder", "--root", "."), 2, "expected"),
    (train, ("--data", "folder", "--mini"), 2, "--recipe mini"), (train, ("--recipe", "papr"), 2, "did you mean paper"), (train, ("--arch", "mini", "--size", 96), 2, "--weights mini"),
    (train, (*MINI, "--method", "erm", "--recipe", "mini", "--k", 3), 2, "means nothing to"), (train, (*MINI, "--arch", "s", "--size", 98), 2, "--arch mini"),
    (train, (*MINI, "--swap", 1.5), 2, "at most 1"), (train, (*MINI, "--swap-mask", "own"), 2, "without --swap"), (train, (*MINI, "--swap", 0.5, "--swap-mask", "owm"), 2, "did you mean own"),
    (train, (*MINI, "--method", "erm", "--swap", 0.5, "--swap-mask", "own"), 2, "finds no mask of its own"), (train, (*MINI, "--method", "early-random", "--swap", 1), 2, "means nothing to"),
    (train, (*MINI, "--swap", 0.5, "--swap-mask", "found", "--weights", "none"), 2, "give --weights"), (train, (*MINI, "--swap", 0.5, "--batch", 1), 2, "larger --batch"),
    (train, ("--masktune", "nowhere"), 2, "no such file"), (train, ("--masktune", FILE), 2, FILE), (train, ("--masktune", ""), 2, "--masktune is empty"), (train, (*MINI, "--method", "erm", "--hide-with", "pixels"), 2, "without --masktune"),
    (train, (*MINI, "--masktune-lr", 1), 2, "without --masktune"), (train, ("--masktun", "x"), 2, "did you mean --masktune"),
    (train, (*MINI, "--weight-mask", 1), 2, "without --supervise"), (train, (*MINI, "--method", "erm", "--supervise", "masks"), 2, "means nothing to"), (train, (*MINI, "--supervise", "mask"), 2, "did you mean masks"),
    (train, (*MINI, "--method", "pdiscoformer", "--weight-complement", 1), 2, "means nothing to"), (train, (*MINI, "--weight-complement", -1), 2, "at least 0"),
    (train, (*MINI, "--method", "seg-erm", "--k", 3), 2, "means nothing to"), (train, (*MINI, "--method", "seg-erm", "--draft"), 2, "means nothing to"), (train, (*MINI, "--method", "box-erm"), 2, "did you mean bbox-erm"),
    (train, (*MINI, "--objective", "grop-dro"), 2, "did you mean group-dro"), (train, (*MINI, "--groups", FILE), 2, "means nothing with --objective erm"),
    *((train, (*MINI, "--objective", name), 2, f"groups.py --ckpt runs/<name>/best.pt --by {by}") for name, by in (("jtt", "errors"), ("george", "clusters"))),
    (train, (*MINI, "--objective", "jtt", "--groups", FILE), 2, "has no column id"), (train, (*MINI, "--objective", "balanced", "--groups", "nowhere.csv"), 2, "no such file"),
    (train, (*MINI, "--objective", "reweight", "--upweight", 3), 2, "only with jtt"), (train, (*MINI, "--objective", "balanced", "--dro-step", 1), 2, "only with group-dro, george"),
    (train, (*MINI, "--objective", "jtt", "--upweight", 0), 2, "above 0"), (train, (*MINI, "--objective", "group-dro", "--dro-adjustment", -1), 2, "at least 0"),
    (train, (*MINI, "--method", "early-random", "--objective", "balanced"), 2, "means nothing to"), (train, (*MINI, "--select", "worst"), 2, "did you mean worst_"),
    *((train, ("--data", name, "--mini", "--objective", "group-dro"), 2, why) for name, why in (
        ("cub", "there are no places"), ("siim", "there are no places"), ("metashift", "each class is in one place only"))),
    (train, ("--data", "cub", "--mini", "--select", "worst_class"), 2, "--val-share 0.1"),
    (train, ("--data", "cub", "--mini", "--val-share", 0.1, "--select", "worst_group"), 2, "take --select worst_class"),
    # data.py
    (data, (), 2, "--root"), (data, ("--root", FILE), 2, "not a folder"), (data, ("--mini",), 2, "leave out one"), (data, ("--data", "mars"), 2, "unknown --data"),
    (data, ("--sheet", FILE), 2, "--force"), (data, ("--sheet", "nowhere/x.png"), 2, "no folder"), (data, ("--sheet", "x.docx"), 2, ".png"),
    # evaluate.py and intervene.py
    *((script, flags, 2, words) for script in (evaluate, intervene) for flags, words in (
        ((), "--ckpt"), (("--ckpt", ""), "--ckpt is empty"), (("--ckpt", "nowhere.pt"), "no such file"), (("--ckpt", "."), "a folder"),
        (("--ckpt", FILE), FILE), (("--ckpt", FILE, "--batch", 0), "at least 1"), (("--ckpt", FILE, "--limit", -1), "at least 0"),
        (("--ckpt", FILE, "--split", "tests"), "did you mean test"), (("--ckpt", FILE, "--device", "abacus"), "abacus"))),
    (evaluate, ("--ckpt", FILE, "--retrain", "drf"), 2, "did you mean dfr"), (evaluate, ("--ckpt", "nowhere.pt", "--retrain", "dfr"), 2, "no such file"),
    (evaluate, ("--ckpt", "nowhere.pt", "--encoding"), 2, "no such file"), (evaluate, ("--ckpt", FILE, "--encodings"), 2, "did you mean --encoding"),
    (evaluate, ("--ckpt", FILE, "--leakage", -1), 2, "at least 0"), (evaluate, ("--ckpt", FILE, "--per-parts"), 2, "did you mean --per-part"),
    (evaluate, ("--ckpt", FILE, "--per-part"), 2, FILE), (evaluate, ("--ckpt", FILE, "--per-part", 3), 2, "unknown flag 3"), (intervene, ("--ckpt", FILE, "--q", 1), 2, "below 1"),
    (intervene, ("--ckpt", FILE, "--score", "angle"), 2, "unknown --score"),
    (intervene, ("--ckpt", FILE, "--tolerance", "inf"), 2, "finite"), (intervene, ("--ckpt", FILE, "--drop", "all"), 2, "invalid int"),
    # groups.py
    *((groups, flags, 2, words) for flags, words in (
        ((), "--ckpt"), (("--ckpt", FILE), "--by"), (("--ckpt", FILE, "--by", "error"), "did you mean errors"), (("--ckpt", "nowhere.pt", "--by", "errors"), "no such file"),
        (("--ckpt", FILE, "--by", "background"), FILE), (("--ckpt", FILE, "--by", "clusters", "--clusters", 1), "take 2"),
        (("--ckpt", FILE, "--by", "clusters", "--clusters", 1000), "at most"), (("--ckpt", FILE, "--by", "errors", "--clusters", 2), "means nothing with"),
        (("--ckpt", FILE, "--by", "errors", "--out", FILE), ".csv"), (("--ckpt", FILE, "--by", "errors", "--out", "nowhere/g.csv"), "no folder"))),
    # predict.py
    (predict, (), 2, "images"), (predict, (FILE,), 2, "give either --ckpt"), (predict, (FILE, "--ckpt", "x.pt", "--weights", "mini"), 2, "give either --ckpt"),
    (predict, (FILE, "--weights", "mini", "--explain"), 2, "needs a trained model"), (predict, (FILE, "--ckpt", "nowhere.pt"), 2, "no such file"),
    (predict, ("nowhere.jpg", "--ckpt", FILE), 2, "nowhere.jpg: no such file"), (predict, (FILE, "--ckpt", FILE, "--out", FILE), 2, "name a folder"),
    (predict, (FILE, "--weights", "mini", "--arch", "mini", "--size", 96), 2, "none of 1 files"), (predict, (FILE, "--weights", "mini"), 2, "--arch"),
    (predict, (FILE, "--weights", "mini", "--arch", "mini", "--size", 95), 2, "--size 95"), (predict, (FILE, "--ckpt", FILE, "--batch", 0), 2, "at least 1"),
    (predict, (FILE, "--weights", "dinov2", "--arch", "mini", "--size", 96), 2, "no mini architecture"), (predict, (FILE, "--arch", "7b16", "--weights", "dinov3"), 2, "refused"),
    # sweep.py
    (sweep, (), 2, "what"), (sweep, ("lader", *MINI), 2, "did you mean ladder"), (sweep, ("erm", *MINI, "--seeds", 0), 2, "at least 1"),
    (sweep, ("early-truth", "erm", "--data", "folder", "--recipe", "mini", "--k", 2), 2, "means nothing to"),
    (sweep, ("erm", *MINI, "--seed", 1), 2, "decided by the sweep"), (sweep, ("erm", *MINI, "--epochs", 0), 2, "at least 1"),
    (sweep, ("erm-jt", *MINI), 2, "did you mean erm-jtt"), (sweep, ("erm", *MINI, "--also", "waterbird200"), 2, "leave it out"), (sweep, ("erm", "--data", "mars"), 2, "unknown --data"),
    # speed.py
    (speed, ("--rounds", 0), 2, "at least 1"), (speed, ("--scale", "--training"), 2, "one at a time"), (speed, ("--keep", 0.5), 2, "means nothing"),
    (speed, ("--training", "--keep", 2), 2, "at most 1"), (speed, ("--arch", "huge"), 2, "no architecture"), (speed, ("--size", 15), 2, "multiple"),
    (speed, ("--out", FILE), 2, "--force"), (speed, ("--out", "."), 2, "folder"),
    # measuring
    (tables, (), 2, "runs"), (tables, ("nowhere",), 2, "nowhere"), (tables, (FILE,), 2, "not a folder"), (tables, (".",), 2, "config.json"),
    (figures, (), 2, "--ckpt"), (figures, ("--ckpt", "nowhere.pt"), 2, "no such file"), (figures, ("--ckpt", FILE, "--format", "docx"), 2, "unknown --format"),
    (figures, ("--ckpt", FILE, "--selectors", "runs"), 2, "--ckpt or --selectors"), (figures, ("--selectors", "nowhere"), 2, "sweep.py selectors"),
    # compose.py
    (compose, (), 2, "--objects"), (compose, ("--objects", "", "--backgrounds", "b", "--out", "o"), 2, "--objects is empty"),
    *((compose, ("--objects", "nowhere", "--backgrounds", "nowhere", "--out", "o", *flags), 2, words) for flags, words in (
        ((), "looked for"), (("--agreement", 1.5), "at most 1"), (("--agreement", "nan"), "finite"), (("--size", 8), "at least 16"),
        (("--sizes", 0.9, 0.5), "smaller and a larger"), (("--crops", 0.9, 0.5), "smaller and a larger"), (("--shares", 0.5, 0.2, 0.2), "add up to 1"),
        (("--shares", 1, 0, 0), "above 0"), (("--sizes", 0.5, 2), "at most 1"), (("--rotation", -1), "at least 0"), (("--train", HUGE), "at most"),
        (("--patch", 100), "larger than --size"), (("--format", "bmp"), "unknown --format"), (("--out", FILE), "is there already"),
        (("--train", 10 ** 7, "--size", 4096), "GiB"), (("--shared-object",), "did you mean --shared-objects"))),
    (compose, ("--objects", FILE, "--backgrounds", "b", "--out", "o"), 2, FILE), (compose, ("--objects", ".", "--backgrounds", ".", "--out", "o"), 2, "no pictures"),
    # miniatures
    (miniature, ("--data", "waterbird"), 2, "waterbird"), (miniature, ("--train", HUGE), 2, "at most"), (miniature, ("--size", 33), 2, "multiple of 8"),
    (miniature, ("--train", 10 ** 6, "--size", 4096), 2, "GiB"),
    (miniature, ("--things", 9, 3), 2, "smaller and a larger"), (miniature, ("--agreement", "nan"), 2, "finite"),
    (miniature, ("--sheet", FILE), 2, "--force"), (miniature, ("--sheet", "nowhere/x.png"), 2, "no folder"),
    (miniature, ("--sheet", "x.docx"), 2, ".png"), (miniature, ("--out", f"{FILE}/x", "--train", 1, "--val", 4, "--test", 4), 1, FILE),
    (pretrain, ("--view", 25), 2, "multiple of 8"), (pretrain, ("--view", 1000), 2, "at most"), (pretrain, ("--scenes", HUGE), 2, "at most"),
    (pretrain, ("--lr", "nan"), 2, "finite"), (pretrain, ("--arch", "s"), 2, "unknown --arch"), (pretrain, ("--resume", "--out", "nowhere"), 2, "no such file"),
    (pretrain, ("--out", "."), 2, "not empty"), (pretrain, ("--shift", 1), 2, "unknown flag")]


def test_an_error_names_the_command_as_it_was_typed():
    said = subprocess.run([sys.executable, "-m", "measure.tables", "runs", "--dat"], cwd=ROOT, capture_output=True, text=True).stderr
    assert said.startswith("python -m measure.tables: unknown flag --dat")


@pytest.mark.parametrize("script, flags, status, words", PROMISE, ids=[f"{s.__name__} {' '.join(map(str, f))}"[:90] for s, f, *_ in PROMISE])
def test_bad_input_is_one_line_and_leaves_nothing(script, flags, status, words, tmp_path, monkeypatch, capsys):
    (tmp_path / FILE).write_text("somebody's notes\n")
    monkeypatch.chdir(tmp_path)
    line = fails(script.main, *flags, status=status)(capsys)
    assert words in line and "Traceback" not in line
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.name.endswith(".lock"))
    assert left == [FILE] and (tmp_path / FILE).read_text() == "somebody's notes\n"
