"""evaluate.py sees each image once: the numbers of one pass are those of each measurement by itself, bit for bit."""
import pytest
import torch
from models import TINY

import data
import evaluate
from baselines import build
from ifam import IFAM
from measure.leakage import Seen, measure_leakage, place_of_mask, pool_by_place, stage1_classifier, stage2_classifier
from measure.metrics import landmarks
from predict import predict
from runs import Config

SMALL = dict(TINY, patch=8)


@pytest.fixture(scope="module")
def splits():
    return data.load("cub", data.find_root("cub", "", True), 96, limit=24)


def model(**kind):
    torch.manual_seed(0)
    found = IFAM(20, 4, SMALL, 96, **kind).eval()
    torch.nn.init.normal_(found.selector.prototypes, std=0.5)
    return found


def method(name):
    torch.manual_seed(0)
    return build(vars(Config(method=name, arch=SMALL, size=96, k=4, pooling="mean")), 20).eval()


KINDS = {"two stages": model, "a smaller stage 1": lambda: model(selector_size=72), "soft": lambda: model(hardness="soft"),
         **{name: (lambda name=name: method(name)) for name in ("pdiscoformer", "erm", "late-truth", "early-found")}}


def equal(one, other):
    """Dicts or tuples of tensors: the same bits, NaN included."""
    one, other = (x if isinstance(x, dict) else x._asdict() for x in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].nan_to_num(7e9), other[name].nan_to_num(7e9)), name


@pytest.mark.parametrize("normalise", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_finds_what_each_measurement_finds_alone(kind, normalise, splits):
    model = KINDS[kind]()
    asked = evaluate.wanted(model, splits["test"], splits["train"])
    assert asked == (({"predict", "pools"}, {"pools"}) if model.selector is None else
                     ({"predict", "landmarks", "pools"}, {"landmarks", "pools"}))
    for some, names in zip((splits["test"], splits["train"]), asked):
        found = evaluate.one_pass(model, some, names, normalise, batch=5)
        assert found.keys() == names
        if "predict" in names:
            equal(found["predict"], predict(model, some, batch=5))
        if "landmarks" in names:
            equal(found["landmarks"], landmarks(model.selector, some, normalise, batch=5))
        how = [model.selector.shrink] if model.selector else []
        equal(found["pools"], pool_by_place((model.selector or model.predictor).backbone, some, "cpu", 5, 0, *how))


def test_a_report_is_that_of_measurements_made_one_by_one(splits):
    model, (train, test) = KINDS["two stages"](), (splits["train"], splits["test"])
    report = evaluate.evaluate(model, test, train, leakage=8, batch=5)
    result = predict(model, test, 5)
    assert report["localisation"] == evaluate.localisation(model, result, test, train, batch=5)
    backbone, stages = model.selector.backbone, (stage2_classifier, stage1_classifier)
    alone = [measure_leakage([stage(model, Seen(model.selector))], test, backbone, count=8)[0] for stage in stages]
    assert report["leakage"] == {**alone[0], "place_of_mask": place_of_mask(model, train, test, batch=5)}
    assert report["leakage_stage1"] == alone[1]
    for stage, key in (("stage2", "logits"), ("stage1", "logits_stage1")):
        assert report[stage]["aa"] == (result[key].argmax(1) == test.labels).double().mean().item()


def test_without_what_is_fitted_no_training_image_is_read_and_every_other_number_stays(splits, monkeypatch):
    model, (train, test) = KINDS["two stages"](), (splits["train"], splits["test"])
    whole = evaluate.evaluate(model, test, train, leakage=8, batch=5)
    monkeypatch.setattr(type(train), "__getitem__", lambda self, i, plain=type(train).__getitem__:
                        plain(self, i) if self is not train else pytest.fail("a training image was read"))
    short = evaluate.evaluate(model, test, train, leakage=8, batch=5, fitted=False)
    assert whole["leakage"].pop("place_of_mask") and whole["localisation"].pop("kp") is not None
    assert short["localisation"].pop("kp") is None and "--no-fitted" in short["localisation"].pop("kp_skipped")
    assert short == whole


def test_each_image_is_read_once_and_seen_by_stage_1_once_under_each_normalisation(splits, monkeypatch):
    model, some = KINDS["two stages"](), splits["test"]
    read, seen, plain, forward = [], [], type(some).__getitem__, model.selector.backbone.forward
    monkeypatch.setattr(type(some), "__getitem__", lambda self, i: read.append(i) or plain(self, i))
    monkeypatch.setattr(model.selector.backbone, "forward", lambda images, keep=None: seen.append((keep is None) * len(images))
                        or forward(images, keep))
    for normalise, times in ((False, 2), (True, 1)):
        evaluate.one_pass(model, some, {"predict", "landmarks", "pools"}, normalise, batch=5)
        assert read == list(range(24)) and sum(seen) == times * 24
        read.clear(), seen.clear()


def test_what_nobody_asks_for_is_not_computed(splits):
    model, some = KINDS["two stages"](), splits["test"]
    assert evaluate.one_pass(model, some, set()) == {}
    bare = splits["train"].part("train", range(8))
    bare.points = None
    assert evaluate.wanted(model, some, bare)[1] == set()            # eight images fit nothing
    bare.masks = None
    assert evaluate.wanted(model, some, bare)[0] == {"predict", "landmarks"} and evaluate.wanted(model, some, None)[1] == set()
