"""The leak map as a table: for people in Markdown and plain text, for programs in rows."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from .counts import Count
from .facts import Facts

NOTHING = "no closed form"


@dataclass(frozen=True)
class LeakRow:
    """If these tensors and only these are shared: what applies.

    Attributes
    ----------
    shared : str
        In words.
    kind : {"group", "combination", "asked"}
        One group of tensors; several that are shared together; the caller's own.
    tensors : tuple of str
        Their names; empty for adapters that the model does not have yet.
    attack : str or None
        The closed form that needs the fewest rounds, a key of :data:`~aprillab.attacks.ATTACKS`.
        None says that no closed form applies, and nothing more.
    title : str
        The attack in words, or "no closed form".
    why : str
        The count that decides, with its numbers; where none could be made, what is missing.
    rounds : int or None
        Of the same picture, that it needs; None where no closed form applies.
    silent_rounds : int
        Rounds before those, in which nothing is seen.
    evidence : tuple of str
        What can show, on such an update, that the picture is the private one.
    also : tuple of str
        What else is known to leak.
    counts : tuple of Count
        All that were made.
    """

    shared: str
    kind: str
    tensors: tuple[str, ...]
    attack: str | None
    title: str
    why: str
    rounds: int | None
    silent_rounds: int
    evidence: tuple[str, ...]
    also: tuple[str, ...]
    counts: tuple[Count, ...]

    @property
    def when(self) -> str:
        """In how many rounds, in words."""
        if self.rounds is None:
            return ""
        rounds = "one round" if self.rounds == 1 else f"{self.rounds} rounds"
        return f"{rounds} after the first" if self.silent_rounds else rounds


@dataclass(frozen=True)
class LeakMap:
    """What each choice of shared tensors gives away of one image, by counting.

    ``print`` shows it as text, a notebook as a table. ``rows`` and :meth:`as_dicts` are for
    programs.

    Attributes
    ----------
    model : str
        Its class.
    family : str
        Which library's.
    facts : Facts
        n, p, d and the other numbers.
    rows : tuple of LeakRow
    notes : tuple of str
        What limits the map.
    """

    model: str
    family: str
    facts: Facts
    rows: tuple[LeakRow, ...]
    notes: tuple[str, ...]

    def __getitem__(self, shared: str) -> LeakRow:
        """The row of that name.

        Raises
        ------
        KeyError
            With the names there are.
        """
        for row in self.rows:
            if row.shared == shared:
                return row
        raise KeyError(f"{shared!r} is no row of this map; there are {', '.join(row.shared for row in self.rows)}")

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, for JSON or a data frame."""
        return [asdict(row) for row in self.rows]

    @property
    def heading(self) -> str:
        """The model and its numbers in a line."""
        facts, size = self.facts, "×".join(map(str, self.facts.image_size))
        return (
            f"{self.model} ({self.family}), images of {size}: n = {facts.patches} patches of p = {facts.pixels} "
            f"numbers, width d = {facts.width}, {facts.tokens} tokens"
        )

    def markdown(self, *, kinds: tuple[str, ...] = ("asked", "combination", "group")) -> str:
        """The table in Markdown, with the heading and the notes."""
        lines = [
            self.heading, "",
            "| if only this is shared | closed form | count | rounds | evidence | what else leaks |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in (row for kind in kinds for row in self.rows if row.kind == kind):
            cells = (
                row.shared, f"**{row.title}**" if row.attack else row.title, row.why, row.when or "–",
                "; ".join(row.evidence) or "–", "; ".join(row.also) or "–",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def __str__(self) -> str:
        lines = textwrap.wrap(self.heading, 110)
        for row in self.rows:
            lines += ["", f"{row.shared}: {row.title}{', ' + row.when if row.when else ''}", f"    {row.why}"]
            for name, words in (("evidence", row.evidence), ("also leaks", row.also)):
                if words:
                    lines += textwrap.wrap(
                        f"{name}: {'; '.join(words)}", 110, initial_indent="    ", subsequent_indent="      "
                    )
        for note in self.notes:
            lines += ["", *textwrap.wrap(note, 110)]
        return "\n".join(lines)
