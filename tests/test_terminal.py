"""What a model or a file says is not let command a terminal."""

import io

import pytest

from minilora.terminal import escaped, for_stream


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("over\rwritten, \x08\x08", "over\\x0dwritten, \\x08\\x08"),
        ("CSI in one character: \x9b31m", "CSI in one character: \\x9b31m"),
        ("\x00 \x7f", "\\x00 \\x7f"),
        ("a line\n\tand a tab, é 木 👩‍🚀", "a line\n\tand a tab, é 木 👩‍🚀"),
    ],
)
def test_control_characters_are_written_out_and_text_stays(text, shown):
    assert escaped(text) == shown


def test_a_terminal_gets_them_written_out_and_a_file_as_they_are():
    assert for_stream("\x1b[1m", Terminal()) == "\\x1b[1m"
    assert for_stream("\x1b[1m", io.StringIO()) == "\x1b[1m"
