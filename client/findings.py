"""What the doctor (:mod:`client.check`) says: a line for everything that it looked at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mcrage.errors import McrageError

Level = Literal["ok", "note", "problem"]
Line = tuple[Level, str, str]
"""How good or bad it is, what is so, and what to do."""

ASK, INSTALL = "Show this line to the coordinator.", "Install the versions that constraints.txt names."


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        area: What was looked at, such as ``keys``.
        level: ``problem`` where the daemon cannot work, or not safely; ``note`` what somebody should know; else ``ok``.
        text: What is so, and where.
        remedy: What to do; every problem has one.
    """

    area: str
    level: Level
    text: str
    remedy: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether something has to be put right."""
        return self.level == "problem"

    def __str__(self) -> str:
        return f"{self.level:<8}{self.area}: {self.text}" + (f". {self.remedy}" if self.remedy else "")


def contained(area: str, check: Callable[[], Iterator[Line]], remedy: str) -> Iterator[Finding]:
    """What a check finds, and a problem for each line of what it raises; ``remedy`` is for those."""
    try:
        for line in check():
            yield Finding(area, *line)
    except McrageError as error:
        for text in str(error).splitlines():
            yield Finding(area, "problem", text, remedy)
    except ImportError as error:
        yield Finding(area, "problem", f"a library is missing or of another version ({type(error).__name__})", INSTALL)
    except Exception as error:  # noqa: BLE001  # its text may hold a cell, and the other checks still have to run
        yield Finding(area, "problem", f"this check failed unexpectedly ({type(error).__name__})", ASK)
