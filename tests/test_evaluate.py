"""Accuracies by hand, leakage as equalities, and the report."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import data
from vit import build_vit
import predict
import runs
import evaluate
import ifam
import intervene
from measure import leakage
from measure import metrics
import train
from benchmarks.samples import patch_keep
from models import pictures, tiny
from settings import parse
from tiny import TINY, fails
from tiny import train as run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("runs") / "run")
    evaluate.main(["--ckpt", str(folder / "best.pt")])
    return folder


@pytest.fixture(scope="module")
def report(trained):
    return json.loads((trained / "report.json").read_text())


@pytest.fixture(scope="module")
def test_split():
    return data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=16)["test"]


class Fixed:
    """Labels and groups without images."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    groups = torch.tensor([0, 0, 0, 1, 2, 3, 3, 3])
    group_names, places = ["a", "b", "c", "d"], ()
    answers = staticmethod(lambda logits: logits.argmax(1))


def test_accuracies_are_the_ones_counted_by_hand():
    guess = torch.tensor([0, 0, 1, 0, 0, 1, 1, 0])       # right: 2 of 3, 1 of 1, 0 of 1, 2 of 3
    result = metrics.accuracies({"logits": F.one_hot(guess).float()}, Fixed, rare=(1, 3), train_groups=torch.tensor([0] * 6 + [1] * 2 + [3] * 2))
    assert result["aa"] == pytest.approx(5 / 8)
    assert result["worst_group"] == 0 and result["worst_group_rare"] == pytest.approx(2 / 3)
    assert result["aa_train_weighted"] == pytest.approx(0.6 * 2 / 3 + 0.2 * 1 + 0.2 * 2 / 3)
    counted = {name: (group["n"], group["accuracy"]) for name, group in result["groups"].items()}
    assert counted == {"a": (3, pytest.approx(2 / 3)), "b": (1, 1.0), "c": (1, 0.0), "d": (3, pytest.approx(2 / 3))}
    intervals = {name: (group["low"], group["high"]) for name, group in result["groups"].items()}
    assert intervals == {name: metrics.wilson(share, n) for name, (n, share) in counted.items()}
    assert result["worst_group_interval"] == list(intervals["c"]) and result["aa_interval"] == list(metrics.wilson(5 / 8, 8))


def test_of_several_worst_groups_the_smallest_has_the_interval():
    right = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])       # groups a and c: none of 3 and none of 1
    result = metrics.accuracies({"logits": F.one_hot(torch.where(right > 0, Fixed.labels, 1 - Fixed.labels)).float()}, Fixed)
    assert result["worst_group"] == 0 and result["worst_group_interval"] == list(metrics.wilson(0, 1))


def test_a_group_without_images_counts_nowhere():
    class Three(Fixed):
        group_names = [*Fixed.group_names, "empty"]
    result = metrics.accuracies({"logits": F.one_hot(Fixed.labels).float()}, Three, train_groups=torch.arange(5))
    assert result["worst_group"] == 1 and result["aa_train_weighted"] == 1 and result["groups"]["empty"] == \
        {"n": 0, "accuracy": None, "low": None, "high": None}


def test_early_hard_masks_leak_exactly_nothing_and_the_late_one_leaks(report):
    early, late = report["leakage"], report["leakage_stage1"]
    assert early["repaint"] == {"max_logit_change": 0.0, "mean_logit_change": 0.0, "flip_rate": 0.0}
    assert early["gradient"] == {"max_abs": 0.0, "mean_max_abs": 0.0, "images": 64}
    assert late["repaint"]["max_logit_change"] > 0 and late["gradient"]["max_abs"] > 0
    for block in (early, late):                          # the honest three: there, and fractions
        values = [*block["swap"].values(), block["admitted"], *(v for k, v in block["probe"].items() if k != "shape"),
                  *(v for k, v in block["probe"]["shape"].items() if k not in ("kernel", "pieces")), *block["probe"]["shape"]["kernel"].values()]
        assert all(0 <= v <= 1 for v in values)


def test_the_report_has_every_group_with_its_count_and_says_how_the_model_was_chosen(report):
    for stage in ("stage1", "stage2"):
        groups = report[stage]["groups"]
        assert sum(g["n"] for g in groups.values()) == report["images"] == 64 and len(groups) == 4
        assert report[stage]["worst_group"] == min(g["accuracy"] for g in groups.values())
        assert report[stage]["worst_group_rare"] == min(groups[g]["accuracy"] for g in ("landbird on water", "waterbird on land"))
    assert report["selection"]["split"] == "val" and report["split"] == "test"
    assert 0 <= report["mask"]["kept_share"] <= 1 and 0 <= report["localisation"]["foreground_iou"] <= 1
    assert report["localisation"]["kp"] > 0 and report["localisation"]["kp_normalise"] is False


def test_the_table_has_an_interval_beside_every_accuracy_of_a_group_and_fits_a_terminal(report):
    lines = evaluate.table(report).splitlines()
    row = lambda start: next(line for line in lines if line.strip().startswith(start))
    both = [report[stage] for stage in ("stage1", "stage2")]
    expected = lambda share, low, high: f"{share:.3f} ({low:.2f}-{high:.2f})".replace("0.000 (", "0 (")
    assert row("worst group").split("worst group")[1].split("  ")[-1].strip() == expected(both[1]["worst_group"], *both[1]["worst_group_interval"])
    for name, group in both[1]["groups"].items():
        assert row(f"{name} (n").endswith(expected(group["accuracy"], group["low"], group["high"]))
    assert max(map(len, lines)) <= 110 and "(" not in row("repaint: largest").replace("repaint", "")


def test_two_evaluations_write_the_same_report(trained):
    before = (trained / "report.json").read_bytes()
    evaluate.main(["--ckpt", str(trained / "best.pt")])
    assert (trained / "report.json").read_bytes() == before
    assert (trained / "parts.png").stat().st_size > 10_000


def test_the_batch_size_of_the_evaluation_changes_no_leakage(trained, report, tmp_path):
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    evaluate.main(["--ckpt", str(tmp_path / "best.pt"), "--batch", "3"])
    again = json.loads((tmp_path / "report.json").read_text())
    assert all(again[leak] == report[leak] for leak in ("leakage", "leakage_stage1"))


def test_one_image_has_no_swap_and_no_probe_but_a_report(trained, tmp_path):
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    evaluate.main(["--ckpt", str(tmp_path / "best.pt"), "--limit", "1"])
    leakage = json.loads((tmp_path / "report-limit1.json").read_text())["leakage"]
    assert leakage["swap"]["flip_rate"] is None and leakage["probe"] is None
    assert leakage["repaint"]["max_logit_change"] == 0


def test_the_batch_size_of_the_evaluation_changes_no_prediction(trained, test_split):
    model, _ = runs.load_model(trained / "best.pt")
    one, many = (predict.predict(model, test_split, batch) for batch in (1, 16))
    assert torch.equal(one["keep"], many["keep"]) and torch.equal(one["logits"].argmax(1), many["logits"].argmax(1))
    torch.testing.assert_close(one["logits"], many["logits"])


def seven_test_images():                                 # odd: no padding may hide
    return data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=7)["test"]


def gather(rank, path, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = predict.predict(runs.load_model(path)[0], seven_test_images(), 4)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_gather_every_sample_once_and_in_order(trained, tmp_path):
    torch.multiprocessing.spawn(gather, (trained / "best.pt", str(tmp_path)), nprocs=2)
    alone = predict.predict(runs.load_model(trained / "best.pt")[0], seven_test_images(), 4)
    for rank in (0, 1):
        both = torch.load(tmp_path / f"{rank}.pt")
        assert all(len(x) == 7 for x in both.values())
        torch.testing.assert_close(both["logits"], alone["logits"])
        assert torch.equal(both["keep"], alone["keep"])


def test_the_late_classifier_under_test_is_stage_1_itself(trained, test_split):
    model, _ = runs.load_model(trained / "best.pt")
    images = torch.stack([test_split[i]["image"] for i in range(4)])
    classifier = leakage.stage1_classifier(model)
    with torch.no_grad():
        keep, maps = classifier.find(images, None)
        out = model(images)
        torch.testing.assert_close(classifier.head(classifier.features(images, maps)), out.logits_stage1)
        assert torch.equal(keep, out.keep)
        early = leakage.stage2_classifier(model)
        assert torch.equal(early.head(early.features(images, early.find(images, None)[1])), out.logits)


def test_two_stages_measured_together_have_the_numbers_of_each_alone_and_share_what_stage_1_sees(trained, test_split):
    model, _ = runs.load_model(trained / "best.pt")
    calls, plain = [], model.selector.backbone.forward
    model.selector.backbone.forward = lambda images, *keep: calls.append(len(images)) or plain(images, *keep)
    stages = leakage.stage2_classifier, leakage.stage1_classifier
    measure = lambda classifiers: leakage.measure_leakage(classifiers, test_split, model.selector.backbone, count=16)
    alone = [measure([stage(model)])[0] for stage in stages]
    assert sum(calls) == 16 * (2 + (2 + 3 + 1))          # mask, swap; the same, three repainted, the gradient
    calls.clear()
    seen = leakage.Seen(model.selector)
    assert measure([stage(model, seen) for stage in stages]) == alone
    assert sum(calls) == 16 * 6


def test_what_was_seen_of_other_images_or_without_their_gradient_is_not_used():
    seen = leakage.Seen(lambda images: images.sum())
    images = torch.rand(2, 3, 4, 4)
    assert seen.known(images) is None
    first = seen(images)
    assert seen(images.clone()) is first and seen.known(images.clone().requires_grad_()) is None
    assert seen.known(images[:1]) is None and seen.known(images + 1e-6) is None


def test_the_gradient_at_hidden_pixels_is_that_of_the_whole_jacobian(trained, test_split):
    model, _ = runs.load_model(trained / "best.pt")
    images = test_split[0]["image"][None]
    classifier = leakage.stage1_classifier(model)
    with torch.no_grad():
        keep, maps = classifier.find(images, None)
    hidden = leakage.pixels(keep, (12, 12), 8) == 0
    jacobian = torch.autograd.functional.jacobian(lambda x: classifier.head(classifier.features(x, maps))[0], images)
    expected = (jacobian[:, 0].abs() * hidden[0]).max()
    assert leakage.hidden_gradient(classifier, images, maps, hidden).item() == pytest.approx(expected.item())


def test_with_more_classes_than_features_the_gradient_is_that_of_every_logit_all_the_same():
    torch.manual_seed(0)
    layer, many = torch.nn.Linear(3 * 8 * 8, 4).double(), torch.nn.Linear(4, 70).double()
    features = lambda x, held: layer(x.flatten(1)).tanh() + held
    images, held = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    hidden = torch.rand(2, 1, 8, 8) < 0.5
    classifier = leakage.Classifier(None, features, many, "found")
    found = leakage.hidden_gradient(classifier, images, held, hidden)
    every = torch.autograd.functional.jacobian(lambda x: many(features(x, held)).sum(0), images)     # (70, 2, 3, 8, 8)
    torch.testing.assert_close(found, (every.abs() * hidden).flatten(2).amax((0, 2)))
    of_few = leakage.pixel_gradient(lambda x: many(features(x, held)), images)
    torch.testing.assert_close(found, (of_few * hidden[:, 0]).flatten(1).amax(1))


def test_the_gradient_of_a_few_images_at_a_time_is_that_of_all_of_them():
    model, images = tiny().eval(), pictures(7)
    for classifier in (leakage.stage1_classifier(model), leakage.stage2_classifier(model)):
        keep, held = classifier.find(images, None)
        whole = leakage.hidden_gradient(classifier, images, held, leakage.shown_by(keep, held, model.selector.backbone) == 0)
        for count in (0, 2, leakage.GRADIENT_BATCH, 6, 7, 90):
            row = leakage.leakage_of_group(classifier, images, None, model.selector.backbone, 0, count)
            torch.testing.assert_close(row.get("gradient", whole[:0]), whole[:count])


def test_the_rungs_of_the_ladder_differ_in_place_and_hardness_alone_and_only_the_last_hides_everything(trained, test_split):
    selector = runs.load_model(trained / "best.pt")[0].selector
    rungs = leakage.ladder(selector, test_split)
    images = torch.stack([test_split[i]["image"] for i in range(4)])
    with torch.no_grad():
        patches = selector.backbone(images)[:, selector.backbone.prefix:]
        keep, _ = rungs["none"].find(images, None)
        assert all(torch.equal(rung.find(images, None)[0], keep) for rung in rungs.values())
        late = rungs["late, hard"]
        by_hand = F.layer_norm(torch.stack([p[k > 0].mean(0) for p, k in zip(patches, keep)]), patches.shape[-1:])
        torch.testing.assert_close(late.features(images, late.find(images, None)[1]), by_hand)
        torch.testing.assert_close(rungs["none"].features(images, None), F.layer_norm(patches.mean(1), patches.shape[-1:]))
    for name, leak in zip(rungs, leakage.measure_leakage(rungs.values(), test_split, selector.backbone, count=4)):
        assert (leak["repaint"]["max_logit_change"] == leak["gradient"]["max_abs"] == 0) == (name == "early, hard")


def test_the_mean_of_kept_patches_is_the_same_before_attention_and_apart_after(trained, test_split):
    selector = runs.load_model(trained / "best.pt")[0].selector
    late, early = (leakage.kept_by_layer(selector, test_split, early) for early in (False, True))
    assert late.shape == (5, 16, 128) and torch.equal(late[0], early[0])
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(late[1:], early[1:]))


def test_admitted_is_counted_pixel_by_pixel():
    g = torch.Generator().manual_seed(0)
    shown, objects = ((torch.rand(3, 1, 4, 4, generator=g) < 0.5).float() for _ in range(2))
    for s, o, share in zip(shown, objects, leakage.admitted(shown, objects)):
        pixels = [(a, b) for a, b in zip(s.flatten().tolist(), o.flatten().tolist()) if a]
        assert share.item() == pytest.approx(sum(not b for _, b in pixels) / len(pixels))


def test_swapped_backgrounds_come_from_the_first_donor_that_shows_background_there():
    g = torch.Generator().manual_seed(0)
    images, objects = torch.rand(5, 3, 6, 6, generator=g), (torch.rand(5, 1, 6, 6, generator=g) < 0.5).float()
    swapped = leakage.swap_backgrounds(images, objects)
    for b in range(5):
        for y in range(6):
            for x in range(6):
                source = b
                if objects[b, 0, y, x] == 0:
                    source = next((d % 5 for d in range(b - 1, b - 5, -1) if objects[d % 5, 0, y, x] == 0), b)
                assert torch.equal(swapped[b, :, y, x], images[source, :, y, x])


def test_the_probe_reads_what_is_linearly_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (400,), generator=g)
    x = torch.randn(400, 20, generator=g)
    assert abs(leakage.linear_probe(x, y) - 0.5) < 0.08
    x[:, 3] += 6 * y
    assert leakage.linear_probe(x, y) > 0.97


def test_mask_iou_counts_patches_and_two_empty_masks_agree():
    a, b = torch.tensor([[1., 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1., 0, 1, 0], [0, 0, 0, 0]])
    assert leakage.mask_iou(a, b).tolist() == [pytest.approx(1 / 3), 1]


@pytest.mark.parametrize("spoil, words", [
    (lambda p: p.unlink(), ("no such file", "expected a checkpoint of train.py")),
    (lambda p: p.write_bytes(p.read_bytes()[:2000]), ("damaged",)),
    (lambda p: p.write_text("hello"), ("damaged, or not a checkpoint",)),
    (lambda p: torch.save({"model": {}}, p), ("not a checkpoint of train.py",)),
], ids=("missing", "truncated", "text", "other"))
def test_a_checkpoint_that_is_none_is_one_line_and_no_report(spoil, words, trained, tmp_path, capsys):
    path = tmp_path / "best.pt"
    path.write_bytes((trained / "best.pt").read_bytes())
    spoil(path)
    line = fails(evaluate.main, "--ckpt", path)(capsys)
    assert all(w in line for w in words), line
    assert not (tmp_path / "report.json").exists()


def test_the_papers_numbers_stand_beside_ifam_itself_and_no_ablation_of_it():
    settings = lambda *flags: vars(parse(runs.Config, "", flags, runs.preset))
    for flags in ([], ["--k", "4"], ["--data", "siim"], ["--data", "cub", "--batch", "64"]):
        assert runs.as_published(settings(*flags)), flags
    for flags in (["--method", "erm"], ["--hardness", "soft"], ["--no-joint"], ["--data", "siim", "--weight-background", "2"]):
        assert not runs.as_published(settings(*flags)), flags


def test_without_a_validation_split_the_error_says_how_to_have_one(tmp_path, capsys):
    folder = run(tmp_path / "run", "--data", "cub", "--limit", "16")
    capsys.readouterr()                                  # of drawing the miniature
    for main, choices in ((evaluate.main, "train, test"), (intervene.main, "test")):
        line = fails(main, "--ckpt", folder / "best.pt", "--split", "val", "--limit", "8")(capsys)
        assert f"cub has no split 'val'; train with --val-share 0.1 to have one, or choose another --split: {choices}\n" in line


@pytest.mark.parametrize("flags, words", [
    (("--data", "cub"), ("200 classes", "2")), (("--data", "waterbird"), ("did you mean waterbirds?",)),
    (("--root", "/nowhere"), ("/nowhere",)), (("--split", "tset"), ("did you mean test?",)), (("--batch", 0), ("--batch",))], ids=str)
def test_bad_flags_of_the_evaluation_are_one_line(flags, words, trained, capsys):
    line = fails(evaluate.main, "--ckpt", trained / "best.pt", *flags)(capsys)
    assert all(w in line for w in words), line


def test_only_the_place_of_the_mask_moves_between_the_pooled_features(test_split):
    vit = build_vit("mini", 96).eval()
    found = leakage.pool_by_place(vit, test_split)
    batch = torch.utils.data.default_collate([test_split[i] for i in range(4)])
    keep = patch_keep(batch["mask"], 8)
    with torch.no_grad():
        whole = vit(batch["image"])[:, 5:]
        dense = vit(batch["image"], keep, hard=False)[:, 5:]          # the dense path: attention weighted by the mask
    for i in range(4):
        kept = keep[i].bool()
        for place, expected in (("none", whole[i].mean(0)), ("late", whole[i, kept].mean(0)), ("early", dense[i, kept].mean(0))):
            torch.testing.assert_close(found[place][i], expected, atol=2e-5, rtol=1e-4)


def test_the_linear_head_solves_the_normal_equations():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=draw, dtype=torch.float64), torch.randint(3, (50,), generator=draw)
    z = (x - x.mean(0)) / x.std(0)
    target = F.one_hot(y, 3).double()
    augmented = torch.cat([z, math.sqrt(0.1 * 50) * torch.eye(4, dtype=torch.float64)])       # ridge as least squares
    w = torch.linalg.lstsq(augmented, torch.cat([target - target.mean(0), torch.zeros(4, 3, dtype=torch.float64)])).solution
    torch.testing.assert_close(leakage.linear_head(x, y, 3)(x), z @ w + target.mean(0))


def test_the_report_has_the_clean_contrast(report):
    place = report["leakage"]["place_of_mask"]
    assert place["measure"] == "worst_group" and place["weights"] == "stage 1"
    assert all(0 <= place[p] <= 1 for p in ("none", "late", "early")) and "place_of_mask" not in report["leakage_stage1"]


def test_a_checkpoint_whose_weights_do_not_fit_its_settings_is_refused(trained, tmp_path, capsys):
    state = runs.read_checkpoint(trained / "best.pt")
    state["config"]["k"] = 5
    torch.save(state, tmp_path / "best.pt")
    assert "do not fit its settings" in fails(evaluate.main, "--ckpt", tmp_path / "best.pt")(capsys)


def test_the_checkpoint_alone_rebuilds_the_model(trained):
    cfg = parse(runs.Config, "", [*TINY, "--out", str(trained)], runs.preset)
    model, state = runs.load_model(trained / "best.pt")
    assert state["config"] == runs.plain(vars(cfg)) and {"config", "step", "best", "model", "dataset"} <= state.keys() and "optimizer" not in state
    assert not model.training and model.selector.k == cfg.k
