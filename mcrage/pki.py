"""The federation's own public-key infrastructure: one private authority and the certificates that it issues.

The coordinator keeps the :class:`Authority`, a folder with ``ca.key``, ``ca.crt`` and the ``server.key`` and
``server.crt`` of its proxy. A hospital makes its key itself (:func:`site_request`) and sends the request only, so that
no private key of a hospital is ever elsewhere. All keys are EC P-384, which both TLS and Flower's SuperNode accept.

Every problem is a ConfigError of one line. No message, ``repr`` or file but the key files holds a private key.
"""

import hashlib
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store, VerificationError

from mcrage.config import SITE_NAME
from mcrage.errors import ConfigError
from mcrage.files import replace_file
from mcrage.privacy.store import sync_folder

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.crt"
SERVER_KEY, SERVER_CERTIFICATE = "server.key", "server.crt"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""Names in every server certificate: the coordinator's own processes connect there."""

Purpose = Literal["server", "site"]
"""What a certificate is issued for: to answer connections, or to make them."""

_Key = ec.EllipticCurvePrivateKey
_PublicKey = ec.EllipticCurvePublicKey
_Validity = tuple[datetime, datetime]
_LONGEST_PEM = 64 * 1024
_LONGEST_NAME = 64  # RFC 5280, ub-common-name
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# A last label without a letter would be a mistyped IP address.
_HOST = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)*(?=[^.]*[a-z]){_LABEL}")
_SERVER_USE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
_SITE_USE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
# In the order of its parameters: digital_signature alone; key_cert_sign and crl_sign.
_LEAF_USAGE = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
_CA_USAGE = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
_NO_VALUE_ERRORS = (x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
# All that a hostile file makes cryptography raise; a name that is too long is warned of.
_UNREADABLE = (ValueError, TypeError, UserWarning, UnsupportedAlgorithm, *_NO_VALUE_ERRORS)


@dataclass(frozen=True, kw_only=True)
class SiteRequest:
    """What a hospital makes before it asks for a certificate; only ``request_pem`` leaves it.

    Attributes:
        key_pem: Private key for TLS, PKCS8 without passphrase.
        openssh_key: The same key in OpenSSH's form without passphrase, as flower-supernode wants it.
        request_pem: Certificate signing request.
    """

    key_pem: bytes = field(repr=False)
    openssh_key: bytes = field(repr=False)
    request_pem: bytes


@dataclass(frozen=True, kw_only=True)
class CertificateInfo:
    """What a certificate says.

    Attributes:
        purpose: ``other`` is what this module does not issue.
        subject: Its common name; may be empty.
        names: DNS names and IP addresses that a server answers to.
        serial: As nginx prints ``$ssl_client_serial``: upper-case hexadecimal, two digits per byte.
        not_after: Last moment at which it is valid, UTC.
        days_left: Whole days until then; negative once it has expired.
        fingerprint: SHA-256 of the certificate, hexadecimal.
        public_key_fingerprint: SHA-256 of its public key (SubjectPublicKeyInfo, DER), hexadecimal.
    """

    purpose: Purpose | Literal["authority", "other"]
    subject: str
    names: tuple[str, ...]
    serial: str
    not_after: datetime
    days_left: int
    fingerprint: str
    public_key_fingerprint: str


@dataclass(frozen=True)
class Authority:
    """A private certificate authority in a folder: :meth:`create` one, or :meth:`open` it.

    ``at`` is the moment of issue everywhere, by default now. Nothing is issued beyond the authority's own end.

    Attributes:
        folder: Where its files lie.
        certificate_pem: The content of ``ca.crt``: what everybody needs who trusts it.
    """

    folder: Path
    certificate_pem: bytes = field(repr=False)
    _key: _Key = field(repr=False, compare=False)

    @classmethod
    def create(cls, folder: Path, *, name: str, days: int = 3650, at: datetime | None = None) -> "Authority":
        """A new authority, in a new or empty folder or in one that nobody else may look into; never replaces one."""
        validity = _validity(days, at, most=36_500)
        if not (name.isprintable() and name == name.strip() and 1 <= len(name) <= _LONGEST_NAME):
            raise ConfigError(f"the authority's name must have 1 to {_LONGEST_NAME} printable characters")
        _make_private(folder)
        for path in (folder / CA_KEY, folder / CA_CERTIFICATE):
            if os.path.lexists(path):
                raise ConfigError(f"'{path}' is there already and is never replaced; choose another folder")
        key, limits = ec.generate_private_key(ec.SECP384R1()), x509.BasicConstraints(True, 0)
        pem = _certify(key, _common_name(name), name, key.public_key(), validity, limits, _CA_USAGE)
        with _one_line(folder):
            _write_new(folder / CA_KEY, _pkcs8(key), mode=0o600)
            _write_new(folder / CA_CERTIFICATE, pem, mode=0o644)
            sync_folder(folder)
        return cls(folder, pem, key)

    @classmethod
    def open(cls, folder: Path) -> "Authority":
        """The authority of a folder, if the key is its certificate's and nobody but its owner may read it."""
        path = folder / CA_CERTIFICATE
        authority = cls(folder, read_pem(path), _private_key(folder / CA_KEY))
        certificate = _certificate(authority.certificate_pem, f"'{path}'")
        if _purpose(certificate) != "authority" or certificate.public_key() != authority._key.public_key():
            raise ConfigError(f"'{path}' is not the certificate of '{CA_KEY}' beside it; restore both from one backup")
        return authority

    def issue_server(self, names: Sequence[str], *, days: int = 90, at: datetime | None = None) -> CertificateInfo:
        """Writes ``server.key``, a new key, and ``server.crt`` for some names and :data:`LOCAL_NAMES`.

        ``names`` are the host names and IP addresses under which hospitals reach the server; days are at most 825.
        """
        if isinstance(names, str):
            raise ConfigError(f"the names of a server are a list, got the text '{names}'")
        validity = _validity(days, at)
        alternatives = list(dict.fromkeys(map(_general_name, [*names, *LOCAL_NAMES])))
        subject = next(text for name in alternatives if len(text := str(name.value)) <= _LONGEST_NAME)
        key = ec.generate_private_key(ec.SECP384R1())
        pem = self._issue(subject, key.public_key(), validity, _SERVER_USE, x509.SubjectAlternativeName(alternatives))
        write_atomically(self.folder / SERVER_KEY, _pkcs8(key), mode=0o600)
        write_atomically(self.folder / SERVER_CERTIFICATE, pem, mode=0o644)
        return describe(pem)

    def renew(self, *, days: int = 90, at: datetime | None = None) -> CertificateInfo:
        """Issues the server certificate that is there again: the same names, a new key."""
        path = self.folder / SERVER_CERTIFICATE
        if not path.exists():
            raise ConfigError(f"there is no '{path}' to renew; issue a server certificate first")
        return self.issue_server(describe(read_pem(path)).names, days=days, at=at)

    def issue_site(self, request_pem: bytes, *, site: str, days: int = 365, at: datetime | None = None) -> bytes:
        """A hospital's certificate in PEM form: it names the site, and serves to connect as a client only.

        Of the request nothing but the public key is taken, and only if it is a P-384 key that signed the request, and
        the request names the same site; every extension that it asks for is ignored. Days are at most 825.
        """
        _check_site(site)
        return self._issue(site, _requested_key(request_pem, site), _validity(days, at), _SITE_USE)

    def _issue(self, subject: str, key: _PublicKey, validity: _Validity, *extensions: x509.ExtensionType) -> bytes:
        own = _certificate(self.certificate_pem, CA_CERTIFICATE)
        if validity[1] > (end := own.not_valid_after_utc):
            raise ConfigError(f"it would outlive its authority, which ends on {_text(end)}; ask for fewer days")
        identifier = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        every = (x509.BasicConstraints(False, None), _LEAF_USAGE, issuer, *extensions)
        return _certify(self._key, own.subject, subject, key, validity, *every)


def site_request(site: str, *also: x509.ExtensionType) -> SiteRequest:
    """A new key of a hospital, and the request for a certificate of that name, with extensions for whoever reads it."""
    _check_site(site)
    key, builder = ec.generate_private_key(ec.SECP384R1()), x509.CertificateSigningRequestBuilder()
    for extension in also:
        builder = builder.add_extension(extension, critical=False)
    request = builder.subject_name(_common_name(site)).sign(key, hashes.SHA384())
    return SiteRequest(
        key_pem=_pkcs8(key),
        openssh_key=key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption()),
        request_pem=request.public_bytes(forms.Encoding.PEM),
    )


def describe(certificate_pem: bytes, *, at: datetime | None = None) -> CertificateInfo:
    """What a certificate says, whoever issued it; days are counted from ``at``, by default now."""
    certificate = _certificate(certificate_pem, "the certificate")
    names = next((e.value for e in certificate.extensions if isinstance(e.value, x509.SubjectAlternativeName)), ())
    public_key = certificate.public_key().public_bytes(forms.Encoding.DER, forms.PublicFormat.SubjectPublicKeyInfo)
    serial = certificate.serial_number
    return CertificateInfo(
        purpose=_purpose(certificate),
        subject=_subject(certificate),
        names=tuple(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)),
        serial=serial.to_bytes(max(1, -(-serial.bit_length() // 8))).hex().upper(),
        not_after=certificate.not_valid_after_utc,
        days_left=(certificate.not_valid_after_utc - _moment(at)) // timedelta(days=1),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        public_key_fingerprint=hashlib.sha256(public_key).hexdigest(),
    )


def verify(certificate_pem: bytes, ca_pem: bytes, *, purpose: Purpose, at: datetime | None = None) -> None:
    """Raises unless an authority issued a certificate for a purpose, and it is valid at ``at``, by default now.

    The names of a server are the connection's business: TLS compares them with the host that was asked for.
    """
    certificate, authority = _certificate(certificate_pem, "the certificate"), _certificate(ca_pem, "the authority")
    if _purpose(authority) != "authority":
        # The verifier would trust whatever it is given, even the certificate itself.
        raise ConfigError(
            f"the certificate {_subject(authority)[:80]!r} is not one of an authority; give the {CA_CERTIFICATE}"
        )
    moment = _moment(at)

    def check(_policy: Policy, leaf: x509.Certificate, _usage: x509.ExtendedKeyUsage) -> None:
        if _purpose(leaf) != purpose:
            raise ValueError

    leaf_policy = ExtensionPolicy.permit_all().require_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, check)
    builder = PolicyBuilder().store(Store([authority])).time(moment)
    builder = builder.extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=leaf_policy)
    try:
        # For servers as well: the purpose is told by our own check, and a server verifier would ask for a host.
        builder.build_client_verifier().verify(certificate, [])
    except VerificationError as error:
        why = _why_refused(certificate, authority, purpose, moment) or f"is refused: {error}"
        raise ConfigError(f"the certificate {_subject(certificate)[:80]!r} {why}") from None


def read_pem(path: Path) -> bytes:
    """The content of a small file; of a larger one as much as is refused as too long."""
    with _one_line(path), path.open("rb") as file:
        return file.read(_LONGEST_PEM + 1)


def write_atomically(path: Path, content: bytes, *, mode: int) -> None:
    """Makes or replaces a file in one step that outlives a power cut; the umask does not change its mode."""
    with _one_line(path):
        replace_file(path, content, mode=mode)
        sync_folder(path.parent)


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be used: {error.strerror}") from None


def _make_private(folder: Path) -> None:
    with _one_line(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            folder.chmod(0o700)
        if (mode := folder.stat().st_mode & 0o777) & 0o077:
            raise ConfigError(f"others may look into '{folder}' (mode {mode:04o}); run chmod 700, or name a new folder")


def _private_key(path: Path) -> _Key:
    with _one_line(path), path.open("rb") as file:
        mode, content = os.fstat(file.fileno()).st_mode & 0o777, file.read(_LONGEST_PEM)
    if mode & 0o077:
        raise ConfigError(f"others may use the key '{path}' (mode {mode:04o}); run chmod 600")
    with suppress(*_UNREADABLE):
        if isinstance(key := forms.load_pem_private_key(content, None), _Key):
            return key
    raise ConfigError(f"'{path}' is no elliptic-curve key in PEM form without passphrase; restore it from a backup")


def _pkcs8(key: _Key) -> bytes:
    return key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())


def _certificate(pem: bytes, source: str) -> x509.Certificate:
    """A certificate of which every part can be read."""
    with suppress(*_UNREADABLE):
        if len(pem) <= _LONGEST_PEM:
            certificate = x509.load_pem_x509_certificate(pem)
            _ = certificate.extensions, certificate.subject, certificate.issuer, certificate.public_key()
            return certificate
    raise ConfigError(f"{source}: expected a certificate in PEM form of at most {_LONGEST_PEM // 1024} KiB")


def _requested_key(pem: bytes, site: str) -> _PublicKey:
    ask = f"ask '{site}' for a new one"
    try:
        if len(pem) > _LONGEST_PEM:
            raise ValueError
        request = x509.load_pem_x509_csr(pem)
        key, subject = request.public_key(), _subject(request)
        if not (isinstance(key, _PublicKey) and isinstance(key.curve, ec.SECP384R1)):
            raise ConfigError(f"the request's key is not one of the curve P-384; {ask}")
        is_signed = request.is_signature_valid
    except _UNREADABLE:
        raise ConfigError(f"the request is no signing request in PEM form that can be read; {ask}") from None
    if not is_signed:
        raise ConfigError(f"the request is not signed with the key that it names; {ask}")
    if subject != site:
        raise ConfigError(f"the request is for {subject[:80]!r} and not for '{site}'; {ask}")
    return key


def _certify(
    signer: _Key, issuer: x509.Name, subject: str, key: _PublicKey, validity: _Validity, *extensions: x509.ExtensionType
) -> bytes:
    builder = x509.CertificateBuilder(issuer, _common_name(subject), key, x509.random_serial_number(), *validity)
    for extension in (x509.SubjectKeyIdentifier.from_public_key(key), *extensions):
        critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer, hashes.SHA384()).public_bytes(forms.Encoding.PEM)


def _validity(days: int, at: datetime | None, *, most: int = 825) -> _Validity:
    """First and last moment; ``most`` is what Apple's TLS accepts of a private authority."""
    if not 1 <= days <= most:
        raise ConfigError(f"a certificate can be valid for 1 to {most:,} days, got {days:,}")
    start = _moment(at)
    return start - timedelta(minutes=5), start + timedelta(days=days)  # earlier for clocks that are slow


def _general_name(name: str) -> x509.GeneralName:
    text = name.lower()
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address("" if "%" in text else text))  # a zone means nothing elsewhere
    if not _HOST.fullmatch(text):
        raise ConfigError(f"{name[:80]!r} is no host name or IP address; give it without https://, port or wildcard")
    return x509.DNSName(text)


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _subject(of: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The common name, if there is exactly one."""
    found = of.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def _purpose(certificate: x509.Certificate) -> Purpose | Literal["authority", "other"]:
    values = [extension.value for extension in certificate.extensions]
    if any(isinstance(value, x509.BasicConstraints) and value.ca for value in values):
        return "authority"
    if _SERVER_USE in values:
        return "server"
    return "site" if _SITE_USE in values else "other"


def _why_refused(certificate: x509.Certificate, authority: x509.Certificate, purpose: str, moment: datetime) -> str:
    """In words, what a verifier found; empty if it is none of the usual reasons."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (*_UNREADABLE, InvalidSignature):
        return f"is not of the authority {_subject(authority)[:80]!r}; get one that it issued"
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if moment > end:
        return f"expired on {_text(end)}, it was valid since {_text(start)}; renew it"
    if moment < start:
        return f"is valid from {_text(start)} to {_text(end)}, but now is {_text(moment)}; set the clock right"
    found = _purpose(certificate)
    return "" if found == purpose else f"has the purpose '{found}' and not '{purpose}'; use the one made for that"


def _check_site(site: str) -> None:
    if not re.fullmatch(SITE_NAME, site):
        raise ConfigError(f"a site's name is 1 to 64 of a-z, 0-9, _ and -, no _ or - first; got {site[:80]!r}")


def _moment(at: datetime | None) -> datetime:
    return (at or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)


def _text(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
