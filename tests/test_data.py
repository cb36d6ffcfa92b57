"""Samples, transforms and the loaders of birds against brute force, on a benchmark written by hand in the real layout."""
import copy
import csv

import numpy as np
import pytest
import torch
from PIL import Image

import data
from benchmarks import samples
from benchmarks import transforms
from benchmarks.samples import Plan, crosstab, patch_keep
from settings import UsageError

SPECIES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """CUB with 3 classes and Waterbirds inside it: portrait, landscape and grey images, all groups in every split,
    unequal counts, rows in another order than folders."""
    root = tmp_path_factory.mktemp("birds")
    cub, rng = root / "CUB_200_2011", np.random.default_rng(0)
    water = cub / "waterbird_complete95_forest2water2"
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs")}
    rows = []
    for i in range(1, 31):
        folder = SPECIES[(i - 1) // 10]
        name = f"{folder}/Bird_{i:04d}_{i}.jpg"
        size = [(60, 40), (40, 60), (48, 48)][i % 3]
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        for base in (cub / "images", water):
            (base / folder).mkdir(parents=True, exist_ok=True)
            (image.convert("L") if i == 5 else image).save(base / name, quality=95)
        (cub / "segmentations" / folder).mkdir(parents=True, exist_ok=True)
        mask = np.zeros((size[1], size[0]), np.uint8)
        mask[10:20, 12:30], mask[10, 12:30] = 255, 51
        Image.fromarray(mask).save(cub / "segmentations" / name.replace(".jpg", ".png"))
        tables["images"].append(f"{i} {name}")
        tables["image_class_labels"].append(f"{i} {(i - 1) // 10 + 1}")
        tables["train_test_split"].append(f"{i} {int(i % 3 != 0)}")
        tables["bounding_boxes"].append(f"{i} 12.0 10.0 18.0 10.0")
        tables["parts/part_locs"] += [f"{i} {p} {15.0 if p % 2 else 0.0} {12.0 if p % 2 else 0.0} {p % 2}" for p in range(1, 16)]
        group = (0, 1, 2, 3, 0, 3, 0)[i % 7] if i > 12 else i % 4
        rows.append([i, name, group // 2, (i - 1) // 4 % 3 if i <= 12 else 0, group % 2, "/o/ocean/1.jpg"])
    (cub / "parts").mkdir()
    (root / "miniature.json").write_text("{}")           # else three classes are not CUB
    for name, lines in tables.items():
        (cub / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (cub / "classes.txt").write_text("".join(f"{i + 1} {s}\n" for i, s in enumerate(SPECIES)))
    with open(water / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["img_id", "img_filename", "y", "split", "place", "place_filename"], *rng.permutation(rows).tolist()])
    return root


def test_a_notebook_is_told_which_data_there_are_and_where_others_would_lie(birds, tmp_path, monkeypatch, capsys):
    assert data.available("waterbirds", birds) and str(birds) in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert not data.available("waterbirds")
    out = capsys.readouterr().out
    assert out.startswith("waterbirds: the miniature (looked for data/CUB_200_2011/") and str(tmp_path) not in out


def test_a_crosstab_counts_every_class_at_every_place(birds, capsys):
    splits = data.load("waterbirds", birds)
    text = crosstab(splits).splitlines()
    assert len(text) == 1 + 2 * len(splits)
    for line in text[1:]:
        split, name, *counts = line.split()
        label = splits[split].classes.index(name)
        assert [int(n) for n in counts] == [int((splits[split].groups == 2 * label + place).sum()) for place in (0, 1)]


def test_waterbirds_groups_are_twice_the_label_plus_the_place_in_every_split(birds):
    splits = data.load("waterbirds", birds, 32)
    rows = list(csv.DictReader(open(birds / "CUB_200_2011/waterbird_complete95_forest2water2/metadata.csv")))
    for number, name in enumerate(("train", "val", "test")):
        mine = [r for r in rows if r["split"] == str(number)]
        samples = splits[name]
        assert samples.ids == [r["img_id"] for r in mine]
        assert samples.groups.tolist() == [2 * int(r["y"]) + int(r["place"]) for r in mine]
        assert sorted(set(samples.groups.tolist())) == [0, 1, 2, 3]
    assert samples.group_names == ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]


def test_waterbirds_keeps_the_files_label_even_where_the_species_is_mislabelled(tmp_path):
    folder = tmp_path / "waterbird_complete95_forest2water2"
    birds = ("021.Eastern_Towhee", "088.Western_Meadowlark", "102.Western_Wood_Pewee", "001.Black_footed_Albatross")
    rows = [f"{i},{bird}/a.jpg,{int(bird[:3] != '001')},{split},0"
            for i, (bird, split) in enumerate((b, s) for b in birds for s in (0, 1, 2))]
    for bird in birds:
        (folder / bird).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / bird / "a.jpg")
    (folder / "metadata.csv").write_text("\n".join(["img_id,img_filename,y,split,place", *rows]))
    splits = data.load("waterbirds", tmp_path, 32, limit=4)
    assert [splits[name].labels.tolist() for name in ("train", "val", "test")] == [[1, 1, 1, 0]] * 3


def test_waterbirds_is_found_beside_cub_too_and_then_has_no_annotations(birds, tmp_path):
    folder = "waterbird_complete95_forest2water2"
    (tmp_path / folder).symlink_to(birds / "CUB_200_2011" / folder)
    sample = data.load("waterbirds", tmp_path, 32)["test"][0]
    assert "mask" not in sample and "points" not in sample and sample["image"].shape == (3, 32, 32)


def test_cub_labels_come_from_the_full_class_list_and_splits_from_the_flag(birds):
    splits = data.load("cub", birds, 32)
    assert len(splits["train"]) == 20 and len(splits["test"]) == 10 and "val" not in splits
    assert splits["test"].classes == SPECIES
    assert splits["test"].labels.tolist() == [(int(i) - 1) // 10 for i in splits["test"].ids]


def test_every_sample_is_a_square_rgb_tensor_whatever_the_file(birds):
    for split in data.load("waterbirds", birds, 32).values():
        for i in range(len(split)):
            for sample in (split[i], split[3, i]):
                assert sample["image"].shape == (3, 32, 32) and sample["image"].isfinite().all()


def test_soft_masks_count_as_object_wherever_any_annotator_said_so(birds):
    samples = data.load("waterbirds", birds, 48)["test"]
    i = samples.ids.index(next(x for x in samples.ids if int(x) % 3 == 2))       # 48 x 48: nothing is resized or cropped
    assert samples[i]["mask"].sum() == 10 * 18


def test_reading_a_sample_twice_gives_the_same_and_leaves_annotations_alone(birds):
    samples = data.load("waterbirds", birds, 32)["test"]
    before = [p.copy() for p in samples.points]
    first, second = samples[0], samples[0]
    assert all(torch.equal(torch.as_tensor(first[k]), torch.as_tensor(second[k])) for k in ("image", "mask", "points"))
    assert all(np.array_equal(a, b) for a, b in zip(before, samples.points))


def test_augmentation_depends_on_seed_epoch_and_id_only(birds):
    one, two = (data.load("waterbirds", birds, 32, seed=s)["train"] for s in (0, 1))
    reordered = data.load("waterbirds", birds, 32)["train"].first(3)
    assert torch.equal(one[2, one.ids.index(reordered.ids[1])]["image"], reordered[2, 1]["image"])
    assert not torch.equal(one[2, 1]["image"], one[3, 1]["image"])
    assert not torch.equal(one[2, 1]["image"], two[2, 1]["image"])


def test_batches_do_not_depend_on_the_number_of_workers(birds):
    samples = data.load("waterbirds", birds, 32)["train"]
    read = lambda workers: [b["image"] for b in torch.utils.data.DataLoader(
        samples, batch_sampler=Plan(len(samples), 4, 0, 5), num_workers=workers)]
    assert all(torch.equal(a, b) for a, b in zip(read(0), read(2)))


def test_processes_share_the_batches_of_one_process_and_resuming_continues_them():
    whole = list(Plan(23, 8, 0, 6))
    halves = [list(Plan(23, 8, 0, 6, rank=r, world=2)) for r in (0, 1)]
    assert whole == [a + b for a, b in zip(*halves)]
    assert list(Plan(23, 8, 3, 6)) == whole[3:]                             # 2 steps an epoch: 3 is in the middle
    for epoch in range(3):
        seen = [i for step in whole[2 * epoch:2 * epoch + 2] for _, i in step]
        assert len(set(seen)) == 16


def dot(size, x, y):
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[y - 1:y + 2, x - 1:x + 2] = 255
    return transforms.View(Image.fromarray(image), points=[(x + 0.5, y + 0.5, 1)])


@pytest.mark.parametrize("step", [
    lambda v: v.resize(150), lambda v: v.flip(), lambda v: v.affine(30, (0, 0), 1.0), lambda v: v.affine(-75, (5, -8), 1.2),
    lambda v: v.affine(0, (7, 3), 0.8), lambda v: v.crop(10, 5, 80), lambda v: transforms.augment(v, 90, np.random.default_rng(4)),
    lambda v: transforms.centre(v, 70)])
def test_keypoints_stay_on_the_pixels_they_name(step):
    for at in ((60, 45), (50, 50), (70, 40)):
        view = dot((120, 100), *at)
        step(view)
        bright = np.asarray(view.image).astype(float).sum(2)
        rows, columns = np.nonzero(bright > bright.max() / 2)
        assert view.points[0, :2] == pytest.approx([columns.mean() + 0.5, rows.mean() + 0.5], abs=1.0)


def test_affine_turns_clockwise_about_the_centre_then_shifts_right_and_down():
    view = transforms.View(Image.new("RGB", (100, 100)), points=[(80, 50, 1)])
    view.affine(90, (3, 4), 1.0)
    assert view.points[0, :2] == pytest.approx([53, 84])


def test_masks_move_with_their_image():
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[20:40, 30:60] = 255
    image = Image.fromarray(pixels)
    view = transforms.View(image, image.convert("L"))
    view.flip(), view.affine(40, (5, -6), 1.1), view.crop(8, 4, 50)
    assert np.array_equal(np.asarray(view.image)[..., 0], np.asarray(view.mask))


def test_a_point_outside_the_crop_becomes_invisible_and_is_moved_to_its_edge():
    view = transforms.View(Image.new("RGB", (100, 60)), points=[(5, 30, 1), (50, 30, 1), (50, 30, 0)])
    transforms.centre(view, 60)
    assert view.points.tolist() == [[0, 30, 0], [30, 30, 1], [30, 30, 0]]


def test_planckian_jitter_multiplies_red_and_blue_and_truncates():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    view = transforms.View(Image.fromarray(pixels))
    r, g, b = transforms.PLANCKIAN[0]
    view.recolour((r, g, b))
    for i in range(6):
        for j in range(5):
            red, green, blue = (int(x) for x in pixels[i, j])
            assert np.asarray(view.image)[i, j].tolist() == [int(min(255, red * (r / g))), green, int(min(255, blue * (b / g)))]


def test_planckian_illuminants_run_from_red_to_blue():
    gains = transforms.PLANCKIAN[:, ::2] / transforms.PLANCKIAN[:, 1:2]
    assert len(gains) == 25 and (np.diff(gains, axis=0) * (-1, 1) > 0).all()
    assert gains[0] == pytest.approx([1.674, 0.003], abs=1e-3) and gains[-1] == pytest.approx([0.753, 1.490], abs=1e-3)


def test_evaluation_view_resizes_the_shorter_side_and_crops_the_centre():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 101, 3), dtype=np.uint8))
    view = transforms.View(image)
    transforms.centre(view, 30)
    expected = image.resize((50, 30), Image.Resampling.BILINEAR).crop((10, 0, 40, 30))       # int(30 * 101 / 60) = 50
    assert np.array_equal(np.asarray(view.image), np.asarray(expected))
    mean, std = transforms.IMAGENET
    tensor = transforms.to_tensor(view.image)
    assert tensor[1, 2, 3].item() == pytest.approx((np.asarray(view.image)[2, 3, 1] / 255 - mean[1]) / std[1], rel=1e-5)


@pytest.mark.parametrize("normalisation", [transforms.IMAGENET, transforms.CHEST, ((0, 0, 0), (1, 1, 1))], ids=str)
def test_the_tensor_of_an_image_has_the_bits_of_the_formula(normalisation):
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)                           # every level in each channel
    mean, std = (np.array(x, dtype=np.float32) for x in normalisation)
    expected = (pixels.astype(np.float32) / 255 - mean) / std
    tensor = transforms.to_tensor(Image.fromarray(pixels), normalisation)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), expected) and tensor.is_contiguous()


def test_a_small_split_is_decoded_once_and_a_large_one_every_time_with_the_same_samples(birds, monkeypatch):
    small, large = (copy.copy(data.load("waterbirds", birds, 32)["test"]) for _ in range(2))
    large.read = lambda path, mode, least=0: samples.read_image(path, mode)                           # what a large one does
    reads, plain = [], samples.read_image
    monkeypatch.setattr(samples, "read_image", lambda path, mode=None, *how: reads.append(path) or plain(path, mode, *how))
    for key in (0, (0, 0), (1, 0), 0):
        for name, expected in large[key].items():
            assert np.array_equal(small[key][name], expected), name
    assert reads.count(small.paths[0]) == 1 + 4          # small once, large for each sample
    monkeypatch.setattr(samples, "SMALL", 3 * 32 ** 2 * len(small) - 1)
    small[1], small[1]
    assert reads.count(small.paths[1]) == 2


def test_pictures_stay_decoded_while_there_is_room_for_them_however_large_the_files_are(birds):
    split = copy.copy(data.load("waterbirds", birds, 32)["test"])
    split.decoded, room = {}, 3 * 60 * 40 + 1                                    # one picture, but no other beside it
    split.room = room
    for i in range(len(split)):
        split[i]
    assert sum(len(picture.tobytes()) for picture in split.decoded.values()) == room - split.room <= room
    assert 0 < len(split.decoded) < len(split)


def test_patch_keep_equals_counting_pixels_patch_by_patch():
    masks = (torch.rand(6, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.5).byte()
    masks[4] = 0
    masks[5] = 0
    masks[5, 3:5, 9:12] = 1                              # smaller than every patch
    keep = patch_keep(masks, 8)
    for b in range(6):
        counts = [masks[b, 8 * i:8 * i + 8, 8 * j:8 * j + 8].float().mean().item() for i in range(3) for j in range(3)]
        expected = [float(c > 0.5) for c in counts]
        if not any(expected) and max(counts) > 0:
            expected[counts.index(max(counts))] = 1.0
        assert keep[b].tolist() == expected
    assert keep[4].sum() == 0 and keep[5].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_missing_data_error_says_what_was_looked_for_where_it_comes_from_and_what_needs_nothing(tmp_path):
    with pytest.raises(UsageError) as error:
        data.load("waterbirds", tmp_path / "nowhere", 32)
    for part in (str(tmp_path / "nowhere"), "metadata.csv", "waterbird_complete95_forest2water2.tar.gz", "--mini"):
        assert part in str(error.value)


def test_a_row_whose_image_is_missing_or_does_not_decode_is_named(birds, tmp_path):
    samples = data.load("waterbirds", birds, 32)["test"]
    samples.paths[2] = tmp_path / "gone.jpg"
    with pytest.raises(UsageError, match=f"sample {samples.ids[2]}.*gone.jpg"):
        samples.check()
    (tmp_path / "gone.jpg").write_bytes((birds / "CUB_200_2011/images/001.Black_footed_Albatross/Bird_0001_1.jpg").read_bytes()[:400])
    with pytest.raises(UsageError, match="cannot read image .*gone.jpg"):
        samples[2]


def test_a_mask_or_a_keypoint_row_that_is_missing_is_named_not_forgotten(birds, tmp_path):
    import shutil
    shutil.copytree(birds, tmp_path / "birds")
    cub = tmp_path / "birds" / "CUB_200_2011"
    locations = (cub / "parts" / "part_locs.txt").read_text()
    (cub / "parts" / "part_locs.txt").write_text("".join(x for x in locations.splitlines(True) if not x.startswith("7 ")))
    with pytest.raises(UsageError, match="part_locs.txt has no row of image 7"):
        data.load("cub", tmp_path / "birds", 32)
    (cub / "parts" / "part_locs.txt").write_text(locations)
    (cub / "segmentations/001.Black_footed_Albatross/Bird_0004_4.png").unlink()
    with pytest.raises(UsageError, match="mask of sample 4 .*Bird_0004_4.png"):
        data.load("cub", tmp_path / "birds", 32)


@pytest.mark.parametrize("rows, words", [
    ("img_id,img_filename,y\n1,a.jpg,0\n", "no column split"),
    ("img_id,img_filename,y,split,place\n1,a.jpg,0,0,1\n2,b.jpg,7,0,1\n", "line 3: y is '7'")], ids=("column", "cell"))
def test_a_metadata_file_without_a_column_or_with_a_cell_that_is_no_group_is_refused(rows, words, tmp_path):
    folder = tmp_path / "waterbird_complete95_forest2water2"
    folder.mkdir()
    (folder / "metadata.csv").write_text(rows)
    with pytest.raises(UsageError, match=words):
        data.load("waterbirds", tmp_path, 32)
