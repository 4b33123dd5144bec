#!/usr/bin/env bash
# Make the miniature: a small Stable Diffusion that knows text-to-image alone, which is assets/tiny;
# the same network upcycled to four tasks by MTU's own list of trained parts; and that one trained
# on with all its weights. assets/tiny-mtu is of the first version still (RESULTS.md).
#
#     bash experiments/miniature.sh [FOLDER]      (default: runs/miniature)
#
# A stage that is finished is skipped, and an interrupted one goes on. The expected minutes are of
# two cores that multiply in bf16; the upper figures are of cores that did other work too. Two cores
# that have AVX2 alone take three times as long. The autoencoder is that of assets/tiny: `python
# experiments/train_autoencoder.py` made it in 27 minutes (29.2 dB on held-out pictures).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/miniature}
# A processor without instructions for bf16 would take ten times as long in it as in fp32.
precision=$(python -c 'import hub
print("fp32" if hub.is_slow_in_bf16(hub.pick_device()) else "bf16")')
train="torchrun --nproc_per_node 2 train.py --precision $precision"

echo "1. Text tower: 7 to 10 minutes. It is frozen afterwards, as Stable Diffusion's is."
echo "   Expected: 87 % of the variance, 77 % of the captions nearest to their own picture."
[ -d "$out/text" ] || python experiments/train_text_tower.py --out "$out/text"

echo "2. Base: text-to-image from scratch, 80 to 95 minutes."
echo "   Expected loss: 0.27 in training, 0.72 on held-out captions (0.62 after 2,000 steps)."
$train --task t2i --batch-size 64 --model scratch --encoders "$out/text" --lr 2e-3 --warmup 400 \
    --steps 8500 --save-every 500 --eval-every 500 --eval-size 128 --out "$out/tiny"

echo "3. MTU: the paper's list from that base, 50 to 65 minutes."
echo "   Expected held-out loss: edit 0.137, sr 0.150, inpaint 0.055, t2i 0.67."
$train --task all --batch-size 32 --model "$out/tiny" --lr 1e-2 --warmup 50 --steps 6000 \
    --save-every 500 --eval-every 1000 --eval-size 128 --out "$out/list"

echo "4. All weights, from there, 60 minutes. This is no longer MTU."
echo "   Expected held-out loss: edit 0.111, sr 0.130, inpaint 0.042, t2i 0.67."
$train --task all --batch-size 40 --train all --model "$out/list" --lr 1e-3 --warmup 50 \
    --steps 4500 --save-every 250 --eval-every 1000 --eval-size 128 --out "$out/tiny-mtu"

echo "5. Half precision, in $out/assets, and the figures of all."
python - "$out" <<'END'
import sys
from pathlib import Path

import torch

from hub import write_json
from sample import load_model

out = Path(sys.argv[1])
base = load_model(out / "tiny")
base.save(out / "assets/tiny", dtype=torch.float16)
# transformers computes in the precision of the file, and diffusers' U-Net in fp32.
base.text_encoder.save_pretrained(out / "assets/tiny/text_encoder")
for name in ("list", "tiny-mtu"):
    model = load_model(out / name)
    # Everything but the U-Net is the base's.
    model.unet.save_pretrained(out / "assets" / name / "unet", dtype=torch.float16)
    write_json(out / "assets" / name / "model_index.json", {**model.index, "base": "../tiny"})
END
python evaluate.py --task t2i --model "$out/assets/tiny" --split train --count 96
for name in list tiny-mtu; do
    for seed in 0 1 2; do
        python evaluate.py --task all --model "$out/assets/$name" --count 100 --seed $seed
        python evaluate.py --task t2i --model "$out/assets/$name" --split train --count 96 \
            --seed $seed
    done
done
