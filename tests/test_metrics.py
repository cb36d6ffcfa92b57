"""Metrics against brute force, against scikit-learn and scipy, and by hand."""
import copy
import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import StandardScaler

import data
from benchmarks import cub
import predict
import evaluate
import ifam
from benchmarks import transforms
from measure.metrics import (Landmarks, ari, auroc, clusters_at, foreground_counts, foreground_ious, keypoint_error, landmarks,
                             nmi, part_centroids, scale_of, wilson)
from settings import UsageError


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- ranking
@pytest.mark.parametrize("levels", (2, 5, 1000), ids="{} levels".format)
def test_auroc_is_the_share_of_pairs_in_order_and_a_tie_is_half_a_pair(levels):
    g = draw(levels)
    scores, labels = torch.randint(levels, (60,), generator=g) / levels, torch.randint(2, (60,), generator=g)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1].tolist() for b in scores[labels == 0].tolist()]
    assert auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-14)
    assert auroc(scores, labels) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores.double()), abs=1e-12)


def test_auroc_keeps_its_digits_with_many_images_and_scores_that_a_bin_would_merge():
    g = draw()
    labels = torch.randint(2, (200_000,), generator=g)
    scores = torch.sigmoid(torch.randn(200_000, generator=g, dtype=torch.float64) / 1e6 + labels / 1e6)
    assert auroc(scores, labels) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_of_a_reversed_shortcut_is_below_a_half():
    assert auroc(torch.tensor([.1, .2, .8, .9]), torch.tensor([1, 1, 0, 0])) == 0
    assert auroc(torch.ones(4), torch.tensor([1, 0, 0, 0])) == 0.5


def test_auroc_refuses_a_missing_class_and_what_is_no_score_or_label():
    with pytest.raises(UsageError, match="both classes: 0 are of class 0, 3 of class 1; take a larger --limit"):
        auroc(torch.rand(3), torch.ones(3))
    for scores, labels in ((torch.tensor([math.nan, 1]), torch.tensor([0, 1])), (torch.rand(2), torch.tensor([0, 2]))):
        with pytest.raises(ValueError):
            auroc(scores, labels)


# ---------------------------------------------------------------- intervals
def test_wilsons_interval_is_the_one_computed_by_hand():
    # 8 of 10: (0.8 + 0.19208 -+ 1.96 * sqrt(0.016 + 0.009604)) / 1.38416; tables, with 1.959964: 0.49016 and 0.94332
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    # none and all of n: z^2 / (n + z^2) from the end
    assert wilson(0.0, 10) == (0, pytest.approx(3.8416 / 13.8416)) and wilson(1.0, 10) == (pytest.approx(10 / 13.8416), 1)


@pytest.mark.parametrize("share, n", ((0.0, 1), (0.0, 10), (0.3, 10), (0.97, 200), (1.0, 25)))
def test_wilsons_interval_solves_its_equation_and_never_leaves_0_to_1(share, n):
    for end in wilson(share, n):
        assert 0 <= end <= 1 and (end - share) ** 2 == pytest.approx(1.96 ** 2 * end * (1 - end) / n, abs=1e-12)


# ---------------------------------------------------------------- foreground
def test_pixel_counts_of_the_foreground_are_those_of_a_loop():
    g = draw()
    maps, masks = torch.rand(2, 3, 4, 4, generator=g), torch.randint(2, (2, 9, 9), generator=g)
    large = F.interpolate(maps, (9, 9), mode="bilinear", align_corners=True)
    for b, counts in enumerate(foreground_counts(maps, masks)):
        expected = [0, 0, 0, 0]
        for y in range(9):
            for x in range(9):
                found, true = large[b, :, y, x].argmax().item() != 2, masks[b, y, x].item() == 1
                expected[{(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[found, true]] += 1
        assert counts.tolist() == expected


def test_ious_are_scikit_learns_jaccard_scores_over_all_pixels_and_over_each_image():
    g = draw(1)
    true, found = torch.rand(6, 10, 10, generator=g) < 0.3, torch.rand(6, 10, 10, generator=g) < 0.4
    counts = torch.stack([(a & b).flatten(1).sum(1) for a, b in ((found, true), (found, ~true), (~found, true), (~found, ~true))], 1)
    flat, score = lambda x: x.flatten().numpy(), sklearn.metrics.jaccard_score
    assert foreground_ious(counts) == pytest.approx({
        "foreground_iou": score(flat(true), flat(found)), "background_iou": score(flat(~true), flat(~found)),
        "foreground_iou_mean": np.mean([score(flat(t), flat(f)) for t, f in zip(true, found)])}, abs=1e-14)


def test_a_large_bird_weighs_more_in_the_pooled_iou_and_not_in_the_mean():
    ious = foreground_ious(torch.tensor([[90, 5, 5, 0], [1, 1, 2, 96]]))      # 0.9 on 100 pixels, 0.25 on 4
    assert ious["foreground_iou"] == pytest.approx(91 / 104) and ious["foreground_iou_mean"] == pytest.approx((0.9 + 0.25) / 2)
    assert ious["background_iou"] == pytest.approx(96 / 109)


def test_images_without_a_bird_count_as_right_only_where_nothing_is_found():
    ious = foreground_ious(torch.tensor([[0, 0, 0, 9], [0, 4, 0, 5]]))
    assert ious["foreground_iou"] == 0 and ious["foreground_iou_mean"] == 0.5 and ious["background_iou"] == 14 / 18


# ---------------------------------------------------------------- centroids and clusters
def test_centroids_are_weighted_means_of_whole_indices_without_the_background():
    maps = torch.rand(3, 4, 5, 7, generator=draw())
    found = part_centroids(maps, 70)
    assert found.shape == (3, 3, 2) and found.dtype == torch.float64
    for b in range(3):
        for k in range(3):
            m = maps[b, k].double()
            x = sum(m[i, j].item() * j for i in range(5) for j in range(7)) / m.sum().item() * 70 / 7
            y = sum(m[i, j].item() * i for i in range(5) for j in range(7)) / m.sum().item() * 70 / 5
            assert found[b, k].tolist() == pytest.approx([x, y])
    one = torch.zeros(1, 2, 4, 4)
    one[0, 0, 1, 2] = 0.3                                # row 1, column 2 of cells of 10 pixels: the edge, not the centre
    assert part_centroids(one, 40).tolist() == [[[20, 10]]]


def test_a_map_of_zeros_has_no_centroid():
    maps = torch.zeros(1, 3, 4, 4)
    maps[0, 1, 2, 2] = 1
    found = part_centroids(maps, 40)[0]
    assert found[0].isnan().all() and found[1].tolist() == [20, 20]


def test_the_cluster_of_a_point_is_the_largest_upsampled_map_at_the_pixel_it_lies_in():
    g = draw()
    maps, S = torch.rand(4, 5, 6, 6, generator=g), 42
    points = torch.cat([torch.rand(4, 30, 2, generator=g) * S, torch.ones(4, 30, 1)], 2)
    large = F.interpolate(maps, (S, S), mode="bilinear", align_corners=False)
    expected = [[large[b, :, int(y), int(x)].argmax().item() for x, y, _ in points[b].tolist()] for b in range(4)]
    assert clusters_at(maps, points, S).tolist() == expected


def test_points_on_the_edges_of_the_image_read_its_outermost_pixels():
    maps = torch.zeros(1, 3, 4, 4)
    maps[0, 2], maps[0, 1, 3, 3] = 0.5, 1                # background, but for part 1 in the lower right corner
    points = torch.tensor([[[0., 0, 1], [8, 0, 1], [8, 8, 1], [0, 8, 1]]])
    assert clusters_at(maps, points, 8).tolist() == [[2, 2, 1, 2]]


# ---------------------------------------------------------------- keypoint regression
def a_split(n, seed, K=3, P=4):
    """Landmarks that follow the centroids loosely; some invisible, some parts inactive, some maps empty."""
    g = draw(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    centroids = uniform(n, K, 2) * 80 + 10
    mix = torch.tensor([[.6, .2, .2], [.1, .8, .1], [.3, .3, .4], [0, .5, .5]], dtype=torch.float64)[:P, :K]
    xy = mix @ centroids + 6 * torch.randn(n, P, 2, generator=g, dtype=torch.float64)
    points = torch.cat([xy, (uniform(n, P, 1) < 0.8).double()], 2).float()
    boxes = torch.cat([uniform(n, 2) * 10, 60 + 30 * uniform(n, 2)], 1).float()
    active = uniform(n, K) < 0.7
    centroids[~active & (uniform(n, K) < 0.4)] = math.nan
    return Landmarks(points, boxes, centroids, active, torch.zeros(n, P, dtype=torch.long))


def published_kp(fit, test):
    """The protocol, step by step, with scikit-learn."""
    def relative(s):
        corner, extent = s.boxes[:, None, :2].double().numpy(), s.boxes[:, None, 2:].double().numpy()
        return ((s.centroids.numpy() - corner) / extent, (s.points[..., :2].double().numpy() - corner) / extent,
                s.points[..., 2].numpy() > 0, s.active.numpy())
    x, y, seen, active = relative(fit)
    x2, y2, seen2, active2 = relative(test)
    distances = []
    for p in range(y.shape[1]):
        a, b = x[seen[:, p]].reshape(-1, 2 * x.shape[1]), x2[seen2[:, p]].reshape(-1, 2 * x.shape[1])
        scale, scale_y = StandardScaler().fit(a), StandardScaler().fit(y[seen[:, p], p])
        a, b = scale.transform(a), scale.transform(b)
        a[np.repeat(~active[seen[:, p]], 2, 1)] = 0
        b[np.repeat(~active2[seen2[:, p]], 2, 1)] = 0
        model = LinearRegression(fit_intercept=False).fit(a, scale_y.transform(y[seen[:, p], p]))
        guess = scale_y.inverse_transform(model.predict(b))
        distances.append(np.linalg.norm(guess - y2[seen2[:, p], p], axis=1))
    return np.concatenate(distances).mean()


@pytest.mark.parametrize("n", (300, 12, 5), ids="{} images".format)      # 5: fewer equations than unknowns
def test_the_keypoint_error_is_that_of_scikit_learns_scaler_and_regression(n):
    fit, test = a_split(n, 0), a_split(50, 1)
    assert test.centroids.isnan().any() and (test.points[..., 2] == 0).any()
    assert keypoint_error(fit, test) == pytest.approx(published_kp(fit, test), rel=1e-8)


def test_landmarks_that_are_a_linear_function_of_the_parts_are_found_exactly_in_any_box():
    fit, test = a_split(100, 2), a_split(40, 3)
    for s in (fit, test):
        s.active[:] = True
        s.centroids[:] = torch.rand(s.centroids.shape, generator=draw(len(s.points)), dtype=torch.float64) * 50
        s.points[..., :2] = (s.centroids[:, :1] * 0.25 + s.centroids[:, 1:2] * 0.75).float()
    assert keypoint_error(fit, test) < 1e-6
    moved = test._replace(points=test.points * torch.tensor([2, 2, 1]), boxes=test.boxes * 2, centroids=test.centroids * 2)
    assert keypoint_error(fit, moved) == pytest.approx(keypoint_error(fit, test), abs=1e-7)


def test_parts_that_are_never_active_leave_the_mean_landmark_and_its_distance():
    points = lambda *xy: torch.tensor([[[x, y, 1.]] for x, y in xy])
    boxes, nothing = torch.tensor([[10., 20, 10, 20]]).expand(2, 4), torch.full((2, 2, 2), math.nan, dtype=torch.float64)
    idle, clusters = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.long)
    fit = Landmarks(points((10, 20), (20, 40)), boxes, nothing, idle, clusters)           # (0, 0) and (1, 1) of the box
    test = Landmarks(points((15, 30), (18, 38)), boxes, nothing, idle, clusters)          # (.5, .5) and (.8, .9)
    assert keypoint_error(fit, test) == pytest.approx((0 + 0.5) / 2)
    test.points[1, 0, 2] = 0                             # invisible: not asked for
    assert keypoint_error(fit, test) == pytest.approx(0)


def test_what_lies_under_an_inactive_part_or_an_invisible_point_changes_nothing():
    fit, test = a_split(60, 4), a_split(30, 5)
    before = keypoint_error(fit, test)
    test.centroids[~test.active] = 1e9
    for s in (fit, test):
        s.points[s.points[..., 2] == 0] = torch.tensor([-7e5, 3e5, 0])
    assert keypoint_error(fit, test) == pytest.approx(before, rel=1e-12)


def test_a_landmark_that_training_never_shows_is_refused_unless_nobody_asks_for_it():
    fit, test = a_split(20, 6), a_split(20, 7)
    fit.points[:, 2, 2] = 0
    with pytest.raises(ValueError, match="no training image shows landmark 3"):
        keypoint_error(fit, test)
    test.points[:, 2, 2] = 0
    assert keypoint_error(fit, test) > 0
    test.points[..., 2] = 0
    with pytest.raises(ValueError, match="no landmark is visible"):
        keypoint_error(fit, test)


def test_scales_leave_nan_out_and_columns_that_do_not_vary_alone():
    x = torch.tensor([[1, 0.1, math.nan, math.nan], [2, 0.1, 5, math.nan], [6, 0.1, 9, math.nan]], dtype=torch.float64)
    mean, deviation = scale_of(x)
    assert mean.tolist() == pytest.approx([3, 0.1, 7, 0])
    assert deviation.tolist() == pytest.approx([math.sqrt(14 / 3), 1, 2, 1])


# ---------------------------------------------------------------- clusterings
LABELLINGS = [torch.randint(a, (n,), generator=draw(a * b + n)) * 3 for a, b, n in ((9, 1, 500), (15, 2, 500), (2, 3, 500), (1, 4, 500))]
LABELLINGS += [torch.arange(500), torch.arange(500) // 100]


@pytest.mark.parametrize("i", range(len(LABELLINGS)))
@pytest.mark.parametrize("j", range(len(LABELLINGS)))
def test_nmi_and_ari_are_those_of_scikit_learn(i, j):
    a, b = LABELLINGS[i], LABELLINGS[j]
    assert nmi(a, b) == pytest.approx(sklearn.metrics.normalized_mutual_info_score(a, b), abs=1e-12)
    assert ari(a, b) == pytest.approx(sklearn.metrics.adjusted_rand_score(a, b), abs=1e-12)


def test_names_of_clusters_do_not_matter_and_a_split_cluster_costs():
    a = torch.tensor([0, 0, 1, 1])
    assert nmi(a, 7 - a) == pytest.approx(1) and ari(a, 7 - a) == 1
    split = torch.tensor([0, 0, 1, 2])                   # information ln 2 over the mean of ln 2 and 1.5 ln 2
    assert nmi(a, split) == pytest.approx(1 / 1.25)
    assert ari(a, split) == pytest.approx((1 - 1 / 3) / (1.5 - 1 / 3))        # pairs together: 2, 1, both 1, of 6
    across = torch.tensor([0, 1, 0, 1])
    assert nmi(a, across) == pytest.approx(0, abs=1e-12) and ari(a, across) == pytest.approx(-0.5)


def test_one_point_and_one_cluster_agree():
    for a in (torch.tensor([3]), torch.tensor([3, 3, 3])):
        assert nmi(a, a) == 1 and ari(a, a) == 1
    assert nmi(torch.zeros(4), torch.arange(4)) == 0 and ari(torch.zeros(4), torch.arange(4)) == 0


def test_pairs_of_as_many_points_as_cub_has_do_not_overflow():
    a = torch.randint(15, (70_000,), generator=draw())
    b = torch.where(torch.rand(70_000, generator=draw(1)) < 0.5, a, torch.randint(9, (70_000,), generator=draw(2)))
    assert ari(a, b) == pytest.approx(sklearn.metrics.adjusted_rand_score(a, b), rel=1e-12)


# ---------------------------------------------------------------- boxes and images
def test_the_box_follows_the_picture_and_only_its_corner_is_cut():
    view = transforms.View(Image.new("RGB", (200, 100)), box=(10, 20, 150, 60))
    transforms.centre(view, 50)                                # 100 x 50, of which 25 columns go on the left
    assert view.box.tolist() == [0, 10, 75, 30]
    view = transforms.View(Image.new("RGB", (200, 100)), box=(10, 20, 150, 60))
    view.flip()
    assert view.box.tolist() == [40, 20, 150, 60]
    view.affine(90, (0, 0), 1.0)                         # the centre of the box is 15 right of the centre: now below it
    assert view.box == pytest.approx([70, -10, 60, 150])


@pytest.fixture(scope="module")
def model():
    """Untrained, with prototypes at features of an image, so that its parts lie somewhere."""
    torch.manual_seed(0)
    model = ifam.IFAM(2, 3, "mini", 96).eval()
    with torch.no_grad():
        tokens = model.selector.backbone(split(limit=1)[0]["image"][None])[0, model.selector.backbone.prefix:]
        model.selector.prototypes.copy_(tokens[[20, 60, 78, 130]])
    return model


def split(name="test", limit=12):
    return data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=limit, splits=(name,))[name]


def test_boxes_are_those_of_the_file_and_every_visible_keypoint_of_the_miniature_lies_in_its_box():
    samples = split()
    for i in range(len(samples)):
        before = list(samples.boxes[i])
        sample = samples[i]
        x, y, width, height = sample["box"].tolist()
        at = sample["points"][sample["points"][:, 2] > 0]
        assert (at[:, 0] >= x - 1).all() and (at[:, 0] <= x + width + 1).all()
        assert (at[:, 1] >= y - 1).all() and (at[:, 1] <= y + height + 1).all()
        assert samples.boxes[i] == before and "box" not in samples[0, i]


def test_boxes_are_read_by_image_id_and_a_row_that_is_missing_is_named(tmp_path):
    assert cub.annotations(tmp_path, ["7"], ["a.jpg"]) == {"masks": None, "points": None, "boxes": None, "attributes": [(tmp_path, "7")]}
    (tmp_path / "bounding_boxes.txt").write_text("9 1.0 2.0 3.0 4.0\n7 60.0 27.0 325.0 304.0\n")
    annotations = lambda *images: cub.annotations(tmp_path, *images)
    assert annotations(["7", "9"], ["a.jpg", "b.jpg"])["boxes"] == [[60, 27, 325, 304], [1, 2, 3, 4]]
    with pytest.raises(UsageError, match="bounding_boxes.txt has no row of image 8; unpack CUB again"):
        annotations(["7", "8"], ["a.jpg", "b.jpg"])


class Selector:
    """Looks at nothing and remembers what it was shown."""
    def __init__(self):
        self.shown = []

    def __call__(self, images):
        self.shown.append(images)
        maps = torch.full((len(images), 3, 4, 4), 0.1)
        maps[:, 0, 1, 1], maps[:, 1, 2, 2] = 0.9, 0.5
        return ifam.Selection(None, maps, None, None)


@pytest.mark.parametrize("normalise", (False, True))
def test_the_selector_is_shown_raw_pixels_unless_normalisation_is_asked_for(normalise):
    samples, selector = split(), Selector()
    found = landmarks(selector, samples, normalise, batch=8)
    shown = torch.cat(selector.shown)
    mean, std = (torch.tensor(x)[:, None, None] for x in transforms.IMAGENET)
    expected = torch.stack([samples[i]["image"] for i in range(len(samples))])           # not changed by the call
    torch.testing.assert_close(shown, expected if normalise else expected * std + mean, atol=1e-6, rtol=1e-5)
    assert samples.masks is not None and found.active.tolist() == [[True, False]] * len(samples)      # 0.5 is not above a half
    assert torch.equal(found.points[3], samples[3]["points"]) and torch.equal(found.boxes[3], samples[3]["box"])


def test_the_report_has_the_localisation_of_the_protocol(model):
    samples, train = split(), split("train", 20)
    result = predict.predict(model, samples)
    found = evaluate.localisation(model, result, samples, train)
    assert set(found) == {"foreground_iou", "foreground_iou_mean", "background_iou", "kp", "nmi", "ari", "kp_normalise"}
    test, fit = (landmarks(model.selector, s) for s in (samples, train))
    assert found["kp"] == pytest.approx(published_kp(fit, test), rel=1e-6) and found["kp_normalise"] is False
    part, name = zip(*[(c, p) for row, at in zip(test.clusters.tolist(), test.points.tolist())
                       for p, (c, xyv) in enumerate(zip(row, at)) if xyv[2]])
    assert len(set(part)) > 2
    assert found["nmi"] == pytest.approx(sklearn.metrics.normalized_mutual_info_score(name, part), abs=1e-12)
    assert found["ari"] == pytest.approx(sklearn.metrics.adjusted_rand_score(name, part), abs=1e-12)
    assert evaluate.localisation(model, result, samples, train, True)["kp_normalise"] is True


def test_the_batch_changes_no_keypoint_metric(model):
    samples, train = split(), split("train")
    one, many = (evaluate.localisation(model, {}, samples, train, batch=b) for b in (1, 7))
    assert one == pytest.approx(many, rel=1e-4)


@pytest.mark.parametrize("spoil, words", [
    (lambda s, t: setattr(t, "points", None), "no keypoints on disk"), (lambda s, t: setattr(s, "boxes", None), "bounding_boxes.txt"),
    (lambda s, t: setattr(t, "points", [p * [1, 1, 0] for p in t.points]), "no training image shows landmark 1")],
    ids=("keypoints", "boxes", "a landmark"))
def test_a_keypoint_regression_that_cannot_be_done_is_null_and_the_table_says_why(spoil, words, model):
    samples, train = split(), split("train")
    spoil(samples, train)
    found = evaluate.localisation(model, {}, samples, train)
    assert found["kp"] is None and words in found["kp_skipped"] and found["nmi"] is not None


def test_training_images_that_are_not_all_on_disk_are_not_used_and_the_table_says_so(model):
    train = split("train", 4)
    train.paths[-1] = train.paths[-1].with_name("gone.jpg")
    report = evaluate.evaluate(model, split(limit=2), train, leakage=1)
    assert "no keypoint regression: the training images" in evaluate.table(report) and json.dumps(report, allow_nan=False)
    assert "place_of_mask" not in report["leakage"]


def test_without_annotations_or_parts_there_is_no_localisation(model):
    samples = split(limit=3)
    samples.masks = samples.points = samples.boxes = None
    assert evaluate.localisation(model, predict.predict(model, samples), samples) == {}
    erm = copy.copy(model)
    erm.selector = None
    assert evaluate.localisation(erm, {}, split(limit=3)) == {}
