"""How a hospital joins: keys that never leave it, a private folder, and a request that the coordinator signs."""

import os
import secrets
import ssl
from contextlib import suppress
from pathlib import Path

from client.places import LEDGER, POLICY, SECRET, SIGNING
from client.policy import PrivacyRules, SitePolicy
from client.protection import prepare
from client.settings import SiteSettings
from mcrage.errors import ConfigError, PrivacyError
from mcrage.files import replace_file
from mcrage.pki import site_request
from mcrage.privacy.keyed import KEY_BYTES, read_secret
from mcrage.signing import as_extension, public_key


def enrol(settings: SiteSettings, *, declared_patients: int) -> list[str]:
    """Makes what is missing and says what to do next; what is there is left as it is.

    Args:
        settings: Of the site.
        declared_patients: Public number of training patients, for a policy that is made here.

    Raises:
        ConfigError: If the site has keys already.
        PrivacyError: If it has a secret and no ledger: with a new one, all that was ever spent would be forgotten.
    """
    server = settings.server
    taken = [str(path) for path in (server.key, server.node_key) if path.exists()]
    if taken:
        raise ConfigError(f"{', '.join(taken)}: there is a key already; 'enroll --rotate' makes another one")
    private, lines = settings.site.private, []
    # First, so that what fails here can be tried again.
    if not (private / LEDGER).exists():
        if (private / SECRET).exists():
            raise PrivacyError(f"'{private}' has a secret and no ledger: bring ledger and witness back from a backup")
        prepare(private, SitePolicy(privacy=PrivacyRules(declared_patients=declared_patients)))
        lines = [f"3. Read {private / POLICY} and change what your hospital does not allow."]
    _make_folder(server.key.parent)
    signing = public_key(read_secret(private / SECRET))
    replace_file(server.key.with_name(SIGNING), f"{signing.hex()}\n".encode(), mode=0o644)
    request_file = _new_keys(settings, key=server.key, node_key=server.node_key)
    if not settings.daemon.secret.exists():
        _make_folder(settings.daemon.secret.parent)
        replace_file(settings.daemon.secret, secrets.token_bytes(32), mode=0o640)
    return [
        f"1. Send {request_file} to the coordinator, over a way that you trust; it is not secret.",
        f"2. Put what comes back at {server.certificate} and the federation's ca.crt at {server.ca}.",
        *lines,
        f"Then: python -m client check {settings.file}",
    ]


def renew(settings: SiteSettings) -> list[str]:
    """Makes another key beside the one in use, for a change from one to the other; :func:`change_over` does that.

    Raises:
        ConfigError: If there is no key yet, or another one is waiting for its certificate already.
    """
    server = settings.server
    if not server.key.exists():
        raise ConfigError(f"'{server.key}' is missing: there is no key to change; 'enroll' makes the first one")
    if _next(server.key).exists():
        raise ConfigError(f"'{_next(server.key)}' is there already and waits for its certificate; remove it if not")
    request_file = _new_keys(settings, key=_next(server.key), node_key=_next(server.node_key))
    return [
        f"1. Send {request_file} to the coordinator ('site rotate' there).",
        f"2. Put what comes back at {_next(server.certificate)}.",
        f"Then: python -m client enroll --change-over {settings.file}, and start the daemon again",
    ]


def change_over(settings: SiteSettings) -> list[str]:
    """Puts the new key and certificate in the place of the old ones, which are kept beside them.

    Raises:
        ConfigError: If one of the new files is missing, or the certificate is not for the new key.
    """
    files = (settings.server.certificate, settings.server.key, settings.server.node_key)
    missing = [str(_next(path)) for path in files if not _next(path).exists()]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not there yet")
    try:
        ssl.create_default_context().load_cert_chain(_next(files[0]), _next(files[1]))
    except (OSError, ssl.SSLError):
        raise ConfigError(f"'{_next(files[0])}' is not the certificate of '{_next(files[1])}'") from None
    for path in files:
        if path.exists():
            path.replace(path.with_name(path.name + ".old"))
        _next(path).replace(path)
    return ["the new key is in use from the next start of the daemon; tell the coordinator ('site retire' there)"]


def _next(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _new_keys(settings: SiteSettings, *, key: Path, node_key: Path) -> Path:
    made = site_request(settings.site.name, as_extension(_signing_key(settings)))
    replace_file(key, made.key_pem)
    replace_file(node_key, made.openssh_key)
    request = settings.server.key.with_name(f"{settings.site.name}.csr")
    replace_file(request, made.request_pem, mode=0o644)
    return request


def _signing_key(settings: SiteSettings) -> bytes:
    path = settings.server.key.with_name(SIGNING)
    with suppress(OSError, ValueError):
        if len(key := bytes.fromhex(path.read_text(encoding="ascii"))) == KEY_BYTES:
            return key
    raise ConfigError(f"'{path}' is missing or damaged: bring it back from a backup; 'enroll' wrote it")


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    if folder.stat().st_uid == os.getuid() and folder.stat().st_mode & 0o007:
        raise ConfigError(f"'{folder}' holds keys and is open to others: chmod 750")
