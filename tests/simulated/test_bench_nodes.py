"""`flipscale bench gpu` on several nodes: processes of gloo on this machine, a rank of 2 x 8 fake GPUs, and faults."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import processes
import pytest
import yaml
from simulated import node as simulated

from flipscale.checks import kernels
from flipscale.checks import report as checks
from flipscale.checks.kernels import check_collectives, check_links, check_products
from flipscale.checks.machine import check_machine
from flipscale.checks.node import Bench, Row
from flipscale.checks.nodes import Nodes, meet
from flipscale.checks.report import findings_block, write_report
from flipscale.checks.steps import engine_variables
from flipscale.checks.trainings import check_kill, check_stall
from flipscale.io.errors import UserError

HOSTS = ["a", "b", "c", "d"]


def few_bytes(stack: ExitStack) -> None:
    """Send little."""
    stack.enter_context(patch.object(kernels, "_LINK_BYTES", 2**16))


def slow_gpu(stack: ExitStack) -> None:
    """Slow down GPU 1 of the second node, rank 3 of 4. The machine's own speed plays no part."""
    few_bytes(stack)

    def measured(call: Callable[[], object], *_: Any) -> float:
        call()
        return 0.5 if os.environ["RANK"] == "3" else 0.1

    stack.enter_context(patch.object(kernels, "seconds_of", measured))


def dead_rank(stack: ExitStack) -> None:
    """Kill rank 3 while the others wait for it."""
    few_bytes(stack)
    measure = kernels.seconds_of

    def killed(call: Callable[[], object], *given: Any) -> float:
        if os.environ["RANK"] == "3":
            os._exit(9)
        time.sleep(2.0)
        return measure(call, *given)

    stack.enter_context(patch.object(kernels, "seconds_of", killed))


@pytest.fixture(scope="module")
def small(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("nodes") / "small.yaml"
    file.write_text(yaml.safe_dump({**recipe, "stages": recipe["stages"][:1]}))
    return file


def run_nodes(fault: simulated.Fault, small: Path, folder: Path, *chosen: Callable[[Bench], None]) -> Bench:
    """Run checks of two nodes of two GPUs, each in a thread, and return what the first has found."""
    launcher = {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}

    def of_node(index: int) -> Bench:
        nodes = meet({**launcher, "GROUP_RANK": str(index)})
        nodes.hosts = HOSTS[:2]
        own = Bench(2, folder / HOSTS[index], [str(small)], 4, start=simulated.Starter(fault))
        own.add("own", "fine")
        checks.check_nodes(benches := [own], nodes, folder, lambda line: None)
        return benches[1]

    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        simulated.on_busy_machine(stack)
        stack.enter_context(patch.object(checks, "OF_ALL_NODES", chosen))
        first, second = pool.map(of_node, range(2))
    assert [one.status for one in first.findings] == [one.status for one in second.findings]
    return first


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_slow_gpu_of_a_node_is_named(small: Path, tmp_path: Path) -> None:
    nodes, links, together = run_nodes(slow_gpu, small, tmp_path, check_links, check_collectives).findings
    assert nodes.text == "4 GPUs on a, b"
    # Its partner measured the same link, and is not slow by the fault.
    assert (links.status, links.text.split(";")[0]) == ("FAILED", "slow: GPU 1 of b"), links
    assert (together.name, together.status) == ("NCCL small", "ok")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_dead_rank_of_another_node_is_named(small: Path, tmp_path: Path) -> None:
    _, links, together = run_nodes(dead_rank, small, tmp_path, check_links, check_collectives).findings
    for finding in (links, together):
        assert finding.status == "FAILED"
        assert finding.text.startswith("rank 3 ended with code 9"), finding


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_stalled_and_a_killed_rank_of_another_node_are_noticed(small: Path, tmp_path: Path) -> None:
    whole = run_nodes(few_bytes, small, tmp_path, check_stall, check_kill)
    _, stalled, killed = whole.findings
    assert (stalled.status, killed.status) == ("ok", "ok"), (stalled, killed)
    assert stalled.text.startswith("rank 2 named")
    assert whole.figures["kill_s"] < 60.0


NODE = """
import sys
from simulated import node
from simulated.test_bench_nodes import slow_gpu, small_checks
if __name__ == "__main__":
    with small_checks():
        node.main(["--batch_size", "4", "--config", *sys.argv[1:]], slow_gpu)  # has no rank 3: all links are equal
"""


@contextmanager
def small_checks() -> Iterator[None]:
    """Leave out the checks that need no other node."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(checks, "CHECKS", (check_machine,)))
        stack.enter_context(patch.object(checks, "OF_ALL_NODES", (check_links, check_collectives)))
        yield


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_accelerate_launch_starts_all_nodes(small: Path, tmp_path: Path) -> None:
    script = tmp_path / "node.py"
    script.write_text(NODE)
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(processes.free_port())]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_MIXED_PRECISION": "bf16"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *launcher, *meeting, "--machine_rank", f"{rank}", str(script), str(small)],
            env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    found = json.loads((tmp_path / "gpu.json").read_text())["all_nodes"]
    assert (found["num_gpus"], len(found["nodes"]), len(found["links"])) == (2, 2, 2)
    assert {host[-2:] for host in found["nodes"]} == {" 0", " 1"}  # both nodes have this host's name
    assert {one["name"]: one["status"] for one in found["findings"]} == dict.fromkeys(
        ("nodes", "links between nodes", "NCCL small"), "ok"
    )
    assert "## GPUs: 2, nodes: 2" in (tmp_path / "report.md").read_text()
    assert "flipscale bench gpu: 2 GPUs" in outputs[0]
    assert "flipscale bench gpu:" not in outputs[1]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_all_checks_run_on_two_nodes_of_eight(recipe: dict, tmp_path: Path) -> None:
    towers = {name: {**recipe["model"][name], "num_hidden_layers": 1} for name in ("vision_config", "text_config")}
    towers["text_config"]["vocab_size"] = 64
    shallow = {**recipe, "model": {**recipe["model"], **towers}, "stages": recipe["stages"][:1]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(shallow))
    launcher = {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}
    launcher |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-m", "simulated.node", "--batch_size", "8", "--config", "small.yaml"]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **launcher, "GROUP_RANK": f"{index}"}, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    own = json.loads((tmp_path / "gpu.json").read_text())
    whole = own["all_nodes"]
    assert (own["num_gpus"], whole["num_gpus"], len(whole["nodes"]), len(whole["links"])) == (8, 16, 2, 16)
    for bench, names in ((own, checks.CHECKS), (whole, checks.OF_ALL_NODES)):
        assert list(bench["seconds"]) == [check.__name__.removeprefix("check_") for check in names]
        assert [one for one in bench["findings"] if one["status"] == "FAILED"] == []
    texts = {one["name"]: one["text"] for one in whole["findings"]}
    assert texts["stalled rank"].startswith("rank 8 named")  # the first of the second node
    # The trainer has the engine that was fastest on a node: equal steps, so the first.
    (row,) = whole["trainer"]
    assert (row["engine"], row["gpus"], row["compiled"]) == ("ddp", 16, False)
    page = (tmp_path / "report.md").read_text()
    print(own["seconds"], whole["seconds"], page)
    assert "## GPUs: 8, nodes: 1" in page
    assert "## GPUs: 16, nodes: 2" in page


def rows_of(rank: int, logs: Path, function: str, **given: object) -> list[Row]:
    """Return the rows of a function of a check as a rank of two nodes of eight fake GPUs."""
    environment = {"RANK": str(rank), "LOCAL_RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    arguments = [f"flipscale.checks.kernels:{function}", json.dumps(given), str(logs)]
    serving = ("flipscale.checks.node", arguments, str(logs / "log"), True, None)
    process = processes.start(simulated.serve, *serving, environment=environment)
    process.join()
    assert process.exitcode == 0, (logs / "log").read_text()
    return json.loads((logs / f"rank-{rank}.json").read_text())


def test_a_gpu_meets_the_gpu_of_its_rail_on_the_other_node(tmp_path: Path) -> None:
    (row,) = rows_of(11, tmp_path, "links", folder=str(tmp_path))
    assert row == {"node": 1, "other": 0, "rail": 3, "bytes_per_s": 64 * 2**20 / 0.1}


def links_of(nodes: int, gpus: int, speed: Callable[[int, int, int], float]) -> list[list[Row]]:
    """Return the rows of `links` on each rank."""
    return [
        [
            {"node": node, "other": other, "rail": rail, "bytes_per_s": speed(*sorted((node, other)), rail)}
            for other in range(nodes)
            if other != node
        ]
        for node in range(nodes)
        for rail in range(gpus)
    ]


@pytest.mark.parametrize(
    ("is_slow", "named"),
    [
        (lambda node, other, rail: False, ""),
        (lambda node, other, rail: 2 in (node, other) and rail == 5, "slow: GPU 5 of c"),
        (lambda node, other, rail: other == 3 and rail < 2, "slow: GPU 0 of d, GPU 1 of d"),
        (lambda node, other, rail: 1 in (node, other), "slow: all GPUs of b"),
        # A pair alone is no GPU's fault.
        (lambda node, other, rail: (node, other, rail) == (0, 1, 7), ""),
    ],
)
def test_what_is_slow_with_every_node_is_named(
    is_slow: Callable[[int, int, int], bool], named: str, tmp_path: Path
) -> None:
    bench = Bench(32, tmp_path, [], 8, nodes=Nodes(hosts=HOSTS))
    rows = links_of(4, 8, lambda *link: 20e9 if is_slow(*link) else 45e9)
    with patch.object(Bench, "run", lambda *_, **__: rows):
        check_links(bench)
    (finding,) = bench.findings
    assert finding.status == ("FAILED" if named else "ok")
    assert finding.text.startswith(named or "45 GB/s a GPU each way; slowest ")
    if slow := [rail for rail in range(8) if is_slow(0, 1, rail)]:
        assert finding.text.endswith(f"slowest 20, GPU {slow[0]} between a and b")


def test_a_gpu_that_was_slow_once_is_not_named(tmp_path: Path) -> None:
    bench = Bench(32, tmp_path, [], 8, nodes=Nodes(hosts=HOSTS))
    # Other work slows another GPU in each measurement.
    runs = [links_of(4, 8, lambda node, other, rail, slow=slow: 20e9 if rail == slow else 45e9) for slow in range(3)]
    with patch.object(Bench, "run", lambda *_, **__: runs.pop(0)):
        check_links(bench)
    (finding,) = bench.findings
    assert (finding.status, len(runs)) == ("ok", 1)
    assert {row["bytes_per_s"] for row in bench.figures["links"]} == {45e9}


@pytest.mark.parametrize(
    ("slow", "named"),
    [([11], "GPU 3 of b"), ([2, 11], "GPU 2 of a, GPU 3 of b"), ([1, *range(8, 16)], "GPU 1 of a, all GPUs of b")],
)
def test_a_slow_gpu_has_its_node(slow: list[int], named: str, tmp_path: Path) -> None:
    rows = [[{"shape": [1, 1, 1], "flops_per_s": 4e14 if rank in slow else 7e14}] for rank in range(16)]
    bench = Bench(16, tmp_path, ["small"], 8, nodes=Nodes(hosts=HOSTS[:2]))
    with patch.object(Bench, "run", lambda *_, **__: rows):
        check_products(bench)
    assert f"products small                     slow: {named}, at least 400 Tflop/s, another 700; " in findings_block(
        bench
    )


def test_what_other_nodes_failed_is_in_the_report(tmp_path: Path) -> None:
    """The report of all nodes names the check that failed on another node, and its reason."""
    own = Bench(8, tmp_path, ["small"], 8, ["small"])
    theirs = {"failed": [{"name": "products small", "status": "FAILED", "text": "slow: GPU 3"}], "versions": None}
    theirs["fastest"] = [{"engine": "hsdp", "compiled": True, "recomputes": False}]
    nodes = Nodes(hosts=HOSTS[:2])
    with (
        patch.object(Nodes, "gather", lambda _, value, limit_s: [{**value, "fastest": theirs["fastest"]}, theirs]),
        patch.object(checks, "OF_ALL_NODES", [lambda bench: bench.add("last", "fine")]),
    ):
        checks.check_nodes(benches := [own], nodes, tmp_path, lambda line: None)
    whole = benches[1]
    assert [(one.name, one.text) for one in whole.findings if one.status == "FAILED"] == [
        ("nodes", "b failed 1 checks; 16 GPUs on a, b"),
        ("b: products small", "slow: GPU 3"),
    ]
    write_report(benches, tmp_path / "report.md")
    assert "FAILED  b: products small                  slow: GPU 3" in (tmp_path / "report.md").read_text()
    # The trainer runs on all nodes under the engine that was fastest on the first.
    assert whole.figures["fastest"] == {"small": theirs["fastest"][0]}
    assert engine_variables("hsdp", 32, 4)["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"


def test_without_a_launcher_there_is_one_node() -> None:
    assert len(meet({"SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}).hosts) == 1  # a batch script, without srun
    assert Nodes().gather("mine") == ["mine"]


def test_a_node_that_is_silent_is_named() -> None:
    port = str(processes.free_port())
    environment = {"GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assert meet(environment).store is None
    from torch.distributed import HashStore

    nodes = Nodes(0, "127.0.0.1", HashStore(), ["a", "b"])
    with pytest.raises(UserError, match=r"^b did not answer in 0 s"):
        nodes.gather(1, 0.1)
