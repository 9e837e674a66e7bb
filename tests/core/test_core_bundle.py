from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.core import bundle_check
from diffship.core.atomic import partial_prefix
from diffship.core.bundle import Bundle, Manifest, Part, require_place, write_bundle
from diffship.core.dtype import TensorMeta
from diffship.core.errors import BundleError, ConfigError, SourceError
from diffship.core.leftovers import claim_folder, remove_leftovers
from diffship.core.limits import LIMITS
from diffship.core.safetensors_file import write_safetensors

Fill = Callable[..., None]


def listing(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_written_bundle_opens_verifies_and_is_plain(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path)
    assert opened == bundle
    seen: list[tuple[str, int]] = []
    opened.verify(lambda name, size: seen.append((name, size)))
    assert [name for name, _ in seen] == sorted(opened.manifest.files) and len(seen) == 3
    assert opened.file("unet/config.json").read_text() == '{"value": 1}'
    assert opened.part("unet").golden is not None
    assert sorted(path.name for path in bundle.path.parent.iterdir()) == ["bundle"]
    assert bundle.path.stat().st_mode & 0o777 == 0o777 & ~_umask()
    with pytest.raises(BundleError, match="no part 'vae'; it has unet"):
        opened.part("vae")
    with pytest.raises(BundleError, match="does not list"):
        opened.file("../../etc/passwd")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_link_to_a_bundle_opens(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    assert Bundle.open(tmp_path / "link").path == bundle.path


@pytest.mark.parametrize("path", ["none", "a\0b", "x" * 5000])
def test_no_such_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Bundle.open(f"{tmp_path}/{path}")


def test_a_folder_or_file_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no diffship\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"PK\3\4")
    with pytest.raises(ConfigError, match="not a folder; it is a zip archive; unpack"):
        Bundle.open(tmp_path / "x.zip")


FILES = ["unet/weights.safetensors", "unet/config.json", "golden/unet.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_found(name: str, bundle: Bundle) -> None:
    path = bundle.path / name
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for offset in generator.integers(0, len(whole), 50):
        path.write_bytes(
            whole[:offset] + bytes([whole[offset] ^ int(generator.integers(1, 256))]) + whole[offset + 1 :]
        )
        with pytest.raises(BundleError, match=name):
            Bundle.open(bundle.path).verify()
    path.write_bytes(whole)
    Bundle.open(bundle.path).verify()


def test_a_changed_header_is_refused_at_open(bundle: Bundle) -> None:
    path = bundle.path / FILES[0]
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(BundleError, match="not a valid safetensors file"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", FILES)
def test_truncated_empty_grown_or_missing_file_is_refused_at_open(name: str, bundle: Bundle) -> None:
    path = bundle.path / name
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 4096), len(whole) - 1, len(whole) + 1}:
        path.write_bytes(whole[:size] + bytes(max(size - len(whole), 0)))
        with pytest.raises(BundleError, match=f"{name} has {size} bytes; it had {len(whole)}"):
            Bundle.open(bundle.path)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(bundle.path)


def test_truncated_manifest_is_refused_at_every_length(bundle: Bundle) -> None:
    path = bundle.path / "diffship.json"
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(BundleError, match=r"diffship\.json"):
            Bundle.open(bundle.path)


def test_unlisted_file_is_named_by_verify(bundle: Bundle) -> None:
    (bundle.path / "unet/extra.py").write_text("print('hi')")
    with pytest.raises(BundleError, match=r"does not list: 'unet/extra\.py'"):
        Bundle.open(bundle.path).verify()


LEFT = [
    *(".DS_Store", "unet/._config.json", "Thumbs.db", "unet/desktop.ini", "__MACOSX/unet/._x", ".gitattributes"),
    *("unet/@eaDir/config.json@SynoEAStream", "$RECYCLE.BIN/x", "unet/.nfs0000000012", ".git", ".huggingface/x"),
]


@pytest.mark.parametrize("name", [*LEFT, ".cache/huggingface/download/unet/config.json.metadata"])
def test_what_systems_and_downloads_leave_is_passed_over_and_told(name: str, bundle: Bundle, fill: Fill) -> None:
    (bundle.path / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle.path / name).write_bytes(b"left")
    (note,) = Bundle.open(bundle.path).verify()
    assert note == f"passed over: 1 file of systems and downloads ('{name}')"
    with write_bundle(bundle.path, overwrite=True) as draft:
        fill(draft.folder, 2)
        (draft.folder / ".DS_Store").write_bytes(b"a file manager looks at the draft")
        assert ".DS_Store" not in draft.finish(bundle.manifest).manifest.files
    assert name == ".DS_Store" or not (bundle.path / name).exists()
    assert Bundle.open(bundle.path).verify() == ("passed over: 1 file of systems and downloads ('.DS_Store')",)


def test_a_clone_is_verified_and_never_replaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `.git` holds the weights once more, as hard links at times, and commits that are nowhere else."""
    monkeypatch.setattr("diffship.core.travel.LIMITS", replace(LIMITS, beside_bytes=99))
    objects = bundle.path / ".git" / "lfs" / "objects"
    objects.mkdir(parents=True)
    (objects / "ab").write_bytes(bytes(1000))
    os.link(objects / "ab", objects / "cd")
    assert Bundle.open(bundle.path).verify() == ("passed over: .git, as it is a clone",)
    with pytest.raises(ConfigError, match=r"is a clone with its \.git, so it is never replaced"):
        require_place(bundle.path, overwrite=True)
    assert (objects / "ab").is_file()
    (bundle.path / "unet" / ".git").mkdir()
    (bundle.path / "unet" / ".git" / "config").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"does not list: 'unet/\.git/config'"):
        Bundle.open(bundle.path).verify()


def test_what_is_passed_over_has_bounds(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle.path / ".gitattributes").write_bytes(bytes(100))
    monkeypatch.setattr("diffship.core.travel.LIMITS", replace(LIMITS, beside_bytes=99))
    with pytest.raises(BundleError, match=r"1 file of systems and downloads, 100 bytes .*: too many"):
        Bundle.open(bundle.path).verify()
    (bundle.path / ".gitattributes").unlink()
    (bundle.path / ".DS_Store").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="is a link"):
        Bundle.open(bundle.path)


def test_line_ends_that_git_changed(tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    with write_bundle(tmp_path / "b") as draft:
        fill(draft.folder, 1)
        (draft.folder / "README.md").write_bytes(b"# A\nmodel\n")
        (draft.folder / "unet" / "config.json").write_bytes(b'{\n"value": 1}\n')
        bundle = draft.finish(manifest)
    (bundle.path / "README.md").write_bytes(b"# A\r\nmodel\r\n")
    assert Bundle.open(bundle.path).verify() == ("README.md: its line ends were changed, and nothing else",)
    (bundle.path / "README.md").write_bytes(b"# B\r\nmodel\r\n")
    with pytest.raises(BundleError, match=r"README\.md has 12 bytes; it had 10\Z"):
        Bundle.open(bundle.path)
    (bundle.path / "README.md").write_bytes(b"# A\nmodel\n")
    (bundle.path / "unet" / "config.json").write_bytes(b'{\r\n"value": 1}\r\n')  # a program reads it: no excuse
    with pytest.raises(
        BundleError, match=r"its line ends were changed\. Check it out again with: git -c core.autocrlf"
    ):
        Bundle.open(bundle.path)


def test_a_bundle_that_was_cloned_without_its_large_files(bundle: Bundle) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9000\n"
    for name in ("unet/weights.safetensors", "diffship.json"):
        (bundle.path / name).write_text(pointer)
        with pytest.raises(BundleError, match=f"{name}.*it is a Git LFS pointer, which stands for 9000 bytes"):
            Bundle.open(bundle.path)


def _link(root: Path) -> None:
    (root / FILES[1]).unlink()
    (root / FILES[1]).symlink_to("/etc/hostname")


def _inner_link(root: Path) -> None:
    (root / FILES[1]).unlink()
    (root / FILES[1]).symlink_to("weights.safetensors")


def _folder_link(root: Path) -> None:
    shutil.move(root / "unet", root.parent / "elsewhere")
    (root / "unet").symlink_to(root.parent / "elsewhere")


def _hard_link(root: Path) -> None:
    os.link(root / FILES[1], root.parent / "outside")


def _loop(root: Path) -> None:
    (root / FILES[1]).unlink()
    (root / FILES[1]).symlink_to("config.json")


def _fifo(root: Path) -> None:
    (root / FILES[1]).unlink()
    os.mkfifo(root / FILES[1])


def _manifest_fifo(root: Path) -> None:
    (root / "diffship.json").unlink()
    os.mkfifo(root / "diffship.json")


def _manifest_link(root: Path) -> None:
    shutil.move(root / "diffship.json", root.parent / "real.json")
    (root / "diffship.json").symlink_to(root.parent / "real.json")


def _manifest_folder(root: Path) -> None:
    (root / "diffship.json").unlink()
    (root / "diffship.json").mkdir()


def _unlisted_fifo(root: Path) -> None:
    os.mkfifo(root / "pipe")


def _socket(root: Path) -> None:
    here = os.getcwd()
    os.chdir(root)
    try:
        socket.socket(socket.AF_UNIX).bind("s")
    finally:
        os.chdir(here)


def _device(root: Path) -> None:
    (root / FILES[1]).unlink()
    try:
        os.mknod(root / FILES[1], 0o20600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device node needs root")


SPECIALS = [
    _link,
    _inner_link,
    _folder_link,
    _hard_link,
    _loop,
    _fifo,
    _manifest_fifo,
    _manifest_link,
    _manifest_folder,
    _unlisted_fifo,
    _socket,
    _device,
]


@pytest.mark.parametrize("spoil", SPECIALS, ids=lambda spoil: spoil.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_anything_but_plain_files_is_refused_and_nothing_hangs(spoil: Callable[[Path], None], bundle: Bundle) -> None:
    spoil(bundle.path)
    begin = time.perf_counter()
    with pytest.raises(BundleError, match=r"is a link|is a hard link|is a pipe"):
        Bundle.open(bundle.path)
    assert time.perf_counter() - begin < 2


def test_hard_links_open_on_request(bundle: Bundle) -> None:
    _hard_link(bundle.path)
    Bundle.open(bundle.path, hard_links=True).verify()


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "code.py", "lib.so", "array.npy", "weights.bin"])
def test_no_pickle_and_no_code_enters_a_bundle(name: str, tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    with pytest.raises(BundleError, match=name), write_bundle(tmp_path / "b") as draft:
        fill(draft.folder)
        (draft.folder / "unet" / name).write_bytes(b"\x80\x04N.")
        draft.finish(manifest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", [_link, _folder_link, _hard_link, _fifo], ids=lambda spoil: spoil.__name__)
def test_no_link_enters_a_bundle(spoil: Callable[[Path], None], tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    with pytest.raises(BundleError), write_bundle(tmp_path / "b") as draft:
        fill(draft.folder)
        spoil(draft.folder)
        draft.finish(manifest)
    assert not (tmp_path / "b").exists()


def test_a_part_whose_file_is_missing_is_not_written(tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    lost = replace(manifest, parts=(replace(manifest.parts[0], files=("unet/lost.onnx",)),))
    with (
        pytest.raises(BundleError, match=r"unet/lost\.onnx, which is not listed"),
        write_bundle(tmp_path / "b") as draft,
    ):
        fill(draft.folder)
        draft.finish(lost)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_refused_and_untouched(bundle: Bundle, manifest: Manifest, fill: Fill) -> None:
    before = listing(bundle.path)
    with pytest.raises(ConfigError, match="exists already"), write_bundle(bundle.path):
        pass
    assert listing(bundle.path) == before


def test_overwrite_replaces_a_bundle(bundle: Bundle, manifest: Manifest, fill: Fill) -> None:
    with write_bundle(bundle.path, overwrite=True) as draft:
        fill(draft.folder, 2)
        draft.finish(manifest)
    assert Bundle.open(bundle.path).file("unet/config.json").read_text() == '{"value": 2}'
    assert [path.name for path in bundle.path.parent.iterdir()] == ["bundle"]


def test_overwrite_of_a_damaged_bundle(bundle: Bundle, manifest: Manifest, fill: Fill) -> None:
    bundle.file("unet/config.json").unlink()
    with write_bundle(bundle.path, overwrite=True) as draft:
        fill(draft.folder, 2)
        draft.finish(manifest)
    Bundle.open(bundle.path).verify()


@pytest.mark.parametrize(
    "change",
    [{"schema": 99}, {"family": {"name": "sd", "steps_default": 200}}, {"parts": [{"name": "unet", "files": []}]}],
)
def test_overwrite_of_a_bundle_that_no_longer_opens(
    change: dict[str, Any], bundle: Bundle, manifest: Manifest, fill: Fill
) -> None:
    path = bundle.path / "diffship.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)
    (bundle.path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"never replaced: .*does not list: 'notes.txt'"):
        require_place(bundle.path, overwrite=True)
    (bundle.path / "notes.txt").unlink()
    with write_bundle(bundle.path, overwrite=True) as draft:
        fill(draft.folder, 2)
        draft.finish(manifest)
    assert Bundle.open(bundle.path).file("unet/config.json").read_text() == '{"value": 2}'


def test_a_manifest_that_cannot_be_read_back_never_appears(tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    with pytest.raises(BundleError, match="history is 'none'; it must be a list"):
        with write_bundle(tmp_path / "place") as draft:
            fill(draft.folder, 1)
            draft.finish(replace(manifest, history="none"))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["notes", "extra", "file", "link", "foreign", "other"])
def test_overwrite_never_touches_anything_else(case: str, bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if case == "notes":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    elif case == "extra":
        shutil.copytree(bundle.path, place)
        (place / "notes.txt").write_text("mine")
    elif case == "file":
        place.write_text("mine")
    elif case == "link":
        place.symlink_to(bundle.path)
    else:
        place.mkdir()
        other = json.dumps({"schema": 1, "target": "onnx", "family": {}, "parts": [], "files": {"notes.txt": {}}})
        (place / "diffship.json").write_text("{}" if case == "foreign" else other)
        (place / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match="never replaced"), write_bundle(place, overwrite=True):
        pass
    assert listing(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    (tmp_path / "b").mkdir()
    with write_bundle(tmp_path / "b") as draft:
        fill(draft.folder)
        draft.finish(manifest)
    Bundle.open(tmp_path / "b").verify()


def test_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mkdir -p"), write_bundle(tmp_path / "a/b"):
        pass


def test_without_finish_or_with_an_error_nothing_appears(tmp_path: Path, fill: Fill) -> None:
    with write_bundle(tmp_path / "b") as draft:
        assert draft.folder.stat().st_mode & 0o777 == 0o700 and draft.folder.parent == tmp_path
        fill(draft.folder)
    with pytest.raises(KeyboardInterrupt), write_bundle(tmp_path / "b") as draft:
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_place(tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    with write_bundle(tmp_path / "b") as first, write_bundle(tmp_path / "b") as second:
        fill(first.folder, 1)
        fill(second.folder, 2)
        second.finish(manifest)
        with pytest.raises(ConfigError, match="exists already"):
            first.finish(manifest)
    assert Bundle.open(tmp_path / "b").file("unet/config.json").read_text() == '{"value": 2}'
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_paths_are_refused_before_any_open(bundle: Bundle) -> None:
    code = """
import json, sys
from pathlib import Path
from typing import Any
from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError
root = Path(sys.argv[1])
table = json.loads((root / "diffship.json").read_text())
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
record = {"size": 1, "sha256": "0" * 64}
for name in json.loads(sys.argv[2]):
    for place in ("files", "part", "golden"):
        spoilt = json.loads(json.dumps(table))
        if place == "files":
            spoilt["files"][name] = record
        elif place == "part":
            spoilt["parts"][0]["files"] = [name]
        else:
            spoilt["parts"][0]["golden"]["file"] = name
        (root / "diffship.json").write_text(json.dumps(spoilt))
        opened.clear()
        try:
            Bundle.open(root)
            print("OPENED", ascii(name))
        except BundleError as fault:
            if "path" not in str(fault) and "itself" not in str(fault):
                print("OTHER", ascii(name), fault)
        others = [path for path in opened if not isinstance(path, int) and str(path) != str(root / "diffship.json")]
        if others:
            print("TOUCHED", ascii(name), others)
print("done")
"""
    names = [
        "../x",
        "/etc/passwd",
        "C:\\x",
        "C:x",
        "a/../../x",
        "a\\b",
        "a\0b",
        "x" * 300,
        "\u2024\u2024/x",
        "\u2025/x",
        "a/./b",
        "a//b",
    ]
    names += ["a/", "", ".", "..", ".hidden", "x.", "x ", " x", "con", "NUL.txt", "com1", "Aux.json", "a\nb", "ünet/x"]
    names += [
        "unet\u2215x",
        "e\u0301",
        "a" * 129,
        "/".join("abcdefghi"),
        "diffship.json",
        "DIFFSHIP.JSON",
        "a:b",
        "a*",
        "-x",
    ]
    result = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path), json.dumps(names)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "done\n", result.stdout + result.stderr


@pytest.mark.parametrize("twin", ["UNET/config.json", "unet/Config.json"])
def test_names_that_collide_on_some_systems(twin: str, bundle: Bundle) -> None:
    path = bundle.path / "diffship.json"
    table = json.loads(path.read_text())
    table["files"][twin] = table["files"]["unet/config.json"]
    path.write_text(json.dumps(table))
    with pytest.raises(BundleError, match="one file on some systems"):
        Bundle.open(bundle.path)


def test_too_many_files(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_check, "LIMITS", replace(LIMITS, bundle_files=20))
    (bundle.path / "many").mkdir()
    for index in range(40):
        (bundle.path / f"many/{index}").touch()
    with pytest.raises(BundleError, match="more than 20 files"):
        Bundle.open(bundle.path)


def test_deep_folders(bundle: Bundle) -> None:
    deep = bundle.path.joinpath(*"abcdefghijkl")
    deep.mkdir(parents=True)
    (deep / "x").touch()
    with pytest.raises(BundleError, match="deeper than 8"):
        Bundle.open(bundle.path)


def test_part_keeps_what_it_was_given(bundle: Bundle, manifest: Manifest) -> None:
    part: Part = bundle.part("unet")
    assert part == manifest.parts[0]
    assert bundle.manifest.family == manifest.family


def test_equal_content_gives_equal_bytes(tmp_path: Path, manifest: Manifest, fill: Fill) -> None:
    for name in ("a", "b"):
        with write_bundle(tmp_path / name) as draft:
            fill(draft.folder, 3)
            write_safetensors(
                draft.folder / "z.safetensors", {"w": TensorMeta("bool", (1,))}, lambda _: np.ones(1, "?")
            )
            draft.finish(manifest)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_a_mount_point_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.raises(ConfigError, match="is a mount point"), write_bundle(tmp_path / "volume"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["volume"]


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, manifest: Manifest, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    old, new = tmp_path / ".b.partial-0123abcd", tmp_path / ".b.partial-4567abcd"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    with write_bundle(tmp_path / "b") as draft:
        fill(draft.folder)
        draft.finish(manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "b"], "a leftover is told by its age there"


@pytest.mark.parametrize("inside", [False, True])
def test_the_current_folder_is_refused(inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / ("below" if inside else ""))
    with pytest.raises(ConfigError, match="current folder"), write_bundle(tmp_path / "here"):
        pass


def test_long_names_that_begin_alike_do_not_share_leftovers(tmp_path: Path) -> None:
    ours, theirs = tmp_path / ("m" * 90 + "-fp16"), tmp_path / ("m" * 90 + "-fp32")
    aside = tmp_path / (partial_prefix(theirs).replace(".partial-", ".old-") + "deadbeef")
    aside.mkdir()
    (aside / "owner").write_text("theirs")
    assert remove_leftovers(ours) == [] and not ours.exists()
    assert remove_leftovers(theirs) == [aside] and (theirs / "owner").read_text() == "theirs"
    longest = tmp_path / ("m" * 255)
    with claim_folder(longest) as folder:
        assert folder.is_dir()


def test_another_writer_does_not_bring_back_what_is_moved_aside(
    bundle: Bundle, manifest: Manifest, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    replace_path, came = os.replace, []

    def between(source: Path, target: Path) -> None:
        replace_path(source, target)
        if ".old-" in str(target):  # the old bundle is aside, the new one not there yet
            came.extend(remove_leftovers(bundle.path))

    monkeypatch.setattr("diffship.core.bundle.exchange", lambda *_: False)
    monkeypatch.setattr("diffship.core.bundle.os.replace", between)
    with write_bundle(bundle.path, overwrite=True) as draft:
        fill(draft.folder, 2)
        draft.finish(manifest)
    assert came == []
    assert Bundle.open(bundle.path).file("unet/config.json").read_text() == '{"value": 2}'
    assert [path.name for path in bundle.path.parent.iterdir()] == ["bundle"]
