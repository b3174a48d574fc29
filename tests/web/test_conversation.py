"""The rules of a conversation: what the boxes become, and what edit and regenerate forget."""

import pytest

from xverse import XverseError
from xverse.web.conversation import Conversation


def talk() -> Conversation:
    first = Conversation().asked("a", system=" You are. ").answered("A")
    return first.asked("b").answered("B").asked("", exec="{}").answered("C")


def test_the_system_message_counts_on_the_first_turn_only() -> None:
    later = talk().asked("c", system="Another.")
    assert later.messages()[0] == {"role": "system", "content": "You are."}
    assert sum(message["role"] == "system" for message in later.messages()) == 1
    none = Conversation().asked("a", system=" ").answered("A").asked("b", system="Too late.")
    assert [message["role"] for message in none.messages()] == ["user", "assistant", "user"]


def test_exec_takes_the_place_of_the_message() -> None:
    asked = Conversation().asked("not sent", exec=' {"rooms": 2}\n')
    assert asked.messages() == [{"role": "exec", "content": ' {"rooms": 2}\n'}]
    assert Conversation().asked("sent", exec=" \n").messages()[0]["role"] == "user"


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_nothing_cannot_be_sent(blank: str) -> None:
    with pytest.raises(XverseError, match="no message"):
        talk().asked(blank, exec=blank)


@pytest.mark.parametrize(
    ("place", "kept"), [(0, "a"), (1, "a"), (2, "aAb"), (3, "aAb"), (4, "aAbB{}"), (5, "aAbB{}")]
)
def test_asking_again_forgets_what_followed(place: int, kept: str) -> None:
    again = talk().asked_again(place, system="You are.")
    assert "".join(turn.content for turn in again.turns) == kept
    assert again.turns[-1].role == ("exec" if place > 3 else "user")
    assert again.system == "You are."


def test_an_edited_turn_keeps_its_role() -> None:
    assert talk().asked_again(4, text="[]").turns[-1].role == "exec"
    edited = talk().asked_again(2, text="new")
    assert [turn.content for turn in edited.turns] == ["a", "A", "new"]
    assert talk().turns[2].content == "b"  # the conversation before it is as it was


def test_the_first_turn_asked_again_takes_the_system_message_anew() -> None:
    assert talk().asked_again(0, system="Another.").system == "Another."
    assert talk().asked_again(2, system="Another.").system == "You are."


@pytest.mark.parametrize("place", [-1, 0])
def test_a_page_that_is_out_of_date(place: int) -> None:
    with pytest.raises(XverseError, match="no such message"):
        Conversation().asked_again(place)
