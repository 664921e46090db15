"""The checks of S2A: what they judge, and that their arms keep as many bits as the claims say."""

from __future__ import annotations

import pytest

from brickyard.checks import s2a, s2a_modules
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.build import resolve

CLAIMS = registry.find("s2a-modules").record.claims


def test_claims_of_four_bits_keep_four_bits_everywhere() -> None:
    texts = [text for claim in CLAIMS for text in (*claim.arms.values(), claim.control.get("arm", "")) if "+" in text]
    assert len(texts) == 6 and all("4" in claim.text for claim in CLAIMS)
    for text in (*texts, s2a_modules.CODED, *s2a_modules.BESIDE[1:]):
        config = resolve(parse(text)).configs["s2a"]
        assert (config.bits, config.slope_bits, config.operand_bits) == (4, 4, 4), text


def test_the_modules_bytes_are_judged_against_full_tuning_and_lora() -> None:
    [claim] = [c for c in CLAIMS if c.measure == "saved_bytes"]
    found = s2a_modules.saved_bytes(claim, batch=2, tokens=16)
    kept = found["figures"]["bytes"]
    assert found["holds"] is True and not found["figures"]["hidden"]
    assert kept[s2a_modules.CODED] <= kept["full"] / 4 and kept[s2a_modules.CODED] <= kept["lora"] / 2.5
    worst = max(4 * kept[s2a_modules.CODED] / kept["full"], 2.5 * kept[s2a_modules.CODED] / kept["lora"])
    assert found["measured"] == pytest.approx(worst)
    # Without codes the module keeps what BitFit keeps, which is no such share.
    assert found["control"]["destroyed"] and kept[s2a_modules.BIAS] == kept["bitfit"]


def test_a_step_is_affordable_only_where_its_peak_falls() -> None:
    plain = {f"{s2a.LORA}, {kind}": 100 for kind in ("sdpa", "eager")}
    falls = {**plain, f"{s2a.S2A}, sdpa": 60, f"{s2a.S2A}, eager": 99}
    fast, slow, between = (1.2, 1.1, 1.3), (1.6, 1.5, 1.7), (1.4, 1.3, 1.5)
    assert s2a._affordable({"sdpa": fast, "eager": fast}, falls) is True
    assert s2a._affordable({"sdpa": fast, "eager": slow}, falls) is False
    assert s2a._affordable({"sdpa": between, "eager": fast}, falls) == "undecided"
    for kind in ("sdpa", "eager"):
        stays = {**falls, f"{s2a.S2A}, {kind}": 100}
        assert s2a._affordable({"sdpa": fast, "eager": fast}, stays) is False


def test_the_verdict_on_step_time_sees_the_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = next(c for c in registry.find("s2a").record.claims if c.measure == "step_time")
    monkeypatch.setattr(s2a, "SLOWER", 1e6)  # whatever the clock says, here memory decides
    monkeypatch.setattr(s2a, "S2A", "full")
    found = s2a.step_time(claim, batch=2, tokens=16, rounds=2)
    assert "peak" in found["inequality"] and found["holds"] is False
    peaks = found["figures"]["peaks"]
    assert all(peaks[f"full, {kind}"] > peaks[f"lora, {kind}"] for kind in ("sdpa", "eager"))
