"""``mcrage pki``: what it writes and says, and what comes of it when two ends meet over TLS on loopback."""

import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mcrage import cli
from mcrage.errors import ConfigError
from mcrage.pki import Authority, SiteRequest, describe, site_request, verify, write_atomically

Run = Callable[..., tuple[int, str, str]]
Files = tuple[Path, Path]

NOW = datetime.now(UTC)
SECONDS = 10  # after which a handshake that hangs is a failure


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mcrage", "pki", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert "PRIVATE" not in shown.out + shown.err
        return int(caught.value.code or 0), shown.out, shown.err

    return call


@pytest.fixture
def folder(tmp_path: Path, run: Run) -> Path:
    """An authority that the command made, with a server certificate."""
    place = tmp_path / "pki"
    assert run("init", place, "--name", "Federation")[0] == 0
    assert run("issue", place, "--server", "fed.example.org", "--server", "10.0.0.5")[0] == 0
    return place


@pytest.fixture(scope="module")
def site() -> SiteRequest:
    return site_request("hosp-a")


@pytest.fixture
def request_file(tmp_path: Path, site: SiteRequest) -> Path:
    (tmp_path / "hosp-a.csr").write_bytes(site.request_pem)
    return tmp_path / "hosp-a.csr"


def test_init_says_who_needs_what_and_never_replaces(run: Run, tmp_path: Path) -> None:
    code, out, err = run("init", tmp_path / "pki", "--name", "Federation", "--days", 100)
    end = f"{describe((tmp_path / 'pki' / 'ca.crt').read_bytes()).not_after:%Y-%m-%d}"
    assert (code, err) == (0, "")
    assert f"ca.crt: authority 'Federation', valid until {end}; every hospital needs this file\n" in out
    assert "ca.key: its key: keep a copy offline, and never give it away\n" in out
    before = (tmp_path / "pki" / "ca.key").read_bytes()
    code, out, err = run("init", tmp_path / "pki", "--name", "Federation")
    assert (code, out) == (2, "")
    assert err == f"'{tmp_path / 'pki' / 'ca.key'}' is there already and is never replaced; choose another folder\n"
    assert (tmp_path / "pki" / "ca.key").read_bytes() == before


def test_issue_and_renew_say_for_whom_and_until_when(run: Run, folder: Path, request_file: Path) -> None:
    code, out, err = run("renew", folder, "--days", 40)
    info = describe((folder / "server.crt").read_bytes())
    assert (code, err) == (0, "")
    assert "server.crt: for fed.example.org, 10.0.0.5, localhost, 127.0.0.1, ::1, valid until " in out
    assert out.endswith(f"{info.not_after:%Y-%m-%d}, serial {info.serial}\n")
    assert info.days_left in (39, 40)
    given = request_file.with_suffix(".crt")
    code, out, err = run("issue", folder, "--site", "hosp-a", "--request", request_file, "--out", given)
    info = describe(given.read_bytes())
    assert (code, err) == (0, "")
    assert out == f"{given}: site hosp-a, valid until {info.not_after:%Y-%m-%d}, serial {info.serial}\n"
    assert info.days_left in (364, 365)
    verify(given.read_bytes(), (folder / "ca.crt").read_bytes(), purpose="site")


def test_the_server_has_ninety_days_by_default(run: Run, folder: Path) -> None:
    assert describe((folder / "server.crt").read_bytes()).days_left in (89, 90)
    run("renew", folder)
    assert describe((folder / "server.crt").read_bytes()).days_left in (89, 90)


def test_an_output_is_replaced_only_if_asked_for(run: Run, folder: Path, request_file: Path) -> None:
    key = (folder / "ca.key").read_bytes()
    arguments = ("issue", folder, "--site", "hosp-a", "--request", request_file, "--days", 30, "--out")
    code, _, err = run(*arguments, folder / "ca.key")
    assert (code, err) == (2, f"'{folder / 'ca.key'}' is there already; give --force to replace it\n")
    assert (folder / "ca.key").read_bytes() == key
    given = request_file.with_suffix(".crt")
    assert run(*arguments, given)[0] == 0
    first = given.read_bytes()
    assert run(*arguments, given)[0] == 2
    assert run(*arguments, given, "--force")[0] == 0
    assert given.read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to issue: --server NAME, or --site NAME with --request FILE and --out FILE"),
        (("--site", "hosp-a"), "say what to issue"),
        (("--site", "hosp-a", "--request", "hosp-a.csr"), "say what to issue"),
        (("--server", "a.org", "--site", "hosp-a"), "say what to issue"),
        (("--server", "a.org", "--out", "a.crt"), "say what to issue"),
        (("--server", "a.org:443"), "'a.org:443' is no host name or IP address"),
        (("--server", "a.org", "--days", "826"), "valid for 1 to 825 days, got 826"),
        (("--server", "a.org", "--days", "0"), "valid for 1 to 825 days, got 0"),
        (("--site", "hosp-b", "--request", "hosp-a.csr", "--out", "b.crt"), "for 'hosp-a' and not for 'hosp-b'"),
        (("--site", "hosp-a", "--request", "pki/ca.crt", "--out", "b.crt"), "no signing request in PEM form"),
        (("--site", "hosp-a", "--request", "absent", "--out", "b.crt"), "'absent' cannot be used: No such file"),
        (("--site", "hosp-a", "--request", "hosp-a.csr", "--out", "no/b.crt"), "'no/b.crt' cannot be used: No such"),
    ],
)
def test_what_cannot_be_issued_is_refused_in_a_line(
    run: Run,
    folder: Path,
    request_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(request_file.parent)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, out, err = run("issue", folder, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not Path("b.crt").exists()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_ssh_keygen_reads_the_same_key(tmp_path: Path, site: SiteRequest) -> None:
    write_atomically(tmp_path / "key", site.openssh_key, mode=0o600)
    command = ["ssh-keygen", "-y", "-P", "", "-f", str(tmp_path / "key")]
    shown = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS).stdout
    public = forms.load_pem_private_key(site.key_pem, None).public_key()
    assert shown.split()[:2] == public.public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH).split()


def test_no_authority_and_no_certificate_are_said(run: Run, tmp_path: Path) -> None:
    assert run("renew", tmp_path)[2] == f"'{tmp_path / 'ca.crt'}' cannot be used: No such file or directory\n"
    assert run("show", tmp_path) == (2, "", f"'{tmp_path}' has no certificate, which would be a file *.crt\n")
    (tmp_path / "a.crt").write_text("garbage")
    code, out, err = run("show", tmp_path / "a.crt")
    assert (code, out) == (2, "")
    assert "expected a certificate in PEM form" in err


def test_show_has_a_line_per_certificate(run: Run, folder: Path) -> None:
    code, out, err = run("show", folder)
    assert (code, err) == (0, "")
    head, authority, server = out.splitlines()
    assert head.split("  ")[0] == "what"
    assert authority.startswith("authority (ca.crt)   Federation  ")
    assert server.startswith("server (server.crt)  fed.example.org, 10.0.0.5, localhost, 127.0.0.1, ::1  ")
    info = describe((folder / "server.crt").read_bytes())
    assert server.split()[-3:] == [info.serial, f"{info.not_after:%Y-%m-%d}", str(info.days_left)]
    code, out, err = run("show", folder / "server.crt", "--json")
    assert (code, err) == (0, "")
    (content,) = json.loads(out)
    assert content["file"] == str(folder / "server.crt")
    assert datetime.fromisoformat(content["not_after"]) == info.not_after
    assert content["names"] == list(info.names)
    assert (content["serial"], content["fingerprint"]) == (info.serial, info.fingerprint)


def test_show_warns_from_thirty_days_on_and_fails_once_one_has_expired(run: Run, folder: Path) -> None:
    authority = Authority.open(folder)
    for hours, code, warning in [
        (31 * 24 + 1, 0, ""),
        (30 * 24 + 1, 0, "expires in 30 days: renew"),
        (24 + 1, 0, "expires in 1 day: renew"),
        (1, 0, "expires in 0 days: renew"),
        (-1, 2, "expired on {}: renew"),
    ]:
        end = datetime.now(UTC) + timedelta(hours=hours)
        authority.issue_server([], days=90, at=end - timedelta(days=90))
        expected = warning and f"{folder / 'server.crt'}: {warning.format(f'{end:%Y-%m-%d}')}\n"
        for options in ((), ("--json",)):
            shown = run("show", folder, *options)
            assert (shown[0], shown[2]) == (code, expected)
            assert "server" in shown[1]


def test_show_tells_that_an_authority_has_no_renewal(run: Run, tmp_path: Path) -> None:
    Authority.create(tmp_path / "pki", name="Federation", days=20)
    assert run("show", tmp_path / "pki")[2].endswith(" days: make a new authority\n")


def test_names_of_others_cannot_command_a_terminal(run: Run, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "evil.crt").write_bytes(hand_made(folder, site_request("hosp-a"), name="a\x1b[2Jb"))
    code, out, _ = run("show", tmp_path / "evil.crt")
    assert code == 0
    assert "other (evil.crt)  a?[2Jb  " in out
    assert "\x1b" not in out


def hand_made(folder: Path, site: SiteRequest, *uses: x509.ObjectIdentifier, name: str = "hosp-a") -> bytes:
    """A certificate that a careless coordinator made: for any purpose, or for several."""
    key = forms.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    builder = x509.CertificateBuilder(
        x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()).subject,
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        x509.load_pem_x509_csr(site.request_pem).public_key(),
        x509.random_serial_number(),
        NOW - timedelta(days=1),
        NOW + timedelta(days=50),
    )
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())  # type: ignore[arg-type]
    builder = builder.add_extension(issuer, critical=False)
    if name == "hosp-a":
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return builder.sign(key, hashes.SHA384()).public_bytes(forms.Encoding.PEM)  # type: ignore[arg-type]


def context(protocol: int, files: Files | None, ca: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python does by itself from 3.13 on
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(ca)
    if files is not None:
        made.load_cert_chain(*files)
    return made


def connect(server: Files, client: Files | None, *, ca: Path, host: str = "localhost") -> str:
    """The serial of the client's certificate as the server's OpenSSL prints it, sent over the connection.

    Raises:
        ssl.SSLError: What the end that refused the other one objected to.
    """
    outside, inside = context(ssl.PROTOCOL_TLS_SERVER, server, ca), context(ssl.PROTOCOL_TLS_CLIENT, client, ca)
    refusals: list[ssl.SSLError] = []

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(SECONDS)
        with connection:
            try:
                with outside.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.sendall(str((wrapped.getpeercert() or {})["serialNumber"]).encode())
            except ssl.SSLError as error:
                refusals.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=SECONDS) as raw,
                inside.wrap_socket(raw, server_hostname=host) as wrapped,
            ):
                return wrapped.recv(1000).decode()
        except OSError:
            thread.join(SECONDS)
            if refusals and "ALERT" not in (refusals[0].reason or ""):
                raise refusals[0] from None
            raise
        finally:
            thread.join(SECONDS)
            assert not thread.is_alive()


def files(folder: Path, certificate: bytes, key: bytes) -> Files:
    """Both in new files of a folder, as TLS wants them."""
    stem = folder / f"{len(list(folder.iterdir()))}"
    write_atomically(stem.with_suffix(".crt"), certificate, mode=0o644)
    write_atomically(stem.with_suffix(".key"), key, mode=0o600)
    return stem.with_suffix(".crt"), stem.with_suffix(".key")


@pytest.fixture
def server(folder: Path) -> Files:
    return folder / "server.crt", folder / "server.key"


@pytest.fixture
def client(run: Run, folder: Path, tmp_path: Path, request_file: Path, site: SiteRequest) -> Files:
    given = tmp_path / "hosp-a.crt"
    assert run("issue", folder, "--site", "hosp-a", "--request", request_file, "--out", given)[0] == 0
    (tmp_path / "hosp-a.key").write_bytes(site.key_pem)
    return given, tmp_path / "hosp-a.key"


def test_server_and_site_accept_each_other_under_every_name_and_after_renewal(
    run: Run, folder: Path, server: Files, client: Files
) -> None:
    for host in ("fed.example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1"):
        assert connect(server, client, ca=folder / "ca.crt", host=host) == describe(client[0].read_bytes()).serial
    run("renew", folder)
    assert connect(server, client, ca=folder / "ca.crt", host="fed.example.org")


@pytest.mark.parametrize("host", ["evil.example.org", "10.0.0.6", "example.org"])
def test_a_wrong_host_name_is_refused(folder: Path, server: Files, client: Files, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        connect(server, client, ca=folder / "ca.crt", host=host)


def test_a_client_without_a_certificate_is_refused(folder: Path, server: Files) -> None:
    with pytest.raises(ssl.SSLError, match="peer did not return a certificate"):
        connect(server, None, ca=folder / "ca.crt")


def test_both_ends_refuse_what_another_authority_of_the_same_name_issued(
    tmp_path: Path, folder: Path, site: SiteRequest, server: Files, client: Files
) -> None:
    other = Authority.create(tmp_path / "other", name="Federation")
    other.issue_server(["fed.example.org"])
    foreign = files(tmp_path, other.issue_site(site.request_pem, site="hosp-a"), site.key_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        connect(server, foreign, ca=folder / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        connect((other.folder / "server.crt", other.folder / "server.key"), client, ca=folder / "ca.crt")


@pytest.mark.parametrize(("days", "message"), [(-60, "certificate has expired"), (1, "is not yet valid")])
def test_certificates_are_refused_outside_their_time(
    tmp_path: Path, folder: Path, site: SiteRequest, server: Files, client: Files, days: int, message: str
) -> None:
    authority, at = Authority.open(folder), NOW + timedelta(days=days)
    untimely = authority.issue_site(site.request_pem, site="hosp-a", days=30, at=at)
    with pytest.raises(ssl.SSLCertVerificationError, match=message):
        connect(server, files(tmp_path, untimely, site.key_pem), ca=folder / "ca.crt")
    with pytest.raises(ConfigError, match=r"expired on|is valid from"):
        verify(untimely, authority.certificate_pem, purpose="site")
    authority.issue_server([], days=30, at=at)
    with pytest.raises(ssl.SSLCertVerificationError, match=message):
        connect(server, client, ca=folder / "ca.crt")


def test_neither_certificate_serves_for_the_other_purpose(folder: Path, server: Files, client: Files) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        connect(server, server, ca=folder / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        connect(client, client, ca=folder / "ca.crt", host="hosp-a")


@pytest.mark.parametrize("uses", [(), (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)])
def test_without_one_purpose_tls_would_take_a_site_for_the_server_and_verify_refuses(
    tmp_path: Path, folder: Path, site: SiteRequest, client: Files, uses: tuple[x509.ObjectIdentifier, ...]
) -> None:
    pem = hand_made(folder, site, *uses)
    assert connect(files(tmp_path, pem, site.key_pem), client, ca=folder / "ca.crt")
    for purpose in ("server", "site"):
        with pytest.raises(ConfigError, match="has the purpose 'other' and not"):
            verify(pem, (folder / "ca.crt").read_bytes(), purpose=purpose)  # type: ignore[arg-type]


def test_a_site_cannot_issue_certificates_for_others(
    tmp_path: Path, folder: Path, site: SiteRequest, server: Files, client: Files
) -> None:
    key = forms.load_pem_private_key(site.key_pem, None)
    forger = Authority(tmp_path, client[0].read_bytes(), key)  # type: ignore[arg-type]
    victim = site_request("hosp-b")
    pem = forger.issue_site(victim.request_pem, site="hosp-b", days=1)
    with pytest.raises(ConfigError, match="'hosp-b' is not of the authority"):
        verify(pem, (folder / "ca.crt").read_bytes(), purpose="site")
    chain = pem + client[0].read_bytes()
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        connect(server, files(tmp_path, chain, victim.key_pem), ca=folder / "ca.crt")


def test_serials_are_written_as_openssl_and_nginx_write_them(
    tmp_path: Path, folder: Path, site: SiteRequest, server: Files
) -> None:
    authority = Authority.open(folder)
    issued = (authority.issue_site(site.request_pem, site="hosp-a") for _ in range(2000))
    pem, plain = next(
        (pem, plain)
        for pem in issued
        if len(plain := f"{x509.load_pem_x509_certificate(pem).serial_number:X}") % 2  # one in sixteen
    )
    serial = connect(server, files(tmp_path, pem, site.key_pem), ca=folder / "ca.crt")
    assert serial == describe(pem).serial == f"0{plain}"
