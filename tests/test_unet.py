"""The U-Net beside diffusers' own: names, numbers, files both ways; and what training needs."""
import json
import time

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import hub
import unet as module
from conftest import refused, same_tensors, shapes
from diffusion import Diffusion
from hub import load_weights, read_json, save_weights
from unet import CONFIGS, UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64, 64), norm_num_groups=8,
             cross_attention_dim=24, attention_head_dim=4)
SHAPES = {  # the structures of released models at reduced widths
    "sd15": dict(CONFIGS["sd15"], block_out_channels=(32, 64, 96, 96), cross_attention_dim=24),
    "tiny": CONFIGS["tiny"],
    "small": SMALL,
    "edit": dict(SMALL, in_channels=8),
    "sd21": dict(SMALL, use_linear_projection=True, attention_head_dim=[2, 4, 8],
                 upcast_attention=True),
    "sin first": dict(SMALL, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-4),
    "one level": dict(SMALL, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
                      up_block_types=("CrossAttnUpBlock2D",)),
    "sdxl": dict(CONFIGS["sdxl"], block_out_channels=(32, 64, 64), norm_num_groups=8,
                 transformer_layers_per_block=(1, 2, 3), attention_head_dim=(2, 4, 8),
                 cross_attention_dim=24, addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=20 + 6 * 8),
}


def theirs(config):
    """diffusers' network, its norms moved off 1 and 0 so that a swapped or missing one shows."""
    torch.manual_seed(1)
    reference = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return reference


def inputs(config, batch=2, size=(16, 16)):
    """x, t, context and added: random, with another timestep for each sample."""
    x = torch.randn(batch, config.get("in_channels", 4), *size)
    t = torch.tensor([999, 1, 500, 37])[:batch]
    context = torch.randn(batch, 7, config["cross_attention_dim"])
    added = None
    if config.get("addition_embed_type"):
        time_ids = torch.randint(0, 1024, (batch, 6))
        added = dict(text_embeds=torch.randn(batch, 20), time_ids=time_ids)
    return x, t, context, added


def close(a, b, bound=1e-5):
    return (a - b).abs().max().item() <= bound * b.abs().max().item()


def raising(error):
    """A function that takes anything and raises the error."""
    def function(*_, **__):
        raise error
    return function


# Names, shapes, numbers

@pytest.mark.parametrize("config, tensors, parameters", [
    (CONFIGS["sd15"], 686, 859_520_964),
    (dict(CONFIGS["sd15"], in_channels=8), 686, 859_532_484),
    (dict(CONFIGS["sd15"], in_channels=9), 686, 859_535_364),
    (CONFIGS["sdxl"], 1680, 2_567_463_684)], ids=["sd15", "edit", "inpainting", "sdxl"])
def test_names_and_shapes_are_those_of_the_checkpoints(config, tensors, parameters):
    with torch.device("meta"):
        ours = shapes(UNet(config))
        assert ours == shapes(UNet2DConditionModel(**config))
    assert len(ours) == tensors
    assert sum(shape.numel() for shape in ours.values()) == parameters


@pytest.mark.parametrize("name", ["small", "sdxl"])
def test_a_seed_draws_the_weights_that_diffusers_draws(name):
    torch.manual_seed(5)
    ours = UNet(SHAPES[name]).state_dict()
    torch.manual_seed(5)
    assert same_tensors(ours, UNet2DConditionModel(**SHAPES[name]).state_dict())


@pytest.mark.parametrize("size", [(16, 16), (11, 13), (8, 24)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_output_equals_diffusers(name, size):
    reference = theirs(SHAPES[name])
    unet = UNet(SHAPES[name]).eval()
    unet.load_state_dict(reference.state_dict())
    x, t, context, added = inputs(SHAPES[name], size=size)
    expected = reference(x, t, context, added_cond_kwargs=added).sample
    assert expected.std() > 0.1
    assert close(unet(x, t, context, added=added), expected)
    between = reference(x, 250.5, context, added_cond_kwargs=added).sample
    assert close(unet(x, 250.5, context, added=added), between)
    assert close(unet(x, torch.tensor(250.5), context, added=added), between)
    unet.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert close(unet(x, t, context, added=added), expected)


@torch.no_grad()
def test_the_timestep_is_embedded_in_fp32():
    unet = UNet(SMALL).to(torch.bfloat16).eval()
    x, _, context, _ = inputs(SMALL)
    x, context = x.bfloat16(), context.bfloat16()
    one = unet.condition(x, 998, context, None, None).temb
    two = unet.condition(x, 999, context, None, None).temb
    assert one.dtype == torch.bfloat16
    assert not torch.equal(one, two)  # bf16 rounds both to 1000
    assert torch.isfinite(unet(x, 999, context)).all()


# What a method relies on

def test_heads_read_the_features_and_train_with_the_network():
    class Heads(torch.nn.Linear):
        def forward(self, features, t):
            self.seen = features, t
            return super().forward(features["mid"].mean(dim=(2, 3)))

    unet = UNet(SMALL)
    x, t, context, _ = inputs(SMALL)
    plain = unet(x, t, context)
    unet.heads = Heads(64, 3)
    out, outputs = unet(x, t, context)
    features, times = unet.heads.seen
    assert sorted(features) == ["mid", "out", "up", "z"]
    assert features["z"] is x and features["out"] is out and torch.equal(out, plain)
    assert features["mid"].shape == (2, 64, 4, 4)
    assert torch.equal(unet.conv_out(F.silu(unet.conv_norm_out(features["up"]))), out)
    assert torch.equal(times, t)
    unet(x, 999, context)
    assert torch.equal(unet.heads.seen[1], torch.tensor([999, 999]))
    outputs.sum().backward()
    assert unet.conv_in.weight.grad.abs().max() > 0


def test_every_replaceable_call_site_gets_cond():
    unet = UNet(SMALL).eval()
    x, t, context, _ = inputs(SMALL)
    unet.task_embedding = torch.nn.Embedding(3, 5)
    task = torch.tensor([2, 0])
    sites = [unet.conv_in]
    for m in unet.modules():
        if isinstance(m, module.ResnetBlock2D):
            sites.append(m)
        if isinstance(m, module.BasicTransformerBlock):
            sites += [m, m.norm1, m.norm2, m.norm3, m.ff]
    seen = []
    for site in sites:
        def spy(x, cond, site=site, forward=site.forward):
            seen.append((site, cond))
            return forward(x, cond)
        site.forward = spy
    unet(x, t, context, task=task)
    assert len(seen) == len(sites)
    assert {id(site) for site, _ in seen} == set(map(id, sites))
    for _, cond in seen:
        assert isinstance(cond, module.Cond)
        assert torch.equal(cond.t, t) and torch.equal(cond.task, task)
        assert torch.equal(cond.task_emb, unet.task_embedding.weight[task])
        assert cond.context is context and cond.temb.shape == (2, 128)
    with pytest.raises(ValueError, match="task"):
        unet(x, t, context)


# Training

def gradients(unet, x, t, context, added=None):
    unet.zero_grad()
    unet(x, t, context, added=added).square().mean().backward()
    return {key: p.grad for key, p in unet.named_parameters()}


@pytest.mark.parametrize("name", ["small", "sd21", "sdxl"])
def test_gradients_reach_every_parameter_and_equal_diffusers(name):
    reference = theirs(SHAPES[name])
    unet = UNet(SHAPES[name])
    unet.load_state_dict(reference.state_dict())
    x, t, context, added = inputs(SHAPES[name])
    ours = gradients(unet, x, t, context, added)
    reference(x, t, context, added_cond_kwargs=added).sample.square().mean().backward()
    for key, p in reference.named_parameters():
        assert ours[key].abs().max() > 0 and close(ours[key], p.grad, 1e-4), key


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    unet = UNet(SMALL)
    batch = inputs(SMALL)
    plain = gradients(unet, *batch)
    calls = []
    original = module.checkpoint

    def spy(layer, *args, **options):
        calls.append(layer)
        return original(layer, *args, **options)

    monkeypatch.setattr(module, "checkpoint", spy)
    unet.gradient_checkpointing = True
    again = gradients(unet, *batch)
    kinds = (module.ResnetBlock2D, module.Transformer2DModel, module.Downsample2D)
    assert len(calls) == sum(isinstance(m, kinds) for m in unet.modules())
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    with torch.no_grad():
        unet(*batch[:3])
    assert len(calls) == len(set(calls))  # nothing to recompute without gradients


def test_bf16_autocast_trains():
    unet = UNet(SMALL)
    x, t, context, _ = inputs(SMALL)
    exact = unet(x, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x, t, context)
        grads = gradients(unet, x, t, context)
    assert out.dtype == torch.bfloat16
    assert close(out.float(), exact, 0.05) and not torch.equal(out.float(), exact)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())


@torch.no_grad()
def test_attention_in_bf16_on_cpu_is_plain_products_of_the_same_value(monkeypatch):
    attention = module.Attention(64, 64, 4).bfloat16()
    x = torch.randn(2, 20, 64).bfloat16()
    exact = module.Attention(64, 64, 4)
    exact.load_state_dict(attention.state_dict())
    expected = exact(x.float())
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    assert close(attention(x).float(), expected, 0.02)


@pytest.mark.parametrize("backend, config", [
    pytest.param("aot_eager", dict(SMALL, block_out_channels=(32, 64),
                                   down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                   up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
                 marks=pytest.mark.slow),
    ("eager", dict(SHAPES["sdxl"], transformer_layers_per_block=1, layers_per_block=1)),
], ids=["aot_eager-sd", "eager-sdxl"])
def test_compiles_into_one_graph(backend, config):
    unet = UNet(config)
    x, t, context, added = inputs(config)
    expected = gradients(unet, x, t, context, added)
    compiled = torch.compile(unet, backend=backend, fullgraph=True)
    assert close(compiled(x, t, context, added=added), unet(x, t, context, added=added))
    unet.zero_grad()
    compiled(x, t, context, added=added).square().mean().backward()
    assert all(close(p.grad, expected[key], 1e-4) for key, p in unet.named_parameters())


# Files

@torch.no_grad()
def test_diffusers_opens_what_is_saved(tmp_path):
    unet = UNet(SHAPES["sd21"]).eval()
    x, t, context, _ = inputs(SHAPES["sd21"])
    unet.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "unet")
    reference, info = UNet2DConditionModel.from_pretrained(
        tmp_path, subfolder="unet", output_loading_info=True)
    assert not any(info.values()), info
    assert close(unet(x, t, context), reference.eval()(x, t, context).sample)
    assert reference.config.upcast_attention  # without effect here, but they read it
    assert sorted(f.name for f in (tmp_path / "unet").iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("options", [
    dict(), dict(max_shard_size="300KB"), dict(variant="bf16"),
    dict(variant="fp16"), dict(variant="fp16", max_shard_size="200KB")], ids=str)
def test_opens_what_diffusers_saved(tmp_path, options):
    reference = theirs(SMALL).to(torch.float16 if "variant" in options else torch.float32)
    reference.save_pretrained(tmp_path / "unet", **options)
    files = list((tmp_path / "unet").glob("*.safetensors"))
    assert len(files) > 1 or "max_shard_size" not in options
    unet = UNet.from_pretrained(tmp_path)
    for key, value in reference.state_dict().items():
        p = unet.state_dict()[key]
        assert torch.equal(p, value.float()) and p.dtype == torch.float32
    assert all(p.requires_grad and not p.is_meta for p in unet.parameters())
    assert all(g.abs().max() > 0 for g in gradients(unet, *inputs(SMALL)).values())


def test_saving_and_loading_changes_nothing(tmp_path):
    unet = UNet(SMALL)
    for dtype, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        unet.save_pretrained(tmp_path, dtype=dtype)
        assert {v.dtype for v in load_file(tmp_path / WEIGHTS).values()} == {expected}
        again = UNet.from_pretrained(tmp_path, subfolder="")
        for key, value in unet.state_dict().items():
            assert torch.equal(value.to(expected).float(), again.state_dict()[key])
        assert json.dumps(again.config) == json.dumps(unet.config)
    before = {key: value.clone() for key, value in again.state_dict().items()}
    unet.save_pretrained(tmp_path)  # what was loaded does not follow the file
    assert same_tensors(again.state_dict(), before)
    with torch.no_grad():
        again.conv_out.weight.add_(1)  # nor does the file follow what was loaded
    assert torch.equal(UNet.from_pretrained(tmp_path, "").conv_out.weight, unet.conv_out.weight)


def test_a_method_names_its_own_class(tmp_path):
    unet = UNet(SMALL)
    unet.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["_class_name"] == "UNet2DConditionModel"
    unet.config.update(_class_name="Other", other={"n": 1})
    unet.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["_class_name"] == "Other"
    with refused("Other"):  # a plain U-Net would draw wrong pictures
        UNet.from_pretrained(tmp_path, "")


def test_a_crash_while_saving_leaves_the_last_good_file(tmp_path, monkeypatch):
    unet = UNet(SMALL)
    unet.save_pretrained(tmp_path)
    good = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    torch.nn.init.zeros_(unet.conv_in.weight)
    monkeypatch.setattr(hub.os, "fsync", raising(OSError("power cut")))
    with refused(f"{WEIGHTS} cannot be written .power cut"):
        unet.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == good


# Mistakes: one line that names the thing

@pytest.mark.parametrize("key, value", [
    ("nonsense", 3), ("act_fn", "gelu"), ("class_embed_type", "timestep"),
    ("mid_block_type", None), ("dual_cross_attention", True), ("time_cond_proj_dim", 256),
    ("only_cross_attention", [False, True, False]), ("resnet_time_scale_shift", "scale_shift"),
    ("addition_embed_type", "image"), ("attention_head_dim", 7), ("attention_head_dim", [4, 4]),
    ("layers_per_block", [1, 2, 2]), ("layers_per_block", "2"), ("in_channels", "4"),
    ("cross_attention_dim", [8, 8, 16]), ("sample_size", [64, 96]), ("norm_eps", "small"),
    ("use_linear_projection", "no"), ("down_block_types", ("DownBlock2D",)),
    ("up_block_types", ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))])
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with refused(key):
        UNet({**SMALL, key: value})


def test_a_json_object_is_shown_in_words():
    with refused("^U-Net config: in_channels = an object is not implemented$"):
        UNet(dict(SMALL, in_channels={"a": 1}))
    with refused("^scheduler config: prediction_type = an object is not implemented; use"):
        Diffusion.from_config(dict(prediction_type={"a": 1}))


@pytest.mark.parametrize("change", [
    dict(attention_head_dim=None), dict(attention_head_dim=0), dict(block_out_channels=32),
    dict(block_out_channels=(32, 60, 64)), dict(layers_per_block=[]), dict(norm_num_groups=None),
    dict(transformer_layers_per_block=[[1], [1], [1]]), dict(addition_embed_type="text_time"),
    dict(addition_embed_type="text_time", projection_class_embeddings_input_dim=20,
         addition_time_embed_dim=8),
    # These would build a network, and fail only when it draws.
    dict(attention_head_dim=4.0), dict(attention_head_dim=[4.0] * 3), dict(norm_eps=None),
    dict(norm_eps=float("nan")), dict(freq_shift=None), dict(freq_shift=-1),
    # These would build without end, or ask for more memory than there is.
    dict(layers_per_block=10 ** 5), dict(transformer_layers_per_block=[10 ** 5] * 3),
    dict(block_out_channels=[32] * 10 ** 4, down_block_types="DownBlock2D",
         up_block_types="UpBlock2D"),
    dict(in_channels=10 ** 9),
    dict(cross_attention_dim=10 ** 12),
], ids=lambda change: str(change)[:60])
def test_impossible_numbers_are_the_fault_of_the_file(change, tmp_path):
    hub.write_json(tmp_path / "config.json", {**SMALL, **change})
    start = time.perf_counter()
    with refused(f"config.json(: .*({'|'.join(change)})| does not hold)"):
        UNet.from_pretrained(tmp_path, "")
    assert time.perf_counter() - start < 2


def test_a_list_of_equal_items_is_one_value():
    lists = dict(sample_size=[16, 16], layers_per_block=[1] * 3, only_cross_attention=[False] * 3,
                 cross_attention_dim=[24] * 3, attention_head_dim=[4] * 3)
    unet = UNet({**SMALL, **lists})
    assert shapes(unet) == shapes(UNet(SMALL))
    assert unet.config["sample_size"] == 16 and unet.config["layers_per_block"] == 1


def test_folders_that_cannot_be_read_are_refused_by_name(tmp_path):
    """A damaged index or config; damaged weights and JSON are test_hub.py's."""
    def fails(match):
        with refused(match):
            UNet.from_pretrained(tmp_path, "")

    UNet(SMALL).save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    fails("safetensors cannot be read")
    file.unlink()
    fails("no weights")
    index = file.with_name(f"{WEIGHTS}.index.json")
    for content in ("{}", '{"weight_map": [1]}', "{"):
        index.write_text(content)
        fails("index.json")
    index.write_text('{"weight_map": {"conv_in.weight": "a.safetensors"}}')
    fails("a.safetensors")
    file.write_bytes(whole)
    hub.write_json(tmp_path / "config.json", SMALL | dict(in_channels=8))
    fails("shape of conv_in.weight")
    (tmp_path / "config.json").unlink()
    fails("config.json")


@pytest.mark.parametrize("key, value, match", [
    ("conv_in.bias", None, "lacks conv_in.bias"),
    ("stranger", torch.zeros(1), "unknown stranger"),
    ("conv_in.bias", torch.zeros(3), "shape of conv_in.bias"),
    ("conv_in.bias", torch.zeros(32).long(), "another type of conv_in.bias")])
def test_loading_is_strict(tmp_path, key, value, match):
    UNet(SMALL).save_pretrained(tmp_path)
    state = {**load_file(tmp_path / WEIGHTS), key: value}
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / WEIGHTS)
    with refused(match):
        UNet.from_pretrained(tmp_path, "")


# hub.py

def test_save_and_load_serve_other_modules(tmp_path):
    def network():
        # A batch norm counts its batches in an integer.
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    source = network()
    save_weights(source, tmp_path, {"a": 1}, name="model.safetensors", dtype=torch.float16)
    with torch.device("meta"):
        target = network()
    load_weights(target, tmp_path)
    assert read_json(tmp_path / "config.json") == {"a": 1}
    assert target[1].num_batches_tracked.dtype == torch.long
    assert torch.equal(target[0].weight, source[0].weight.half().float())
