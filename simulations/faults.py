"""Faults between and at the processes of a deployment: a line that breaks, a clock that is wrong.

For tests of :mod:`simulations.deployed`.
"""

import shutil
import socket
import struct
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

from mcrage.errors import ConfigError

LARGE = 8192
"""Bytes at once: no handshake and no question to the coordinator has as many, every model does."""

# For the dynamic linker: the clock of the machine with seconds added that a file names at every moment.
_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long ahead(void) {
    static volatile long *seconds;
    if (!seconds) {
        int file = open(getenv("CLOCK_AHEAD"), O_RDONLY);
        if (file < 0) return 0;
        seconds = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        close(file);
    }
    return *seconds;
}
int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, now);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (where) *where = exact.tv_sec;
    return exact.tv_sec;
}
"""


class Line:
    """A line between a hospital and the coordinator that breaks in the middle of what is large.

    Args:
        target: The coordinator's port.

    Attributes:
        port: The hospital's end of it.
        to_break: What is broken next, in this order: ``pull`` of the hospital or ``push``.
        broken: What was, and when.
    """

    def __init__(self, target: int) -> None:
        self._target, self._listening = target, socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.to_break: list[str] = []
        self.broken: list[tuple[str, float]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Lets nobody in any more."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, sink, what in ((near, far, "push"), (far, near, "pull")):
                    threading.Thread(target=self._carry, args=(source, sink, what), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, what: str) -> None:
        with suppress(OSError):
            while content := source.recv(2**16):
                if len(content) >= LARGE and self.to_break[:1] == [what]:
                    self.to_break.pop(0)
                    self.broken.append((what, time.monotonic()))
                    sink.sendall(content[: len(content) // 2])
                    # A reset, as from a firewall that forgot the connection, and an end without a word in turn.
                    if len(self.broken) % 2:
                        for each in (source, sink):
                            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                sink.sendall(content)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Clock:
    """A clock that is wrong, and may jump, for the processes that are started with its environment.

    Args:
        folder: Where its library is made; new.

    Raises:
        ConfigError: If there is no C compiler.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise ConfigError("there is no C compiler here to make a wrong clock with")
        self._file, library = folder / "ahead", folder / "clock.so"
        (folder / "clock.c").write_text(_CLOCK)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "clock.c", "-ldl"], check=True)
        self.set(0)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(self._file)}

    def set(self, seconds: int) -> None:
        """So many seconds ahead from now on."""
        if not self._file.exists():
            self._file.write_bytes(bytes(8))
        with self._file.open("r+b") as file:
            file.write(struct.pack("l", seconds))
