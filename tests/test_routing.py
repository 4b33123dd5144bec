"""DTR: the masks of the official code, where they act, what they leave alone."""
import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image

import adm
import moe
import test_moe
from conftest import call
from data import ASSETS
from hub import UserError
from routing import MODES, add_routing, random_masks, task_masks
from sample import Model, generate, load_model
from test_moe import FLAT, SMALL, T, base
from unet import BasicTransformerBlock, ResnetBlock2D, UNet

run = functools.partial(test_moe.run, channels=4)


def blocks(network):
    return [module for module in network.modules() if hasattr(module, "routable_channels")]


@pytest.mark.parametrize("C", [32, 64, 96, 128, 192, 320, 384, 640, 768, 1024, 1152, 1920, 2560])
@pytest.mark.parametrize("alpha, beta", [(4.0, 0.8), (1.0, 0.5), (0.5, 0.9), (4.0, 1.0)])
def test_masks_equal_the_official_definition(C, alpha, beta):
    """In float64, one timestep after the other."""
    expected = np.zeros((1000, C))
    width = int(C * beta)
    for t, u in enumerate(np.linspace(0, 1, 1000)):
        start = int(np.round(u ** alpha * (C - width)))
        expected[t, start:start + width] = 1
    masks = task_masks(torch.arange(1000), C, alpha, beta)
    assert masks.dtype == torch.float32 and np.array_equal(masks.numpy(), expected)


def test_near_timesteps_share_more_than_distant_ones():
    masks = task_masks(torch.arange(1000), 320)
    shared = masks @ masks.T
    assert (masks.sum(1) == 256).all()
    assert (shared[0].diff() <= 0).all() and shared[0, 999] < shared[0, 500]


@pytest.mark.parametrize("mode", MODES)
def test_fractional_timesteps_take_the_nearest(mode):
    mask = add_routing(base(), mode=mode).mid_block.resnets[0].mask
    nearest = torch.tensor([0, 900, 999])
    assert torch.equal(mask(torch.tensor([0.4, 899.6, 998.9])), mask(nearest))


def test_random_masks_are_a_function_of_seed_block_and_t():
    a = random_masks(64, seed=1, block=2)
    assert (a.sum(1) == 51).all() and torch.equal(a, random_masks(64, seed=1, block=2))
    for other in (random_masks(64, seed=2, block=2), random_masks(64, seed=1, block=3)):
        assert not torch.equal(a, other)
    assert not torch.equal(a[0], a[1])


def test_every_block_gets_masks_of_its_width_by_the_options_and_nothing_is_stored():
    t = torch.arange(400)
    unet = add_routing(base(), 2.0, 0.5, "dtr", 400)
    routed = [m for m in unet.modules() if isinstance(m, (ResnetBlock2D, BasicTransformerBlock))]
    assert routed == blocks(unet)
    for block in routed:
        width = block.norm1.weight.shape[0]
        assert torch.equal(block.mask(t), task_masks(t, width, 2.0, 0.5, num_steps=400))
    # R-TR: each block has a draw of its own. On the meta device the draw is made all the same.
    with torch.device("meta"):
        unet = add_routing(UNet(SMALL), 4.0, 0.5, "random", 400, 3)
    for i, block in enumerate(blocks(unet)):
        width = block.norm1.weight.shape[0]
        assert torch.equal(block.mask(t), random_masks(width, 0.5, 400, seed=3, block=i))
    assert unet.state_dict().keys() == base().state_dict().keys()
    assert len(list(unet.parameters())) == len(list(base().parameters()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "adm-tiny", "ddpm-tiny"])
def test_halves_give_backbone_and_skip_a_window_each(name):
    network = base() if name == "unet" else adm.UNet2D(adm.CONFIGS[name])
    skips = {}      # block -> channels of the tensor from the way down that it will pop
    for level in network.up_blocks:
        level.register_forward_pre_hook(lambda level, inputs: skips.update(
            zip(level.resnets, [x.shape[1] for x in reversed(inputs[2])])))
    x = torch.randn(1, network.config["in_channels"], 16, 16)
    network(x, torch.tensor([5]), torch.randn(1, 7, 24) if name == "unet" else None)
    assert len(skips) == len(network.up_blocks) * (network.config["layers_per_block"] + 1)

    add_routing(network, mode="halves")
    t = torch.tensor([0, 300, 999])
    for block in blocks(network):
        mask, one_window = block.mask(t), task_masks(t, block.routable_channels)
        if block not in skips:
            assert torch.equal(mask, one_window)
            continue
        backbone = block.routable_channels - skips[block]
        halves = [task_masks(t, backbone), task_masks(t, skips[block])]
        assert torch.equal(mask, torch.cat(halves, dim=1))
        # One window hides channels of the skip alone at first, and of the backbone alone at last.
        assert one_window[0, :backbone].all() and one_window[2, backbone:].all()
        assert not mask[0, :backbone].all() and not mask[2, backbone:].all()


@pytest.mark.parametrize("mode", MODES)
def test_beta_1_is_exactly_the_plain_network(mode):
    assert torch.equal(run(add_routing(base(), beta=1.0, mode=mode)), run(base()))


def test_the_mask_meets_the_update_and_not_the_skip_path():
    unet = add_routing(base())
    cond = unet.condition(torch.zeros(4, 4, 8, 8), T, torch.randn(4, 7, 24), None, None)
    resnet, block = unet.up_blocks[0].resnets[0], unet.mid_block.attentions[0].transformer_blocks[0]
    x = torch.randn(4, 128, 8, 8)
    m = task_masks(T, 128)[:, :, None, None]
    expected = resnet.conv_shortcut(x) + resnet.update(m * x, cond)
    assert torch.allclose(resnet(x, cond), expected, atol=1e-6)
    # The official DiT block, line by line.
    x = torch.randn(4, 64, 64)
    m = task_masks(T, 64)[:, None]
    r = m * x
    r = r + block.attn1(block.norm1(r, cond))
    r = r + block.attn2(block.norm2(r, cond), cond.context)
    r = r + block.ff(block.norm3(r, cond), cond)
    assert torch.allclose(block(x, cond), r + (1 - m) * x, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["adm-tiny", "ddpm-tiny"])
def test_the_papers_own_unet(name, tmp_path):
    """Each residual and attention block meets its mask; a folder is rebuilt, and draws."""
    plain = adm.UNet2D(adm.CONFIGS[name]).eval()
    for p in plain.parameters():
        p.add_(0.02 * torch.randn_like(p))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 990])
    expected = plain(x, t, None)
    assert torch.equal(add_routing(copy.deepcopy(plain), beta=1.0)(x, t, None), expected)
    routed = add_routing(copy.deepcopy(plain))
    out = routed(x, t, None)
    assert not torch.allclose(out, expected, atol=1e-4)
    assert any(isinstance(block, adm.Attention) for block in blocks(plain))
    for block, twin in zip(blocks(routed), blocks(plain), strict=True):
        C = twin.routable_channels
        y = torch.randn(2, C, 8, 8)
        masked = task_masks(t, C)[:, :, None, None] * y
        cond = plain.condition(x, t, None, None, None)
        if isinstance(twin, adm.Attention):
            expected = y + twin(masked, cond) - masked
        else:
            expected = twin.skip(y) + twin.update(masked, cond)
        assert torch.allclose(block(y, cond), expected, atol=1e-5)
    parts = (adm.Pixels(32), None, None, adm.scheduler_for(routed.config))
    Model(routed, *parts, {"_class_name": "RoutedPipeline2D"}).save(tmp_path)
    model = load_model(tmp_path)
    assert torch.equal(model.unet(x, t, None), out)
    assert generate(model, "uncond", [""], steps=2, height=40)[0].size == (32, 40)


@pytest.mark.parametrize("mode", MODES)
def test_it_composes_with_mtu_and_folds(mode):
    dense = run(add_routing(base(), mode=mode))
    last, first = add_routing(moe.upcycle(base()), mode=mode), add_routing(base(), mode=mode)
    for unet in (last, moe.upcycle(first)):
        assert unet.config["_class_name"] in ("RoutedUpcycledUNet", "UpcycledRoutedUNet")
        assert torch.allclose(run(unet, channels=8), dense, atol=1e-4)
        folded = moe.fold(unet, "edit")
        assert torch.allclose(run(folded, channels=8), run(unet, 1, channels=8), atol=1e-4)
        assert folded.config["_class_name"] == "RoutedUNet"


@pytest.mark.parametrize("upcycled", [False, True])
def test_a_folder_is_rebuilt_with_its_routing(tmp_path, upcycled):
    model = load_model(ASSETS / "tiny")
    if upcycled:
        moe.upcycle(model.unet)
    add_routing(model.unet, alpha=2.0, mode="random", seed=3)
    model.save(tmp_path)
    again = load_model(tmp_path).unet
    assert again.config == model.unet.config and again.config["routing"]["alpha"] == 2.0
    x, text, task = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 128), torch.zeros(2).long()
    out, expected = (unet(x, T[1:3], text, task=task) for unet in (again, model.unet))
    assert torch.allclose(out, expected, atol=1e-6)
    with pytest.raises(UserError, match="Routed.*load_model"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_and_bf16(mode):
    unet = add_routing(base(**FLAT), mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(torch.compile(unet, backend="eager", fullgraph=True))
    assert out.dtype == torch.bfloat16 and (out - run(unet)).abs().max() < 0.1
    assert run(unet.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [
    dict(beta=0.0), dict(beta=1.1), dict(beta=0.01), dict(alpha=0.0), dict(alpha=float("nan")),
    dict(mode="rtr"), dict(num_steps=1)])
def test_bad_settings_are_refused_and_leave_the_network_alone(options):
    unet = base()
    with pytest.raises(UserError, match="alpha is above 0, beta"):
        add_routing(unet, **options)
    assert unet.config == base().config and torch.equal(run(unet), run(base()))
    add_routing(unet)
    with pytest.raises(UserError, match="already"):
        add_routing(unet)


def test_the_demonstration_draws_the_masks_between_labelled_axes(tmp_path):
    done = call("routing.py", "--out", tmp_path / "m.png")
    # README quotes the last number of the first row.
    assert done.returncode == 0 and done.stdout.splitlines()[2].split()[-1] == "0.750"
    picture = np.asarray(Image.open(tmp_path / "m.png").convert("L"))
    dtr = task_masks(torch.arange(1000), 320).T.numpy()
    random = random_masks(320).T.numpy()
    # Both lie in frames whose lines are as long as the axes; the labels lie outside.
    lines = [y for y, row in enumerate(picture == 128) if row.sum() >= 1000]
    left = np.flatnonzero(picture[lines[0]] == 128)[0]
    assert len(lines) == 4
    for mask, top, bottom in zip((dtr, random), lines[::2], lines[1::2]):
        assert np.array_equal(picture[top + 1:bottom, left + 1:left + 1001], 255 * mask)
        for corner in (picture[top:top + 20, :left], picture[bottom - 20:bottom, :left],
                       picture[bottom + 1:bottom + 20, left:-500],
                       picture[bottom + 1:bottom + 20, -500:]):
            assert (corner < 99).any()
