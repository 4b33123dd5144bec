"""What a run tells of itself: FLOPs, speed, TensorBoard; recipes; processes that share an optimizer and must have the same weights."""
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adm
import merge
import moe
import options
import train
import watch
from checkpoint import same_on_all_ranks, same_start
from conftest import called, in_two_processes
from folders import UserError
from routing import add_routing
from sample import load_model
from test_train import log, run, weights
from unet import CONFIGS, UNet


@pytest.mark.parametrize("kind", ["dense", "upcycled", "routed", "blocks", "checkpointed", "pixels", "sdxl"])
def test_flops_are_those_of_a_step(kind):
    """Counted on the weights themselves; the network is as it was afterwards."""
    side = 16
    if kind == "pixels":
        unet, side = adm.UNet2D(adm.CONFIGS["adm-tiny"] | dict(num_class_embeds=None)), 32
    elif kind == "sdxl":
        unet = UNet(CONFIGS["sdxl"] | dict(block_out_channels=(32, 64, 64), sample_size=16, attention_head_dim=(1, 2, 2), norm_num_groups=8,
                                           transformer_layers_per_block=(1, 1, 1), cross_attention_dim=64))
    else:
        unet = UNet(CONFIGS["tiny"])
    if kind == "upcycled":
        moe.upcycle(unet)
    if kind == "routed":
        add_routing(unet)
    if kind == "blocks":
        merge.add_projections(unet, "blocks")
    unet.gradient_checkpointing = kind == "checkpointed"
    watch.counted.clear()
    task, channels = (1, 8) if kind == "upcycled" else (None, unet.config["in_channels"])
    frozen = {name for name, p in unet.named_parameters() if not p.requires_grad}
    counted = [watch.flops(unet, task, backward) for backward in (False, True)]
    assert unet.gradient_checkpointing == (kind == "checkpointed") and {n for n, p in unet.named_parameters() if not p.requires_grad} == frozen
    assert all(p.grad is None and p.device.type == "cpu" for p in unet.parameters())
    unet.gradient_checkpointing = False
    context = None if kind == "pixels" else torch.zeros(1, 77, unet.config["cross_attention_dim"])
    pooled = unet.config.get("projection_class_embeddings_input_dim")
    added = dict(text_embeds=torch.zeros(1, pooled - 6 * 256), time_ids=torch.zeros(1, 6)) if pooled else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = unet(torch.zeros(1, channels, side, side), torch.zeros(1), context, task=None if task is None else torch.tensor([task]), added=added)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert counted == [forward, counter.get_total_flops()] and 2 * forward < counted[1] < 3 * forward


def test_the_log_tells_the_speed(tmp_path, monkeypatch):
    """By a clock that ticks at each look: a step begins, asks for data twice, gets it twice, ends."""
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(train.time, "time", lambda: next(ticks))
    run(tmp_path / "a", "--task", "sr", "--steps", 4, "--log-every", 2, "--device-batch-size", 2)
    unet = load_model(tmp_path / "a").unet
    assert len(log(tmp_path / "a")) == 2
    for row in log(tmp_path / "a"):
        assert row["images_per_s"] == 4 / 5 and row["data_share"] == 0.4
        assert row["tflops"] == round(4 / 5 * watch.flops(unet, 0, backward=True) / 1e12, 4)
        assert row["mfu"] is None and 0.1 < row["memory_gb"] < 50


def test_the_peak_is_that_of_the_device(monkeypatch):
    for name, wanted in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", None),
                         ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H100 NVL", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert watch.peak(SimpleNamespace(type="cuda"), "bf16") == wanted
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert watch.peak(SimpleNamespace(type="cuda"), "fp32") == 156e12 and watch.peak(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize("task", ["sr", "label"])
def test_bench_prints_the_speed_and_leaves_nothing(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = called("train.py", "--bench", "--task", task, "--batch-size", 2, "--steps", 3)
    assert done.returncode == 0 and " images/s; " in done.stdout and "saved in" not in done.stdout and not list(tmp_path.iterdir())
    assert called("train.py", "--bench", "--decouple", 2).returncode == 2


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "a" and purge_step == 1

        def add_scalar(self, *scalar):
            seen.append(scalar)

        def flush(self):
            pass
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: name)
    run(tmp_path / "a", "--task", "sr", "--steps", 1, "--tensorboard", "--eval-every", 1)
    told, held_out = log(tmp_path / "a")
    assert ("loss/sr", told["loss"]["sr"], 1) in seen and ("images_per_s", told["images_per_s"], 1) in seen
    assert ("held_out/sr", held_out["held_out"]["sr"], 1) in seen
    assert [s[1] for s in seen if s[0].startswith("held_out_by_t/sr/")] == [v for v in held_out["held_out_by_t"]["sr"] if v is not None]
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    done = run(tmp_path / "b", "--task", "sr", "--steps", 1, "--tensorboard", check=False)
    assert done.returncode == 2 and "pip install tensorboard" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_a_recipe_gives_defaults_and_options_win(monkeypatch):
    def asked(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        return options.get_args()
    args, own = asked("--preset", "mtu-sdxl"), asked("--lr", "0.1", "--preset", "mtu-sdxl", "--batch-size", "8")
    assert (args.lr, args.batch_size, args.num_experts, args.weight_decay) == (5e-5, 128, 1, 0.01) and "xl" in args.model
    assert (own.lr, own.batch_size, own.weight_decay) == (0.1, 8, 0.01)
    assert asked().lr is None and asked("--preset", "mtu-sd15").num_experts == 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--task", "all"], ["--task", "t2i", "--t-range", 0, 500, "--projection"], ["--task", "sr", "--routing", "dtr", "--loss-weight", "uw"],
    ["--task", "translate", "--input", "x"], ["--task", "masked"], ["--task", "label"], ["--task", "repr"],
    ["--task", "label", "--model", "scratch", "--head", "classifier"]], ids=lambda options: "-".join(map(str, options[1::2])))
def test_one_graph_for_all_steps(options, tmp_path, monkeypatch):
    """No graph break, and no recompilation from step to step."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(train, "compiled", lambda run, device: torch.compile(run, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    run(tmp_path / "a", *options, "--steps", 3, "--compile", "--batch-size", 8, "--device-batch-size", 4)
    assert len(graphs) == 1


def test_adams_moments_divided_among_processes_are_saved_whole(tmp_path):
    """ZeRO's run is the plain run, and each goes on as the other, with another number of processes."""
    asked, states = ("--task", "all", "--lr-schedule", "constant"), []
    for name, option in (("plain", []), ("zero", ["--zero"])):
        run(tmp_path / name, *asked, "--steps", 2, *option, ranks=2)
        states.append(load_file(tmp_path / name / "state" / "state.safetensors"))
    plain, zero = states
    assert plain.keys() == zero.keys() and any(key.startswith("adam/exp_avg_sq/") for key in plain)
    assert all(torch.allclose(plain[key], zero[key], rtol=1e-4, atol=1e-7) for key in plain)
    run(tmp_path / "zero", *asked, "--steps", 4)
    run(tmp_path / "plain", *asked, "--steps", 4, "--zero", ranks=2)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "zero")
    assert all(torch.allclose(a[key], b[key], atol=2e-4) for key in a)
    assert [row["step"] for row in log(tmp_path / "zero")] == [1, 2, 3, 4]


def one_bit_apart():
    dist.init_process_group("gloo")
    params = dict(a=torch.arange(6.0).view(2, 3).T, b=torch.ones(5), c=torch.zeros(2))
    same_on_all_ranks(params)
    if dist.get_rank() == 1:
        params["b"][3] = torch.nextafter(params["b"][3], torch.tensor(2.0))
    weights = [torch.nn.Parameter(torch.ones(8)) for _ in range(4)]
    optimizer = train.make_optimizer([dict(params=weights), dict(params=[])], torch.device("cpu"), zero=True)
    for w in weights:
        w.grad = w.detach().clone()
    optimizer.step()
    assert len(optimizer.optim.state) == 2 and all((w < 1).all() for w in weights)
    try:
        same_on_all_ranks(params)
    except UserError as error:
        return str(error)


def apart(step):
    dist.init_process_group("gloo")
    same_start(5, torch.device("cpu"))
    try:
        same_start(step + dist.get_rank(), torch.device("cpu"))
    except UserError as error:
        return str(error)


def test_processes_that_found_different_checkpoints_say_so():
    assert all("a disk that all machines share" in told for told in in_two_processes(apart, 2))


def test_weights_that_differ_between_processes_are_named_and_moments_are_divided():
    assert all("differ between the processes, b first, 1 of 3" in told for told in in_two_processes(one_bit_apart))


def parting(*words):
    factor, make, groups = train.lr_factor, train.make_optimizer, []

    def lr_factor(step, args):
        if dist.get_rank() == 1:
            groups[0]["params"][0].data[0] += 1e-6
        return factor(step, args)
    train.lr_factor, train.make_optimizer = lr_factor, lambda *args: groups.extend(args[0]) or make(*args)
    return called(*words)


def test_a_run_whose_processes_part_ends_before_it_saves(tmp_path):
    ends = in_two_processes(parting, "train.py", "--task", "sr", "--batch-size", 4, "--steps", 1, "--eval-size", 1, "--sample-every", 0,
                            "--out", tmp_path / "run")
    assert all(done.returncode == 2 and "differ between the processes" in done.stderr for done in ends)
    assert not (tmp_path / "run" / "state").exists()


def rank_1_in_trouble(*words):
    """It alone has a loss that is not finite in step 2, and is told to stop in step 3."""
    factor, per_sample, trouble, step = train.lr_factor, train.per_sample_loss, os.environ["RANK"] == "1", []

    def lr_factor(now, args):
        step[:] = [now + 1]
        if trouble and now + 1 == 3:
            signal.raise_signal(signal.SIGTERM)
        return factor(now, args)

    def per_sample_loss(*args):
        losses, weighted = per_sample(*args)
        return losses, weighted * torch.nan if trouble and step == [2] else weighted
    train.lr_factor, train.per_sample_loss = lr_factor, per_sample_loss
    return called(*words)


def test_what_befalls_one_process_all_do(tmp_path):
    """Also where only one of them has an x for the head."""
    words = ["train.py", "--task", "label", "--drop", 0.9, "--seed", 2, "--batch-size", 4, "--eval-size", 1, "--sample-every", 0, "--log-every", 1]
    assert called(*words, "--steps", 1, "--save-every", 0, "--out", tmp_path / "b").returncode == 0
    (alone,) = log(tmp_path / "b")
    ends = in_two_processes(rank_1_in_trouble, *words, "--steps", 5, "--out", tmp_path / "a")
    assert [done.returncode for done in ends] == [130, 130], [done.stderr[-3000:] for done in ends]
    assert "stopped at step 3, saved in" in ends[0].stdout
    rows = log(tmp_path / "a")
    assert [row["skipped"] for row in rows] == [0, 1, 1] and [row["grad_norm"] is None for row in rows] == [False, True, False]
    assert load_file(tmp_path / "a/state/state.safetensors")["adam/step/unet.conv_in.weight"] == 2
    assert alone["loss"] == pytest.approx(rows[0]["loss"], rel=1e-3) and alone["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-2)
