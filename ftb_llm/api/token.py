"""The bearer token as a header can carry it: read the same way by the server and by its clients."""

from ftb_llm.errors import SetupError


def cleaned(text: str, *, name: str = "the bearer token") -> str:
    """The token without the white space around it, such as the line break of the file it comes from; "" when nothing is left.

    Args:
        name: what the token came from, for the error's line; the token itself is never shown.

    Raises:
        SetupError: a character within it can't stand in a header of HTTP.
    """
    token = text.strip()
    for place, character in enumerate(token, start=1):
        if not (character.isascii() and character.isprintable()):
            raise SetupError(
                f"{name}: character {place} of the token can't be sent in a header; it must be made of ASCII letters, "
                "digits and signs alone, such as openssl rand -hex 32 prints"
            )
    return token
