"""Lines of a fix as Python's parser counts them, whatever characters a file holds."""

from __future__ import annotations

import pytest

from brickyard.core.fixes import GRANULARITIES, apply, edits, training_texts

# Characters at which str.splitlines breaks a line and Python's parser does not, all inside one string.
ODD = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_is_what_the_parser_takes_for_one(end: str) -> None:
    function = "def f(x):\n    return weak(x)\n"
    before = f"ODD = {ODD!r}\n\x0c\n{function}\n\ndef g():\n    return 1\n".replace(repr(ODD), f"'{ODD}'")
    after = before.replace("weak", "safe")
    expected = {"line": "return safe(x)\n", "block": "return safe(x)\n", "file": after.strip("\n") + "\n"}
    expected["function"] = function.replace("weak", "safe")
    for granularity in GRANULARITIES:
        assert training_texts(before, after.replace("\n", end), granularity) == [expected[granularity]]
        old, new = before.replace("\n", end), after.replace("\n", end)
        for a, b in ((old, new), (old, after), (before, new)):
            assert apply(a, edits(a, b, granularity)) == b, "not exact"
