"""The U-Net against diffusers' own: names, numbers, files both ways; and what training asks of it."""
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import folders
import unet as module
from conftest import ROOT, full_disk
from folders import UserError, command, fetch, load_weights, read_json, save_weights
from unet import CONFIGS, UNet

SMALL = dict(sample_size=16, block_out_channels=(32, 64, 64), norm_num_groups=8, layers_per_block=1, cross_attention_dim=24,
             attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
SHAPES = {  # the structures of released models at reduced widths
    "sd15": dict(CONFIGS["sd15"], block_out_channels=(32, 64, 96, 96), cross_attention_dim=24),
    "tiny": CONFIGS["tiny"],
    "small": SMALL,
    "edit": dict(SMALL, in_channels=8),
    "sd21": dict(SMALL, use_linear_projection=True, attention_head_dim=[2, 4, 8], upcast_attention=True),
    "sin first": dict(SMALL, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-4),
    "scale shift": dict(SMALL, resnet_time_scale_shift="scale_shift"),
    "one level": dict(SMALL, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)),
    "sdxl": dict(CONFIGS["sdxl"], block_out_channels=(32, 64, 64), transformer_layers_per_block=(1, 2, 3), attention_head_dim=(2, 4, 8),
                 cross_attention_dim=24, addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8),
}


def theirs(config):
    """Diffusers' network with `config`, its norms moved off 1 and 0 so that a swapped or missing one shows."""
    torch.manual_seed(1)
    reference = pytest.importorskip("diffusers").UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return reference


def inputs(config, batch=2, size=(16, 16)):
    """-> x, t, context, added: random, with another timestep for each sample."""
    x = torch.randn(batch, config.get("in_channels", 4), *size)
    added = None
    if config.get("addition_embed_type"):
        added = dict(text_embeds=torch.randn(batch, 20), time_ids=torch.randint(0, 1024, (batch, 6)))
    return x, torch.tensor([999, 1, 500, 37])[:batch], torch.randn(batch, 7, config["cross_attention_dim"]), added


def close(a, b, bound=1e-5):
    return (a - b).abs().max().item() <= bound * b.abs().max().item()


# Names, shapes, numbers

@pytest.mark.parametrize("config, tensors, parameters", [
    (CONFIGS["sd15"], 686, 859_520_964), (dict(CONFIGS["sd15"], in_channels=8), 686, 859_532_484),
    (dict(CONFIGS["sd15"], in_channels=9), 686, 859_535_364), (CONFIGS["sdxl"], 1680, 2_567_463_684)],
                         ids=["sd15", "instruct-pix2pix", "inpainting", "sdxl"])
def test_names_and_shapes_are_those_of_the_checkpoints(config, tensors, parameters):
    with torch.device("meta"):
        ours = {k: v.shape for k, v in UNet(config).state_dict().items()}
    assert len(ours) == tensors and sum(shape.numel() for shape in ours.values()) == parameters
    with torch.device("meta"):
        reference = pytest.importorskip("diffusers").UNet2DConditionModel(**config)
    assert ours == {k: v.shape for k, v in reference.state_dict().items()}


def test_a_new_network_starts_as_diffusers_does():
    torch.manual_seed(5)
    a = UNet(SMALL).state_dict()
    b = pytest.importorskip("diffusers").UNet2DConditionModel(**SMALL).state_dict()
    for key in a:
        assert a[key].std() == pytest.approx(b[key].std(), rel=0.25) if a[key].numel() > 500 else a[key].abs().max() <= 1, key


@pytest.mark.parametrize("size", [(16, 16), (11, 13), (8, 24)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_output_equals_diffusers(name, size):
    config, reference = SHAPES[name], theirs(SHAPES[name])
    unet = UNet(config).eval()
    unet.load_state_dict(reference.state_dict())
    x, t, context, added = inputs(config, size=size)
    expected = reference(x, t, context, added_cond_kwargs=added).sample
    assert expected.std() > 0.1
    assert close(unet(x, t, context, added=added), expected)
    assert close(unet.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, context, added=added), expected)
    expected = reference(x, 250.5, context, added_cond_kwargs=added).sample
    assert close(unet(x, 250.5, context, added=added), expected) and close(unet(x, torch.tensor(250.5), context, added=added), expected)


@torch.no_grad()
def test_timesteps_and_texts_are_per_sample():
    unet, (x, t, context, _) = UNet(SMALL).eval(), inputs(SMALL, batch=4)
    together = unet(x, t, context)
    for i in range(4):
        assert close(unet(x[i:i + 1], t[i:i + 1], context[i:i + 1]), together[i:i + 1])
    assert not close(unet(x, t.flip(0), context), together, 1e-3) and not close(unet(x, t, context.flip(0)), together, 1e-3)


@torch.no_grad()
def test_the_timestep_is_embedded_in_fp32():
    unet = UNet(SMALL).to(torch.bfloat16).eval()
    x, _, context, _ = inputs(SMALL)
    x, context = x.bfloat16(), context.bfloat16()
    one, two = unet.condition(x, 997, context, None, None).temb, unet.condition(x, 999, context, None, None).temb
    assert one.dtype == torch.bfloat16 and not torch.equal(one, two)  # bf16 rounds both to 1000
    assert torch.isfinite(unet(x, 999, context)).all()


@torch.no_grad()
def test_features_on_request():
    unet, (x, t, context, _) = UNet(SMALL).eval(), inputs(SMALL)
    out, features = unet(x, t, context, return_features=True)
    assert torch.equal(out, unet(x, t, context))
    assert features["mid"].shape == (2, 64, 4, 4) and features["up"].shape == (2, 32, 16, 16)
    assert torch.equal(unet.conv_out(torch.nn.functional.silu(unet.conv_norm_out(features["up"]))), out)


# What a method relies on

def test_every_replaceable_call_site_gets_cond():
    unet, (x, t, context, _) = UNet(SMALL).eval(), inputs(SMALL)
    unet.task_embedding = torch.nn.Embedding(3, 5)
    task, seen = torch.tensor([2, 0]), []
    resnets = [r for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) for r in block.resnets]
    blocks = [m for m in unet.modules() if isinstance(m, module.BasicTransformerBlock)]
    sites = [unet.conv_in, *resnets, *blocks, *(getattr(b, name) for b in blocks for name in ("norm1", "norm2", "norm3", "ff"))]
    for site in sites:
        forward = site.forward
        site.forward = lambda x, cond, forward=forward, site=site: (seen.append((site, cond)), forward(x, cond))[1]
    unet(x, t, context, task=task)
    assert len(seen) == len(sites) and {id(site) for site, _ in seen} == set(map(id, sites))
    for _, cond in seen:
        assert isinstance(cond, module.Cond) and torch.equal(cond.t, t) and torch.equal(cond.task, task)
        assert torch.equal(cond.task_emb, unet.task_embedding.weight[task]) and cond.context is context and cond.temb.shape == (2, 128)
    with pytest.raises(ValueError, match="task"):
        unet(x, t, context)


# Training

def gradients(unet, x, t, context, added=None):
    unet.zero_grad()
    unet(x, t, context, added=added).square().mean().backward()
    return {k: p.grad for k, p in unet.named_parameters()}


@pytest.mark.parametrize("name", ["small", "sd21", "sdxl"])
def test_gradients_reach_every_parameter(name):
    unet = UNet(SHAPES[name])
    for key, grad in gradients(unet, *inputs(SHAPES[name])).items():
        assert grad is not None and torch.isfinite(grad).all() and grad.abs().max() > 0, key


def test_gradients_equal_diffusers():
    reference, unet, (x, t, context, _) = theirs(SMALL), UNet(SMALL), inputs(SMALL)
    unet.load_state_dict(reference.state_dict())
    ours = gradients(unet, x, t, context)
    reference(x, t, context).sample.square().mean().backward()
    assert all(close(ours[k], p.grad, 1e-4) for k, p in reference.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    unet, batch, calls = UNet(SMALL), inputs(SMALL), []
    plain = gradients(unet, *batch)
    original = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda m, *a, **k: (calls.append(m), original(m, *a, **k))[1])
    unet.gradient_checkpointing = True
    again = gradients(unet, *batch)
    assert len(calls) == sum(isinstance(m, (module.ResnetBlock2D, module.Transformer2DModel, module.Downsample2D)) for m in unet.modules())
    assert all(torch.equal(plain[k], again[k]) for k in plain)
    with torch.no_grad():
        unet(*batch[:3])
    assert len(calls) == len(set(calls))  # nothing to recompute without gradients


def test_bf16_autocast_trains():
    unet, (x, t, context, _) = UNet(SMALL), inputs(SMALL)
    exact = unet(x, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x, t, context)
        grads = gradients(unet, x, t, context)
    assert out.dtype == torch.bfloat16 and close(out.float(), exact, 0.05) and not torch.equal(out.float(), exact)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("backend, config", [
    ("aot_eager", dict(SMALL, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))),
    ("eager", dict(SHAPES["sdxl"], transformer_layers_per_block=1, layers_per_block=1))], ids=["aot_eager-sd", "eager-sdxl"])
def test_compiles_into_one_graph(backend, config):
    unet, (x, t, context, added) = UNet(config), inputs(config)
    expected = gradients(unet, x, t, context, added)
    compiled = torch.compile(unet, backend=backend, fullgraph=True)
    assert close(compiled(x, t, context, added=added), unet(x, t, context, added=added))
    unet.zero_grad()
    compiled(x, t, context, added=added).square().mean().backward()
    assert all(close(p.grad, expected[k], 1e-4) for k, p in unet.named_parameters())


# Files

@torch.no_grad()
def test_diffusers_opens_what_is_saved(tmp_path):
    unet, (x, t, context, _) = UNet(SHAPES["sd21"]).eval(), inputs(SHAPES["sd21"])
    unet.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "unet")
    cls = pytest.importorskip("diffusers").UNet2DConditionModel
    reference, info = cls.from_pretrained(tmp_path, subfolder="unet", output_loading_info=True)
    assert not any(info.values()), info
    assert close(unet(x, t, context), reference.eval()(x, t, context).sample)
    assert reference.config.upcast_attention  # without effect here, kept for them
    assert sorted(f.name for f in (tmp_path / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("how", [dict(), dict(max_shard_size="300KB"), dict(variant="fp16"), dict(variant="fp16", max_shard_size="200KB")],
                         ids=str)
def test_opens_what_diffusers_saved(tmp_path, how):
    reference = theirs(SMALL).to(torch.float16 if "variant" in how else torch.float32)
    reference.save_pretrained(tmp_path / "unet", **how)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1 or "max_shard_size" not in how
    unet = UNet.from_pretrained(tmp_path)
    expected = reference.state_dict()
    assert all(torch.equal(p, expected[k].float()) and p.dtype == torch.float32 for k, p in unet.state_dict().items())
    assert list(unet.state_dict()) and not any(p.is_meta for p in unet.parameters()) and all(p.requires_grad for p in unet.parameters())
    assert all(g.abs().max() > 0 for g in gradients(unet, *inputs(SMALL)).values())


def test_full_precision_is_preferred(tmp_path):
    reference = theirs(SMALL)
    reference.save_pretrained(tmp_path, max_shard_size="300KB")
    reference.half().save_pretrained(tmp_path, variant="fp16")
    assert any(p.half().float().ne(p).any() for p in UNet.from_pretrained(tmp_path, "").parameters())


def test_saving_and_loading_changes_nothing(tmp_path):
    unet = UNet(SMALL)
    for dtype, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        unet.save_pretrained(tmp_path, dtype=dtype)
        assert {v.dtype for v in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {expected}
        again = UNet.from_pretrained(tmp_path, subfolder="")
        assert all(torch.equal(v if dtype is None else v.to(dtype).float(), again.state_dict()[k]) for k, v in unet.state_dict().items())
        assert json.dumps(again.config) == json.dumps(unet.config)
    before = {k: v.clone() for k, v in again.state_dict().items()}
    unet.save_pretrained(tmp_path)  # what was loaded does not follow the file
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
    with torch.no_grad():
        again.conv_out.weight.add_(1)  # nor the file what was loaded
    assert torch.equal(UNet.from_pretrained(tmp_path, "").conv_out.weight, unet.conv_out.weight)


def test_a_method_names_its_own_class(tmp_path):
    unet = UNet(SMALL)
    unet.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["_class_name"] == "UNet2DConditionModel"
    unet.config.update(_class_name="Other", other={"n": 1})
    unet.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["_class_name"] == "Other"
    with pytest.raises(UserError, match="Other"):  # a plain U-Net would draw wrong pictures
        UNet.from_pretrained(tmp_path, "")


def test_a_crash_while_saving_leaves_the_last_good_file(tmp_path, monkeypatch):
    unet = UNet(SMALL)
    unet.save_pretrained(tmp_path)
    good = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    monkeypatch.setattr(folders.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors cannot be written .power cut"):
        unet.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == good
    assert torch.count_nonzero(UNet.from_pretrained(tmp_path, "").conv_in.weight)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    with full_disk(50_000), pytest.raises(UserError, match="diffusion_pytorch_model.safetensors cannot be written"):
        UNet(SMALL).save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        UNet(SMALL).save_pretrained(tmp_path / "file" / "folder")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


# Mistakes: one line that names the thing

@pytest.mark.parametrize("change", [
    dict(nonsense=3), dict(act_fn="gelu"), dict(class_embed_type="timestep"), dict(mid_block_type=None), dict(dual_cross_attention=True),
    dict(resnet_time_scale_shift="ada_group"), dict(time_cond_proj_dim=256), dict(addition_embed_type="image"),
    dict(addition_embed_type="text_time"), dict(attention_head_dim=7), dict(attention_head_dim=[4, 4]), dict(attention_head_dim=None),
    dict(layers_per_block=[1, 2, 2]), dict(cross_attention_dim=[8, 8, 8]), dict(transformer_layers_per_block=[[1], [1], [1]]),
    dict(block_out_channels=32), dict(block_out_channels=(32, 60, 64)), dict(norm_num_groups=None), dict(in_channels="4"),
    dict(use_linear_projection="no"), dict(down_block_types=("DownBlock2D",)),
    dict(up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))], ids=lambda change: next(iter(change)))
def test_configs_that_are_not_implemented_are_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))) as error:
        UNet({**SMALL, **change})
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_read_are_refused_by_name(tmp_path):
    def refused(match, path=tmp_path, subfolder="unet"):
        with pytest.raises(UserError, match=match) as error:
            UNet.from_pretrained(path, subfolder)
        assert "\n" not in str(error.value)

    folder = tmp_path / "unet"
    file, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    refused("no model folder", path=tmp_path / "missing")
    refused("unet/")
    UNet(SMALL).save_pretrained(folder)
    whole, text = file.read_bytes(), config.read_text()
    for content in (whole[:-1000], whole[:20], b"", b"not safetensors at all"):
        file.write_bytes(content)
        refused("safetensors cannot be read")
    file.unlink()
    refused("no weights")
    for content, match in (("{}", "index.json"), ('{"weight_map": [1]}', "index.json"), ('{"weight_map": {"conv_in.weight": "a.safetensors"}}', "a.safetensors"),
                           ("{", "index.json")):
        (folder / f"{file.name}.index.json").write_text(content)
        refused(match)
    file.write_bytes(whole)
    for content, match in ((text[:30], "config.json"), ("[]", "config.json"),
                           (text.replace('"in_channels": 4', '"in_channels": 8'), "shape or type of conv_in.weight")):
        config.write_text(content)
        refused(match)
    config.unlink()
    refused("config.json")


@pytest.mark.parametrize("change, match", [
    (lambda state: state.pop("conv_in.bias"), "lacks conv_in.bias"),
    (lambda state: state.update(stranger=torch.zeros(1)), "unknown stranger"),
    (lambda state: state.update({"conv_in.bias": torch.zeros(3)}), "shape or type of conv_in.bias")], ids=["missing", "unknown", "shape"])
def test_loading_is_strict(tmp_path, change, match):
    from safetensors.torch import save_file
    UNet(SMALL).save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    change(state)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=match):
        UNet.from_pretrained(tmp_path, "")


def test_the_hub_is_asked_for_needed_files_only(tmp_path, monkeypatch):
    """A repository with full precision, one with half precision only, and a tokenizer, which has no weights."""
    import huggingface_hub
    full, half = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
    everything = [full, half, "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin", "unet/config.json",
                  "vae/diffusion_pytorch_model.safetensors", "v1-5-pruned.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"]

    def taken(subfolder, there, cache):
        def snapshot_download(repo, **how):
            for name in huggingface_hub.utils.filter_repo_objects(there, **how):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).touch()
            return str(cache)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert fetch("owner/name", subfolder) == cache / subfolder
        return {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()}

    assert taken("unet", everything, tmp_path / "a") == {full, "unet/config.json"}
    assert taken("unet", [f for f in everything if f != full], tmp_path / "b") == {half, "unet/config.json"}
    assert taken("tokenizer", everything, tmp_path / "c") == {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    tower = {"config.json", "model.safetensors"}  # CLIP's, alone in its repository
    assert taken("", [*tower, "pytorch_model.bin", "text_encoder/model.safetensors", *everything], tmp_path / "d") == tower
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(UserError, match="owner/name.*no network$"):
        fetch("owner/name", "unet")


def test_save_and_load_serve_other_modules(tmp_path):
    source = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))  # with a tensor of integers
    save_weights(source, tmp_path, {"a": 1}, name="model.safetensors", dtype=torch.float16)
    with torch.device("meta"):
        target = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    load_weights(target, tmp_path)
    assert read_json(tmp_path / "config.json") == {"a": 1} and target[1].num_batches_tracked.dtype == torch.long
    assert torch.equal(target[0].weight, source[0].weight.half().float())


@pytest.mark.parametrize("error, code, says", [
    ("UserError('no such\\nthing')", 2, "error: no such thing"), ("torch.OutOfMemoryError('a\\nb')", 2, "error: out of memory"),
    ("RuntimeError('DefaultCPUAllocator: not enough memory: you tried')", 2, "error: out of memory"),
    ("KeyboardInterrupt()", 130, "interrupted"), ("RuntimeError('a bug')", 1, "Traceback")])
def test_a_mistake_ends_in_one_line(error, code, says):
    program = f"import torch\nfrom folders import UserError, command\ndef main():\n    raise {error}\ncommand(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(says) and (code == 1 or done.stderr.count("\n") == 1) and not done.stdout


def test_a_command_without_mistakes_just_runs():
    ran = []
    command(lambda: ran.append(1))
    assert ran == [1]
