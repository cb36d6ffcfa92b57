"""baselines.py: what iFAM is compared with, and the one place where settings become a model.

Every model returns an ifam.Output from forward(images, keep=None, noise=None), and for training a pair from
forward_pair(images, warped, noise), so that one loop trains and one program measures them all. Letters: ifam.py.
"""
from torch import nn

from ifam import IFAM, Noise, Output, Predictor, Selector, build_vit, discretize


class ERM(nn.Module):
    """Plain fine-tuning ("DinoV2" in the paper's tables): a ViT, LayerNorm and a linear head on the class token.

    It is iFAM's second stage without a mask. keep (B, N) hides patches from it; only measurements use that.
    """
    selector = None
    needs_truth = False

    def __init__(self, classes, arch="b", size=518, registers=4, **choices):
        super().__init__()
        self.predictor = Predictor(build_vit(arch, size, registers), classes, **choices)

    def forward(self, images, keep=None, noise=None):
        return Output(self.predictor(images, keep))

    def forward_pair(self, images, warped, noise, keep=None):
        return self(images, keep), None


class TrueMask(ERM):
    """iFAM's second stage under the true mask, in training and in evaluation: what a perfect first stage would give.

    masking="early": the mask comes before attention, class token. "late": full attention, mean of the kept patches.
    """
    needs_truth = True

    def __init__(self, classes, masking, **shared):
        super().__init__(classes, **shared, masking=masking, pooling={"early": "cls", "late": "mean"}[masking])

    def forward(self, images, keep=None, noise=None):
        if keep is None:
            raise ValueError("this model is told where the object is: pass keep")
        return super().forward(images, keep)


class PDiscoFormer(IFAM):
    """iFAM's first stage alone (Aniraj et al., ECCV 2024): soft part maps over features of the whole image.

    The paper's "no second stage": a late, soft mask. keep says where a part beats the background; nothing uses it.
    """
    predictor = None

    def __init__(self, classes, k=8, arch="b", size=518, registers=4, tau=1.0, dropout1=0.3):
        nn.Module.__init__(self)
        self.selector = Selector(build_vit(arch, size, registers), classes, k, tau, dropout1)
        self.dropout2 = 0.0

    def second_stage(self, images, first, noise=Noise(), keep=None):
        keep = discretize(first.part_logits) if keep is None else keep
        return Output(first.logits, first.logits, first.maps, keep, first.part_logits, first.part_features)


METHODS = ("ifam", "erm", "pdiscoformer", "early-truth", "late-truth")


def build(settings, classes):
    """A model from the settings of a run, the dict that a checkpoint carries. ValueError if they do not fit."""
    shared = dict(classes=classes, arch=settings["arch"], size=settings["size"], registers=settings["registers"])
    parts = dict(k=settings["k"], tau=settings["tau"], dropout1=settings["part_dropout1"])
    if settings["method"] == "erm":
        return ERM(**shared)
    if settings["method"] in ("early-truth", "late-truth"):
        return TrueMask(**shared, masking=settings["method"].split("-")[0])
    if settings["method"] == "pdiscoformer":
        return PDiscoFormer(**shared, **parts)
    return IFAM(**shared, **parts, dropout2=settings["part_dropout2"], joint=settings["joint"],
                masking=settings["masking"], hardness=settings["hardness"], pooling=settings["pooling"])
