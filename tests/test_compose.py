"""compose.py: exact masks, exact counts, no file in two splits, the same bytes again; then train and predict on it."""
import csv
import hashlib
import json
import shlex
import shutil
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image

import compose
import evaluate
import predict
import train
from miniature.objects import PLACE_KINDS, Frame, paint, scatter
from miniature.scenes import bird_look, creature
from miniature.scenes import compose as scene
from settings import parse
from test_miniature import contents
from tiny import ROOT, fails, killed_while_drawing

CLASSES, PLACES = ("landbird", "waterbird"), ("land", "water")
SMALL = "--train 40 --val 8 --test 16 --size 32 --workers 1".split()


def draw_sources(root, each=6):
    """The miniature's creatures as cut-outs and its scenes without creatures: root/cutouts/<class>, root/scenes/<place>."""
    for number, (label, place) in enumerate(zip(CLASSES, PLACES)):
        (root / "cutouts" / label).mkdir(parents=True)
        (root / "scenes" / place).mkdir(parents=True)
        for i in range(each):
            rng = np.random.default_rng([number, i])
            canvas = Image.new("RGBA", (240, 240))
            shapes, _ = creature(bird_look(rng, number))
            paint(canvas, [s._replace(colour=(*s.colour, 255)) for s in shapes], Frame((.5, .5), .22, False))
            canvas.resize((80, 80), Image.Resampling.BOX).save(root / "cutouts" / label / f"{i}.png")
            ground = scene(rng, 96, draw_things=partial(scatter, kinds=PLACE_KINDS[number], count=(8, 12), radius=(.05, .08)))
            Image.fromarray(ground.image).save(root / "scenes" / place / f"{i}.jpg", quality=95)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    draw_sources(root)
    return root


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "set"
    run(sources, out)
    return out


def flags(sources, out, *more):
    return ["--objects", str(sources / "cutouts"), "--backgrounds", str(sources / "scenes"), "--out", str(out), *SMALL, *map(str, more)]


def run(sources, out, *more):
    compose.main(flags(sources, out, *more))
    return out


def table(out):
    with open(out / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def solid(path, colour, size=(40, 40), alpha=None):
    """A picture of one colour; alpha: (h, w) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, colour)
    if alpha is not None:
        picture.putalpha(Image.fromarray(alpha))
    picture.save(path)


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("more", [(), ("--soft-edges", 4), ("--rotation", 180, "--sizes", 1, 1), ("--no-flips",)])
def test_the_mask_is_the_alpha_at_the_final_pixels(tmp_path, more):
    """A red object on blue: the red of every pixel is its alpha, the blue what alpha leaves of the background."""
    disc = np.hypot(*(np.indices((60, 40)) - [[[30]], [[20]]])) < 19
    for label in CLASSES:
        for i in range(3):
            solid(tmp_path / "cutouts" / label / f"{i}.png", (255, i, CLASSES.index(label)), (40, 60), disc.astype(np.uint8) * 255)
    for place in PLACES:
        for i in range(3):
            solid(tmp_path / "scenes" / place / f"{i}.png", (0, PLACES.index(place), 255 - i))
    out, partly = run(tmp_path, tmp_path / "out", *more), 0
    for row in table(out):
        image, mask = (np.asarray(Image.open(out / row[name])).astype(int) for name in ("filename", "mask"))
        assert np.abs(image[..., 0] - mask).max() <= 1 and (image[..., 2] >= 252 - mask).all() and (image[..., 2] <= 256 - mask).all()
        assert not ((mask > 0) & (mask < compose.FAINT)).any() and (mask > 0).any()
        partly += ((mask > 0) & (mask < 255)).mean()
    assert partly / 64 > (.1 if "--soft-edges" in more else .005)


def test_the_object_does_not_depend_on_the_background_nor_the_background_on_the_object(sources, tmp_path):
    cfg = parse(compose.Config, "", flags(sources, tmp_path / "out"))
    objects, backgrounds, _ = compose.gather(cfg)
    for job in compose.plan(cfg, objects, backgrounds)[:10]:
        other = job._replace(background=backgrounds["train"][PLACES[1 - PLACES.index(job.background.kind)]][0])
        (image, mask), (elsewhere, same) = (compose.picture_of(j, cfg) for j in (job, other))
        assert (mask == same).all() and (image == elsewhere)[mask == 255].all() and (image != elsewhere)[mask == 0].any()
        thing = job._replace(object=next(s for kind in objects["train"].values() for s in kind if s != job.object))
        changed, other_mask = compose.picture_of(thing, cfg)
        assert (image == changed)[(mask == 0) & (other_mask == 0)].mean() > .999     # the same square of the photograph
        recoloured, same = compose.picture_of(job, parse(compose.Config, "", flags(sources, "out", "--recolour-backgrounds")))
        assert (mask == same).all() and (image == recoloured)[mask == 255].all() and (image != recoloured)[mask == 0].mean() > .9


def test_an_object_has_the_sizes_that_were_asked_for(sources, tmp_path):
    out = run(sources, tmp_path / "out", "--sizes", .5, .5, "--rotation", 0, "--size", 64)
    for row in table(out):
        extent = [np.ptp(np.asarray(Image.open(out / row["mask"])).any(axis).nonzero()[0]) + 1 for axis in (0, 1)]
        assert max(extent) in (31, 32, 33), row


def test_recolouring_leaves_no_colour_that_tells_the_place():
    """Green and blue photographs: their mean colours are drawn from one distribution; the structure stays."""
    base = np.random.default_rng(0).uniform(90, 120, (16, 16, 1)) * np.ones(3)
    means = []
    for tint in ((0, 60, 0), (0, 0, 60)):
        found = [compose.recolour(np.random.default_rng(i), base + tint) for i in range(200)]
        means.append(np.mean([x.mean((0, 1)) for x in found], axis=0))
        grey = [compose.TO_CHROMA[0] @ x.reshape(-1, 3).T for x in found[:20]]
        assert all(np.corrcoef(g, base[..., 0].ravel())[0, 1] > .99 for g in grey)
    assert np.abs(means[0] - means[1]).max() < 1


def test_admitted_and_the_colour_of_rims_are_those_of_a_loop_over_patches(made):
    for row in table(made)[:12]:
        image, mask = (np.asarray(Image.open(made / row[name])) for name in ("filename", "mask"))
        background, pixels, cover = [], 0, {}
        for y in range(0, 32, 8):
            for x in range(0, 32, 8):
                cover[y, x] = (mask[y:y + 8, x:x + 8] > 0).mean()
        for (y, x), share in cover.items():
            if share > .5 or max(cover.values()) <= .5 and share == max(cover.values()):
                pixels += 64
                background += list(image[y:y + 8, x:x + 8][mask[y:y + 8, x:x + 8] == 0])
        share, colour = compose.rims(image, mask, 8)
        assert share == pytest.approx(len(background) / pixels) and colour == pytest.approx(np.mean(background, 0))


# ---------------------------------------------------------------- who stands where
def test_no_individual_and_no_photograph_is_in_two_splits(made):
    for column in ("object", "background"):
        shown = [{row[column] for row in table(made) if row["split"] == split} for split in compose.SPLITS]
        assert not shown[0] & shown[1] and not shown[0] & shown[2] and not shown[1] & shown[2] and all(shown)


@pytest.mark.parametrize("agreement", [0, .5, .95, 1])
def test_training_agrees_as_asked_and_val_and_test_are_balanced(sources, tmp_path, agreement):
    out = run(sources, tmp_path / "out", "--agreement", agreement)
    met = Counter((row["split"], row["label"], row["place"]) for row in table(out))
    for split, (agree, differ) in {"train": (round(20 * agreement), 20 - round(20 * agreement)), "val": (2, 2), "test": (4, 4)}.items():
        assert [met[split, c, p] for c in CLASSES for p in PLACES] == [agree, differ, differ, agree]


def test_every_individual_of_a_group_is_used_equally_often(sources, tmp_path):
    out = run(sources, tmp_path / "out", "--train", 400)
    for label in CLASSES:
        used = Counter(row["object"] for row in table(out) if row["split"] == "train" and row["label"] == label)
        assert len(used) == 4 and max(used.values()) - min(used.values()) <= 2


@pytest.mark.parametrize("classes, places", [(2, 2), (3, 3), (5, 2), (2, 5), (4, 3)])
def test_a_class_and_a_place_belong_together_in_the_same_way_seen_from_either_side(classes, places):
    home = {i: set(compose.homes(i, classes, places)[0]) for i in range(classes)}
    assert all(home.values()) and set().union(*home.values()) == set(range(places))     # nobody is without a home, no place without a class
    assert all(len(h) < places for h in home.values())
    assert all((j in home[i]) == (i in compose.homes(j, places, classes)[0]) for i in range(classes) for j in range(places))
    pairs = Counter(compose.layout("train", 100 * classes, classes, places, .9))
    for i in range(classes):
        at_home = [pairs[i, j] for j in home[i]]
        assert sum(at_home) == 90 and max(at_home) - min(at_home) <= 1
    test = Counter(compose.layout("test", 4 * classes * places, classes, places, .9))
    assert set(test.values()) == {4} and len(test) == classes * places


def test_shared_objects_shares_individuals_and_not_photographs(sources, tmp_path):
    out = run(sources, tmp_path / "out", "--shared-objects", "--train", 80, "--test", 32)
    shown = lambda column: [{row[column] for row in table(out) if row["split"] == split} for split in compose.SPLITS]
    assert shown("object")[0] == shown("object")[2] and len(shown("object")[0]) == 12
    assert not shown("background")[0] & shown("background")[2]


def test_a_table_decides_files_order_split_and_part(sources, tmp_path):
    """The lower half of each photograph is black: a crop to the upper one shows no black."""
    for p, place in enumerate(PLACES):
        for i in range(3):
            solid(tmp_path / "b" / place / f"{i}.png", (200 + i, 200 + p, 200))
            picture = Image.open(tmp_path / "b" / place / f"{i}.png")
            picture.paste((0, 0, 0), (0, 20, 40, 40))
            picture.save(tmp_path / "b" / place / f"{i}.png")
    lines = ["place,file,split,crop,note"] + [f"{place},b/{place}/{i}.png,{split},0 0 1 0.5,x" for place in PLACES
                                              for i, split in enumerate(("test", "train", "val"))]
    (tmp_path / "backgrounds.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "objects.csv").write_text("file,label\n" + "".join(f"cutouts/{c}/{i}.png,{c}\n" for c in CLASSES for i in range(6)))
    with pytest.raises(compose.UsageError, match="cannot read|no such file|not there"):
        run(tmp_path, tmp_path / "out", "--objects", tmp_path / "objects.csv", "--backgrounds", tmp_path / "backgrounds.csv")
    shutil.copytree(sources / "cutouts", tmp_path / "cutouts")
    out = run(tmp_path, tmp_path / "out", "--objects", tmp_path / "objects.csv", "--backgrounds", tmp_path / "backgrounds.csv", "--places", "water", "land")
    home = {"landbird": "water", "waterbird": "land"}                   # the order of --places turns the shortcut around
    for row in table(out):
        image, mask = (np.asarray(Image.open(out / row[name])) for name in ("filename", "mask"))
        assert (image[mask == 0] >= 200).all()
        assert row["background"].endswith({"test": "0.png", "train": "1.png", "val": "2.png"}[row["split"]])
    assert np.mean([home[row["label"]] == row["place"] for row in table(out) if row["split"] == "train"]) == .95


def test_a_folder_named_like_a_split_decides_the_split(sources, tmp_path, capsys):
    shutil.copytree(sources / "cutouts", tmp_path / "cutouts")
    (tmp_path / "cutouts" / "landbird" / "notes.txt").write_text("mine")
    for label in CLASSES:
        for i in range(6):
            split = compose.SPLITS[i % 3]
            (tmp_path / "cutouts" / label / split).mkdir(exist_ok=True)
            (tmp_path / "cutouts" / label / f"{i}.png").rename(tmp_path / "cutouts" / label / split / f"{i}.png")
    out = run(tmp_path, tmp_path / "out", "--backgrounds", sources / "scenes")
    assert all(row["object"].split("/")[1] == row["split"] for row in table(out))
    assert "they do not end as pictures do: 1" in capsys.readouterr().out


# ---------------------------------------------------------------- the folder
def test_the_same_command_gives_the_same_bytes_whatever_the_number_of_processes(sources, made, tmp_path):
    assert contents(run(sources, tmp_path / "two", "--workers", 2)) == contents(made)
    assert contents(run(sources, tmp_path / "seed", "--seed", 1)) != contents(made)


def test_the_readme_names_every_source_with_its_hash_and_a_command_that_gives_the_same_bytes(sources, made, tmp_path):
    text = (made / "README").read_text()
    for path in [*sources.rglob("*.png"), *sources.rglob("*.jpg")]:
        line = next(line for line in text.splitlines() if line.endswith(f"  {path.parent.name}/{path.name}"))
        assert line.startswith(hashlib.sha256(path.read_bytes()).hexdigest())
    assert "seed 0" in text and "admitted: " in text
    command = next(line for line in text.splitlines() if line.startswith("python compose.py"))
    compose.main(shlex.split(command.replace("--out FOLDER", f"--out {tmp_path / 'again'}"))[2:])
    assert contents(tmp_path / "again") == contents(made)


def test_killed_in_the_middle_it_leaves_nothing_that_looks_whole_and_the_next_run_tidies(sources, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "compose.py", *flags(sources, out, "--train", 4000)]
    killed_while_drawing(command, tmp_path)
    assert [path.name.startswith(".out.") for path in tmp_path.iterdir()] == [True]
    run(sources, out)
    assert list(tmp_path.iterdir()) == [out] and len(table(out)) == 64


def test_what_is_there_is_never_written_over(sources, made, tmp_path, capsys):
    before = contents(made)
    assert "delete it" in fails(compose.main, *flags(sources, made))(capsys) and contents(made) == before
    (tmp_path / "file").write_text("mine")
    assert "is there already" in fails(compose.main, *flags(sources, tmp_path / "file"))(capsys)
    assert "delete it" not in fails(compose.main, *flags(sources, sources))(capsys)


# ---------------------------------------------------------------- bad sources
def opaque(root):
    solid(root / "cutouts" / "landbird" / "0.png", (9, 9, 9))


def no_picture(root):
    (root / "scenes" / "water" / "0.jpg").write_text("no picture")


def no_object(root):
    solid(root / "cutouts" / "landbird" / "0.png", (9, 9, 9), alpha=np.full((40, 40), 3, np.uint8))


def one_class(root):
    shutil.rmtree(root / "cutouts" / "landbird")


def one_place(root):
    shutil.rmtree(root / "scenes" / "land")


def two_cut_outs(root):
    for path in sorted((root / "cutouts" / "landbird").iterdir())[2:]:
        path.unlink()


def two_photographs(root):
    for path in sorted((root / "scenes" / "land").iterdir())[2:]:
        path.unlink()


def empty(root):
    shutil.rmtree(root / "cutouts")
    (root / "cutouts").mkdir()


def twins(root):
    shutil.copy(root / "cutouts" / "landbird" / "0.png", root / "cutouts" / "waterbird" / "9.png")


def some_split(root):
    (root / "cutouts" / "landbird" / "train").mkdir()
    (root / "cutouts" / "landbird" / "0.png").rename(root / "cutouts" / "landbird" / "train" / "0.png")


@pytest.mark.parametrize("spoil, words", [
    (opaque, "0.png is opaque everywhere"), (no_picture, "0.jpg"), (no_object, "transparent everywhere"), (one_class, "waterbird alone"),
    (one_place, "water alone"), (two_cut_outs, "landbird has 2 files"), (two_photographs, "--shared-backgrounds"), (empty, "no pictures"),
    (twins, "are the same file"), (some_split, "1 of 6 files have a split")], ids=lambda x: getattr(x, "__name__", ""))
def test_sources_that_make_no_data_set_are_one_line_that_names_them(sources, tmp_path, capsys, spoil, words):
    for folder in ("cutouts", "scenes"):
        shutil.copytree(sources / folder, tmp_path / folder)
    spoil(tmp_path)
    assert words in fails(compose.main, *flags(tmp_path, tmp_path / "out"))(capsys)
    assert not (tmp_path / "out").exists()


def test_a_second_file_of_the_same_content_is_left_out_and_said(sources, tmp_path, capsys):
    shutil.copytree(sources / "cutouts", tmp_path / "cutouts")
    shutil.copy(tmp_path / "cutouts" / "landbird" / "0.png", tmp_path / "cutouts" / "landbird" / "copy.png")
    out = run(tmp_path, tmp_path / "out", "--backgrounds", sources / "scenes")
    assert "landbird/copy.png is the same file as landbird/0.png: left out" in capsys.readouterr().out
    assert "landbird/copy.png" not in {row["object"] for row in table(out)}


# ---------------------------------------------------------------- to the end
def test_a_composed_set_trains_is_evaluated_by_groups_and_masks_and_predicts(sources, tmp_path):
    """Creatures and scenes of the miniature, composed; a model is trained on them, measured, and asked about pictures."""
    out = run(sources, tmp_path / "set", "--size", 96, "--train", 32)
    train.main(["--data", "folder", "--root", str(out), "--recipe", "mini", "--epochs", "1", "--batch", "8", "--warmup", "2",
                "--device", "cpu", "--out", str(tmp_path / "run")])
    evaluate.main(["--ckpt", str(tmp_path / "run" / "best.pt"), "--leakage", "16", "--device", "cpu"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    text = json.dumps(report)
    for label in CLASSES:
        for place in PLACES:
            assert f"{label} {place}" in text
    assert "admitted" in text and "iou" in text
    pictures = [out / row["filename"] for row in table(out) if row["split"] == "test"]
    predict.main(["--ckpt", str(tmp_path / "run" / "best.pt"), *map(str, pictures[:3]), "--device", "cpu", "--out", str(tmp_path / "predictions")])
    rows = json.loads((tmp_path / "predictions" / "predictions.json").read_text())["pictures"]
    assert len(rows) == 3 and all(row["prediction"] in CLASSES for row in rows)
