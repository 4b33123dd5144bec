"""Train the small classifier whose features measure pictures of Fashion-MNIST.

    python experiments/train_fashion_classifier.py --data FOLDER --out runs/classifier.safetensors

The file that ships is assets/fashion/classifier.safetensors. Distances that were measured with two
different classifiers cannot be compared, so it should not be trained again without a reason; the
results name its hash. No picture is mirrored in training: all shoes point to the left, and a
measure that had learned to overlook mirroring could not see a network draw them to the right.
"""
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import common
import frame
from hub import Parser, UserError, command, replacing


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", default="runs/classifier.safetensors", help="new file")
    parser.add_argument("--epochs", type=int, default=6, help="visits of each picture")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="random seed for weights and order")
    args = parser.parse_args()
    if min(args.epochs, args.batch_size) < 1 or not 0 < args.lr < 1:
        raise UserError("--epochs and --batch-size are at least 1, and --lr is below 1")
    common.refuse_existing(args.out)
    return args


def train(classifier, pictures, classes, args):
    """Train in place on pictures (N, 3, 16, 16) and their classes (N,)."""
    steps = args.epochs * (len(pictures) // args.batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.lr, weight_decay=0.01)
    # The rate rises for a third of the steps and falls to zero: a few epochs are enough so.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    order = torch.empty(0, dtype=torch.long)
    classifier.train()
    for _ in tqdm(range(steps), desc="classifier"):
        if len(order) < args.batch_size:
            order = torch.randperm(len(pictures))
        batch, order = order[:args.batch_size], order[args.batch_size:]
        logits = classifier(pictures[batch])
        # Smoothed labels keep the features of one class from shrinking to a point.
        loss = F.cross_entropy(logits, classes[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval().requires_grad_(False)


def set_unit(classifier, pictures):
    """Rescale the features so that their variance is 1 on average, and nothing else changes."""
    features = frame.features_of(classifier, pictures)
    unit = features.var(dim=0).mean().sqrt()
    classifier.unit.mul_(unit)
    # The last layer reads smaller numbers now, and its weights make up for it.
    classifier.linear.weight.mul_(unit)


def accuracy(classifier, pictures, classes):
    with torch.no_grad():
        found = torch.cat([classifier(part).argmax(dim=1) for part in pictures.split(500)])
    return (found == classes).double().mean().item()


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    pictures, classes = frame.load_pictures(args.data, "train")
    classifier = frame.Classifier()
    train(classifier, pictures, classes, args)
    set_unit(classifier, pictures[:10_000])
    # What is measured is what is in the file, in half precision.
    state = {name: tensor.half() if tensor.is_floating_point() else tensor
             for name, tensor in classifier.state_dict().items()}
    classifier.load_state_dict(state)
    right = accuracy(classifier, *frame.load_pictures(args.data, "heldout"))
    with replacing(args.out) as beside:
        save_file(state, beside, metadata={"format": "pt", "accuracy": f"{right:.4f}"})
    parameters = sum(p.numel() for p in classifier.parameters())
    print(f"{parameters:,} parameters, {frame.describe_classifier(args.out)}; saved in {args.out}")


if __name__ == "__main__":
    command(main)
