"""Load a model and draw with it: any task, any model folder or hub id.

    python sample.py --task edit
    python sample.py --task t2i --prompt "red apple, google style" --num-images 4
    python sample.py --task edit --image cat.png --prompt "make it snow" --model runs/all
    python sample.py --task class --model facebook/DiT-XL-2-256 --prompt "golden retriever"
    python sample.py --task translate --given source=cat.png

`load_model` rebuilds a model with its methods from disk, and `generate` draws with it. In the last
command several modalities are drawn together (MT-Diffusion): without --given, every modality is
generated. Whatever would draw no picture, such as weights that are not finite, ends in one line
that names the part at fault (`check_parts`, `Model.check`).

Letters: B batch, K branches of guidance, C channels, h w latent.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import adm
import aggregation
import dit
import emoji
import merge
import moe
import routing
from chart import arrange
from clip import CLIPText, Tokenizer
from data import ALL, ASSETS, EXAMPLES, MAX_PIXELS, SDXL_GUIDANCE, TASKS
from data import on_white, open_image, to_pil, to_tensor, words_of
from diffusion import CORRECTIONS, SAMPLERS, Diffusion, guide, partway, randn, seeded
from hub import LARGEST_NUMBER, Parser, UserError, between, blaming, command, fetch, find_index
from hub import load_weights, pick_device, read_json, refuse_idle, write_json, write_png
from unet import UNet
from vae import VAE

# --precision; None lets load_model decide.
DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
# model_index.json's class names of adm.py's models; those that only we open end in Pipeline2D.
PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "Pipeline2D")
# What ends the names of the folders of text encoders: only SDXL has a second one.
NUMBERS = ("", "_2")
LARGEST_SIDE = 8192  # of a picture, in pixels
# The command draws so many pictures at a time, so that --num-images needs no more memory.
BATCH = 16
JOINT = [task for task, rule in TASKS.items() if rule.modality]  # MT-Diffusion's tasks
# The command's options that `generate` has under the same name.
PASSED_ON = ("negative_prompt", "guidance", "image_guidance", "guidance_rescale", "steps",
             "sampler", "strength")


# -------------------------------------------------------------------------------------------------
# A model and its folder

@dataclass
class Model:
    """Hold everything that drawing needs. `index` is the folder's model_index.json.

    A model on pixels has no text encoder, and adm.Pixels stands for its autoencoder.
    """
    unet: nn.Module                           # or a DiT
    vae: nn.Module
    text_encoder: CLIPText | None
    tokenizer: Tokenizer | None
    scheduler: dict
    index: dict
    text_encoder_2: CLIPText | None = None    # SDXL has two
    tokenizer_2: Tokenizer | None = None
    path: str = "this model"                  # where it came from, for messages

    @property
    def diffusion(self):
        return Diffusion.from_config(self.scheduler)

    @property
    def tasks(self):
        """Task names, in the order of the rows of an upcycled U-Net.

        A plain U-Net has one task. Its input channels say whether it is text-to-image or
        image-to-image, but not which of these.
        """
        config = self.unet.config
        if "aggregation" in config:
            # Its heads belong to one task, whose name they tell.
            (modality,) = config["aggregation"]["modalities"]
            return [task for task, rule in TASKS.items() if rule.modality == modality]
        if "moe" in config:
            return config["moe"]["tasks"]
        if not self.texts:
            return ["class"] if self.classes else ["uncond"]
        # A source enters beside z_t, in as many channels again.
        plain = config["in_channels"] == config["out_channels"]
        return ["t2i"] if plain else ["edit", "sr", "inpaint"]

    @property
    def native_size(self):
        return self.unet.config["sample_size"] * self.vae.factor

    @property
    def guidance(self):
        """Task -> text and image scale that suit this model, where its index says so.

        Folders for diffusers have the key with an underscore, which diffusers skips.
        """
        return self.index.get("guidance") or self.index.get("_guidance") or {}

    @property
    def texts(self):
        """The pairs of tokenizer and text encoder: none on pixels, two for SDXL."""
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return [pair for pair in pairs if pair[1] is not None]

    @property
    def classes(self):
        """Name -> number of the classes that a class-conditional network draws; else empty.

        A class may have several names with commas between them, as in diffusers' DiTPipeline. Its
        number is a name too.
        """
        rows = getattr(self.unet, "num_class_embeds", None)
        if rows is None or "aggregation" in self.unet.config:
            return {}
        classes = {}
        for number, names in self.index.get("id2label", {}).items():
            for name in (names, *names.split(",")):
                classes[name.strip()] = int(number)
        for number in range(rows - 1):
            classes.setdefault(str(number), number)
        return classes

    @property
    def device(self):
        return self.unet.conv_out.weight.device

    @property
    def modules(self):
        return [self.unet, self.vae, *[encoder for _, encoder in self.texts]]

    def to(self, device):
        for module in self.modules:
            module.to(device)
        if self.unet.heads is not None:
            # Tables of coefficients are no parameters and move by themselves.
            self.unet.heads.process.to(device)
            self.unet.heads.diffusion.to(device)
        return self

    def check(self, part, output, place=None):
        """Return what a part computed, (B, ..); UserError where it is constant or not finite.

        Weights of NaN or zero, and activations beyond the largest fp16, would otherwise end in a
        black, grey or noisy picture without a word. place: where the part comes from, if it is not
        this model's own.
        """
        # One comparison a sample finds all of it: the spread of one that holds NaN is NaN, and of
        # one that holds an infinity it is infinite or NaN.
        low, high = output.float().flatten(1).aminmax(dim=1)
        spread = high - low
        if not ((spread > 0) & (spread < math.inf)).all():
            place = place or place_of(self.path, self.index, part)
            raise UserError(f"the {part} of {place} computes NaN, infinity or the same number "
                            "everywhere, so there is no picture to save: its weights are damaged, "
                            "or too large for half precision (--precision fp32)")
        return output

    @torch.no_grad()
    def encode_text(self, prompts):
        """B strings -> context (B, S, D), and what `added` turns into the network's other input.

        The latter is SDXL's pooled text (B, P), or the number of each class (B,) for a network that
        draws classes, whose context is None. Others have None.

        SDXL reads both encoders' penultimate states side by side, and the second's pooled state.
        Its empty prompt is all zeros where the folder says force_zeros_for_empty_prompt, in
        training as in drawing.
        """
        if self.classes:
            return None, self.class_numbers(prompts)
        if not self.texts:
            return None, None
        # Each encoder returns last, penultimate and pooled states: (B, S, D), (B, S, D), (B, P).
        states = []
        for number, (tokenizer, encoder) in zip(NUMBERS, self.texts):
            # A word that textual inversion has learned may stand for several tokens.
            ids = tokenizer([tokenizer.expand(prompt) for prompt in prompts])
            states.append(encoder(ids.to(self.device)))
            for output in states[-1]:
                self.check("text_encoder" + number, output)
        if len(states) == 1:
            # Stable Diffusion 1.x and 2.x, whose towers of 2.x lack the last layer already.
            return states[0][0], None
        context = torch.cat([penultimate for _, penultimate, _ in states], dim=-1)
        pooled = states[1][2]
        if self.index.get("force_zeros_for_empty_prompt", True):
            has_text = torch.tensor([float(prompt != "") for prompt in prompts]).to(context)
            context = context * has_text[:, None, None]
            pooled = pooled * has_text[:, None]
        return context, pooled

    def class_numbers(self, prompts):
        """B names of classes -> their numbers (B,). The empty name means no class."""
        # The last row of the table means no class, as the empty text means no text.
        numbers = self.classes | {"": self.unet.num_class_embeds - 1}
        for prompt in prompts:
            if prompt not in numbers:
                raise UserError(f"{self.path} has no class {prompt!r}. A class is a number below "
                                f"{numbers['']}, or a name, such as {next(iter(numbers))!r}")
        return torch.tensor([numbers[prompt] for prompt in prompts], device=self.device)

    def added(self, pooled, height, width):
        """What the network reads besides the context, from what `encode_text` returned.

        For SDXL this is the pooled text and six numbers, those of pictures never resized or
        cropped: original size, corner of the crop, target size.
        """
        if pooled is None:
            return None
        if self.classes:
            return dict(class_labels=pooled)
        sizes = pooled.new_tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return dict(text_embeds=pooled, time_ids=sizes.repeat(len(pooled), 1))

    def encode(self, pictures):
        """Pictures (B, 3, H, W) in [-1, 1] -> the mean of their latents (B, C, h, w), unscaled."""
        mean, _ = self.vae.encode(pictures.to(self.device), self.tile(pictures, 1))
        # On pixels there is no autoencoder that could be at fault: the picture itself is constant.
        return mean if self.vae.factor == 1 else self.check("vae", mean)

    def decode(self, latents):
        """Latents (B, C, h, w) as the U-Net draws them -> pictures (B, 3, H, W), about [-1, 1]."""
        latents = self.check("unet", latents) / self.vae.config["scaling_factor"]
        return self.check("vae", self.vae.decode(latents, self.tile(latents, self.vae.factor)))

    def tile(self, x, factor):
        """The side of a tile in latents, or None up to twice the size the autoencoder trained at.

        Above that the autoencoder's memory is the limit, not the U-Net's. factor: pixels of the
        picture for each of x.
        """
        side = self.vae.config["sample_size"]
        if max(x.shape[2:]) * factor <= 2 * side:
            return None
        # A quarter of each tile overlaps the next one, so the side is a multiple of 4.
        return side // self.vae.factor // 4 * 4

    def save(self, folder, dtype=None, unet_only=False):
        """Write the model in the Hugging Face layout; dtype: of the files' tensors.

        unet_only: leave the other parts that are there as they are, since training changes none.
        """
        folder = Path(folder)
        saves = {}
        if self.vae.factor > 1:     # on pixels there are no weights
            saves["vae"] = partial(self.vae.save_pretrained, dtype=dtype)
        for number, (tokenizer, encoder) in zip(NUMBERS, self.texts):
            saves[f"tokenizer{number}"] = tokenizer.save_pretrained
            saves[f"text_encoder{number}"] = partial(encoder.save_pretrained, dtype=dtype)
        self.unet.save_pretrained(folder / self.unet.folder, dtype=dtype)
        for part, save in saves.items():
            if not (unet_only and (folder / part).exists()):
                save(folder / part)
        write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler)
        write_json(folder / "model_index.json", self.index)


def pipeline_index(model):
    """The model_index.json of a model. diffusers opens the folder, unless a method is attached."""
    kept = ("id2label", "force_zeros_for_empty_prompt")
    index = {key: value for key, value in model.index.items() if key in kept}
    # diffusers warns of keys that it does not know, but for those with an underscore.
    index |= {"_diffusers_version": "0.30.0", "_guidance": model.guidance,
              "scheduler": ["diffusers", model.scheduler.get("_class_name", "DDIMScheduler")]}
    if model.vae.factor > 1:
        index["vae"] = ["diffusers", "AutoencoderKL"]
    for number, (_, encoder) in zip(NUMBERS, model.texts):
        index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
        index[f"text_encoder{number}"] = ["transformers", encoder.config["architectures"]]

    network = model.unet.class_names[0]
    if model.unet.folder == "transformer":
        # diffusers has no pipeline for a transformer on pixels.
        pipeline = "DiTPipeline" if "vae" in index else "DiTPipeline2D"
    elif not model.texts:
        pipeline = "DDPMPipeline"
    else:
        xl = "XL" if model.text_encoder_2 else ""
        # There is a pipeline of its own for networks that read a picture beside z_t.
        edits = "" if model.tasks == ["t2i"] else "InstructPix2Pix"
        pipeline = f"StableDiffusion{xl}{edits}Pipeline"
        if not xl:
            # Parts that are not in the folder must be named as missing, or diffusers looks for
            # them.
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None],
                      "requires_safety_checker": False}
    if name := model.unet.config.get("_class_name"):
        # A network that a method has changed has a class of our own, such as RoutedUNet2D. By the
        # usual names diffusers would open the folder and draw wrong pictures.
        pipeline = name.replace("UNet", "Pipeline").replace("DiT", "DiTPipeline")
        network = name
    return index | {"_class_name": pipeline, model.unet.folder: ["diffusers", network]}


def load_model(path_or_hub_id, dtype=torch.float32, device="cpu"):
    """Load a folder in the Hugging Face layout, or a hub id -> Model on the device, in eval mode.

    dtype: of the weights in memory and of what they compute. None takes bf16 on a GPU, but fp32 for
    a miniature and on pixels.
    A folder on this disk may hold only what differs from another model: model_index.json's "base",
    a path relative to the folder or a hub id, then says where the other parts are.
    """
    # Whatever goes wrong inside is the fault of this folder, and the message names it.
    with blaming(path_or_hub_id):
        model = load_parts(str(path_or_hub_id), dtype, device)
    # But a GPU that is too small is not.
    return model.to(torch.device(device))


def load_parts(path, dtype, device):
    """Load the parts of a model into the CPU's memory -> Model. device: where it will compute."""
    root, index = find_index(path)
    if "base" in index and not Path(path).is_dir():
        raise UserError(f"{path}: model_index.json names a base for the parts that are not there, "
                        "which works on this disk alone; download the repository and name its "
                        "folder")
    name = str(index.get("_class_name"))
    kind = UNet
    if "DiTPipeline" in name:
        kind = dit.DiT
    elif name.endswith(PIXEL_PIPELINES):
        kind = adm.UNet2D

    def place(part):
        return place_of(path, index, part)

    # In a model on pixels such as google/ddpm-cifar10-32, the files of both lie at the top.
    at_top = (kind is adm.UNet2D and (root / "scheduler_config.json").is_file()
              and not (root / kind.folder).is_dir())
    network_folder = root if at_top else fetch(place(kind.folder), kind.folder)
    scheduler_folder = root if at_top else fetch(place("scheduler"), "scheduler")
    config = read_json(network_folder / "config.json")
    scheduler = read_json(scheduler_folder / "scheduler_config.json")
    # What diffusers' pipelines correct silently in old files is corrected here, once.
    scheduler |= CORRECTIONS.get(name, {})
    with blaming(scheduler_folder / "scheduler_config.json"):
        Diffusion.from_config(scheduler)
    if kind is UNet and name in CORRECTIONS:
        with blaming(network_folder / "config.json"):
            correct_sample_size(config)
    on_pixels = kind is not UNet and "vae" not in index
    if dtype is None:
        # On a GPU bf16 halves the memory and more than halves the time; a miniature, whose latents
        # are 16 x 16, needs neither.
        small = on_pixels or config.get("sample_size") == 16
        gpu = torch.device(device).type == "cuda"
        dtype = torch.bfloat16 if gpu and not small else torch.float32

    parts = dict(tokenizer=None, text_encoder=None)
    if kind is UNet:
        # Of the networks that UNet knows, only SDXL's has such an embedding and two encoders.
        for number in NUMBERS if config.get("addition_embed_type") else NUMBERS[:1]:
            tokenizer, encoder = f"tokenizer{number}", f"text_encoder{number}"
            parts[tokenizer] = Tokenizer.from_pretrained(place(tokenizer), tokenizer)
            parts[encoder] = CLIPText.from_pretrained(place(encoder), encoder, dtype)
    if not on_pixels:
        parts["vae"] = VAE.from_pretrained(place("vae"), dtype=dtype)
    # The largest part comes last: where another one is missing, that shows before 10 GB are read.
    network = load_network(kind, network_folder, config, scheduler, dtype)
    if on_pixels:
        parts["vae"] = adm.Pixels(network.config["sample_size"])
    model = Model(unet=network, scheduler=scheduler, index=index, path=path, **parts)
    check_parts(model)
    return model


def correct_sample_size(config):
    """Set the sample_size of an old U-Net's config to 64, as diffusers' pipelines do.

    The first files of Stable Diffusion 1.x say 32, which would draw pictures of 256 pixels.
    """
    version = config.get("_diffusers_version")
    old = version is not None and tuple(map(int, version.split(".")[:2])) < (0, 9)
    if old and isinstance(config["sample_size"], int) and config["sample_size"] < 64:
        config["sample_size"] = 64


def place_of(path, index, part):
    """Find the model that a part belongs to: the folder itself, or what it calls its base."""
    if "base" not in index or (Path(path) / part).is_dir():
        return path
    with blaming(f"{path}: model_index.json"):
        beside = Path(path) / index["base"]
        return str(beside) if beside.exists() else index["base"]


def load_network(kind, folder, config, scheduler, dtype):
    """Build a network with the methods that its config.json records, and fill it with its weights.

    kind: UNet, adm.UNet2D or dit.DiT.
    """
    # The constructor knows the plain network; each method attaches in the order of its making.
    keys = ("moe", "projections", "aggregation", "routing")
    methods = {key: config.pop(key) for key in keys if config.get(key)}
    diffusion = Diffusion.from_config(scheduler)
    # On the meta device tensors have no memory yet: the weights are read only once, from the file.
    with torch.device("meta"), blaming(folder / "config.json"):
        network = kind(config)
        if "moe" in methods:
            moe.upcycle(network, **methods["moe"])
        if "projections" in methods:
            merge.add_projections(network, methods["projections"])
        if "aggregation" in methods:
            aggregation.add_heads(network, **methods["aggregation"], diffusion=diffusion)
    load_weights(network, folder, kind.rename, dtype)
    if "routing" in methods:
        # After loading: the table of random masks is no weight.
        with blaming(folder / "config.json"):
            routing.add_routing(network, **methods["routing"])
    return network.eval()


def check_parts(model):
    """Raise a UserError where two parts of a model do not fit each other.

    Without these comparisons a wrong pair would draw garbage without a word, or fail deep inside.
    """
    C = model.vae.config["latent_channels"]
    config = model.unet.config
    f = model.vae.factor
    needed = dict(sample_size=range(1, LARGEST_SIDE // f + 1), in_channels=(C, 2 * C),
                  out_channels=(C,))
    if not model.texts:
        # A network that learns the variance has as many channels again for it. Samplers such as
        # DDIM do not read them.
        learned = model.scheduler.get("variance_type") == "learned_range"
        needed["out_channels"] = (2 * C,) if learned else (C, 2 * C)
    else:
        widths = [encoder.config["hidden_size"] for _, encoder in model.texts]
        needed["cross_attention_dim"] = (sum(widths),)
    if model.text_encoder_2:
        pooled = model.text_encoder_2.width + 6 * config["addition_time_embed_dim"]
        needed["projection_class_embeddings_input_dim"] = (pooled,)
    compare(model, "U-Net" if model.unet.folder == "unet" else "transformer", config, needed)
    # A tile is as large, and at least four latents wide.
    compare(model, "vae", model.vae.config, dict(sample_size=range(4 * f, LARGEST_SIDE + 1)))
    with blaming(f"{model.path}: model_index.json, id2label"):
        classes = model.classes
    if classes:
        # The last row of the table means no class.
        compare(model, "network", vars(model.unet),
                dict(num_class_embeds=(max(classes.values()) + 2,)))
    # A mask of channels belongs to each timestep.
    T = model.diffusion.T
    compare(model, "routing", {"num_steps": T} | config.get("routing", {}), dict(num_steps=(T,)))
    for tokenizer, encoder in model.texts:
        end = tokenizer.vocab[tokenizer.special["eos_token"]]
        compare(model, "text encoder", encoder.config, dict(
            vocab_size=range(max(tokenizer.vocab.values()) + 1, LARGEST_NUMBER + 1),
            max_position_embeddings=range(tokenizer.length, LARGEST_NUMBER + 1),
            # Another model's vocabulary would turn the prompt into other words, and ends
            # elsewhere. Old configs say 2 for any.
            eos_token_id=(end, 2)))


def compare(model, part, config, needed):
    """Raise a UserError for an entry of a part's config that does not fit.

    needed: key -> a tuple or a range of the values that fit.
    """
    for key, fitting in needed.items():
        value = config.get(key)
        if value not in fitting:
            words = " or ".join(map(str, fitting))
            if isinstance(fitting, range):
                words = f"from {fitting[0]} to {fitting[-1]}"
            raise UserError(f"{model.path}: {key} of the {part} is {value}, but with the other "
                            f"parts it must be {words}")


# -------------------------------------------------------------------------------------------------
# Drawing

def kind_of(model, task):
    """The name in TASKS of what a task is: itself, or t2i or edit for a task added later."""
    if task not in model.tasks:
        raise UserError(f"{model.path} does not know the task {task!r}; it knows "
                        f"{', '.join(model.tasks)}")
    if task in TASKS:
        return task
    # moe.add_task gave it a name of its own; its input convolution tells its kind.
    channels = model.unet.config["moe"]["in_channels"][task]
    return "t2i" if channels == model.unet.config["out_channels"] else "edit"


def picture_size(model, picture, height, width):
    """The height and width to draw: as given, or the model's size along the longer side.

    picture: the one whose shape is kept, or None.
    """
    ratio_w, ratio_h = picture.size if picture else (1, 1)
    # Networks and autoencoders halve the picture several times, and a DiT cuts it into patches.
    # diffusers asks for multiples of 8, whatever the autoencoder.
    multiple = math.lcm(8 if model.native_size % 8 == 0 else model.vae.factor,
                        model.vae.factor * getattr(model.unet, "multiple", 1))

    longer = multiple * max(ratio_h, ratio_w)
    if height is None:
        height = max(1, round(model.native_size * ratio_h / longer)) * multiple
    if width is None:
        width = max(1, round(model.native_size * ratio_w / longer)) * multiple
    for length in (height, width):
        if length % multiple or not multiple <= length <= LARGEST_SIDE:
            raise UserError(f"height {height} and width {width} must be multiples of {multiple}, "
                            f"up to {LARGEST_SIDE}")
    return height, width


def scales(model, task, guidance, image_guidance):
    """Text and image scale: as given, or the model's own, or the paper's."""
    kind = kind_of(model, task)
    # MTU's appendix has scales for SD 1.5 and for SDXL. A model's own index goes before them.
    paper = (TASKS[kind].guidance, TASKS[kind].image_guidance)
    if model.text_encoder_2:
        paper = SDXL_GUIDANCE[kind]
    with blaming(f"{model.path}: model_index.json, guidance"):
        text_default, image_default = map(checked_scale, model.guidance.get(task, paper))
    return (text_default if guidance is None else checked_scale(guidance),
            image_default if image_guidance is None else checked_scale(image_guidance))


def checked_scale(scale):
    """A guidance scale as a float. As in diffusers, a scale of at most 1 means no guidance."""
    if not abs(float(scale)) <= 1e4:
        raise UserError(f"guidance {scale} must be finite, at most 10,000")
    return max(float(scale), 1.0)


def warn_of_long_prompts(model, prompts):
    # The tokenizer cuts a long prompt off without a word. A repeated prompt is named once.
    for prompt in dict.fromkeys(prompts) if model.tokenizer else ():
        if dropped := model.tokenizer.dropped(model.tokenizer.expand(prompt)):
            print(f"warning: the prompt is longer than {model.tokenizer.length} tokens; not seen: "
                  f"{' '.join(dropped)}", file=sys.stderr)


@torch.no_grad()
def generate(model, task, prompts, images=None, *, negative_prompt="", guidance=None,
             image_guidance=None, guidance_rescale=0.0, steps=20, sampler=None, strength=None,
             height=None, width=None, seed=0, ensemble=(), callback=None):
    """Draw one picture per prompt -> list of PIL images. Picture i has the seed `seed + i`.

    prompts: one string or a list; for the task class, names of classes or their numbers.
    images: the source pictures of an image-to-image task, one a prompt; or, with strength in
        (0, 1], the pictures to start from (SDEdit).
    guidance, image_guidance: text and image scale, at most 1 for none. By default the model's own
        (model_index.json, "guidance"), or else the paper's for the task (data.TASKS).
    height, width: by default the model's size, with the shape of a picture that is given.
    sampler: a name in diffusion.SAMPLERS; by default what the model's scheduler names.
    guidance_rescale: see diffusion.guide.
    ensemble: N U-Nets; number floor(t N / T) makes the step at t (DeMe Eq. 7).
    callback(i, t, x_t, x0): sees each step's latents.

    A request that cannot be met, or a part whose output is constant or not finite, raises
    UserError. MT-Diffusion's tasks draw their picture from nothing; see `draw_modalities`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    images = [images] if isinstance(images, Image.Image) else images
    if TASKS[kind_of(model, task)].modality:
        if any((*prompts, images, negative_prompt, guidance, image_guidance, guidance_rescale,
                strength, *ensemble)):
            raise UserError(f"{task} reads no prompt, picture, guidance or ensemble; what is known "
                            "comes by draw_modalities")
        drawn = draw_modalities(model, len(prompts), steps=steps, seed=seed, sampler=sampler,
                                height=height, width=width,
                                callback=callback and (lambda *step: callback(*step[:4])))
        return [to_pil(picture) for picture in drawn["image"]]
    if not (model.texts or model.classes) and any((*prompts, negative_prompt)):
        raise UserError(f"{model.path} reads no text, so a prompt would do nothing")
    reads_source = check_images(model, task, prompts, images, strength)
    guidance, image_guidance = scales(model, task, guidance, image_guidance)
    sampler = pick_sampler(model, sampler)
    if not 0 <= guidance_rescale <= 1:
        raise UserError(f"guidance rescale {guidance_rescale}: from 0 to 1")
    # A batch has one size: all pictures are resized to the shape of the first.
    height, width = picture_size(model, images and images[0], height, width)
    warn_of_long_prompts(model, [*prompts, negative_prompt])

    diffusion = model.diffusion.to(model.device)
    # Each picture has a generator of its own, so it does not depend on the batch around it.
    generators = seeded(range(seed, seed + len(prompts)))
    x = randn((len(prompts), *latent_shape(model, height, width)), generators, model.device)
    start, source = 0, None
    if images:
        mean = model.encode(as_tensors(images, height, width))
        if strength is not None:
            # SDEdit: noise is added to the picture, and only the last steps are run.
            scaled = mean * model.vae.config["scaling_factor"]
            x, start = partway(diffusion, scaled, x, steps, strength, sampler)
        if reads_source:
            # As InstructPix2Pix was trained (data.Encoder): without the scaling that z_t has.
            source = mean
    predict = guided(model, task, prompts, source, negative_prompt=negative_prompt,
                     guidance=guidance, image_guidance=image_guidance, rescale=guidance_rescale,
                     size=(height, width), ensemble=ensemble)
    x0 = SAMPLERS[sampler](diffusion, predict, x, steps=steps, start=start, generators=generators,
                           callback=callback)
    return [to_pil(picture) for picture in model.decode(x0)]


def check_images(model, task, prompts, images, strength):
    """Check that pictures come where the task needs them -> whether the U-Net reads a source."""
    if images and len(images) != len(prompts):
        raise UserError("images is a list of as many pictures as there are prompts")
    reads_source = TASKS[kind_of(model, task)].source
    if not images and (reads_source or strength is not None):
        raise UserError(f"task {task} needs a picture to start from: --image FILE")
    if images and not reads_source and strength is None:
        raise UserError(f"task {task} takes a picture only to start from: give --strength too")
    return reads_source


def latent_shape(model, height, width):
    """The shape (C, h, w) of the latent of a picture of height x width pixels."""
    factor = model.vae.factor
    return model.vae.config["latent_channels"], height // factor, width // factor


def as_tensors(images, height, width):
    """PIL pictures -> (B, 3, height, width) in [-1, 1], on white where they are transparent."""
    pictures = [on_white(picture.convert("RGBA")) for picture in images]
    pictures = [picture.resize((width, height), Image.BICUBIC) for picture in pictures]
    return torch.stack([to_tensor(picture) for picture in pictures])


def guided(model, task, prompts, source, *, negative_prompt, guidance, image_guidance, rescale,
           size, ensemble):
    """Make predict(x_t, t) -> the guided prediction (B, C or 2 C, h, w), for a sampler.

    Guidance compares predictions of K branches, which run as one batch: without text and picture,
    with the picture alone, with both. diffusion.guide says how they combine.
    """
    B = len(prompts)
    nothing = [negative_prompt] * B
    # Each branch: its prompts, and whether it sees the source.
    branches = [(nothing, 0.0), (nothing, 1.0), (prompts, 1.0)]
    if source is None:
        # The first two are the same then.
        del branches[0]
    if guidance == 1 and (source is None or image_guidance == 1):
        branches = branches[-1:]
    K = len(branches)
    # The text is encoded once, before the first step, and for all branches together.
    context, pooled = model.encode_text([prompt for words, _ in branches for prompt in words])
    added = model.added(pooled, *size)
    weight = model.unet.conv_out.weight
    # The experts' router reads which task it is (MTU Eq. 1); a plain U-Net does not look.
    row = torch.full((K * B,), model.tasks.index(task), device=weight.device)
    if source is not None:
        source = torch.cat([source * seen for _, seen in branches]).to(weight)  # (K B, C, h, w)
    T = model.diffusion.T

    def predict(x, t):
        # The same x_t for every branch; the samplers run in fp32, the network in its own type.
        z = x.to(weight.dtype).repeat(K, 1, 1, 1)                               # (K B, C, h, w)
        if source is not None:
            z = torch.cat([z, source], dim=1)                                   # (K B, 2 C, h, w)
        number = int(t[0]) * len(ensemble) // T                                 # DeMe Eq. 7
        unet = ensemble[number] if ensemble else model.unet
        out = unet(z, t.repeat(K), context, task=row, added=added).float()
        model.check("unet", out, f"copy {number + 1} of the ensemble" if ensemble else None)
        out = out.unflatten(0, (K, B))                                          # (K, B, C.., h, w)
        C = x.shape[1]
        prediction = guide(out[:, :, :C], guidance, image_guidance, rescale)
        # A variance is not guided: it is that of the last branch, as in DiT.
        return torch.cat([prediction, out[-1, :, C:]], dim=1)
    return predict


def pick_sampler(model, sampler):
    """The sampler that was named, or the one that the model's scheduler stands for."""
    sampler = sampler or model.diffusion.sampler
    if sampler is None:
        # The file describes the process all the same, so any sampler of ours may step through it.
        raise UserError(f"{model.path}: the scheduler's {model.diffusion.missing} is not "
                        f"implemented; name a sampler with --sampler: {', '.join(SAMPLERS)}")
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler}: choose from {', '.join(SAMPLERS)}")
    return sampler


# -------------------------------------------------------------------------------------------------
# Several modalities (MT-Diffusion)

@torch.no_grad()
def draw_modalities(model, count, known=None, *, steps=20, seed=0, sampler=None, height=None,
                    width=None, callback=None):
    """Generate every modality that is not in `known`, by Algorithm 1.

    known: "image" or the model's modality -> pictures (B, 3, H, W), classes (B,) or vectors
        (B, D). With known = {} everything is generated; with the image known, the other modality
        is inferred from it (classification, reverse translation).
    -> {"image": (B, 3, H, W), modality: pictures, probabilities (B, K) or vectors (B, D)}; what is
        known is there as it is. Sample i has the seed `seed + i`.
    """
    unet = model.unet
    (modality,) = unet.heads
    known = known or {}
    check_known(model, modality, known)
    height, width = picture_size(model, None, height, width)
    shape = latent_shape(model, height, width)
    generators = seeded(range(seed, seed + count))
    noise = randn((count, *shape), generators, model.device)
    in_z = {name: to_latents(model, value.to(model.device)) for name, value in known.items()}
    z0 = in_z.pop("image", None)

    # How x enters: by its encoding in z_t, and for -X also beside z_t.
    encode = aggregation.modality_encoder(model, modality, shape)
    x_input = in_z.get(modality, torch.zeros_like(noise))
    x_is_absent = aggregation.reads_x(unet) and modality not in known
    if x_is_absent:
        # -X learned pure generation from zeros in place of x and of E(x).
        encode = torch.zeros_like
    context, pooled = model.encode_text([""] * count)
    keep = torch.ones(count, device=model.device)  # as in training, where some samples drop x
    network = aggregation.predictor(unet, unet, {modality: aggregation.Known(x_input, None, keep)},
                                    context, model.added(pooled, height, width))

    def predict(z, t):
        prediction, outputs = network(z, t)
        return model.check("unet", prediction), outputs

    # Only these two are written for an E that changes from step to step.
    default = "ddpm" if model.diffusion.sampler == "ddpm" else "ddim"
    z, x = aggregation.sample(unet.heads, predict, {modality: encode}, noise, known=in_z, z0=z0,
                              steps=steps, sampler=sampler or default,
                              generators=generators, callback=callback)
    drawn = {}
    for name, value in ({"image": z} if x_is_absent else {"image": z, **x}).items():
        if name in known:
            # Exactly as it was given, and not as the autoencoder would return it.
            drawn[name] = known[name]
        elif value.dim() == 4:
            drawn[name] = model.decode(value).float().cpu()
        else:
            drawn[name] = model.check("unet", value).cpu()
    if "masked" in known and model.vae.factor == 1:
        # On pixels, what was not masked is put back. No pixel of a picture is exactly zero.
        visible = (known["masked"] != 0).any(dim=1, keepdim=True)
        drawn["image"] = torch.where(visible, known["masked"], drawn["image"])
    return drawn


def check_known(model, modality, known):
    """Raise a UserError where a model was not trained to do without its other modality."""
    if modality in known:
        return
    if model.unet.config["aggregation"]["modalities"][modality]["weights"] == "interpolating":
        # Such a process ends at x instead of at pure noise, so there is nowhere to start from.
        raise UserError(f"this model was trained with --schedule interpolating, for a {modality} "
                        f"that is always known: --given {modality}=...")
    if "image" in known and aggregation.reads_x(model.unet):
        # Zeros beside z_t mean pure generation, in which x is not drawn at all.
        raise UserError(f"this model reads {modality} beside z_t (--input x), so it cannot infer "
                        "it from the image")


def to_latents(model, value):
    """Pictures (B, 3, H, W) -> latents in the space of z_0; anything else stays as it is."""
    if value.dim() != 4:
        return value
    return (model.encode(value) * model.vae.config["scaling_factor"]).float()


def read_given(model, word, height, width):
    """Read --given's NAME=VALUE -> {NAME: what it stands for}, and the height and width to draw."""
    (modality,) = model.unet.heads
    name, _, text = word.partition("=")
    if name not in ("image", modality) or not text:
        raise UserError(f"--given {word}: give NAME=VALUE, where NAME is image or {modality}")
    # A picture that is known gives its shape to what is drawn.
    picture = open_image(text) if name not in ("label", "repr") else None
    height, width = picture_size(model, picture, height, width)
    if picture:
        value = read_picture(name, picture, height, width)
    elif name == "repr":
        value = aggregation.vectors(model, [text])[0].cpu()
    else:
        classes = aggregation.class_names(model.unet)
        if text not in classes:
            raise UserError(f"--given {word}: the classes are {', '.join(classes)}")
        value = torch.tensor(classes.index(text))
    return {name: value}, height, width


def read_picture(name, picture, height, width):
    """A picture of --given -> (3, H, W), resampled to the size that is drawn.

    A picture to be restored is zero where it is transparent, and elsewhere exactly as it is, so it
    must have that size already.
    """
    if name != "masked":
        return as_tensors([picture], height, width)[0]
    hidden = np.asarray(picture.getchannel("A")) < 255
    if not hidden.any():
        raise UserError("--given masked: what is transparent is restored, and nothing is")
    if picture.size != (width, height):
        raise UserError(f"--given masked: the picture is {picture.width} x {picture.height} "
                        f"and what is drawn {width} x {height}; resize one, or give --height and "
                        "--width")
    # No 8-bit value becomes exactly zero, so zero means masked and nothing else.
    value = to_tensor(on_white(picture))
    value[:, torch.from_numpy(hidden)] = 0
    return value


def put_into_words(model, name, values):
    """Put a drawn modality that is no picture into words, a line a sample: classes, or a text."""
    if name == "label":
        classes = aggregation.class_names(model.unet)
        for row in values:
            best = row.topk(min(3, len(row)))
            yield ", ".join(f"{classes[i]} {p:.3f}"
                            for p, i in zip(best.values.tolist(), best.indices.tolist()))
    if name == "repr":
        # A vector has no picture of its own, but it has neighbours among texts.
        captions = [example["prompt"] for example in emoji.Builtin("plain", "heldout")]
        reference = aggregation.vectors(model, captions).cpu()
        for row in values:
            cosine = torch.nn.functional.cosine_similarity(row[None], reference)
            yield (f"nearest held-out caption: {captions[cosine.argmax()]!r}, "
                   f"cosine {cosine.max():.3f}")


# -------------------------------------------------------------------------------------------------
# Grids and strips

@torch.no_grad()
def picture_of(model, value):
    """An example's picture (3, H, W), or an encoded one's moments (2, C, h, w) -> a PIL picture."""
    if value.dim() == 4:
        # A folder that `data.py encode` wrote has no pictures, so the autoencoder shows its copy.
        value = model.vae.decode(value[:1].to(model.device))[0]
    return to_pil(value)


def sample_grid(model, datasets, columns, seed, path):
    """Draw held-out examples: for each task a row of sources, of samples and of targets."""
    pictures = []
    sampler = model.diffusion.sampler or "ddim"
    for task, dataset in datasets.items():
        # Spread over the data set, so that they are not all of one kind.
        chosen = [dataset[(2 * i + 1) * len(dataset) // (2 * columns)] for i in range(columns)]
        if task in JOINT:
            pictures += modality_rows(model, TASKS[task].modality, [e["x"] for e in chosen], seed)
        else:
            sources = [picture_of(model, e["source"]) for e in chosen if "source" in e]
            pictures += sources
            pictures += generate(model, task, [e["prompt"] for e in chosen], sources or None,
                                 seed=seed, sampler=sampler)
        pictures += [picture_of(model, e["target"]) for e in chosen]
    write_png(path, arrange(pictures, columns), dict(seed=seed))


def modality_rows(model, modality, x, seed):
    """Draw unconditionally, and then given x -> the pictures among the modalities, row by row."""
    if modality == "repr":
        x = aggregation.vectors(model, x).cpu()
    elif modality == "source" and x[0].dim() == 4:  # the moments of an encoded folder
        x = torch.stack([to_tensor(picture_of(model, value)) for value in x])
    else:
        x = torch.stack([torch.as_tensor(value) for value in x])
    requests = [{}, {modality: x}]
    if model.unet.config["aggregation"]["modalities"][modality]["weights"] == "interpolating":
        requests = [{modality: x}]  # such a process begins at x
    pictures = []
    for known in requests:
        for value in draw_modalities(model, len(x), known, seed=seed).values():
            if value.dim() == 4:
                pictures += [to_pil(picture) for picture in value]
    return pictures


def save_trajectory(model, frames, path, arguments):
    """Write the denoising of one picture as a strip, x_t above the predicted x_0.

    frames: a list of (2, C, h, w), x_t and x_0 at every step, of which ten are shown.
    """
    if len(frames) > 10:
        frames = [frames[round(i * (len(frames) - 1) / 9)] for i in range(10)]
    # Half-noisy latents are not what the autoencoder was made for, but it shows them well enough.
    scale = model.vae.config["scaling_factor"]
    with torch.no_grad():
        columns = [model.vae.decode(frame / scale) for frame in frames]
    pictures = [to_pil(column[row]) for row in (0, 1) for column in columns]
    write_png(path, arrange(pictures, len(columns)), arguments)


# -------------------------------------------------------------------------------------------------
# The command

def get_args():
    parser = Parser("Generate images with a model.")
    group = parser.add_argument_group("what to draw")
    group.add_argument("--task", default="t2i", help="a task that the model knows")
    group.add_argument("--model", help="model folder or hub id (default: assets/tiny-mtu, or "
                       "runs/TASK for a task that it does not know)")
    group.add_argument("--num-images", type=between(1, 10_000), default=1,
                       help="pictures of each prompt")
    group.add_argument("--height", type=int, help="in pixels (default: the model's, with the shape "
                       "of --image)")
    group.add_argument("--width", type=int, help="in pixels, likewise")
    group.add_argument("--seed", type=between(0, 1e18), default=0,
                       help="random seed; picture i has seed + i")

    single = parser.add_argument_group("tasks that draw one picture")
    single.add_argument("--prompt", action="append", help="text, or the name of a class; repeat it "
                        "for more pictures (default: the task's example, or the first class)")
    single.add_argument("--negative-prompt", default="", help="text to steer away from")
    single.add_argument("--image", help="source picture (default: the task's example)")
    single.add_argument("--guidance", type=float, help="text guidance scale, 1 for none (default: "
                        "the model's own, or the paper's)")
    single.add_argument("--image-guidance", type=float, help="image guidance scale, 1 for none")
    single.add_argument("--guidance-rescale", type=float, default=0.0, help="bring over-saturated "
                        "guided pictures back, 0 to 1 (0.7 for models that predict v to pure "
                        "noise)")
    single.add_argument("--strength", type=float, help="start from --image instead of from noise, "
                        "and run this share of the steps (SDEdit)")
    single.add_argument("--ensemble", nargs="+", default=[], metavar="MODEL", help="DeMe before "
                        "merging: copies tuned for equal timestep ranges, from t = 0 upwards")
    single.add_argument("--side-by-side", action="store_true",
                        help="save the source and the result in one picture")
    single.add_argument("--trajectory", action="store_true",
                        help="save the denoising too, as a strip of pictures")

    several = parser.add_argument_group("tasks that draw several modalities (MT-Diffusion)")
    several.add_argument("--given", action="append", default=[], metavar="NAME=VALUE",
                         help="a modality that is known, such as image=FILE, source=FILE, "
                         "masked=FILE (transparent where masked), label=CLASS or repr=TEXT; "
                         "without it every modality is generated")

    group = parser.add_argument_group("how to draw, and where to")
    group.add_argument("--steps", type=int, default=20, help="sampling steps (MTU: 20, SDXL 50)")
    group.add_argument("--sampler", choices=SAMPLERS,
                       help="default: the one that the model's scheduler names")
    group.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, "
                       "but fp32 for a miniature")
    group.add_argument("--out", help="the picture, a .png file (default: samples/TASK.png)")
    args = parser.parse_args()
    if args.task in JOINT:
        refuse_idle(args, single, f"what {args.task} is to know comes by --given")
    else:
        refuse_idle(args, several, f"MT-Diffusion has the tasks {', '.join(JOINT)}")
    return args


def check_args(args):
    """Check what can be checked before a model is loaded, and name the model and the picture."""
    rule = TASKS.get(args.task)
    if len(args.given) > 1:
        raise UserError("--given: give NAME=VALUE once; with both modalities nothing is left to "
                        "generate")
    if args.image and not args.prompt and rule and words_of(args.task):
        # The shipped example's instruction must not be applied to somebody's own picture.
        raise UserError(f"--image needs a --prompt: what shall {args.task} do with it?")
    args.out = args.out or f"samples/{args.task}.png"
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: pictures are written as .png files")
    # Refused now, and not after minutes of drawing.
    if Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder")
    if args.model is None:
        # The model that ships knows MTU's tasks, and perhaps some that were added to it.
        trained = rule and args.task not in ALL
        args.model = f"runs/{args.task}" if trained else str(ASSETS / "tiny-mtu")
        if trained and not Path(args.model).is_dir():
            raise UserError(f"no model at {args.model}: python train.py --task {args.task} trains "
                            "one, or name another with --model")


def check_sheet(count, height, width):
    """Raise a UserError where the sheet of all pictures would be larger than one can open."""
    if count * height * width > MAX_PIXELS:
        raise UserError(f"--num-images: {count} pictures of {width} x {height} make a sheet of "
                        f"more than {MAX_PIXELS:,} pixels; at most "
                        f"{MAX_PIXELS // (height * width)} fit on one")


def load_ensemble(args, model):
    """DeMe's copies before merging, in the order of their timestep ranges -> their U-Nets."""
    if not args.ensemble:
        return []
    # In another order each copy would draw the timesteps that another one was tuned for.
    merge.check_order(args.ensemble, model.diffusion.T)
    copies = [load_model(path, DTYPES[args.precision], model.device) for path in args.ensemble]
    for path, copy in zip(args.ensemble, copies):
        if copy.unet.config != model.unet.config or copy.scheduler != model.scheduler:
            raise UserError(f"--ensemble: {path} is another kind of model than {args.model}")
    return [copy.unet for copy in copies]


def draw_pictures(args, model, bar):
    """Run the command for tasks that draw one picture of a prompt -> a line on what was drawn."""
    # Without an example of the task: the first class, or the empty prompt.
    image, example = EXAMPLES.get(args.task, (None, next(iter(model.classes), "")))
    image = args.image or (image and str(ASSETS / "examples" / image))
    prompts = [prompt for prompt in args.prompt or [example] for _ in range(args.num_images)]
    source = open_image(image) if image else None
    # Before the copies of an ensemble are loaded and minutes go into drawing.
    height, width = picture_size(model, source, args.height, args.width)
    check_sheet(len(prompts), height, width)
    ensemble = load_ensemble(args, model)

    frames = []     # of the first picture
    pictures = []

    def watch(i, t, x, x0):
        bar.update()
        if args.trajectory and not pictures:
            frames.append(torch.cat([x[:1], x0[:1]]))

    bar.total = args.steps * math.ceil(len(prompts) / BATCH)
    for first in range(0, len(prompts), BATCH):
        chunk = prompts[first:first + BATCH]
        pictures += generate(
            model, args.task, chunk, source and [source] * len(chunk), height=height, width=width,
            seed=args.seed + first, ensemble=ensemble, callback=watch,
            **{name: getattr(args, name) for name in PASSED_ON})

    # One prompt makes a square of pictures, several make a row each.
    columns = round(len(pictures) ** 0.5)
    if len(prompts) > args.num_images > 1:
        columns = args.num_images
    if args.side_by_side and source:
        shown = on_white(source).resize(pictures[0].size, Image.BICUBIC)
        pictures = [one for picture in pictures for one in (shown, picture)]
        columns = 2 * columns
    # The file says how to draw it again.
    arguments = vars(args) | {"prompt": prompts, "image": image}
    write_png(args.out, arrange(pictures, columns), arguments)
    if args.trajectory:
        strip = Path(args.out).with_name(f"{Path(args.out).stem}-trajectory.png")
        save_trajectory(model, frames, strip, arguments)
    words = ", ".join(map(repr, dict.fromkeys(prompts)))
    return [f"{args.task}: {words}{f' on {image}' if image else ''} -> {args.out}"]


def draw_joint(args, model, bar):
    """Run the command for MT-Diffusion's tasks -> lines on what is no picture, and on the file.

    The picture has all modalities side by side, one row a sample.
    """
    known = {}
    height, width = picture_size(model, None, args.height, args.width)
    # There is at most one such word.
    for word in args.given:
        known, height, width = read_given(model, word, args.height, args.width)
    check_sheet(2 * args.num_images, height, width)
    pictures = []
    lines = []
    bar.total = args.steps * math.ceil(args.num_images / BATCH)
    for first in range(0, args.num_images, BATCH):
        count = min(BATCH, args.num_images - first)
        chunk = {name: value.expand(count, *value.shape) for name, value in known.items()}
        drawn = draw_modalities(model, count, chunk, steps=args.steps, seed=args.seed + first,
                                sampler=args.sampler, height=height, width=width,
                                callback=lambda *_: bar.update())
        shown = [value for value in drawn.values() if value.dim() == 4]
        pictures += [to_pil(picture) for row in zip(*shown) for picture in row]
        for name in drawn.keys() - known.keys():
            lines += put_into_words(model, name, drawn[name])
    write_png(args.out, arrange(pictures, len(shown)), vars(args))
    given = ", ".join(args.given) or "nothing"
    return [*lines, f"{args.task}: {', '.join(drawn)}; given: {given} -> {args.out}"]


def main():
    args = get_args()
    check_args(args)
    model = load_model(args.model, DTYPES[args.precision], pick_device(args.device))
    draw = draw_joint if TASKS[kind_of(model, args.task)].modality else draw_pictures
    # As a context, the bar leaves the terminal also where an error's one line follows.
    with tqdm(desc=args.task, leave=False, delay=1) as bar:
        lines = draw(args, model, bar)
    print(*lines, sep="\n")


if __name__ == "__main__":
    command(main)
