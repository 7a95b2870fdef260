"""``python -m client``: a hospital's own command, on its own machine.

``enroll`` makes keys and the private folder, ``check`` says whether all is well, ``approve`` allows a bundle, ``run``
is the daemon. Each takes the path of ``site.toml``. Exit codes: 0 done, 2 usage or something that is not as it has to
be, 3 refused on privacy grounds.
"""

import getpass
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from client.bundles import MOST_BYTES, Approvals, Bundle
from client.settings import SiteSettings
from mcrage.errors import ConfigError, McrageError, PrivacyError

app = typer.Typer(
    help="Take part in a federation with a hospital's own rows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
audit_app = typer.Typer(help="Read and check the hospital's audit log.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(audit_app, name="audit")

SiteFile = Annotated[Path, typer.Argument(metavar="SITE.TOML", help="The hospital's settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("enroll")
def enroll(
    file: SiteFile,
    *,
    patients: Annotated[
        int, typer.Option(min=0, help="Number of training patients that the hospital makes public; needed once.")
    ] = 0,
    rotate: Annotated[bool, typer.Option("--rotate", help="Make another key beside the one in use.")] = False,
    change: Annotated[bool, typer.Option("--change-over", help="Use the other key from now on.")] = False,
) -> None:
    """Make the key pair, the private folder and its policy, and say what to send to the coordinator."""
    from client.enrolment import change_over, enrol, renew

    settings = SiteSettings.load(file)
    if rotate or change:
        lines = renew(settings) if rotate else change_over(settings)
    elif not patients:
        raise ConfigError("--patients: give the number of training patients that the hospital makes public")
    else:
        lines = enrol(settings, declared_patients=patients)
    for line in lines:
        typer.echo(line)


@app.command("check")
def check(
    file: SiteFile,
    *,
    only: Annotated[
        str, typer.Option(help="'network' or 'data': what one half of the daemon needs, as the user who runs it.")
    ] = "both",
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the server.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at everything that the daemon needs; exit code 2 if anything is not as it has to be."""
    from client.check import examine

    findings = examine(SiteSettings.load(file), offline=offline, only=only)
    if as_json:
        typer.echo(json.dumps([vars(each) for each in findings], indent=1))
    else:
        for each in findings:
            typer.echo(str(each))
    if any(each.is_problem for each in findings):
        raise typer.Exit(2)


@app.command("approve")
def approve(
    file: SiteFile,
    bundle: Annotated[Path, typer.Argument(metavar="APP.fab", help="The bundle, from the coordinator.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take the approval back.")] = False,
) -> None:
    """Show what is in a bundle and what changed since the last approved one, and allow it to run here."""
    settings = SiteSettings.load(file)
    approvals, read = Approvals(settings.daemon.approved), Bundle.read(_content(bundle))
    if withdraw:
        approvals.withdraw(read.digest)
        typer.echo(f"withdrawn: {read.digest}")
        return
    for line in _described(read, approvals):
        typer.echo(line)
    differences = read.differences()
    if differences:
        lines = "\n".join(f"  {line}" for line in differences[:20])
        raise ConfigError(
            f"the bundle is of another version than the code installed here; install that one first\n{lines}"
        )
    if not yes and not typer.confirm("This is the code that is installed here. Approve the bundle?"):
        raise typer.Exit(2)
    approvals.add(read, by=_user())
    typer.echo(f"approved: {read.digest}")


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)  # one of more is refused
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container, where the user has no name
        return str(os.getuid())


def _described(bundle: Bundle, approvals: Approvals) -> list[str]:
    lines = [f"SHA-256 {bundle.digest}", f"{len(bundle.files)} files"]
    last = approvals.last_files()
    if not last:
        return [*lines, *(f"  {name}" for name in sorted(bundle.files)), "no bundle has been approved before"]
    changes = bundle.changes_since(last)
    return [*lines, "since the last approved one:", *(f"  {line}" for line in changes or ["nothing has changed"])]


@app.command("run")
def run(
    file: SiteFile,
    *,
    only: Annotated[
        str, typer.Option(help="'network' or 'data': one half of the daemon, where two users run it.")
    ] = "both",
) -> None:
    """Take part until SIGTERM: keeps Flower's SuperNode and the process with the data running."""
    from client.daemon import run_daemon

    sys.exit(run_daemon(SiteSettings.load(file), only=only))


LogFile = Annotated[Path, typer.Argument(metavar="SITE.TOML", help="The hospital's settings.")]


@audit_app.command("verify")
def audit_verify(
    file: LogFile,
    *,
    expect_head: Annotated[str, typer.Option(help="Hash that the log had once, from another place.")] = "",
    expect_lines: Annotated[int, typer.Option(help="How many lines it had then.")] = 0,
) -> None:
    """Check the chain of hashes from the first line to the last; exit code 2 if it is broken."""
    from client.journal import verify

    path = _journal(file)
    verdict = verify(path, expect_head=expect_head or None, expect_lines=expect_lines or None)
    for problem in verdict.problems:
        typer.echo(problem, err=True)
    typer.echo(f"{path}: {verdict.lines:,} lines, head {verdict.head or 'none'}")
    if verdict.problems:
        raise typer.Exit(2)


@audit_app.command("show")
def audit_show(
    file: LogFile,
    *,
    last: Annotated[int, typer.Option(min=1, help="How many lines.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the newest lines of the log."""
    from client.journal import read

    for line in read(_journal(file), last=last):
        if "damaged" in line:
            typer.echo(json.dumps(line) if as_json else f"line {line['damaged']} is damaged")
            continue
        others = {name: value for name, value in line.items() if name not in ("n", "at", "event", "previous", "hash")}
        text = " ".join(f"{name}={value}" for name, value in others.items())
        typer.echo(json.dumps(line) if as_json else f"{line['n']} {line['at']} {line['event']} {text}")


def _journal(file: Path) -> Path:
    from client.places import JOURNAL

    path = SiteSettings.load(file).site.private / JOURNAL
    if not path.exists():
        raise ConfigError(f"'{path}' is not there; the daemon begins it")
    return path


def main() -> None:
    """Runs the command; errors become one line per problem on stderr and exit code 2 or 3."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app(prog_name="python -m client")
    except McrageError as error:
        typer.echo(str(error), err=True)
        sys.exit(3 if isinstance(error, PrivacyError) else 2)
    except Exception as error:
        if os.environ.get("MCRAGE_DEBUG"):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            typer.echo(f"'{error.filename}' cannot be used: {error.strerror}", err=True)
            sys.exit(2)
        # The text of an unforeseen error may hold a cell of a patient's row.
        typer.echo(f"unexpected {type(error).__name__}; set MCRAGE_DEBUG=1 to see where", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
