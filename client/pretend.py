"""The private folder of a hospital that is only pretended, made when it is first asked."""

from pathlib import Path

from client.places import POLICY
from client.policy import SitePolicy
from client.protection import prepare

PRIVATE = "private"

_TRAINING_SHARE = 0.7


def pretend_private_folder(folder: Path, site: str, data_path: Path) -> Path:
    """The folder ``private/SITE`` below another one, with a policy that allows everything.

    It declares the number of training patients to two digits, from the number of lines of the table's file: a real
    hospital writes down what it wants to be known.
    """
    private = folder / PRIVATE / site
    if not (private / POLICY).exists():
        with data_path.open("rb") as file:
            patients = _TRAINING_SHARE * max(sum(1 for _ in file) - 1, 1)
        prepare(private, SitePolicy.simulated(declared_patients=max(int(float(f"{patients:.2g}")), 1)))
    return private
