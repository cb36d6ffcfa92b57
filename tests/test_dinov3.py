"""Rotary positions and DINOv3: its arrays under both kinds of names, every path of a mask, and files that do not fit."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, agrees, below, golden
from models import TINY, pictures, tiny, two_stages
from tiny import fails, train as run_train

import runs
import train
import vit as lesson
import weights
from ifam import IFAM, Static
from measure import leakage
from settings import UsageError
from vit import ARCHS, ViT, attend_all, build_vit, rotate, rotations
from weights import load_backbone, load_pretrained

ROTARY = dict(TINY, positions="rotary")
BOTH = pytest.mark.parametrize("arch", [TINY, ROTARY], ids=["learned", "rotary"])
KINDS = pytest.mark.parametrize("kind", ["mlp", "swiglu"])
RAGGED = torch.zeros(4, 15)
RAGGED[1, [0, 7, 14]] = 1
RAGGED[2, 3:11] = 1
RAGGED[3] = 1                                                                    # image 0 keeps nothing


def small(kind, size=(80, 48), **other):
    return ViT(size, **{**dict(patch=16, width=64, depth=2, heads=2, ffn=kind, hidden=256, layer_scale=1.0, positions="rotary", eps=1e-5), **other}).eval()


# ---------------------------------------------------------------- names, written here the other way round
def official(kind):
    """The state dict of a golden model under official names."""
    z = golden("dinov3_small")
    if kind == "swiglu":
        return below("swiglu/official/", z)
    state = {"rope_embed.periods": 100 ** (torch.arange(8) / 8)}
    for name, x in below("mlp/hf/", z).items():
        if any(f".attention.{one}_proj." in name for one in "qkv"):           # put together below
            continue
        for theirs, ours in (("embeddings.register_tokens", "storage_tokens"), ("embeddings.patch_embeddings", "patch_embed.proj"), ("embeddings.", ""),
                             ("model.layer", "blocks"), ("attention.o_proj", "attn.proj"), ("up_proj", "fc1"), ("down_proj", "fc2"),
                             ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma")):
            name = name.replace(theirs, ours)
        state[name] = x.view(1, 64) if name == "mask_token" else x
    for i in (0, 1):
        q, k, v = (below(f"mlp/hf/model.layer.{i}.attention.{one}_proj.", z) for one in "qkv")
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([q["weight"], k["weight"], v["weight"]])
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q["bias"], torch.full((64,), 7.0), v["bias"]])   # masked: any number
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(64)
    return state


def hugging_face(kind):
    """The same under those of Hugging Face."""
    z = golden("dinov3_small")
    if kind == "mlp":
        return below("mlp/hf/", z)
    state = {}
    for name, x in below("swiglu/official/", z).items():
        if "qkv.bias_mask" in name or name == "rope_embed.periods":
            continue
        for ours, theirs in (("storage_tokens", "embeddings.register_tokens"), ("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
                             ("patch_embed.proj", "embeddings.patch_embeddings"), ("blocks.", "model.layer."), ("attn.proj", "attention.o_proj"),
                             ("mlp.w1", "mlp.gate_proj"), ("mlp.w2", "mlp.up_proj"), ("mlp.w3", "mlp.down_proj"), ("ls1.gamma", "layer_scale1.lambda1"),
                             ("ls2.gamma", "layer_scale2.lambda1")):
            name = name.replace(ours, theirs)
        if "qkv" in name:
            for one, part in zip("qkv", x.chunk(3)):
                if (one, name[-4:]) != ("k", "bias"):
                    state[name.replace("attn.qkv", f"attention.{one}_proj")] = part
        else:
            state[name] = x.view(1, 1, 64) if name.endswith("mask_token") else x
    return state


def timm(kind, bias=True):
    """The same as timm's Eva has them; without bias for the models whose bias is 0."""
    state = {}
    for name, x in official(kind).items():
        if name.endswith((".periods", ".bias_mask", "mask_token")):
            continue
        for ours, theirs in (("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), ("mlp.w1", "mlp.fc1_g"),
                             ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2")):
            name = name.replace(ours, theirs)
        if name.endswith("qkv.bias"):
            state |= {name.replace("qkv.bias", f"{one}_bias"): x.chunk(3)[i] for one, i in (("q", 0), ("v", 2)) if bias}
        else:
            state[name] = x
    return state


FAMILIES = {"official": official, "hf": hugging_face, "timm": timm}
IN_FAMILIES = pytest.mark.parametrize("family", FAMILIES)


@KINDS
@pytest.mark.parametrize("family", ["official", "hf"])
def test_the_names_of_this_test_are_those_of_the_golden_models(kind, family):
    shapes = json.loads((HERE / "golden" / "dinov3_names.json").read_text())[f"{kind}/{family}"]
    assert {name: list(x.shape) for name, x in FAMILIES[family](kind).items()} == shapes


@torch.no_grad()
@IN_FAMILIES
@pytest.mark.parametrize("kind, size", [("mlp", "square"), ("mlp", "tall"), ("swiglu", "tall")])
def test_weights_of_dinov3_give_its_tokens_under_all_names(kind, size, family):
    z = golden("dinov3_small")
    vit = small(kind, tuple(z[f"{kind}/{size}/x"].shape[2:]))
    load_backbone(vit, FAMILIES[family](kind))
    agrees(vit(z[f"{kind}/{size}/x"]), z[f"{kind}/{size}/tokens"])
    agrees(vit(z[f"{kind}/{size}/x"], torch.ones(1, len(z[f"{kind}/{size}/tokens"][0]) - 5)), z[f"{kind}/{size}/tokens"])


@KINDS
@IN_FAMILIES
def test_every_missing_key_and_every_other_one_of_a_dinov3_file_is_named(kind, family):
    state, vit = FAMILIES[family](kind), small(kind)
    for key in state.keys():
        if not key.endswith(("mask_token", "periods")):
            with pytest.raises(ValueError, match="weights do not fit the model: missing "):
                load_backbone(vit, {name: x for name, x in state.items() if name != key})
    block = {"official": "blocks.1.", "timm": "blocks.1.", "hf": "model.layer.1."}[family]
    for key in ("head.weight", "pos_embed", f"{block}mlp.extra.weight", f"{block}norm3.weight"):
        with pytest.raises(ValueError, match=f"unexpected .*{key.split('.')[-2 if '.' in key else 0]}"):
            load_backbone(vit, {**state, key: torch.zeros(64)})


def test_the_bias_of_keys_is_0_after_loading_and_a_mask_that_was_never_set_is_refused():
    vit = small("mlp")
    for state in (official("mlp"), hugging_face("mlp"), timm("mlp")):
        load_backbone(vit, state)
        query, key, value = vit.blocks[1].attn.qkv.bias.chunk(3)
        assert key.eq(0).all() and query.abs().min() > 0 and value.abs().min() > 0
    load_backbone(vit, timm("mlp", bias=False))
    assert vit.blocks[1].attn.qkv.bias.eq(0).all()
    with pytest.raises(ValueError, match="blocks.0.attn.qkv.bias_mask has values other than 0 and 1"):
        load_backbone(vit, {**official("mlp"), "blocks.0.attn.qkv.bias_mask": torch.full((192,), torch.nan)})


def test_periods_may_be_rounded_but_not_others_and_what_only_pretraining_uses_is_left_out():
    state, vit = official("mlp"), small("mlp")
    load_backbone(vit, {**state, "rope_embed.periods": state["rope_embed.periods"].bfloat16(), "local_cls_norm.weight": torch.ones(64)})
    with pytest.raises(ValueError, match="periods 1 to 3.16e"):
        load_backbone(vit, {**state, "rope_embed.periods": 1e4 ** (torch.arange(8) / 8)})


# ---------------------------------------------------------------- rotary positions
def test_a_rotation_is_a_complex_number_of_angle_2_pi_coordinate_over_period():
    q = torch.randn(2, 5 + 6, 2, 16, dtype=torch.float64)
    turned = rotate(q, rotations((2, 3), 5, 16).double())
    assert torch.equal(turned[:, :5], q[:, :5])                                  # class token and registers have no place
    for n in range(6):
        where = ((n // 3 + 0.5) / 2 * 2 - 1, (n % 3 + 0.5) / 3 * 2 - 1)
        angles = torch.tensor([2 * torch.pi * where[axis] / 100 ** (i / 4) for axis in (0, 1) for i in range(4)], dtype=torch.float64)
        theirs = torch.complex(q[:, 5 + n, :, :8], q[:, 5 + n, :, 8:]) * torch.polar(torch.ones_like(angles), angles)
        agrees(turned[:, 5 + n], torch.cat([theirs.real, theirs.imag], -1), 1e-6)


@torch.no_grad()
def test_permuting_patches_together_with_their_positions_permutes_the_output():
    torch.manual_seed(0)
    vit, x = small("swiglu").double(), pictures(2, 80, 48).double()
    order = torch.cat([torch.arange(5), 5 + torch.randperm(15)])
    tokens, turn = vit.embed(x), vit.turn()
    whole = vit._run(tokens, attend_all)
    agrees(vit._run(tokens[:, order], attend_all, turn=turn[:, order]), whole[:, order], 1e-12)
    assert not torch.allclose(vit._run(tokens[:, order], attend_all), whole[:, order], rtol=0, atol=1e-3)


def test_training_moves_no_position():
    vit, x = small("mlp"), pictures(2, 80, 48)
    assert torch.equal(vit.train()(x), vit.eval()(x)) and torch.equal(vit(x), vit(x))


def by_hand(vit, images, keep):
    """Kept tokens of one image after another, as if the others had never been there -> [(1, kept, D)]."""
    out = []
    for image, kept in zip(images, keep.bool()):
        rows = F.pad(kept, (vit.prefix, 0), value=True)
        turn = vit.turn()
        out.append(vit._run(vit.embed(image[None])[:, rows], attend_all, turn=turn if turn is None else turn[:, rows]))
    return out


@BOTH
def test_packed_joint_masked_and_dense_paths_agree(arch):
    torch.manual_seed(0)
    vit, x = build_vit(arch, (42, 70)).double().eval(), pictures(4, 42, 70).double()
    readable = F.pad(RAGGED, (vit.prefix, 0), value=1.0).bool()
    packed = vit(x, RAGGED)
    joint = vit(x, RAGGED.clone().requires_grad_())
    soft = vit(x, RAGGED.double(), hard=False)                                   # masked attention over all tokens
    vit.packed = False
    masked = vit(x, RAGGED)
    for i, alone in enumerate(by_hand(vit, x, RAGGED)):
        for tokens in (packed, joint, masked, soft):
            agrees(tokens[i][readable[i]], alone[0], 1e-12)
    agrees(masked, joint, 1e-12)
    vit.packed = True
    agrees(vit(x, torch.ones(4, 15)), vit(x), 1e-12)
    for keep in (None, RAGGED, RAGGED.clone().requires_grad_()):
        agrees(vit(x, keep, class_only=True), vit(x, keep)[:, :1], 1e-12)


@BOTH
def test_gradients_of_the_packed_and_the_joint_path_agree_and_the_masks_gradient_is_a_difference_quotient(arch):
    torch.manual_seed(0)
    vit, x = build_vit(arch, (42, 70)).double(), pictures(4, 42, 70).double()
    found, keep = [], RAGGED.double()
    for mask in (keep, asked := keep.clone().requires_grad_()):
        vit.zero_grad()
        vit(x, mask)[:, 0].square().sum().backward()
        found.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    for ours, expected in zip(*found):
        agrees(ours, expected, 1e-9)
    with torch.no_grad():
        for image, patch in ((0, 3), (1, 7), (2, 12)):                           # dropped, kept, dropped
            step = torch.zeros_like(keep)
            step[image, patch] = 1e-6 if keep[image, patch] == 0 else -1e-6
            slope = (vit(x, keep + step, hard=False)[:, 0].square().sum() - vit(x, keep, hard=False)[:, 0].square().sum()) / step.sum()
            assert slope.item() == pytest.approx(asked.grad[image, patch].item(), rel=1e-3)


@pytest.mark.parametrize("dense", [False, True], ids=["packed", "joint"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_no_dropped_pixel_reaches_a_logit_under_rotary_positions(pooling, dense):
    model, x = tiny((42, 70), arch=ROTARY, pooling=pooling), pictures(4, 42, 70)
    mask, seen = lambda: RAGGED.clone().requires_grad_(dense), leakage.pixels(RAGGED, (3, 5), 14).bool()
    logits = model(x, keep=mask()).logits
    for paint in (5 * torch.randn_like(x), x.roll(1, 0), torch.zeros_like(x)):
        assert torch.equal(logits, model(torch.where(seen, x, paint), keep=mask()).logits)
    x.requires_grad_()
    gradient, = torch.autograd.grad(model(x, keep=mask()).logits.sum(), x)
    seen = seen.expand_as(gradient)
    assert gradient[~seen].eq(0).all() and gradient[seen].abs().max() > 0


def test_the_last_attention_reads_turned_keys_and_gives_them_as_they_were_before():
    torch.manual_seed(0)
    vit, x = build_vit(ROTARY, (42, 70)).double(), pictures(2, 42, 70).double()
    seen = []
    vit.blocks[-1].attn.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    vit(x)
    (before, after), attn = seen[0], vit.blocks[-1].attn
    attention, keys = vit.last_attention(x)
    agrees(keys, attn.project(before)[1][:, 5:].transpose(1, 2), 1e-12)          # FOUND compares what patches look like
    q, k, v = attn.project(before, vit.turn())
    whole = (torch.einsum("bhd,bthd->bht", q[:, 0], k) / 16 ** 0.5).softmax(-1)
    agrees(attention, whole[..., 5:], 1e-12)
    agrees(attn.proj(torch.einsum("bht,bthd->bhd", whole, v).flatten(1)), after[:, 0], 1e-12)


def test_under_autocast_queries_keys_and_values_have_one_type():
    torch.manual_seed(0)
    vit, x = small("mlp"), pictures(2, 80, 48)
    keep = (torch.rand(2, 15) < 0.5).float()
    with torch.no_grad():
        expected, exact = vit(x, keep), vit(x)
        with torch.autocast("cpu", torch.bfloat16):
            agrees(vit(x, keep).float(), expected, 0.05)
            agrees(vit(x).float(), exact, 0.05)


# ---------------------------------------------------------------- sizes
@torch.no_grad()
def test_the_size_may_be_any_multiple_of_the_patch_and_no_weight_changes():
    state = weights.official_names(official("mlp"))
    for size in (16, 48, (32, 112), 224):
        vit = small("mlp", size)
        load_backbone(vit, official("mlp"))
        assert all(torch.equal(x, state[name]) for name, x in vit.state_dict().items())
        assert vit(pictures(1, *((size, size) if isinstance(size, int) else size))).isfinite().all()
    with pytest.raises(ValueError, match="56x56 is not a multiple of the patch size 16, as 48 is"):
        small("mlp", 56)


@pytest.mark.parametrize("arch, millions", [("s16", 21.6), ("s16plus", 28.7), ("b16", 85.7), ("l16", 303.1)])
def test_the_sizes_of_dinov3_have_as_many_parameters_as_published(arch, millions):
    with torch.device("meta"):
        vit = build_vit(arch, 224)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert vit.patch == 16 and vit.norm.eps == vit.blocks[0].norm2.eps == 1e-5 and vit.pos_embed is None and vit.prefix == 5
    assert vit.width // vit.blocks[0].attn.heads == 64


@pytest.mark.parametrize("make, message", [
    (lambda: ViT(28, positions="sines"), "learned or rotary, not 'sines'"),
    (lambda: ViT(28, width=36, heads=6, positions="rotary"), "multiple of 4 channels a head, not 6"),
    (lambda: build_vit("7b16", 224), "7b16 is refused: DINOv3's ViT-7B")])
def test_what_no_rotary_vit_can_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@torch.no_grad()
def test_a_model_with_rotary_positions_is_exported_with_fixed_shapes():
    model, x = tiny((42, 70), arch=ROTARY), pictures(2, 42, 70)
    program = torch.export.export(Static(model), (x,)).module()
    agrees(program(x)[0], model(x).logits)
    assert torch.equal(program(x)[2], model(x).keep)


def test_a_rotary_model_trains_its_tokens_and_has_no_position_to_train():
    model = IFAM(2, 4, ROTARY, 70)
    train.freeze_backbone(model.selector)
    moves = [name for name, p in model.selector.backbone.named_parameters() if p.requires_grad]
    assert moves == ["cls_token", "register_tokens"]


# ---------------------------------------------------------------- --weights
def test_dinov3_is_gated_and_the_error_says_where_to_ask_which_file_goes_where_and_what_licence_it_has(hub):
    for arch, file in (("s16", "dinov3_vits16_pretrain_lvd1689m*.pth"), ("s16plus", "dinov3_vits16plus_pretrain_lvd1689m*.pth"), ("l16/6", "dinov3_vitl16_pretrain_lvd1689m*.pth")):
        with pytest.raises(UsageError) as error:
            load_pretrained(two_stages(), "dinov3", arch)
        line = str(error.value)
        assert all(word in line for word in (file, str(hub[0]), "ask for access at https://ai.meta.com/", "DINOv3 License travels with it", "--weights FILE"))
        assert "\n" not in line
    assert hub[1] == []                                  # no network was asked


@pytest.mark.parametrize("arch, registers, words", [
    ("b", 4, "dinov3 has no b architecture: add --arch s16"), ("mini", 4, "dinov3 has no mini"), ("b16", 0, "4 registers"), ("g", 4, "no g architecture")])
def test_dinov3_of_another_family_or_without_registers_is_refused(arch, registers, words, hub):
    with pytest.raises(UsageError, match=words):
        load_pretrained(two_stages(), "dinov3", arch, registers)


def test_a_file_of_dinov3_put_there_by_hand_is_used_and_two_are_not(hub):
    model = two_stages()
    for stage in (model.selector, model.predictor):
        stage.backbone = small("mlp")
    torch.save(official("mlp"), hub[0] / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    load_pretrained(model, "dinov3", "s16")
    assert all(torch.equal(x, weights.official_names(official("mlp"))[name]) for name, x in model.selector.backbone.state_dict().items())
    torch.save(official("mlp"), hub[0] / "dinov3_vits16_pretrain_lvd1689m-00000000.pth")
    with pytest.raises(UsageError, match="2 files fit"):
        load_pretrained(model, "dinov3", "s16")


def test_the_7b_is_refused_by_name_and_by_its_file(tmp_path, capsys):
    line = fails(train.main, "--data", "waterbirds", "--mini", "--arch", "7b16", "--out", tmp_path / "run")(capsys)
    assert "--arch 7b16 is refused" in line and "ViT-7B" in line and "l16" in line
    torch.save({"cls_token": torch.zeros(1, 1, 4096)}, tmp_path / "7b.pth")
    with pytest.raises(UsageError, match="is DINOv3's ViT-7B, which is refused"):
        load_pretrained(two_stages(), str(tmp_path / "7b.pth"), "l16")


def test_weights_of_the_other_family_say_which_flags_they_want(tmp_path):
    with torch.device("meta"):
        vits = {name: build_vit(name, 48 if ARCHS[name].get("patch") == 16 else 56) for name in ("s", "s16", "s16plus", "mini", "mini-rotary")}
    of = lambda file, own: weights.other_size(vits[file].state_dict(), vits[own])
    assert of("s16", "s") == "this is a ViT-S/16 with 4 registers and rotary positions: --arch s16 --registers 4"
    assert of("s16plus", "s16") == "this is a ViT-S+/16 with 4 registers and rotary positions: --arch s16plus --registers 4"
    assert of("mini", "mini-rotary") == "this is a ViT-Mini/8 with 4 registers: --arch mini --registers 4"
    assert of("s", "s16") == "this is a ViT-S/14 with 4 registers: --arch s --registers 4" and of("s16", "s16") == ""
    with pytest.raises(UsageError, match="dinov2 has no s16 architecture.*--weights dinov3"):
        load_pretrained(two_stages(), "dinov2", "s16")


def test_stage_1_may_start_from_a_file_of_its_own_and_of_another_family(tmp_path):
    torch.manual_seed(0)
    files = {name: build_vit(arch, 70) for name, arch in (("one", TINY), ("two", dict(ROTARY, width=48, patch=7)))}
    for name, vit in files.items():
        torch.save(vit.state_dict(), tmp_path / f"{name}.pt")
    model = IFAM(2, 3, TINY, 70, selector_arch=dict(ROTARY, width=48, patch=7), selector_size=42)
    load_pretrained(model, str(tmp_path / "one.pt"), "s", 4, "s16", str(tmp_path / "two.pt"))
    assert all(torch.equal(x, files["two"].state_dict()[name]) for name, x in model.selector.backbone.state_dict().items())
    assert all(torch.equal(x, files["one"].state_dict()[name]) for name, x in model.predictor.backbone.state_dict().items())
    fresh = IFAM(2, 3, TINY, 70)
    before = {name: x.clone() for name, x in fresh.predictor.state_dict().items()}
    load_pretrained(fresh, "none", "s", 4, "", str(tmp_path / "one.pt"))          # stage 1 alone is pretrained
    assert all(torch.equal(x, before[name]) for name, x in fresh.predictor.state_dict().items())
    assert torch.equal(fresh.selector.backbone.cls_token, files["one"].cls_token)


def test_a_run_whose_stages_start_from_different_files_freezes_stage_1_and_remembers_both(tmp_path, capsys):
    out = run_train(tmp_path / "run", "--selector-arch", "mini-rotary", "--selector-weights", "mini-rotary", "--k", 3)
    config = json.loads((out / "config.json").read_text())
    assert (config["weights"], config["selector_weights"], config["selector_arch"]) == ("mini-parts", "mini-rotary", "mini-rotary")
    model, _ = runs.load_model(out / "last.pt")
    start = weights.read_file(weights.MINIATURES["mini-rotary"], "weights")
    assert torch.equal(model.selector.backbone.blocks[0].attn.qkv.weight, start["blocks.0.attn.qkv.weight"].float())
    assert model.selector.backbone.pos_embed is None and model.predictor.backbone.pos_embed is not None
    line = fails(train.main, "--data", "waterbirds", "--mini", "--method", "erm", "--selector-weights", "mini")(capsys)
    assert "--selector-weights means nothing to --method erm" in line


def test_a_run_with_rotary_positions_takes_any_multiple_of_the_patch_and_changes_no_weight_for_it(tmp_path, capsys):
    out = run_train(tmp_path / "run", "--arch", "mini-rotary", "--weights", "mini-rotary", "--size", 72, "--k", 3)
    model, _ = runs.load_model(out / "best.pt")
    start = weights.read_file(weights.MINIATURES["mini-rotary"], "weights")
    own = model.selector.backbone.state_dict()
    assert own.keys() == start.keys() and model.grid == (9, 9)
    assert all(torch.equal(x, start[name].float()) for name, x in own.items() if not name.endswith("_tokens") and name != "cls_token")
    line = fails(train.main, "--data", "waterbirds", "--mini", "--arch", "mini-rotary", "--weights", "mini-rotary", "--size", 70)(capsys)
    assert "70x70 is not a multiple of the patch size 8, as 64 is" in line


# ---------------------------------------------------------------- NeCo and Franca: DINOv2's network in other files
def dense_successors():
    """{what a file looks like: (content, what is said of it)}; the backbone in all of them is the same."""
    vit = build_vit(dict(TINY, depth=3), 70, registers=0)
    state = {**vit.state_dict(), "mask_token": torch.zeros(1, 32)}
    under = lambda prefix, x: {prefix + name: value for name, value in x.items()}
    other = {name: x + 1 for name, x in state.items()}
    chunked = {name.replace("blocks.", "blocks.0.", 1) if name.startswith("blocks.0") else name.replace("blocks.", "blocks.1.", 1): x for name, x in state.items()}
    head = {"dino_head.last_layer.weight": torch.zeros(3), "ibot_head.mlp.0.bias": torch.zeros(3)}
    return vit, {
        "NeCo, teacher and student": ({"state_dict": {**under("teacher.", state), **under("student.", other)}, "epoch": 3}, "left out student."),
        "NeCo, student alone": (under("student.", state), "names without 'student.'"),
        "Franca, bare": (state, ""),
        "Franca, in chunks": (chunked, ""),
        "Franca, of its pretraining": ({"teacher": {**under("backbone.", chunked), **head}}, "left out dino_head., ibot_head.")}


@pytest.mark.parametrize("name", dense_successors()[1])
def test_files_of_neco_and_franca_are_read_and_what_is_left_out_is_said(name, tmp_path, capsys):
    torch.manual_seed(0)
    vit, files = dense_successors()
    content, said = files[name]
    torch.save(content, tmp_path / "vit.ckpt")
    model = IFAM(2, 3, dict(TINY, depth=3), 70, registers=0)
    load_pretrained(model, str(tmp_path / "vit.ckpt"), "s", 0)
    line = capsys.readouterr().out
    assert said in line and line.count("\n") == bool(said)
    assert all(torch.equal(x, vit.state_dict()[key]) for key, x in model.selector.backbone.state_dict().items())


def test_a_head_that_is_not_known_is_an_error_and_not_left_out(tmp_path):
    vit, files = dense_successors()
    content = {"teacher": {**files["Franca, of its pretraining"][0]["teacher"], "other_head.weight": torch.zeros(3)}}
    torch.save(content, tmp_path / "vit.ckpt")
    with pytest.raises(UsageError, match="missing cls_token"):
        load_pretrained(IFAM(2, 3, dict(TINY, depth=3), 70, registers=0), str(tmp_path / "vit.ckpt"), "s", 0)


def test_the_lesson_knows_each_arch_and_weights_names_the_largest():
    assert set(lesson.REFUSED).isdisjoint(ARCHS) and "l16" in lesson.REFUSED["7b16"]
