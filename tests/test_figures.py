"""Figures: intervals and colours are what they say, and every figure can be written to a file."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ifam
from benchmarks.files import is_our_picture
from measure import figures, leakage
from runs import Config, preset
from settings import UsageError, may_write, parse, write_json
from tiny import fails
from tiny import train as run


def test_a_kind_of_mask_has_its_own_colour_wherever_its_name_occurs():
    colours = [figures.bar_style(f"{mask} (some model)")["color"] for mask in figures.MASKS]
    assert len(set(colours)) == len(figures.MASKS)
    assert figures.bar_style("early, hard")["color"] == figures.bar_style("early, hard (ifam)")["color"]


def test_what_a_mask_drops_is_grey_and_what_it_keeps_is_the_picture():
    picture, keep = np.random.default_rng(0).random((8, 8, 3)), torch.tensor([[1.0, 0], [0, 1]])
    shown = figures.only_kept(picture, keep)
    assert np.array_equal(shown[:4, :4], picture[:4, :4]) and np.allclose(shown[:4, 4:], 0.93)


def test_signs_have_colours_and_zero_has_none():
    less, none, more = figures.signed(np.array([[-1.0, 0, 1]]))[0]
    assert less[2] > less[0] and more[0] > more[2] and np.ptp(none) < 0.01


def test_an_outline_runs_between_kept_and_dropped_patches_only():
    line = figures.outlined(np.zeros((8, 8, 3)), np.array([[1, 0], [1, 0]])).any(2)
    assert line.shape == (24, 24) and line[:, 11:13].all() and not line[:, :10].any() and not line[:, 14:].any()


def test_a_coarse_heat_map_has_the_mean_of_each_cell():
    values = torch.arange(16.0).view(4, 4)
    assert figures.coarse(values, 2)[0, 0] == 2.5 and figures.coarse(values, 2)[3, 3] == values[2:, 2:].mean()


@pytest.mark.parametrize("draw", [
    lambda path: figures.grid({"a": [np.zeros((4, 4, 3)), (np.eye(4), "text")], "b": [None, np.ones((4, 4, 3))]}, ["one"], path, parts=[0, 3], heading="two parts"),
    lambda path: figures.group_bars({"none": {"x y": {"n": 4, "accuracy": 0.5}, "z": {"n": 0, "accuracy": None}}}, path, chance=0.5),
    lambda path: figures.ladder({"one": {"none": 1.0, "early, hard": 0}, "two": {"none": 0, "early, hard": 0}}, path),
    lambda path: figures.curves({"late, hard": [0.5, 0.9], "early, hard": [0.5, 0.6]}, "x", "y", path, chance=0.5),
    figures.schematic,
], ids=["grid", "group bars", "ladder", "curves", "schematic"])
def test_a_figure_is_written_where_it_is_asked_to(draw, tmp_path):
    draw(tmp_path / "figure.png")
    assert min(Image.open(tmp_path / "figure.png").size) > 100 and not figures.plt.get_fignums()


@pytest.mark.parametrize("suffix, start", ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")))
def test_the_suffix_of_a_path_is_the_format_and_a_path_may_be_a_string(suffix, start, tmp_path):
    figures.curves({"early, hard": [0.5, 0.6]}, "x", "y", str(tmp_path / ("figure" + suffix)))
    assert (tmp_path / ("figure" + suffix)).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == ["figure" + suffix]               # nothing half is left


def drawn(monkeypatch, *args, **more):
    """What grid draws, as the axes have it: {name of a row: [(picture as RGB, text), ...]}, and the figure."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path, **how: kept.append(figure))
    figures.grid(*args, **more)
    figure, = kept
    colours = lambda axis: axis.images[0].to_rgba(axis.images[0].get_array())[..., :3] if axis.images else None
    rows = [[(colours(axis), axis.get_xlabel()) for axis in figure.axes
             if axis.get_subplotspec() and axis.get_subplotspec().rowspan.start == row] for row in range(len(args[0]))]
    figures.plt.close(figure)
    return rows, figure


def test_a_map_of_a_tenth_is_drawn_dark_whatever_else_is_in_the_picture(monkeypatch):
    faint, full = np.full((3, 3), 0.1), np.eye(3)
    (alone,), _ = drawn(monkeypatch, {"": [faint]})
    (both,), _ = drawn(monkeypatch, {"": [faint, full]})
    assert alone[0][0].max() < 0.3 and np.array_equal(alone[0][0], both[0][0]) and both[1][0].max() > 0.9


@pytest.mark.parametrize("values", ([[0.0, 1.2]], [[-0.1, 1.0]], [[0.0, np.nan]]), ids=str)
def test_a_map_with_values_outside_the_scale_is_refused_unless_the_scale_is_named(values, monkeypatch):
    with pytest.raises(ValueError, match="pass largest="):
        figures.grid({"": [np.array(values)]})
    assert not figures.plt.get_fignums()
    _, figure = drawn(monkeypatch, {"": [np.array([[0.0, 1.2]])]}, largest=1.2)
    assert ends(figure) == ["0", "1.2"]                  # a scale of the figure's own has a colour bar
    _, figure = drawn(monkeypatch, {"": [np.array([[0.0, 1 + 1e-6]])]})                   # rounding
    assert ends(figure) == []


def ends(figure):
    """What stands at the two ends of the colour bars of a figure."""
    return [label.get_text() for axis in figure.axes if not axis.get_subplotspec() for label in axis.get_yticklabels()]


def test_gradients_which_are_scaled_to_their_own_image_have_a_colour_bar(few, monkeypatch):
    model, samples = few
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path, **how: kept.append(figure))
    figures.gradients({"early, hard": leakage.stage2_classifier(model)}, samples, model.predictor.backbone, count=1)
    assert ends(kept[0]) == ["0", "largest\nof the\nimage"]
    figures.plt.close("all")


def test_a_part_has_one_colour_on_every_animal():
    animal = np.random.default_rng(0).random((8, 8, 3))
    other = animal[..., [2, 0, 1]]                       # other colours, as bright
    parts = np.array([[0, 1], [2, 2]])                   # 2: background
    shown = figures.overlay(animal, parts, 2)
    assert np.allclose(shown, figures.overlay(other, parts, 2))
    for part, corner in ((0, shown[:4, :4]), (1, shown[:4, 4:])):
        assert np.allclose(corner - corner.mean(2, keepdims=True), 0.6 * (figures.part_colour(part) - figures.part_colour(part).mean()))


def test_the_number_of_a_part_stands_on_one_of_its_patches_and_only_on_parts_that_occur():
    parts = np.full((4, 6), 3)
    parts[0, 0] = parts[3, 5] = parts[3, 4] = 0          # a ring would have its middle outside
    parts[1, 2] = 2
    marks = figures.numbered(parts, 3)
    assert [text for *_, text in marks] == ["0", "2"]
    for x, y, text in marks:
        assert parts[int(y * 4), int(x * 6)] == int(text)


@pytest.mark.parametrize("suffix", figures.FORMATS)
def test_every_format_has_our_signature_and_a_picture_of_somebody_else_has_not(suffix, tmp_path):
    ours, theirs = tmp_path / f"ours.{suffix}", tmp_path / f"theirs.{suffix}"
    figures.curves({"early, hard": [0.5, 0.6]}, "x", "y", ours)
    figures.plt.figure().savefig(theirs, **({"metadata": {"Software": None}} if suffix == "png" else {}))
    figures.plt.close("all")
    may_write(ours, is_our_picture)
    with pytest.raises(UsageError, match="was not written by this script"):
        may_write(theirs, is_our_picture)


def test_a_figure_of_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(UsageError, match="png, pdf, svg"):
        figures.schematic(tmp_path / "x.docx")
    figures.plt.close("all")
    assert not list(tmp_path.iterdir())


def test_a_film_shows_the_steps_it_is_asked_for_and_refuses_others(few, tmp_path, monkeypatch):
    _, samples = few
    parts = lambda k: [[" ".join([str(k)] * 12)] * 12]
    film = {"data": "waterbirds", "split": "test", "k": 4, "ids": [samples.ids[3]],
            "frames": [{"step": 0, "parts": parts(4)}, {"step": 10, "parts": parts(2)}, {"step": 12, "parts": parts(1)}]}
    (tmp_path / "film.json").write_text(json.dumps(film))
    seen = {}
    monkeypatch.setattr(figures, "grid", lambda rows, titles, path, **more: seen.update(more, rows=rows, titles=titles))
    ids = list(samples.ids)                              # ImageNet's are no list
    monkeypatch.setattr(samples, "ids", type("Names", (), {"__len__": lambda self: len(ids), "__getitem__": lambda self, i: ids[i]})())
    figures.film(tmp_path / "film.json", samples, steps=(0, 12))
    (_, (_, first, _), (_, last, marks)), = seen["rows"].values()
    assert seen["titles"] == ["image", "step 0", "step 12"] and (first, last) == ("0% kept", "100% kept")
    assert seen["parts"] == [1] and marks[0][2] == "1"
    with pytest.raises(UsageError, match="has no 11: it has the steps 0, 10, 12"):
        figures.film(tmp_path / "film.json", samples, steps=(11,))
    for wrong in ({"k": "4"}, {"frames": [{"step": 0, "parts": []}]}, {"ids": []}, {"data": "mars"}):
        (tmp_path / "film.json").write_text(json.dumps(film | wrong))
        with pytest.raises(UsageError, match=f"film.json is not as train.py writes it: {[*wrong][0]}"):
            figures.film(tmp_path / "film.json", samples)


def test_a_dollar_in_the_name_of_a_class_is_a_dollar(tmp_path):
    assert figures.short("012.US$_and_$_Bird") == r"US\$ and \$ Bird" and figures.short("dog on sofa") == "dog\non sofa"
    text = figures.plt.figure().text(0, 0, figures.short("a_$x^2$"))
    assert text._preprocess_math(text.get_text()) == ("a $x^2$", False)
    figures.plt.close("all")


@pytest.fixture(scope="module")
def few():
    """A model of parts that lie somewhere, and a few images."""
    torch.manual_seed(0)
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=48, splits=("test",))["test"]
    model = ifam.IFAM(2, 4, "mini", 96).eval()
    with torch.no_grad():
        tokens = model.selector.backbone(samples[0]["image"][None])[0, model.selector.backbone.prefix:]
        model.selector.prototypes[:] = tokens[[20, 60, 78, 130, 5]]
        model.selector.prototypes[1] += 100              # a part that no patch goes to
    return model, samples


def test_the_legend_has_the_parts_that_occur_and_no_other(few, monkeypatch):
    model, samples = few
    with torch.no_grad():
        found = model(torch.stack([samples[i]["image"] for i in range(16)])).part_logits.argmax(1)
    there = sorted(set(found.flatten().tolist()) - {4})
    assert 1 not in there and len(there) > 1
    for draw in (figures.parts, lambda model, *rest, **more: figures.compare_parts({"one": model}, *rest, **more)):
        kept = []
        monkeypatch.setattr(figures, "save", lambda figure, path, **how: kept.append(figure))
        draw(model, samples, count=16)
        assert [text.get_text() for text in kept[0].legends[0].get_texts()] == [f"part {p}" for p in there]
    figures.plt.close("all")


def test_late_against_early_takes_as_many_of_each_rare_group_and_early_answers_do_not_move(few, monkeypatch):
    model, samples = few
    seen = {}
    monkeypatch.setattr(figures, "grid", lambda rows, titles, path, **more: seen.update(rows=rows, titles=titles))
    figures.late_against_early(model, samples, count=4)
    assert seen["titles"] == ["landbird\non water"] * 2 + ["waterbird\non land"] * 2
    image, late, early, again = seen["rows"].values()
    for (_, before), (_, now), (_, both) in zip(late, early, again):
        old, by, new, none = both.split("\n")
        assert old.startswith("late ") and by != "by 0" and (new, none) == (f"early {now},", "by 0") and before[0] in "✓✗"


def test_the_command_writes_both_pictures_and_refuses_a_model_of_one_stage(tmp_path, capsys):
    folder = run(tmp_path / "run")
    figures.main(["--ckpt", str(folder / "best.pt"), "--out", str(tmp_path / "docs")])
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["late_early.png", "schematic.png"]
    erm = run(tmp_path / "erm", "--method", "erm")
    capsys.readouterr()
    assert "has no two stages to compare" in fails(figures.main, "--ckpt", erm / "best.pt")(capsys)


def test_training_curves_are_drawn_from_the_log_with_and_without_validation(tmp_path):
    step = {"step": 1, "epoch": 0.5, "lr": {"heads": 0.0}, "loss": 2.0, "class2": 1.0, "accuracy": 0.5, "gradient_norm": 1.0}
    val = {"step": 2, "val": {"aa": 0.5, "worst_group": 0.25}}
    for name, lines in (("none", []), ("train", [step, step | {"step": 2}]), ("both", [step, val])):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figures.training_curves(str(tmp_path / "log.jsonl"), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_figure_of_small_selectors_knows_a_run_by_its_stage_1_and_needs_one_time_of_each(tmp_path, capsys):
    numbers = {("waterbirds-mini", "worst_group"): {(): (1.1, .93), ("--selector-size", "64"): (.6, .9), ("--selector-arch", "mini/1"): (.4, .7)},
               ("cub-mini", "aa"): {(): (1.1, .94), ("--selector-size", "64"): (.6, .93)}}
    runs, written = [], lambda run, report: (run / "report.json").write_text(json.dumps(report))
    for (title, measure), sizes in numbers.items():
        for flags, (time, value) in sizes.items():
            for seed in (0, 1):
                runs.append(tmp_path / title / f"{len(runs)}-{seed}")
                runs[-1].mkdir(parents=True)
                write_json(runs[-1] / "config.json", vars(parse(Config, "", ["--data", title.removesuffix("-mini"), "--mini", "--seed", str(seed), *flags], preset)))
                report = {"data": title, "split": "test", "images": 8, "leakage": None, "stage2": {measure: value + seed / 100}}
                written(runs[-1], report | {"speed": {"relative_to_dense": time}} if seed == 0 else report)
    (runs[0] / "report-val.json").write_text(json.dumps(report | {"split": "val"}))
    (runs[0] / "report-dfr.json").write_text(json.dumps(report | {"retrain": {"how": "dfr"}}))
    found = figures.of_selectors(runs)
    assert [len(values) for _, values in found["waterbirds, worst group"].values()] == [2, 2, 2]
    assert found["waterbirds, worst group"]["64 px, 4 blocks"] == ([.6], [.9, .91])
    assert list(found["waterbirds, worst group"]) == ["96 px, 4 blocks", "64 px, 4 blocks", "96 px, 1 block"] and len(found["cub"]) == 2
    figures.main(["--selectors", *map(str, runs), "--out", str(tmp_path)])
    assert Image.open(tmp_path / "selectors.png").size[0] > 500
    written(runs[0], report | {"checkpoint": {"sha256": "of another"}})
    (runs[0] / "best.pt").write_bytes(b"")               # of another best.pt: left out, by name
    with pytest.raises(UsageError, match="96 px, 4 blocks has a time: python evaluate.py --ckpt"):
        figures.of_selectors(runs[:2])
    assert "not of the present best.pt" in capsys.readouterr().err
    written(runs[0], {"data": "waterbirds-mini"})
    assert "is not as evaluate.py writes it" in fails(figures.main, "--selectors", *runs, "--out", tmp_path)(capsys)
    assert "no report of a run" in fails(figures.main, "--selectors", tmp_path, "--out", tmp_path)(capsys)
