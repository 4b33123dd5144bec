"""Rows of benchmark.py about whole models, at their released sizes and with random weights.

    memory   the peak while one guided picture of the model's own size is drawn in bf16
    encoded  the training step of edit, upcycled, with the frozen encoders' work (two pictures and a
             text, which `data.py encode` does once) against without
    pictures 16 JPEG files opened, cropped and resized to 512 x 512 on one core, beside Pillow,
             which opens and resizes them without a crop
    merge    four copies of the U-Net's file merged into a fifth: seconds and peak memory, beside
             reading the five files and writing one; needs six files' room in the folder
"""
import os
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image

import timing
import clip
import merge
import moe
import readers
from data import ASSETS, to_tensor
from hub import pick_device
from sample import Model, generate, load_model
from unet import CONFIGS, UNet
from vae import CONFIGS as VAE_CONFIGS, VAE

TEXT_TOWERS = {"tiny": ["tiny"], "sd15": ["clip_l"], "sdxl": ["clip_l", "clip_bigg"]}
CPU = torch.device("cpu")


def random_model(size, device, dtype):
    """All parts of a model at their released sizes, with random weights."""
    tiny = load_model(ASSETS / "tiny")
    with torch.device("meta"):
        towers = [clip.CLIPText({**clip.CONFIGS[name], "vocab_size": 49408})
                  for name in TEXT_TOWERS[size]]
        parts = [UNet(CONFIGS[size]), VAE(VAE_CONFIGS[size]), *towers]
    for part in parts:
        part.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for p in part.parameters():
            p.normal_(std=0.02)
    second = dict(text_encoder_2=towers[1], tokenizer_2=tiny.tokenizer) if towers[1:] else {}
    return Model(parts[0], parts[1], towers[0], tiny.tokenizer, tiny.scheduler, {}, **second)


def memory_rows(args):
    device = pick_device()
    before = timing.peak_memory(device, reset=True)
    model = random_model(args.size, device, torch.bfloat16)
    parts = [model.unet, model.vae, *[encoder for _, encoder in model.texts]]
    weights = sum(p.nbytes for part in parts for p in part.parameters()) / 1e9
    # One step is enough: the second needs no more memory than the first.
    timing.peak_memory(device, reset=True)
    generate(model, "t2i", ["pizza"], guidance=7.5, steps=1)
    print(f"{args.size}, one picture of {model.native_size} x {model.native_size} in bf16 on "
          f"{device}: weights {weights:.2f} GB, peak {timing.peak_memory(device) - before:.2f} GB")


def encoded_rows(args):
    device = pick_device()
    model = random_model(args.size, device, torch.float32)
    unet = moe.upcycle(model.unet)
    side, size = unet.config["sample_size"], model.native_size
    x, t = torch.randn(1, 8, side, side, device=device), torch.full((1,), 500, device=device)
    task = torch.ones(1, dtype=torch.long, device=device)  # edit
    picture = torch.rand(1, 3, size, size, device=device) * 2 - 1
    context, pooled = model.encode_text(["make it snow"])

    def step():
        timing.backward(unet, unet(x, t, context, task=task, added=model.added(pooled, size, size)))

    def encode_and_step():
        with torch.no_grad():
            model.vae.encode(picture)
            model.vae.encode(picture)
            model.encode_text(["make it snow"])
        step()
    timing.print_ratio(f"{args.size}, edit, {size} x {size}", encode_and_step, step, args.runs)


def picture_rows(args):
    torch.set_num_threads(1)
    # InstructPix2Pix's pictures have 512 x 512 pixels, and training cuts a part out of them.
    sizes = ((512, 512, 1.06), (640, 480, 1), (1280, 960, 1), (2040, 1356, 1))
    for width, height, enlarge in sizes:
        with tempfile.TemporaryDirectory() as folder:
            # Smooth structure and a little grain compress about as photographs do.
            paths = [Path(folder) / f"{i}.jpg" for i in range(16)]
            for path in paths:
                coarse = Image.effect_noise((width // 16, height // 16), 90).convert("RGB")
                picture = coarse.resize((width, height), Image.BICUBIC)
                grain = Image.effect_noise((width, height), 20).convert("RGB")
                Image.blend(picture, grain, 0.1).save(path, quality=90)

            def ours():
                for path in paths:
                    to_tensor(readers.open_square(path, 512, readers.Frame(enlarge)))

            def pillow():
                for path in paths:
                    picture = Image.open(path).convert("RGB").resize((512, 512), Image.BICUBIC)
                    to_tensor(picture)
            timing.print_ratio(f"16 JPEGs of {width} x {height} to 512", ours, pillow, args.runs)


def merge_rows(args):
    with tempfile.TemporaryDirectory(dir=".") as folder:
        first, *tuned = folders = [Path(folder) / name for name in "ABCDE"]
        UNet(CONFIGS[args.size]).save_pretrained(first / "unet")
        (first / "model_index.json").write_text("{}")
        for other in tuned:
            shutil.copytree(first, other)
        files = [other / "unet/diffusion_pytorch_model.safetensors" for other in folders]
        os.sync()  # what was just written shall not be timed with what follows

        def read_and_write():
            for file in files:
                with open(file, "rb") as opened:
                    while opened.read(2 ** 26):
                        pass
            shutil.copyfile(files[0], Path(folder) / "copy")
            os.sync()

        def merge_all():
            merge.merge_folders(first, tuned, [0.1, 0.2, 0.3, 0.4], Path(folder) / "merged")
            os.sync()

        disk = timing.seconds(read_and_write)
        before = timing.peak_memory(CPU, reset=True)
        took = timing.seconds(merge_all)
        size = files[0].stat().st_size / 1e9
        print(f"{args.size}, five files of {size:.2f} GB: merged in {took:.1f} s, read and written "
              f"in {disk:.1f} s, ratio {took / disk:.2f}; peak memory "
              f"{timing.peak_memory(CPU) - before:.2f} GB")


# Group of rows -> its function, and the names of its two columns.
ROWS = {"memory": (memory_rows, "", ""), "encoded": (encoded_rows, "encodes", "encoded"),
        "pictures": (picture_rows, "ours", "Pillow"), "merge": (merge_rows, "", "")}
