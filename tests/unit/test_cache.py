"""The cache of small files: what is whole and the user's own is read again, everything else is made again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelopt_lite.cache import cache_folder, cached, private_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "modelopt-lite" / "kind"


@pytest.fixture
def compiler():
    """What stands for one: returns what it makes, another thing each time."""

    class Compiler:
        runs = 0

        def __call__(self):
            self.runs += 1
            return b"made %d" % self.runs

    return Compiler()


def the_file(cache):
    (path,) = cache.iterdir()  # so nothing temporary is left either
    return path


def test_it_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path(os.path.expanduser("~/.cache/modelopt-lite"))


def test_made_once(cache, compiler):
    assert [cached("kind", (b"a", b"b"), compiler) for _ in range(3)] == [b"made 1"] * 3
    assert cache.stat().st_mode & 0o777 == 0o700
    assert the_file(cache).stat().st_mode & 0o077 == 0


def test_another_process_finds_it(cache, compiler):
    cached("kind", (b"a",), compiler)
    program = "from modelopt_lite.cache import cached; print(cached('kind', (b'a',), lambda: b'made again'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "b'made 1'\n"


def test_every_part_of_the_key_counts(cache, compiler):
    for number, key in enumerate([(b"a", b"b"), (b"ab",), (b"ab", b""), (b"b", b"a"), ()], 1):
        assert cached("kind", key, compiler) == b"made %d" % number


def damaged(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def half_written(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def of_another_key(path):
    cached("kind", (b"other",), lambda: b"other")
    (other,) = set(path.parent.iterdir()) - {path}
    other.replace(path)


@pytest.mark.parametrize("happen", [damaged, half_written, emptied, of_another_key], ids=lambda f: f.__name__)
def test_what_is_not_whole_is_made_again(cache, compiler, happen):
    cached("kind", (b"a",), compiler)
    happen(the_file(cache))
    assert [cached("kind", (b"a",), compiler) for _ in range(2)] == [b"made 2"] * 2


def test_a_compiler_that_fails_leaves_nothing(cache):
    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached("kind", (b"a",), fails)
    assert not [*cache.iterdir()]


def readable_by_others(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o755)


def a_link(cache):
    cache.parent.mkdir(parents=True)
    elsewhere = cache.parent.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    cache.symlink_to(elsewhere)


def a_file(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("")


@pytest.mark.parametrize("begin", [readable_by_others, a_link, a_file], ids=lambda f: f.__name__)
def test_a_folder_that_cannot_be_trusted_is_not_used(cache, compiler, begin):
    """It costs the time to compile, and is no error."""
    begin(cache)
    assert [cached("kind", (b"a",), compiler) for _ in range(2)] == [b"made 1", b"made 2"]
    assert cache.is_file() or not [*cache.iterdir()]
    with pytest.raises(OSError, match=str(cache)):
        private_folder("kind")


def test_another_users_folder_is_not_used(cache, compiler, monkeypatch):
    cached("kind", (b"a",), compiler)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert cached("kind", (b"a",), compiler) == b"made 2"


@pytest.mark.parametrize("function", ["mkstemp", "replace"])
def test_a_full_or_read_only_disk(cache, compiler, monkeypatch, function):
    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp" if function == "mkstemp" else "os.replace", fails)
    assert [cached("kind", (b"a",), compiler) for _ in range(2)] == [b"made 1", b"made 2"]
    assert not [*cache.iterdir()]


def test_no_home(compiler, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    assert cached("kind", (b"a",), compiler) == b"made 1"
