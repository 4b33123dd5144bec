"""DTR: the masks of the official code, where they act, what they leave alone."""
import copy
import json

import numpy as np
import pytest
import torch

import adm
import moe
import routing
from conftest import called
from folders import UserError
from routing import add_routing, random_masks, task_masks
from sample import Model, generate, load_model
from unet import CONFIGS, BasicTransformerBlock, ResnetBlock2D, UNet
from vae import Attention, Pixels

SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64, 64), cross_attention_dim=24)


def base():
    torch.manual_seed(0)
    return UNet(SMALL).eval()


def inputs(channels=4):
    torch.manual_seed(1)
    return torch.randn(4, channels, 8, 8), torch.tensor([1, 300, 600, 999]), torch.randn(4, 7, 24)


@pytest.mark.parametrize("C", [32, 64, 96, 128, 192, 320, 384, 640, 768, 1024, 1152, 1280, 1920, 2560])
@pytest.mark.parametrize("alpha, beta", [(4.0, 0.8), (1.0, 0.5), (0.5, 0.9), (4.0, 1.0)])
def test_masks_equal_the_official_definition(C, alpha, beta):
    T, width = 1000, int(C * beta)  # in float64, one timestep after the other
    expected = np.zeros((T, C))
    for t, u in enumerate(np.linspace(0, 1, T)):
        start = int(np.round(u ** alpha * (C - width)))
        expected[t, start:start + width] = 1
    masks = task_masks(torch.arange(T), C, alpha, beta)
    assert masks.dtype == torch.float32 and np.array_equal(masks.numpy(), expected)


def test_near_timesteps_share_more_than_distant_ones():
    masks = task_masks(torch.arange(1000), 320)
    shared = masks @ masks.T
    assert (shared.diff(dim=1)[0] <= 0).all() and shared[0, 999] < shared[0, 500] and (masks.sum(1) == 256).all()


def test_fractional_timesteps_take_the_nearest():
    t = torch.tensor([0.4, 899.6, 998.9])
    assert torch.equal(task_masks(t, 320), task_masks(torch.tensor([0, 900, 999]), 320))
    for mode in routing.MODES:
        mask = routing.Mask(320, 3, 4.0, 0.8, mode, 1000, 0)
        assert torch.equal(mask(t), mask(torch.tensor([0, 900, 999])))


def test_random_masks_are_a_function_of_seed_block_and_t():
    a = random_masks(64, seed=1, block=2)
    assert (a.sum(1) == 51).all() and torch.equal(a, random_masks(64, seed=1, block=2))
    assert not torch.equal(a, random_masks(64, seed=2, block=2)) and not torch.equal(a, random_masks(64, seed=1, block=3))
    assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize("mode", routing.MODES)
def test_beta_1_is_exactly_the_plain_network(mode):
    unet, (x, t, text) = base(), inputs()
    expected = unet(x, t, text)
    assert torch.equal(add_routing(unet, beta=1.0, mode=mode)(x, t, text), expected)


@pytest.mark.parametrize("mode", routing.MODES)
def test_each_sample_follows_its_own_timestep(mode):
    unet, (x, t, text) = add_routing(base(), mode=mode), inputs()
    together, plain = unet(x, t, text), base()(x, t, text)
    for i in range(4):
        assert torch.allclose(together[i:i + 1], unet(x[i:i + 1], t[i:i + 1], text[i:i + 1]), atol=1e-5)
        assert (together[i] - plain[i]).abs().max() > 1e-3


def test_the_mask_meets_the_update_and_not_the_skip_path():
    x, t, text = inputs()
    unet = base()
    cond = unet.condition(x, t, text, None, None)
    resnet, block = unet.up_blocks[0].resnets[0], unet.mid_block.attentions[0].transformer_blocks[0]
    h, tokens = torch.randn(4, 128, 8, 8), torch.randn(4, 64, 64)
    add_routing(unet)
    m = task_masks(t, 128)[:, :, None, None]
    expected = resnet.conv_shortcut(h) + ResnetBlock2D.update(resnet, m * h, cond)
    assert torch.allclose(resnet(h, cond), expected, atol=1e-6)
    m = task_masks(t, 64)[:, None]  # the official DiT block, line by line
    r = m * tokens
    r = r + block.attn1(block.norm1(r, cond))
    r = r + block.attn2(block.norm2(r, cond), cond.context)
    r = r + block.ff(block.norm3(r, cond), cond)
    assert torch.allclose(block(tokens, cond), r + (1 - m) * tokens, atol=1e-6)


def test_every_block_is_routed_with_its_own_width_and_nothing_is_stored():
    unet, keys = base(), base().state_dict().keys()
    add_routing(unet, mode="random")
    blocks = [m for m in unet.modules() if isinstance(m, (ResnetBlock2D, BasicTransformerBlock))]
    assert blocks and all(type(b) in (routing.RoutedResnetBlock2D, routing.RoutedTransformerBlock) for b in blocks)
    assert unet.state_dict().keys() == keys and sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in base().parameters())
    assert {b.mask.num_channels for b in blocks} == {32, 64, 96, 128}


@pytest.mark.parametrize("name", ["adm-tiny", "ddpm-tiny"])
def test_the_papers_own_backbone(name, tmp_path):
    """Every residual and attention block of a UNet2D meets its mask; beta 1 is the plain network; a folder is rebuilt."""
    torch.manual_seed(0)
    unet, x, t = adm.UNet2D(adm.CONFIGS[name]).eval(), torch.randn(2, 3, 32, 32), torch.tensor([10, 990])
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.02 * torch.randn_like(p))
        plain = unet(x, t, None)
        assert torch.equal(add_routing(copy.deepcopy(unet), beta=1.0)(x, t, None), plain)
        routed = add_routing(copy.deepcopy(unet))
        out = routed(x, t, None)
        blocks = [m for m in routed.modules() if isinstance(m, (ResnetBlock2D, Attention))]
        assert len(blocks) == sum(isinstance(m, (ResnetBlock2D, Attention)) for m in unet.modules()) > 5
        for block in blocks:
            norm = block.group_norm if isinstance(block, Attention) else block.norm1
            y, cond = torch.randn(2, norm.num_channels, 8, 8), unet.condition(x, t, None, None, None)
            m = task_masks(t, norm.num_channels)[:, :, None, None]
            twin = dict(unet.named_modules())[next(n for n, b in routed.named_modules() if b is block)]
            skip = y if isinstance(block, Attention) else block.skip(y)
            assert torch.allclose(block(y, cond), skip + twin.update(m * y, cond), atol=1e-6)
    assert not torch.allclose(out, plain, atol=1e-4)
    learned = routed.config["out_channels"] == 6
    model = Model(routed, Pixels(32), None, None, dict(_class_name="DDPMScheduler", variance_type="learned_range" if learned else "fixed_small"),
                  {"_class_name": "RoutedPipeline2D"})
    model.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path).unet(x, t, None), out)
        size = [p.size for p in generate(load_model(tmp_path), "uncond", [""], steps=2, height=40, width=32)]
    assert size == [(32, 40)]


@pytest.mark.parametrize("mode", routing.MODES)
@pytest.mark.parametrize("first", ["moe", "routing"])
def test_it_composes_with_mtu_and_folds(mode, first):
    (x, t, text), task = inputs(8), torch.arange(4)
    if first == "moe":
        unet = add_routing(moe.upcycle(base()), mode=mode)
    else:
        unet = moe.upcycle(add_routing(base(), mode=mode))
    dense = add_routing(base(), mode=mode)
    assert torch.allclose(unet(x, t, text, task=task), dense(x[:, :4], t, text), atol=1e-4)
    folded = moe.fold(unet, "edit")
    assert torch.allclose(folded(x, t, text), unet(x, t, text, task=torch.ones_like(task)), atol=1e-4)
    assert unet.config["_class_name"] == "UpcycledUNet" and folded.config["_class_name"] == "RoutedUNet"


@pytest.mark.parametrize("upcycled", [False, True])
def test_a_folder_is_rebuilt_with_its_routing(tmp_path, upcycled):
    import shutil

    from data import ASSETS
    from sample import load_model
    shutil.copytree(ASSETS / "tiny", tmp_path / "m")
    unet = UNet.from_pretrained(ASSETS / "tiny")
    unet = moe.upcycle(unet) if upcycled else unet
    add_routing(unet, alpha=2.0, mode="random", seed=3).save_pretrained(tmp_path / "m" / "unet")
    again = load_model(tmp_path / "m").unet
    assert again.config["routing"] == unet.config["routing"]
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 7, 128)
    task = torch.zeros(2, dtype=torch.long)
    assert torch.allclose(again(x, t, text, task=task), unet(x, t, text, task=task), atol=1e-6)
    with pytest.raises(UserError, match="routing|load_model"):
        (moe if upcycled else UNet).from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("mode", routing.MODES)
def test_one_graph_and_bf16(mode):
    unet, (x, t, text) = add_routing(base(), mode=mode), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(unet, backend="eager", fullgraph=True)(x, t, text)
    assert out.dtype == torch.bfloat16 and (out.float() - unet(x, t, text)).abs().max() < 0.1
    half = unet.bfloat16()(x.bfloat16(), t, text.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [dict(beta=0.0), dict(beta=1.1), dict(alpha=0.0), dict(alpha=float("nan")), dict(mode="rtr"), dict(beta=0.01)])
def test_bad_settings_are_refused_and_leave_the_network_alone(options):
    unet = base()
    with pytest.raises(UserError, match="alpha|beta"):
        add_routing(unet, **options)
    assert "routing" not in unet.config and type(unet.mid_block.resnets[0]) is ResnetBlock2D
    add_routing(unet)
    with pytest.raises(UserError, match="already"):
        add_routing(unet)


def test_the_demonstration_draws(tmp_path):
    from PIL import Image
    done = called("routing.py", "--out", tmp_path / "m.png")
    assert done.returncode == 0 and "share of channels" in done.stdout
    assert Image.open(tmp_path / "m.png").size == (1000, 320 + 8 + 320)


def test_config_json_records_it(tmp_path):
    add_routing(base(), alpha=2.0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "RoutedUNet" and config["routing"]["alpha"] == 2.0
