"""The folder is the registry, plug-ins join by entry point, and nothing is imported to list."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenmill as tm
from tokenmill import catalog, laws
from tokenmill.errors import LimitError, UnsupportedError

TOY = Path(__file__).parent / "laws" / "toy_decoder.py"


def _run(code: str, *path: Path) -> str:
    """The output of a fresh interpreter, with these folders first on its path."""
    start = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A method whose file was dropped into the folder of a family: its slug."""
    root = tmp_path / "tokenmill"
    for family in catalog.FAMILIES:
        if (catalog.ROOT / family).is_dir():
            shutil.copytree(catalog.ROOT / family, root / family)
    shutil.copy(TOY, root / "decode" / "toy_decoder.py")
    monkeypatch.setattr(catalog, "ROOT", root)
    package = importlib.import_module("tokenmill.decode")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(root / "decode")])
    yield "toy-decoder"
    sys.modules.pop("tokenmill.decode.toy_decoder", None)
    vars(package).pop("toy_decoder", None)


def test_a_dropped_file_is_a_method_everywhere(dropped: str) -> None:
    assert catalog.paths()[dropped] == "tokenmill.decode.toy_decoder"
    card = tm.card("toy_decoder")
    assert (card.slug, card.family, card.name) == (dropped, "decode", "Toy decoder")
    assert dropped in [c.slug for c in tm.cards("decode")]
    assert tm.method(dropped) is catalog.load(dropped).ToyDecoder
    assert importlib.import_module("tokenmill.decode").ToyDecoder is tm.method(dropped)
    quick = [law for law in laws.laws_for(card.kind) if law.name in ("api is there", "length stops exactly")]
    assert [laws.judge(dropped, law).status for law in quick] == ["ok", "ok"]


def test_shared_modules_and_unwritten_methods_are_not_in_the_catalog(dropped: str) -> None:
    files = {f.stem.replace("_", "-") for f in (catalog.ROOT / "decode").glob("[a-z]*.py")}
    assert {c.slug for c in tm.cards("decode")} == files
    assert not any(slug.startswith(("-", "_")) for slug in catalog.paths())


def test_a_folder_is_a_method_too(dropped: str) -> None:
    folder = catalog.ROOT / "decode" / "toy_decoder"
    folder.mkdir()
    (catalog.ROOT / "decode" / "toy_decoder.py").rename(folder / "__init__.py")
    assert catalog.entry(dropped).file == folder / "__init__.py"
    assert tm.card(dropped).name == "Toy decoder"


def test_reading_a_card_gives_what_the_module_has(dropped: str) -> None:
    for slug in catalog.paths():
        written = catalog.load(slug).CARD
        read = tm.card(slug)
        assert (written.slug, written.family) == ("", "")
        fields = set(catalog.Card.__dataclass_fields__) - {"slug", "family"}
        assert all(getattr(read, f) == getattr(written, f) for f in fields)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("X = 1", "there is no CARD"),
        ("import os\nCARD = Card(name=os.name)", "not plain data"),
        ("CARD = Card(**{})", "not plain data"),
    ],
)
def test_a_card_that_is_not_plain_data_is_refused(dropped: str, source: str, message: str) -> None:
    (catalog.ROOT / "decode" / "bad.py").write_text(source)
    with pytest.raises(UnsupportedError, match=message):
        tm.card("bad")


def test_two_methods_with_one_public_name_are_refused(dropped: str) -> None:
    shutil.copy(TOY, catalog.ROOT / "decode" / "another.py")
    with pytest.raises(LimitError, match="ToyDecoder"):
        dir(importlib.import_module("tokenmill.decode"))


def test_an_unknown_name_answers_with_the_nearest(dropped: str) -> None:
    with pytest.raises(LimitError, match="Did you mean toy-decoder"):
        tm.card("toy-decodr")
    with pytest.raises(LimitError, match="Did you mean decode"):
        tm.cards("decod")


def test_a_broken_import_stays_a_broken_import(dropped: str) -> None:
    text = TOY.read_text().replace("import torch\n", "import no_such_package\n", 1)
    (catalog.ROOT / "decode" / "broken.py").write_text(text.replace('"ToyDecoder"', '"Other"'))
    assert tm.card("broken").name == "Toy decoder"
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        catalog.load("broken")


def test_importing_and_listing_load_no_torch() -> None:
    code = """
    import tokenmill as tm
    cards = tm.cards()
    dir(tm), dir(tm.bench), tm.bench.task_names()
    print([m for m in ("torch", "transformers", "numpy") if m in sys.modules])
    """
    assert _run(code).strip() == "[]"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder into which a distribution with one method was installed by pip."""
    source, target = tmp_path / "source", tmp_path / "site"
    (source / "millext").mkdir(parents=True)
    (source / "millext" / "__init__.py").touch()
    text = TOY.read_text().replace("Toy decoder", "Plugged decoder")
    (source / "millext" / "plugged.py").write_text(text)
    (source / "pyproject.toml").write_text(
        textwrap.dedent("""
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "millext"
        version = "1.0"
        [project.entry-points."tokenmill.methods"]
        "decode.plugged-decoder" = "millext.plugged"
        """)
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    return target


def test_an_installed_plugin_is_in_cards_list_and_laws(plugin: Path) -> None:
    code = """
    import tokenmill as tm
    from tokenmill import catalog
    entry = catalog.entry("plugged-decoder")
    print(entry.origin, entry.family, tm.card("plugged-decoder").name, "torch" in sys.modules)
    from typer.testing import CliRunner
    from tokenmill.cli import app
    print("plugged-decoder" in CliRunner().invoke(app, ["list"]).output, "torch" in sys.modules)
    import json, torch
    torch.set_num_threads(1)
    done = CliRunner().invoke(app, ["check", "plugged-decoder", "--json"])
    found = {r["law"]: r["status"] for r in json.loads(done.output)}
    print(found.pop("docs page exists"), set(found.values()), len(found) > 15, done.exit_code)
    """
    lines = _run(code, plugin).splitlines()
    assert lines == ["millext decode Plugged decoder False", "True False", "does not apply {'ok'} True 0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("toy", "'<family>.<slug>'"), ("magic.toy", "'<family>.<slug>'"), ("decode.toy-decoder", "a new slug")],
)
def test_a_plugin_with_a_bad_name_is_refused(
    dropped: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "millext-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: millext\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tokenmill.methods]\n{name} = millext.plugged\n")
    monkeypatch.syspath_prepend(info.parent)
    with pytest.raises(LimitError, match=message) as error:
        catalog.entries()
    assert "millext" in str(error.value)


@pytest.mark.parametrize("name", ["tokenmill", "tokenmill.bench"])
def test_public_names_are_found_and_none_hides_behind_a_submodule(name: str) -> None:
    """A submodule that is imported becomes an attribute of its package and would cover a name like its own."""
    package = importlib.import_module(name)
    public = dir(package)
    assert len(public) > 5
    for attribute in public:
        value = getattr(package, attribute)
        submodule = f"{name}.{attribute}" in sys.modules
        assert submodule == (type(value) is type(sys)), attribute
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018 - the access is the test


def test_paper_address() -> None:
    assert catalog.Paper(title="A", date="2026-01", arxiv="2601.00001").url == "https://arxiv.org/abs/2601.00001"
    assert catalog.Paper(title="A", date="2026-01").url == ""
