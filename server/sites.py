"""Which hospitals belong to the federation: what the coordinator wants, and what Flower and the proxy then know.

``site add`` and its like only write ``sites.json``. The running coordinator brings the SuperLink and the proxy to that
state, and writes which node ids the sites have; so a site can be removed whether or not anything runs.
"""

import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from mcrage import pki
from mcrage.errors import ConfigError
from mcrage.files import lock_file
from mcrage.signing import requested_key
from server.control import Control, Node
from server.home import CoordinatorSettings, Home, SiteEntry, SiteKey, write_json
from server.proxy import Proxy, ProxySite


def add(home: Home, name: str, request: bytes, *, days: int) -> bytes:
    """Lets a new site in; returns its certificate.

    Args:
        home: The coordinator's folder.
        name: Of the site; its request must name it as well.
        request: What ``python -m client enroll`` made, PEM.
        days: How long the certificate shall be valid.

    Raises:
        ConfigError: If there is a site of this name, or the request is not good; every key serves one site only.
    """
    with _changing(home) as sites:
        if name in sites:
            raise ConfigError(f"there is a site {name} already; 'site rotate' gives it another key")
        certificate, key = _issued(home, name, request, days)
        signing_key = requested_key(request).hex()
        owners = [site for site, entry in sites.items() if entry.signing_key == signing_key]
        if owners:
            raise ConfigError(f"site {name}: this signing key is that of site {owners[0]}; every site has its own")
        home.write_sites({**sites, name: SiteEntry(keys=(key,), signing_key=signing_key, added=datetime.now(UTC))})
    return certificate


def rotate(home: Home, name: str, request: bytes, *, days: int) -> bytes:
    """Gives a site another key beside the one that it has; returns the new certificate.

    Both are good until :func:`retire`, so that the site can change over between two rounds.
    """
    with _changing(home) as sites:
        entry = _entry(sites, name)
        certificate, key = _issued(home, name, request, days)
        if requested_key(request).hex() != entry.signing_key:
            lost = "if its secret was lost, remove the site and add it anew under another name"
            raise ConfigError(f"site {name}: the request tells another signing key than the site's; {lost}")
        home.write_sites({**sites, name: entry.model_copy(update={"keys": (*entry.keys, key)})})
    return certificate


def retire(home: Home, name: str) -> int:
    """Takes all keys of a site but the newest out of use; returns how many."""
    with _changing(home) as sites:
        entry = _entry(sites, name)
        _put_out_of_use(home, name, entry.keys[:-1])
        home.write_sites({**sites, name: entry.model_copy(update={"keys": entry.keys[-1:]})})
    return len(entry.keys) - 1


def remove(home: Home, name: str) -> None:
    """Lets a site in no more."""
    with _changing(home) as sites:
        _put_out_of_use(home, name, _entry(sites, name).keys)
        home.write_sites({site: entry for site, entry in sites.items() if site != name})


def proxy_of(home: Home, settings: CoordinatorSettings) -> Proxy:
    """The proxy as the settings and the list of sites want it."""
    return Proxy(
        folder=home.proxy,
        listen=settings.address,
        upstream_port=settings.superlink_port,
        server_certificate=home.pki / "server.crt",
        server_key=home.pki / "server.key",
        ca=home.pki / "ca.crt",
        sites=tuple(
            ProxySite(name, tuple(key.serial for key in entry.keys), tuple(key.public_key for key in entry.keys))
            for name, entry in sorted(home.sites().items())
        ),
        max_body_mb=settings.max_body_mb,
        requests_per_second=settings.requests_per_second,
    )


def reconcile(home: Home, control: Control) -> list[str]:
    """Brings Flower's list of nodes to the coordinator's list of sites; returns what was done, in words.

    A key that Flower does not take keeps no other one out.

    Raises:
        FederationError: If the SuperLink does not answer.
    """
    sites = home.sites()
    wanted = {key.public_key: name for name, entry in sites.items() for key in entry.keys}
    nodes = control.nodes()
    known, done = {node.public_key: node for node in nodes}, []
    for node in nodes:
        if node.public_key not in wanted:
            control.unregister(node.node_id)
            done.append(f"node {node.node_id} is let in no more")
    for public_key, name in wanted.items():
        if public_key not in known:
            try:
                node_id = control.register(public_key, name)
            except ConfigError as error:
                done.append(f"site {name} is not let in: {error}")
                continue
            known[public_key] = Node(node_id, public_key, is_online=False)
            done.append(f"site {name} is node {node_id}")
    registry = _registry(sites, wanted, known)
    if registry != home.read_registry():
        write_json(home.registry, registry)
    return done


def _registry(
    sites: Mapping[str, SiteEntry], wanted: Mapping[str, str], known: Mapping[str, Node]
) -> dict[str, dict[str, Any]]:
    node_ids: dict[str, list[int]] = {name: [] for name in wanted.values()}
    for public_key, name in wanted.items():
        node_ids[name] += [known[public_key].node_id] if public_key in known else []
    return {name: {"node_ids": ids, "signing_key": sites[name].signing_key} for name, ids in node_ids.items()}


@contextmanager
def _changing(home: Home) -> Iterator[dict[str, SiteEntry]]:
    """The list of sites, which nobody else changes meanwhile."""
    lock = lock_file(home.folder / "state" / "sites.lock")
    if lock is None:
        raise ConfigError("another command is changing the list of sites; call it again")
    try:
        yield home.sites()
    finally:
        os.close(lock)


def _entry(sites: Mapping[str, SiteEntry], name: str) -> SiteEntry:
    try:
        return sites[name]
    except KeyError:
        raise ConfigError(f"there is no site {name!r}; 'site list' shows all") from None


def _issued(home: Home, name: str, request: bytes, days: int) -> tuple[bytes, SiteKey]:
    certificate = pki.Authority.open(home.pki).issue_site(request, site=name, days=days)
    public_key = x509.load_pem_x509_certificate(certificate).public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey), "the authority signs no other keys"
    info = pki.describe(certificate)
    text = b64encode(public_key_to_bytes(public_key)).decode()
    used = home.former_keys() | {key.public_key: owner for owner, entry in home.sites().items() for key in entry.keys}
    if text in used:
        # Flower takes every key once, and one that was taken out of use may be in other hands.
        again = "'python -m client enroll --rotate' makes another one"
        raise ConfigError(f"site {name}: this key is or was one of site {used[text]}; {again}")
    return certificate, SiteKey(serial=info.serial, public_key=text, expires=info.not_after)


def _put_out_of_use(home: Home, name: str, keys: Sequence[SiteKey]) -> None:
    """Before it leaves the list: a crash in between shuts a key out too early, never too late."""
    if keys:
        home.write_former_keys(home.former_keys() | {key.public_key: name for key in keys})
