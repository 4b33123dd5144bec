"""AutoencoderKL against diffusers."""
import inspect
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, refused, shapes
from hub import write_json
from train_autoencoder import psnr
from vae import CONFIGS, DEFAULTS, VAE, completed

# f = 4, and diffusers' tile is 16 latents.
SMALL = dict(block_out_channels=(8, 8, 16), norm_num_groups=4, sample_size=64)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def theirs(config):
    return diffusers.AutoencoderKL(**completed(config)).eval().requires_grad_(False)


def ours(config, weights=None):
    vae = VAE(config).eval().requires_grad_(False)
    if weights:
        vae.load_state_dict(weights.state_dict())
    return vae


def overflowing(dtype, **config):
    """Residual streams of 1e5 to 1e6, beyond fp16, though fp16 holds every weight exactly."""
    torch.manual_seed(0)
    vae = ours({**SMALL, **config})
    for level in (vae.encoder.down_blocks[0], vae.decoder.up_blocks[0]):
        level.resnets[0].conv2.weight.mul_(4e5)
    return vae.half().to(dtype)


def inputs(h, w, f=4):
    return torch.randn(2, 4, h, w), torch.rand(2, 3, f * h, f * w) * 2 - 1


def outputs(vae, z, images, tile=None):
    return torch.cat([x.flatten() for x in (vae.decode(z, tile), *vae.encode(images, tile))])


def their_outputs(vae, z, images):
    q = vae.encode(images).latent_dist
    return torch.cat([x.flatten() for x in (vae.decode(z).sample, q.mean, q.logvar)])


@pytest.mark.parametrize("name, size, scale", [("sd15", 512, 0.18215), ("sdxl", 1024, 0.13025)])
def test_keys_and_shapes_of_stable_diffusion(name, size, scale):
    with torch.device("meta"):
        a = VAE(CONFIGS[name])
        b = theirs(CONFIGS[name])
    assert len(shapes(a)) == 248
    assert shapes(a) == shapes(b)
    assert a.factor == 8 and a.config["sample_size"] == size
    assert a.config["scaling_factor"] == scale and a.config["force_upcast"] is True


@pytest.mark.parametrize("config", [CONFIGS["tiny"], dict(
    block_out_channels=(32, 32, 64, 64), layers_per_block=2, norm_num_groups=8)])
def test_equals_diffusers_and_folders_go_both_ways(config, tmp_path):
    b = theirs(config)
    a = ours(config, b)
    z, images = inputs(6, 8, a.factor)
    expected = their_outputs(b, z, images)
    assert a.encode(images)[0].shape == z.shape
    assert torch.allclose(outputs(a, z, images), expected, atol=1e-5)
    a.save_pretrained(tmp_path / "vae")
    there = diffusers.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert torch.equal(their_outputs(there, z, images), expected)
    there.save_pretrained(tmp_path / "b" / "vae")
    again = VAE.from_pretrained(tmp_path / "b")
    assert torch.equal(outputs(again, z, images), outputs(a, z, images))


def test_older_attention_names_load(tmp_path):
    vae = ours(SMALL)
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    names = dict(to_q="query", to_k="key", to_v="value", to_out="proj_attn")
    old = {}
    for key, value in load_file(file).items():
        key = key.replace("to_out.0", "to_out")
        old[".".join(names.get(word, word) for word in key.split("."))] = value
    assert sum("proj_attn" in key or ".query." in key for key in old) == 8
    save_file(old, file)
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(VAE.from_pretrained(tmp_path).decode(z), vae.decode(z))


# A step of 12 latents and a fade of 4: one row of tiles, one column, a side of exactly a tile,
# last tiles of 1 and 2, many tiles.
@pytest.mark.parametrize("h, w", [(12, 40), (30, 9), (16, 25), (26, 14), (31, 53)])
def test_tiles_equal_diffusers_and_bound_what_the_networks_see(h, w):
    b = theirs(SMALL)
    b.enable_tiling()
    a = ours(SMALL, b)
    z, images = inputs(h, w)
    whole = outputs(a, z, images)
    seen = []
    for network, size in ((a.decoder, 16), (a.encoder, 64)):
        network.register_forward_pre_hook(
            lambda module, args, size=size: seen.append(max(args[0].shape[2:]) / size))
    tiled = outputs(a, z, images, tile=16)
    assert max(seen) == 1 and len(seen) == 2 * len(range(0, h, 12)) * len(range(0, w, 12))
    assert torch.allclose(tiled, their_outputs(b, z, images), atol=1e-5)
    assert not torch.allclose(tiled, whole, atol=1e-3)


def test_a_picture_of_one_tile_is_not_cut():
    vae = ours(SMALL)
    z = torch.randn(1, 4, 16, 12)
    assert torch.equal(vae.decode(z, tile=16), vae.decode(z))


def test_what_is_no_picture_or_no_tile_is_refused():
    vae = ours(SMALL)
    with refused("multiples of 4"):
        vae.encode(torch.zeros(1, 3, 32, 30))
    with refused("uint8"):
        vae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    for tile in (0, -4, 6):
        with refused(f"tile = {tile}"):
            vae.decode(torch.randn(1, 4, 16, 16), tile)


@pytest.mark.parametrize("tile", [None, 8])
def test_fp16_does_not_overflow(tile):
    z, images = (x.half() for x in inputs(12, 12))
    unsafe = overflowing(torch.float16, force_upcast=False)
    assert not unsafe.decode(z, tile).isfinite().all()
    assert not unsafe.encode(images, tile)[0].isfinite().all()
    safe = overflowing(torch.float16)
    assert all(p.dtype == torch.float16 for p in safe.parameters())
    exact = outputs(overflowing(torch.float32), z.float(), images.float(), tile)
    output = outputs(safe, z, images, tile)
    assert output.dtype == torch.float16
    assert torch.allclose(output.float(), exact, atol=2e-3, rtol=1e-3)
    # It is fp32 inside, not bf16.
    assert torch.allclose(outputs(safe, z.float(), images.float(), tile), exact, atol=1e-5)


def test_fp16_autocast_does_not_overflow():
    z, _ = inputs(12, 12)
    with torch.autocast("cpu", torch.float16):
        assert not overflowing(torch.float32, force_upcast=False).decode(z).isfinite().all()
        picture = overflowing(torch.float32).decode(z)
    assert torch.allclose(picture, overflowing(torch.float32).decode(z), atol=1e-5)


def test_bf16_autocast_is_left_alone():
    vae = ours(SMALL)
    z, _ = inputs(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        picture = vae.decode(z)
        assert torch.equal(picture, vae.decoder(vae.post_quant_conv(z)))
    assert picture.dtype == torch.bfloat16


def test_gradients_reach_fp16_weights():
    vae = VAE(SMALL).half()
    vae.decode(torch.randn(1, 4, 8, 8)).square().mean().backward()
    for p in vae.decoder.conv_in.parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0


@DTYPES
@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_dtype_give_pictures_of_the_inputs_dtype(weights, dtype):
    z, images = (x.to(dtype) for x in inputs(8, 8))
    output = overflowing(weights).decode(z), overflowing(weights).encode(images)[0]
    exact = overflowing(torch.float32)
    for x, expected in zip(output, (exact.decode(z.float()), exact.encode(images.float())[0])):
        assert x.dtype == dtype
        assert (x.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("value", [True, False])
def test_force_upcast_is_kept(tmp_path, value):
    null = dict.fromkeys(("latents_mean", "latents_std", "shift_factor"))
    VAE({**SMALL, **null, "force_upcast": value}).save_pretrained(tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["force_upcast"] is value
    assert VAE.from_pretrained(tmp_path).config["force_upcast"] is value


def test_every_config_key_of_diffusers_has_its_default_here():
    known = {**DEFAULTS, "down_block_types": ("DownEncoderBlock2D",),
             "up_block_types": ("UpDecoderBlock2D",)}
    parameters = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    for key in set(parameters) - {"self"}:
        assert parameters[key].default == known.pop(key, None), key
    assert not known


@pytest.mark.parametrize("key, value", [
    ("act_fn", "relu"), ("shift_factor", 0.1), ("latents_mean", [0.0] * 4), ("surprise", 1),
    ("latents_std", [1.0] * 4), ("use_quant_conv", False), ("use_post_quant_conv", False),
    ("mid_block_add_attention", False), ("mid_block_add_attention", None),
    ("down_block_types", ["AttnDownEncoderBlock2D"] * 3), ("down_block_types", None),
    ("down_block_types", ["DownEncoderBlock2D"] * 2), ("up_block_types", ["UpDecoderBlock2D"] * 4),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 3), ("layers_per_block", None),
    ("layers_per_block", 10 ** 9), ("sample_size", None), ("latent_channels", 4.0),
    ("force_upcast", [[{}]]), ("norm_num_groups", 7), ("block_out_channels", 8),
    *[("scaling_factor", value) for value in ("x", 0, 1e-300, 1e-4, 1e5, float("nan"))]])
def test_what_is_not_implemented_is_the_files_fault_and_named(tmp_path, key, value):
    write_json(tmp_path / "vae" / "config.json", {**SMALL, key: value})
    # Numbers that do not fit each other are named by PyTorch or Python.
    words = "does not hold" if key in ("norm_num_groups", "block_out_channels") else f": .*{key}"
    with refused(f"config.json.*{words}"):
        VAE.from_pretrained(tmp_path)


def test_another_autoencoder_is_named(tmp_path):
    write_json(tmp_path / "vae" / "config.json", dict(_class_name="AutoencoderKLTemporalDecoder"))
    with refused("holds a AutoencoderKLTemporalDecoder"):
        VAE.from_pretrained(tmp_path)


def test_the_shipped_autoencoder_reconstructs_held_out_pictures():
    assert psnr(VAE.from_pretrained(ROOT / "assets" / "tiny"), 100) > 28
