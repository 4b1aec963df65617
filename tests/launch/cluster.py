"""A Slurm cluster on the loopback of this machine: munge, slurmctld, and two nodes of one core, all in one folder.

    python tests/launch/cluster.py      # starts one, prints SLURM_CONF and `sinfo`, and stops it at Enter

Needs root and Debian's packages slurm-wlm and munge. Nothing of the system's own configuration is read or changed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

CONFIGURATION = """
ClusterName=kitbench
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=20
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo")
START_SECONDS = 30


class CannotStart(Exception):
    """Slurm cannot be started here; the message says why."""


class Cluster:
    """The running cluster, as a context; `environment` is what its commands need."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise CannotStart("Slurm is started as root only")
        missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        if missing:
            raise CannotStart(f"{', '.join(missing)} not found; apt-get install slurm-wlm munge")

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="kitbench-slurm-"))
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        self.configuration = self.folder / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(folder=self.folder, host=socket.gethostname().partition(".")[0], ports=_free_ports(3))
        )
        self.environment = {"SLURM_CONF": str(self.configuration), "PATH": _path()}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            key = self.folder / "munge.key"
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
            files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
            self._start("munged", "--foreground", "--force", *files, f"--socket={self.folder}/munge.socket")
            self._until("munge", lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D", "-i")
            for node in ("n1", "n2"):
                self.up(node)
            self._until("the nodes", lambda: self.states() == {"n1": "idle", "n2": "idle"})
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in ("n1", "n2"):
            self.cut(node)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *words: str) -> str:
        """What a command of Slurm prints. Raises CalledProcessError where it fails."""
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, check=True)
        return done.stdout

    def states(self) -> dict[str, str]:
        """State of each node: idle, allocated, down, ..."""
        try:
            lines = self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        except subprocess.CalledProcessError:  # the controller is not up yet
            return {}
        return {name: state.rstrip("*") for name, state in (line.split() for line in lines)}

    def up(self, node: str) -> None:
        """Start a node's daemon."""
        self._start("slurmd", "-D", "-N", node)

    def cut(self, node: str) -> None:
        """Cut a node's power: its daemons and every process of its jobs are killed before they can tell anybody."""
        daemon = self.processes.pop(f"slurmd {node}", None)
        tasks, daemons = [], [] if daemon is None or daemon.poll() is not None else [psutil.Process(daemon.pid)]
        for process in psutil.process_iter():
            try:
                environment, parent = process.environ(), process.parent()
            except psutil.Error:  # gone meanwhile, or not ours
                continue
            if (environment.get("SLURM_CONF"), environment.get("SLURMD_NODENAME")) == (str(self.configuration), node):
                tasks.append(process)
                if parent is not None and parent.name().startswith("slurmstepd"):
                    daemons.append(parent)
        for process in (*daemons, *tasks):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if daemon is not None:
            daemon.wait()

    def down(self, node: str) -> None:
        """Cut a node's power, and let the controller know, which it would find out by itself in minutes."""
        self.cut(node)
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def _start(self, program: str, *arguments: str) -> None:
        name = f"{program} {arguments[-1]}" if program == "slurmd" else program
        with (self.folder / f"{name}.out".replace(" ", "-")).open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [program, *arguments], env=os.environ | self.environment, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _until(self, what: str, ready: object) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():  # type: ignore[operator]
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "; ".join(
                    f"{path.name}: {' '.join(path.read_text(errors='replace').split()[-40:])}"
                    for path in (*self.folder.glob("*.log"), *self.folder.glob("*.out"))
                    if path.stat().st_size
                )
                raise CannotStart(f"{what} did not start{f' ({dead[0]} ended)' if dead else ''}: {logs}")
            time.sleep(0.2)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> None:
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.configuration}")
        print(cluster.command("sinfo"))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        input("Enter stops it. ")


if __name__ == "__main__":
    main()
