"""Small models, and what the published code calls their parameters."""
from types import SimpleNamespace

import torch
from conftest import below, golden

from ifam import IFAM
from runs import load_published
from vit import ViT

TINY = dict(patch=14, width=32, depth=2, heads=2, layer_scale=1.0)


def published_model(**settings):
    return load_published(below("sd/", golden("ifam_small")), heads=3, **settings).eval()


def tiny(size=70, classes=3, k=4, seed=0, **settings):
    """A small random model whose parts differ: prototypes lie where the features are."""
    torch.manual_seed(seed)
    model = IFAM(classes, k, settings.pop("arch", TINY), size, **settings).eval()
    torch.nn.init.normal_(model.selector.prototypes, std=0.5)
    return model


def two_stages(size=70, **kind):
    """A model of two small backbones, for load_pretrained."""
    return SimpleNamespace(**{stage: SimpleNamespace(backbone=ViT(size, 14, 48, 3, 3, layer_scale=1.0, **kind))
                              for stage in ("selector", "predictor")})


def pictures(count=3, height=70, width=None, seed=1):
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def there(out):
    """The fields of an Output, or of a Noise, that are there."""
    return [x for x in out if x is not None]


# ---------------------------------------------------------------- the published names and ours
RENAMED = {  # ours: theirs; blocks, norms and patch embedding are called the same in both
    "selector.prototypes": "stage_1.fc_landmarks.weight",
    "selector.modulation.": "stage_1.modulation.",
    "selector.classifier.": "stage_1.fc_class_landmarks.",
    "selector.backbone.register_tokens": "stage_1.reg_token",
    "predictor.backbone.register_tokens": "stage_2.reg_token",
    "selector.backbone.": "stage_1.",
    "predictor.backbone.": "stage_2.",
    "predictor.": "stage_2.",
}


def their_name(name):
    ours = next(prefix for prefix in RENAMED if name.startswith(prefix))
    name = RENAMED[ours] + name[len(ours):]
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def their_layout(name, tensor, registers=True):
    """A parameter, or its gradient, as the published code holds it."""
    if name == "selector.prototypes":
        return tensor[..., None, None]                                           # a 1x1 convolution
    if "modulation" in name:
        return tensor.mT
    return tensor[:, 1:] if registers and name.endswith("pos_embed") else tensor


def as_published(model):
    """The state dict that the published code would have written for this model (the inverse of load_published)."""
    state = model.state_dict()
    registers = model.selector.backbone.register_tokens is not None
    theirs = {their_name(name): their_layout(name, tensor, registers) for name, tensor in state.items()}
    for stage, vit in (("stage_1", "selector.backbone"), ("stage_2", "predictor.backbone")):
        if registers:                                                            # timm adds the position to the token
            theirs[f"{stage}.cls_token"] = state[f"{vit}.cls_token"] + state[f"{vit}.pos_embed"][:, :1]
    return {**theirs, "stage_2.prefix_attn_mask": torch.ones(1, model.predictor.backbone.prefix)}
