"""
The servers that other tests lean on start, stop and start again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.stack.servers import Nginx, Postgres, Redis

if TYPE_CHECKING:
    from tests.stack.harness import Machine

pytestmark = pytest.mark.needs("servers")


def test_postgresql_keeps_what_was_committed_over_a_crash(machine: Machine) -> None:
    """
    A database that was made before PostgreSQL was killed is there when it runs again.
    """
    postgres = Postgres(machine)
    postgres.start()
    postgres.create("shop")
    postgres.run("CREATE TABLE lamp (price int); INSERT INTO lamp VALUES (7)", "shop")
    postgres.stop()
    assert postgres.run("SELECT 1") == ""
    postgres.start()
    assert postgres.run("SELECT price FROM lamp", "shop") == "7"


def test_redis_starts_again_on_its_port(machine: Machine) -> None:
    """
    Redis answers after it was killed and started again.
    """
    redis = Redis(machine)
    redis.start()
    redis.stop()
    assert redis.start().popen.poll() is None


def test_nginx_serves_its_configuration(machine: Machine) -> None:
    """
    Nginx answers as its file says, and is gone after it was stopped.
    """
    port = machine.port()
    config = machine.directory / "nginx.conf"
    config.write_text(
        f"events {{}} http {{ access_log off; server {{ listen 127.0.0.1:{port}; location / {{ return 204; }} }} }}"
    )
    nginx = Nginx(machine, config, port)
    process = nginx.start()
    assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).status_code == 204
    nginx.stop()
    assert process.popen.poll() == 0
