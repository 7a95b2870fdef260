"""``python -m server``: the coordinator's command, on the coordinator's machine.

Every verb but ``doctor`` takes the coordinator's folder first. Results go to stdout, progress and problems to stderr.
Exit codes: 0 done, 1 a run that was waited for failed, 2 usage or something that is not as it has to be.
"""

import json
import logging
import os
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mcrage.config import Scalar
from mcrage.errors import ConfigError, McrageError
from server.home import CoordinatorSettings, Home

_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
app = typer.Typer(help="Coordinate a federation of hospitals.", **_SETTINGS)
site_app = typer.Typer(help="Say which hospitals belong to the federation.", **_SETTINGS)
app.add_typer(site_app, name="site")

Folder = Annotated[Path, typer.Argument(metavar="HOME", help="The coordinator's folder.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
SiteName = Annotated[str, typer.Argument(metavar="SITE", help="Name of the site.")]
Request = Annotated[Path, typer.Argument(metavar="SITE.csr", help="What the site's 'enroll' made.")]
Out = Annotated[Path, typer.Option(help="Where the site's certificate is written; it goes back to the site.")]
Days = Annotated[int, typer.Option(min=1, help="How long the certificate is valid.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("init")
def init(
    home: Folder,
    *,
    name: Annotated[list[str], typer.Option(help="DNS name or address under which sites reach it; several times.")],
    listen: Annotated[str, typer.Option(help="Address and port of the proxy.")] = "0.0.0.0:8443",
    superlink_port: Annotated[int, typer.Option(help="Port of the SuperLink on loopback.")] = 18000,
) -> None:
    """Make the folder, the federation's authority, the server's certificate and the bundle for the hospitals."""
    from mcrage.pki import CA_KEY, Authority
    from server.coordinator import write_bundle

    settings = _settings(names=tuple(name), listen=listen, superlink_port=superlink_port)
    made = Home(home.absolute())
    made.require_new()
    # In this order, so that it can be called again after a name that no certificate can have.
    is_there = (made.pki / CA_KEY).exists()
    authority = Authority.open(made.pki) if is_there else Authority.create(made.pki, name="mcrage federation")
    authority.issue_server(name)
    Home.create(home, settings)
    write_bundle(made)
    typer.echo(f"{made.pki / 'ca.crt'}: send it to every hospital")
    typer.echo(f"{made.bundle}: send it to every hospital; {_digest(made.bundle)}")
    typer.echo(f"Then: python -m server up {home}")


def _settings(**values: Any) -> CoordinatorSettings:
    from pydantic import ValidationError

    from server.home import problems

    try:
        return CoordinatorSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(problems(error))) from None


def _digest(path: Path) -> str:
    from hashlib import sha256

    return f"SHA-256 {sha256(path.read_bytes()).hexdigest()}"


@app.command("up")
def up(home: Folder) -> None:
    """Run the coordinator until SIGTERM: SuperLink, proxy, and every run that is wanted."""
    from server.coordinator import run_coordinator

    os.umask(0o077)
    raise typer.Exit(run_coordinator(Home.open(home)))


@site_app.command("add")
def site_add(home: Folder, site: SiteName, request: Request, *, out: Out, days: Days = 365) -> None:
    """Let a hospital in: signs its request and registers its key."""
    from server.sites import add

    _require_folder_of(out)
    _hand_out(add(Home.open(home), site, _content(request), days=days), out, site)


@site_app.command("rotate")
def site_rotate(home: Folder, site: SiteName, request: Request, *, out: Out, days: Days = 365) -> None:
    """Give a hospital another key beside the one that it has, until 'retire'."""
    from server.sites import rotate

    _require_folder_of(out)
    _hand_out(rotate(Home.open(home), site, _content(request), days=days), out, site)


@site_app.command("retire")
def site_retire(home: Folder, site: SiteName) -> None:
    """Take all keys of a hospital but the newest out of use."""
    from server.sites import retire

    typer.echo(f"site {site}: {retire(Home.open(home), site)} old keys are out of use")


@site_app.command("remove")
def site_remove(home: Folder, site: SiteName) -> None:
    """Let a hospital in no more."""
    from server.sites import remove

    remove(Home.open(home), site)
    typer.echo(f"site {site}: removed; a running coordinator turns it away within seconds")


@site_app.command("list")
def site_list(home: Folder, *, as_json: AsJson = False) -> None:
    """Show the hospitals, their keys, and whether they are connected."""
    from server.overview import site_rows

    rows = site_rows(Home.open(home))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        expiry = f"certificate {row['days_left']} days" + (": renew" if row["days_left"] <= 30 else "")
        more = f"; {row['reason']}" if row["reason"] else ""
        typer.echo(f"{row['site']:<24} {row['state']:<18} {expiry}, {row['keys']} key{'s' * (row['keys'] > 1)}{more}")


def _require_folder_of(out: Path) -> None:
    """Before a key is taken up that serves once only."""
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        raise ConfigError(f"--out '{out}': no file can be written there")


def _hand_out(certificate: bytes, out: Path, site: str) -> None:
    from mcrage.files import replace_file

    replace_file(out, certificate, mode=0o644)
    typer.echo(f"{out}: send it back to {site}; it is not secret")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None


@app.command("start")
def start(
    home: Folder,
    run: RunName,
    *,
    settings: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One more setting.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print all settings and start nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end, with a line per round.")] = False,
) -> None:
    """Want a run; the running coordinator starts it."""
    from server import jobs

    opened = Home.open(home)
    given = {**_from_file(settings), **_from_changes(change or [])}
    if dry_run:
        typer.echo(json.dumps(jobs.parse(opened, run, given).to_flat(), indent=1))
        return
    jobs.create(opened, run, given)
    typer.echo(f"run {run}: wanted; 'python -m server status {home}' shows how it goes", err=True)
    if wait:
        _wait(opened, run)


@app.command("resume")
def resume(home: Folder, run: RunName, *, wait: Annotated[bool, typer.Option("--wait")] = False) -> None:
    """Go on with a run that was stopped or failed, after its last complete round."""
    from server import jobs

    opened = Home.open(home)
    jobs.want(opened, run, "run")
    typer.echo(f"run {run}: wanted", err=True)
    if wait:
        _wait(opened, run)


@app.command("stop")
def stop(home: Folder, run: RunName) -> None:
    """Stop a run; what is complete is kept."""
    from server import jobs

    jobs.want(Home.open(home), run, "stop")
    typer.echo(f"run {run}: will be stopped", err=True)


@app.command("status")
def status(
    home: Folder,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show sites and runs: round, epsilon per site, time left."""
    from server.overview import overview, overview_lines

    opened = Home.open(home)
    while True:
        content = overview(opened)
        typer.echo(json.dumps(content, indent=1) if as_json else "\n".join(overview_lines(content)))
        if not watch:
            return
        time.sleep(2)
        typer.echo("")


@app.command("rebalance")
def rebalance(
    home: Folder,
    run: RunName,
    *,
    rows: Annotated[int, typer.Option(min=0, help="Rows in all; 0 brings every group to parity.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Root of the drawing.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Draw rows of the groups that hospitals lack from a finished run's model."""
    from server.rebalance import rebalance as draw

    folder = Home.open(home).run(run)
    for line in draw(folder, rows=rows, seed=seed, force=force):
        typer.echo(line)


@app.command("report")
def report(home: Folder, run: RunName) -> None:
    """Write a page about a run: sites, rounds, privacy, fairness."""
    from server.report import write_report

    typer.echo(f"{write_report(Home.open(home), run)}")


@app.command("doctor")
def doctor(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The server as hospitals reach it.")],
    *,
    ca: Annotated[Path | None, typer.Option(help="The authority's certificate.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="A site's, to look with its eyes as well.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at a server from outside; exit code 2 unless it may be called production."""
    from server.doctor import is_production, probe

    probes = probe(address, ca=ca, certificate=certificate, key=key)
    typer.echo(json.dumps([vars(each) for each in probes], indent=1) if as_json else "\n".join(map(str, probes)))
    good = is_production(probes)
    typer.echo(f"{address}: {'production' if good else 'NOT production'}", err=True)
    if not good:
        raise typer.Exit(2)


def _wait(home: Home, run: str) -> None:
    """A line per round until the run ends; exit code 1 if it failed."""
    from server import jobs
    from server.home import read_json

    shown, settings = -1, jobs.load(home, run)
    while True:
        is_heard = jobs.is_heard(home, run)  # what stood there before the wish is not its end
        told, job = read_json(home.run(run) / "status.json"), jobs.read(home, run)
        done = int(told.get("server_round", 0))
        if done > max(shown, 0):
            seconds = told.get("seconds_per_round") or 0.0
            total = told.get("num_server_rounds") or settings.federation.rounds
            typer.echo(f"run {run}: round {done} of {total}, {seconds:.1f} s a round", err=True)
        shown = done
        if is_heard and job.state in jobs.ENDED:
            typer.echo(f"run {run}: {job.state}" + (f": {job.error}" if job.error else ""), err=True)
            raise typer.Exit(0 if job.state == "done" else 1)
        time.sleep(0.5)


def _from_file(path: Path | None) -> Mapping[str, Scalar]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}': {str(error).splitlines()[0]}") from None


def _from_changes(changes: list[str]) -> dict[str, Scalar]:
    settings: dict[str, Scalar] = {}
    for change in changes:
        key, _, text = change.partition("=")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        settings[key] = value if isinstance(value, Scalar) else text  # a date is none
    return settings


def main() -> None:
    """Runs the command; errors become one line per problem on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app(prog_name="python -m server")
    except McrageError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"'{error.filename}': {error.strerror}" if error.filename else str(error), err=True)
        sys.exit(2)
    except Exception as error:
        if os.environ.get("MCRAGE_DEBUG"):
            raise
        typer.echo(f"unexpected {type(error).__name__}; set MCRAGE_DEBUG=1 to see where", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
