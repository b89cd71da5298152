"""A task of two tools, one after the other, whose numbers no model can know but from them.

SmolLM2 has 135M parameters: it copies what a tool said into the next call, and into an answer that
a schema holds, but it cannot plan. Which tool is next is therefore the framework's to say, each by
the means that it has for that.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

QUESTION = "Find the flight to Oslo and count its free seats."
# Nothing in the question, the tools' descriptions or the schemas says them.
FLIGHT, SEATS = "QF73", 91
_FLIGHTS = {"Oslo": FLIGHT, "Rome": "AB12", "Paris": "KL58"}
_SEATS = {FLIGHT: SEATS, "AB12": 37, "KL58": 14}

City = Literal["Oslo", "Rome", "Paris"]
Number = Annotated[str, Field(pattern="^[A-Z]{2}[0-9]{2}$")]


class Free(BaseModel):
    """The free seats of a flight."""

    flight: Number
    seats: int


ANSWER = Free(flight=FLIGHT, seats=SEATS)


def find_flight(city: City) -> str:
    """Find the number of the flight to a city."""
    return f"The flight is {_FLIGHTS[city]}."


def count_seats(flight_number: str) -> str:
    """Count the free seats of a flight."""
    return f"{_SEATS.get(flight_number, 0)} seats"


TOOLS = {"find_flight": find_flight, "count_seats": count_seats}
CALLS = [("find_flight", {"city": "Oslo"}), ("count_seats", {"flight_number": FLIGHT})]
RESULTS = [f"The flight is {FLIGHT}.", f"{SEATS} seats"]
