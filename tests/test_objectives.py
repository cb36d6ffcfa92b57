"""Objectives: what each sample weighs, checked against sums written out, numbers of the specification, and plain training."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import data
import evaluate
import ifam
import objectives
import runs
import train
from benchmarks.files import read_groups, write_groups
from benchmarks.samples import AGAIN, Plan, Samples
from ifam import Output
from measure.metrics import accuracies
from settings import Stopped, UsageError, parse
from test_train import same_step
from tiny import TINY, fails, together
from tiny import train as run


def split(labels=(0, 0, 1, 1), places=(), groups=None, name="waterbirds"):
    ids = [f"{i}, a bird.jpg" for i in range(len(labels))]
    return Samples(name, "train", 96, ("landbird", "waterbird"), ids, ids, labels, places, groups)


# ---------------------------------------------------------------- files of groups
def test_groups_that_were_written_are_read_whatever_the_order_of_the_lines(tmp_path):
    samples, groups = split(), ["wrong", "right", "right", "wrong"]
    write_groups(tmp_path / "a.csv", samples.ids, groups)
    names, read = read_groups(tmp_path / "a.csv", samples)
    assert names == ["right", "wrong"] and [names[g] for g in read] == groups
    head, *lines = (tmp_path / "a.csv").read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([head, *reversed(lines)]))
    assert torch.equal(read_groups(tmp_path / "b.csv", samples)[1], read)


@pytest.mark.parametrize("change, words", [
    (lambda lines: lines[:-1], "3, a bird.jpg of waterbirds train is missing"), (lambda lines: [*lines, '"x.jpg",a'], "x.jpg is no sample"),
    (lambda lines: [*lines, lines[1]], "a second time"), (lambda lines: [line.replace(",b", ",a") for line in lines], "there must be two groups"),
    (lambda lines: [line.replace("group", "cluster") for line in lines], "no column group"), (lambda lines: [*lines[:-1], lines[-1][:-1]], "expected a name")])
def test_a_groups_file_that_is_not_of_the_split_is_one_line(change, words, tmp_path):
    samples = split()
    write_groups(tmp_path / "a.csv", samples.ids, ["a", "b", "a", "b"])
    (tmp_path / "a.csv").write_text("\n".join(change((tmp_path / "a.csv").read_text().splitlines())))
    with pytest.raises(UsageError, match=words) as error:
        read_groups(tmp_path / "a.csv", samples)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="no such file"):
        read_groups(tmp_path / "none.csv", samples)


# ---------------------------------------------------------------- weights
WATERBIRDS = (3498, 184, 56, 1057)                       # training images by group: land bird on land, on water; water bird on land, on water


def objective(counts, *flags, steps=100):
    """An Objective over groups of so many images, in order."""
    cfg = parse(runs.Config, "", [*TINY, *map(str, flags), *(("--groups", "x.csv") if "jtt" in flags or "george" in flags else ())], runs.preset)
    names = ["right", "wrong"] if "jtt" in flags else [f"group {g}" for g in range(len(counts))]
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return objectives.Objective(cfg, names, groups, "groups", steps)


def class_losses(batch, labels, logits):
    """The weighted class loss of a batch, as training takes it."""
    return ifam.class_loss(logits, labels, batch["weight"])


@pytest.fixture
def step():
    """Twelve images of four groups, with logits -> the group of each, labels, logits."""
    torch.manual_seed(0)
    return torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3]), torch.randint(2, (12,)), torch.randn(12, 2, requires_grad=True)


def means(groups, labels, logits):
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([losses[groups == g].mean() for g in groups.unique()])


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_with_one_group_the_loss_and_its_gradient_are_those_of_erm(step):
    _, labels, logits = step
    loss = class_losses(objective((12,), "--objective", "group-dro").of(torch.arange(12)), labels, logits)
    plain = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient(loss, logits), gradient(plain, logits))


def test_weights_that_do_not_move_give_the_mean_of_the_means_of_groups(step):
    groups, labels, logits = step
    dro = objective((5, 2, 1, 4), "--objective", "group-dro")
    dro.step = 0.0
    batch = dro.of(torch.arange(12))
    torch.testing.assert_close(class_losses(batch, labels, logits), means(*step).mean())
    dro.update(objectives.group_losses(Output(logits), labels, batch["member"]))
    assert torch.equal(dro.q, torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(dro.losses.float(), means(*step).detach())


def test_the_gradient_is_that_of_each_groups_mean_times_its_weight(step):
    groups, labels, logits = step
    dro = objective((5, 2, 1, 4), "--objective", "group-dro")
    dro.log_q = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log()
    expected = sum(q * gradient(mean, logits) for q, mean in zip((0.1, 0.2, 0.3, 0.4), means(*step)))
    torch.testing.assert_close(gradient(class_losses(dro.of(torch.arange(12)), labels, logits), logits), expected)


@pytest.mark.parametrize("adjustment, expected", [(0, (0.09861, 0.13311, 0.65930, 0.10898)), (2, (0.08270, 0.12506, 0.69828, 0.09396))])
def test_after_100_steps_the_weights_are_those_of_the_specification(adjustment, expected):
    dro = objective(WATERBIRDS, "--objective", "group-dro", "--dro-adjustment", adjustment, "--dro-step", 0.01)
    dro.present = torch.ones(4, dtype=torch.bool)
    for _ in range(100):
        dro.update({f"group {g}": torch.tensor(loss) for g, loss in enumerate((0.1, 0.4, 2.0, 0.2))})
        assert dro.q.sum() == pytest.approx(1, abs=1e-12) and (dro.q > 0).all()
    assert dro.q.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_adjustment_is_largest_for_the_smallest_group():
    assert objective(WATERBIRDS, "--objective", "group-dro", "--dro-adjustment", 2).adjustment.tolist() == pytest.approx([0.0338, 0.1474, 0.2673, 0.0615], abs=1e-4)
    assert objective(WATERBIRDS, "--objective", "george").adjustment[2] == pytest.approx(0.2673, abs=1e-4)


def test_a_group_that_is_absent_does_not_move_and_counts_nothing(step):
    groups, labels, logits = step
    dro = objective((5, 2, 1, 4), "--objective", "group-dro", "--dro-adjustment", 2)
    there = (groups != 2).nonzero()[:, 0]
    batch = dro.of(there)
    torch.testing.assert_close(class_losses(batch, labels[there], logits[there]), means(groups[there], labels[there], logits[there]).sum() / 4)
    dro.update(objectives.group_losses(Output(logits[there]), labels[there], batch["member"]))
    others = dro.log_q[[0, 1, 3]] - dro.log_q[2]
    torch.testing.assert_close(others, dro.step * (means(groups[there], labels[there], logits[there]).detach().double() + dro.adjustment[[0, 1, 3]]))
    assert dro.record()["groups"]["group 2"]["loss"] is None


def test_eta_is_the_published_one_times_the_published_steps_over_those_of_the_run():
    assert objective((2, 2), "--objective", "group-dro", "--dro-step", 0, steps=11_100).step == pytest.approx(0.01)
    assert objective((2, 2), "--objective", "group-dro", "--dro-step", 0, steps=600).step == pytest.approx(0.185)
    assert "0.185 = 0.01 * 11,100 / 600 steps" in str(objective((2, 2), "--objective", "group-dro", "--dro-step", 0, steps=600))
    assert objective((2, 2), "--objective", "group-dro", "--dro-step", 0.5, steps=600).step == 0.5


def test_the_expected_gradient_of_reweighting_is_that_of_balanced_draws():
    weighed, drawn = (objective(WATERBIRDS, "--objective", name) for name in ("reweight", "balanced"))
    assert (weighed.weights / 4795).tolist() == pytest.approx(drawn.shares.tolist()) and drawn.weights is weighed.shares is None
    assert weighed.weights.mean().item() == pytest.approx(1) and drawn.shares.sum() == pytest.approx(1)
    assert drawn.of(torch.arange(4)) == {}


def test_errors_weigh_lambda_times_the_others_and_one_on_average():
    jtt = objective((6, 2), "--objective", "jtt", "--upweight", 20)
    assert jtt.weights.tolist() == pytest.approx(6 * [0.174] + 2 * [3.478], abs=5e-4) and jtt.weights.mean().item() == pytest.approx(1)
    assert objective((6, 2), "--objective", "jtt", "--upweight", 1).weights.tolist() == 8 * [1]


def test_an_error_of_weight_lambda_has_the_gradient_of_lambda_copies():
    torch.manual_seed(0)
    labels, logits = torch.randint(2, (8,)), torch.randn(8, 2, requires_grad=True)
    weight = objective((6, 2), "--objective", "jtt", "--upweight", 20).of(torch.arange(8))["weight"]
    copies = torch.tensor([*range(6), *20 * [6, 7]])
    torch.testing.assert_close(gradient(ifam.class_loss(logits, labels, weight), logits), gradient(F.cross_entropy(logits[copies], labels[copies]), logits))


# ---------------------------------------------------------------- draws
def test_groups_of_an_epoch_of_balanced_draws_have_equal_shares_and_draws_are_those_of_any_process_and_start():
    shares = objective(WATERBIRDS, "--objective", "balanced").shares
    plan = lambda start=0, **who: list(Plan(4795, 16, start, 599, shares=shares, **who))
    whole, groups = plan(), torch.arange(4).repeat_interleave(torch.tensor(WATERBIRDS))
    drawn = torch.tensor([i for batch in whole[:299] for _, i in batch])
    assert (torch.bincount(groups[drawn]) / len(drawn) - 0.25).abs().max() < 4 * (3 / 16 / len(drawn)) ** 0.5
    assert [a + b for a, b in zip(*(plan(rank=r, world=2) for r in (0, 1)))] == whole and plan(400) == whole[400:]
    assert len({key for batch in whole for key in batch}) == 599 * 16            # a sample is never augmented alike twice
    even = objective((10, 10), "--objective", "balanced").shares
    assert even.tolist() == pytest.approx(20 * [1 / 20])


def test_without_an_objective_the_order_is_a_permutation_of_each_epoch():
    drawn = [key for batch in Plan(23, 8, 0, 4, seed=5) for key in batch]
    assert drawn == [(epoch, i) for epoch in (0, 1) for i in np.random.default_rng([5, epoch]).permutation(23)[:16].tolist()]


def test_a_sample_that_an_epoch_draws_again_is_augmented_otherwise():
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=8)["train"]
    first, again = samples[0, 3]["image"], samples[AGAIN, 3]["image"]
    assert first.shape == again.shape and not torch.equal(first, again)


# ---------------------------------------------------------------- which groups
def grouped(samples, *flags):
    return objectives.grouping(parse(runs.Config, "", [*TINY, *map(str, flags)], runs.preset), samples)


def test_groups_are_class_and_place_and_classes_where_these_say_no_more():
    cross = split((0, 0, 1, 1), ("land", "water"), (0, 1, 3, 3))
    names, groups, what = grouped(cross, "--objective", "reweight")
    assert names == ["landbird land", "landbird water", "waterbird water"] and groups.tolist() == [0, 1, 2, 2] and what == "class and place"
    for samples, why in ((split(), "there are no places"), (split((0, 0, 1, 1), ("land", "water"), (0, 0, 3, 3)), "each class is in one place only")):
        names, groups, what = grouped(samples, "--objective", "balanced")
        assert names == ["landbird", "waterbird"] and groups.tolist() == [0, 0, 1, 1] and why in what
        with pytest.raises(UsageError, match=f"{why}.*give --groups FILE, or take --objective balanced"):
            grouped(samples, "--objective", "group-dro")


@pytest.mark.parametrize("groups, words", [(4 * ["right"], "fewer epochs"), (["right", "left", "right", "left"], "reads right and wrong")])
def test_errors_that_are_none_are_refused(groups, words, tmp_path):
    samples = split()
    write_groups(tmp_path / "a.csv", samples.ids, groups)
    with pytest.raises(UsageError, match=words):
        grouped(samples, "--objective", "jtt", "--groups", tmp_path / "a.csv")


def test_settings_of_another_objective_do_not_come_with_config(tmp_path):
    earlier = lambda: {"data": "waterbirds", "mini": True, "objective": "george", "groups": "x.csv", "dro_adjustment": 2.0}
    assert runs.preset({}, kept := earlier()) and kept["groups"] == "x.csv" and kept["dro_adjustment"] == 2
    assert runs.preset({"objective": "erm"}, gone := earlier()) and not gone.keys() & objectives.TAKES.keys()
    assert runs.preset({"method": "early-random"}, judge := earlier()) and judge.keys() == {"data", "mini"}


# ---------------------------------------------------------------- in the loop
def one_step(rank, world, flags, path):
    """A step of group-dro with weights that are not uniform, saved by rank 0: its gradients, terms and the next weights."""
    together(rank, world, path)
    cfg = parse(runs.Config, "", [*TINY, *map(str, flags)], runs.preset)
    model = train.build_model(cfg, torch.device("cpu")).train()
    samples = data.load(cfg.data, data.find_root(cfg.data, cfg.root, True), cfg.size, limit=cfg.limit)["train"]
    dro = objectives.start(cfg, samples, 100)
    dro.log_q = torch.tensor([0.2, 0.5, 0.3]).double().log()
    plan = Plan(64, 16, 0, 1, 0, rank, world, dro.shares)
    batch = torch.utils.data.default_collate([samples[key] for key in next(iter(plan))])
    terms = train.gradients(model, cfg, {**batch, **dro.of(plan.whole(0)[1], rank, world)}, 5, rank, train.Buckets(model.parameters(), world))
    dro.update(terms)
    if rank == 0:
        torch.save({"terms": terms, "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "q": dro.q}, path)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_portions_and_processes_take_the_step_of_group_dro_that_one_takes(tmp_path):
    flags = ("--objective", "group-dro", "--weight-presence", 0)                 # its maximum over the batch is that of a portion
    one_step(0, 1, flags, tmp_path / "one.pt")
    one_step(0, 1, (*flags, "--micro", 6), tmp_path / "portions.pt")
    mp.spawn(one_step, (2, (*flags, "--micro", 3), tmp_path / "two.pt"), nprocs=2)
    one, *others = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "portions", "two"))
    assert one["q"].tolist() != pytest.approx([0.2, 0.5, 0.3])
    for other in others:
        same_step(one, other)
        assert other["q"].tolist() == pytest.approx(one["q"].tolist(), rel=1e-6)


def test_stopped_and_resumed_is_not_interrupted_bit_for_bit_and_the_log_has_the_weights(tmp_path, monkeypatch):
    flags = ["--method", "erm", "--objective", "group-dro", "--epochs", 2, "--log-every", 1]
    whole = run(tmp_path / "whole", *flags)
    stops = iter([0, 0, 15])
    with monkeypatch.context() as patch:
        patch.setattr(train, "agreed", lambda *_: next(stops))
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", *flags)
    stopped = run(tmp_path / "stopped", *flags, "--resume")
    a, b = (runs.read_checkpoint(folder / "last.pt") for folder in (whole, stopped))
    assert a["step"] == b["step"] == 8 and torch.equal(a["objective"]["log_q"], b["objective"]["log_q"])
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())
    logs = [[line["groups"] for line in runs.read_log(folder / "log.jsonl") if "groups" in line] for folder in (whole, stopped)]
    assert logs[0] == logs[1] and len(logs[0]) == 8
    assert [x["q"] for x in logs[0][-1].values()] == pytest.approx(a["objective"]["log_q"].exp().tolist())
    assert list(logs[0][0]) == ["landbird on land", "waterbird on land", "waterbird on water"]


def test_over_the_true_groups_as_clusters_george_is_group_dro_and_resuming_with_others_is_refused(tmp_path, capsys):
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=64)["train"]
    file = tmp_path / "clusters.csv"
    write_groups(file, samples.ids, [samples.group_names[g] for g in samples.groups])
    found = [run(tmp_path / name, "--method", "erm", "--objective", name, *more) for name, more in
             (("george", ("--groups", file)), ("group-dro", ("--dro-adjustment", 2)))]
    a, b = (runs.read_checkpoint(folder / "last.pt") for folder in found)
    assert torch.equal(a["objective"]["log_q"], b["objective"]["log_q"])
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())
    flags = (*TINY, "--method", "erm", "--objective", "george", "--resume", "--out", found[0], "--groups")
    write_groups(file, samples.ids, [samples.group_names[g] for g in samples.groups.flip(0)])
    assert "other groups than those of --groups" in fails(train.main, *flags, file)(capsys)
    write_groups(tmp_path / "moved.csv", samples.ids[::-1], [samples.group_names[g] for g in samples.groups.flip(0)])
    train.main([*map(str, flags), str(tmp_path / "moved.csv")])                 # the same groups, in another file


def test_jtt_with_lambda_one_trains_as_erm_step_for_step(tmp_path):
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=64)["train"]
    write_groups(tmp_path / "errors.csv", samples.ids, ["wrong", *63 * ["right"]])
    plain = run(tmp_path / "erm", "--method", "erm", "--log-every", 1)
    jtt = run(tmp_path / "jtt", "--method", "erm", "--log-every", 1, "--objective", "jtt", "--groups", tmp_path / "errors.csv", "--upweight", 1)
    one, two = ([line["loss"] for line in runs.read_log(folder / "log.jsonl") if "loss" in line] for folder in (plain, jtt))
    assert two == pytest.approx(one, rel=1e-4) and len(one) == 4


@pytest.mark.parametrize("method", ["ifam", "pdiscoformer", "ep"])
def test_every_class_loss_of_a_method_is_weighed_and_nothing_else(method):
    cfg = parse(runs.Config, "", [*TINY, "--method", method], runs.preset)
    samples = data.load(cfg.data, data.find_root(cfg.data, cfg.root, True), cfg.size, limit=cfg.limit)["train"]
    batch, model = torch.utils.data.default_collate([samples[0, i] for i in range(4)]), train.build_model(cfg, torch.device("cpu")).train()
    plain, same, none = (train.gradients(model, cfg, {**batch, **more}, 0) for more in ({}, {"weight": torch.ones(4)}, {"weight": torch.zeros(4)}))
    for name, value in plain.items():
        assert same[name].item() == pytest.approx(value.item(), rel=1e-6), name
        if name != "loss":
            assert none[name] == (0 if name.startswith("class") else value), name
    assert {"class1", "class2"} & plain.keys() == {"ifam": {"class1", "class2"}, "pdiscoformer": {"class1"}, "ep": {"class2"}}[method]


# ---------------------------------------------------------------- the best epoch
@pytest.mark.parametrize("select, epoch", [("accuracy", 1), ("worst_group", 2), ("worst_class", 3)])
def test_the_best_epoch_is_that_of_the_number_that_was_asked_for(select, epoch, tmp_path, monkeypatch):
    scores = iter(zip((0.9, 0.8, 0.7), (0.1, 0.5, 0.5), (0.2, 0.3, 0.6)))        # of equal ones the more accurate
    monkeypatch.setattr(train.Trainer, "validate", lambda *_: dict(zip(("aa", "worst_group", "worst_class"), next(scores))))
    folder = run(tmp_path / "run", "--method", "frozen", "--limit", 16, "--epochs", 3, "--select", select)
    best = runs.read_checkpoint(folder / "best.pt")
    assert best["best"]["epoch"] == best["step"] == epoch and best["best"]["by"] == select


def test_a_report_says_what_the_epoch_was_chosen_by(tmp_path, capsys):
    folder = run(tmp_path / "run", "--method", "frozen", "--limit", 16, "--select", "worst_class")
    evaluate.main(["--ckpt", str(folder / "best.pt"), "--limit", "8", "--leakage", "2", "--out", str(tmp_path / "report.json")])
    selection = json.loads((tmp_path / "report.json").read_text())["selection"]
    assert selection["by"] == "worst_class" and "chosen on val by worst class" in capsys.readouterr().out
    val = [line["val"] for line in runs.read_log(folder / "log.jsonl") if "val" in line]
    assert selection["score"] == max(score["worst_class"] for score in val)


def test_there_must_be_something_to_choose_the_epoch_by():
    check = lambda val, select: train.check_select(SimpleNamespace(select=select, data="cub"), val)
    check(None, "accuracy"), check(split(), "worst_class"), check(split(places=("land", "water"), groups=(0, 1, 2, 3)), "worst_group")
    with pytest.raises(UsageError, match="--val-share"):
        check(None, "worst_class")
    with pytest.raises(UsageError, match="there are no places.*--select worst_class"):
        check(split(), "worst_group")
    with pytest.raises(UsageError, match="each class is in one place only"):
        check(split((0, 0, 1, 1), ("land", "water"), (0, 0, 3, 3)), "worst_group")


@pytest.mark.parametrize("name, words", [("right", "for fewer epochs"), ("wrong", "for more epochs")])
def test_an_error_set_that_is_empty_or_everything_is_refused_with_the_advice_that_helps(name, words, tmp_path):
    samples = split()
    write_groups(tmp_path / "errors.csv", samples.ids, [name] * len(samples.ids))
    with pytest.raises(UsageError, match=words):
        objectives.grouping(SimpleNamespace(groups=str(tmp_path / "errors.csv"), objective="jtt"), samples)


def test_the_worst_class_is_the_least_of_the_classes():
    samples = split((0, 0, 0, 1, 1), ("land", "water"), (0, 0, 1, 3, 3))
    found = accuracies({"logits": F.one_hot(torch.tensor([0, 0, 1, 1, 0]), 2).float()}, samples)
    assert found["worst_class"] == 0.5 and found["worst_group"] == 0
    assert accuracies({"logits": F.one_hot(torch.tensor([0, 0, 0, 1, 0]), 2).float()}, split((0, 0, 1, 1, 1)))["worst_class"] == pytest.approx(1 / 3)
