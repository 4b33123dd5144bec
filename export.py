"""What other programs open: the model_index.json of diffusers' pipelines, and one task of an upcycled model as such a folder."""
from dataclasses import replace
from pathlib import Path

import moe
from adm import UNet2D
from data import EXAMPLES
from folders import UserError, new_folder, write_file


def pipeline_index(model):
    """The model_index.json with which diffusers opens a model that is not upcycled: the class of the whole and of each part."""
    scheduler = ["diffusers", model.scheduler.get("_class_name", "DDIMScheduler")]
    if isinstance(model.unet, UNet2D):
        return dict(_class_name="DDPMPipeline", _diffusers_version="0.30.0", unet=["diffusers", "UNet2DModel"], scheduler=scheduler)
    xl = "XL" if model.text_encoder_2 else ""
    edits = "" if model.tasks == ["t2i"] else "InstructPix2Pix"
    index = {"_guidance": model.guidance} if model.guidance else {}
    index |= dict(_class_name=f"StableDiffusion{xl}{edits}Pipeline", _diffusers_version="0.30.0", vae=["diffusers", "AutoencoderKL"],
                 unet=["diffusers", "UNet2DConditionModel"], tokenizer=["transformers", "CLIPTokenizer"],
                 text_encoder=["transformers", "CLIPTextModel"], scheduler=scheduler)
    if xl:
        return index | dict(tokenizer_2=["transformers", "CLIPTokenizer"], text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
                            force_zeros_for_empty_prompt=model.index.get("force_zeros_for_empty_prompt", True))
    return index | dict(safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)


def export(model, task, folder, base):
    """One task as a folder that diffusers opens unmodified: StableDiffusionPipeline for t2i, StableDiffusionInstructPix2PixPipeline for
    image-to-image tasks (Stable Diffusion XL's likewise), with a model card. base: what was trained, for the card; None: nothing, it is new."""
    folder, upcycled = Path(folder), "moe" in model.unet.config
    if task not in model.tasks:
        raise UserError(f"this model does not know the task {task!r}; it knows {', '.join(model.tasks)}")
    if "routing" in model.unet.config or "projections" in model.unet.config:
        raise UserError("a routed model masks channels at every timestep, one with projections after blocks has layers that no other program "
                        "knows: they cannot be exported")
    if model.heads is not None:
        raise UserError("a joint model draws several modalities, which no other program knows: it cannot be exported")
    if isinstance(model.unet, UNet2D):
        raise UserError("a model that draws pixels has nothing to export: its folder is diffusers' own layout")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; choose another --export-to")
    plain = replace(model, unet=moe.fold(model.unet, task)) if upcycled else model
    index, base = pipeline_index(plain), Path(base).name if base and Path(base).exists() else base
    name, source = index["_class_name"], plain.tasks != ["t2i"]
    index["_guidance"] = {task: scales for name, scales in model.guidance.items() if name == task}
    how = "trained" if base is None else f"trained from `{base}`"
    if upcycled:
        how = f"upcycled from `{base}` to {', '.join(model.tasks)} (MTU, arXiv 2503.11905); its experts are folded into plain weights"
    given, scales = ", image=picture" if source else "", index.get("_guidance", {}).get(task, "the defaults")
    code = f"from diffusers import {name}\npipe = {name}.from_pretrained(\"{folder.name}\")\n"
    about, licence = ("", "") if base is None else (f"base_model: {base}\n", f" The licence is that of `{base}`.")
    card = f"""---
{about}library_name: diffusers
pipeline_tag: {"image-to-image" if source else "text-to-image"}
---
The task `{task}` of a model {how}.{licence}

```python
{code}picture = pipe("{EXAMPLES.get(task, ("", ""))[1]}"{given}).images[0]
```

Text and image guidance: {scales}. In the project that trained it: `python sample.py --task {task} --model {folder.name}`.
"""
    with new_folder(folder) as beside:
        replace(plain, index=index).save(beside)
        write_file(beside / "README.md", lambda path: path.write_text(card))
