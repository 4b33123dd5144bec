"""MT-Diffusion on real data: what z_0 and the other modality x are, task by task; training by Algorithm 2, drawing by Algorithm 1.

    task        z_0                              x, as --given names it                  E(x)
    translate   Twitter's drawing of an emoji    source: Google's                        x itself, as latents of the frozen VAE
    masked      a picture                        masked: it with square patches zero     x itself, as latents or pixels
    label       a picture                        label: its category                     the U-Net, by cross-attention on the category's name;
                                                                                         on pixels, by its class embedding
    repr        a picture                        repr: its caption's text vector; or     the U-Net, by cross-attention on it as one token
                                                 its own, of an image encoder

The equations, heads and encoders are aggregation.py's; here one x a task. The network sees no text: its context is that of "". What is measured
on held-out examples is both terms of Eq. 6: denoising, and the head's squared error or cross-entropy.

Letters: B batch, C channels, h w latent, H W picture, K classes.
"""
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

import data
from aggregation import DROP, LAMBDA, add_heads, each_class_once, expected, joint_loss, sample, unet_encoding, widen
from clip import CLIPVision, preprocess
from data import STYLES, Latent, Sheet, latents, on_white, open_image, to_pil, to_tensor
from diffusion import UncertaintyWeight, randn, seeded
from folders import UserError, fetch
from vae import Pixels


class Setting(NamedTuple):
    modality: str  # x's name
    heads: tuple   # kinds of its head, the default first
    drop: float    # share of samples that train without x, the starred variants; with -X, whose x is then all zeros, DROP


SETTINGS = {
    "translate": Setting("source", ("image",), 0.0),
    "masked": Setting("masked", ("image",), DROP),
    "label": Setting("label", ("linear", "classifier"), DROP),
    "repr": Setting("repr", ("vector",), DROP),
}
X = Latent(sample=False, scaled=True)  # in the space of z_0; without its noise, which no head could predict


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

class Pictures(data.Builtin):
    """The built-in emoji for a joint task: target is z_0, x the other modality: a picture (3, H, W), the number of a class, or
    the caption whose vector it is (with an image encoder, target's)."""

    def _drawn(self, style, cell):
        return to_tensor(on_white(Sheet.picture(style, cell)).resize((self.size, self.size), Image.LANCZOS))

    def _translate_items(self):
        return self.rows

    def _translate(self, e, rng):
        cell = e.cells[data._tone(e, rng)]
        x, target = (self._drawn(style, cell) for style in STYLES)
        return dict(prompt="", target=target, x=x)

    def _masked_items(self):
        return self._pictures()

    def _masked(self, item, rng):
        example = self._uncond(item, rng)
        return dict(example, x=patched(example["target"], rng))

    def _label_items(self):
        return self._pictures()

    def _label(self, item, rng):
        return dict(self._uncond(item, rng), x=classes().index(item[0].category.lower()))

    def _repr_items(self):
        return self._pictures()

    def _repr(self, item, rng):
        (e, style), tone = item, data._tone(item[0], rng)
        return dict(prompt="", target=self._drawn(style, e.cells[tone]), x=data.caption(e, tone, style))


def classes():
    return sorted({e.category.lower() for e in Sheet.load()})


def patched(picture, rng, patches=None):
    """(3, H, W) -> a copy with square patches set to zero, which may overlap: 5 to 20 of H/8 pixels [r]. No other value is exactly zero, since
    255 is odd: x tells its mask."""
    side = picture.shape[1] // 8
    picture = picture.clone()
    for _ in range(rng.integers(5, 21) if patches is None else patches):
        top, left = (int(rng.integers(size - side + 1)) for size in picture.shape[1:])
        picture[:, top:top + side, left:left + side] = 0
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# The model: train.py's options, and how a task attaches

OPTIONS = ("head", "input", "drop", "schedule", "head_weight")


def checked(args, tasks):
    """Fills in the defaults of OPTIONS, which are train.py's for joint tasks alone."""
    task, asked = tasks[0], [f"--{name.replace('_', '-')}" for name in OPTIONS if getattr(args, name) is not None]
    if args.image_encoder and task != "repr":
        raise UserError("--image-encoder goes with --task repr")
    if task not in SETTINGS:
        if asked:
            raise UserError(f"{asked[0]} goes with --task {', '.join(SETTINGS)}")
        return
    setting = SETTINGS[task]
    for name in ("data", "t_range", "decouple"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with --task {task}, which trains on the built-in emoji, at all timesteps")
    for name, default in zip(OPTIONS, (setting.heads[0], "z", DROP if args.input == "x" else setting.drop, "vanishing", LAMBDA)):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.head not in setting.heads or args.input == "x" and setting.heads[0] != "image":
        raise UserError(f"--head {args.head} --input {args.input}: {task} has the head {' or '.join(setting.heads)}; only pictures go in beside z_t")
    if not 0 <= args.drop < 1 or not 0 <= args.head_weight < float("inf"):
        raise UserError(f"--drop {args.drop} is in [0, 1), --head-weight {args.head_weight} at least 0")


def open_image_encoder(path_or_hub_id):
    """A pipeline's image_encoder/, or a folder of its own, also of a whole CLIPModel -> CLIPVision"""
    try:
        fetch(path_or_hub_id, CLIPVision.subfolder)
    except UserError:
        return CLIPVision.from_pretrained(path_or_hub_id, "").eval()
    return CLIPVision.from_pretrained(path_or_hub_id).eval()


def attach(model, task, head, input, schedule, image_encoder=None):
    """A model that draws one picture -> the same with a head for the task's x; or, where it has that already, as it is. image_encoder: of repr,
    the folder or hub id of one that then is part of the model."""
    setting, channels = SETTINGS[task], model.vae.config["latent_channels"]
    asked = dict(weights=schedule, k=1.0, kind=head)
    if head == "image" and task == "masked":
        asked["silu"] = False
    if task == "label":
        asked["classes"] = len(classes())
    if head == "classifier":  # as deep as the U-Net; the paper's is 128 wide
        first = model.unet.config["block_out_channels"][0]
        asked |= dict(width=min(128, max(32, first // 64 * 32)), depth=model.unet.config["layers_per_block"])
    if task == "repr":
        asked["width"] = model.unet.config.get("cross_attention_dim")
    if model.heads is not None:
        if model.heads.config["modalities"] != {setting.modality: asked} or beside(model) != (input == "x"):
            raise UserError(f"this model has another head, schedule or input: {model.tasks[0]}, {model.heads.config['modalities']}, "
                            f"--input {'x' if beside(model) else 'z'}")
        if image_encoder:
            raise UserError("--image-encoder is for a model that is new to repr; this one keeps what it was trained with")
        return
    if model.tasks not in (["t2i"], ["uncond"]):
        raise UserError(f"{task} starts from a model that draws from text or from nothing, not one for {', '.join(model.tasks)}")
    if task == "repr" and not model.texts:
        raise UserError("repr enters by cross-attention: it needs a model with a text encoder, and this one draws pixels")
    if task == "label" and not model.texts and model.unet.config["num_class_embeds"] != len(classes()) + 1:
        raise UserError("label enters a model on pixels by its class embedding, which this one lacks or has for other classes: --model scratch")
    if image_encoder:
        model.image_encoder = open_image_encoder(image_encoder)
        model.index["image_encoder"] = ["transformers", *model.image_encoder.config["architectures"]]
        if model.image_encoder.width != asked["width"]:
            raise UserError(f"--image-encoder {image_encoder}: its vectors are {model.image_encoder.width} wide; the U-Net's cross-attention, where "
                            f"repr enters as one token, takes {asked['width']}")
    elif task == "repr" and vectors(model, [""]).shape[1] != asked["width"]:
        raise UserError("repr enters by cross-attention as one token: it needs a text encoder whose pooled state is as wide as that takes")
    if input == "x":
        widen(model.unet, channels)
    model.heads = add_heads(model.unet, {setting.modality: asked}, channels)
    model.index["joint"] = dict(task=task) | (dict(classes=classes()) if task == "label" else {})


def beside(model):
    """Whether x goes in beside z_t, the paper's -X."""
    return model.unet.config["in_channels"] > model.vae.config["latent_channels"]


def fits(model):
    """Whether a folder's heads are those of the task that its model_index.json names."""
    if model.heads is None:
        return True
    told, modalities = model.index.get("joint"), model.heads.config["modalities"]
    if not isinstance(told, dict) or str(told.get("task")) not in SETTINGS or list(modalities) != [SETTINGS[told["task"]].modality]:
        return False
    names, wanted = told.get("classes", []), [m.get("classes", 0) for m in modalities.values()]
    return isinstance(names, list) and all(isinstance(name, str) for name in names) and [len(names)] == wanted


def network(unet, context, added, x=None):
    """-> (z_t (B, C, h, w), t (B,)) -> prediction, features. x: what goes in beside z_t. Of a class embedding, z_t meets the last row: no class."""
    def predict(z, t):
        more = added
        if getattr(unet, "class_embedding", None) is not None:
            more = dict(class_labels=torch.full((len(z),), unet.config["num_class_embeds"] - 1, device=z.device))
        z = z if x is None else torch.cat([z, x.to(z.dtype)], dim=1)
        return unet(z.to(unet.conv_out.weight.dtype), t, context, added=more, return_features=True)
    return predict


@torch.no_grad()
def vectors(model, captions=(), pictures=()):
    """B captions -> the frozen text encoder's pooled states (B, D); of a model with an image encoder, B PIL pictures, of any iterable, which else is
    not looked at -> its embeddings (B, D)"""
    weight = model.unet.conv_out.weight
    if model.image_encoder is not None:
        pictures = list(pictures)
        parts = [preprocess(pictures[i:i + 32], model.image_encoder.config["image_size"]) for i in range(0, len(pictures), 32)]
        return torch.cat([model.image_encoder(part.to(weight))[1].float() for part in parts])
    tokenizer, encoder = model.texts[0]
    return encoder(tokenizer(captions).to(weight.device))[2].float()


def encoding(model, context, h, w, pooled=None):
    """context (B, S, D), pooled (B, P) or None -> E (B, C, h, w) by the U-Net itself"""
    z = torch.empty(len(context), model.vae.config["latent_channels"], h, w, device=context.device)
    added = model.added(pooled, h * model.vae.factor, w * model.vae.factor)
    return unet_encoding(model.unet, z, context.to(model.unet.conv_out.weight.dtype), added).float()


def class_encoder(model, h, w):
    """-> encode(numbers of classes (n,)) -> E (n, C, h, w), from the text states of their names, which are computed once; on pixels from rows
    of the class embedding, which stay as they were made: the encoder passes no gradient on."""
    if not model.texts:
        C, weight = model.vae.config["latent_channels"], model.unet.conv_out.weight
        return lambda numbers: unet_encoding(model.unet, weight.new_empty(len(numbers), C, h, w), added={"class_labels": numbers}).float()
    context, pooled = model.encode_text(model.index["joint"]["classes"])

    def encode(numbers):
        return encoding(model, context.index_select(0, numbers), h, w, None if pooled is None else pooled.index_select(0, numbers))
    return encode


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Encoder(data.Encoder):
    """A training batch -> z_0 (B, C, h, w) and what joint_loss takes of x: E (1, B, C, h, w), x, given (1, B). Where the U-Net is the encoder, it is
    that of the moment; in `draw` it is the averaged one."""

    def __init__(self, model):
        super().__init__(model.vae)
        self.model, self.modality, self.task = model, *model.heads, model.tasks[0]
        if self.task == "label":  # outside of autocast, so that a resumed run has the same
            self.encode = class_encoder(model, *[model.unet.config["sample_size"]] * 2)

    @torch.no_grad()
    def __call__(self, batch, device):
        z0, _ = super().__call__(batch, device)
        if self.task == "label":
            x = torch.tensor(batch["x"], device=device)
            E = each_class_once(self.encode, x)
        elif self.task == "repr":
            x = vectors(self.model, batch["x"], map(to_pil, batch["target"]))
            E = encoding(self.model, x[:, None], *z0.shape[2:])
        else:
            x = E = latents(X, *self.moments(batch["x"], device), self.vae.config["scaling_factor"])
        torch.clear_autocast_cache()  # before torch 2.10 it keeps the weights that were cast here without a gradient
        return z0, dict(E=E[None], x={self.modality: x}, given=batch["keep"].to(device)[None])


class Denoiser(nn.Module):
    """In the place of train.Denoiser: the U-Net and its heads, per-sample losses of a batch."""

    def __init__(self, model, loss_weight="none", head_weight=LAMBDA):
        super().__init__()
        self.diffusion = model.diffusion.to(model.unet.conv_out.weight.device)
        self.unet, self.heads, self.beside, self.loss_weight, self.head_weight = model.unet, model.heads, beside(model), loss_weight, head_weight
        self.aggregation = model.heads.aggregation(self.diffusion.alpha_bar).to(self.diffusion.alpha_bar.device)
        self.uncertainty = UncertaintyWeight(self.diffusion.T).to(self.diffusion.alpha_bar.device) if loss_weight == "uw" else None

    def forward(self, x0, known, text, t, noise, task, added=None):
        """x0, noise (B, C, h, w), known: what Encoder returns of x, text (B, S, D) or None, t (B,) -> losses (B, 1 + modalities), the denoising
        term and the modalities', NaN where a sample goes without, and the weighted sum (B,)."""
        E, x, given = known["E"], known["x"], known["given"]
        x_in = [x[name] * row[:, None, None, None] for name, row in zip(self.heads, given)] if self.beside else [None]

        def objective(denoising, prediction):
            return self.diffusion.objective(denoising, prediction, x0, noise, t, self.loss_weight, self.uncertainty)

        weighted, terms, _ = joint_loss(self.diffusion, self.aggregation, network(self.unet, text, added, *x_in), self.heads, x0, t, noise,
                                        E, x, given, self.head_weight, objective)
        without = torch.full_like(weighted, torch.nan)
        columns = [torch.where(row > 0, terms[name], without) for name, row in zip(self.heads, given)]
        return torch.stack([terms["denoising"], *columns], dim=1), weighted


# ---------------------------------------------------------------------------------------------------------------------
# Drawing

def read_given(words, model):
    """--given's words, ["source=a.png"], ["label=flags"] or ["repr=red apple"] -> {name: a PIL picture, the number of a class, words}; image is
    z_0. repr is a picture where the model has an image encoder."""
    (modality,), given = model.heads, {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise UserError(f"--given {word}: give NAME=VALUE, where NAME is image or {modality}")
        if name not in ("image", modality):
            raise UserError(f"--given {word}: this model was not trained on {name}; it knows image and {modality}")
        if name in given:
            raise UserError(f"--given {word}: {name} is given twice")
        if name == "label":
            names = model.index["joint"]["classes"]
            if value.lower() not in names:
                raise UserError(f"--given {word}: the classes are {', '.join(names)}")
            given[name] = names.index(value.lower())
        elif name == "repr" and (model.image_encoder is None) == os.path.isfile(value):
            raise UserError(f"--given {word}: this model's repr is " + ("of words, and that is a file" if model.image_encoder is None else
                                                                        "of a picture, and there is no such file"))
        elif name == "repr" and model.image_encoder is None:
            given[name] = value
        else:
            given[name] = open_image(value)
            if name == "masked" and given[name].getchannel("A").getextrema()[0] == 255:
                raise UserError(f"--given {word}: what is to be restored is what is transparent, and nothing is")
    if len(given) == 2:
        raise UserError(f"--given image and {modality}: nothing is left to draw")
    return given


def tensors(model, given, count, height, width):
    """read_given's -> `count` times each: pictures (B, 3, H, W), resampled where they have another size; classes (B,); vectors (B, D).

    A masked picture is zero where it is transparent, be it in part, and elsewhere exactly as given: UserError at another size."""
    out = {}
    for name, value in given.items():
        if name in ("label", "repr"):
            out[name] = torch.full((count,), value) if name == "label" else vectors(model, [value], [value]).expand(count, -1)
            continue
        if name == "masked" and value.size != (width, height):
            raise UserError(f"--given masked: the picture is {value.width} x {value.height} and what is drawn {width} x {height}: resize it, or draw "
                            "another size (--width, --height); resampled here, pixels would not stay as given")
        picture = to_tensor(on_white(value).resize((width, height), Image.BICUBIC))
        if name == "masked":
            picture[:, torch.from_numpy(np.asarray(value.getchannel("A")) < 255)] = 0
        out[name] = picture.expand(count, -1, -1, -1)
    return out


@torch.no_grad()
def draw(model, count, known=None, steps=20, seed=0, sampler=None, eta=0.0, height=None, width=None, callback=None):
    """Algorithm 1 -> {"image": (B, 3, H, W), modality: pictures, probabilities (B, K) or vectors (B, D)}, each as given where it is.

    known: {"image" or modality: pictures (B, 3, H, W), classes (B,) or vectors}, not all. Sample i has seed `seed + i`.
    sampler: ddim or ddpm; default the folder's, else ddim. callback(i, t, z, z_0, x) sees each step.
    """
    (modality,), known, device = model.heads, known or {}, model.unet.conv_out.weight.device
    height, width, diffusion = height or model.native_size, width or model.native_size, model.diffusion.to(device)
    scale, f = model.vae.config["scaling_factor"], model.vae.factor
    shape, generators = (count, model.vae.config["latent_channels"], height // f, width // f), seeded(range(seed, seed + count))
    noise = randn(shape, generators, device)
    context, pooled = model.encode_text([""] * count)
    fixed = {name: latents(X, *model.vae.encode(value.to(device)), scale).float() if value.dim() == 4 else value.to(device)
             for name, value in known.items()}
    z0, encode, unknown = fixed.pop("image", None), lambda x: x, modality not in known
    if unknown and model.heads.config["modalities"][modality]["weights"] == "interpolating":
        raise UserError(f"this model was trained with --schedule interpolating, for a {modality} that is always given: --given {modality}=...")
    if unknown and z0 is not None and beside(model):
        raise UserError(f"this model sees {modality} beside z_t (--input x): it draws from it, or the image alone, and does not tell it")
    if model.tasks == ["label"]:
        table = class_encoder(model, *shape[2:])(torch.arange(len(model.index["joint"]["classes"]), device=device))
        encode = lambda x: expected(table, x)  # noqa: E731
    if model.tasks == ["repr"]:
        encode = lambda x: encoding(model, x[:, None], *shape[2:])  # noqa: E731
    x_in = [fixed.get(modality, torch.zeros_like(noise))] if beside(model) else []
    if x_in and unknown:  # pure generation, as its zeros mean in training
        encode = torch.zeros_like
    z, x = sample(diffusion, model.heads.aggregation(diffusion.alpha_bar).to(device),
                  network(model.unet, context, model.added(pooled, height, width), *x_in), model.heads, {modality: encode}, noise, fixed, z0, steps,
                  sampler or ("ddpm" if diffusion.sampler == "ddpm" else "ddim"), eta, generators, callback)
    drawn = {"image": z} | ({} if x_in and unknown else x)
    return {name: known[name] if name in known else model.vae.decode(value / scale).float().cpu() if value.dim() == 4 else value.cpu()
            for name, value in drawn.items()}


def restored(model, out, known):
    """`draw`'s of a masked picture -> z_0 in which, for a model on pixels, what was not masked is as given; and a line that says how far from it
    the network's own drawing is there. Through an autoencoder nothing stays exactly."""
    x, drawn = known["masked"], out["image"]
    kept = (x != 0).any(dim=1, keepdim=True).expand_as(x)
    image = torch.where(kept, x, drawn) if isinstance(model.vae, Pixels) else drawn

    def apart(image):
        return (image.clamp(-1, 1) - x).abs()[kept].mul(127.5)
    if not kept.any():
        return image, "all is masked"
    return image, (f"where nothing is masked, of 255: mean difference {apart(image).mean():.2f}, largest {apart(image).max():.2f}; "
                   f"the network's own drawing: mean {apart(drawn).mean():.2f}")


def side_by_side(model, given, count, height, width, **options):
    """-> PIL pictures, row by row all that are pictures of a sample, z_0 first; how many a row; lines to print. Otherwise as `draw`."""
    known = tensors(model, given, count, height, width)
    out, lines = draw(model, count, known, height=height, width=width, **options), []
    if "masked" in known:
        out["image"], line = restored(model, out, known)
        lines.append(line)
    pictures = [value for value in out.values() if value.dim() == 4]
    if "label" in out and "label" not in known:
        for row in out["label"]:
            best = row.topk(min(3, len(row)))
            lines.append(", ".join(f"{model.index['joint']['classes'][k]} {p:.3f}" for p, k in zip(best.values.tolist(), best.indices.tolist())))
    if "repr" in out and "repr" not in known:
        heldout, what = Pictures("repr", "heldout", model.native_size), "captions" if model.image_encoder is None else "pictures"
        shown = {data.caption(e, None, style): (style, e.cells[None]) for e, style in heldout.items}
        captions, drawings = list(shown), (to_pil(heldout._drawn(*which)) for which in shown.values())
        cosine = torch.nn.functional.cosine_similarity(out["repr"][:, None], vectors(model, captions, drawings).cpu(), dim=2)
        lines += [f"nearest of {len(captions)} held-out {what}: {captions[row.argmax()]!r}, cosine {row.max():.3f}" for row in cosine]
    return [to_pil(picture) for row in zip(*pictures) for picture in row], len(pictures), lines


def grid_rows(model, examples, seed):
    """Held-out examples -> PIL pictures, a row each: z_0 and x of nothing given; z_0 of x given, and that x; the true z_0."""
    (modality,) = model.heads
    x = [example["x"] for example in examples]
    if modality == "repr":
        x = vectors(model, x, (to_pil(example["target"]) for example in examples))
    else:
        x = torch.stack(x) if torch.is_tensor(x[0]) else torch.tensor(x)
    known, rows = {modality: x}, []
    for given in ({}, known) if model.heads.config["modalities"][modality]["weights"] != "interpolating" else (known,):
        out = draw(model, len(x), given, seed=seed)
        if "masked" in given:
            out["image"], _ = restored(model, out, given)
        rows += [value for value in out.values() if value.dim() == 4]
    return [to_pil(picture) for row in [*rows, [example["target"] for example in examples]] for picture in row]
