"""MTU: exactness at step 0, independence of the tasks, folding, what trains."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import data
import moe
import train
from conftest import assert_mistake, call, same_tensors
from hub import UserError, load_weights, read_json
from routing import add_routing
from sample import generate, load_model
from train import parameter_groups
from unet import CONFIGS, UNet

SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64), cross_attention_dim=24,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
# One level, whose only transformer is in the middle: torch.compile takes less time.
FLAT = dict(block_out_channels=(32,), down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",))
TINY_MTU = data.ASSETS / "tiny-mtu"
ALL = torch.arange(4)  # the four tasks in one batch
T = torch.tensor([1, 300, 600, 999])


def base(**changes):
    torch.manual_seed(0)
    return UNet({**SMALL, **changes}).eval()


def run(unet, task=ALL, channels=8, batch=slice(None)):
    """The output for a batch of four samples, the same at each call."""
    torch.manual_seed(1)
    dtype = unet.conv_out.weight.dtype
    x, text = torch.randn(4, 9, 8, 8).to(dtype), torch.randn(4, 7, 24).to(dtype)
    task = torch.as_tensor(task).expand(4)
    return unet(x[batch, :channels], T[batch], text[batch], task=task[batch])


def middle(unet):
    """The feed-forward layer in the middle: 64 channels, 256 inner units."""
    return unet.mid_block.attentions[0].transformer_blocks[0].ff


def condition(unet, x, task):
    return unet.condition(x, 1, None, torch.tensor(task), None)


def names(unet, parts):
    return {name for name, _ in unet.named_parameters() if any(part in name for part in parts)}


def trained(unet):
    return {name for name, p in unet.named_parameters() if p.requires_grad}


@torch.no_grad()
def scramble(unet):
    """Give what trains values that training could give it (a lacking channel's zeros stay)."""
    for p in unet.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p) * (p != 0 if p.dim() == 5 else 1))
    for module in unet.modules():
        if isinstance(module, moe.ExpertFeedForward):
            module.router[2].weight.normal_()
    return unet


def reloaded(folder):
    """The network in a folder, from what its config.json records."""
    config = read_json(folder / "config.json")
    settings = config.pop("moe")
    assert config.pop("_class_name") == "UpcycledUNet"
    with torch.device("meta"):
        unet = moe.upcycle(UNet(config), **settings)
    load_weights(unet, folder)
    return unet.eval()


def difference(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


@pytest.mark.parametrize("N, width", [
    (1, None), (4, None), (16, None), (4, 1.0), (1, 2.0), (8, 2.0), (8, 0.375)])
def test_preserve_equals_dense_at_step_0_and_copies_learn_apart(N, width):
    expected = run(base(), channels=4)
    unet = moe.upcycle(base(), num_experts=N, expert_width=width)
    assert difference(run(unet), expected) < 1e-5  # the source picture meets zero weights
    assert difference(run(unet, 0, channels=4), expected) < 1e-5
    rows = middle(unet).net[0].proj.weight
    copies = round(N * (width or 1 / N))
    assert len(rows) == 2 * 256 * copies
    if copies == 1:
        return
    start = rows[0].clone()
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        (run(unet) - 1).square().mean().backward()
        optimizer.step()
    first, copy = rows[0], rows[256]
    assert (first - copy).norm() > 0.05 * (first - start).norm() > 0


def test_task_names_are_those_of_the_data():
    assert moe.TASKS == data.ALL


def test_top_k_leaves_k_weights_that_sum_to_one_and_tasks_choose_different_experts():
    unet = moe.upcycle(base(), num_experts=8, top_k=3)
    chosen = set()
    for block in moe.transformer_blocks(unet):
        w = block.ff.router_weights(unet.task_embedding.weight)
        assert torch.allclose(w.sum(1), torch.ones(4))
        assert ((w > 0).sum(1) == 3).all()
        chosen.update(tuple(row.nonzero().flatten().tolist()) for row in w)
    assert len(chosen) > 4


@pytest.mark.parametrize("N, width, G", [(4, None, 0.25), (2, 1.0, 1), (1, 2.0, 2)])
def test_literal_scales_the_output_by_G(N, width, G):
    unet = base()
    dense, x = middle(unet), torch.randn(4, 5, 64)
    bias = dense.net[2].bias.detach().clone()
    expected = (dense(x, None) - bias) * G + bias
    moe.upcycle(unet, num_experts=N, init="literal", expert_width=width)
    mixed = middle(unet)(x, condition(unet, x, [0, 1, 2, 3]))
    assert torch.allclose(mixed, expected, atol=1e-5)


def test_equation_1_written_out():
    """N separate GEGLU networks cut from the dense one, mixed by a two-layer router with a ReLU."""
    unet = base()
    W, b = (p.detach().clone() for p in middle(unet).net[0].parameters())
    V, c = (p.detach().clone() for p in middle(unet).net[2].parameters())
    ff = middle(moe.upcycle(unet, init="literal"))
    torch.nn.init.normal_(ff.router[2].weight)
    x = torch.randn(2, 5, 64)
    cond = condition(unet, x, [1, 3])
    w = ff.router[2](ff.router[0](unet.task_embedding.weight[[1, 3]]).clamp(min=0)).exp()
    w = w / w.sum(dim=1, keepdim=True)
    assert torch.allclose(ff.router_weights(cond.task_emb), w, atol=1e-6)
    assert not torch.allclose(w[0], w[1])
    expected = 0
    for i in range(4):
        value = torch.arange(64 * i, 64 * (i + 1))
        gate = 256 + value
        inner = F.linear(x, W[value], b[value]) * F.gelu(F.linear(x, W[gate], b[gate]))
        expected = expected + w[:, i, None, None] * F.linear(inner, V[:, value], c)
    assert torch.allclose(ff(x, cond), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(top_k=2), dict(init="literal"), dict(num_experts=2)])
def test_fold_equals_the_mixture_and_leaves_it_alone(options):
    unet = scramble(moe.upcycle(base(), **options))
    for row, task in enumerate((0, 1, "sr", "inpaint")):
        folded = moe.fold(unet, task)
        channels = 8 if row else 4
        assert type(folded) is UNet
        assert folded.config == {**base().config, "in_channels": channels}
        expected = run(unet, row, channels)
        assert difference(run(folded, channels=channels), expected) < 1e-5
        for p in folded.parameters():
            p.data.zero_()
        assert torch.equal(run(unet, row, channels), expected)


def test_a_mixed_batch_equals_its_samples_alone():
    unet, task = scramble(moe.upcycle(base())), torch.tensor([3, 0, 1, 1])
    together = run(unet, task)
    for i in range(4):
        one = slice(i, i + 1)
        assert difference(run(unet, task, batch=one), together[one]) < 1e-4


@pytest.mark.parametrize("saved", [False, True])
def test_a_fifth_task_disturbs_nothing_and_trains_alone(tmp_path, saved):
    unet = scramble(moe.upcycle(base()))
    before = run(unet)
    moe.add_task(unet, "deblur", like="sr")
    assert torch.equal(run(unet), before)
    assert torch.equal(run(unet, 4), run(unet, 2))
    if saved:
        unet.save_pretrained(tmp_path)
        unet = reloaded(tmp_path)
        assert unet.config["moe"]["added"] == ["deblur"]
    # As train.py does: no weight decay on tables with a row per task.
    optimizer = torch.optim.AdamW(parameter_groups(unet, 0.1, 0.1), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        run(unet, 4).square().sum().backward()
        optimizer.step()
    assert torch.equal(run(unet), before)
    assert not torch.allclose(run(unet, 4), run(unet, 2))


def test_what_trains_is_the_papers_list_and_all_of_it_gets_gradients():
    unet = moe.upcycle(base())
    assert trained(unet) == names(unet, ["conv_in.", "task_embedding.", ".norm3.", ".ff."])
    assert not unet.conv_in.weight[0, :, 4:].any()      # t2i has four channels
    run(unet).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in unet.parameters())
    assert unet.conv_in.weight.grad[1:, :, 4:].abs().max() > 0
    assert unet.conv_in.weight.grad[0, :, 4:].abs().max() == 0
    assert middle(unet).router[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("which, layer", [("self", "attn1."), ("cross", "attn2."), ("ffn", "ff.")])
def test_one_kind_of_layer_trains_with_what_tells_the_tasks_apart(which, layer):
    """The paper's Table 1."""
    dense, unet = base(), moe.upcycle(base())
    assert trained(moe.trainable(dense, which)) == names(dense, [layer])
    parts = [layer, "conv_in.", "task_embedding.", ".norm3.", ".router."]
    assert trained(moe.trainable(unet, which)) == names(unet, parts)
    assert trained(moe.trainable(unet, "all")) == names(unet, [""])


@pytest.mark.parametrize("options", [
    {},
    dict(num_experts=2, expert_width=1.0, top_k=1),
    dict(in_channels={"edit": 12}, task_dim=8, router_dim=16),
])
def test_round_trip(tmp_path, options):
    unet = scramble(moe.upcycle(base(), **options))
    unet.save_pretrained(tmp_path)
    again = reloaded(tmp_path)
    assert torch.equal(run(again), run(unet))
    assert again.config["moe"] == unet.config["moe"]
    assert trained(again) == trained(unet)
    with pytest.raises(UserError, match="UpcycledUNet"):
        UNet.from_pretrained(tmp_path, "")


@pytest.mark.parametrize("channels", [8, 9])
def test_a_base_with_more_channels_draws_from_text_and_edits(channels):
    """InstructPix2Pix has 8 channels and keeps them; an inpainting base loses mask and picture."""
    latent_only = base(in_channels=channels)
    latent_only.conv_in.weight.data[:, 4:] = 0
    drawn = run(latent_only, channels=channels)
    edited = run(base(in_channels=8)) if channels == 8 else drawn
    unet = moe.upcycle(base(in_channels=channels))
    assert unet.config["moe"]["in_channels"] == dict(t2i=4, edit=8, sr=8, inpaint=8)
    assert difference(run(unet, 0, channels=4), drawn) < 1e-5
    assert difference(run(unet, 1), edited) < 1e-5


@pytest.mark.parametrize("name, N, total, trains", [("sd15", 4, 869, 158), ("sdxl", 1, 2600, 1272)])
def test_sizes_are_the_papers(name, N, total, trains):
    """The paper's section 6.1, but for SDXL's printed 1.5B trainable, which do not fit its 2.6B."""
    with torch.device("meta"):
        unet = moe.upcycle(UNet(CONFIGS[name]), num_experts=N)
    sizes = [(p.numel() / 1e6, p.requires_grad) for p in unet.parameters()]
    assert sum(size for size, _ in sizes) == pytest.approx(total, rel=0.01)
    assert sum(size for size, needs in sizes if needs) == pytest.approx(trains, rel=0.01)


def test_one_graph_and_half_precision():
    unet = scramble(moe.upcycle(base(**FLAT)))
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert torch.allclose(run(compiled), run(unet), atol=1e-5)
    x = torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert middle(unet)(x, condition(unet, x, [0, 1])).dtype == torch.bfloat16
    for width in (None, 1.0):
        unet = moe.upcycle(base(**FLAT).bfloat16(), num_experts=2, expert_width=width)
        assert run(unet).dtype == torch.bfloat16


@pytest.mark.parametrize("options, words", [
    (dict(num_experts=3), "evenly"),
    (dict(num_experts=0), "at least one"),
    (dict(num_experts=1, expert_width=0.5), "whole number"),
    (dict(expert_width=float("inf")), "whole number"),
    (dict(expert_width=0.3), "whole number .* not 4 x 0.3$"),
    (dict(expert_width=100.0), "up to 16 .* not 4 x 100$"),
    (dict(num_experts=7), "evenly, not num_experts 7 of width 0.142857$"),
    (dict(top_k=99), "top_k from 1 to num_experts, not 99 of 4$"),
    (dict(init="random"), "preserve or literal"),
    (dict(top_k=5), "top_k"),
    (dict(tasks=("edit", "edit")), "unique"),
    (dict(tasks=()), "unique"),
    (dict(in_channels={"t2i": 3}), "noisy latent"),
    (dict(in_channels={"edti": 12}), "edti"),
])
def test_bad_settings_are_refused_and_leave_the_network_alone(options, words):
    unet = base()
    with pytest.raises(UserError, match=words):
        moe.upcycle(unet, **options)
    assert unet.config == base().config
    assert torch.equal(run(unet, channels=4), run(base(), channels=4))


@pytest.mark.parametrize("words, request_", [
    ("'colorize'; this model knows t2i, edit", lambda unet: moe.fold(unet, "colorize")),
    ("not upcycled", lambda unet: moe.fold(base(), "edit")),
    ("do not fold", lambda unet: moe.fold(moe.upcycle(base(), expert_width=1.0), "edit")),
    ("upcycled already", moe.upcycle),
    ("'sr' already", lambda unet: moe.add_task(unet, "sr", like="edit")),
    ("6 channels; its tasks have .4, 8", lambda unet: run(unet, channels=6)),
    ("pass task", lambda unet: unet(torch.zeros(1, 8, 8, 8), 1, torch.zeros(1, 7, 24))),
])
def test_impossible_requests_are_refused(words, request_):
    with pytest.raises(ValueError, match=words):
        request_(moe.upcycle(base()))


def test_the_command_counts_a_folder_routed_or_not(tmp_path):
    model = load_model(data.ASSETS / "tiny")
    moe.upcycle(model.unet, ("t2i", "edit"), num_experts=2)
    model.save(tmp_path / "plain")
    add_routing(model.unet)
    model.save(tmp_path / "routed")
    plain, routed = (call("moe.py", "--model", tmp_path / name).stdout.splitlines()[1:]
                     for name in ("plain", "routed"))
    assert plain == routed
    total = sum(p.numel() for p in model.unet.parameters()) / 1e6
    assert plain[0].split()[:2] == ["upcycled", f"{total:.2f}M"]
    assert sum("0.50 0.50 | 0.50 0.50" in line for line in plain) == len(
        moe.transformer_blocks(model.unet))


def test_the_demonstration_weighs_the_experts_and_removes_each(tmp_path, monkeypatch):
    model = load_model(TINY_MTU)
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    layers, tasks = moe.transformer_blocks(model.unet), model.tasks
    w = moe.weights_of_tasks(model.unet)
    assert w.shape == (len(layers), len(tasks), 4)
    assert np.allclose(w.sum(-1), 1)
    costs = moe.removal_costs(model, count=1)
    assert costs.shape == w.shape
    assert same_tensors(model.unet.state_dict(), before)

    # The same by hand: w without the expert, and divided by what is left of its sum.
    examples = train.held_out_examples(tasks, None, model, 1)
    losses = train.held_out_losses(model, examples, 4)
    for layer, expert in ((0, 3), (len(layers) - 1, 2)):
        rest = torch.tensor(w[layer])
        rest[:, expert] = 0
        rest = rest / rest.sum(1, keepdim=True)
        with monkeypatch.context() as patch:
            patch.setattr(layers[layer].ff, "router_weights", lambda e_task: rest)
            without = train.held_out_losses(model, examples, 4)
        assert np.allclose(costs[layer, :, expert], 100 * (without / losses - 1), atol=0.01)
        assert abs(costs[layer]).max() > 1

    monkeypatch.setattr(moe, "removal_costs", lambda model: costs)
    done = call("moe.py", "--model", TINY_MTU, "--out", tmp_path / "new" / "moe.png")
    assert done.returncode == 0 and "moe.png: above" in done.stdout, done.stderr
    assert Image.open(tmp_path / "new" / "moe.png").size > (800, 400)


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_a_folded_tasks_card_draws_our_picture_in_diffusers(tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    words = ("moe.py", "--fold", task, "--model", TINY_MTU, "--out", "folded")
    assert call(*words[:-1], "no text \udcff").returncode == 0  # a name that is not UTF-8
    assert call(*words).returncode == 0
    source = data.open_image(data.ASSETS / "examples/edit.png")
    data.on_white(source).resize((64, 64), Image.BICUBIC).save("source.png")
    card = (tmp_path / "folded/README.md").read_text()
    assert "from `assets/tiny`" in card and "Apache-2.0" in card and "CC-BY 4.0" in card
    code = card.split("```python")[1].split("```")[0]
    quick = "generator=torch.manual_seed(0), num_inference_steps=4, guidance_scale="
    results = dict(torch=torch)
    exec(code.replace("guidance_scale=", quick, 1), results)
    for path in ("folded", TINY_MTU):
        images = [source] if task == "edit" else None
        ours = generate(load_model(path), task, ["your words here"], images, steps=4)[0]
        assert np.abs(np.asarray(ours, float) - np.asarray(results["picture"])).mean() < 1
    assert_mistake(call(*words), "folded exists")


@pytest.mark.parametrize("origin", ["owner/base", "runs/base"])
def test_a_folded_tasks_card_names_its_base_and_its_licence(tmp_path, monkeypatch, origin):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/base").mkdir(parents=True)
    model = load_model(TINY_MTU)
    model.save("all")
    (tmp_path / "all/arguments.json").write_text(json.dumps(dict(model=origin)))
    assert call("moe.py", "--fold", "sr", "--model", "all", "--out", "sr").returncode == 0
    card = (tmp_path / "sr/README.md").read_text()
    assert f"upcycled from `{origin}`" in card and f"the licence of `{origin}`" in card
    assert "guidance_scale=1.0, image_guidance_scale=1.0" in card
    # Only a hub id is a link for the hub.
    assert ("base_model: owner/base" in card) == (origin == "owner/base")

    for name in ("a\0b", "\ud800"):
        (tmp_path / "all/arguments.json").write_text(json.dumps(dict(model=name)))
        damaged = call("moe.py", "--fold", "sr", "--model", "all", "--out", "damaged")
        assert_mistake(damaged, "arguments.json does not hold")

    broken = load_model(TINY_MTU)
    torch.nn.init.constant_(broken.unet.conv_out.bias, float("nan"))
    broken.save("broken")
    damaged = call("moe.py", "--fold", "sr", "--model", "broken", "--out", "damaged")
    assert_mistake(damaged, "broken folds into a conv_out.bias")
    assert not (tmp_path / "damaged").exists()

    add_routing(model.unet)
    model.save("routed")
    words = ("moe.py", "--fold", "sr", "--model", "routed")
    assert_mistake(call(*words, "--out", "other"), "RoutedUNet, which no other program")
    assert not (tmp_path / "other").exists()
    assert_mistake(call(*words), "go together")


def test_a_fifth_task_is_trained_on_pictures_of_its_own(tmp_path, monkeypatch):
    """The whole way that README tells; of the shipped model's four tasks not a bit changes."""
    monkeypatch.setitem(data.TASKS, "deblur", data.TASKS["sr"])
    model = load_model(TINY_MTU)
    moe.add_task(model.unet, "deblur", like="sr")
    model.index.pop("base")
    model.save(tmp_path / "five")
    lines = []
    for i, split in enumerate(["train", "train", "heldout", "heldout"]):
        picture = data.to_pil(data.builtin("t2i", "train")[i]["target"])
        picture.save(tmp_path / f"{i}.png")
        picture.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / f"{i}-blurred.png")
        lines.append(json.dumps(
            dict(file_name=f"{i}.png", source_file_name=f"{i}-blurred.png", split=split)))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    done = call(
        "train.py", "--task", "deblur", "--model", tmp_path / "five", "--data", tmp_path,
        "--out", tmp_path / "out", "--steps", 2, "--batch-size", 2, "--warmup", 0, "--lr", 0.01,
        "--weight-decay", 0.1, "--eval-size", 2, "--sample-every", 0)
    assert done.returncode == 0, done.stderr
    x, text, after = torch.randn(5, 8, 16, 16), torch.ones(5, 77, 128), load_model(tmp_path / "out")
    with torch.no_grad():
        a, b = (m.unet(x, 500, text, task=torch.arange(5)) for m in (model, after))
    assert [torch.equal(*pair) for pair in zip(a, b)] == [True, True, True, True, False]
