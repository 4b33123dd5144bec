"""DDPM's and ADM's U-Nets against diffusers' UNet2DModel, files both ways."""
import pytest
import torch
from diffusers import UNet2DModel

import adm
from adm import BLOCKS, CONFIGS, UNet2D
from folders import UserError

TINY = {  # the structures of released models at reduced widths
    "ddpm": dict(CONFIGS["ddpm"], block_out_channels=(32, 64, 64, 64)),
    "ddpm256": dict(CONFIGS["ddpm256"], block_out_channels=(32, 32, 64, 64, 96, 96), layers_per_block=1),
    "adm": dict(CONFIGS["adm"], block_out_channels=(32, 64, 96, 128), attention_head_dim=16, layers_per_block=2, num_class_embeds=10),
    "ddpm-tiny": CONFIGS["ddpm-tiny"],
    "adm-tiny": CONFIGS["adm-tiny"],
    "mixed": dict(CONFIGS["adm-tiny"], downsample_type="conv", upsample_type="conv", attn_norm_num_groups=8, norm_num_groups=16),
    "without attention": dict(CONFIGS["ddpm-tiny"], add_attention=False, **{
        f"{side.lower()}_block_types": (BLOCKS[0].format(side),) * 3 for side in ("Down", "Up")}),
}


def randomised(model):
    """diffusers starts some layers at zero or one: make every tensor count."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", TINY)
def test_output_and_names_equal_diffusers(name, tmp_path):
    torch.manual_seed(0)
    config = TINY[name]
    theirs = randomised(UNet2DModel(**config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = UNet2D.from_pretrained(tmp_path).eval()
    size = config["sample_size"] if config["sample_size"] < 256 else 64
    x, t, labels = torch.randn(2, 3, size, size), torch.tensor([3, 977]), torch.tensor([1, 7]) if config.get("num_class_embeds") else None
    with torch.no_grad():
        want = theirs(x, t, class_labels=labels).sample
        got = ours(x, t, None, added={"class_labels": labels})
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()
    ours.save_pretrained(tmp_path / "back")
    back = UNet2DModel.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(back(x, t, class_labels=labels).sample, want)


@pytest.mark.parametrize("name, parameters", [("ddpm", 35_746_307), ("ddpm256", 113_673_219), ("adm", 295_904_454)])
def test_sizes_of_released_models(name, parameters):
    with torch.device("meta"):
        ours, theirs = UNet2D(CONFIGS[name]), UNet2DModel(**CONFIGS[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters


def test_time_class_and_every_parameter_count():
    torch.manual_seed(0)
    unet = randomised(UNet2D(TINY["adm"]))
    x = torch.randn(2, 3, 16, 16)
    out = unet(x, torch.tensor([5, 5]), None, added={"class_labels": torch.tensor([0, 0])})
    assert out.shape == (2, 6, 16, 16)
    for t, labels in (([5, 6], [0, 0]), ([5, 5], [0, 1])):
        other = unet(x, torch.tensor(t), None, added={"class_labels": torch.tensor(labels)})
        assert torch.allclose(out[0], other[0], atol=1e-5) and not torch.allclose(out[1], other[1], atol=1e-3)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    unet = randomised(UNet2D(CONFIGS["adm-tiny"]))
    x, grads = torch.randn(1, 3, 16, 16), []
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(x, 10, None).square().mean().backward()
        grads.append([p.grad.clone() for p in unet.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_older_attention_names_are_read(tmp_path):
    """google/ddpm-cifar10-32's file names the attention's layers as diffusers did before 0.17."""
    from safetensors.torch import load_file, save_file
    unet = randomised(UNet2D(TINY["ddpm"]))
    unet.save_pretrained(tmp_path)
    file, older = tmp_path / "diffusion_pytorch_model.safetensors", {}
    for key, value in load_file(file).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{old}.")
        older[key] = value
    save_file(older, file)
    again = UNet2D.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("key, value", [
    ("time_embedding_type", "fourier"), ("center_input_sample", True), ("dropout", 0.1), ("class_embed_type", "timestep"), ("act_fn", "relu"),
    ("down_block_types", ("SkipDownBlock2D",) * 3), ("downsample_type", "pool"), ("attention_head_dim", 0), ("block_out_channels", (30, 60, 90)),
    ("attn_norm_num_groups", 7), ("sample_size", 30), ("downsample_padding", 0.0), ("mid_block_scale_factor", 1.4), ("num_class_embeds", -1), ("something_new", 3)])
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        UNet2D(dict(CONFIGS["adm-tiny"], **{key: value}))


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="attention_head_dim"):
        UNet2D(dict(CONFIGS["adm-tiny"], attention_head_dim=48))


def test_classes_are_asked_for():
    with pytest.raises(ValueError, match="class_labels"):
        UNet2D(TINY["adm"])(torch.randn(1, 3, 16, 16), 5, None)


def test_another_class_is_refused(tmp_path):
    UNet2D(CONFIGS["ddpm-tiny"]).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(UserError, match="UNet2DConditionModel, not a UNet2DModel"):
        adm.UNet2D.from_pretrained(tmp_path)
