"""What the steps of a recipe share while they run: the things that they read, where these lie and what they hold.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from brickyard.recipe.contents import Hashes
from brickyard.recipe.steps import Recipe, Step


@dataclass(frozen=True)
class Thing:
    """Something that steps read: its kind, where it lies (or how it is called), the digest of its contents.

    `base` is what a brick was trained on; `label` is what a report calls it.
    """

    kind: str
    spec: str
    digest: str
    label: str
    base: str | None = None


@dataclass
class Work:
    """What running steps share: the recipe, the folder, hashes, what lies outside, and what finished steps left."""

    recipe: Recipe
    folder: Path
    hashes: Hashes
    trust_remote_code: bool = False
    outside: dict[tuple[str, str], Thing] = field(default_factory=dict)
    left: dict[str, Thing] = field(default_factory=dict)

    def thing(self, step: Step, name: str, value: str) -> Thing:
        """Return what a value of an option that takes a model, a brick or data stands for."""
        return self.left[value[1:]] if value.startswith("$") else self.outside[read_as(step, name), value]

    def things(self, step: Step, name: str) -> list[Thing]:
        """Return all that an option names, none where it is not given."""
        value = step.options.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        return [self.thing(step, name, item) for item in items]

    def spec(self, step: Step, name: str) -> str | None:
        """Return where the one thing that an option names lies; None where it is not given."""
        return next((thing.spec for thing in self.things(step, name)), None)


def read_as(step: Step, name: str) -> str:
    """Return as what an option reads something that no step makes: data, model or brick."""
    takes = step.option(name).takes
    return "data" if "data" in takes else "model" if takes == ("model",) else "brick"
