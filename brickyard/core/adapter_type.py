"""One more type of adapter in PEFT's closed registry. Imports no peft at module level: peft's import calls us."""

from __future__ import annotations

import sys

from brickyard.core.errors import Refused

TYPE = "BRICKYARD"


def register() -> None:
    """Make PEFT know the type BRICKYARD; does nothing where it is known already.

    PEFT's registry takes only names that are members of its enum, so the member is added first. Raises Refused where a
    later PEFT release or another library has taken the name or the prefix.
    """
    tuner = getattr(sys.modules.get("brickyard.core.inject_tuner"), "BrickyardTuner", None)
    if tuner is None:
        return  # our own modules are importing peft just now; `inject` calls again when they are complete
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    from brickyard.core.inject_config import BrickyardConfig

    if TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE)
        member._name_, member._value_ = TYPE, TYPE
        PeftType._member_map_[TYPE] = member
        PeftType._member_names_.append(TYPE)
        PeftType._value2member_map_[TYPE] = member
        type.__setattr__(PeftType, TYPE, member)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(TYPE))
    if known is BrickyardConfig:
        return
    try:
        register_peft_method(
            name=TYPE.lower(),
            config_cls=BrickyardConfig,
            model_cls=tuner,
            prefix=tuner.prefix,
            is_mixed_compatible=False,
        )
    except (KeyError, ValueError) as error:
        raise Refused(
            f"PEFT does not take the type {TYPE} ({error}); another library may have it. Known: {known}."
        ) from error
