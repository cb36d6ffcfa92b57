"""--data folder: pictures of one's own, in folders or in a table; what is odd about them is said, each file opened once.

And --recipe: settings by one word.
"""
import builtins
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import intervene
import runs
import sweep
import train
from benchmarks import files, folder
from measure import tables
from settings import UsageError, parse
from tiny import fails

FULL = {f"{split}/{animal}": n for split, n in (("train", 4), ("val", 2), ("test", 3)) for animal in ("cat", "dog")}


def draw(path, seed, size=(40, 30), mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path, **how)


def tree(root, counts=FULL, suffix=".png"):
    """{folder: number} of pictures, all different."""
    for n, (name, count) in enumerate(counts.items()):
        for i in range(count):
            draw(root / name / f"{i}{suffix}", 100 * n + i)
    return root


def table(root, *rows, header="filename,label,split,place,mask,id", pictures=8):
    """A metadata.csv, and im/0.png, im/1.png, ..."""
    root.mkdir(exist_ok=True)
    for i in range(pictures):
        draw(root / "im" / f"{i}.png", i)
    (root / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


def looked(root, capsys, **how):
    """Load a folder -> (its splits, the lines that were printed)."""
    splits = data.load("folder", root, 28, **how)
    return splits, capsys.readouterr().out


# ---------------------------------------------------------------- layouts
def test_folders_of_classes_are_read_with_all_that_is_below_them(tmp_path, capsys):
    tree(tmp_path / "pets")
    draw(tmp_path / "pets/train/cat/deep/er/x.JPG", 1)
    draw(tmp_path / "pets/train/cat/y.webp", 2)
    draw(tmp_path / "pets/train/.hidden/z.png", 3)
    (tmp_path / "pets/train/cat/loop").symlink_to(tmp_path / "pets/train/cat")
    splits, said = looked(tmp_path / "pets", capsys)
    train = splits["train"]
    assert list(splits) == ["train", "val", "test"] and train.classes == ("cat", "dog") and train.places == ()
    assert [train.ids[i] for i in range(4, 6)] == ["train/cat/deep/er/x.JPG", "train/cat/y.webp"] and len(train) == 10
    assert train.labels.tolist() == [0] * 6 + [1] * 4 and torch.equal(train.groups, train.labels) and train.title == "pets"
    assert train[0]["image"].shape == train[0, 1]["image"].shape == (3, 28, 28)
    assert said.index("train         cat") < said.index("pets train: 10 images (6 cat, 4 dog)")


@pytest.mark.parametrize("header, split, label, place", [
    ("filename,label,split,place,mask,id", "train", "dog", "in"), ("filename,y,split,a,mask,id", "0", "1", "0"),
    ("img_filename,y,split,place,mask,img_id", "0", "1", "1")])
def test_a_table_is_read_with_our_names_and_those_of_subpopbench_and_wilds(header, split, label, place, tmp_path):
    other = {"dog": "cat", "1": "0"}[label], {"in": "out", "0": "1", "1": "0"}[place]
    table(tmp_path, f"im/0.png,{label},{split},{place},im/4.png,7", f"im/1.png,{other[0]},{split},{other[1]},im/5.png,8", header=header)
    samples = data.load("folder", tmp_path, 28)["train"]
    assert samples.ids == ["7", "8"] and samples.paths[1] == tmp_path / "im/1.png" and samples.labels.tolist() == [1, 0]
    assert len(samples.places) == 2 and samples.masks == [tmp_path / "im/4.png", tmp_path / "im/5.png"]
    assert samples.groups.tolist() == [2 * y + (p == max(place, other[1])) for y, p in ((1, place), (0, other[1]))]
    assert {"mask", "group"} <= samples[0].keys()


def test_numbers_are_in_the_order_of_numbers_and_words_sorted_whatever_the_split():
    assert folder.in_order(["10", "9", "2", "9"]) == ["2", "9", "10"] and folder.in_order(["-1", "1.5", "1"]) == ["-1", "1", "1.5"]
    assert folder.in_order(["10", "9", "b"]) == ["10", "9", "b"] and folder.in_order(["nan", "1"]) == ["1", "nan"]
    assert folder.named("class", ["2", "1.5", "b2", "cat"]) == ["class 2", "class 1.5", "b2", "cat"]


def test_the_transparency_of_a_picture_is_its_mask(tmp_path, capsys):
    pixels = np.full((28, 28, 4), 200, np.uint8)
    pixels[:10, :, 3] = 0
    table(tmp_path, "im/a.png,cat,train,,alpha,", "im/b.png,dog,train,,im/b.png,", pictures=1)
    for name in "ab":
        Image.fromarray(pixels, "RGBA").save(tmp_path / f"im/{name}.png")
    samples = data.load("folder", tmp_path, 28)["train"]
    for i in range(2):
        assert torch.equal(samples[i]["mask"], torch.from_numpy((pixels[..., 3] > 0).astype(np.uint8)))
    table(tmp_path, "im/a.png,cat,train,,alpha,", "im/b.png,dog,train,,alpha,", "im/0.png,dog,train,,alpha,")
    samples, said = looked(tmp_path, capsys)
    assert len(samples["train"]) == 2 and "1 of 3 files of train cannot be read" in said and "alpha channel" in said


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    tree(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6                                   # a quarter to the right
    draw(tmp_path / "train/cat/0.png", 5, (40, 20), exif=turned)
    sideways = data.load("folder", tmp_path, 20)["train"][0]["image"]
    draw(tmp_path / "train/cat/0.png", 5, (40, 20))
    flat = data.load("folder", tmp_path, 20)["train"][0]["image"]
    assert torch.equal(sideways, flat.rot90(-1, (1, 2)))


def test_masks_that_some_rows_lack_are_not_used_in_that_split_only(tmp_path, capsys):
    rows = [f"im/{i}.png,{'cd'[i % 2]},{'train' if i < 4 else 'test'},,{f'im/{i}.png' if i > 9 else 'im/0.png' * (i > 0)}," for i in range(8)]
    splits, said = looked(table(tmp_path, *rows), capsys)
    assert splits["train"].masks is None and splits["test"].masks and "1 of 4 rows of train have no mask" in said


@pytest.mark.parametrize("rows, words", [
    (["im/0.png,cat,train,,,", "im/1.png,dog,3,,,"], ("line 3", "split is '3'")), (["im/0.png,,train,,,"], ("line 2", "label or y is ''")),
    (["im/0.png,cat,train,in,,", "im/1.png,dog,train,,,"], ("1 of 2 rows of train have no place", "im/1.png")),
    (["../0.png,cat,train,,,"], ("below the folder",)), (["im/0.png,cat,train,,../m.png,"], ("line 2: mask is '../m.png'", "or alpha")),
    (["im/0.png,cat,train,,,1", "im/1.png,dog,train,,,1"], ("same id", "1 of train")), ([], ("no rows",)),
    (["im/0.png,cat,train,,,", "im/1.png,cat,test,,,"], ("of one class, cat",)), (["im/0.png,cat,train"], ("3 fields, expected 6",))], ids=str)
def test_a_table_that_is_not_as_expected_is_refused_with_its_line(rows, words, tmp_path):
    with pytest.raises(UsageError) as error:
        data.load("folder", table(tmp_path, *rows))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("counts, root, words", [
    ({"cat": 2, "dog": 2}, "", ("folders of pictures (cat, dog)", "no train")), ({".": 2}, "", ("pictures, but no folders of classes",)),
    (FULL, "train", ("too deep",)), (FULL, "train/cat", ("too deep",)), ({"x/" + k: n for k, n in FULL.items()}, "", ("not deep enough", "x")),
    (FULL, "nowhere", ("not there", "--root")), ({**FULL, "valid/cat": 1}, "", ("val and valid",)), ({"train/x": 0, "a": 0}, "", ("expected",)),
    ({"train/cat": 3}, "", ("of one class",)), ({**FULL, "test/fox": 1}, "", ("test has images of fox", "train has none"))], ids=str)
def test_another_layout_is_told_by_what_it_seems_to_be(counts, root, words, tmp_path):
    tree(tmp_path / "pets", counts)
    (tmp_path / "pets").mkdir(exist_ok=True)
    with pytest.raises(UsageError) as error:
        data.load("folder", tmp_path / "pets" / root)
    assert all(word in str(error.value) for word in words), error.value


# ---------------------------------------------------------------- what is odd
def test_each_oddity_is_one_line(tmp_path, capsys):
    root = tree(tmp_path / "pets", {**FULL, "train/fox": 2})
    (root / "train/cat/bad.jpg").write_text("no picture")
    (root / "train/cat/notes.txt").write_text("no picture either")
    (root / "val/owl").mkdir()
    shutil.copy(root / "train/cat/0.png", root / "test/dog/copy.png")
    shutil.copy(root / "train/cat/1.png", root / "train/dog/copy.png")           # in one split: not odd
    splits, said = looked(root, capsys)
    for line in ("pets: left out 1 file with the ending of no picture (.txt)", "pets: no pictures in the folder val/owl",
                 "pets: val has no images of fox", "pets: test has no images of fox",
                 "pets: 1 file of test with the content of one in train: train/cat/0.png = test/dog/copy.png"):
        assert said.count(line + "\n") == 1, line
    assert said.count("1 of 12 files of train cannot be read and are left out: ") == 1 and "bad.jpg: it is no picture" in said
    assert len(splits["train"]) == 11 and "bad.jpg" in splits["train"].differs and "owl" not in splits["train"].classes
    with pytest.raises(UsageError, match="--strict-data: .*bad.jpg.*content of one in train"):
        data.load("folder", root, strict=True)


def test_a_group_that_training_lacks_is_said(tmp_path, capsys):
    rows = [f"im/{i}.png,{'cat' if i % 2 else 'dog'},{'train' if i < 4 else 'test'},{'in' if i % 2 or i == 6 else 'out'},," for i in range(8)]
    assert "test has groups that train lacks: dog in (1 image)\n" in looked(table(tmp_path, *rows), capsys)[1]


def test_where_every_file_of_a_class_is_damaged_nothing_is_trained(tmp_path):
    tree(tmp_path)
    for i in range(4):
        (tmp_path / f"train/cat/{i}.png").write_bytes(b"")
    with pytest.raises(UsageError, match="one class only.*4 of 8 files of train cannot be read"):
        data.load("folder", tmp_path)


def test_each_file_is_opened_once_and_read_to_its_end_only_where_size_and_head_occur_in_two_splits(tmp_path, monkeypatch):
    root, opened, digested = tree(tmp_path, suffix=".bmp"), [], []             # all of one size
    big = np.zeros((60, 60, 3), np.uint8)
    for name, last in (("train/cat/x", 1), ("test/cat/x", 2), ("test/dog/x", 1)):
        big[0, 0] = last                                 # the last row of a BMP comes first: these differ at the end
        Image.fromarray(big).save(root / f"{name}.bmp")
    plain, rest = builtins.open, folder.digest_of_rest
    monkeypatch.setattr(builtins, "open", lambda path, *how, **more: opened.append(str(path)) or plain(path, *how, **more))
    monkeypatch.setattr(folder, "digest_of_rest", lambda path: digested.append(path.relative_to(root).as_posix()) or rest(path))
    splits = data.load("folder", root)
    mine = [path for path in opened if path.endswith(".bmp")]
    assert sorted(digested) == ["test/cat/x.bmp", "test/dog/x.bmp", "train/cat/x.bmp"]
    assert len(mine) == len(set(mine)) + 3 == sum(map(len, splits.values())) + 3
    assert splits["test"].differs == "1 file of test with the content of one in train: train/cat/x.bmp = test/dog/x.bmp"
    opened.clear()
    some = data.load("folder", root, check={"test"})["test"]
    some.check()
    assert len([path for path in opened if path.endswith(".bmp")]) == len(some)


def test_looking_at_a_file_says_what_read_image_says(tmp_path):
    draw(tmp_path / "a.png", 1, mode="RGBA")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "c.tif")
    for name in ("a.png", "b.png", "c.tif", "none.png"):
        look = files.look(tmp_path / name)
        try:
            files.read_image(tmp_path / name)
            assert look.fault == "" and look.alpha
        except UsageError as error:
            assert look.fault and look.fault in str(error)


def test_a_miniature_written_as_a_folder_gives_the_same_samples(tmp_path):
    """Against the reader of Waterbirds: pixels, labels, groups, masks."""
    birds = data.find_root("waterbirds", "", True)
    theirs = data.load("waterbirds", birds, 96, limit=6, splits=("test",))["test"]
    rows = []
    for i in range(6):
        for kind, path in (("im", theirs.paths[i]), ("mask", theirs.masks[i])):
            (tmp_path / kind).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / kind / f"{i}{path.suffix}")
        y, place = divmod(int(theirs.groups[i]), 2)
        rows.append(f"im/{i}{theirs.paths[i].suffix},{theirs.classes[y]},2,{theirs.places[place]},mask/{i}.png,{theirs.ids[i]}")
    ours = data.load("folder", table(tmp_path, *rows, pictures=0), 96)["test"]
    assert ours.group_names == theirs.group_names
    for key in ((1, 0), 0, 5):
        a, b = ours[key], theirs[key]
        assert {"image", "mask"} <= a.keys() | {"mask"} and a["id"] == b["id"]
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a if k != "id")


# ---------------------------------------------------------------- the command
def test_the_command_prints_the_table_and_draws_a_sheet_that_it_may_replace_and_nobody_elses(tmp_path, capsys):
    root, sheet = tree(tmp_path / "pets"), tmp_path / "sheet.png"
    for _ in range(2):
        data.main(["--root", str(root), "--sheet", str(sheet)])
        assert "train         cat                              4" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.height == 6 * 96 and picture.info["Software"] == "iFAM"
        assert len(picture.crop((picture.width - 8 * 96, 0, picture.width - 7 * 96, 96)).getcolors(10000)) > 100
    draw(sheet, 1)
    assert "--force" in fails(data.main, "--root", root, "--sheet", sheet)(capsys)


def test_available_says_whether_a_folder_can_be_read(tmp_path, capsys):
    assert data.available("folder", tree(tmp_path / "pets")) and "your pictures under" in capsys.readouterr().out
    assert not data.available("folder", tmp_path) and "not there (--root" in capsys.readouterr().out


# ---------------------------------------------------------------- a run
SMALL = ("--recipe", "mini", "--epochs", 1, "--batch", 4, "--device", "cpu", "--log-every", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ifam on a folder without a test split -> (the folder, the run)."""
    home = tmp_path_factory.mktemp("own")
    places = lambda i: "in" if i % 3 else "out"
    root = table(home / "pets", *(f"im/{i}.png,{'cat' if i % 2 else 'dog'},{'train' if i < 8 else 'val'},{places(i)},im/{i}.png," for i in range(20)), pictures=0)
    for i in range(20):
        draw(root / f"im/{i}.png", i, mode="RGBA")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train.main(["--data", "folder", "--root", "pets", *map(str, SMALL)])
    return home, home / "runs" / "pets"


def test_a_run_has_the_name_of_its_folder_and_is_measured_on_val_where_there_is_no_test(trained, monkeypatch, capsys):
    home, run = trained
    monkeypatch.chdir(home)
    evaluate.main(["--ckpt", "runs/pets/best.pt", "--leakage", "4"])
    report, out = json.loads((run / "report.json").read_text()), capsys.readouterr().out
    assert report["data"] == "folder pets" and report["split"] == "val" and report["images"] == 12
    assert "pets has no test split: measured on val, on which the best epoch was chosen too" in out and "folder pets val, 12 images" in out
    assert set(report["stage2"]["groups"]) == {"cat in", "cat out", "dog in", "dog out"} and report["localisation"]["foreground_iou"] is not None
    assert report["leakage"]["repaint"]["max_logit_change"] == 0 and report["leakage"]["place_of_mask"] is None     # 8 images
    intervene.main(["--ckpt", "runs/pets/best.pt", "--drop", "1"])
    evaluate.main(["--ckpt", "runs/pets/best.pt", "--leakage", "0", "--intervention", "runs/pets/intervention.json"])
    assert "CHOSEN ON VAL: too good in val" in capsys.readouterr().out           # --split is test, the images are those of val
    state = torch.load(run / "best.pt", weights_only=True)
    assert state["dataset"] == {"classes": ["cat", "dog"], "places": ["in", "out"], "pipeline": "fine-grained"}
    tables.main(["runs/pets"])
    assert "folder pets" in capsys.readouterr().out


def test_another_folder_with_the_same_classes_is_measured_under_its_own_name_and_others_are_refused(trained, tmp_path, capsys):
    home, run = trained
    tree(tmp_path / "zoo")
    evaluate.main(["--ckpt", str(run / "best.pt"), "--root", str(tmp_path / "zoo"), "--leakage", "4"])
    report = json.loads((run / "report-zoo.json").read_text())
    assert report["data"] == "folder zoo" and report["images"] == 6
    tree(tmp_path / "farm", {name.replace("dog", "cow"): n for name, n in FULL.items()})
    assert "farm has other classes" in fails(evaluate.main, "--ckpt", run / "best.pt", "--root", tmp_path / "farm")(capsys)
    tree(tmp_path / "three", {**FULL, "train/fox": 2})
    assert "needs 3 classes, the checkpoint has 2" in fails(evaluate.main, "--ckpt", run / "best.pt", "--root", tmp_path / "three")(capsys)


def test_a_folder_without_any_split_to_measure_on_says_how_to_have_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "pets", {"train/cat": 8, "train/dog": 8})
    where = ("--data", "folder", "--root", "pets", *map(str, SMALL))
    train.main([*where, "--method", "erm"])
    assert "pets: no val and no test split: nothing to measure on; --val-share 0.1" in capsys.readouterr().out
    assert "--val-share 0.1" in fails(evaluate.main, "--ckpt", "runs/pets-erm/best.pt")(capsys)
    train.main([*where, "--method", "erm", "--val-share", "0.25", "--out", "held"])
    evaluate.main(["--ckpt", "held/best.pt", "--leakage", "4"])
    assert json.loads((tmp_path / "held/report.json").read_text())["images"] == 4


# ---------------------------------------------------------------- recipes
def settings(*flags):
    return parse(runs.Config, "", [str(flag) for flag in flags], runs.preset, runs.read_settings)


def but(cfg, *names):
    return {name: value for name, value in vars(cfg).items() if name not in names}


def test_mini_is_the_recipe_mini_on_drawings():
    for name in ("waterbirds", "siim", "imagenet"):
        assert but(settings("--data", name, "--mini"), "mini", "out") == but(settings("--data", name, "--recipe", "mini"), "mini", "out")
    assert settings().recipe == "paper" == settings("--mini", "--recipe", "paper").recipe and settings("--mini").recipe == "mini"
    assert but(settings("--recipe", "paper")) == but(settings()) and settings("--recipe", "mini", "--epochs", 7).epochs == 7
    plain = settings("--data", "folder", "--recipe", "mini")
    assert {name: getattr(plain, name) for name in runs.MINI} == {**runs.MINI, "dro_step": 0}      # group-dro and george alone have a step
    assert settings("--mini", "--objective", "group-dro").dro_step == runs.MINI["dro_step"]


@pytest.mark.parametrize("flags, size, arch", [
    ((), 252, ""), (("--data", "folder"), 168, ""), (("--mini",), 0, ""), (("--arch", "b16", "--size", 512), 256, ""), (("--arch", "l", "--size", 70), 0, ""),
    (("--selector-size", 112), 112, ""), (("--recipe", "faster"), 252, "b/6"), (("--recipe", "faster", "--mini"), 0, "mini/2")], ids=str)
def test_the_fast_recipes_show_stage_1_half_of_the_side_but_12_patches_and_the_faster_one_half_of_the_blocks(flags, size, arch):
    cfg = settings(*(() if "--recipe" in flags else ("--recipe", "fast")), *flags)
    flags = [f for f in flags if f not in ("--recipe", "faster")]
    assert (cfg.selector_size, cfg.selector_arch) == (size, arch)
    usual = settings(*(flags if "--selector-size" not in flags else ()))
    assert but(cfg, "selector_size", "selector_arch", "recipe") == but(usual, "selector_size", "selector_arch", "recipe")


def test_a_recipe_leaves_out_what_a_method_does_not_have_with_a_line_and_a_typed_flag_is_refused():
    cfg = settings("--data", "folder", "--method", "erm", "--recipe", "mini")
    assert cfg.lr == runs.MINI["lr"] and cfg.lr_prototypes == runs.Config.lr_prototypes
    assert "left out, for --method erm has no such setting: --k 4 --lr-tokens 1e-05" in runs.recipe_text(cfg)
    assert runs.recipe_text(settings("--mini", "--method", "erm")) == runs.recipe_text(settings()) == ""
    assert runs.recipe_text(settings("--method", "erm", "--recipe", "fast")).startswith("--recipe fast: nothing; left out")
    with pytest.raises(UsageError, match="--k means nothing to --method erm"):
        settings("--method", "erm", "--recipe", "mini", "--k", 4)


def test_a_sweep_shares_out_what_was_typed_and_what_a_recipe_has(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {cfg.method: cfg for cfg, _ in sweep.plan(["erm", "ifam"], 2, ["--data", "folder", "--root", "pets", "--recipe", "mini", "--k", "3"])}
    said = capsys.readouterr().out
    assert found["ifam"].k == 3 and found["ifam"].out == "runs/pets-sweep/ifam-1" and found["erm"].lr == runs.MINI["lr"]
    assert said.count("--k 3: left out for erm") == 1 and said.count("--recipe mini: left out, for --method erm") == 1


def test_a_recipe_replaces_what_the_settings_of_another_run_say_and_old_runs_have_the_usual_one(tmp_path):
    content = {**vars(settings("--mini", "--k", 3, "--seed", 5)), "recipe": None}
    del content["recipe"]                                # as written before there were recipes
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = settings("--config", tmp_path / "config.json")
    assert again.recipe == "mini" and not runs.differences(content, again)
    fast = settings("--config", tmp_path / "config.json", "--recipe", "fast")
    assert (fast.selector_size, fast.k, fast.seed, fast.lr) == (0, 3, 5, runs.MINI["lr"])
    paper = settings("--config", tmp_path / "config.json", "--recipe", "paper", "--no-mini")
    assert (paper.arch, paper.size, paper.lr, paper.seed) == ("b", 518, runs.Config.lr, 5)
    erm = {**vars(settings("--mini", "--method", "erm")), "k": 4, "lr_tokens": 1e-5}                     # what earlier runs recorded
    assert not runs.differences(erm, settings("--mini", "--method", "erm"))


def test_a_row_of_a_table_names_the_recipe_where_it_is_not_the_usual_one():
    rows = [tables.row_name(vars(settings("--data", "folder", *flags))) for flags in ((), ("--recipe", "mini", "--k", 3), ("--recipe", "fast", "--method", "erm"))]
    assert rows == ["ifam", "ifam --recipe mini --k 3", "erm --recipe fast"] and tables.row_name(vars(settings("--mini"))) == "ifam"


@pytest.mark.parametrize("flags, words", [
    (("--arch", "mini", "--size", 96), "--weights mini"), (("--weights", "mini"), "--arch mini"), (("--registers", 3), "--registers 3"),
    (("--weights", "rad-dino"), "--registers 0"), (("--recipe", "mini", "--size", 100), "multiple"), (("--recipe", "mini", "--weights", "no.pt"), "no such file")], ids=str)
def test_settings_that_make_no_model_are_refused_before_a_picture_is_opened(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("data were opened"))
    assert words in fails(train.main, "--data", "folder", "--root", tmp_path, *flags)(capsys)


# ---------------------------------------------------------------- one folder too deep
@pytest.mark.parametrize("name", [name for name in data.BENCHMARKS if name != "folder"])
def test_a_root_one_or_more_folders_too_deep_says_which_to_give(name):
    if name not in data.miniature.BENCHMARKS:
        pytest.skip(f"no miniature of {name}")
    root, below = data.find_root(name, "", True), ""
    found = data.read(name, root, 96, 0)
    path = next(iter(found.values())).paths[0]
    for part in path.relative_to(root).parts[:3]:
        below += f"/{part}"
        if (root.parent / (root.name + below)).is_dir() and below != "/siim":     # this one is read as it is, too
            with pytest.raises(UsageError, match=f"give .*{root.name}"):
                data.read(name, root.parent / (root.name + below), 96, 0)
