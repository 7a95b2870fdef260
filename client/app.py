"""The hospital's side as a Flower ClientApp: each handler turns an instruction into one permitted reply."""

from collections.abc import Callable
from functools import partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.boundary import answer, incoming
from client.places import DEBUG_LOG
from client.site import Site
from mcrage.messages import (
    AccountInstruction,
    CountInstruction,
    DescribeInstruction,
    EvaluateInstruction,
    Outgoing,
    SumInstruction,
    TrainInstruction,
)

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Schema, suppressed group counts and, where asked for, one-way histograms."""
    return _answered(message, context, lambda site: site.describe(DescribeInstruction.from_wire(incoming(message))))


@app.query("account")
def account(message: Message, context: Context) -> Message:
    """What the site's ledger says."""
    return _answered(message, context, lambda site: site.account(AccountInstruction.from_wire(incoming(message))))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Parameters after some steps on the site's training rows."""
    return _answered(message, context, lambda site: site.train(TrainInstruction.from_wire(incoming(message))))


@app.train("sum")
def summed(message: Message, context: Context) -> Message:
    """The site's part of a step with shared noise, under a mask."""
    return _answered(message, context, lambda site: site.sum(SumInstruction.from_wire(incoming(message))))


@app.train("count")
def count(message: Message, context: Context) -> Message:
    """Tables of counts of the site's training patients, exact, noisy, or as a part of a sum under a mask."""
    return _answered(message, context, lambda site: site.count(CountInstruction.from_wire(incoming(message))))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss on the site's test rows."""
    return _answered(message, context, lambda site: site.evaluate(EvaluateInstruction.from_wire(incoming(message))))


def _answered(message: Message, context: Context, work: Callable[[Site], Outgoing]) -> Message:
    try:
        site = Site.of(context.node_config, context.run_config)
    except Exception as error:  # noqa: BLE001  # answered like any other, but without a folder for its text
        return answer(message, partial(_raise, error))
    return answer(message, lambda: work(site), sign=site.sign, log=site.private_dir / DEBUG_LOG)


def _raise(error: Exception) -> Outgoing:
    raise error
