"""Sites that come, change their keys and go: in the list, at a real SuperLink, and for the proxy."""

import hashlib
import os
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key, load_ssh_private_key
from cryptography.x509.oid import NameOID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from mcrage.errors import ConfigError, FederationError
from mcrage.files import lock_file
from mcrage.pki import SiteRequest, describe, site_request, verify
from mcrage.signing import as_extension, public_key
from server import sites
from server.control import Control
from server.home import CoordinatorSettings, Home
from server.registry import read_registry

NewHome = Callable[[Path], Home]
SuperLinkOf = Callable[[Home], AbstractContextManager[Control]]


@pytest.fixture
def home(tmp_path: Path, new_home: NewHome) -> Home:
    return new_home(tmp_path / "home")


@pytest.fixture(scope="module")
def live_home(tmp_path_factory: pytest.TempPathFactory, new_home: NewHome) -> Home:
    """The folder of a SuperLink that runs, without any site."""
    return new_home(tmp_path_factory.mktemp("sites") / "home")


@pytest.fixture(scope="module")
def superlink(live_home: Home, superlink_of: SuperLinkOf) -> Iterator[Control]:
    with superlink_of(live_home) as control:
        yield control


@pytest.fixture
def live(live_home: Home, superlink: Control) -> Iterator[tuple[Home, Control]]:
    yield live_home, superlink
    for name in live_home.sites():
        sites.remove(live_home, name)
    sites.reconcile(live_home, superlink)


def header(made: SiteRequest) -> str:
    key = load_ssh_private_key(made.openssh_key, None).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return b64encode(public_key_to_bytes(key)).decode()


def asked(name: str, secret: str = "") -> SiteRequest:
    """What enrolment makes; by default every site has a secret of its own."""
    return site_request(name, as_extension(public_key(hashlib.sha256((secret or name).encode()).digest())))


def request_of(key_pem: bytes, name: str) -> bytes:
    """A request of another name with a key that there is."""
    key = load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    return built.public_bytes(Encoding.PEM)


def added(home: Home, name: str) -> SiteRequest:
    made = asked(name)
    sites.add(home, name, made.request_pem, days=30)
    return made


def rotated(home: Home, name: str) -> SiteRequest:
    made = asked(name)
    sites.rotate(home, name, made.request_pem, days=30)
    return made


def keys(home: Home, name: str) -> list[str]:
    return [key.public_key for key in home.sites()[name].keys]


def files(home: Home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.folder.glob("*.json")}


def test_a_site_gets_a_certificate_for_the_key_that_it_made(home: Home) -> None:
    made = asked("hosp-a")
    certificate = sites.add(home, "hosp-a", made.request_pem, days=30)
    verify(certificate, (home.pki / "ca.crt").read_bytes(), purpose="site")
    (key,) = home.sites()["hosp-a"].keys
    info = describe(certificate)
    assert info.subject == "hosp-a"
    assert info.days_left in (29, 30)
    assert (key.serial, key.expires) == (info.serial, info.not_after)
    assert key.public_key == header(made), "what its SuperNode will show"


def test_a_site_is_added_once(home: Home) -> None:
    added(home, "hosp-a")
    before = files(home)
    with pytest.raises(ConfigError, match="there is a site hosp-a already; 'site rotate' gives it another key"):
        added(home, "hosp-a")
    assert files(home) == before


@pytest.mark.parametrize("name", ["../x", "", "A", "a b", "a" * 65, "CON", "a\n", "-a", "a;"])
def test_a_name_that_is_none_is_refused(home: Home, name: str) -> None:
    before = files(home)
    with pytest.raises(ConfigError, match="a site's name is"):
        sites.add(home, name, asked("hosp-a").request_pem, days=30)
    assert files(home) == before


@pytest.mark.parametrize(
    ("request_pem", "days", "told"),
    [
        (asked("hosp-b").request_pem, 30, "the request is for 'hosp-b' and not for 'hosp-a'"),
        (b"no request", 30, "no signing request"),
        (asked("hosp-a").key_pem, 30, "no signing request"),
        (site_request("hosp-a").request_pem, 30, "the request tells no signing key of the site"),
        (asked("hosp-a").request_pem, 0, "1 to 825 days"),
        (asked("hosp-a").request_pem, 826, "1 to 825 days"),
    ],
    ids=["another name", "garbage", "a key", "no signing key", "no days", "too many days"],
)
def test_a_request_that_is_not_good_changes_nothing(home: Home, request_pem: bytes, days: int, told: str) -> None:
    before = files(home)
    with pytest.raises(ConfigError, match=told) as refused:
        sites.add(home, "hosp-a", request_pem, days=days)
    assert "\n" not in str(refused.value)
    assert files(home) == before
    added(home, "hosp-a")
    for change in (sites.rotate, sites.add):
        with pytest.raises(ConfigError):
            change(home, "hosp-a", request_pem, days=days)
    assert len(keys(home, "hosp-a")) == 1


def test_a_site_has_both_keys_while_one_replaces_the_other(home: Home) -> None:
    old, new = added(home, "hosp-a"), rotated(home, "hosp-a")
    assert keys(home, "hosp-a") == [header(old), header(new)]
    assert sites.retire(home, "hosp-a") == 1
    assert keys(home, "hosp-a") == [header(new)]
    assert sites.retire(home, "hosp-a") == 0
    assert keys(home, "hosp-a") == [header(new)]


def test_a_key_serves_once_only(home: Home) -> None:
    """Flower takes a key no second time, and one that was put out of use may be in other hands."""
    old, _, gone = added(home, "hosp-a"), rotated(home, "hosp-a"), added(home, "hosp-b")
    told = "site hosp-a: this key is or was one of site hosp-a; 'python -m client enroll --rotate' makes another one"
    for _ in ("in use", "retired"):
        with pytest.raises(ConfigError) as refused:
            sites.rotate(home, "hosp-a", old.request_pem, days=30)
        assert str(refused.value) == told
        sites.retire(home, "hosp-a")
    sites.remove(home, "hosp-b")
    for name in ("hosp-b", "hosp-c"):
        with pytest.raises(ConfigError, match=f"site {name}: this key is or was one of site hosp-b"):
            sites.add(home, name, request_of(gone.key_pem, name), days=30)
    with pytest.raises(ConfigError, match="this key is or was one of site hosp-a"):
        sites.add(home, "hosp-d", request_of(old.key_pem, "hosp-d"), days=30)
    assert list(home.sites()) == ["hosp-a"]
    added(home, "hosp-b")  # the name may come back with another key


def test_a_site_keeps_the_key_by_which_its_replies_are_checked(home: Home) -> None:
    """Whoever could put another one in its place could answer for it."""
    added(home, "hosp-a")
    before = home.sites()["hosp-a"]
    with pytest.raises(ConfigError, match="site hosp-a: the request tells another signing key than the site's"):
        sites.rotate(home, "hosp-a", asked("hosp-a", secret="another").request_pem, days=30)
    rotated(home, "hosp-a")
    assert home.sites()["hosp-a"].signing_key == before.signing_key
    with pytest.raises(ConfigError, match="site hosp-b: this signing key is that of site hosp-a"):
        sites.add(home, "hosp-b", asked("hosp-b", secret="hosp-a").request_pem, days=30)
    assert list(home.sites()) == ["hosp-a"]
    sites.remove(home, "hosp-a")
    added(home, "hosp-a")
    assert home.sites()["hosp-a"].signing_key == before.signing_key, "a site that comes back is the same one"


def test_a_site_that_is_not_there_cannot_be_changed(home: Home) -> None:
    for change in (sites.retire, sites.remove):
        with pytest.raises(ConfigError, match="there is no site 'hosp-z'; 'site list' shows all"):
            change(home, "hosp-z")
    with pytest.raises(ConfigError, match="there is no site 'hosp-z'"):
        rotated(home, "hosp-z")
    assert not home.former_keys()


def test_a_damaged_list_is_not_replaced_by_a_shorter_one(home: Home) -> None:
    home.list_of_sites.write_text("{")
    for change in (added, rotated, sites.retire, sites.remove):
        with pytest.raises(ConfigError, match=r"sites\.json"):
            change(home, "hosp-a")
    assert home.list_of_sites.read_text() == "{"


def test_two_commands_at_once_lose_no_site(home: Home) -> None:
    lock = lock_file(home.folder / "state" / "sites.lock")
    assert lock is not None
    for change in (added, rotated, sites.retire, sites.remove):
        with pytest.raises(ConfigError, match="another command is changing the list of sites; call it again"):
            change(home, "hosp-a")
    os.close(lock)
    added(home, "hosp-a")


def test_the_proxy_knows_serials_and_keys_of_every_site(home: Home) -> None:
    old, new, other = added(home, "hosp-b"), rotated(home, "hosp-b"), added(home, "hosp-a")
    settings = CoordinatorSettings(names=("localhost",), listen="127.0.0.1:1", max_body_mb=9, requests_per_second=7)
    proxy = sites.proxy_of(home, settings)
    assert [site.name for site in proxy.sites] == ["hosp-a", "hosp-b"]
    assert [site.public_keys for site in proxy.sites] == [(header(other),), (header(old), header(new))]
    assert [len(site.serials) for site in proxy.sites] == [1, 2]
    assert (proxy.listen, proxy.max_body_mb, proxy.requests_per_second) == (("127.0.0.1", 1), 9, 7)
    assert proxy.render()


def test_flower_gets_the_sites_and_the_registry_their_nodes(live: tuple[Home, Control]) -> None:
    home, control = live
    added(home, "hosp-a")
    added(home, "hosp-b")
    done = sites.reconcile(home, control)
    by_key = {node.public_key: node.node_id for node in control.nodes()}
    nodes = {name: [by_key[key] for key in keys(home, name)] for name in home.sites()}
    assert done == [f"site {name} is node {node_ids[0]}" for name, node_ids in nodes.items()]
    assert home.read_registry() == {
        name: {"node_ids": node_ids, "signing_key": home.sites()[name].signing_key} for name, node_ids in nodes.items()
    }
    registry = read_registry(home.registry)
    assert registry.site_of == {nodes["hosp-a"][0]: "hosp-a", nodes["hosp-b"][0]: "hosp-b"}
    assert {signer.site: signer.public_key.hex() for signer in registry.signers.values()} == {
        name: entry.signing_key for name, entry in home.sites().items()
    }
    written = home.registry.stat()
    assert sites.reconcile(home, control) == []
    assert home.registry.stat() == written


def test_a_node_that_was_registered_by_hand_is_thrown_out(live: tuple[Home, Control]) -> None:
    home, control = live
    own = added(home, "hosp-a")
    sites.reconcile(home, control)
    foreign = control.register(header(asked("hosp-x")), "hosp-a")
    assert sites.reconcile(home, control) == [f"node {foreign} is let in no more"]
    assert [node.public_key for node in control.nodes()] == [header(own)]


def test_a_removed_site_is_unregistered_and_leaves_the_registry(live: tuple[Home, Control]) -> None:
    home, control = live
    added(home, "hosp-a")
    stays = added(home, "hosp-b")
    sites.reconcile(home, control)
    (node_id,) = home.read_registry()["hosp-a"]["node_ids"]
    sites.remove(home, "hosp-a")
    assert sites.reconcile(home, control) == [f"node {node_id} is let in no more"]
    assert [node.public_key for node in control.nodes()] == [header(stays)]
    assert list(home.read_registry()) == ["hosp-b"]


def test_a_site_is_two_nodes_while_it_changes_its_key_the_newest_last(live: tuple[Home, Control]) -> None:
    home, control = live
    added(home, "hosp-a")
    sites.reconcile(home, control)
    (old,) = home.read_registry()["hosp-a"]["node_ids"]
    rotated(home, "hosp-a")
    sites.reconcile(home, control)
    both = home.read_registry()["hosp-a"]["node_ids"]
    assert (len(both), both[0]) == (2, old)
    sites.retire(home, "hosp-a")
    assert sites.reconcile(home, control) == [f"node {old} is let in no more"]
    assert home.read_registry()["hosp-a"]["node_ids"] == both[1:]
    assert [node.node_id for node in control.nodes()] == both[1:]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"hosp-z": {"node_ids": [1]}}'])
def test_a_registry_that_is_damaged_is_made_anew(live: tuple[Home, Control], content: bytes | None) -> None:
    home, control = live
    added(home, "hosp-a")
    sites.reconcile(home, control)
    good = home.registry.read_bytes()
    home.registry.unlink() if content is None else home.registry.write_bytes(content)
    assert sites.reconcile(home, control) == []
    assert home.registry.read_bytes() == good


def test_a_key_that_flower_does_not_take_keeps_no_other_site_out(live: tuple[Home, Control]) -> None:
    home, control = live
    burnt = asked("hosp-a")
    control.unregister(control.register(header(burnt), "hosp-a"))
    sites.add(home, "hosp-a", burnt.request_pem, days=30)
    added(home, "hosp-b")
    refused, let_in = sites.reconcile(home, control)
    assert refused == (
        "site hosp-a is not let in: the SuperLink refused to register site hosp-a (HTTP 412, Flower's code 23)"
    )
    (node,) = control.nodes()
    assert let_in == f"site hosp-b is node {node.node_id}"
    assert {name: entry["node_ids"] for name, entry in home.read_registry().items()} == {
        "hosp-a": [],
        "hosp-b": [node.node_id],
    }
    assert read_registry(home.registry).site_of == {node.node_id: "hosp-b"}


def test_without_a_superlink_the_registry_stays_as_it_is(home: Home) -> None:
    added(home, "hosp-a")
    control, before = Control(home.settings.superlink_port, home.pki / "ca.crt"), home.registry.read_bytes()
    with pytest.raises(FederationError, match="does not answer"):
        sites.reconcile(home, control)
    control.close()
    assert home.registry.read_bytes() == before
