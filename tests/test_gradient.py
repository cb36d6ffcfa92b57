"""The gradient of the mask: what the paper asks for, what the published code cuts, against autograd of the formula itself."""
import pytest
import torch
import torch.nn.functional as F
from conftest import agrees, below, golden
from models import pictures, their_layout, their_name, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import ifam
from ifam import Noise
from vit import KeepGradient, ViT, attend_all, attend_masked
from runs import load_published

B, T, H, D = 3, 13, 2, 5
PREFIX = 3                                                                       # class token and registers: always readable


def explicit(q, k, v, mask):
    """A_ij = m_j exp(s_ij) / sum_k m_k exp(s_ik), O_i = sum_j A_ij v_j, written down. q, k, v (B, T, H, D), mask (B, T)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    weight = mask[:, None, None] * scores.exp()
    return torch.einsum("bhij,bjhd->bihd", weight / weight.sum(-1, keepdim=True), v)


def by_formula(vit, x, mask, class_only):
    """What ViT._run_joint must equal: every token in every layer, and the formula for attention."""
    rows = (lambda x: x[:, :1]) if class_only else None
    return vit._run(x, lambda q, k, v: explicit(q, k, v, mask), rows)


def random_mask(kind, g):
    mask = torch.ones(B, T, dtype=torch.float64)
    patches = mask[:, PREFIX:]
    if kind == "binary":
        patches.copy_(torch.rand(patches.shape, generator=g) < 0.4)
    elif kind == "none":
        patches.zero_()
    elif kind == "soft":
        patches.copy_(torch.rand(patches.shape, generator=g))
        patches[0, ::3] = 0                                                      # a soft mask may be exactly 0 or 1
        patches[1, ::4] = 1
    return mask


def case(kind, seed=0):
    """-> [q, k, v, mask] as float64 leaves, and the gradient that arrives at the output."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = torch.randn(4, B, T, H, D, generator=g, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, random_mask(kind, g))], grad


KINDS = ["binary", "none", "all", "soft"]


# ---------------------------------------------------------------- one attention layer
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_masked_attention_and_all_its_gradients_equal_autograd_of_the_formula(kind, seed):
    inputs, grad = case(kind, seed)
    ours, expected = attend_masked(*inputs, hard=kind != "soft"), explicit(*inputs)
    agrees(ours, expected, 1e-10)
    pairs = zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad))
    for name, (gradient, exact) in zip(("q", "k", "v", "mask"), pairs):
        assert exact.abs().max() > 1e-3, name
        agrees(gradient, exact, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_mask_is_what_finite_differences_measure(kind):
    (q, k, v, mask), grad = case(kind)
    gradient, = torch.autograd.grad(attend_masked(q, k, v, mask, hard=kind != "soft"), mask, grad)
    step, measured = 1e-6, torch.zeros_like(mask)
    with torch.no_grad():
        for b in range(B):
            for j in range(T):
                nudge = torch.zeros_like(mask)
                nudge[b, j] = step
                measured[b, j] = ((explicit(q, k, v, mask + nudge) - explicit(q, k, v, mask - nudge)) * grad).sum() / (2 * step)
    agrees(gradient, measured, 1e-7)


def test_a_dropped_key_gets_a_gradient_that_says_what_letting_it_in_would_do():
    (q, k, v, mask), grad = case("binary")
    gradient, = torch.autograd.grad(attend_masked(q, k, v, mask), mask, grad)
    with torch.no_grad():
        b, j = (mask == 0).nonzero()[0].tolist()
        let_in = mask.clone()
        let_in[b, j] = 1e-6
        change = ((explicit(q, k, v, let_in) - explicit(q, k, v, mask)) * grad).sum()
    assert gradient[b, j].item() == pytest.approx(change.item() / 1e-6, rel=1e-4)
    assert gradient[mask == 0].abs().min() > 0


@pytest.mark.parametrize("chunk", [1, 3 * B * H * T, 7 * B * H * T + 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_does_not_depend_on_the_chunk(kind, chunk, monkeypatch):
    inputs, grad = case(kind)
    gradients = lambda: torch.autograd.grad(attend_masked(*inputs, hard=kind != "soft"), inputs, grad)
    whole = gradients()
    monkeypatch.setattr(KeepGradient, "CHUNK", chunk)
    for part, expected in zip(gradients(), whole):
        agrees(part, expected, 1e-12)


def test_scores_in_half_precision_are_recomputed_in_single():
    inputs, grad = case("binary")
    q, k, v, mask = (x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, 3 * [torch.bfloat16] + [torch.float32]))
    gradient, = torch.autograd.grad(attend_masked(q, k, v, mask), mask, grad.bfloat16())
    exact, = torch.autograd.grad(explicit(*(x.double() for x in (q, k, v)), wide := mask.double()), wide, grad)
    assert gradient.dtype == torch.float32
    agrees(gradient, exact, 2e-2)                                                # what is left: the output is bfloat16


class Largest(TorchDispatchMode):
    """Records the largest storage, in elements of four bytes, that any operation returns."""
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("hard", [True, False])
def test_no_tensor_of_queries_times_keys_is_stored_or_made(hard, monkeypatch):
    batch, tokens, heads, width = 2, 300, 2, 8
    linear, square = batch * tokens * heads * width, batch * heads * tokens * tokens
    chunk = 20 * batch * heads * tokens
    monkeypatch.setattr(KeepGradient, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, tokens, heads, width, generator=g, requires_grad=True) for _ in "qkv"]
    inputs.append(torch.ones(batch, tokens, requires_grad=True))
    saved = []
    keep = lambda x: saved.append(x.untyped_storage().nbytes() // 4) or x
    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attend_masked(*inputs, hard=hard)
    with Largest() as backward:
        out.sum().backward()
    assert 4 * chunk < square and 4 * linear < square                            # or the bounds below would say nothing
    assert saved and max(saved) <= linear and forward.elements <= linear
    assert backward.elements <= max(chunk, linear)
    assert all(x.grad is not None for x in inputs)


def test_a_mask_of_ones_is_plain_attention():
    (q, k, v, _), _ = case("all")
    agrees(attend_masked(q, k, v, torch.ones(B, T, dtype=torch.float64)), attend_all(q, k, v), 1e-12)


# ---------------------------------------------------------------- both stages
def published_loss(joint, hardness="hard", dtype=torch.float32):
    """-> (the published snapshot, the stage-2 cross entropy on its batch), in training without noise."""
    z = golden("ifam_small")
    model = load_published(below("sd/", z), heads=3, hardness=hardness, joint=joint, dropout1=0.0, dropout2=0.0)
    logits = model.train().to(dtype)(z["x"].to(dtype), noise=Noise()).logits
    return model, F.cross_entropy(logits, z["grad/targets"])


TOKENS = ["selector.prototypes", "selector.backbone.cls_token", "selector.backbone.register_tokens", "selector.backbone.pos_embed"]
OFF_THE_PATH = ("selector.classifier", "selector.modulation")                    # they only feed the stage-1 logits


@pytest.mark.parametrize("hardness, joint", [("hard", False), ("soft", True)])
def test_the_stage_2_loss_has_the_published_gradients_where_the_two_agree(hardness, joint):
    z = below(f"grad/{hardness}/", golden("ifam_small"))
    model, loss = published_loss(joint, hardness)
    loss.backward()
    agrees(loss, z["loss"])
    for name, parameter in model.named_parameters():
        theirs = their_name(name)
        if z[f"norm/{theirs}"].isnan():                                          # their .grad is None
            assert parameter.grad is None, name
            continue
        ours = their_layout(name, parameter.grad)
        agrees(ours.norm(), z[f"norm/{theirs}"], 1e-4)
        if theirs in z:
            agrees(ours, z[theirs], 1e-4)


def test_the_stage_2_loss_reaches_stage_1_through_a_hard_mask_and_in_the_published_code_does_not():
    z = below("grad/hard/", golden("ifam_small"))
    stage1 = [key for key in z if key.startswith("norm/stage_1.")]
    assert len(stage1) == 53 and all(z[key].isnan() for key in stage1)           # theirs: None for every parameter
    cut, loss = published_loss(joint=False)
    loss.backward()
    assert all(p.grad is None for p in cut.selector.parameters())                # joint=False reproduces that
    model, loss = published_loss(joint=True)
    loss.backward()
    agrees(loss, z["loss"])                                                      # the value is the same
    for name, parameter in model.named_parameters():
        if name.startswith(OFF_THE_PATH):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().max() > 0, name
    for ours, same in zip(model.predictor.parameters(), cut.predictor.parameters()):
        agrees(ours.grad, same.grad, 1e-4)                                       # stage 2 learns the same either way


def test_one_step_on_the_stage_2_loss_alone_moves_the_prototypes_and_tokens_of_stage_1():
    model, loss = published_loss(joint=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= set(TOKENS)
    assert moved == {name for name in before if not name.startswith(OFF_THE_PATH)}


def test_the_gradient_of_the_whole_model_is_that_of_the_formula_in_every_layer(monkeypatch):
    model, loss = published_loss(joint=True, dtype=torch.float64)
    loss.backward()
    monkeypatch.setattr(ViT, "_run_joint", by_formula)
    slow, slow_loss = published_loss(joint=True, dtype=torch.float64)
    slow_loss.backward()
    agrees(loss, slow_loss, 1e-10)
    for (name, ours), expected in zip(model.named_parameters(), slow.parameters()):
        if expected.grad is None:
            assert ours.grad is None, name
        else:
            agrees(ours.grad, expected.grad, 1e-8)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kept", [(0, 3, 25), (4, 9, 1), (0, 0, 0), (25, 25, 25)], ids=str)
def test_tokens_that_every_image_drops_have_no_gradient_to_compute_and_everything_else_has_that_of_the_formula(
        kept, pooling, monkeypatch):
    model, x = tiny(pooling=pooling).double(), pictures(3).double().requires_grad_()
    keep = torch.zeros(3, 25, dtype=torch.float64)
    for row, n in zip(keep, kept):
        row[torch.randperm(25, generator=torch.Generator().manual_seed(n))[:n]] = 1
    results = []
    for path in (ViT._run_joint, by_formula):
        monkeypatch.setattr(ViT, "_run_joint", path)
        mask = keep.clone().requires_grad_()
        model.zero_grad()
        tokens = model.predictor.backbone(x, mask)
        loss = F.cross_entropy(model.predictor(x, mask), torch.tensor([0, 2, 1]))
        loss.backward(inputs=[x, mask, *model.predictor.parameters()])
        results.append([tokens, loss, x.grad, mask.grad, *(p.grad for p in model.predictor.parameters())])
        x.grad = None
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)


def test_the_gradient_of_a_given_mask_is_what_softening_it_measures():
    hard, soft = (tiny(hardness=kind).double() for kind in ("hard", "soft"))
    soft.load_state_dict(hard.state_dict())
    x = pictures(2).double()
    keep = (torch.rand(2, 25, generator=torch.Generator().manual_seed(5)) < 0.5).double().requires_grad_()
    loss = lambda model, mask: F.cross_entropy(model(x, keep=mask).logits, torch.tensor([0, 2]))
    gradient, = torch.autograd.grad(loss(hard, keep), keep)
    with torch.no_grad():
        for b, j in [(0, 3), (0, 11), (1, 0), (1, 24)]:
            kept = keep[b, j] == 1
            nudge = torch.zeros_like(keep)
            nudge[b, j] = 1e-6
            inside = keep - nudge if kept else keep + nudge                      # towards the inside of [0, 1]
            change = (loss(soft, inside) - loss(soft, keep)) * (-1 if kept else 1)
            assert gradient[b, j].item() == pytest.approx(change.item() / 1e-6, rel=1e-3, abs=1e-8)


def test_a_dropped_key_that_outweighs_every_kept_one_gives_a_large_but_finite_gradient():
    q, k, v = torch.zeros(3, 1, 4, 1, 2).unbind()
    k = k.clone()
    k[0, 3], q = 1000.0, q + 1.0                         # its score exceeds the others by far more than exp can hold
    mask = torch.tensor([[1.0, 1, 1, 0]], requires_grad=True)
    (attend_masked(q, k, v + torch.arange(4.0).view(1, 4, 1, 1), mask)).sum().backward()
    assert mask.grad.isfinite().all() and mask.grad[0, 3] > 1e20
