"""Each method of the comparison has its defining property, and each ablation changes one thing."""
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import baselines
from vit import ARCHS, build_vit
import runs
import data
import evaluate
import ifam
from measure import leakage
import train
from baselines import AttentionPooling, BatchNorm, EfficientPooling, FoundMask, TrueMask, background_seed
from models import TINY, pictures, tiny
from settings import parse
from tiny import TINY as FLAGS
from tiny import fails


def config(*flags):
    return parse(runs.Config, "", [*FLAGS, *map(str, flags)], runs.preset)


def built(*flags):
    return train.build_model(config(*flags), torch.device("cpu"))


def some_keep(count=3, patches=25):
    return (torch.rand(count, patches, generator=torch.Generator().manual_seed(3)) > 0.6).float()


def given(kind, **choices):
    torch.manual_seed(0)
    return kind(3, TINY, 70, **choices).eval()


# ---------------------------------------------------------------- given masks
@torch.no_grad()
def test_early_truth_is_ifam_with_keep_given():
    model, x, keep = given(TrueMask, masking="early", pooling="cls"), pictures(), some_keep()
    whole = tiny()
    whole.predictor.load_state_dict(model.predictor.state_dict())
    assert torch.equal(model(x, keep).logits, whole(x, keep).logits)
    with pytest.raises(ValueError, match="pass keep"):
        model(x)


@torch.no_grad()
def test_late_truth_sees_the_whole_image_and_pools_under_the_mask():
    model, x, keep = given(TrueMask, masking="late", pooling="mean"), pictures(), some_keep()
    patches = model.predictor.backbone(x)[:, model.predictor.backbone.prefix:].double()
    by_hand = torch.stack([p[k == 1].mean(0) for p, k in zip(patches, keep)])
    head = lambda pooled: model.predictor.head(model.predictor.fc_norm(pooled.float()))
    torch.testing.assert_close(model(x, keep).logits, head(by_hand), atol=1e-5, rtol=1e-4)
    hidden = torch.where(leakage.pixels(keep, (5, 5), 14) == 0, torch.randn_like(x), x)
    assert (model(hidden, keep).logits - model(x, keep).logits).abs().max() > 1e-3
    model.predictor.pooling = "mean-all"                 # published: a sum over N, shorter the smaller the mask
    torch.testing.assert_close(model(x, keep).logits, head(by_hand * keep.mean(1, keepdim=True)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_early_given_masks_hide_the_rest_and_a_found_mask_is_what_stage_2_reports():
    x, keep = pictures(), some_keep()
    hidden = torch.where(leakage.pixels(keep, (5, 5), 14) == 0, torch.randn_like(x), x)
    for kind in (TrueMask, FoundMask):
        model = given(kind, masking="early", pooling="mean")
        assert torch.equal(model(x, keep).logits, model(hidden, keep).logits)
    assert torch.equal(model(x).keep, model.find(x)) and torch.equal(model(x).logits, model(x, model.find(x)).logits)


def test_the_attention_of_the_last_block_is_what_its_output_is_made_of():
    torch.manual_seed(0)
    vit, x = build_vit(TINY, 70).double(), pictures().double()
    seen = []
    vit.blocks[-1].attn.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    vit(x)
    attention, keys = vit.last_attention(x)
    (before, after), attn = seen[0], vit.blocks[-1].attn
    q, k, v = attn.qkv(before).unflatten(-1, (3, 2, 16)).unbind(2)               # (B, T, H, D/H)
    scores = torch.einsum("bhd,bthd->bht", q[:, 0], k) / 16 ** 0.5
    whole = scores.exp() / scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(attention, whole[..., 5:])
    torch.testing.assert_close(keys, k[:, 5:].transpose(1, 2))
    torch.testing.assert_close(attn.proj(torch.einsum("bht,bthd->bhd", whole, v).flatten(1)), after[:, 0])


@torch.no_grad()
def test_under_a_mask_the_last_attention_is_that_of_the_kept_tokens_alone():
    torch.manual_seed(0)
    vit, x, keep = build_vit(TINY, 70).double(), pictures().double(), some_keep()
    attention, _ = vit.last_attention(x, keep)
    assert (attention * (1 - keep[:, None]) == 0).all()
    everything, _ = vit.last_attention(x, torch.ones_like(keep))
    torch.testing.assert_close(everything, vit.last_attention(x)[0])
    hidden = torch.where(leakage.pixels(keep, (5, 5), 14) == 0, torch.randn_like(x), x)
    assert torch.equal(vit.last_attention(hidden, keep)[0], attention)


@torch.no_grad()
def test_layers_are_what_forward_goes_through():
    torch.manual_seed(0)
    vit, x, keep = build_vit(TINY, 70).double(), pictures().double(), some_keep()
    first, *_, last = vit.layers(x)
    assert torch.equal(first, vit.embed(x)) and torch.equal(vit.norm(last), vit(x)) and len(list(vit.layers(x))) == 3
    *_, last = vit.layers(x, keep)
    readable = vit.mask_of(keep).bool()
    torch.testing.assert_close(vit.norm(last)[readable], vit(x, keep)[readable])


def test_founds_seed_is_the_least_attended_patch_by_brute_force():
    g = torch.Generator().manual_seed(0)
    B, H, N, d = 3, 4, 30, 5
    attention = torch.rand(B, H, N, generator=g, dtype=torch.float64).pow(3)
    keys = torch.randn(B, H, N, d, generator=g, dtype=torch.float64) + 0.7
    keep, seed = background_seed(attention, keys)
    for b in range(B):
        mean = sum(attention[b, h, n] for h in range(H) for n in range(N)) / (H * N)
        Q = [sum(float(attention[b, h, n] > mean) for n in range(N)) / N + 1e-10 for h in range(H)]
        beta = [torch.tensor(sum(Q) / Q[h], dtype=torch.float64).log() for h in range(H)]
        least = min(range(N), key=lambda n: sum(beta[h] * attention[b, h, n] for h in range(H)))
        assert seed[b] == least
        describe = lambda n: torch.cat([beta[h] * keys[b, h, n] for h in range(H)])
        for n in range(N):
            cosine = describe(n) @ describe(least) / (describe(n).norm() * describe(least).norm())
            assert keep[b, n] == float(cosine <= 0.3)
    assert 0 < keep.mean() < 1 and all(keep[b, seed[b]] == 0 for b in range(B))


def test_the_finder_is_the_backbone_before_training_and_never_moves():
    model = built("--method", "early-found")
    weights = model.predictor.backbone.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in model.finder.state_dict().items())
    grouped = {id(p) for group in train.parameter_groups(model, config("--method", "early-found"), 1) for p in group["params"]}
    assert not grouped & {id(p) for p in model.finder.parameters()}
    same = built("--method", "early-truth").state_dict()
    assert all(torch.equal(model.state_dict()[name], x) for name, x in same.items())


# ---------------------------------------------------------------- probes
def test_efficient_probing_has_weights_that_sum_to_one_and_no_more_parameters_than_its_source():
    torch.manual_seed(0)
    pool, x = EfficientPooling(64, 32).double(), torch.randn(2, 9, 64, dtype=torch.float64)
    assert sum(p.numel() for p in pool.parameters()) == 32 * 64 + 64 * 64
    torch.testing.assert_close(pool.attention(x).sum(2), torch.ones(2, 32, dtype=torch.float64))
    for b in range(2):                                   # slice by slice, as its definition reads
        for i in range(32):
            a = (x[b] @ pool.queries[i] / 64 ** 0.5).exp()
            values = x[b] @ pool.value.weight[2 * i:2 * i + 2].T
            torch.testing.assert_close(pool(x)[b, 2 * i:2 * i + 2], (a / a.sum()) @ values)
    with pytest.raises(ValueError, match="64 is not a multiple of its 48"):
        EfficientPooling(64, 48)
    assert all(arch["width"] % 32 == 0 for arch in ARCHS.values())


def test_aims_pooling_is_attention_of_one_query_over_normalised_patches():
    torch.manual_seed(0)
    pool, x = AttentionPooling(12, 3).double().train(), torch.randn(2, 7, 12, dtype=torch.float64) * 3 + 1
    flat = x.reshape(14, 12)
    normal = ((flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-6).sqrt()).view(2, 7, 12)
    for b in range(2):
        heads = []
        for h in (slice(0, 4), slice(4, 8), slice(8, 12)):
            scores = normal[b] @ pool.key.weight[h].T @ pool.query[h] / 4 ** 0.5
            heads.append(scores.softmax(0) @ (normal[b] @ pool.value.weight[h].T))
        torch.testing.assert_close(pool(x)[b], torch.cat(heads))
    assert sum(p.numel() for p in pool.parameters()) == 12 + 2 * 12 * 12


def test_our_batch_norm_is_torchs_in_training_and_evaluation():
    ours, theirs = BatchNorm(6).double(), nn.BatchNorm1d(6, eps=1e-6, affine=False).double()
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(4, 5, 6, generator=g, dtype=torch.float64, requires_grad=True)
        w = torch.randn(4, 5, 6, generator=g, dtype=torch.float64)
        a, b = ours(x), theirs(x.flatten(0, 1)).view_as(x)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad((a * w).sum(), x)[0], torch.autograd.grad((b * w).sum(), x)[0])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.flatten(0, 1)).view_as(x))


def normalise_a_share(rank, world, path):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=world)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(4, 5, 6, generator=g, dtype=torch.float64).tensor_split(world)[rank] for _ in range(2))
    scale = torch.ones(6, dtype=torch.float64, requires_grad=True)
    layer = BatchNorm(6).double()
    (layer(x * scale).tanh() * w).mean().backward()
    train.average_over_processes([scale.grad], world)
    if rank == 0:
        torch.save((scale.grad, layer.mean, layer.variance), f"{path}/{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()        # its threads must not outlive the process


def test_batch_norm_over_two_processes_is_that_of_one_with_its_gradient(tmp_path):
    normalise_a_share(0, 1, tmp_path)
    mp.spawn(normalise_a_share, (2, tmp_path), nprocs=2)
    for one, two in zip(*(torch.load(tmp_path / f"{world}.pt") for world in (1, 2))):
        torch.testing.assert_close(two, one)


@pytest.mark.parametrize("method", ("frozen", "ep", "aim"))
def test_a_probe_trains_its_head_alone_unless_told_to_train_the_backbone(method):
    trained = lambda model: {n for n, p in model.named_parameters() if p.requires_grad}
    model = built("--method", method)
    assert trained(model) and not any(".backbone." in name for name in trained(model))
    if method != "frozen":
        tuned = built("--method", method, "--train-backbone")
        assert trained(tuned) == {name for name, _ in tuned.named_parameters()}
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in tuned.state_dict().items())
        with pytest.raises(ValueError, match="keep cannot be given"):
            model(pictures(1, 96), torch.ones(1, 144))


# ---------------------------------------------------------------- ablations
@pytest.fixture(scope="module")
def batch():
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=16)["train"]
    return torch.utils.data.default_collate([samples[0, i] for i in range(4)])


def step(batch, *flags):
    """-> initial weights, loss terms and gradients of one step."""
    model = built(*flags).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    terms = train.gradients(model, config(*flags), batch, 0)
    return before, terms, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def plain(batch):
    return step(batch)


SHAPING = {"presence", "background", "orthogonality", "equivariance", "variation", "entropy"}


@pytest.mark.parametrize("flag, gone", [("--no-shaping", SHAPING), ("--no-stage1-class", {"class1"}),
                                        ("--freeze-stage2", set()), ("--no-joint", set())])
def test_an_ablation_keeps_weights_and_noise_and_removes_only_what_it_names(flag, gone, batch, plain):
    before, terms, grads = step(batch, flag)
    assert before.keys() == plain[0].keys() and all(torch.equal(x, before[name]) for name, x in plain[0].items())
    assert plain[1].keys() - terms.keys() == gone
    packs = {"class2"} if flag == "--no-joint" else set()        # stage 2 then packs its tokens, which rounds otherwise
    for name in terms.keys() - {"loss"}:                 # same images, noise and masks
        torch.testing.assert_close(terms[name], plain[1][name], rtol=1e-6 if name in packs else 0, atol=0)
    missing = plain[2].keys() - grads.keys()
    if flag == "--freeze-stage2":
        tokens = ("cls_token", "register_tokens", "pos_embed")
        assert missing == {n for n in plain[2] if n.startswith("predictor.backbone.") and not n.endswith(tokens)}
    else:
        assert missing == ({"selector.classifier.weight"} if gone == {"class1"} else set())
    for name, g in grads.items():                        # nothing but stage 1 feels these; stage 2 has its own loss
        if name.startswith("predictor."):
            torch.testing.assert_close(g, plain[2][name], msg=name)
    changed = not torch.allclose(grads["selector.prototypes"], plain[2]["selector.prototypes"])
    assert changed == (flag != "--freeze-stage2")


@pytest.mark.parametrize("flags, changed", [
    (("--hardness", "soft"), {"class2"}), (("--part-dropout1", 0), {"class1"}), (("--part-dropout2", 0), {"class2"})])
def test_a_change_of_the_mask_or_of_a_dropout_leaves_weights_and_all_other_losses_alone(flags, changed, batch, plain):
    before, terms, _ = step(batch, *flags)
    assert all(torch.equal(x, before[name]) for name, x in plain[0].items())
    different = {name for name, x in plain[1].items() if not torch.equal(x, terms[name])}
    assert terms.keys() == plain[1].keys() and different - {"loss"} == changed


def test_a_late_mask_leaves_stage_1_alone_and_differs_from_the_early_one_of_the_same_pooling_in_stage_2(batch):
    early, late = step(batch, "--pooling", "mean"), step(batch, "--pooling", "mean", "--masking", "late")
    assert all(torch.equal(x, late[0][name]) for name, x in early[0].items())
    assert {name for name, x in early[1].items() if not torch.equal(x, late[1][name])} - {"loss"} == {"class2"}


def test_k_changes_the_number_of_prototypes_and_leaves_both_backbones_alone():
    plain, more = built().state_dict(), built("--k", 6).state_dict()
    differ = {name for name in plain if plain[name].shape != more[name].shape or not torch.equal(plain[name], more[name])}
    assert plain.keys() == more.keys() and not any(".backbone." in name for name in differ)
    assert more["selector.prototypes"].shape[0] == 7


def test_every_setting_of_a_run_is_in_its_config_and_rebuilds_the_model():
    cfg = config("--no-shaping", "--no-stage1-class", "--freeze-stage2")
    assert (cfg.shaping, cfg.stage1_class, cfg.freeze_stage2) == (False, False, True)
    for method in baselines.METHODS:
        cfg = config("--method", method)
        assert baselines.build(vars(cfg), 2).state_dict().keys() == train.build_model(cfg, torch.device("cpu")).state_dict().keys()


@pytest.mark.parametrize("flags, words", [
    (("--method", "erm", "--no-joint"), ("--joint", "erm", "ifam")),
    (("--method", "pdiscoformer", "--freeze-stage2"), ("--freeze-stage2", "pdiscoformer")),
    (("--method", "pdiscoformer", "--no-stage1-class"), ("--stage1-class",)),
    (("--method", "ep", "--k", 4), ("--k", "ifam, pdiscoformer")),
    (("--method", "frozen", "--train-backbone"), ("--train-backbone", "ep, aim")),
    (("--train-backbone",), ("--method ifam",)),
    (("--method", "late-truth", "--pooling", "cls"), ("late mask", "mean")),
    (("--method", "frozen", "--weights", "none"), ("--method frozen", "--weights")),
    (("--freeze-stage2", "--weights", "none"), ("--freeze-stage2", "random")),
], ids=lambda x: "".join(map(str, x)) if isinstance(x, tuple) else x)
def test_a_flag_that_a_method_does_not_have_is_one_line(flags, words, tmp_path, capsys):
    line = fails(train.main, "--data", "waterbirds", "--mini", *flags, "--limit", 16, "--out", tmp_path / "run")(capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()
