"""Training images that a mask has changed: every pixel of a swapped image comes from where it should."""
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

import data
import runs
import train
from augment import Swap, draw_donors
from baselines import background_seed
from ifam import pixels
from measure.leakage import DONORS, swap_backgrounds
from models import pictures, tiny
from settings import UsageError, parse
from tiny import TINY, fails, together
from tiny import train as run


def config(*flags):
    return parse(runs.Config, "", [*TINY, *map(str, flags)], runs.preset)


def batch_of(count=8, epoch=0, **change):
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=64)["train"]
    samples.train_masks = True
    return torch.utils.data.default_collate([samples[epoch, i] for i in range(0, 64, 64 // count)]) | change


@pytest.fixture(scope="module")
def batch():
    return batch_of()


def numbered(count, step=0):
    return [train.generator(0, step, 4, p) for p in range(count)]


# ---------------------------------------------------------------- other backgrounds
def test_a_mask_of_ones_leaves_an_image_and_one_of_zeros_gives_the_donors_pixels_bit_for_bit():
    x, labels = pictures(6), torch.tensor([0, 0, 1, 1, 2, 0])
    donors = draw_donors(labels, 1.0, numbered(6))
    assert (labels[donors[:, 0]] != labels).all()
    assert torch.equal(swap_backgrounds(x, torch.ones(6, 1, 70, 70), donors), x)
    assert torch.equal(swap_backgrounds(x, torch.zeros(6, 1, 70, 70), donors), x[donors[:, 0]])


def test_a_swapped_pixel_is_the_first_donors_that_shows_background_there_by_brute_force():
    x, labels = pictures(6)[:, :, :8, :8], torch.tensor([0, 0, 1, 1, 2, 0])
    objects = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    donors = draw_donors(labels, 1.0, numbered(6))
    swapped = swap_backgrounds(x, objects, donors)
    for i in range(6):
        for r in range(8):
            for c in range(8):
                lends = [i] if objects[i, 0, r, c] else [j for j in donors[i].tolist() if not objects[j, 0, r, c]] or [i]
                assert torch.equal(swapped[i, :, r, c], x[lends[0], :, r, c])


def test_the_measurement_lends_as_it_did_before_donors_could_be_named():
    x, objects = pictures(10), (pictures(10)[:, :1] > 0).float()
    swapped, todo = x.clone(), objects == 0
    for donor in range(1, 8):
        give = todo & (objects.roll(donor, 0) == 0)
        swapped, todo = torch.where(give, x.roll(donor, 0), swapped), todo & ~give
    assert torch.equal(swap_backgrounds(x, objects), swapped)
    assert torch.equal(swap_backgrounds(x[:1], objects[:1]), x[:1])


def test_the_draw_is_a_function_of_seed_step_and_position_and_takes_the_share_that_was_asked_for():
    labels = torch.arange(400) % 2
    donors = draw_donors(labels, 0.3, numbered(400))
    assert torch.equal(donors, draw_donors(labels, 0.3, numbered(400)))
    assert not torch.equal(donors, draw_donors(labels, 0.3, numbered(400, step=1)))
    swapped = (labels[donors] != labels[:, None]).all(1)
    assert 0.2 < swapped.float().mean() < 0.4 and (donors[~swapped] == torch.arange(400)[~swapped, None]).all()
    everywhere = draw_donors(labels, 1.0, numbered(400))
    assert torch.equal(everywhere[swapped], donors[swapped])                     # the coin does not move the donors


def test_images_of_one_class_alone_stay_as_they_are():
    assert torch.equal(draw_donors(torch.zeros(4, dtype=torch.long), 1.0, numbered(4)), torch.arange(4)[:, None].repeat(1, DONORS))


def step(batch, *flags, number=0):
    cfg = config(*flags)
    model = train.build_model(cfg, torch.device("cpu")).train()
    swap = Swap(cfg) if cfg.swap else None
    terms = train.gradients(model, cfg, batch, number, swap=swap)
    return {**terms, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("method", ["erm", "ifam"])
def test_without_swaps_a_step_is_what_it_was_bit_for_bit_and_with_all_of_them_it_is_another(method, batch):
    plain, none, every = (step(batch, "--method", method, *flags) for flags in ((), ("--swap", 0), ("--swap", 1)))
    assert plain.keys() == none.keys() and all(torch.equal(x, none[name]) for name, x in plain.items())
    assert not torch.equal(plain["loss"], every["loss"])


def test_one_class_in_the_share_gives_the_step_without_swaps(batch):
    same = {**batch, "label": torch.zeros_like(batch["label"])}
    plain, swapped = (step(same, "--method", "erm", *flags) for flags in ((), ("--swap", 1)))
    assert all(torch.equal(x, swapped[name]) for name, x in plain.items())


@pytest.mark.parametrize("source, method", [("true", "erm"), ("found", "erm"), ("own", "ifam"), ("own", "pdiscoformer")])
def test_what_stays_is_the_mask_that_was_named(source, method, batch):
    cfg = config("--method", method, "--swap", 1, "--swap-mask", source)
    model, swap = train.build_model(cfg, torch.device("cpu")).train(), Swap(cfg)
    batch = {**batch, "found": batch["mask"].roll(9, 1)}
    objects = swap.objects(model, batch["image"], batch)
    expected = batch["mask" if source == "true" else "found"][:, None].float()
    if source == "own":
        expected = pixels(model.eval()(batch["image"]).keep.detach(), (12, 12), 8)
    assert torch.equal(objects, expected) and 0 < objects.mean() < 1 and not objects.requires_grad
    swapped = swap(model.train(), batch, numbered(8))
    assert torch.equal(swapped["image"].where(objects > 0, torch.zeros(())), batch["image"].where(objects > 0, torch.zeros(())))
    assert torch.equal(swapped["label"], batch["label"])
    changed = (swapped["image"] != batch["image"]).any(1, keepdim=True)
    assert changed.any() and not changed[objects > 0].any()


def test_an_image_in_which_no_object_is_found_stays_as_it_is_and_lends_nothing(batch):
    masks = torch.zeros_like(batch["mask"])
    masks[2:, 20:40, 20:40] = 1                          # nothing is found in the first two
    swap = lambda images: Swap(config("--swap", 1))(None, {**batch, "image": images, "mask": masks, "label": torch.tensor([0, 1] * 4)}, numbered(8))["image"]
    images, swapped = batch["image"], swap(batch["image"])
    assert torch.equal(swapped[:2], images[:2]) and all((a != b).any() for a, b in zip(swapped[2:], images[2:]))
    assert torch.equal(swap(torch.cat([images[:2] + 1, images[2:]]))[2:], swapped[2:])     # what is lent would show


def test_what_found_finds_for_swaps_is_that_of_the_backbone_before_training(monkeypatch, tmp_path):
    cfg, seen = config("--method", "erm"), {}
    start = train.build_model(cfg, torch.device("cpu")).predictor.backbone
    real = train.find_masks
    monkeypatch.setattr(train, "find_masks", lambda finder, samples, *rest: seen.update(find=finder.find, share=real(finder, samples, *rest), samples=samples) or seen["share"])
    folder = run(tmp_path / "run", "--method", "erm", "--swap", 0.5, "--swap-mask", "found", "--limit", 16)
    x = pictures(2, 96)
    assert torch.equal(seen["find"](x), background_seed(*start.last_attention(x))[0]) and 0 < seen["share"] < 1
    assert not any("finder" in name for name in runs.read_checkpoint(folder / "last.pt")["model"])
    sample = seen["samples"][0, 3]
    assert set(sample["found"].unique().tolist()) <= {0, 1} and "mask" not in sample


def test_both_views_of_a_step_show_the_swapped_scene(batch, monkeypatch):
    seen = {}
    warp = train.ifam.warp
    monkeypatch.setattr(train.ifam, "warp", lambda images, *how: seen.setdefault("warped", images) is None or warp(images, *how))
    original = train.ifam.IFAM.forward_pair
    monkeypatch.setattr(train.ifam.IFAM, "forward_pair", lambda self, images, *rest, **told: seen.update(images=images) or original(self, images, *rest, **told))
    step(batch, "--swap", 1)
    assert torch.equal(seen["warped"], seen["images"]) and not torch.equal(seen["images"], batch["image"])


def test_accumulation_swaps_as_the_whole_batch_does(batch):
    flags = ("--swap", 0.7, "--swap-mask", "own", "--weight-presence", 0)        # presence takes its maximum in a portion
    whole, parts = step(batch, *flags), step(batch, *flags, "--micro", 3)
    for name, x in whole.items():
        assert (parts[name] - x).norm() <= 1e-4 * x.norm() + 1e-6, name


def swapped_share(rank, world, path):
    together(rank, world, path)
    whole = batch_of(8)
    mine = {name: x[rank * 8 // world:(rank + 1) * 8 // world] for name, x in whole.items()}
    cfg = config("--swap", 1)
    generators = [train.generator(0, 3, 4, p) for p in range(rank * 8 // world, (rank + 1) * 8 // world)]
    torch.save(Swap(cfg)(tiny(), mine, generators)["image"], f"{path}.{rank}")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_a_process_takes_backgrounds_from_its_own_share_alone(tmp_path):
    mp.spawn(swapped_share, (2, tmp_path / "two"), nprocs=2)
    whole = batch_of(8)
    alone = {name: x[:4] for name, x in whole.items()}
    expected = Swap(config("--swap", 1))(tiny(), alone, [train.generator(0, 3, 4, p) for p in range(4)])["image"]
    assert torch.equal(torch.load(tmp_path / "two.0"), expected)


@pytest.mark.parametrize("source", ["found"])
def test_a_run_with_swaps_resumes_to_the_weights_of_one_that_was_not_stopped(source, tmp_path, monkeypatch):
    flags = ("--swap", 0.5, "--swap-mask", source, "--limit", 32, "--epochs", 2, "--save-every", 1)
    whole = run(tmp_path / "whole", *flags)
    real = train.save
    def stop(path, rank, cfg, step, *rest, **more):      # killed after the third of four steps
        real(path, rank, cfg, step, *rest, **more)
        if step == 3 and path.name == "last.pt":
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *flags)
    monkeypatch.setattr(train, "save", real)
    killed = run(tmp_path / "killed", *flags, "--resume")
    a, b = (runs.read_checkpoint(folder / "last.pt")["model"] for folder in (whole, killed))
    assert all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("flags, words", [
    (("--method", "erm", "--swap", 0.5, "--swap-mask", "own"), "finds no mask of its own"),
    (("--swap", 0.5, "--swap-mask", "found", "--weights", "none"), "give --weights"),
    (("--swap", 0.5, "--draft"), "as large as its picture"), (("--swap", 0.5, "--batch", 1), "larger --batch")])
def test_swaps_that_cannot_happen_are_refused(flags, words, tmp_path, capsys):
    assert words in fails(train.main, *TINY, *flags, "--out", tmp_path / "run")(capsys) and not (tmp_path / "run").exists()


def test_true_masks_that_tell_the_label_or_are_not_there_swap_nothing_and_found_ones_may():
    tell = SimpleNamespace(name="siim", masks=[], labels=torch.arange(2), masks_tell=True, classes=("healthy", "sick"))
    with pytest.raises(UsageError, match="gives the label away; choose --swap-mask found"):
        train.give_truth(tell, config("--swap", 0.5))
    with pytest.raises(UsageError, match="--swap-mask true needs true masks, and siim has none here"):
        train.give_truth(SimpleNamespace(name="siim", masks=None, labels=torch.arange(2)), config("--swap", 0.5))
    train.give_truth(tell, config("--swap", 0.5, "--swap-mask", "own"))


def test_settings_of_before_there_were_swaps_are_those_without():
    settings = asdict(config())
    assert runs.differences({n: x for n, x in settings.items() if not n.startswith("swap")}, config()) == {}
    assert set(runs.differences(settings, config("--swap", 0.5))) == {"swap"}
