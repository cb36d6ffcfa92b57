"""tables.py: means and intervals by hand, rows named by what was changed, the paper's numbers beside ours."""
import csv
import json
import re
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

import baselines
from measure import tables
import train
import runs
from settings import parse, write_json
from tiny import fails

PLACE = {"none": 0.1, "late": 0.3, "early": 0.7}


def write_run(folder, *flags, worst=0.5, report="report.json", images=16, **more):
    folder.mkdir(exist_ok=True)
    cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", *flags, "--out", str(folder)], runs.preset)
    write_json(folder / "config.json", runs.plain(asdict(cfg)))
    write_json(folder / report, {"data": "waterbirds-mini", "split": "test", "images": 400,
                                 "stage2": {"worst_group": worst, "aa": 1.0}, **more,
                                 "leakage": {"images": images, "repaint": {"max_logit_change": 0.0}, "swap": {"flip_rate": 0.0}, "place_of_mask": PLACE}})
    return str(folder)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_interval_is_students_t():
    values = [0.9, 0.8, 0.85, 0.95, 0.7]
    mean, half = tables.interval(values)
    assert mean == pytest.approx(statistics.mean(values)) and half == pytest.approx(2.776 * statistics.stdev(values) / 5 ** 0.5)
    assert tables.interval([0.5]) == (0.5, None)


def test_rows_are_methods_with_what_was_changed_and_numbers_are_over_their_seeds(tmp_path, capsys):
    found = lambda share, empty, iou: {"mask": {"kept_share": share, "empty": empty}, "localisation": {"foreground_iou": iou}}
    runs = [write_run(tmp_path / "a", worst=0.9, **found(0.2, 4, 0.6)),
            write_run(tmp_path / "b", "--seed", "1", worst=0.8, **found(0.4, 0, 0.5)),
            write_run(tmp_path / "c", "--hardness", "soft", "--no-joint", **found(0.5, 0, 0.5)),
            write_run(tmp_path / "d", "--method", "erm", worst=0.1),
            write_run(tmp_path / "e", "--method", "early-truth"),
            write_run(tmp_path / "f", "--method", "early-truth", "--pooling", "cls")]
    (tmp_path / "a.md").write_text("what a shell's * brings along")
    tables.main([*runs, str(tmp_path / "a.md"), "--out", str(tmp_path / "out" / "all")])
    text = capsys.readouterr().out
    header, _, ifam, soft, erm, truth, published = map(cells, text.splitlines()[2:9])
    row = dict(zip(header, ifam))
    assert row[""] == "`ifam`" and row["n"] == "2" and row["worst group"] == "0.80 / 0.90" and row["kept"] == "0.20 / 0.40"
    assert row["least worst group"] == "0.800" and row["early - late"] == "0.40 / 0.40" and row["empty"] == "0 / 0.01"
    assert row["repaint, logits"] == "0 / 0" and "swap: flipped" in row
    row = dict(zip(header, erm))
    assert row["worst group"] == "0.100" and row["kept"] == row["foreground IoU"] == "–" and "AUROC" not in header
    assert [r[0] for r in (soft, truth, published)] == ["`ifam --hardness soft --no-joint`", "`early-truth`", "`early-truth --pooling cls`"]
    assert (tmp_path / "out" / "all.md").read_text() == text and tables.FOOTNOTE in text
    table, = json.loads((tmp_path / "out" / "all.json").read_text())["tables"]
    assert table["rows"][0]["numbers"]["worst group"]["half_interval"] == pytest.approx(12.706 * 0.05)     # as before
    assert table["rows"][0]["numbers"]["worst group"]["values"] == [0.9, 0.8] and table["rows"][0]["seeds"] == [0, 1]
    assert table["rows"][0]["paper"]["accuracy"] == {"value": 0.99, "parts": 8, "network": None}


@pytest.mark.parametrize("values, text", (
    ([0.5], "0.500"), ([0.93, 0.03, 0.825], "0.03 / 0.82 / 0.93"), ([0.004, 0.0], "0 / 0.004"),
    ([0.9, 0.8, 0.85, 0.95], "0.875 ± 0.103")), ids=str)
def test_two_or_three_seeds_are_listed_from_least_to_best_and_more_have_an_interval(values, text):
    mean, half = tables.interval(values)
    assert tables.ours({"mean": mean, "half_interval": half, "values": values}, len(values)) == text


def two_tables(folder):
    """Runs of two benchmarks with what is hard to escape, and the name that their tables were written under."""
    folders = [write_run(folder / "a", worst=0.9), write_run(folder / "b", "--seed", "1", worst=0.8),
               write_run(folder / "c", "--method", "erm", worst=None),
               write_run(folder / "d", "--weights", "my_file #1 & 50% of {x}~^\\$.pt", worst=0.25),
               write_run(folder / "e", "--val-share", "0.1", report="report-val.json", split="val")]
    (folder / "out").mkdir()
    tables.main([*folders, "--out", str(folder / "out" / "all")])
    return folder / "out" / "all"


def test_csv_and_latex_have_the_cells_of_the_markdown(tmp_path, capsys):
    name = two_tables(tmp_path)
    printed = [block.splitlines() for block in capsys.readouterr().out.split("**waterbirds-mini, ")[1:]]
    assert len(printed) == 2
    found = list(csv.DictReader((tmp_path / "out" / "all.csv").read_text().splitlines()))
    latex = name.with_suffix(".tex").read_text().split(r"\begin{tabular}")[1:]
    for lines, tex in zip(printed, latex, strict=True):
        split = lines[0].partition(",")[0]
        header, _, *rows = [cells(line) for line in lines if line.startswith("|")]
        titles = ["method", *(f"{before}, paper" if title == "paper" else title for before, title in zip(header, header[1:]))]
        for row in rows:
            of_csv = found.pop(0)
            assert (of_csv["data"], of_csv["split"], of_csv["images"]) == ("waterbirds-mini", split, "400")
            there = dict(zip(titles, [row[0].strip("`"), *row[1:]]))
            assert {title: of_csv[title] for title in titles} == {title: "" if x == "–" else x for title, x in there.items()}
            assert not any(of_csv[title] for title in of_csv.keys() - titles - {"data", "split", "images"})
        body = re.search(r"\\midrule\n(.*)\\bottomrule", tex, re.S)[1].splitlines()
        for row, line in zip(rows, body, strict=True):
            numbers = [x.replace("--", "–").replace(r"$\pm$", "±") for x in re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))[1:]]
            assert numbers == row[1:]
    assert not found


def test_latex_is_balanced_and_escaped(tmp_path):
    text = two_tables(tmp_path).with_suffix(".tex").read_text()
    assert text.startswith("% ") and "booktabs" in text.splitlines()[0]
    bare = re.sub(r"\\[\\&%$#_{}]", "", text.partition("\n")[2])                # without what is escaped, and its line ends
    assert bare.count("{") == bare.count("}") and not re.search(r"[#_~^%±–]|\*\*", bare) and bare.count("$") % 2 == 0
    for kind in ("table", "tabular"):
        assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}") == 2
    for columns, body in re.findall(r"\\begin{tabular}{(\w+)}\n(.*?)\\end{tabular}", text, re.S):
        lines = [line for line in body.splitlines() if line not in (r"\toprule", r"\midrule", r"\bottomrule")]
        assert columns[0] == "l" and set(columns[1:]) == {"r"} and len(lines) >= 2 and all(line.endswith(r" \\") for line in lines)
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
        assert [body.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == sorted(
            body.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"\texttt{ifam -{}-weights my\_file \#1 \& 50\% of \{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}\$.pt}" in text
    assert r"\textbf{real data, full size}" in text and r"test\_and\_val" in text


@pytest.mark.parametrize("ending", ["md", "tex", "csv", "json"])
def test_a_file_of_somebody_else_is_not_replaced_and_nothing_is_written_beside_it(ending, tmp_path, capsys):
    run = write_run(tmp_path / "a")
    (tmp_path / f"all.{ending}").write_text("a,b\n1,2\n")
    assert f"all.{ending} was not written by this script" in fails(tables.main, run, "--out", tmp_path / "all")(capsys)
    assert [p.name for p in tmp_path.glob("all*")] == [f"all.{ending}"]
    for _ in range(2):                                   # its own it replaces
        tables.main([run, "--out", str(tmp_path / "all"), "--force"])
        tables.main([run, "--out", str(tmp_path / "all")])


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_method_has_a_row_that_is_called_after_it(method, tmp_path):
    (_, name, *_), = tables.read_run(Path(write_run(tmp_path / "run", "--method", method)))
    assert name == method


def test_the_papers_numbers_stand_beside_ours_in_our_units():
    assert tables.from_paper("waterbirds", "ifam", 8) == {"accuracy": (0.99, 8), "worst rare group": (0.97, 8)}
    assert tables.from_paper("waterbirds", "ifam", 5) == {}                      # no such number
    assert tables.from_paper("cub-mini", "ifam", 5) == {"accuracy": (pytest.approx(0.901), 4)}
    assert tables.from_paper("metashift", "ifam --k 8", 8) == {"accuracy": (0.845, 8), "worst group": (pytest.approx(0.788), 8)}
    assert tables.from_paper("waterbird200", "ifam --k 4 --no-shaping", 4) == {"accuracy": (pytest.approx(0.802), 4)}
    assert tables.from_paper("waterbirds", "late-truth --pooling mean-all", 8) == tables.from_paper("waterbirds", "late-truth", 8)
    assert tables.from_paper("siim", "erm", 8) == {"AUROC": (92.6, None), "worst group AUROC": (54.3, None)}
    assert tables.from_paper("waterbirds", "ifam --no-joint", 8) == {}
    assert tables.from_paper("waterbirds", "erm --objective group-dro --select worst_group", 8)["worst rare group"] == (pytest.approx(0.906), None)
    assert tables.from_paper("waterbirds", "erm --objective group-dro --groups groups-background.csv", 8) == {}   # not the benchmark's groups
    assert tables.from_paper("waterbirds", "erm --masktune --hide-with pixels", 8) == tables.from_paper("waterbirds", "erm --masktune", 8) != {}
    assert tables.from_paper("siim-mini", "erm --objective jtt --groups groups-errors.csv", 4) == {"AUROC": (92.6, None), "worst group AUROC": (55.9, None)}
    assert tables.theirs({"value": .906, "parts": None, "network": "ResNet-50"}) == "0.906 (ResNet-50)"
    assert tables.from_paper("waterbirds", "frozen + PCA probe", 8) == {"accuracy": (pytest.approx(0.974), None), "worst rare group": (0.94, None)}
    assert tables.from_paper("waterbirds", "ifam --k 16 --batch 64", 16) == {"accuracy": (pytest.approx(0.988), 16), "worst rare group": (0.97, 16)}
    assert tables.from_paper("waterbird200", "ifam", 8)["foreground IoU"] == (pytest.approx(0.686), 8)
    for columns, rows in tables.PAPER.values():
        assert set(columns) <= tables.COLUMNS.keys() and all(len(numbers) <= len(columns) for numbers in rows.values())


def test_every_split_and_benchmark_of_a_run_has_its_own_table(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    write_run(tmp_path / "a", report="report-val.json", split="val")
    tables.main([run])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("**")] == \
        ["**waterbirds-mini, test, 400 images**", "**waterbirds-mini, val, 400 images**"]


def test_reports_of_part_of_a_split_are_never_averaged_with_those_of_all_of_it(tmp_path, capsys):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "--seed", "1")]
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    (tmp_path / "b" / "report.json").write_text(json.dumps(report | {"images": 8}))
    tables.main(folders)
    out = capsys.readouterr().out
    assert "test, 400 images**" in out and "test, 8 images**" in out and out.count("| `ifam` | 1 |") == 2


def test_a_corrected_model_has_a_row_of_its_own_and_the_papers_number_beside_it(tmp_path, capsys):
    folder = write_run(tmp_path / "a", worst=0.5)
    for name, hand, by_rule, q, q_by, split in (
            ("loo", [], [2], None, None, "val"), ("hand", [1, 2], [], None, None, "val"), ("both", [], [2], 0.9, "rule", "val"),
            ("mixed", [0], [2], None, None, "test"), ("none", [], [], None, None, "test"), ("q9", [], [], 0.9, "hand", "val"),
            ("q99", [], [], 0.99, "hand", "test")):
        decision = {"parts_by_hand": hand, "parts_by_rule": by_rule, "q_by": q_by, "split": split}
        write_run(tmp_path / "a", worst=0.7, report=f"report-{name}.json", images=100,
                  intervention={"drop": hand + by_rule, "q": q, "decision": decision})
    tables.main([folder])
    out = capsys.readouterr().out
    assert [cells(line)[0] for line in out.splitlines()[4:12]] == [
        "`ifam`", "`ifam + LOO + patches`", "`ifam + without part 1, part 2`", "`ifam + LOO`",
        "`ifam + without part 0 + LOO (chosen on test)`", "`ifam + nothing found`", "`ifam + patches q 0.9`", "`ifam + patches q 0.99`"]
    assert "largest change of an image, of 16 to 100" in out
    paper = lambda row: tables.from_paper("metashift", row, 8)["worst group"]
    assert paper("ifam --k 8 + LOO + patches") == paper("ifam --k 8 + LOO + patches q 0.9 (chosen on test)") == (pytest.approx(0.83), 8)
    assert paper("ifam --k 8 + patches q 0.99") == (pytest.approx(0.801), 8) and not tables.from_paper("metashift", "ifam --k 8 + patches q 0.9", 8)
    write_run(tmp_path / "a", report="report-twin.json", intervention={"drop": [2], "q": None, "decision": {
        "parts_by_hand": [], "parts_by_rule": [2], "q_by": None, "split": "val"}})
    assert "report-loo.json and" in (line := fails(tables.main, folder)(capsys)) and "report-twin.json are of the same" in line


def test_a_number_that_some_seeds_lack_says_how_many_have_it(tmp_path, capsys):
    runs = [write_run(tmp_path / str(seed), "--seed", str(seed), **({"localisation": {"foreground_iou": 0.5}} if seed else {}))
            for seed in range(3)]
    tables.main(runs)
    assert "0.50 / 0.50 (of 2)" in capsys.readouterr().out


def test_what_cannot_be_put_in_a_table_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    assert "same settings and seed" in fails(tables.main, run, write_run(tmp_path / "b"))(capsys)
    (tmp_path / "b" / "report.json").unlink()
    assert "evaluate.py --ckpt" in fails(tables.main, tmp_path / "b")(capsys)
    assert "no config.json" in fails(tables.main, tmp_path / "typo")(capsys)
    tables.main([run, str(tmp_path / "b"), str(tmp_path / "typo")])              # a sweep that is still running
    assert "left out, without config.json or report.json" in (line := capsys.readouterr().err) and "typo" in line
    for content in ("{", "{}", "[]"):
        (tmp_path / "a" / "report.json").write_text(content)
        assert "report.json" in fails(tables.main, run)(capsys)


@pytest.mark.parametrize("flags, row, given", [
    ((), "ifam", "none"), (("--method", "erm", "--objective", "group-dro", "--select", "worst_group"), "erm --objective group-dro --select worst_group", "groups: training, validation"),
    (("--objective", "balanced"), "ifam --objective balanced", "groups: training"),
    (("--objective", "balanced", "--data", "metashift"), "ifam --objective balanced", "none"), (("--select", "worst_class"), "ifam --select worst_class", "none"),
    (("--objective", "jtt", "--groups", "a/errors.csv", "--upweight", "20"), "ifam --objective jtt --groups errors.csv --upweight 20.0", "2 passes"),
    (("--objective", "george", "--groups", "a/clusters.csv"), "ifam --objective george --groups clusters.csv", "2 passes"),
    (("--method", "early-truth", "--objective", "reweight"), "early-truth --objective reweight", "groups: training; masks: training, test"),
    (("--trim", "truth"), "ifam --trim truth", "masks: training, test"), (("--method", "seg-erm"), "seg-erm", "masks: training"), (("--method", "bbox-erm"), "bbox-erm", "masks: training, as boxes"),
    (("--supervise", "masks"), "ifam --supervise masks", "masks: training"), (("--supervise", "boxes"), "ifam --supervise boxes", "masks: training, as boxes"),
    (("--swap", "0.5"), "ifam --swap 0.5", "masks: training"), (("--swap", "0.5", "--swap-mask", "own"), "ifam --swap 0.5 --swap-mask own", "none"), (("--weight-complement", "4"), "ifam --weight-complement 4.0", "none")])
def test_every_row_says_what_supervision_it_had(flags, row, given, tmp_path):
    write_run(tmp_path / "a", *flags)
    (_, name, _, _, report), = tables.read_run(tmp_path / "a")
    assert (name, tables.supervision_text(report["supervision"])) == (row, given)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    if not flags:                                        # a run from before there were objectives
        write_json(tmp_path / "a" / "config.json", {key: x for key, x in config.items() if key not in ("objective", "groups", "select")})
        assert tables.read_run(tmp_path / "a")[0][1:] == (name, 0, 4, report)


def test_a_run_of_masktune_took_an_epoch_more_and_its_row_does_not_name_the_folder(tmp_path):
    write_run(tmp_path / "a", "--method", "erm")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    write_json(tmp_path / "a" / "config.json", config | {"masktune": "runs/waterbirds-mini-erm"})
    (_, name, _, _, report), = tables.read_run(tmp_path / "a")
    assert (name, tables.supervision_text(report["supervision"])) == ("erm --masktune", "1 pass + 1 epoch")


def test_a_correction_that_was_decided_on_validation_has_seen_its_groups():
    decided = lambda by, split: {"intervention": {"decision": {"parts_by_rule": [1] * by, "parts_by_hand": [], "q_by": None, "split": split}}}
    config = {"data": "waterbirds", "method": "ifam"}
    assert tables.supervision(config, decided(True, "val"))["groups"] == ["validation"]
    assert tables.supervision(config, decided(False, "val"))["groups"] == tables.supervision(config | {"data": "cub"}, decided(True, "val"))["groups"] == []
