"""What the settings refuse, told in the words of the key that holds it."""

from uda_reid.errors import UserError


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}, got '{value}'.")


def check_least(section: str, least: float, **values: float) -> None:
    for key, value in values.items():
        if value < least:
            raise UserError(f"{section}.{key} must be {least} or more, got {value}.")


def check_fraction(section: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{section}.{key} must be in [0, 1], got {value}.")


def check_memory(section: str, temperature: float, **momentum: float) -> None:
    if temperature <= 0:
        raise UserError(f"{section}.temperature must be above 0, got {temperature}; 0.05 is usual.")
    for key, value in momentum.items():
        if not 0 <= value < 1:
            raise UserError(f"{section}.{key} must be in [0, 1), got {value}; with 1 a memory would never move.")


def check_teacher(section: str, teacher_momentum: float) -> None:
    if not 0 <= teacher_momentum < 1:
        raise UserError(f"{section}.teacher_momentum must be in [0, 1), got {teacher_momentum}.")


def check_batch(section: str, identities: int, instances: int) -> None:
    if min(identities, instances) < 2:
        raise UserError(
            f"{section}.identities and {section}.instances must be 2 or more, got {identities} and {instances}; a "
            "triplet needs a second image of one identity and one of another."
        )
