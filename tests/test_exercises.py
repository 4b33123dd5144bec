"""The exercises' grading: right answers score fully, wrong ones get a hint that names the mistake.

Answers are tried in this process: a function of the project is replaced for one property's time.
"""
import ast
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "exercises"))
import answers  # noqa: E402
import exercises  # noqa: E402
import properties  # noqa: E402

CODE = [exercise for exercise in exercises.TABLE if exercise.file.endswith(".py")]
RIGHT = [(number, name) for number, some in answers.RIGHT.items() for name in some]
WRONG = [(number, wrong) for number, some in answers.WRONG.items() for wrong in some]


@contextlib.contextmanager
def answered(exercise, bodies):
    """Put an answer's functions in the place of the project's, and yield their module."""
    module = importlib.import_module(Path(exercise.file).stem)
    source = (ROOT / exercise.file).read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, body in zip(exercise.contracts, bodies, strict=True):
            *owner, last = name.split(".")
            place = getattr(module, *owner) if owner else module
            text = textwrap.dedent(exercises.with_body(source, name, body.strip()))
            # super() looks for a variable of this name around the function.
            text = f"def make(__class__):\n{textwrap.indent(text, '    ')}    return {last}\n"
            made = {}
            exec(compile(text, exercise.file, "exec"), module.__dict__, made)
            patch.setattr(place, last, made["make"](place))
        yield module


def grade(number, bodies):
    exercise = exercises.EXERCISES[number]
    with answered(exercise, bodies) as module:
        return properties.grade(number, module)


def failures(rows):
    return [row for row in rows if not row["passed"]]


@pytest.mark.parametrize("exercise", CODE, ids=lambda e: str(e.number))
def test_the_projects_own_function_scores_fully(exercise):
    rows = properties.grade(exercise.number, properties.load(exercise))
    assert len(rows) >= 4 and not failures(rows)


@pytest.mark.parametrize("number, name", RIGHT)
def test_right_answers_score_fully(number, name):
    assert not failures(grade(number, answers.RIGHT[number][name]))


@pytest.mark.parametrize("number, wrong", WRONG, ids=lambda x: getattr(x, "what", x))
def test_wrong_answers_fail_with_a_hint_that_points_at_the_mistake(number, wrong):
    bodies = answers.RIGHT[number][wrong.of]
    changed = [body.replace(wrong.old, wrong.new) for body in bodies]
    assert changed != bodies
    failed = failures(grade(number, changed))
    assert failed
    hints = [row["hint"] for row in failed]
    assert any(re.search(wrong.hint, hint) for hint in hints), hints
    for row in failed:
        assert all("\n" not in row[key] and len(row[key]) < 400 for key in row if key != "passed")


def test_every_exercise_has_three_right_answers_and_five_wrong_ones():
    for exercise in CODE:
        assert len(answers.RIGHT[exercise.number]) == 3 and len(answers.WRONG[exercise.number]) >= 5
    assert len(answers.FORM_RIGHT) == 3 and len(answers.FORM_WRONG) >= 5


@pytest.mark.parametrize("name", answers.FORM_RIGHT)
def test_forms_that_are_right(name):
    assert not failures(properties.grade(19, answers.FORM_ANSWER | answers.FORM_RIGHT[name]))


@pytest.mark.parametrize("what, change, hint", answers.FORM_WRONG, ids=lambda x: str(x)[:20])
def test_forms_that_are_wrong(what, change, hint):
    failed = failures(properties.grade(19, answers.FORM_ANSWER | change))
    assert any(re.search(hint, row["hint"]) for row in failed), failed


@pytest.mark.parametrize("body, came, hint", [
    ("return None", "NoneType", "return missing"),
    ("return x0 @ noise", "RuntimeError: .* at line", "shapes"),
    ("exit()", "SystemExit", "stops"),
    ("return x0 * float('nan')", "nan", "NaN"),
    ("return self.add_noise(x0, noise, t)", "RecursionError", "stops"),
    ("raise NotImplementedError('exercise 1: ..')", "blank", "not written"),
])
def test_an_answer_that_breaks_is_one_line(body, came, hint):
    first = failures(grade(1, [body]))[0]
    assert re.search(came, first["came"]) and re.search(hint, first["hint"])
    assert "\n" not in first["came"]


# -------------------------------------------------------------------------------------------------
# The command

@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project's exercises and what they change, as a git repository."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests" / "exercises", folder / "tests" / "exercises",
                    ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "exercises.py", folder / "tests")
    (folder / ".gitignore").write_text("runs/\n")
    for words in (["init", "-q"], ["add", "."],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "start"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def here(clone, monkeypatch):
    """The command's module, at work in the clone, which is as it was at the start."""
    subprocess.run(["git", "checkout", "-q", "."], cwd=clone, check=True)
    monkeypatch.setattr(exercises, "ROOT", clone)
    monkeypatch.setattr(exercises, "ANSWERS", clone / "runs" / "exercises")
    return clone


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["exercises.py", *map(str, words)])
    try:
        return exercises.main()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("exercise", CODE, ids=lambda e: str(e.number))
def test_blank_takes_one_function_out_and_solution_puts_it_back(here, monkeypatch, exercise):
    path = here / exercise.file
    before = path.read_bytes()
    assert command(monkeypatch, "blank", exercise.number) == 0
    text = path.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    names = set(exercise.contracts)

    def others(source):
        """All functions but the exercise's, by their code."""
        lines = []
        for node in ast.walk(ast.parse(source)):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef):
                    name = f"{node.name}.{child.name}" if hasattr(node, "name") else child.name
                    lines += [] if name in names else [(name, ast.unparse(child))]
        return lines

    assert others(text) == others(before.decode())
    for name in names:
        node = exercises.find_node(text, name)
        documentation, error = node.body
        assert isinstance(error, ast.Raise) and f"exercise {exercise.number}" in ast.unparse(error)
        assert exercise.source in documentation.value.value
    # Other edits of the same file stay.
    path.write_text(text + "# mine\n", encoding="utf-8")
    assert command(monkeypatch, "solution", exercise.number) == 0
    assert path.read_bytes() == before + b"# mine\n"


def test_blank_keeps_work_and_solution_saves_it(here, monkeypatch, capsys):
    path = here / "diffusion.py"
    original = path.read_text()
    changed = original.replace("result = out[0]\n", "result = out[0].clone()\n")
    path.write_text(changed)
    assert command(monkeypatch, "blank", 3) == 2
    assert "guide in diffusion.py has changes" in capsys.readouterr().err
    assert path.read_text() == changed
    assert command(monkeypatch, "blank", 1) == 0        # another function of the same file
    assert command(monkeypatch, "solution", 1) == 0
    assert command(monkeypatch, "solution", 3) == 0
    assert path.read_text() == original
    assert "out[0].clone()" in (here / "runs" / "exercises" / "3-guide.py").read_text()


def test_blank_of_two_exercises_on_one_function(here, monkeypatch):
    assert command(monkeypatch, "blank", 5) == 0 and command(monkeypatch, "blank", 6) == 0
    assert "exercise 6" in (here / "moe.py").read_text()
    assert command(monkeypatch, "blank", 6) == 0


@pytest.mark.parametrize("number", [1, 2, 14, 18])
def test_solution_replaces_an_answer_that_is_no_python(here, monkeypatch, number):
    exercise = exercises.EXERCISES[number]
    path = here / exercise.file
    before = path.read_bytes()
    command(monkeypatch, "blank", number)
    text = path.read_text()
    path.write_text(re.sub(r"raise NotImplementedError\(.*", "return ((x = 1", text, count=1))
    with pytest.raises(SyntaxError):
        ast.parse(path.read_text())
    assert command(monkeypatch, "solution", number) == 0
    assert path.read_bytes() == before


def test_windows_line_ends_stay(here, monkeypatch):
    path = here / "routing.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = path.read_bytes()
    assert command(monkeypatch, "blank", 10) == 0
    assert path.read_bytes().count(b"\r\n") == path.read_bytes().count(b"\n")
    assert command(monkeypatch, "solution", 10) == 0 and path.read_bytes() == before


def test_without_git_a_line_says_so(here, monkeypatch, tmp_path, capsys):
    shutil.copy(here / "merge.py", tmp_path)
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    for action in ("blank", "solution"):
        assert command(monkeypatch, action, 13) == 2
        message = capsys.readouterr().err
        assert "git clone" in message and message.count("\n") == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command(monkeypatch, "blank", 13) == 2
    assert "git is not installed" in capsys.readouterr().err
    assert (tmp_path / "merge.py").read_bytes() == (here / "merge.py").read_bytes()


def test_a_committed_blank_is_named(here, monkeypatch, capsys):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    command(monkeypatch, "blank", 13)
    subprocess.run([*git, "commit", "-qam", "homework"], cwd=here, check=True)
    assert command(monkeypatch, "solution", 13) == 2
    assert "--commit" in capsys.readouterr().err
    assert command(monkeypatch, "solution", 13, "--commit", "HEAD~1") == 0
    assert (here / "merge.py").read_bytes() == (ROOT / "merge.py").read_bytes()
    subprocess.run(["git", "reset", "-q", "--hard", "HEAD~1"], cwd=here, check=True)


def test_list_has_a_line_for_each_exercise(monkeypatch, capsys):
    assert command(monkeypatch, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))
    assert [line.split()[2] for line in lines] == sorted(line.split()[2] for line in lines)
    for words in (["blank", 99], ["check"], ["frobnicate"]):
        assert command(monkeypatch, *words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_form_is_written_and_never_overwritten(here, monkeypatch, capsys):
    path = here / "runs" / "exercises" / "19.json"
    assert command(monkeypatch, "blank", 19) == 0 and "threat" in capsys.readouterr().out
    assert json.loads(path.read_text()) == exercises.FORM
    assert command(monkeypatch, "blank", 19) == 0
    path.write_text(json.dumps(answers.FORM_ANSWER))
    assert command(monkeypatch, "blank", 19) == 2


def check(folder, *words):
    """Run check as a student does -> exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, "tests/exercises.py", "check", *map(str, words)],
                          cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    return done.returncode, done.stdout, done.stderr


def test_check_as_a_command(here, monkeypatch):
    code, out, _ = check(here, 3)
    assert code == 0 and out.count("\npassed ") == 4 and out.endswith("score    4 of 4\n")
    # It runs out of time; what came before it counts.
    path = here / "diffusion.py"
    text = exercises.with_body(path.read_text(), "guide", "print('hello')\nwhile len(out) == 2:\n"
                               "    pass\nreturn out[0] + image_scale * (out[-2] - out[0]) + "
                               "text_scale * (out[-1] - out[-2])")
    path.write_text(exercises.with_function(path.read_text(), "guide", text))
    code, out, err = check(here, 3, "--json", "--limit", 1)
    result = json.loads(out)
    assert code == 1 and "hello" in err and result["exercise"] == 3 and not result["passed"]
    assert [row["passed"] for row in result["properties"]] == [True, False, False, False]
    assert "1 seconds" in result["properties"][1]["came"] and result["score"] == 1


@pytest.mark.slow
def test_check_of_answers_that_break(here, monkeypatch):
    path = here / "diffusion.py"
    original = path.read_text()
    command(monkeypatch, "blank", 1)
    blank = path.read_text()
    for body, came in (("", "a blank"), ("import os; os._exit(3)", "code 3"),
                       ("return ((x0", "SyntaxError")):
        if body:
            path.write_text(re.sub(r'raise NotImplementedError\("exercise 1.*', body, blank))
        code, out, err = check(here, 1)
        assert code == 1 and came in out and len(out.splitlines()) == 6 and "Traceback" not in err
        assert "score    0 of 4" in out
    path.write_text(original)


@pytest.mark.slow
@pytest.mark.parametrize("exercise", exercises.TABLE, ids=lambda e: str(e.number))
def test_check_of_every_solution(here, exercise):
    form = here / "runs" / "exercises" / "19.json"
    form.parent.mkdir(parents=True, exist_ok=True)
    form.write_text(json.dumps(answers.FORM_ANSWER))
    code, out, err = check(here, exercise.number)
    assert code == 0, out + err
