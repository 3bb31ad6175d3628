"""The front page: both languages say the same, and what they say is there."""

import ast
import contextlib
import importlib
import io
import re
from dataclasses import fields

import pytest
from conftest import ROOT

from config import Config

ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
COMMAND = re.compile(r"^(python|torchrun|pip|pytest|ruff) ")


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .+$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)


def sections(text: str) -> list[str]:
    """What stands under each heading."""
    parts = re.split(r"(?m)^#+ .+$", re.sub(r"(?m)^((?:python|torchrun|pip|pytest|ruff) .*?) +# .*$", r"\1", text))
    return parts[1:]


def commands(text: str) -> list[str]:
    """The lines of the shell blocks, without their comments."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    return [re.sub(r" +# .*", "", line) for line in lines]


def figures(text: str) -> list[str]:
    """Every number, of prose, tables and formulas."""
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def rows(text: str, heading_number: int) -> list[list[str]]:
    """The cells of the tables in the section of that number."""
    lines = [line for line in sections(text)[heading_number].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def section_of(name: str) -> int:
    return headings(ENGLISH).index(name)


def test_both_languages_have_the_same_headings():
    levels = [[len(heading.split()[0]) for heading in headings(text)] for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1] and len(levels[0]) > 15


@pytest.mark.parametrize("number", range(len(headings(ENGLISH))))
def test_both_languages_say_the_same(number):
    english, chinese = sections(ENGLISH)[number], sections(CHINESE)[number]
    assert commands(english) == commands(chinese)
    assert figures(english) == figures(chinese)
    for pattern in (r"```math\n(.*?)```", r"`([^`\n]+)`", r"\$([^$\n]+)\$"):  # formulas; code in the text
        found = [sorted(re.findall(pattern, re.sub(r"```bash.*?```", "", text, flags=re.S), flags=re.S))
                 for text in (english, chinese)]
        assert found[0] == found[1]
    links = [sorted(link for link in re.findall(r"\]\(([^)#]+)\)", text) if "README" not in link)
             for text in (english, chinese)]
    assert links[0] == links[1]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_links_lead_somewhere(text):
    anchors = {re.sub(r"[^\w -]", "", heading.lstrip("# ")).strip().lower().replace(" ", "-")
               for heading in headings(text)}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (ROOT / link).exists(), link


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of each script, by its help."""
    found = {}
    for name in ("train", "inference", "evaluate", "convert", "bench"):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            importlib.import_module(name).main(["--help"])
        found[f"{name}.py"] = set(re.findall(r"--[\w-]+", out.getvalue()))
    return found


def test_every_flag_of_every_command_exists(flags):
    seen = 0
    for line in commands(ENGLISH):
        script = re.search(r"\w+\.py\b", line)
        if script and line.startswith(("python", "torchrun", "pip")):
            own = line[script.end():]
            for flag in re.findall(r"--[\w-]+", own):
                assert flag in flags[script[0]], line
                seen += 1
        else:
            assert COMMAND.match(line), line
    assert seen > 20
    mentioned = set(re.findall(r"`(--[\w-]+)", re.sub(r"```.*?```", "", ENGLISH, flags=re.S)))
    assert mentioned <= set.union({"--max-restarts"}, *flags.values()), mentioned  # that one is of torchrun


def test_the_table_of_settings_is_config_py():
    for text in (ENGLISH, CHINESE):
        table = {row[0].strip("`"): row[1].strip("`") for row in rows(text, section_of("## Configuration"))[1:]}
        expected = {f.name: " ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
                    for f in fields(Config)}
        assert table == expected
    told = [row[2] for row in rows(ENGLISH, section_of("## Configuration"))[1:]]
    assert told == [f.metadata["help"] for f in fields(Config)]


def test_every_equation_is_where_the_table_says():
    table = rows(ENGLISH, section_of("## The paper in this code"))[1:]
    for paper, _, code in table:
        name, file = re.fullmatch(r"\[([\w.]+)\]\((\w+\.py)\)", code).groups()
        scope = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            scope = next(node for node in scope.body if getattr(node, "name", None) == part)
        told = " ".join(ast.get_docstring(scope).split())
        for label in re.findall(r"Eq\. \d+(?:-\d+)?|Algorithm \d|appendix B|\d{4}\.\d{5}|and \d+", paper):
            assert label in told or (label == "appendix B" and name == "UNet"), (name, label)
    numbers = {int(n) for row in table if "." not in row[0].split("Eq.")[0] for n in re.findall(r"Eq\. (\d+)", row[0])}
    assert {2, 4, 5, 6, 8, 11, 12, 13, 14, 15} <= numbers
