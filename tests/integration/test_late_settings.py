"""
Settings that are written into the environment after we read it: by uvicorn's --env-file, by load_dotenv(), by the module.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.services import Service, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

DOTENV = "python-dotenv==1.2.1"
UVICORN = ("uvicorn", "main:app", "--port", "{port}")
ZERO = "opentelemetry-instrument"
PLAIN = "from fastapi import FastAPI\napp = FastAPI()\n"
FILE = "OTEL_SERVICE_NAME=shop-secret-name\nOTEL_TRACES_SAMPLER_ARG=0.123\nOTEL_CORRELATION_RESPONSE_HEADER=X-Other\nPORT=1\n"
NAMES = "OTEL_CORRELATION_RESPONSE_HEADER, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER_ARG"


@pytest.fixture(scope="session")
def dotenv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A folder with the real python-dotenv.
    """
    target = tmp_path_factory.mktemp("dotenv")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(target)]
    done = subprocess.run([*pip, DOTENV], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {DOTENV}: {done.stderr[-200:]}")
    return target


def lines(
    command: tuple[str, ...], source: str, directory: Path, path: Path | None = None, **variables: str
) -> tuple[list[str], str]:
    """
    Start a service, send two requests, and return what it says of settings that came too late, and everything.
    """
    (directory / "main.py").write_text(source)
    (directory / "service.env").write_text(FILE)
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    environment = clean_environment(OTEL_TRACES_EXPORTER="none", **variables)
    with Service(command, directory, environment) as service:
        assert httpx.get(service.url + "/openapi.json").headers["x-request-id"]
        service.stop()
        output = service.output()
    return [line for line in output.splitlines() if "after the start" in line], output


@pytest.mark.slow
def test_uvicorns_env_file_comes_too_late_and_one_line_says_so(dotenv: Path, tmp_path: Path) -> None:
    """
    The line has the names of the variables, no value, and what to do.
    """
    said, output = lines((ZERO, *UVICORN, "--env-file", "service.env"), PLAIN, tmp_path, dotenv)
    assert len(said) == 1, output
    assert NAMES in said[0]
    assert "bootstrap()" in said[0]
    assert "shop-secret-name" not in output
    assert "0.123" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "before", "after"),
    [
        ("zero", "", "from dotenv import load_dotenv\nload_dotenv('service.env')\n"),
        ("code", "from otel_correlation import bootstrap\nbootstrap()\n", "import os\nos.environ.update({})\n"),
    ],
    ids=["load_dotenv under opentelemetry-instrument", "the module after bootstrap"],
)
def test_the_module_comes_too_late(start: str, before: str, after: str, dotenv: Path, tmp_path: Path) -> None:
    """
    However they come, they are named once.
    """
    changes = dict(line.split("=") for line in FILE.split())
    source = before + after.replace("{}", repr(changes)) + PLAIN
    said, output = lines((ZERO, *UVICORN) if start == "zero" else UVICORN, source, tmp_path, dotenv)
    assert len(said) == 1, output
    assert NAMES in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "source"),
    [
        ("zero", "import os\nos.environ['OTEL_SERVICE_NAME'] = 'shop'\nos.environ['OTEL_LOGS_EXPORTER'] = ''\n"),
        (
            "zero",
            "import os\nos.environ.setdefault('OTEL_SERVICE_NAME', 'other')\ndel os.environ['OTEL_TRACES_EXPORTER']\n",
        ),
        (
            "code",
            "import os\nos.environ['OTEL_TRACES_SAMPLER_ARG'] = '0.5'\nimport otel_correlation\notel_correlation.bootstrap()\n",
        ),
        ("zero", "import os\nos.environ['OTHER_SETTING'] = os.environ['OTEL_CORRELATION_STRICT'] = '1'\n"),
    ],
    ids=["the same value, and an empty one", "setdefault, and one taken away", "before bootstrap", "not ours"],
)
def test_what_changes_nothing_is_no_complaint(start: str, source: str, tmp_path: Path) -> None:
    """
    Nothing is said of a variable that has the value that was read, is empty, or is read whenever it is needed.
    """
    command = (ZERO, *UVICORN) if start == "zero" else UVICORN
    said, output = lines(command, source + PLAIN, tmp_path, OTEL_SERVICE_NAME="shop")
    assert said == [], output


@pytest.mark.slow
def test_uvicorns_workers_read_the_file_in_time(dotenv: Path, tmp_path: Path) -> None:
    """
    A worker is a process of its own, started after its parent has read the file: nothing is late there.
    """
    command = (ZERO, *UVICORN, "--workers", "2", "--env-file", "service.env")
    said, output = lines(command, PLAIN, tmp_path, dotenv, OTEL_CORRELATION_RESPONSE_HEADER="X-Request-ID")
    assert all("OTEL_SERVICE_NAME" not in line for line in said), output
