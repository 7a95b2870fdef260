"""What stands between an instruction and a hospital's rows: the policy first, then the ledger, and only then the data.

All of it lies in the hospital's private folder (:mod:`client.places`).
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from client.places import LEDGER, POLICY, SECRET, WITNESS
from client.policy import Instruction, SitePolicy
from mcrage import __version__
from mcrage.data.schema import TableSchema
from mcrage.errors import MessageError, RefusedError
from mcrage.messages import CountInstruction, SumInstruction
from mcrage.peers import Peer, peers_from_json
from mcrage.privacy.accounting import epsilon, merge
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import create_secret, derive, read_secret
from mcrage.privacy.ledger import Limits, PrivacyLedger
from mcrage.privacy.masking import MaskKey
from mcrage.privacy.statement import PrivacyAccount, accountant
from mcrage.refusals import REFUSALS

UNPROTECTED = PrivacyEvent(mechanism="unprotected")

_LOG = logging.getLogger("mcrage.site")


@dataclass(frozen=True)
class Release:
    """A release that was charged, or was before.

    Attributes:
        secret: What its noise and draws are derived from.
        digest: Of everything that it depends on; other inputs give other noise.
    """

    secret: bytes
    digest: bytes

    def key(self, purpose: str) -> bytes:
        """32 bytes for one purpose of this release."""
        return derive(self.secret, purpose, self.digest)

    @property
    def spreading(self) -> bytes:
        """32 bytes that are the same for all releases: what spreads rounded values within their rounding."""
        return derive(self.secret, "spreading")


@dataclass(frozen=True)
class Protection:
    """The private folder of a hospital.

    Attributes:
        folder: Where it is.
        site: Name of the hospital.
        num_threads: Threads of torch.
    """

    folder: Path
    site: str
    num_threads: int = 1

    @property
    def policy(self) -> SitePolicy:
        """What the hospital allows, read anew.

        Raises:
            RefusedError: If there is no valid policy: then nothing is allowed.
        """
        return SitePolicy.load(self.folder / POLICY)

    def check(self, instruction: Instruction, schema: TableSchema) -> None:
        """Raises unless the policy allows the instruction as it stands; reads no row and spends nothing.

        Raises:
            RefusedError: With the code of the rule.
        """
        self.policy.check(instruction, schema)

    def account(self, run: str) -> PrivacyAccount:
        """What the ledger says, of one run and in all.

        Raises:
            LedgerError: If the ledger cannot be used.
        """
        policy = self.policy
        with PrivacyLedger.open(self.folder / LEDGER, witness=self.folder / WITNESS) as ledger:
            rows, since = ledger.rows, ledger.since
        every = [event for row in rows for event in row.events]
        of_run = [event for row in rows if row.run == run for event in row.events]
        return PrivacyAccount(
            site=self.site,
            since=since.date().isoformat(),
            delta=policy.delta,
            epsilon=epsilon(every, delta=policy.delta),
            epsilon_run=epsilon(of_run, delta=policy.delta),
            events=merge(every),
            declared_patients=policy.privacy.declared_patients,
            accountant=accountant(),
            has_unprotected=any(event.mechanism == "unprotected" for event in every),
        )

    def mask_key(self, run: str, *, dataset: str) -> MaskKey:
        """The site's key for the masks of a run, as long as nothing changes here.

        Raises:
            PrivacyError: If the site has no secret.
        """
        return MaskKey(read_secret(self.folder / SECRET), run.encode() + self._state(dataset))

    def offer(self, run: str, *, dataset: str) -> str:
        """The key for masks as the other sites get it, signed."""
        public, secret = self.mask_key(run, dataset=dataset).public, read_secret(self.folder / SECRET)
        return Peer.signed(public, site=self.site, run=run, secret=secret).to_json()

    def peers(self, instruction: SumInstruction | CountInstruction, own: MaskKey) -> dict[str, bytes]:
        """Keys for masks of the sites that are asked together, if the noise may be shared with them.

        Raises:
            RefusedError: If not, with the code of the rule.
        """
        try:
            peers = peers_from_json(instruction.peers, run=instruction.run)
        except MessageError as error:
            raise RefusedError(2134, f"{REFUSALS[2134]}: {error}") from None
        public = {site: peer.key for site, peer in peers.items()}
        if public.get(self.site) != own.public:
            raise RefusedError(2134, f"{REFUSALS[2134]}: the key of this site is not among them")
        if len({*public.values()}) < len(public):
            raise RefusedError(2134, f"{REFUSALS[2134]}: two sites have the same key")
        signing = {site: peer.signing_key for site, peer in peers.items() if site != self.site}
        self.policy.check_peers(signing, colluders=instruction.colluders)
        return public

    def _state(self, dataset: str) -> bytes:
        """Whatever moves a sum, were it by a rounding: one noise over two sums would bare their difference."""
        computed = [dataset, self.policy.privacy.declared_patients, self.num_threads, __version__, torch.__version__]
        return json.dumps(computed).encode()

    def charge(self, instruction: Instruction, events: Sequence[PrivacyEvent], *, dataset: str) -> Release:
        """Records what is about to be done; the data may be read once this has returned.

        Args:
            instruction: What was asked.
            events: What its reply is, to the accountant.
            dataset: Fingerprint of the table.

        Raises:
            BudgetExceededError: If the budget does not allow it.
            LedgerError: If the ledger cannot be used.
        """
        policy, task = self.policy, type(instruction).__name__.removesuffix("Instruction").lower()
        asked = instruction_digest(instruction)
        is_protected = instruction.dp and instruction.noise_seed < 0
        digest = hashlib.sha256(asked + self._state(dataset)).hexdigest()
        # A run without noise is one fact about the run, however many messages it has.
        key = digest if is_protected else f"without noise {instruction.run} {dataset}"
        limits = Limits(
            delta=policy.delta,
            epsilon_total=policy.privacy.max_epsilon_total,
            epsilon_run=policy.privacy.max_epsilon_run,
            most_events=policy.privacy.max_releases,
            allow_unprotected=not policy.privacy.required,
        )
        with PrivacyLedger.open(self.folder / LEDGER, witness=self.folder / WITNESS) as ledger:
            ledger.charge(
                tuple(events) if is_protected else (UNPROTECTED,),
                key=key,
                run=instruction.run,
                task=task if is_protected else "without noise",
                dataset=dataset,
                limits=limits,
            )
        if is_protected:
            return Release(read_secret(self.folder / SECRET), bytes.fromhex(digest))
        if instruction.dp:
            _LOG.warning("THE NOISE COMES FROM A SEED THAT THE SERVER KNOWS: it protects nobody; simulations only")
        # The keys of masks follow from secrets, which no seed knows.
        if isinstance(instruction, SumInstruction | CountInstruction):
            asked = instruction_digest(instruction.model_copy(update={"peers": ""}))
        return Release(derive(bytes(32), "simulated", instruction.noise_seed, self.site), asked)


def instruction_digest(instruction: Instruction) -> bytes:
    """Of every value and every parameter of an instruction."""
    wire = instruction.to_wire()
    digest = hashlib.sha256(json.dumps([type(instruction).__name__, sorted(wire.values.items())]).encode())
    for name, array in sorted(wire.arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    return digest.digest()


def prepare(folder: Path, policy: SitePolicy) -> None:
    """Makes a hospital's private folder: its policy, an empty ledger and a new secret.

    Raises:
        LedgerError, PrivacyError: If there is a ledger or a secret already.
    """
    witness = folder / WITNESS
    for each in (folder, witness.parent):
        each.mkdir(parents=True, exist_ok=True, mode=0o700)
    PrivacyLedger.create(folder / LEDGER, witness=witness).close()
    create_secret(folder / SECRET)
    text = policy.to_toml()
    (folder / POLICY).write_text(text, encoding="utf-8")
    (folder / POLICY).chmod(0o600)
