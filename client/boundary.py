"""The one gate of a site: every reply is built here, and nothing else leaves.

An exception's text may hold a patient's data, so it stays in the site's log; the server gets a code and an id.
"""

import logging
import secrets
from collections.abc import Callable

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from mcrage.errors import McrageError, MessageError
from mcrage.messages import Outgoing, SiteError, Wire

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
    return Wire(dict(values["config"]), named)  # type: ignore[arg-type]  # lists and bytes are refused by from_wire


def answer(message: Message, work: Callable[[], Outgoing]) -> Message:
    """The reply to an instruction: what ``work`` gives, or an error as a code and an id."""
    try:
        outgoing = work()
        if not isinstance(outgoing, Outgoing):
            raise TypeError(f"a {type(outgoing).__name__} is not on the list of what may leave a site")
        wire = outgoing.to_wire()
        content = RecordDict(
            {
                "config": ConfigRecord(dict(wire.values)),
                "arrays": ArrayRecord({name: Array(array) for name, array in wire.arrays.items()}),
            }
        )
        return Message(content, reply_to=message)
    except Exception as error:  # noqa: BLE001  # the site's boundary: whatever happened, its text stays here
        site_error = SiteError.of(error, secrets.token_hex(4))
        _LOG.error("%s: %s", site_error, error, exc_info=not isinstance(error, McrageError))
        return Message(Error(site_error.code, site_error.error_id), reply_to=message)
