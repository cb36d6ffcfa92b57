"""What a selection encodes: planted selections that tell the answer or do not, the evaluator's masks, and the files of --encoding."""
import json

import pytest
import torch

import baselines
import data
import evaluate
import predict
import runs
import train
from benchmarks.samples import balanced
from measure import encoding
from measure import tables
from settings import UsageError, parse, write_json
from tiny import fails
from tiny import train as run


# ---------------------------------------------------------------- a planted selection
SIDE, GRID = 32, 4                                       # 4 x 4 patches of 8 pixels


def planted(count, seed):
    """Noise in which one patch of the two middle columns is bright (class 1) or dark -> images, labels, keep of that patch."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=g)
    images = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=g)
    rows, columns = torch.randint(4, (count,), generator=g), torch.randint(1, 3, (count,), generator=g)
    for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist())):
        images[i, :, 8 * row:8 * row + 8, 8 * column:8 * column + 8] += 4 * labels[i] - 2
    return images, labels, torch.nn.functional.one_hot(4 * rows + columns, 16).float()


class Planted:
    """These images as a split of a benchmark."""
    name, split, group_names, masks, masks_tell, places = "planted", "test", ["dark", "bright"], None, False, ()
    answers = staticmethod(lambda logits: logits.argmax(1))

    def __init__(self, images, labels):
        self.images, self.labels, self.groups = images, labels, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "id": str(i)}


class Own:
    """A model that answers by where its mask is, if asked so, else by how bright the patches are that it sees."""

    def __init__(self, by_place):
        self.by_place = by_place

    def predictor(self, images, keep):
        keep = torch.ones(len(images), 16) if keep is None else keep
        bright = (torch.nn.functional.avg_pool2d(images, 8).mean(1).flatten(1) * keep).sum(1)
        right = keep.unflatten(1, (4, 4))[:, :, 2:].sum((1, 2)) - keep.unflatten(1, (4, 4))[:, :, :2].sum((1, 2))
        return torch.stack([torch.zeros(len(images)), right if self.by_place else bright], 1)


@pytest.fixture(scope="module")
def evaluator():
    """A stage 2 that took the steps of train.py under random masks."""
    cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", "--method", "early-random", "--weights", "none", "--size", str(SIDE),
                                  "--batch", "32", "--lr", "2e-4", "--lr-heads", "1e-3", "--weight-class2", "1", "--warmup", "0"], runs.preset)
    steps = 80
    trainer = train.Trainer(cfg, steps, 0, 1, torch.device("cpu"), 2)
    trainer.model.train()
    for step in range(steps):
        images, labels, _ = planted(32, 1000 + step)
        trainer({"image": images, "label": labels}, step)
    return trainer.model.eval()


@pytest.fixture(scope="module")
def images():
    return planted(200, 0)


def test_a_selection_that_tells_the_class_by_its_place_encodes_half_and_the_model_itself_is_right(evaluator, images):
    pictures, labels, _ = images
    keep = torch.zeros(200, 4, 4)
    keep[labels == 0, :, 0], keep[labels == 1, :, 3] = 1, 1                      # columns without the bright or dark patch
    found = encoding.measure_encoding(Own(True), evaluator, Planted(pictures, labels), keep.flatten(1), batch=64)
    own = found["masks"]["own"]
    assert own["model"]["aa"] == 1 and abs(own["evaluator"]["aa"] - 0.5) < 0.1
    assert abs(found["encoding"] - 0.5) < 0.1 and found["encoding_interval"][0] > 0.35
    assert set(found["masks"]) == {"own", "random", "all"} and found["images"] == 200
    assert sum(x["n"] * x["difference"] for x in found["groups"].values()) / 200 == pytest.approx(found["encoding"])
    assert "encodes: +0." in encoding.summary(found)


def test_an_honest_selection_encodes_nothing_and_its_evaluator_is_a_fair_judge(evaluator, images):
    pictures, labels, keep = images
    found = encoding.measure_encoding(Own(False), evaluator, Planted(pictures, labels), keep, batch=64)
    assert found["masks"]["own"]["model"]["aa"] == 1 and abs(found["encoding"]) < 0.05
    assert found["masks"]["all"]["evaluator"]["aa"] > 0.95
    seen = (baselines.RandomMask.of([str(i) for i in range(200)], 16) * keep).sum().item() / 200     # what no judge can exceed
    assert abs(found["masks"]["random"]["evaluator"]["aa"] - (seen + (1 - seen) / 2)) < 0.1


def test_the_difference_counts_images_in_pairs_and_its_interval_covers_what_is_drawn():
    a, b = torch.tensor([1., 1, 1, 0, 0, 1]), torch.tensor([1., 0, 0, 1, 0, 1])
    found = encoding.difference(a, b)
    assert found["difference"] == pytest.approx(1 / 6) and found["low"] < 1 / 6 < found["high"]
    same = encoding.difference(a, a)
    assert same["difference"] == 0 and same["low"] == -same["high"] < 0
    assert encoding.difference(a[:0], b[:0]) == {"difference": None, "low": None, "high": None}
    g, covered = torch.Generator().manual_seed(0), 0
    for _ in range(1000):                                # both right .5, one .2, the other .1, none .2
        cell = torch.multinomial(torch.tensor([.5, .2, .1, .2]), 80, True, generator=g)
        x = encoding.difference((cell < 2).double(), ((cell == 0) | (cell == 2)).double())
        covered += x["low"] <= 0.1 <= x["high"]
    assert 0.93 <= covered / 1000 <= 0.98


# ---------------------------------------------------------------- the masks of the evaluator
def test_random_masks_have_every_share_and_depend_on_names_or_steps_alone():
    of = baselines.RandomMask.of
    names = [f"picture {i}" for i in range(4000)]
    keep = of(names, 144)
    assert torch.equal(of(names[7:9], 144), keep[7:9]) and set(keep.unique().tolist()) == {0, 1}
    shares = keep.mean(1)
    assert all(abs(((shares >= a) & (shares < a + 0.25)).double().mean() - 0.25) < 0.03 for a in (0, 0.25, 0.5))
    left, right = keep[:, :72].mean(1), keep[:, 72:].mean(1)                     # given its share, patches are independent
    assert (left - right).std() < 0.12 and abs((left - right).mean()) < 0.01


def test_a_step_under_random_masks_is_the_same_in_one_portion_and_in_two():
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=8)["train"]
    batch = torch.utils.data.default_collate([samples[0, i] for i in range(8)])

    def gradient(*flags):
        cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", "--method", "early-random", *flags], runs.preset)
        model = train.build_model(cfg, torch.device("cpu")).train()
        train.gradients(model, cfg, batch, 3)
        return model.predictor.head.weight.grad
    torch.testing.assert_close(gradient(), gradient("--micro", "3"), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradient(), gradient("--seed", "1"), rtol=1e-2)


def test_balanced_training_images_have_every_group_as_often_as_the_largest():
    groups = torch.tensor([3, 0, 0, 0, 0, 0, 3, 1])
    chosen = groups[balanced(groups)]
    assert torch.bincount(chosen).tolist() == [5, 5, 0, 5] and set(balanced(groups).tolist()) == set(range(8))


# ---------------------------------------------------------------- --encoding
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "run", "--limit", 16, "--batch", 8, "--film", 0)


def again(folder):
    """What --encoding measures, without the rest of the report."""
    cfg = parse(evaluate.Config, "", ["--ckpt", str(folder / "best.pt"), "--encoding", "--device", "cpu"])
    model, state = runs.load_model(cfg.ckpt)
    _, samples, _, _ = predict.open_split(cfg, state, model)
    return evaluate.measure_encoding(cfg, model, evaluate.evaluator_of(cfg, state, "cpu"), samples, "cpu")


def test_the_evaluator_is_trained_once_as_the_run_was_and_used_again(trained, capsys):
    evaluate.main(["--ckpt", str(trained / "best.pt"), "--leakage", "16", "--encoding", "--device", "cpu"])
    found = json.loads((trained / "report.json").read_text())["encoding"]
    assert "what the selection encodes" in capsys.readouterr().out
    config, own = (json.loads((folder / "config.json").read_text()) for folder in (trained / "encoding", trained))
    assert config["method"] == "early-random" and all(config[key] == own[key] for key in ("lr", "epochs", "batch", "seed", "size", "weights", "limit", "pooling"))
    assert list(found["masks"]) == ["own", "true", "random", "all"] and found["evaluator"]["sha256"] == runs.hash_of(trained / "encoding" / "best.pt")
    by = {name: mask["difference"] for name, mask in found["masks"].items()}
    assert found["beyond_true"]["difference"] == pytest.approx(by["own"] - by["true"])
    for mask in found["masks"].values():
        assert mask["difference"] == pytest.approx(mask["model"]["aa"] - mask["evaluator"]["aa"])
    report = json.loads((trained / "report.json").read_text())
    assert found["masks"]["own"]["model"]["aa"] == report["stage2"]["aa"]
    written = (trained / "encoding" / "best.pt").stat().st_mtime_ns
    assert again(trained) == found and (trained / "encoding" / "best.pt").stat().st_mtime_ns == written
    row, = tables.read_run(trained)
    assert tables.COLUMNS["encoding"](row[4]) == found["encoding"] and tables.COLUMNS["mask tells, area"](row[4]) is not None


def test_an_evaluator_that_is_not_finished_is_resumed_and_one_of_other_settings_moved_aside(trained, capsys):
    before = again(trained)
    log = trained / "encoding" / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if "finished" not in line))
    assert again(trained) == before and '"finished": true' in log.read_text()
    config = json.loads((trained / "encoding" / "config.json").read_text())
    write_json(trained / "encoding" / "config.json", {**config, "lr": 0.5})
    capsys.readouterr()
    assert again(trained) == before and "moved to" in capsys.readouterr().out
    assert (trained / "encoding.1" / "best.pt").is_file()


@pytest.mark.parametrize("flags", [("--method", "erm"), ("--hardness", "soft"), ("--masking", "late", "--pooling", "mean"), ("--method", "pdiscoformer"),
                                   ("--method", "late-found"), ("--method", "early-random"), ("--method", "ep")], ids=" ".join)
def test_a_model_without_an_early_hard_mask_of_its_own_is_refused_before_anything_is_trained(flags, tmp_path, capsys):
    cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", "--limit", "16", "--out", str(tmp_path), *flags], runs.preset)
    model = train.build_model(cfg, torch.device("cpu"))
    best = {"split": "val", "epoch": 1, "accuracy": 0.5}
    runs.save(tmp_path / "best.pt", 0, cfg, 1, best, {"model": model})
    line = fails(evaluate.main, "--ckpt", tmp_path / "best.pt", "--encoding")(capsys)
    assert "--encoding asks what an early, hard mask tells" in line and [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_a_published_snapshot_does_not_say_how_to_train_an_evaluator(trained):
    cfg = parse(evaluate.Config, "", ["--ckpt", str(trained / "best.pt"), "--encoding"])
    model, state = runs.load_model(cfg.ckpt)
    with pytest.raises(UsageError, match="published snapshot, does not say how"):
        evaluate.check(cfg, model, {**state, "step": None}, Planted(*planted(2, 0)[:2]), {})


@pytest.mark.parametrize("method", ["early-truth", "early-found"])
def test_methods_whose_mask_is_given_are_measured_too(method):
    cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", "--method", method], runs.preset)
    encoding.check(baselines.build(vars(cfg), 2), "it")
