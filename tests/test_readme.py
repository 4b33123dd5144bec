"""Every command of the README runs, with fewer steps, in a copy of the project."""
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from conftest import ROOT, called, in_one_process

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [part.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() for part in line.split("&&")]
FEWER = {"train.py": "--steps 1 --eval-size 4 --batch-size 4 --sample-every 0 --warmup 1", "vae.py": "--steps 1 --batch-size 2 --eval-size 8",
         "clip.py": "--steps 1 --batch-size 2", "sample.py": "--steps 2", "evaluate.py": "--count 1 --steps 1",
         "benchmark.py": "--size tiny --runs 1 --only joint --batch-size 2",
         "gradients": "--eval-size 4", "compare.py": "--steps 1 --seeds 1 --eval-size 8"}


started = set()


def runnable(command):
    """Not the environment's commands (they made the one that runs this), the tests themselves, or the hub."""
    words = shlex.split(command, comments=True)
    model = words[words.index("--model") + 1] if "--model" in words else ""
    local = "/" not in model or model.startswith(("assets/", "runs/"))
    return bool(words) and words[0] in ("python", "torchrun", "cp") and "pytest" not in words and local


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The commands run in the README's order in one copy, since later ones use what earlier ones wrote."""
    folder = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns(".git", "runs", "samples", "__pycache__", ".venv", ".pytest_cache")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    return folder


def test_the_readme_names_the_main_commands():
    assert "python train.py --task all" in COMMANDS and "python sample.py --task edit" in COMMANDS
    assert "pip install -r requirements.txt" in COMMANDS and "python -m pytest -q tests" in COMMANDS
    assert sum(map(runnable, COMMANDS)) > 10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """In the place of /data: two pairs to train on, and two held out."""
    folder = tmp_path_factory.mktemp("data")
    for name in "abcd":
        Image.effect_noise((64, 64), 90).convert("RGB").save(folder / f"{name}.png")
    rows = [dict(file_name=f"{name}.png", source_file_name="a.png", text=name, split="heldout" if name in "cd" else "train") for name in "abcd"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def long(command):
    return re.search(r"(compare|vae|clip)\.py|--out runs/(tiny|mtu|full(-\d)?)(\s|$)", command)


@pytest.mark.parametrize("command", [pytest.param(command, marks=pytest.mark.slow) if long(command) else command
                                     for command in dict.fromkeys(filter(runnable, COMMANDS))])
def test_command(project, pictures, monkeypatch, command):
    """A script's first command starts Python or torchrun, as a user does; the others save the time that takes."""
    words = shlex.split(command, comments=True)
    fewer = next((FEWER[name] for name in FEWER for word in words if word.endswith(name)), "")
    given = {word for word in words if word.startswith("--")}
    extra = shlex.split(fewer) if "--export" not in given else []
    for option, value in zip(extra[::2], extra[1::2]):
        if option in given:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    if {"--task", "--batch-size"} <= {*words} and "," in (tasks := words[words.index("--task") + 1]):  # every task is in every batch
        words[words.index("--batch-size") + 1] = str(4 * -(-len(tasks.split(",")) // 4))
    words = [word.replace("/data", str(pictures)) if word.startswith("/data") else word for word in words if word != "--compile"]
    if "--preset" in words:  # its model is the hub's, and it is for eight devices
        words += ["--model", "assets/tiny", "--out", "runs/preset"]
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
    if (words[0], words[script]) in started or words[script] == "compare.py" or "--preset" in words:
        monkeypatch.chdir(project)
        in_one_process(monkeypatch)
        done = called(*words[script:])
    else:
        started.add((words[0], words[script]))
        python = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}.get(words[0], words[:1])
        done = subprocess.run(python + words[1:], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
def test_python_block(project, block):
    done = subprocess.run([sys.executable, "-c", block], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_table_of_files_tells_their_lines():
    told = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {name: int(lines) for name, lines in told} == {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}


def test_files_can_be_read_in_one_sitting():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path.name


def test_the_product_needs_only_its_requirements():
    """diffusers and transformers are for tests; nothing is pickled."""
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (diffusers|transformers)\b", text, re.M), path.name
        assert "torch.load(" not in text and "pickle" not in text, path.name


def test_assets_stay_small():
    assert sum(f.stat().st_size for f in (ROOT / "assets").rglob("*") if f.is_file() and "state" not in f.parts) < 45e6
