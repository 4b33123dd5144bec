"""AutoencoderKL against diffusers."""
import inspect
import json

import pytest
import torch

from data import ASSETS
from folders import UserError
from vae import CONFIGS, DEFAULTS, IGNORED, VAE, _levels

diffusers = pytest.importorskip("diffusers")


def theirs(config):
    return diffusers.AutoencoderKL(**config).eval()


SMALL = dict(_levels((8, 8, 16)), layers_per_block=1, norm_num_groups=4, sample_size=64)  # f = 4: diffusers' tile is 16 latents


def overflowing(dtype, **config):
    """Its residual streams reach 1e5 to 1e6, more than fp16 holds, while every weight is one of fp16's numbers."""
    torch.manual_seed(0)
    vae = VAE({**SMALL, **config}).eval().requires_grad_(False)
    for level in (vae.encoder.down_blocks[0], vae.decoder.up_blocks[0]):
        level.resnets[0].conv2.weight.mul_(4e5)
    return vae.half().to(dtype)


@pytest.mark.parametrize("name, size, scale", [("sd15", 512, 0.18215), ("sdxl", 1024, 0.13025)])
def test_keys_and_shapes_of_stable_diffusion(name, size, scale):
    with torch.device("meta"):
        ours, b = VAE(CONFIGS[name]), diffusers.AutoencoderKL(**CONFIGS[name]).state_dict()
    a = ours.state_dict()
    assert len(a) == 248 and {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert (ours.factor, ours.config["sample_size"], ours.config["scaling_factor"], ours.config["force_upcast"]) == (8, size, scale, True)


@pytest.mark.parametrize("config", [dict(_levels((32, 32, 64, 64)), layers_per_block=2, norm_num_groups=8), CONFIGS["tiny"]])
def test_equals_diffusers(config):
    b = theirs(config)
    a = VAE(config).eval()
    a.load_state_dict(b.state_dict())
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    mean, logvar = a.encode(images)
    distribution = b.encode(images).latent_dist
    assert torch.allclose(mean, distribution.mean, atol=1e-5) and torch.allclose(logvar, distribution.logvar, atol=1e-5)
    assert mean.shape[-2:] == (48 // a.factor, 64 // a.factor)
    assert torch.allclose(a.decode(mean), b.decode(mean).sample, atol=1e-5)


def test_folders_go_both_ways(tmp_path):
    ours = VAE(CONFIGS["tiny"]).eval()
    ours.save_pretrained(tmp_path / "ours" / "vae")
    z = torch.randn(1, 4, 8, 8)
    there = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours" / "vae", low_cpu_mem_usage=False)
    assert torch.allclose(there.decode(z).sample, ours.decode(z), atol=1e-5)
    there.save_pretrained(tmp_path / "theirs" / "vae")
    assert torch.equal(VAE.from_pretrained(tmp_path / "theirs").decode(z), ours.decode(z))


def test_older_attention_names_load(tmp_path):
    from safetensors.torch import load_file, save_file
    ours = VAE(CONFIGS["tiny"]).eval()
    ours.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for key, value in load_file(file).items():
        for new, name in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            key = key.replace(new, name)
        old[key] = value
    save_file(old, file)
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(VAE.from_pretrained(tmp_path).decode(z), ours.decode(z))


# Tiles of 16 latents, a step of 12, a fade of 4. One row of tiles, one column, a side of exactly a tile, last tiles of 1 and 2, many.
@pytest.mark.parametrize("h, w", [(12, 40), (30, 9), (16, 25), (26, 14), (31, 53)])
def test_tiles_equal_diffusers_and_bound_what_the_networks_see(h, w):
    b = theirs(SMALL).requires_grad_(False)
    b.enable_tiling()
    a = VAE(SMALL).eval().requires_grad_(False)
    a.load_state_dict(b.state_dict())
    z, images, seen = torch.randn(2, 4, h, w), torch.rand(2, 3, 4 * h, 4 * w) * 2 - 1, []
    for network, size in ((a.decoder, 16), (a.encoder, 64)):
        network.register_forward_pre_hook(lambda module, args, size=size: seen.append(max(args[0].shape[2:]) / size))
    picture, (mean, logvar) = a.decode(z, tile=16), a.encode(images, tile=16)
    assert max(seen) == 1 and len(seen) == 2 * len(range(0, h, 12)) * len(range(0, w, 12))
    distribution = b.encode(images).latent_dist
    assert picture.shape == (2, 3, 4 * h, 4 * w) and torch.allclose(picture, b.decode(z).sample, atol=1e-5)
    assert torch.allclose(mean, distribution.mean, atol=1e-5) and torch.allclose(logvar, distribution.logvar, atol=1e-5)
    assert torch.equal(a.mode(images, tile=16), mean) and not torch.allclose(a.mode(images), mean, atol=1e-3)


def test_a_picture_of_one_tile_is_not_cut():
    vae = VAE(SMALL).eval()
    z = torch.randn(1, 4, 16, 12)
    assert torch.equal(vae.decode(z, tile=16), vae.decode(z))


@pytest.mark.parametrize("tile", [0, -4, 6])
def test_a_tile_that_cannot_overlap_by_a_quarter_is_refused(tile):
    with pytest.raises(UserError, match=f"tile = {tile}"):
        VAE(SMALL).decode(torch.randn(1, 4, 16, 16), tile=tile)


def test_what_is_no_picture_is_refused():
    vae = VAE(SMALL)
    with pytest.raises(UserError, match="multiples of 4"):
        vae.encode(torch.zeros(1, 3, 32, 30))
    with pytest.raises(UserError, match="uint8"):
        vae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("tile", [None, 8])
def test_fp16_does_not_overflow(tile):
    z, images = torch.randn(1, 4, 12, 12).half(), (torch.rand(1, 3, 48, 48) * 2 - 1).half()
    unsafe, safe, exact = overflowing(torch.float16, force_upcast=False), overflowing(torch.float16), overflowing(torch.float32)
    assert not unsafe.decode(z, tile).isfinite().all() and not unsafe.mode(images, tile).isfinite().all()
    for ours, reference in ((safe.decode(z, tile), exact.decode(z.float(), tile)), (safe.mode(images, tile), exact.mode(images.float(), tile))):
        assert ours.dtype == torch.float16 and torch.allclose(ours.float(), reference, atol=2e-3, rtol=1e-3)
    assert torch.allclose(safe.decode(z.float(), tile), exact.decode(z.float(), tile), atol=1e-5)  # fp32 inside, not bf16
    assert all(p.dtype == torch.float16 for p in safe.parameters())


def test_fp16_autocast_does_not_overflow():
    z = torch.randn(1, 4, 12, 12)
    with torch.autocast("cpu", torch.float16):
        assert not overflowing(torch.float32, force_upcast=False).decode(z).isfinite().all()
        picture = overflowing(torch.float32).decode(z)
    assert torch.allclose(picture, overflowing(torch.float32).decode(z), atol=1e-5)


def test_bf16_autocast_is_left_alone():
    vae, z = VAE(SMALL).eval(), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        picture = vae.decode(z)
        assert picture.dtype == torch.bfloat16 and torch.equal(picture, vae.decoder(vae.post_quant_conv(z)))


def test_gradients_reach_fp16_weights():
    vae = VAE(SMALL).half()
    vae.decode(torch.randn(1, 4, 8, 8)).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vae.decoder.conv_in.parameters())


@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_of_weights_and_inputs_gives_pictures_of_the_inputs(weights, inputs):
    vae, exact = overflowing(weights), overflowing(torch.float32)
    z, images = torch.randn(1, 4, 8, 8).to(inputs), torch.rand(1, 3, 32, 32).to(inputs)
    for ours, reference in ((vae.decode(z), exact.decode(z.float())), (vae.mode(images), exact.mode(images.float()))):
        assert ours.dtype == inputs and (ours.float() - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize("value", [True, False])
def test_force_upcast_is_kept(tmp_path, value):
    VAE({**SMALL, "force_upcast": value, "latents_mean": None, "latents_std": None, "shift_factor": None}).save_pretrained(tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["force_upcast"] is value
    assert VAE.from_pretrained(tmp_path).config["force_upcast"] is value


def test_every_config_key_of_diffusers_has_its_default_here():
    theirs = {k: p.default for k, p in inspect.signature(diffusers.AutoencoderKL.__init__).parameters.items() if k != "self"}
    assert theirs == {**DEFAULTS, **dict.fromkeys(IGNORED)}


@pytest.mark.parametrize("key, value", [
    ("act_fn", "relu"), ("shift_factor", 0.1), ("latents_mean", [0.0] * 4), ("latents_std", [1.0] * 4), ("use_quant_conv", False),
    ("use_post_quant_conv", False), ("mid_block_add_attention", False), ("mid_block_add_attention", None), ("surprise", 1),
    ("down_block_types", ["AttnDownEncoderBlock2D"] * 3), ("down_block_types", ["DownEncoderBlock2D"] * 2), ("down_block_types", None),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 3), ("up_block_types", ["UpDecoderBlock2D"] * 4)])
def test_what_is_not_implemented_is_named(key, value):
    with pytest.raises(UserError, match=key):
        VAE({**CONFIGS["tiny"], key: value})


def test_another_class_is_named(tmp_path):
    VAE(SMALL).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(file.read_text().replace("AutoencoderKL", "AutoencoderKLTemporalDecoder"))
    with pytest.raises(UserError, match="AutoencoderKLTemporalDecoder"):
        VAE.from_pretrained(tmp_path)


def test_the_shipped_autoencoder_reconstructs_held_out_pictures():
    from vae import psnr
    assert psnr(VAE.from_pretrained(ASSETS / "tiny"), 100, "cpu") > 28
