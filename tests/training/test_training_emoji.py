"""The emoji data set, its vocabulary and its captions."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffship.core.errors import ConfigError, SourceError
from diffship.sampling.tokenizer import END, START
from diffship.training import emoji, emoji_stages
from diffship.training import judge as judging
from diffship.training.commands import run, train_decoder
from diffship.training.diffusion import alphas_cumprod, caption_variants, loss_weight
from diffship.training.emoji import prepare
from diffship.training.options import TrainOptions
from diffship.training.paired import PairedPictures
from diffship.training.pictures import Pictures
from diffship.training.vae import augment, gradient_l1, multiscale_l1, psnr
from diffship.training.vocabulary import train_vocabulary

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def _entry(code: str, label: str, group: int, **more: object) -> dict[str, object]:
    return {"hexcode": code, "label": label, "group": group, "tags": ["tag"], **more}


def _archives(folder: Path) -> None:
    """Three archives in the layout of the npm packages: an apple, and a hand in five tones, twice."""
    hands = [
        _entry(
            code,
            name,
            1,
            skins=[_entry(f"{code}-{t}", f"{name}: tone {i + 1}", 1, tone=i + 1) for i, t in enumerate(TONES)],
        )
        for code, name in (("1F44B", "waving hand"), ("1F44D", "thumbs up"))
    ]
    data = [_entry("1F34E", "Red Apple", 4), _entry("2764-FE0F", "red heart", 0), *hands]
    codes = ["1f34e", "2764", *(f"{c}{t}" for c in ("1f44b", "1f44d") for t in ("", *(f"-{x.lower()}" for x in TONES)))]
    _tar(folder / "emojibase-data-1.tgz", {"package/en/data.json": json.dumps(data).encode()})
    _tar(folder / "lobehub-fluent-emoji-3d-1.tgz", {f"package/assets/{c}.webp": _picture("WEBP") for c in codes})
    _tar(folder / "emoji-datasource-google-1.tgz", {f"package/img/google/64/{c}.png": _picture("PNG") for c in codes})


def _picture(form: str) -> bytes:
    out = io.BytesIO()
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (16, 16, 48, 48))
    picture.save(out, form, lossless=True)
    return out.getvalue()


def _tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    _archives(folder)
    assert run("emoji-data", TrainOptions(data=folder, out=folder / "data")) == {"pictures": 28}
    return folder / "data"


def test_pictures_lie_on_white_and_captions_are_matched_without_variation_selectors(data: Path) -> None:
    pictures = Pictures.read(data, lambda r: r["style"] == "fluent")
    assert {r["text"] for r in pictures.records} >= {"red apple", "red heart", "waving hand: tone 3"}
    assert pictures.pixels.shape == (14, 128, 128, 3)
    assert tuple(pictures.pixels[0, 0, 0]) == (255, 255, 255)
    assert tuple(pictures.pixels[0, 64, 64]) == (255, 0, 0)
    assert pictures.take(torch.tensor([0]))[0, :, 64, 64].tolist() == [1.0, -1.0, -1.0]


def test_a_tenth_of_the_tone_combinations_is_held_out_in_every_style(data: Path) -> None:
    records = Pictures.records_of(data, lambda r: r["split"] == "held_out")
    assert len(records) == 2
    assert {r["style"] for r in records} == {"fluent", "google"}
    assert len({r["text"] for r in records}) == 1
    assert all(r["tone"] for r in records)


def test_the_judge_never_sees_held_out_pictures_nor_the_second_style_of_held_out_concepts(data: Path) -> None:
    records = Pictures.records_of(data, judging.sees)
    assert records
    assert all(r["split"] == "train" for r in records)
    assert not [r for r in records if r["style"] == "google" and judging.style_held_out(r["concept"])]
    assert 0.15 < sum(judging.style_held_out(str(i)) for i in range(2000)) / 2000 < 0.25


def test_the_second_style_is_a_folder_that_a_lora_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the domain, no held-out combination, and no concept whose second style the judge has not seen either."""
    for module in (judging, emoji):
        monkeypatch.setattr(module, "style_held_out", lambda concept: concept == "red heart")
    _archives(tmp_path)
    data = tmp_path / "data"
    run("emoji-data", TrainOptions(data=tmp_path, out=data))
    found = PairedPictures.open(data / "google", 128)
    wanted = {
        record["text"]: caption_variants(record["text"], record["tags"])
        for record in Pictures.read(data).records
        if record["style"] == "google" and record["domain"] and judging.sees(record)
    }
    assert {"red apple", "waving hand"} <= wanted.keys() and "red heart" not in wanted
    assert {found.captions(row)[0]: found.captions(row) for row in range(len(found))} == wanted
    assert 0 < len(wanted) < 14 and "not name" in found.told
    assert len(PairedPictures.open(data, 128)) == sum(
        record["style"] == "fluent" and record["split"] == "train" and record["domain"]
        for record in Pictures.read(data).records
    )


def test_a_missing_archive_names_the_command_that_gets_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="npm pack @lobehub/fluent-emoji-3d"):
        run("emoji-data", TrainOptions(data=tmp_path, out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="first: diffship train emoji-vae"):
        train_decoder(TrainOptions(data=tmp_path, out=tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'emoji-unet'"):
        run("emoji-nothing", TrainOptions(data=tmp_path, out=tmp_path))


def test_the_vocabulary_is_one_that_clips_tokenizer_reads(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    words = ["red apple", "green apple", "a red apple, fruit", "grinning face"] * 3
    size = train_vocabulary(words, 600, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(size))
    assert (vocabulary[START], vocabulary[END]) == (size - 2, size - 1)
    tokenizer = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.convert_ids_to_tokens(tokenizer("Red  APPLE!").input_ids) == [
        START,
        "red</w>",
        "apple</w>",
        "!</w>",
        END,
    ]
    for text in ("naïve ☕ 12", "日本", "it's"):
        assert END not in tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:-1]


def test_captions_begin_with_the_plain_one() -> None:
    assert caption_variants("octopus", []) == ["octopus", "an octopus"]
    assert caption_variants("red apple", ["fruit", "red", "food", "x"])[2] == "red apple, fruit, red, food"


def test_the_noise_schedule_is_that_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    from diffship.training.preview import SCHEDULER

    assert torch.allclose(alphas_cumprod(), DDIMScheduler(**SCHEDULER).alphas_cumprod, rtol=1e-5)


def test_loss_weights_are_min_snr_five_plus_a_capped_share_for_noisy_steps() -> None:
    snr = torch.tensor([50.0, 5.0, 1.0, 0.001])
    assert torch.allclose(loss_weight(snr), torch.tensor([0.12, 1.2, 2.0, 11.0]))


def test_picture_losses_have_their_closed_forms() -> None:
    a, b = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)
    assert multiscale_l1(a, b).item() == pytest.approx(1.5)
    assert gradient_l1(a, b).item() == 0
    assert psnr(a, b) == pytest.approx(10 * torch.log10(torch.tensor(16.0)).item())


def test_augmentation_keeps_the_ground_white_and_is_repeatable() -> None:
    pixels = torch.ones(4, 3, 32, 32)
    pixels[:, :, 12:20, 12:20] = -1
    one, two = (augment(pixels.clone(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert (one == -1).sum() == (pixels == -1).sum()


def test_prepare_counts_pictures_without_a_second_style(tmp_path: Path) -> None:
    _archives(tmp_path)
    files = [tmp_path / f"{stem}-1.tgz" for stem in ("lobehub-fluent-emoji-3d", "emojibase-data")]
    assert prepare(files[0], files[1], tmp_path / "out", size=32) == 14


def test_a_stage_keeps_every_setting_that_the_user_does_not_name() -> None:
    given = TrainOptions(data=Path(), out=Path(), steps=7, seed=3)
    for stage, base in emoji_stages.DEFAULTS.items():
        assert emoji_stages.schedule(stage, given) == replace(base, steps=7, seed=3)
    assert emoji_stages.schedule("emoji-unet", given).validate_every == 4


def test_damaged_latents_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "latents.safetensors"
    cache.write_bytes(b"\x10" + bytes(7) + b'{"mean"')
    monkeypatch.setattr(emoji_stages, "_digest", lambda vae, pictures: "same")
    with pytest.raises(SourceError, match=r"latents\.safetensors: not a valid .*encodes the pictures anew"):
        emoji_stages.encode(None, None, tmp_path)  # type: ignore[arg-type]
