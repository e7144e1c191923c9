from tests.readme import README, filled


def test_references_are_current() -> None:
    """`python -m tests.readme` writes them anew."""
    text = README.read_text()
    assert text == filled(text)
