"""Captioned pictures from folders and shards: the right pixels, the right captions, clear refusals."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffship.core.errors import SourceError
from diffship.core.limits import LIMITS
from diffship.training import paired
from diffship.training.paired import PairedPictures


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def plain(colour: tuple[int, ...], width: int = 8, height: int = 8) -> np.ndarray:
    return np.full((height, width, len(colour)), colour, np.uint8)


RED, GREEN = encoded(plain((255, 0, 0))), encoded(plain((0, 255, 0)))


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def shard(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.parent


def lines(*records: Mapping[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def beside(folder: Path) -> Path:
    return write(folder, {"a.png": RED, "a.txt": "red  square\n", "sub/b.png": GREEN, "sub/b.txt": "green square"})


def listed(folder: Path) -> Path:
    records = ({"file_name": "a.png", "text": "red square"}, {"file_name": "sub/b.png", "text": "green square"})
    return write(folder, {"a.png": RED, "sub/b.png": GREEN, "metadata.jsonl": lines(*records)})


def tabled(folder: Path) -> Path:
    table = "file_name,text\na.png,red square\nsub/b.png,green square\n"
    return write(folder, {"a.png": RED, "sub/b.png": GREEN, "metadata.csv": table})


def sharded(folder: Path) -> Path:
    first = {"x/a.png": RED, "x/a.json": json.dumps({"caption": "red square"}).encode()}
    shard(folder / "00000.tar", first)
    return shard(folder / "00001.tar", {"b.png": GREEN, "b.txt": b"green square", "b.cls": b"7"})


@pytest.mark.parametrize("make", [beside, listed, tabled, sharded])
def test_every_form_gives_the_same_pictures(make: Callable[[Path], Path], tmp_path: Path) -> None:
    pictures = PairedPictures.open(make(tmp_path), 4)
    assert [pictures.captions(row) for row in range(len(pictures))] == [["red square"], ["green square"]]
    pixels = pictures.pixels([1, 0, 1])
    assert pixels.shape == (3, 4, 4, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0].tolist() == [[0, 255, 0], [255, 0, 0], [0, 255, 0]]
    assert pictures.digest == PairedPictures.open(listed(tmp_path / "other"), 4).digest


def test_the_middle_is_cut_out_and_mirrored_where_asked(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:12], wide[:, 12:16] = (200, 0, 0), (0, 0, 200)  # the middle third, red beside blue
    write(tmp_path, {"wide.png": encoded(wide), "wide.txt": "two colours"})
    plain_one, mirrored = PairedPictures.open(tmp_path, 8).pixels([0, 0], [False, True])
    np.testing.assert_array_equal(plain_one, wide[:, 8:16])
    np.testing.assert_array_equal(mirrored, wide[:, 8:16][:, ::-1])


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": encoded(plain((9, 9, 9, 0))), "a.txt": "nothing"})
    assert PairedPictures.open(tmp_path, 8).pixels([0]).min() == 255


def test_the_digest_hangs_on_pictures_and_captions(tmp_path: Path) -> None:
    def digest(name: str, **changes: bytes | str) -> str:
        files = {"a.png": RED, "a.txt": "red"} | {key.replace("_", "."): value for key, value in changes.items()}
        return PairedPictures.open(write(tmp_path / name, files), 8).digest

    assert digest("one") == digest("two")
    assert len({digest("one"), digest("three", a_png=GREEN), digest("four", a_txt="rot")}) == 3


def test_of_emojis_own_data_the_training_pictures_of_the_domain_are_taken(tmp_path: Path) -> None:
    def record(name: str, **changes: object) -> dict[str, object]:
        facts = {"file_name": name, "text": "apple", "tags": ["fruit", "red"], "concept": "apple", "group": "food"}
        return {**facts, "tone": 0, "domain": True, "split": "train", "style": "fluent", **changes}

    records = (record("a.png"), record("b.png", style="google"), record("c.png", split="held_out"))
    files = {"a.png": RED, "b.png": GREEN, "c.png": GREEN, "d.png": GREEN}
    write(tmp_path, {**files, "metadata.jsonl": lines(*records, record("d.png", domain=False))})
    pictures = PairedPictures.open(tmp_path, 8)
    assert len(pictures) == 1
    assert pictures.captions(0) == ["apple", "an apple", "apple, fruit, red", "apple, red"]
    assert pictures.pixels([0])[0, 0, 0].tolist() == [255, 0, 0]


def test_captions_are_cut_at_the_limit_of_prompts(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": RED, "a.txt": "word " * 1000})
    (caption,) = PairedPictures.open(tmp_path, 8).captions(0)
    assert len(caption) == LIMITS.prompt_chars


HUGE = encoded(np.zeros((4100, 4100, 1), np.uint8)[..., 0])

REFUSED: dict[str, tuple[Mapping[str, bytes | str], str]] = {
    "empty folder": ({"readme.md": "hi"}, "has no pictures with captions; legal: pictures with metadata.jsonl"),
    "no captions": ({"a.png": RED, "b.png": RED}, "2 of 2 pictures have no caption, first .*a.png; legal: "),
    "one without": ({"a.png": RED, "a.txt": "red", "b.png": RED}, "1 of 2 pictures have no caption, first .*b.png"),
    "blank caption": ({"a.png": RED, "a.txt": " \n"}, "1 of 1 pictures have no caption"),
    "no picture": (
        {"a.png": "hello", "a.txt": "x"},
        "a.png: is no PNG, JPEG or WebP picture: cannot [a-z ]*; it is text \\('hello'\\)",
    ),
    "gif": ({"a.png": encoded(plain((1,))[..., 0], "GIF"), "a.txt": "x"}, "a.png: is no PNG, JPEG or WebP"),
    "too many pixels": ({"a.png": HUGE, "a.txt": "x"}, "a.png: is 4100x4100; at most 16800000 pixels are decoded"),
    "missing file": ({"metadata.jsonl": lines({"file_name": "a.png", "text": "x"})}, "a.png: there is no such picture"),
    "outside": ({"metadata.jsonl": lines({"file_name": "../a.png", "text": "x"})}, "line 1: file_name is '../a.png'"),
    "absolute": ({"metadata.jsonl": lines({"file_name": "/etc/passwd", "text": "x"})}, "file_name is '/etc/passwd'"),
    "drive": ({"metadata.jsonl": lines({"file_name": "C:\\a.png", "text": "x"})}, "file_name is 'C:"),
    "no name": ({"metadata.jsonl": lines({"text": "x"})}, "file_name is 'None'"),
    "not JSON": ({"metadata.jsonl": "{"}, "line 1 is not JSON"),
    "not a table": ({"metadata.jsonl": "[1]"}, "line 1 is not JSON: it is no table"),
    "not UTF-8": ({"metadata.jsonl": b'{"file_name": "\xff"}'}, "metadata.jsonl: cannot be read"),
    "no text": ({"a.png": RED, "metadata.jsonl": lines({"file_name": "a.png", "text": 5})}, "have no caption"),
    "long caption file": ({"a.png": RED, "a.txt": "x" * 70_000}, "a.txt: has 70000 bytes; a caption has at most"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_folders_are_refused(case: str, tmp_path: Path) -> None:
    files, message = REFUSED[case]
    with pytest.raises(SourceError, match=message):
        PairedPictures.open(write(tmp_path, files), 8)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder of pictures"):
        PairedPictures.open(tmp_path / "nowhere", 8)


def test_a_damaged_picture_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write(tmp_path, {"a.png": RED, "a.txt": "x", "b.png": encoded(noise)[:-4000], "b.txt": "y"})
    pictures = PairedPictures.open(tmp_path, 8)
    with pytest.raises(SourceError, match=r"b\.png: is damaged"):
        pictures.pixels([0, 1])


def test_a_picture_of_too_many_bytes_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "_PICTURE_BYTES", 10)
    with pytest.raises(SourceError, match=r"a\.png: has \d+ bytes; at most 10 are read"):
        PairedPictures.open(write(tmp_path, {"a.png": RED, "a.txt": "x"}), 8)


def test_names_in_a_shard_are_no_paths(tmp_path: Path) -> None:
    shard(
        tmp_path / "data" / "0.tar",
        {"../../evil.png": RED, "../../evil.txt": b"red", "/abs.png": RED, "/abs.txt": b"x"},
    )
    before = sorted(tmp_path.rglob("*"))
    pictures = PairedPictures.open(tmp_path / "data", 8)
    assert pictures.pixels([0, 1]).shape == (2, 8, 8, 3)
    assert [pictures.captions(row) for row in (0, 1)] == [["red"], ["x"]]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_a_shard_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(SourceError, match=r"'a\.png' is a link or a sparse file"):
        PairedPictures.open(tmp_path, 8)


def test_a_compressed_or_broken_shard_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "zipped" / "0.tar", {"a.png": RED, "a.txt": b"x"}, "w:gz")
    write(tmp_path / "broken", {"0.tar": b"not a tar"})
    for name in ("zipped", "broken"):
        with pytest.raises(SourceError, match=r"0\.tar: is no uncompressed tar archive"):
            PairedPictures.open(tmp_path / name, 8)


def test_a_shard_with_the_same_picture_twice_or_a_long_caption_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "twice" / "0.tar", {"a.png": RED, "a.jpg": RED, "a.txt": b"x"})
    shard(tmp_path / "long" / "0.tar", {"a.png": RED, "a.json": b" " * 70_000})
    with pytest.raises(SourceError, match="has two pictures called 'a'"):
        PairedPictures.open(tmp_path / "twice", 8)
    with pytest.raises(SourceError, match="its caption has 70000 bytes"):
        PairedPictures.open(tmp_path / "long", 8)


def test_a_cut_shard_names_the_picture(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shard(tmp_path / "0.tar", {"a.txt": b"x", "a.png": encoded(noise)})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:6000])
    with pytest.raises(SourceError, match=r"0\.tar"):
        PairedPictures.open(tmp_path, 8).pixels([0])


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    for name, pixels in (("eight", grey), ("sixteen", grey.astype(np.uint16) * 257)):
        write(tmp_path / name, {"a.png": encoded(pixels), "a.txt": "grey"})
    eight, sixteen = (PairedPictures.open(tmp_path / name, 8).pixels([0]) for name in ("eight", "sixteen"))
    assert np.array_equal(eight, sixteen) and eight.std() > 50


def test_a_caption_ends_where_its_line_does(tmp_path: Path) -> None:
    """As Python's own files have lines; U+2028 and the like come with text from web pages."""
    text = "a red\u2028apple\x0con a table\x85here\r\nan apple\rfruit\n"
    write(tmp_path, {"a.png": RED, "a.txt": text})
    with open(tmp_path / "a.txt", encoding="utf-8") as file:
        theirs = [" ".join(line.split()) for line in file]
    assert PairedPictures.open(tmp_path, 8).captions(0) == theirs
    assert len(theirs) == 3


def test_marks_before_captions_are_no_part_of_them(tmp_path: Path) -> None:
    write(tmp_path / "folder", {"a.png": RED, "a.txt": b"\xef\xbb\xbfred square"})
    assert PairedPictures.open(tmp_path / "folder", 8).captions(0) == ["red square"]
    shard(tmp_path / "shards" / "0.tar", {"a.png": RED, "a.txt": b"\xef\xbb\xbfred square"})
    assert PairedPictures.open(tmp_path / "shards", 8).captions(0) == ["red square"]
    write(tmp_path / "bad", {"a.png": RED, "a.txt": "red".encode("utf-16")})
    with pytest.raises(SourceError, match=r"a\.txt: its caption is not UTF-8"):
        PairedPictures.open(tmp_path / "bad", 8)


@pytest.mark.parametrize("order", [("a.json", "a.txt"), ("a.txt", "a.json")])
def test_an_empty_text_leaves_the_caption_of_the_json(order: tuple[str, ...], tmp_path: Path) -> None:
    said = {"a.json": b'{"caption": "red square"}', "a.txt": b""}
    shard(tmp_path / "0.tar", {"a.png": RED, **{name: said[name] for name in order}})
    assert PairedPictures.open(tmp_path, 8).captions(0) == ["red square"]


def test_tables_as_spreadsheets_write_them_are_read(tmp_path: Path) -> None:
    mark, pictures = "\N{ZERO WIDTH NO-BREAK SPACE}", {"a.png": RED, "b.png": GREEN}
    table = f'{mark}file_name,text\r\na.png,"red\r\nsquare"\r\n\r\nb.png,green square\r\n'
    found = PairedPictures.open(write(tmp_path / "csv", {**pictures, "metadata.csv": table}), 8)
    records = [{"file_name": "a.png", "text": "red square"}, {"file_name": "b.png", "text": "green square"}]
    table = f"{mark}{lines(records[0])}\n  \n{lines(records[1])}\n"
    listed = PairedPictures.open(write(tmp_path / "jsonl", {**pictures, "metadata.jsonl": table}), 8)
    assert [found.captions(row) for row in range(2)] == [["red square"], ["green square"]]
    assert found.digest == listed.digest


def test_a_line_is_called_by_its_number_in_the_file(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "csv", {"a.png": RED, "metadata.csv": 'file_name,text\na.png,"red\nsquare"\n/b.png,green\n'}
    )
    with pytest.raises(SourceError, match=r"metadata\.csv: line 4: file_name is '/b\.png'"):
        PairedPictures.open(folder, 8)
    folder = write(tmp_path / "jsonl", {"metadata.jsonl": "\n\n[]\n"})
    with pytest.raises(SourceError, match="line 3 is not JSON: it is no table"):
        PairedPictures.open(folder, 8)


def test_a_name_that_is_too_long_for_the_file_system_is_refused_as_such(tmp_path: Path) -> None:
    record = {"file_name": "a" * 300 + ".png", "text": "red"}
    with pytest.raises(SourceError, match="too long"):
        PairedPictures.open(write(tmp_path, {"metadata.jsonl": lines(record)}), 8)


def test_a_folder_called_like_a_shard_is_a_folder_of_pictures(tmp_path: Path) -> None:
    found = PairedPictures.open(write(tmp_path, {"x.tar/a.png": RED, "x.tar/a.txt": "red"}), 8)
    assert found.captions(0) == ["red"]


def jpeg() -> bytes:
    return encoded(plain((255, 0, 0)), "JPEG")


def captioned(files: Mapping[str, bytes]) -> dict[str, bytes | str]:
    """`files`, and a caption beside each."""
    return {**files, **{f"{Path(name).with_suffix('')}.txt": f"picture {name}" for name in files}}


def test_every_suffix_of_a_jpeg_is_read(tmp_path: Path) -> None:
    found = PairedPictures.open(
        write(tmp_path, captioned({f"{s}.{s}": jpeg() for s in ("jpg", "jfif", "jpe", "JPEG")})), 8
    )
    assert len(found) == 4 and found.told.endswith("4 pictures are used")


def test_one_picture_that_is_not_read_is_told_and_more_than_a_tenth_refused(tmp_path: Path) -> None:
    few = {f"{number}.png": RED for number in range(3)}
    one = PairedPictures.open(write(tmp_path / "one", captioned({**few, "x.bmp": b"BM"})), 8)
    assert len(one) == 3 and "3 pictures are used; left: 1 .bmp files, which are not read" in one.told
    with pytest.raises(
        SourceError, match=r"3 pictures are used; left: 1 \.bmp files.*1 \.gif files.*a tenth may be left"
    ):
        PairedPictures.open(write(tmp_path / "two", captioned({**few, "x.bmp": b"BM", "y.gif": b"GIF"})), 8)
    many = {f"{number}.png": RED for number in range(30)}
    some = PairedPictures.open(write(tmp_path / "many", captioned({**many, "x.bmp": b"BM", "y.gif": b"GIF"})), 8)
    assert len(some) == 30 and "1 .gif files" in some.told


def test_captions_without_a_picture_are_counted_and_notices_are_none(tmp_path: Path) -> None:
    files = captioned({f"{number}.png": RED for number in range(3)})
    found = PairedPictures.open(write(tmp_path / "one", {**files, "README.txt": "of this folder", "lost.txt": "x"}), 8)
    assert found.told.endswith("3 pictures are used; left: 1 captions without a picture")
    with pytest.raises(SourceError, match="left: 2 captions without a picture"):
        PairedPictures.open(write(tmp_path / "two", {**files, "lost.txt": "x", "gone.txt": "x"}), 8)


def test_what_systems_and_editors_leave_is_passed_over_and_counted(tmp_path: Path) -> None:
    junk = {
        "._a.png": b"\0\5\x16\7",
        "__MACOSX/._a.png": b"\0",
        ".ipynb_checkpoints/a-checkpoint.png": RED,
        "Thumbs.db": b"",
    }
    found = PairedPictures.open(write(tmp_path / "folder", {**captioned({"a.png": RED}), **junk}), 8)
    assert len(found) == 1 and found.told.endswith("left: 4 hidden or system files")
    members = {"a.png": RED, "a.txt": b"red", "__MACOSX/._a.png": b"\0", "._a.txt": b"\0\xff"}
    packed = PairedPictures.open(shard(tmp_path / "shards" / "0.tar", members), 8)
    assert len(packed) == 1 and packed.told.endswith("left: 2 hidden or system files")


def test_linked_folders_are_read_and_links_to_nothing_counted(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", captioned({"b.png": GREEN}))
    folder = write(tmp_path / "data", captioned({"a.png": RED}))
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "more" / "round").symlink_to(folder)
    (folder / "c.png").symlink_to("nowhere")
    found = PairedPictures.open(folder, 8)
    assert [found.captions(row) for row in range(len(found))] == [["picture a.png"], ["picture b.png"]]
    assert "1 links that lead nowhere" in found.told and "1 folders that are read under another name" in found.told
    os.mkfifo(folder / "d.png")
    with pytest.raises(SourceError, match="left: 2 links that lead nowhere, or no plain files"):
        PairedPictures.open(folder, 8)


def test_shards_and_what_lies_beside_them_are_counted_wherever_they_lie(tmp_path: Path) -> None:
    one, two = {"a.png": RED, "a.txt": b"red"}, {"b.png": GREEN, "b.txt": b"green"}
    shard(tmp_path / "deep" / "0.tar", one)
    shard(tmp_path / "deep" / "sub" / "1.TAR", two)
    assert len(PairedPictures.open(tmp_path / "deep", 8)) == 2
    write(tmp_path / "deep" / "sub", captioned({"x.png": RED, "y.png": RED}))
    with pytest.raises(SourceError, match="2 pictures are used; left: 2 pictures beside shards"):
        PairedPictures.open(tmp_path / "deep", 8)
    for name in ("1.tar.gz", "1.TGZ"):
        shard(tmp_path / name / "0.tar", one)
        shard(tmp_path / name / name, two, "w:gz")
        with pytest.raises(SourceError, match=rf"{name}: is packed; shards are read where they lie"):
            PairedPictures.open(tmp_path / name, 8)
    found = PairedPictures.open(write(tmp_path / "plain", {**captioned({"a.png": RED}), "all.zip": b"PK"}), 8)
    assert found.told.endswith("1 pictures are used; left: 1 archives, which are not read")


def test_a_shard_that_is_damaged_cut_or_joined_is_refused(tmp_path: Path) -> None:
    """What tarfile itself passes over: each of these had the pictures before the fault, and not a word."""
    shard(tmp_path / "whole", {f"{n}.{end}": data for n in range(3) for end, data in (("png", RED), ("txt", b"red"))})
    whole = (tmp_path / "whole").read_bytes()
    third = 4 * 512  # header and body of the first picture and of its caption
    assert whole[third : third + 6] == b"1.png\0"
    for name, data, told in (
        ("header", whole[:third] + b"\1" * 512 + whole[third + 512 :], f"is damaged or cut short at byte {third}"),
        ("member", whole[:third], f"is damaged or cut short at byte {third}"),
        ("middle", whole[: third + 100], f"is damaged or cut short at byte {third}"),
        ("joined", whole * 2, "something follows its end at byte 6144"),
    ):
        with pytest.raises(SourceError, match=told):
            PairedPictures.open(write(tmp_path / name, {"0.tar": data}), 8)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("file_name;text", "its columns are 'file_name;text'; legal are file_name and text, with commas"),
        ("file_name, text", "its columns are 'file_name', ' text'"),
        ("File_Name,Text", "its columns are 'File_Name', 'Text'"),
        ("file_name,text,text", "two of its columns have one name"),
    ],
)
def test_columns_that_are_not_read_are_named(head: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        PairedPictures.open(write(tmp_path, {"a.png": RED, "metadata.csv": f"{head}\na.png,red\n"}), 8)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "a.png,a red apple, on a table, lit\nb.png,a cup\n",
            "line 2: has 4 fields for the 2 columns file_name, text",
        ),
        ('a.png,"a sign that says \\"open, come in\\" in red"\nb.png,a cup\n', "line 2: .*expected after"),
        ('a.png,"a plate of 6 inches\nb.png,a cup\n', "line 3: unexpected end of data"),
        ("a.png\nb.png,a cup\n", "line 2: has 1 fields"),
    ],
)
def test_a_row_that_is_no_csv_is_refused_by_its_line(rows: str, message: str, tmp_path: Path) -> None:
    table = {"a.png": RED, "b.png": GREEN, "metadata.csv": f"file_name,text\n{rows}"}
    with pytest.raises(SourceError, match=message + r".*are doubled"):
        PairedPictures.open(write(tmp_path, table), 8)


def test_pictures_that_a_table_does_not_name_are_counted(tmp_path: Path) -> None:
    table = {"a.png": RED, "b.png": GREEN, "metadata.jsonl": lines({"file_name": "a.png", "text": "red"})}
    found = PairedPictures.open(write(tmp_path, table), 8)
    assert found.told.endswith("1 pictures are used; left: 1 that metadata.jsonl does not name")


def test_names_with_dots_in_a_shard_are_whole(tmp_path: Path) -> None:
    members = {f"img.{number}.{end}": data for number in range(3) for end, data in (("png", RED), ("txt", b"red"))}
    found = PairedPictures.open(shard(tmp_path / "0.tar", members), 8)
    assert len(found) == 3 and found.told.endswith("3 pictures are used")
    shard(tmp_path / "lost" / "0.tar", {"a.png": RED, "a.txt": b"red", "b.txt": b"x", "c.json": b"{}"})
    with pytest.raises(SourceError, match="left: 2 captions without a picture"):
        PairedPictures.open(tmp_path / "lost", 8)


def test_a_picture_has_as_many_captions_as_are_given(tmp_path: Path) -> None:
    said = ["a red apple", "an  apple"]
    records = ({"file_name": "a.png", "text": said}, {"file_name": "b.png", "text": "", "caption": "green"})
    table = write(tmp_path / "list", {"a.png": RED, "b.png": GREEN, "metadata.jsonl": lines(*records)})
    beside = write(tmp_path / "lines", {"a.png": RED, "a.txt": "a red apple\n\n an apple \n"})
    packed = shard(tmp_path / "shard" / "0.tar", {"a.png": RED, "a.json": json.dumps({"text": said}).encode()})
    for folder in (table, beside, packed):
        assert PairedPictures.open(folder, 8).captions(0) == ["a red apple", "an apple"]
    assert PairedPictures.open(table, 8).captions(1) == ["green"]
    record = {"file_name": "a.png", "text": ["a", 5]}
    with pytest.raises(SourceError, match=r"line 1: text is a list of .*; legal is text, or a list of texts"):
        PairedPictures.open(write(tmp_path / "odd", {"a.png": RED, "metadata.jsonl": lines(record)}), 8)
