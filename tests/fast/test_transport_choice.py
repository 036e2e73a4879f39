"""Which transport is taken, with what reason, and every refusal."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import pytest

from memkv_engines.config import load_config
from memkv_engines.errors import ConfigError, TransportError
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports import nixl_install, select
from memkv_engines.transports.gds import GdsTransport
from memkv_engines.transports.nixl import NixlTransport
from memkv_engines.transports.posix import PosixTransport
from memkv_engines.transports.select import Decision, Facts, Policy, TransportPlan, decide, plan
from memkv_engines.transports.topology import Topology
from tests.fast.io_samples import setup_for, started
from tests.fast.samples import NAMESPACE, aligned, make_name, noise
from tests.fast.service_samples import POOL

NEAR = Topology({("GPU0", "nvme0n1"): "PIX"})
FAR = Topology({("GPU0", "nvme0n1"): "PIX", ("GPU1", "nvme0n1"): "SYS"})
EVERYTHING = Facts(kvikio="26.10", topology=NEAR)
NOTHING = Facts(gpudirect_lacks=("a GPU with its driver", "the kernel module nvidia_fs"), nixl_lacks="not installed")
FAR_DRIVE = dataclasses.replace(EVERYTHING, topology=FAR)


@pytest.mark.parametrize(
    ("policy", "facts", "on_gpu", "kind", "medium", "says"),
    [
        (Policy(), NOTHING, False, "posix", "host", "the KV cache is in host memory"),
        (Policy(), EVERYTHING, False, "posix", "host", "auto is posix for host memory"),
        (Policy(), EVERYTHING, True, "gds/gpudirect", "gpu", "behind one PCIe switch"),
        (Policy(), NOTHING, True, "posix", "host", "lacks a GPU with its driver; the kernel module nvidia_fs"),
        (Policy(), FAR_DRIVE, True, "posix", "host", "GPU1 and nvme0n1 are across sockets"),
        (Policy(gds="on"), FAR_DRIVE, True, "gds/gpudirect", "gpu", "gds=on"),
        (Policy(staging_medium="gpu"), FAR_DRIVE, True, "gds/gpudirect", "gpu", "staging_medium=gpu"),
        (Policy(staging_medium="host"), EVERYTHING, True, "posix", "host", "asked for"),
        (Policy(gds="off"), EVERYTHING, True, "posix", "host", "asked for"),
        (Policy(transport="posix"), EVERYTHING, True, "posix", "host", "transport=posix"),
        (Policy(transport="gds"), EVERYTHING, True, "gds/gpudirect", "gpu", "PCIe switch"),
        (Policy(transport="gds"), FAR_DRIVE, True, "gds/compat", "host", "compatibility path"),
        (Policy(transport="gds"), EVERYTHING, False, "gds/compat", "host", "compatibility path"),
        (Policy(transport="nixl"), EVERYTHING, False, "nixl", "host", "nixl_plugin=POSIX"),
        (Policy(transport="nixl"), EVERYTHING, True, "nixl", "host", "moves host memory only"),
        (Policy(transport="nixl", nixl_plugin="VENDOR"), EVERYTHING, True, "nixl", "gpu", "nixl_plugin=VENDOR"),
        (Policy(transport="nixl", nixl_plugin="GDS", gds="on"), EVERYTHING, True, "nixl", "gpu", "gds=on"),
        (Policy(transport="nixl", staging_medium="host"), EVERYTHING, True, "nixl", "host", "asked for"),
    ],
)
def test_what_is_chosen(policy: Policy, facts: Facts, on_gpu: bool, kind: str, medium: str, says: str) -> None:
    decision = decide(policy, facts, on_gpu=on_gpu)
    assert (decision.kind, decision.medium) == (kind, medium)
    assert says in decision.reason


@pytest.mark.parametrize(
    ("policy", "facts", "on_gpu", "says"),
    [
        (Policy(gds="on"), NOTHING, True, r"gds=on, but .* lacks a GPU .*nvidia_fs.* Set gds=auto"),
        (Policy(gds="on"), NOTHING, False, r"nvidia_fs; KV caches in GPU memory"),
        (Policy(gds="on"), EVERYTHING, False, r"lacks KV caches in GPU memory\. Set gds=auto"),
        (Policy(staging_medium="gpu"), NOTHING, True, r"staging_medium=gpu, but .*nvidia_fs"),
        (Policy(staging_medium="gpu", gds="off"), EVERYTHING, True, "contradicts gds=off"),
        (Policy(staging_medium="gpu", transport="posix"), EVERYTHING, True, "cannot move GPU memory"),
        (Policy(staging_medium="gpu", transport="nixl"), EVERYTHING, True, "cannot move GPU memory"),
        (Policy(staging_medium="host", gds="on"), EVERYTHING, True, "contradicts staging_medium=host"),
        (Policy(transport="posix", gds="on"), EVERYTHING, True, "contradicts transport=posix"),
        (Policy(transport="nixl", gds="on"), EVERYTHING, True, "contradicts transport=nixl"),
        (Policy(transport="gds", gds="off"), EVERYTHING, True, "gds=off contradicts transport=gds"),
        (Policy(transport="nixl", nixl_plugin="GDS_MT", gds="off"), EVERYTHING, True, "nixl_plugin=GDS_MT"),
        (Policy(transport="nixl"), NOTHING, False, "transport=nixl: not installed; or set transport=posix"),
        (Policy(transport="gds"), NOTHING, False, "kvikio is not installed"),
    ],
)
def test_what_is_refused(policy: Policy, facts: Facts, on_gpu: bool, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        decide(policy, facts, on_gpu=on_gpu)


def test_every_policy_has_an_answer_and_none_is_better_than_it_is() -> None:
    choices = (("auto", "posix", "nixl", "gds"), ("auto", "on", "off"), ("POSIX", "GDS"), ("auto", "gpu", "host"))
    for words in itertools.product(*choices):
        policy = Policy(*words)
        for facts, on_gpu in itertools.product((EVERYTHING, NOTHING, FAR_DRIVE), (True, False)):
            try:
                decision = decide(policy, facts, on_gpu=on_gpu)
            except ConfigError as error:
                assert "et " in str(error) or "install" in str(error), f"no remedy: {error}"
                continue
            assert decision.reason
            if decision.medium == "gpu":
                assert on_gpu and not facts.gpudirect_lacks and policy.gds != "off"
            if decision.kind == "gds/gpudirect":
                assert decision.medium == "gpu"
            if policy.gds == "on":
                assert decision.medium == "gpu", "asked for GPUDirect, and got something else"
            if policy.transport != "auto":
                assert decision.kind.split("/")[0] == policy.transport


def test_the_configuration_has_the_keys_of_the_policy() -> None:
    config = load_config({"path": "kv", "transport": "nixl", "gds": False, "nixl_plugin": "VENDOR"}, {})
    assert Policy.of(config) == Policy("nixl", "off", "VENDOR", "auto")
    with pytest.raises(ConfigError, match="give one of"):
        load_config({"path": "kv", "transport": "rdma"}, {})


@pytest.mark.parametrize("way", ["auth", "encrypt"])
def test_protected_chunks_pass_the_host(way: str) -> None:
    assert decide(Policy(), EVERYTHING, on_gpu=True).medium == "gpu"
    decision = decide(Policy(protection=way), EVERYTHING, on_gpu=True)
    assert decision.medium == "host" and f"protection={way}" in decision.reason
    assert decide(Policy(protection=way, transport="gds"), EVERYTHING, on_gpu=True).kind == "gds/compat"
    for asked in (Policy(gds="on", protection=way), Policy(staging_medium="gpu", protection=way)):
        with pytest.raises(ConfigError, match=f"protection={way}.*protection=off"):
            decide(asked, EVERYTHING, on_gpu=True)
    config = load_config({"path": "kv", "protection": way}, {"MEMKV_ENGINES_PROTECTION_KEY": bytes(range(32)).hex()})
    assert Policy.of(config) == Policy(protection=way)


def test_nothing_is_looked_at_where_posix_is_certain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*_: object) -> Facts:
        raise AssertionError("looked")

    monkeypatch.setattr(select, "facts_of", never)
    for transport in ("auto", "posix"):
        assert plan(Policy(transport), tmp_path).decision.kind == "posix"
    with pytest.raises(AssertionError, match="looked"):
        plan(Policy("nixl"), tmp_path)


def test_facts_of_a_machine_without_a_gpu(tmp_path: Path) -> None:
    facts = select.facts_of(tmp_path, tmp_path)
    assert len(facts.gpudirect_lacks) >= 2
    assert facts.topology.pairs == {}


def test_gpudirect_that_files_promise_is_tried_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it fails, since there is no GPU: that is what is lacking, in the words of what failed."""
    monkeypatch.setattr(select.gds_module, "what_gpudirect_lacks", lambda *_: [])
    (lack,) = select.facts_of(tmp_path).gpudirect_lacks
    assert lack.startswith(f"a working path to {tmp_path} (")
    assert "kvikio" in lack or "a GPU with its driver" in lack
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_what_would_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert select.main(["select", str(tmp_path), "transport=posix"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert answers["host"]["kind"] == answers["gpu"]["kind"] == "posix"
    assert select.main(["select", str(tmp_path), "gds=on"]) == 0
    assert "nvidia_fs" in json.loads(capsys.readouterr().out)["gpu"]["error"]


# ----------------------------------------------------------------------------------------------------- in a directory


class Broken(PosixTransport):
    """Called something else, so that it is proved, and it does not work."""

    name = "broken"

    def __init__(self, error: Exception | None) -> None:
        super().__init__("buffered")
        self.name, self.error, self.closed = "broken", error, False

    def read(self, handle: int, views: object, offset: int) -> None:
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("error", "says"), [(TransportError("no io_uring"), "no io_uring"), (None, "reads other bytes than it wrote")]
)
def test_a_transport_that_does_not_work_in_the_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, says: str
) -> None:
    broken = Broken(error)
    monkeypatch.setattr(select, "PosixTransport", type("Other", (), {}))
    monkeypatch.setattr(TransportPlan, "_make", lambda *_: broken)
    planned = TransportPlan(Policy("nixl"), Decision("nixl", "host", "asked for"))
    with pytest.raises(ConfigError, match=f"broken does not work .*{says}.* Set transport=posix"):
        DirectoryTier(tmp_path / "kv", direct_io="off", transport=planned)
    assert broken.closed
    assert list((tmp_path / "kv").iterdir()) == []


def test_the_tier_says_why(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, direct_io="off", transport=plan(Policy(), tmp_path))
    assert "transport=auto is posix for host memory" in tier.mode_report.reason
    assert "chosen of" in tier.mode_report.reason
    tier.close()


def test_a_file_that_the_transport_does_not_take_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DirectoryTier(tmp_path, direct_io="off")
    tier.put(NAMESPACE.folder, make_name(), [aligned(noise(ALIGN_BYTES))])
    before = os.listdir("/proc/self/fd")

    def refuse(*_: object, **__: object) -> int:
        raise TransportError("no")

    monkeypatch.setattr(PosixTransport, "attach", refuse)
    with pytest.raises(TransportError):
        tier.open(NAMESPACE.folder, make_name())
    with pytest.raises(TransportError):
        tier.put(NAMESPACE.folder, make_name(5), [aligned(noise(ALIGN_BYTES))])
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [make_name().text]
    tier.close()


# ------------------------------------------------------------------------------------------- libraries that are absent


ABSENT = nixl_install.installed_version() == ""


@pytest.mark.skipif(not ABSENT, reason="NIXL is installed here: tests/kernels/transports has the rest")
@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_the_service_refuses_to_start_without_the_transport_asked_for(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ConfigError, match=r"transport=nixl: NIXL is not installed: pip install .* transport=posix"):
        started(setup_for(tmp_path, [POOL], transport="nixl"), mode)


@pytest.mark.parametrize("key", ["gds=on", "staging_medium=gpu"])
@pytest.mark.parametrize("mode", ["on", "off"])
def test_the_service_refuses_gpudirect_without_the_kernel_module(tmp_path: Path, mode: str, key: str) -> None:
    wanted = dict([key.split("=")])
    with pytest.raises(ConfigError, match=rf"{key}, but GPUDirect Storage lacks .*nvidia_fs.*KV caches in GPU memory"):
        started(setup_for(tmp_path, [POOL], transport="auto", **wanted), mode)


@pytest.mark.skipif(not ABSENT, reason="kvikio and NIXL are installed here")
def test_transports_without_their_library_say_what_to_install() -> None:
    with pytest.raises(ConfigError, match="pip install nixl"):
        NixlTransport()
    with pytest.raises(ConfigError, match="pip install kvikio"):
        GdsTransport(gpudirect=False)


def test_versions_of_nixl() -> None:
    assert nixl_install.why_unusable("1.5.0") == nixl_install.why_unusable("1.5.1") == ""
    assert nixl_install.why_unusable("2.0.0rc1") == ""
    assert "stale bytes" in nixl_install.why_unusable("1.4.1")
    assert "not installed" in nixl_install.why_unusable("")


def test_a_plugin_that_is_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXL_PLUGIN_DIR", str(tmp_path))
    assert f"no libplugin_VENDOR.so in {tmp_path}; there are A, B" in nixl_install.why_missing("VENDOR", ["B", "A"])
    (tmp_path / "libplugin_VENDOR.so").write_bytes(b"no library")
    why = nixl_install.why_missing("VENDOR", [])
    assert "too short" in why or "invalid ELF" in why
