"""The loop: one step is the same for any number of processes, resuming is exact, bad input is one line."""
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import data
from vit import ViT, build_vit
import runs
import evaluate
import train
from baselines import METHODS
from benchmarks.samples import Plan, Samples, read_image
from settings import parse
from tiny import ROOT, TINY, fails, together, torchrun
from tiny import train as run
from runs import load_published
from weights import MINIATURES, read_file


def config(*flags):
    return parse(runs.Config, "", [*TINY, *map(str, flags)], runs.preset)


def first_gradients(rank, world, flags, path, size=train.Buckets.BYTES):
    """Gradients of step 5 of the first batch, saved by rank 0: what every split of the batch must agree on."""
    together(rank, world, path)
    train.Buckets.BYTES = size
    cfg = config(*flags)
    model = train.build_model(cfg, torch.device("cpu")).train()
    samples = data.load(cfg.data, data.find_root(cfg.data, cfg.root, True), cfg.size, limit=cfg.limit)["train"]
    batch = torch.utils.data.default_collate([samples[key] for key in next(iter(Plan(64, 16, 0, 1, 0, rank, world)))])
    buckets = train.Buckets(model.parameters(), world)
    sums = train.gradients(model, cfg, batch, 5, rank, buckets)
    if rank == 0:
        torch.save({"terms": sums, "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
                    "messages": len(buckets.buckets) if world > 1 else 0}, path)
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "gradients.pt"
    first_gradients(0, 1, (), path)
    return torch.load(path)


def same_step(a, b, but=()):
    for name in a["terms"]:
        if name not in but:
            assert b["terms"][name].item() == pytest.approx(a["terms"][name].item(), rel=1e-5, abs=1e-7), name
    assert a["gradients"].keys() == b["gradients"].keys()
    for name, g in a["gradients"].items():
        assert (b["gradients"][name] - g).norm() <= 1e-4 * g.norm() + 1e-7, name


def test_two_processes_give_the_gradients_of_one_with_the_same_global_batch(one_process, tmp_path):
    mp.spawn(first_gradients, (2, (), tmp_path / "two.pt"), nprocs=2)
    same_step(one_process, torch.load(tmp_path / "two.pt"))


@pytest.mark.parametrize("flags", [("--micro", 3), ("--no-shaping", "--no-stage1-class"), ("--checkpoint",)], ids=lambda f: "".join(map(str, f)))
def test_gradients_that_travel_in_many_messages_are_those_of_one_process(flags, tmp_path):
    flags = (*flags, *(() if "--no-shaping" in flags else ("--weight-presence", 0)))     # its maximum is that of a portion
    first_gradients(0, 1, flags, tmp_path / "one.pt")
    mp.spawn(first_gradients, (2, flags, tmp_path / "two.pt", 200_000), nprocs=2)
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    same_step(one, two)                                  # also: without losses of its own stage 1 has idle parameters
    assert two["messages"] > 5


def test_accumulation_gives_the_same_gradients_but_for_the_presence_loss(tmp_path):
    flags = ("--weight-presence", 0)                     # its maximum over the batch is taken within each part
    first_gradients(0, 1, flags, tmp_path / "whole.pt")
    first_gradients(0, 1, (*flags, "--micro", 6), tmp_path / "parts.pt")
    same_step(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "parts.pt"), but=("presence",))


def test_two_processes_train_to_the_weights_of_one_and_two_nodes_finish(tmp_path):
    flags = ["train.py", *TINY, "--lr-heads", 1e-4, "--lr-prototypes", 1e-4, "--lr", 1e-5]
    started = [torchrun(2, *flags, "--out", tmp_path / "two")]
    assert started[0].wait(300) == 0, started[0].stdout.read()
    nodes = [torchrun(1, *flags, "--out", tmp_path / "nodes", nodes=2, node=n) for n in (0, 1)]
    assert [n.wait(300) for n in nodes] == [0, 0], "\n".join(n.stdout.read() for n in nodes)
    run(tmp_path / "one", *flags[len(TINY) + 1:])
    one, two, nodes = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
                       for name in ("one", "two", "nodes"))
    for name in one[1].keys() & runs.loss_weights(config()).keys():          # after three updates, averaged over the whole batch
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-3), name
    assert two[2] == nodes[2]                            # validation, each sample once
    two, nodes = (runs.read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("two", "nodes"))
    assert all(torch.equal(nodes[name], w) for name, w in two.items())


def test_killed_in_the_third_epoch_and_resumed_equals_never_killed_bit_for_bit(tmp_path):
    flags = [*TINY, "--epochs", "4", "--save-every", "1", "--log-every", "1", "--ema", "0.9"]
    command = [sys.executable, "train.py", *flags, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "log.jsonl"
    steps = lambda: [0, *(record["step"] for record in runs.read_log(log))] if log.is_file() else [0]    # the last line may be torn
    while steps()[-1] < 10:                              # four steps an epoch: 10 is in the middle of the third
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = runs.read_checkpoint(tmp_path / "killed" / "last.pt")["step"]
    assert 9 <= saved < 16
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command[:-1], str(tmp_path / "whole")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for name in ("last.pt", "best.pt"):
        killed, whole = (runs.read_checkpoint(tmp_path / run / name) for run in ("killed", "whole"))
        assert killed["step"] == whole["step"] and killed["best"] == whole["best"]
        more = {"optimizer", "scaler", "ema"} if name == "last.pt" else set()    # best.pt has the moving average as its model
        assert whole.keys() == killed.keys() == {*runs.DESCRIPTION, "model"} | more
        for key in {"model", "ema"} & whole.keys():
            assert all(torch.equal(killed[key][n], w) for n, w in whole[key].items())
        for n, moments in whole.get("optimizer", {}).get("state", {}).items():
            assert all(torch.equal(killed["optimizer"]["state"][n][m], x) for m, x in moments.items())
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 17))     # no step is logged twice


def test_groups_of_the_optimizer_are_the_published_ones():
    from conftest import golden
    published = json.loads((ROOT / "tests/golden/param_groups.json").read_text())
    sd = {k[3:]: v for k, v in golden("ifam_small").items() if k.startswith("sd/")}
    model = load_published(sd, heads=3)
    train.freeze_backbone(model.selector)
    cfg = config("--lr", 2.828e-6, "--lr-tokens", 2.828e-6, "--lr-prototypes", 2.828e-3, "--lr-heads", 2.828e-2, "--weight-decay", 0.01)
    ours = {id(p): (g["lr"], g["weight_decay"]) for g in train.parameter_groups(model, cfg, 1) for p in g["params"]}
    names = {"stage_1.fc_landmarks.weight": "selector.prototypes", "stage_1.modulation.weight": "selector.modulation.weight",
             "stage_1.fc_class_landmarks.weight": "selector.classifier.weight", "stage_2.head.weight": "predictor.head.weight",
             "stage_2.fc_norm.weight": "predictor.fc_norm.weight", "stage_1.reg_token": "selector.backbone.register_tokens",
             "stage_1.pos_embed": "selector.backbone.pos_embed", "stage_2.cls_token": "predictor.backbone.cls_token",
             "stage_2.blocks.1.attn.qkv.weight": "predictor.backbone.blocks.1.attn.qkv.weight",
             "stage_2.blocks.1.attn.qkv.bias": "predictor.backbone.blocks.1.attn.qkv.bias",
             "stage_2.blocks.0.ls1.gamma": "predictor.backbone.blocks.0.ls1.gamma"}
    theirs = {n: (g["lr"], g["weight_decay"]) for g in published for n in g["names"]}
    mine = dict(model.named_parameters())
    for old, new in names.items():
        assert ours[id(mine[new])] == pytest.approx(theirs[old]), old
    frozen = [n for n, p in model.named_parameters() if id(p) not in ours]
    assert frozen and all(n.startswith("selector.backbone.") for n in frozen)
    assert not any(n.endswith(("cls_token", "register_tokens", "pos_embed")) for n in frozen)


def test_learning_rates_scale_with_the_square_root_of_the_batch_and_decay_with_one_over_steps():
    model = train.build_model(config(), torch.device("cpu"))
    small, large = (train.parameter_groups(model, config("--batch", b), s) for b, s in ((16, 100), (64, 400)))
    for a, b in zip(small, large):
        assert b["lr"] == pytest.approx(2 * a["lr"]) and b["weight_decay"] == pytest.approx(a["weight_decay"] / 2)


def test_the_schedule_warms_up_linearly_and_falls_to_zero_as_a_cosine():
    factors = [train.lr_at(s, 110, warmup=10) for s in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1 and factors[60] == pytest.approx(0.5) and 0 < factors[109] < 1e-3


def test_presets_are_the_papers_settings_and_the_command_line_wins():
    cfg = parse(runs.Config, "", ["--data", "cub", "--k", "16"], runs.preset)
    assert (cfg.size, cfg.k, cfg.epochs, cfg.lr, cfg.lr_prototypes, cfg.lr_heads) == (518, 16, 90, 1e-6, 1e-3, 1e-2)
    assert runs.loss_weights(cfg) == {"class1": 1, "class2": 1, "presence": 1, "background": 2, "orthogonality": 1, "equivariance": 1,
                                  "variation": 1, "entropy": 1, "concentration": 0, "mask": 0, "complement": 0}
    assert not parse(runs.Config, "", ["--no-joint"], runs.preset).joint


@pytest.mark.parametrize("flags", [*(("--method", m) for m in METHODS[1:]), ("--method", "aim", "--train-backbone"),
                                   ("--method", "early-truth", "--pooling", "cls"), ("--method", "late-found", "--pooling", "mean-all"),
                                   ("--no-joint",), ("--no-shaping", "--no-stage1-class"), ("--freeze-stage2",), ("--weights", "none"), ("--no-train-tokens",), ("--amp", "bf16"),
                                   ("--ema", "0.5", "--micro", "5"), ("--hardness", "soft"), ("--masking", "late", "--pooling", "mean")],
                         ids=lambda f: "".join(f))
def test_every_method_and_setting_trains_and_evaluates(flags, tmp_path):
    folder = run(tmp_path / "run", *flags, "--limit", 16)
    evaluate.main(["--ckpt", str(folder / "best.pt")])
    report = json.loads((folder / "report.json").read_text())
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(next(x["loss"] for x in records if "loss" in x)) and 0 <= report[("stage1" if "pdisco" in flags[-1] else "stage2")]["aa"] <= 1


def test_pretrained_backbones_start_equal_and_only_tokens_of_stage_1_move(tmp_path):
    vit = build_vit("mini", 96)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    folder = run(tmp_path / "run", "--weights", tmp_path / "vit.pt", "--limit", 16)
    trained = runs.read_checkpoint(folder / "last.pt")["model"]
    for name, before in vit.state_dict().items():
        moved = not torch.equal(trained[f"selector.backbone.{name}"], before)
        # nobody reads the class token of stage 1 but its own patches, through attention: it moves too
        assert moved == name.endswith(("cls_token", "register_tokens", "pos_embed")), name
    assert not torch.equal(trained["predictor.backbone.blocks.0.attn.qkv.weight"], vit.state_dict()["blocks.0.attn.qkv.weight"])


def test_without_train_tokens_nothing_of_the_backbone_of_stage_1_moves(tmp_path):
    folder = run(tmp_path / "run", "--limit", 16, "--no-train-tokens")
    trained = runs.read_checkpoint(folder / "last.pt")["model"]
    for name, before in read_file(MINIATURES["mini-parts"], "weights").items():
        assert torch.equal(trained[f"selector.backbone.{name}"], before.float()), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_every_backbone_from_the_same_file(method):
    model = train.build_model(config("--method", method), torch.device("cpu"))
    backbones = [m for m in model.modules() if isinstance(m, ViT)]
    assert len(backbones) == (1 + (method == "ifam" or method.endswith("-found")))
    for name, x in read_file(MINIATURES["mini-parts"], "weights").items():
        assert all(torch.equal(backbone.state_dict()[name], x.float()) for backbone in backbones), name


def test_stage_2_warms_up_and_stage_1_does_not():
    model = train.build_model(config(), torch.device("cpu"))
    warmup = {id(p): group["warmup"] for group in train.parameter_groups(model, config("--warmup", 7), 100) for p in group["params"]}
    assert all(warmup[id(p)] == (7 if name.startswith("predictor.") else 0) for name, p in model.named_parameters() if p.requires_grad)


def test_the_true_mask_of_an_augmented_image_moves_with_it():
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=8)["train"]
    assert "mask" not in samples[0, 3]
    samples.train_masks = True
    sample, place = samples[0, 3], samples.masks
    samples.paths = samples.masks                        # now the "image" is the mask: both must agree after the same steps
    white = samples[0, 3]["image"][0] > samples[0, 3]["image"].min()
    assert ((white == sample["mask"].bool()).float().mean() > 0.99) and 0.02 < sample["mask"].float().mean() < 0.5 and place


def test_a_film_changes_no_bit_of_training_and_a_resumed_run_films_what_a_whole_one_does(tmp_path):
    flags = ["--limit", 96, "--epochs", 2, "--batch", 8, "--save-every", 7]       # 12 steps an epoch
    without, whole = run(tmp_path / "without", *flags, "--film", 0), run(tmp_path / "whole", *flags, "--film", 3)
    a, b = (runs.read_checkpoint(folder / "last.pt") for folder in (without, whole))
    assert all(torch.equal(a["model"][name], x) for name, x in b["model"].items())
    assert all(torch.equal(x, b["optimizer"]["state"][n][m]) for n, moments in a["optimizer"]["state"].items() for m, x in moments.items())
    assert not list(without.glob("film*")) and (whole / "film.png").is_file()
    film = runs.read_film(whole / "film.json")
    assert [frame["step"] for frame in film["frames"]] == [0, 10, 20, 24] and len(film["ids"]) == 3 and film["split"] == "val"
    model, _ = runs.load_model(whole / "last.pt")        # the last frame is what the trained model does
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=96, splits=("val",))["val"]
    images = torch.stack([samples[samples.ids.index(name)]["image"] for name in film["ids"]])
    found = model.selector(images).part_logits.argmax(1).view(3, 12, 12).tolist()
    assert [[[int(x) for x in row.split()] for row in image] for image in film["frames"][-1]["parts"]] == found
    (whole / "film.json").write_text(json.dumps({**film, "frames": [*film["frames"], {"step": 50, "parts": film["frames"][0]["parts"]}]}))
    run(whole, *flags, "--film", 3, "--resume")          # what lies beyond last.pt is dropped, the rest stays
    assert runs.read_film(whole / "film.json") == film


def test_a_method_without_parts_has_no_film(tmp_path):
    assert not list(run(tmp_path / "erm", "--limit", 16, "--method", "erm").glob("film*"))


def test_a_run_that_is_already_there_is_moved_aside_not_lost(tmp_path):
    for _ in range(2):
        run(tmp_path / "run", "--limit", 16)
    assert (tmp_path / "run" / "last.pt").is_file() and (tmp_path / "run.1" / "last.pt").is_file()


@pytest.mark.parametrize("flags, words", [
    (("--root", "/nowhere"), ("/nowhere", "waterbird_complete95", "--mini")),
    (("--mini", "--k", 0), ("--k", "at least 1")),
    (("--mini", "--size", 100), ("100", "multiple of the patch size 8")),
    (("--mini", "--epoch", 3), ("--epoch", "did you mean --epochs?")),
    (("--data", "waterbird"), ("waterbird", "did you mean waterbirds?")),
    (("--mini", "--epochs", "many"), ("--epochs", "many")),
    (("--mini", "--weights", "/nowhere.pt"), ("/nowhere.pt", "no such file")),
    (("--mini", "--weights", "dinov2"), ("mini", "--arch")),
    (("--mini", "--masking", "late"), ("mean",)),
    (("--mini", "--limit", 4), ("--batch 8", "4 images")),
    (("--mini", "--resume"), ("no run at", "--out")),
    (("--mini", "--device", "abacus"), ("abacus", "cpu")),
    (("--mini", "--tau", 0), ("--tau", "above 0")),
    (("--mini", "--lr", "nan"), ("--lr", "nan")),
    (("--mini", "--lr-heads", -1), ("--lr-heads", "at least 0")),
], ids=lambda x: "".join(map(str, x)) if isinstance(x, tuple) else x)
def test_bad_settings_are_one_line_and_leave_nothing_behind(flags, words, tmp_path, capsys):
    line = fails(train.main, *flags, "--out", tmp_path / "run")(capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_resume_with_other_settings_is_refused_and_names_the_first(tmp_path, capsys):
    folder = run(tmp_path / "run", "--limit", 16)
    before = (folder / "last.pt").read_bytes()
    line = fails(train.main, *TINY, "--limit", 16, "--k", 3, "--resume", "--out", folder)(capsys)
    assert "--k 4, not 3" in line and (folder / "last.pt").read_bytes() == before
    (folder / "last.pt").write_bytes(before[:1000])
    assert "damaged" in fails(train.main, *TINY, "--limit", 16, "--resume", "--out", folder)(capsys)


def test_resuming_a_run_killed_before_its_first_save_starts_it_but_not_with_other_settings(tmp_path, capsys):
    folder = run(tmp_path / "run", "--limit", 16)
    (folder / "last.pt").unlink()
    assert "--k 4, not 3" in fails(train.main, *TINY, "--limit", 16, "--k", 3, "--resume", "--out", folder)(capsys)
    run(folder, "--limit", 16, "--resume")
    assert (folder / "last.pt").is_file()
    (tmp_path / "empty").mkdir()
    assert "no run at" in fails(train.main, *TINY, "--resume", "--out", tmp_path / "empty")(capsys)


def test_a_compiled_model_has_the_gradients_of_a_plain_one():
    cfg = config("--limit", 16)
    samples = data.load(cfg.data, data.find_root(cfg.data, cfg.root, True), cfg.size, limit=16)["train"]
    batch = torch.utils.data.default_collate([samples[0, i] for i in range(4)])
    found = []
    for compiled in (False, True):
        model = train.build_model(cfg, torch.device("cpu")).train()
        if compiled:                                     # traced, but not lowered to C++: that would take minutes
            train.compile_stages(model, backend="aot_eager")
        train.gradients(model, cfg, batch, 0)
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, atol=1e-6, rtol=1e-4, msg=name)


def test_the_fused_optimizer_takes_the_steps_of_the_plain_one():
    cfg, weights = config(), []
    for fused in (True, False):
        model = train.build_model(cfg, torch.device("cpu")).double()
        optimizer = torch.optim.AdamW(train.parameter_groups(model, cfg, 10), fused=fused, foreach=False)
        for step in range(3):
            g = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    for ours, expected in zip(*weights):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)


def test_a_log_line_says_what_share_of_the_time_the_loop_waited_for_data(tmp_path):
    folder = run(tmp_path / "run", "--limit", 16, "--log-every", 1)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["waiting"] < 1 for line in lines if "loss" in line)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_term(tmp_path, capsys):
    line = fails(train.main, *TINY, "--lr-heads", 1e30, "--lr-prototypes", 1e30, "--warmup", 0, "--clip", 1e9, "--out", tmp_path / "run", status=1)(capsys)
    assert "step 1: the loss term 'class2' is" in line or "step 1: the loss term 'class1' is" in line, line


def test_a_file_that_is_no_image_is_found_before_the_run_begins(tmp_path, capsys, monkeypatch):
    original = Samples.first
    (tmp_path / "bad.jpg").write_text("hello")

    def spoiled(samples, n):
        original(samples, n).paths[3] = tmp_path / "bad.jpg"
        return samples
    monkeypatch.setattr(Samples, "first", spoiled)
    line = fails(train.main, *TINY, "--out", tmp_path / "run")(capsys)
    assert "cannot read image" in line and "bad.jpg" in line and not (tmp_path / "run").exists()


def test_pixels_that_do_not_decode_stop_training_with_their_path_also_from_a_worker(tmp_path, capsys, monkeypatch):
    original = read_image
    bad = lambda path, mode=None, *how: original(tmp_path / "gone.jpg", mode) if mode else None
    monkeypatch.setattr("benchmarks.samples.read_image", bad)
    for workers in (0, 1):
        line = fails(train.main, *TINY, "--workers", workers, "--out", tmp_path / "run")(capsys)
        assert "cannot read image" in line and "gone.jpg" in line
