"""pretrain.py: correspondences and words against brute force, a run that resumes bit for bit, the committed file."""
import json
import math
import shutil

import numpy as np
import pytest
import test_compose
import torch
from PIL import Image

from vit import build_vit
from measure.clusters import k_means
from miniature import pretrain
from benchmarks import transforms
from benchmarks.samples import patch_keep
from miniature.objects import Frame
from miniature.scenes import pretraining_scenes
from miniature.siim import pretraining_chests
from runs import read_checkpoint
from settings import parse
from tiny import ROOT, fails, train as run_train
from weights import MINI_ARCHS, MINIATURES, load_backbone, read_file

TINY = ["--scenes", "40", "--steps", "4", "--batch", "4", "--words", "6", "--every", "2", "--device", "cpu"]


def test_the_same_scene_point_is_found_in_both_views():
    torch.manual_seed(0)
    ramps = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, 256),) * 2, indexing="xy"))        # x and y of a scene point
    scenes = torch.cat([ramps, torch.zeros(1, 256, 256)])[None].expand(6, -1, -1, -1)
    a, centre = pretrain.draw_view(6, 64)
    b, _ = pretrain.draw_view(6, 64, near=centre)
    there, inside = pretrain.partners(a, b, 8)
    first = torch.nn.functional.avg_pool2d(pretrain.look(scenes, a, 64), 8).flatten(2).mT         # patch centres of a, in the scene
    again = torch.nn.functional.grid_sample(pretrain.look(scenes, b, 64), there[:, :, None], align_corners=False)[..., 0].mT
    assert 0.2 < inside.float().mean() < 0.95
    assert (first - again)[inside].abs().max() < 0.03                                             # of a scene 2 wide


def test_blur_is_the_gaussian_average_with_reflected_borders():
    x, sigma = torch.randn(1, 1, 9, 9, dtype=torch.float64), 0.8
    weight = [math.exp(-d * d / (2 * sigma ** 2)) for d in range(-2, 3)]
    mirror = lambda i: abs(i) if i < 9 else 16 - i
    expected = [[sum(weight[u + 2] * weight[v + 2] * x[0, 0, mirror(i + u), mirror(j + v)].item() for u in range(-2, 3)
                     for v in range(-2, 3)) / sum(weight) ** 2 for j in range(9)] for i in range(9)]
    torch.testing.assert_close(pretrain.blur(x.float(), sigma)[0, 0].double(), torch.tensor(expected, dtype=torch.float64),
                               atol=1e-5, rtol=1e-5)


def test_flat_patches_have_the_least_texture_and_grain_more_than_an_edge_in_the_mean_logarithm():
    flat = torch.full((1, 3, 32, 32), 0.5)
    edge, grain = flat.clone(), flat + 0.2 * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    edge[..., 16:] = 1.0
    flat, edge, grain = (pretrain.texture(x)[0].mean(0) for x in (flat, edge, grain))
    torch.testing.assert_close(flat, torch.full((4,), math.log(1e-4)))
    assert (edge > flat).all() and (grain[2:] - flat[2:] > 2 * (edge[2:] - flat[2:])).all()


def test_k_means_finds_clusters_that_are_apart():
    draw = torch.Generator().manual_seed(0)
    true = torch.tensor([[0., 0], [10, 0], [0, 10]])
    x = (true[:, None] + 0.1 * torch.randn(3, 50, 2, generator=draw)).flatten(0, 1)
    found = k_means(x, 3, draw)
    torch.testing.assert_close(found[found.sum(1).argsort()][[0]], true[[0]], atol=0.1, rtol=0)
    assert sorted(torch.cdist(true, found).argmin(1).tolist()) == [0, 1, 2]


def test_the_measures_are_1_for_features_that_are_only_position_or_only_the_mask():
    class Given(torch.nn.Module):
        prefix, cls_token = 0, torch.zeros(1)

        def __init__(self, x):
            super().__init__()
            self.rows = iter(x.split(64))

        def forward(self, images):
            return next(self.rows)
    draw = torch.Generator().manual_seed(0)
    objects = torch.rand(40, 144, generator=draw) < 0.2
    position = torch.randn(1, 144, 8, generator=draw).expand(40, -1, -1)
    mask = objects[..., None] * torch.ones(8) + 0.01 * torch.randn(40, 144, 8, generator=draw)
    images = torch.zeros(40, 1)
    assert pretrain.measures(Given(position), images, objects)["position"] == pytest.approx(1, abs=0.02)
    found = pretrain.measures(Given(mask), images, objects)
    assert found["linear"] == 1 and found["k_means"] == 1 and found["position"] < 0.1


def test_afterwards_the_mean_of_five_clusters_of_patches_is_the_origin():
    scenes = pretraining_scenes(6, 0, size=96)[0][..., :3]
    vit = build_vit("mini", 96)
    pretrain.centre_features(vit, pretrain.to_images(scenes), 0.32, 5)
    views = [transforms.View(Image.fromarray(s)) for s in scenes]
    for i, view in enumerate(views):
        transforms.augment(view, 96, np.random.default_rng([5, i]))
    x = pretrain.features(vit, torch.stack([transforms.to_tensor(v.image) for v in views])).flatten(0, 1)
    draw = torch.Generator().manual_seed(5)
    centres = k_means(x[torch.randperm(len(x), generator=draw)[:8000]], 5, draw)
    assert centres.mean(0).abs().max() < 1e-3 and x.var(0).mean().sqrt() == pytest.approx(0.32, rel=1e-3)


def test_a_run_that_was_stopped_resumes_to_the_same_weights_on_one_thread(tmp_path, monkeypatch, capsys, request):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)                             # with more, positions of overlapping windows add up in any order
    run = lambda out, *flags: pretrain.main([*TINY, "--out", str(tmp_path / out), *flags])
    run("whole")
    step, original = iter(range(10)), pretrain.loss_terms

    def stop_at_the_third(*arguments):
        if next(step) == 2:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(pretrain, "loss_terms", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(pretrain, "loss_terms", original)
    assert not (tmp_path / "parts" / "mini.pt").exists()
    capsys.readouterr()                                  # what rendering said
    assert "--resume" in fails(pretrain.main, *TINY, "--out", tmp_path / "parts")(capsys)
    assert "--words 6" in fails(pretrain.main, *TINY, "--words", 7, "--resume", "--out", tmp_path / "parts")(capsys)
    run("parts", "--resume")
    whole, parts = (torch.load(tmp_path / out / "mini.pt", weights_only=True) for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.fixture(scope="module")
def composites(tmp_path_factory):
    root = tmp_path_factory.mktemp("composites")
    test_compose.draw_sources(root, each=3)
    return test_compose.run(root, root / "set", "--train", 12, "--val", 8, "--size", 96)


def test_it_learns_from_composed_pictures_from_given_weights_with_masks_as_a_target(composites, tmp_path):
    run = lambda out, *flags: pretrain.main([*TINY, "--composites", str(composites), "--start", str(ROOT / "miniature/mini.pt"), "--steps", "2",
                                             "--out", str(tmp_path / out), *flags])
    run("still", "--lr", "0")
    run("masks", "--view", "96", "--weight-pasted", "2", "--weight-ground", "0.5", "--weight-words", "0", "--weight-invariance", "0")
    start, still, masks = (read_file(path, "weights") for path in (ROOT / "miniature/mini.pt", tmp_path / "still/mini.pt", tmp_path / "masks/mini.pt"))
    moved = lambda other: {name for name in start if not torch.equal(start[name], other[name])}
    assert moved(still) == {"norm.weight", "norm.bias"}                 # the scaling at the end
    assert len(moved(masks)) > 10
    log = [json.loads(line) for line in (tmp_path / "masks/log.jsonl").read_text().splitlines()]
    assert 0.5 < log[0]["pasted"] < 4 and "own" not in log[0] and 0 <= log[0]["ground"] < 0.5
    assert "pasted" not in json.loads((tmp_path / "still/log.jsonl").read_text().splitlines()[0])


def test_the_mask_terms_are_those_of_a_loop_over_patches(composites):
    cfg = parse(pretrain.Config, "", ["--composites", str(composites), "--view", "96", "--weight-pasted", "2", "--weight-ground", "0.5", "--colour", "0"])
    scenes = pretrain.find_scenes(cfg)[0]
    model, scenes = pretrain.Reader(4, masks=True), pretrain.to_images(scenes[:3])
    words = lambda views: (torch.ones(6, 144, 4), torch.ones(6, 144, 4))
    words.weight, seen = 1, []
    reading = model.patches
    model.patches = lambda views: seen.append(reading(views)) or seen[-1]
    torch.manual_seed(5)
    terms = pretrain.loss_terms(model, words, scenes, None, cfg, 1000, "cpu")
    torch.manual_seed(5)
    a, centre = pretrain.draw_view(3, 96)
    b, _ = pretrain.draw_view(3, 96, near=centre)
    z, pasted, ground = seen[0], [], []
    for i, (view, mask) in enumerate((v, s[3]) for v in (a, b) for s, v in zip(scenes, v)):
        mask = pretrain.look(mask[None, None], view[None], 96)[0, 0]
        for n in range(144):
            y, x = divmod(n, 12)
            cover = mask[8 * y:8 * y + 8, 8 * x:8 * x + 8].mean()
            p = model.pasted(z[i, n]).sigmoid()[0]
            pasted.append(-(cover * p.log() + (1 - cover) * (1 - p).log()))
            ground += [z[i, n]] * bool(cover < .05)
    ground = torch.stack(ground)
    assert terms["pasted"].item() == pytest.approx(2 * torch.stack(pasted).mean().item(), rel=1e-3)
    assert terms["ground"].item() == pytest.approx((0.5 * ground.var(0, correction=0).mean() / z.flatten(0, 1).var(0, correction=0).mean()).item(), rel=1e-3)


def test_what_is_no_composite_and_no_start_is_refused_in_one_line(composites, tmp_path, capsys):
    assert "masks are needed" in fails(pretrain.main, "--composites", without_masks(composites, tmp_path / "bare"), "--out", tmp_path / "x")(capsys)
    assert "looked for" in fails(pretrain.main, "--composites", tmp_path / "nowhere", "--out", tmp_path / "x")(capsys)
    assert "--weight-pairs" in fails(pretrain.main, "--composites", composites, "--weight-pairs", 1, "--out", tmp_path / "x")(capsys)
    torch.save({"a": torch.ones(2)}, tmp_path / "odd.pt")
    assert "--start" in fails(pretrain.main, *TINY, "--start", tmp_path / "odd.pt", "--out", tmp_path / "x")(capsys)
    assert not (tmp_path / "x").exists()


def without_masks(composites, out):
    shutil.copytree(composites, out)
    lines = (out / "metadata.csv").read_text().splitlines()
    (out / "metadata.csv").write_text("\n".join([lines[0].replace("mask", "unused"), *lines[1:]]) + "\n")
    return out


@pytest.mark.parametrize("arch", ["mini", "mini-rotary"])
def test_a_view_as_large_as_an_image_is_read_as_the_vit_reads_it_and_a_smaller_one_at_its_place(arch):
    torch.manual_seed(0)
    reader, views = pretrain.Reader(4, arch), torch.randn(2, 3, 96, 96)
    reader.vit.eval()
    with torch.no_grad():
        torch.testing.assert_close(reader.patches(views), reader.vit(views)[:, reader.vit.prefix:], atol=1e-5, rtol=1e-5)
        seen = [reader.patches(views[..., :64, :64]) for _ in range(2)]          # at random places of the grid
    # rotary positions too: patches read the class token and registers, which are not turned, at an angle of their place
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)


@pytest.mark.parametrize("name", MINIATURES)
def test_the_committed_file_is_small_and_measures_as_written_beside_it(name):
    path = MINIATURES[name]
    made = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size < 4e6 and "pretrain" in made["command"] and made["seed"] == 0
    vit = build_vit(MINI_ARCHS[name], 96)
    load_backbone(vit, read_file(path, "weights"))
    cfg = parse(pretrain.Config, "", [])
    draw = pretraining_chests if "--subject chests" in made["command"] else pretraining_scenes
    scenes, parts = draw(400, cfg.seed + 1, size=96)
    images = (pretrain.to_images(scenes[..., :3]) - pretrain.MEAN) / pretrain.STD
    objects = patch_keep(torch.from_numpy(scenes[..., 3] > 127), 8).bool()
    found = pretrain.measures(vit, images, objects, None if parts is None else torch.from_numpy(parts))
    for name, value in found.items():
        assert value == pytest.approx(made[name], abs=0.02), name


@pytest.mark.parametrize("name", MINIATURES)
def test_a_run_starts_from_the_committed_file_of_this_name(name, tmp_path):
    out = run_train(tmp_path / "run", "--weights", name, "--arch", MINI_ARCHS[name], "--epochs", 1, "--lr", 0, "--lr-tokens", 0)
    trained, start = read_checkpoint(out / "best.pt")["model"], read_file(MINIATURES[name], "weights")
    assert all(torch.equal(trained[f"{stage}.backbone.{key}"], value.float()) for key, value in start.items() for stage in ("selector", "predictor"))
    assert json.loads((out / "config.json").read_text())["weights"] == name


# ---------------------------------------------------------------- pairs and parts
def test_a_point_of_a_creature_is_found_where_its_frame_puts_it():
    draw = np.random.default_rng(0)
    frames = [Frame(draw.uniform(.3, .7, 2), draw.uniform(.1, .3), bool(i % 2), draw.uniform(-1, 1)) for i in range(4)]
    rows = torch.tensor([(*f.centre, *f[1:]) for f in frames]).float()
    affine, _ = pretrain.draw_view(4, 64)
    places = pretrain.on_creature(affine, rows, 8)
    for frame, view, local in zip(frames, affine, places):
        scene = (pretrain.view_centres(8)[0] @ view[:, :2].T + view[:, 2] + 1) / 2
        torch.testing.assert_close(torch.from_numpy(frame.place(local.double().numpy())).float(), scene, atol=1e-5, rtol=0)


def test_the_loss_of_pairs_is_that_of_a_loop_over_patches():
    draw = torch.Generator().manual_seed(0)
    z, places, cover = torch.randn(4, 9, 5, generator=draw), torch.randn(4, 9, 2, generator=draw), torch.rand(4, 9, generator=draw)
    terms = []
    for first in (0, 2):
        each = []
        for pair in range(2):
            a, b = (first + pair) % 4, (first + pair + 2) % 4
            for i in range(9):
                near = [math.exp(-((places[a, i] - places[b, j]) ** 2).sum().item() / .18) * (cover[b, j].item() > .3) for j in range(9)]
                if cover[a, i] > .5 and sum(near) > .5:
                    score = [torch.cosine_similarity(z[a, i], z[b, j], dim=0).item() / .1 for j in range(9)]
                    total = math.log(sum(map(math.exp, score)))
                    each.append(sum(n / sum(near) * (total - s) for n, s in zip(near, score)))
        terms.append(sum(each) / len(each))
    assert pretrain.pairs_loss(z, places, cover, .1).item() == pytest.approx(sum(terms) / 2, rel=1e-4)


def test_without_a_creature_in_sight_the_loss_of_pairs_is_0():
    z = torch.randn(4, 9, 5, requires_grad=True)
    loss = pretrain.pairs_loss(z, torch.randn(4, 9, 2), torch.zeros(4, 9), .1)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


def test_pairs_are_learned_from_and_resume(tmp_path):
    flags = [*TINY, "--weight-pairs", "1", "--weight-pasted", "1", "--weight-words", "0", "--weight-invariance", "0"]
    pretrain.main([*flags, "--out", str(tmp_path / "run")])
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert 0 < log[-1]["pairs"] < 10 and 0 <= log[-1]["parts"] <= 1 and "invariance" not in log[-1]


def test_a_patch_is_named_after_the_part_that_covers_most_of_it():
    draw = torch.Generator().manual_seed(0)
    parts = torch.randint(6, (2, 16, 16), generator=draw) * (torch.rand(2, 16, 16, generator=draw) < torch.rand(2, 1, 1, generator=draw))
    parts[0, :8, :8], parts[1, 8:, 8:] = 0, 4
    for i, named in enumerate(pretrain.parts_of_patches(parts)):
        for n, name in enumerate(named.tolist()):
            y, x = divmod(n, 2)
            pixels = parts[i, 8 * y:8 * y + 8, 8 * x:8 * x + 8].flatten().tolist()
            counts = [pixels.count(c) for c in range(1, 6)]
            creature = sum(counts) / 64
            assert name == (0 if creature < .05 else -1 if creature < .25 else counts.index(max(counts)) + 1)


def test_features_that_are_the_part_have_recall_1_and_features_that_are_noise_a_sixth():
    names = torch.arange(1200) % 6
    given = torch.eye(6)[names]
    assert pretrain.recalls(given, names, given, names, 6).tolist() == [1] * 6
    noise = torch.randn(1200, 4, generator=torch.Generator().manual_seed(0))
    assert pretrain.recalls(noise[:600], names[:600], noise[600:], names[600:], 6).mean() == pytest.approx(1 / 6, abs=.05)
