"""What several commands read from their command lines."""


def names(words: str) -> tuple[str, ...]:
    """Read "A,B" as ("A", "B")."""
    return tuple(word.strip() for word in words.split(","))
