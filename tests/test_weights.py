"""Weights of every family against the tokens that their own code computed, and files that do not fit."""
import argparse
import json
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import HERE, agrees, below, golden
from models import TINY, as_published, pictures, published_model, their_name, there, tiny, two_stages

import data
import runs
import evaluate
import ifam
import train
import weights
from vit import ARCHS, ViT
from settings import UsageError
from tiny import TINY as FLAGS
from tiny import fails
from runs import load_published
from weights import load_backbone, load_pretrained


# ---------------------------------------------------------------- backbones
VARIANTS = {"reg_mlp": dict(registers=4), "reg_swiglu": dict(registers=4, ffn="swiglu"), "noreg_mlp": dict(registers=0)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("height, width", [(70, 70), (98, 84)])
def test_official_dinov2_weights_give_the_official_tokens(variant, height, width):
    z = golden("dinov2_small")
    vit = ViT((height, width), 14, 48, 3, 3, layer_scale=1.0, **VARIANTS[variant])
    load_backbone(vit, below(f"sd/{variant}/", z))
    theirs = below(f"{variant}/{height}x{width}/x_norm_", z)
    tokens = vit(z[f"x/{height}x{width}"])
    agrees(tokens[:, 0], theirs["clstoken"])
    agrees(tokens[:, vit.prefix:], theirs["patchtokens"])
    if vit.register_tokens is not None:
        agrees(tokens[:, 1:vit.prefix], theirs["regtokens"])


@pytest.mark.parametrize("antialias, offset", [(True, 0.0), (False, 0.1), (False, 0.0)])
@pytest.mark.parametrize("grid", [(5, 5), (7, 6), (3, 4)], ids=str)
def test_position_embeddings_are_resampled_as_officially(grid, antialias, offset):
    z = golden("dinov2_small")
    theirs = z[f"posinterp/aa{int(antialias)}_off{offset}/{grid[0] * 14}x{grid[1] * 14}"]
    ours = weights.resample_positions(z["sd/reg_mlp/pos_embed"], grid, antialias, offset)
    agrees(ours, theirs)


def test_backbone_weights_that_do_not_fit_are_named():
    state = below("sd/reg_mlp/", golden("dinov2_small"))
    fresh = lambda **other: ViT(70, 14, 48, 3, 3, layer_scale=1.0, **other)
    with pytest.raises(ValueError, match="missing norm.bias"):
        load_backbone(fresh(), {name: tensor for name, tensor in state.items() if name != "norm.bias"})
    with pytest.raises(ValueError, match="unexpected register_tokens"):
        load_backbone(fresh(registers=0), state)
    with pytest.raises(ValueError, match=r"cls_token is \(1, 1, 48\), the model has \(1, 1, 24\)"):
        load_backbone(ViT(70, 14, 24, 3, 3), state)


def as_timm(official):
    """Official weights as timm would write them."""
    names = {name: name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.") for name in official if name != "mask_token"}
    state = {new: official[name] for name, new in names.items()}
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


@pytest.mark.parametrize("variant, height, width", [
    ("reg_mlp", 70, 70), ("reg_mlp", 98, 84), ("reg_swiglu", 70, 70), ("reg_swiglu", 98, 84), ("noreg_mlp", 70, 70)])
def test_timm_files_give_the_official_tokens(variant, height, width):
    z = golden("dinov2_small")
    vit = ViT((height, width), 14, 48, 3, 3, layer_scale=1.0, **VARIANTS[variant])
    load_backbone(vit, as_timm(below(f"sd/{variant}/", z)))
    tokens = vit(z[f"x/{height}x{width}"])
    agrees(tokens[:, vit.prefix:], z[f"{variant}/{height}x{width}/x_norm_patchtokens"])
    agrees(tokens[:, 0], z[f"{variant}/{height}x{width}/x_norm_clstoken"])


def test_positions_of_a_timm_file_without_registers_are_resampled_with_antialias_and_no_offset():
    # timm differs from the official code here: 0.35 in the tokens at 98x84
    z = golden("dinov2_small")
    vit = ViT((98, 84), 14, 48, 3, 3, layer_scale=1.0, registers=0)
    load_backbone(vit, {**as_timm(below("sd/noreg_mlp/", z)), "pos_embed": z["sd/reg_mlp/pos_embed"]})
    agrees(vit.pos_embed, z["posinterp/aa1_off0.0/98x84"])


HUGGING_FACE = {"dinov2_reg": dict(registers=4), "dinov2_swiglu": dict(registers=0, ffn="swiglu")}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_files_give_the_tokens_of_its_models(name):
    z = golden("hf_dinov2_small")
    vit = ViT((98, 84), 14, 48, 3, 3, layer_scale=1.0, **HUGGING_FACE[name])
    load_backbone(vit, below(f"sd/{name}/", z))
    agrees(vit(z["x/98x84"]), z[f"{name}/98x84/last_hidden_state"])


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_missing_key_of_a_hugging_face_file_is_named(name):
    state = below(f"sd/{name}/", golden("hf_dinov2_small"))
    vit = ViT(70, 14, 48, 3, 3, layer_scale=1.0, **HUGGING_FACE[name])
    for key in state.keys() - {"embeddings.mask_token"}:
        ours = weights.rename({key: None}, weights.HUGGING_FACE).popitem()[0]
        with pytest.raises(ValueError, match=f"missing {ours}".replace(".", r"\.")):
            load_backbone(vit, {other: x for other, x in state.items() if other != key})


@pytest.mark.parametrize("key", ["classifier.weight", "encoder.layer.3.norm1.weight", "encoder.layer.0.attention.attention.scale",
                                 "embeddings.pooler"])
def test_an_unexpected_key_of_a_hugging_face_file_is_named(key):
    state = {**below("sd/dinov2_reg/", golden("hf_dinov2_small")), key: torch.zeros(48)}
    with pytest.raises(ValueError, match="unexpected .*" + key.split(".")[-1]):
        load_backbone(ViT(70, 14, 48, 3, 3, layer_scale=1.0), state)


# ---------------------------------------------------------------- --weights
@pytest.mark.parametrize("arch, registers, name", [("s", 4, "dinov2_vits14/dinov2_vits14_reg4"), ("b", 0, "dinov2_vitb14/dinov2_vitb14"),
                                                   ("g", 4, "dinov2_vitg14/dinov2_vitg14_reg4")])
def test_without_a_network_the_file_its_url_and_its_place_are_named(arch, registers, name, hub):
    url = f"https://dl.fbaipublicfiles.com/dinov2/{name}_pretrain.pth"
    place = hub[0] / url.rsplit("/", 1)[1]
    with pytest.raises(UsageError) as error:
        load_pretrained(two_stages(), "dinov2", arch, registers)
    assert all(word in str(error.value) for word in (url, str(place), "by hand", "Network is unreachable"))
    assert hub[1] == [url] and not place.exists()


def test_rad_dino_without_a_network_names_its_file_url_and_place(hub):
    with pytest.raises(UsageError) as error:
        load_pretrained(two_stages(), "rad-dino", "b", 0)
    words = ("model.safetensors", "https://huggingface.co/microsoft/rad-dino/", str(hub[0] / "rad-dino" / "model.safetensors"))
    assert all(word in str(error.value) for word in words)


def test_a_file_put_there_by_hand_is_used_without_asking_the_network(hub):
    state = below("sd/reg_mlp/", golden("dinov2_small"))
    torch.save(state, hub[0] / "dinov2_vits14_reg4_pretrain.pth")
    model = two_stages()
    load_pretrained(model, "dinov2", "s", 4)
    for stage in (model.selector, model.predictor):
        assert all(torch.equal(x, state[name]) for name, x in stage.backbone.state_dict().items())
    assert hub[1] == []


def test_a_download_goes_where_a_file_put_there_by_hand_would_be(hub, monkeypatch):
    state = below("sd/noreg_mlp/", golden("dinov2_small"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **how: torch.save(state, path))
    model = two_stages(registers=0)
    load_pretrained(model, "dinov2", "l", 0)
    assert torch.equal(model.predictor.backbone.norm.bias, state["norm.bias"])
    assert (hub[0] / "dinov2_vitl14_pretrain.pth").is_file()


def test_rad_dino_is_read_from_its_safetensors_file(hub):
    z = golden("hf_dinov2_small")
    weights.write_safetensors(hub[0] / "rad-dino" / "model.safetensors", below("sd/dinov2_swiglu/", z), {"format": "pt"})
    model = two_stages((98, 84), registers=0, ffn="swiglu")
    load_pretrained(model, "rad-dino", "b", 0)
    agrees(model.selector.backbone(z["x/98x84"]), z["dinov2_swiglu/98x84/last_hidden_state"])


EVERY_TYPE = {f"some.{dtype}": (torch.arange(6) % 2).to(dtype).view(2, 3) for dtype in weights.DTYPES.values()} | {
    "one": torch.tensor(3.0), "none": torch.zeros(0, 4), "turned": torch.randn(3, 2).mT}


def test_safetensors_files_are_those_of_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    weights.write_safetensors(tmp_path / "ours.safetensors", EVERY_TYPE, {"what": 'a "text" \u00e9'})
    package.save_file({name: x.contiguous() for name, x in EVERY_TYPE.items()}, tmp_path / "theirs.safetensors", {"what": "text"})
    theirs, (ours, said) = package.load_file(tmp_path / "ours.safetensors"), weights.read_safetensors(tmp_path / "theirs.safetensors")
    assert theirs.keys() == ours.keys() == EVERY_TYPE.keys() and said == {"what": "text"}
    for name, x in EVERY_TYPE.items():
        assert all(y.dtype == x.dtype and y.shape == x.shape and torch.equal(x, y) for y in (theirs[name], ours[name])), name


def test_a_safetensors_file_is_read_and_written_without_the_package(monkeypatch, tmp_path):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    weights.write_safetensors(tmp_path / "x.safetensors", EVERY_TYPE, {"what": "text"})
    found, said = weights.read_safetensors(tmp_path / "x.safetensors")
    assert said == {"what": "text"} and all(torch.equal(x, found[name]) for name, x in EVERY_TYPE.items())
    with pytest.raises(ValueError, match="odd is of type torch.complex64"):
        weights.write_safetensors(tmp_path / "y.safetensors", {"odd": torch.zeros(1, dtype=torch.complex64)}, {})


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"", b"hello", b"\xff" * 64, header(x=ENTRY) + b"1234567", header(x=ENTRY) + b"123456789", header(x=ENTRY | {"shape": [3]}) + b"12345678",
    header(x=ENTRY | {"shape": [-1, -2]}) + b"12345678", header(x=ENTRY | {"data_offsets": [4, 12]}) + b"1" * 12, header(x=ENTRY, y=ENTRY) + b"12345678",
    header(x=ENTRY | {"dtype": "F31"}) + b"12345678", header(x=[]), (2).to_bytes(8, "little") + b"[]", header(x=ENTRY)[:-3]], ids=range(13))
def test_a_damaged_safetensors_file_is_one_line(content, tmp_path):
    (tmp_path / "vit.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="vit.safetensors is damaged, or not weights"):
        weights.read_file(tmp_path / "vit.safetensors", "weights")


@pytest.mark.parametrize("flags, words", [
    (("--weights", "rad-dino"), ("--arch b --registers 0",)),
    (("--weights", "dinov2", "--arch", "s", "--size", 28, "--registers", 2), ("--registers 2",)),
    (("--weights", "dinov4"), ("dinov4: no such file", "dinov3", "rad-dino"))], ids=str)
def test_weights_that_cannot_be_are_one_line(flags, words, tmp_path, capsys):
    line = fails(train.main, *FLAGS, *flags, "--out", tmp_path / "run")(capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture_or_no_weights_at_all_are_refused(tmp_path, capsys):
    torch.save(ViT(96, 8, 64, 2, 2).state_dict(), tmp_path / "narrow.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, words in (("narrow", ("this is a ViT/8 of width 64 with 2 blocks, with 4 registers, which no --arch is",)), ("list", ("dict of tensors",)), ("text", ("damaged, or not a file of backbone weights",))):
        line = fails(train.main, *FLAGS, "--weights", tmp_path / f"{name}.pt", "--out", tmp_path / "run")(capsys)
        assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


class Intruder:
    """Unpickled without care, it would print."""
    def __reduce__(self):
        return print, ("code ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"norm.bias": Intruder()}, tmp_path / "vit.pt")
    with pytest.raises(UsageError, match="holds a (builtins.)?print, which could run code") as error:
        weights.read_file(tmp_path / "vit.pt", "weights")
    assert "damaged" not in str(error.value) and "again" not in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- files as people have them
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "backbone.", "dinov2.", "model.", "encoder.", "module.backbone.",
                                    "_orig_mod.module.encoder."])
def test_one_wrapper_and_prefixes_that_all_names_share_are_taken_off_and_said(wrapper, prefix, tmp_path, capsys):
    state = below("sd/reg_mlp/", golden("dinov2_small"))
    content = {prefix + name: x for name, x in state.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "args": argparse.Namespace(arch="vit_small", lr=1e-4), "student": {"other": torch.zeros(2)}}
    torch.save(content, tmp_path / "vit.pt")
    model = two_stages()
    load_pretrained(model, str(tmp_path / "vit.pt"), "s", 4)
    assert all(torch.equal(x, state[name]) for name, x in model.predictor.backbone.state_dict().items())
    said = capsys.readouterr().out
    assert said.count("\n") == bool(wrapper or prefix) and (repr(wrapper) in said) == bool(wrapper) and (repr(prefix) in said) == bool(prefix)


@pytest.mark.parametrize("change, says", [
    (lambda x: {"head.weight": torch.zeros(2), **{"backbone." + n: t for n, t in x.items()}}, "missing cls_token"),   # not all share it
    (lambda x: {"model": {"state_dict": x}}, "expected a dict of tensors"),      # one level
    (lambda x: {"model": {**x, "epoch": 3}}, "expected a dict of tensors"),
    (lambda x: {"weights": x}, "expected a dict of tensors"),
    (lambda x: {"model": {}}, "missing cls_token"),
    (lambda x: {1: x["norm.bias"]}, "expected a dict of tensors"),
    (lambda x: {**x, "pos_embed": torch.zeros(3)}, "weights do not fit the model: "),
    (lambda x: {"config": {}, "step": 1, "best": None, "model": x}, "is a checkpoint of train.py, a whole model")])
def test_what_is_wrapped_otherwise_is_refused_as_ever(change, says, tmp_path):
    torch.save(change(below("sd/reg_mlp/", golden("dinov2_small"))), tmp_path / "vit.pt")
    with pytest.raises(UsageError, match=says):
        load_pretrained(two_stages(), str(tmp_path / "vit.pt"), "s", 4)


def test_a_namespace_in_a_file_is_data_and_lets_no_code_through(tmp_path, capsys):
    torch.save({"args": argparse.Namespace(lr=1, hook=Intruder()), "model": {}}, tmp_path / "vit.pt")
    with pytest.raises(UsageError, match="which could run code"):
        weights.read_file(tmp_path / "vit.pt", "weights")
    assert capsys.readouterr().out == ""
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "vit.pt")
    assert weights.read_file(tmp_path / "vit.pt", "weights")["args"].lr == 1


def test_a_file_of_another_size_says_which_flags_it_wants(tmp_path):
    def kind(arch="s", registers=4, **own):
        return ViT(56, **{"patch": 14, **ARCHS[arch], **own}, registers=registers)
    of = lambda vit, other, **how: weights.other_size(vit.state_dict(), other, **how)
    assert of(kind(), kind("mini")) == "this is a ViT-S/14 with 4 registers: --arch s --registers 4"
    assert of(kind("mini", 0), kind()) == "this is a ViT-Mini/8 without registers: --arch mini --registers 0"
    assert of(kind(registers=0), kind()) == "this is a ViT-S/14 without registers: --arch s --registers 0"
    assert of(kind(depth=5), kind()) == "this is a ViT/14 of width 384 with 5 blocks, with 4 registers, which no --arch is"
    assert of(kind(), kind()) == of(kind(), kind(depth=6), blocks="6") == "" != of(kind(), kind(depth=6))
    assert weights.other_size({"norm.bias": torch.zeros(3)}, kind()) == ""
    torch.save(kind(registers=0).state_dict(), tmp_path / "vit.pt")
    with pytest.raises(UsageError, match=r"--arch mini: this is a ViT-S/14 without registers: --arch s --registers 0$"):
        load_pretrained(two_stages(), str(tmp_path / "vit.pt"), "mini", 4)


def test_the_sizes_that_errors_name_are_those_of_the_flags():
    assert {name: key for key, name in weights.SIZES.items()} == {
        n: (a.get("patch", 14), a["width"], a["depth"], a.get("ffn", "mlp"), a.get("positions", "learned")) for n, a in ARCHS.items()}


@pytest.mark.parametrize("place", range(12))
def test_a_bit_that_flipped_in_a_tensor_is_noticed(place, tmp_path, hub):
    torch.save({"norm.weight": torch.ones(40, 40), "norm.bias": torch.randn(600)}, tmp_path / "whole.pt")
    raw = bytearray((tmp_path / "whole.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.pt") as records:
        record = records.getinfo(f"whole/data/{place % 2}")
    raw[record.header_offset + 30 + 64 + record.file_size // 13 * (1 + place)] ^= 1 << place % 8   # beyond header and padding
    for path in (tmp_path / "flipped.pt", hub[0] / "flipped.pth"):
        path.write_bytes(raw)
    with pytest.raises(UsageError, match=r"flipped.pt is damaged, whole/data/\d is not what its checksum says; make it again"):
        weights.read_file(tmp_path / "flipped.pt", "weights")
    with pytest.raises(UsageError, match="delete it, and it is downloaded again"):
        weights.fetch("https://x/flipped.pth", hub[0] / "flipped.pth")


def test_files_without_checksums_and_those_before_zip_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "fast.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("fast.pt", "old.pt"):
        assert torch.equal(weights.read_file(tmp_path / name, "weights")["a"], torch.ones(3))


def test_a_file_that_cannot_be_read_says_why_and_not_that_it_is_damaged(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="/proc/self/mem cannot be read: Input/output error"):
        weights.read_file("/proc/self/mem", "weights")
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        weights.read_file("x" * 300 + ".pt", "weights")

    def denied(*a, **kw):
        raise PermissionError(13, "Permission denied", "x.pt")
    monkeypatch.setattr(weights.torch, "load", denied)
    with pytest.raises(UsageError, match="x.pt cannot be read: Permission denied$"):
        weights.read_file(tmp_path / "x.pt", "weights")


def test_an_intact_file_that_is_something_else_is_not_called_damaged_only(tmp_path, recwarn):
    with zipfile.ZipFile(tmp_path / "book.pt", "w") as book:
        book.writestr("page.txt", "hello")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    recwarn.clear()
    for name in ("book", "script"):
        with pytest.raises(UsageError, match="is not weights, or the directory in it is damaged") as error:
            weights.read_file(tmp_path / f"{name}.pt", "weights")
        assert "again" not in str(error.value)
    assert not len(recwarn)                              # one line, no warnings of torch beside it


# ---------------------------------------------------------------- published snapshots
def test_sizes_are_read_from_the_tensors():
    model = published_model()
    vit = model.selector.backbone
    assert (model.selector.k, model.predictor.head.out_features) == (4, 5)
    assert (vit.patch, vit.width, vit.grid, len(vit.blocks), vit.prefix) == (14, 48, (5, 5), 3, 5)
    with pytest.raises(ValueError, match="width 48: pass heads="):
        load_published(below("sd/", golden("ifam_small")))


@pytest.mark.parametrize("settings", [
    dict(size=70, k=1), dict(size=(70, 98), k=3), dict(size=(98, 70), k=1, classes=7), dict(size=(56, 70), registers=0),
    dict(size=28, arch=dict(patch=7, width=64, depth=1, heads=1, ffn="swiglu")),
    dict(size=(14, 42), registers=2, arch=dict(patch=14, width=24, depth=3, heads=4, hidden=40))], ids=str)
def test_snapshots_of_any_grid_width_and_number_of_parts_load(settings):
    model = tiny(**settings)
    size = settings["size"] if isinstance(settings["size"], tuple) else (settings["size"],) * 2
    heads = model.selector.backbone.blocks[0].attn.heads
    loaded = load_published(as_published(model), heads=None if model.selector.backbone.width == 64 else heads).eval()
    x = pictures(2, *size)
    for ours, again in zip(there(model(x)), there(loaded(x))):
        agrees(again, ours)
    assert loaded.selector.backbone.grid == model.selector.backbone.grid


def test_images_with_another_number_of_patches_than_the_snapshot_are_refused():
    loaded = load_published(as_published(tiny(size=(70, 98))), heads=2)
    with pytest.raises(ValueError, match="images are 70x70 pixels"):
        loaded(pictures(1, 70))


def test_every_missing_key_of_a_snapshot_is_named():
    state = as_published(tiny(arch=dict(TINY, depth=1)))
    ours = {their_name(name): name for name in tiny(arch=dict(TINY, depth=1)).state_dict()}
    unnamed = []
    for name in ours:
        try:
            load_published({key: tensor for key, tensor in state.items() if key != name}, heads=2)
            unnamed.append(f"{name}: accepted")
        except ValueError as error:
            words = (name, name.split(".", 1)[1], ours[name].split("backbone.")[-1])
            if not any(word in str(error) for word in words):
                unnamed.append(f"{name}: {error}")
        except Exception as error:
            unnamed.append(f"{name}: {error!r}")
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize("name", [
    "stage_1.blocks.1.attn.qkv.scale", "stage_2.head.bias", "stage_2.blocks.2.norm1.weight", "stage_3.head.weight", "optimizer",
    "stage_1.fc_landmarks.bias", "stage_1.fc_class_landmarks.bias", "stage_1.head.weight", "stage_1.fc_norm.weight",
    "stage_2.fc_landmarks.weight", "stage_2.modulation.weight"])
def test_an_unexpected_key_of_a_snapshot_is_named(name):
    state = {**as_published(tiny()), name: torch.zeros(32)}
    named = name.replace("stage_1.fc_class_landmarks", "selector.classifier").split(".", 1)[-1]
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        load_published(state, heads=2)


@pytest.mark.parametrize("name", [
    "stage_1.blocks.1.attn.qkv.weight", "stage_1.modulation.bias", "stage_1.fc_class_landmarks.weight", "stage_2.cls_token",
    "stage_2.pos_embed", "stage_2.blocks.0.ls1.gamma", "stage_2.fc_norm.bias"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name):
    state = as_published(tiny())
    odd = torch.zeros([n + 1 for n in state[name].shape])
    ours = {their_name(key): key for key in tiny().state_dict()}[name]
    with pytest.raises(ValueError, match=ours + r" is \(.*\), the model has \("):
        load_published({**state, name: odd}, heads=2)


def test_a_hugging_face_snapshot_is_the_same_model_as_a_timm_one():
    shapes = json.loads((HERE / "golden" / "ifam_hf_names.json").read_text())    # of a snapshot that their code wrote
    draw = torch.Generator().manual_seed(0)
    theirs = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    model = load_published(theirs, heads=3).eval()
    assert (model.selector.k, model.predictor.head.out_features, model.selector.backbone.prefix) == (4, 5, 1)
    again = load_published(as_published(model), heads=3).eval()
    for one, other in zip(there(model(pictures(2))), there(again(pictures(2)))):
        assert torch.equal(one, other)
    for stage in ("selector", "predictor"):              # a query is a query, and not a key of the other stage
        attention = getattr(model, stage).backbone.blocks[2].attn.qkv.weight
        prefix = f"stage_{1 + (stage == 'predictor')}.encoder.layer.2.attention.attention"
        assert all(torch.equal(x, theirs[f"{prefix}.{kind}.weight"]) for x, kind in zip(attention.chunk(3), ("query", "key", "value")))


def snapshot(path, classes=2, layout="whole", **settings):
    """A file as the published code leaves it; returns the model in it."""
    arch = dict(patch=8, width=64, depth=1, heads=1)
    model = tiny(classes=classes, **{"size": 96, "k": 3, "arch": arch, **settings})
    state = OrderedDict(as_published(model))
    whole = {"model_state": state, "optimizer_state": {"state": {}, "param_groups": []}, "finished_epoch": np.int64(3),
             "epoch_test_accuracies": [np.float64(0.5), np.float32(0.25)]}
    torch.save(whole if layout == "whole" else state, path)
    return model


@pytest.mark.parametrize("layout", ["whole", "bare"])
@pytest.mark.parametrize("registers", [4, 0])
def test_a_snapshot_becomes_a_model_with_the_settings_of_its_benchmark(layout, registers, tmp_path):
    model = snapshot(tmp_path / "snapshot_best.pt", 200, layout, registers=registers)
    loaded, state = runs.load_model(tmp_path / "snapshot_best.pt", "cpu", "cub")
    for ours, again in zip(there(model(pictures(2, 96))), there(loaded(pictures(2, 96)))):
        agrees(again, ours)                              # timm adds a position to the class token: rounded once more
    config = state["config"]
    expected = dict(data="cub", method="ifam", size=96, k=3, registers=registers, masking="early", hardness="hard", pooling="cls", mini=False)
    assert {name: config[name] for name in expected} == expected and config["tau"] == runs.Config.tau
    assert runs.load_model(tmp_path / "snapshot_best.pt", "cpu", "waterbird200")[1]["config"] == config


@pytest.mark.parametrize("old", [True, False])
def test_numpy_scalars_of_both_numpy_generations_are_read(old, tmp_path):
    torch.save({"score": np.float64(0.5)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as copy:
        for name in new.namelist():                      # numpy 2 renamed the module that is written in the file
            copy.writestr(name, new.read(name).replace(b"numpy._core", b"numpy.core") if old else new.read(name))
    assert weights.read_file(tmp_path / "old.pt", "scores") == {"score": 0.5}


@pytest.fixture
def few_birds(tmp_path):
    """Eight images of each split of the miniature, as if they were the benchmark."""
    folder = "CUB_200_2011/waterbird_complete95_forest2water2"
    there, here = data.find_root("waterbirds", "", True) / folder, tmp_path / "birds" / folder
    here.mkdir(parents=True)
    header, *rows = (there / "metadata.csv").read_text().splitlines()
    split = header.split(",").index("split")
    few = [row for number in "012" for row in [r for r in rows if r.split(",")[split] == number][:8]]
    (here / "metadata.csv").write_text("\n".join([header, *few]) + "\n")
    for child in (*there.iterdir(), *there.parent.iterdir()):
        link = tmp_path / "birds" / child.relative_to(there.parent.parent)
        if not link.exists():
            link.symlink_to(child.resolve())
    return tmp_path / "birds"


def test_evaluating_a_snapshot_writes_a_report_that_says_so(few_birds, tmp_path, capsys):
    snapshot(tmp_path / "snapshot_best.pt")
    evaluate.main([*map(str, ("--ckpt", tmp_path / "snapshot_best.pt", "--data", "waterbirds", "--root", few_birds,
                              "--limit", 6, "--leakage", 4, "--device", "cpu"))])
    report = json.loads((tmp_path / "report-snapshot_best-limit6.json").read_text())
    assert report["source"] == "published snapshot" and report["images"] == 6 and report["leakage"]["repaint"]["max_logit_change"] == 0
    assert report["selection"]["split"] == "unknown" and (tmp_path / "parts-snapshot_best-limit6.png").is_file()
    assert "published snapshot; waterbirds test, 6 images" in capsys.readouterr().out


@pytest.mark.parametrize("settings, flags, words", [
    (dict(), (), ("published snapshot", "add --data")),
    (dict(), ("--data", "cub"), ("2 classes", "200")),
    (dict(size=(96, 80)), ("--data", "waterbirds"), ("square",)),
    (dict(arch=TINY), ("--data", "waterbirds"), ("width 32",))], ids=str)
def test_a_snapshot_that_cannot_be_evaluated_is_one_line_and_no_report(settings, flags, words, tmp_path, capsys):
    snapshot(tmp_path / "snapshot_best.pt", **{"size": 70, **settings} if "arch" in settings else settings)
    line = fails(evaluate.main, "--ckpt", tmp_path / "snapshot_best.pt", *flags)(capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("change", [{"stage_1.norm.bias": "text"}, {"stage_1.fc_landmarks.weight": torch.zeros(3)}, {3: torch.zeros(3)},
                                    {"stage_1.modulation.weight": torch.zeros(3)}, {"stage_1.pos_embed": torch.zeros(1, 0, 64)},
                                    {"stage_1.pos_embed": torch.zeros(3)}, {"stage_1.patch_embed.proj.weight": torch.zeros(3)}], ids=str)
def test_a_snapshot_with_something_else_for_a_tensor_is_one_line(change, tmp_path, capsys):
    snapshot(tmp_path / "snapshot_best.pt")
    content = torch.load(tmp_path / "snapshot_best.pt", weights_only=False)
    torch.save({"model_state": {**content["model_state"], **change}}, tmp_path / "snapshot_best.pt")
    line = fails(evaluate.main, "--ckpt", tmp_path / "snapshot_best.pt", "--data", "waterbirds")(capsys)
    assert "snapshot_best.pt" in line


def test_a_snapshot_with_a_missing_tensor_names_it(tmp_path, capsys):
    snapshot(tmp_path / "snapshot_best.pt")
    content = torch.load(tmp_path / "snapshot_best.pt", weights_only=False)
    for name in ("stage_2.blocks.0.norm1.bias", "stage_1.modulation.weight"):
        state = {key: x for key, x in content["model_state"].items() if key != name}
        torch.save({"model_state": state}, tmp_path / "snapshot_best.pt")
        line = fails(evaluate.main, "--ckpt", tmp_path / "snapshot_best.pt", "--data", "waterbirds")(capsys)
        assert name.split(".", 1)[1] in line, line


def test_a_snapshot_is_no_backbone_and_no_run_to_resume(tmp_path, capsys):
    snapshot(tmp_path / "last.pt")
    line = fails(train.main, *FLAGS, "--weights", tmp_path / "last.pt", "--out", tmp_path / "run")(capsys)
    assert "published two-stage code" in line and "evaluate.py --ckpt" in line
    line = fails(train.main, *FLAGS, "--resume", "--out", tmp_path)(capsys)
    assert "not a checkpoint of train.py" in line
