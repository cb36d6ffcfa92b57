"""What people unpack, edit and point us at: the right value where it can be known, else one line that names the place."""
import json
import os
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_benchmarks import uid, write_dicom, write_mapping

import data
from benchmarks import files, siim
from benchmarks.files import read_image
from benchmarks.imagenet import IN9, IN9_VARIANTS
from benchmarks.samples import Names, Samples
from settings import UsageError, run_script

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def refused(words, call, *arguments, **options):
    """One line that has these words, and no advice that does not help."""
    with pytest.raises(UsageError) as error:
        call(*arguments, **options)
    line = str(error.value)
    assert re.search(words, line), line
    assert "\n" not in line and "--limit" not in line
    return line


def saved(pixels, path, mode=None, **how):
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    (image.convert(mode) if mode else image).save(path, **how)
    return path


def photo(path, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path)


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_16_bit_picture_goes_from_black_to_white_in_equal_steps(name, tmp_path, capsys):
    files.say_once.cache_clear()
    for _ in range(2):
        read = np.asarray(read_image(saved(RAMP, tmp_path / name), "RGB"))
    assert (read == read[..., :1]).all()
    assert np.bincount(read[..., 0].ravel()).tolist() == [129] + [257] * 254 + [129]
    assert capsys.readouterr().out.count("0 is taken as black and 65535 as white") == 1


def test_twelve_bits_in_sixteen_are_refused_and_scaled_where_the_file_says_so(tmp_path):
    refused("up to 4095 of 65535.*fewer than 16 bits", read_image, saved(RAMP >> 4, tmp_path / "a.png"), "RGB")
    assert not np.asarray(read_image(saved(RAMP * 0, tmp_path / "black.png"), "RGB")).any()
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095))
    assert np.asarray(read_image(tmp_path / "a.pgm", "RGB"))[0, :, 0].tolist() == [0, 128, 255]


def test_32_bit_whole_numbers_are_refused_and_floats_are_read_between_0_and_1(tmp_path):
    refused("nothing says what is white", read_image, saved(RAMP.astype(np.int32), tmp_path / "a.tif"), "RGB")
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    assert np.asarray(read_image(saved(ramp, tmp_path / "b.tif"), "RGB"))[0, :, 0].tolist() == list(range(256))
    refused("from 0 to 255, expected 0 .black. to 1", read_image, saved(255 * ramp, tmp_path / "c.tif"), "RGB")
    ramp[0, 0] = np.nan
    refused("values go from nan", read_image, saved(ramp, tmp_path / "d.tif"), "RGB")


@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("RGB", "a.png"), ("RGB", "a.jpg"),
                                        ("CMYK", "a.jpg"), ("L", "a.jpg"), ("YCbCr", "a.tif")])
def test_pictures_of_8_bits_are_what_pillow_makes_of_them(mode, name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    path = saved(noise, tmp_path / name, mode)
    for wanted in ("RGB", "L"):
        assert read_image(path, wanted).tobytes() == Image.open(path).convert(wanted).tobytes()


def test_a_turned_photograph_is_read_as_it_is_stored_unless_it_is_somebodys_own(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6                                     # turn clockwise by a quarter to see it upright
    path = saved(noise, tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(path, "RGB")), noise)
    assert np.array_equal(np.asarray(read_image(path, "RGB", upright=True)), np.rot90(noise, -1))
    assert read_image(saved(RAMP[:6, :4] * 99, tmp_path / "b.png", exif=exif), "RGB", upright=True).size == (6, 4)


@pytest.mark.parametrize("how", ["RGBA", "LA", "P", "P, several", "RGB", "GIF"])
def test_what_is_transparent_is_white_in_a_picture_and_background_in_a_mask(how, tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2], pixels[2:] = (90, 90, 90, 255), (200, 200, 200, 0)
    image, path = Image.fromarray(pixels), tmp_path / ("a.gif" if how == "GIF" else "a.png")
    if how in ("RGBA", "LA"):
        saved(image, path, how)
    elif how == "RGB":
        saved(image, path, "RGB", transparency=(200, 200, 200))
    else:
        indexed = image.convert("RGB").quantize(2)
        gone = indexed.getpixel((0, 3))
        indexed.save(path, transparency=bytes(255 * (i != gone) for i in range(2)) if how == "P, several" else gone)
    assert np.unique(np.asarray(read_image(path, "RGB"))[2:]).tolist() == [255]
    assert np.unique(np.asarray(read_image(path, "L"))[2:]).tolist() == [0]
    assert np.unique(np.asarray(read_image(path, "RGB"))[:2]).tolist() == [90]


def test_half_transparent_is_half_white(tmp_path):
    path = saved(np.full((2, 2, 4), (100, 0, 200, 51), np.uint8), tmp_path / "a.png")
    assert np.asarray(read_image(path, "RGB"))[0, 0].tolist() == [224, 204, 244]


def test_in_a_mask_of_any_depth_all_above_zero_is_object(tmp_path):
    mask = np.array([[0, 1], [0, 3]])
    for name, kind in (("a.png", np.uint16), ("a.tif", np.float32), ("a.npy", bool), ("b.npy", np.int64), ("c.npy", float)):
        np.save(tmp_path / name, mask.astype(kind)) if name.endswith("npy") else saved(mask.astype(kind), tmp_path / name)
        assert np.array_equal(np.asarray(read_image(tmp_path / name, "L")), 255 * (mask > 0)), name


@pytest.mark.parametrize("array, words", [
    (np.zeros((4, 4, 3)), r"shape \(4, 4, 3\)"), (np.zeros(4), r"shape \(4,\)"), (np.array([["a"]]), "type <U1"),
    (None, "several arrays"), (b"", "No data"), (b"\x93NUMPY\x01\x00", "cannot read image")])
def test_an_array_that_is_no_mask_is_refused(array, words, tmp_path):
    path = tmp_path / "mask.npy"
    if array is None:
        np.savez(tmp_path / "mask.npz", np.zeros((4, 4)))
        os.replace(tmp_path / "mask.npz", path)
    elif isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)
    refused(words, read_image, path, "L")


@pytest.mark.parametrize("side, words", [(10000, "100000000 pixels"), (14000, "196000000 pixels")])
def test_a_picture_too_large_for_pillow_is_one_line_and_no_warning(side, words, tmp_path, recwarn):
    path = tmp_path / "bomb.pbm"
    path.write_bytes(b"P4 %d %d\n" % (side, side))
    for mode in (None, "RGB"):
        assert "make it smaller" in refused(words, read_image, path, mode)
    assert not [w for w in recwarn if not issubclass(w.category, ResourceWarning)]


def test_a_dicom_that_is_cut_off_is_one_line_and_no_warning(tmp_path, recwarn):
    for i, jpeg in enumerate((False, True)):
        write_dicom(tmp_path / f"1.2.{i}.dcm", np.zeros((64, 64), np.uint8), jpeg=jpeg)
        whole = (tmp_path / f"1.2.{i}.dcm").read_bytes()
        recwarn.clear()
        for cut in (100, 200, 350, len(whole) - 300):
            (tmp_path / "cut.dcm").write_bytes(whole[:cut])
            refused("cannot read image .*cut.dcm", read_image, tmp_path / "cut.dcm", "RGB")
        assert not [w for w in recwarn if not issubclass(w.category, ResourceWarning)]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files"), OSError(5, "Input/output error")])
def test_what_the_system_refuses_is_neither_damaged_nor_missing(error, tmp_path, monkeypatch):
    def fails(*_):
        raise error
    path = saved(np.zeros((4, 4), np.uint8), tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fails)
    lines = [refused(error.strerror, read_image, path, "RGB")]
    monkeypatch.setattr(os, "scandir", fails)
    lines.append(refused(error.strerror, files.folders, tmp_path))
    monkeypatch.setattr(Path, "read_bytes", fails)
    lines.append(refused(error.strerror, files.read_rows, path, {"id": files.ID}))
    assert not any(word in line for line in lines for word in ("not there", "replace", "unpack", "damaged"))


# ---------------------------------------------------------------- the folder that is named
@pytest.mark.parametrize("name", data.BENCHMARKS)
def test_a_file_as_root_is_called_a_file(name, tmp_path):
    (tmp_path / "README.md").write_text("# Read me")
    refused("README.md is a file, not a folder", data.load, name, tmp_path / "README.md")


def test_a_root_that_is_too_deep_says_which_to_give(tmp_path):
    base = birds(tmp_path)
    for name in ("cub", "waterbirds", "waterbird200"):
        assert refused("CUB_200_2011", data.load, name, base).rstrip(".").endswith(str(tmp_path))
    (tmp_path / "imagenet/train").mkdir(parents=True)
    for root in ("imagenet", "imagenet/train"):
        assert refused("too deep", data.load, "imagenet", tmp_path / root).endswith(f"give {tmp_path}")


# ---------------------------------------------------------------- birds
NAMES = [f"{c}/{c[4:]}_{i}.jpg" for c in ("001.Black_Tern", "002.Old_Wren") for i in range(6)]


def birds(root, rows=None, inside="waterbird_complete95_forest2water2"):
    """CUB with two species of six birds, and Waterbirds inside; bird i has all its parts at (i, i), its box at (i, 1)."""
    base = root / "CUB_200_2011"
    for i, name in enumerate(NAMES, 1):
        photo(base / "images" / name)
        photo(base / inside / name)
    (base / "parts").mkdir()
    every = range(1, 13)
    for name, lines in {"images": [f"{i} {NAMES[i - 1]}" for i in every], "classes": ["1 001.Black_Tern", "2 002.Old_Wren"],
                        "image_class_labels": [f"{i} {1 + (i > 6)}" for i in every], "train_test_split": [f"{i} {i % 2}" for i in every],
                        "bounding_boxes": [f"{i} {i}.0 1.0 5.0 4.0" for i in every],
                        "parts/part_locs": [f"{i} {p} {i}.0 {i}.0 1" for i in every for p in range(1, 16)]}.items():
        (base / f"{name}.txt").write_text("\n".join(lines) + "\n")
    rows = rows or [f"{i},{NAMES[i - 1]},{int(i <= 6)},{i % 3},{i % 2}" for i in every]
    (base / inside / "metadata.csv").write_text("\n".join(["img_id,img_filename,y,split,place", *rows]) + "\n")
    (root / "miniature.json").write_text("{}")           # else two species are not CUB
    return base


def test_each_bird_has_its_own_keypoints_although_its_id_was_counted_anew(tmp_path, capsys):
    wanted = [(i, name) for i, name in enumerate(NAMES, 1) if i not in (1, 5)][::-1]
    birds(tmp_path, [f"{n},{name},{int(i <= 6)},{n % 3},0" for n, (i, name) in enumerate(wanted)])
    for samples in data.load("waterbirds", tmp_path).values():
        for path, points, box in zip(samples.paths, samples.points, samples.boxes):
            number = 1 + NAMES.index(f"{path.parent.name}/{path.name}")
            assert points.tolist() == [[number, number, 1]] * 15 and box == [number, 1, 5, 4]
    assert "img_id of 9 of 10 rows is not CUB's" in capsys.readouterr().out


def test_a_bird_that_cub_does_not_know_is_refused(tmp_path):
    birds(tmp_path, ["1,001.Black_Tern/Black_Tern_9.jpg,0,0,0"])
    refused("metadata.csv.*does not know 001.Black_Tern/Black_Tern_9.jpg", data.load, "waterbirds", tmp_path)


def test_waterbirds_as_wilds_unpacks_it_is_found(tmp_path):
    base = birds(tmp_path, inside="waterbirds_v1.0")
    assert len(data.load("waterbirds", tmp_path)["test"]) == 4
    shutil.move(base / "waterbirds_v1.0", tmp_path / "waterbirds_v1.0")
    assert len(data.load("waterbirds", tmp_path)["test"].points) == 4


LONG = "a" * 300 + ".jpg"
TABLES = {      # file of CUB: (a line to add or bytes to put in its place, words of the error)
    "a letter for an id": ("images", "x a.jpg", "images.txt, line 13: id is 'x', expected a whole number"),
    "no name": ("images", "13", "images.txt, line 13: 1 of 2 fields, expected id, images"),
    "a long name": ("images", f"13 {LONG}", r"images.txt, line 13: images is 'a+\.\.\.', expected the name of a file"),
    "200 KB": ("images", "13 " + "a/" * 100000, r"line 13: images is '.{60}\.\.\.', expected"),
    "a name above the folder": ("images", "13 ../../a.jpg", "line 13: images is '../../a.jpg'"),
    "an id twice": ("images", "12 b.jpg", "images.txt, line 13: id 12 a second time"),
    "no UTF-8": ("images", b"1 a.jpg\n2 \xe9.jpg\n", "images.txt, line 2: found the byte 0xe9, expected id, images as UTF-8"),
    "UTF-16": ("classes", "1 a\n2 b\n".encode("utf-16"), "classes.txt, line 1: found UTF-16, expected"),
    "a folder": ("classes", None, "classes.txt: Is a directory"),
    "no number of a class": ("image_class_labels", "13 one", "image_class_labels.txt, line 13: image_class_labels is 'one'"),
    "a third split": ("train_test_split", "13 2", "train_test_split.txt, line 13: train_test_split is '2', expected one of 0, 1"),
    "part 0": ("parts/part_locs", "12 0 1.0 1.0 1", "part_locs.txt, line 181: part is '0', expected a whole number from 1 to 15"),
    "part 16": ("parts/part_locs", "12 16 1.0 1.0 1", "line 181: part is '16'"),
    "a part twice": ("parts/part_locs", "12 15 1.0 1.0 1", "line 181: part 15 of image 12 a second time"),
    "a missing part": ("parts/part_locs", "13 1 1.0 1.0 1", "part_locs.txt has no row of part 2 of image 13"),
    "a point that is nowhere": ("parts/part_locs", "13 1 nan 1.0 1", "line 181: x is 'nan', expected a number from"),
    "a point far away": ("parts/part_locs", "13 1 1.0 1e30 1", "line 181: y is '1e30'"),
    "no point": ("parts/part_locs", "13 1 1.0 1.0", "line 181: 4 of 5 fields"),
    "half visible": ("parts/part_locs", "13 1 1.0 1.0 0.5", "line 181: visible is '0.5'"),
    "three numbers": ("bounding_boxes", "13 1.0 2.0 3.0", "bounding_boxes.txt, line 13: 4 of 5 fields"),
    "five numbers": ("bounding_boxes", "13 1.0 2.0 3.0 4.0 5.0", "bounding_boxes.txt, line 13: height is '4.0 5.0'"),
    "an endless box": ("bounding_boxes", "13 1.0 2.0 inf 4.0", "bounding_boxes.txt, line 13: width is 'inf'"),
    "an empty box": ("bounding_boxes", "13 1.0 2.0 0.0 4.0", "bounding_boxes.txt, line 13: width is '0.0'"),
    "a box far away": ("bounding_boxes", "13 -1e9 2.0 3.0 4.0", "bounding_boxes.txt, line 13: x is '-1e9'")}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_holds_something_else_is_refused_with_its_line(case, tmp_path):
    name, content, words = TABLES[case]
    path = birds(tmp_path) / f"{name}.txt"
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes() + content.encode() + b"\n")
    refused(words, data.load, "cub", tmp_path)


HEADER = b"img_id,img_filename,y,split,place\n"
METADATA = {
    "semicolons": (HEADER.replace(b",", b";"), "line 1: has no column img_id; found ';' between them, expected .* with commas"),
    "tabs": (HEADER.replace(b",", b"\t"), r"line 1: has no column img_id; found '\\t' between"),
    "nothing": (b"", "line 1: has no column img_id; found nothing"),
    "other columns": (b"id,name\n", "line 1: has no column img_id; found the columns id, name"),
    "a missing field": (HEADER + b"1,a.jpg,0,0\n", "line 2: 4 fields, expected 5"),
    "a sixth field": (HEADER + b"1,a.jpg,0,0,0,0\n", "line 2: 6 fields, expected 5"),
    "no name": (HEADER + b"1,,0,0,0\n", "line 2: img_filename is '', expected the name of a file"),
    "an open quote": (HEADER + b'1,"a.jpg,0,0,0\n', "metadata.csv, line 2: .*expected"),
    "200 KB": (HEADER + b"1," + b"a" * 200000 + b",0,0,0\n", "metadata.csv, line 2: field larger"),
    "a number with a point": (HEADER + b"1.0,a.jpg,0,0,0\n", "line 2: img_id is '1.0', expected a whole number"),
    "UTF-16": (HEADER.decode().encode("utf-16"), "metadata.csv, line 1: found UTF-16"),
    "no UTF-8": (HEADER + b"1,\xff.jpg,0,0,0\n", "metadata.csv, line 2: found the byte 0xff")}


@pytest.mark.parametrize("case", METADATA)
def test_a_metadata_file_that_is_something_else_names_what_was_found(case, tmp_path):
    content, words = METADATA[case]
    (birds(tmp_path) / "waterbird_complete95_forest2water2/metadata.csv").write_bytes(content)
    assert "unpack" not in refused(words, data.load, "waterbirds", tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    base = birds(tmp_path)
    before = {name: data.load(name, tmp_path) for name in ("cub", "waterbirds")}
    for path in (*base.glob("*.txt"), base / "parts/part_locs.txt", base / "waterbird_complete95_forest2water2/metadata.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    for name, splits in before.items():
        for split, samples in data.load(name, tmp_path).items():
            assert samples.ids == splits[split].ids and samples.classes == splits[split].classes
            assert torch.equal(samples.groups, splits[split].groups) and samples.paths == splits[split].paths
            assert np.array_equal(samples.points, splits[split].points)


# ---------------------------------------------------------------- ImageNet
def write_imagenet(root, names, splits=("train", "val")):
    for split in splits:
        for name in names:
            photo(root / "imagenet" / split / name / "a.JPEG")
    return root


def test_folders_that_are_numbers_are_no_classes_of_imagenet(tmp_path):
    write_imagenet(tmp_path, map(str, range(12)), ["val"])
    refused("named by number .0., .*expected wnids such as n01440764", data.load, "imagenet", tmp_path)
    write_mapping(tmp_path)
    refused("named by number", data.load, "imagenet", tmp_path, limit=3)


def test_hidden_and_foreign_folders_move_no_label(tmp_path):
    (tmp_path / "imagenet/val").mkdir(parents=True)
    wnids = sorted(f"n{10007 * i % 10 ** 8:08d}" for i in range(1000))
    photo(tmp_path / "a.JPEG")
    for wnid in wnids:
        (tmp_path / "imagenet/val" / wnid).mkdir()
        os.link(tmp_path / "a.JPEG", tmp_path / "imagenet/val" / wnid / "a.JPEG")
    for name in (".ipynb_checkpoints", "lost+found", "a_notes"):
        photo(tmp_path / "imagenet/val" / name / "a.JPEG")
    photo(tmp_path / "imagenet/val" / wnids[3] / "._a.JPEG")
    for limit in (0, 10):
        samples = data.load("imagenet", tmp_path, limit=limit)["test"]
        assert [wnids[i] for i in samples.labels] == [path.parent.name for path in samples.paths]
    assert samples.digest() != data.load("imagenet", tmp_path)["test"].digest()
    for path in (tmp_path / "imagenet/val" / wnids[7]).iterdir():
        path.unlink()
    refused(f"no images in .*{wnids[7]}", data.load, "imagenet", tmp_path)


def test_a_flat_validation_archive_names_what_sorts_it(tmp_path):
    photo(tmp_path / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    refused("images and no folders.*valprep.sh", data.load, "imagenet", tmp_path)
    (tmp_path / "imagenet/train").mkdir()
    (tmp_path / "imagenet/train/n01440764.tar").write_bytes(b"")
    refused("train has no folders named by wnid", data.load, "imagenet", tmp_path)


def test_a_part_of_imagenet_is_read_where_a_file_tells_its_numbers_and_says_which_it_has(tmp_path, capsys):
    write_imagenet(tmp_path, ("n01440764", "n02085620"))
    refused("2 classes .*not 1000.*LOC_synset_mapping.txt", data.load, "imagenet", tmp_path)
    write_mapping(tmp_path)
    samples = data.load("imagenet", tmp_path)["test"]
    assert samples.labels.tolist() == [0, 151] and samples.outputs == 1000
    assert "2 of 1000 classes: n01440764 (0), n02085620 (151)" in capsys.readouterr().out
    path = tmp_path / "LOC_synset_mapping.txt"
    path.write_text("".join(path.read_text().splitlines(True)[:200]))
    refused("LOC_synset_mapping.txt: 200 wnids, expected 1000", data.load, "imagenet", tmp_path)


@pytest.mark.parametrize("content", ['{"wnids": {', "[]", "7", '{"wnids": []}', '{"wnids": {"n01440764": "0"}}', '{"wnids": {"n01440764": 1000}}', ""])
def test_a_description_of_a_miniature_that_is_torn_or_no_description_is_one_line(content, tmp_path):
    write_imagenet(tmp_path, ("n01440764",))
    (tmp_path / "miniature.json").write_text(content)
    refused("miniature.json", data.load, "imagenet", tmp_path)


# ---------------------------------------------------------------- ImageNet-9, MetaShift
def write_challenge(root):
    for c, folder in enumerate(IN9):
        for variant in IN9_VARIANTS:
            for i in range(2):
                name = f"n0208562{c}_{i}"
                photo(root / "bg_challenge" / variant / "val" / folder / (f"fg_{name}_bg_n0{i}.JPEG" if "mixed" in variant else f"{name}.JPEG"))
    return root / "bg_challenge"


def test_a_variant_that_does_not_show_the_same_objects_is_left_out_and_named(tmp_path, capsys):
    base = write_challenge(tmp_path)
    assert set(data.load("imagenet9", tmp_path)) == {"test", *IN9_VARIANTS[1:]}
    (base / "mixed_rand/val/03_reptile/fg_n02085623_1_bg_n01.JPEG").unlink()
    (base / "only_fg/val/08_fish/n99.JPEG").write_bytes((base / "only_fg/val/08_fish/n02085628_0.JPEG").read_bytes())
    splits = data.load("imagenet9", tmp_path)
    assert set(splits) == {"test", *IN9_VARIANTS[1:]} - {"mixed_rand", "only_fg"}
    out = capsys.readouterr().out
    assert "2 dog instead of 450, 2 bird" in out
    assert "mixed_rand lacks 1 of the objects that most variants show, and has 0 others (03_reptile/n02085623_1): left out" in out
    assert "only_fg lacks 0 of the objects that most variants show, and has 1 others (08_fish/n99): left out" in out
    refused("mixed_rand lacks 1", data.load, "imagenet9", tmp_path, limit=4, strict=True)


def test_an_empty_folder_of_a_class_is_refused(tmp_path):
    base = write_challenge(tmp_path)
    for path in base.glob("original/val/07_primate/*"):
        path.unlink()
    refused("imagenet9 test: no images of primate", data.load, "imagenet9", tmp_path, limit=4)
    for folder in ("train/cat/cat(sofa)", "train/cat/cat(bed)", "test/cat/cat(shelf)", "test/dog/dog(shelf)"):
        photo(tmp_path / "MetaDatasetCatDog" / folder / "1.jpg")
    for folder in ("dog(bench)", "dog(bike)"):
        (tmp_path / "MetaDatasetCatDog/train/dog" / folder).mkdir(parents=True)
    refused("metashift train: no images of dog", data.load, "metashift", tmp_path)


def test_a_file_name_that_is_not_utf8_is_augmented_and_others_as_ever(tmp_path):
    base = tmp_path / "MetaDatasetCatDog"
    for folder in ("train/cat/cat(sofa)", "train/cat/cat(bed)", "train/dog/dog(bench)", "train/dog/dog(bike)",
                   "test/cat/cat(shelf)", "test/dog/dog(shelf)"):
        photo(base / folder / "1.jpg")
        photo(base / folder / "2.jpg")
    os.rename(base / "train/dog/dog(bike)/1.jpg", os.fsencode(base) + b"/train/dog/dog(bike)/\xff.jpg")
    samples = data.load("metashift", tmp_path, 28)["train"]
    assert all(samples[0, i]["image"].isfinite().all() for i in range(len(samples))) and len(samples.digest()) == 16
    assert zlib.crc32(os.fsencode("cat(sofa)/é")) == zlib.crc32("cat(sofa)/é".encode())


def test_the_papers_numbers_of_metashift_are_of_the_541_images():
    found = data.BENCHMARKS["metashift"]
    assert found.paper_split == "test_and_val" and sum(found.counts[found.paper_split][0]) == 541
    assert {b.paper_split for name, b in data.BENCHMARKS.items() if name != "metashift"} == {"test"}


# ---------------------------------------------------------------- SIIM-ACR
@pytest.mark.parametrize("cell", ["-1", " -1", "-1.0", "-1 ", "-1."])
def test_a_healthy_chest_is_minus_one_in_any_spelling(cell, tmp_path):
    (tmp_path / "train-rle.csv").write_text(f"ImageId, EncodedPixels\n1.2,{cell}\n1.3, 5 2\n1.3,0 1\n")
    found = siim.read_runs(tmp_path / "train-rle.csv")
    assert found == {"1.2": siim.Runs(()), "1.3": siim.Runs(("5 2", "0 1"))}
    assert np.flatnonzero(np.asarray(found["1.3"].image()).T).tolist() == [0, 5, 6]


@pytest.mark.parametrize("cell", ["", " ", "nan", "NaN", "-2", "0", "5 0", "3 4 5", "3 4 -5 6", "3.5 4", "a b", "-1 -1", "inf", "1048575 2", "1e3 5"])
def test_any_other_cell_that_is_no_pairs_of_numbers_is_refused_with_its_line(cell, tmp_path):
    (tmp_path / "train-rle.csv").write_text(f"ImageId,EncodedPixels\n1.2,-1\n1.3,{cell}\n")
    refused(r"train-rle.csv, line 3: EncodedPixels is .*, expected -1, or pairs", siim.read_runs, tmp_path / "train-rle.csv")


@pytest.mark.parametrize("cell", ["", "2", "yes", "nan"])
def test_a_tube_that_is_neither_there_nor_not_is_refused_with_its_line(cell, tmp_path):
    (tmp_path / "cxr_tube_dict.csv").write_text(f"ImageId,chest_tube\n1.2,0\n1.3,{cell}\n")
    refused("cxr_tube_dict.csv, line 3: chest_tube is", siim.read_tubes, tmp_path / "cxr_tube_dict.csv")


def test_chests_without_the_disease_are_no_benchmark(tmp_path):
    for i in range(1, 5):
        write_dicom(tmp_path / "siim/dicom-images-train" / uid(i, 2) / uid(i, 3) / f"{uid(i)}.dcm", np.zeros((8, 8), np.uint8))
    (tmp_path / "siim/train-rle.csv").write_text("ImageId,EncodedPixels\n" + "".join(f"{uid(i)},-1\n" for i in range(1, 5)))
    (tmp_path / "siim/cxr_tube_dict.csv").write_text(f"ImageId,chest_tube\n{uid(1)},1\n{uid(2)},0\n")
    refused("siim train: no images of pneumothorax", data.load, "siim", tmp_path, limit=2)


# ---------------------------------------------------------------- counts
def of_counts(name, split, *counts):
    """A split with so many images of each group, without pictures."""
    b, n = data.BENCHMARKS[name], sum(counts)
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    places = ("a", "b")[:len(counts) // b.classes] if len(counts) > b.classes else ()
    return Samples(name, split, 28, [f"c{i}" for i in range(b.classes)], range(n), range(n), groups // max(1, len(places)), places, groups)


def test_the_published_counts_pass_and_others_are_named():
    published = data.BENCHMARKS["waterbirds"].counts["train"]
    assert data.difference(of_counts("waterbirds", "train", 3498, 184, 56, 1057), published) == ""
    assert data.difference(of_counts("waterbirds", "train", 3525, 186, 54, 1030), published) == (
        "3525 c0 a instead of 3498, 186 c0 b instead of 184, 54 c1 a instead of 56, 1030 c1 b instead of 1057")
    for healthy, ill in ((6798, 1926), (7880, 2216)):    # two releases of SIIM-ACR
        assert data.difference(of_counts("siim", "train", healthy, ill), data.BENCHMARKS["siim"].counts["train"]) == ""
    assert data.difference(of_counts("siim", "train", 7880, 2217), data.BENCHMARKS["siim"].counts["train"]) == "2217 c1 instead of 2216"
    some = of_counts("imagenet", "test", *[50] * 990, *[49] * 10)
    assert data.difference(some, data.BENCHMARKS["imagenet"].counts["test"]).endswith("49 c993 instead of 50 and 6 more")
    assert data.difference(of_counts("cub", "train", *[30] * 200), data.BENCHMARKS["cub"].counts["train"]) == "6000 images instead of 5994"


def test_published_counts_add_up_to_the_published_sizes():
    sizes = {name: {split: {sum(release) for release in releases} for split, releases in b.counts.items()}
             for name, b in data.BENCHMARKS.items()}
    assert sizes["waterbirds"] == {"train": {4795}, "val": {1199}, "test": {5794}} and sizes["cub"] == {"train": {5994}, "test": {5794}}
    assert sizes["siim"] == {"train": {8724, 10096}, "test": {1951}, "robust": {312}, "non_robust": {1639}}
    assert sizes["metashift"] == {"train": {1123}, "test_and_val": {541}} and sizes["imagenet"] == {"train": {1281167}, "test": {50000}}
    assert set(map(frozenset, sizes["imagenet9"].values())) == {frozenset({4050})} and len(sizes["imagenet9"]) == 8


def test_what_differs_from_the_published_data_is_said_once_kept_and_refused_when_strict(tmp_path, capsys):
    birds(tmp_path)
    assert "published" not in capsys.readouterr().out and not data.load("waterbirds", tmp_path)["test"].differs
    (tmp_path / "miniature.json").unlink()
    capsys.readouterr()
    splits = data.load("waterbirds", tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "published" in line]
    assert line.startswith("waterbirds is not as published: train: 1 landbird on land instead of 3498")
    assert all(s.differs and s.differs in line for s in splits.values()) and splits["test"].keep([0]).differs
    refused("not as published.*--strict-data", data.load, "waterbirds", tmp_path, strict=True)
    assert not data.load("waterbirds", tmp_path, limit=4, strict=True)["test"].differs


def test_a_difference_that_a_script_meets_is_one_line_and_exit_2(tmp_path, capsys):
    birds(tmp_path)
    (tmp_path / "miniature.json").unlink()
    with pytest.raises(SystemExit) as end:
        run_script(lambda: data.load("waterbirds", tmp_path, strict=True))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_digest_tells_other_images_and_another_order_and_not_how_names_are_kept(tmp_path):
    digest = lambda ids: Samples("none", "train", 28, ("a",), ids, ids, [0] * len(ids)).digest()
    names = ["train/n1/a.JPEG", "train/n1/bb.JPEG", "train/n2/é.JPEG"]
    block = lambda names, width: Names(tmp_path, np.array([os.fsencode(n) for n in names], dtype=f"S{width}")).ids
    assert re.fullmatch("[0-9a-f]{16}", digest(names))
    assert digest(names) == digest(block(names, 20)) == digest(block(names, 90))
    assert len({digest(x) for x in (names, names[::-1], names[:2], [*names, "b"])}) == 4
