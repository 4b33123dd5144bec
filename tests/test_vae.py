"""AutoencoderKL against diffusers."""
import pytest
import torch

from data import ASSETS
from unet import UserError
from vae import CONFIGS, VAE, _levels

diffusers = pytest.importorskip("diffusers")


def theirs(config):
    return diffusers.AutoencoderKL(**config).eval()


def test_keys_and_shapes_of_stable_diffusion():
    with torch.device("meta"):
        a, b = VAE(CONFIGS["sd15"]).state_dict(), diffusers.AutoencoderKL(**CONFIGS["sd15"]).state_dict()
    assert len(a) == 248 and {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


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


@pytest.mark.parametrize("key, value", [("act_fn", "relu"), ("shift_factor", 0.1), ("use_quant_conv", False), ("surprise", 1)])
def test_what_is_not_implemented_is_named(key, value):
    with pytest.raises(UserError, match=key):
        VAE({**CONFIGS["tiny"], key: value})


def test_the_shipped_autoencoder_reconstructs_held_out_pictures():
    from vae import psnr
    assert psnr(VAE.from_pretrained(ASSETS / "tiny"), 100, "cpu") > 28
