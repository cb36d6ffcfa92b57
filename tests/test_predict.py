"""Pictures of one's own: what predict.py says of them is what evaluation says, whatever their format, size and method."""
import csv
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from test_weights import snapshot
from tiny import fails

import baselines
import data
import intervene
import predict
import runs
from benchmarks.files import is_our_picture
from benchmarks.samples import patch_keep
from benchmarks.transforms import PIPELINES
from ifam import limits_of
from settings import UsageError, parse


@pytest.fixture(scope="module")
def samples():
    return data.load("waterbirds", data.find_root("waterbirds", "data", True), 96, limit=6, splits=("test",))["test"]


@pytest.fixture(scope="module")
def saved(samples, tmp_path_factory):
    """-> a function: method and flags -> path of a checkpoint of random weights that tell images apart."""
    def save(method="ifam", *flags, dataset=True):
        path = tmp_path_factory.mktemp("runs") / "best.pt"
        cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", "--method", method, *flags], runs.preset)
        torch.manual_seed(1)
        model = baselines.build(asdict(cfg), classes=2)
        if model.selector:
            torch.nn.init.normal_(model.selector.prototypes, std=0.5)
        runs.save(path, 0, cfg, 1, {"split": "val", "epoch": 1, "accuracy": None}, {"model": model},
                  dataset=samples.described() if dataset else None)
        return path
    return save


@pytest.fixture(scope="module")
def checkpoint(saved):
    return saved()


@pytest.fixture(scope="module")
def model(checkpoint):
    return runs.load(checkpoint)


def test_files_get_the_predictions_that_their_benchmark_gets(model, samples):
    ours, theirs = predict.on(model, samples.paths), predict.predict(model, samples)
    assert torch.equal(ours.logits, theirs["logits"]) and torch.equal(ours.keep, theirs["keep"])
    assert torch.equal(ours.logits_stage1, theirs["logits_stage1"])
    assert ours.names == [samples.classes[c] for c in theirs["logits"].argmax(1)]
    assert ours.maps.shape == (6, 5, 12, 12) and ours.parts.shape == (6, 12, 12)


def test_a_photograph_is_read_upright_from_a_file_and_from_pillow(model, samples, tmp_path):
    upright = Image.open(samples.paths[0]).convert("RGB").crop((0, 0, 96, 60))
    for orientation, back in ((6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180), (2, Image.Transpose.FLIP_LEFT_RIGHT)):
        stored = upright.transpose(back)
        exif = stored.getexif()
        exif[274] = orientation
        stored.save(path := tmp_path / f"{orientation}.png", exif=exif)
        seen = predict.open_picture(path, 96)
        assert torch.equal(seen.image, predict.open_picture(upright, 96).image) and seen.original.size == (96, 60)
        assert torch.equal(seen.image, predict.open_picture(Image.open(path), 96).image)


@pytest.mark.parametrize("pipeline", ["fine-grained", "photographs", "radiographs"])
@pytest.mark.parametrize("size", [(300, 200), (97, 411), (96, 96), (33, 40)])
def test_the_part_of_a_picture_that_is_seen_is_where_it_is_said_to_be(pipeline, size):
    ramp = np.stack(np.broadcast_arrays(np.linspace(0, 255, size[0])[None], np.linspace(0, 255, size[1])[:, None], 0.0), 2)
    seen = predict.open_picture(Image.fromarray(ramp.round().astype(np.uint8)), 96, PIPELINES[pipeline]._replace(normalisation=((0, 0, 0), (1, 1, 1))))
    left, top, right, bottom = seen.seen
    for channel, low, high, n, along in ((0, left, right, size[0], 0), (1, top, bottom, size[1], 1)):
        line = seen.image[channel].mean(along) * (n - 1)                         # pixels of the original, by column or row
        cell = (high - low) / 96
        middle = low + (torch.arange(96) + 0.5) * cell - 0.5
        assert (line - middle)[4:-4].abs().max() < max(1.0, cell) + n / 255


def test_a_squashed_picture_is_seen_whole(model, samples):
    image = Image.open(samples.paths[0]).resize((300, 100))
    assert predict.open_picture(image, 96).seen == pytest.approx((100, 0, 200, 100))
    whole = predict.open_picture(image, 96, squashed=True)
    assert whole.seen == (0, 0, 300, 100) and whole.image.shape == (3, 96, 96)
    assert torch.equal(predict.on(model, [image], squashed=True).logits, predict.on(model, [whole]).logits)


def test_a_picture_too_long_to_crop_is_refused_and_can_be_squashed():
    line = Image.new("RGB", (60000, 1))
    with pytest.raises(UsageError, match="60000 x 1 pixels.*--squash"):
        predict.open_picture(line, 518)
    assert predict.open_picture(line, 518, squashed=True).image.shape == (3, 518, 518)


def test_a_mask_of_ones_own_decides_what_stage_2_sees(model, samples):
    out = predict.on(model, [samples.paths[1]], mask=samples.masks[1])
    sample = samples[1]
    keep = patch_keep(sample["mask"][None], 8)
    assert torch.equal(out.keep, keep)
    with torch.no_grad():
        assert torch.equal(out.logits, model(sample["image"][None], keep).logits)
    hidden = np.asarray(Image.open(samples.paths[1]).convert("RGB")).copy()
    hidden[np.kron(keep.view(12, 12).numpy(), np.ones((8, 8))) == 0] = 0         # the files are 96 x 96: patches are whole pixels
    assert hidden.shape == (96, 96, 3)
    other = predict.on(model, [Image.fromarray(hidden)], mask=samples.masks[1])
    assert torch.equal(out.logits, other.logits)
    with pytest.raises(UsageError, match="give a mask of its size"):
        predict.on(model, [samples.paths[1]], mask=Image.new("L", (8, 8)))


def test_explaining_is_removing_each_part_in_turn(model, samples):
    out = predict.on(model, samples.paths[:2], explain=True)
    images = torch.stack([samples[i]["image"] for i in range(2)])
    for part in range(4):
        model.selector.limits = limits_of(4, [part])
        with torch.no_grad():
            assert torch.equal(out.without[:, part], model(images).logits)
    model.selector.limits = before = limits_of(4, [2])
    both = predict.on(model, samples.paths[:2], explain=True)
    assert model.selector.limits is before and torch.equal(both.without[:, 2], both.logits)
    model.selector.limits = None
    assert not torch.equal(both.logits, out.logits)


def test_a_correction_of_intervene_py_is_applied_to_pictures_too(checkpoint, model, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "best.pt")
    intervene.main(["--ckpt", "best.pt", "--drop", "1", "--limit", "8", "--device", "cpu"])
    predict.main(["--ckpt", "best.pt", str(samples.paths[0]), "--intervention", "intervention.json", "--no-figures"])
    report = json.loads((tmp_path / "predictions/predictions.json").read_text())
    expected = predict.on(model, [samples.paths[0]], explain=True)
    assert report["intervention"]["drop"] == [1] and report["pictures"][0]["parts"][1] == 0
    assert report["pictures"][0]["probability"] == pytest.approx(expected.without[0, 1].softmax(0).max().item(), abs=1e-6)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_method_predicts_and_shows_what_it_has(method, saved, samples, tmp_path, capsys):
    mask = ["--keep", samples.masks[0]] * ("truth" in method)
    flags = ["--ckpt", saved(method), samples.paths[0], "--out", tmp_path / "out", "--arrays", *mask, *["--explain"] * (method in ("ifam", "pdiscoformer"))]
    predict.main([str(f) for f in flags])
    (row,) = json.loads((tmp_path / "out/predictions.json").read_text())["pictures"]
    assert ("parts" in row) == ("without" in row) == (method in ("ifam", "pdiscoformer")) and ("stage1" in row) == (method == "ifam")
    assert ("kept" in row) == (method not in ("erm", "frozen", "ep", "aim", "early-random", "seg-erm", "bbox-erm")) and "best" not in row
    with np.load(row["arrays"]) as arrays:
        logits = torch.from_numpy(arrays["logits"])
        assert row["probability"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-6) and row["prediction"] == arrays["classes"][logits.argmax()]
        assert ("keep" in arrays) == ("kept" in row)
        assert ("maps" in arrays) == ("part_logits" in arrays) == ("parts" in row)
    assert is_our_picture(tmp_path / f"out/{samples.paths[0].stem}.png")


@pytest.mark.parametrize("method, flags, words", [
    ("erm", ["--explain"], "no parts to leave out"), ("pdiscoformer", ["--keep"], "no second stage"), ("aim", ["--keep"], "no second stage"),
    ("early-truth", [], "give --keep MASK"), ("ifam", ["--keep", "--explain"], "leave out --keep or --explain")])
def test_what_a_method_does_not_have_is_refused(method, flags, words, saved, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [word for flag in flags for word in ([flag, samples.masks[0]] if flag == "--keep" else [flag])]
    assert words in fails(predict.main, "--ckpt", saved(method), samples.paths[0], *flags)(capsys)
    assert not any(tmp_path.iterdir())


def test_a_folder_gives_a_row_for_each_picture_and_names_what_is_none(checkpoint, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, mode in (("a.png", "RGB"), ("deep/er/b.webp", "RGB"), ("deep/a.png", "L"), (".hidden.png", "RGB"), ("c.gif", "P"), ("d.tiff", "CMYK")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(samples.paths[0]).resize((64, 80)).convert(mode).save(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("no picture")
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:900])
    command = ["--ckpt", checkpoint, "in", "--out", "in/out"]
    line = fails(predict.main, *command, status=1)(capsys)
    assert "2 of 7 files were left out" in line and "in/cut.png" in line and "in/notes.txt" in line
    report = json.loads((tmp_path / "in/out/predictions.json").read_text())
    assert [row["file"] for row in report["pictures"]] == ["in/a.png", "in/c.gif", "in/d.tiff", "in/deep/a.png", "in/deep/er/b.webp"]
    assert set(report["left_out"]) == {"in/cut.png", "in/notes.txt"} and report["model"]["sha256"] == runs.hash_of(checkpoint)
    with open(tmp_path / "in/out/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["part_2"]) for row in rows] == [row["parts"][2] for row in report["pictures"]]
    assert [float(row["probability"]) for row in rows] == [row["probability"] for row in report["pictures"]]
    written = sorted(p.name for p in (tmp_path / "in/out").iterdir())
    assert written == ["b.png", "c.png", "d.png", "in_a.png.png", "in_deep_a.png.png", "predictions.csv", "predictions.json"]
    fails(predict.main, *command, status=1)(capsys)                              # its own pictures are none of the input
    assert written == sorted(p.name for p in (tmp_path / "in/out").iterdir())


def test_nobodys_files_are_replaced(checkpoint, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    picture = tmp_path / "out" / "x.png"
    Image.open(samples.paths[0]).save(picture)
    before = picture.read_bytes()
    assert "its own figure" in fails(predict.main, "--ckpt", checkpoint, picture, "--out", "out")(capsys)
    Image.open(samples.paths[0]).save(tmp_path / "x.jpg")
    assert "--force" in fails(predict.main, "--ckpt", checkpoint, "x.jpg", "--out", "out")(capsys)
    (tmp_path / "out/predictions.csv").write_text("mine,too\n")
    assert "--force" in fails(predict.main, "--ckpt", checkpoint, "x.jpg", "--out", "out", "--no-figures")(capsys)
    assert picture.read_bytes() == before and (tmp_path / "out/predictions.csv").read_text() == "mine,too\n"


def test_more_than_two_classes_come_with_the_five_best():
    logits = torch.tensor([[0.0, 3, 1, 2, -1, 5, 4]])
    row = predict.row_of(predict.Prediction([predict.Picture("x.jpg", None, (), None, (), None)], tuple("abcdefg"), logits), 0)
    assert [b["class"] for b in row["best"]] == list("fgbdc") and row["prediction"] == "f"
    assert row["best"][1]["probability"] == pytest.approx(logits.softmax(1)[0, 6].item())
    assert predict.flat(row)["prediction_5"] == "c" and "then g" in predict.line_of(row, 5, 1)


def test_old_checkpoints_take_the_names_of_their_benchmark_or_say_that_they_have_none(saved, tmp_path, capsys, monkeypatch):
    path = saved(dataset=False)
    model = runs.load(path)
    assert model.classes == ("landbird", "waterbird") and model.pipeline is PIPELINES["fine-grained"] and model.size == 96
    torch.save({**runs.read_checkpoint(path), "config": {**runs.read_checkpoint(path)["config"], "mini": False, "root": str(tmp_path)}}, tmp_path / "old.pt")
    assert runs.load(tmp_path / "old.pt").classes == ("class 0", "class 1") and "they are numbers" in capsys.readouterr().out
    for fault, words in (({"classes": ["one"], "places": [], "pipeline": "photographs"}, "names of 1"),
                         ({"classes": ["a", "b"], "places": [], "pipeline": "hopes"}, "dataset.pipeline"), ({"classes": 2}, "dataset.classes")):
        torch.save({**runs.read_checkpoint(path), "dataset": fault}, tmp_path / "odd.pt")
        with pytest.raises(UsageError, match=words):
            runs.load(tmp_path / "odd.pt")


def test_a_published_snapshot_predicts_too(samples, tmp_path, monkeypatch):
    whole = snapshot(tmp_path / "snapshot.pt", 2)
    monkeypatch.chdir(tmp_path)                          # no benchmark here: its classes are numbers
    model = runs.load("snapshot.pt", name="waterbirds")
    out = predict.on(model, samples.paths[:2])
    with torch.no_grad():
        assert torch.equal(out.logits, whole.eval()(torch.stack([p.image for p in out.pictures])).logits)
    assert set(out.names) <= {"class 0", "class 1"}


def test_a_backbone_alone_shows_components_and_what_is_found(samples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    predict.main(["--weights", "mini", "--arch", "mini", "--size", "96", *map(str, samples.paths[:2]), "--arrays"])
    assert "no classes and no parts" in capsys.readouterr().out
    rows = json.loads((tmp_path / "predictions/predictions.json").read_text())["pictures"]
    backbone = predict.load_bare("mini", "mini", 96, 4)
    image = samples[0]["image"][None]
    with np.load(rows[0]["arrays"]) as arrays, torch.no_grad():
        tokens = backbone(image)
        assert np.allclose(arrays["patches"].reshape(144, -1), tokens[0, 5:].numpy(), atol=1e-5) and np.allclose(arrays["class_token"], tokens[0, 0].numpy(), atol=1e-5)
        shown = arrays["components"].reshape(144, 3)
        assert shown.min(0) == pytest.approx(0) and shown.max(0) == pytest.approx(1)
        centred = tokens[0, 5:].double() - tokens[0, 5:].double().mean(0)
        values, axes = torch.linalg.eigh(centred.mT @ centred)                   # largest last
        for c in range(3):
            assert abs(np.corrcoef(shown[:, c], (centred @ axes[:, -1 - c]).numpy())[0, 1]) == pytest.approx(1, abs=1e-4)
        assert rows[0]["kept"] == pytest.approx(arrays["keep"].mean())
    assert is_our_picture(tmp_path / rows[0]["figure"])
