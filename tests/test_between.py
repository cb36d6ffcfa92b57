"""Inside the object: what one part says alone, and what its representation holds of the other parts."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from models import TINY, pictures, tiny
from PIL import Image

import baselines
import data
import evaluate
import miniature
import runs
from baselines import ERM, PDiscoFormer
from benchmarks.cub import read_attributes
from benchmarks.samples import Samples
from ifam import IFAM
from measure import between, figures, tables
from miniature.cub import colour_name
from settings import UsageError
from tiny import fails
from vit import ViT

KINDS = {"as published": {}, "a smaller stage 1": dict(size=84, selector_size=42), "a late mask": dict(masking="late", pooling="mean"),
         "a soft mask": dict(hardness="soft")}


# ---------------------------------------------------------------- one pass of stage 2 per part
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_per_part_is_a_pass_under_the_mask_of_that_part(kind):
    model, images = tiny(**KINDS[kind]), pictures(5, KINDS[kind].get("size", 70))
    with torch.no_grad():
        out = model(images, per_part=True)
        there = out.keep_parts.any(2)
        for k in range(4):
            alone = model(images, out.keep_parts[:, k]).logits
            torch.testing.assert_close(out.logits_parts[there[:, k], k], alone[there[:, k]])
        assert torch.equal(out.logits, model(images).logits) and model(images).logits_parts is None
    assert out.logits_parts[~there].isnan().all() and out.logits_parts[there].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_disjoint_and_their_union_is_the_mask(kind):
    model, images = tiny(**KINDS[kind]), pictures(5, KINDS[kind].get("size", 70))
    with torch.no_grad():
        out = model(images, per_part=True)
    assert torch.equal(out.keep_parts.sum(1), out.keep) and ((out.keep_parts > 0).sum(1) <= 1).all()
    assert (out.keep_parts.any(2).sum(1) > 1).any(), "nothing to tell apart"
    if model.selector.given is None:                     # one grid: the part is that of the noise-free maps
        best = out.part_logits[:, :-1].argmax(1)
        assert all(out.keep_parts[i, best[i, n], n] == out.keep[i, n] for i in range(5) for n in range(out.keep.shape[1]))


def test_no_pixel_outside_a_part_moves_a_bit_of_what_it_says():
    model, images = tiny(), pictures(4)
    with torch.no_grad():
        out = model(images, per_part=True)
        for k in range(4):
            hidden = (out.keep_parts[:, k] == 0).unflatten(1, model.grid)[:, None].repeat_interleave(14, 2).repeat_interleave(14, 3)
            painted = torch.where(hidden, torch.full_like(images, 7.0), images)
            again = model.each_part(painted, out)        # the parts held fixed
            there = out.keep_parts[:, k].any(1)
            assert torch.equal(again.logits_parts[there, k], out.logits_parts[there, k])
            assert not torch.equal(again.logits_parts.nan_to_num(), out.logits_parts.nan_to_num())


def test_a_given_mask_is_split_by_the_parts_too_and_a_part_outside_it_says_nothing():
    model, images = tiny(), pictures(3)
    with torch.no_grad():
        out = model(images)
        part = model.split(out, out.keep)[:, 1]
        again = model(images, part, per_part=True)
    assert torch.equal(again.keep_parts[:, 1], part) and again.logits_parts[:, [0, 2, 3]].isnan().all()
    torch.testing.assert_close(again.logits_parts[:, 1][part.any(1)], again.logits[part.any(1)])


def test_in_training_no_patch_belongs_to_a_part_that_was_dropped_and_gradients_reach_stage_1():
    model, images = tiny().train(), pictures(4)
    noise = model.draw_noise(4)._replace(parts2=torch.tensor([[1., 0, 1, 0]] * 4))
    out = model(images, noise=noise, per_part=True)
    assert not out.keep_parts[:, [1, 3]].any() and torch.equal(out.keep_parts.sum(1), out.keep)
    out.logits_parts[out.keep_parts.any(2)].sum().backward()
    assert model.selector.prototypes.grad.abs().max() > 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_removed_part_says_nothing():
    model, images = tiny(), pictures(3)
    model.selector.limits = torch.tensor([float("inf"), -float("inf"), float("inf"), float("inf")])
    with torch.no_grad():
        out = model(images, per_part=True)
    assert out.logits_parts[:, 1].isnan().all() and torch.equal(out.keep_parts.sum(1), out.keep)


def test_a_model_without_a_second_stage_or_without_parts_has_no_pass_per_part():
    with pytest.raises(ValueError, match="no second stage"):
        PDiscoFormer(3, 4, TINY, 70).eval()(pictures(2), per_part=True)
    with pytest.raises(TypeError):
        ERM(3, TINY, 70)(pictures(2), per_part=True)


# ---------------------------------------------------------------- what parts say alone
def test_accuracy_agreement_and_what_the_whole_follows_are_the_ones_counted_by_hand():
    labels, whole = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 1])
    parts = torch.tensor([[0, 1, 9], [1, 1, 9], [2, 0, 9], [0, 1, 9]])           # the third part never has a patch
    patches = torch.tensor([[5, 3, 0], [2, 4, 0], [1, 6, 0], [0, 2, 0]])
    found = between.parts_say(whole, parts, patches, labels)
    first, second, third = found["parts"]
    assert (first["n"], first["accuracy"], first["whole"], first["patches"]) == (3, 1, pytest.approx(2 / 3), pytest.approx(8 / 3))
    assert (second["n"], second["accuracy"], second["images"]) == (4, pytest.approx(2 / 4), 1)
    assert (third["n"], third["accuracy"], third["patches"], third["follows"]) == (0, None, None, None)
    assert found["agreement"] == {"pairs": 3, "share": pytest.approx(1 / 3)}
    # images 0 and 2 are split: the whole says what part 0 says in the first, and what neither says in the second
    assert (first["follows"], second["follows"]) == (0.5, 0.0)
    assert found["disagree"] == {"images": 2, "share": 0.5, "largest": 0.5, "none": 0.5}


def test_one_part_has_nobody_to_agree_with():
    found = between.parts_say(*(torch.tensor(x) for x in ([0, 1], [[0], [0]], [[3], [1]], [0, 1])))
    assert found["agreement"] == {"pairs": 0, "share": None} and found["disagree"]["images"] == 0 and found["parts"][0]["accuracy"] == 0.5


def test_a_landmark_is_shown_by_the_part_whose_patch_it_lies_in_unless_it_is_hidden_or_outside():
    parts = torch.zeros(1, 2, 6)                         # a grid of 2 x 3 patches in a picture of 60 x 60
    parts[0, 0, 1] = parts[0, 1, 5] = 1
    points = torch.tensor([[[25., 10, 1], [59.9, 59.9, 1], [25, 10, 0], [60, 60, 1], [5, 5, 1]]])
    shown = between.landmarks_shown(parts, points, (2, 3), 60)[0]
    assert shown[0].tolist() == [True, False, False, False, False] and shown[1].tolist() == [False, True, False, False, False]


# ---------------------------------------------------------------- an attribute that is planted in one part
GROUPS, COLOURS = ("has_bill_color", "has_tail_color", "has_size"), ("blue", "red", "green")


def write_attributes(cub, values, certainty=None):
    """attributes/ as CUB has it: image i (from 1) has value values[i][a] of group a, with one of four certainties."""
    (cub / "attributes").mkdir(parents=True)
    (cub.parent / "attributes.txt").write_text("".join(f"{3 * a + v + 1} {group}::{colour}\n" for a, group in enumerate(GROUPS) for v, colour in enumerate(COLOURS)))
    (cub / "attributes" / "certainties.txt").write_text("1 not visible\n2 guessing\n3 probably\n4 definitely\n")
    (cub / "attributes" / "image_attribute_labels.txt").write_text("".join(
        f"{i} {3 * a + v + 1} {int(v == value)} {(certainty or {}).get((i, a), 4)} 1.5\n"
        for i, row in enumerate(values, 1) for a, value in enumerate(row) for v in range(3)))


class Planted(Samples):
    """Left halves have one of three colours, right halves one of three others, drawn independently; beaks lie on the left."""

    def __init__(self, folder, n=300):
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randint(3, (n, 2), generator=generator)
        write_attributes(folder / "CUB_200_2011", [[*row, 0] for row in self.values.tolist()])
        points = np.zeros((15, 3))
        points[1], points[13] = (5, 5, 1), (27, 5, 1)    # beak and tail
        super().__init__("planted", "test", 32, "ab", [str(i + 1) for i in range(n)], range(n), torch.arange(n) % 2,
                         points=[points] * n, attributes=[(folder / "CUB_200_2011", str(i + 1)) for i in range(n)])
        self.pictures = 0.1 * torch.randn(n, 3, 32, 32, generator=generator)
        for i, (left, right) in enumerate(self.values.tolist()):
            self.pictures[i, left, :, :16] += 1
            self.pictures[i, right, :, 16:] -= 1

    def __getitem__(self, i):
        return {"image": self.pictures[self.paths[i]], "points": torch.from_numpy(self.points[i]).float(), "label": int(self.labels[i])}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp("planted"))


def halves(method=IFAM, mixes=True):
    """A random model whose part 0 is the left half, part 1 the right half, without the last row; part 2 has nothing."""
    torch.manual_seed(1)
    model = method(2, 3, dict(patch=8, width=32, depth=2, heads=2, layer_scale=1.0), 32).eval()
    for block in (block for module in model.modules() if isinstance(module, ViT) for block in module.blocks):
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.3 * mixes)
        torch.nn.init.zeros_(block.attn.proj.bias)
    logits = torch.zeros(1, 4, 4, 4)
    logits[:, 0, :3, :2] = logits[:, 1, :3, 2:] = logits[:, 3, 3] = 5
    plain = model.selector.select
    model.selector.select = lambda features, *more: plain(features, *more)._replace(part_logits=logits.flatten(2).expand(len(features), -1, -1))
    return model


def test_an_attribute_of_one_part_is_read_late_from_another_and_early_at_chance(planted):
    found = between.between_parts(halves(), planted)
    assert {(c["part"], c["attribute"], c["where"]) for c in found["cells"]} == {
        (0, "has_bill_color", "shown"), (0, "has_tail_color", "elsewhere"), (1, "has_bill_color", "elsewhere"), (1, "has_tail_color", "shown")}
    for cell in found["cells"]:
        for stage in ("stage1", "stage2"):
            shown = cell["where"] == "shown"
            assert cell[stage]["image"] > 0.9 and cell[stage]["kept"] > 0.9, cell
            assert cell[stage]["own"] > 0.9 if shown else abs(cell[stage]["own"] - 1 / 3) < 0.12, cell
        assert cell["n"] == 300 and cell["values"] == 3 and abs(cell["class_alone"] - 1 / 3) < 0.12
    assert found["pairs"] == 2 and found["stage1"]["difference"] > 0.5 and found["stage2"]["difference"] > 0.5
    assert abs(found["shown"]["stage2"]["difference"]) < 0.05
    free = [c for c in found["cells"] if c["where"] == "elsewhere" and c["class_alone"] <= c["chance"] + between.FREE]
    assert (found["free"] or {"pairs": 0})["pairs"] == len(free)                 # labels are drawn independently too
    for stage, late in (("stage1", "image"), ("stage2", "kept")):                # the formula, by hand
        each = [c[stage][late] - c[stage]["own"] for c in found["cells"] if c["where"] == "elsewhere"]
        assert found[stage]["difference"] == pytest.approx(sum(each) / 2)


def test_where_attention_passes_nothing_on_the_measure_is_exactly_0(planted):
    found = between.between_parts(halves(mixes=False), planted)
    assert found["stage1"]["difference"] == found["stage2"]["difference"] == 0


def test_a_single_stage_is_measured_late_against_its_own_early_pass(planted):
    found = between.between_parts(halves(PDiscoFormer), planted)
    assert "stage2" not in found and found["stage1"]["difference"] > 0.5


@pytest.mark.parametrize("kind", ["as published", "a smaller stage 1"])
def test_the_three_representations_of_a_part_are_means_of_its_patches_of_three_passes(kind):
    model, images = tiny(**KINDS[kind]), pictures(3, KINDS[kind].get("size", 70))
    with torch.no_grad():
        parts, found = between.representations(model, images)
        out, vit = model(images, per_part=True), model.predictor.backbone
        assert torch.equal(parts, out.keep_parts)
        for i, k in parts.any(2).nonzero().tolist():
            mine = parts[i, k] > 0
            for place, keep in (("image", None), ("kept", out.keep[i:i + 1]), ("own", parts[i, k][None])):
                expected = vit(images[i:i + 1], keep)[0, vit.prefix:][mine].mean(0)
                torch.testing.assert_close(found[f"stage2.{place}"][i, k], expected)
    assert all(torch.equal(x.isnan().all(2), ~parts.any(2)) for name, x in found.items() if name.startswith("stage2"))


def test_the_own_pass_reads_no_pixel_of_another_part_and_the_late_one_does():
    model, images = tiny(), pictures(3)
    with torch.no_grad():
        first = model.selector(images)
        parts, before = between.representations(model, images)
        others = (parts[:, 1] > 0).unflatten(1, model.grid)[:, None].repeat_interleave(14, 2).repeat_interleave(14, 3)
        model.selector.select = lambda features, *more: first                    # the parts held fixed
        after = between.representations(model, torch.where(others, torch.zeros_like(images), images))[1]
    there = parts[:, 0].any(1) & parts[:, 1].any(1)
    assert there.any()
    for stage in ("stage1", "stage2"):
        assert torch.equal(before[f"{stage}.own"][there, 0], after[f"{stage}.own"][there, 0])
        assert (before[f"{stage}.kept"] - after[f"{stage}.kept"])[there, 0].abs().max() > 1e-4


# ---------------------------------------------------------------- attributes on disk
def test_attributes_are_read_as_cub_has_them_and_those_of_no_region_are_left_out(tmp_path):
    cub = tmp_path / "CUB_200_2011"
    write_attributes(cub, [[0, 1, 0], [2, 2, 0], [1, 0, 0]], {(2, 0): 2, (3, 1): 1, (3, 0): 3})
    found = read_attributes(cub, ["3", "1", "2"])
    assert found.groups == ["has_bill_color", "has_tail_color"] and found.values == [list(COLOURS)] * 2 and found.parts == [(2,), (14,)]
    assert found.labels.tolist() == [[1, -1], [0, 1], [-1, 2]]                   # guessing and not visible are no labels


def test_of_two_values_of_a_group_none_is_taken_and_lines_with_more_fields_are_read_and_said(tmp_path, capsys):
    cub = tmp_path / "CUB_200_2011"
    write_attributes(cub, [[0, 1, 0], [2, 2, 0]])
    path = cub / "attributes" / "image_attribute_labels.txt"
    path.write_text(path.read_text().replace("1 2 0 4 1.5", "1 2 1 4 1.5").replace("2 6 1 4 1.5", "2 6 1 4 0 1.5 7"))
    assert read_attributes(cub, ["1", "2"]).labels.tolist() == [[-1, 1], [2, 2]]
    assert "1 lines have more than five fields" in capsys.readouterr().out


@pytest.mark.parametrize("line, words", [("1 2 yes 4 1.5", "is present"), ("1 2", "is present"), ("1 x", "unpack CUB again")])
def test_a_damaged_line_of_attributes_is_named(tmp_path, line, words):
    cub = tmp_path / "CUB_200_2011"
    write_attributes(cub, [[0, 1, 0]])
    path = cub / "attributes" / "image_attribute_labels.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match="line 10.*" + words):
        read_attributes(cub, ["1"])
    path.write_text("")
    with pytest.raises(UsageError, match="no line of image 1"):
        read_attributes(cub, ["1"])


@pytest.mark.parametrize("absent", ["attributes.txt", "CUB_200_2011/attributes/certainties.txt", "CUB_200_2011/attributes/image_attribute_labels.txt"])
def test_without_the_files_of_the_attributes_the_measure_is_left_out_and_the_report_says_why(tmp_path, absent):
    samples = Planted(tmp_path, 12)
    (tmp_path / absent).unlink()
    found = between.between_parts(halves(), samples)
    assert list(found) == ["skipped"] and absent.rpartition("/")[2] in found["skipped"]
    samples.attributes = None
    assert "no attributes of parts" in between.between_parts(halves(), samples)["skipped"]


def test_an_attribute_that_the_class_decides_is_not_free_and_is_what_the_class_alone_tells(tmp_path):
    samples = Planted(tmp_path)
    samples.labels = samples.values[:, 0]                # the class is the colour of the bill
    found = between.between_parts(halves(), samples)
    cells = {c["attribute"]: c for c in found["cells"] if c["where"] == "elsewhere"}
    assert cells["has_bill_color"]["class_alone"] == 1 and cells["has_tail_color"]["class_alone"] < 0.45
    assert found["free"] is None or found["free"]["pairs"] == 1


def test_too_few_images_measure_nothing(tmp_path):
    assert "100 images" in between.between_parts(halves(), Planted(tmp_path, 60))["skipped"]


@pytest.mark.parametrize("name", ["waterbirds", "cub"])
def test_drawn_birds_have_the_colours_that_their_attributes_say_and_an_older_folder_gets_them_without_being_drawn_again(name, tmp_path):
    knobs = dict(train=24, test=24, size=96, **({"val": 4} if name == "waterbirds" else {}))
    root = miniature.render(name, tmp_path, **knobs)
    contents = lambda: {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    whole, cub = contents(), root / "CUB_200_2011"
    samples = data.load(name, root, 96)["test"]
    known, points = read_attributes(cub, [number for _, number in samples.attributes]), samples.points
    assert set(known.groups) >= {"has_bill_color", "has_crown_color", "has_breast_color", "has_leg_color"} and known.labels.shape[0] == 24
    right = []
    for i, at in enumerate(points):
        picture = np.asarray(Image.open(samples.paths[i]).convert("RGB")).astype(float)
        x, y, visible = at[3]                            # the breast, of one colour around the landmark
        spot = picture[int(y) - 2:int(y) + 3, int(x) - 2:int(x) + 3].reshape(-1, 3).mean(0)
        a = known.groups.index("has_breast_color")
        right.append(visible and known.labels[i, a] >= 0 and colour_name(spot) == known.values[a][known.labels[i, a]])
    assert np.mean(right) > 0.7                          # a coat and the edge of the breast blur hues
    (root / "attributes.txt").unlink()
    shutil.rmtree(cub / "attributes")
    assert miniature.render(name, tmp_path, **knobs) == root and contents() == whole


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a method, with random weights: what is measured is there or not, whatever was learned."""
    def make(method="ifam", **settings):
        preset = {"data": "waterbirds", "mini": True, "method": method}
        cfg = runs.Config(**{**runs.preset(preset), **preset})
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(method) / "best.pt"
        runs.save(path, 0, cfg, 0, {"split": "val", "epoch": 0, "accuracy": None}, {"model": baselines.build(dataclasses.asdict(cfg), classes=2)})
        (path.parent / "config.json").write_text(json.dumps(runs.plain(dataclasses.asdict(cfg))))
        return path
    return make


@pytest.mark.parametrize("method, words", [("erm", "has no parts"), ("pdiscoformer", "no second stage")])
def test_a_model_that_cannot_see_one_part_alone_is_refused_before_anything_is_measured(checkpoint, method, words, capsys):
    path = checkpoint(method)
    line = fails(evaluate.main, "--ckpt", path, "--per-part", "--limit", 4)(capsys)
    assert words in line and "--per-part" in line and not list(path.parent.glob("*.json")) == [path.parent / "report.json"]


def test_the_report_the_table_and_the_figure_have_what_each_part_says(checkpoint, capsys):
    path = checkpoint()
    evaluate.main(["--ckpt", str(path), "--per-part", "--limit", "12", "--leakage", "12"])
    report, shown = json.loads((path.parent / "report-limit12.json").read_text()), capsys.readouterr().out
    assert sum(p["n"] > 0 for p in report["parts"]["parts"]) >= 1 and "one part alone" in shown
    assert "100 images" in report["leakage"]["between_parts"]["skipped"] and "left out" in shown
    assert (path.parent / "between-limit12.png").stat().st_size > 1000


def test_tables_have_a_column_of_what_parts_know_of_each_other(checkpoint, planted, tmp_path):
    path = checkpoint()
    report = {"data": "waterbirds-mini", "split": "test", "images": 300, "stage2": {"aa": 0.9, "groups": {}},
              "leakage": {"images": 300, "repaint": {"max_logit_change": 0.0}, "swap": {"flip_rate": 0.0}, "between_parts": between.between_parts(halves(), planted)},
              "parts": {"agreement": {"pairs": 3, "share": 0.25}}}
    (path.parent / "report.json").write_text(json.dumps(report))
    (_, _, _, k, found), = tables.read_run(path.parent)
    row = tables.summarise("waterbirds-mini", "ifam", {0: ("report.json", k, found)})
    assert row["numbers"]["between parts"]["mean"] == report["leakage"]["between_parts"]["stage2"]["difference"]
    assert row["numbers"]["parts agree"]["mean"] == 0.25 and "between parts" in tables.markdown("waterbirds-mini", "test", 300, [row])


def test_the_figure_has_a_cell_for_each_attribute_and_part(planted, tmp_path):
    figures.between(between.between_parts(halves(), planted), tmp_path / "between.svg")
    figures.between(between.between_parts(halves(PDiscoFormer), planted), tmp_path / "one.png")
    assert (tmp_path / "between.svg").stat().st_size > 5000 and (tmp_path / "one.png").stat().st_size > 5000
