"""Draw: any task, any model folder or hub id.

    python sample.py --task edit                       shipped model, shipped picture, an instruction
    python sample.py --task t2i --prompt "red apple, google style" --prompt "dog face, twitter style" --num-images 4
    python sample.py --task edit --image cat.png --prompt "make it snow" --model runs/all

`load_model` rebuilds a model with its methods from disk; `generate` draws with it. Letters: B batch, K guidance branches.
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import moe
from clip import CLIPText, Tokenizer
from data import ASSETS, SOURCE, TARGET, TASKS, latents, on_white, open_image, to_pil, to_tensor
from diffusion import Diffusion, ddim, guide, partway, randn, seeded
from routing import add_routing
from unet import UNet, UserError, blaming, command, fetch, read_json, write_file
from vae import VAE

EXAMPLES = {  # what a task draws when nothing is given
    "t2i": (None, "red apple, google style"),
    "edit": ("edit.png", "give it dark skin"),
    "sr": ("sr.png", ""),
    "inpaint": ("inpaint.png", "remove the thumbs up sign on the left"),
}


@dataclass
class Model:
    """Everything that drawing needs. index is the folder's model_index.json."""
    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Tokenizer
    scheduler: dict
    index: dict

    @property
    def diffusion(self):
        return Diffusion.from_config(self.scheduler)

    @property
    def tasks(self):
        """Task names in the order of the U-Net's rows; a U-Net that is not upcycled does one, told by its input channels."""
        if "moe" in self.unet.config:
            return self.unet.config["moe"]["tasks"]
        return ["t2i"] if self.unet.config["in_channels"] == self.unet.config["out_channels"] else ["edit"]

    @property
    def native_size(self):
        return self.unet.config["sample_size"] * self.vae.factor

    def to(self, device):
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(device)
        return self


def load_model(path_or_hub_id):
    """A folder in the Hugging Face layout, or a hub id -> Model, in eval mode.

    A folder may hold only what differs from another model: model_index.json's "base" (a path relative to the folder, or a
    hub id) then says where the other parts are.
    """
    index = read_json(fetch(path_or_hub_id, "") / "model_index.json")
    base, folder = path_or_hub_id, Path(path_or_hub_id)
    with blaming(f"{path_or_hub_id}: model_index.json"):
        if "base" in index:
            base = folder / index["base"] if (folder / index["base"]).exists() else index["base"]
        for text_scale, image_scale in index.get("guidance", {}).values():
            text_scale + image_scale

    def place(part):
        return path_or_hub_id if "base" not in index or (folder / part).exists() else base

    config = read_json(fetch(place("unet"), "unet") / "config.json")
    routing = config.pop("routing", None)
    if "moe" not in config and routing:
        config.pop("_class_name")
    unet = (moe if "moe" in config else UNet).from_pretrained(place("unet"), config=config)
    if routing:
        with blaming(f'{path_or_hub_id}: unet/config.json, "routing"'):
            add_routing(unet, **routing)
    model = Model(unet, VAE.from_pretrained(place("vae")), CLIPText.from_pretrained(place("text_encoder")),
                  Tokenizer.from_pretrained(place("tokenizer")),
                  read_json(fetch(place("scheduler"), "scheduler") / "scheduler_config.json"), index)
    u, text, T = unet.config, model.text_encoder.config, model.diffusion.T
    for fits, parts in (
            (u["sample_size"] is not None, "the U-Net's sample_size, which is null"),
            (u["addition_embed_type"] is None, "the U-Net's addition_embed_type: Stable Diffusion XL is not implemented here yet"),
            (u["in_channels"] in (u["out_channels"], 2 * u["out_channels"]), f"the U-Net's {u['in_channels']} input channels: 4 or 8 are"),
            (u["out_channels"] == model.vae.config["latent_channels"], "the U-Net's out_channels and the VAE's latent_channels"),
            (u["cross_attention_dim"] == text["hidden_size"], "the U-Net's cross_attention_dim and the text encoder's hidden_size"),
            (max(model.tokenizer.vocab.values()) < text["vocab_size"], "the tokenizer's vocabulary and the text encoder's"),
            (model.tokenizer.length <= text["max_position_embeddings"], "the tokenizer's length and the text encoder's positions"),
            (routing is None or routing["num_steps"] == T, "the routing's num_steps and the scheduler's num_train_timesteps")):
        if not fits:
            raise UserError(f"{path_or_hub_id}: cannot draw with {parts}" + (" that differ" if " and " in parts else ""))
    for module in (model.unet, model.vae, model.text_encoder):
        module.eval()
    return model


@torch.no_grad()
def generate(model, task, prompts, images=None, negative_prompt="", guidance=None, image_guidance=None, steps=20, eta=0.0, strength=None,
             height=None, width=None, seed=0, callback=None):
    """Draw one picture per prompt with DDIM -> list of PIL images. Picture i has seed `seed + i`, whatever the batch around it.

    images: PIL pictures, one per prompt: the source of an image-to-image task, or with strength in (0, 1] the start (SDEdit).
    guidance, image_guidance: text and image scale, 1 and 1 is none; default what model_index.json says under "guidance", else the
        paper's for the task (data.TASKS).
    height, width: multiples of 8; default the model's size, for given pictures with their shape.
    callback(i, t, x_t, x0): each step's latents, scaled.
    """
    if isinstance(prompts, str) or images and len(images) != len(prompts):
        raise ValueError("prompts is a list of strings, images a list of as many pictures")
    if task not in model.tasks:
        raise UserError(f"this model does not know the task {task!r}; it knows {', '.join(model.tasks)}")
    rule, B, device = TASKS.get(task, TASKS["edit"]), len(prompts), next(model.unet.parameters()).device
    if rule.source and not images:
        raise UserError(f"task {task} needs a picture: --image FILE")
    if strength is not None and not images:
        raise UserError("strength needs a picture to start from: --image FILE")
    if images and not rule.source and strength is None:
        raise UserError(f"task {task} takes a picture only to start from: give --strength too")
    own = model.index.get("guidance", {}).get(task, (rule.guidance, rule.image_guidance))
    guidance, image_guidance = own[0] if guidance is None else guidance, own[1] if image_guidance is None else image_guidance
    if not (math.isfinite(guidance) and math.isfinite(image_guidance)):
        raise UserError(f"guidance {guidance} and image guidance {image_guidance} must be finite")
    height, width = _size(model, images, height, width)
    for prompt in prompts:
        if dropped := model.tokenizer.dropped(prompt):
            print(f"warning: the prompt is longer than 77 tokens; not seen: {' '.join(dropped)}", file=sys.stderr)

    def encode_text(texts):
        return model.text_encoder(model.tokenizer(texts).to(device))[0]             # (B, S, D)

    scale = model.vae.config["scaling_factor"]
    shape = (B, model.unet.config["out_channels"], height // model.vae.factor, width // model.vae.factor)
    generators = seeded(range(seed, seed + B))
    x, start, diffusion = randn(shape, generators, device), 0, model.diffusion.to(device)
    if images:
        pictures = torch.stack([to_tensor(on_white(im.convert("RGBA")).resize((width, height), Image.BICUBIC)) for im in images]).to(device)
        mean, logvar = model.vae.encode(pictures)
        if strength is not None:
            x, start = partway(diffusion, latents(TARGET._replace(sample=False), mean, logvar, scale), x, steps, strength)

    text, blank = encode_text(prompts), encode_text([negative_prompt] * B)
    if rule.source:
        source = latents(SOURCE, mean, logvar, scale)
        context, source = torch.cat([blank, blank, text]), torch.cat([torch.zeros_like(source), source, source])
        if guidance == image_guidance == 1:
            context, source = text, source[-B:]
    else:
        context, source = (text, None) if guidance == 1 else (torch.cat([blank, text]), None)
    K = len(context) // B
    row = torch.full((K * B,), model.tasks.index(task), device=device)

    def predict(x, t):
        z = x.repeat(K, 1, 1, 1)
        z = z if source is None else torch.cat([z, source], dim=1)                  # (K B, 4 or 8, h, w)
        out = model.unet(z, t.repeat(K), context, task=row)
        return guide(out.float().view(K, *x.shape), guidance, image_guidance)

    x0 = ddim(diffusion, predict, x, steps=steps, eta=eta, start=start, generators=generators, callback=callback)
    return [to_pil(image) for image in model.vae.decode(x0 / scale)]


def _size(model, images, height, width):
    """The picture's height and width: as asked, or the model's native size along the longer side of the given picture."""
    ratio_h, ratio_w = (1, 1) if not images else (images[0].height, images[0].width)
    multiple, longer = 8 if model.native_size % 8 == 0 else model.vae.factor, max(ratio_h, ratio_w)
    height = max(multiple, round(model.native_size * ratio_h / longer / multiple) * multiple) if height is None else height
    width = max(multiple, round(model.native_size * ratio_w / longer / multiple) * multiple) if width is None else width
    if height % multiple or width % multiple or height < multiple or width < multiple:
        raise UserError(f"height {height} and width {width} must be multiples of {multiple}")
    return height, width


def grid(pictures, columns):
    """PIL pictures of one size -> one picture, row by row."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def save_png(picture, path, arguments):
    """The picture with the run's arguments in its metadata."""
    info = PngInfo()
    info.add_text("arguments", json.dumps(arguments))
    write_file(path, lambda beside: picture.save(beside, format="PNG", pnginfo=info))


def main():
    parser = argparse.ArgumentParser(description="Draw with a model folder or hub id.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", default="t2i", help=f"one of {', '.join(TASKS)}, or a task that the model was given later")
    parser.add_argument("--model", default=str(ASSETS / "tiny-mtu"), help="folder in the Hugging Face layout, or hub id")
    parser.add_argument("--prompt", action="append", help="text; again for more pictures; default: the task's example")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--image", help="source picture; default: the task's example")
    parser.add_argument("--guidance", type=float, help="text scale; default the model's own, or the paper's: 7.5 for t2i and edit, 4 for inpaint")
    parser.add_argument("--image-guidance", type=float, help="image scale; default the model's own, or the paper's: 1.6 for edit, 1.5 for inpaint")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (the paper's: 20)")
    parser.add_argument("--eta", type=float, default=0.0, help="0 deterministic DDIM, 1 as noisy as DDPM")
    parser.add_argument("--strength", type=float, help="start from --image instead of from noise, with this share of the steps (SDEdit)")
    parser.add_argument("--height", type=int, help="multiple of 8; default the model's")
    parser.add_argument("--width", type=int, help="multiple of 8; default the model's")
    parser.add_argument("--num-images", type=int, default=1, help="of each prompt; more than one make a grid; seeds count up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trajectory", action="store_true", help="save the denoising: a strip (x_t above, predicted x_0 below) and a GIF")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--out", help="the picture; default samples/TASK.png")
    args = parser.parse_args()

    if not 1 <= args.num_images <= 10_000:
        raise UserError(f"--num-images {args.num_images}: from 1 to 10000")
    if not 0 <= args.seed < 2 ** 62:
        raise UserError(f"--seed {args.seed}: from 0 to 2^62")
    image, example = EXAMPLES.get(args.task, (None, ""))
    image = args.image or image and str(ASSETS / "examples" / image)
    prompts = [prompt for prompt in args.prompt or [example] for _ in range(args.num_images)]
    out = Path(args.out or f"samples/{args.task}.png")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--out {out}: pictures are written as .png files")
    images = [open_image(image)] * len(prompts) if image else None
    model = load_model(args.model).to(pick_device(args.device))

    frames, bar = [], tqdm(total=args.steps, desc=args.task, leave=False, delay=1)

    def step(i, t, x, x0):
        bar.update()
        if args.trajectory:
            frames.append(torch.cat([x[:1], x0[:1]]))

    pictures = generate(model, args.task, prompts, images, args.negative_prompt, args.guidance, args.image_guidance,
                        args.steps, args.eta, args.strength, args.height, args.width, args.seed, step)
    bar.close()
    arguments = {**vars(args), "prompt": prompts, "image": image}
    columns = args.num_images if len(prompts) > args.num_images > 1 else round(len(prompts) ** 0.5)
    save_png(pictures[0] if len(pictures) == 1 else grid(pictures, columns), out, arguments)
    print(f"{args.task}: {', '.join(map(repr, dict.fromkeys(prompts)))}" + (f" on {image}" if image else "") + f" -> {out}")
    if args.trajectory:
        with torch.no_grad():
            decoded = [[to_pil(im) for im in model.vae.decode(f / model.vae.config["scaling_factor"])] for f in frames]
        shown = [decoded[round(i * (len(decoded) - 1) / 9)] for i in range(10)] if len(decoded) > 10 else decoded
        strip = out.with_name(f"{out.stem}-trajectory.png")
        save_png(grid([f[0] for f in shown] + [f[1] for f in shown], columns=len(shown)), strip, arguments)
        first, *rest = [f[1] for f in decoded]
        first.save(strip.with_suffix(".gif"), save_all=True, append_images=rest, duration=[120] * len(rest) + [1500], loop=0)
        print(f"denoising -> {strip} and {strip.with_suffix('.gif')}")


def pick_device(name=None):
    """The device that is named, else cuda, mps, cpu in this order."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


if __name__ == "__main__":
    command(main)
