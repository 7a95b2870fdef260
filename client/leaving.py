"""What may leave a hospital by its policy, in words for a data protection officer.

A part of the doctor (:mod:`client.check`).
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from client.findings import Line
from client.holdings import allowed
from client.places import POLICY
from client.rights import barred
from client.settings import SiteSettings
from mcrage.data.schema import TableSchema
from mcrage.errors import RefusedError, SchemaError

if TYPE_CHECKING:  # what needs torch is imported by the checks: that it is missing has to be told as well
    from client.policy import PrivacyRules, SitePolicy


def leaving_lines(settings: SiteSettings) -> Iterator[Line]:
    """A line for each kind of thing that may leave, and how."""
    for path in (settings.site.private / POLICY, settings.site.schema_file):
        if closed := barred(path):
            yield "note", f"not told: '{path}' {closed}", ""
            return
    try:
        schema = TableSchema.load(settings.site.schema_file)
        policy = allowed(settings)
    except (SchemaError, RefusedError):
        yield "note", "nothing: it takes a valid policy and a valid data dictionary", ""
        return
    for text in _leaving(policy, schema):
        yield "note", text, ""


def _leaving(policy: "SitePolicy", schema: TableSchema) -> list[str]:
    privacy, data = policy.privacy, policy.data
    may_be_exact, may_train = not privacy.required, "train" in data.tasks
    modelled = [column.name for column in schema.modelled]
    closed = [name for name in modelled if data.allowed_columns and name not in data.allowed_columns]
    always = "in every run: the data dictionary, versions of programs, what the ledger says, codes of errors"
    if closed:
        return [always, f"nothing else: the policy does not allow the column {', '.join(closed)}"]
    counts, histograms = (partial(_may_describe, policy, schema, marginals=each) for each in (False, True))
    has_loss = may_be_exact and data.release_loss and {"train", "evaluate"} & {*data.tasks}
    return [
        always,
        f"numbers of patients by group, none from 1 to {data.minimum_cell - 1}: "
        + _ways(f"epsilon at most {privacy.max_count_epsilon:g}", counts(dp=True), counts(dp=False)),
        "histograms of single columns: "
        + _ways(f"at least {privacy.min_histogram_noise:g} on each bar", histograms(dp=True), histograms(dp=False)),
        "parameters of the model: "
        + _ways(
            f"at least {privacy.min_noise_multiplier:g} times what one patient can change in a step",
            may_train and privacy.declared_patients > 0 and "local" in privacy.noise,
            may_train and may_be_exact,
        ),
        "sums over patients that open only together with those of other sites: "
        + (_shared(privacy) if may_train and "shared" in privacy.noise else "never"),
        "tables of counts of a few columns: "
        + (_tables(policy) if may_train and privacy.allow_histograms else "never"),
        "mean losses: " + ("as they are" if has_loss else "never"),
        "scores of test patients, counted: "
        + _ways(f"epsilon at most {privacy.max_score_epsilon:g}", "evaluate" in data.tasks, False),
        f"with noise, all together: epsilon at most {privacy.max_epsilon_run:g} a run and "
        f"{privacy.max_epsilon_total:g} for ever, delta {policy.delta:.2g}, {privacy.max_releases:,} releases",
        f"{len(modelled)} columns are modelled: {', '.join(modelled[:20])}{', ...' if len(modelled) > 20 else ''}",
    ]


def _shared(privacy: "PrivacyRules") -> str:
    known = ", ".join(peer.partition(":")[0] for peer in privacy.peers)
    others = "any that the server names" if privacy.allow_unknown_peers else known or "none, as 'peers' names none"
    return (
        f"with noise that at least {privacy.min_sharing_sites} sites add up together (at least "
        f"{privacy.min_noise_multiplier:g} times what one patient can change in a step, also where "
        f"{privacy.min_colluders} of them tell theirs); the other sites: {others}"
    )


def _tables(policy: "SitePolicy") -> str:
    privacy, least = policy.privacy, f"at least {policy.privacy.min_histogram_noise:g} on each cell"
    shared = f"{least}, of which {privacy.min_sharing_sites} sites or more add up"
    ways = {"local": f"with noise ({least})", "shared": f"in a sum with noise ({shared})"}
    exact = ["as they are"] if not privacy.required and policy.data.release_exact_counts else []
    return " or ".join([*(ways[each] for each in privacy.noise), *exact]) or "never"


def _ways(noise: str, has_noise: bool, is_exact: bool) -> str:
    return " or ".join([f"with noise ({noise})"] * has_noise + ["as they are"] * is_exact) or "never"


def _may_describe(policy: "SitePolicy", schema: TableSchema, *, marginals: bool, dp: bool) -> bool:
    """Whether the policy, which is asked itself, allows counts or histograms."""
    from mcrage.messages import DescribeInstruction

    asked = {"run": "0" * 64, "test_fraction": policy.data.min_test_fraction, "marginals": marginals, "dp": dp}
    rules = policy.privacy
    noise = {"histogram_noise": rules.min_histogram_noise} if marginals else {}
    protected = {"delta": policy.delta, "count_epsilon": rules.max_count_epsilon} | noise if dp else {}
    try:
        policy.check(DescribeInstruction.model_validate(asked | protected), schema)
    except RefusedError:
        return False
    return True
