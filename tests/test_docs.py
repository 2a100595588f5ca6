"""README and docs against the program: commands parse and run, settings are valid, what is named and quoted is there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from project import Project
from ruamel.yaml import YAML

from cli import app
from pipeline.config import SECTIONS, check_params, load_yaml
from pipeline.metrics import NAMES
from pipeline.schema import schema

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"^(?:reprolora|(?:\.venv/bin/)?python cli\.py) +")
SCHEMA = schema((ROOT / "params.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment above it."""

    page: str
    line: int
    mark: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of its commands, without comments."""
        for line in re.sub(r"\\\n", " ", self.text).splitlines():
            for part in re.split(r"&&|>.*", line):
                if words := shlex.split(part, comments=True):
                    yield words


def blocks(language: str, pages: list[Path] = PAGES) -> list[Block]:
    found = []
    for page in pages:
        lines = page.read_text(encoding="utf-8").splitlines()
        for start, line in enumerate(lines):
            if line.strip() == f"```{language}":
                end = next(i for i in range(start + 1, len(lines)) if lines[i].strip() == "```")
                mark = re.search(r"<!-- ((?:(?!-->).)*) -->\n\Z", "\n".join([*lines[:start], ""]), re.S)
                name = page.relative_to(ROOT).as_posix()
                found.append(
                    Block(name, start + 1, " ".join(mark[1].split()) if mark else "", "\n".join(lines[start + 1 : end]) + "\n")
                )
    return found


def place(block: Block) -> str:
    return f"{block.page}:{block.line}"


SHELL, SETTINGS = blocks("sh"), [b for b in blocks("yaml") if b.mark != "of dvc.yaml"]


def command_of(words: list[str]) -> tuple[Any, list[str], list[str]]:
    """The command that a line names, its path, and the words after it."""
    command, rest, path = typer.main.get_command(app), words, []
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no command {' '.join(words[:2])}"
        command, path, rest = command.commands[rest[0]], [*path, rest[0]], rest[1:]
    return command, path, rest


def ours(words: list[str]) -> list[str] | None:
    match = OURS.match(shlex.join(words) + " ")
    return words[len(match[0].split()) :] if match else None


@pytest.mark.parametrize("block", SHELL, ids=place)
def test_every_command_parses_and_is_run_or_says_why_not(block: Block) -> None:
    named = []
    for words in block.commands():
        arguments = ours(words)
        if arguments and arguments != ["--help"]:
            command, path, rest = command_of(arguments)
            command.make_context(" ".join(path), rest)
            named.append(path)
    if match := re.fullmatch(r"run by (.+)", block.mark):
        for path in named:
            assert any(runs(name, path) for name in match[1].split(", ")), f"{path}: run by none of {match[1]}"
    else:
        assert block.mark == "run" or re.fullmatch(r"not run: .{10,}", block.mark), "say whether a test runs it"


def runs(name: str, path: list[str]) -> bool:
    """Whether a test has the command's words, or a block of a page that is marked `run` has the command."""
    if name.endswith(".py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        return all(f'"{word}"' in text for word in path)
    commands = [words for b in SHELL if (b.page, b.mark) == (name, "run") for words in b.commands()]
    return any((ours(words) or [])[: len(path)] == path for words in commands)


def test_a_command_that_is_not_there_is_found() -> None:
    command, path, rest = command_of(["convert", "a", "b", "--too", "kohya"])
    with pytest.raises(Exception, match="No such option: --too"):
        command.make_context(" ".join(path), rest)
    with pytest.raises(AssertionError, match="no command exprt"):
        command_of(["exprt"])


def inline(page: Path) -> list[str]:
    """Code in the running text and tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parameters_and_files_in_the_text_are_there(page: Path) -> None:
    for code in inline(page):
        if match := OURS.match(code + " "):
            words = [word for word in shlex.split(code[len(match[0]) :]) if word not in ("X", "…")]
            if words:
                command, _, rest = command_of(words)
                known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
                assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known, code
        elif (key := re.match(rf"({'|'.join(SECTIONS)})\.([a-z_]+)(\.[a-z_]+)*(?=$|[ :=])", code)) and not code.endswith(
            ".json"
        ):
            assert is_parameter(key[0]), f"{code} is no parameter"
        elif is_file(code) and not re.search(r"NAME|\*|\$\{", code):
            assert (ROOT / code).exists(), f"there is no {code}"


def is_file(code: str) -> bool:
    return bool(re.fullmatch(r"(docs|pipeline|stages|tests|presets|assets|bench|\.github)/[\w./$*{}-]+\.\w+", code))


def is_parameter(dotted: str) -> bool:
    section, *rest = dotted.split(".")
    if section == "gate":
        return rest[0] in NAMES
    entry = SCHEMA["properties"][section]
    for part in rest:
        held = next((e for e in (entry, entry.get("items", {}), *entry.get("anyOf", [])) if "$ref" in e), None)
        entry = SCHEMA["$defs"][held["$ref"].rpartition("/")[2]]["properties"].get(part, {}) if held else {}
    return bool(entry)


def test_parameters_are_told_from_what_is_none() -> None:
    assert all(is_parameter(k) for k in ("train.steps", "dataset.buckets.step", "dataset.concepts.path", "gate.leak"))
    assert not any(is_parameter(k) for k in ("train.stepz", "dataset.buckets.max", "train.steps.more", "gate.leek"))


def merge(into: Any, settings: Any) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


@pytest.mark.parametrize("block", SETTINGS, ids=place)
def test_settings_are_valid_over_their_preset(block: Block) -> None:
    match = re.fullmatch(r"over: (\w+)", block.mark)
    assert match, "say which preset these settings go over"
    document = load_yaml(ROOT / "presets" / f"{match[1]}.yaml")
    before = check_params(document)
    merge(document, YAML(typ="safe").load(block.text))
    assert check_params(document, place(block)) != before


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            assert there.is_file(), target
            assert not anchor or anchor in anchors(there), target


def test_the_index_names_every_page() -> None:
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in PAGES[1:]} - {"README.md"}


def messages() -> list[str]:
    """Every text in the program, with a line break where something is filled in."""
    found = []
    for path in [ROOT / "cli.py", *(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(_text(node))
    return [text for text in found if text]


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "\n" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return f"{left or chr(10)}{right or chr(10)}" if left or right else ""
    return ""


def is_said(quoted: str, told: list[str]) -> bool:
    """Whether the parts between `…` stand in one message in this order."""
    pattern = re.compile(r".*".join(re.escape(part.strip()) for part in quoted.split("…")), re.S)
    return any(pattern.search(text) for text in told)


def test_every_message_that_is_explained_is_one_of_the_programs() -> None:
    told, page = messages(), (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"\*\*`(.+?)`\*\*", page)
    assert len(quoted) > 60
    assert [text for text in quoted if not is_said(text, told)] == []
    assert not is_said("the GPU's memory is fool", told) and not is_said("is no folder … dataset.path:", told)


@pytest.mark.slow
def test_the_commands_that_are_marked_so_run_in_order(new_project: Callable[[], Project], tmp_path: Path) -> None:
    """Page by page in one project, the tutorial first: it runs what the others look at."""
    project = new_project()
    project.set("export", name="my-style")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "reprolora").write_text(f'#!/bin/sh\nexec python {shlex.quote(str(ROOT / "cli.py"))} "$@"\n')
    (tools / "reprolora").chmod(0o755)
    person = {f"GIT_{who}_{what}": "t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = project.environment(person)
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    marked = sorted((b for b in SHELL if b.mark == "run"), key=lambda block: block.page != "docs/tutorial.md")
    assert len(marked) > 5
    trained = 0
    for block in marked:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=project.root, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{place(block)}\n{block.text}\n{done.stdout}{done.stderr}"
        trained += project.executed().count("train-lora")
    assert trained == 2  # as the tutorial says: at first, and for another rate; never for what was changed back
