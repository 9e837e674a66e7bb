"""How prompts are read: A1111's published parser cases, states against a second implementation and against compel's own
figures, clip-skip against diffusers' pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_pipelines import PipelineModel, make_pipe, tokenizer_folder
from transformers import CLIPTokenizer

from diffship.core.errors import ConfigError, DiffshipError, HandoffError, UnsupportedError
from diffship.core.reading import PLAIN, Reading
from diffship.models.sources.tokenizer_files import clip_files
from diffship.sampling.encode import encode
from diffship.sampling.generate import Request, generate, generate_many, settings, start
from diffship.sampling.text import a1111, compel
from diffship.sampling.text.chunks import a1111_chunks, compel_chunks
from diffship.sampling.tokenizer import ClipTokenizer
from diffship.sampling.wire import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"steps": 2, "size": (64, 64), "seed": 3}

# The doctest of `parse_prompt_attention` in modules/prompt_parser.py of AUTOMATIC1111/stable-diffusion-webui.
PUBLISHED: list[tuple[str, list[tuple[str, float]]]] = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.5730000000000004),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641000000000006),
            (".", 1.1),
        ],
    ),
]


@pytest.mark.parametrize(("text", "wanted"), PUBLISHED, ids=[text for text, _ in PUBLISHED])
def test_a1111s_published_parser_cases(text: str, wanted: list[tuple[str, float]]) -> None:
    assert [(piece.text, piece.weight) for piece in a1111.parse(text)] == wanted


def test_breaks_and_what_stands_for_itself() -> None:
    assert [piece.ends for piece in a1111.parse("a BREAK b BREAKFAST")] == [False, True, False]
    assert [piece.text for piece in a1111.parse("(a BREAK b:1.2)")] == ["a", "", "b"]  # a word there, a break here
    assert [(piece.text, piece.weight) for piece in a1111.parse("a:1.3) ] b: \\x")] == [("a:1.3) ] b: x", 1.0)]
    assert a1111.parse("") == compel.parse("") == compel.parse("  ")


# What compel 2.5.1 makes of these: `PromptParser().parse_conjunction(text).prompts[0].children`.
COMPEL: list[tuple[str, list[tuple[str, float]]]] = [
    ("a cat++ dog", [("a", 1.0), ("cat", 1.1**2), ("dog", 1.0)]),
    ("a (red (big)+ cat)- dog", [("a", 1.0), ("red", 0.9), ("big", 0.9 * 1.1), ("cat", 0.9), ("dog", 1.0)]),
    ("un(bal cat", [("un(bal cat", 1.0)]),
    ('(cat, dog.)0.5,"red one"+', [("cat , dog .", 0.5), (",", 1.0), ("red one", 1.1)]),
    ("cat-dog cat- -cat", [("cat-dog", 1.0), ("cat", 0.9), ("-cat", 1.0)]),
    (r"(a\)b)+ \(x\)", [("a)b", 1.1), ("(x)", 1.0)]),
    ("(x)-1.5", [("x", 0.9), ("1.5", 1.0)]),
    ("(cat) dog", [("cat dog", 1.0)]),
]


@pytest.mark.parametrize(("text", "wanted"), COMPEL, ids=[text for text, _ in COMPEL])
def test_compels_reading(text: str, wanted: list[tuple[str, float]]) -> None:
    assert [(piece.text, pytest.approx(piece.weight)) for piece in compel.parse(text)] == wanted


REFUSED = {
    "prompt editing": ("a1111", "a [cat:dog:0.5]", "change between steps"),
    "alternation": ("a1111", "a [cat (red)|dog]", "change between steps"),
    "two prompts": ("a1111", "a cat AND a dog", "AND"),
    "LoRA in the text": ("a1111", "a cat <lora:moss:0.8>", "--lora FILE"),
    "no number": ("a1111", "(cat:1.2.3)", "'1.2.3'"),
    "too heavy": ("a1111", "(" * 60 + "cat", "from -100 to 100"),
    "too many chunks": ("a1111", "BREAK " * 40, "at most 32"),
    "two prompts of compel": ("compel", '("a cat", "a dog").and()', ".and("),
    "blends": ("compel", '("a cat", "a dog").blend(1, 1)', ".blend("),
    "deep brackets": ("compel", "(" * 500 + "cat", "more than 40 deep"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return make_pipe("sd", folder)


@pytest.fixture(scope="module")
def xl_pipe(folder: Path) -> Any:
    return make_pipe("sdxl", folder)


@pytest.fixture(scope="module")
def model(pipe: Any, folder: Path) -> PipelineModel:
    return PipelineModel(pipe, folder)


@pytest.fixture(scope="module")
def xl(xl_pipe: Any, folder: Path) -> PipelineModel:
    return PipelineModel(xl_pipe, folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(model: PipelineModel, name: str) -> None:
    syntax, prompt, said = REFUSED[name]
    with pytest.raises(ConfigError) as fault:
        encode(model, prompt, None, (64, 64), 1.0, Reading(syntax))
    assert said in str(fault.value)
    encode(model, prompt, None, (64, 64), 1.0)  # in plain syntax it is text


@pytest.fixture(scope="module", autouse=True)
def with_means(pipe: Any, xl_pipe: Any) -> None:
    """Trained encoders shift their states. Fresh ones do not, and the ratio of two means of zero is noise."""
    for encoder in (pipe.text_encoder, xl_pipe.text_encoder, xl_pipe.text_encoder_2):
        for name, parameter in encoder.named_parameters():
            if "norm" in name and name.endswith("bias"):
                torch.nn.init.constant_(parameter, 0.1)


def second_opinion(tokenizer: CLIPTokenizer, encoder: Any, parsed: list[tuple[str, float]], layer: int | None) -> Any:
    """A1111's chunks and emphasis, token by token, in torch: cut at 75 (no comma near), the mean of a chunk kept."""
    chunks: list[list[tuple[int, float]]] = [[]]
    for text, weight in parsed:
        if text == "BREAK":
            chunks.append([])
            continue
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            if len(chunks[-1]) == 75:
                chunks.append([])
            chunks[-1].append((token, weight))
    made = []
    for chunk in chunks:
        ids = [tokenizer.bos_token_id, *(token for token, _ in chunk)]
        ids += [tokenizer.eos_token_id] * (77 - len(ids))
        weights = torch.tensor([1.0, *(weight for _, weight in chunk), *[1.0] * (76 - len(chunk))])
        out = encoder(torch.tensor([ids]), output_hidden_states=True)
        states = out.last_hidden_state[0] if layer is None else out.hidden_states[layer][0]
        mean = states.mean()
        states = states * weights[:, None]
        made.append(states * (mean / states.mean()))
    return torch.cat(made).detach().numpy()


WORDS = "word red cat apple tree big " * 16  # 96 words
WEIGHTED: dict[str, tuple[str, list[tuple[str, float]]]] = {
    "weights": (
        "a (red:1.3) apple, [big] tree",
        [("a ", 1.0), ("red", 1.3), (" apple, ", 1.0), ("big", 1 / 1.1), (" tree", 1.0)],
    ),
    "a break": ("red BREAK (apple)", [("red", 1.0), ("BREAK", -1.0), ("apple", 1.1)]),
    "a break in front": ("BREAK red", [("", 1.0), ("BREAK", -1.0), ("red", 1.0)]),
    "a long one": (f"({WORDS}:0.7)", [(WORDS, 0.7)]),
    "nothing": ("", [("", 1.0)]),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_a1111s_states_equal_a_second_implementation(
    pipe: Any, xl_pipe: Any, model: PipelineModel, xl: PipelineModel, name: str
) -> None:
    text, parsed = WEIGHTED[name]
    ours = encode(model, text, None, (64, 64), 1.0, Reading("a1111")).positive["encoder_hidden_states"]
    wanted = second_opinion(pipe.tokenizer, pipe.text_encoder, parsed, None)
    np.testing.assert_allclose(ours, wanted, atol=2e-5)

    made = encode(xl, text, None, (64, 64), 1.0, Reading("a1111")).positive
    encoders = (xl_pipe.text_encoder, xl_pipe.text_encoder_2)
    sides = [second_opinion(xl_pipe.tokenizer, encoder, parsed, -2) for encoder in encoders]
    np.testing.assert_allclose(made["encoder_hidden_states"], np.concatenate(sides, -1), atol=2e-5)
    # the pooled states are those of the first chunk, without weights
    first = next(iter(parsed))[0] if name in ("a long one", "a break in front") else text.split(" BREAK")[0]
    plain = first.translate(str.maketrans("", "", "()[]")).replace(":1.3", "")
    if name != "a long one":
        pooled = encode(xl, plain, None, (64, 64), 1.0).positive["text_embeds"]
        np.testing.assert_allclose(made["text_embeds"], pooled, atol=2e-6)


# Three values (20, 300, -5 of the flat states) that compel 2.5.1 gives for the tiny pipeline of this test, with
# Compel(tokenizer, text_encoder, truncate_long_prompts=False, downweight_mode=DownweightMode.REMOVE)(text).
COMPEL_STATES = {
    "a (red)1.5 apple++ on, a table": (77, [0.65175325, 0.8082614, 0.442812]),
    "a (red)0.5 apple- on (the big)0.1 table": (77, [0.6517533, 0.6578759, 0.33965117]),
    "word " * 40 + ". " + "apple, tree " * 30 + "(red)1.4 x": (385, [0.9353749, 0.76423913, -0.95457745]),
    "red (cat)0 dog": (77, [0.8817776, -0.70206326, -0.5311623]),
}


@pytest.mark.parametrize("text", COMPEL_STATES, ids=range(len(COMPEL_STATES)))
def test_states_equal_those_of_compel(model: PipelineModel, text: str) -> None:
    states = encode(model, text, None, (64, 64), 1.0, Reading("compel")).positive["encoder_hidden_states"]
    length, values = COMPEL_STATES[text]
    assert states.shape == (length, 16)
    np.testing.assert_allclose(states.ravel()[[20, 300, -5]], values, atol=1e-4)


def test_text_without_signs_is_the_same_in_every_syntax(model: PipelineModel) -> None:
    text = "a red apple on a table"
    arrays = [encode(model, text, "", (64, 64), 5.0, Reading(syntax)) for syntax in ("plain", "a1111", "compel")]
    for other in arrays[1:]:
        assert np.array_equal(other.positive["encoder_hidden_states"], arrays[0].positive["encoder_hidden_states"])


def test_a_comma_near_the_end_is_where_a_chunk_ends_and_vectors_stay_together() -> None:
    files = dict(clip_files(1000))
    files["added_tokens.json"] = b'{"<toy>": 1000, "<toy>_1": 1001, "<toy>_2": 1002}'
    del files["tokenizer.json"]
    del files["tokenizer_config.json"]
    tokenizer = ClipTokenizer.from_files(files)
    assert tokenizer.groups("<toy>")[0] == (1000, 1001, 1002)
    one = len(tokenizer.groups("red"))

    def lengths(text: str) -> list[int]:
        return [len(chunk.ids) for chunk in a1111_chunks(tokenizer, a1111.parse(text))]

    words = 60 // one
    assert lengths("red " * words + ", " + "red " * 30)[0] == words * one + 1  # the comma is 15 tokens before the end
    assert lengths("red, " + "red " * 90)[0] == 75  # it is too far away
    assert lengths("," * 73 + "<toy>") == [73, 3]
    assert len(compel_chunks(tokenizer, compel.parse("red. " + "red " * 90))[0].ids) == one + 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("skip", [0, 1])
def test_clip_skip_draws_diffusers_pictures(request: Any, folder: Path, kind: str, skip: int) -> None:
    pipe = request.getfixturevalue("pipe" if kind == "sd" else "xl_pipe")
    made = PipelineModel(pipe, folder)
    if kind == "sd":
        made = with_skipped_states(made, pipe)
    # diffusers 0.42 looks for the final norm below a name that transformers 5 has no more
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    asked = {"prompt": "a red apple", "negative_prompt": "blurry", "width": 64, "height": 64, "guidance_scale": 5.0}
    theirs = pipe(
        **asked, num_inference_steps=2, clip_skip=skip, output_type="np", generator=torch.Generator().manual_seed(3)
    ).images[0]
    ours = generate(made, Request("a red apple", negative="blurry", guidance=5.0, clip_skip=skip, **SMALL))[0]
    error = np.mean((np.round(np.asarray(theirs, np.float64) * 255) - ours.pixels) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 60
    assert ours.settings.get("clip_skip") == (skip or None)


def with_skipped_states(model: PipelineModel, pipe: Any) -> PipelineModel:
    """The outputs that an encoder has which was exported with clip-skip."""
    runner = model.use("text_encoder")
    inner, plain = getattr(pipe.text_encoder, "text_model", pipe.text_encoder), runner.run

    def run(feeds: Any) -> dict[str, Any]:
        made = plain(feeds)
        norm = inner.final_layer_norm(torch.from_numpy(made["hidden_states.1"]))
        return {**made, "last_hidden_state.1": norm.detach().numpy()}

    runner.outputs = (*runner.outputs, replace(runner.outputs[0], name="last_hidden_state.1"))
    runner.run = run  # type: ignore[method-assign]
    return model


def test_clip_skip_that_a_model_cannot_names_the_command(model: PipelineModel, xl: PipelineModel) -> None:
    with pytest.raises(UnsupportedError, match="diffship export tiny --clip-skip 1"):
        start(model, Request("a cat", clip_skip=1, **SMALL))
    with pytest.raises(ConfigError, match="legal is from 0 to 1"):
        start(xl, Request("a cat", clip_skip=2, **SMALL))
    with pytest.raises(ConfigError, match="clip_skip is 99"):
        Request("a cat", clip_skip=99)
    with pytest.raises(ConfigError, match="compel"):
        Request("a cat", prompt_syntax="compell")


def test_prompts_of_unequal_length_and_pictures_of_unequal_prompts(model: PipelineModel) -> None:
    long = Request("red BREAK apple", negative="bad", prompt_syntax="a1111", guidance=5.0, **SMALL)
    begun = start(model, long)[0]
    assert begun.positive is not None and begun.negative is not None
    states = [side["encoder_hidden_states"] for side in (begun.positive, begun.negative)]
    empty = encode(model, "", None, (64, 64), 1.0).positive["encoder_hidden_states"]
    assert states[0].shape == states[1].shape == (154, 16)
    np.testing.assert_allclose(states[1][77:], empty, atol=1e-6)
    short = Request("a cat", guidance=5.0, **SMALL)
    together, alone = generate_many(model, [long, short]), generate(model, short)
    assert np.array_equal(together[1].pixels, alone[0].pixels)


def test_how_prompts_are_read_travels(model: PipelineModel) -> None:
    read = Request("a (red:1.4) apple", prompt_syntax="a1111", **SMALL)
    (begun,) = start(model, read)
    assert unpack(pack(begun)).reading == begun.reading == Reading("a1111")
    assert settings(begun)["prompt_syntax"] == "a1111"
    # who gets no embeddings encodes in the same way
    (other,) = generate_many(model, [read])
    from diffship.sampling.generate import draw

    assert np.array_equal(draw(model, [unpack(pack(begun, embeddings=False))])[0].pixels, other.pixels)
    plain = start(model, replace(read, prompt_syntax="plain"))[0]
    assert b'"reading' not in pack(plain) and b"reading" not in pack(plain)
    assert unpack(pack(plain)).reading == PLAIN
    with pytest.raises(DiffshipError):
        Reading.from_json({"syntax": "b1111"})
    assert issubclass(HandoffError, DiffshipError)


def test_one_image_of_four_by_its_number(model: PipelineModel) -> None:
    four = Request("a cat", rng="philox", images=4, batch=1, **SMALL)
    one = replace(four, images=1, first_image=2)
    assert np.array_equal(generate(model, one)[0].pixels, generate(model, four)[2].pixels)
    with pytest.raises(ConfigError, match="first"):
        replace(four, first_image=1)
