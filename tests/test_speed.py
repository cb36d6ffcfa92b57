"""Operations are those of the formula; short cuts give the same; every mode of the command, and what it refuses."""
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import agrees
from models import TINY, pictures, tiny
from tiny import fails
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import runs
import speed
import train
from benchmarks import transforms
from ifam import Predictor
from settings import parse
from vit import ARCHS, KeepGradient, build_vit

RAGGED = torch.zeros(4, 25)
RAGGED[1, [0, 7, 24]] = 1
RAGGED[2, 3:17] = 1
RAGGED[3] = 1


formula = speed.formula


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_operations_are_those_of_the_formula_and_of_kept_patches_alone(ffn, positions):
    model, x = tiny(arch=dict(TINY, ffn=ffn, depth=3, positions=positions)), pictures(4)
    vit, D = model.predictor.backbone, TINY["width"]
    assert speed.operations(vit, x) == formula(vit, 25)
    assert speed.operations(model.selector, x) == formula(vit, 25) + 2 * (2 * 5 * 25 * D + 4 * D * 3)    # distances, features and classifier
    of_kept = [formula(vit, n, class_only=True) + 2 * D * 3 for n in RAGGED.sum(1).int().tolist()]
    assert speed.operations(model.predictor, x, RAGGED) == sum(of_kept) / 4
    assert speed.operations(model.predictor, x) == of_kept[3]


def test_operations_of_a_late_mask_are_those_of_all_patches():
    model, x = Predictor(build_vit(TINY, 70), 3, masking="late", pooling="mean"), pictures(4)
    assert speed.operations(model, x, RAGGED) >= formula(model.backbone, 25)


def test_operations_of_a_smaller_stage_1_are_its_own():
    assert speed.operations(tiny(selector_size=42).selector, pictures(2)) < 0.5 * speed.operations(tiny().selector, pictures(2))


@torch.no_grad()
def test_a_last_block_that_computes_the_class_token_alone_gives_the_same_class_token():
    torch.manual_seed(0)
    vit, x = build_vit(TINY, 70).double(), pictures(4).double()
    for keep in (None, RAGGED, RAGGED.clone().requires_grad_()):
        agrees(vit(x, keep, class_only=True), vit(x, keep)[:, :1], 1e-12)
    agrees(vit(x, RAGGED * 0.5, hard=False, class_only=True), vit(x, RAGGED * 0.5, hard=False)[:, :1], 1e-12)


def test_its_gradients_are_those_of_the_whole_last_block():
    torch.manual_seed(0)
    vit, x = build_vit(TINY, 70).double(), pictures(4).double()
    found = []
    for rows in (vit(x, keep := RAGGED.double().requires_grad_(), class_only=True), vit(x, other := RAGGED.double().requires_grad_())):
        vit.zero_grad()
        rows[:, 0].square().sum().backward()
        found.append([p.grad.clone() for p in vit.parameters()])
    agrees(keep.grad, other.grad, 1e-10)
    for ours, expected in zip(*found):
        agrees(ours, expected, 1e-10)


def test_some_patches_are_embedded_as_all_of_them_are():
    vit, x = build_vit(TINY, (42, 70)).double(), pictures(2, 42, 70).double()
    keep = torch.rand(2, 15, generator=torch.Generator().manual_seed(0)) < 0.4
    agrees(vit.patch_embed.some(x, keep), vit.patch_embed(x)[keep], 1e-12)


def test_forced_masks_keep_as_many_patches_as_they_are_told():
    counts = speed.forced(0.05, 0.6, 8, 256).sum(1).tolist()
    assert counts[0] == 13 and counts[-1] == 154 and sum(counts) / 8 / 256 == pytest.approx(0.325, abs=0.002)


def test_the_peak_is_what_is_held_at_once():
    def call():
        a = torch.ones(1000, 1000)                       # 4 MB, then 8 MB at once, then 4 MB again
        b = a + 1
        del a
        return b * 2
    assert speed.peak_memory(call, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize("hard", [True, False])
def test_the_memory_of_a_masked_step_does_not_grow_with_queries_times_keys(hard, monkeypatch):
    monkeypatch.setattr(KeepGradient, "CHUNK", 1 << 16)
    bytes_of = []
    for side in (12, 36):                                # 9 times the patches, 81 times the pairs
        vit, x = build_vit(TINY, 14 * side), torch.randn(1, 3, 14 * side, 14 * side)
        keep = torch.ones(1, side ** 2)
        step = lambda: vit(x, keep.clone().requires_grad_(), hard).sum().backward()
        step()                                           # gradients of parameters are there from now on
        bytes_of.append(speed.peak_memory(step, torch.device("cpu")))
    assert bytes_of[1] < 10 * bytes_of[0]


@torch.no_grad()
def test_a_measured_model_is_described_in_full():
    found = speed.measure(tiny(), pictures(2), rounds=1)
    assert found["gflops"]["dense"] * 1e9 == formula(tiny().predictor.backbone, 25)
    assert found["share_of_time"]["stage1"] > 0 and sum(found["share_of_time"][n] for n in ("attention", "feed_forward")) < 1
    assert found["latency_ms"] > 0 and found["peak_bytes"]["model"] > 0 and found["relative_to_dense"] > 0
    assert "images/s" in speed.summary(found)
    json.dumps(found)


# ---------------------------------------------------------------- the command
@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the command with tiny settings -> its numbers, what it printed."""
    monkeypatch.setitem(ARCHS, "mini", dict(TINY, depth=2))

    def call(*flags):
        speed.main([*map(str, flags), *(() if "--gpus" in flags else ("--rounds", "1")), "--out", str(tmp_path / "found.json")])
        return json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    return call


MODEL = ("--arch", "mini", "--device", "cpu")


def test_prediction_is_measured_in_every_case(run):
    found, text = run(*MODEL, "--size", 70, "--batch", 2, "--k", 2)
    rows = found["rows"]
    assert all(name in text for name in rows) and set(speed.CASES) < set(rows) and rows["dense"]["relative_to_dense"] == 1
    assert rows["5 % kept"]["gflops"] < rows["20 % kept"]["gflops"] < rows["100 % kept"]["gflops"]
    assert all(x > 0 for row in rows.values() for x in row.values())


def test_growth_comes_with_its_figure(run, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "STEPS", {"tokens": ("size", (70, 140), {}), "K": ("k", (1, 2), dict(batch=2)), "batch": ("batch", (1, 2), {})})
    found = run(*MODEL, "--scale")[0]["growth"]
    assert found["tokens"]["x"] == [30, 105] and (tmp_path / "found.png").stat().st_size > 10_000
    for what in ("prediction", "training", "prediction, small stage 1", "training, small stage 1"):
        x, y = found["tokens"]["x"], found["tokens"][what]["bytes"]
        assert found["tokens"]["exponents"][what]["bytes"] == pytest.approx(math.log(y[1] / y[0]) / math.log(x[1] / x[0]))


def test_a_step_of_every_variant_is_measured(run):
    rows = run(*MODEL, "--training", "--size", 70, "--batch", 2)[0]["rows"]
    assert list(rows) == list(speed.VARIANTS) and all(math.isfinite(x) and x > 0 for row in rows.values() for x in row.values())
    assert rows["two stages"]["peak_bytes"] > rows["one dense ViT, everything trains"]["peak_bytes"]


def test_checkpoint_is_measured_beside_a_dense_step_without_it_and_needs_less_memory(run, monkeypatch):
    monkeypatch.setitem(ARCHS, "mini", dict(TINY, depth=6))
    flags = (*MODEL, "--training", "--size", 140, "--batch", 2)
    plain, rows = run(*flags)[0]["rows"], run(*flags, "--checkpoint")[0]["rows"]
    dense, *others = speed.VARIANTS
    assert list(rows) == [dense, *(f"{name}, --checkpoint" for name in speed.VARIANTS)]
    assert rows[dense]["peak_bytes"] == pytest.approx(plain[dense]["peak_bytes"], rel=0.02)
    for name in (dense, *others[:2]):
        assert rows[f"{name}, --checkpoint"]["peak_bytes"] < 0.8 * plain[name]["peak_bytes"], name


@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_operations_of_a_training_step_are_what_torch_counts(keep, monkeypatch):
    monkeypatch.setitem(ARCHS, "mini", dict(TINY, width=96, depth=3))
    cfg = speed.Config(arch="mini", size=140, batch=2, keep=keep, k=3)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        speed.make_step(cfg, torch.device("cpu"), speed.VARIANTS["two stages"])()
    model = tiny(140, k=3, classes=2, arch="mini")
    ours = sum(speed.step_operations(model, round(100 * keep)))
    assert ours == pytest.approx(counted.get_total_flops() / 2, rel=1e-4)        # not counted: classifiers, the warp


def test_many_gpus_on_paper_are_arithmetic_that_can_be_done_by_hand(run):
    found, text = run(*MODEL[:2], "--gpus", "--size", 70, "--batch", 3, "--rate", 0.001)
    rows, model = found["rows"], tiny(arch="mini", k=8, classes=2)
    train.freeze_backbone(model.selector)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    forward, backward = (x / 1e9 for x in speed.step_operations(model, 5))
    assert list(rows) == ["1 GPU", *(f"{n} GPUs" for n in (2, 4, 8, 16, 32, 64))] and "busy" in text
    for n, row in zip((1, 2, 4, 8, 16, 32, 64), rows.values()):
        assert row["sent_bytes"] == pytest.approx(2 * (n - 1) / n * gradients) and row["step"] == pytest.approx(3 * (forward + backward))
        for link in (25, 400):
            exchange = row["sent_bytes"] / (link * 1e9)
            assert row[f"exchange_{link}"] == pytest.approx(exchange) and row[f"hidden_{link}"] == pytest.approx(exchange / backward)
            waits = max(0, exchange - 3 * backward)
            assert row[f"computing_{link}"] == pytest.approx(row["step"] / (row["step"] + waits))


def test_reading_is_measured_at_both_sizes(run, monkeypatch):
    few = partial(speed.reading, count=4, large=(1100, 1040))
    monkeypatch.setitem(speed.MODES, "reading", (few, *speed.MODES["reading"][1:]))
    found, text = run("--reading")
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 5 + 4 and all(name in text for name in rows) and all(row["images_per_second"] > 0 for row in rows.values())
    for size in (518, 224):
        draft = rows[f"1100 x 1040, {size} px, --draft"]
        assert 0 < draft["levels_mean"] < draft["levels_most"] < 256
        assert {f"ImageNet, {size} px{step}" for step in ("", ": decode", ": to this size", ": augment", ": tensor")} < set(rows)


def test_the_steps_of_reading_are_those_of_the_pipelines():
    for pipeline, to_size, rest in speed.PIPELINES.values():
        view, rng = transforms.View(Image.fromarray(np.full((75, 100, 3), 99, np.uint8))), np.random.default_rng(0)
        to_size(view, 56, rng)
        assert min(view.image.size) == 56
        rest(view, 56, rng)
        assert view.image.size == (56, 56)


def test_growth_shows_the_small_stage_1_of_the_recipe_fast():
    assert speed.small_selector("s/2", 224) == {"selector_size": 168}
    cfg = parse(runs.Config, "", ["--data", "cub", "--recipe", "fast"], runs.preset)
    assert speed.small_selector("b", 518) == {"selector_size": cfg.selector_size} and not cfg.selector_arch


def test_the_table_of_sizes_is_what_torch_counts_and_has_every_arch(monkeypatch, capsys):
    monkeypatch.setattr(speed.vit, "ARCHS", {"mini": dict(TINY, positions="rotary"), "s": TINY})
    rows = speed.sizes(speed.Config(k=4), torch.device("cpu"), sides=(70, 90))
    for row, arch in zip(rows.values(), speed.vit.ARCHS.values()):
        for wanted, side in ((70, 70), (90, 84)):
            model, x = tiny(side, classes=2, arch=arch), pictures(1, side)
            keep = speed.forced(0.2, 0.2, 1, (side // 14) ** 2)
            assert row[f"gflops_{wanted}"] * 1e9 == pytest.approx(speed.operations(model.predictor.backbone, x), rel=1e-12)
            assert row[f"both_{wanted}"] * 1e9 == pytest.approx(speed.operations(model, x, keep), rel=1e-12)
        assert row["parameters"] == sum(p.numel() for p in tiny(70, arch=arch).predictor.backbone.parameters())
    monkeypatch.undo()
    speed.main(["--sizes"])
    text = capsys.readouterr().out
    assert all(f"  {name} (patch" in text for name in ARCHS) and "M parameters" in text


def test_a_mode_has_its_own_defaults_and_what_is_typed_replaces_them():
    of = lambda *flags: speed.parse(speed.Config, "", flags, speed.preset)
    assert (of().batch, of().rounds) == (8, 7) and (of("--training").batch, of("--training").rounds) == (4, 10)
    assert of("--training", "--batch", "3").batch == 3 and of("--scale").out == "docs/scale.json"


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_forced_mask_keeps_the_same_share_of_every_image_and_has_the_gradient_of_the_mask_that_was_found(share):
    model, images = tiny(), pictures(3)
    weight = torch.rand(3, 25, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((model.mask(model.selector(images)) * weight).sum(), model.selector.prototypes)
    speed.force(model, share)
    keep = model.mask(model.selector(images))
    assert keep.sum(1).tolist() == [round(25 * share)] * 3 and set(keep.flatten().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(torch.autograd.grad((keep * weight).sum(), model.selector.prototypes), found)


@pytest.mark.parametrize("flags, words", [
    (("--arch", "x"), ("'x' is no architecture", "b/6")), (("--arch", "s/13"), ("s has 12 blocks",)), (("--size", 100), ("multiple of the patch",)),
    (("--rounds", 0), ("--rounds",)), (("--amp", "bf61"), ("did you mean bf16?",)), (("--scale", "--size", 70), ("--size means nothing to scale",)),
    (("--scale", "--selector-size", 70), ("--selector-size means nothing to scale",)),
    (("--keep", 0.5), ("--keep", "only to training")), (("--gpus", "--keep", 0), ("--keep", "a share")), (("--gpus", "--rate", 0), ("--rate", "above 0")),
    (("--checkpoint",), ("--checkpoint means nothing to prediction", "training")), (("--training", "--rate", 3), ("--rate", "only to gpus")),
    (("--gpus", "--rounds", 3), ("--rounds means nothing to gpus",)), (("--gpus", "--size", 100), ("multiple of the patch",)), (("--training", "--keep", 1.5), ("--keep", "at most 1")), (("--reading", "--arch", "s"), ("--arch",)),
    (("--sizes", "--rounds", 3), ("--rounds means nothing to sizes",)), (("--arch", "7b16"), ("--arch 7b16 is refused", "l16")),
    (("--training", "--keep", -1), ("--keep", "at least 0")), (("--scale", "--training"), ("--scale and --training",))], ids=str)
def test_bad_flags_are_one_line(flags, words, capsys):
    line = fails(speed.main, *flags)(capsys)
    assert all(w in line for w in words), line
