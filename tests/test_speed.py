"""Operations counted from shapes against torch's counter; every way to compute the same gives the same; the report."""
import json

import pytest
import torch
from conftest import agrees
from models import TINY, pictures, tiny
from tiny import fails
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ifam
import speed
from ifam import IFAM, Predictor
from vit import ARCHS, KeepGradient, ViT, attend_packed, build_vit

RAGGED = torch.zeros(4, 25)
RAGGED[1, [0, 7, 24]] = 1
RAGGED[2, 3:17] = 1
RAGGED[3] = 1


def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()                                       # the fused kernels of CPUs are not in the counter's table
    return counter.get_total_flops()


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_operations_counted_from_shapes_are_those_that_torch_counts(ffn):
    model, x = tiny(arch=dict(TINY, ffn=ffn, depth=3)), pictures(4)
    assert speed.vit_flops(model.predictor.backbone) * 4 == counted(lambda: model.predictor.backbone(x))
    assert speed.stage1_flops(model.selector, 3) * 4 == counted(lambda: model.selector(x))
    assert speed.stage2_flops(model.predictor) * 4 == counted(lambda: model.predictor(x))
    kept = RAGGED.sum(1).int().tolist()
    assert sum(speed.stage2_flops(model.predictor, n) for n in kept) == counted(lambda: model.predictor(x, RAGGED))


def test_operations_of_a_late_mask_are_those_of_all_patches():
    model, x = Predictor(build_vit(TINY, 70), 3, masking="late", pooling="mean"), pictures(4)
    assert speed.stage2_flops(model, 3) * 4 == counted(lambda: model(x, RAGGED))


def test_operations_of_a_smaller_stage_1_are_its_own():
    model, x = tiny(selector_size=42), pictures(2)
    assert speed.stage1_flops(model.selector, 3) * 2 == counted(lambda: model.selector(x))
    assert speed.stage1_flops(model.selector, 3) < 0.5 * speed.stage1_flops(tiny().selector, 3)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("keep", [RAGGED, RAGGED[[0, 0, 0, 0]], RAGGED[[3, 3, 3, 3]]], ids=["ragged", "none", "all"])
@pytest.mark.parametrize("other", speed.OTHERS)
def test_every_way_to_attend_within_packed_images_gives_the_same_logits(other, keep, pooling):
    model, x = tiny(pooling=pooling), pictures(4)
    with torch.no_grad():
        expected = model(x, keep).logits
        with speed.replaced(ifam, "attend_packed", speed.OTHERS[other]):
            agrees(model(x, keep).logits, expected)
        with speed.replaced(ViT, "_run_packed", speed.not_packed):
            agrees(model(x, keep).logits, expected)
            asked = counted(lambda: model.predictor(x, keep))
    assert asked == 4 * speed.stage2_flops(model.predictor)                      # it does compute every token
    assert attend_packed is not speed.OTHERS[other]


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
    counts = speed.counts_of(0.05, 0.6, 8, 256)
    keep = speed.forced(counts, 256, torch.Generator().manual_seed(0))
    assert keep.sum(1).tolist() == counts and counts[0] == 13 and counts[-1] == 154
    assert sum(counts) / 8 / 256 == pytest.approx(0.325, abs=0.002)


def test_the_peak_is_what_is_held_at_once():
    def call():
        a = torch.ones(1000, 1000)                       # 4 MB, then 8 MB at once, then 4 MB again
        b = a + 1
        del a
        return b * 2
    assert speed.peak_memory(call, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_the_exponent_of_a_power_law_is_its_power():
    x = [5, 20, 300]
    assert speed.exponent(x, [3 * v ** 1.7 for v in x]) == pytest.approx(1.7)


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
    assert found["gflops"]["dense"] * 1e9 == speed.vit_flops(tiny().predictor.backbone)
    assert found["share_of_time"]["stage1"] > 0 and sum(found["share_of_time"][n] for n in ("attention", "feed_forward")) < 1
    assert found["latency_ms"] > 0 and found["peak_bytes"]["model"] > 0 and found["relative_to_dense"] > 0
    json.dumps(found)


def test_the_command_prints_every_case_and_the_growth_comes_with_its_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(ARCHS, "mini", dict(TINY, depth=2))
    common = ("--arch", "mini", "--rounds", "1", "--device", "cpu")
    speed.main([*common, "--size", "70", "--batch", "2", "--k", "2", "--compare", "--profile", "--out", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    text = capsys.readouterr().out
    assert all(name in text for name in rows) and "attention" in text
    assert {*speed.CASES, *(f"20 % kept, {other}" for other in (*speed.OTHERS, "not packed"))} < rows.keys() and rows["dense"]["relative_to_dense"] == 1
    assert rows["5 % kept"]["relative_operations"] < rows["20 % kept"]["relative_operations"] < rows["100 % kept"]["relative_operations"]
    monkeypatch.setattr(speed, "STEPS", {"tokens": ("size", (70, 140)), "K": ("k", (1, 2)), "batch": ("batch", (1, 2))})
    speed.main([*common, "--scale", "--out", str(tmp_path / "scale.json")])
    found = json.loads((tmp_path / "scale.json").read_text())["growth"]
    assert found["tokens"]["x"] == [30, 105] and (tmp_path / "scale.png").stat().st_size > 10_000
    for what in ("prediction", "training"):
        x, y = found["tokens"]["x"], found["tokens"][what]["bytes"]
        assert found["tokens"]["exponents"][what]["bytes"] == pytest.approx(speed.exponent(x, y))


@pytest.mark.parametrize("flags, words", [
    (("--arch", "x"), ("'x' is no architecture", "b/6")), (("--arch", "s/13"), ("s has 12 blocks",)), (("--size", 100), ("multiple of the patch",)),
    (("--rounds", 0), ("--rounds",)), (("--amp", "bf61"), ("did you mean bf16?",)),
    (("--scale", "--size", 70), ("--scale", "leave out --size"))], ids=str)
def test_bad_flags_are_one_line(flags, words, capsys):
    line = fails(speed.main, *flags, "--device", "cpu")(capsys)
    assert all(w in line for w in words), line
