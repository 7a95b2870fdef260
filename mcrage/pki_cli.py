"""``mcrage pki``: the certificates of a federation: make its authority, issue, renew and look.

Only ``init`` and ``issue`` write a key, each to a file that only its owner reads; none is ever printed.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcrage.errors import ConfigError

if TYPE_CHECKING:
    from mcrage.pki import CertificateInfo

app = typer.Typer(help="Make and issue the certificates of a federation.", no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The authority's folder.")]

_SERVER_DAYS, _SITE_DAYS, _SOON_DAYS = 90, 365, 30


@app.command("init")
def init(
    folder: Folder,
    *,
    name: Annotated[str, typer.Option(help="The federation's name, in every certificate.")],
    days: Annotated[int, typer.Option(help="How long the authority is valid.")] = 3650,
) -> None:
    """Make the federation's authority in a new folder; one that is there is never replaced."""
    from mcrage.pki import CA_CERTIFICATE, CA_KEY, Authority, describe

    info = describe(Authority.create(folder, name=name, days=days).certificate_pem)
    typer.echo(f"{folder / CA_CERTIFICATE}: authority '{name}', {_validity(info)}; every hospital needs this file")
    typer.echo(f"{folder / CA_KEY}: its key: keep a copy offline, and never give it away")


@app.command("issue")
def issue(
    folder: Folder,
    *,
    server: Annotated[
        list[str] | None, typer.Option(help="Host name or IP address of the server; any number of them.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Name of a hospital.")] = None,
    request: Annotated[Path | None, typer.Option(help="The request that the hospital made.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the hospital's certificate goes.")] = None,
    days: Annotated[
        int | None, typer.Option(help="How long it is valid, at most 825; by default 90 for a server, 365 for a site.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")] = False,
) -> None:
    """Issue the server's certificate with a new key, or a hospital's for the key that it made."""
    from mcrage.pki import Authority

    if server and site is None and request is None and out is None:
        _tell_server(folder, Authority.open(folder).issue_server(server, days=_SERVER_DAYS if days is None else days))
    elif site is not None and request is not None and out is not None and not server:
        lasting = _SITE_DAYS if days is None else days
        _issue_site(folder, site=site, request=request, out=out, days=lasting, force=force)
    else:
        raise ConfigError("say what to issue: --server NAME, or --site NAME with --request FILE and --out FILE")


def _issue_site(folder: Path, *, site: str, request: Path, out: Path, days: int, force: bool) -> None:
    from mcrage.pki import Authority, describe, read_pem, write_atomically

    if out.exists() and not force:
        raise ConfigError(f"'{out}' is there already; give --force to replace it")
    certificate = Authority.open(folder).issue_site(read_pem(request), site=site, days=days)
    write_atomically(out, certificate, mode=0o644)
    info = describe(certificate)
    typer.echo(f"{out}: site {site}, {_validity(info)}, serial {info.serial}")


@app.command("renew")
def renew(
    folder: Folder, *, days: Annotated[int, typer.Option(help="How long it is valid, at most 825.")] = _SERVER_DAYS
) -> None:
    """Issue the server's certificate again: the same names, a new key."""
    from mcrage.pki import Authority

    _tell_server(folder, Authority.open(folder).renew(days=days))


def _tell_server(folder: Path, info: "CertificateInfo") -> None:
    from mcrage.pki import SERVER_CERTIFICATE

    names = ", ".join(info.names)
    typer.echo(f"{folder / SERVER_CERTIFICATE}: for {names}, {_validity(info)}, serial {info.serial}")


def _validity(info: "CertificateInfo") -> str:
    return f"valid until {info.not_after:%Y-%m-%d}"


@app.command("show")
def show(
    path: Annotated[Path, typer.Argument(metavar="FILE_OR_FOLDER", help="A certificate, or a folder of *.crt files.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what certificates say and how long they are valid; exit code 2 if one has expired."""
    from mcrage.pki import describe, read_pem

    files = sorted(path.glob("*.crt")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"'{path}' has no certificate, which would be a file *.crt")
    found = {file: describe(read_pem(file)) for file in files}
    if as_json:
        typer.echo(json.dumps([_as_dict(file, info) for file, info in found.items()], indent=1))
    else:
        typer.echo(_as_table(found))
    for file, info in found.items():
        if info.days_left <= _SOON_DAYS:
            typer.echo(f"{file}: {_warning(info)}", err=True)
    if any(info.days_left < 0 for info in found.values()):
        raise typer.Exit(2)


def _as_dict(file: Path, info: "CertificateInfo") -> dict[str, Any]:
    return {"file": str(file), **asdict(info), "not_after": info.not_after.isoformat()}


def _as_table(found: "dict[Path, CertificateInfo]") -> str:
    rows = [["what", "names", "serial", "valid until", "days left"]]
    for file, info in found.items():
        names = ", ".join(info.names) or info.subject
        # A certificate of others can hold what a terminal would obey.
        shown = "".join(sign if sign.isprintable() else "?" for sign in names)
        rows.append(
            [f"{info.purpose} ({file.name})", shown, info.serial, f"{info.not_after:%Y-%m-%d}", f"{info.days_left:,}"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _warning(info: "CertificateInfo") -> str:
    remedy = "make a new authority" if info.purpose == "authority" else "renew"
    if info.days_left < 0:
        return f"expired on {info.not_after:%Y-%m-%d}: {remedy}"
    return f"expires in {info.days_left} day{'s' * (info.days_left != 1)}: {remedy}"
