"""The examples of ``deploy/``: they have every setting, and are what the programs make of them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from client.settings import DaemonSection, ServerSection, SiteSection, SiteSettings
from server.home import CoordinatorSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def commented(path: Path, content: dict[str, Any]) -> None:
    """Fails unless every key has a comment in its line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for key in content:
        assert any(re.match(rf"{key} = .+ # \w", line) for line in lines), f"{key} of {path.name} has no comment"


def test_the_example_of_a_hospitals_settings_loads_and_has_every_key_at_its_default(tmp_path: Path) -> None:
    path = DEPLOY / "site.example.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    shutil.copy(path, tmp_path / "site.toml")
    (tmp_path / "site.toml").chmod(0o600)

    settings = SiteSettings.load(tmp_path / "site.toml")

    assert settings.site.name == "site-01"
    assert set(content) == set(SiteSettings.model_fields) - {"file"}
    for name, section in {"site": SiteSection, "server": ServerSection, "daemon": DaemonSection}.items():
        assert set(content[name]) == set(section.model_fields)
        fields = {key: field for key, field in section.model_fields.items() if not field.is_required()}
        assert {key: str(content[name][key]) for key in fields} == {k: str(f.default) for k, f in fields.items()}
        commented(path, content[name])


def test_the_example_of_a_coordinators_settings_loads_and_has_every_key_at_its_default() -> None:
    path = DEPLOY / "coordinator.example.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8"))

    settings = CoordinatorSettings.model_validate(content)

    assert set(content) == set(CoordinatorSettings.model_fields)
    assert settings == CoordinatorSettings(names=settings.names)
    commented(path, content)


def test_the_example_of_nginx_is_what_the_documented_command_makes(tmp_path: Path) -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (tmp_path / "deploy/nginx").mkdir(parents=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    subprocess.run(
        ["bash", "-euc", command], cwd=tmp_path, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}, check=True
    )

    made, kept = (folder / "deploy/nginx/nginx.conf" for folder in (tmp_path, ROOT))
    assert made.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")


def test_what_the_documents_link_to_is_there() -> None:
    for document in DEPLOY.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (DEPLOY / link).exists(), f"{document.name}: {link}"
