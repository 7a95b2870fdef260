from client.leaving import _leaving
from client.policy import PrivacyRules, SitePolicy
from mcrage.data.schema import TableSchema


def test_with_whom_noise_is_shared_is_told_in_words(tiny_schema: TableSchema) -> None:
    peers = (f"st-john:{'0' * 64}", f"st-luke:{'1' * 64}")
    rules = PrivacyRules(declared_patients=84, noise=("shared",), peers=peers, min_colluders=2)
    told = _leaving(SitePolicy(privacy=rules), tiny_schema)
    assert "parameters of the model: never" in told
    assert told[4].endswith(
        "with noise that at least 3 sites add up together (at least 0.5 times what one patient can change in a step, "
        "also where 2 of them tell theirs); the other sites: st-john, st-luke"
    )
    nobody = SitePolicy(privacy=rules.model_copy(update={"peers": ()}))
    assert _leaving(nobody, tiny_schema)[4].endswith("the other sites: none, as 'peers' names none")
    anybody = SitePolicy(privacy=rules.model_copy(update={"allow_unknown_peers": True}))
    assert _leaving(anybody, tiny_schema)[4].endswith("the other sites: any that the server names")
