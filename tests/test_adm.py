"""DDPM's and ADM's U-Nets beside diffusers' UNet2DModel, and what stands around them."""
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import adm
import aggregation
import emoji
import hub
from adm import CONFIGS, Pixels, SCHEDULER, UNet2D, network_boxes, scheduler_for, zero_outputs
from conftest import call, randomised, same_tensors, shapes
from data import to_pil
from hub import UserError
from sample import Model, generate, load_model, pipeline_index
from unet import Cond

PLAIN = dict(down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3)
TINY = {  # the structures of released models at reduced widths
    "ddpm": dict(CONFIGS["ddpm"], block_out_channels=(32, 64, 64, 64)),
    "ddpm256": dict(CONFIGS["ddpm256"], block_out_channels=(32, 32, 64, 64, 96, 96),
                    layers_per_block=1, sample_size=64),
    "adm": dict(CONFIGS["adm"], block_out_channels=(32, 64, 96, 128), attention_head_dim=16,
                layers_per_block=2, num_class_embeds=10),
    "ddpm-tiny": CONFIGS["ddpm-tiny"],
    "adm-tiny": CONFIGS["adm-tiny"],
    "mixed": dict(CONFIGS["adm-tiny"], downsample_type="conv", upsample_type="conv",
                  attn_norm_num_groups=8, norm_num_groups=16),
    "no norm in the middle": dict(CONFIGS["adm-tiny"], attn_norm_num_groups=None),
    "no attention": dict(CONFIGS["ddpm-tiny"], add_attention=False, **PLAIN),
}


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_output_and_names_equal_diffusers(name, tmp_path):
    config = TINY[name]
    theirs = randomised(UNet2DModel(**config))
    theirs.save_pretrained(tmp_path)
    ours = UNet2D.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, config["sample_size"], config["sample_size"])
    t = torch.tensor([3, 977])
    labels = torch.tensor([1, 7]) if config.get("num_class_embeds") else None
    expected = theirs(x, t, class_labels=labels).sample
    out = ours(x, t, None, added={"class_labels": labels})
    assert (expected - out).abs().max() <= 1e-5 * expected.abs().max()
    ours.save_pretrained(tmp_path / "back")
    back = UNet2DModel.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(back(x, t, class_labels=labels).sample, expected)


@pytest.mark.parametrize("name, parameters", [
    ("ddpm", 35_746_307), ("ddpm256", 113_673_219), ("adm", 295_904_454)])
def test_sizes_of_released_models(name, parameters):
    with torch.device("meta"):
        ours = UNet2D(CONFIGS[name])
        assert shapes(ours) == shapes(UNet2DModel(**CONFIGS[name]))
    assert sum(p.numel() for p in ours.parameters()) == parameters


def test_time_class_and_every_parameter_count():
    unet = randomised(UNet2D(TINY["adm"]))
    x = torch.randn(2, 3, 16, 16)

    def run(t, labels):
        return unet(x, torch.tensor(t), None, added={"class_labels": torch.tensor(labels)})

    out = run([5, 5], [0, 0])
    assert out.shape == (2, 6, 16, 16)
    for other in (run([5, 6], [0, 0]), run([5, 5], [0, 1])):
        assert torch.allclose(out[0], other[0], atol=1e-5)
        assert not torch.allclose(out[1], other[1], atol=1e-3)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    with pytest.raises(ValueError, match="class_labels"):
        unet(x, 5, None)


def test_attention_is_routable_as_residual_blocks_are():
    for m in UNet2D(CONFIGS["adm-tiny"]).modules():
        if hasattr(m, "group_norm"):
            assert m.routable_channels == m.to_q.in_features
        elif hasattr(m, "conv1"):
            assert m.routable_channels == m.conv1.in_channels


def test_older_attention_names_are_read(tmp_path):
    """google/ddpm-cifar10-32's file names the attention's layers as diffusers did before 0.17."""
    unet = randomised(UNet2D(TINY["ddpm"]))
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {}
    for key, value in load_file(file).items():
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                         ("to_out.0", "proj_attn")]:
            key = key.replace(f".{new}.", f".{old}.")
        older[key] = value
    save_file(older, file)
    assert same_tensors(UNet2D.from_pretrained(tmp_path).state_dict(), unet.state_dict())


@pytest.mark.parametrize("key, value", [
    ("time_embedding_type", "fourier"), ("center_input_sample", True), ("dropout", 0.1),
    ("class_embed_type", "timestep"), ("act_fn", "relu"), ("downsample_type", "pool"),
    ("down_block_types", ("SkipDownBlock2D",) * 3), ("attention_head_dim", 48),
    ("sample_size", 30), ("downsample_padding", [0, 1, 0]), ("mid_block_scale_factor", 1.4),
    ("something_new", 3)])
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        UNet2D(dict(CONFIGS["adm-tiny"], **{key: value}))


@pytest.mark.parametrize("key, value", [
    ("attention_head_dim", 0), ("block_out_channels", (30, 60, 90)), ("attn_norm_num_groups", 7),
    ("num_class_embeds", -1), ("norm_num_groups", None), ("layers_per_block", 10 ** 5),
    ("freq_shift", None), ("norm_eps", None), ("attention_head_dim", 16.0)])
def test_impossible_numbers_are_the_fault_of_the_file(key, value, tmp_path):
    hub.write_json(tmp_path / "config.json", dict(CONFIGS["adm-tiny"], **{key: value}))
    with pytest.raises(UserError, match=f"config.json(: .*{key}| does not hold)"):
        UNet2D.from_pretrained(tmp_path)


def test_another_class_is_refused(tmp_path):
    UNet2D(CONFIGS["ddpm-tiny"]).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(UserError, match="UNet2DConditionModel, not a UNet2DModel"):
        UNet2D.from_pretrained(tmp_path)


def test_a_picture_is_its_own_latent():
    pixels = Pixels(32)
    images = torch.rand(2, 3, 32, 32)
    mean, logvar = pixels.encode(images, tile=None)
    assert torch.equal(mean, images) and torch.equal(pixels.decode(mean, tile=None), images)
    assert torch.equal(mean + (logvar / 2).exp() * torch.randn_like(mean), images)
    assert pixels.factor == 1 and not pixels.state_dict()
    assert pixels.config == dict(latent_channels=3, scaling_factor=1.0, sample_size=32)


def test_the_variance_is_learned_where_the_network_has_outputs_for_it():
    for name, expected in [("adm", "learned_range"), ("adm-tiny", "learned_range"),
                           ("ddpm", "fixed_large"), ("ddpm-tiny", "fixed_large")]:
        scheduler = scheduler_for(CONFIGS[name])
        assert scheduler == {**SCHEDULER, "variance_type": expected}
        cosine = scheduler_for(CONFIGS[name], "squaredcos_cap_v2")
        assert cosine == scheduler | dict(beta_schedule="squaredcos_cap_v2")
        assert scheduler == scheduler_for(UNet2D(TINY[name]).config)


@pytest.mark.parametrize("owner", ["here", "hub"])
def test_parts_are_found_in_both_layouts(owner, tmp_path, monkeypatch):
    """In folders of their own, or at the top as in google/ddpm-cifar10-32."""
    def download(hub_id, subfolder):
        """Give the files at the top, or those of one folder, as the hub does."""
        source = Path(hub_id.replace("hub", "here"))
        cache = Path("cache") / source.name
        for file in (source / subfolder).glob("*.*"):
            (cache / subfolder).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, cache / subfolder)
        return cache, {path.name for path in source.iterdir()}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", download)
    model = Model(UNet2D(CONFIGS["ddpm-tiny"]), Pixels(32), None, None, SCHEDULER, {})
    model.index = pipeline_index(model)
    model.save("here/folders")
    shutil.copytree("here/folders/unet", "here/top")
    shutil.copy("here/folders/scheduler/scheduler_config.json", "here/top")
    shutil.copy("here/folders/model_index.json", "here/top")
    # What lies beside the folders is not read.
    hub.write_json("here/folders/config.json", {})
    shutil.copytree("here/folders", "here/incomplete")
    shutil.rmtree("here/incomplete/scheduler")
    if owner == "here":
        hub.write_json("here/folders/scheduler_config.json", {})

    for name in ("folders", "top"):
        again = load_model(f"{owner}/{name}")
        assert again.scheduler == model.scheduler
        assert all(torch.equal(value, again.unet.state_dict()[key])
                   for key, value in model.unet.state_dict().items())
    with pytest.raises(UserError, match=f"^{owner}/incomplete has no folder scheduler/"):
        load_model(f"{owner}/incomplete")
    with pytest.raises(UserError, match="missing"):
        load_model(f"{owner}/missing")


@torch.no_grad()
def test_a_class_is_drawn_with_guidance_and_an_unguided_variance(tmp_path):
    """Beside DDPM's loop by diffusers, on the noise and the variance that DiT's authors combine."""
    torch.manual_seed(0)
    classes = emoji.classes()
    config = CONFIGS["adm-tiny"] | dict(sample_size=16, num_class_embeds=len(classes) + 1)
    model = Model(randomised(UNet2D(config)), Pixels(16), None, None, scheduler_for(config),
                  {"id2label": {str(i): name for i, name in enumerate(classes)}})
    model.index = pipeline_index(model)
    model.save(tmp_path)
    model = load_model(tmp_path)
    assert model.tasks == ["class"] and list(model.classes)[:len(classes)] == classes
    (drawn,) = generate(model, "class", [classes[2]], guidance=3.0, steps=3, sampler="ddpm", seed=5)

    scheduler = DDPMScheduler.from_config(model.scheduler)
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 3, 16, 16, generator=generator)
    for t in scheduler.timesteps:
        with_class, without = (
            model.unet(x, t, None, added={"class_labels": torch.tensor([number])})
            for number in (2, len(classes)))
        noise = without + 3.0 * (with_class - without)
        out = torch.cat([noise[:, :3], with_class[:, 3:]], dim=1)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    expected = to_pil(x[0])
    pixels = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int()
              for p in (drawn, expected)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1 and pixels[0].float().std() > 10

    # Its names of classes mean nothing once it has heads, and do not matter then.
    aggregation.prepare(model, "translate", "source")
    model.save(tmp_path / "joint")
    assert load_model(tmp_path / "joint").tasks == ["translate"]

    # What --task class prints of a model at its own size, which is not 64 x 64.
    done = call("evaluate.py", "--task", "class", "--model", tmp_path, "--count", 3, "--steps", 1,
                "--pictures", tmp_path / "drawn")
    assert done.returncode == 0 and "same class" in done.stdout, done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_zeroed_outputs_make_every_block_its_skip_path_and_the_network_zero(name):
    network = UNet2D(TINY[name])
    zero_outputs(network)
    cond = Cond(torch.randn(2, network.time_embedding.linear_2.out_features), None,
                torch.zeros(2), None, None, None)
    for module in network.modules():
        if isinstance(module, adm.Attention):
            x = torch.randn(2, module.routable_channels, 8, 8)
            assert torch.equal(module(x, cond), x)
        elif isinstance(module, adm.ResnetBlock2D):
            x = torch.randn(2, module.conv1.in_channels, 8, 8)
            assert torch.equal(module(x, cond), module.skip(x))
    size = network.config["sample_size"]
    labels = dict(class_labels=torch.zeros(2, dtype=torch.long))
    out = network(torch.randn(2, 3, size, size), torch.tensor([3, 900]), None, added=labels)
    assert not out.any()


def test_the_diagram_shows_every_mask_and_what_is_concatenated(tmp_path):
    boxes, arrows = network_boxes(CONFIGS["adm"])
    masks = [[int(number) for number in box.mask.split()] for box in boxes]
    # What a residual block or attention reads is as wide as its first norm, in diffusers too.
    with torch.device("meta"):
        theirs = UNet2DModel(**CONFIGS["adm"])
    norms = [len(p) for name, p in theirs.named_parameters()
             if name.endswith((".norm1.weight", ".group_norm.weight"))]
    assert sorted(sum(masks, [])) == sorted(norms) and len(norms) > 50
    # A box reads what the box before it puts out, on the way up beside the skip connection.
    assert boxes[0].shape == (3, 64, 64) and boxes[-1].shape == (6, 64, 64)
    skips = set(arrows) - {(i, i + 1) for i in range(len(boxes) - 1)}
    assert len(skips) == 16
    for end, box in enumerate(boxes[1:], 1):
        below, *beside = [boxes[i] for i, j in sorted(arrows, reverse=True) if j == end]
        for skip in beside:
            assert skip.row == box.row and skip.column < box.column
            assert skip.shape[1:] == below.shape[1:]
        if masks[end]:
            assert masks[end][0] == below.shape[0] + sum(skip.shape[0] for skip in beside)
            assert len(masks[end]) == box.text.count(",") + 1
    assert call("adm.py", "--out", tmp_path / "adm.png").returncode == 0
    assert Image.open(tmp_path / "adm.png").height > 700
