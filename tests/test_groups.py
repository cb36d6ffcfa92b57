"""Groups that nobody labelled: errors, clusters and backgrounds, against slower ways and planted ones; no label of a place is read."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch

import data
import groups
import runs
import train as training
from benchmarks.files import read_groups
from measure import clusters, tables
from measure.metrics import ari
from models import pictures, tiny
from settings import UsageError
from tiny import fails, train


def blobs(sizes=(400, 30), dims=6, distance=8.0, seed=0):
    """Planted rows -> (x (n, dims), blob of each), shuffled."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    own = own[torch.randperm(len(own), generator=generator)]
    centres = distance * torch.randn(len(sizes), dims, generator=generator)
    return centres[own] + torch.randn(len(own), dims, generator=generator), own


# ---------------------------------------------------------------- clusters
@pytest.mark.parametrize("sizes", [(400, 30), (55, 1045), (100, 60, 40), (30, 30, 30, 30)])
def test_planted_blobs_are_found_and_numbered_from_the_largest(sizes):
    x, own = blobs(sizes)
    found, score = clusters.cluster(x)
    assert ari(found, own) == 1 and score > 0.5
    assert found.bincount().tolist() == sorted(sizes, reverse=True)
    again, same = clusters.cluster(x)
    assert torch.equal(found, again) and score == same


def test_a_narrow_and_a_wide_cluster_on_one_line_are_told_apart():
    """Hardness is like that: most images are easy, and few are hard and spread out; k-means would halve the many."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1000, 1, generator=generator), -9 + 3 * torch.randn(60, 1, generator=generator)])
    found, _ = clusters.cluster(x)
    assert ari(found, (torch.arange(1060) >= 1000).long()) > 0.9


def test_the_number_of_clusters_may_be_given_and_one_that_cannot_be_filled_is_none():
    x, _ = blobs((40, 40))
    assert clusters.cluster(x, 3)[0].unique().tolist() == [0, 1, 2]
    for rows in (torch.ones(20, 3), torch.randn(2, 3), torch.randn(1, 3)):
        found, score = clusters.cluster(rows)
        assert score is None and not found.any() and len(found) == len(rows)


def test_densities_are_those_of_torch_and_no_round_of_a_start_lowers_the_likelihood(monkeypatch):
    x = blobs((60, 40), dims=3)[0].double()
    likelihoods = []
    for steps in range(1, 9):
        monkeypatch.setattr(clusters, "STEPS", steps)
        likelihood, (share, mean, variance) = clusters.fit_mixture(x, 2, torch.Generator().manual_seed(1))
        likelihoods.append(likelihood)
    d = torch.distributions
    each = d.Independent(d.Normal(mean, variance.sqrt()), 1)
    true = each.log_prob(x[:, None]) + share.log() + 1.5 * torch.log(torch.tensor(2 * torch.pi))
    assert torch.allclose(clusters.log_density(x, (share, mean, variance)), true, atol=1e-9)
    assert all(b >= a - 1e-12 for a, b in zip(likelihoods, likelihoods[1:]))


def test_silhouettes_are_those_of_the_definition():
    x, own = blobs((12, 7, 1), dims=2, distance=2.0)
    x, means = x.double(), []
    for c in range(3):
        values = []
        for i in (own == c).nonzero()[:, 0].tolist():
            far = lambda k: [(x[i] - x[j]).norm().item() for j in range(len(x)) if own[j] == k and j != i]
            a, b = sum(far(c)) / max(1, len(far(c))), min(sum(far(k)) / len(far(k)) for k in range(3) if k != c)
            values.append((b - a) / max(a, b) if len(far(c)) else 0.0)
        means.append(sum(values) / len(values))
    assert abs(clusters.silhouette(x, own) - sum(means) / 3) < 1e-12


def test_large_clusters_are_compared_by_a_fixed_number_of_rows(monkeypatch):
    x, own = blobs((300, 200))
    whole = clusters.silhouette(x.double(), own)
    monkeypatch.setattr(clusters, "COMPARED", 50)
    assert abs(clusters.silhouette(x.double(), own) - whole) < 0.05


# ---------------------------------------------------------------- of a model
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained ifam on 64 images of the miniature, whose parts and background differ: it is wrong about half."""
    folder = tmp_path_factory.mktemp("groups")
    cfg = runs.Config(**{**runs.preset({"mini": True}), "mini": True, "limit": 64})
    torch.manual_seed(0)
    model = training.start_model(cfg, 2).eval()
    image = data.load("waterbirds", data.find_root("waterbirds", "data", True), 96, limit=1, splits=("train",))["train"][0]["image"]
    with torch.no_grad():                                # a patch in the corner is background
        model.selector.prototypes.copy_(model.selector.features(image[None])[0, [54, 66, 78, 90, 0]])
    runs.save(folder / "best.pt", 0, cfg, 0, {"split": "val", "epoch": 0, "accuracy": None}, {"model": model})
    return folder


def written(run, *flags, by, name="g"):
    """Run groups.py -> (path of its csv, what it says of it)."""
    out = run / f"{name}-{by}.csv"
    groups.main(["--ckpt", str(run / "best.pt"), "--by", by, "--out", str(out), "--device", "cpu", *map(str, flags)])
    return out, json.loads(out.with_suffix(".json").read_text())


def opened(run):
    """-> (the model of a run, its training split)"""
    model, state = runs.load_model(run / "best.pt")
    cfg = groups.Config(ckpt=str(run / "best.pt"), by="errors")
    return model, groups.training_split(cfg, state)


def test_wrong_are_exactly_the_samples_that_the_checkpoint_gets_wrong_in_the_evaluation_view(run, capsys):
    out, said = written(run, by="errors")
    model, samples = opened(run)
    with torch.no_grad():
        wrong = [samples[i]["id"] for i in range(len(samples)) if model(samples[i]["image"][None]).logits.argmax(1) != samples.labels[i]]
    names, read = read_groups(out, samples)
    assert names == ["right", "wrong"] and [name for name, g in zip(samples.ids, read) if names[g] == "wrong"] == wrong
    assert said["groups"] == {"right": 64 - len(wrong), "wrong": len(wrong)} and said["by"] == "errors"
    assert said["checkpoint"] == {"file": "best.pt", "sha256": runs.hash_of(run / "best.pt")} and said["sha256"] == runs.hash_of(out)
    assert "adjusted Rand index" in capsys.readouterr().out


@pytest.mark.parametrize("logits, words", [([0.0, 1.0], "has nothing wrong"), ([1.0, 0.0], "has everything wrong")])
def test_an_empty_error_set_is_one_line_that_says_what_to_do(logits, words, monkeypatch):
    samples = SimpleNamespace(labels=torch.ones(4).long(), answers=lambda logits: logits.argmax(1))
    monkeypatch.setattr(groups, "predict", lambda *how, **more: {"logits": torch.tensor([logits] * 4)})
    with pytest.raises(UsageError, match=f"best.pt {words} in training.*epochs"):
        groups.by_errors(None, samples, groups.Config(ckpt="best.pt", by="errors"))


def test_clusters_part_each_class_and_planted_ones_are_found(monkeypatch):
    """Of two classes by the distance to the boundary, of more by what the head reads."""
    for classes in (("cat", "dog"), ("cat", "dog", "fox")):
        labels = torch.arange(300) % len(classes)
        hard = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.1
        samples = SimpleNamespace(classes=classes, labels=labels, outputs=len(classes), name="zoo", __len__=None)
        samples = type("Split", (SimpleNamespace,), {"__len__": lambda self: 300})(**vars(samples))
        noise = torch.randn(300, 5, generator=torch.Generator().manual_seed(2))
        margin = noise[:, 0] + (2 * labels - 1) * torch.where(hard, -5., 5.)
        monkeypatch.setattr(groups, "predict", lambda *how, **more: {"logits": torch.stack([-margin, margin], 1)})
        monkeypatch.setattr(groups, "read_by_head", lambda *how, **more: noise + 12 * labels[:, None] + 9 * hard[:, None])
        names, scores = groups.by_clusters(None, samples, groups.Config(ckpt="x", by="clusters"))
        assert scores.keys() == set(classes)
        number = torch.tensor([int(name[-1]) for name in names])
        for label, name in enumerate(classes):
            mine = labels == label
            assert {n for n, m in zip(names, mine) if m} == {f"{name}, cluster 0", f"{name}, cluster 1"}
            assert ari(number[mine], hard[mine].long()) == 1


@pytest.mark.parametrize("by", ["errors", "clusters", "background"])
def test_true_groups_are_never_read_and_a_second_run_writes_the_same_file(by, run, monkeypatch):
    first, said = written(run, by=by)
    true = groups.training_split

    def shuffled(cfg, state):
        samples = copy.copy(true(cfg, state))
        samples.groups = samples.groups[torch.randperm(len(samples), generator=torch.Generator().manual_seed(3))]
        return samples
    monkeypatch.setattr(groups, "training_split", shuffled)
    second, other = written(run, by=by, name="h")
    assert first.read_bytes() == second.read_bytes()
    assert other["adjusted_rand_index_measured"] != said["adjusted_rand_index_measured"]


def test_backgrounds_are_read_from_refused_patches_alone():
    """No pixel of a kept patch moves the features, to the bit; they are those of the dense masked pass."""
    for settings in ({}, {"selector_size": 42}):
        model, images = tiny(**settings), pictures(4)
        keep = torch.zeros(4, 25)
        keep[:, 6:9] = keep[:, 11:14] = keep[:, 16:19] = 1
        keep[3] = 1                                      # nothing is refused
        model.mask = lambda first: keep
        samples = lambda x: [{"image": image} for image in x]
        measure = lambda x: groups.backgrounds(model, type("S", (list,), dict(name="s", split="train"))(samples(x)))
        features, share = measure(images)
        assert share[3] == 0 and not features[3].any() and (0 < share[:3]).all() and (share[:3] < 1).all()
        own = torch.nn.functional.interpolate(keep.view(4, 1, 5, 5), model.selector.backbone.grid, mode="nearest-exact").flatten(1)
        model.selector.backbone.packed = False
        with torch.no_grad():
            patches = model.selector.backbone(model.selector.shrink(images), 1 - own)[:, model.selector.backbone.prefix:]
        for i in range(3):
            assert torch.allclose(features[i], patches[i][own[i] == 0].mean(0), atol=1e-5)
        model.selector.backbone.packed = True
        if not settings:                                 # a smaller stage 1 sees pixels of neighbours when it shrinks
            inside = keep.view(4, 1, 5, 5).repeat_interleave(14, 2).repeat_interleave(14, 3) > 0
            moved, _ = measure(torch.where(inside, pictures(4, seed=9), images))
            assert torch.equal(features[:3], moved[:3])


def test_backgrounds_are_crossed_with_the_class_and_images_without_one_go_with_the_most(monkeypatch, capsys):
    x, place = blobs((150, 50))
    share = torch.full((200,), 0.8)
    share[:3] = 0
    labels = torch.arange(200) % 2
    samples = SimpleNamespace(classes=("cat", "dog"), labels=labels, name="zoo")
    monkeypatch.setattr(groups, "backgrounds", lambda *how, **more: (x, share))
    names, scores = groups.by_background(None, samples, groups.Config(ckpt="x", by="background"))
    assert "3 images, of which nothing is refused" in capsys.readouterr().out and scores.keys() == {"background"}
    assert names == [f"{('cat', 'dog')[y]}, background {0 if i < 3 else p}" for i, (y, p) in enumerate(zip(labels.tolist(), place.tolist()))]
    share[:] = 0
    with pytest.raises(UsageError, match="keeps every patch"):
        groups.by_background(None, samples, groups.Config(ckpt="x", by="background"))


def test_a_run_trains_with_the_groups_and_a_model_without_a_mask_has_no_background(run, tmp_path, capsys):
    out, said = written(run, "--clusters", 2, by="background")
    trained = train(tmp_path / "second", "--limit", 64, "--method", "erm", "--objective", "group-dro", "--groups", out)
    first = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert first["images"]["groups"] == said["digest"] and first["objective"]["groups"] == said["groups"]
    assert first["objective"]["source"] == "a first model"                      # whatever the file is called
    line = fails(groups.main, "--ckpt", trained / "best.pt", "--by", "background")(capsys)
    assert "method erm, which learns no mask" in line and not (trained / "groups-background.csv").exists()


def test_groups_that_a_model_made_are_no_labels_and_cost_a_pass():
    report, config = {}, {**vars(runs.Config()), "objective": "group-dro"}
    said = lambda log=None, **more: tables.supervision_text(tables.supervision({**config, **more}, report, log))
    assert said() == said(groups="runs/mine.csv") == "groups: training"
    assert said(groups="runs/ifam-0/groups-background.csv") == "2 passes"        # a run whose log does not say
    assert said({"source": "a first model"}, groups="runs/mine.csv") == "2 passes"
    assert said({"source": "groups"}, groups="runs/ifam-0/groups-background.csv") == "groups: training"
    assert said({"source": "classes"}, data="folder", objective="balanced") == "none"


def test_files_of_others_are_not_replaced_and_flags_that_mean_nothing_are_refused(run, tmp_path, capsys):
    theirs = tmp_path / "list.csv"
    theirs.write_text("name,age\n")
    ask = lambda *flags: fails(groups.main, "--ckpt", run / "best.pt", *flags)(capsys)
    assert "--force" in ask("--by", "errors", "--out", theirs) and theirs.read_text() == "name,age\n"
    assert "ends in .csv" in ask("--by", "errors", "--out", tmp_path / "x.json")
    assert "means nothing with --by errors" in ask("--by", "errors", "--clusters", 2, "--out", tmp_path / "x.csv")
    assert "leave it out" in ask("--by", "errors", "--data", "waterbird200")
