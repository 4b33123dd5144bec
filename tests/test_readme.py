"""Every command of the README runs, with fewer steps, in a copy of the project."""
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from conftest import ROOT, call

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
# Options that make a command short; they replace the README's own.
FEWER = {"train.py": "--steps 1 --eval-size 4 --batch-size 4 --sample-every 0 --warmup 1",
         "sample.py": "--steps 2", "evaluate.py": "--count 1 --steps 1",
         "merge.py": "--eval-size 4", "moe.py": "", "data.py": "", "routing.py": "",
         "aggregation.py": ""}


def commands_of(block):
    """The commands of a block, with its shell loop unrolled."""
    block = block.replace("\\\n", " ")
    loop = re.search(r"for i in ([\d ]+); do\n(.*?)\ndone", block, re.S)
    if loop:
        turns = []
        for i in loop[1].split():
            turn = re.sub(r"\$\(\((.*?)\)\)", lambda m: str(eval(m[1].replace("i", i))), loop[2])
            turns.append(turn.replace("$i", i))
        block = block.replace(loop[0], "\n".join(turns))
    return [part.strip() for line in block.splitlines() for part in line.split("&&")]


COMMANDS = [command for block in BLOCKS for command in commands_of(block)]


def runnable(command):
    """Not those that make the environment, that run the tests, or that need the hub."""
    words = shlex.split(command, comments=True)
    model = words[words.index("--model") + 1] if "--model" in words else ""
    local = "/" not in model or model.startswith(("assets/", "runs/"))
    return bool(words) and words[0] in ("python", "torchrun") and "pytest" not in words and local


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """One copy for all commands, in the README's order: later ones read what earlier ones wrote."""
    folder = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns(".git", "runs", "samples", "__pycache__", ".venv",
                                     ".pytest_cache")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder in the place of /data: two pairs to train on, two held out."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for name in "abcd":
        Image.effect_noise((64, 64), 90).convert("RGB").save(folder / f"{name}.png")
        rows.append(dict(file_name=f"{name}.png", source_file_name="a.png", text=name,
                         split="heldout" if name in "cd" else "train"))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def shortened(command, pictures):
    """The words of a command that does the same in fewer steps."""
    words = [word.replace("/data", str(pictures)) if word.startswith("/data") else word
             for word in shlex.split(command, comments=True)]
    script = next(word for word in words if word.endswith(".py"))
    extra = shlex.split(FEWER[script])
    for option, value in zip(extra[::2], extra[1::2]):
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words, words.index(script)


def test_the_readme_names_the_main_commands():
    assert "python train.py --task all" in COMMANDS
    assert any("sample.py --task edit" in c and "--model runs/all" in c for c in COMMANDS)
    assert "pip install -r requirements.txt" in COMMANDS
    assert "python -m pytest -q tests" in COMMANDS
    assert sum(map(runnable, COMMANDS)) > 15


started = set()


@pytest.mark.parametrize("command", list(dict.fromkeys(filter(runnable, COMMANDS))))
def test_command(project, pictures, monkeypatch, command):
    """A script's first command starts Python, as a user does; the others save that time."""
    words, script = shortened(command, pictures)
    monkeypatch.chdir(project)
    if words[script] in started:
        done = call(*words[script:])
    else:
        started.add(words[script])
        done = subprocess.run([sys.executable, *words[script:]], cwd=project, capture_output=True,
                              text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_file_of_the_project_is_in_the_readme():
    listed = set(re.findall(r"^    (\w+\.py) ", README, re.M))
    assert listed == {path.name for path in ROOT.glob("*.py")}
