"""The one gate of a site: every reply is built here, and nothing else leaves.

An exception's text may hold a patient's data, so it stays in a file of the site; the server gets a code and an id.
"""

import errno
import logging
import os
import secrets
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from mcrage.errors import MessageError
from mcrage.messages import Outgoing, SiteError
from mcrage.wire import Wire, packed, unpacked

_LOG = logging.getLogger("mcrage.site")


def incoming(message: Message) -> Wire:
    """The plain data of an instruction.

    Raises:
        MessageError: If it does not consist of one record of values and at most one of arrays.
    """
    values, arrays = message.content.config_records, message.content.array_records
    if set(values) != {"config"} or not set(arrays) <= {"arrays"} or message.content.metric_records:
        raise MessageError("expected a record 'config' and at most a record 'arrays'")
    named = {name: array.numpy() for name, array in arrays.get("arrays", ArrayRecord()).items()}
    return unpacked(Wire(dict(values["config"]), named))  # type: ignore[arg-type]  # from_wire refuses lists and bytes


def answer(
    message: Message,
    work: Callable[[], Outgoing],
    *,
    sign: Callable[[Wire, str], Wire] | None = None,
    log: Path | None = None,
) -> Message:
    """The reply to an instruction: what ``work`` gives, or an error as a code and an id.

    Args:
        message: The instruction.
        work: Does it.
        sign: Signs the reply to the instruction with an id; None where there is nothing to sign with.
        log: File of the hospital's own that gets the text of an error; without one the text is lost.
    """
    try:
        outgoing = work()
        if not isinstance(outgoing, Outgoing):
            raise TypeError(f"a {type(outgoing).__name__} is not on the list of what may leave a site")
        wire = packed(outgoing.to_wire())
        if sign is not None:
            wire = sign(wire, message.metadata.message_id)
        content = RecordDict(
            {
                "config": ConfigRecord(dict(wire.values)),
                "arrays": ArrayRecord({name: Array(array) for name, array in wire.arrays.items()}),
            }
        )
        return Message(content, reply_to=message)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # without whatever text it had
    except BaseException as error:  # noqa: BLE001  # the site's boundary: whatever happened, its text stays here
        site_error = SiteError.of(_want_of_memory(error), secrets.token_hex(4))
        # What a program logs may be sent on by whatever runs it: the text goes to the hospital's own file alone.
        _LOG.error("%s", site_error)
        keep_text(log, site_error.error_id, error)
        return Message(Error(site_error.code, site_error.error_id), reply_to=message)


def refuse(kind: str) -> Outgoing:
    """Raises for an instruction that the site does not know.

    Raises:
        MessageError: Always.
    """
    raise MessageError(f"there is no instruction {kind[:40]!r}")


def _want_of_memory(error: BaseException) -> BaseException:
    """A MemoryError in the place of torch's, which is a RuntimeError."""
    words = ("allocate memory", "out of memory")
    is_torch = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return MemoryError() if is_torch else error


def keep_text(log: Path | None, error_id: str, error: BaseException) -> None:
    """Adds an error with all its text to a file that only its owner reads; says so where it cannot."""
    if log is None:
        return
    text = "".join(traceback.format_exception(error))
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now(UTC).isoformat()} error {error_id}\n{text}\n")
    except OSError as failed:
        _LOG.error("error %s: its text could not be kept (%s)", error_id, errno.errorcode.get(failed.errno or 0, "?"))
