"""Every benchmark in its own layout, written small by the tests: what the loaders must and must not do with it."""
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import baselines
from vit import ARCHS
import predict
import runs
import data
import evaluate
import ifam
from measure import leakage
from measure import metrics
from benchmarks import siim
import train
from benchmarks import transforms
from benchmarks.samples import Names, pick, read_image
import settings
from benchmarks import imagenet as in9
from benchmarks import samples as samples_module
from settings import UsageError, parse
from tiny import ROOT, fails

RNG = np.random.default_rng(0)


def picture(path, size=(40, 30), mode="RGB", value=None, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) if value is None else np.full((size[1], size[0], 3), value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **how)


def draws(n=200):
    return (np.random.default_rng(i) for i in range(n))


# ---------------------------------------------------------------- the table
def test_the_table_has_every_benchmark_of_the_paper_with_its_numbers():
    assert set(data.BENCHMARKS) == {"cub", "waterbirds", "waterbird200", "metashift", "siim", "imagenet", "imagenet9", "folder"}
    assert [data.BENCHMARKS[n].size for n in ("cub", "waterbirds", "waterbird200", "siim", "metashift", "imagenet", "imagenet9")] == [518] * 4 + [224] * 3
    assert [b.trained_on for b in data.BENCHMARKS.values() if b.trained_on] == ["cub", "imagenet"]
    for name, b in data.BENCHMARKS.items():
        assert (b.k in b.paper or name == "folder") and b.metrics and b.source and b.layout and b.licence, name


def test_help_lists_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "waterbird200: 200 classes, only to evaluate a model of cub" in text and "metashift: 2 classes" in text


def test_presets_are_the_papers_and_miniatures_keep_the_loss_of_their_benchmark():
    preset = lambda *flags: settings.parse(runs.Config, "", list(flags), runs.preset)
    imagenet, siim_, mini = preset("--data", "imagenet"), preset("--data", "siim"), preset("--data", "siim", "--mini")
    assert (imagenet.epochs, imagenet.ema, imagenet.size, imagenet.k, imagenet.amp) == (120, 0.9999, 224, 1, "auto")
    assert (siim_.weights, siim_.registers, siim_.weight_background, siim_.epochs) == ("rad-dino", 0, 0.0, 90)
    assert (mini.weights, mini.registers, mini.weight_background) == ("chest", 4, 0.0)
    assert preset("--data", "metashift").k == 4 and preset("--data", "cub").weight_background == 2.0


@pytest.mark.parametrize("name, instead", [("waterbird200", "cub"), ("imagenet9", "imagenet")])
def test_training_on_a_benchmark_for_evaluation_says_what_to_train_instead(name, instead, tmp_path, capsys):
    line = fails(train.main, "--data", name, "--out", tmp_path / "run")(capsys)
    assert f"train with --data {instead}" in line and f"--data {name}" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", data.BENCHMARKS)
def test_a_missing_benchmark_says_what_was_looked_for_and_where_it_comes_from(name, tmp_path):
    with pytest.raises(UsageError) as error:
        data.load(name, tmp_path)
    assert str(tmp_path) in str(error.value) and name in str(error.value) or name == "waterbird200"
    assert ("Unpack" if name != "folder" else "expected {train,val,test}") in str(error.value)


# ---------------------------------------------------------------- MetaShift
@pytest.fixture(scope="module")
def metashift(tmp_path_factory):
    root = tmp_path_factory.mktemp("metashift")
    base, number = root / "MetaDatasetCatDog", 0
    counts = {"train/cat/cat(sofa)": 5, "train/cat/cat(bed)": 7, "train/dog/dog(bench)": 4, "train/dog/dog(bike)": 6,
              "test/cat/cat(shelf)": 20, "test/dog/dog(shelf)": 40, "test/cat/cat(grass)": 9}
    for folder, n in counts.items():
        for _ in range(n):
            number += 1
            picture(base / folder / f"{2300000 + number * 7919 % 1000}.jpg")
    picture(base / "train/cat/cat(sofa)/1.jpg")
    picture(base / "train/cat/cat(bed)/1.jpg")
    (base / "train/cat/cat(bed)/notes.txt").write_text("no image")
    return root


def test_metashift_reads_the_six_named_folders_and_an_id_in_two_contexts_counts_twice(metashift):
    splits = data.load("metashift", metashift, 28)
    samples = splits["train"]
    assert len(samples) == 24 and [i for i in samples.ids if i.endswith("/1")] == ["cat(bed)/1", "cat(sofa)/1"]
    assert samples.labels.tolist() == [0] * 14 + [1] * 10
    assert torch.bincount(samples.groups).tolist() == [14, 0, 0, 10] and samples.group_names[3] == "dog outdoors"
    assert not any("grass" in i for s in splits.values() for i in s.ids)
    assert set(splits["test"].groups.tolist()) == {0, 2}


def test_metashift_validation_is_a_fixed_stratified_share_of_the_published_test_set(metashift):
    one, two = (data.load("metashift", metashift, 28, seed=s) for s in (0, 5))
    assert one["val"].ids == two["val"].ids and torch.bincount(one["val"].labels).tolist() == [3, 6]
    assert sorted(one["val"].ids + one["test"].ids) == sorted(one["test_and_val"].ids) and len(one["test_and_val"]) == 60
    assert [int(i.split("/")[1]) for i in one["test_and_val"].ids[:20]] == sorted(int(i.split("/")[1]) for i in one["test_and_val"].ids[:20])
    train_, held = samples_module.stratified(torch.tensor([0] * 235 + [1] * 306), 0.15)
    assert (len(train_), len(held)) == (460, 81)           # of the real 541


def test_metashift_without_one_of_its_folders_is_refused(metashift, tmp_path):
    base = tmp_path / "MetaDatasetCatDog"
    base.mkdir()
    for split in ("train", "test"):
        (base / split).mkdir()
        (base / split / "cat").symlink_to(metashift / "MetaDatasetCatDog" / split / "cat")
    (base / "train/dog").symlink_to(metashift / "MetaDatasetCatDog/train/dog")
    with pytest.raises(UsageError, match=re.escape("dog(shelf)")):
        data.load("metashift", tmp_path, 28)


def test_loading_prints_images_and_groups_of_every_split(metashift, capsys):
    data.load("metashift", metashift, 28)
    out = capsys.readouterr().out
    assert "metashift train: 24 images (14 cat indoors, 0 cat outdoors, 0 dog indoors, 10 dog outdoors)" in out
    assert "metashift test: 51 images" in out and "metashift test_and_val: 60 images" in out


def test_a_limit_takes_every_class_although_files_are_sorted_by_class(metashift):
    samples = data.load("metashift", metashift, 28, limit=8)["train"]
    assert len(samples) == 8 and set(samples.labels.tolist()) == {0, 1}


# ---------------------------------------------------------------- CUB, Waterbird200
@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    root = tmp_path_factory.mktemp("cub")
    base, rows = root / "CUB_200_2011", []
    for i in range(1, 61):
        c = (i - 1) // 20 + 1
        # as in CUB: the capital letters of file and folder differ
        rows.append((i, c, f"{c:03d}.Groove_billed_Ani{c}/Groove_Billed_Ani{c}_{i:04d}.jpg", int(i % 4 != 0 and (c != 3 or i % 2 == 1))))
        picture(base / "images" / rows[-1][2], size=[(40, 30), (30, 40)][i % 2], mode="L" if i == 8 else "RGB")
        picture(base / "waterbird_complete95_forest2water2" / rows[-1][2], size=[(40, 30), (30, 40)][i % 2], value=i)
    (base / "images.txt").write_text("".join(f"{i} {f}\n" for i, _, f, _ in rows))
    (base / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, c, _, _ in rows))
    (base / "train_test_split.txt").write_text("".join(f"{i} {t}\n" for i, _, _, t in rows))
    (base / "classes.txt").write_text("".join(f"{c} {c:03d}.Bird with spaces\n" for c in range(1, 201)))
    (root / "miniature.json").write_text("{}")           # else three of 200 classes are not CUB
    # metadata.csv says otherwise: Waterbird200 must not read it
    (base / "waterbird_complete95_forest2water2" / "metadata.csv").write_text("img_id,img_filename,y,split,place\n1,x.jpg,0,2,0\n")
    return root, rows


def test_the_hold_out_of_cub_takes_the_same_share_of_every_class_and_leaves_nothing_in_both(cub):
    splits = data.load("cub", cub[0], 28, val_share=0.2)
    whole = data.load("cub", cub[0], 28)["train"]
    assert sorted(splits["train"].ids + splits["val"].ids) == sorted(whole.ids) and splits["val"].split == "val"
    total, held = torch.bincount(whole.labels), torch.bincount(splits["val"].labels)
    assert held.tolist() == [max(1, round(0.2 * n)) for n in total.tolist()]
    assert splits["val"].ids == data.load("cub", cub[0], 28, seed=3, val_share=0.2)["val"].ids
    assert splits["val"].ids != [i for i in whole.ids][-len(splits["val"]):]


def test_a_benchmark_with_its_own_validation_split_refuses_a_hold_out(metashift):
    with pytest.raises(UsageError, match="its own validation"):
        data.load("metashift", metashift, 28, val_share=0.1)


def test_labels_of_cub_count_in_the_full_list_of_200_classes(cub):
    samples = data.load("cub", cub[0], 28)["test"]
    assert len(samples.classes) == 200 and samples.labels.tolist() == [c - 1 for _, c, _, t in cub[1] if not t]


def test_waterbird200_is_cubs_test_split_with_the_images_of_waterbirds(cub):
    samples = data.load("waterbird200", cub[0], 28)["test"]
    assert samples.name == samples.title == "waterbird200"                       # its report has a name of its own
    mine = [(str(i), c - 1) for i, c, _, t in cub[1] if not t]
    assert list(zip(samples.ids, samples.labels.tolist())) == mine
    for n, (i, _) in enumerate(mine):                      # the composite of image i is painted with grey level i
        assert np.abs(np.asarray(read_image(samples.paths[n], "RGB")).astype(int) - int(i)).max() <= 2


def test_waterbird200_brings_cubs_original_training_images_for_the_keypoint_regression(cub):
    splits, original = data.load("waterbird200", cub[0], 28), data.load("cub", cub[0], 28)["train"]
    assert splits["train"].paths == original.paths and splits["train"].name == "cub"
    assert not set(splits["train"].ids) & set(splits["test"].ids)


def test_a_mask_with_several_channels_is_read_as_grey_before_it_is_binarised(cub, tmp_path):
    grey = np.zeros((30, 40), np.uint8)
    grey[5:20, 10:30] = 51
    Image.fromarray(np.stack([grey, grey, grey, np.full_like(grey, 255)], -1), "RGBA").save(tmp_path / "mask.png")
    samples = data.load("cub", cub[0], 30)["test"]
    samples.masks = [tmp_path / "mask.png"] * len(samples)
    wide = next(i for i, path in enumerate(samples.paths) if Image.open(path).size == (40, 30))
    assert np.array_equal(samples[wide]["mask"], grey[:, 5:35] > 0)


def test_a_layout_with_another_number_of_classes_is_refused_with_a_limit_too_unless_it_is_drawn(cub, tmp_path):
    base = tmp_path / "CUB_200_2011"
    base.mkdir()
    for entry in (cub[0] / "CUB_200_2011").iterdir():
        if entry.name != "classes.txt":
            (base / entry.name).symlink_to(entry)
    (base / "classes.txt").write_text("1 a\n2 b\n3 c\n")
    for limit in (0, 4):
        with pytest.raises(UsageError, match="3 classes .*not 200") as error:
            data.load("cub", tmp_path, 28, limit=limit)
        assert "--limit" not in str(error.value)
    (tmp_path / "miniature.json").write_text("{}")
    assert len(data.load("cub", tmp_path, 28)["test"].classes) == 3


# ---------------------------------------------------------------- ImageNet
WNIDS = ("n02085620", "n01440764", "n01530575")            # not in order


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for wnid in WNIDS:
        for i in range(4):
            mode = ("RGB", "CMYK", "L", "RGB")[i]
            picture(root / "imagenet/train" / wnid / f"{wnid}_{i}.JPEG", (50, 40), mode, format="PNG" if i == 3 else "JPEG")
        picture(root / "imagenet/val" / wnid / f"ILSVRC2012_val_{i:08d}.JPEG", (50, 40))
    write_mapping(root)
    return root


def write_mapping(root):
    """Kaggle's list: our three wnids among 1000, where ImageNet has them."""
    number = {0: "n01440764", 10: "n01530575", 151: "n02085620"}
    wnids = [number.get(i, f"n{1440764 + 8863 * i if i < 10 else 1530575 + 3933 * (i - 10) if i < 151 else 2085620 + i:08d}") for i in range(1000)]
    assert wnids == sorted(set(wnids))
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a name, another\n" for wnid in wnids))


def test_the_class_of_an_imagenet_image_is_the_rank_of_its_wnid_and_every_colour_mode_is_read(imagenet):
    splits = data.load("imagenet", imagenet, 28, limit=12)
    samples = splits["train"]
    assert len(samples.classes) == 1000 and set(splits) == {"train", "test"}
    assert sorted(set(samples.labels.tolist())) == [0, 10, 151] and samples.outputs == 1000
    for i in range(12):
        assert samples.classes[samples.labels[i]] == samples.paths[i].parent.name
        assert samples.ids[i].startswith(f"train/{samples.paths[i].parent.name}/")
        for sample in (samples[i], samples[0, i]):
            assert sample["image"].shape == (3, 28, 28) and sample["image"].isfinite().all()
    batch = next(iter(torch.utils.data.DataLoader(samples, 4, num_workers=1)))         # names travel to workers
    assert batch["id"] == [samples.ids[i] for i in range(4)]


def test_an_imagenet_with_other_wnids_is_refused(imagenet, tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/imagenet").symlink_to(imagenet / "imagenet")
    for limit in (0, 8):
        with pytest.raises(UsageError, match="3 classes .*not 1000") as error:
            data.load("imagenet", tmp_path / "part", 28, limit=limit)
        assert "LOC_synset_mapping.txt" in str(error.value) and "--limit" not in str(error.value)
    (tmp_path / "imagenet/val").mkdir(parents=True)
    (tmp_path / "imagenet/train").symlink_to(imagenet / "imagenet/train")
    picture(tmp_path / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UsageError, match="images and no folders.*valprep"):
        data.load("imagenet", tmp_path, 28, limit=2)


def test_a_miniature_of_imagenet_keeps_the_real_numbers_of_its_classes(imagenet, tmp_path):
    (tmp_path / "imagenet").symlink_to(imagenet / "imagenet")
    (tmp_path / "miniature.json").write_text(json.dumps({"wnids": {"n01440764": 0, "n01530575": 10, "n02085620": 151}}))
    samples = data.load("imagenet", tmp_path, 28)["test"]
    assert samples.labels.tolist() == [0, 10, 151] and samples.outputs == 1000
    assert in9.in9_classes()[samples.labels].tolist() == [8, 1, 0]
    (tmp_path / "miniature.json").write_text(json.dumps({"wnids": {"n01440764": 0}}))
    with pytest.raises(UsageError, match="n01530575, which has no class"):
        data.load("imagenet", tmp_path, 28)


def test_names_are_one_block_of_bytes_and_behave_as_a_list(tmp_path):
    listed = [f"train/n{i:08d}/é{i}.JPEG" for i in range(1000)]
    names = Names(tmp_path, np.array([n.encode() for n in listed]))
    assert list(names.ids) == listed and names[7] == tmp_path / listed[7] and len(names) == 1000
    assert list(names[3:6]) == [tmp_path / n for n in listed[3:6]]
    assert list(pick(names, [4, 1]).ids) == [listed[4], listed[1]]
    assert names.block.nbytes < 1000 * 40 and names.ids.block is names.block


# ---------------------------------------------------------------- RandAugment
def grid_points(width, height):
    y, x = np.mgrid[:height, :width] + 0.5
    return x, y


def smooth(width=60, height=44):
    x, y = grid_points(width, height)
    wave = lambda a, b: 127 + 120 * np.sin(x / a + y / b)
    return Image.fromarray(np.stack([wave(9, 14), wave(-12, 8), wave(7, -20)], -1).astype(np.uint8))


def apply(name, amount, image=None):
    view = transforms.View(image or smooth())
    transforms.OPERATIONS[name][0](view, amount)
    return np.asarray(view.image)


def geometric(image, source):
    """Where each output pixel comes from, bilinearly in float64 -> (pixels, inside by more than 2 pixels)."""
    x, y = source(*grid_points(*image.size))
    tensor = torch.from_numpy(np.asarray(image).astype(np.float64)).permute(2, 0, 1)[None]
    at = torch.from_numpy(np.stack([2 * x / image.width - 1, 2 * y / image.height - 1], -1))[None]
    found = F.grid_sample(tensor, at, mode="bicubic", padding_mode="border", align_corners=False)[0].permute(1, 2, 0).numpy()
    return found, (x > 2) & (y > 2) & (x < image.width - 2) & (y < image.height - 2), (x < 0) | (y < 0) | (x > image.width) | (y > image.height)


def rotation(x, y, degrees=18):
    t, cx, cy = np.deg2rad(degrees), 30, 22                # counter-clockwise on screen, about the centre
    return cx + np.cos(t) * (x - cx) - np.sin(t) * (y - cy), cy + np.sin(t) * (x - cx) + np.cos(t) * (y - cy)


@pytest.mark.parametrize("name, amount, source", [
    ("Rotate", 18, rotation), ("ShearX", 0.18, lambda x, y: (x + 0.18 * y, y)), ("ShearY", -0.18, lambda x, y: (x, y - 0.18 * x)),
    ("TranslateXRel", 0.27, lambda x, y: (x + 0.27 * 60, y)), ("TranslateYRel", -0.27, lambda x, y: (x, y - 0.27 * 44))])
def test_geometric_operations_bring_pixels_from_where_their_definition_says(name, amount, source):
    got, (expected, inside, outside) = apply(name, amount), geometric(smooth(), source)
    assert np.abs(got - expected)[inside].max() < 3 and inside.mean() > 0.5
    assert (got[outside] == transforms.FILL).all() and outside.any()


def test_rotation_is_pillows():
    expected = smooth().rotate(-13.7, Image.Resampling.BICUBIC, fillcolor=transforms.FILL)
    assert np.abs(apply("Rotate", -13.7).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("name, amount, define", [
    ("Invert", None, lambda v: 255 - v), ("Posterize", 2, lambda v: v & 0b11000000), ("Posterize", 0, lambda v: 0),
    ("Solarize", 153, lambda v: v if v < 153 else 255 - v), ("SolarizeAdd", 66, lambda v: min(255, v + 66) if v < 128 else v)])
def test_operations_on_grey_levels_are_their_definition_at_every_level(name, amount, define):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    got = apply(name, amount, Image.fromarray(np.stack([levels, levels[::-1], levels.T], -1)))
    expected = np.vectorize(define)(levels.astype(int))
    assert np.array_equal(got[..., 0], expected) and np.array_equal(got[..., 1], expected[::-1]) and np.array_equal(got[..., 2], expected.T)


def blend(image, other, factor):
    return np.clip(other + factor * (np.asarray(image, np.float64) - other), 0, 255)


def test_brightness_colour_contrast_and_sharpness_move_away_from_their_grey_image():
    image, f = smooth(), 1.18
    luma = np.asarray(image.convert("L"), np.float64)[..., None]
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    pixels, soft = np.asarray(image, np.float64), np.asarray(image, np.float64).copy()
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), (0, 1))
    soft[1:-1, 1:-1] = (windows * kernel).sum((-1, -2))
    for name, other in (("Brightness", 0), ("Color", luma), ("Contrast", int(luma.mean() + 0.5)), ("Sharpness", soft)):
        assert np.abs(apply(name, f) - blend(image, other, f)).max() <= 1.2, name


def test_autocontrast_stretches_and_equalize_flattens_each_channel():
    image = smooth().point(lambda v: 60 + v // 3)
    pixels = np.asarray(image, np.float64)
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    assert np.abs(apply("AutoContrast", None, image) - (pixels - low) * 255 / (high - low)).max() <= 1
    got = apply("Equalize", None, image)
    for c in range(3):                                     # rank of a level among the pixels, spread over 0..255
        counts = np.bincount(pixels[..., c].astype(int).ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        table = np.minimum(255, (step // 2 + np.cumsum(counts) - counts) // step)
        assert np.array_equal(got[..., c], table[pixels[..., c].astype(int)])


def test_amounts_at_magnitude_six_are_the_published_ones_and_posterize_does_more_at_lower_magnitude():
    at = {name: amount(6.0) for name, (_, amount, _) in transforms.OPERATIONS.items()}
    assert len(at) == 15 and (at["Posterize"], at["Solarize"], at["SolarizeAdd"]) == (2, 153, 66)
    assert [at[n] for n in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")] == pytest.approx([18, .18, .18, .27, .27])
    assert [at[n] for n in ("Color", "Contrast", "Brightness", "Sharpness")] == pytest.approx([1.18] * 4)
    assert {n for n, (_, _, signed) in transforms.OPERATIONS.items() if signed} == {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
    assert transforms.OPERATIONS["Posterize"][1](3) < 2 and transforms.OPERATIONS["Solarize"][1](3) < 153


def test_randaugment_applies_each_of_two_operations_half_of_the_time(monkeypatch):
    seen = []
    spy = {n: (lambda view, a, n=n: seen.append((n, a)), *rest) for n, (_, *rest) in transforms.OPERATIONS.items()}
    monkeypatch.setattr(transforms, "OPERATIONS", spy)
    for rng in draws(3000):
        transforms.rand_augment(None, rng)
    counts = {n: sum(name == n for name, _ in seen) for n in spy}
    assert len(seen) / 3000 == pytest.approx(1, abs=0.05) and all(c == pytest.approx(200, abs=60) for c in counts.values())
    angles = np.array([a for n, a in seen if n == "Rotate"])
    assert np.abs(angles).mean() == pytest.approx(18, abs=0.5) and np.abs(angles).std() == pytest.approx(1.5, abs=0.4)
    assert (angles > 0).mean() == pytest.approx(0.5, abs=0.12)


def test_random_boxes_have_the_published_areas_and_shapes_and_lie_inside():
    boxes = np.array([transforms.random_box((100, 80), rng) for rng in draws()])
    left, top, width, height = boxes.T
    assert (boxes >= 0).all() and (left + width <= 100).all() and (top + height <= 80).all()
    assert 0.07 < (width * height).min() / 8000 < 0.15 and (width * height).max() / 8000 > 0.8
    assert (width / height).min() > 0.7 and (width / height).max() < 1.4
    assert transforms.random_box((1000, 10), np.random.default_rng(0)) == (493, 0, 13, 10)


def test_keypoints_and_masks_follow_the_imagenet_pipeline():
    image = np.zeros((100, 120, 3), np.uint8)
    image[40:60, 50:70] = (255, 0, 0)
    followed = 0
    for rng in draws(40):
        view = transforms.View(Image.fromarray(image), Image.fromarray(image[..., 0]), [(60, 50, 1)])
        transforms.augment_imagenet(view, 64, rng)
        rows, columns = np.nonzero(np.asarray(view.mask))
        if view.points[0, 2] and len(rows) and 2 < rows.min() and rows.max() < 61 and 2 < columns.min() and columns.max() < 61:
            followed += 1
            assert view.points[0, :2] == pytest.approx([columns.mean() + 0.5, rows.mean() + 0.5], abs=1.5)
    assert followed > 10


def test_imagenet_is_evaluated_at_256_over_224_bicubic_centre():
    image = smooth(90, 70)
    view = transforms.View(image)
    transforms.centre_imagenet(view, 56)
    expected = image.resize((int(64 * 90 / 70), 64), Image.Resampling.BICUBIC).crop((13, 4, 69, 60))
    assert np.array_equal(np.asarray(view.image), np.asarray(expected))


# ---------------------------------------------------------------- ImageNet-9
@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    root = tmp_path_factory.mktemp("challenge")
    for c, folder in enumerate(in9.IN9):
        for i in range(2):
            stem = f"n0208562{c}_{i:05d}"
            for variant in in9.IN9_VARIANTS:
                name = f"fg_{stem}_bg_n01530575_05678" if variant.startswith("mixed") else stem
                picture(root / "bg_challenge" / variant / "val" / folder / f"{name}.JPEG", (28, 28), quality=95)
            mask = np.zeros((28, 28), bool)
            mask[4 + c:20, 6:18] = True
            (root / "bg_challenge/fg_mask/val" / folder).mkdir(parents=True, exist_ok=True)
            np.save(root / "bg_challenge/fg_mask/val" / folder / f"{stem}.npy", mask)
    return root


def test_the_map_from_1000_to_nine_classes_has_the_published_sizes():
    merge = in9.in9_classes()
    assert [(merge == c).sum().item() for c in range(-1, 9)] == [630, 116, 52, 42, 36, 35, 27, 26, 20, 16]
    assert [merge[i].item() for i in (0, 6, 7, 33, 151, 171, 172, 173, 268, 269, 390, 407, 881, 999)] == [8, 8, 1, 3, 0, -1, -1, 0, 0, 4, 8, 2, 6, -1]


def test_imagenet9_is_read_as_it_is_with_the_mask_of_its_foreground(challenge):
    splits = data.load("imagenet9", challenge, 28)
    assert set(splits) == {"test", *in9.IN9_VARIANTS[1:]} and all(len(s) == 18 for s in splits.values())
    for samples in (splits["test"], splits["mixed_rand"]):
        assert samples.labels.tolist() == [c for c in range(9) for _ in range(2)] and samples.outputs == 1000
        sample, c = samples[7], 3
        mean, std = (torch.tensor(x)[:, None, None] for x in transforms.IMAGENET)
        pixels = torch.from_numpy(np.array(Image.open(samples.paths[7]))).permute(2, 0, 1) / 255
        torch.testing.assert_close(sample["image"], (pixels - mean) / std)
        assert sample["mask"].sum() == (16 - c) * 12
    with pytest.raises(UsageError, match="28 x 28 pixels, not 56 x 56"):
        data.load("imagenet9", challenge, 56)["test"][0]


def test_imagenet9_without_a_class_or_a_variant_is_refused(challenge, tmp_path):
    (tmp_path / "bg_challenge").mkdir()
    for name in in9.IN9_VARIANTS[:4]:
        (tmp_path / "bg_challenge" / name).symlink_to(challenge / "bg_challenge" / name)
    with pytest.raises(UsageError, match="only_fg"):
        data.load("imagenet9", tmp_path, 28)
    (tmp_path / "miniature.json").write_text("{}")
    assert set(data.load("imagenet9", tmp_path, 28)) == {"test", "mixed_same", "mixed_rand", "mixed_next"}
    (tmp_path / "bg_challenge/original").unlink()
    picture(tmp_path / "bg_challenge/original/val/2_wheeled_vehicle/a.JPEG", (28, 28))
    with pytest.raises(UsageError, match="02_wheeled vehicle"):
        data.load("imagenet9", tmp_path, 28)


def test_a_prediction_outside_the_nine_classes_is_wrong_and_logits_are_neither_summed_nor_restricted(challenge):
    samples = data.load("imagenet9", challenge, 28)["test"].keep([0, 2, 4])             # dog, bird, wheeled vehicle
    logits = torch.zeros(3, 1000)
    logits[0, [151, 152, 900]] = torch.tensor([2.0, 2.0, 3.0])          # two dogs together say dog, the arg-max is no class
    logits[1, 8], logits[2, 33] = 1, 1                                  # bird: right; reptile: wrong
    found = metrics.accuracies({"logits": logits}, samples)
    assert samples.answers(logits).tolist() == [-1, 1, 3] and found["aa"] == pytest.approx(1 / 3)


def test_a_model_that_needs_true_masks_is_measured_on_the_variants_that_have_them(challenge, tmp_path, capsys):
    cfg = parse(runs.Config, "", ["--data", "imagenet", "--method", "early-truth", "--arch", "mini", "--size", "32", "--weights", "none"], runs.preset)
    parts = {"model": baselines.build(runs.plain(vars(cfg)), 1000)}
    runs.save(tmp_path / "best.pt", 0, cfg, 1, {"epoch": 1, "split": "val", "accuracy": 0.5}, parts)
    for variant in in9.IN9_VARIANTS:                       # the mini network cuts images into patches of 8 pixels
        for path in (challenge / "bg_challenge" / variant).rglob("*.JPEG"):
            to = tmp_path / path.relative_to(challenge)
            to.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).resize((32, 32)).save(to)
    for path in challenge.rglob("*.npy"):
        to = tmp_path / path.relative_to(challenge)
        to.parent.mkdir(parents=True, exist_ok=True)
        np.save(to, np.pad(np.load(path), 2))
    evaluate.main(["--ckpt", str(tmp_path / "best.pt"), "--data", "imagenet9", "--root", str(tmp_path), "--device", "cpu"])
    assert "left out, for they have no true masks: only_fg, no_fg, only_bg_b, only_bg_t" in capsys.readouterr().out
    report = json.loads((tmp_path / "report-imagenet9.json").read_text())
    assert list(report["sets"]) == ["mixed_same", "mixed_rand", "mixed_next"] and "bg_gap" in report
    shutil.rmtree(tmp_path / "bg_challenge/fg_mask")
    assert "imagenet9 test has none here" in fails(evaluate.main, "--ckpt", tmp_path / "best.pt", "--data", "imagenet9", "--root", tmp_path)(capsys)


class Eye:
    """A stand-in for a model: says class 151 (dog) as long as the mean of the red channel is not above a limit."""
    selector, needs_truth, trim = None, False, "none"
    predictor = True

    def __init__(self, limit):
        self.limit, self.seen = limit, 0

    def eval(self):
        return self

    def __call__(self, images, keep=None):
        self.seen += len(images)
        logits = torch.zeros(len(images), 1000)
        logits[:, 151] = 1
        logits[images[:, 0].mean((1, 2)) > self.limit, 999] = 2
        return ifam.Output(logits)


def test_the_adversarial_challenge_pastes_every_object_on_every_background_and_stops_at_the_first_failure(challenge):
    splits = data.load("imagenet9", challenge, 28)
    dogs, backgrounds = splits["test"].keep([0, 1, 3]), splits["only_bg_t"].keep(range(10))
    reds, expected = [], []
    for i in range(3):                                     # brute force, on pixels
        image, mask = (np.asarray(read_image(x[i], m), np.float64) for x, m in ((dogs.paths, "RGB"), (dogs.masks, "L")))
        reds.append([])
        for path in backgrounds.paths:
            mixed = np.where(mask[..., None] > 0, image, np.asarray(read_image(path, "RGB"), np.float64))
            reds[-1].append(((mixed / 255 - transforms.IMAGENET[0]) / transforms.IMAGENET[1])[..., 0].mean())
    limit = (max(reds[0]) + max(reds[1])) / 2
    for i in range(2):
        expected.append(max(reds[i]) > limit)
    model = Eye(limit)
    found = evaluate.adversarial(model, dogs, backgrounds, batch=1)
    assert sorted(expected) == [False, True] and found["vulnerable"] == 2               # and the bird is never a dog
    assert found["classes"] == {"dog": 50.0, "bird": 0.0} and found["challenge_accuracy"] == pytest.approx(100 / 3)
    first = next(j for j, red in enumerate(reds[expected.index(True)]) if red > limit)
    assert model.seen == 10 + (first + 1) + 1


def test_a_picture_of_parts_names_an_answer_that_is_none_of_the_nine(challenge, tmp_path):
    from measure import figures
    samples = data.load("imagenet9", challenge, 28)["test"]
    samples.merge = torch.full((1000,), -1)
    model = ifam.IFAM(1000, k=2, arch=dict(ARCHS["mini"], patch=7), size=28).eval()
    figures.parts(model, samples, tmp_path / "parts.png")
    assert (tmp_path / "parts.png").stat().st_size > 1000


def test_the_background_gap_is_the_difference_of_two_sets_and_shared_images_are_seen_once(challenge, metashift):
    splits = data.load("imagenet9", challenge, 28)
    sets = {name: splits[name] for name in ("mixed_same", "mixed_rand")}
    model = Eye(0.0)
    result = predict.predict(model, splits["test"])
    found = evaluate.measure_sets(model, splits["test"], result, sets, ("aa",))
    for name, samples in sets.items():
        guess = torch.tensor([0 if samples[i]["image"][0].mean() <= 0 else -1 for i in range(18)])
        assert found[name]["stage2"]["aa"] == (guess == samples.labels).double().mean() and found[name]["images"] == 18
    assert evaluate.background_gap({"mixed_same": {"stage1": {"aa": 0.935}}, "mixed_rand": {"stage1": {"aa": 0.911}}}, "stage1") == pytest.approx(2.4)
    parts = data.load("metashift", metashift, 28)
    model = Eye(0.0)
    result = predict.predict(model, parts["test"])
    evaluate.measure_sets(model, parts["test"], result, {"all": parts["test_and_val"]}, ("aa",))
    assert model.seen == len(parts["test_and_val"])


# ---------------------------------------------------------------- SIIM-ACR
PREFIX = "1.2.276.0.7230010.3.1"


def uid(i, kind=4):
    return f"{PREFIX}.{kind}.8323329.{i}.1517875166.{i}"


def write_dicom(path, pixels, photometric="MONOCHROME2", bits=8, jpeg=False):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate
    from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit
    import io
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = path.name[:-4]
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, photometric, 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 8 if bits == 8 else 16, bits, bits - 1
    file.PixelData = pixels.astype(np.uint8 if bits == 8 else np.uint16).tobytes()
    if jpeg:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        file.PixelData = encapsulate([buffer.getvalue()])
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def encode(mask):
    """A mask as the csv has it: down columns, offsets from the end of the previous run."""
    flat, row, end = mask.T.ravel(), [], 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    for start, stop in edges.reshape(-1, 2):
        row += [start - end, stop - start]
        end = stop
    return " ".join(map(str, row))


def region(top, left, height, width):
    mask = np.zeros((1024, 1024), np.int8)
    mask[top:top + height, left:left + width] = 1
    return mask


REGIONS = {2: [region(100, 700, 40, 10), region(120, 705, 60, 30), region(900, 20, 5, 5)], 3: [region(50, 60, 200, 7)], 5: [region(0, 0, 1, 1)]}
TUBES = {1: False, 2: True, 3: False, 4: True}             # labels: 2, 3, 5 positive; 5, 6, 7, 8 without a tube label


def write_siim(base, release, tubes="pkl"):
    grey = np.linspace(0, 255, 1024)[:, None].repeat(1024, 1).astype(np.uint8)
    for i in (1, 2, 3, 4, 5, 6, 7, 9):                     # 8 has no file, 9 no row
        write_dicom(base / "dicom-images-train" / uid(i, 2) / uid(i, 3) / f"{uid(i)}.dcm", 255 - grey if i == 6 else grey,
                    "MONOCHROME1" if i == 6 else "MONOCHROME2", jpeg=i == 7)
    space = " " if release == "A" else ""
    rows = [f"{uid(i)},{space}{encode(mask)}" for i in (2, 3, 5) for mask in REGIONS[i]] + [f"{uid(i)},{space}-1" for i in (1, 4, 6, 7, 8)]
    (base / "train-rle.csv").write_text("\n".join(["ImageId, EncodedPixels", *rows]) + "\n")
    if tubes == "pkl":
        (base / "cxr_tube_dict.pkl").write_bytes(pickle.dumps({uid(i): t for i, t in (TUBES | {77: True}).items()}))
    else:
        (base / "cxr_tube_dict.csv").write_text("ImageId,chest_tube\n" + "".join(f"{uid(i)},{int(t)}\n" for i, t in TUBES.items()))
    return base


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    pytest.importorskip("pydicom")
    root = tmp_path_factory.mktemp("chests")
    write_siim(root / "siim", "B")
    return root


@pytest.mark.parametrize("release, tubes, where", [("A", "csv", "pneumothorax"), ("B", "pkl", "siim")])
def test_both_releases_of_the_csv_give_the_same_labels_groups_and_sets(release, tubes, where, tmp_path, capsys):
    write_siim(tmp_path / where, release, tubes)
    splits = data.load("siim", tmp_path, 28)
    ids = {name: [int(i.rsplit(".", 1)[1]) for i in s.ids] for name, s in splits.items()}
    assert ids == {"train": [5, 6, 7], "test": [1, 2, 3, 4], "robust": [3, 4], "non_robust": [1, 2]}
    assert splits["train"].labels.tolist() == [1, 0, 0] and splits["test"].labels.tolist() == [0, 1, 1, 0]
    assert splits["test"].groups.tolist() == [0, 3, 2, 1] and splits["test"].group_names[2] == "pneumothorax without tube"
    assert "left out: 1 without a row in train-rle.csv, 1 rows" in capsys.readouterr().out


def test_a_mask_is_the_union_of_all_rows_and_is_not_transposed(chests):
    masks = {int(i.rsplit(".", 1)[1]): np.asarray(read_image(m, "L")) for s in data.load("siim", chests, 28).values() for i, m in zip(s.ids, s.masks)}
    for i in (1, 2, 3, 5):
        expected = np.maximum.reduce(REGIONS.get(i, [region(0, 0, 0, 0)]))
        assert np.array_equal(masks[i], 255 * expected.astype(np.uint8))


def test_no_model_is_given_masks_that_are_empty_without_the_disease(chests, tmp_path, capsys):
    flags = ["--data", "siim", "--root", chests, "--arch", "mini", "--size", "32", "--weights", "none", "--batch", "2", "--out", tmp_path / "run"]
    for method in ("early-truth", "late-truth"):
        assert "gives the label away" in fails(train.main, *flags, "--method", method)(capsys) and not (tmp_path / "run").exists()
    splits = data.load("siim", chests, 32)
    assert leakage.place_of_mask(None, splits["train"], splits["test"]) is None


def test_radiographs_are_squashed_grey_and_normalised_and_monochrome1_is_inverted(chests):
    samples = data.load("siim", chests, 28)["train"]
    plain, inverted, compressed = (samples[i] for i in range(3))
    expected = np.asarray(Image.fromarray(np.linspace(0, 255, 1024)[:, None].repeat(1024, 1).astype(np.uint8)).resize((28, 28), Image.Resampling.BILINEAR))
    torch.testing.assert_close(plain["image"], (torch.from_numpy(expected / 255).float().expand(3, 28, 28) - 0.48865) / 0.24621)
    torch.testing.assert_close(inverted["image"], plain["image"])
    assert (compressed["image"] - plain["image"]).abs().max() < 0.05
    flipped = [torch.equal(samples[epoch, 0]["image"], plain["image"].flip(2)) for epoch in range(8)]
    assert all(flipped)                                    # columns are equal: a flip changes nothing, and nothing else happens


def test_a_radiograph_is_mirrored_half_of_the_time_and_otherwise_left_alone():
    image, flips = smooth(), []
    plain = np.asarray(image.resize((28, 28), Image.Resampling.BILINEAR))
    for rng in draws(60):
        view = transforms.View(image)
        transforms.augment_chest(view, 28, rng)
        flips.append(np.array_equal(np.asarray(view.image), plain[:, ::-1]))
        assert flips[-1] or np.array_equal(np.asarray(view.image), plain)
    assert 15 < sum(flips) < 45


def test_a_dicom_of_more_than_eight_bits_is_refused_not_wrapped(tmp_path):
    write_dicom(tmp_path / "deep.dcm", np.full((8, 8), 300), bits=12)
    for mode in (None, "RGB"):
        with pytest.raises(UsageError, match="deep.dcm: 12 bits"):
            read_image(tmp_path / "deep.dcm", mode)
    (tmp_path / "text.dcm").write_text("no DICOM at all")
    with pytest.raises(UsageError, match="cannot read image .*text.dcm"):
        read_image(tmp_path / "text.dcm")


def test_without_pydicom_the_error_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(UsageError, match="pip install pydicom"):
        read_image(tmp_path / "a.dcm", "RGB")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_that_asks_for_a_class_is_refused_and_does_not_run(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "ran")
    for content in ({"1.2": evil}, {"1.2": np.bool_(True)}):
        (tmp_path / "cxr_tube_dict.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UsageError, match="does not need"):
            siim.read_tubes(tmp_path / "cxr_tube_dict.pkl")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cxr_tube_dict.pkl").write_bytes(pickle.dumps({"1.2": 1}))
    with pytest.raises(UsageError, match="no dict of str -> bool"):
        siim.read_tubes(tmp_path / "cxr_tube_dict.pkl")


@pytest.mark.parametrize("rows, words", [
    ("ImageId,EncodedPixels\na,-1\na,1 2\n", "both -1 and a mask"), ("id,mask\na,-1\n", "has no column ImageId; found the columns id, mask")])
def test_a_csv_that_contradicts_itself_is_refused(rows, words, tmp_path):
    (tmp_path / "train-rle.csv").write_text(rows)
    with pytest.raises(UsageError, match=words):
        siim.read_runs(tmp_path / "train-rle.csv")


def test_ids_are_compared_whole_although_one_is_the_beginning_of_another(tmp_path):
    base = write_siim(tmp_path / "siim", "B")
    rows = (base / "train-rle.csv").read_text().replace(f"{uid(6)},-1\n", f"{uid(6)}0,-1\n{uid(6)[:-2]},1 1\n")
    (base / "train-rle.csv").write_text(rows)
    assert uid(6) not in data.load("siim", tmp_path, 28)["train"].ids


def test_the_prepared_layout_gives_the_samples_of_the_raw_one(chests, tmp_path):
    raw, base = data.load("siim", chests, 28), tmp_path / "siim"
    names = {"train": "train_set", "test": "full_test_set", "robust": "robust_test_set", "non_robust": "non_robust_test_set"}
    for split, folder in names.items():
        for label in "01":
            (base / folder / label).mkdir(parents=True)
        for path, label in zip(raw[split].paths, raw[split].labels.tolist()):
            (base / folder / str(label) / path.name).symlink_to(path)
    (base / "all_masks").mkdir()
    for samples in (raw["train"], raw["test"]):            # the published script writes them transposed
        for i, label, mask in zip(samples.ids, samples.labels, samples.masks):
            if label:
                mask.image().transpose(Image.Transpose.TRANSPOSE).save(base / "all_masks" / f"{i}.png")
    prepared = data.load("siim", tmp_path, 28)
    for split in names:
        assert list(prepared[split].ids) == list(raw[split].ids) and torch.equal(prepared[split].groups, raw[split].groups)
        for i in range(len(raw[split])):
            assert torch.equal(prepared[split][i]["mask"], raw[split][i]["mask"])
    (base / "robust_test_set/1" / raw["robust"].paths[0].name).unlink()
    with pytest.raises(UsageError, match="in neither of robust_test_set and"):
        data.load("siim", tmp_path, 28)


def test_siim_reports_auroc_on_the_full_the_robust_and_the_non_robust_set(chests):
    splits = data.load("siim", chests, 28)
    logits = torch.tensor([[0.0, 0.3], [0.0, 0.9], [0.0, 0.1], [0.0, 0.5]])             # 1: healthy, 2, 3: ill, 4: healthy

    class Fixed(Eye):
        def __call__(self, images, keep=None):
            return type("Output", (), {"logits": logits[:len(images)], "maps": None})
    report = evaluate.measure_sets(Fixed(0), splits["test"], {"logits": logits}, {n: splits[n] for n in ("robust", "non_robust")}, ("auroc",))
    assert metrics.accuracies({"logits": logits}, splits["test"])["auroc"] == 50.0
    assert report["robust"]["stage2"]["auroc"] == 0.0 and report["non_robust"]["stage2"]["auroc"] == 100.0
