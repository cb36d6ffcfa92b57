"""Interventions: what is removed and nothing else, thresholds against exact quantiles, the rule, the file, the guarantee."""
import hashlib
import json
import math
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

import evaluate
import ifam
import interventions
import predict
import runs
from measure import figures
import intervene
from measure import leakage
from measure import metrics
from baselines import ERM, PDiscoFormer
from ifam import discretize, refuse
from models import TINY as ARCH
from models import pictures, tiny
from benchmarks.samples import Samples
from tiny import fails, train

INF = math.inf


def reference(part_logits, drop, limits):
    """keep, written out patch by patch."""
    B, parts, N = part_logits.shape
    keep = torch.zeros(B, N)
    for b in range(B):
        for n in range(N):
            distance = (-part_logits[b, :, n]).tolist()
            part = min(range(parts), key=distance.__getitem__)
            keep[b, n] = part < parts - 1 and part not in drop and distance[part] <= limits[part]
    return keep


# ---------------------------------------------------------------- what is removed
@pytest.mark.parametrize("drop", [(), (1,), (0, 3)])
@pytest.mark.parametrize("limits", [[INF] * 4, [3.0, 5.0, INF, 2.0]])
def test_a_patch_is_kept_if_its_nearest_part_stands_and_is_near_enough(drop, limits):
    part_logits = -10 * torch.rand(3, 5, 40, generator=torch.Generator().manual_seed(2))
    keep = discretize(refuse(part_logits, ifam.limits_of(4, drop, torch.tensor(limits))))
    assert torch.equal(keep, reference(part_logits, drop, limits))
    assert keep.any() and not keep.all()


def test_a_patch_of_a_removed_part_does_not_fall_to_its_second_best_part():
    part_logits = torch.tensor([-1.0, -2.0, -3.0]).view(1, 3, 1)                 # parts 0 and 1 both beat the background
    assert discretize(part_logits).item() == 1
    assert discretize(refuse(part_logits, ifam.limits_of(2, [0]))).item() == 0
    assert discretize(part_logits, parts=torch.tensor([[0.0, 1.0]])).item() == 1         # as part dropout would have it


def test_patches_that_are_not_refused_keep_their_logits_and_background_is_never_touched():
    part_logits = -torch.rand(2, 4, 30, generator=torch.Generator().manual_seed(0))
    after = refuse(part_logits, ifam.limits_of(3, [2]))
    refused = part_logits.argmax(1) == 2
    same = ~refused[:, None].expand_as(after)
    same[:, 3] = True
    assert torch.equal(after[same], part_logits[same]) and (after[~same] == -INF).all() and refused.any()


def test_no_limits_and_infinite_limits_are_the_untouched_model_bit_for_bit():
    model, images = tiny(), pictures()
    before = model(images)
    model.selector.limits = ifam.limits_of(4)
    for a, b in zip(before, model(images)):
        assert a is b is None or torch.equal(a, b)


def test_the_whole_model_sees_the_intervention_masks_maps_and_both_predictions():
    model, images = tiny(), pictures()
    before = model(images)
    part = before.part_logits.argmax(1).flatten().bincount(minlength=5)[:4].argmax().item()
    model.selector.limits = ifam.limits_of(4, [part])
    after = model(images)
    gone = before.part_logits.argmax(1) == part
    assert torch.equal(after.keep, before.keep * ~gone) and gone.any()
    assert (after.maps.flatten(2)[:, -1][gone] == 1).all()                       # the late mask sees background there
    assert torch.equal(after.logits, model(images, keep=after.keep).logits)
    assert not torch.equal(after.logits, before.logits) and not torch.equal(after.logits_stage1, before.logits_stage1)


def test_an_intervention_is_no_part_of_a_checkpoint():
    model = tiny()
    names = list(model.state_dict())
    model.selector.limits = ifam.limits_of(4, [0])
    assert list(model.state_dict()) == names


def test_an_image_without_any_patch_is_classified_from_class_token_and_registers_and_counted():
    model, images = tiny(), pictures()
    model.selector.limits = torch.full((4,), -1.0)                               # no distance is that small
    out = model(images)
    assert out.keep.sum() == 0 and out.logits.isfinite().all() and out.logits_stage1.isfinite().all()
    alone = [model(image[None]).logits for image in images]                      # one by one: rows of a batch may round apart
    assert all(torch.equal(x, alone[0]) for x in alone)                          # there is nothing left to tell them apart
    torch.testing.assert_close(out.logits, torch.cat(alone))


# ---------------------------------------------------------------- the guarantee
@pytest.mark.parametrize("settings", [{}, {"pooling": "mean"}, {"hardness": "soft"}])
def test_under_an_intervention_no_hidden_pixel_reaches_a_logit_exactly(settings):
    model, images = tiny(**settings), pictures(4)
    raw = model.selector(images).part_logits
    near = torch.tensor([np.median((-raw.amax(1))[raw.argmax(1) == p].detach()) for p in range(4)])
    used = model(images).part_logits.argmax(1).flatten().bincount(minlength=5)[:4].argmax().item()
    model.selector.limits = ifam.limits_of(4, [used], near)
    classifier = leakage.stage2_classifier(model)
    keep, held = classifier.find(images, None)
    base = discretize(raw)
    assert 0 < keep.sum() < base.sum()                   # some patches were taken away, some are left
    hidden = leakage.pixels(keep, model.selector.backbone.grid, 14) == 0
    with torch.no_grad():
        logits = classifier.head(classifier.features(images, held))
        change, flips = leakage.repaint(classifier, images, held, hidden, logits, torch.Generator().manual_seed(0))
    gradient = leakage.hidden_gradient(classifier, images, held, hidden)
    if settings.get("hardness") == "soft":               # a soft mask hides nothing but what was removed
        removed = leakage.pixels(base * (1 - keep), model.selector.backbone.grid, 14) == 1
        change, _ = leakage.repaint(classifier, images, held, removed, logits, torch.Generator().manual_seed(0))
        gradient = leakage.hidden_gradient(classifier, images, held, removed)
    assert (change == 0).all() and (gradient == 0).all()


# ---------------------------------------------------------------- thresholds
@pytest.mark.parametrize("q", [0.001, 0.5, 0.9, 0.99, 0.9999])
def test_streamed_quantiles_are_the_exact_ones_to_a_bin_and_never_below(q):
    rng = np.random.default_rng(0)
    values = [rng.lognormal(3, 1, 5000), 1e-3 * rng.random(7), 900 + rng.random(20000), 1e6 * rng.random(333)]
    values = [v.astype(np.float32) for v in values]
    part = torch.tensor(np.concatenate([[p] * len(v) for p, v in enumerate(values)]))
    everything = torch.tensor(np.concatenate(values))
    order = torch.tensor(rng.permutation(len(part)))
    found = intervene.Quantiles(4)
    for some in order.split(777):                        # in portions and in any order
        found.add(part[some], everything[some])
    exact = torch.tensor([np.quantile(v, q, method="inverted_cdf") for v in values])
    ours = found.at(q)
    assert (ours >= exact).all() and (ours <= exact * (1 + 2 ** -12)).all()
    assert found.seen().tolist() == [len(v) for v in values]
    for v, t in zip(values, ours.tolist()):
        assert (v <= t).mean() >= q


@pytest.mark.parametrize("q", [0.001, 0.5, 0.9, 0.999])
def test_streamed_quantiles_from_above_are_the_exact_ones_to_a_bin_and_never_above(q):
    values = np.random.default_rng(1).lognormal(1, 2, 4000).astype(np.float32)
    found = intervene.Quantiles(2)
    found.add(torch.zeros(4000, dtype=torch.long), torch.tensor(values))
    exact = -np.quantile(-values, q, method="inverted_cdf")
    ours, unseen = found.above(q).tolist()
    assert exact * (1 - 2 ** -12) <= ours <= exact and (values >= ours).mean() >= q and unseen == -INF


def test_zero_and_rounding_below_zero_are_small_distances_and_an_unseen_part_has_no_limit():
    found = intervene.Quantiles(2)
    found.add(torch.tensor([0, 0, 0]), torch.tensor([-1e-6, 0.0, -0.0]))
    zero, unseen = found.at(0.5).tolist()
    assert 0 <= zero < 1e-30 and unseen == INF


def test_calibration_counts_every_training_patch_under_its_part_in_the_evaluation_view():
    class Samples(torch.utils.data.Dataset):             # no annotations, and augmented only when asked with an epoch
        masks = points = boxes = None
        images = pictures(5)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            assert isinstance(i, int)
            return {"image": self.images[i]}

    model = tiny()
    found = intervene.calibrate(model, Samples(), batch=2)
    distance, part = (-model.selector(Samples.images).part_logits).min(1)
    for p in range(4):
        mine = distance[part == p].detach().numpy()
        assert found.seen()[p] == len(mine)
        if len(mine):
            exact = np.quantile(mine, 0.8, method="inverted_cdf")
            assert found.at(0.8)[p].item() == pytest.approx(exact, rel=2 ** -11)


@pytest.mark.parametrize("score", ifam.SCORES)
@pytest.mark.parametrize("q", [0.3, 0.9])
def test_of_each_part_a_share_q_of_the_calibration_patches_stays_and_those_are_the_least_unlike(score, q):
    class Samples(torch.utils.data.Dataset):
        images = pictures(6)
        __len__ = lambda self: 6
        __getitem__ = lambda self, i: {"image": self.images[i]}

    model = tiny()
    selector = model.selector
    raw, features = selector(Samples.images).part_logits.detach(), selector.features(Samples.images).detach()
    part = raw.argmax(1)
    unlike = {"distance": (features[:, :, None] - selector.prototypes).square().sum(3).gather(2, part[..., None])[..., 0],
              "margin": -(raw.amax(1) - raw[:, -1]),
              "cosine": 1 - torch.nn.functional.cosine_similarity(features, selector.prototypes[part], dim=2)}[score]
    found = intervene.calibrate(model, Samples(), batch=4, score=score)
    limits = intervene.thresholds_at(found, q, score)
    selector.limits, selector.score = limits, score
    after = selector(Samples.images).part_logits.argmax(1)
    checked = 0
    for p in range(4):
        mine = (part == p).nonzero(as_tuple=True)
        if not len(mine[0]):
            assert limits[p] == INF
            continue
        stays, value, checked = after[mine] == p, unlike[mine], checked + 1
        assert stays.double().mean() >= q - 1e-9 and stays.sum() <= math.ceil(q * len(stays)) + 1
        assert (~stays).sum() == 0 or value[stays].max() <= value[~stays].min() + 1e-4
    assert checked > 1


def test_scores_are_what_they_say_and_the_default_is_the_distance():
    torch.manual_seed(0)
    features, prototypes = torch.randn(2, 7, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
    raw = -(features[:, :, None] - prototypes).square().sum(3).mT
    for b in range(2):
        for n in range(7):
            p = raw[b, :, n].argmax()
            f, x = features[b, n], prototypes[p]
            expected = {"distance": (f - x).square().sum(), "margin": raw[b, 3, n] - raw[b, p, n],
                        "cosine": 1 - f @ x / f.norm() / x.norm()}
            for score in ifam.SCORES:
                assert ifam.unlikeness(score, raw, features, prototypes)[b, n].item() == pytest.approx(expected[score].item())
    limits = torch.tensor([1.0, 5, 9])
    assert torch.equal(refuse(raw, limits), refuse(raw, limits, ifam.unlikeness("distance", raw, features, prototypes)))


def test_for_features_and_prototypes_of_one_length_distance_and_cosine_order_patches_alike():
    torch.manual_seed(0)
    unit = lambda *shape: 3 * torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)
    features, prototypes = unit(1, 200, 8), unit(5, 8)
    raw = -(features[:, :, None] - prototypes).square().sum(3).mT
    distance, cosine = (ifam.unlikeness(score, raw, features, prototypes) for score in ("distance", "cosine"))
    torch.testing.assert_close(distance, 2 * 9 * cosine)                         # |f - p|^2 = |f|^2 + |p|^2 - 2 |f| |p| cos


# ---------------------------------------------------------------- the rule
class Scripted(intervene.Trials):
    """Trials whose numbers are known: {parts removed: (worst group, average)}."""

    def __init__(self, numbers, k):
        self.numbers, self.asked, self.rows = numbers, [], {}
        self.model = type("Model", (), {"selector": type("Selector", (), {"k": k})})

    def measure(self, *options):
        for option in options:
            worst, average = self.numbers.get(option[0] if option[1] is None else option, (0.0, 0.0))
            self.rows.setdefault(option, {"worst_group": worst, "aa": average})
        return [self.rows[option] for option in options]


def found(numbers, k=3, drop=(), tolerance=0.01):
    trials = Scripted(numbers, k)
    trials.measure(intervene.UNTOUCHED)
    return intervene.leave_one_out(trials, drop, tolerance)


def test_a_removal_must_raise_the_worst_group_and_may_not_cost_the_average_more_than_the_tolerance():
    base = {(): (0.5, 0.9)}
    assert found(base | {(0,): (0.5, 0.95)}) == ()                               # raised nothing
    assert found(base | {(0,): (0.6, 0.88)}) == ()                               # cost too much
    assert found(base | {(0,): (0.6, 0.88)}, tolerance=0.02) == (0,)
    assert found(base | {(0,): (0.6, 0.89), (1,): (0.55, 0.99)}) == (0,)         # the better worst group
    assert found(base | {(0,): (0.6, 0.89), (1,): (0.6, 0.9)}) == (1,)           # then the better average


def test_removals_add_up_while_each_raises_the_worst_group_and_one_part_always_stays():
    rising = {(): (0.1, 0.9), (0,): (0.2, 0.9), (1,): (0.3, 0.9), (0, 1): (0.4, 0.9), (1, 2): (0.35, 0.9), (0, 1, 2): (1, 1)}
    assert found(rising) == (0, 1)
    assert found(rising, drop=(2,)) == (1, 2)                                    # beside those dropped by hand
    # what two removals cost together is counted from the untouched model
    assert found({(): (0.1, 0.9), (0,): (0.2, 0.894), (0, 1): (0.3, 0.888)}) == (0,)


def test_of_several_quantiles_the_rule_takes_the_best_or_none_and_a_single_one_is_taken_as_told():
    cfg = lambda *q: intervene.Config("x.pt", q=q)
    numbers = {(): (0.5, 0.9), ((), 0.9): (0.7, 0.8), ((), 0.95): (0.6, 0.9), ((), 0.99): (0.55, 0.9)}
    assert intervene.decide(Scripted(numbers, 2), cfg(0.9, 0.95, 0.99)) == ((), 0.95)
    assert intervene.decide(Scripted(numbers, 2), cfg(0.9)) == ((), 0.9)
    numbers |= {((), 0.95): (0.5, 0.9), ((), 0.99): (0.4, 0.9)}
    assert intervene.decide(Scripted(numbers, 2), cfg(0.9, 0.95, 0.99)) == ((), None)


def rows_of(name, labels, groups, classes, places=()):
    """Trials on a split of a benchmark without pictures."""
    n = len(labels)
    return intervene.Trials(tiny(), Samples(name, "test", 70, classes, range(n), range(n), labels, places, groups))


def test_of_many_classes_the_worst_is_the_mean_of_the_worst_tenth():
    classes = [f"class {c}" for c in range(30)]
    trials = rows_of("cub", list(range(30)) * 2, None, classes)
    logits = torch.eye(30).repeat(2, 1)                  # every class is right twice
    logits[[0, 1, 30]] = -logits[[0, 1, 30]]             # class 0 never, class 1 once
    row = trials.row((), None, logits, torch.ones(60))
    assert row["worst_group"] == pytest.approx((0 + 0.5 + 1) / 3) and row["worst_group_name"] == "class 0 and 2 more"
    few = rows_of("cub", [0, 1], None, ["a", "b"]).row((), None, torch.eye(2) * torch.tensor([[-1], [1]]), torch.ones(2))
    assert few["worst_group"] == 0 and few["worst_group_name"] == "a"


def test_on_siim_the_rule_speaks_of_auroc_of_all_and_of_those_whose_tube_misleads():
    labels, tubes = [0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0]
    groups = [2 * y + tube for y, tube in zip(labels, tubes)]
    scores = torch.tensor([0.1, 0.8, 0.3, 0.9, 0.2, 0.4])
    logits = torch.stack([torch.zeros(6), scores], 1)
    trials = rows_of("siim", labels, groups, ["healthy", "pneumothorax"], ["without tube", "with tube"])
    trials.rows[intervene.UNTOUCHED] = row = trials.row((), None, logits, torch.ones(6))
    wins = lambda ones, zeros: sum(a > b for a in ones for b in zeros) / (len(ones) * len(zeros))
    assert row["auroc"] == pytest.approx(wins([0.3, 0.9, 0.4], [0.1, 0.8, 0.2]))
    assert row["auroc_rare"] == pytest.approx(wins([0.3, 0.4], [0.8, 0.2])) and row["aa"] == 0.5
    better = trials.row((0,), None, torch.stack([torch.zeros(6), torch.tensor([0.1, 0.2, 0.3, 0.9, 0.2, 0.4])], 1), torch.ones(6))
    assert better["aa"] == row["aa"] and better["effect"]["auroc_rare"] == pytest.approx(0.5)
    assert trials.accepts(better, row, 0.01) and not trials.accepts(row, better, 0.01)
    assert "AUROC" in intervene.table(trials, intervene.UNTOUCHED)
    untold = rows_of("siim", labels, None, ["healthy", "pneumothorax"]).row((), None, logits, torch.ones(6))
    assert untold["auroc_rare"] == untold["auroc"] == row["auroc"]


# ---------------------------------------------------------------- the scripts
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "run", "--limit", "32", "--k", "3") / "best.pt"


@pytest.fixture(scope="module")
def done(trained):
    """intervene.py with everything on, then evaluate.py with and without its file -> (intervention, plain, corrected)."""
    intervene.main(["--ckpt", str(trained), "--drop", "1", "--q", "0.8", "--limit", "24", "--device", "cpu"])
    files = ("intervention", "report-limit24", "report-limit24-intervention")
    for more in ([], ["--intervention", str(trained.with_name("intervention.json"))]):
        evaluate.main(["--ckpt", str(trained), "--limit", "24", "--device", "cpu", *more])
    return [json.loads(trained.with_name(f"{name}.json").read_text()) for name in files]


def test_the_file_says_what_was_removed_on_what_grounds_and_for_which_checkpoint(trained, done):
    made = done[0]
    assert made["drop"] == [1] and made["q"] == 0.8 and made["checkpoint"]["sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert made["decision"] | {"rule": ""} == {"data": "waterbirds-mini", "split": "val", "images": 24, "tolerance": 0.01, "rule": "",
                                               "parts_by_hand": [1], "parts_by_rule": [], "q_by": "hand"}
    assert made["calibration"]["split"] == "train" and made["calibration"]["images"] == 24
    assert made["thresholds"] == made["calibration"]["squared_distances"]["0.8"] and len(made["thresholds"]) == 3
    rows = {(tuple(row["drop"]), row["q"]): row for row in made["rows"]}
    assert {((), None), ((0,), None), ((1,), None), ((2,), None), ((1,), 0.8)} == rows.keys()
    for row in rows.values():
        for key in ("groups", "classes"):
            assert row["effect"][key] == {n: x - rows[(), None][key][n] for n, x in row[key].items()}


def test_evaluate_measures_the_corrected_model_in_its_whole_report(done):
    made, plain, corrected = done
    assert corrected["intervention"]["drop"] == [1] and "intervention" not in plain
    assert corrected["mask"]["kept_share"] < plain["mask"]["kept_share"]
    assert corrected["mask"]["empty"] >= plain["mask"]["empty"]
    leak = corrected["leakage"]
    assert leak["repaint"]["max_logit_change"] == 0 and leak["gradient"]["max_abs"] == 0
    assert corrected["localisation"]["foreground_iou"] != plain["localisation"]["foreground_iou"]


@pytest.mark.parametrize("score", ["margin", "cosine"])
def test_the_score_is_in_the_file_and_evaluation_applies_the_same_patches(trained, tmp_path, score, capsys):
    file = tmp_path / "x.json"
    intervene.main(["--ckpt", str(trained), "--q", "0.7", "--score", score, "--limit", "24", "--device", "cpu", "--out", str(file)])
    made = json.loads(file.read_text())
    name = interventions.THRESHOLDS[score]
    assert made["score"] == score and made["thresholds"] == made["calibration"][name]["0.7"]
    assert all(t is None or t >= 0 for t in made["thresholds"]) and f"of the {score}" in capsys.readouterr().out
    model, state = runs.load_model(trained)
    samples = predict.open_split(intervene.Config(str(trained), limit=24), state, model)[1]
    assert interventions.apply_intervention(model, file, trained)["score"] == score
    row = next(r for r in made["rows"] if r["q"] == 0.7)
    assert row["kept_share"] == pytest.approx(predict.predict(model, samples)["keep"].mean().item())
    assert row["kept_share"] < made["rows"][0]["kept_share"]
    for change, says in (({"score": "angle"}, "score is \"angle\", expected one of"), ({"score": "distance"}, "calibration.squared_distances is missing"),
                         ({"score": []}, "score is []")):
        (tmp_path / "edited.json").write_text(json.dumps(made | change))
        assert says in fails(evaluate.main, "--ckpt", trained, "--intervention", tmp_path / "edited.json")(capsys)


def test_a_file_from_before_there_were_scores_is_read_as_one_of_the_distance(trained, done, tmp_path):
    old = {key: x for key, x in done[0].items() if key != "score"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    model, _ = runs.load_model(trained)
    assert interventions.apply_intervention(model, tmp_path / "old.json", trained)["score"] == "distance" == model.selector.score
    limits = model.selector.limits
    interventions.apply_intervention(model, trained.with_name("intervention.json"), trained)
    assert torch.equal(limits, model.selector.limits)


def test_the_rows_are_what_the_model_does_when_set_to_that_intervention(trained, done):
    cfg = intervene.Config(str(trained), limit=24)
    model, state = runs.load_model(trained)
    samples = predict.open_split(cfg, state, model)[1]
    interventions.apply_intervention(model, trained.with_name("intervention.json"), trained)
    result = predict.predict(model, samples)
    expected = metrics.accuracies(result, samples)
    row = next(r for r in done[0]["rows"] if r["q"] == 0.8)
    assert row["aa"] == expected["aa"] and row["worst_group"] == expected["worst_group"]
    assert row["empty"] == (result["keep"].sum(1) == 0).sum()
    assert row["kept_share"] == pytest.approx(result["keep"].mean().item())


def test_there_is_a_sheet_for_every_part_and_a_picture_of_the_removed_patches(trained, done):
    for name in ("part-0", "part-1", "part-2", "patches"):
        with PIL.Image.open(trained.with_name(f"intervention-{name}.png")) as picture:
            assert picture.height > 400 or picture.height < 100                  # a part without patches: one line


def test_each_sheet_says_what_the_removal_of_its_part_does_and_unused_parts_say_that(trained, monkeypatch):
    titles = []
    monkeypatch.setattr(figures, "part_sheet", lambda model, samples, part, census, title, *where: titles.append(title))
    model, state = runs.load_model(trained)
    trials = intervene.Trials(model, predict.open_split(intervene.Config(str(trained), limit=24), state, model)[1])
    trials.measure(intervene.UNTOUCHED, ((0,), None), ((1,), None), ((2,), None))
    intervene.pictures(trials, trained.with_name("x.json"), "here", (), "cpu")
    for part, title in enumerate(titles):
        before, after = trials.rows[(), None], trials.rows[(part,), None]
        assert f"worst group {before['worst_group']:.3f} → {after['worst_group']:.3f}" in title
        low, high = intervene.most_changed(after)
        assert f"part {part}: " in title and f"loses most: {low}; gains most: {high}" in title


def test_images_are_read_once_for_all_quantiles_and_once_for_all_removals_of_a_round(trained, tmp_path, monkeypatch):
    model, state = runs.load_model(trained)
    read, get = [], Samples.__getitem__
    monkeypatch.setattr(Samples, "__getitem__", lambda self, i: (read.append(self.split), get(self, i))[1])
    monkeypatch.setattr(figures, "part_sheet", lambda *a: None)
    monkeypatch.setattr(figures, "removals", lambda *a: None)
    intervene.main(["--ckpt", str(trained), "--loo", "--tolerance", "0", "--q", "0.5", "0.9", "0.99", "--limit", "8", "--device", "cpu",
                    "--out", str(tmp_path / "both.json")])
    content = json.loads((tmp_path / "both.json").read_text())
    removed = len(content["decision"]["parts_by_rule"])
    rounds = 1 + min(removed, 1) + 1                     # parts one by one, again beside the first removed, all quantiles
    assert read.count("train") == 8 and read.count("val") == 8 * rounds
    assert [row["q"] for row in content["rows"]][-3:] == [0.5, 0.9, 0.99] and content["rows"][-1]["drop"] == content["drop"]
    assert content["q"] is None or content["decision"]["q_by"] == "rule"
    model, _ = runs.load_model(trained)
    interventions.apply_intervention(model, tmp_path / "both.json", trained)
    assert ((model.selector.limits == -INF).nonzero()[:, 0].tolist()) == content["drop"]


def test_looking_writes_sheets_but_decides_nothing(trained, tmp_path, capsys):
    shutil.copy(trained, tmp_path / "best.pt")
    intervene.main(["--ckpt", str(tmp_path / "best.pt"), "--limit", "8", "--device", "cpu"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", *[f"intervention-part-{p}.png" for p in range(3)]]
    printed = capsys.readouterr().out
    assert all(f"without part {p}" in printed for p in range(3)) and "empty" in printed


def test_what_was_decided_on_test_says_so(trained, tmp_path, capsys):
    file = tmp_path / "x.json"
    intervene.main(["--ckpt", str(trained), "--loo", "--split", "test", "--tolerance", "1", "--limit", "8", "--out", str(file), "--device", "cpu"])
    assert "it saw the test set" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["decision"]["split"] == "test"
    content["decision"]["parts_by_rule"] = [0]
    assert "CHOSEN ON TEST: too good in test, robust" in interventions.describe_intervention(content, "waterbirds-mini", ["test", "robust"])
    assert "CHOSEN" not in interventions.describe_intervention(content, "waterbirds-mini", ["val"])
    cub = {"drop": [], "q": 0.9, "decision": content["decision"] | {"data": "cub", "q_by": "rule"}}
    assert "CHOSEN ON TEST" in interventions.describe_intervention(cub, "waterbird200", ["test"])   # the same birds before other backgrounds
    assert "CHOSEN" not in interventions.describe_intervention(cub, "metashift", ["test"])
    content["decision"]["split"] = "val"
    assert "CHOSEN ON VAL: too good in test_and_val" in interventions.describe_intervention(content, "waterbirds-mini", ["test", "test_and_val"])


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("flags, says", [
    (["--drop", 3], "no such part; its parts are 0 to 2"), (["--drop", -1], "at least 0"),
    (["--drop", 0, 1, 2], "removes all 3 parts"), (["--q", 1], "above 0 and below 1"), (["--q", 0.9, 0], "above 0 and below 1"),
    (["--q", "nan"], "finite"), (["--tolerance", -1], "at least 0"), (["--tolerance", "inf"], "finite"), (["--out", "nowhere/x.json"], "folder that exists"),
    (["--split", "train"], "unknown --split"), (["--score", "angle"], "unknown --score"), (["--score", "cosine"], "add --q")])
def test_a_mistake_is_one_line_and_writes_nothing(trained, tmp_path, capsys, flags, says):
    shutil.copy(trained, tmp_path / "best.pt")
    assert says in fails(intervene.main, "--ckpt", tmp_path / "best.pt", *flags)(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_a_model_without_parts_has_no_intervention_and_pdiscoformer_has():
    cfg = intervene.Config("x.pt")
    with pytest.raises(intervene.UsageError, match="has no parts"):
        intervene.check(cfg, ERM(2, ARCH, 70), "erm")
    torch.manual_seed(0)
    model = PDiscoFormer(3, 2, ARCH, 70).eval()
    intervene.check(cfg, model, "pdiscoformer")
    torch.nn.init.normal_(model.selector.prototypes, std=0.5)
    before = model(pictures()).logits
    model.selector.limits = ifam.limits_of(2, [0, 1])
    assert not torch.equal(model(pictures()).logits, before)


def test_an_intervention_on_another_checkpoint_is_refused(trained, done, tmp_path, capsys):
    state = torch.load(trained, weights_only=True)
    torch.save(state | {"step": state["step"] + 1}, tmp_path / "best.pt")
    file = trained.with_name("intervention.json")
    line = fails(evaluate.main, "--ckpt", tmp_path / "best.pt", "--intervention", file)(capsys)
    assert "is an intervention on another checkpoint" in line
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


EDITS = [   # (fields that a person edited, what the line says of them); the file has 3 parts, --drop 1 --q 0.8
    ({"drop": [9]}, "drop is [9], expected numbers of parts, 0 to 2"), ({"drop": [-1]}, "drop is [-1]"), ({"drop": [0, 1, 2]}, "not all of them"),
    ({"drop": "01"}, 'drop is "01"'), ({"drop": [1, 1]}, "each once"), ({"drop": [True]}, "drop is [true]"), ({"drop": [1.0]}, "drop is [1.0]"),
    ({"drop": None}, "drop is null"), ({"drop": [0]}, "drop is [0], expected those of decision"), ({"drop": {}}, "drop is {}"),
    ({"q": 0.9}, "expected a row of what was decided"), ({"q": "0.8"}, 'q is "0.8", expected null or a number'), ({"q": 2}, "q is 2"),
    ({"q": math.nan}, "q is NaN"), ({"q": None}, "decision.q_by is \"hand\", expected null if q is"), ({"q": [0.8]}, "q is [0.8]"),
    ({"thresholds": [1.0]}, "thresholds is [1.0], expected calibration.squared_distances at 0.8"), ({"thresholds": ["a", 1, 2]}, "thresholds is"),
    ({"thresholds": None}, "thresholds is null"), ({"calibration": None}, "calibration.data is missing"), ({"rows": []}, "rows is []"),
    ({"calibration.patches": [1, 2]}, "expected 3 numbers of patches"), ({"calibration.patches": [0, 0, 0]}, "0 where, and only where"),
    ({"calibration.images": 0}, "calibration.images is 0"), ({"calibration.squared_distances": {"0.8": [-1, 2, 3]}}, "3 numbers or nulls"),
    ({"calibration.squared_distances": {"0.8": [math.inf] * 3}}, "3 numbers or nulls"), ({"calibration.squared_distances": {}}, "thresholds is"),
    ({"decision": {}}, "decision.data is missing"), ({"decision": []}, "decision.data is missing"), ({"decision.data": "birds"}, "benchmark"),
    ({"decision.split": "<b>x</b>$a$\n"}, "the name of a split"), ({"decision.split": ["val"]}, "the name of a split"),
    ({"decision.images": -1}, "decision.images is -1"), ({"decision.tolerance": math.inf}, "decision.tolerance is Infinity"),
    ({"decision.parts_by_hand": []}, "expected those of decision"), ({"decision.parts_by_rule": [0]}, "expected those of decision"),
    ({"decision.q_by": "rule"}, "expected hand for one quantile"), ({"decision.q_by": 3}, "decision.q_by is 3"),
    ({"checkpoint": {}}, "checkpoint.sha256 is missing"), ({"checkpoint": 3}, "checkpoint.sha256 is missing"),
    ({"checkpoint.sha256": 12}, "checkpoint.sha256 is 12")]


@pytest.mark.parametrize("change, says", EDITS, ids=[str(change) for change, _ in EDITS])
def test_an_intervention_that_a_person_edited_is_one_line_before_anything_is_measured(trained, done, tmp_path, capsys, change, says):
    content = json.loads(json.dumps(done[0]))
    for field, value in change.items():
        *above, last = field.split(".")
        (content[above[0]] if above else content)[last] = value
    (tmp_path / "x.json").write_text(json.dumps(content))
    line = fails(evaluate.main, "--ckpt", trained, "--intervention", tmp_path / "x.json")(capsys)
    assert "x.json is not as intervene.py writes it: " in line and says in line, line


def test_an_intervention_without_quantiles_or_with_several_is_as_sound(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(intervene.figures, "part_sheet", lambda *a: None)
    monkeypatch.setattr(intervene.figures, "removals", lambda *a: None)
    model, _ = runs.load_model(trained)
    for flags in (["--drop", "0", "2"], ["--loo"], ["--q", "0.9", "0.5", "--drop", "1"], ["--q", "0.99"]):
        intervene.main(["--ckpt", str(trained), "--limit", "8", "--device", "cpu", "--out", str(tmp_path / "x.json"), *flags])
        assert interventions.apply_intervention(model, tmp_path / "x.json", trained)["decision"]["split"] == "val"


@pytest.mark.parametrize("name, content", [
    ("config.json", "{}"), ("notes.json", '{"decision": "mine"}'), ("list.json", "[]"), ("torn.json", '{"decision'), ("val.json", None), ("cub.json", None),
    ("folder.json", None), ("x-part-2.png", "not a picture"), ("x-part-0.png", PIL.Image), ("x-patches.png", "")])
def test_a_result_never_takes_the_place_of_what_this_program_did_not_write(trained, tmp_path, capsys, name, content):
    shutil.copy(trained, tmp_path / "best.pt")
    (tmp_path / "folder.json").mkdir()
    if content is PIL.Image:
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)                       # a picture of somebody else
    elif content is not None:
        (tmp_path / name).write_text(content)
    before = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / (name if name.endswith(".json") else "x.json")
    line = fails(intervene.main, "--ckpt", tmp_path / "best.pt", "--loo", "--q", "0.9", "--out", out)(capsys)
    assert name in line and sorted(p.name for p in tmp_path.iterdir()) == before
    if isinstance(content, str):
        assert (tmp_path / name).read_text() == content


def test_an_earlier_intervention_and_its_pictures_are_replaced(trained, tmp_path):
    for part in (0, 2):
        intervene.main(["--ckpt", str(trained), "--limit", "8", "--device", "cpu", "--out", str(tmp_path / "x.json"), "--drop", str(part), "--q", "0.9"])
        assert json.loads((tmp_path / "x.json").read_text())["drop"] == [part] and (tmp_path / "x-patches.png").is_file()


def test_force_replaces_what_this_program_did_not_write(trained, tmp_path):
    for name in ("x.json", "x-part-0.png"):
        (tmp_path / name).write_text("mine")
    intervene.main(["--ckpt", str(trained), "--limit", "8", "--device", "cpu", "--out", str(tmp_path / "x.json"), "--drop", "0", "--force"])
    assert json.loads((tmp_path / "x.json").read_text())["drop"] == [0] and intervene.is_our_picture(tmp_path / "x-part-0.png")


def test_names_with_dollars_tags_or_line_breaks_break_neither_table_nor_picture(trained, tmp_path, monkeypatch, capsys):
    names = ["a $x^{$\nbird", "<b>two</b> $\\frac$\udcff"]
    model, state = runs.load_model(trained)
    samples = predict.open_split(intervene.Config(str(trained), limit=8), state, model)[1]
    samples.classes, samples.groups, samples.group_names = names, samples.labels, names
    trials = intervene.Trials(model, samples)
    trials.measure(intervene.UNTOUCHED, ((0,), None), ((1,), None), ((2,), None))
    monkeypatch.setattr(intervene, "most_changed", lambda row: tuple(map(intervene.one_line, names)))
    lines = [line for line in intervene.table(trials, intervene.UNTOUCHED).splitlines() if "is empty" not in line]
    assert len(lines) == 5 and all(line.isprintable() for line in lines) and "a $x^{$ bird" in lines[1]
    intervene.pictures(trials, tmp_path / "x.json", "here", (), "cpu")
    assert len(list(tmp_path.glob("x-part-*.png"))) == 3


@pytest.mark.parametrize("content, says", [
    (None, "no such file"), ("{", "damaged"), ("[" * 10 ** 5, "damaged"), ("[]", "checkpoint.sha256 is missing"), ('{"drop": []}', "checkpoint.sha256 is missing")])
def test_a_damaged_intervention_is_one_line(trained, tmp_path, capsys, content, says):
    file = tmp_path / "x.json"
    if content:
        file.write_text(content)
    assert says in fails(evaluate.main, "--ckpt", trained, "--intervention", file)(capsys)


# ---------------------------------------------------------------- pictures
def test_the_patch_that_beats_the_background_by_most_is_found_and_framed_in_the_colour_of_its_part():
    part_logits = torch.full((2, 3, 4), -9.0)
    part_logits[0, 0] = torch.tensor([-5.0, -1.0, -2.0, -10.0])                  # part 0: patches 0, 1, 2; the nearest is 1
    part_logits[0, 2] = torch.tensor([-14.0, -3.0, -9.0, -1.0])                  # and patch 0 is farthest from the background
    part_logits[1, 2] = -1.0                                                     # all background
    found = intervene.census(part_logits, torch.tensor([[0.25, 0.5, 1.0, 1.0]] * 2))
    assert found.margin[0, 0] == 9 and found.where[0, 0] == 0 and found.count.tolist() == [[3, 0], [0, 0]]
    assert found.margin[1, 0] == -INF and found.area[0, 0] == 1.75 and found.best[0, 0] == 0.25
    assert intervene.census(part_logits).area is None
    tile = figures.neighbourhood(np.zeros((12, 12, 3)), 4, 0, 1, figures.part_colour(5), around=1, least=12)
    assert np.allclose(tile[4, 4:8], figures.part_colour(5)) and np.allclose(tile[:4], 0.8) and (tile[8:] == 0).all()


def test_a_sheet_says_how_it_ranks_and_how_much_of_the_patches_is_object_and_an_empty_part_is_one_line(trained, monkeypatch):
    model, state = runs.load_model(trained)
    samples = predict.open_split(intervene.Config(str(trained), limit=24), state, model)[1]
    trials = intervene.Trials(model, samples)
    trials.measure(intervene.UNTOUCHED)
    census, grids, lines = trials.census, [], []
    part = census.count.sum(0).argmax().item()
    monkeypatch.setattr(figures, "grid", lambda rows, **more: grids.append((rows, more["heading"])))
    monkeypatch.setattr(figures, "one_line", lambda text, path: lines.append(text))
    figures.part_sheet(model, samples, part, census, "title")
    rows, heading = grids[0]
    raw = torch.cat([model.selector(samples[i]["image"][None]).part_logits for i in range(len(samples))]).detach()
    masks = torch.nn.functional.avg_pool2d(torch.stack([samples[i]["mask"] for i in range(len(samples))])[:, None].float(), 8).flatten(1)
    mine = raw.argmax(1) == part
    assert f"and {masks[mine].mean():.0%} of that of all its patches" in heading and "largest margin over the background" in heading
    assert [*rows][0].startswith("largest margin") and [*rows][-3:] == ["a patch\nat random", "images with\nthis part", "its patches"]
    figures.part_sheet(model, samples, part, census._replace(count=census.count * 0), "title")
    assert lines == [f"part {part} is empty: no patch of any of the 24 images goes to it"] and len(grids) == 1
    trials.census = census._replace(count=census.count * 0)
    assert intervene.table(trials, intervene.UNTOUCHED).count("is empty") == 3
