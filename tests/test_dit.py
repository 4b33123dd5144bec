"""DiT beside diffusers' DiTTransformer2DModel and the papers' equations written again."""
import copy
import re

import pytest
import torch
import torch.nn.functional as F
import numpy as np
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import aggregation
import hub
from conftest import assert_mistake, call, randomised, shapes
from data import ASSETS
from dit import CONFIGS, DiT, network_boxes
from hub import UserError
from routing import MODES, add_routing, random_masks, task_masks
from sample import generate, load_model, pipeline_index

SMALL = dict(sample_size=8, in_channels=3, out_channels=6, num_layers=2, num_attention_heads=2,
             attention_head_dim=12, num_embeds_ada_norm=5)
VARIANTS = {
    "small": SMALL,
    "one head": dict(SMALL, num_attention_heads=1, attention_head_dim=8),
    "four heads, patches of 1": dict(SMALL, num_attention_heads=4, sample_size=4, patch_size=1),
    "patches of 3, no variance": dict(SMALL, sample_size=9, patch_size=3, out_channels=None),
    "no biases, one layer": dict(SMALL, attention_bias=False, num_layers=1, norm_eps=1e-3),
}
# transformer/config.json of facebook/DiT-XL-2-256
FACEBOOK = dict(
    _class_name="Transformer2DModel", _diffusers_version="0.12.0.dev0",
    activation_fn="gelu-approximate", attention_bias=True, attention_head_dim=72,
    cross_attention_dim=None, dropout=0.0, in_channels=4, norm_elementwise_affine=False,
    norm_num_groups=32, norm_type="ada_norm_zero", num_attention_heads=16,
    num_embeds_ada_norm=1000, num_layers=28, num_vector_embeds=None, only_cross_attention=False,
    out_channels=8, patch_size=2, sample_size=32, upcast_attention=False,
    use_linear_projection=False)
T = torch.tensor([3, 977])
LABEL = torch.tensor([1, 5])  # 5 is the row for "no class"


def share(theirs):
    """Give diffusers' network one embedding for all blocks, as the paper's has."""
    for block in theirs.transformer_blocks:
        block.norm1.emb = theirs.transformer_blocks[0].norm1.emb
    return theirs


def same_as(theirs):
    ours = DiT(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def picture(config, rows=None, columns=None):
    side = config["sample_size"]
    return torch.randn(2, config["in_channels"], rows or side, columns or side)


def close(out, expected):
    return out.shape == expected.shape and (out - expected).abs().max() <= 1e-5 * max(
        1, expected.abs().max())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gradients_equal_diffusers(name, shared):
    """Also where the blocks of diffusers' network embed time and class each in its own way."""
    config = VARIANTS[name]
    theirs = randomised(DiTTransformer2DModel(**config))
    if shared:
        share(theirs)
    ours = same_as(theirs)
    x = picture(config)
    expected = theirs(x, T, LABEL).sample
    out = ours(x, T, LABEL)
    assert close(out, expected)
    assert close(ours(x, T, None, added={"class_labels": LABEL}), expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    assert {key for key, _ in ours.named_parameters()} == gradients.keys()
    # The gradient of a bias of keys is zero but for rounding: a softmax does not see a shift.
    rounding = 1e-6 * max(grad.abs().max() for grad in gradients.values())
    for key, p in ours.named_parameters():
        largest = gradients[key].abs().max()
        assert (p.grad - gradients[key]).abs().max() <= 1e-5 * largest + rounding, key
        assert largest > 10 * rounding or "to_k.bias" in key, key


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(12, 12), (4, 4), (4, 16), (16, 4)])
def test_other_sizes_equal_diffusers(rows, columns):
    """Positions are stretched to the trained size."""
    theirs = randomised(DiTTransformer2DModel(**SMALL))
    x = picture(SMALL, rows, columns)
    expected = theirs(x, T, LABEL).sample
    if rows != columns:
        # diffusers lays the patches of every picture out as a square: undo it.
        side = int((rows * columns // 4) ** 0.5)
        patches = expected.reshape(2, 6, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        patches = patches.reshape(2, rows // 2, columns // 2, 6, 2, 2)
        expected = patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 6, rows, columns)
    assert close(same_as(theirs)(x, T, LABEL), expected)


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_goes_to_diffusers_and_back(shared, tmp_path):
    theirs = randomised(DiTTransformer2DModel(**SMALL))
    if shared:
        share(theirs)
    x = picture(SMALL)
    expected = theirs(x, T, LABEL).sample
    folder = tmp_path / "transformer"
    hub.save_weights(same_as(theirs), folder, dict(theirs.config))
    for name in ("DiTTransformer2DModel", "Transformer2DModel"):
        hub.write_json(folder / "config.json", dict(theirs.config, _class_name=name))
        ours = DiT.from_pretrained(tmp_path).eval()
        assert close(ours(x, T, LABEL), expected)
    ours.save_pretrained(tmp_path / "ours")
    # diffusers says what is missing, unknown or of another shape.
    back, info = DiTTransformer2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(back.eval()(x, T, LABEL).sample, expected)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    again = DiT.from_pretrained(tmp_path / "ours", subfolder="")
    assert again.config == ours.config
    # One embedding where the copies are equal; it then counts once.
    embeddings = [block.norm1.emb for block in again.transformer_blocks if block.norm1.emb]
    assert len(embeddings) == (1 if shared else 2)
    again.load_state_dict(ours.state_dict())  # a second time changes nothing
    inside = torch.nn.ModuleDict({"net": again}).state_dict()
    assert inside.keys() == {f"net.{key}" for key in theirs.state_dict()}


def test_a_file_is_loaded_strictly_and_its_type_is_chosen(tmp_path):
    ours = randomised(DiT(SMALL))
    ours.save_pretrained(tmp_path, dtype=torch.float16)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    assert all(value.dtype == torch.float16 for value in state.values())
    loaded = DiT.from_pretrained(tmp_path, "", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    out = loaded(picture(SMALL).bfloat16(), T, LABEL)
    assert out.dtype == torch.bfloat16
    key = "transformer_blocks.1.norm1.linear.weight"
    for broken, message in [({**state, "extra": torch.ones(1)}, "unknown extra"),
                            ({k: v for k, v in state.items() if k != key}, f"lacks {key}"),
                            ({**state, key: state[key][1:].clone()}, f"another shape of {key}")]:
        save_file(broken, file)
        with pytest.raises(UserError, match=re.escape(message)):
            DiT.from_pretrained(tmp_path, "")


@pytest.mark.parametrize("name, blocks, width, heads, millions", [
    ("dit-s", 12, 384, 6, 33), ("dit-b", 12, 768, 12, 130), ("dit-l", 24, 1024, 16, 458),
    ("dit-xl", 28, 1152, 16, 675), ("dit-tiny", 6, 128, 4, 1.9)])
def test_sizes_of_the_paper(name, blocks, width, heads, millions):
    """The paper's Table 1. Its figures are rounded down, or to the nearest million."""
    with torch.device("meta"):
        ours = DiT(CONFIGS[name])
        theirs = DiTTransformer2DModel(**CONFIGS[name])
    assert shapes(ours) == shapes(theirs)
    assert [block.routable_channels for block in ours.transformer_blocks] == [width] * blocks
    assert [block.attn1.heads for block in ours.transformer_blocks] == [heads] * blocks
    count = sum(p.numel() for p in ours.parameters())
    assert abs(count / 1e6 - millions) < 0.5
    copies = sum(p.numel() for p in ours.transformer_blocks[0].norm1.emb.parameters())
    assert count + (blocks - 1) * copies == sum(p.numel() for p in theirs.parameters())


def test_the_released_config_is_dit_xl():
    with torch.device("meta"):
        assert DiT(FACEBOOK).config == DiT(CONFIGS["dit-xl"]).config


def test_initialisation_is_the_published_one():
    network = DiT(dict(SMALL, num_layers=3, attention_head_dim=32, num_embeds_ada_norm=500))
    D = 64
    limits = {r"to_[qkv]\.weight": (6 / (4 * D)) ** 0.5,  # of one layer with 3 D outputs
              r"to_out\.0\.weight": (6 / (2 * D)) ** 0.5,
              r"(proj|net\.2)\.weight": (6 / (5 * D)) ** 0.5,
              r"pos_embed\.proj\.weight": (6 / (D + 2 * 2 * 3)) ** 0.5}
    for key, value in network.state_dict().items():
        if re.search(r"bias|norm1\.linear|proj_out", key):
            assert not value.any(), key
        elif "norm1.emb" in key:
            assert abs(value.std() - 0.02) < 0.001 and value.mean().abs() < 0.001, key
        else:
            limit = [limit for pattern, limit in limits.items() if re.search(pattern, key)][-1]
            assert 0.97 * limit < value.abs().max() <= limit, key
    out = network(picture(SMALL), T, LABEL)
    assert not out.any()
    out.sum().backward()  # DDP waits for the gradient of every parameter, zero or not
    assert all(p.grad is not None for p in network.parameters())
    # Each block is the identity: only the last layer keeps the output at zero.
    cond = network.condition(torch.zeros(2, 3, 8, 8), T, LABEL, None, None)
    x = torch.randn(2, 16, D)
    assert all(torch.equal(block(x, cond), x) for block in network.transformer_blocks)


def test_time_class_and_their_absence():
    network = randomised(DiT(SMALL))
    x = picture(SMALL)[:1].repeat(2, 1, 1, 1)
    same = network(x, 7, torch.tensor([2, 2]))
    for t, label in [(torch.tensor([7, 8]), [2, 2]), (torch.tensor([7, 7]), [2, 5])]:
        other = network(x, t, torch.tensor(label))
        assert torch.allclose(other[0], same[0], atol=1e-5)
        assert (other[1] - same[1]).abs().max() > 1e-3
    assert network.num_class_embeds == 6
    table = network.transformer_blocks[0].norm1.emb.class_embedder["embedding_table"]
    assert len(table.weight) == network.num_class_embeds
    with pytest.raises(ValueError, match="class_labels"):
        network(x, 7, None, added={"class_labels": None})
    with pytest.raises(ValueError, match="class_labels"):
        network(x, 7)


def test_what_train_and_sample_ask_of_a_network():
    network = DiT(VARIANTS["patches of 3, no variance"]).bfloat16()
    assert network.conv_out.weight.dtype == torch.bfloat16 and network.multiple == 3
    assert network.heads is network.task_embedding is None
    assert network.config["out_channels"] == network.config["in_channels"] == 3
    assert network(picture(SMALL | {"sample_size": 9}).bfloat16(), T, None, None,
                   {"class_labels": LABEL}).shape == (2, 3, 9, 9)


def test_large_timesteps_stay_apart_in_bf16():
    network = randomised(DiT(SMALL)).bfloat16()
    cond = network.condition(torch.zeros(2, 3, 8, 8), torch.tensor([998, 999]), LABEL * 0, None,
                             None)
    assert cond.temb.dtype == torch.bfloat16 and not torch.equal(*cond.temb)


@torch.no_grad()
def test_a_block_is_the_papers_equations():
    network = randomised(DiT(SMALL))
    cond = network.condition(torch.zeros(2, 3, 8, 8), T, LABEL, None, None)
    block = network.transformer_blocks[1]
    for size in (1.0, 1e-3):  # small numbers show the eps of the norms
        x = size * torch.randn(2, 16, 24)
        expected = published_block(network, block, x, torch.ones(2, 1, 24))
        assert (block(x, cond) - expected).abs().max() < 1e-4 * expected.abs().max()


def published_block(network, block, x, m):
    """The official DTR code's block at T and LABEL, written again on the block's parameters."""
    p = dict(network.transformer_blocks[0].named_parameters()) | dict(block.named_parameters())
    frequencies = 10000 ** (-torch.arange(128) / 127)
    angles = T[:, None] * frequencies
    c = torch.cat([angles.cos(), angles.sin()], 1)
    for name in ("linear_1", "linear_2"):
        c = F.linear(c, p[f"norm1.emb.timestep_embedder.{name}.weight"],
                     p[f"norm1.emb.timestep_embedder.{name}.bias"])
        c = F.silu(c) if name == "linear_1" else c
    c = c + p["norm1.emb.class_embedder.embedding_table.weight"][LABEL]
    s1, k1, g1, s2, k2, g2 = F.linear(
        F.silu(c), p["norm1.linear.weight"], p["norm1.linear.bias"])[:, None].chunk(6, -1)

    def norm(y, eps):
        return (y - y.mean(-1, True)) / (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt()

    r = m * x
    y = norm(r, 1e-6) * (1 + k1) + s1
    q, k, v = (F.linear(y, p[f"attn1.to_{n}.weight"], p[f"attn1.to_{n}.bias"])
               .unflatten(-1, (block.attn1.heads, -1)).transpose(1, 2) for n in "qkv")
    y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    y = F.linear(y.transpose(1, 2).flatten(2), p["attn1.to_out.0.weight"], p["attn1.to_out.0.bias"])
    r = r + g1 * y
    y = F.linear(norm(r, 1e-5) * (1 + k2) + s2, p["ff.net.0.proj.weight"], p["ff.net.0.proj.bias"])
    y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y ** 3)))
    r = r + g2 * F.linear(y, p["ff.net.2.weight"], p["ff.net.2.bias"])
    return r + (1 - m) * x


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_dtr_routes_every_block_and_nothing_else(mode):
    plain = randomised(DiT(dict(SMALL, num_layers=3)))
    x = picture(SMALL)
    assert torch.equal(add_routing(copy.deepcopy(plain), beta=1.0, mode=mode)(x, T, LABEL),
                       plain(x, T, LABEL))
    routed = add_routing(copy.deepcopy(plain), mode=mode, seed=4)
    assert len(routed.transformer_blocks) == 3
    assert [m for m in routed.modules() if hasattr(m, "mask")] == [*routed.transformer_blocks]
    # The whole network again, with the block written independently.
    h = plain.pos_embed(x)
    for i, block in enumerate(plain.transformer_blocks):
        # DTR: one mask for all blocks. R-TR: each block has drawn its own.
        masks = random_masks(24, seed=4, block=i)[T].float() if mode == "random" else \
            task_masks(T, 24)
        assert torch.equal(routed.transformer_blocks[i].mask(T).float(), masks)
        h = published_block(plain, block, h, masks[:, None])
    cond = plain.condition(x, T, LABEL, None, None)
    shift, scale = plain.proj_out_1(F.silu(cond.temb))[:, None].chunk(2, -1)
    h = plain.proj_out_2(F.layer_norm(h, (24,), eps=1e-6) * (1 + scale) + shift)
    h = h.view(2, 4, 4, 2, 2, 6)
    expected = torch.einsum("nhwpqc->nchpwq", h).reshape(2, 6, 8, 8)
    out = routed(x, T, LABEL)
    assert close(out, expected) and (out - plain(x, T, LABEL)).abs().max() > 1e-2
    assert routed.state_dict().keys() == plain.state_dict().keys()


def test_a_routed_dit_is_not_opened_as_a_plain_one(tmp_path):
    add_routing(DiT(SMALL)).save_pretrained(tmp_path)
    assert hub.read_json(tmp_path / "config.json")["routing"]["mode"] == "dtr"
    with pytest.raises(UserError, match="RoutedDiT.*load_model"):
        DiT.from_pretrained(tmp_path, "")


def test_a_call_with_other_tensors_leaves_the_network_as_it_is():
    """train.py counts FLOPs so. It would not, were one module registered in several blocks."""
    network = randomised(DiT(SMALL))
    x = picture(SMALL)
    expected = network(x, T, LABEL)
    others = {key: torch.ones_like(p) for key, p in network.named_parameters()}
    out = torch.func.functional_call(network, others, (x, T, None, None, {"class_labels": LABEL}))
    assert not torch.equal(out, expected)
    assert torch.equal(network(x, T, LABEL), expected)


def test_gradient_checkpointing_changes_nothing():
    network = add_routing(randomised(DiT(SMALL)))
    x = picture(SMALL)
    results = []
    for network.gradient_checkpointing in (False, True):
        network.zero_grad()
        stored = []

        def store(y):
            stored.append(y.numel())
            return y

        with torch.autograd.graph.saved_tensors_hooks(store, lambda y: y):
            out = network(x, T, LABEL)
        out.square().mean().backward()
        results.append((out, [p.grad.clone() for p in network.parameters()], sum(stored)))
    (out, grads, size), (out_again, grads_again, size_again) = results
    assert torch.equal(out, out_again) and size_again < size / 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, grads_again, strict=True))


def test_one_graph_and_bf16():
    network = randomised(DiT(SMALL))
    x = picture(SMALL)
    expected = network(x, T, LABEL)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert close(compiled(x, T, LABEL), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, T, LABEL)
    half = network.bfloat16()(x.bfloat16(), T, LABEL)
    for other in (out, half):
        assert other.dtype == torch.bfloat16
        assert (other - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("key, value", [
    ("norm_type", "layer_norm"), ("activation_fn", "geglu"), ("dropout", 0.1),
    ("norm_elementwise_affine", True), ("cross_attention_dim", 768), ("attention_type", "gated"),
    ("sample_size", 7), ("attention_head_dim", 3), ("something_new", 3), ("num_layers", "many")])
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"DiT config: .*{key}") as caught:
        DiT(SMALL | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key, value", [
    ("num_layers", 0), ("num_attention_heads", 0), ("num_embeds_ada_norm", None),
    ("num_embeds_ada_norm", -3), ("patch_size", 0), ("in_channels", None), ("sample_size", None)])
def test_impossible_numbers_are_the_fault_of_the_file(key, value, tmp_path):
    hub.write_json(tmp_path / "config.json", SMALL | {key: value})
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "config.json"))) as caught:
        DiT.from_pretrained(tmp_path, "")
    assert "\n" not in str(caught.value)


# ---- a whole model, as facebook/DiT-XL-2-256 lies on disk ----

CLASSES = {"0": "tench, Tinca tinca", "1": "goldfish", "207": "golden retriever"}


def model_folder(path, out_channels=8):
    """A DiTPipeline with random weights, on the miniature's latents; saved with its class names."""
    torch.manual_seed(0)
    # diffusers' pipeline knows no other number of classes than ImageNet's.
    config = dict(SMALL, sample_size=16, in_channels=4, out_channels=out_channels,
                  num_embeds_ada_norm=1000)
    randomised(DiT(config)).save_pretrained(path / "transformer")
    parts = dict(transformer=DiTTransformer2DModel.from_pretrained(path / "transformer"),
                 vae=AutoencoderKL.from_pretrained(ASSETS / "tiny", subfolder="vae"),
                 scheduler=DDIMScheduler(clip_sample=False))
    for name in ("vae", "scheduler"):
        parts[name].save_pretrained(path / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    hub.write_json(path / "model_index.json",
                   index | {"_class_name": "DiTPipeline", "id2label": CLASSES})
    pipe = DiTPipeline(**parts, id2label=CLASSES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours, theirs):
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()
               for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("guidance, out_channels", [(4.0, 8), (1.0, 8), (4.0, 4)])
def test_a_class_is_drawn_as_diffusers_draws_it(tmp_path, guidance, out_channels):
    pipe = model_folder(tmp_path / "a", out_channels)
    model = load_model(tmp_path / "a")
    assert model.tasks == ["class"] and model.native_size == 64
    names = ["golden retriever", "Tinca tinca"]

    def draw(pipe):
        return pipe(pipe.get_label_ids(names), guidance_scale=guidance, num_inference_steps=4,
                    generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)]).images

    expected = draw(pipe)
    drawn = generate(model, "class", names, guidance=guidance, steps=4, seed=7)
    assert difference(drawn, expected) <= 1 and np.std(expected[0]) > 10
    assert difference(drawn[:1], drawn[1:]) > 10
    # Numbers are names too, and what we write diffusers opens.
    numbers = generate(model, "class", ["207", "0"], guidance=guidance, steps=4, seed=7)
    assert difference(numbers, drawn) == 0
    model.index = pipeline_index(model)
    model.save(tmp_path / "b")
    again = DiTPipeline.from_pretrained(tmp_path / "b")
    again.set_progress_bar_config(disable=True)
    assert difference(draw(again), expected) <= 1


def test_the_command_draws_the_first_class_and_refuses_an_unknown_one(tmp_path):
    model_folder(tmp_path / "a")
    options = ["--task", "class", "--model", tmp_path / "a", "--steps", 1, "--out"]
    done = call("sample.py", *options, tmp_path / "out.png")
    assert done.returncode == 0 and "class: 'tench, Tinca tinca'" in done.stdout, done.stderr
    done = call("sample.py", *options, tmp_path / "no.png", "--prompt", "dragon")
    assert_mistake(done, "'dragon'", "below 1000", "tench")
    assert not (tmp_path / "no.png").exists()
    # Without a class it draws what guidance steers away from.
    model = load_model(tmp_path / "a")
    nothing = generate(model, "class", [""], steps=2)
    assert difference(nothing, generate(model, "class", ["1"], steps=2, guidance=1.0)) > 10
    assert difference(nothing, generate(model, "class", ["1"], steps=2, guidance=1.0,
                                        negative_prompt="goldfish")) > 10
    steered = generate(model, "class", ["1"], steps=2, guidance=3.0, negative_prompt="1")
    assert difference(steered, generate(model, "class", ["1"], steps=2, guidance=1.0)) <= 1


@pytest.mark.parametrize("entries, words", [
    ({"id2label": {"1000": "too many"}}, "num_class_embeds of the network is 1001"),
    ({"id2label": ["tench"]}, "id2label"), ({"id2label": {"one": "tench"}}, "id2label")])
def test_class_names_that_do_not_fit_are_named(tmp_path, entries, words):
    model_folder(tmp_path)
    index = hub.read_json(tmp_path / "model_index.json")
    hub.write_json(tmp_path / "model_index.json", index | entries)
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_dit_has_no_heads_of_mt_diffusion(tmp_path):
    model_folder(tmp_path)
    with pytest.raises(UserError, match="starts from a U-Net"):
        aggregation.prepare(load_model(tmp_path), "translate", "source")


def test_the_demonstration_prints_the_published_sizes(tmp_path):
    done = call("dit.py", "--out", tmp_path / "dit.png")
    assert done.returncode == 0 and Image.open(tmp_path / "dit.png").width > 1000
    rows = {row[0]: row for row in map(str.split, done.stdout.splitlines())}
    for name, published in [("dit-s", 6.06), ("dit-b", 23.01), ("dit-l", 80.71),
                            ("dit-xl", 118.64)]:
        assert abs(float(rows[name][-1]) / published - 1) < 0.001


@pytest.mark.parametrize("name", ["dit-s", "dit-xl"])
def test_the_diagram_has_the_papers_shapes(name):
    boxes, arrows = network_boxes(CONFIGS[name])
    by_place = {(box.column, box.row): box for box in boxes}
    assert len(by_place) == len(boxes)
    width, depth = {"dit-s": (384, 12), "dit-xl": (1152, 28)}[name]
    # 32 x 32 latents in patches of 2 x 2 are 256 tokens, and the last layer makes noise and
    # variance of 2 x 2 x 4 numbers from each.
    tokens = (256, width)
    assert [by_place[0, row].shape for row in range(6)] == [
        (4, 32, 32), tokens, tokens, tokens, (256, 32), (8, 32, 32)]
    assert {by_place[1, row].shape for row in range(5)} == {tokens}
    assert [by_place[2, row].shape for row in range(3)] == [(), (width,), (6 * width,)]
    masks = {place: box.mask for place, box in by_place.items() if box.mask}
    assert masks == {(0, 2): f"{width}", (1, 1): f"{width}"}
    assert str(depth) in by_place[0, 2].text
    # Every box but the three inputs is reached from the one above, and both updates are modulated.
    places = {((boxes[i].column, boxes[i].row), (boxes[j].column, boxes[j].row))
              for i, j in arrows}
    assert places == {((2, 2), (1, 2)), ((2, 2), (1, 3))} | {
        ((column, row - 1), (column, row)) for column, row in by_place if row > 0}
