"""weights.py: weights of other people's files, under our names.

    load_pretrained(model, "dinov2", "b")                # downloaded once; every backbone starts from it
    load_pretrained(model, "dinov3", "b16")              # gated: a user puts the file there
    load_backbone(vit, read_file("model.safetensors", "weights"))        # official, timm or Hugging Face
    names, sizes = rename_published(find_published(read_file("snapshot_best.pt", "a snapshot")))

Floor: the ground. Nothing needs to be read before. Our names are those of the official DINOv2 files. A file of another
family is renamed by the small table of its family and must then fit exactly: what does not is an error that names it.
Letters: ifam.py.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from settings import UsageError

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{name}/{name}{registers}_pretrain.pth"
RAD_DINO_URL = "https://huggingface.co/microsoft/rad-dino/resolve/main/model.safetensors"
DINOV3 = "dinov3_vit{arch}_pretrain_lvd1689m*.pth"       # the official name ends in eight digits of a checksum
DINOV3_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
# --weights: the --arch that fits, and the file by miniature/pretrain.py
MINI_ARCHS = {"mini": "mini", "mini-parts": "mini", "mini-rotary": "mini-rotary", "chest": "mini"}
MINIATURES = {name: Path(__file__).resolve().parent / "miniature" / f"{name}.pt" for name in MINI_ARCHS}


# ---------------------------------------------------------------- files
# torch.load refuses every class that it is not told of. These are data and cannot run anything: scores as numpy scalars
# (in snapshots of the published code; before numpy 2 their module had another name), and the settings of a script.
INERT = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8")),
         *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def read_file(path, what, again="make it again"):
    """The content of a file of torch.save, plain types and tensors only, or of a .safetensors file.

    A .safetensors file of runs.save_safetensors has the content of a checkpoint.
    what: what it should be, for the error; again: how to get another. UsageError, which says why, if the file is not
    there, cannot be read, is damaged (a bit that flipped shows in a checksum), or holds what could run code.
    """
    zipped = False
    try:
        if not Path(path).is_file():
            raise UsageError(f"{path}: {'a folder, not a' if Path(path).is_dir() else 'no such'} file; expected {what}")
        if Path(path).suffix == ".safetensors":
            return content_of_safetensors(path, again)
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"       # as torch tells its files from those before version 1.6
        if zipped and (record := first_damaged(path)):
            raise UsageError(f"{path} is damaged, {record} is not what its checksum says; {again}")
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:                           # what is no such file can fail in many ways
        kind = type(error).__name__
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(f"{path} holds a {refused[1]}, which could run code: only tensors, numbers and containers "
                             "of them are read; save those alone") from None
        if zipped:                                       # its records are what their checksums say
            raise UsageError(f"{path} is not {what}, or the directory in it is damaged ({kind})") from None
        raise UsageError(f"{path} is damaged, or not {what} ({kind}); {again}") from None


def first_damaged(path):
    """The first record of a zip file, which torch.save writes, that its checksum does not fit; "" if all do."""
    try:
        with zipfile.ZipFile(path) as records:
            for record in records.infolist():
                if record.external_attr & 0x10 and record.file_size:             # torch takes it for a folder: no bytes
                    return record.filename
            checked = any(record.CRC for record in records.infolist())           # set_crc32_options(False) writes none
            return checked and records.testzip() or ""
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        return f"its directory ({error})"


# The safetensors format (github.com/huggingface/safetensors), read and written here, so that no package is needed: 8
# bytes, the length of the header as a little-endian number; the header, JSON: {name: {"dtype", "shape", "data_offsets":
# [begin, end]}}, with texts by name under "__metadata__"; then the bytes of the tensors without a gap.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
CHECKPOINT = {"config", "step", "best"}                  # metadata, as JSON, of what runs.save_safetensors writes


def content_of_safetensors(path, again="make it again"):
    """A .safetensors file -> its tensors by name; of runs.save_safetensors, a checkpoint as train.py saves one."""
    tensors, metadata = read_safetensors(path)
    if not CHECKPOINT <= metadata.keys():
        return tensors
    if metadata.get("sha256") != checksum(tensors, metadata):
        raise UsageError(f"{path} is damaged, its content is not what its checksum says; {again}")
    return {**{name: json.loads(text) for name, text in metadata.items() if name != "sha256"}, "model": tensors}


def read_safetensors(path):
    """-> ({name: tensor}, metadata: {name: text}). ValueError, KeyError, TypeError where the format is not kept."""
    with open(path, "rb") as file:
        size, start = os.fstat(file.fileno()).st_size, 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError("the header ends after the file")
        header, tensors, at = json.loads(file.read(start - 8)), {}, 0
        metadata = header.pop("__metadata__", {})
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if begin != at or end > size - start or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} is not where its neighbours and its shape say")
            content, at = bytearray(file.read(end - begin)), end
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
        if at != size - start:
            raise ValueError("the file goes on after its tensors")
    return tensors, metadata


def write_safetensors(path, tensors, metadata):
    """{name: tensor} and metadata {name: text} -> a .safetensors file. ValueError for a type that the format lacks."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, at, order = {"__metadata__": metadata}, 0, sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    for name in order:                                   # wide types first: each begins at a multiple of its size
        x = tensors[name]
        if x.dtype not in names:
            raise ValueError(f"{name} is of type {x.dtype}, which is none of {', '.join(DTYPES)}")
        end = at + x.numel() * x.dtype.itemsize
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(bytes_of(tensors[name]))


def bytes_of(tensor):
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def checksum(tensors, metadata):
    """SHA-256 over names and bytes of tensors and all metadata but "sha256", where it is kept."""
    found = hashlib.sha256(json.dumps({k: v for k, v in sorted(metadata.items()) if k != "sha256"}).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(bytes_of(tensors[name]))
    return found.hexdigest()


def fetch(url, cached):
    """The content of the file at url, downloaded to `cached` unless it is there."""
    try:
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), progress=False)
    except Exception as error:                           # urllib, torch and the file system raise many kinds here
        raise UsageError(f"cannot get {cached.name} from {url} ({error}); download it by hand to {cached}") from None
    return read_file(cached, f"the file at {url}", "delete it, and it is downloaded again")


# ---------------------------------------------------------------- a pretrained backbone
def load_pretrained(model, name, arch, registers=4, selector_arch="", selector_name="", read=None):
    """Start every backbone of a model from pretrained weights: all from the same, but for a stage 1 of its own.

    name: "dinov2", "dinov3", "rad-dino", one of MINIATURES, the path of a file, or "none"; selector_name: that of
    stage 1 ("": name). arch, selector_arch ("": as arch): as build_vit has them; "b/6" takes the first 6 blocks of b's
    file. read: what reader() gave, so that no file is read again. UsageError when it is not there or does not fit.
    """
    read = read or reader(registers)
    for stage, start, whole in ((model.selector, selector_name or name, selector_arch or arch),
                                (model.predictor, name, arch)):
        if stage is not None:
            load_start(stage.backbone, start, whole, read)


def load_start(backbone, name, arch, read):
    """Start one backbone from --weights NAME, read by what reader() gave; arch, UsageError: as in load_pretrained."""
    if name == "none":
        return
    size, _, blocks = arch.partition("/")
    state = read(name, size)
    try:
        load_backbone(backbone, state, int(blocks) if blocks else None)
    except ValueError as error:
        reason = other_size(state, backbone, blocks) or error
        raise UsageError(f"--weights {name} with --arch {arch}: {reason}") from None


def reader(registers=4):
    """A function (NAME, named size) that reads --weights NAME, each file once; its line is printed once."""
    return functools.cache(lambda name, size: read_weights(name, size, registers))


def refuse_by_name(name, arch, registers=4):
    """UsageError for weights of which the name alone tells that they do not fit a named size; nothing is read."""
    if name == "dinov2" and arch not in ("s", "b", "l", "g"):
        other = "dinov3" if "16" in arch else arch
        raise UsageError(f"--weights dinov2 has no {arch} architecture: add --weights {other} (or none) to --arch "
                         f"{arch}, or choose another --arch")
    if name == "dinov3" and arch not in ("s16", "s16plus", "b16", "l16"):
        raise UsageError(f"--weights dinov3 has no {arch} architecture: add --arch s16, s16plus, b16 or l16")
    if name == "dinov3" and registers != 4:
        raise UsageError(f"--weights dinov3 has 4 registers (storage tokens), not {registers}: leave out --registers")
    if name == "dinov2" and registers not in (0, 4):
        raise UsageError(f"--weights dinov2 has 4 registers or none: --registers {registers} fits neither")
    if arch != MINI_ARCHS.get(name, arch):
        raise UsageError(f"--weights {name} is a small backbone of the miniatures and does not fit --arch {arch}: add "
                         f"--arch {MINI_ARCHS[name]}, or choose other --weights")
    if name == "rad-dino" and (arch != "b" or registers):
        raise UsageError("--weights rad-dino is a ViT-B without registers: add --arch b --registers 0")


def read_weights(name, arch, registers):
    """The dict of tensors that --weights NAME is for a named size."""
    refuse_by_name(name, arch, registers)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if name == "dinov2":
        url = DINOV2_URL.format(name=f"dinov2_vit{arch}14", registers="_reg4" if registers else "")
        state = fetch(url, cache / Path(url).name)
    elif name == "dinov3":
        state = read_gated(cache, arch)
    elif name == "rad-dino":
        state = fetch(RAD_DINO_URL, cache / "rad-dino" / "model.safetensors")
    else:
        state = read_file(MINIATURES.get(name, name), "a file of backbone weights (or one of dinov2, dinov3, rad-dino, "
                          f"{', '.join(MINIATURES)}, none)")
    if find_published(state):
        raise UsageError(f"--weights {name} is a snapshot of the published two-stage code, not a backbone; "
                         "evaluate it with evaluate.py --ckpt")
    if isinstance(state, dict) and {*CHECKPOINT, "model"} <= state.keys():
        raise UsageError(f"--weights {name} is a checkpoint of train.py, a whole model and not a backbone; evaluate it "
                         "with evaluate.py --ckpt, or go on with train.py --resume")
    state, taken_off = unwrap(state)
    if not named_tensors(state):
        raise UsageError(f"--weights {name}: expected a dict of tensors, named as by DINOv2, DINOv3, timm or Hugging "
                         "Face")
    if any(x.shape[-1:] == (4096,) for key, x in state.items() if key.endswith("cls_token")):
        raise UsageError(f"--weights {name} is DINOv3's ViT-7B, which is refused: it is too large; --arch l16 is the "
                         "largest of its family here")
    if taken_off and int(os.environ.get("RANK", 0)) == 0:
        print(f"--weights {name}: {taken_off}")
    return state


def read_gated(cache, arch):
    """The official file of DINOv3 for a named size, which a user must ask for and put into the folder `cache`."""
    pattern = DINOV3.format(arch=arch)
    found = sorted(cache.glob(pattern))
    if not found:
        raise UsageError(f"--weights dinov3 is gated, and no {pattern} is in {cache}: ask for access at {DINOV3_URL}, "
                         "download the file of that name and put it there, or name one that you have, official, of "
                         "Hugging Face or of timm, as --weights FILE; the DINOv3 License travels with it and with what "
                         "you train from it")
    if len(found) > 1:
        raise UsageError(f"--weights dinov3: {len(found)} files fit in {cache}, {', '.join(p.name for p in found)}: "
                         "keep one, or name one as --weights FILE")
    return read_file(found[0], "the official file of DINOv3", "download it again")


def named_tensors(content):
    """Is it a dict of tensors by name?"""
    return isinstance(content, dict) and all(isinstance(name, str) and isinstance(x, torch.Tensor)
                                             for name, x in content.items())


def unwrap(content):
    """What people save around a backbone's weights, taken off -> (what is inside, a line that says what, or "").

    One level, an entry of WRAPPERS; then each of PREFIXES that all names share, and those below it. Of a teacher beside
    its student the teacher is taken, of a backbone beside heads of its pretraining (HEADS) the backbone.
    """
    inner = next((key for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), "")
    content, prefix, left = content[inner] if inner else content, "", []
    while content and named_tensors(content):
        first = {name.partition(".")[0] + "." for name in content}
        more = next((p for p, beside in PREFIXES.items() if p in first and first <= {p, *beside}), "")
        if not more:
            break
        left += sorted(first - {more})
        content = {name.removeprefix(more): x for name, x in content.items() if name.startswith(more)}
        prefix += more
    said = f"read what is under {inner!r}" if inner else "read"
    said += f", names without {prefix!r}" * bool(prefix) + f", left out {', '.join(left)}" * bool(left)
    return content, said * bool(inner or prefix)


def load_backbone(vit, state_dict, blocks=None):
    """Copy the weights of a DINOv2 or DINOv3 model into vit: official files, timm's, Hugging Face's, or a ViT of ours.

    A position embedding of another number of patches must be of a square grid and is resampled to vit's, as the code
    that wrote the file does it; rotary positions have no weights. blocks: take only that many, the first; the final
    norm stays that of the whole. Raises ValueError that names the first keys or shapes that do not fit.
    """
    try:
        state = official_names(state_dict)
        if blocks is not None:
            state = {name: x for name, x in state.items() if block_of(name) < blocks}
        if "pos_embed" in state and vit.pos_embed is not None and state["pos_embed"].shape[1] != vit.pos_embed.shape[1]:
            state["pos_embed"] = resample_positions(state["pos_embed"], vit.grid, *how_resampled(state_dict))
    except KeyError as error:
        raise ValueError(f"weights do not fit the model: missing {error.args[0]}") from None
    except (IndexError, RuntimeError) as error:          # a tensor has another number of dimensions
        raise ValueError(f"weights do not fit the model: {error}") from None
    load_strictly(vit, state)


def other_size(state_dict, vit, blocks=""):
    """"this is a ViT-S/14 with 4 registers: --arch s --registers 4" if a file is of another size than vit, else ""."""
    try:
        file, own = (shape_of(official_names(state)) for state in (state_dict, vit.state_dict()))
    except (KeyError, IndexError, ValueError):           # too little of it is there
        return ""
    if blocks and file["depth"] >= int(blocks):
        own["depth"] = file["depth"]
    size_of = lambda shape: SIZES.get(tuple(shape[name] for name in ("patch", "width", "depth", "ffn", "positions")))
    if (size_of(file) or file, file["registers"]) == (size_of(own) or own, own["registers"]):
        return ""
    if not size_of(file) and size_of({**file, "positions": "learned"}):          # its positions are missing
        return ""
    registers = f"with {file['registers']} registers" if file["registers"] else "without registers"
    rotary = " and rotary positions" * (file["positions"] == "rotary")
    if size := size_of(file):
        name = re.sub("16|-rotary", "", size).replace("plus", "+").title()
        return (f"this is a ViT-{name}/{file['patch']} {registers}{rotary}: --arch {size} "
                f"--registers {file['registers']}")
    return (f"this is a ViT/{file['patch']} of width {file['width']} with {file['depth']} blocks, {registers}{rotary}, "
            "which no --arch is")


def how_resampled(state_dict):
    """-> (antialias, offset) of resample_positions in the code that a file is from.

    With registers everybody does the same. Without, the official code and Hugging Face's differ, and timm's files are
    those under official names that have no mask token.
    """
    if {"register_tokens", "reg_token", "embeddings.register_tokens"} & state_dict.keys():
        return True, 0.0
    if is_hugging_face(state_dict):
        return False, 0.0
    return (False, 0.1) if "mask_token" in state_dict else (True, 0.0)


def resample_positions(pos_embed, grid, antialias, offset=0.0):
    """Position embedding (1, 1+N, D) of a square grid -> the same for another grid (h, w), bicubic.

    offset: 0.1 in the official models without registers, a workaround for rounding that moves every sample a little.
    Equal grids: unchanged.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if side * side != pos_embed.shape[1] - 1:
        raise ValueError(f"position embedding of {pos_embed.shape[1] - 1} patches is not a square grid")
    if (side, side) == tuple(grid):
        return pos_embed
    patches = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    how = dict(scale_factor=tuple((n + offset) / side for n in grid)) if offset else dict(size=tuple(grid))
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **how)
    return torch.cat([pos_embed[:, :1].float(), patches.flatten(2).mT], dim=1).to(pos_embed.dtype)


def load_strictly(module, state_dict):
    """load_state_dict, but what does not fit is a ValueError of one line that names it."""
    own = module.state_dict()
    odd = [f"missing {name}" for name in own if name not in state_dict]
    odd += [f"unexpected {name}" for name in state_dict if name not in own]
    odd += [f"{name} is {tuple(x.shape)}, the model has {tuple(own[name].shape)}"
            for name, x in state_dict.items() if name in own and x.shape != own[name].shape]
    if odd:
        more = f" (and {len(odd) - 3} more)" if odd[3:] else ""
        raise ValueError(f"weights do not fit the model: {'; '.join(odd[:3])}{more}")
    module.load_state_dict(state_dict)


# ---------------------------------------------------------------- names
WRAPPERS = ("teacher", "model", "state_dict")            # entries that hold the weights: DINO, MAE, Lightning
HEADS = ("dino_head.", "ibot_head.")                     # of the pretraining of DINOv2 and of Franca
PREFIXES = {  # what all names may begin with, or all but those of what is beside it and left out
    **dict.fromkeys(("module.", "_orig_mod.", "dinov2.", "model.", "encoder."), ()),     # DDP, torch.compile, a parent
    "teacher.": ("student.", *HEADS), "student.": HEADS, "backbone.": HEADS}             # of NeCo; of Franca
# (patch, width, depth, feed-forward, positions): --arch
SIZES = {(8, 128, 4, "mlp", "learned"): "mini", (8, 128, 4, "mlp", "rotary"): "mini-rotary",
         (14, 384, 12, "mlp", "learned"): "s", (14, 768, 12, "mlp", "learned"): "b",
         (14, 1024, 24, "mlp", "learned"): "l", (14, 1536, 40, "swiglu", "learned"): "g",
         (16, 384, 12, "mlp", "rotary"): "s16", (16, 384, 12, "swiglu", "rotary"): "s16plus",
         (16, 768, 12, "mlp", "rotary"): "b16", (16, 1024, 24, "mlp", "rotary"): "l16"}
HUGGING_FACE = (  # how Dinov2Model and Dinov2WithRegistersModel name what we name otherwise; every line is applied
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    (".attention.attention.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.weights_in.", ".mlp.w12."),
    (".mlp.weights_out.", ".mlp.w3."),
    ("layernorm.", "norm."),
)
HUGGING_FACE_DINOV3 = (  # the same for DINOv3ViTModel; its queries, keys and values are put together below
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("embeddings.", ""),
    ("model.layer.", "blocks."),
    ("layer.", "blocks."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.q_proj.bias", ".attn.q_bias"),
    (".attention.v_proj.bias", ".attn.v_bias"),
    (".attention.", ".attn."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)
HUGGING_FACE_MLP = ((".mlp.up_proj.", ".mlp.fc1."), (".mlp.down_proj.", ".mlp.fc2."))
HUGGING_FACE_SWIGLU = ((".mlp.gate_proj.", ".mlp.w1."), (".mlp.up_proj.", ".mlp.w2."), (".mlp.down_proj.", ".mlp.w3."))
TIMM_DINOV3 = (("reg_token", "register_tokens"), (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))
TIMM_DINOV3_SWIGLU = ((".mlp.fc1_g.", ".mlp.w1."), (".mlp.fc1_x.", ".mlp.w2."), (".mlp.fc2.", ".mlp.w3."))
TIMM_SWIGLU = ((".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3."))            # gate and value in one matrix
PUBLISHED = (  # how the published two-stage code names what is not in its ViTs; the first prefix that fits counts
    ("stage_1.fc_landmarks.weight", "selector.prototypes"),
    ("stage_1.modulation.", "selector.modulation."),
    ("stage_1.fc_class_landmarks.", "selector.classifier."),
    ("stage_1.", "selector.backbone."),
    ("stage_2.fc_norm.", "predictor.fc_norm."),
    ("stage_2.head.", "predictor.head."),
    ("stage_2.", "predictor.backbone."),
)


def is_hugging_face(state_dict):
    return any(name.startswith(("embeddings.", "encoder.layer.", "model.layer.", "layer.")) for name in state_dict)


def block_of(name):
    """"blocks.3.norm1.bias" -> 3; -1 for what is in no block."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def rename(state, table):
    """Apply every (old, new) of a table to every name."""
    for old, new in table:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def official_names(state_dict):
    """A ViT as timm or Hugging Face writes it, or one of DINOv3 -> the same under official DINOv2 names.

    Official ones stay as they are, but for blocks in chunks (blocks.0.11 is blocks.11), as DINOv2's and Franca's
    pretraining writes them. The mask token of pretraining is dropped. KeyError for a missing part of a tensor that is
    put together here.
    """
    marks = ("storage_tokens", "rope_embed.periods", ".bias_mask", ".q_proj.weight", ".o_proj.weight", ".gamma_1")
    if any(name.endswith(marks) for name in state_dict):
        return dinov3_names(state_dict)
    state = dict(state_dict)
    if is_hugging_face(state):
        state = rename(state, HUGGING_FACE)
        apart = re.compile(r"\.attn\.(query|key|value)\.")
        for qkv in {apart.sub(".attn.qkv.", name) for name in state if apart.search(name)}:
            state[qkv] = torch.cat([state.pop(qkv.replace(".qkv.", f".{one}.")) for one in ("query", "key", "value")])
    if "reg_token" in state:
        # timm's register models have added the class token's position to the token
        state["register_tokens"], state["pos_embed"] = state.pop("reg_token"), F.pad(state["pos_embed"], (0, 0, 1, 0))
    first, second = (state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and len(first) != second.shape[1]:
        state = rename(state, TIMM_SWIGLU)
    state.pop("mask_token", None)
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): x for name, x in state.items()}


def dinov3_names(state_dict):
    """A ViT of DINOv3, official, Hugging Face's or timm's -> our names.

    Left out are the mask token, the norm of the class token of local crops (local_cls_norm, which only pretraining
    uses) and the periods, which must be ours. The key's bias, which the official code masks in every step, becomes 0
    here, once; training may move it. KeyError as in official_names; ValueError for other periods, or a mask that was
    never set.
    """
    gated = any(".mlp.gate_proj." in name or ".mlp.fc1_g." in name for name in state_dict)
    timm = any(name.endswith((".gamma_1", ".gamma_2")) for name in state_dict)
    if is_hugging_face(state_dict):
        state = rename(state_dict, HUGGING_FACE_DINOV3 + (HUGGING_FACE_SWIGLU if gated else HUGGING_FACE_MLP))
    elif timm:
        state = rename(state_dict, TIMM_DINOV3 + TIMM_DINOV3_SWIGLU * gated)
    else:
        state = rename(state_dict, (("storage_tokens", "register_tokens"),))
    check_periods(state.pop("rope_embed.periods", None))
    state = {name: x for name, x in state.items() if name != "mask_token" and not name.startswith("local_cls_norm.")}
    without_bias = timm and not any(name.endswith(("q_bias", "v_bias", "qkv.bias")) for name in state)
    for block in sorted({name.rpartition("attn.")[0] for name in state if "attn." in name}):
        if is_hugging_face(state_dict):
            parts = [state.pop(f"{block}attn.{one}_proj.weight") for one in "qkv"]
            state[f"{block}attn.qkv.weight"] = torch.cat(parts)
        state[f"{block}attn.qkv.bias"] = masked_bias(state, block + "attn.", without_bias)
        halves = [f"{block}mlp.{one}." for one in ("w1", "w2")]
        if any(name.startswith(tuple(halves)) for name in state):
            for kind in ("weight", "bias"):              # gate and value in one matrix
                state[f"{block}mlp.w12.{kind}"] = torch.cat([state.pop(half + kind) for half in halves])
    return state


def masked_bias(state, attn, without):
    """The bias of queries, keys and values of an attention layer of DINOv3, 0 for keys; its parts leave `state`.

    without: the file has none (timm leaves it out where it was trained to 0).
    """
    if without:
        return torch.zeros_like(state[f"{attn}qkv.weight"][:, 0])
    if f"{attn}qkv.bias" not in state and f"{attn}qkv.bias_mask" not in state:
        query, value = state.pop(f"{attn}q_bias"), state.pop(f"{attn}v_bias")
        return torch.cat([query, torch.zeros_like(query), value])
    mask = state.pop(f"{attn}qkv.bias_mask")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{attn}qkv.bias_mask has values other than 0 and 1")
    return torch.where(mask.bool(), state.pop(f"{attn}qkv.bias"), 0)


def check_periods(periods):
    """ValueError for periods of rotary positions that are not vit.rotations'; None: the file does not tell.

    The official files have them in bfloat16, three digits; ours are exact, as Hugging Face's and timm's.
    """
    if periods is not None:
        ours = 100.0 ** (torch.arange(len(periods), device=periods.device) / len(periods))
        if not torch.allclose(periods.float(), ours, rtol=0.01):
            raise ValueError(f"its rotary positions have periods {periods[0]:.3g} to {periods[-1]:.3g}, and not "
                             f"{ours[0]:.3g} to {ours[-1]:.3g}")


# ---------------------------------------------------------------- snapshots of the published two-stage code
def find_published(content):
    """The state dict of a two-stage model in a snapshot's content: it itself, or one of its entries, or None."""
    entries = [content, *content.values()] if isinstance(content, dict) else []
    is_one = lambda x: isinstance(x, dict) and any(str(name).startswith(("stage_1.", "stage_2.")) for name in x)
    return next(filter(is_one, entries), None)


def rename_published(state_dict, heads=None):
    """A state dict of the published two-stage code (stage_1.*, stage_2.*; its ViTs as in timm or Hugging Face).

    -> (the same under the names of IFAM, {classes, k, arch, size}). Every size is read from the tensors but two that
    they do not tell: heads (default: 64 channels each, as in all DINOv2 sizes) and the shape of the patch grid
    (size: images whose grid is nearest to square). ValueError for a tensor that is missing.
    """
    if not named_tensors(state_dict):
        raise ValueError("not a snapshot of the published two-stage code: not all of it are tensors by name")
    state = {}
    for name, tensor in state_dict.items():
        old, new = next((pair for pair in PUBLISHED if name.startswith(pair[0])), ("", ""))
        state[new + name[len(old):]] = tensor
    state.pop("predictor.backbone.prefix_attn_mask", None)                       # a buffer of ones
    try:
        for stage in ("predictor.backbone.", "selector.backbone."):
            vit = official_names({name[len(stage):]: state.pop(name) for name in [*state] if name.startswith(stage)})
            state |= {stage + name: tensor for name, tensor in vit.items()}
        state["selector.prototypes"] = state["selector.prototypes"].flatten(1)   # a 1x1 convolution there
        for name in ("selector.modulation.weight", "selector.modulation.bias"):
            state[name] = state[name].mT                                         # (D, K+1) there
        arch, size = describe(vit, heads)                                        # both stages are alike
        classes, k = len(state["predictor.head.weight"]), len(state["selector.prototypes"]) - 1
    except KeyError as error:
        raise ValueError(f"not a snapshot of the published two-stage code: missing {error.args[0]}") from None
    except (IndexError, RuntimeError) as error:          # a tensor has another number of dimensions
        raise ValueError(f"not a snapshot of the published two-stage code: {error}") from None
    return state, dict(classes=classes, k=k, arch=arch, size=size)


def describe(vit, heads):
    """A ViT's state dict -> (arguments of ViT, (height, width) of images if its grid is nearest to square)."""
    shape = shape_of(vit)
    if heads is None and shape["width"] % 64:
        raise ValueError(f"the number of heads cannot be read from the tensors at width {shape['width']}: pass heads=")
    patches = vit["pos_embed"].shape[1] - 1
    if patches < 1:
        raise ValueError("its position embedding has no patches")
    rows = next(n for n in range(math.isqrt(patches), 0, -1) if patches % n == 0)
    return {**shape, "heads": heads or shape["width"] // 64}, (rows * shape["patch"], patches // rows * shape["patch"])


def shape_of(vit):
    """A ViT's state dict -> the arguments of ViT that its tensors tell: all but the number of heads and the size."""
    width, _, patch, _ = vit["patch_embed.proj.weight"].shape
    ffn, last = ("swiglu", "w3") if "blocks.0.mlp.w12.weight" in vit else ("mlp", "fc2")
    return dict(patch=patch, width=width, depth=1 + max(map(block_of, vit)), ffn=ffn,
                hidden=vit[f"blocks.0.mlp.{last}.weight"].shape[1],
                registers=vit["register_tokens"].shape[1] if "register_tokens" in vit else 0,
                positions="learned" if "pos_embed" in vit else "rotary")
