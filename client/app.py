"""The hospital's side as a Flower ClientApp: each handler turns an instruction into one permitted reply."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.boundary import answer, incoming
from client.site import Site
from mcrage.messages import DescribeInstruction, EvaluateInstruction, TrainInstruction

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Schema, suppressed group counts and, where asked for, one-way histograms."""
    return answer(message, lambda: _site(context).describe(DescribeInstruction.from_wire(incoming(message))))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Parameters after some steps on the site's training rows."""
    return answer(message, lambda: _site(context).train(TrainInstruction.from_wire(incoming(message))))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss on the site's test rows."""
    return answer(message, lambda: _site(context).evaluate(EvaluateInstruction.from_wire(incoming(message))))


def _site(context: Context) -> Site:
    return Site.of(context.node_config, context.run_config)
