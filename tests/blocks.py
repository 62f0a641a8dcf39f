"""The code blocks of the documentation: where they are, of what language, and whether they are right.

A comment above a block says how it is to be taken: with `<!-- smoke -->` its `fedsplit` commands are run at the
smallest size (`<!-- smoke: KEY=VALUE ... -->`: and with these keys), `<!-- not run: WHY -->` is for what is no
command, or cannot run.
"""

from __future__ import annotations

import argparse
import configparser
import importlib
import importlib.metadata
import importlib.util
import re
import shlex
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

import fedsplit.config
from fedsplit import harden, pretrain
from fedsplit.types import FedsplitError

ROOT = Path(__file__).resolve().parents[1]
COMMENT = re.compile(r"<!-- (?:(smoke)(?:: (.+?))?|(not run): (.+?)) -->", re.DOTALL)
# Words that stand for what a reader puts there, with one that fits.
STAND_INS = {"F.toml": "configs/demo.toml", "study.toml": "configs/demo.toml", "N": "1", "RUN...": "RUN"}
# Other people's tools, of which nothing is checked but the files of this repository that they name.
FOREIGN = ("scp", "tensorboard", "systemctl", "journalctl", "ip")
OURS = re.compile(r"^(configs|simulations|tests|docs|notebooks|fedsplit)/[\w./*-]+$")


class Wrong(AssertionError):
    """A block that a reader could not use."""


class Parsed(BaseException):
    """A program got as far as having read its command line."""


@dataclass(frozen=True)
class Block:
    """A code block; `how` is 'smoke', 'not run' or empty, `said` what the comment says."""

    page: str
    line: int
    language: str
    text: str
    how: str = ""
    said: str = ""

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page}:{self.line}"


def blocks(text: str, page: str = "page.md") -> list[Block]:
    """Every fenced or indented block of a Markdown text, in order.

    Raises:
        Wrong: nobody can say what a block is.
    """
    tokens = MarkdownIt("commonmark").parse(text)
    found = []
    for number, token in enumerate(tokens):
        if token.type not in ("fence", "code_block"):
            continue
        before = tokens[number - 1] if number else None
        comment = COMMENT.search(before.content) if before is not None and before.type == "html_block" else None
        how, said = (comment[1] or comment[3], comment[2] or comment[4] or "") if comment else ("", "")
        place = (page, (token.map or [0])[0] + 1)
        language = token.info.strip() or ("text" if how == "not run" else guessed(token.content, f"{page}:{place[1]}"))
        found.append(Block(*place, language, token.content, how, said))
    return found


def guessed(text: str, place: str) -> str:
    """The language of a block that does not say: shell, if every line begins with a program that we know.

    Raises:
        Wrong: it is not.
    """
    for line in lines(text):
        words = bare(words_of(line, place))
        if words and checker(words) is None:
            raise Wrong(f"{place}: nobody knows what '{words[0]}' is; name the block's language, or why it is not run.")
    return "shell"


def lines(text: str) -> Iterator[str]:
    """The command lines of a shell block, continued ones joined."""
    yield from (line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip())


def words_of(line: str, place: str) -> list[str]:
    """The words of a command line, without its comment; `[--optional]` words are there.

    Raises:
        Wrong: it is no command line.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise Wrong(f"{place}: {line}: {error}.") from None
    shown = [word.strip("[]") if word.startswith("[--") or "[" not in word else word for word in words]
    return [STAND_INS.get(word, re.sub(r"=N$", "=1", word)) for word in shown]


def bare(words: Sequence[str]) -> list[str]:
    """A command without `sudo`, settings of the environment, and the folder of its program."""
    rest = list(words)
    while rest and (rest[0] == "sudo" or re.match(r"^[A-Z_]+=", rest[0])):
        rest.pop(0)
    return [rest[0].rpartition("/")[2], *rest[1:]] if rest else []


def check(block: Block) -> None:
    """Hold a block against what there is; Python is for the caller to run.

    Raises:
        Wrong: a program, option, key, file or target that there is not, or text that does not parse.
    """
    if block.language == "shell":
        for line in lines(block.text):
            check_line(line, block.place)
    elif block.language == "toml":
        check_toml(block)
    elif block.language == "python":
        try:
            compile(block.text, block.place, "exec")
        except SyntaxError as error:
            raise Wrong(f"{block.place}: {error}") from None
    elif block.language not in ("text",) and not block.language.startswith("{"):
        raise Wrong(f"{block.place}: a block of '{block.language}' is not checked by anybody.")


def check_toml(block: Block) -> None:
    """TOML parses, and is a config unless the block says what else it is."""
    try:
        values = dict(fedsplit.config.flatten(tomllib.loads(block.text)))
        if block.how != "not run":
            fedsplit.config.resolve(values)
    except (tomllib.TOMLDecodeError, FedsplitError) as error:
        raise Wrong(f"{block.place}: {error}") from None


def check_line(line: str, place: str) -> None:
    """One command line."""
    words = bare(words_of(line, place))
    if not words:
        return
    for word in words:
        file = word.rpartition("=")[2]
        if OURS.match(file) and not list(ROOT.glob(file)):
            raise Wrong(f"{place}: there is no {file}.")
    checked = checker(words)
    if checked is None:
        raise Wrong(f"{place}: nobody knows what '{words[0]}' is.")
    try:
        checked(words[1:])
    except (Wrong, FedsplitError) as error:
        raise Wrong(f"{place}: {line}: {error}") from None


def checker(words: Sequence[str]) -> Callable[[list[str]], None] | None:
    """What checks the rest of a command line that begins so; None where nobody can."""
    named = {
        "fedsplit": check_fedsplit, "flwr": check_flwr, "make": check_make, "pip": check_pip, "python": check_python,
        "pytest": check_pytest, "flower-superlink": lambda rest: parsed(script("flower-superlink"), rest),
    }  # fmt: skip
    if words[0] in FOREIGN or words[0] in ("install.sh",):
        return lambda rest: None
    return named.get(words[0])


def check_fedsplit(rest: list[str]) -> None:
    """The real parser, and the real config of what it was given."""
    if "..." in rest:  # what is left out cannot be parsed
        rest = [rest[0], "--help"]
    options = parsed(script("fedsplit"), rest)
    files, pairs = getattr(options, "config", None) or [], getattr(options, "set", [])
    files = [files] if isinstance(files, str) else files
    files = [file for file in files if not file.startswith("/")]  # on a device
    load = {"pretrain": pretrain.load, "harden": harden.load}.get(rest[0], fedsplit.config.load)
    load([ROOT / file for file in files], pairs)


def check_flwr(rest: list[str]) -> None:
    """Flower's own parser, and our keys in `--run-config`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # typer's own, of click
        from flwr.cli.app import app
        from typer.main import get_command

    command: Any = get_command(app)
    while hasattr(command, "commands"):
        name, *rest = rest
        if name not in command.commands:
            raise Wrong(f"flwr has no '{name}'")
        command = command.commands[name]
    try:
        given = command.make_context("flwr", rest).params
    except SystemExit:
        raise Wrong("Flower shows its help") from None
    except Exception as error:  # click's, vendored by typer in some versions
        raise Wrong(str(getattr(error, "message", error))) from None
    for text in given.get("run_config_overrides") or given.get("run_config") or []:
        if text.endswith(".toml"):
            fedsplit.config.load([ROOT / text])
        else:
            fedsplit.config.load([], [pair for pair in shlex.split(text) if pair != "..."])


def check_make(rest: list[str]) -> None:
    """The targets are there."""
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in rest:
        if target not in targets:
            raise Wrong(f"the Makefile has no target '{target}'")


def check_pip(rest: list[str]) -> None:
    """The extras that are asked for are there."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    known = parser["options.extras_require"]
    for extra in ",".join(re.findall(r"^fedsplit\[(.+)\]$", "\n".join(rest), re.MULTILINE)).split(","):
        if extra and extra not in known:
            raise Wrong(f"fedsplit has no extra '{extra}'")


def check_pytest(rest: list[str]) -> None:
    """Files are there (`check_line`); of options pytest's own parser knows."""
    for word in rest:
        if word.startswith("tests") and not list(ROOT.glob(word.partition("::")[0])):
            raise Wrong(f"there is no {word}")


def check_python(rest: list[str]) -> None:
    """A study or a module of ours, by its own parser."""
    if rest[:1] == ["-m"]:
        module = importlib.import_module(rest[1])
        parsed(module.main, rest[2:])
        return
    file = ROOT / rest[0]
    if not file.is_file():
        raise Wrong(f"there is no {rest[0]}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"documented_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    options = parsed(module.main, rest[1:])
    fedsplit.config.load([], [pair for pair in getattr(options, "set", None) or []])


def script(name: str) -> Callable[[], Any]:
    """The function behind an installed command."""
    (point,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    return point.load()  # type: ignore[no-any-return]


def parsed(main: Callable[[], Any], rest: Sequence[str]) -> argparse.Namespace:
    """What a program's own parser makes of a command line; the program ends there.

    Raises:
        Wrong: the parser refuses it.
    """
    real, argv = argparse.ArgumentParser.parse_args, sys.argv
    given: list[argparse.Namespace] = []

    def parse(parser: argparse.ArgumentParser, *arguments: Any, **named: Any) -> argparse.Namespace:
        given.append(real(parser, *arguments, **named))
        raise Parsed

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise Wrong(message)

    errors = {cls: cls.error for cls in (argparse.ArgumentParser, *argparse.ArgumentParser.__subclasses__())}
    sys.argv = [getattr(main, "__name__", "main"), *rest]
    argparse.ArgumentParser.parse_args = parse  # type: ignore[assignment, method-assign]
    for cls in errors:
        cls.error = refuse  # type: ignore[assignment, method-assign]
    try:
        main()
    except Parsed:
        return given[0]
    except SystemExit:
        if "--help" in rest:
            return argparse.Namespace()
        raise Wrong("it ends before it has read its command line") from None
    finally:
        sys.argv, argparse.ArgumentParser.parse_args = argv, real  # type: ignore[method-assign]
        for cls, error in errors.items():
            cls.error = error  # type: ignore[method-assign]
    raise Wrong("it has no parser")
