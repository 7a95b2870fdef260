import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as forms

from client.enrolment import change_over, enrol, renew
from client.node import tls_context
from client.places import LEDGER, POLICY, SECRET, SIGNING, WITNESS
from client.policy import SitePolicy
from client.protection import prepare
from client.settings import SiteSettings
from mcrage.errors import ConfigError, PrivacyError
from mcrage.pki import Authority, describe, verify
from mcrage.privacy.keyed import read_secret
from mcrage.privacy.ledger import PrivacyLedger
from mcrage.signing import public_key, requested_key

NAME = "st-mary"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("federation") / "ca", name="Federation")


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    """A site that has nothing but its settings."""
    path = tmp_path / "site.toml"
    path.write_text(
        f'[site]\nname = "{NAME}"\ndata = "table.csv"\nschema_file = "schema.json"\n'
        '[server]\naddress = "federation.example.org:8443"\n'
    )
    path.chmod(0o600)
    return SiteSettings.load(path)


@pytest.fixture
def with_umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def contents(settings: SiteSettings) -> dict[str, bytes]:
    folder = settings.file.parent
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def certify(settings: SiteSettings, authority: Authority, *, suffix: str = "") -> None:
    """Puts there what the coordinator sends back."""
    keys = settings.server.key.parent
    certificate = authority.issue_site((keys / f"{NAME}.csr").read_bytes(), site=NAME)
    (keys / f"site.crt{suffix}").write_bytes(certificate)
    settings.server.ca.write_bytes(authority.certificate_pem)


def public_keys(settings: SiteSettings, suffix: str = "") -> set[bytes]:
    """Of both files of the key."""
    server, no_passphrase = settings.server, None
    tls = forms.load_pem_private_key(Path(f"{server.key}{suffix}").read_bytes(), no_passphrase)
    node = forms.load_ssh_private_key(Path(f"{server.node_key}{suffix}").read_bytes(), no_passphrase)
    form = (forms.Encoding.DER, forms.PublicFormat.SubjectPublicKeyInfo)
    return {tls.public_key().public_bytes(*form), node.public_key().public_bytes(*form)}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_file_has_the_rights_that_it_needs_whatever_the_umask(
    umask: int, settings: SiteSettings, with_umask: Callable[[int], int]
) -> None:
    with_umask(umask)
    enrol(settings, declared_patients=84)
    folder = settings.file.parent
    modes = {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    secret = {"private/policy.toml", "private/secret.key", "keys/site.key", "keys/node.key"}
    assert {name for name, mode in modes.items() if mode == 0o600} >= secret
    assert modes["keys/runtime.secret"] == 0o640
    assert modes[f"keys/{NAME}.csr"] == 0o644
    assert modes["keys"] == (0o700 if umask == 0o077 else 0o750)
    assert modes["private"] == modes["private/witness"] == 0o700
    inside = {name: mode for name, mode in modes.items() if name.startswith("private/") and mode & 0o077}
    assert all(mode & 0o022 == 0 for mode in inside.values()), "behind a folder that is closed to others"
    assert settings.daemon.secret.stat().st_size == 32


def test_what_enrolment_makes_is_one_key_a_request_for_it_and_a_closed_policy(
    settings: SiteSettings, authority: Authority
) -> None:
    lines = enrol(settings, declared_patients=84)
    assert len(public_keys(settings)) == 1
    certify(settings, authority)
    verify(settings.server.certificate.read_bytes(), authority.certificate_pem, purpose="site")
    assert describe(settings.server.certificate.read_bytes()).subject == NAME
    tls_context(settings)
    private = settings.site.private
    policy = SitePolicy.load(private / POLICY)
    assert (policy.privacy.declared_patients, policy.privacy.required) == (84, True)
    with PrivacyLedger.open(private / LEDGER, witness=private / WITNESS) as ledger:
        assert ledger.rows == ()
    for path in (settings.server.key.with_name(f"{NAME}.csr"), settings.server.certificate, private / POLICY):
        assert sum(str(path) in line for line in lines) == 1
    assert lines[-1] == f"Then: python -m client check {settings.file}"
    secret = settings.server.key.read_text().splitlines()[2]
    assert secret not in "".join(lines)
    assert secret.encode() not in settings.server.key.with_name(f"{NAME}.csr").read_bytes()


def test_the_request_tells_by_which_key_the_site_signs_and_a_later_one_tells_the_same(settings: SiteSettings) -> None:
    enrol(settings, declared_patients=84)
    request = settings.server.key.with_name(f"{NAME}.csr")
    key = public_key(read_secret(settings.site.private / SECRET))
    assert requested_key(request.read_bytes()) == key
    # Whoever has the network changes its key, and does not see the secret.
    (settings.site.private / SECRET).rename(settings.site.private / "elsewhere")
    first = request.read_bytes()
    renew(settings)
    assert request.read_bytes() != first
    assert requested_key(request.read_bytes()) == key


@pytest.mark.parametrize("content", [None, "", "00", "zz" * 32])
def test_without_the_key_that_the_coordinator_knows_no_other_one_is_asked_for(
    settings: SiteSettings, content: str | None
) -> None:
    enrol(settings, declared_patients=84)
    signing = settings.server.key.with_name(SIGNING)
    signing.unlink() if content is None else signing.write_text(content)
    before = contents(settings)
    with pytest.raises(ConfigError, match=r"signing\.pub' is missing or damaged: bring it back from a backup"):
        renew(settings)
    assert contents(settings) == before


def test_two_sites_have_nothing_in_common(settings: SiteSettings, tmp_path: Path) -> None:
    other = SiteSettings.load(settings.file).model_copy()
    enrol(settings, declared_patients=84)
    first = contents(settings)
    for name in first:
        if name != "site.toml":
            (tmp_path / name).unlink()
    enrol(other, declared_patients=84)
    second = contents(other)
    for name in ("keys/site.key", "keys/node.key", "keys/runtime.secret", "private/secret.key"):
        assert first[name] != second[name]


def test_a_second_enrolment_changes_nothing(settings: SiteSettings) -> None:
    enrol(settings, declared_patients=84)
    before = contents(settings)
    with pytest.raises(ConfigError, match=r"site\.key, .*node\.key: there is a key already; 'enroll --rotate'"):
        enrol(settings, declared_patients=999)
    settings.server.key.unlink()
    with pytest.raises(ConfigError, match=r"node\.key: there is a key already"):
        enrol(settings, declared_patients=999)
    assert contents(settings) == {name: content for name, content in before.items() if name != "keys/site.key"}


def test_a_private_folder_that_is_there_is_kept(settings: SiteSettings) -> None:
    prepare(settings.site.private, SitePolicy.simulated(declared_patients=7))
    before = contents(settings)
    lines = enrol(settings, declared_patients=84)
    assert {name: contents(settings)[name] for name in before} == before
    assert not [line for line in lines if POLICY in line]


def test_a_lost_ledger_is_not_replaced_by_an_empty_one(settings: SiteSettings) -> None:
    prepare(settings.site.private, SitePolicy.simulated(declared_patients=7))
    (settings.site.private / LEDGER).unlink()
    (settings.site.private / WITNESS).unlink()
    before = contents(settings)
    with pytest.raises(PrivacyError, match="has a secret and no ledger: bring ledger and witness back"):
        enrol(settings, declared_patients=84)
    assert contents(settings) == before
    assert (settings.site.private / SECRET).exists()


def test_keys_are_not_put_where_others_can_look_and_it_can_be_tried_again(settings: SiteSettings) -> None:
    keys = settings.server.key.parent
    keys.mkdir(mode=0o755)
    keys.chmod(0o755)
    with pytest.raises(ConfigError, match=f"'{keys}' holds keys and is open to others: chmod 750"):
        enrol(settings, declared_patients=84)
    assert list(keys.iterdir()) == []
    keys.chmod(0o750)
    enrol(settings, declared_patients=84)
    assert len(public_keys(settings)) == 1


def test_a_key_is_changed_in_two_steps_and_the_old_one_is_kept(settings: SiteSettings, authority: Authority) -> None:
    enrol(settings, declared_patients=84)
    certify(settings, authority)
    before = contents(settings)
    keys = settings.server.key.parent
    lines = renew(settings)
    assert str(keys / f"{NAME}.csr") in lines[0]
    assert str(keys / "site.crt.new") in lines[1]
    after = contents(settings)
    assert {name for name in after if after[name] != before.get(name)} == {
        *("keys/site.key.new", "keys/node.key.new", f"keys/{NAME}.csr")
    }
    assert {stat.S_IMODE((keys / f"{name}.key.new").stat().st_mode) for name in ("site", "node")} == {0o600}
    with pytest.raises(ConfigError, match=r"site\.crt\.new: not there yet"):
        change_over(settings)
    certify(settings, authority, suffix=".new")
    new = public_keys(settings, ".new")
    assert len(new) == 1
    assert "site retire" in change_over(settings)[0]
    assert public_keys(settings) == new
    tls_context(settings)
    for name in ("site.key", "node.key", "site.crt"):
        assert (keys / f"{name}.old").read_bytes() == before[f"keys/{name}"]
        assert not (keys / f"{name}.new").exists()
    assert {
        stat.S_IMODE((keys / f"{name}.key{end}").stat().st_mode) for name in ("site", "node") for end in ("", ".old")
    } == {0o600}
    renew(settings)
    assert public_keys(settings) == new


def test_a_certificate_of_another_key_is_not_changed_to(settings: SiteSettings, authority: Authority) -> None:
    enrol(settings, declared_patients=84)
    certify(settings, authority)
    renew(settings)
    crt = settings.server.certificate
    for content in (crt.read_bytes(), b"", b"no certificate"):
        crt.with_name("site.crt.new").write_bytes(content)
        before = contents(settings)
        with pytest.raises(ConfigError, match=r"site\.crt\.new' is not the certificate of '.*site\.key\.new'"):
            change_over(settings)
        assert contents(settings) == before
    tls_context(settings)


def test_a_request_on_its_way_is_not_replaced_by_another_one(settings: SiteSettings) -> None:
    with pytest.raises(ConfigError, match="there is no key to change; 'enroll' makes the first one"):
        renew(settings)
    assert not settings.server.key.parent.exists()
    enrol(settings, declared_patients=84)
    renew(settings)
    before = contents(settings)
    with pytest.raises(ConfigError, match="is there already and waits for its certificate"):
        renew(settings)
    assert contents(settings) == before


def test_a_site_that_never_had_its_first_certificate_can_use_a_second_key(
    settings: SiteSettings, authority: Authority
) -> None:
    enrol(settings, declared_patients=84)
    renew(settings)
    certify(settings, authority, suffix=".new")
    change_over(settings)
    assert describe(settings.server.certificate.read_bytes(), at=datetime.now(UTC)).subject == NAME
    tls_context(settings)
