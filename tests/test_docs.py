"""Every code block of README, CONTRIBUTING and docs is right: Python runs, TOML loads, commands name what there is.

What a block is and how it is held against the code stands in `blocks.py`; here it is applied to every page, and
shown to fail.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blocks import OURS, ROOT, Block, Wrong, bare, blocks, check, lines, words_of
from markdown_it import MarkdownIt
from PIL import Image

import fedsplit.config
from fedsplit.cli.main import main
from fedsplit.config import Config, keys, load
from fedsplit.places import PLACES, STUDIES

sys.path.append(str(ROOT / "docs"))

import generate

PAGES = ["README.md", "CONTRIBUTING.md", *(str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("docs/**/*.md")))]
MADE_BY_READERS = ("fedsplit/wire/clip.py",)  # of the walk-through
# Runs of the documentation at the smallest size.
SMOKE = (
    "model.name=fedsplit_nano", "model.pretrained=false", "rounds=1", "data.limit=60", "data.test-limit=20",
    "data.allow-missing-classes=true", "data.min-samples=1", "devices.count=3", "devices.per-round=0",
    "cut.front=1", "cut.tail=0", "local.max-steps=1", "local.batch-size=8", "local.self-update.epochs=1",
)  # fmt: skip
QUICK = ("run", "plan", "keys", "map", "certify")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the configs, and a small data set where the pages say DATA_FOLDER."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = tmp_path / "DATA_FOLDER" / "tinyimagenet_a100"
    folder.mkdir(parents=True)
    images = []
    for seed in range(4):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue()})
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2, 3]}), folder / "val.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_is_right(name: str) -> None:
    for block in blocks(page(name), name):
        check(block)


@pytest.mark.parametrize("name", [name for name in PAGES if any(b.language == "python" for b in blocks(page(name)))])
def test_python_of_a_page_runs_in_order(name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)  # dataclasses look their module up
    for block in blocks(page(name), name):
        if block.language == "python" and block.how != "not run":
            with monkeypatch.context() as patch:
                if block.how == "smoke":
                    patch.setattr(fedsplit.config, "load", partial(load_small, block))
                exec(compile(block.text, block.place, "exec"), vars(module))


def load_small(block: Block, files: Sequence[str] = (), pairs: Sequence[str] = ()) -> Config:
    return load(files, [*pairs, *SMOKE, *block.said.split()])


@pytest.mark.parametrize("name", [name for name in PAGES if any(b.how == "smoke" for b in blocks(page(name)))])
def test_commands_that_are_quick_run(name: str, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for block in blocks(page(name), name):
        for line in lines(block.text) if (block.how, block.language) == ("smoke", "shell") else ():
            command = bare(words_of(line, block.place))
            if command[0] != "fedsplit" or command[1] not in QUICK or "--workers" in command or not stays_small(line):
                continue
            more = (*SMOKE, *block.said.split()) if command[1] in ("run", "plan", "map") else ()
            code = main([*command[1:], *(word for pair in more for word in ("--set", pair))])
            assert code == 0, f"{block.place}: {line}: {capsys.readouterr().err}"
            ran += 1
    assert ran or all(block.language == "python" for block in blocks(page(name), name) if block.how == "smoke")


def stays_small(line: str) -> bool:
    """Whether a command is at the smallest size with `SMOKE`, and needs nothing that a reader has to bring."""
    return not re.search(r"FOLDER|FILE|=N\b", line)


def test_a_table_is_what_the_code_beside_it_prints(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (b for b in blocks(page("docs/wire.md")) if b.language == "python")
    exec(compile(block.text, block.place, "exec"), {})
    printed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    rows = re.findall(r"^\| (`[^|]+`) \| ([\d.]+) \| ([\d., ]+) \|", page("docs/wire.md"), re.MULTILINE)
    assert len(rows) > 10
    for names, bits, errors in rows:
        for codec, error in zip(re.findall(r"`(.+?)`", names), errors.split(", "), strict=True):
            assert float(printed[codec][0]) == pytest.approx(float(bits), abs=0.05), codec
            assert f"{float(printed[codec][1]):.{len(error.partition('.')[2])}f}" == error, codec


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_that_a_page_names_are_there(name: str) -> None:
    text, folder = page(name), (ROOT / name).parent
    for token in MarkdownIt("commonmark").parse(text):
        for child in token.children or ():
            target = str(child.attrs.get("href", "")).partition("#")[0] if child.type == "link_open" else ""
            if target and "://" not in target:
                assert (folder / target).is_file(), f"{name} links to {target}, which is not there"
            words = child.content.split() if child.type == "code_inline" else []
            for word in words[1:] if words[:1] in (["pytest"], ["python"]) else words[:1]:
                if OURS.match(word) and "." in word and word not in MADE_BY_READERS:
                    assert list(ROOT.glob(word)), f"{name} names {word}, which is not there"


def test_every_page_stands_in_the_index() -> None:
    index = blocks(page("docs/index.md"))
    listed = [line for block in index for line in block.text.splitlines() if line[:1] not in (":", "")]
    there = [str(file.relative_to(ROOT / "docs").with_suffix("")) for file in ROOT.glob("docs/**/*.md")]
    assert sorted(listed) == sorted(set(there) - {"index"}), "docs/index.md lists every page, once"


BAD = [
    ("    fedsplit run --set rounds=three", "rounds must be a whole number"),
    ("    fedsplit run --set roundz=3", "Unknown config key 'roundz'"),
    ("    fedsplit run --config configs/nowhere.toml", "there is no configs/nowhere.toml"),
    ("    fedsplit run --rounds 3", "unrecognized arguments: --rounds 3"),
    ("    fedsplit rum", "invalid choice: 'rum'"),
    ("    sudo /opt/fedsplit/venv/bin/fedsplit doctor --devise", "unrecognized arguments: --devise"),
    ("    flwr run . --streaming", "[Nn]o such option"),
    ("    flwr runs .", "flwr has no 'runs'"),
    ('    flwr run . --run-config "roundz=3"', "Unknown config key 'roundz'"),
    ("    flwr run . --run-config configs/nowhere.toml", "there is no configs/nowhere.toml"),
    ("    python simulations/nowhere.py", "there is no simulations/nowhere.py"),
    ("    python simulations/paper.py sfprompt --qick", "unrecognized arguments: --qick"),
    ("    python simulations/paper.py sfprompt --set data.limmit=1", "Unknown config key 'data.limmit'"),
    ("    python -m fedsplit.pretrain.probe --data digits", "arguments are required: --weights"),
    ("    flower-superlink --hots 0.0.0.0", "unrecognized arguments|--hots"),
    ("    make tests", "no target 'tests'"),
    ("    pip install 'fedsplit[everything]'", "no extra 'everything'"),
    ("    pytest tests/test_nothing.py", "there is no tests/test_nothing.py"),
    ("    fedsplit pretrain --set epoch=1", "Unknown config key 'epoch'"),
    ("    fedsplit run --set 'name=x", "No closing quotation"),
    ("    round 1 accuracy 28.8", "nobody knows what 'round' is"),
    ("```toml\n[data]\nlimmit = 3\n```", "Unknown config key 'data.limmit'"),
    ("```toml\nrounds = \n```", "Invalid value"),
    ("<!-- not run: another program's -->\n```toml\nrounds = \n```", "Invalid value"),
    ("```python\nimport =\n```", "invalid syntax"),
    ("```ruby\nputs 1\n```", "'ruby' is not checked"),
    ("<!-- not run -->\n\n    round 1", "nobody knows what 'round' is"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[text.strip().splitlines()[-1][:50] for text, _ in BAD])
def test_a_block_that_a_reader_could_not_use_is_found(text: str, said: str) -> None:
    with pytest.raises(Wrong, match=rf"page\.md:\d+.*(?:{said})"):
        for block in blocks(f"Text:\n\n{text}\n"):
            check(block)


def test_blocks_are_found_with_what_is_said_of_them() -> None:
    text = "1. In a list:\n\n       make test   # it\n\n<!-- smoke: a=1 b=2 -->\n\n    fedsplit keys \\\n      wire\n"
    text += "\n<!-- not run: no -->\n~~~\nx\n~~~\n"
    first, second, third = blocks(text)
    assert (first.line, first.language, first.how) == (3, "shell", "")
    assert (second.how, second.said.split()) == ("smoke", ["a=1", "b=2"])
    assert [bare(words_of(line, "")) for line in lines(second.text)] == [["fedsplit", "keys", "wire"]]
    assert third == Block("page.md", 11, "text", "x\n", "not run", "no")
    assert bare(words_of("sudo A=b /usr/bin/fedsplit plan [--json] [--against F.toml] # c", "")) == [
        "fedsplit", "plan", "--json", "--against", "configs/demo.toml",
    ]  # fmt: skip


def test_the_generated_reference_has_every_key_piece_and_command() -> None:
    text = generate.keys()
    assert [name for name in keys() if f"| `{name}` |" not in text] == []
    assert "| `devices.per-round` | int |" in text and "≥ 0" in text
    shown = generate.pieces()
    for place in (*PLACES, *STUDIES):
        assert f"`{place.key}`" in shown
        for name, cls in place.pieces.items():
            assert f"### {name}\n" in shown and f"`{cls.__module__}.{cls.__name__}`" in shown
    for word in generate.PARTS:
        assert shown.count(f"| **{word}** |") >= len({cls for place in PLACES for cls in place.pieces.values()})
    said = generate.commands()
    assert "## fedsplit run\n" in said and "--max-ssim X" in said


def test_pages_take_sections_of_the_readme() -> None:
    text = "# Title\n\nabove [docs/x.md](docs/x.md) [c](CONTRIBUTING.md)\n\n"
    text += "## Use it!\n\nbelow\n\n### Deep\n\n## Next\n\nno\n"
    assert generate.section(text, "title").strip().startswith("above")
    assert generate.section(text, "use-it").strip() == "below\n\n## Deep"
    assert generate.homed(generate.moved(text)).count("](x.md) [c](contributing.md)") == 1
    assert generate.titled("see [docs/x.md](x.md)") == "see [](x.md)"
    filled = generate.fill("# Use it\n\n[The README](../README.md#use-it)\n")
    assert "fedsplit run" in filled and "](docs/" not in filled and "../README" not in filled
    assert generate.plain("a * b_c `d * e` [x]") == r"a \* b\_c `d * e` \[x\]"
    with pytest.raises(KeyError):
        generate.fill("[Nothing](../README.md#nothing)\n")
