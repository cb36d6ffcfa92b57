"""Claims about the miniatures: exact counts, masks and parts, the real layout, a cache whole or absent."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import miniature
import settings
from miniature import scenes, siim
from settings import UsageError
from tiny import killed_while_drawing

TINY = dict(train=40, val=8, test=12, size=48, things=(10, 16))
WATERBIRDS = "waterbird_complete95_forest2water2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return miniature.render("waterbirds", tmp_path_factory.mktemp("mini"), **TINY)


def table(path):
    """Space separated file -> {first column: the other columns}."""
    lines = [line.split() for line in path.read_text().splitlines()]
    assert len({line[0] for line in lines}) == len(lines)
    return {int(line[0]): line[1:] for line in lines}


def metadata(root):
    with open(root / "CUB_200_2011" / WATERBIRDS / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def image(path):
    return np.asarray(Image.open(path)).astype(int)


# ---------------------------------------------------------------- the folder
def test_the_layout_is_that_of_cub_and_waterbirds_and_its_files_agree(root):
    cub = root / "CUB_200_2011"
    names, labels = table(cub / "images.txt"), table(cub / "image_class_labels.txt")
    classes, train = table(cub / "classes.txt"), table(cub / "train_test_split.txt")
    assert list(names) == list(range(1, 61)) and classes == {1: ["001.Landbird"], 2: ["002.Waterbird"]}
    assert list(labels.values()) == sorted(labels.values())             # ids are sorted by class, as in CUB
    rows = metadata(root)
    assert list(rows[0]) == ["img_id", "img_filename", "y", "split", "place", "place_filename"]
    ids = [int(row["img_id"]) for row in rows]
    assert sorted(ids) == list(names) and ids != sorted(ids)            # complete, and not in folder order
    for id, row in zip(ids, rows):
        file, label = names[id][0], int(labels[id][0])
        assert row["img_filename"] == file and int(row["y"]) == label - 1
        assert file.startswith(classes[label][0] + "/")
        assert train[id] == [str(int(row["split"] != "2"))]
        for path in (cub / "images" / file, cub / WATERBIRDS / file,
                     (cub / "segmentations" / file).with_suffix(".png")):
            assert Image.open(path).size == (48, 48)
    assert (cub / "parts/parts.txt").read_text().splitlines()[6] == "7 left eye"


@pytest.mark.parametrize("agreement", [0.5, 0.95, 1.0])
def test_counts_and_agreement_are_exact(agreement):
    benchmark = miniature.Waterbirds(agreement=agreement, train=2000)
    rows = benchmark.rows()
    groups = [[sum(r.split == s and benchmark.group(r) == g for r in rows) for g in range(4)] for s in range(3)]
    agree = round(1000 * agreement)
    assert groups == [[agree, 1000 - agree, 1000 - agree, agree], [100] * 4, [200] * 4]


def test_masks_are_soft_in_steps_of_51_and_the_box_is_the_masks(root):
    cub = root / "CUB_200_2011"
    names, boxes, levels = table(cub / "images.txt"), table(cub / "bounding_boxes.txt"), set()
    for id, (file,) in names.items():
        picture = Image.open((cub / "segmentations" / file).with_suffix(".png"))
        mask = np.asarray(picture)
        levels |= set(np.unique(mask))
        x, y, width, height = map(float, boxes[id])
        ys, xs = mask.nonzero()
        assert picture.mode == "L" and 0.05 < (mask > 0).mean() < 0.4
        assert (x, y, x + width, y + height) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert {0, 255} < levels <= set(range(0, 256, 51))


def test_every_visible_part_lies_on_the_mask_and_a_hidden_one_is_zero(root):
    cub, visible = root / "CUB_200_2011", np.zeros((60, 15), int)
    names = table(cub / "images.txt")
    lines = [line.split() for line in (cub / "parts/part_locs.txt").read_text().splitlines()]
    assert [(int(a), int(b)) for a, b, *_ in lines] == [(i, p) for i in names for p in range(1, 16)]
    for id, part, x, y, seen in lines:
        mask = image((cub / "segmentations" / names[int(id)][0]).with_suffix(".png"))
        visible[int(id) - 1, int(part) - 1] = int(seen)
        assert x.endswith(".0") and y.endswith(".0")
        assert mask[int(float(y)), int(float(x))] > 0 if seen == "1" else (x, y) == ("0.0", "0.0")
    left, right = visible[:, [6, 8]], visible[:, [10, 12]]                  # eye and wing
    assert not (left.any(1) & right.any(1)).any()                           # one side is turned away
    assert 11 < visible.sum(1).mean() <= 13


# ---------------------------------------------------------------- the pictures
def test_the_things_lie_behind_the_bird_and_change_nothing_else(root):
    cub, on_bird, elsewhere = root / "CUB_200_2011", [], []
    for (file,) in table(cub / "images.txt").values():
        mask = image((cub / "segmentations" / file).with_suffix(".png"))
        change = np.abs(image(cub / WATERBIRDS / file) - image(cub / "images" / file))
        on_bird.append(change[mask == 255].mean())
        elsewhere.append(change[mask == 0].mean())
    assert np.mean(on_bird) < 3 < 8 < np.mean(elsewhere)        # on the bird there is JPEG's error only


def test_the_mask_is_exact(monkeypatch):
    """Over two backdrops a bird is the same under its mask; outside it, taking it away changes nothing."""
    monkeypatch.setattr(scenes, "PIXEL_NOISE", 0)
    rng = np.random.default_rng(0)
    body, frame = scenes.creature(scenes.bird_look(rng, 0)), scenes.pose(rng, (.2, .2), .1)
    nothing = lambda rng: []
    one, two = (scenes.compose(np.random.default_rng(s), 96, body, frame, 0, nothing) for s in (1, 2))
    away = scenes.compose(np.random.default_rng(1), 96, body, frame._replace(centre=(9, 9)), 0, nothing)
    assert (one.mask == two.mask).all() and not away.mask.any()
    same = (one.image == two.image).all(-1)
    assert same[one.mask == 1].all() and not same[one.mask == 0].any()
    assert ((one.image == away.image).all(-1) | (one.mask > 0)).all()
    coated = scenes.compose(np.random.default_rng(1), 96, body, frame, 0.8, nothing)
    change = np.abs(coated.image.astype(int) - one.image).max(-1)
    assert not change[one.mask == 0].any() and change[one.mask == 1].mean() > 20    # the coat is the creature's alone


def test_bird_and_backdrop_do_not_depend_on_the_place():
    benchmark = miniature.Waterbirds(**TINY)
    for row in benchmark.rows()[:10]:
        land, water = (benchmark.scene(row._replace(place=place)) for place in (0, 1))
        assert (land.plain == water.plain).all() and (land.mask == water.mask).all()
        assert (land.image == water.image)[land.mask == 1].all() and (land.image != water.image).any()


def test_without_the_cue_both_classes_are_the_same_bird():
    looks = [scenes.bird_look(np.random.default_rng(0), label, cue=0) for label in (0, 1)]
    assert looks[0] == looks[1] != scenes.bird_look(np.random.default_rng(0), 0)


def test_pretraining_scenes_repeat_and_hold_one_creature_each():
    drawn, parts = scenes.pretraining_scenes(12, seed=3, size=48)
    again, _ = scenes.pretraining_scenes(5, seed=3, size=48)
    assert drawn.shape == (12, 48, 48, 4) and parts.shape == (12, 48, 48)
    assert drawn.dtype == parts.dtype == np.uint8
    assert (drawn[:5] == again).all()
    assert ((drawn[..., 3] > 0).mean((1, 2)) > 0.02).all() and not (drawn[0] == drawn[1]).all()
    assert (parts[drawn[..., 3] == 255] > 0).all() and (parts[drawn[..., 3] == 0] == 0).all()
    assert {scenes.BODY_PLAN[i] for i in np.unique(parts)} == set(scenes.BODY_PLAN)


def test_pretraining_chests_repeat_and_tube_and_disease_are_independent(monkeypatch):
    chests, parts = siim.pretraining_chests(8, seed=3, size=48)
    assert parts is None and chests.shape == (8, 48, 48, 4) and (chests[:4] == siim.pretraining_chests(4, seed=3, size=48)[0]).all()
    assert (0.05 < (chests[..., 3] > 127).mean((1, 2))).all() and (chests[..., 0] == chests[..., 2]).all()
    drawn, chest = [], siim.chest
    monkeypatch.setattr(siim, "chest", lambda rng, size, disease, tube, *more: drawn.append((disease, tube)) or chest(rng, size, disease, tube, *more))
    for i in range(80):
        siim.pretraining_chest(i, 3, 48)
    assert all(8 < drawn.count(both) < 34 for both in ((0, 0), (0, 1), (1, 0), (1, 1)))


def test_a_pair_shows_the_same_creature_twice_in_other_colours_and_poses():
    pictures, frames = scenes.pretraining_pairs(6, seed=3, coat=(.3, .8), size=48)
    assert pictures.shape == (6, 2, 48, 48, 4) and frames.shape == (6, 2, 5)
    for pair, both in zip(pictures, frames):
        if any(one[..., 3][edge].any() for one in pair for edge in (0, -1, (slice(None), 0), (slice(None), -1))):
            continue                                     # it reaches beyond the picture
        areas = [(one[..., 3] / 255).sum() / scale ** 2 for one, scale in zip(pair, both[:, 2])]
        assert areas[0] == pytest.approx(areas[1], rel=.06) and (both[0] != both[1]).any()       # one shape, to its edge
        assert not (pair[0] == pair[1]).all()


# ---------------------------------------------------------------- the cache
def test_rendering_is_deterministic_by_seed_and_does_not_depend_on_the_number_of_workers(root, tmp_path):
    two = miniature.render("waterbirds", tmp_path, workers=2, **TINY)
    assert two.name == root.name and contents(two) == contents(root)
    assert contents(miniature.render("waterbirds", tmp_path, **TINY, seed=1)) != contents(root)


def test_what_is_cached_is_not_rendered_again(root, monkeypatch):
    monkeypatch.setattr(miniature, "in_parallel", None)
    assert miniature.render("waterbirds", root.parent, **TINY) == root


def test_a_half_written_cache_is_never_used(tmp_path):
    """Killed in the middle, with workers: nothing usable is left, and the next render is whole and tidy."""
    knobs = dict(train=600, val=8, test=12, size=48)
    flags = [word for name, value in knobs.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "miniature", "--out", tmp_path / "killed", *flags]
    killed_while_drawing(command, tmp_path)
    left = [p.name for p in (tmp_path / "killed").iterdir()]
    assert len(left) == 1 and left[0].startswith(".waterbirds-")
    again = miniature.render("waterbirds", tmp_path / "killed", **knobs)
    assert [p.name for p in (tmp_path / "killed").iterdir()] == [again.name]
    assert contents(again) == contents(miniature.render("waterbirds", tmp_path / "whole", **knobs))


def test_the_first_of_two_processes_wins_and_the_other_uses_its_copy(tmp_path, monkeypatch):
    finish = miniature.Waterbirds.finish

    def overtaken(self, *args):
        finish(self, *args)
        monkeypatch.setattr(miniature.Waterbirds, "finish", finish)
        os.environ["first"] = str(miniature.render("waterbirds", tmp_path, **TINY))
    monkeypatch.setenv("first", "")
    monkeypatch.setattr(miniature.Waterbirds, "finish", overtaken)
    monkeypatch.setattr(settings, "remove_stale", lambda root: None)
    monkeypatch.setattr(settings.os, "getpid", iter([1000001, 1000002]).__next__)
    second = miniature.render("waterbirds", tmp_path, **TINY)
    assert str(second) == os.environ["first"] and list(tmp_path.iterdir()) == [second]


# ---------------------------------------------------------------- bad input, command line
@pytest.mark.parametrize("knobs, word", [
    (dict(train=0), "train"), (dict(agreement=1.2), "agreement"), (dict(agreement=float("nan")), "agreement"),
    (dict(things=(9, 3)), "things"), (dict(thing_radius=(.1, .05)), "thing-radius"), (dict(thing_radius=(.1, 1)), "thing-radius"), (dict(size=50), "size"),
    (dict(size=-96), "size"), (dict(cue=2), "cue"), (dict(seed=-1), "seed"),
    (dict(agreemnt=1), "did you mean agreement")])
def test_bad_knobs_are_one_clear_line(knobs, word, tmp_path):
    with pytest.raises(UsageError, match=word):
        miniature.render("waterbirds", tmp_path / "none", **knobs)
    assert not (tmp_path / "none").exists()


def test_an_unknown_benchmark_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match="did you mean waterbirds"):
        miniature.render("waterbird", tmp_path)


def test_the_command_line_prints_the_folder_and_the_groups_and_draws_a_sheet(tmp_path):
    flags = "--data waterbirds --size 48 --train 40 --val 8 --test 12 --things 3 5".split()
    command = [sys.executable, "-m", "miniature", *flags,
               "--out", tmp_path, "--sheet", tmp_path / "sheet.png"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert (Path(lines[0]) / "CUB_200_2011").is_dir() and lines[2].split() == ["train", "19", "1", "1", "19"]
    assert Image.open(tmp_path / "sheet.png").size == (8 * 48, 4 * 48)
    bad = subprocess.run([*command, "--agreement", "7"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
