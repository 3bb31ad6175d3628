"""The front page: both languages say the same, and what they say is there."""

import ast
import contextlib
import importlib
import io
import re
from dataclasses import fields

import pytest
from helpers import ROOT

from config import Config

ENGLISH = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
COMMAND = re.compile(r"^(python|torchrun|pip|pytest|ruff) ")
SHELL = re.compile(r"```bash\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"```.*?```", re.DOTALL)
SCRIPTS = {
    "train.py": "train",
    "inference.py": "inference",
    "evaluate.py": "evaluate",
    "tools.convert": "tools.convert",
    "tools.bench": "tools.bench",
}


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .+$", BLOCK.sub("", text), flags=re.MULTILINE)


def without_comments(line: str) -> str:
    return re.sub(r" +# .*", "", line)


def commands(text: str) -> list[str]:
    """The lines of the shell blocks, without their comments."""
    blocks = SHELL.findall(text)
    return [without_comments(line) for block in blocks for line in block.splitlines()]


def sections(text: str) -> list[str]:
    """What stands under each heading, without the comments in shell blocks."""
    lines = [without_comments(line) if COMMAND.match(line) else line for line in text.splitlines()]
    return re.split(r"(?m)^#+ .+$", "\n".join(lines))[1:]


def figures(text: str) -> list[str]:
    """Every number, of prose, tables and formulas."""
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables under that heading of the English page."""
    section = sections(text)[headings(ENGLISH).index(heading)]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_both_languages_have_the_same_headings():
    english, chinese = (
        [heading.split()[0] for heading in headings(text)] for text in (ENGLISH, CHINESE))
    assert english == chinese
    assert len(english) > 15


@pytest.mark.parametrize("number", range(len(headings(ENGLISH))))
def test_both_languages_say_the_same(number):
    english, chinese = sections(ENGLISH)[number], sections(CHINESE)[number]
    assert commands(english) == commands(chinese)
    assert figures(english) == figures(chinese)
    formulas, code, inline = r"(?s)```math\n(.*?)```", r"`([^`\n]+)`", r"\$([^$\n]+)\$"
    for pattern in (formulas, code, inline):
        found = [sorted(re.findall(pattern, SHELL.sub("", text))) for text in (english, chinese)]
        assert found[0] == found[1]
    links = [re.findall(r"\]\(([^)#]+)\)", text) for text in (english, chinese)]
    links = [sorted(link for link in found if "README" not in link) for found in links]
    assert links[0] == links[1]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_links_lead_somewhere(text):
    anchors = set()
    for heading in headings(text):
        words = re.sub(r"[^\w -]", "", heading.lstrip("# ")).strip().lower()
        anchors.add(words.replace(" ", "-"))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (ROOT / link).exists(), link


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of each script, by its help."""
    found = {}
    for command, module in SCRIPTS.items():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        found[command] = set(re.findall(r"--[\w-]+", out.getvalue()))
    return found


def test_every_flag_of_every_command_exists(flags):
    seen = 0
    for line in commands(ENGLISH):
        script = re.search(r"\w+\.py\b|tools\.\w+", line)
        if script is None:
            assert COMMAND.match(line), line
            continue
        for flag in re.findall(r"--[\w-]+", line[script.end():]):
            assert flag in flags[script[0]], line
            seen += 1
    assert seen > 20
    mentioned = set(re.findall(r"`(--[\w-]+)", BLOCK.sub("", ENGLISH)))
    of_torchrun = {"--max-restarts"}
    assert mentioned <= set.union(of_torchrun, *flags.values())


def test_the_table_of_settings_is_config_py():
    expected = {}
    for f in fields(Config):
        is_tuple = isinstance(f.default, tuple)
        expected[f.name] = " ".join(map(str, f.default)) if is_tuple else str(f.default)
    for text in (ENGLISH, CHINESE):
        table = rows(text, "## Configuration")[1:]
        assert {row[0].strip("`"): row[1].strip("`") for row in table} == expected
    told = [row[2] for row in rows(ENGLISH, "## Configuration")[1:]]
    assert told == [f.metadata["help"] for f in fields(Config)]


def test_every_equation_is_where_the_table_says():
    table = rows(ENGLISH, "## The paper in this code")[1:]
    label = re.compile(r"Eq\. \d+(?:-\d+)?|Algorithm \d|appendix B|\d{4}\.\d{5}|and \d+")
    for paper, _, code in table:
        name, file = re.fullmatch(r"\[([\w.]+)\]\((\w+\.py)\)", code).groups()
        scope = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            scope = next(node for node in scope.body if getattr(node, "name", None) == part)
        told = " ".join(ast.get_docstring(scope).split())
        for words in label.findall(paper):
            assert words in told, (name, words)
    of_the_paper = [row[0] for row in table if "." not in row[0].split("Eq.")[0]]
    numbers = {int(n) for cell in of_the_paper for n in re.findall(r"Eq\. (\d+)", cell)}
    assert {2, 4, 5, 6, 8, 11, 12, 13, 14, 15} <= numbers
