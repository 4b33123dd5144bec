"""MTU: exactness at step 0, independence of tasks, folding, what trains."""
import json

import pytest
import torch
from PIL import ImageFilter

import data
import moe
from conftest import called
from folders import UserError
from routing import add_routing
from sample import load_model
from train import parameter_groups
from unet import CONFIGS, UNet

SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64, 64), cross_attention_dim=24)


def base(**changes):
    return UNet({**SMALL, **changes}).eval()


def inputs(batch=4, channels=8):
    return torch.randn(batch, channels, 8, 8), torch.tensor([1, 300, 600, 999])[:batch], torch.randn(batch, 7, 24)


def scramble(unet):
    """Give every trained tensor values that training could have given it (the zeros of channels a task lacks stay)."""
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p) * (p != 0 if p.dim() == 5 else 1))
        for module in unet.modules():
            if isinstance(module, moe.ExpertFeedForward):
                module.router[2].weight.normal_()
    return unet


def difference(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("width", [None, 1.0, 2.0])
def test_preserve_equals_dense_at_step_0(num_experts, width):
    unet, (x, t, text) = base(), inputs()
    expected = unet(x[:, :4], t, text)
    moe.upcycle(unet, num_experts=num_experts, expert_width=width)
    # the four tasks in one batch; the source picture meets zero weights
    assert difference(unet(x, t, text, task=torch.arange(4)), expected) < 1e-5
    assert difference(unet(x[:, :4], t, text, task=torch.zeros(4, dtype=torch.long)), expected) < 1e-5


@pytest.mark.parametrize("experts, width", [(4, 0.5), (1, 2.0), (8, 0.375), (2, 1.0)])
def test_copies_of_a_unit_preserve_and_learn_apart(experts, width):
    unet, (x, t, text) = base(), inputs()
    expected = unet(x[:, :4], t, text)
    moe.upcycle(unet, num_experts=experts, expert_width=width)
    assert difference(unet(x, t, text, task=torch.arange(4)), expected) < 1e-5
    ff = unet.mid_block.attentions[0].transformer_blocks[0].ff
    project, inner = ff.net[0].proj, 256
    start = project.weight[0].clone()
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (unet(x, t, text, task=torch.arange(4)) - x[:, 4:]).square().mean().backward()
        optimizer.step()
    first, second = project.weight[0], project.weight[inner]  # copies of unit 0
    assert (first - second).norm() > 0.05 * (first - start).norm() > 0


def test_top_k_lets_tasks_choose_different_experts():
    torch.manual_seed(0)
    unet = moe.upcycle(base(), num_experts=8, top_k=2)
    chosen = {tuple(m.weights(unet.task_embedding.weight)[i].nonzero().flatten().tolist())
              for m in unet.modules() if isinstance(m, moe.ExpertFeedForward) for i in range(4)}
    assert len(chosen) > 4


def test_task_names_are_those_of_the_data():
    assert moe.TASKS == data.ALL


def test_literal_copies_the_weights_and_scales_the_output():
    unet = base()
    ff = unet.mid_block.attentions[0].transformer_blocks[0].ff
    x = torch.randn(4, 5, 64)
    dense, bias = ff(x, None), ff.net[2].bias.detach().clone()
    moe.upcycle(unet, num_experts=4, init="literal")
    cond = unet.condition(x, 1, None, torch.arange(4), None)
    mixed = unet.mid_block.attentions[0].transformer_blocks[0].ff(x, cond)
    assert torch.allclose(mixed, (dense - bias) / 4 + bias, atol=1e-6)


def test_experts_are_slices_of_the_dense_network():
    """Eq. 1 written out: N separate GEGLU networks cut from the dense one, weighted and summed."""
    unet = base()
    ff = unet.mid_block.attentions[0].transformer_blocks[0].ff
    (W, b), (V, c) = ((m.weight.detach().clone(), m.bias.detach().clone()) for m in (ff.net[0].proj, ff.net[2]))
    moe.upcycle(unet, num_experts=4, init="literal")
    ff = unet.mid_block.attentions[0].transformer_blocks[0].ff
    torch.nn.init.normal_(ff.router[2].weight)
    x, task = torch.randn(2, 5, 64), torch.tensor([1, 3])
    cond, inner = unet.condition(x, 1, None, task, None), V.shape[1]
    w, expected = ff.weights(cond.task_emb), 0
    for i in range(4):
        s = slice(i * inner // 4, (i + 1) * inner // 4)
        value, gate = x @ W[:inner][s].T + b[:inner][s], x @ W[inner:][s].T + b[inner:][s]
        expected = expected + w[:, i, None, None] * ((value * torch.nn.functional.gelu(gate)) @ V[:, s].T + c)
    assert torch.allclose(ff(x, cond), expected, atol=1e-5)
    assert torch.allclose(w.sum(1), torch.ones(2)) and not torch.allclose(w[0], w[1])


def test_task_convolutions_equal_separate_ones():
    unet = scramble(moe.upcycle(base()))
    x, task = torch.randn(4, 8, 9, 7), torch.tensor([2, 0, 3, 2])
    out = unet.conv_in(x, unet.condition(x, 1, None, task, None))
    for i, k in enumerate(task.tolist()):
        expected = torch.nn.functional.conv2d(x[i:i + 1], unet.conv_in.weight[k], unet.conv_in.bias[k], padding=1)
        assert torch.allclose(out[i:i + 1], expected, atol=1e-5)
    assert unet.conv_in.weight[0, :, 4:].abs().max() == 0  # t2i has four channels, and what stands in others does not matter


@pytest.mark.parametrize("task", [0, 1, "sr", "inpaint"])
@pytest.mark.parametrize("options", [dict(), dict(top_k=2), dict(init="literal"), dict(num_experts=2)])
def test_fold_equals_the_mixture(task, options):
    unet = scramble(moe.upcycle(base(), **options))
    row, folded = moe.task_index(unet, task), moe.fold(unet, task)
    assert type(folded) is UNet and folded.config["in_channels"] == (4 if row == 0 else 8) and "moe" not in folded.config
    x, t, text = inputs(channels=folded.config["in_channels"])
    assert difference(folded(x, t, text), unet(x, t, text, task=torch.full((4,), row))) < 1e-5


def test_fold_saves_as_a_diffusers_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folded = moe.fold(scramble(moe.upcycle(base())), "edit")
    folded.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    x, t, text = inputs()
    assert difference(theirs(x, t, text).sample, folded(x, t, text)) < 1e-5


def test_wide_experts_do_not_fold():
    with pytest.raises(UserError, match="do not fold"):
        moe.fold(moe.upcycle(base(), num_experts=2, expert_width=1.0), "edit")


def test_top_k_keeps_k_weights_that_sum_to_one():
    unet = scramble(moe.upcycle(base(), num_experts=8, top_k=3))
    w = unet.mid_block.attentions[0].transformer_blocks[0].ff.weights(unet.task_embedding.weight)
    assert ((w > 0).sum(1) == 3).all() and torch.allclose(w.sum(1), torch.ones(4))


def test_changing_one_tasks_rows_leaves_the_others_alone():
    unet, (x, t, text) = scramble(moe.upcycle(base())), inputs()
    before = unet(x, t, text, task=torch.arange(4))
    with torch.no_grad():
        unet.task_embedding.weight[2] += 1
        unet.conv_in.weight[2, :, :4] += 1
        for module in unet.modules():
            if isinstance(module, moe.TaskLayerNorm):
                module.weight[2] += 1
    after = unet(x, t, text, task=torch.arange(4))
    changed = [(a != b).any().item() for a, b in zip(after, before)]
    assert changed == [False, False, True, False]


def test_a_mixed_batch_equals_its_samples_alone():
    unet, (x, t, text) = scramble(moe.upcycle(base())), inputs()
    together = unet(x, t, text, task=torch.tensor([3, 0, 1, 1]))
    for i, k in enumerate([3, 0, 1, 1]):
        assert difference(unet(x[i:i + 1], t[i:i + 1], text[i:i + 1], task=torch.tensor([k])), together[i:i + 1]) < 1e-4


@pytest.mark.parametrize("reloaded", [False, True])
def test_a_fifth_task_disturbs_nothing_and_trains_alone(tmp_path, reloaded):
    unet, (x, t, text) = scramble(moe.upcycle(base())), inputs()
    task = torch.arange(4)
    before = unet(x, t, text, task=task)
    moe.add_task(unet, "deblur", like="sr")
    assert torch.equal(unet(x, t, text, task=task), before)
    assert torch.equal(unet(x, t, text, task=torch.full((4,), 4)), unet(x, t, text, task=torch.full((4,), 2)))
    if reloaded:
        unet.save_pretrained(tmp_path)
        unet = moe.from_pretrained(tmp_path, "").eval()
        assert unet.config["moe"]["added"] == ["deblur"]
    optimizer = torch.optim.AdamW(parameter_groups(unet, 0.1, 0.1), lr=0.1)  # train.py's: no weight decay on tables with a row per task
    for _ in range(3):
        optimizer.zero_grad()
        unet(x, t, text, task=torch.full((4,), 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(unet(x, t, text, task=task), before)
    assert not torch.allclose(unet(x, t, text, task=torch.full((4,), 4)), unet(x, t, text, task=torch.full((4,), 2)))


def test_what_trains_is_the_papers_list_and_all_of_it_gets_gradients():
    unet, (x, t, text) = moe.upcycle(base()), inputs()
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert all(name.startswith(("conv_in.", "task_embedding.")) or ".norm3." in name or ".ff." in name for name in trained)
    assert len(trained) == sum(".norm3." in n or ".ff." in n for n, _ in unet.named_parameters()) + 3
    unet(x, t, text, task=torch.arange(4)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in unet.parameters())
    assert unet.conv_in.weight.grad[1:, :, 4:].abs().max() > 0 and unet.conv_in.weight.grad[0, :, 4:].abs().max() == 0
    ff = unet.mid_block.attentions[0].transformer_blocks[0].ff
    assert ff.router[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("options", [dict(), dict(num_experts=2, expert_width=1.0, top_k=1), dict(in_channels={"edit": 12}, task_dim=8, router_dim=16)])
def test_round_trip(tmp_path, options):
    unet, (x, t, text) = scramble(moe.upcycle(base(), **options)), inputs()
    unet.save_pretrained(tmp_path)
    again = moe.from_pretrained(tmp_path, "").eval()
    assert torch.equal(again(x, t, text, task=torch.arange(4)), unet(x, t, text, task=torch.arange(4)))
    assert again.config["moe"] == unet.config["moe"]
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [n for n, p in unet.named_parameters() if p.requires_grad]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] != "UNet2DConditionModel"
    with pytest.raises(UserError, match="UpcycledUNet"):
        UNet.from_pretrained(tmp_path, "")


def test_an_eight_channel_base_keeps_its_source_weights():
    unet, (x, t, text) = base(in_channels=8), inputs()
    expected = unet(x, t, text)
    without = unet(torch.cat([x[:, :4], 0 * x[:, 4:]], 1), t, text)
    moe.upcycle(unet)
    assert difference(unet(x, t, text, task=torch.ones(4, dtype=torch.long)), expected) < 1e-5
    assert difference(unet(x[:, :4], t, text, task=torch.zeros(4, dtype=torch.long)), without) < 1e-5


def test_a_nine_channel_base_draws_from_text_and_its_mask_is_left_behind():
    """Stable Diffusion's inpainting U-Net: noisy latent 4, mask 1, masked picture 4."""
    unet, (x, t, text) = base(in_channels=9), inputs()
    expected = unet(torch.cat([x[:, :4], torch.zeros(4, 5, 8, 8)], 1), t, text)
    moe.upcycle(unet)
    assert unet.config["moe"]["in_channels"] == dict(t2i=4, edit=8, sr=8, inpaint=8)
    for task, given in ((0, x[:, :4]), (1, x)):  # the picture's channels start at zero
        assert difference(unet(given, t, text, task=torch.full((4,), task)), expected) < 1e-5


@pytest.mark.parametrize("name, experts, total, trained", [("sd15", 4, 869, 158), ("sdxl", 1, 2600, 1272)])
def test_sizes_are_the_papers(name, experts, total, trained):
    """Section 6.1: 869M and 158M for SD 1.5; 2.6B for SDXL, whose 1.5B trainable do not fit that: 1.27B are counted here."""
    with torch.device("meta"):
        unet = moe.upcycle(UNet(CONFIGS[name]), num_experts=experts)
    numbers = [sum(p.numel() for p in unet.parameters() if p.requires_grad or not only) / 1e6 for only in (False, True)]
    assert abs(numbers[0] / total - 1) < 0.01 and abs(numbers[1] / trained - 1) < 0.01


def test_compiles_to_one_graph():
    unet, (x, t, text) = scramble(moe.upcycle(base())), inputs()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, text, task=torch.arange(4)), unet(x, t, text, task=torch.arange(4)), atol=1e-5)


def test_bfloat16_autocast_keeps_the_ffn_in_bfloat16():
    unet = scramble(moe.upcycle(base()))
    ff, x = unet.mid_block.attentions[0].transformer_blocks[0].ff, torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ff(x, unet.condition(x, 1, None, torch.tensor([0, 1]), None)).dtype == torch.bfloat16


@pytest.mark.parametrize("options, words", [
    (dict(num_experts=3), "evenly"), (dict(num_experts=0), "at least one"), (dict(init="random"), "preserve or literal"),
    (dict(top_k=5), "top_k"), (dict(tasks=("edit", "edit")), "unique"), (dict(in_channels={"t2i": 3}), "noisy latent"), (dict(in_channels={"edti": 12}), "edti"),
    (dict(num_experts=1, expert_width=0.5), "whole number")])
def test_bad_requests_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        moe.upcycle(base(), **options)


def test_a_task_must_be_known_and_given():
    unet, (x, t, text) = moe.upcycle(base()), inputs()
    with pytest.raises(UserError, match="t2i, edit, sr, inpaint"):
        moe.fold(unet, "colorize")
    with pytest.raises(ValueError, match="pass task"):
        unet(x, t, text)
    with pytest.raises(UserError, match="upcycled already"):
        moe.upcycle(unet)
    with pytest.raises(UserError, match="12 channels; its tasks have 4, 8"):
        unet(inputs(channels=12)[0], t, text, task=torch.arange(4))


@pytest.mark.parametrize("width", [None, 1.0])
def test_half_precision_weights_are_upcycled_too(width):
    unet, (x, t, text) = moe.upcycle(base().bfloat16(), num_experts=2, expert_width=width), inputs(channels=4)
    with torch.no_grad():
        assert unet(x.bfloat16(), t, text.bfloat16(), task=torch.zeros(4, dtype=torch.long)).dtype == torch.bfloat16


def test_the_command_counts_a_folder_routed_or_not(tmp_path):
    unet = moe.upcycle(base(), tasks=("edit",), num_experts=2)
    unet.save_pretrained(tmp_path / "plain/unet")
    add_routing(unet).save_pretrained(tmp_path / "routed/unet")
    plain, routed = (called("moe.py", "--model", tmp_path / name).stdout.splitlines()[1:] for name in ("plain", "routed"))
    assert plain == routed and sum(".ff" in line and "0.50  0.50" in line for line in plain) == sum(
        isinstance(m, moe.ExpertFeedForward) for m in unet.modules())
    done = called("moe.py", "--model", tmp_path / "plain", "--num-experts", 8)
    assert done.returncode == 2 and "--num-experts" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_fifth_task_is_trained_on_pictures_of_its_own(tmp_path, monkeypatch):
    """The whole way that README tells; of the shipped model's four tasks not a bit changes."""
    monkeypatch.setitem(data.TASKS, "deblur", data.TASKS["sr"])
    model = load_model(data.ASSETS / "tiny-mtu")
    moe.add_task(model.unet, "deblur", like="sr")
    model.index.pop("base")
    model.save(tmp_path / "five")
    pictures, lines = data.plain("train")[1][:8], []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        picture.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / f"{i}-blurred.png")
        lines.append(dict(file_name=f"{i}.png", source_file_name=f"{i}-blurred.png", split="train" if i < 6 else "heldout"))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = called("train.py", "--task", "deblur", "--model", tmp_path / "five", "--data", tmp_path, "--out", tmp_path / "out", "--steps", 2, "--batch-size", 2,
                  "--warmup", 0, "--lr", 0.01, "--weight-decay", 0.1, "--eval-size", 2, "--sample-every", 0)
    assert done.returncode == 0, done.stderr
    trained, x = load_model(tmp_path / "out").unet, torch.randn(5, 8, 16, 16)
    with torch.no_grad():
        before, after = (unet(x, 500, torch.ones(5, 77, 128), task=torch.arange(5)) for unet in (model.unet, trained))
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True] * 4 + [False]
