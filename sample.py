"""Draw: any task, any model folder or hub id.

    python sample.py --task edit                       shipped model, shipped picture, an instruction
    python sample.py --task t2i --prompt "red apple, google style" --prompt "dog face, twitter style" --num-images 4
    python sample.py --task edit --image cat.png --prompt "make it snow" --model runs/all
    python sample.py --task translate --given source=a.png                      several modalities (joint.py); nothing given, all are drawn

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

import joint
import moe
from adm import UNet2D
from aggregation import Heads, add_heads
from clip import CLIPText, CLIPVision, Tokenizer
from data import ASSETS, EXAMPLES, SDXL_GUIDANCE, SOURCE, TARGET, TASKS, latents, on_white, open_image, to_pil, to_tensor
from diffusion import SAMPLERS, Diffusion, guide, partway, randn, seeded
from export import export
from folders import HelpFormatter, UserError, blaming, command, compiled, fetch, load_weights, pick_device, read_json, write_file, write_json
from merge import add_projections, timestep_ranges
from routing import add_routing
from unet import UNet
from vae import VAE, Pixels, blended

DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}  # of --precision
PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "RoutedPipeline2D", "ProjectedPipeline2D", "JointPipeline2D")


@dataclass
class Model:
    """Everything that drawing needs. index is the folder's model_index.json. A UNet2D has neither autoencoder nor text."""
    unet: UNet
    vae: VAE | Pixels
    text_encoder: CLIPText | None
    tokenizer: Tokenizer | None
    scheduler: dict
    index: dict
    text_encoder_2: CLIPText | None = None   # SDXL
    tokenizer_2: Tokenizer | None = None
    heads: Heads | None = None               # MT-Diffusion
    image_encoder: CLIPVision | None = None  # its task repr, if it was trained on pictures' vectors

    @property
    def diffusion(self):
        return Diffusion.from_config(self.scheduler)

    @property
    def tasks(self):
        """Task names in the order of the U-Net's rows. A U-Net that is not upcycled does one thing, told by its input channels; which of the
        image-to-image tasks, it does not say."""
        if self.heads is not None:
            return [self.index["joint"]["task"]]
        if "moe" in self.unet.config:
            return self.unet.config["moe"]["tasks"]
        if isinstance(self.unet, UNet2D):
            return ["uncond"]
        return ["t2i"] if self.unet.config["in_channels"] == self.unet.config["out_channels"] else ["edit", "sr", "inpaint"]

    @property
    def native_size(self):
        return self.unet.config["sample_size"] * self.vae.factor

    @property
    def guidance(self):
        """Task -> text and image scale that suit this model, where its model_index.json tells (with _ in folders for diffusers)."""
        return self.index.get("guidance") or self.index.get("_guidance") or {}

    @property
    def texts(self):
        """Tokenizer and encoder, once or, for SDXL, twice."""
        pairs = (self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)
        return [pair for pair in pairs if pair[1] is not None]

    @property
    def parts(self):
        """Folder -> what is saved there, without the U-Net."""
        parts = dict(vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, text_encoder_2=self.text_encoder_2,
                     tokenizer_2=self.tokenizer_2, image_encoder=self.image_encoder)
        return {name: part for name, part in parts.items() if part is not None and not isinstance(part, Pixels)}

    def to(self, device):
        for module in filter(None, (self.unet, self.heads, self.vae, self.image_encoder, *[encoder for _, encoder in self.texts])):
            module.to(device)
        return self

    @torch.no_grad()
    def encode_text(self, prompts):
        """list of B strings -> context (B, S, D), pooled (B, P) or None; None and None without a text encoder.

        SDXL reads both encoders' penultimate states side by side and the second's pooled state; "" is all zeros where the folder says
        force_zeros_for_empty_prompt, in training as in drawing.
        """
        if not self.texts:
            return None, None
        device = self.text_encoder.text_model.final_layer_norm.weight.device
        states = [encoder(tokenizer(prompts).to(device)) for tokenizer, encoder in self.texts]
        if len(states) == 1:
            return states[0][0], None
        context, pooled = torch.cat([penultimate for _, penultimate, _ in states], dim=-1), states[1][2]
        if self.index.get("force_zeros_for_empty_prompt", True):
            told = torch.tensor([float(prompt != "") for prompt in prompts], dtype=context.dtype, device=device)
            context, pooled = context * told[:, None, None], pooled * told[:, None]
        return context, pooled

    def added(self, pooled, height, width):
        """SDXL's further conditions of pictures that were never resized or cropped: pooled text and original size, crop, target size."""
        if pooled is None:
            return None
        return dict(text_embeds=pooled, time_ids=pooled.new_tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(len(pooled), 1))

    def save(self, folder, frozen_too=True, dtype=None):
        """In the Hugging Face layout. dtype: of the files' tensors, default the parameters' own."""
        self.unet.save_pretrained(Path(folder) / "unet", **(dict(dtype=dtype) if dtype else {}))
        if self.heads is not None:
            self.heads.save_pretrained(Path(folder) / "heads", dtype)
        if frozen_too:
            for name, part in self.parts.items():
                part.save_pretrained(Path(folder) / name, **(dict(dtype=dtype) if dtype and not name.startswith("tokenizer") else {}))
            write_json(Path(folder) / "scheduler" / "scheduler_config.json", self.scheduler)
            write_json(Path(folder) / "model_index.json", self.index)


def load_model(path_or_hub_id, dtype=torch.float32, device="cpu"):
    """A folder in the Hugging Face layout, or a hub id -> Model on the device, in eval mode.

    dtype: of the weights in memory, and of what they compute; None: bf16 where the device is fast at it, but fp32 for a miniature and on pixels.

    A folder may hold only what differs from another model: model_index.json's "base" (a path relative to the folder, or a
    hub id) then says where the other parts are.
    """
    index = read_json(fetch(path_or_hub_id, "") / "model_index.json")
    base, folder = path_or_hub_id, Path(path_or_hub_id)
    with blaming(f"{path_or_hub_id}: model_index.json"):
        if "base" in index:
            base = folder / index["base"] if (folder / index["base"]).exists() else index["base"]
        for text_scale, image_scale in (index.get("guidance") or index.get("_guidance") or {}).values():
            math.isfinite(text_scale + image_scale)

    def place(part):
        if "base" not in index or (folder / part).is_dir():
            return path_or_hub_id
        if not folder.is_dir():  # on the hub
            try:
                fetch(path_or_hub_id, part)
                return path_or_hub_id
            except UserError as error:
                if "has no folder" not in str(error):
                    raise
        return base

    device = torch.device(device)
    if index.get("_class_name") in PIXEL_PIPELINES:
        return load_pixels(path_or_hub_id, index, dtype or torch.float32).to(device)
    config = read_json(fetch(place("unet"), "unet") / "config.json")
    if dtype is None:
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
                device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        dtype = torch.bfloat16 if fast and config.get("sample_size") != 16 else torch.float32
    unet, heads = load_unet(moe if "moe" in config else UNet, place("unet"), "unet", config, dtype)
    xl = bool(unet.config["addition_embed_type"])
    model = Model(unet, VAE.from_pretrained(place("vae"), dtype=dtype), CLIPText.from_pretrained(place("text_encoder"), dtype=dtype),
                  Tokenizer.from_pretrained(place("tokenizer")),
                  read_json(fetch(place("scheduler"), "scheduler") / "scheduler_config.json"), index,
                  CLIPText.from_pretrained(place("text_encoder_2"), "text_encoder_2", dtype) if xl else None,
                  Tokenizer.from_pretrained(place("tokenizer_2"), "tokenizer_2") if xl else None, heads,
                  CLIPVision.from_pretrained(place("image_encoder"), dtype=dtype) if heads and (index.get("image_encoder") or [None])[0] else None)
    u, T, texts = unet.config, model.diffusion.T, model.texts
    pooled = model.text_encoder_2.width if xl else 0
    for fits, parts in (
            (u["sample_size"] is not None, "the U-Net's sample_size, which is null"),
            (u["in_channels"] in (u["out_channels"], 2 * u["out_channels"]) or "moe" in u,
             f"the U-Net's {u['in_channels']} input channels: 4 or 8 are"),
            (u["out_channels"] == model.vae.config["latent_channels"], "the U-Net's out_channels and the VAE's latent_channels"),
            (u["cross_attention_dim"] == sum(e.config["hidden_size"] for _, e in texts),
             "the U-Net's cross_attention_dim and the text encoder's hidden_size"),
            (not xl or u["projection_class_embeddings_input_dim"] == pooled + 6 * u["addition_time_embed_dim"],
             "the U-Net's projection_class_embeddings_input_dim and the pooled text's width with six numbers"),
            (all(max(t.vocab.values()) < e.config["vocab_size"] for t, e in texts), "the tokenizer's vocabulary and the text encoder's"),
            (all(t.length <= e.config["max_position_embeddings"] for t, e in texts), "the tokenizer's length and the text encoder's positions"),
            (u.get("routing", {}).get("num_steps", T) == T, "the routing's num_steps and the scheduler's num_train_timesteps"),
            (model.image_encoder is None or model.image_encoder.width == u["cross_attention_dim"],
             "the U-Net's cross_attention_dim and the image encoder's width"),
            (joint.fits(model), "the heads and the joint task of model_index.json")):
        if not fits:
            raise UserError(f"{path_or_hub_id}: cannot draw with {parts}" + (" that differ" if " and " in parts else ""))
    for module in filter(None, (model.vae, model.image_encoder, *[encoder for _, encoder in texts])):
        module.eval()
    return model.to(device)


def load_unet(kind, path_or_hub_id, subfolder, config, dtype):
    """-> U-Net, Heads or None. kind: moe, UNet or UNet2D. config: of the folder's config.json, which records what else is attached."""
    routing, projections, aggregation = (config.pop(key, None) for key in ("routing", "projections", "aggregation"))
    if routing or projections or aggregation:
        config.pop("_class_name", None)
    attach = {"attach": lambda unet: add_projections(unet, projections)} if projections else {}
    unet = kind.from_pretrained(path_or_hub_id, subfolder, config, dtype, **attach)
    if routing:
        with blaming(f'{path_or_hub_id}: unet/config.json, "routing"'):
            add_routing(unet, **routing)
    if not aggregation:
        return unet.eval(), None
    with blaming(f'{path_or_hub_id}: unet/config.json, "aggregation"'):
        heads = add_heads(unet, **aggregation)
    load_weights(heads, fetch(path_or_hub_id, "heads"), dtype=dtype)
    return unet.eval(), heads.eval()


def load_pixels(path_or_hub_id, index, dtype=torch.float32):
    """load_model for a U-Net without text, on pixels. Its parts may lie beside model_index.json, as google/ddpm-cifar10-32's do."""
    try:
        inside, folder = "unet", fetch(path_or_hub_id, "unet")
    except UserError:
        inside, folder = "", fetch(path_or_hub_id, "")
    config = read_json(folder / "config.json")
    unet, heads = load_unet(UNet2D, path_or_hub_id, inside, config, dtype)
    scheduler = read_json(fetch(path_or_hub_id, "scheduler" if inside else "") / "scheduler_config.json")
    model, c = Model(unet, Pixels(unet.config["sample_size"]), None, None, scheduler, index, heads=heads), unet.config
    T = model.diffusion.T
    learned = scheduler.get("variance_type") == "learned_range"
    classes = heads.config["modalities"].get("label", {}).get("classes") if heads else None
    for fits, parts in ((c["sample_size"] is not None, "sample_size, which is null"),
                        (c["in_channels"] == 3 or heads and c["in_channels"] == 6, f"in_channels = {c['in_channels']}: 3 are"),
                        (c["out_channels"] == 3 * (1 + learned), f"out_channels = {c['out_channels']}: 3 are, 6 with variance_type learned_range"),
                        (c["num_class_embeds"] == (classes and classes + 1), "num_class_embeds: only the task label gives classes, and none"),
                        (c.get("routing", {}).get("num_steps", T) == T, "routing for another num_train_timesteps"),
                        (joint.fits(model), "heads, which are not those of model_index.json's joint task")):
        if not fits:
            raise UserError(f"{path_or_hub_id}: cannot draw with the U-Net's {parts}")
    return model


@torch.no_grad()
def generate(model, task, prompts, images=None, negative_prompt="", guidance=None, image_guidance=None, steps=20, eta=0.0, strength=None, height=None,
             width=None, seed=0, callback=None, sampler=None, guidance_rescale=0.0, ensemble=None, low_memory=False, keep_unchanged=False):
    """Draw one picture per prompt -> list of PIL images. Picture i has seed `seed + i`, whatever the batch around it.

    images: PIL pictures, one per prompt: the source of an image-to-image task, or with strength in (0, 1] the start (SDEdit).
    guidance, image_guidance: text and image scale, 1 and 1 is none; default what model_index.json says under "guidance", else the
        paper's for the task (data.TASKS).
    height, width: multiples of 8; default the model's size, for given pictures with their shape.
    callback(i, t, x_t, x0): each step's latents, scaled.
    sampler: a name in diffusion.SAMPLERS; default the one that the folder's scheduler names. eta: DDIM's noise.
    guidance_rescale: see diffusion.guide.
    ensemble: N U-Nets of the model's kind; number floor(t N / T) makes step t (DeMe Eq. 7).
    low_memory: the text encoders leave the device once they have read, and guidance's branches pass the U-Net one after another.
    keep_unchanged: of tasks with an instruction; where the drawn picture hardly differs the given one's pixels stay, see vae.blended.
    """
    if isinstance(prompts, str) or images and len(images) != len(prompts):
        raise ValueError("prompts is a list of strings, images a list of as many pictures")
    if task not in model.tasks:
        raise UserError(f"this model does not know the task {task!r}; it knows {', '.join(model.tasks)}")
    if model.heads is not None:
        raise UserError(f"{task} draws several modalities: joint.draw does that, and the command sample.py --task {task}")
    kind = task if task in TASKS else "t2i" if model.unet.config["moe"]["in_channels"][task] == model.unet.config["out_channels"] else "edit"
    rule, B, device = TASKS[kind], len(prompts), next(model.unet.parameters()).device
    if rule.source and not images:
        raise UserError(f"task {task} needs a picture: --image FILE")
    if strength is not None and not images:
        raise UserError("strength needs a picture to start from: --image FILE")
    if keep_unchanged and (not rule.source or rule.prompt == "empty"):
        raise UserError(f"task {task} has no source of which parts could stay unchanged")
    if images and not rule.source and strength is None:
        raise UserError(f"task {task} takes a picture only to start from: give --strength too")
    own = model.guidance.get(task, SDXL_GUIDANCE[kind] if model.text_encoder_2 else (rule.guidance, rule.image_guidance))
    guidance, image_guidance = own[0] if guidance is None else guidance, own[1] if image_guidance is None else image_guidance
    if not (math.isfinite(guidance) and math.isfinite(image_guidance)):
        raise UserError(f"guidance {guidance} and image guidance {image_guidance} must be finite")
    diffusion = model.diffusion.to(device)
    sampler = sampler or diffusion.sampler
    if sampler not in SAMPLERS or eta and sampler != "ddim" or not 0 <= guidance_rescale <= 1:
        raise UserError(f"sampler {sampler}, eta {eta}, guidance rescale {guidance_rescale}: the samplers are {', '.join(SAMPLERS)}; only ddim "
                        "has an eta; the rescale goes from 0 to 1")
    height, width = _size(model, images, height, width)
    for prompt in dict.fromkeys((*prompts, negative_prompt)) if model.tokenizer else ():
        if dropped := model.tokenizer.dropped(prompt):
            print(f"warning: the prompt is longer than 77 tokens; not seen: {' '.join(dropped)}", file=sys.stderr)

    dtype, scale = model.unet.conv_out.weight.dtype, model.vae.config["scaling_factor"]
    side = model.vae.config["sample_size"]  # above twice the autoencoder's own size its memory, not the U-Net's, is the limit: tiles
    tile = side // model.vae.factor // 4 * 4 if max(height, width) > 2 * side else None
    shape = (B, model.vae.config["latent_channels"], height // model.vae.factor, width // model.vae.factor)
    generators = seeded(range(seed, seed + B))
    x, start, source = randn(shape, generators, device), 0, None
    if images:
        pictures = torch.stack([to_tensor(on_white(im.convert("RGBA")).resize((width, height), Image.BICUBIC)) for im in images])
        mean, logvar = model.vae.encode(pictures.to(device), tile)
        if strength is not None:
            x, start = partway(diffusion, latents(TARGET._replace(sample=False), mean, logvar, scale), x, steps, strength, sampler)
        source = latents(SOURCE, mean, logvar, scale) if rule.source else None

    # guidance's branches, see diffusion.guide: the words and whether the picture is given
    if guidance == 1 and (source is None or image_guidance == 1):
        branches = [(prompts, 1)]
    else:
        branches = [([negative_prompt] * B, 0)] + [([negative_prompt] * B, 1)] * (source is not None) + [(prompts, 1)]
    K = len(branches)
    for _, encoder in model.texts:
        encoder.to(device)
    context, pooled = model.encode_text([prompt for words, _ in branches for prompt in words])  # (K B, S, D)
    for _, encoder in model.texts if low_memory else ():
        encoder.to("cpu")
    added = model.added(pooled, height, width)
    source = None if source is None else torch.cat([source * given for _, given in branches])
    row = torch.full((K * B,), model.tasks.index(task), device=device)
    pieces = [slice(k * B, (k + 1) * B) for k in range(K)] if low_memory else [slice(None)]
    conditions = [(context if context is None else context[p], row[p], added and {key: value[p] for key, value in added.items()}) for p in pieces]

    def predict(x, t):
        z = x.to(dtype).repeat(K, 1, 1, 1)
        z = z if source is None else torch.cat([z, source.to(dtype)], dim=1)        # (K B, 4 or 8, h, w)
        unet = ensemble[int(t[0]) * len(ensemble) // diffusion.T] if ensemble else model.unet
        out = torch.cat([unet(z[p], t.repeat(K)[p], *condition) for p, condition in zip(pieces, conditions)])
        return guide(out.float().unflatten(0, (K, B)), guidance, image_guidance, guidance_rescale)

    options = dict(eta=eta) if sampler == "ddim" else {}
    x0 = SAMPLERS[sampler](diffusion, predict, x, steps=steps, start=start, generators=generators, callback=callback, **options)
    drawn = model.vae.decode(x0 / scale, tile)
    if keep_unchanged:
        drawn = blended(pictures.to(drawn), drawn, model.vae.decode(mean, tile))
    return [to_pil(image) for image in drawn]


def _size(model, images, height, width):
    """The picture's height and width: as asked, or the model's native size along the longer side of the given picture."""
    ratio_h, ratio_w = (1, 1) if not images else (images[0].height, images[0].width)
    multiple, longer = 8 if model.native_size % 8 == 0 else model.vae.factor, max(ratio_h, ratio_w)
    multiple = math.lcm(multiple, getattr(model.unet, "multiple", 1))
    height = max(multiple, round(model.native_size * ratio_h / longer / multiple) * multiple) if height is None else height
    width = max(multiple, round(model.native_size * ratio_w / longer / multiple) * multiple) if width is None else width
    if height % multiple or width % multiple or not (multiple <= height <= 8192 and multiple <= width <= 8192):
        raise UserError(f"height {height} and width {width} must be multiples of {multiple}, up to 8192")
    return height, width


def grid(pictures, columns):
    """PIL pictures of one size -> one picture, row by row."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def sample_grid(model, datasets, columns, seed, path):
    """Held-out examples, a row of sources, of samples and of targets per task."""
    rows = []
    for task, dataset in datasets.items():
        chosen = [dataset[(2 * i + 1) * len(dataset) // (2 * columns)] for i in range(columns)]
        if model.heads is not None:
            rows += joint.grid_rows(model, chosen, seed)
            continue
        sources = [to_pil(e["source"]) for e in chosen] if "source" in chosen[0] else None
        samples = generate(model, task, [e["prompt"] for e in chosen], sources, seed=seed)
        rows += (sources or []) + samples + [to_pil(e["target"]) for e in chosen]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, columns).save(path)


def save_png(picture, path, arguments):
    """The picture with the run's arguments in its metadata."""
    info = PngInfo()
    info.add_text("arguments", json.dumps(arguments))
    write_file(path, lambda beside: picture.save(beside, format="PNG", pnginfo=info))


def draw_jointly(args, parser, out):
    """The command for a joint task: all modalities side by side, a row a sample, labels and vectors in words."""
    if other := [name for name in ("prompt", "negative_prompt", "image", "guidance", "image_guidance", "guidance_rescale", "strength", "trajectory",
                                   "ensemble", "compile", "low_memory", "keep_unchanged") if getattr(args, name) != parser.get_default(name)]:
        raise UserError(f"--{other[0].replace('_', '-')} does not go with --task {args.task}; what is known comes by --given")
    if args.model == f"runs/{args.task}" and not Path(args.model).is_dir():
        raise UserError(f"no model at {args.model}: python train.py --task {args.task} makes it, or name another by --model")
    model = load_model(args.model, DTYPES[args.precision], pick_device(args.device))
    if args.task not in model.tasks:
        raise UserError(f"this model does not know the task {args.task!r}; it knows {', '.join(model.tasks)}")
    given = joint.read_given(args.given, model)
    shapes = [value for name, value in given.items() if isinstance(value, Image.Image) and name != "repr"]
    height, width = _size(model, shapes, args.height, args.width)
    bar = tqdm(total=args.steps, desc=args.task, leave=False, delay=1)
    pictures, columns, lines = joint.side_by_side(model, given, args.num_images, height, width, steps=args.steps, seed=args.seed, eta=args.eta,
                                                  sampler=args.sampler, callback=lambda *_: bar.update())
    bar.close()
    save_png(grid(pictures, columns), out, vars(args))
    print("\n".join([*lines, f"{args.task}: {', '.join(['image', *model.heads])}; given: {', '.join(args.given) or 'nothing'} -> {out}"]))


def main():
    parser = argparse.ArgumentParser(description="Draw with a model folder or hub id.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--task", default="t2i", help=f"one of {', '.join([*TASKS, *joint.SETTINGS])}, or a task that the model was given later")
    parser.add_argument("--model", help="folder in the Hugging Face layout, or hub id; default assets/tiny-mtu, of joint tasks runs/TASK")
    parser.add_argument("--prompt", action="append", help="text; again for more pictures; default: the task's example")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--image", help="source picture; default: the task's example")
    parser.add_argument("--given", action="append", default=[], metavar="NAME=VALUE", help="what a joint task knows: image, which is z_0, source or "
                        "masked (of the size that is drawn; what is transparent, be it in part, is masked) =FILE, label=CLASS, repr=WORDS, or "
                        "=FILE where the model has an image encoder; default: nothing, all is drawn")
    parser.add_argument("--guidance", type=float, help="text scale; default the model's own, or the paper's: 7.5 for t2i and edit, 4 for inpaint")
    parser.add_argument("--image-guidance", type=float, help="image scale; default the model's own, or the paper's: 1.6 for edit, 1.5 for inpaint")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1: against too strong contrast (arXiv 2305.08891: 0.7)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: what the model's scheduler names")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (the paper: 20, for SDXL 50)")
    parser.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 deterministic, 1 as noisy as DDPM")
    parser.add_argument("--strength", type=float, help="start from --image instead of from noise, with this share of the steps (SDEdit)")
    parser.add_argument("--height", type=int, help="multiple of 8; default the model's")
    parser.add_argument("--width", type=int, help="multiple of 8; default the model's")
    parser.add_argument("--num-images", type=int, default=1, help="of each prompt; more than one make a grid; seeds count up")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--trajectory", action="store_true", help="save the denoising: a strip (x_t above, predicted x_0 below) and a GIF")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 where the device is fast at it, fp32 for the miniature")
    parser.add_argument("--ensemble", nargs="+", metavar="MODEL", help="DeMe before merging: copies tuned for equal timestep ranges, from t = 0 on")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net: pays for many pictures of one size")
    parser.add_argument("--low-memory", action="store_true", help="text encoders leave the device after use, guidance's branches pass one by one")
    parser.add_argument("--keep-unchanged", action="store_true", help="edit, inpaint: the source's own pixels where nothing was to change")
    parser.add_argument("--out", help="the picture; default samples/TASK.png")
    parser.add_argument("--export", metavar="TASK", help="draw nothing; write this task of an upcycled model as a folder that diffusers opens")
    parser.add_argument("--export-to", metavar="FOLDER", help="that folder")
    args = parser.parse_args()

    if not 1 <= args.num_images <= 10_000:
        raise UserError(f"--num-images {args.num_images}: from 1 to 10000")
    if not 0 <= args.seed < 2 ** 62:
        raise UserError(f"--seed {args.seed}: from 0 to 2^62")
    if bool(args.export) != bool(args.export_to):
        raise UserError("--export TASK and --export-to FOLDER go together")
    if args.given and args.task not in joint.SETTINGS:
        raise UserError(f"--given goes with --task {', '.join(joint.SETTINGS)}")
    args.model = args.model or (f"runs/{args.task}" if args.task in joint.SETTINGS else str(ASSETS / "tiny-mtu"))
    if args.export:
        model, arguments = load_model(args.model), Path(args.model) / "arguments.json"
        base = read_json(arguments).get("model", args.model) if arguments.is_file() else model.index.get("base", args.model)
        export(model, args.export, args.export_to, None if base == "scratch" else base)
        print(f"{args.export} of {args.model} -> {args.export_to}")
        return
    image, example = EXAMPLES.get(args.task, (None, ""))
    image = args.image or image and str(ASSETS / "examples" / image)
    prompts = [prompt for prompt in args.prompt or [example] for _ in range(args.num_images)]
    out = Path(args.out or f"samples/{args.task}.png")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--out {out}: pictures are written as .png files")
    if args.task in joint.SETTINGS:
        return draw_jointly(args, parser, out)
    images = [open_image(image)] * len(prompts) if image else None
    dtype, device = DTYPES[args.precision], pick_device(args.device)
    model = load_model(args.model, dtype, device)
    for path, wanted in zip(args.ensemble or (), timestep_ranges(model.diffusion.T, max(1, len(args.ensemble or ())))):
        arguments = Path(path) / "arguments.json"
        told = read_json(arguments).get("t_range") if arguments.is_file() else None
        if told and tuple(told) != wanted:
            raise UserError(f"--ensemble: {path} was tuned for timesteps {told[0]} to {told[1]}, and would here draw {wanted[0]} to {wanted[1]}; "
                            "give the copies in the order of their ranges, all of them")
    copies = [load_model(path, dtype, device) for path in args.ensemble or ()]
    if any(copy.unet.config != model.unet.config or copy.scheduler != model.scheduler for copy in copies):
        raise UserError(f"--ensemble: the models are not all of the kind of {args.model}")
    ensemble = [copy.unet for copy in copies]
    for unet in (ensemble or [model.unet]) if args.compile else ():
        unet.forward = compiled(unet.forward, device)
    copies = None

    frames, bar = [], tqdm(total=args.steps, desc=args.task, leave=False, delay=1)

    def step(i, t, x, x0):
        bar.update()
        if args.trajectory:
            frames.append(torch.cat([x[:1], x0[:1]]))

    pictures = generate(model, args.task, prompts, images, args.negative_prompt, args.guidance, args.image_guidance,
                        args.steps, args.eta, args.strength, args.height, args.width, args.seed, step, args.sampler, args.guidance_rescale, ensemble,
                        args.low_memory, args.keep_unchanged)
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


if __name__ == "__main__":
    command(main)
