"""The bearer token: cleaned and refused in one place, and never shown."""

import pytest

from ftb_llm.api.token import cleaned
from ftb_llm.errors import SetupError


@pytest.mark.parametrize("text", ["s3cret", "s3cret\n", " \ts3cret\r\n"])
def test_white_space_around_a_token_is_no_part_of_it(text: str) -> None:
    assert cleaned(text) == "s3cret"


@pytest.mark.parametrize("text", ["", " \n"])
def test_nothing_but_white_space_is_no_token(text: str) -> None:
    assert cleaned(text) == ""


@pytest.mark.parametrize(("text", "place"), [("tökén", 2), ("s3c\nret", 4), ("abc\x00", 4), ("t\udce9", 2)])
def test_what_no_header_carries_is_refused_without_showing_it(text: str, place: int) -> None:
    with pytest.raises(SetupError) as caught:
        cleaned(text, name="FTB_LLM_TOKEN")
    line = str(caught.value)
    assert line.startswith(f"FTB_LLM_TOKEN: character {place} of the token can't be sent in a header")
    assert "\n" not in line
    assert text not in line
