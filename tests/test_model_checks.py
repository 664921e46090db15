"""The measured claims of the network layers run from end to end at a small size."""

from __future__ import annotations

from brickyard.checks import lightning_attention, transnormer
from brickyard.core import registry


def test_the_forms_agree_and_the_control_does_not() -> None:
    claim = registry.find("lightning-attention").record.claims[0]
    found = lightning_attention.agreement(claim, lengths=(1, 65, 200))
    assert found["holds"] is True and found["measured"] < 100
    assert found["control"]["destroyed"] and found["control"]["measured"] > 1e4


def test_decoding_from_the_state_gives_the_same_tokens_in_constant_memory() -> None:
    claim = registry.find("transnormer").record.claims[-1]
    found = transnormer.decode(claim, prompts=2, prompt=20, new=12)
    assert found["holds"] is True and found["measured"] == 0
    assert found["control"]["destroyed"]


def test_every_measured_claim_has_its_function() -> None:
    import importlib

    for entry in registry.records():
        for claim in entry.record.claims:
            if claim.measure:
                place = importlib.import_module(f"brickyard.checks.{entry.path.stem}")
                assert callable(getattr(place, claim.measure)), (entry.record.name, claim.measure)
