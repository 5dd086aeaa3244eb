"""
Start the whole incident on this machine: PostgreSQL, three services behind nginx, and a viewer; until Ctrl-C.

Every port is a variable (NGINX_PORT and so on), and so is the folder for all logs (INCIDENT_DIRECTORY). With
OTEL_EXPORTER_OTLP_ENDPOINT set, telemetry goes there and no viewer is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import asyncpg

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
DEFAULT_PORTS = {"nginx": 8080, "checkout": 8081, "payments": 8082, "ledger": 8083, "postgres": 8084, "viewer": 4318}
PORTS = {name: int(os.environ.get(f"{name.upper()}_PORT", port)) for name, port in DEFAULT_PORTS.items()}
VIEWER = f"http://127.0.0.1:{PORTS['viewer']}"
SEARCH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
TABLES = {
    "checkout": "orders (number int PRIMARY KEY, sku text, card text CHECK (length(card) <= 40))",
    "payments": "payments (id serial PRIMARY KEY, order_number int, cents int)",
    "ledger": "entries (id serial PRIMARY KEY, order_number int, cents int)",
}
# Every worker process has a pool of its own, so the service whose pool is to run dry has one worker.
SIZES = {"checkout": ("2", "5"), "payments": ("2", "5"), "ledger": ("1", "2")}


class System:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, name: str, *command: str | Path, environment: dict[str, str] | None = None, user: str | None = None
    ) -> None:
        """
        Start a program with a log and a pid file of its own; return when it accepts connections.
        """
        if listens(PORTS[name]):
            raise SystemExit(f"port {PORTS[name]} is taken: set {name.upper()}_PORT")
        log = self.directory / f"{name}.log"
        with log.open("wb") as output:
            self.processes[name] = process = subprocess.Popen(
                list(map(str, command)),
                cwd="/" if user else HERE,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=user,
            )
        (self.directory / f"{name}.pid").write_text(str(process.pid))
        deadline = time.monotonic() + 60
        while not listens(PORTS[name]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def start_postgres(self, data: Path) -> None:
        # PostgreSQL refuses to run as root.
        user = None if os.geteuid() else "postgres"
        if user:
            shutil.chown(data, user)
        made = subprocess.run(
            [program("initdb"), "-D", data, "-U", "shop", "-A", "trust", "-N"],
            cwd="/",
            user=user,
            check=False,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise SystemExit(made.stderr)
        settings = {
            "port": PORTS["postgres"],
            "unix_socket_directories": data,
            "fsync": "off",  # Nobody needs these data tomorrow.
            "log_error_verbosity": "terse",  # The details of an error are the values of a row.
        }
        options = [f"--{key}={value}" for key, value in settings.items()]
        self.start("postgres", program("postgres"), "-D", data, *options, user=user)

    def start_service(self, name: str) -> None:
        workers, pool = SIZES[name]
        self.start(
            name,
            BIN / "opentelemetry-instrument",
            BIN / "gunicorn",
            f"{name}:app",
            environment={
                "PORT": str(PORTS[name]),
                "WORKERS": workers,
                "POOL_SIZE": pool,
                "DATABASE_URL": database(name).replace("postgresql://", "postgresql+asyncpg://"),
                "PAYMENTS_URL": f"http://127.0.0.1:{PORTS['payments']}",
                "LEDGER_URL": f"http://127.0.0.1:{PORTS['ledger']}",
                "OTEL_SERVICE_NAME": name,
                "OTEL_LOGS_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_ENDPOINT": os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", VIEWER),
                # One span for each statement, by asyncpg's instrumentation; SQLAlchemy's would be a second one.
                "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": os.environ.get(
                    "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "sqlalchemy"
                ),
            },
        )

    def start_nginx(self) -> None:
        text = (HERE / "nginx.conf").read_text()
        places = {
            "directory": self.directory,
            "example": HERE,
            "proxies": HERE.parents[1] / "deploy" / "proxies" / "nginx",
            **PORTS,
        }
        for name, value in places.items():
            text = text.replace(f"@{name}@", str(value))
        config = self.directory / "nginx.conf"
        config.write_text(text)
        # Started by root, its workers would be another user, who may not enter our folders.
        user = () if os.geteuid() else ("-g", "user root;")
        self.start("nginx", program("nginx"), "-e", "stderr", "-c", config, *user)

    def stop(self) -> None:
        """
        End the services first, so that what they still have to say is stored, then what they stand on.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # An impatient second Ctrl-C would leave some running.
        base = {"postgres", "viewer"} & self.processes.keys()
        for names in (self.processes.keys() - base, base):
            for name in names:
                # PostgreSQL takes SIGINT for "end all sessions"; SIGTERM would wait for them.
                self.processes[name].send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            for name in names:
                self.processes[name].wait()


def program(name: str) -> str:
    found = shutil.which(name, path=SEARCH)
    if found is None:
        raise SystemExit(f"{name} is not installed (Debian: apt-get install postgresql nginx-light)")
    return found


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def database(name: str) -> str:
    return f"postgresql://shop@127.0.0.1:{PORTS['postgres']}/{name}"


async def create_tables() -> None:
    for name, table in TABLES.items():
        for url, statement in (
            (database("postgres"), f"CREATE DATABASE {name}"),
            (database(name), f"CREATE TABLE {table}"),
        ):
            connection = await connect(url)
            await connection.execute(statement)
            await connection.close()


async def connect(url: str) -> asyncpg.Connection:
    while True:
        try:
            return await asyncpg.connect(url)
        except asyncpg.CannotConnectNowError:  # It listens before it is ready.
            await asyncio.sleep(0.1)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = Path(os.environ.get("INCIDENT_DIRECTORY") or tempfile.mkdtemp(prefix="incident-"))
    # nginx's workers and PostgreSQL run as users of their own where we are root.
    directory.chmod(0o755)
    system = System(directory)
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="incident-postgres-") as data:
        try:
            if "OTEL_EXPORTER_OTLP_ENDPOINT" not in os.environ:
                system.start("viewer", BIN / "otel-correlation", "serve", f"--port={PORTS['viewer']}")
            system.start_postgres(Path(data))
            asyncio.run(create_tables())
            for name in ("ledger", "payments", "checkout"):
                system.start_service(name)
            system.start_nginx()
            print(f"The shop is http://127.0.0.1:{PORTS['nginx']}, its logs and pids are in {directory}.")
            print(f"The incident:   {sys.executable} {HERE / 'load.py'}", flush=True)
            signal.pause()
        finally:
            system.stop()


if __name__ == "__main__":
    main()
