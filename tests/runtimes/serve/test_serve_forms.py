"""What bodies and queries may hold, at every bound, and that the OpenAPI document says the same."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core.errors import ConfigError
from diffship.runtimes.serve.forms import GenerateForm, HandoffForm, ImagesForm, ResumeForm, read_body, read_query
from diffship.runtimes.serve.openapi import openapi_document
from diffship.runtimes.serve.options import ServeOptions

jsonschema = pytest.importorskip("jsonschema")
FORMS = {
    "/v1/generate": (GenerateForm, {"prompt": "cat", "response": "json"}),
    "/v1/handoff": (HandoffForm, {"prompt": "cat", "split": 3}),
    "/v1/images/generations": (ImagesForm, {"prompt": "cat"}),
}
BOUNDED = [
    (path, entry.name, entry.metadata["low"], entry.metadata["high"])
    for path, (form, _) in FORMS.items()
    for entry in dataclasses.fields(form)
    if "low" in entry.metadata and entry.name not in ("width", "height", "previews")
]


def body(**values: Any) -> bytes:
    return json.dumps(values).encode()


def schema(path: str) -> dict[str, Any]:
    post = openapi_document(ServeOptions(), False)["paths"][path]["post"]
    return dict(post["requestBody"]["content"]["application/json"]["schema"])


@pytest.mark.parametrize(("path", "name", "low", "high"), BOUNDED)
def test_case_31_numbers_are_legal_up_to_their_bounds(path: str, name: str, low: float, high: float) -> None:
    form, values = FORMS[path]
    for value in (low, high):
        assert getattr(read_body(form, body(**{**values, name: value})), name) == value
        jsonschema.validate({**values, name: value}, schema(path))
    # 2**63 and its neighbours are one float, so what lies past an end is made of whole numbers where the bound is one
    step = 1 if isinstance(low, int) else 1e-6
    bad = [low - step, high + step, 10**400, True, "3", [], {}, 1e308]
    for value in bad:
        with pytest.raises(ConfigError) as refused:
            read_body(form, body(**{**values, name: value}))
        assert name in str(refused.value)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, name: value}, schema(path))


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e309", b"1" * 5000])
def test_case_31_numbers_that_json_or_floats_do_not_have(text: bytes) -> None:
    with pytest.raises(ConfigError):
        read_body(GenerateForm, b'{"prompt": "cat", "guidance": %s}' % text)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "model"])
def test_case_31_half_a_character_is_refused_not_drawn(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} holds U\+D83D, half of a surrogate pair"):
        read_body(GenerateForm, body(**{"prompt": "cat", name: "a\ud83d"}))
    whole = read_body(GenerateForm, body(**{"prompt": "cat", name: "a\U0001f600"}))
    assert getattr(whole, name) == "a\U0001f600"


def test_case_31_nothing_is_allocated_for_what_is_refused() -> None:
    data = body(prompt="cat", response="json", images=10**9, width=10**9, height=10**9, steps=10**9)
    read_body(GenerateForm, body(prompt="cat"))  # what is cached on first use is not the point
    tracemalloc.start()
    with pytest.raises(ConfigError):
        read_body(GenerateForm, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8: byte 0"),
        (b"[" * 60_000, "not JSON"),
        (b"[" * 100_000, "commas, colons and brackets"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'"cat"', "must be a table"),
        (b"{}", "'prompt' is missing"),
        (b'{"prompt": ""}', "0 characters; legal is from 1 to 2000"),
        (b'{"prompt": null}', "must be a string"),
        (b'{"prompt": "cat", "stepz": 3}', "did you mean 'steps'?"),
        (b'{"prompt": "cat", "sampler": "eular"}', "did you mean 'euler'?"),
        (b'{"prompt": "cat", "width": 64}', "width and height come together"),
        (b'{"prompt": "cat", "images": 2}', "png holds one image"),
        (b'{"prompt": "cat", "previews": 1}', "previews come with response events"),
        (b'{"prompt": "cat", "negative_prompt": 3}', "negative_prompt is 3"),
    ],
)
def test_bodies_are_refused_with_what_is_legal(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        read_body(GenerateForm, data)


def test_prompts_of_any_length_but_the_legal_ones_are_refused() -> None:
    assert len(read_body(GenerateForm, body(prompt="x" * 2000)).prompt) == 2000
    for text in ("x" * 2001, "x" * 1_000_000):
        with pytest.raises(ConfigError, match="legal is from 1 to 2000"):
            read_body(GenerateForm, body(prompt=text))


@pytest.mark.parametrize("size", ["512", "x512", "512x", "5e2x512", "-64x64", "64x64x64", "٦٤x٦٤"])
def test_openai_sizes(size: str) -> None:
    assert read_body(ImagesForm, body(prompt="cat", size="512x768")).drawing().height == 768
    with pytest.raises(ConfigError):
        read_body(ImagesForm, body(prompt="cat", size=size)).drawing()


@pytest.mark.parametrize(
    "pairs",
    [
        [("until", "1_0")],
        [("until", "0x10")],
        [("until", "007")],
        [("until", "")],
        [("until", "NaN")],
        [("until", "1e309")],
        [("until", "true")],
        [("until", "3"), ("until", "4")],
        [("untill", "3")],
        [("until", "3"), ("response", "json")],
        [("deadline_seconds", "0.5")],
        [("model", "")],
        [("embeddings", "no"), ("until", "3")],
        [("embeddings", "1"), ("until", "3")],
        [("dtype", "float16")],
    ],
)
def test_queries_are_as_strict_as_bodies(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(ConfigError):
        read_query(ResumeForm, pairs)


def test_a_query() -> None:
    form = read_query(
        ResumeForm, [("until", "15"), ("deadline_seconds", "2.5"), ("model", "7"), ("embeddings", "false")]
    )
    assert form == ResumeForm(until=15, deadline_seconds=2.5, model="7", embeddings=False)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_case_30_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    with pytest.raises(ConfigError):
        read_body(GenerateForm, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = [entry.name for entry in dataclasses.fields(GenerateForm)]


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), JSON, max_size=6))
def test_case_30_the_form_takes_nothing_that_its_schema_refuses(values: dict[str, Any]) -> None:
    try:
        read_body(GenerateForm, body(**values))
    except ConfigError:
        return
    jsonschema.validate(values, schema("/v1/generate"))


def test_the_openapi_document_names_every_route_and_field() -> None:
    document = openapi_document(ServeOptions(), True)
    assert document["paths"].keys() == {
        "/live", "/ready", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/generate", "/v1/handoff", "/v1/resume",
        "/v1/images/generations",
    }  # fmt: skip
    for path, (form, _) in FORMS.items():
        jsonschema.Draft202012Validator.check_schema(schema(path))
        assert set(schema(path)["properties"]) == {entry.name for entry in dataclasses.fields(form)}
    query = document["paths"]["/v1/resume"]["post"]["parameters"]
    assert {entry["name"] for entry in query} == {
        "Idempotency-Key", *(entry.name for entry in dataclasses.fields(ResumeForm))
    }  # fmt: skip
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
    assert "401" not in document["paths"]["/live"]["get"]["responses"]


def test_a_split_may_be_any_call_of_a_sampler_with_two_calls_a_step() -> None:
    assert HandoffForm(prompt="cat", split=299).split == 299  # Heun with 150 steps makes that many
    with pytest.raises(ConfigError, match="split"):
        HandoffForm(prompt="cat", split=301)
