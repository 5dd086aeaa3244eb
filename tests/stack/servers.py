"""
Real servers from the operating system's packages: PostgreSQL, Redis, nginx and Prometheus, on loopback ports of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.stack import build
from tests.stack.harness import Machine, Process, eventually, get

if TYPE_CHECKING:
    from collections.abc import Sequence

# Debian keeps PostgreSQL's programs, which need one another's version, outside the path.
POSTGRES_DIRECTORIES = tuple(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
PACKAGES = {
    "postgres": "postgresql",
    "initdb": "postgresql",
    "redis-server": "redis-server",
    "nginx": "nginx-light",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}


def find(program: str) -> Path | None:
    """
    Return where the program is, or None.
    """
    directories = POSTGRES_DIRECTORIES if program in ("postgres", "initdb") else ()
    search = os.pathsep.join([*map(str, directories), os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(program, path=search)
    return Path(found) if found else None


def missing() -> list[str]:
    """
    Return the Debian packages that hold what is not here.
    """
    return sorted({package for program, package in PACKAGES.items() if find(program) is None})


def install() -> None:
    """
    Install what is missing where that is possible (Debian, root); otherwise name it.

    Raises:
        StackError: A package is missing and cannot be installed.
    """
    global POSTGRES_DIRECTORIES  # noqa: PLW0603 - the directory appears with the package
    packages = missing()
    if not packages:
        return
    how = f"install them, on Debian by: apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() or shutil.which("apt-get") is None:
        raise build.StackError(f"PostgreSQL, Redis, nginx or Prometheus is missing ({', '.join(packages)}); {how}")
    # RUNLEVEL=1: invoke-rc.d starts no server after the installation.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
        ended = subprocess.run(
            ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if ended.returncode:
            raise build.StackError(f"apt-get {command[0]} failed ({ended.stderr.strip()[-300:]}); {how}")
    POSTGRES_DIRECTORIES = tuple(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    if missing():
        raise build.StackError(f"still missing after the installation: {', '.join(missing())}")


def program(name: str) -> Path:
    """
    Return the path of an installed program.
    """
    found = find(name)
    assert found is not None, f"{name} is not installed"
    return found


@dataclass(slots=True)
class Postgres:
    """
    One PostgreSQL cluster without passwords, open to loopback; every statement is in its log.
    """

    machine: Machine
    port: int = 0
    data: Path = Path()
    process: Process | None = None

    def __post_init__(self) -> None:
        """
        Make the cluster; it can be started more than once.
        """
        self.port = self.machine.port()
        # Not under the test's directory: PostgreSQL refuses to run as root, and its own user cannot enter there.
        self.data = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.machine.directories.append(self.data)
        if not os.geteuid():
            shutil.chown(self.data, "postgres", "postgres")
        command = [
            program("initdb"),
            "-D",
            self.data,
            "-U",
            "postgres",
            "-A",
            "trust",
            "-N",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        ended = subprocess.run(
            [*self._as_user(), *map(str, command)], cwd="/", capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stderr

    @staticmethod
    def _as_user() -> Sequence[str]:
        if os.geteuid():
            return ()
        return ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")

    def start(self, **parameters: str) -> Process:
        """
        Return when it answers; ``parameters`` are settings of the server.
        """
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.data),
            "fsync": "off",
            "log_statement": "all",
            **parameters,
        }
        command: list[str | Path] = [
            program("postgres"),
            "-D",
            self.data,
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        self.process = self.machine.start("postgres", [*self._as_user(), *command], {}, Path("/"))
        eventually("PostgreSQL", lambda: self.run("SELECT 1") == "1", while_running=[self.process])
        return self.process

    def stop(self) -> None:
        """
        Shut it down at once, as a crash of its machine would; what was committed stays.
        """
        assert self.process is not None
        self.process.clean_up()
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def run(self, statement: str, database: str = "postgres") -> str:
        """
        Return psql's bare answer to one statement, empty when it failed.
        """
        ended = subprocess.run(
            ["psql", "-X", "-A", "-t", "-q", "-c", statement, self.url(database)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ended.stdout.strip()

    def url(self, database: str = "postgres") -> str:
        """
        Return the URL of one database.
        """
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """
        Make a database and return its URL.
        """
        self.run(f'CREATE DATABASE "{database}"')
        assert self.run("SELECT 1", database) == "1", f"no database {database}"
        return self.url(database)


@dataclass(slots=True)
class Redis:
    """
    One Redis without persistence.
    """

    machine: Machine
    port: int = 0
    process: Process | None = None

    def __post_init__(self) -> None:
        """
        Choose the port once, so that it can be started again.
        """
        self.port = self.machine.port()

    @property
    def url(self) -> str:
        """
        Return the URL of database 0.
        """
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Process:
        """
        Return when it answers.
        """
        command: list[str | Path] = [
            program("redis-server"),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
        ]
        self.process = self.machine.start("redis", command, {}, self.machine.directory)
        eventually("Redis", self._pong, while_running=[self.process])
        return self.process

    def _pong(self) -> bool:
        return self._answers("PING", b"+PONG\r\n")

    def has_none(self, pattern: str) -> bool:
        """
        Tell whether no key has a name of this pattern.
        """
        return self._answers(f"KEYS {pattern}", b"*0\r\n")

    def _answers(self, command: str, answer: bytes) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(len(answer)) == answer

    def stop(self) -> None:
        """
        Kill it.
        """
        assert self.process is not None
        self.process.clean_up()


@dataclass(slots=True)
class Nginx:
    """
    One nginx with a configuration file; it runs in the foreground and its errors go to its log.

    Args:
        config: The whole configuration. ``daemon`` and ``pid`` are set here; everything else is the file's.
        port: The port that the file listens on, awaited at start.
    """

    machine: Machine
    config: Path
    port: int
    process: Process | None = None
    prefix: Path = field(default_factory=Path)

    def start(self) -> Process:
        """
        Return when it accepts connections.
        """
        if self.prefix == Path():
            # Its workers run as another user where the master is root, and must reach their temporary files.
            self.prefix = Path(tempfile.mkdtemp(prefix="nginx-"))
            self.prefix.chmod(0o755)
            self.machine.directories.append(self.prefix)
        directives = f"daemon off; pid {self.prefix}/nginx.pid;"
        command: list[str | Path] = [
            program("nginx"),
            "-e",
            "stderr",
            "-p",
            self.prefix,
            "-c",
            self.config,
            "-g",
            directives,
        ]
        self.process = self.machine.start("nginx", command, {}, self.prefix)

        def accepts() -> bool:
            with socket.create_connection(("127.0.0.1", self.port), 5):
                return True

        eventually("nginx", accepts, while_running=[self.process])
        return self.process

    def stop(self) -> None:
        """
        End it and its workers.
        """
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.stop()


@dataclass(slots=True)
class Prometheus:
    """
    One Prometheus with a configuration file, and with the options that it is given.
    """

    machine: Machine
    config: Path
    options: Sequence[str] = ()
    address: str = ""
    process: Process | None = None

    def __post_init__(self) -> None:
        """
        Choose the port once.
        """
        self.address = f"127.0.0.1:{self.machine.port()}"

    def start(self) -> Process:
        """
        Return when it answers queries.
        """
        command: list[str | Path] = [
            program("prometheus"),
            f"--config.file={self.config}",
            f"--storage.tsdb.path={self.machine.directory / 'prometheus'}",
            f"--web.listen-address={self.address}",
            *self.options,
        ]
        self.process = self.machine.start("prometheus", command, {}, self.machine.directory)
        ready = f"http://{self.address}/-/ready"
        eventually("Prometheus", lambda: get(ready).status_code == 200, while_running=[self.process])
        return self.process

    def ask(self, path: str, **parameters: str) -> Any:
        """
        Return the ``data`` of one answer of ``/api/v1/``.

        Raises:
            AssertionError: Prometheus refused the question; its own words.
        """
        answer = get(f"http://{self.address}/api/v1/{path}", parameters=parameters).json()
        assert answer["status"] == "success", f"{answer.get('error')}: {parameters}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """
        Return the series of an expression now: ``metric`` and ``value``.
        """
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result
