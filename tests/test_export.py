"""Trained models for other programs: the static path against the packed one, torch.export, ONNX, safetensors files."""
import json
from dataclasses import asdict

import pytest
import torch
from conftest import agrees
from models import pictures, tiny
from tiny import fails, train

import evaluate
import ifam
import interventions
import intervene
import runs
from baselines import METHODS, build
from settings import UsageError, parse

CASES = {**{method: (method,) for method in METHODS}, "soft": ("ifam", "--hardness", "soft"),
         "late": ("ifam", "--masking", "late", "--pooling", "mean"), "mean": ("ifam", "--pooling", "mean"),
         "small selector": ("ifam", "--selector-size", "48", "--selector-arch", "mini/2"),
         "three backgrounds": ("ifam", "--backgrounds", "3")}


def model_of(case):
    """A random model of a method, whose parts differ, and inputs for it."""
    cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", "--method", *CASES[case]], runs.preset)
    torch.manual_seed(0)
    model = build(asdict(cfg), 2).eval()
    if model.selector is not None:
        torch.nn.init.normal_(model.selector.prototypes, std=0.5)
    keep = (torch.rand(2, 144) < 0.4).float()
    return model, (pictures(2, 96), keep) if model.needs_truth else (pictures(2, 96),)


def same(ours, out, rel=1e-5):
    """(logits, maps, keep) are those of an Output."""
    for x, expected in zip(ours, (out.logits, out.maps, out.keep), strict=True):
        assert (x is None) == (expected is None)
        if x is not None:
            agrees(x, expected, rel)


# ---------------------------------------------------------------- fixed shapes
@pytest.mark.parametrize("case", CASES)
def test_the_static_path_equals_the_packed_one_and_draws_no_graph(case):
    model, inputs = model_of(case)
    with torch.no_grad():
        out = model(*inputs)
    found = ifam.Static(model.train())(*inputs)          # for evaluation, whatever the model is doing
    same(found, out)
    assert model.training and not any(x.requires_grad for x in found if x is not None)
    assert all(vit.packed for vit in model.modules() if isinstance(vit, ifam.ViT))      # the model itself is as it was


@pytest.mark.parametrize("share", [0, 1])
def test_images_that_keep_nothing_or_everything_are_no_exception(share):
    model, keep = tiny(), torch.full((3, 25), float(share))
    with torch.no_grad():
        same(ifam.Static(model)(pictures(), keep), model(pictures(), keep))


def test_it_shares_its_weights_and_has_the_intervention_of_the_model():
    model = tiny()
    before = ifam.Static(model)(pictures())
    model.selector.limits = ifam.limits_of(4, [int(before[1][:, :-1].mean((0, 2, 3)).argmax())])
    without = ifam.Static(model)
    with torch.no_grad():
        same(without(pictures()), model(pictures()))
        assert not torch.equal(without(pictures())[2], before[2])
        model.predictor.head.weight.mul_(2)
        same(without(pictures()), model(pictures()))
    assert sum(p.untyped_storage().data_ptr() not in {q.untyped_storage().data_ptr() for q in model.parameters()}
               for p in without.parameters()) == 0


def test_a_grid_that_is_not_known_yet_is_said():
    model = tiny()
    model.selector.backbone.grid_is_known = False
    with pytest.raises(ValueError, match="run the model on images first"):
        ifam.Static(model)


@pytest.mark.parametrize("case", ["ifam", "early-truth", "early-found", "pdiscoformer", "ep"])
def test_one_graph_holds_the_whole_model(case):
    model, inputs = model_of(case)
    torch._dynamo.reset()
    with torch.no_grad():
        same(torch.compile(ifam.Static(model), fullgraph=True, backend="eager")(*inputs), model(*inputs))


# ---------------------------------------------------------------- files of programs
@pytest.mark.parametrize("case", ["ifam", "small selector", "three backgrounds", "early-truth", "late-found", "pdiscoformer", "aim"])
def test_an_exported_program_gives_the_models_outputs(case, tmp_path):
    model, inputs = model_of(case)
    runs.export(model, tmp_path / "model.pt2", batch=2)
    program = torch.export.load(tmp_path / "model.pt2")
    with torch.no_grad():
        same(program.module()(*inputs), model(*inputs))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    with pytest.raises(Exception, match="(?i)guard|shape|size"):                 # so many images, and no others
        program.module()(*(x[:1] for x in inputs))


@pytest.mark.parametrize("case", ["ifam", "soft", "early-truth", "erm"])
def test_an_onnx_file_gives_the_models_outputs(case, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = model_of(case)
    runs.export(model, tmp_path / "model.onnx", batch=2)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [x.name for x in session.get_inputs()] == ["images", "keep"][:len(inputs)]
    found = session.run(None, {name: x.numpy() for name, x in zip(("images", "keep"), inputs)})
    with torch.no_grad():
        out = model(*inputs)
    there = {"logits": out.logits, "maps": out.maps, "kept" if model.needs_truth else "keep": out.keep}
    there = {name: x for name, x in there.items() if x is not None}
    assert [x.name for x in session.get_outputs()] == [*there]
    for x, expected in zip(found, there.values(), strict=True):
        agrees(torch.from_numpy(x), expected, 1e-4)


@pytest.mark.parametrize("name, missing, words", [
    ("model.pth", "", ".pt2, .onnx or .safetensors"), ("model.onnx", "onnxscript", "pip install onnx onnxscript"),
    ("nowhere/model.pt2", "", "nowhere is no folder"), ("model.safetensors", "", "only a model of a checkpoint")])
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(name, missing, words, tmp_path, monkeypatch):
    there = runs.find_spec
    monkeypatch.setattr(runs, "find_spec", lambda package: None if package == missing else there(package))
    with pytest.raises(UsageError, match=words):
        runs.export(tiny(), tmp_path / name)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- safetensors
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a moving average, and its best.pt as a safetensors file beside it."""
    folder = train(tmp_path_factory.mktemp("run") / "a", "--ema", 0.9)
    runs.export(runs.load(folder / "best.pt"), folder / "best.safetensors")
    return folder


def test_a_safetensors_file_is_the_checkpoint(trained):
    (model, then), (found, now) = (runs.load_model(trained / f"best.{kind}") for kind in ("pt", "safetensors"))
    for name, x in model.state_dict().items():
        assert torch.equal(x, found.state_dict()[name]), name
    assert {name: now[name] for name in runs.DESCRIPTION} == {name: then[name] for name in runs.DESCRIPTION}
    ours, again = (runs.load(trained / f"best.{kind}") for kind in ("pt", "safetensors"))
    assert (again.classes, again.places, again.pipeline) == (ours.classes, ours.places, ours.pipeline)
    assert again.classes == ("landbird", "waterbird")


def test_the_package_reads_it_with_settings_as_json(trained):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(trained / "best.safetensors", "pt") as file:
        said = {name: json.loads(text) for name, text in file.metadata().items() if name != "sha256"}
        state = torch.load(trained / "best.pt")
        assert {"config", "step", "best", "dataset"} <= said.keys() and all(said[name] == state[name] for name in said)
        assert all(torch.equal(file.get_tensor(name), x) for name, x in state["model"].items())


def test_the_content_of_last_pt_is_written_with_its_moving_average(trained, tmp_path):
    state = torch.load(trained / "last.pt")
    runs.save_safetensors(state, tmp_path / "last.safetensors")
    found = runs.read_checkpoint(tmp_path / "last.safetensors")
    assert "optimizer" not in found and all(torch.equal(x, found["model"][name]) for name, x in state["ema"].items())


def test_evaluation_and_interventions_take_it_and_tell_it_from_others(trained, tmp_path, capsys):
    reports = []
    for kind in ("pt", "safetensors"):
        evaluate.main(["--ckpt", str(trained / f"best.{kind}"), "--limit", "4", "--leakage", "2", "--out", str(tmp_path / f"{kind}.json")])
        reports.append(json.loads((tmp_path / f"{kind}.json").read_text()))
    checkpoints = [report.pop("checkpoint") for report in reports]
    assert reports[0] == reports[1] and checkpoints[0]["epoch"] == checkpoints[1]["epoch"]
    assert checkpoints[1]["sha256"] == runs.hash_of(trained / "best.safetensors") != checkpoints[0]["sha256"]
    ckpt, out = str(trained / "best.safetensors"), str(tmp_path / "intervention.json")
    intervene.main(["--ckpt", ckpt, "--limit", "4", "--drop", "0", "--out", out])
    model = runs.load(ckpt)
    assert interventions.apply_intervention(model, out, ckpt)["drop"] == [0] and model.selector.limits[0] == -float("inf")
    with pytest.raises(UsageError, match="on another checkpoint"):
        interventions.apply_intervention(model, out, trained / "best.pt")


def test_a_bit_that_flipped_is_seen_in_a_tensor_and_in_the_settings(trained, tmp_path, capsys):
    content = (trained / "best.safetensors").read_bytes()
    for at in (len(content) - 5, content.index(b"waterbirds"), content.index(b'"batch') + 12, 12):
        (tmp_path / "x.safetensors").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        line = fails(evaluate.main, "--ckpt", tmp_path / "x.safetensors")(capsys)
        assert "damaged" in line, (at, line)
    (tmp_path / "x.safetensors").write_bytes(content[:-9])
    assert "damaged" in fails(evaluate.main, "--ckpt", tmp_path / "x.safetensors")(capsys)


def test_it_is_no_backbone_and_resuming_needs_last_pt(trained, capsys):
    from train import main
    line = fails(main, "--data", "waterbirds", "--mini", "--weights", trained / "best.safetensors", "--out", trained / "b")(capsys)
    assert "is a checkpoint of train.py, a whole model" in line
