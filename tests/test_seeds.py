"""seeds.py: means and intervals by hand, and a table from reports."""
import json
import statistics

import pytest

import seeds
from tiny import fails


def test_the_interval_is_students_t():
    values = [0.9, 0.8, 0.85, 0.95, 0.7]
    mean, half = seeds.interval(values)
    assert mean == pytest.approx(statistics.mean(values)) and half == pytest.approx(2.776 * statistics.stdev(values) / 5 ** 0.5)
    assert seeds.interval([0.5]) == (0.5, None)


def test_the_table_groups_runs_by_name_and_leaves_out_what_a_method_does_not_have(tmp_path, capsys):
    place = {"none": 0.1, "late": 0.3, "early": 0.7}
    for name, worst, more in (("ifam-0", 0.9, {"mask": {"kept_share": 0.2, "empty": 4}, "localisation": {"foreground_iou": 0.6}}),
                              ("ifam-1", 0.8, {"mask": {"kept_share": 0.4, "empty": 0}, "localisation": {"foreground_iou": 0.5}}), ("erm-0", 0.1, {})):
        (tmp_path / name).mkdir()
        report = {"images": 400, "stage2": {"worst_group": worst, "aa": 1.0}, **more,
                  "leakage": {"repaint": {"max_logit_change": 0.0}, "place_of_mask": place}}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    seeds.main([str(tmp_path / name) for name in ("ifam-0", "ifam-1", "erm-0")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| ifam | 2 | 0.850 ± 0.635 | 1.000 ± 0.000 | 0.550") and "| 0.300 ± " in lines[2] and lines[2].endswith("| 0.800 |")
    assert lines[3] == "| erm | 1 | 0.100 | 1.000 | – | – | – | 0.000 | 0.300 | 0.700 | 0.400 | 0.100 |"


def test_a_run_without_a_report_is_named(tmp_path, capsys):
    assert "evaluate.py --ckpt" in fails(seeds.main, tmp_path / "run-0")(capsys)
