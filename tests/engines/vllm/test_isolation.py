"""Who may share KV and who may not: models, tenants, salts, adapters, replicas, and what was before a reset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import Reports, Step, ask, misses, model, play_all, reset, settle, start

PROMPT = tokens_of(700, 1400)
OTHERS = [tokens_of(701 + number, 1400) for number in range(2)]
LAST_BLOCK = 1399 // 32 * 32
WITH_ADAPTERS = {"enable_lora": True, "max_loras": 2}


def question(name: str, **more: str) -> Step:
    return ask(name, [PROMPT], **more)


def between(*steps: Step) -> list[Step]:
    """The steps, with an emptied local cache between them."""
    played: list[Step] = []
    for step in steps:
        played += [step, settle(), reset()]
    return played


def oracles() -> list[Step]:
    return [
        start("tiny-llama"),
        ask("cold", [PROMPT, *OTHERS]),
        start("tiny-llama-b"),
        question("cold, other model"),
        start("tiny-llama", engine=WITH_ADAPTERS),
        question("cold, adapter a", lora=model("lora-a")),
        question("cold, adapter b", lora=model("lora-b")),
    ]


def sharing(tier: Path) -> list[Step]:
    return [
        start("tiny-llama", tier),
        *between(
            question("first visit"),
            question("same model"),
            question("salt", salt="one"),
            question("same salt", salt="one"),
            question("other salt", salt="two"),
        ),
        start("tiny-llama-b", tier),
        *between(question("other model"), question("other model again")),
        start("tiny-llama", tier, tenant="someone"),
        *between(question("tenant"), question("same tenant")),
        start("tiny-llama", tier),
        question("same model again"),
        start("tiny-llama", tier, load=False),
        question("not to load"),
        start("tiny-llama", tier) | {"transfer": {"kv_role": "kv_consumer"}},
        *between(question("consumer"), ask("consumer, other prompt", OTHERS[:1])),
        ask("consumer, other prompt again", OTHERS[:1]),
        start("tiny-llama", tier) | {"transfer": {"kv_role": "kv_producer"}},
        *between(ask("producer", OTHERS[:1])),
        ask("producer again", OTHERS[:1]),
        start("tiny-llama", tier),
        ask("after the producer", OTHERS[:1]),
        question("before a reset"),
        {"do": "reset", "connector": True},
        *between(question("after a reset"), question("after a reset, again")),
    ]


def adapters(tier: Path, retrained: Path) -> list[Step]:
    a, b, own = model("lora-a"), model("lora-b"), str(retrained)
    shutil.copytree(a, own)
    return [
        start("tiny-llama", tier, engine=WITH_ADAPTERS),
        *between(
            question("no adapter"),
            question("no adapter again"),
            question("adapter a", lora=a),
            question("adapter a again", lora=a),
            question("adapter b", lora=b),
            question("before training", lora=own),
            question("before training, again", lora=own),
        ),
        start("tiny-llama", tier, engine=WITH_ADAPTERS),
        question("before training, restart", lora=own),
        start("tiny-llama", tier, engine=WITH_ADAPTERS),
        {"do": "copy", "source": f"{b}/adapter_model.safetensors", "target": own},
        question("retrained", lora=own),
    ]


def replica(tier: Path, meeting: Path, number: int) -> list[Step]:
    def meet(what: str) -> Step:
        return {"do": "meet", "folder": str(meeting / what), "parties": 2}

    own = OTHERS[number : number + 1]
    return [
        meet("start"),
        start("tiny-llama", tier),
        meet("ask"),
        ask(f"replica {number}, both", [PROMPT]),
        ask(f"replica {number}, own", own),
        settle(),
        meet("stored"),
        reset(),
        ask(f"replica {number}, all", [PROMPT, *OTHERS]),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("isolation")
    reports = play_all(
        sharing(folder / "shared"),
        adapters(folder / "adapters", folder / "trained"),
        [*oracles()],
    )
    # These two wait for each other, so both must be under way.
    reports += play_all(*(replica(folder / "replicas", folder / "meeting", number) for number in range(2)))
    return {name: report for run in reports for name, report in run.items()}


@pytest.mark.parametrize(
    ("name", "oracle", "hit"),
    [
        ("first visit", "cold", False),
        ("same model", "cold", True),
        ("salt", "cold", False),
        ("same salt", "cold", True),
        ("other salt", "cold", False),
        ("other model", "cold, other model", False),
        ("other model again", "cold, other model", True),
        ("tenant", "cold", False),
        ("same tenant", "cold", True),
        ("same model again", "cold", True),
        ("not to load", "cold", False),
        ("consumer", "cold", True),
        ("before a reset", "cold", True),
        ("after a reset", "cold", False),
        ("after a reset, again", "cold", True),
        ("no adapter", "cold", False),
        ("no adapter again", "cold", True),
        ("adapter a", "cold, adapter a", False),
        ("adapter a again", "cold, adapter a", True),
        ("adapter b", "cold, adapter b", False),
        ("before training", "cold, adapter a", False),
        ("before training, again", "cold, adapter a", True),
        ("before training, restart", "cold, adapter a", True),
        ("retrained", "cold, adapter b", False),
    ],
)
def test_kv_is_shared_only_where_it_is_the_same(runs: Reports, name: str, oracle: str, hit: bool) -> None:
    run = runs[name]
    assert run["tokens"] == runs[oracle]["tokens"][:1]
    assert run["cached"] == [LAST_BLOCK if hit else 0]
    assert run["counted"].get("external", 0) == (LAST_BLOCK if hit else 0)
    assert misses(run) == {}


def test_a_consumer_stores_nothing_and_a_producer_loads_nothing(runs: Reports) -> None:
    for role in ("consumer, other prompt", "producer"):
        for name in (role, f"{role} again"):
            assert runs[name]["tokens"] == [runs["cold"]["tokens"][1]]
            assert runs[name]["cached"] == [0]
    assert not any(name.startswith("store_") for name in runs["consumer, other prompt"]["counted"])
    assert runs["after the producer"]["cached"] == [LAST_BLOCK]


def test_the_oracles_differ(runs: Reports) -> None:
    names = ("cold", "cold, other model", "cold, adapter a", "cold, adapter b")
    assert len({tuple(runs[name]["tokens"][0]) for name in names}) == len(names)


@pytest.mark.parametrize("number", [0, 1])
def test_two_replicas_that_start_at_once_share_a_directory(runs: Reports, number: int) -> None:
    cold = runs["cold"]["tokens"]
    assert runs[f"replica {number}, both"]["tokens"] == cold[:1]
    assert runs[f"replica {number}, own"]["tokens"] == [cold[1 + number]]
    run = runs[f"replica {number}, all"]
    assert run["tokens"] == cold
    assert (run["cached"], run["counted"]["external"], misses(run)) == ([LAST_BLOCK] * 3, 3 * LAST_BLOCK, {})


def test_every_namespace_with_chunks_says_what_it_stands_for(
    runs: Reports, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Quotas find the tenant there; an adapter's namespace has a manifest as well."""
    tier = tmp_path_factory.getbasetemp() / "isolation0" / "adapters"
    namespaces = {chunk.parents[1] for chunk in tier.rglob("*.kv")}
    manifests = [json.loads((folder / "manifest.json").read_bytes()) for folder in namespaces]
    names = [manifest["lora_name"] for manifest in manifests if "lora" in manifest]
    assert len(manifests) == len(names) + 1
    assert len(names) == 4, "a, b, and one before and after its training"
    assert {manifest["tenant"] for manifest in manifests} == {""}
