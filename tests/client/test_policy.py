import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import client.policy
from client.policy import DataRules, Instruction, ModelRules, PrivacyRules, SitePolicy
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import MessageError, RefusedError
from mcrage.messages import DescribeInstruction, EvaluateInstruction, TrainInstruction, Wire
from mcrage.refusals import OF_FAULT, REFUSALS

MB = 2**20
TASKS = ["describe", "train", "evaluate"]
OPEN = {"required": False}
OTHER_NAME = {"columns": [{"name": "x", "kind": "integer", "minimum": 0, "maximum": 9}]}
MANY_COLUMNS = {"columns": [{"name": f"x{n}", "kind": "integer", "minimum": 0, "maximum": 9} for n in range(50_000)]}

Values = dict[str, Any]
Ask = Callable[..., Instruction]


def policy(privacy: Values | None = None, data: Values | None = None, model: Values | None = None) -> SitePolicy:
    """A hospital's policy: the defaults, but for what is given."""
    declared: Values = {"declared_patients": 1_000}
    rules = PrivacyRules(**(declared | (privacy or {})))
    return SitePolicy(privacy=rules, data=DataRules(**(data or {})), model=ModelRules(**(model or {})))


@pytest.fixture(scope="module")
def description(tiny_schema: TableSchema) -> str:
    return CDDPM.initialised(tiny_schema, None, config=ModelConfig(width=8, depth=1), random_state=0).describe()


@pytest.fixture(scope="module")
def ask(description: str) -> Ask:
    """Makes instructions that the default policy allows, but for what is given."""
    common: Values = {"run": "a" * 64, "test_fraction": 0.3, "dp": True, "delta": 1e-5}
    model: Values = {"server_round": 1, "seed": 0, "description": description, "parameters": {}}
    steps: Values = {"first_step": 0, "local_steps": 10, "total_steps": 1_000, "warmup_steps": 10}
    train = steps | {"batch_size": 64, "learning_rate": 5e-3, "proximal_mu": 0.0}
    noise: Values = {"noise_multiplier": 2.0, "sample_rate": 0.1, "max_grad_norm": 1.0, "draws": 4}
    without: Values = {"dp": False, "delta": 0.0}

    def make(task: str, **changes: object) -> Instruction:
        is_dp = changes.get("dp", True)
        if "size" in changes:
            changes["description"] = described(description, **changes.pop("size"))  # type: ignore[arg-type]
        if task == "describe":
            counts = {"count_epsilon": 0.5, "histogram_noise": 20.0} if is_dp else without
            return DescribeInstruction(**(common | {"marginals": True} | counts | changes))
        if task == "evaluate":
            return EvaluateInstruction(**(common | model | ({"score_epsilon": 0.5} if is_dp else without) | changes))
        return TrainInstruction(**(common | model | train | (noise if is_dp else without) | changes))

    return make


def described(description: str, schema: object = None, **config: object) -> str:
    """Another description: of another size, or with another schema."""
    content = json.loads(description)
    content["config"] |= config
    return json.dumps(content if schema is None else content | {"schema": schema})


def code_of(a_policy: SitePolicy, instruction: Instruction, schema: TableSchema) -> int:
    with pytest.raises(RefusedError) as caught:
        a_policy.check(instruction, schema)
    return caught.value.code


# For each rule a request that breaks it and no other: code, task, values, and what is not the policy's default.
ONE_PER_RULE: list[tuple[int, str, Values, dict[str, Values]]] = [
    (2002, "evaluate", {}, {"data": {"tasks": ("describe", "train")}}),
    (2003, "train", {"dp": False}, {}),
    (2004, "train", {"noise_seed": 0}, {}),
    (2005, "describe", {}, {"data": {"allowed_columns": ("sex", "age", "ill")}}),
    (2006, "train", {"test_fraction": 0.999}, {}),
    (2007, "train", {"dp": False, "noise_multiplier": 1.0}, {"privacy": OPEN}),
    (2008, "evaluate", {"dp": False}, {"privacy": OPEN}),
    (2101, "train", {"noise_multiplier": 0.05}, {}),
    (2102, "train", {"noise_multiplier": 1e9}, {}),
    (2103, "train", {"sample_rate": 1.0}, {}),
    (2104, "train", {"sample_rate": 0.0}, {}),
    (2105, "train", {"delta": 1e-3}, {}),
    (2106, "train", {"delta": 0.0}, {}),
    (2107, "train", {"max_grad_norm": 1e9}, {}),
    (2108, "train", {"draws": 10_000}, {}),
    (2109, "train", {"local_steps": 2_000, "total_steps": 20_000}, {}),
    (2110, "train", {"server_round": 10**6}, {}),
    (2111, "train", {"total_steps": 10**9}, {}),
    (2112, "train", {"first_step": 995}, {}),
    (2113, "describe", {"count_epsilon": 1e9}, {}),
    (2114, "describe", {"histogram_noise": 0.0}, {}),
    (2115, "evaluate", {"score_epsilon": 1e9}, {}),
    (2116, "describe", {}, {"privacy": {"allow_histograms": False}}),
    (2120, "train", {"learning_rate": 1e9}, {}),
    (2121, "train", {"batch_size": 10**9}, {}),
    (2122, "train", {"proximal_mu": 0.1}, {}),
    (2123, "train", {}, {"privacy": OPEN | {"declared_patients": 0}}),
    (2201, "train", {"size": {"width": 10**9}}, {}),
    (2202, "train", {"size": {"padding": " " * (50 * MB)}}, {}),
    (2203, "train", {"description": "no JSON"}, {}),
    (2204, "train", {"size": {"schema": OTHER_NAME}}, {}),
    (2307, "train", {"parameters": {"w": np.zeros(20_000_001, np.float32)}}, {}),
]

NO_MODELS = [
    *("", "{}", "[]", "1" * 100_000, '{"config": null, "schema": null}', "[" * 100_000),
    "[" + "[]," * 300_000 + "0]",
]
NO_SIZES: list[Values] = [*({"width": width} for width in (0, -1, 8.5, "8")), {"depth": True}, {"depth": math.inf}]
OTHER_SCHEMAS: list[object] = [[], "text", {"columns": [{}] * 5}, MANY_COLUMNS]

# Further requests for the same rules.
MORE: list[tuple[int, str, Values, dict[str, Values]]] = [
    (2002, "describe", {}, {"data": {"tasks": ()}}),
    *((2003, task, {"dp": False}, {}) for task in ("describe", "evaluate")),
    *((2004, task, {"noise_seed": 2**62}, {}) for task in ("describe", "evaluate")),
    (2006, "train", {"test_fraction": 1e-9}, {}),
    *((2007, "train", {"dp": False} | more, {"privacy": OPEN}) for more in ({"delta": 1e-5}, {"draws": 8})),
    (2007, "describe", {"dp": False, "count_epsilon": 0.5}, {"privacy": OPEN}),
    (2007, "evaluate", {"dp": False, "score_epsilon": 0.5}, {"privacy": OPEN, "data": {"release_loss": True}}),
    (2007, "train", {"noise_multiplier": 0.0, "sample_rate": 0.0, "max_grad_norm": 0.0}, {}),
    (2007, "describe", {"count_epsilon": 0.0, "histogram_noise": 0.0}, {}),
    (2007, "describe", {"marginals": False}, {}),
    (2007, "evaluate", {"score_epsilon": 0.0}, {}),
    *((2101, "train", {"noise_multiplier": noise}, {}) for noise in (0.0, 5e-324)),
    (2105, "describe", {"delta": 1e-3}, {}),
    (2106, "evaluate", {"delta": 0.0}, {}),
    *((2107, "train", {"max_grad_norm": norm}, {}) for norm in (0.0, 1e-9)),
    (2109, "train", {"local_steps": 10**9, "total_steps": 10**9}, {}),
    (2112, "train", {"first_step": 10**9}, {}),
    (2113, "describe", {"count_epsilon": 0.0}, {}),
    (2114, "describe", {"histogram_noise": 1e-3}, {}),
    (2116, "describe", {"dp": False}, {"privacy": OPEN | {"allow_histograms": False}}),
    (2201, "evaluate", {"size": {"depth": 10**9}}, {}),
    (2201, "train", {"size": {"width": 4096, "depth": 32}}, {}),
    *((2203, "train", {"description": text}, {}) for text in NO_MODELS),
    *((2203, "train", {"size": size}, {}) for size in NO_SIZES),
    *((2204, "train", {"size": {"schema": schema}}, {}) for schema in OTHER_SCHEMAS),
    (2307, "evaluate", {"parameters": {str(number): np.zeros(0, np.float32) for number in range(1_001)}}, {}),
    (2307, "train", {"parameters": {"w": np.zeros(10_000_001, np.float64)}}, {}),
]


@pytest.mark.parametrize(("code", "task", "changes", "rules"), [*ONE_PER_RULE, *MORE])
def test_a_hostile_request_is_refused_as_it_stands(
    code: int, task: str, changes: Values, rules: dict[str, Values], ask: Ask, tiny_schema: TableSchema
) -> None:
    instruction = ask(task, **dict(changes))
    before = instruction.model_dump_json(exclude={"parameters"})
    assert code_of(policy(**rules), instruction, tiny_schema) == code
    assert instruction.model_dump_json(exclude={"parameters"}) == before


def test_every_rule_has_a_code_of_its_own() -> None:
    codes = [code for code, *_ in ONE_PER_RULE]
    assert len(set(codes)) == len(codes) >= 30


def test_every_code_of_the_policy_is_raised_here_and_has_words() -> None:
    source = Path(client.policy.__file__).read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"\b2[0-3]\d\d\b", source)}
    of_sharing = {*range(2130, 2134), 2135, 2136, 2140, 2141, 2142}  # test_sharing_site.py, test_counting_site.py
    assert codes == {2001} | {code for code, *_ in ONE_PER_RULE} | of_sharing
    assert codes | set(OF_FAULT.values()) <= set(REFUSALS)


# What no policy has to decide: the message itself does not allow it.
NO_MESSAGES: dict[str, dict[str, list[Any]]] = {
    "train": {
        "noise-multiplier": [-1.0, math.nan, math.inf, "0"],
        "sample-rate": [1.5, -0.1],
        "draws": [0, 1.5],
        "local-steps": [0, -1],
        "learning-rate": [0.0],
        **{name: [-1] for name in ("first-step", "server-round", "batch-size", "proximal-mu", "max-grad-norm")},
        "delta": [0.1, -1e-5],
        "dp": [0, "false"],
        "noise-seed": [-2],
        "run": ["../../ledger"],
        "data-path": ["/etc/passwd"],
    },
    "describe": {"test-fraction": [0.0, 1.0], "count-epsilon": [-1.0], "histogram-noise": [-1.0], "columns": ["name"]},
    "evaluate": {"score-epsilon": [math.inf]},
}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in NO_MESSAGES.items() for name in names])
def test_what_is_not_a_message_never_reaches_the_policy(task: str, name: str, ask: Ask) -> None:
    instruction = ask(task)
    wire = instruction.to_wire()
    type(instruction).from_wire(wire)
    for value in NO_MESSAGES[task][name]:
        with pytest.raises(MessageError, match=name):
            type(instruction).from_wire(Wire(wire.values | {name: value}, wire.arrays))


# Of every limit the last value inside and the first one outside.
EDGES: list[tuple[int, str, str, Any, Any]] = [
    (2006, "train", "test_fraction", 0.05, math.nextafter(0.05, 0)),
    (2006, "train", "test_fraction", 0.5, math.nextafter(0.5, 1)),
    (2101, "train", "noise_multiplier", 0.5, math.nextafter(0.5, 0)),
    (2102, "train", "noise_multiplier", 1e3, math.nextafter(1e3, math.inf)),
    (2103, "train", "sample_rate", 0.5, math.nextafter(0.5, 1)),
    (2105, "train", "delta", 1e-5, math.nextafter(1e-5, 1)),
    (2107, "train", "max_grad_norm", 1e-3, math.nextafter(1e-3, 0)),
    (2107, "train", "max_grad_norm", 100.0, math.nextafter(100.0, math.inf)),
    (2108, "train", "draws", 32, 33),
    (2109, "train", "local_steps", 1_000, 1_001),
    (2110, "train", "server_round", 1_000, 1_001),
    (2111, "train", "total_steps", 20_000, 20_001),
    (2112, "train", "first_step", 990, 991),
    (2113, "describe", "count_epsilon", 1.0, math.nextafter(1.0, 2)),
    (2114, "describe", "histogram_noise", 5.0, math.nextafter(5.0, 0)),
    (2115, "evaluate", "score_epsilon", 1.0, math.nextafter(1.0, 2)),
    (2120, "train", "learning_rate", 1.0, math.nextafter(1.0, 2)),
    (2121, "train", "batch_size", 65_536, 65_537),
    (2201, "train", "size", {"width": 1024}, {"width": 1025}),
    (2201, "train", "size", {"depth": 8}, {"depth": 9}),
]


@pytest.mark.parametrize(("code", "task", "name", "inside", "outside"), EDGES)
def test_a_limit_belongs_to_what_is_allowed_and_nothing_beyond_it(
    code: int, task: str, name: str, inside: object, outside: object, ask: Ask, tiny_schema: TableSchema
) -> None:
    policy().check(ask(task, **{name: inside}), tiny_schema)
    assert code_of(policy(), ask(task, **{name: outside}), tiny_schema) == code


def test_a_description_may_be_as_long_as_the_limit(ask: Ask, description: str, tiny_schema: TableSchema) -> None:
    small = policy(model={"max_description_mb": 1})
    small.check(ask("train", description=description.ljust(MB)), tiny_schema)
    assert code_of(small, ask("train", description=description.ljust(MB + 1)), tiny_schema) == 2202


def test_the_parameters_of_a_model_count_together(ask: Ask, tiny_schema: TableSchema) -> None:
    small, half = policy(model={"max_parameters": 100}), np.zeros(50, np.float32)
    small.check(ask("evaluate", parameters={"a": half, "b": half}), tiny_schema)
    more = {"a": half, "b": half, "c": np.zeros(1, np.float32)}
    assert code_of(small, ask("evaluate", parameters=more), tiny_schema) == 2307


def test_counts_may_be_asked_for_without_histograms(ask: Ask, tiny_schema: TableSchema) -> None:
    without = ask("describe", marginals=False, histogram_noise=0.0)
    policy({"allow_histograms": False}).check(without, tiny_schema)


def test_columns_that_are_not_modelled_need_no_permission(ask: Ask, tiny_schema: TableSchema) -> None:
    policy(data={"allowed_columns": ("sex", "age", "lab", "ill")}).check(ask("train"), tiny_schema)


@pytest.mark.parametrize("task", ["describe", "train"])
def test_a_hospital_that_requires_no_privacy_may_keep_its_losses(task: str, ask: Ask, tiny_schema: TableSchema) -> None:
    policy(OPEN).check(ask(task, dp=False), tiny_schema)
    assert code_of(policy(OPEN), ask("evaluate", dp=False), tiny_schema) == 2008
    policy(OPEN, data={"release_loss": True}).check(ask("evaluate", dp=False), tiny_schema)


def test_delta_is_at_most_a_tenth_over_the_patients(ask: Ask, tiny_schema: TableSchema) -> None:
    for patients, max_delta, delta in ((100_000, 1e-5, 1e-6), (100_000, 1e-7, 1e-7), (10, 1e-5, 1e-5)):
        its = policy({"declared_patients": patients, "max_delta": max_delta})
        assert its.delta == pytest.approx(delta, rel=1e-12)
        its.check(ask("train", delta=its.delta), tiny_schema)
        assert code_of(its, ask("train", delta=math.nextafter(its.delta, 1)), tiny_schema) == 2105


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("changes", [{"dp": False}, {"noise_seed": 3}, {}])
def test_a_pretend_hospital_allows_what_simulations_ask(
    task: str, changes: Values, ask: Ask, tiny_schema: TableSchema
) -> None:
    SitePolicy.simulated(declared_patients=84).check(ask(task, **changes), tiny_schema)


def test_a_refusal_tells_the_hospital_what_was_asked(ask: Ask, tiny_schema: TableSchema) -> None:
    with pytest.raises(RefusedError, match=r"2101: .* below the site's policy.*'noise_multiplier': 0\.05"):
        policy().check(ask("train", noise_multiplier=0.05), tiny_schema)


GOOD = "[privacy]\ndeclared_patients = 1000\n"

BAD_LINES = [
    *(f"max_epsilon_run = {value}" for value in ("'3'", "inf", "nan", "-1.0")),
    *("max_epsilon = 3.0", "max_delta = 0.1", "min_noise_multiplier = 0.1", "max_sample_rate = 0.9"),
    *("required = 'no'", "required = 0", "allow_simulated_noise = true"),
]
FAULTS: list[tuple[str | bytes, str]] = [
    ("", "privacy: Field required"),
    ("[privacy]\n", "declared_patients"),
    *((f"[privacy]\ndeclared_patients = {number}\n", "declared_patients") for number in ("0", "-5", "1000.0", "true")),
    (GOOD + "max_epsilon_run = 2026-01-01\n", "not TOML of plain values"),
    *((GOOD + f"{line}\n", line.split()[0]) for line in BAD_LINES),
    (GOOD + "declared_patients = 2000\n", "not TOML"),
    (GOOD + "[data]\ntasks = ['train', 'sample']\n", "data.tasks"),
    (GOOD + "[data]\nallowed_columns = 'age'\n", "data.allowed_columns"),
    (GOOD + "[model]\nmax_width = '1024'\n", "model.max_width"),
    (GOOD + "[extra]\n", "extra"),
    ("declared_patients = 1000\n", "declared_patients"),
    ("privacy = 3\n", "privacy"),
    ("{}", "not TOML"),
    ("a = " + "[" * 100_000, "not TOML"),
    (b"\xff\xfe", "not TOML"),
    (GOOD + "#" * MB, "at most"),
]


def write(path: Path, text: str | bytes = GOOD) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(("text", "words"), FAULTS)
def test_a_policy_with_a_fault_allows_nothing(text: str | bytes, words: str, tmp_path: Path) -> None:
    _refused(write(tmp_path / "policy.toml", text), words)


def _refused(path: Path, words: str) -> None:
    with pytest.raises(RefusedError) as caught:
        SitePolicy.load(path)
    assert caught.value.code == 2001
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_others_may_read_a_policy_and_not_write_it(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.toml")
    for mode in (0o400, 0o600, 0o640, 0o644):
        path.chmod(mode)
        assert SitePolicy.load(path) == policy()
    for mode in (0o620, 0o602, 0o666, 0o664):
        path.chmod(mode)
        _refused(path, "writable by no other")


def test_a_policy_of_another_user_allows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "policy.toml")
    if os.getuid() == 0:
        os.chown(path, 12_345, 12_345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12_345)
    _refused(path, "of root or this user")


def test_without_a_file_of_its_own_a_hospital_allows_nothing(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "No such file")
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    write(tmp_path / "policy.toml")
    (tmp_path / "link").symlink_to(tmp_path / "policy.toml")
    _refused(tmp_path / "folder", "must be a file")
    _refused(tmp_path / "pipe", "must be a file")
    _refused(tmp_path / "link", "cannot be read")


@given(
    max_epsilon_total=st.floats(1e-3, 1e300),
    max_delta=st.floats(1e-300, 1e-3),
    declared_patients=st.integers(1, 10**12),
    allow_histograms=st.booleans(),
    columns=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    tasks=st.lists(st.sampled_from(TASKS)),
)
def test_a_written_policy_is_read_as_it_was(
    columns: list[str], tasks: list[Any], tmp_path_factory: pytest.TempPathFactory, **values: Any
) -> None:
    its = policy(values, data={"allowed_columns": tuple(columns), "tasks": tuple(tasks)})
    again = SitePolicy.load(write(tmp_path_factory.getbasetemp() / "policy.toml", its.to_toml()))
    assert again == its
    assert again.fingerprint == its.fingerprint


def test_the_policy_of_a_pretend_hospital_is_read_as_it_was(tmp_path: Path) -> None:
    its = SitePolicy.simulated(declared_patients=84)
    assert SitePolicy.load(write(tmp_path / "policy.toml", its.to_toml())) == its


def test_the_fingerprint_is_of_what_the_policy_says(tmp_path: Path) -> None:
    said = "# ours\n[privacy]\nmax_epsilon_run = 3\ndeclared_patients = 1_000\n"
    assert SitePolicy.load(write(tmp_path / "policy.toml", said)).fingerprint == policy().fingerprint
    assert policy({"max_epsilon_run": 3.1}).fingerprint != policy().fingerprint
    assert policy(data={"release_loss": True}).fingerprint != policy().fingerprint


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        policy().privacy.required = False
