"""The language of arms: what is read, what is refused, and that writing and reading are inverse."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brickyard.core.arm import TRAINING, Arm, Piece, parse
from brickyard.core.errors import UsageError

names = st.from_regex(r"[a-z][a-z0-9]{0,6}(-[a-z0-9]{1,4})?", fullmatch=True)
keys = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True).filter(lambda k: k not in TRAINING)
scalars = (
    st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
    | st.text(
        st.characters(codec="ascii", exclude_characters="'\"\\", exclude_categories=("Cc",)), min_size=1, max_size=8
    )
)
values = scalars | st.lists(scalars, max_size=3)
pieces = st.builds(Piece, names, st.dictionaries(keys, values, max_size=3))


@given(
    st.lists(pieces, min_size=1, max_size=3, unique_by=lambda p: p.name),
    st.fixed_dictionaries({}, optional={"lr": st.floats(1e-6, 1)}),
)
@settings(derandomize=True, deadline=None)
def test_what_is_written_reads_back_the_same(parts: list[Piece], training: dict) -> None:
    arm = Arm(tuple(parts), training)
    assert parse(str(arm)) == arm
    assert str(parse(str(arm))) == str(arm)


def test_reads_the_examples_of_the_design() -> None:
    assert parse("mos:r=7,e=2") == Arm((Piece("mos", {"r": 7, "e": 2}),))
    assert parse("lora:r=8 + zo-adam") == Arm((Piece("lora", {"r": 8}), Piece("zo-adam")))
    assert parse("full + dp:epsilon=8,delta=1e-5").pieces[1].options == {"epsilon": 8, "delta": 1e-5}
    assert parse("lst:ladder=false").pieces[0].options == {"ladder": False}
    assert parse("lora:lr=1e-3,epochs=2,batch=16,wd=0").training == {"lr": 1e-3, "epochs": 2.0, "batch": 16, "wd": 0.0}
    assert parse("lora:target=[query,value]").pieces[0].options == {"target": ["query", "value"]}
    assert parse("dp:epsilon=1e+2").pieces[0].options == {"epsilon": 100.0}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("lora +", "empty"),
        ("lora:", "empty"),
        ("lora:r", "option=value"),
        ("lora:r=", "option=value"),
        ("lora:r=8,r=4", "twice"),
        ("lora:lr=1 + full:lr=2", "twice"),
        ("lora + lora", "twice"),
        ("LoRA", "not a method name"),
        ("lora:r=__import__('os').system('x')", "not a literal"),
        ("lora:r=2**9999", "not a literal"),
        ("lora:r=(1", "close"),
        ("lora:r=1j", "not a literal"),
        ("lora:r=1e999", "not a literal"),
        ("lora:lr=fast", "number"),
        ("lora:lr=-1", "positive"),
        ("lora:batch=2.5", "whole"),
        ("lora:epochs=0", "positive"),
        ("lora:lr=true", "number"),
        ("x" * 3000, "characters"),
        ("lora:r={}", "not a literal"),
        ("lora:r=lambda:0", "not a literal"),
    ],
)
def test_refuses_what_is_no_arm_and_says_why(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse(text)


@given(st.text(max_size=40))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_text_is_read_or_refused_but_never_breaks(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse(str(parse(text))) == parse(text)


def test_slugs_are_file_names() -> None:
    assert parse("lora:r=8,target=[query,value] + moment-probing").slug == "lora_r_8_target_query_value_moment-probing"
