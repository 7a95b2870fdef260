"""The federation's certificates: what is written, issued and refused; test_pki_cli uses them over TLS."""

import os
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import assume, given
from hypothesis import strategies as st

from mcrage.errors import ConfigError
from mcrage.pki import Authority, SiteRequest, describe, site_request, verify, write_atomically

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
NAMES = ["fed.example.org", "10.0.0.5"]
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("pki"), name="Federation")
    made.issue_server(NAMES)
    return made


@pytest.fixture
def fresh(tmp_path: Path) -> Authority:
    """An authority of the same name that a test may spoil."""
    return Authority.create(tmp_path / "pki", name="Federation")


@pytest.fixture(scope="module")
def site() -> SiteRequest:
    return site_request("hosp-a")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def extensions(pem: bytes) -> dict[str, x509.Extension[x509.ExtensionType]]:
    found = x509.load_pem_x509_certificate(pem).extensions
    return {type(extension.value).__name__: extension for extension in found}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        made = Authority.create(tmp_path / "new", name="Federation")
        made.issue_server(NAMES)
        made.renew()
    finally:
        os.umask(before)
    modes = {path.name: mode(path) for path in made.folder.iterdir()}
    assert modes == {"ca.key": 0o600, "ca.crt": 0o644, "server.key": 0o600, "server.crt": 0o644}
    assert mode(made.folder) == 0o700


@pytest.mark.parametrize("left", [("ca.key", "ca.crt"), ("ca.key",), ("ca.crt",)])
def test_a_second_create_never_overwrites(fresh: Authority, left: tuple[str, ...]) -> None:
    for name in {"ca.key", "ca.crt"} - set(left):
        (fresh.folder / name).unlink()
    before = {path.name: path.read_bytes() for path in fresh.folder.iterdir()}
    with pytest.raises(ConfigError, match=f"{left[0]}' is there already and is never replaced"):
        Authority.create(fresh.folder, name="Another")
    assert {path.name: path.read_bytes() for path in fresh.folder.iterdir()} == before
    assert set(before) == set(left)
    (fresh.folder / "link").mkdir(mode=0o700)
    (fresh.folder / "link" / "ca.key").symlink_to(fresh.folder / "elsewhere")
    with pytest.raises(ConfigError, match="there already"):
        Authority.create(fresh.folder / "link", name="Another")
    assert not (fresh.folder / "elsewhere").exists()


def test_an_empty_folder_is_made_private_and_a_shared_one_is_left_alone(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    assert mode(Authority.create(shared, name="Federation").folder) == 0o700
    for name in ("ca.key", "ca.crt"):
        (shared / name).rename(shared / f"former {name}")
    shared.chmod(0o755)
    with pytest.raises(ConfigError, match=r"\(mode 0755\); run chmod 700, or name a new folder"):
        Authority.create(shared, name="Federation")
    assert mode(shared) == 0o755
    assert not (shared / "ca.key").exists()
    with pytest.raises(ConfigError, match="cannot be used: File exists"):
        Authority.create(shared / "former ca.crt", name="Federation")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x1b[31m", "x" * 65])
def test_a_name_that_no_certificate_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 64 printable characters"):
        Authority.create(tmp_path / "pki", name=name)
    assert not (tmp_path / "pki").exists()


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_may_use_or_that_is_missing_is_refused(fresh: Authority, loose: int) -> None:
    (fresh.folder / "ca.key").chmod(loose)
    with pytest.raises(ConfigError, match=rf"ca\.key' \(mode {loose:04o}\); run chmod 600"):
        Authority.open(fresh.folder)
    (fresh.folder / "ca.key").chmod(0o400)
    assert Authority.open(fresh.folder) == fresh
    for name in ("ca.key", "ca.crt"):
        (fresh.folder / name).unlink()
        with pytest.raises(ConfigError, match=f"{name}' cannot be used: No such file"):
            Authority.open(fresh.folder)


def test_what_makes_no_authority_together_is_refused(fresh: Authority, authority: Authority) -> None:
    fresh.issue_server(NAMES)
    pairs = [(authority.folder / "ca.key", "ca.crt"), (fresh.folder / "server.key", "server.crt")]
    for key, certificate in [(key.read_bytes(), (fresh.folder / name).read_bytes()) for key, name in pairs]:
        write_atomically(fresh.folder / "ca.key", key, mode=0o600)
        write_atomically(fresh.folder / "ca.crt", certificate, mode=0o644)
        with pytest.raises(ConfigError, match=r"ca\.crt' is not the certificate of 'ca\.key'"):
            Authority.open(fresh.folder)
    write_atomically(fresh.folder / "ca.crt", b"garbage", mode=0o644)
    with pytest.raises(ConfigError, match=r"ca\.crt': expected a certificate in PEM form"):
        Authority.open(fresh.folder)


def test_a_key_of_another_kind_or_with_a_passphrase_is_refused(fresh: Authority) -> None:
    pem, pkcs8 = forms.Encoding.PEM, forms.PrivateFormat.PKCS8
    key = forms.load_pem_private_key((fresh.folder / "ca.key").read_bytes(), None)
    locked = key.private_bytes(pem, pkcs8, forms.BestAvailableEncryption(b"passphrase"))
    other_kind = rsa.generate_private_key(65537, 2048).private_bytes(pem, pkcs8, forms.NoEncryption())
    for content in (b"garbage", b"", locked, other_kind):
        write_atomically(fresh.folder / "ca.key", content, mode=0o600)
        with pytest.raises(ConfigError, match="no elliptic-curve key in PEM form without passphrase"):
            Authority.open(fresh.folder)


def test_no_representation_shows_a_key(authority: Authority, site: SiteRequest) -> None:
    assert b"PRIVATE" in site.key_pem
    assert "CERTIFICATE REQUEST" in repr(site)
    for shown in (repr(site), repr(authority), f"{site} {authority}"):
        assert "PRIVATE" not in shown
        assert "_key" not in shown


def test_every_certificate_says_what_it_has_to_and_nothing_else(authority: Authority, site: SiteRequest) -> None:
    own = extensions(authority.certificate_pem)
    server = extensions((authority.folder / "server.crt").read_bytes())
    hospital = extensions(authority.issue_site(site.request_pem, site="hosp-a"))
    assert set(own) == {"BasicConstraints", "KeyUsage", "SubjectKeyIdentifier"}
    assert set(hospital) == {*own, "ExtendedKeyUsage", "AuthorityKeyIdentifier"}
    assert set(server) == {*hospital, "SubjectAlternativeName"}
    assert own["BasicConstraints"].value == x509.BasicConstraints(ca=True, path_length=0)
    allowed = {"digital_signature": False, "content_commitment": False, "key_encipherment": False}
    allowed |= {"data_encipherment": False, "key_agreement": False, "encipher_only": False, "decipher_only": False}
    assert own["KeyUsage"].value == x509.KeyUsage(**allowed, key_cert_sign=True, crl_sign=True)
    allowed["digital_signature"] = True
    for leaf, use in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (hospital, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert leaf["BasicConstraints"].value == x509.BasicConstraints(ca=False, path_length=None)
        assert leaf["KeyUsage"].value == x509.KeyUsage(**allowed, key_cert_sign=False, crl_sign=False)
        assert leaf["ExtendedKeyUsage"].value == x509.ExtendedKeyUsage([use])
    for found in (own, server, hospital):
        assert {name for name in found if found[name].critical} == {"BasicConstraints", "KeyUsage"}
    assert (authority.folder / "server.crt").read_bytes().count(b"BEGIN") == 1


def test_a_site_certificate_names_the_site_from_five_minutes_ago_on(authority: Authority, site: SiteRequest) -> None:
    pems = [authority.issue_site(site.request_pem, site="hosp-a", days=30, at=NOW) for _ in range(50)]
    issued = [x509.load_pem_x509_certificate(pem) for pem in pems]
    assert {certificate.subject.rfc4514_string() for certificate in issued} == {"CN=hosp-a"}
    start = NOW.replace(microsecond=0) - timedelta(minutes=5)
    assert {certificate.not_valid_before_utc for certificate in issued} == {start}
    assert {certificate.not_valid_after_utc - start for certificate in issued} == {timedelta(days=30, minutes=5)}
    assert len({certificate.serial_number for certificate in issued}) == 50
    assert max(certificate.serial_number for certificate in issued).bit_length() > 150


def test_names_of_a_server_are_told_apart_and_given_once(fresh: Authority) -> None:
    info = fresh.issue_server(["Fed.Example.ORG", "fed.example.org", "LOCALHOST", "0:0::1", "10.0.0.5"])
    assert info.names == ("fed.example.org", "localhost", "::1", "10.0.0.5", "127.0.0.1")
    names = extensions((fresh.folder / "server.crt").read_bytes())["SubjectAlternativeName"].value
    assert isinstance(names, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert fresh.issue_server([]).names == ("localhost", "127.0.0.1", "::1")
    long = ".".join(["a" * 60, "example", "org"])
    assert fresh.issue_server([long]).names[0] == long
    assert fresh.issue_server([long]).subject == "localhost", "a common name has 64 characters at most"


NO_NAMES = ["", " ", "https://fed.example.org", "fed.example.org:9092", "*.example.org", "fed_1", "-a", "a-", "a..b"]
NO_NAMES += ["a.b.", "10.0.0.256", "10.0.0", "fe80::1%eth0", "a" * 64, ".".join(["a" * 60] * 5), "a.org\n", "ä.org"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_a_server_is_refused(authority: Authority, name: str) -> None:
    before = (authority.folder / "server.crt").read_bytes()
    with pytest.raises(ConfigError, match="the names of a server are a list, got the text"):
        authority.issue_server(name)
    with pytest.raises(ConfigError, match="is no host name or IP address") as caught:
        authority.issue_server([name])
    assert "\n" not in str(caught.value)
    assert (authority.folder / "server.crt").read_bytes() == before


def test_renewing_keeps_the_names_and_takes_a_new_key(fresh: Authority) -> None:
    with pytest.raises(ConfigError, match=r"no '.*server\.crt' to renew; issue a server certificate first"):
        fresh.renew()
    first, key = fresh.issue_server(NAMES, days=10, at=NOW), (fresh.folder / "server.key").read_bytes()
    second = fresh.renew(days=20, at=NOW)
    assert second == describe((fresh.folder / "server.crt").read_bytes())
    assert (second.names, second.not_after - first.not_after) == (first.names, timedelta(days=10))
    assert second.public_key_fingerprint != first.public_key_fingerprint
    assert second.serial != first.serial
    assert (fresh.folder / "server.key").read_bytes() != key
    assert sorted(path.name for path in fresh.folder.iterdir()) == ["ca.crt", "ca.key", "server.crt", "server.key"]


def test_a_write_replaces_in_one_step_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first", mode=0o600)
    with path.open("rb") as held:
        write_atomically(path, b"second", mode=0o640)
        assert held.read() == b"first", "a reader never sees half of it"
    assert (path.read_bytes(), mode(path)) == (b"second", 0o640)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for place in (tmp_path / "folder", tmp_path / "absent" / "file"):
        with pytest.raises(ConfigError, match="cannot be used"):
            write_atomically(place, b"third", mode=0o600)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("days", [0, -1, 826, 10**6])
def test_a_life_too_long_or_none_is_refused(authority: Authority, site: SiteRequest, days: int) -> None:
    calls = [lambda: authority.issue_server(NAMES, days=days), lambda: authority.renew(days=days)]
    for issue in [*calls, lambda: authority.issue_site(site.request_pem, site="hosp-a", days=days)]:
        with pytest.raises(ConfigError, match=f"valid for 1 to 825 days, got {days:,}"):
            issue()
    assert describe(authority.issue_site(site.request_pem, site="hosp-a", days=825, at=NOW), at=NOW).days_left == 825


def test_nothing_outlives_its_authority(tmp_path: Path, site: SiteRequest) -> None:
    made = Authority.create(tmp_path / "pki", name="Federation", days=10, at=NOW)
    longest = describe(made.issue_site(site.request_pem, site="hosp-a", days=10, at=NOW))
    assert longest.not_after == describe(made.certificate_pem).not_after
    for days, later in ((11, 0), (10, 1)):
        at = NOW + timedelta(seconds=later)
        with pytest.raises(ConfigError, match=r"would outlive its authority, which ends on 2.*; ask for fewer days"):
            made.issue_site(site.request_pem, site="hosp-a", days=days, at=at)
        with pytest.raises(ConfigError, match="would outlive"):
            made.issue_server(NAMES, days=days, at=at)
    assert not (made.folder / "server.key").exists()


def asked(*names: str, key: PrivateKey | None = None, also: x509.ExtensionType | None = None) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder if also is None else builder.add_extension(also, critical=True)
    return builder.sign(key or ec.generate_private_key(ec.SECP384R1()), hashes.SHA384()).public_bytes(
        forms.Encoding.PEM
    )


def with_another_key(pem: bytes) -> bytes:
    """The same request, in which the key was exchanged after it was signed."""
    request = x509.load_pem_x509_csr(pem)
    form = forms.Encoding.X962, forms.PublicFormat.UncompressedPoint
    others = x509.load_pem_x509_csr(asked("hosp-b"))
    points = [each.public_key().public_bytes(*form) for each in (request, others)]
    der = request.public_bytes(forms.Encoding.DER).replace(*points)
    return x509.load_der_x509_csr(der).public_bytes(forms.Encoding.PEM)


def long_name() -> bytes:
    with pytest.warns(UserWarning, match="length must be"):
        return asked("a" * 5000)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "other name": (lambda: asked("hosp-b"), "for 'hosp-b' and not for 'hosp-a'; ask 'hosp-a' for a new one"),
    "two names": (lambda: asked("hosp-a", "hosp-b"), "for '' and not for 'hosp-a'"),
    "no name": (asked, "for '' and not for 'hosp-a'"),
    "escape in the name": (lambda: asked("hosp-a\x1b[2J\n"), r"for 'hosp-a\\x1b\[2J\\n' and not"),
    "name that is too long": (long_name, "can be read"),
    "RSA": (lambda: asked("hosp-a", key=rsa.generate_private_key(65537, 2048)), "not one of the curve P-384"),
    "P-256": (lambda: asked("hosp-a", key=ec.generate_private_key(ec.SECP256R1())), "the curve P-384"),
    "P-521": (lambda: asked("hosp-a", key=ec.generate_private_key(ec.SECP521R1())), "the curve P-384"),
    "broken signature": (lambda: with_another_key(asked("hosp-a")), "is not signed with the key"),
    "garbage": (lambda: b"\x00\xff" * 50, "no signing request in PEM form"),
    "nothing": (lambda: b"", "no signing request in PEM form"),
    "a megabyte of garbage": (lambda: os.urandom(2**20), "no signing request in PEM form"),
    "a megabyte before it": (lambda: b"#" * 2**20 + b"\n" + asked("hosp-a"), "no signing request in PEM form"),
    "a key": (lambda: site_request("hosp-a").key_pem, "no signing request in PEM form"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_request_is_refused_in_a_line(authority: Authority, kind: str) -> None:
    make, message = HOSTILE[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        authority.issue_site(make(), site="hosp-a")
    assert not {"\n", "\x1b"} & set(str(caught.value))
    assert len(str(caught.value)) < 200


ASKED = [x509.BasicConstraints(ca=True, path_length=None), x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])]
ASKED += [x509.NameConstraints([x509.DNSName("org")], None), x509.SubjectAlternativeName([x509.DNSName("a.org")])]


@pytest.mark.parametrize("extension", ASKED, ids=lambda extension: type(extension).__name__)
def test_extensions_that_a_request_asks_for_are_ignored(authority: Authority, extension: x509.ExtensionType) -> None:
    pem = authority.issue_site(asked("hosp-a", also=extension), site="hosp-a")
    assert extension not in [found.value for found in extensions(pem).values()]
    assert (describe(pem).purpose, describe(pem).names) == ("site", ())
    verify(pem, authority.certificate_pem, purpose="site")


@given(at=st.integers(0, 10**6), to=st.integers(0, 255))
def test_a_request_with_one_byte_changed_is_refused(authority: Authority, site: SiteRequest, at: int, to: int) -> None:
    der = bytearray(x509.load_pem_x509_csr(site.request_pem).public_bytes(forms.Encoding.DER))
    at %= len(der)
    assume(der[at] != to)
    der[at] = to
    pem = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()
    with pytest.raises(ConfigError):
        authority.issue_site(pem, site="hosp-a")


@given(st.binary(max_size=300))
def test_bytes_that_are_no_request_and_no_certificate_are_refused(authority: Authority, content: bytes) -> None:
    wrapped = ssl.DER_cert_to_PEM_cert(content)
    long = b"#" * 2**16 + b"\n" + authority.certificate_pem
    for pem in (content, wrapped.encode(), wrapped.replace("CERTIFICATE", "CERTIFICATE REQUEST").encode(), long):
        with pytest.raises(ConfigError, match="expected a certificate in PEM form of at most 64 KiB"):
            describe(pem)
        with pytest.raises(ConfigError, match="no signing request in PEM form"):
            authority.issue_site(pem, site="hosp-a")


@pytest.mark.parametrize("name", ["", "Hosp", "hosp a", "-hosp", "hosp-a\n", "a" * 65, "hosp/../a", "ä"])
def test_a_site_is_called_as_in_all_messages(authority: Authority, site: SiteRequest, name: str) -> None:
    with pytest.raises(ConfigError, match="a site's name"):
        site_request(name)
    with pytest.raises(ConfigError, match="a site's name"):
        authority.issue_site(site.request_pem, site=name)
    assert describe(authority.issue_site(site_request("a" * 64).request_pem, site="a" * 64)).subject == "a" * 64


def test_both_forms_hold_the_same_key_and_flowers_loader_takes_it(site: SiteRequest) -> None:
    flower = forms.load_ssh_private_key(site.openssh_key, None)
    assert isinstance(flower, ec.EllipticCurvePrivateKey)
    assert isinstance(flower.curve, ec.SECP384R1)
    assert flower.public_key() == forms.load_pem_private_key(site.key_pem, None).public_key()
    assert flower.public_key() == x509.load_pem_x509_csr(site.request_pem).public_key()
    assert site.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert site_request("hosp-a").key_pem != site.key_pem


def test_describe_says_what_the_certificate_says(authority: Authority, site: SiteRequest) -> None:
    pems = [authority.issue_site(site.request_pem, site="hosp-a", days=30, at=NOW) for _ in range(2)]
    first, second = (describe(pem, at=NOW) for pem in pems)
    assert (first.purpose, first.subject, first.names, first.days_left) == ("site", "hosp-a", (), 30)
    assert first.not_after == NOW.replace(microsecond=0) + timedelta(days=30)
    assert first.fingerprint == x509.load_pem_x509_certificate(pems[0]).fingerprint(hashes.SHA256()).hex()
    assert first.fingerprint != second.fingerprint
    assert first.public_key_fingerprint == second.public_key_fingerprint
    assert describe((authority.folder / "server.crt").read_bytes()).purpose == "server"
    own = describe(authority.certificate_pem)
    assert (own.purpose, own.subject) == ("authority", "Federation")
    moments = [first.not_after + timedelta(seconds=seconds) for seconds in (-86401, -86400, -1, 0, 1)]
    assert [describe(pems[0], at=moment).days_left for moment in moments] == [1, 1, 0, 0, -1]


def test_verify_says_what_is_wrong(authority: Authority, fresh: Authority, site: SiteRequest) -> None:
    ca, server = authority.certificate_pem, (authority.folder / "server.crt").read_bytes()
    pem = authority.issue_site(site.request_pem, site="hosp-a", days=10, at=NOW)
    verify(server, ca, purpose="server")
    verify(pem, ca, purpose="site")
    start, end = f"{NOW - timedelta(minutes=5):%Y-%m-%d %H:%M} UTC", f"{NOW + timedelta(days=10):%Y-%m-%d %H:%M} UTC"
    for certificate, of, purpose, days, message in [
        (pem, fresh.certificate_pem, "site", 0, "'hosp-a' is not of the authority 'Federation'; get one that it"),
        (pem, ca, "server", 0, "'hosp-a' has the purpose 'site' and not 'server'"),
        (server, ca, "site", 0, "'fed.example.org' has the purpose 'server' and not 'site'"),
        (ca, ca, "site", 0, "'Federation' has the purpose 'authority' and not 'site'"),
        (pem, ca, "site", 11, f"'hosp-a' expired on {end}, it was valid since {start}; renew it"),
        (pem, ca, "site", -1, f"'hosp-a' is valid from {start} to {end}, but now is .* UTC; set the clock right"),
        (pem, pem, "site", 0, "'hosp-a' is not one of an authority; give the ca.crt"),
        (b"x", ca, "site", 0, "the certificate: expected a certificate in PEM form"),
        (pem, b"x", "site", 0, "the authority: expected a certificate in PEM form"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            verify(certificate, of, purpose=purpose, at=NOW + timedelta(days=days))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
