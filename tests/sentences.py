"""What every error that a user sees has in common."""

import re


def assert_sentence(error: BaseException | str, *words: object) -> None:
    """Asserts that an error is one sentence on one line that contains the given words."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?]\s+[A-Z]", text), f"more than one sentence: {text}"
    for word in words:
        assert str(word) in text, f"{word} is not named: {text}"
