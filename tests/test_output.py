"""OutputText: nothing is lost, nothing after a stop string is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrt.output import OutputText
from agentrt.tokenizer import IncrementalDecoder

ALPHABET = "abc"
pieces_of_text = st.lists(st.text(ALPHABET, max_size=4), max_size=12)
stop_strings = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3).map(tuple)


def output_of(pieces: list[str], stops: tuple[str, ...]) -> tuple[OutputText, list[str]]:
    """Push one token a piece, as the loop does: until a stop string, then finish."""
    decoder = IncrementalDecoder([p.encode() for p in pieces], strips_leading_space=False)
    output, released = OutputText(decoder, stops), []
    for token_id in range(len(pieces)):
        released.append(output.push(token_id))
        if output.stopped:
            break
    released.append(output.finish())
    return output, released


@given(pieces_of_text, stop_strings)
def test_pieces_join_to_the_text_cut_at_the_first_stop_string(pieces, stops):
    output, released = output_of(pieces, stops)
    text, whole = output.text, "".join(pieces)
    assert "".join(released) == text
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    if output.stopped:
        assert any(whole[len(text) :].startswith(stop) for stop in stops)
    else:
        assert text == whole


@given(pieces_of_text, stop_strings)
def test_every_released_piece_is_certain_when_it_is_released(pieces, stops):
    """However the text goes on, what was released stays what it was."""
    whole = output_of(pieces, stops)[1]
    for num in range(len(pieces)):
        part = output_of(pieces[:num], stops)[1][:-1]
        assert whole[: len(part)] == part


@given(st.text(ALPHABET, max_size=12), st.text(ALPHABET, min_size=1, max_size=4))
def test_a_stop_string_is_found_however_tokens_cut_it(text, stop):
    output, _ = output_of(list(text), (stop,))
    assert output.text == text.split(stop)[0]
    assert output.stopped == (stop in text)


def test_held_back_text_is_no_longer_than_the_stop_string_needs():
    output, released = output_of(["xa", "b", "y"], ("abc",))
    assert released == ["x", "", "aby", ""]
    assert output.text == "xaby"


def test_of_two_stop_strings_the_earlier_counts():
    output, _ = output_of(["one two three"], ("three", "two"))
    assert output.text == "one "


def test_a_character_over_several_tokens_comes_whole():
    smile = "🙂".encode()
    decoder = IncrementalDecoder([smile[:2], smile[2:], b"!"], strips_leading_space=False)
    output = OutputText(decoder, ())
    assert [output.push(0), output.push(1), output.push(2)] == ["", "🙂", "!"]


@pytest.mark.parametrize("stops", [(), ("no",)])
def test_an_unfinished_character_is_released_at_the_end(stops):
    output = OutputText(IncrementalDecoder([b"\xf0\x9f"], strips_leading_space=False), stops)
    assert output.push(0) == ""
    assert output.finish() == output.text == "\N{REPLACEMENT CHARACTER}"
