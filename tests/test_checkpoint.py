"""train.py --checkpoint: the same weights bit for bit, less kept for the way back, and where it means nothing."""
import pytest
import torch
from tiny import TINY, train as run

import runs
import speed
import train
import vit
from settings import parse

CPU = torch.device("cpu")


def config(*flags):
    return parse(runs.Config, "", [*TINY, "--batch", "5", "--size", "48", *map(str, flags)], runs.preset)


def batch(step, images=5, patches=6):
    """Random images of 48 px, their labels and true masks."""
    g = torch.Generator().manual_seed(step)
    keep = (torch.rand(images, patches, patches, generator=g) < 0.4).float()
    return {"image": torch.randn(images, 3, 8 * patches, 8 * patches, generator=g), "label": torch.arange(images) % 2,
            "mask": keep.repeat_interleave(8, 1).repeat_interleave(8, 2)}


def trained(*flags, steps=2):
    """The weights after some steps, and how often a block ran."""
    trainer, ran = train.Trainer(config(*flags), 10, 0, 1, CPU, 2), []
    for module in trainer.model.modules():
        if isinstance(module, vit.Attention):            # _run_joint does not call the block itself
            module.qkv.register_forward_hook(lambda *_: ran.append(1))
    trainer.model.train()
    for step in range(steps):
        trainer(batch(step), step)
    return trainer.model.state_dict(), len(ran)


@pytest.mark.parametrize("flags", [
    (), ("--no-joint",), ("--hardness", "soft"), ("--masking", "late", "--pooling", "mean"), ("--pooling", "mean"), ("--micro", 2),
    ("--no-joint", "--no-train-tokens"), ("--weights", "none"), ("--freeze-stage2",), ("--selector-arch", "mini/2", "--selector-size", 32),
    ("--arch", "mini-rotary", "--weights", "mini-rotary"), ("--amp", "bf16"), ("--ema", 0.9), ("--method", "pdiscoformer"), ("--method", "erm"),
    ("--method", "early-truth"), ("--method", "late-found"), ("--method", "aim", "--train-backbone")], ids=lambda f: "".join(map(str, f)) or "joint")
def test_with_checkpoints_the_weights_are_the_same_bit_for_bit_and_blocks_run_again(flags):
    plain, once = trained(*flags)
    again, twice = trained(*flags, "--checkpoint")
    assert plain.keys() == again.keys() and all(torch.equal(again[name], x) for name, x in plain.items())
    assert twice > once


def test_less_is_held_for_the_way_back_in_either_stage_and_on_either_path():
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for keep in (None, (torch.rand(2, 144) < 0.5).float(), (torch.rand(2, 144) < 0.5).float().requires_grad_()):
        held = []
        for checkpoint in (False, True):
            backbone = vit.build_vit("mini", 96)
            backbone.checkpoint = checkpoint
            held.append(speed.peak_memory(lambda: backbone(x, keep).sum(), CPU))
        assert held[1] < 0.5 * held[0]


def test_a_forward_pass_without_gradients_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", None)
    backbone = vit.build_vit("mini", 48)
    backbone.checkpoint = True
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 48, 48)).shape == (1, backbone.prefix + 36, 128)


def test_a_compiled_model_with_checkpoints_has_the_gradients_of_a_plain_one():
    found = []
    for flags in ((), ("--checkpoint",)):
        cfg = config(*flags)
        model = train.build_model(cfg, CPU).train()
        if flags:                                        # traced, but not lowered to C++: that would take minutes
            train.compile_stages(model, backend="aot_eager")
        train.gradients(model, cfg, batch(0), 0)
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("flags, nothing", [
    (("--method", "ep"), True), (("--method", "aim"), True), (("--method", "ep", "--train-backbone"), False), (("--method", "erm"), False),
    (("--method", "pdiscoformer", "--no-train-tokens"), True), ((), False)], ids=str)
def test_a_line_says_so_where_no_gradient_passes_through_a_block(flags, nothing, capsys):
    model = train.build_model(config(*flags, "--checkpoint"), CPU, classes=2)
    assert ("--checkpoint saves nothing here" in capsys.readouterr().out) == nothing
    on = [m.checkpoint for m in model.modules() if isinstance(m, vit.ViT)]
    assert any(on) != nothing


def test_a_run_may_be_resumed_with_it_for_it_changes_no_result(tmp_path):
    flags = ("--limit", 32, "--size", 48, "--epochs", 2, "--film", 0)
    whole = runs.read_checkpoint(run(tmp_path / "whole", *flags) / "last.pt")
    folder = run(tmp_path / "run", *flags, "--checkpoint")
    assert all(torch.equal(x, whole["model"][name]) for name, x in runs.read_checkpoint(folder / "last.pt")["model"].items())
    run(folder, *flags, "--resume")
    assert runs.as_published(vars(parse(runs.Config, "", ["--checkpoint"], runs.preset)))
