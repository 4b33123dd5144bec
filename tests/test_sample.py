"""Drawing: diffusers' picture, the shipped models, seeds, sizes, folders, bad input."""
import copy
import json
import math
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import adm
import aggregation
import moe
import sample
import vae
from clip import CONFIGS as TEXT, CLIPText
from conftest import assert_mistake, call, full_disk, refused, same_tensors
from data import ALL, ASSETS, EXAMPLES, on_white, open_image
from hub import read_json, write_json
from sample import generate, load_model, pipeline_index, sample_grid
from unet import CONFIGS, UNet


@pytest.fixture(scope="module")
def tiny():
    return load_model(ASSETS / "tiny")


@pytest.fixture(scope="module")
def mtu():
    return load_model(ASSETS / "tiny-mtu")


def example(task):
    """The prompt and the picture, or None, that a task draws without arguments."""
    image, prompt = EXAMPLES[task]
    return prompt, open_image(ASSETS / "examples" / image) if image else None


def flat(picture, size=(64, 64)):
    """What diffusers is given: the picture on white, at the model's size."""
    return on_white(picture.convert("RGBA")).resize(size, Image.BICUBIC)


def difference(a, b):
    """Mean absolute difference of two pictures, of 255."""
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------
# The same picture as diffusers

@pytest.mark.parametrize("prompt, guidance", [("red apple, google style", 7.5), ("", 1.0)])
def test_the_shipped_base_draws_diffusers_picture(tiny, prompt, guidance):
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(ASSETS / "tiny"))
    theirs = pipe(prompt, num_inference_steps=8, guidance_scale=guidance,
                  generator=generator(3)).images[0]
    ours = generate(tiny, "t2i", prompt, guidance=guidance, steps=8, seed=3)[0]
    assert difference(ours, theirs) < 1


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """SDXL's structure at reduced widths, random weights, as diffusers and transformers write it.

    The vocabulary of its text towers is assets/tiny's.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "xl"
    first_tokenizer, second_tokenizer = (
        transformers.CLIPTokenizer.from_pretrained(ASSETS / "tiny" / "tokenizer") for _ in range(2))
    second_tokenizer.pad_token = "!"
    text = dict(vocab_size=len(first_tokenizer), num_hidden_layers=3,
                bos_token_id=first_tokenizer.bos_token_id,
                eos_token_id=first_tokenizer.eos_token_id, num_attention_heads=4)
    unet = diffusers.UNet2DConditionModel(**CONFIGS["sdxl"] | dict(
        sample_size=8, block_out_channels=(32, 64, 64), attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 2, 3), cross_attention_dim=32 + 48,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8))
    with torch.no_grad():
        unet.add_embedding.linear_2.weight *= 30  # so that a wrong size or pooled text shows
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32), norm_num_groups=8, sample_size=64,
        scaling_factor=0.13025, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading")
    first = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        **text, hidden_size=32, intermediate_size=64))
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        **text, hidden_size=48, intermediate_size=96, projection_dim=24, hidden_act="gelu"))
    diffusers.StableDiffusionXLPipeline(vae, first, second, first_tokenizer, second_tokenizer, unet,
                                        scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("negative", ["", "dog face"])
def test_sdxl_draws_diffusers_picture(sdxl, negative):
    import diffusers
    pipe = quiet(diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl))
    model = load_model(sdxl)
    assert model.diffusion.sampler == "euler" and model.native_size == 64
    for width, guidance in ((64, 5.0), (96, 1.0)):
        theirs = pipe("red apple!", negative_prompt=negative or None, num_inference_steps=6,
                      guidance_scale=guidance, height=64, width=width,
                      generator=generator(3)).images[0]
        ours = generate(model, "t2i", "red apple!", negative_prompt=negative, guidance=guidance,
                        steps=6, seed=3, height=64, width=width)[0]
        assert difference(ours, theirs) < 0.05


@pytest.mark.parametrize("name, sampler", [
    ("DDIMScheduler", "ddim"), ("EulerAncestralDiscreteScheduler", "euler-a"),
    ("DPMSolverMultistepScheduler", "dpm++")])
def test_a_folded_edit_draws_what_instruct_pix2pix_draws(mtu, tmp_path, name, sampler):
    """With the scheduler that its folder names; InstructPix2Pix's own is Euler's ancestral one."""
    folded = replace(mtu, unet=moe.fold(mtu.unet, "edit"))
    folded.index = pipeline_index(folded)
    folded.save(tmp_path)
    scheduler = getattr(diffusers, name).from_config(folded.scheduler)
    scheduler.save_pretrained(tmp_path / "scheduler")
    pipe = quiet(diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        tmp_path, scheduler=scheduler))
    model = load_model(tmp_path)
    assert model.diffusion.sampler == sampler
    prompt, image = example("edit")
    theirs = pipe(prompt, image=flat(image), num_inference_steps=6, guidance_scale=3.0,
                  image_guidance_scale=1.5, generator=generator(1)).images[0]
    ours, whole = (generate(each, "edit", prompt, image, steps=6, guidance=3.0, image_guidance=1.5,
                            sampler=sampler, seed=1)[0] for each in (model, mtu))
    assert difference(ours, theirs) < 1
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(whole, dtype=int)).max() <= 2


def change(path, **entries):
    """Change a JSON file; None takes an entry out."""
    value = read_json(path) | entries
    write_json(path, {key: entry for key, entry in value.items() if entry is not None})


@pytest.fixture
def folder(tmp_path):
    """A copy of assets/tiny, to be changed."""
    return shutil.copytree(ASSETS / "tiny", tmp_path / "model")


@pytest.mark.parametrize("name, version", [
    *[("StableDiffusionPipeline", version) for version in ("0.3.0", "0.8.1", "0.9.0.dev0", None)],
    ("StableDiffusionImg2ImgPipeline", "0.6.0"),
    ("StableDiffusionInstructPix2PixPipeline", "0.6.0")])
def test_an_old_files_sample_size_is_corrected_where_diffusers_does(folder, name, version):
    """SD 1.4's first config said 32, for a model of 512 x 512 pixels."""
    import diffusers
    change(folder / "unet" / "config.json", _diffusers_version=version)
    change(folder / "model_index.json", _class_name=name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == name
    ours = load_model(folder).native_size
    assert ours == pipe.unet.config.sample_size * 4 and ours in (64, 256)


def test_a_scheduler_that_is_not_implemented_matters_only_for_its_own_stepping(folder, tiny):
    change(folder / "scheduler" / "scheduler_config.json", _class_name="UniPCMultistepScheduler")
    model = load_model(folder)
    with refused("UniPC.*--sampler"):
        generate(model, "t2i", "red apple", steps=2)
    a = generate(model, "t2i", "red apple", steps=2, sampler="ddim")[0]
    assert a.tobytes() == generate(tiny, "t2i", "red apple", steps=2, sampler="ddim")[0].tobytes()


def test_sdxl_is_upcycled_trained_folded_and_opened_by_diffusers(sdxl, tmp_path):
    import diffusers
    for size, name in ((64, "a.png"), (80, "b.png")):
        example("edit")[1].convert("RGB").resize((size, size)).save(tmp_path / name)
    rows = [dict(file_name="a.png", source_file_name="b.png", text="make it blue", split="train"),
            dict(file_name="b.png", source_file_name="a.png", text="make it blue", split="heldout")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = call("train.py", "--model", sdxl, "--task", "edit,t2i", "--data", tmp_path,
                "--steps", 1, "--batch-size", 2, "--eval-size", 1, "--sample-every", 0,
                "--lr", 1e-2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = call("moe.py", "--fold", "edit", "--model", tmp_path / "run", "--out", tmp_path / "edit")
    assert done.returncode == 0, done.stderr
    pipe = quiet(diffusers.StableDiffusionXLInstructPix2PixPipeline.from_pretrained(
        tmp_path / "edit"))
    picture = Image.open(tmp_path / "a.png")
    theirs = pipe("make it blue", image=picture, num_inference_steps=4, guidance_scale=3.0,
                  image_guidance_scale=1.5, height=64, width=64, generator=generator(1)).images[0]
    for folder in (tmp_path / "run", tmp_path / "edit"):
        ours = generate(load_model(folder), "edit", "make it blue", picture, steps=4, guidance=3.0,
                        image_guidance=1.5, seed=1)[0]
        assert difference(ours, theirs) < 0.5


def test_a_hub_id_draws_as_its_folder(sdxl, monkeypatch):
    """What is downloaded is tested in test_hub.py."""
    folders = {"owner/xl": sdxl, "owner/tuned": ASSETS / "tiny-mtu"}
    monkeypatch.setattr("hub.download", lambda name, part: (folders[name], set()))
    a, b = (generate(load_model(name), "t2i", "pizza", steps=2)[0] for name in (sdxl, "owner/xl"))
    assert a.tobytes() == b.tobytes()
    with refused("owner/tuned: model_index.json names a base.*download"):
        load_model("owner/tuned")


# -------------------------------------------------------------------------------------------------
# Properties of a drawing

def test_an_ensemble_gives_each_step_to_the_copy_of_its_range(tiny):
    calls = []

    class Copy:
        def __init__(self, name):
            self.name = name

        def __call__(self, z, t, *args, **options):
            calls.append((self.name, int(t[0])))
            return tiny.unet(z, t, *args, **options)
    alone = generate(tiny, "t2i", "pizza", steps=8)[0]
    together = generate(tiny, "t2i", "pizza", steps=8, ensemble=[Copy(i) for i in range(4)])[0]
    assert together.tobytes() == alone.tobytes()
    assert calls == [(t * 4 // 1000, t) for t in tiny.diffusion.timesteps(8)]
    assert {name for name, _ in calls} == {0, 1, 2, 3}


def test_half_precision_draws_nearly_the_same(mtu):
    """Weights and arithmetic in bf16."""
    prompt, image = example("edit")
    model = load_model(ASSETS / "tiny-mtu", torch.bfloat16)
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    a, b = (generate(each, "edit", prompt, image, steps=4)[0] for each in (mtu, model))
    assert 0 < difference(a, b) < 5


@pytest.mark.parametrize("task", ALL)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_picture(mtu, task):
    prompt, image = example(task)
    a, b, c = (generate(mtu, task, prompt, image, steps=4, seed=seed)[0] for seed in (0, 0, 1))
    assert a.tobytes() == b.tobytes() != c.tobytes()


def test_a_picture_does_not_depend_on_its_batch(mtu):
    prompt, image = example("edit")
    batch = generate(mtu, "edit", [prompt] * 3, [image] * 3, steps=4, seed=5)
    alone = generate(mtu, "edit", prompt, image, steps=4, seed=6)[0]
    assert np.abs(np.asarray(batch[1], dtype=int) - np.asarray(alone, dtype=int)).max() <= 2


@pytest.mark.parametrize("task, steps", [("edit", 4), ("t2i", 1)])
def test_guidance_of_at_most_one_is_the_conditional_model(mtu, task, steps):
    """All branches at scales 1, 1 (forced by a hair) give what one branch gives, and so does 0.

    The second case is how SD-Turbo is used, one step with a guidance of 0.
    """
    prompt, image = example(task)

    def draw(guidance):
        options = dict(steps=steps, guidance=guidance, image_guidance=1.0)
        return np.asarray(generate(mtu, task, prompt, image, **options)[0], dtype=int)
    one, zero, branches = (draw(guidance) for guidance in (1.0, 0.0, 1.0 + 1e-7))
    assert (one == zero).all() and np.abs(one - branches).max() <= 2


def test_strength_keeps_or_changes_the_picture(mtu):
    image = example("edit")[1]

    def distance(strength):
        drawn = generate(mtu, "t2i", "red apple, google style", image, strength=strength, steps=10)
        return difference(drawn[0], flat(image))
    assert distance(0.1) < 0.5 * distance(1.0)


@pytest.mark.parametrize("size", [(64, 96), (48, 40)])
def test_sizes(mtu, size):
    picture = generate(mtu, "t2i", "x", height=size[0], width=size[1], steps=1)[0]
    assert picture.size == size[::-1]


def test_a_picture_keeps_its_shape(mtu):
    wide = Image.new("RGBA", (300, 150), "red")
    assert generate(mtu, "sr", "", wide, steps=1)[0].size == (64, 32)


def test_long_prompts_warn(mtu, capsys):
    generate(mtu, "t2i", "apple " * 80 + "zebra", steps=1)
    assert "zebra" in capsys.readouterr().err


@pytest.mark.parametrize("like", ["t2i", "edit"])
def test_a_task_added_later_draws_as_its_model_did(mtu, like):
    image = Image.new("RGB", (64, 64)) if like == "edit" else None
    model = replace(mtu, unet=copy.deepcopy(mtu.unet), index=mtu.index | {"guidance": {}})
    moe.add_task(model.unet, "later", like=like)
    drawn, before = (np.asarray(generate(model, task, "pizza", image, steps=2)[0])
                     for task in ("later", like))
    assert np.array_equal(drawn, before)


# -------------------------------------------------------------------------------------------------
# Nothing that is no picture is drawn without a word

FAULTS = {
    "not a number": lambda y: y * torch.nan,
    "infinity": lambda y: y / 0,
    "zeros": lambda y: 0 * y,
    "one sample": lambda y: torch.cat([y[:-1], y[-1:] * torch.nan]),
}


@pytest.mark.parametrize("part, module", [
    ("text_encoder", "text_model.final_layer_norm"), ("unet", "conv_out"), ("vae", "quant_conv"),
    ("vae", "decoder.conv_out")])
def test_a_part_that_computes_no_signal_is_named(mtu, part, module):
    """The autoencoder lies in the folder's base."""
    prompt, image = example("edit")
    place = ASSETS / "tiny-mtu" / "../tiny" if part == "vae" else ASSETS / "tiny-mtu"
    network = getattr(mtu, part).get_submodule(module)
    for fault in FAULTS.values():
        hook = network.register_forward_hook(lambda module, inputs, y: fault(y))
        with refused(f"the {part} of {place} computes"):
            generate(mtu, "edit", [prompt] * 2, [image] * 2, steps=1, guidance=1.0)
        hook.remove()


@pytest.mark.parametrize("part, key", [("unet", "conv_in.weight"), ("vae", "decoder.conv_in.bias"),
                                       ("text_encoder_2", "text_projection.weight")])
def test_weights_of_nan_write_no_file(sdxl, tmp_path, part, key):
    model = load_model(sdxl)
    getattr(model, part).get_parameter(key).data.fill_(torch.nan)
    model.save(tmp_path / "model")
    out = tmp_path / "out.png"
    done = call("sample.py", "--model", tmp_path / "model", "--steps", 1, "--out", out)
    assert_mistake(done, f"the {part} of {tmp_path / 'model'}")
    assert not out.exists()


def test_a_copy_of_an_ensemble_that_computes_no_signal_is_named(tiny):
    copies = [tiny.unet, lambda *inputs, **options: torch.full((1, 4, 16, 16), torch.inf)]
    with refused("unet of copy 2 of the ensemble"):
        generate(tiny, "t2i", "pizza", steps=2, guidance=1.0, ensemble=copies)


@pytest.mark.parametrize("guidance", ["high", {"t2i": 7.5}, {"t2i": ["a", "b"]},
                                      {"t2i": [1, 2, 3]}, {"t2i": [math.nan, 1]},
                                      {"t2i": [1, 10 ** 400]}, {"t2i": [1, -math.inf]}])
def test_a_folder_whose_guidance_is_no_pair_of_numbers_is_named(tiny, guidance):
    model = replace(tiny, index=tiny.index | {"guidance": guidance})
    with refused("model_index.json, guidance"):
        generate(model, "t2i", "pizza", steps=1)


# -------------------------------------------------------------------------------------------------
# The command

def draw(out, *words):
    """Run sample.py without a mistake -> what it prints, and the picture."""
    done = call("sample.py", *words, "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, Image.open(out)


def test_many_pictures_are_drawn_in_batches_and_fit_on_a_sheet(tmp_path, monkeypatch):
    batches = []

    def blank(model, task, prompts, *args, seed, **options):
        batches.append((seed, len(prompts)))
        return [Image.new("RGB", (64, 64))] * len(prompts)
    monkeypatch.setattr(sample, "generate", blank)
    draw(tmp_path / "a.png", "--num-images", 40, "--seed", 5)
    assert batches == [(5, 16), (21, 16), (37, 8)]
    done = call("sample.py", "--num-images", 10_000, "--width", 128, "--height", 128)
    assert_mistake(done, "at most 6103 fit")
    assert len(batches) == 3


def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(tmp_path, tiny):
    out = tmp_path / "a.png"
    strip = tmp_path / "a-trajectory.png"
    for size, path in ((1000, out), (20_000, strip)):  # the second has room for the picture
        with full_disk(size):
            done = call("sample.py", "--steps", 5, "--out", out, "--trajectory")
        assert done.returncode == 2
        # The bar has left the line in which the error stands.
        assert done.stderr.rpartition("\r")[2].startswith(f"error: {path} cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and Image.open(out)
    dataset = [dict(prompt="", target=torch.rand(3, 64, 64))]
    with full_disk(1000), refused("grid.png cannot be written"):
        sample_grid(tiny, {"t2i": dataset}, 1, 0, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_the_command_writes_a_picture_and_a_strip(tmp_path):
    """A prompt alone meets the shipped picture."""
    out = tmp_path / "a" / "b.png"
    printed, picture = draw(out, "--task", "edit", "--steps", 3, "--num-images", 2, "--trajectory",
                            "--prompt", "make it a man")
    assert str(out) in printed and "edit.png" in printed
    assert picture.size in ((64, 128), (128, 64))
    assert json.loads(picture.text["arguments"])["steps"] == 3
    assert Image.open(tmp_path / "a" / "b-trajectory.png").size == (3 * 64, 2 * 64)


def test_side_by_side_shows_the_source_and_the_result(tmp_path):
    alone, both = (np.asarray(draw(tmp_path / "a.png", "--task", "edit", "--steps", 1, *option)[1])
                   for option in ([], ["--side-by-side"]))
    assert both.shape == (64, 128, 3) and (both[:, 64:] == alone).all()
    assert (both[:, :64] == np.asarray(flat(example("edit")[1]))).all()


def test_several_prompts_make_a_grid_with_a_row_each(tmp_path):
    printed, picture = draw(tmp_path / "grid.png", "--steps", 1, "--num-images", 3,
                            "--prompt", "red apple", "--prompt", "blue book")
    assert picture.size == (3 * 64, 2 * 64) and "'red apple', 'blue book'" in printed


def test_an_examples_instruction_is_never_applied_to_ones_own_picture(tmp_path):
    words = ["--steps", 1, "--image", ASSETS / "examples" / "sr.png", "--task"]
    done = call("sample.py", *words, "edit", "--out", tmp_path / "a.png")
    assert_mistake(done, "--prompt")
    assert not list(tmp_path.iterdir())
    draw(tmp_path / "a.png", *words, "sr")


@pytest.mark.parametrize("arguments, words", [
    (["--image", "nothing.png", "--task", "edit", "--prompt", "x"], "nothing.png"),
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--task", "colorize"], "colorize"),
    (["--out", "a.jpg"], "a.jpg"),
    (["--num-images", "0"], "--num-images"),
    (["--num-images", "1000000000"], "--num-images: 1000000000 is not from 1 to 10000"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2 ** 62)], "from 0 to 1e+18"),
    (["--steps", "1e9"], "--steps"),
    (["--steps", "0"], "steps = 0"),
    (["--steps", "1000000000"], "steps = 1000000000"),
    (["--steps", "1000000000", "--sampler", "dpm++-karras"], "steps = 1000000000"),
    (["--device", "nonsense"], "nonsense")])
def test_a_mistake_is_one_line_and_exit_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = call("sample.py", *arguments)
    assert_mistake(done, words)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, words", [
    (dict(task="colorize"), "t2i, edit, sr, inpaint"),
    (dict(task="edit", images=None, strength=None), "--image"),
    (dict(strength=None), "strength"),
    (dict(strength=float("nan")), "strength"),
    (dict(strength=0.5, images=None), "picture"),
    (dict(strength=0.0), "strength"),
    (dict(strength=1.5), "strength"),
    (dict(height=60), "multiples of 8"),
    (dict(height=-8), "multiples of 8"),
    (dict(steps=0), "steps"),
    (dict(steps=2000), "steps"),
    (dict(sampler="magic"), "magic"),
    (dict(guidance=float("nan")), "finite")])
def test_bad_requests_are_refused(mtu, options, words):
    image = [Image.new("RGB", (64, 64))]
    arguments = dict(task="t2i", images=image, strength=0.5, steps=10) | options
    with refused(words):
        generate(mtu, prompts=["x"], **arguments)


def test_generate_on_a_model_with_heads_refuses_what_it_would_ignore(tiny):
    """And its callback has four arguments, as for every other model."""
    model = load_model(ASSETS / "tiny")
    aggregation.prepare(model, "translate", "source")
    seen = []
    (drawn,) = generate(model, "translate", "", steps=2,
                        callback=lambda i, t, x, x0: seen.append((i, t)))
    assert drawn.size == (64, 64) and [i for i, _ in seen] == [0, 1]
    for options in (dict(prompts="a cat"), dict(images=[Image.new("RGB", (64, 64))]),
                    dict(guidance=9.0), dict(image_guidance=2.0), dict(guidance_rescale=0.7),
                    dict(strength=0.3), dict(negative_prompt="a dog"), dict(ensemble=[tiny.unet])):
        with refused("translate reads no"):
            generate(model, "translate", **{"prompts": "", "steps": 1} | options)


def test_a_model_that_reads_no_text_refuses_a_prompt(tmp_path):
    """The test's miniature is DDPM's; a network that draws classes takes their names instead."""
    net = adm.UNet2D(adm.CONFIGS["ddpm-tiny"])
    model = sample.Model(net, adm.Pixels(net.config["sample_size"]), None, None,
                         adm.scheduler_for(net.config, "linear"), {}, path="a/b")
    assert generate(model, "uncond", "", steps=1)
    for prompts, options in (("cat", {}), (["", "cat"], {}), ("", dict(negative_prompt="cat"))):
        with refused("^a/b reads no text, so a prompt would do nothing$"):
            generate(model, "uncond", prompts, steps=1, **options)


def test_the_base_knows_only_text_to_image(tiny):
    with refused("t2i"):
        generate(tiny, "edit", "x", Image.new("RGB", (64, 64)))


# -------------------------------------------------------------------------------------------------
# Folders that are wrong

@pytest.mark.parametrize("part, config, words", [
    ("unet", dict(in_channels=9), "in_channels of the U-Net is 9"),
    ("unet", dict(out_channels=3), "out_channels of the U-Net is 3"),
    ("unet", dict(cross_attention_dim=32), "cross_attention_dim of the U-Net is 32"),
    ("unet", dict(sample_size=None), "sample_size"),
    ("unet", dict(sample_size=10 ** 6), "sample_size of the U-Net is 1000000, .* from 1 to 2048"),
    ("unet", dict(sample_size=0), "sample_size of the U-Net is 0, .* from 1 to 2048"),
    ("vae", dict(sample_size=0), "sample_size of the vae is 0, .* from 16 to 8192"),
    ("vae", dict(sample_size=15), "sample_size of the vae is 15"),
    ("text_encoder", dict(vocab_size=100, eos_token_id=99, bos_token_id=98), "vocab_size"),
    ("text_encoder", dict(max_position_embeddings=16), "max_position_embeddings"),
    # The vocabulary of another model, which would read other words.
    ("text_encoder", dict(eos_token_id=2000), "eos_token_id of the text encoder is 2000")])
def test_parts_that_do_not_fit_are_named(folder, part, config, words):
    shutil.rmtree(folder / part)
    kind, tiny = dict(unet=(UNet, CONFIGS), vae=(vae.VAE, vae.CONFIGS),
                      text_encoder=(CLIPText, TEXT))[part]
    kind(tiny["tiny"] | config).save_pretrained(folder / part)
    with refused(words):
        load_model(folder)


def test_parts_that_are_missing_are_saved_again_and_no_others(folder, tiny):
    for name in ("vae", "tokenizer"):
        shutil.rmtree(folder / name)
    stays = folder / "text_encoder" / "config.json"
    stays.write_text("{}")
    tiny.save(folder, unet_only=True)
    assert stays.read_text() == "{}"
    tiny.save(folder)
    for module, again in zip(tiny.modules, load_model(folder).modules, strict=True):
        assert same_tensors(again.state_dict(), module.state_dict())
