"""The daemon of a hospital: Flower's SuperNode and the runner, kept alive until it is told to end."""

import logging
import os
import sys
from contextlib import ExitStack

from client.node import QUIET, require_flower
from client.places import DAEMON_LOCK
from client.settings import SiteSettings, parts_of
from mcrage.errors import ConfigError
from mcrage.files import lock_file
from mcrage.supervision import Program, Supervisor

_LOG = logging.getLogger("mcrage.daemon")

_RESTART_SECONDS = 5.0


def run_daemon(settings: SiteSettings, *, only: str = "both") -> int:
    """Runs the daemon until SIGTERM; returns its exit code.

    Args:
        settings: Of the site.
        only: ``network`` or ``data`` for one half, where two users run the two; ``both`` otherwise.

    Raises:
        ConfigError: If another daemon of this site is running, or Flower is of another version.
    """
    parts = parts_of(only)
    require_flower()
    name, server = settings.site.name, settings.server.address
    with ExitStack() as locks:
        for part in parts:
            locks.callback(os.close, _lock(settings, part))
        _LOG.info("site %s: %s of the daemon, server %s", name, " and ".join(parts), server)
        code = Supervisor([_program(settings, part) for part in parts]).run()
    _LOG.info("site %s: ended", name)
    return code


def _lock(settings: SiteSettings, part: str) -> int:
    """So that no second daemon starts another trainer, or another node with the same key."""
    folder = settings.site.private if part == "data" else settings.server.key.parent
    try:
        lock = lock_file(folder / DAEMON_LOCK.format(part=part))
    except OSError as error:
        raise ConfigError(f"'{folder}' cannot be used: {error.strerror}; 'python -m client enroll' makes it") from None
    if lock is None:
        raise ConfigError(f"another daemon of site {settings.site.name} is running")
    return lock


def _program(settings: SiteSettings, part: str) -> Program:
    module = "client.node" if part == "network" else "client.runner"
    # What goes between the two halves stays on this machine, whatever proxy the hospital has.
    loopback = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1")))
    environment = os.environ | QUIET | {"NO_PROXY": loopback, "no_proxy": loopback, "PYTHONUNBUFFERED": "1"}
    return Program(
        name=f"the {part} process",
        command=[sys.executable, "-m", module, str(settings.file.absolute())],
        environment=environment,
        # Flower turns a node away for up to a minute after it was lost; it is tried until it is let in.
        restart_seconds=_RESTART_SECONDS,
    )
