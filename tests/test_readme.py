"""The pages: both languages say the same, and what they say is there."""

import ast
import contextlib
import importlib
import io
import re
from dataclasses import fields

import pytest
from helpers import ROOT

import ddim
from config import Config

PAIRS = [
    ("README.md", "README.zh-CN.md"),
    ("docs/derivation.md", "docs/derivation.zh-CN.md"),
]
PAGES = ["README.md", "README.zh-CN.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
ENGLISH = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^(python |torchrun |pip |hf |pytest |ruff |\.ci/)")
BLOCK = re.compile(r"```.*?```", re.DOTALL)
SCRIPTS = {
    "train.py": "train",
    "inference.py": "inference",
    "evaluate.py": "evaluate",
    "tools.convert": "tools.convert",
    "tools.bench": "tools.bench",
    "tools.shape_checker": "tools.shape_checker",
}


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .+$", BLOCK.sub("", text), flags=re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_comments(text: str) -> str:
    return re.sub(r" +# .*", "", text)


def commands(text: str) -> list[str]:
    """Return the lines of the shell blocks, without their comments."""
    return without_comments("".join(blocks(text, "bash"))).splitlines()


def sections(text: str) -> list[str]:
    """Return what stands under each heading, the code without its comments."""
    text = BLOCK.sub(lambda block: without_comments(block[0]), text)
    return re.split(r"(?m)^#+ .+$", text)[1:]


def links(text: str) -> list[str]:
    """Return the links that both languages share: not those from one to the other."""
    found = re.findall(r"\]\(([^)#]+)", text)
    return sorted(link for link in found if not re.search(r"README|derivation", link))


def figures(text: str) -> list[str]:
    """Return every number, of prose, tables, code and formulas."""
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def rows(text: str, column: str) -> list[list[str]]:
    """Return the cells of the table whose first column is called so."""
    table = re.search(rf"^\| {column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def pairs_of_sections() -> list[tuple[str, str, str]]:
    found = []
    for names in PAIRS:
        english, chinese = ((ROOT / name).read_text() for name in names)
        for heading, *both in zip(
                headings(english), sections(english), sections(chinese), strict=True):
            found.append(pytest.param(*both, id=heading))
    return found


@pytest.mark.parametrize("names", PAIRS)
def test_both_languages_have_the_same_headings(names):
    english, chinese = (headings((ROOT / name).read_text()) for name in names)
    assert [line.split()[0] for line in english] == [line.split()[0] for line in chinese]
    assert len(english) > 10


@pytest.mark.parametrize(("english", "chinese"), pairs_of_sections())
def test_both_languages_say_the_same(english, chinese):
    assert commands(english) == commands(chinese)
    assert blocks(english, "math") == blocks(chinese, "math")
    assert figures(english) == figures(chinese)
    assert links(english) == links(chinese)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    words = [re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower() for line in headings(text)]
    return {word.replace(" ", "-") for word in words}


def test_every_picture_is_shown_and_small():
    shown = "".join((ROOT / name).read_text() for name in PAGES)
    for path in ROOT.glob("assets/*"):
        assert path.name in shown
        assert path.stat().st_size < 300_000


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Ask the help of each script for its flags."""
    found = {}
    for command, module in SCRIPTS.items():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        found[command] = set(re.findall(r"--[\w-]+", out.getvalue()))
    return found


def test_every_flag_of_every_command_exists(flags):
    seen = 0
    for line in [line for name in PAGES for line in commands((ROOT / name).read_text())]:
        for command in line.split(" && "):
            assert COMMAND.match(command), line
            script = re.search(r"\w+\.py\b|tools\.\w+", command)
            if script is None:
                continue
            for flag in re.findall(r"--[\w-]+", command[script.end():]):
                assert flag in flags[script[0]], line
                seen += 1
    assert seen > 40


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_in_the_text_exists(name, flags):
    text = BLOCK.sub("", (ROOT / name).read_text())
    mentioned = {flag for code in re.findall(r"`([^`]+)`", text)
                 for flag in re.findall(r"--[\w-]+", code)}
    of_torchrun = {"--max-restarts"}
    assert mentioned <= set.union(of_torchrun, *flags.values())


def test_the_settings_are_those_of_config_py():
    known = {f.name: f for f in fields(Config)}
    for name, default, told in rows(ENGLISH, "setting"):
        f = known[name.strip("`")]
        is_tuple = isinstance(f.default, tuple)
        expected = " ".join(map(str, f.default)) if is_tuple else str(f.default)
        assert (default.strip("`"), told) == (expected, f.metadata["help"])
    chinese = rows((ROOT / "README.zh-CN.md").read_text(), "设置")
    assert [row[:2] for row in chinese] == [row[:2] for row in rows(ENGLISH, "setting")]


def test_the_python_of_the_front_page_runs():
    """Its loss is that of a network without training."""
    for name in ("README.md", "README.zh-CN.md"):
        (code,) = blocks((ROOT / name).read_text(), "python")
        found = {}
        exec(code, found)
        assert found["images"].shape == (8, 3, 16, 16)
        assert 0.9 < found["loss"].item() < 1.1


def test_the_needed_version_is_that_of_requirements_txt():
    (version,) = re.findall(r"^torch>=(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
    for name in ("README.md", "README.zh-CN.md"):
        assert f"PyTorch {version} " in (ROOT / name).read_text()


def test_every_equation_is_where_the_table_says():
    """A docstring names its equations; the number of another paper may stand above the file."""
    table = rows(ENGLISH, "in the paper")
    for paper, _, code in table:
        name, file = re.fullmatch(r"\[([\w.]+)\]\((\w+\.py)\)", code).groups()
        module = scope = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            parts = {getattr(node, "name", None): node for node in scope.body}
            assert part in parts, code
            scope = parts[part]
        told, told_above = (" ".join(ast.get_docstring(node).split()) for node in (scope, module))
        for words in re.findall(r"Eq\. \d+(?:-\d+)?|Algorithm \d|appendix B|and \d+", paper):
            assert words in told, (name, words)
        for number in re.findall(r"\d{4}\.\d{5}", paper):
            assert number in told + told_above, (name, number)
    of_the_paper = [row[0] for row in table if "." not in row[0].split("Eq.")[0]]
    numbers = {int(n) for cell in of_the_paper for n in re.findall(r"Eq\. (\d+)", cell)}
    assert {2, 4, 5, 6, 8, 11, 12, 13, 14, 15} <= numbers
    chinese = rows((ROOT / "README.zh-CN.md").read_text(), "论文")
    assert [row[2] for row in chinese] == [row[2] for row in table]


# docs/fewer-steps.md

FEWER_STEPS = (ROOT / "docs/fewer-steps.md").read_text()


def test_the_lines_beside_the_formulas_are_those_of_ddim():
    code = [line.strip() for line in (ROOT / "ddim.py").read_text().splitlines()]
    lines = "".join(blocks(FEWER_STEPS, "python")).splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line in code


def test_the_timesteps_listed_are_those_visited():
    for spacing in ("quadratic", "uniform"):
        ten = ", ".join(map(str, ddim.spaced_timesteps(1000, 10, spacing)))
        assert f"| {spacing} | {ten} |" in FEWER_STEPS
        fifty = list(map(str, ddim.spaced_timesteps(1000, 50, spacing)))
        start, end = ", ".join(fifty[:3]), f"{fifty[-2]}, {fifty[-1]} ({spacing})"
        assert re.search(f"{start}, .*{re.escape(end)}", FEWER_STEPS)
