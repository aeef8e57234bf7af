"""Finding, checking and reading data: the known files, Penn Treebank, any text."""

import hashlib
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import platformdirs
import pytest
import tyro

from dni_rnn.data.task import SPLITS, Corpus, Task
from dni_rnn.data.texts import UNKNOWN
from dni_rnn.errors import UsageError
from dni_rnn_tasks import ptb
from dni_rnn_tasks.known_files import ENVIRONMENT, KnownFile, Source, load_known
from dni_rnn_tasks.ptb import CHARACTERS, PTB, WORDS, derive_characters
from dni_rnn_tasks.text import Text

ROOT = Path(__file__).parents[1]
REAL_PTB = ROOT.parent / "shared" / "data" / "ptb"

A, B = b"first file\n", b"second\n"
FILES = tuple(KnownFile(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in (("a.txt", A), ("b.txt", B)))
OTHER = (KnownFile("other.txt", 5, hashlib.sha256(b"other").hexdigest()),)
WANTED = {"a.txt": A, "b.txt": B}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own, and no data folder in the environment."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: folder / name)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return folder / "dni_rnn"


@pytest.fixture
def real_ptb():
    if not all((REAL_PTB / file.name).is_file() for file in WORDS + CHARACTERS):
        pytest.skip("no Penn Treebank files in ../shared/data/ptb: PTB itself was not tested")
    return REAL_PTB


def fill(folder, contents=WANTED):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def load(data_dir=None, choices=(FILES,), sources=()):
    return load_known("demo", choices, data_dir, sources, "ADVICE")


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# Known files


@pytest.mark.parametrize(
    ("content", "problem"),
    [(A, "None"), (A[:-1], "10 bytes instead of 11"), (A.replace(b"f", b"F"), "SHA-256 ")],
)
def test_mismatch(content, problem):
    assert str(FILES[0].mismatch(content)).startswith(problem)


@pytest.mark.parametrize("place", ["--data-dir", ENVIRONMENT, "cache", "source"])
def test_places_are_searched_in_order(place, tmp_path, cache, monkeypatch):
    """Every place after the first with files holds altered copies, which reading would refuse."""
    places = ["--data-dir", ENVIRONMENT, "cache", "source"]
    altered = {"a.txt": A.upper(), "b.txt": B.upper()}
    folders = {"--data-dir": tmp_path / "named", ENVIRONMENT: tmp_path / "variable", "cache": cache}
    for name in places[places.index(place) :]:
        if name in folders:
            fill(folders[name], WANTED if name == place else altered)
    if places.index(place) <= 1:
        monkeypatch.setenv(ENVIRONMENT, str(folders[ENVIRONMENT]))
    source = Source("pack", lambda: WANTED if place == "source" else altered)
    data_dir = folders["--data-dir"] if place == "--data-dir" else None
    assert load(data_dir, sources=[source]) == WANTED
    if place != "source":
        fill(folders[place], altered)
        with pytest.raises(UsageError, match="not the published file") as error:
            load(data_dir, sources=[Source("pack", lambda: WANTED)])
        assert str(folders[place]) in one_line(error)


@pytest.mark.parametrize("sub_folder", ["", "demo"])
def test_files_lie_in_the_folder_or_in_the_data_sets_own(sub_folder, tmp_path):
    fill(tmp_path / "data" / sub_folder)
    assert load(tmp_path / "data") == WANTED


@pytest.mark.parametrize("option", ["--data-dir", ENVIRONMENT])
@pytest.mark.parametrize("problem", ["no folder", "no file"])
def test_a_named_folder_is_never_replaced(option, problem, tmp_path, cache, monkeypatch):
    fill(cache)
    folder = tmp_path / "named"
    if problem == "no file":
        fill(folder, {"a.txt": A})
    if option == ENVIRONMENT:
        monkeypatch.setenv(ENVIRONMENT, str(folder))
    with pytest.raises(UsageError) as error:
        load(folder if option == "--data-dir" else None, sources=[Source("pack", lambda: WANTED)])
    message = one_line(error)
    assert f"{option} {folder}: " in message
    assert ("not a folder" if problem == "no folder" else "no b.txt there") in message


def test_an_empty_variable_names_no_folder(cache, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "")
    fill(cache)
    assert load() == WANTED


@pytest.mark.parametrize("named", [True, False])
def test_first_complete_choice_is_read(named, cache):
    data_dir = cache if named else None
    fill(cache, {"other.txt": b"other"})
    assert load(data_dir, choices=(FILES, OTHER)) == {"other.txt": b"other"}
    fill(cache)
    assert load(data_dir, choices=(FILES, OTHER)) == WANTED
    assert load(data_dir, choices=(OTHER, FILES)) == {"other.txt": b"other"}


def test_the_message_names_the_choice_closest_to_complete(tmp_path):
    with pytest.raises(UsageError, match=r"no a\.txt, b\.txt there"):
        load(tmp_path, choices=(FILES[::-1], FILES))
    fill(tmp_path, {"b.txt": B})
    with pytest.raises(UsageError, match=r"no a\.txt there"):
        load(tmp_path, choices=(FILES, (*OTHER, *OTHER)))


def test_an_unreadable_file(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    fill(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"a\.txt: cannot be read \(Permission denied\)") as error:
        load(tmp_path)
    one_line(error)


def test_fetched_files_go_to_the_cache(cache):
    calls = []
    source = Source("pack", lambda: calls.append(1) or {**WANTED, "extra.txt": b"not asked for"})
    assert load(sources=[source]) == WANTED
    assert {path.name: path.read_bytes() for path in (cache / "demo").iterdir()} == WANTED
    assert load(sources=[source]) == WANTED
    assert len(calls) == 1


def test_a_source_that_fails_is_passed_over(cache):
    def broken():
        raise RuntimeError("no\nnetwork")

    def absent():
        raise ModuleNotFoundError("No module named 'pack'", name="pack")

    altered = Source("altered", lambda: {"a.txt": A, "b.txt": B.upper()})
    failing = [Source("pack", absent), Source("broken", broken), altered]
    with pytest.raises(UsageError) as error:
        load(sources=failing)
    assert one_line(error) == (
        f"demo: no data (not in {cache}; no package pack; broken: RuntimeError: no network; "
        "altered: not the published b.txt); ADVICE"
    )
    assert not cache.exists()
    assert load(sources=[*failing, Source("good", lambda: WANTED)]) == WANTED


def test_an_interrupted_write_leaves_nothing(cache, monkeypatch):
    def interrupt(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(UsageError, match="cannot write to the cache") as error:
        load(sources=[Source("pack", lambda: WANTED)])
    one_line(error)
    assert list((cache / "demo").iterdir()) == []


# Penn Treebank


def test_characters_are_derived_by_the_published_rule():
    expected = b"n o _ i t \n < u n k > _ N \n "
    published = KnownFile("demo", len(expected), hashlib.sha256(expected).hexdigest())
    assert derive_characters(b" no it \n <unk> N \n", published) == expected
    with pytest.raises(AssertionError, match="not the published"):
        derive_characters(b" no it \n <unk> M \n", published)


def text_of(corpus, split):
    return "".join(np.array(corpus.symbols)[getattr(corpus, split)])


def test_ptb_char(real_ptb, tmp_path):
    """The character files and those made from the word files are the same symbols."""
    folders = {files: tmp_path / files[0].name for files in (CHARACTERS, WORDS)}
    for files, folder in folders.items():
        folder.mkdir()
        for file in files:
            (folder / file.name).symlink_to(real_ptb / file.name)
    corpus = PTB().load(folders[CHARACTERS])
    assert isinstance(PTB(), Task)
    assert corpus.name == "ptb/char"
    assert len(corpus.symbols) == corpus.input_symbols == corpus.target_symbols == 50
    assert {"_", "\n"} <= set(corpus.symbols)
    assert " " not in corpus.symbols
    lengths = [len(getattr(corpus, split)) for split in SPLITS]
    assert lengths == [5_017_482, 393_042, 442_423]
    assert text_of(corpus, "valid") == "".join(
        line.strip().replace(" ", "_") + "\n"
        for line in (real_ptb / "ptb.valid.txt").read_text().splitlines()
    )

    derived = PTB().load(folders[WORDS])
    assert derived.symbols == corpus.symbols
    for split in SPLITS:
        np.testing.assert_array_equal(getattr(derived, split), getattr(corpus, split))


def test_ptb_raw(real_ptb):
    corpus = PTB(convention="raw").load(real_ptb)
    assert corpus.name == "ptb/raw"
    for split, file in zip(SPLITS, WORDS, strict=True):
        assert len(getattr(corpus, split)) == file.size
    assert text_of(corpus, "test").encode() == (real_ptb / "ptb.test.txt").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "449,944 bytes instead of 449,945"),
        (lambda content: content.replace(b"the", b"teh", 1), "SHA-256"),
    ],
)
def test_a_damaged_ptb_is_refused(damage, message, real_ptb, tmp_path):
    for file in WORDS[:2]:
        (tmp_path / file.name).symlink_to(real_ptb / file.name)
    (tmp_path / "ptb.test.txt").write_bytes(damage((real_ptb / "ptb.test.txt").read_bytes()))
    with pytest.raises(UsageError, match=message) as error:
        PTB().load(tmp_path)
    assert str(tmp_path / "ptb.test.txt") in one_line(error)


def fake_datasets(folder, change=lambda sentence: sentence):
    """A `datasets` that serves the rows of the Parquet branch, made from the word files."""
    ours = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}

    def load_dataset(path, *, data_dir, revision):
        assert (path, data_dir) == ("ptb-text-only/ptb_text_only", "penn_treebank")
        assert revision == "refs/convert/parquet"
        return {
            split: {"sentence": [change(line.strip()) for line in (folder / name).read_text().splitlines()]}
            for split, name in ours.items()
        }

    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    return module


def fake_torchtext(folder):
    """A `torchtext.datasets` that behaves as 0.6: downloads only when its folder is not there, prints."""

    def download(root):
        target = Path(root, "penn-treebank")
        if not target.is_dir():
            print("downloading")
            fill(target, {file.name: (folder / file.name).read_bytes() for file in WORDS})
        return os.path.join(target, "")

    module = ModuleType("torchtext.datasets")
    vars(module)["PennTreebank"] = SimpleNamespace(download=download)
    return module


def install(monkeypatch, datasets=None, torchtext=None):
    """Put fakes in place of the two packages; None makes the import fail as when not installed."""
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "torchtext", torchtext and ModuleType("torchtext"))
    monkeypatch.setitem(sys.modules, "torchtext.datasets", torchtext)


@pytest.mark.parametrize("package", ["datasets", "torchtext", "altered datasets, then torchtext"])
def test_ptb_is_fetched_checked_and_kept(package, real_ptb, cache, monkeypatch, capsys):
    datasets = fake_datasets(real_ptb, (lambda s: s) if package == "datasets" else str.upper)
    torchtext = None if package == "datasets" else fake_torchtext(real_ptb)
    install(monkeypatch, None if package == "torchtext" else datasets, torchtext)
    fetched = PTB().load(None)
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in (cache / "ptb").iterdir()) == sorted(file.name for file in WORDS)
    for file in WORDS:
        assert file.mismatch((cache / "ptb" / file.name).read_bytes()) is None
    install(monkeypatch)  # nothing to fetch with any more: the cache must do
    again = PTB().load(None)
    assert (len(fetched.train), len(fetched.test)) == (5_017_482, 442_423)
    np.testing.assert_array_equal(again.valid, fetched.valid)


def test_torchtext_reads_a_root_that_is_already_there(real_ptb, tmp_path, monkeypatch):
    install(monkeypatch, torchtext=fake_torchtext(tmp_path / "not used"))
    (tmp_path / "penn-treebank").symlink_to(real_ptb)
    contents = ptb.from_torchtext(tmp_path)
    assert [file.mismatch(contents[file.name]) for file in WORDS] == [None, None, None]


def test_ptb_without_data_or_packages(monkeypatch):
    install(monkeypatch)
    with pytest.raises(UsageError, match="no package datasets; no package torchtext") as error:
        PTB().load(None)
    message = one_line(error)
    assert "--data-dir" in message
    assert "pip install 'dni-rnn[datasets]'" in message


def test_local_files_need_none_of_the_heavy_packages(real_ptb):
    code = (
        "import sys; from pathlib import Path; from dni_rnn_tasks.ptb import PTB; "
        "from dni_rnn_tasks.text import Text; early = 'numpy' in sys.modules; "
        "PTB(convention='raw').load(Path(sys.argv[1])); Text().load(None); "
        "print(early, [m for m in ('torch', 'datasets', 'torchtext') if m in sys.modules])"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "tasks")))
    done = subprocess.run(
        [sys.executable, "-c", code, str(real_ptb)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False []"


# Any text


def test_text_file_is_split_by_position(tmp_path):
    text = "abcdé\r\n" * 20  # 140 characters, 160 bytes
    (tmp_path / "story.txt").write_bytes(text.encode())
    corpus = Text(path=tmp_path / "story.txt").load(None)
    assert isinstance(corpus, Corpus)
    assert corpus.name == "text/story.txt"
    assert corpus.symbols == ("\n", "\r", "a", "b", "c", "d", "é")
    assert [text_of(corpus, split) for split in SPLITS] == [text[:126], text[126:133], text[133:]]
    unequal = Text(path=tmp_path / "story.txt", valid_fraction=0.5, test_fraction=0.1).load(None)
    assert [len(getattr(unequal, split)) for split in SPLITS] == [56, 70, 14]


def test_text_folder_is_joined_by_name_without_hidden_files(tmp_path):
    folder = fill(tmp_path / "book", {"b.md": b"bb" * 20, "a.txt": b"ab" * 20, ".hidden": b"\xff"})
    fill(folder / "sub", {"c": b"ba" * 20})
    fill(folder / ".git", {"config": b"\xff"})
    corpus = Text(path=folder).load(None)
    assert corpus.name == "text/book"
    assert "".join(text_of(corpus, split) for split in SPLITS) == "ab" * 20 + "bb" * 20 + "ba" * 20


def test_default_text():
    corpus = Text().load(None)
    assert corpus.name == "text/default"
    assert corpus.input_symbols == len(set(corpus.symbols)) <= 96
    assert all(symbol == "\n" or " " <= symbol <= "~" for symbol in corpus.symbols)
    assert len(corpus.train) > 200_000
    assert "The Python" in "".join(text_of(corpus, split) for split in SPLITS)


def test_default_text_drops_what_training_lacks(monkeypatch):
    topics = {"c": "ab!\u2014?", "b": "ab" * 20, "a": "ba" * 20}
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)
    corpus = Text(valid_fraction=0.1, test_fraction=0.1).load(None)
    everything = "ba" * 20 + "\n" + "ab" * 20 + "\n" + "ab!?"  # the dash is not ASCII
    assert text_of(corpus, "train") == everything[:70]
    assert text_of(corpus, "valid") == everything[70:78]
    assert text_of(corpus, "test") == "bab\nab"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        (b"", "no text there"),
        (b"abc\xe9def" * 20, "not UTF-8 at byte 3"),
        (b"ab" * 10, "20 characters split into 18 / 1 / 1"),
    ],
)
def test_unusable_text(content, message, tmp_path):
    path = tmp_path / "story.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        Text(path=path).load(None)
    assert "story.txt" in one_line(error)


def test_what_training_has_not_got_is_one_unknown_symbol(tmp_path):
    (tmp_path / "story.txt").write_text("ab" * 36 + "zzab" + "ayéb")
    corpus = Text(path=tmp_path / "story.txt").load(None)
    assert corpus.symbols == ("a", "b", UNKNOWN)
    assert (corpus.valid.tolist(), corpus.test.tolist()) == ([2, 2, 0, 1], [0, 2, 2, 1])
    assert set(corpus.train.tolist()) == {0, 1}
    assert corpus.unknown == 4
    (tmp_path / "story.txt").write_text("ab" * 40)
    known = Text(path=tmp_path / "story.txt").load(None)
    assert (known.symbols, known.unknown) == (("a", "b"), 0)


@pytest.mark.parametrize(
    ("symbols", "dtype"), [(256, np.uint8), (257, np.int16), (1 << 15, np.int16), ((1 << 15) + 1, np.int32)]
)
def test_symbols_have_the_narrowest_type_and_their_order(symbols, dtype, tmp_path):
    """Pieces are cut within characters of several bytes, and the type changes on the way."""
    letters = [chr(0x4E00 + i) for i in range(symbols)]
    text = "".join(letters[::-1]) + "".join(letters) * 20
    (tmp_path / "story.txt").write_text(text, encoding="utf-8")
    corpus = Text(path=tmp_path / "story.txt").load(None)
    assert corpus.symbols == tuple(letters)
    assert {getattr(corpus, split).dtype for split in SPLITS} == {np.dtype(dtype)}
    assert "".join(text_of(corpus, split) for split in SPLITS) == text


def test_any_file_is_256_bytes(tmp_path):
    content = bytes(range(256)) * 3 + b"\xff\xd8\0" * 30
    (tmp_path / "picture.jpg").write_bytes(content)
    corpus = Text(path=tmp_path / "picture.jpg", symbols="bytes").load(None)
    assert b"".join(getattr(corpus, split).tobytes() for split in SPLITS) == content
    assert (corpus.name, corpus.input_symbols, corpus.unknown) == ("text/picture.jpg/bytes", 256, 0)
    assert corpus.alphabet.counts[0] == int((corpus.train == 0).sum())
    help_ = Text(symbols="bytes").load(None)
    assert "The Python" in help_.train.tobytes().decode()


def test_a_folder_gives_its_texts_and_says_once_what_is_none(tmp_path, capsys):
    """Whatever lies in it, and whatever links lead where."""
    folder = fill(
        tmp_path / "src", {"a.py": b"aa" * 20, "z.py": b"zz" * 20, "logo.png": b"\x89PNG\r\n", "0": b"0\0"}
    )
    fill(folder / "__pycache__", {"a.pyc": b"\xcb\r\r\n"})
    fill(folder / ".git", {"config": b"hidden"})
    fill(folder / "runs" / "one", {"config.json": b"{}", "metrics.jsonl": b"{}\n"})
    fill(tmp_path / "more", {"m.txt": b"mm" * 20, "late.txt": b"l" * 5000 + b"\xff"})
    (folder / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "round").symlink_to(folder)
    (folder / "again.py").symlink_to("a.py")
    (folder / "broken").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    corpus = Text(path=folder).load(None)
    assert "".join(text_of(corpus, split) for split in SPLITS) == "aa" * 20 + "mm" * 20 + "zz" * 20
    (line,) = capsys.readouterr().err.splitlines()
    for words in (
        "3 not UTF-8 text (0, ...)",
        "2 hidden or a cache (.git",
        "1 a run directory (runs/one)",
        "2 not a file",
    ):
        assert words in line
    inside = Text(path=folder / "linked" / "m.txt").load(None)
    assert "".join(text_of(inside, split) for split in SPLITS) == "mm" * 20
    assert capsys.readouterr().err == ""
    assert Text(path=folder, symbols="bytes").load(None).input_symbols == 256
    assert "not UTF-8" not in capsys.readouterr().err


def test_a_folder_without_any_text_says_what_is_there(tmp_path):
    fill(tmp_path, {"logo.png": b"\x89PNG\r\n"})
    with pytest.raises(UsageError, match=r"no text there; .* \(passed over: 1 not UTF-8 text \(logo.png\)\)"):
        Text(path=tmp_path).load(None)


def test_a_text_is_looked_for_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"t.txt": b"here" * 20})
    fill(tmp_path / "data", {"t.txt": b"data" * 20})
    for path in (Path("t.txt"), Path("deeper/t.txt"), tmp_path / "t.txt"):
        assert text_of(Text(path=path).load(tmp_path / "data"), "test") == "data"
    assert text_of(Text(path=Path("t.txt")).load(None), "test") == "here"
    with pytest.raises(UsageError, match=r"no t\.txt there"):
        Text(path=Path("t.txt")).load(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    with pytest.raises(UsageError, match="no text there") as error:
        Text(path=tmp_path).load(None)
    assert str(tmp_path) in one_line(error)


def test_unreadable_text(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "story.txt").write_text("there, but not for us")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"story\.txt: cannot be read \(Permission denied\)") as error:
        Text(path=tmp_path / "story.txt").load(None)
    one_line(error)


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\)") as error:
        Text(path=tmp_path).load(None)
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize(
    ("valid", "test", "message"),
    [
        (0.0, 0.1, "valid_fraction is 0.0"),
        (0.1, 1.0, "test_fraction is 1.0"),
        (float("nan"), 0.1, "valid_fraction is nan"),
        (0.5, 0.5, "nothing to train on"),
    ],
)
def test_fractions_are_checked(valid, test, message):
    with pytest.raises(UsageError, match=message) as error:
        Text(valid_fraction=valid, test_fraction=test)
    one_line(error)


def test_tasks_are_command_line_options():
    assert tyro.cli(PTB, args=["--convention", "raw"]) == PTB(convention="raw")
    assert tyro.cli(Text, args=["a.txt", "--test-fraction", "0.2"]) == Text(
        path=Path("a.txt"), test_fraction=0.2
    )
    assert tyro.cli(Text, args=[]) == Text()
    with pytest.raises(UsageError, match="valid_fraction"):
        tyro.cli(Text, args=["--valid-fraction", "2"])
