"""experiments/frame.py and the scripts that stand on it: the measure, shared draws, stages."""
import gzip
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data
import deme
import dtr
import frame
import merge
import mtdiffusion
from conftest import same_tensors
from diffusion import Diffusion
from hub import UserError, read_json
from sample import load_model


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A folder like Fashion-MNIST's with 60 training and 20 test pictures of blocks."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 20)):
        pictures = rng.integers(256, size=(count, 4, 4), dtype=np.uint8).repeat(7, 1).repeat(7, 2)
        classes = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", pictures), ("labels-idx1", classes)):
            header = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    return folder


# -------------------------------------------------------------------------------------------------
# The measure

def test_kernel_distance_is_the_mean_over_all_pairs_of_different_pictures():
    a, b = (torch.randn(count, 3, dtype=torch.float64) for count in (7, 5))

    def k(x, y):
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist())) / 3 + 1) ** 3

    aa = [k(a[i], a[j]) for i in range(7) for j in range(7) if i != j]
    bb = [k(b[i], b[j]) for i in range(5) for j in range(5) if i != j]
    ab = [k(x, y) for x in a for y in b]
    expected = np.mean(aa) + np.mean(bb) - 2 * np.mean(ab)
    assert abs(frame.kernel(a, b) - expected) < 1e-9


def test_kernel_distance_of_many_features_is_that_of_all_parts():
    a = torch.randn(2100, 2, dtype=torch.float64)
    b = torch.randn(30, 2, dtype=torch.float64)
    pairs = ((a @ a.T / 2 + 1) ** 3).fill_diagonal_(0).sum() / (2100 * 2099)
    others = ((b @ b.T / 2 + 1) ** 3).fill_diagonal_(0).sum() / (30 * 29)
    expected = pairs + others - 2 * ((a @ b.T / 2 + 1) ** 3).mean()
    assert abs(frame.kernel(a, b) - expected.item()) < 1e-8


def test_the_shipped_classifier_is_small_and_sees_colours():
    assert frame.WEIGHTS.stat().st_size < 500_000
    classifier = frame.load_classifier()
    hash_, accuracy = frame.describe_classifier().split(",")[0], frame.describe_classifier()
    assert len(hash_) == 12
    assert float(accuracy.split()[1]) > 0.89
    grey = torch.rand(4, 1, 16, 16).expand(4, 3, 16, 16) * 2 - 1
    features = frame.features_of(classifier, grey)
    assert features.shape == (4, 64) and features.dtype == torch.float64
    # As bright in the mean of its channels, and yet another picture.
    coloured = grey + torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    assert not torch.allclose(features, frame.features_of(classifier, coloured), atol=0.1)
    # The order and the number of pictures change nothing: the norms have learned their numbers.
    assert torch.allclose(frame.features_of(classifier, grey.flip(0)[:2]), features[[3, 2]])


def test_a_damaged_classifier_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(frame.WEIGHTS.read_bytes()[:-100])
    with pytest.raises(UserError, match="x.safetensors"):
        frame.load_classifier(tmp_path / "x.safetensors")


def test_pictures_and_floor_come_from_the_files(fashion):
    pictures, classes = frame.load_pictures(fashion, "heldout")
    assert pictures.shape == (20, 3, 16, 16)
    assert classes.tolist() == [i % 10 for i in range(20)]
    assert (pictures[:, 0] == pictures[:, 2]).all() and pictures.abs().max() <= 1
    args = SimpleNamespace(data=fashion, count=20, draw_steps=2, precision="fp32")
    the_frame = frame.Frame(args)
    floor = the_frame.floor(draws=3)
    training, _ = frame.load_pictures(fashion, "train")
    # Pictures 0 to 9 are one of each class, and so on.
    for number in range(3):
        expected = the_frame.distances(training[20 * number:20 * number + 20])
        assert np.allclose([floor["frechet"][number], floor["kernel"][number]], expected, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# Shared weights and draws

def test_new_networks_of_a_seed_are_equal_and_begin_with_zero(tmp_path):
    paths = [frame.fresh_model(tmp_path / name, "ddpm-tiny", seed)
             for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    a, b, c = (load_model(path).unet.state_dict() for path in paths)
    assert same_tensors(a, b)
    assert not torch.equal(a["conv_in.weight"], c["conv_in.weight"])
    model = load_model(paths[0])
    assert model.native_size == 16
    assert not model.unet(torch.randn(1, 3, 16, 16), torch.tensor([5]), None).any()
    assert model.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    # What is there stays: a run may have begun from it.
    before = (tmp_path / "a" / "unet" / "config.json").stat().st_mtime_ns
    frame.fresh_model(tmp_path / "a", "ddpm-tiny", 7)
    assert (tmp_path / "a" / "unet" / "config.json").stat().st_mtime_ns == before


def test_drawn_pictures_depend_on_the_seed_and_not_on_the_batch(tmp_path):
    model = load_model(frame.fresh_model(tmp_path / "a", "ddpm-tiny", 0))
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.02)
    whole = frame.draw(model, 5, steps=2, seed=10, precision="fp32")
    parts = frame.draw(model, 5, steps=2, seed=10, precision="fp32", batch_size=2)
    later = frame.draw(model, 2, steps=2, seed=12, precision="fp32")
    assert (whole - parts).abs().max() <= 1 / 127.5
    assert (whole[2:4] - later).abs().max() <= 1 / 127.5
    assert whole.shape == (5, 3, 16, 16)
    levels = (whole + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)


def test_classes_are_drawn_equally_often_without_guidance(monkeypatch):
    calls = []

    def generate(model, task, prompts, **options):
        calls.append((task, prompts, options))
        return [data.to_pil(torch.zeros(3, 16, 16))] * len(prompts)

    monkeypatch.setattr(frame, "generate", generate)
    for task in ("class", "label"):
        model = SimpleNamespace(tasks=[task], device=torch.device("cpu"))
        frame.draw(model, 30, steps=9, seed=100, batch_size=20)
    (task, prompts, options), (_, more, later), (_, nothing, joint), _ = calls
    assert sorted(prompts + more) == sorted(list("0123456789") * 3)
    assert options["guidance"] == 1.0 and options["steps"] == 9
    assert (options["seed"], later["seed"]) == (100, 120)
    assert set(nothing) == {""} and "guidance" not in joint


def test_arms_of_a_seed_share_pictures_noise_and_timesteps(fashion):
    def examples(task, seed):
        dataset = data.open_dataset(task, "train", 16, fashion)
        return data.Examples({task: dataset}, [task], batch_size=4, seed=seed, num_timesteps=1000,
                             latent_shape=(3, 16, 16))

    first = examples("uncond", 3)
    for task in ("class", "masked", "label"):
        other = examples(task, 3)
        for number in (0, 5, 17):
            for key in ("target", "noise", "t"):
                assert torch.equal(torch.as_tensor(first[number][key]),
                                   torch.as_tensor(other[number][key]))
    assert not torch.equal(first[5]["noise"], examples("uncond", 4)[5]["noise"])


# -------------------------------------------------------------------------------------------------
# Stages

@pytest.fixture
def world(tmp_path, monkeypatch):
    """A runner whose training takes no time -> its args, and what was trained and measured."""
    class FakeFrame(frame.Frame):
        def __init__(self, args):
            self.args = args

        def floor(self):
            return dict(frechet=[0.1], kernel=[0.0])

    world = SimpleNamespace(trained=[], measured=[], rate=100.0)

    def train(words, out):
        world.trained.append((Path(out).name, shlex.join(words)))
        step = int(words[words.index("--steps") + 1])
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(dict(step=step, loss={}, images_per_s=world.rate)) + "\n")
        out.with_suffix(".txt").write_text("")

    monkeypatch.setattr(frame, "Frame", FakeFrame)
    monkeypatch.setattr(common, "train", train)
    monkeypatch.setattr(frame, "load_model", lambda folder: None)
    monkeypatch.setattr(frame, "draw", lambda *args, **options: None)
    world.args = SimpleNamespace(results=str(tmp_path / "r" / "x.json"), count=20, draw_steps=5,
                                 precision="fp32", data="somewhere", minutes=60.0,
                                 out=str(tmp_path / "runs"))

    def stage(arm, step, start=0, fails=False):
        def measure():
            world.measured.append(f"{arm}-{step}")
            if fails:
                raise KeyboardInterrupt
            return dict(frechet=[1.0 / step], kernel=[0.5])

        return frame.Stage(arm, 0, step, measure, pictures=20, start=start,
                           options="--task uncond --batch-size 10", out=tmp_path / "runs" / arm)

    world.stage = stage
    return world


def test_stages_that_are_done_are_left_out_and_the_rest_goes_on(world):
    stages = [world.stage("a", 10), world.stage("b", 10), world.stage("a", 20, 10, fails=True)]
    runner = frame.Runner(world.args, dict(steps=20))
    with pytest.raises(KeyboardInterrupt):
        runner.run(stages)
    assert world.measured == ["a-10", "b-10", "a-20"]
    rows = read_json(world.args.results)["stages"]
    assert list(rows) == ["a, seed 0, step 10", "b, seed 0, step 10"]

    stages[2] = world.stage("a", 20, 10)
    runner = frame.Runner(world.args, dict(steps=20))
    assert runner.run(stages)
    assert world.measured[3:] == ["a-20"]
    row = read_json(world.args.results)["stages"]["a, seed 0, step 20"]
    assert row["images"] == 100 and row["frechet"] == [0.05]
    # Ten steps of ten images at a hundred a second.
    assert row["train_seconds"] == 1.0
    assert frame.Runner(world.args, dict(steps=20)).run(stages)
    assert len(world.measured) == 4


def test_a_run_goes_to_the_step_of_its_stage_with_its_seed_and_data(world):
    frame.Runner(world.args, {}).run([world.stage("a", 10)])
    (name, words), = world.trained
    assert name == "a"
    for expected in ("--steps 10", "--seed 0", "--data somewhere", "--precision fp32"):
        assert expected in words


def test_no_stage_begins_that_would_end_too_late(world, capsys):
    world.args.minutes = 5.0
    world.rate = 1.0
    runner = frame.Runner(world.args, {})
    # 100 images at one a second, then 500, which are more than eight minutes.
    assert not runner.run([world.stage("a", 10), world.stage("a", 60, 10), world.stage("b", 60)])
    assert world.measured == ["a-10"]
    assert "a, seed 0, step 60 would take about 8 minutes" in capsys.readouterr().out


def test_a_run_whose_folder_is_gone_is_known_to_begin_anew(world, capsys):
    world.args.minutes = 9.0
    world.rate = 1.0
    runner = frame.Runner(world.args, {})
    assert runner.run([world.stage("a", 10)])
    second = world.stage("a", 58, 10)   # 480 images, 8 minutes; from the first step 9.7
    shutil.rmtree(second.out)
    assert not runner.run([second])
    assert "about 10 minutes" in capsys.readouterr().out
    second.out.mkdir()
    assert runner.run([second])


def test_all_work_is_announced_by_a_probe_that_leaves_nothing_behind(world, capsys):
    world.rate = 10.0
    runner = frame.Runner(world.args, {})
    runner.announce([world.stage("a", 60), world.stage("a", 120, 60)])
    assert "2 of 2 stages remain, about 2 minutes" in capsys.readouterr().out
    assert world.trained[0][0].startswith("probe-") and "--steps 20" in world.trained[0][1]
    assert not any(Path(world.args.out).iterdir())
    assert runner.results["floor"]["frechet"] == [0.1]


def test_rows_of_other_settings_are_not_mixed(world):
    frame.Runner(world.args, dict(steps=10)).run([world.stage("a", 10)])
    with pytest.raises(UserError, match="steps"):
        frame.Runner(world.args, dict(steps=20))
    world.args.count = 40
    with pytest.raises(UserError, match="count"):
        frame.Runner(world.args, dict(steps=10))


def test_the_time_of_a_stage_is_that_of_its_steps(tmp_path):
    rows = [dict(step=5, images_per_s=10.0), dict(step=10, images_per_s=20.0), dict(step=10),
            dict(step=15, images_per_s=40.0), dict(step=20, images_per_s=5.0)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = frame.Stage("a", 0, 20, dict, pictures=0, options="--batch-size 4", out=tmp_path,
                        start=10)
    # Five steps of four images each, at 40 and at 5 a second.
    assert frame.training_seconds(stage) == 20 / 40 + 20 / 5


@pytest.mark.parametrize("last, flat", [(0.5, False), (0.98, True), (1.2, True)])
def test_an_arm_is_flat_where_its_last_stage_brought_little(last, flat):
    rows = [dict(arm="plain", step=step, frechet=[value * noise]) for noise in (0.9, 1.1)
            for step, value in ((10, 9.0), (20, 1.0), (30, last))]
    assert frame.is_flat(rows, "plain") == flat
    # A step that only one seed has reached does not count.
    assert frame.is_flat([*rows, dict(arm="plain", step=40, frechet=[9.0])], "plain") == flat
    assert not frame.is_flat(rows, "other")


def test_table_and_figure_are_made_of_what_is_there(tmp_path, capsys):
    rows = [dict(arm=arm, seed=seed, step=step, measure_seconds=30.0, train_seconds=30.0,
                 frechet=[value + seed, 0.3], kernel=[value / 10])
            for arm, step, value in (("plain", 10, 4.0), ("plain", 20, 3.0), ("DTR", 10, 2.0))
            for seed in range(2)]
    rows.append(dict(arm="alone", seed=0, step=20, measure_seconds=0.0, accuracy=0.5))
    path = tmp_path / "x.json"
    path.write_text(json.dumps(dict(settings=dict(classifier="c"), floor=dict(frechet=[0.1]),
                                    stages={str(i): row for i, row in enumerate(rows)})))
    frame.report(path)
    printed = capsys.readouterr().out
    assert "| plain | 4.500 (0.707) | 3.500 (0.707) | 2 |" in printed
    assert "| DTR | 2.500 (0.707) |  | 2 |" in printed
    assert "| alone | 0.500 | 1 |" in printed
    assert "6 minutes in all" in printed
    frame.report(path, by_arm=True)
    assert (tmp_path / "x.png").stat().st_size > 5000
    with pytest.raises(UserError, match="no stage has ended"):
        frame.report(tmp_path / "y.json")


# -------------------------------------------------------------------------------------------------
# The three experiments

def options_of(stage):
    """The words of a stage's command as a dict, {"--lr": "5e-4"}."""
    words = shlex.split(stage.options)
    return dict(zip(words, words[1:]))


def test_dtr_compares_equal_runs_and_ends_one_before_the_next_begins(tmp_path):
    args = SimpleNamespace(out="runs", count=20, steps=8, seeds=3, weighted=False, adm=False)
    measure = lambda folder, draws: None  # noqa: E731
    stages = dtr.make_stages(args, measure)
    runs = [stages[i:i + 4] for i in range(0, len(stages), 4)]
    assert [(run[0].arm, run[0].seed) for run in runs] == [
        ("plain", 0), ("DTR", 0), ("R-TR", 0), ("plain", 1), ("DTR", 1), ("plain", 2), ("DTR", 2)]
    for run in runs:
        assert [(stage.start, stage.step) for stage in run] == [(0, 2), (2, 4), (4, 6), (6, 8)]
        assert len({(stage.arm, stage.seed, stage.out, stage.options) for stage in run}) == 1
    assert len({run[0].out for run in runs}) == 7
    plain, routed, random = (options_of(run[0]) for run in runs[:3])
    assert routed == plain | {"--routing": "dtr"} | {"200": "--routing"}
    assert random["--routing"] == "random"
    # Otherwise a longer run would not repeat the shorter one.
    assert plain["--lr-schedule"] == "constant"
    assert [run[3].pictures for run in runs] == [60, 20, 20, 20, 20, 20, 20]
    args.weighted = True
    assert {stage.arm for stage in dtr.make_stages(args, measure)} > {"DTR, ANT-UW"}
    args.weighted, args.adm, args.out = False, True, tmp_path
    plain, routed, halves = (stage for stage in dtr.make_stages(args, measure)
                             if stage.arm in dtr.ADM and stage.seed == 1 and stage.start == 0)
    assert routed.options == plain.options + " --routing dtr"
    assert halves.options == plain.options + " --routing halves"
    assert load_model(options_of(plain)["--model"]).tasks == ["class"]


def test_mtdiffusion_has_controls_that_differ_in_one_thing(monkeypatch):
    monkeypatch.setattr(frame, "fresh_model", lambda folder, *rest: folder)
    args = SimpleNamespace(out="runs", count=20, steps=8, seeds=2, k=3.0, data="d")
    stages = mtdiffusion.make_stages(args, None)
    assert len(stages) == 2 * 2 * 6 + 2
    arms = {stage.arm: stage.options for stage in stages if stage.options}
    assert arms["x beside z"].replace(mtdiffusion.NO_AGGREGATION, "").replace(
        mtdiffusion.NO_HEAD, "") == arms["X"]
    assert arms["M, no aggregation"].replace(mtdiffusion.NO_AGGREGATION, "") == arms["M"]
    assert "--k 3.0" in arms["M"] and "--k" not in arms["U"]
    # The same first weights for all that have the same inputs.
    second = [stage for stage in stages if stage.seed == 1 and stage.options]
    models = {stage.arm: options_of(stage)["--model"] for stage in second}
    assert models["plain"] == models["U"] == models["X"] == models["x beside z"]
    assert models["M"] == models["M, no aggregation"] != models["plain"]
    # A run ends before the next one begins.
    assert [stage.start for stage in second] == 6 * [0, 4]
    assert [stage.arm for stage in second[::2]] == list(mtdiffusion.ARMS)


def test_replacement_shows_the_network_what_is_visible_and_returns_it():
    picture = torch.rand(2, 3, 16, 16) * 0.8 + 0.1
    masked = picture.clone()
    masked[:, :, 4:8, 4:8] = 0
    diffusion = Diffusion.from_config(dict(beta_schedule="squaredcos_cap_v2"))
    seen = []

    def unet(z, t, context):
        seen.append((z.clone(), t))
        return torch.zeros_like(z)

    model = SimpleNamespace(diffusion=diffusion, unet=unet)
    restored = mtdiffusion.restore_by_replacement(model, masked, 5)
    visible = (masked != 0).all(dim=1, keepdim=True).expand_as(masked)
    assert torch.equal(restored[visible], picture[visible])
    assert len(seen) == 5
    for z, t in seen:
        signal, sigma = diffusion.signal_noise(t, z)
        noise = (z - signal * picture) / sigma
        # The same noise at every step, as DDIM has it.
        first = (seen[0][0] - diffusion.signal_noise(seen[0][1], z)[0] * picture) \
            / diffusion.signal_noise(seen[0][1], z)[1]
        assert torch.allclose(noise[visible], first[visible], atol=1e-3)


def test_patches_are_the_same_for_all_arms_and_their_error_is_counted_there_only(monkeypatch):
    pictures = torch.rand(3, 3, 16, 16) * 0.8 + 0.1
    masked = mtdiffusion.masked_pictures(pictures)
    assert torch.equal(masked, mtdiffusion.masked_pictures(pictures))
    hidden = (masked == 0).all(dim=1)
    assert 0.05 < hidden.float().mean() < 0.5

    def restore(model, masked, steps):
        # Right where it was hidden but for 0.1, wrong elsewhere.
        return torch.where(hidden[:, None], pictures + 0.1, torch.ones_like(pictures))

    monkeypatch.setattr(mtdiffusion, "restore_by_replacement", restore)
    psnr = mtdiffusion.psnr_in_patches(SimpleNamespace(tasks=["uncond"]), pictures, 5)
    assert abs(psnr - 10 * np.log10(4 / 0.01)) < 0.02


def test_deme_is_compared_at_equal_cost_with_draws_of_its_own():
    args = SimpleNamespace(out="runs", count=20, draw_steps=50, steps=5, copies=4, projection=None)
    the_frame = SimpleNamespace(measure=dict)
    both = [deme.make_tuning_stages(args, the_frame, seed) for seed in (0, 1)]
    for stages in both:
        plain, consistent, *copies = [stage for stage in stages if stage.options]
        assert "--t-range" not in plain.options and "--consistency" not in plain.options
        assert "--t-range 0 1000" in consistent.options
        ranges = ["0 250", "250 500", "500 750", "750 1000"]
        assert all(f"--t-range {words} " in stage.options for words, stage in zip(ranges, copies))
        assert plain.images == consistent.images == sum(copy.images for copy in copies)
        assert len({copy.seed for copy in copies}) == 4
        for stage in (plain, consistent, *copies):
            options = options_of(stage)
            assert options["--lr-schedule"] == "constant" and options["--warmup"] == "0"
        merged = [stage.arm for stage in stages if not stage.options]
        assert merged == ["ensemble", "merged, 1/N", "merged, searched"]
        assert {stage.step for stage in stages if stage not in copies} == {20}
    first, second = ({stage.seed for stage in stages} for stages in both)
    assert not first & second
    # The search looks at other noise than the report.
    reported = range(frame.Frame.APART, 10 * frame.Frame.APART)
    assert deme.SEARCH["seed"] not in reported


def test_merging_goes_through_the_base_and_the_copies(tmp_path):
    base = frame.fresh_model(tmp_path / "base", "ddpm-tiny", 0)
    copies = [frame.fresh_model(tmp_path / f"copy-{seed}", "ddpm-tiny", seed) for seed in (1, 2)]
    for path in copies:
        model = load_model(path)
        # A network that still computes zeros draws no picture.
        torch.nn.init.normal_(model.unet.conv_out.weight, std=0.02)
        model.save(path)
    args = SimpleNamespace(out=str(tmp_path), projection=None, precision="fp32")
    drawn = []

    class FakeFrame:
        def measure(self, model, ensemble=()):
            drawn.append((model.unet.conv_in.weight.clone(), ensemble))
            return dict(frechet=[1.0])

        classifier = frame.load_classifier()
        real = torch.randn(70, 64, dtype=torch.float64)

    merging = deme.Merging(args, FakeFrame(), copies)
    theta, *tuned = (load_model(path).unet.conv_in.weight for path in (base, *copies))
    assert torch.equal(merging.merged((0, 0)).unet.conv_in.weight, theta)
    assert torch.allclose(merging.merged((0, 1)).unet.conv_in.weight, tuned[1], atol=1e-6)
    merging.measure("merged, 1/N")
    assert torch.allclose(drawn[0][0], (tuned[0] + tuned[1]) / 2, atol=1e-6)
    merging.measure("ensemble")
    assert torch.equal(drawn[1][1][1].conv_in.weight, tuned[1])

    def search(score, n, rounds):
        best = score((0.5, 0.2))
        # The search ends with other weights than the best.
        score((0.9, 0.9))
        return (0.5, 0.2), best

    deme.SEARCH, before = dict(deme.SEARCH, count=3, steps=1), deme.SEARCH
    searching, merge.search_weights = merge.search_weights, search
    try:
        row = merging.measure("merged, searched")
    finally:
        deme.SEARCH, merge.search_weights = before, searching
    expected = theta + 0.5 * (tuned[0] - theta) + 0.2 * (tuned[1] - theta)
    assert torch.allclose(drawn[2][0], expected, atol=1e-6)
    assert row["weights"] == [0.5, 0.2]


@pytest.mark.parametrize("words, message", [
    (["--count", "15"], "--count"), (["--draw-steps", "0"], "--draw-steps"), ([], "--data")])
def test_a_mistake_is_named(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dtr.py", *words, *(["--data", "x"] if words else [])])
    with pytest.raises(UserError, match=message):
        dtr.main()


@pytest.mark.slow
def test_dtr_from_runs_to_table(fashion, tmp_path, monkeypatch, capsys):
    words = ["--data", fashion, "--steps", 8, "--seeds", 1, "--count", 20, "--draw-steps", 2,
             "--out", tmp_path / "runs", "--results", tmp_path / "x.json"]
    monkeypatch.setattr(sys, "argv", ["dtr.py", *map(str, words)])
    dtr.main()
    rows = read_json(tmp_path / "x.json")["stages"].values()
    assert {row["arm"] for row in rows} == {"plain", "DTR", "R-TR"}
    assert all(np.isfinite(row["frechet"][0]) for row in rows)
    assert "| plain |" in capsys.readouterr().out
