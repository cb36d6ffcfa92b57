"""Claims about the miniatures beside Waterbirds: counts, rates, masks, layouts; the same bytes twice."""
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data
import miniature
import settings
from benchmarks import imagenet
from settings import UsageError
from tiny import ROOT

TINY = {"cub": dict(train=32, test=16, size=48), "metashift": dict(train=16, test=8, size=48),
        "siim": dict(train=20, test=40, size=64, dicom=False), "imagenet": dict(train=18, val=18, size=48),
        "imagenet9": dict(test=18, size=48)}
# ImageNet's indices that belong to each class of ImageNet-9, first-last
IN9_RANGES = ("151-170 173-268", "7-24 87-100 127-146",
              "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670-671 675 690 705 "
              "717 734 751 757 791 802-803 817 820 829 847 864 866-867 870 880", "33-68",
              "269-280 286-299 356-362 387-388", "300-326",
              "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 822 875 881 889",
              "365-384", "0-6 389-397")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): that tiny miniature, rendered once."""
    root = tmp_path_factory.mktemp("mini")
    return lambda name: miniature.render(name, root, **TINY.get(name, TINY["cub"]))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def image(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("name", TINY)
def test_a_seed_draws_the_same_bytes_twice_and_another_seed_others(folder, name, tmp_path):
    again = miniature.render(name, tmp_path, **TINY[name])
    assert again.name == folder(name).name and contents(again) == contents(folder(name))
    assert contents(miniature.render(name, tmp_path, **TINY[name], seed=1)) != contents(again)
    assert json.loads((again / "miniature.json").read_text())["knobs"]["size"] == TINY[name]["size"]


@pytest.mark.parametrize("name", TINY)
def test_a_killed_rendering_leaves_nothing_that_is_taken_for_whole(name, tmp_path, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(miniature.BENCHMARKS[name], "finish", dies)
    monkeypatch.setattr(settings.shutil, "rmtree", lambda *args, **kw: None)       # as a kill: no clean-up
    with pytest.raises(KeyboardInterrupt):
        miniature.render(name, tmp_path, **TINY[name])
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())


BIRDS = dict(cue=1.0, things=(7, 11))                    # the drawings of earlier versions


@pytest.mark.parametrize("name, folder, knobs", [
    ("waterbirds", "waterbirds-859fe875d1", dict(cue=1.0, hue_noise=.03, things=(10, 15), thing_radius=(.05, .08))),
    ("waterbirds", "waterbirds-b9b2b48ff3", {}), ("cub", "cub-4ad6cd36c8", BIRDS), ("waterbird200", "cub-4ad6cd36c8", BIRDS),
    ("metashift", "metashift-89e57c744c", dict(train=2200, cue=.7, things=(13, 17))),
    ("siim", "siim-6cdc017f26", dict(dicom=False)), ("imagenet", "imagenet-6f901d62df", dict(train=2250)),
    ("imagenet9", "imagenet9-d52ddfed21", {})])
def test_a_miniature_that_was_drawn_by_an_earlier_version_is_not_drawn_again(name, folder, knobs, tmp_path):
    (tmp_path / folder).mkdir()
    assert miniature.render(name, tmp_path, **knobs) == tmp_path / folder


# ---------------------------------------------------------------- the birds
def test_a_species_is_at_home_in_95_percent_and_parts_lie_inside_masks(folder):
    rows = miniature.Cub(train=1600, test=800).rows()
    for split, n in enumerate((200, 100)):
        for species in range(8):
            places = [r.place for r in rows if r.split == split and r.label == species]
            assert len(places) == n and places.count(species) == .95 * n
    cub = folder("cub") / "CUB_200_2011"
    names = dict(line.split() for line in (cub / "images.txt").read_text().splitlines())
    for line in (cub / "parts/part_locs.txt").read_text().splitlines():
        id, part, x, y, visible = line.split()
        mask = image((cub / "segmentations" / names[id]).with_suffix(".png"))
        assert mask[int(float(y)), int(float(x))] if visible == "1" else (x, y) == ("0.0", "0.0")


def test_waterbird200_is_the_test_birds_of_cub_half_of_each_species_on_the_other_habitat(folder):
    root = folder("cub")
    assert folder("waterbird200") == root                                   # one folder, two benchmarks
    cub = root / "CUB_200_2011"
    with open(cub / "waterbird_complete95_forest2water2" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    split = dict(line.split() for line in (cub / "train_test_split.txt").read_text().splitlines())
    assert len(rows) == 16 and all(split[r["img_id"]] == "0" for r in rows)
    assert sum(r["y"] == r["place"] for r in rows) == 8
    for r in rows:
        mask = image((cub / "segmentations" / r["img_filename"]).with_suffix(".png"))
        old = image(cub / "images" / r["img_filename"])
        new = image(cub / "waterbird_complete95_forest2water2" / r["img_filename"])
        assert np.abs(old - new)[mask == 255].mean() < 5 < np.abs(old - new)[mask == 0].mean()


# ---------------------------------------------------------------- MetaShift
def test_metashift_trains_without_the_minority_and_one_cat_lies_in_two_contexts(folder):
    root = folder("metashift")
    found = sorted(p.relative_to(root / "MetaDatasetCatDog") for p in (root / "MetaDatasetCatDog").rglob("*.jpg"))
    count = {str(p): sum(f.parent == p for f in found) for p in {f.parent for f in found}}
    assert count == {"train/cat/cat(sofa)": 4, "train/cat/cat(bed)": 5, "train/dog/dog(bench)": 4,
                     "train/dog/dog(bike)": 4, "test/cat/cat(shelf)": 4, "test/dog/dog(shelf)": 4}
    sofa, bed = ({f.name for f in found if where in str(f)} for where in ("(sofa)", "(bed)"))
    (twin,) = sofa & bed
    assert len({(root / "MetaDatasetCatDog/train/cat" / c / twin).read_bytes() for c in ("cat(sofa)", "cat(bed)")}) == 1
    for f in found:
        mask = image((root / "segmentations" / f).with_suffix(".png"))
        assert set(np.unique(mask)) == {0, 255} and .05 < (mask > 0).mean() < .4


# ---------------------------------------------------------------- SIIM-ACR
def decode(cells, side=1024):
    """Union of run-length rows, down the columns, pixel by pixel."""
    mask = np.zeros(side * side, bool)
    for numbers in (list(map(int, cell.split())) for cell in cells):
        at = 0
        for offset, length in zip(numbers[::2], numbers[1::2]):
            mask[at + offset:at + offset + length] = True
            at += offset + length
    return mask.reshape(side, side).T


def test_a_tube_misleads_in_half_of_the_test_set_and_in_5_percent_of_training(folder):
    siim = miniature.Siim(train=800, test=80, dicom=False)
    cells = [[sum(r.split == s and siim.group(r) == g for r in siim.rows()) for g in range(4)] for s in (0, 1)]
    assert cells == [[380, 20, 20, 380], [20] * 4]
    base = folder("siim") / "siim"
    stems = lambda name: {p.stem for p in (base / name).rglob("*.png")}
    robust, easy = stems("robust_test_set"), stems("non_robust_test_set")
    assert len(robust) == len(easy) == 20 and not robust & easy and robust | easy == stems("full_test_set")
    assert len(stems("train_set")) == 20 and not stems("train_set") & stems("full_test_set")


def test_tube_and_pneumothorax_change_the_chest_only_where_they_are(monkeypatch):
    siim = miniature.Siim(dicom=False)
    row = next(r for r in siim.rows() if siim.group(r) == 0)
    healthy, tube, sick = (siim.scene(row._replace(label=y, place=t)) for y, t in ((0, 0), (0, 1), (1, 0)))
    assert not healthy.mask.any() and not tube.mask.any() and .002 < sick.mask.mean() < .08
    changed = sick.image != healthy.image
    assert changed[sick.mask == 1].mean() > .9 and (sick.lungs >= sick.mask - .02).all()
    assert (healthy.image != tube.image).mean() < .1 and healthy.image.shape == (128, 128)
    for row in siim.rows()[:40]:                            # a perfect selector keeps no pixel of a tube
        bare, tube = siim.scene(row._replace(place=0)), siim.scene(row._replace(place=1))
        assert (bare.image != tube.image).any() and (bare.image == tube.image)[bare.lungs > 0].all()


def test_kaggles_layout_holds_the_drawn_masks_in_one_or_several_rows(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    knobs = dict(train=12, test=4, size=64, dicom=True)
    root, siim = miniature.render("siim", tmp_path, **knobs), miniature.Siim(**knobs)
    lines = [line.split(", ") for line in (root / "siim/train-rle.csv").read_text().splitlines()]
    assert lines[0] == ["ImageId", "EncodedPixels"]
    paths = {p.name[:-4]: p for p in (root / "siim/dicom-images-train").glob("*/*/*.dcm")}
    several = 0
    for row in siim.rows():
        cells, scene = [cell for uid, cell in lines[1:] if uid == row.file], siim.scene(row)
        several += len(cells) > 1
        assert (cells == ["-1"]) == (row.label == 0)
        if row.label:
            assert (decode(cells) == miniature.siim.enlarge(scene.mask >= .5)).all()
        file = pydicom.dcmread(paths.pop(row.file))
        assert (file.BitsStored, file.PhotometricInterpretation, file.file_meta.TransferSyntaxUID.name) == (
            8, "MONOCHROME2", "JPEG Baseline (Process 1)")
        assert np.abs(file.pixel_array.astype(int) - miniature.siim.enlarge(scene.image)).mean() < 6
    assert not paths and several
    tubes = dict(csv.reader(open(root / "siim/cxr_tube_dict.csv")))
    assert tubes == {"ImageId": "chest_tube", **{r.file: str(r.place) for r in siim.rows() if r.split == 1}}


# ---------------------------------------------------------------- ImageNet and ImageNet-9
def test_each_wnids_index_lies_in_its_groups_ranges_and_indices_rise_with_wnids():
    for (wnids, _), ranges in zip(miniature.imagenet.DRAWN, IN9_RANGES, strict=True):
        spans = [[int(x) for x in part.split("-")] for part in ranges.split()]
        assert all(any(span[0] <= index <= span[-1] for span in spans) for _, index, _ in wnids)
    known = sorted((wnid, index) for wnid, index, _ in miniature.imagenet.CLASSES9)
    assert [index for _, index in known] == sorted(index for _, index in known) and len(set(known)) == 18


@pytest.mark.parametrize("wnids", [1, 2])
def test_95_percent_of_each_class_lie_among_the_things_of_its_group_the_others_among_all(wnids):
    benchmark = miniature.ImageNet(wnids=wnids, train=3600 * wnids, val=180 * wnids)
    for split, n in enumerate((400, 20)):
        for label in range(9 * wnids):
            places = [r.place for r in benchmark.rows() if r.split == split and r.label == label]
            assert len(places) == n and places.count(label % 9) == .95 * n
            assert split or len(set(places)) == 9


def test_imagenets_folders_are_wnids_with_a_mask_for_each_image(folder):
    root = folder("imagenet")
    known = json.loads((root / "miniature.json").read_text())["wnids"]
    assert len(known) == 9 and known["n02085620"] == 151
    for split in ("train", "val"):
        assert {p.name for p in (root / "imagenet" / split).iterdir()} == set(known)
        files = list((root / "imagenet" / split).rglob("*.JPEG"))
        assert len(files) == 18
        for file in files:
            mask = image((root / "segmentations" / file.relative_to(root / "imagenet")).with_suffix(".png"))
            assert set(np.unique(mask)) == {0, 255} and .05 < (mask > 0).mean() < .35


def test_object_and_backdrop_ignore_the_things_and_every_object_has_the_coat():
    benchmark, bare = miniature.ImageNet(wnids=2, train=36), miniature.ImageNet(wnids=2, train=36, coat=0)
    for row in benchmark.rows()[:18]:
        here, there = benchmark.scene(row), benchmark.scene(row._replace(place=(row.place + 1) % 9))
        assert (here.mask == there.mask).all() and (here.plain == there.plain).all()
        assert (here.image == there.image)[here.mask == 1].all() and (here.image != there.image).any()
        change = np.abs(here.plain.astype(int) - bare.scene(row).plain).max(-1)
        assert not change[here.mask == 0].any() and change[here.mask == 1].mean() > 15


def test_each_variant_of_imagenet9_is_what_its_name_says():
    benchmark = miniature.ImageNet9(test=36, size=48)
    rows = benchmark.rows()
    by_stem = {r.file: r for r in rows}
    for row in rows[:18]:
        named, mask = benchmark.variants(row, rows)
        assert set(named) == set(imagenet.IN9_VARIANTS)
        picture = {variant: p for variant, (_, p) in named.items()}
        original, ys, xs = picture["original"], *miniature.imagenet.box_of(mask)
        inside = np.zeros_like(mask)
        inside[ys, xs] = True
        assert mask.any(0)[xs].any() and mask[ys, xs].sum() == mask.sum()
        for variant, kept in (("only_fg", mask), ("no_fg", ~mask), ("only_bg_b", ~inside)):
            assert (picture[variant][kept] == original[kept]).all() and not picture[variant][~kept].any()
        assert (picture["only_bg_t"] == original)[~inside].all() and (picture["only_bg_t"] != original)[mask].any()
        group = row.label % 9
        for variant, wanted in (("mixed_same", group), ("mixed_next", (group + 1) % 9), ("mixed_rand", None)):
            stem, mixed = named[variant]
            front, back = stem.removeprefix("fg_").split("_bg_")
            other = by_stem[back]
            assert front == row.file and other != row and wanted in (None, other.label % 9)
            ground = benchmark.variants(other, rows)[0]["only_bg_t"][1]
            assert (mixed == np.where(mask[..., None], original, ground)).all()


def test_the_challenges_layout_has_every_variant_and_a_mask_by_the_stem(folder):
    base = folder("imagenet9") / "bg_challenge"
    assert {p.name for p in base.iterdir()} == {*imagenet.IN9_VARIANTS, "fg_mask"}
    for variant in imagenet.IN9_VARIANTS:
        assert sorted(p.name for p in (base / variant / "val").iterdir()) == list(miniature.imagenet.GROUPS9)
        for file in (files := list((base / variant / "val").rglob("*.JPEG"))):
            stem = file.stem.removeprefix("fg_").split("_bg_")[0]
            mask = np.load(base / "fg_mask/val" / file.parent.name / f"{stem}.npy")
            assert mask.shape == (48, 48) and set(np.unique(mask)) == {0, 1} and Image.open(file).size == (48, 48)
        assert len(files) == 18


# ---------------------------------------------------------------- bad input, command line
@pytest.mark.parametrize("name, knobs, word", [
    ("imagenet", dict(wnids=3), "wnids"), ("imagenet", dict(train=10), "train"), ("imagenet9", dict(test=9), "test"),
    ("imagenet9", dict(object=(.2, .4)), "object"), ("siim", dict(dicom=True, size=96), "size"),
    ("metashift", dict(pet=(.3, .2)), "pet"), ("cub", dict(hue_noise=2), "hue-noise")])
def test_a_bad_knob_is_one_clear_line(name, knobs, word, tmp_path):
    with pytest.raises(UsageError, match=word):
        miniature.render(name, tmp_path / "none", **knobs)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name, knobs", [*((name, {}) for name in miniature.BENCHMARKS), ("siim", dict(dicom=True))])
def test_every_image_has_the_true_mask_that_a_perfect_selector_would_find(name, knobs, tmp_path):
    if knobs:
        pytest.importorskip("pydicom")
    knobs = {**TINY.get(name, TINY["cub"]), **knobs} | ({"val": 16} if name == "waterbirds" else {})
    splits = data.load(name, miniature.render(name, tmp_path, **knobs), 48, check=False)
    for split in splits.values():
        for i in range(len(split) if split.split in ("train", "test", "original") else 0):
            assert split[i]["mask"].shape == (48, 48) and .02 < split[i]["mask"].float().mean() < .6


@pytest.mark.parametrize("name", miniature.BENCHMARKS)
def test_every_benchmark_has_a_contact_sheet_and_a_table(name):
    benchmark = miniature.BENCHMARKS[name](size=32)
    sheet = benchmark.sheet()
    assert sheet.dtype == np.uint8 and sheet.shape[0] % 32 == sheet.shape[1] % 32 == 0 and sheet.shape[2] == 3
    assert sheet.std() > 20 and len(benchmark.summary().splitlines()) > 1


def test_a_reader_that_stops_reading_is_no_traceback(tmp_path):
    flags = ["--data", "imagenet9", "--size", "32", "--test", "18", "--out", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "miniature", *flags], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
