"""What is offered as published is as published: heads, probes, starts, rules of a mask, and FOUND's masks and head."""
import json

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn

import augment
import data
import runs
import train
from baselines import BatchNorm, EfficientPooling, AttentionPooling, FoundMask, TrueMask, build, found_loss, train_found_head
from benchmarks.samples import patch_keep
from ifam import pixels
from measure import encoding, leakage, tables
from models import TINY, pictures
from settings import UsageError, parse
from tiny import TINY as FLAGS
from tiny import fails, together
from tiny import train as run

CPU = torch.device("cpu")


def config(*flags):
    return parse(runs.Config, "", [*FLAGS, *map(str, flags)], runs.preset)


def built(*flags):
    return train.build_model(config(*flags), CPU)


def given(kind, **choices):
    torch.manual_seed(0)
    return kind(3, TINY, 70, **choices).eval()


def some_keep(count=3, patches=25):
    return (torch.rand(count, patches, generator=torch.Generator().manual_seed(3)) > 0.6).float()


def split(count=20, size=96):
    return data.load("waterbirds", data.find_root("waterbirds", "", True), size, limit=count)["train"]


# ---------------------------------------------------------------- heads
def test_each_head_is_the_published_one_and_norm_is_that_of_ifams_stage_2():
    head = lambda model: (isinstance(model.predictor.fc_norm, nn.LayerNorm), model.predictor.head.bias is not None)
    for method in ("erm", "frozen", "early-truth", "early-found", "late-truth", "late-found"):
        assert head(built("--method", method)) == (False, not method.startswith("early")), method
        assert head(built("--method", method, "--head", "norm")) == (True, False), method
    for method in ("ifam", "early-random"):
        assert head(built("--method", method)) == (True, False)
    assert built("--method", "erm", "--head", "norm").state_dict().keys() == built("--method", "early-random").state_dict().keys()
    assert (built("--method", "erm").predictor.head.bias == 0).all()


@torch.no_grad()
def test_under_a_late_mask_the_mean_over_all_patches_keeps_the_masks_size_and_a_layernorm_removes_it():
    x, whole = pictures(), torch.ones(3, 25)
    keep = F.pad(torch.ones(3, 5), (0, 20))
    choices = dict(masking="late", pooling="mean-all")
    published, norm = given(TrueMask, **choices, norm=False, bias=True).predictor, given(TrueMask, **choices).predictor
    norm.backbone.load_state_dict(published.backbone.state_dict())
    patches = published.backbone(x)[:, published.backbone.prefix:]
    torch.testing.assert_close(published.features(x, keep), patches[:, :5].sum(1) / 25)
    torch.testing.assert_close(published.features(x, whole), patches.mean(1))
    same = patches[:, :1].expand(-1, 25, -1)             # where all patches are alike, only the size of a mask is left
    for predictor, keeps_size in ((published, True), (norm, False)):
        predictor.backbone.forward = lambda images, *_, **__: F.pad(same, (0, 0, 5, 0))
        few, all_of_it = predictor.features(x, keep), predictor.features(x, whole)
        torch.testing.assert_close(few, all_of_it / 5 if keeps_size else all_of_it, atol=1e-3, rtol=1e-3)


def forget(folder, *names):
    """Make a run look as one from before these settings existed."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    for file in ("last.pt", "best.pt"):
        state = torch.load(folder / file, weights_only=False)
        state["config"] = {k: v for k, v in state["config"].items() if k not in names}
        torch.save(state, folder / file)


@pytest.mark.parametrize("method", ["erm", "late-found"])
def test_runs_from_before_there_was_a_choice_keep_their_head_everywhere(method, tmp_path, capsys):
    old = ("--head", "norm", *(("--find-in", "view") if method == "late-found" else ()))
    out = run(tmp_path / "old", "--method", method, *old, "--seed", 3)
    before, _ = runs.load_model(out / "best.pt")
    forget(out, "head", "find_in", "finder", "mask_rule", "mask_with", "probe_norm")
    after, state = runs.load_model(out / "best.pt")
    x = pictures(2, 96)
    assert torch.equal(before(x).logits, after(x).logits) and state["config"]["head"] == "norm"
    row = tables.row_name(runs.read_config(out / "config.json"))
    assert "--head norm" in row and ("--find-in view" in row) == (method == "late-found")
    assert runs.read_settings(out / "config.json")["head"] == "norm"
    line = fails(train.main, *FLAGS, "--method", method, "--seed", 3, "--out", out, "--resume")(capsys)
    assert "was started with --head norm, not published" in line
    run(out, "--method", method, *old, "--seed", 3, "--resume")
    run(tmp_path / "again", "--config", out / "config.json")
    assert runs.read_config(tmp_path / "again" / "config.json")["head"] == "norm"
    assert "head" not in runs.of_today({"method": "ifam"})                       # which has no such choice


# ---------------------------------------------------------------- probes
def test_efficient_probings_queries_do_not_decay_and_its_values_do():
    for flags in ((), ("--probe-norm",)):
        model, cfg = built("--method", "ep", *flags), config("--method", "ep", *flags)
        decay = {id(p): group["weight_decay"] for group in train.parameter_groups(model, cfg, 4) for p in group["params"]}
        named = {name.rpartition(".")[2] if "queries" in name else name: decay[id(p)] for name, p in model.named_parameters() if id(p) in decay}
        assert named.pop("queries") == 0 and named.pop("predictor.head.bias") == 0
        assert len(named) == 2 and all(x > 0 for x in named.values())            # values and head


def test_batch_norm_before_the_head_is_that_of_the_probes_own_paper():
    torch.manual_seed(0)
    model, x = built("--method", "ep", "--probe-norm").predictor.double().train(), pictures(4, 96).double()
    pooled = model.pool[0](model.backbone(x)[:, model.backbone.prefix:])
    assert isinstance(model.pool[0], EfficientPooling)
    torch.testing.assert_close(model.features(x), nn.BatchNorm1d(128, eps=1e-6, affine=False).double()(pooled))
    assert not list(model.pool[1].parameters())
    plain = built("--method", "ep").predictor
    assert {n for n, _ in model.named_parameters() if n.startswith("pool")} == {"pool.0.queries", "pool.0.value.weight"}
    assert isinstance(plain.pool, EfficientPooling)


def normalise_a_share(rank, world, path):
    together(rank, world, path)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tensor_split(world)[rank]
    layer = BatchNorm(5).double()
    out = [layer(x)]
    if world > 1:
        out = [torch.zeros_like(x) for _ in range(world)]
        torch.distributed.all_gather(out, layer(x))
    if rank == 0:
        torch.save(torch.cat(out), f"{path}/{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_its_statistics_are_those_of_the_whole_batch_over_processes(tmp_path):
    normalise_a_share(0, 1, tmp_path)
    mp.spawn(normalise_a_share, (2, tmp_path), nprocs=2)
    torch.testing.assert_close(torch.load(tmp_path / "2.pt"), torch.load(tmp_path / "1.pt"))


@pytest.mark.parametrize("width", [128, 768])
def test_the_layers_of_a_probe_start_as_published(width):
    torch.manual_seed(0)
    aim, uniform = AttentionPooling(width, 2), width ** -0.5 / 3 ** 0.5          # the deviation of U(-1, 1) / sqrt(D)
    for layer in (EfficientPooling(width).value, aim.key, aim.value):
        assert layer.weight.std().item() == pytest.approx(uniform, rel=0.02)


# ---------------------------------------------------------------- from a mask to patches
@pytest.mark.parametrize("patch", [7, 8, 14, 16])
def test_by_its_centre_a_patch_is_kept_as_nearest_exact_reads_the_mask(patch):
    masks = (torch.rand(4, 5 * patch, 4 * patch, generator=torch.Generator().manual_seed(0)) < 0.5).byte()
    keep = patch_keep(masks, patch, "centre")
    assert torch.equal(keep, F.interpolate(masks[:, None].float(), (5, 4), mode="nearest-exact").flatten(1))
    small = torch.zeros(1, 2 * patch, 2 * patch)
    small[0, 0, 0] = 1                                   # no centre: nothing is kept; by half of a patch its best one is
    assert patch_keep(small, patch, "centre").sum() == 0 and patch_keep(small, patch)[0].tolist() == [1, 0, 0, 0]


def test_a_model_is_told_masks_by_its_own_rule_wherever_it_is_told():
    batch = torch.utils.data.default_collate([sample for sample in (lambda s: [s[i] for i in range(4)])(split(size=96))])
    for rule in ("half", "centre"):
        model = built("--method", "early-truth", "--mask-rule", rule)
        expected = patch_keep(batch["mask"], 8, rule)
        assert torch.equal(leakage.given(model, batch, CPU)["keep"], expected)
        keep, held = leakage.stage2_classifier(model).find(batch["image"], batch["mask"][:, None].float())
        assert torch.equal(keep, expected) and torch.equal(held, expected)
    assert not torch.equal(patch_keep(batch["mask"], 8), expected)


# ---------------------------------------------------------------- a mask on pixels
@torch.no_grad()
def test_a_mask_on_pixels_takes_the_content_and_leaves_the_tokens():
    x, keep = pictures(), some_keep()
    shown = pixels(keep, (5, 5), 14)
    for pooling in ("mean", "cls"):
        on_pixels, tokens = (given(TrueMask, masking="early", pooling=pooling, mask_with=what) for what in ("pixels", "patches"))
        assert torch.equal(on_pixels(torch.where(shown == 0, torch.randn_like(x), x), keep).logits, on_pixels(x, keep).logits)
        assert (on_pixels(x, keep).logits - tokens(x, keep).logits).abs().max() > 1e-3
        torch.testing.assert_close(on_pixels(x, torch.ones_like(keep)).logits, tokens(x, torch.ones_like(keep)).logits)
        by_hand = on_pixels.predictor.backbone(x * shown)
        pooled = by_hand[:, 0] if pooling == "cls" else torch.stack([p[k == 1].mean(0) for p, k in zip(by_hand[:, 5:], keep)])
        torch.testing.assert_close(on_pixels.predictor.features(x, keep), on_pixels.predictor.fc_norm(pooled))
    with pytest.raises(ValueError, match="early, hard mask"):
        given(TrueMask, masking="late", pooling="mean", mask_with="pixels")


def test_what_a_selection_encodes_is_asked_of_a_mask_that_takes_tokens_away_under_either_head():
    for flags in ((), ("--head", "norm"), ("--mask-rule", "centre")):
        encoding.check(built("--method", "early-truth", *flags), "it")
    with pytest.raises(UsageError, match="--mask-with pixels"):
        encoding.check(built("--method", "early-found", "--mask-with", "pixels"), "it")


def test_hidden_pixels_leak_nothing_by_repainting_or_gradient_whatever_an_early_mask_takes_away():
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=8)["test"]
    for flags in ((), ("--mask-with", "pixels"), ("--mask-rule", "centre"), ("--head", "norm")):
        model = built("--method", "early-truth", *flags).eval()
        found, = leakage.measure_leakage([leakage.stage2_classifier(model)], samples, model.predictor.backbone)
        assert found["repaint"]["max_logit_change"] == 0 and found["gradient"]["max_abs"] == 0, flags
    late = built("--method", "late-truth").eval()
    found, = leakage.measure_leakage([leakage.stage2_classifier(late)], samples, late.predictor.backbone)
    assert found["repaint"]["max_logit_change"] > 0 and found["gradient"]["max_abs"] > 0


# ---------------------------------------------------------------- masks that are found once
@pytest.fixture(scope="module")
def finder():
    return built("--method", "early-found").eval()


def test_a_found_mask_is_augmented_with_its_picture_as_a_true_mask_is(tmp_path):
    samples, g = split(), np.random.default_rng(0)
    keep = g.random((20, 12, 12)) < 0.5
    original = samples.masks
    for i, path in enumerate(samples.paths):             # the same masks as files
        side = Image.open(path).size
        Image.fromarray(np.uint8(keep[i]) * 255).resize(side, Image.Resampling.NEAREST).save(tmp_path / f"{i}.png")
    truth = [[samples_[2, i] for i in range(20)] for samples_ in (
        as_masks(split(), [tmp_path / f"{i}.png" for i in range(20)]), as_masks(split(), original))]
    samples.found, samples.found_grid = torch.from_numpy(np.packbits(keep.reshape(20, -1), axis=1)), (12, 12)
    for asked in (False, True):
        samples.train_masks = asked
        for i in range(20):
            sample = samples[2, i]
            assert torch.equal(sample["found"], truth[0][i]["mask"]) and torch.equal(sample["image"], truth[0][i]["image"])
            assert torch.equal(sample["mask"], truth[1][i]["mask"]) if asked else "mask" not in sample
    assert "found" not in samples[0] and set(truth[0][0]["mask"].unique().tolist()) == {0, 1}
    kept = samples.part("train", [3, 1])
    assert torch.equal(kept[2, 0]["found"], truth[0][3]["mask"])


def as_masks(samples, paths):
    samples.masks, samples.train_masks = paths, True
    return samples


def test_masks_are_found_in_whole_pictures_once_and_a_square_one_is_its_evaluation_view(finder):
    samples, cfg = split(), config("--method", "early-found")
    share = augment.find_masks(finder, samples, cfg, 0, 1, CPU)
    by_hand = torch.cat([finder.find(samples[i]["image"][None]) for i in range(20)])             # the miniature is square
    found = torch.from_numpy(np.unpackbits(samples.found.numpy(), axis=1, count=144))
    assert torch.equal(found, by_hand.byte()) and share == pytest.approx(by_hand.mean().item())
    again = split()
    augment.find_masks(finder, again, config("--method", "early-found", "--micro", 3, "--workers", 2), 0, 1, CPU)
    assert torch.equal(again.found, samples.found)
    wide = Image.new("RGB", (160, 96), "white")
    wide.paste("black", (0, 0, 80, 96))
    samples.read = lambda path, mode, least=0: wide
    assert (samples.whole()[0]["image"][0, :, :40] < -1).all() and (samples.whole()[0]["image"][0, :, 56:] > 1).all()


def find_a_share(rank, world, path):
    together(rank, world, path)
    model, samples = built("--method", "late-found", "--finder", "head"), split(37)
    cfg = config("--method", "late-found", "--finder", "head")
    augment.FOUND_STEPS = 3
    torch.nn.init.normal_(model.finder_head.weight, std=float(rank + 1), generator=torch.Generator().manual_seed(rank))
    augment.teach_finder(model, samples, cfg, rank, world, CPU)
    augment.find_masks(model, samples, cfg, rank, world, CPU)
    torch.save((samples.found, model.finder_head.state_dict()), f"{path}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_head_and_the_masks_of_one(tmp_path):
    find_a_share(0, 1, tmp_path)
    mp.spawn(find_a_share, (2, tmp_path), nprocs=2)
    (masks, head), *others = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for found, weights in others:
        assert torch.equal(found, masks) and all(torch.equal(x, head[name]) for name, x in weights.items())


def test_training_is_told_the_masks_of_the_pictures_and_evaluation_finds_its_own(finder):
    samples, cfg = split(), config("--method", "early-found")
    augment.find_masks(finder, samples, cfg, 0, 1, CPU)
    batch = torch.utils.data.default_collate([samples[0, i] for i in range(4)])
    told = leakage.given(finder, batch, CPU)
    assert torch.equal(told["keep"], patch_keep(batch["found"], 8)) and not torch.equal(told["keep"], finder.find(batch["image"]))
    looked = []
    hook = finder.look
    finder.look = lambda images: looked.append(1) or hook(images)
    train.gradients(finder, cfg, batch, 0)
    assert not looked                                    # one forward less in each step
    batch = torch.utils.data.default_collate([samples[i] for i in range(4)])
    assert "mask" in batch and leakage.given(finder, batch, CPU) == {}
    assert torch.equal(finder(batch["image"]).keep, hook(batch["image"])[1]) and looked
    del finder.look


@pytest.mark.parametrize("flags", [("early-found", "--finder", "head"), ("late-found", "--find-in", "view")], ids=" ".join)
def test_a_stopped_run_goes_on_with_the_same_masks_to_the_same_weights(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "FOUND_STEPS", 20)
    flags = ("--method", *flags, "--ema", "0.5", "--log-every", 1)
    run(tmp_path / "whole", *flags)
    noted, agreed = [], train.agreed
    with monkeypatch.context() as patch:
        patch.setattr(train, "agreed", lambda *_: noted.append(1) or 15 * (len(noted) == 2))
        with pytest.raises(train.Stopped):
            run(tmp_path / "stopped", *flags)
    assert len(noted) == 2 and agreed is train.agreed
    monkeypatch.setattr(train, "teach_finder", None)     # the head is in the checkpoint
    run(tmp_path / "stopped", *flags, "--resume")
    whole, stopped = (runs.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "stopped"))
    for part in ("model", "ema"):
        assert all(torch.equal(stopped[part][name], x) for name, x in whole[part].items())
    model, _ = runs.load_model(tmp_path / "stopped" / "best.pt")
    x = pictures(2, 96)
    assert torch.equal(model(x).keep, model.find(x))
    if "head" in flags:
        assert torch.equal(whole["model"]["finder_head.weight"], whole["ema"]["finder_head.weight"])
        assert torch.equal(model.finder_head.weight, whole["model"]["finder_head.weight"])


# ---------------------------------------------------------------- FOUND's head
def planted(count=40, patches=30, width=16, seed=0):
    """Keys near two directions and the mask that a seed step would give, of which a tenth is wrong -> keys, mask, truth."""
    g = torch.Generator().manual_seed(seed)
    truth = (torch.rand(count, patches, generator=g) < 0.3).float()
    axes = torch.eye(width)[:2]
    keys = axes[truth.long()] * 3 + 0.3 * torch.randn(count, patches, width, generator=g)
    wrong = torch.rand(count, patches, generator=g) < 0.1
    return keys, torch.where(wrong, 1 - truth, truth), truth


def taught(keys, keep, steps=500, seed=0):
    torch.manual_seed(seed)
    head = nn.Linear(keys.shape[2], 1)
    train_found_head(head, ((keys, keep) for _ in range(steps)))
    return head


def test_the_head_finds_a_planted_object_and_mends_what_the_seed_step_got_wrong():
    keys, keep, truth = planted()
    head = taught(keys, keep)
    assert torch.equal((head(keys)[..., 0] > 0).float(), truth) and not torch.equal(keep, truth)
    assert not any(p.requires_grad for p in head.parameters())
    again = taught(keys, keep)
    assert torch.equal(head.weight, again.weight) and torch.equal(head.bias, again.bias)


def test_what_the_head_learns_from_changes_after_100_steps():
    logits, keep = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64), torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    bce = lambda target: -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).mean()
    own = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    for step, expected in ((0, bce(keep) + 1.5 * bce(own)), (99, bce(keep) + 1.5 * bce(own)), (100, 4 * bce(own))):
        torch.testing.assert_close(found_loss(logits, keep, step), expected)
    assert not found_loss(logits, keep, 0).requires_grad


def test_in_a_picture_without_contrast_the_head_keeps_all_or_nothing():
    keys, keep, _ = planted()
    flat = keys.mean((0, 1)).expand(2, 30, -1)
    for head in (taught(keys, keep), taught(flat, torch.zeros(2, 30)), taught(0 * flat, torch.ones(2, 30))):
        found = head(flat)
        assert found.isfinite().all() and len((found > 0).unique()) == 1


def test_the_head_knows_no_labels_and_stays_as_it_is_while_the_model_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "FOUND_STEPS", 20)
    heads = []
    for turn in (False, True):
        samples, model = split(64), built("--method", "early-found", "--finder", "head")
        start = model.finder_head.weight.clone()
        samples.labels, samples.groups = (1 - x if turn else x for x in (samples.labels, samples.groups))
        augment.teach_finder(model, samples, config("--method", "early-found", "--finder", "head"), 0, 1, CPU)
        heads.append(model.finder_head.weight)
    assert torch.equal(*heads) and not torch.equal(heads[0], start)
    out = run(tmp_path / "run", "--method", "early-found", "--finder", "head")
    assert torch.equal(runs.read_checkpoint(out / "last.pt")["model"]["finder_head.weight"], heads[0])
    monkeypatch.setattr(augment, "FOUND_STEPS", 4)
    heads = []
    for room in (augment.ROOM, 0):                         # pictures that are too many to keep their keys are looked at anew
        monkeypatch.setattr(augment, "ROOM", room)
        augment.teach_finder(model := built("--method", "early-found", "--finder", "head"), split(64), config("--method", "early-found"), 0, 1, CPU)
        heads.append(model.finder_head.weight)
    torch.testing.assert_close(*heads)


def test_finder_and_head_draw_nothing_that_another_weight_depends_on():
    seed, head = built("--method", "early-found").state_dict(), built("--method", "early-found", "--finder", "head").state_dict()
    assert head.keys() - seed.keys() == {"finder_head.weight", "finder_head.bias"}
    assert all(torch.equal(x, head[name]) for name, x in seed.items())
    assert isinstance(build({**vars(config("--method", "late-found")), "finder": "head"}, 2), FoundMask)
