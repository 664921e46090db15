"""The language of arms: what is read, what is refused, and that writing and reading are inverse."""

import contextlib
import re

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


def test_no_two_arms_share_a_slug_and_the_usual_ones_keep_the_plain_one() -> None:
    plain = {
        "lora": "lora",
        "lora:lr=1e-5,r=4": "lora_lr_1e-05_r_4",
        "lora:target=query": "lora_target_query",
        "mos:r=7,e=2 + moment-probing": "mos_e_2_r_7_moment-probing",
        "full + dp:epsilon=8": "full_dp_epsilon_8",
        "adalora:target_r=4,init_r=6": "adalora_init_r_6_target_r_4",
        "lst:ladder=false": "lst_ladder_false",
    }
    assert {text: parse(text).slug for text in plain} == plain
    assert re.fullmatch(r"lora_target_query-[0-9a-f]{8}", parse("lora:target=query*").slug)
    words = ["query", "query*", "'*query'", "query_key", "_query", "query|key", "r", "8", "none", "'none'", "dp", "a-2"]
    values = [*words, "'8'", "''", "[]", *(f"[{a}]" for a in words), *(f"[{a},{b}]" for a in words for b in words)]
    texts = [f"lora:target={v}{rest}" for v in values for rest in ("", ",target_r=8", " + dp", " + dp:r=8")]
    texts += ["lora:target_r=8", "lora + target:r=8", "lora + target + r", "x", "x-2", "x + y", "x:y=1", "x:y=z"]
    texts += ["lora:target=[" + ",".join(["query"] * n) + "]" for n in (60, 61)]
    arms = {str(parse(text)) for text in texts}
    slugs = {parse(text).slug for text in arms}
    assert len(arms) > 600 and len(slugs) == len(arms)
    assert all(re.fullmatch(r"[a-z0-9A-Z._-]{1,220}", slug) for slug in slugs)
    # The second copy of one arm, `lora_target_a-2`, is not another arm's place, nor is one that ends like a digest.
    assert parse("lora:target=a-2").slug != "lora_target_a-2"
    seeming = parse("lora:target=query*").slug.removeprefix("lora_target_")
    assert parse(f"lora:target={seeming}").slug != parse("lora:target=query*").slug


@given(*[st.lists(pieces, min_size=1, max_size=2, unique_by=lambda p: p.name)] * 2)
@settings(derandomize=True, deadline=None)
def test_arms_of_any_words_have_slugs_of_their_own(one: list[Piece], other: list[Piece]) -> None:
    a, b = Arm(tuple(one)), Arm(tuple(other))
    assert (a.slug == b.slug) == (str(a) == str(b))
