"""The airline of airline_agent.py: a SQLite file, and the tools that read and change it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from agentrt import tool


class AirlineDatabase:
    """Owns the file. Tools without `async` run in worker threads, several at a time, so each call
    has a connection and a transaction of its own. What a tool raises, the model reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(Path(__file__).with_name("airline_data.sql").read_text())

    @property
    def tools(self) -> list[Any]:
        changes = [self.set_bags, self.set_cabin, self.cancel_reservation]
        return [self.get_reservation, *changes, self.look_up_user]

    def reservations(self) -> dict[str, dict[str, Any]]:
        """Every reservation as it is now, by its id."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT * FROM reservations").fetchall()
        return {row["reservation_id"]: dict(row) for row in rows}

    @tool
    def get_reservation(self, reservation_id: str) -> str:
        """Look up a reservation by reservation id."""
        with self._transaction() as connection:
            return _sentence(_find(connection, reservation_id))

    @tool
    def set_bags(self, reservation_id: str, bags: int) -> str:
        """Set the number of bags of a reservation."""
        with self._transaction() as connection:
            if bags < _find(connection, reservation_id)["bags"]:
                raise ValueError("bags can be added, not taken away")
            return _update(connection, reservation_id, "bags", bags)

    @tool
    def set_cabin(self, reservation_id: str, cabin: Literal["economy", "business"]) -> str:
        """Change the cabin of a reservation to economy or business."""
        with self._transaction() as connection:
            return _update(connection, reservation_id, "cabin", cabin)

    @tool
    def cancel_reservation(self, reservation_id: str) -> str:
        """Cancel a reservation."""
        with self._transaction() as connection:
            cabin = _find(connection, reservation_id)["cabin"]
            if cabin != "business":
                raise PermissionError(f"a ticket in {cabin} cannot be cancelled")
            return _update(connection, reservation_id, "status", "cancelled")

    @tool
    def look_up_user(self, reservation_id: str) -> str:
        """Look up the user of a reservation by reservation id."""
        with self._transaction() as connection:
            row = _find(connection, reservation_id)
        kind = f"{row['membership']} member"
        return f"The user of reservation {reservation_id} is {row['name']}, a {kind}."

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path)) as connection, connection:
            connection.row_factory = sqlite3.Row
            connection.execute("BEGIN IMMEDIATE")  # nobody writes between a check and its update
            yield connection


def _find(connection: sqlite3.Connection, reservation_id: str) -> sqlite3.Row:
    query = "SELECT * FROM reservations JOIN users USING (user_id) WHERE reservation_id = ?"
    row: sqlite3.Row | None = connection.execute(query, (reservation_id,)).fetchone()
    if row is None:
        raise LookupError(f"there is no reservation {reservation_id}")
    return row


def _update(connection: sqlite3.Connection, reservation_id: str, column: str, value: Any) -> str:
    change = f"UPDATE reservations SET {column} = ? WHERE reservation_id = ?"
    connection.execute(change, (value, reservation_id))
    return _sentence(_find(connection, reservation_id))


def _sentence(row: sqlite3.Row) -> str:
    """SmolLM2-135M repeats a sentence well; to JSON it answers in JSON."""
    return (
        f"Reservation {row['reservation_id']} flies from {row['origin']} to {row['destination']} "
        f"in {row['cabin']} with {row['bags']} bags and is {row['status']}."
    )
