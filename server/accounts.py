"""What the sites' privacy ledgers say at the end of a run, as far as it is true to itself."""

import logging

from flwr.app import ConfigRecord, Message, RecordDict

from mcrage.config import RunConfig
from mcrage.errors import PrivacyError
from mcrage.messages import AccountInstruction, SiteAccount
from mcrage.privacy.statement import PrivacyAccount, statement
from server.exchange import Subject
from server.roster import Roster
from server.validation import check_replies

_LOG = logging.getLogger("mcrage.server")


def collect_accounts(config: RunConfig, roster: Roster) -> dict[str, PrivacyAccount]:
    """What the ledgers of the sites say, by site; of a busy site too, which answers once it is done.

    Left out is a site that does not answer, speaks for another one, or tells an epsilon that is not that of its events.
    """
    content = RecordDict({"config": ConfigRecord(dict(AccountInstruction(run=config.run).to_wire().values))})
    standing = roster.standing(roster.nodes)
    sites = sorted([*standing.free, *standing.busy])
    messages = {site: Message(content, roster.nodes[site], "query.account") for site in sites}
    answers = roster.exchange.ask(messages, Subject("account", config.federation.rounds))
    replies = check_replies(answers, asked=sites, read=SiteAccount.from_wire)
    accounts, missing = {}, {**standing.absent, **replies.dropped}
    for site, reply in replies.accepted.items():
        try:
            if reply.account.site != site:
                raise PrivacyError("it names another site")
            statement(reply.account)
        except PrivacyError as error:
            missing[site] = str(error)
        else:
            accounts[site] = reply.account
    for site, reason in missing.items():
        _LOG.warning("the privacy account of site %s is left out: %s", site, reason)
    return accounts
