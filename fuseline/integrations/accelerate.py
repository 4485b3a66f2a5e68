"""accelerate's list of the backends of `torch.compile`, an enumeration: one more member."""

from __future__ import annotations

from ..compiler.errors import FuselineError

NAME = "FUSELINE"


def add_backend() -> None:
    """Adds "fuseline" to `accelerate.utils.DynamoBackend`; a second call changes nothing.

    Raises:
        FuselineError: accelerate's list is no enumeration of strings any more.
    """
    from accelerate.utils import DynamoBackend

    if NAME in DynamoBackend.__members__:
        return
    try:
        member = str.__new__(DynamoBackend, NAME)
        member._name_, member._value_ = NAME, NAME
        member._sort_order_ = len(DynamoBackend.__members__)
        DynamoBackend._member_map_[NAME] = member
        DynamoBackend._value2member_map_[NAME] = member
        DynamoBackend._member_names_.append(NAME)
        assert DynamoBackend(NAME) is member
    except (AttributeError, TypeError, ValueError, AssertionError) as error:
        raise FuselineError(
            "this accelerate has another list of backends, to which fuseline cannot be added",
            [f"{type(error).__name__}: {error}"],
            'compile the model yourself: model.compile(backend="fuseline"), and leave torch_compile out',
        ) from error
