"""New last layers: each against conditions of its optimum or a case that is known, and the guarantee of a mask after it."""
import copy
import json

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import predict
import runs
import train
from benchmarks.samples import Samples
from ifam import limits_of
from measure import leakage, tables
from measure import retrain as R
from models import as_published, tiny
from settings import UsageError, parse
from test_tables import write_run
from tiny import fails

ROOT = {name: data.find_root(name, "", True) for name in ("waterbirds", "metashift", "siim", "cub")}


def gaussians(count, seed, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def planted(counts, seed=0):
    """Images of the groups (0,0), (0,1), (1,0), (1,1): feature 0 tells the class by a margin of 1, feature 1 the place by 3."""
    groups = torch.arange(4).repeat_interleave(torch.tensor(counts))
    x = 0.2 * gaussians(len(groups), seed)
    x[:, 0] += 2.0 * (groups // 2) - 1
    x[:, 1] += 3 * (2.0 * (groups % 2) - 1)
    return x, groups // 2, groups


def saved(folder, method, *flags, benchmark="waterbirds"):
    """A checkpoint of a model that starts from the miniature's backbone, and was not trained."""
    cfg = parse(runs.Config, "", ["--data", benchmark, "--mini", "--method", method, "--limit", "64", *map(str, flags)], runs.preset)
    torch.manual_seed(0)
    classes = {"cub": len(data.read("cub", ROOT["cub"], 96, 0)["test"].classes)}.get(benchmark, 2)
    model = train.build_model(cfg, torch.device("cpu")) if classes == 2 else runs.build(vars(cfg), classes)
    folder.mkdir(exist_ok=True)
    runs.save(folder / "best.pt", 0, cfg, 0, {"split": "val", "epoch": 0, "accuracy": None}, {"model": model})
    return folder / "best.pt"


@pytest.fixture(scope="module")
def splits():
    return data.load("waterbirds", ROOT["waterbirds"], 96, limit=32)


# ---------------------------------------------------------------- logistic regression
@pytest.mark.parametrize("ridge", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_fit_meets_the_conditions_of_the_optimum(classes, ridge):
    x, strength = gaussians(60, 0), 0.3
    y = (x[:, :3] + gaussians(60, 1, 3)).argmax(1) % classes
    v = R.logistic(x, y, classes, strength, ridge).requires_grad_()
    logits = x @ v[:, :-1].T + v[:, -1]
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], y.double(), reduction="sum") if classes == 2 else \
        F.cross_entropy(logits, y, reduction="sum")
    loss.backward()
    slope, w = v.grad[:, :-1], v.detach()[:, :-1]
    assert v.shape == (1 if classes == 2 else 3, 7) and v.grad[:, -1].abs().max() < 1e-2         # intercepts are free
    if ridge:
        torch.testing.assert_close(strength * slope, -w, atol=1e-3, rtol=0)
    else:
        assert 0 < (w == 0).sum() < w.numel()
        assert slope[w == 0].abs().max() <= (1 + 1e-3) / strength
        torch.testing.assert_close(slope[w != 0], -w.sign()[w != 0] / strength, rtol=1e-3, atol=0)


def test_a_fit_that_does_not_end_is_an_error():
    with pytest.raises(R.RunError, match="did not converge"):
        R.logistic(gaussians(20, 0), torch.arange(20) % 2, 2, 1.0, most=3)


# ---------------------------------------------------------------- DFR
def test_with_one_retrain_and_equal_groups_it_is_l1_logistic_regression():
    x, y, groups = planted([15] * 4)
    (weight, bias), chosen = R.dfr(x, y, groups, 2, strengths=(0.3,), retrains=1)
    mean, scale = x.mean(0), x.std(0, correction=0)
    v = R.logistic((x - mean) / scale, y, 2, 0.3)
    torch.testing.assert_close((weight[1] - weight[0]) * scale, v[0, :-1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias[1] - bias[0] + (weight[1] - weight[0]) @ mean, v[0, -1], atol=1e-3, rtol=1e-3)
    assert chosen == {"strength": 0.3, "tuning": {}}


def test_the_head_is_the_mean_of_the_heads(monkeypatch):
    x, y, groups = planted([30, 12, 11, 20])
    found, fit = [], R.logistic
    monkeypatch.setattr(R, "logistic", lambda *a, **kw: found.append((len(a[1]), fit(*a, **kw))) or found[-1][1])
    weight, bias = R.dfr(x, y, groups, 2, strengths=(0.3,), retrains=5)[0]
    assert [count for count, _ in found] == [44] * 5     # the smallest group has 11
    each = [R.as_head(v, *R.standard(x)) for _, v in found]
    torch.testing.assert_close(weight, torch.stack([w for w, _ in each]).mean(0))
    torch.testing.assert_close(bias, torch.stack([b for _, b in each]).mean(0))
    assert not torch.equal(each[0][0], each[1][0])       # each from a subset of its own


def test_twice_as_many_images_of_one_group_change_the_expected_head_by_nothing():
    x, y, groups = planted([40, 20, 20, 40])
    twice = torch.cat([torch.arange(120), (groups == 3).nonzero()[:, 0]])
    one, other = (R.dfr(x[i], y[i], groups[i], 2, strengths=(0.3,), retrains=60)[0][0] for i in (torch.arange(120), twice))
    assert (one - other).norm() < 0.05 * one.norm()
    assert torch.bincount(groups[R.balanced_subset(groups, torch.Generator().manual_seed(0))]).tolist() == [20] * 4


def test_it_finds_the_core_feature_where_erm_reads_the_spurious_one():
    x, y, _ = planted([500, 0, 0, 500])
    test = planted([100] * 4, seed=1)
    erm = R.as_head(R.probe(x, y, 2), x.mean(0))
    assert R.worst(erm, *test) == 0
    head, chosen = R.dfr(*planted([40, 40, 20, 20], seed=2), 2)
    assert R.worst(head, *test) > 0.9 and set(chosen["tuning"]) == set(R.STRENGTHS)


def test_the_halves_share_no_image_and_have_each_group():
    groups = torch.tensor([0] * 7 + [1] * 2 + [3] * 4)
    one, other = R.halves(groups)
    assert sorted(torch.cat([one, other]).tolist()) == list(range(13))
    assert torch.bincount(groups[one]).tolist() == [4, 1, 0, 2] and torch.bincount(groups[other]).tolist() == [3, 1, 0, 2]


def test_labels_of_the_test_split_are_never_read_in_fitting(tmp_path, monkeypatch):
    path = saved(tmp_path, "erm")
    read, heads = data.read, []

    def shuffled(*a):
        found = read(*a)
        order = torch.randperm(len(found["test"]), generator=torch.Generator().manual_seed(len(heads)))
        found["test"].labels, found["test"].groups = found["test"].labels[order], found["test"].groups[order]
        return found
    monkeypatch.setattr(data, "read", shuffled)
    for how in ("dfr", "dfr", "afr", "afr"):
        cfg = parse(evaluate.Config, "", ["--ckpt", str(path), "--retrain", how, "--limit", "32"])
        model, state = runs.load_model(path)
        _, samples, _, sets = predict.open_split(cfg, state, model)
        evaluate.new_head(cfg, model, state, samples, sets, "cpu")
        heads.append((samples.labels, model.predictor.head.state_dict()))
    for (labels, one), (others, other) in (heads[:2], heads[2:]):
        assert not torch.equal(labels, others) and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- AFR
def test_images_of_which_the_old_head_is_unsure_weigh_more():
    weights = R.afr_weights(torch.tensor([0.99, 0.6, 0.1]).double(), 14)
    torch.testing.assert_close(weights, torch.tensor([4e-6, 9.1e-4, 0.999085]).double(), atol=5e-7, rtol=1e-2)
    assert weights.sum() == pytest.approx(1)
    assert torch.equal(R.afr_weights(torch.tensor([0.9, 0.1]), 0), torch.tensor([0.5, 0.5]))


def test_a_large_penalty_keeps_the_old_head_and_two_starts_agree():
    x, y, _ = planted([20, 10, 10, 20])
    old = gaussians(2, 3), gaussians(2, 4, 1)[:, 0]
    for got, was in zip(R.afr(x, y, old, 14, 1e6, 1e-7, 500), old):
        torch.testing.assert_close(got, was, atol=1e-5, rtol=0)
    one, other = (R.afr(x, y, old, 14, 0.2, 0.05, 3000, start) for start in (None, (-old[0], -old[1])))
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(one[0], old[0], atol=0.01)


def test_how_much_unsure_images_weigh_is_chosen_by_the_worst_class_and_needs_no_groups():
    x, y, groups = planted([200, 10, 10, 200])
    old = R.as_head(R.probe(*planted([500, 0, 0, 500])[:2], 2), 0.0)
    head, chosen = R.tuned_afr(x, y, old)
    assert list(chosen["tuning"]) == list(R.GAMMAS) and R.GAMMAS[0] == 14
    assert chosen["tuning"][chosen["gamma"]] == max(chosen["tuning"].values())
    assert R.worst(head, x, y, groups) > R.worst(old, x, y, groups)


# ---------------------------------------------------------------- the PCA probe
def test_all_components_are_the_plain_probe():
    x, y, groups = planted([20] * 4)
    (weight, bias), chosen = R.pca_probe(x, y, 2, (x, y, torch.zeros_like(y)))   # no groups to choose by: all are right
    assert chosen["components"] == [0, 6] and chosen["of"] == 6
    for got, plain in zip((weight, bias), R.as_head(R.probe(x, y, 2), x.mean(0))):
        torch.testing.assert_close(got, plain, atol=1e-3, rtol=1e-3)


def test_dropping_a_leading_spurious_component_raises_the_worst_group():
    x, y, _ = planted([500, 5, 5, 500])
    x[:, 0] += 0.8 * gaussians(len(x), 5, 1)[:, 0]
    head, chosen = R.pca_probe(x, y, 2, planted([30] * 4, seed=1))
    test = planted([100] * 4, seed=2)
    assert chosen["components"][0] > 0
    assert R.worst(head, *test) > R.worst(R.as_head(R.probe(x, y, 2), x.mean(0)), *test) + 0.3


# ---------------------------------------------------------------- LLE
def test_an_ensemble_of_one_set_is_the_linear_probe():
    x, y, _ = planted([20] * 4)
    weight, bias = R.as_head(R.probe(x, y, 2), x.mean(0))
    torch.testing.assert_close(R.last_layer_ensemble([x], y, 2)(x.float()), (x @ weight.T + bias).float(), atol=1e-4, rtol=1e-4)


def test_a_shift_that_is_certain_is_exactly_that_head_and_weights_sum_to_1():
    heads = [(gaussians(3, seed), gaussians(3, seed + 9, 1)[:, 0]) for seed in (0, 1)]
    x = gaussians(5, 7).float()
    for d, head in enumerate(heads):
        certain = torch.zeros(2, 6), torch.tensor([1e4, -1e4]) * (1 - 2 * d)
        assert torch.equal(R.Head(heads, certain)(x), R.Head([head])(x))
    any_shift = gaussians(2, 8), gaussians(2, 9, 1)[:, 0]
    torch.testing.assert_close(R.Head([heads[0]] * 2, any_shift)(x), R.Head([heads[0]])(x))
    assert R.Head([heads[0]]).affine and not R.Head(heads, any_shift).affine


def test_backgrounds_are_those_of_other_classes_and_objects_stay_as_they_are():
    labels = torch.tensor([0, 0, 0, 1, 0, 1])
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    objects = torch.zeros(6, 1, 4, 4)
    objects[:, :, :2, :2] = 1
    swapped = leakage.swap_backgrounds(images, objects, R.lenders(labels))
    inside = (objects == 1).expand_as(images)
    assert torch.equal(swapped[inside], images[inside])
    donors = swapped[:, 0, 3, 3].long()
    assert (labels[donors] != labels).all() and torch.equal(swapped[:, 0, 0, 0], images[:, 0, 0, 0])


def test_the_order_of_swapping_mixes_classes():
    labels = torch.tensor([0] * 90 + [1] * 30)
    order = R.mixed(labels)
    assert sorted(order.tolist()) == list(range(120)) and all(labels[part].sum() in (3, 4, 5) for part in order.split(16)[:-1])


# ---------------------------------------------------------------- on a model
METHODS = {"ifam": (), "erm": (), "pdiscoformer": (), "ep": (), "early-truth": (), "late-found": (), "trimmed": ("--trim", "found"),
           "told": ("--trim", "truth"), "soft": ("--hardness", "soft")}


@pytest.mark.parametrize("name", METHODS)
def test_what_the_head_reads_is_found_for_every_method(name, splits, tmp_path, monkeypatch):
    monkeypatch.setitem(R.AFR, "steps", 0)               # then the head stays what it was
    method = name if name in runs.METHODS else "ifam"
    model, _ = runs.load_model(saved(tmp_path, method, *METHODS[name]))
    before = predict.predict(model, splits["test"])["logits"]
    R.retrain("afr", model, splits)
    assert isinstance(getattr(*R.head_of(model)), R.Head)
    torch.testing.assert_close(predict.predict(model, splits["test"])["logits"], before, atol=1e-4, rtol=1e-4)
    classifier = leakage.classifier_of(model)
    images, truth = (torch.stack([splits["test"][i][key] for i in range(4)]) for key in ("image", "mask"))
    torch.testing.assert_close(classifier(images, truth[:, None].float()), before[:4], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", R.TITLES)
def test_a_new_head_of_ifam_leaks_exactly_nothing_and_one_of_a_late_mask_leaks(how, splits, tmp_path):
    for method, hides in (("ifam", True), ("pdiscoformer", False)):
        model, _ = runs.load_model(saved(tmp_path, method))
        about = R.retrain(how, model, splits)
        assert about["how"] == how and about["fitted_on"] == {split: 32 for split in R.SPLITS[how]}
        backbone = (model.predictor or model.selector).backbone
        found, = leakage.measure_leakage([leakage.classifier_of(model)], splits["test"], backbone, count=16)
        for value in (found["repaint"]["max_logit_change"], found["gradient"]["max_abs"]):
            assert (value == 0) == hides


def test_an_intervention_stays_on_and_the_head_is_fitted_under_it(splits, tmp_path):
    model, _ = runs.load_model(saved(tmp_path, "ifam"))
    free = R.read_by_head(model, splits["val"])
    model.selector.limits = limits_of(model.selector.k, [0, 1])
    x = R.read_by_head(model, splits["val"])
    images = torch.stack([splits["val"][i]["image"] for i in range(4)])
    with torch.no_grad():
        held = model.predictor.features(images, model.mask(model.selector(images)))
    torch.testing.assert_close(x[:4].float(), held, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(x, free)


def test_the_gradient_of_many_classes_is_not_mixed_where_a_head_is_no_affine_map():
    heads = [(gaussians(9, seed, 3), torch.zeros(9).double()) for seed in (0, 1)]
    head = R.Head(heads, (gaussians(2, 2, 3), torch.zeros(2).double()))
    images = gaussians(2, 3, 3 * 4 * 4).float().view(2, 3, 4, 4)
    classifier = leakage.Classifier(None, lambda images, held: images.mean((2, 3)), head, "")
    hidden = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    jacobian = torch.autograd.functional.jacobian(lambda x: head(x.mean((2, 3))).sum(0), images)                # (9, 2, 3, 4, 4)
    torch.testing.assert_close(leakage.hidden_gradient(classifier, images, None, hidden), jacobian.abs().amax((0, 2, 3, 4)))


def test_classes_take_the_place_of_groups_where_there_are_none_and_more_than_two_are_fitted():
    x, y = gaussians(90, 0), torch.arange(90) % 3
    x[torch.arange(90), y] += 2
    samples = Samples("folder", "val", 8, ("a", "b", "c"), list(map(str, range(90))), list(range(90)), y)
    assert torch.equal(samples.groups, y)
    head, _ = R.pca_probe(x, y, 3, (x, y, samples.groups))
    assert head[0].shape == (3, 6) and R.worst(head, x, y, y) > 0.7
    assert R.dfr(x, y, y, 3)[0][0].shape == (3, 6)


# ---------------------------------------------------------------- the command
def test_the_report_has_a_name_of_its_own_and_is_the_same_again(tmp_path, capsys):
    path = saved(tmp_path / "run", "ifam")
    command = ["--ckpt", str(path), "--retrain", "dfr", "--leakage", "16", "--limit", "32"]
    evaluate.main(command)
    said, report = capsys.readouterr().out, path.with_name("report-limit32-dfr.json")
    first = report.read_bytes()
    found = json.loads(first)
    assert "last layer retrained, DFR: 32 images of val with their 4 groups" in said and "paper" not in found
    assert found["retrain"]["groups"] and sum(found["retrain"]["group_sizes"].values()) == 32
    assert found["leakage"]["repaint"]["max_logit_change"] == found["leakage"]["gradient"]["max_abs"] == 0
    evaluate.main(command)
    assert report.read_bytes() == first and not path.with_name("report.json").exists()


def test_the_table_has_a_row_of_its_own(tmp_path, capsys):
    folder = write_run(tmp_path / "erm-0", "--method", "erm", worst=0.5)
    for how, worst in (("dfr", 0.9), ("pca", 0.8)):
        write_run(tmp_path / "erm-0", "--method", "erm", worst=worst, report=f"report-{how}.json", retrain={"how": how, "groups": how == "dfr"})
    tables.main([folder])
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row[1] for row in rows] == ["`erm`", "`erm + DFR`", "`erm + PCA probe`"]
    assert [row[3] for row in rows] == ["none", "groups: validation; 1 pass + head", "1 pass + head"]


def test_sets_that_share_images_with_the_fit_are_left_out(tmp_path, capsys):
    path = saved(tmp_path, "erm", benchmark="metashift")
    evaluate.main(["--ckpt", str(path), "--retrain", "afr", "--leakage", "1", "--limit", "0", "--out", str(tmp_path / "x.json")])
    assert "left out, for the new head is fitted on images of theirs: test_and_val" in capsys.readouterr().out
    assert "sets" not in json.loads((tmp_path / "x.json").read_text())


@pytest.mark.parametrize("method, benchmark, flags, words", [
    ("erm", "waterbirds", ("--retrain", "dfr", "--split", "val"), "measure on another --split"),
    ("erm", "waterbirds", ("--retrain", "pca", "--split", "val"), "measure on another --split"),
    ("erm", "waterbirds", ("--retrain", "pca", "--split", "train"), "measure on another --split"),
    ("erm", "metashift", ("--retrain", "afr", "--split", "test_and_val"), "measure on another --split"),
    ("erm", "cub", ("--retrain", "dfr"), "--retrain afr needs no groups"), ("erm", "cub", ("--retrain", "afr"), "--val-share 0.1"),
    ("erm", "cub", ("--retrain", "pca"), "--val-share 0.1"), ("ifam", "siim", ("--retrain", "afr"), "--val-share 0.1"),
    ("ifam", "waterbirds", ("--retrain", "dfr", "--encoding"), "leave out --retrain"),
    ("erm", "waterbirds", ("--retrain", "dfr", "--limit", 4), "one image of"), ("erm", "waterbirds", ("--retrain", "afr", "--limit", 1), "1 of 2 classes"),
    ("erm", "waterbirds", ("--retrain", "drf"), "did you mean dfr")])
def test_what_cannot_be_is_one_line(method, benchmark, flags, words, tmp_path, capsys):
    path = saved(tmp_path, method, benchmark=benchmark)
    assert words in fails(evaluate.main, "--ckpt", path, *flags)(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_backgrounds_cannot_be_swapped_without_a_mask_nor_by_one_that_tells_the_label(splits, tmp_path):
    model, _ = runs.load_model(saved(tmp_path, "erm"))
    bare, telling = copy.copy(splits["train"]), copy.copy(splits["train"])
    bare.masks, telling.masks_tell = None, True
    for some, words in ((bare, "finds no mask"), (telling, "mark what makes the label")):
        with pytest.raises(UsageError, match=words):
            R.retrain("lle", model, {"train": some})
        R.check("lle", tiny(), {"train": some}, "")       # iFAM has a mask of its own


def test_a_published_snapshot_gets_a_head_or_a_line(tmp_path, capsys):
    torch.save(as_published(tiny(classes=2, arch=dict(patch=14, width=64, depth=1, heads=1, layer_scale=1.0))), tmp_path / "snapshot.pt")
    typed = ["--ckpt", str(tmp_path / "snapshot.pt"), "--limit", "16", "--leakage", "1", "--root"]
    evaluate.main([*typed, str(ROOT["waterbirds"]), "--data", "waterbirds", "--retrain", "afr", "--out", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text())["retrain"]["fitted_on"] == {"val": 16}
    line = fails(evaluate.main, *typed, ROOT["siim"], "--data", "siim", "--retrain", "afr")(capsys)
    assert "siim has no val split" in line
