"""
What an image and a wheel are made of: named by digest or hash, in one place, and the same everywhere.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy import images

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
DOCKERFILES = sorted(path for path in images.files(ROOT) if path.name == "Dockerfile")


def pins(name: str) -> dict[str, str]:
    """
    Return the versions of a file of requirements; each must have hashes.
    """
    text = (REQUIREMENTS / name).read_text()
    blocks = re.findall(r"^([a-z0-9._-]+)==(\S+)[^\n]*\n((?:    --hash=\S+[^\n]*\n)*)", text, re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^[^ #\n]", text, re.MULTILINE))
    assert all("--hash=sha256:" in hashes for _, _, hashes in blocks)
    return {package: version for package, version, _ in blocks}


def test_every_image_is_in_the_list() -> None:
    """
    What a file starts or builds upon is in deploy/images.txt, written as there; only a digest may be missing.
    """
    assert [line for line in images.problems(ROOT) if not line.endswith("has no digest")] == []
    assert len(list(images.named(ROOT))) > 15


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """
    The files that name images, apart.
    """
    for path in [*images.files(ROOT), ROOT / "deploy/images.txt"]:
        there = tmp_path / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)
    return tmp_path


def test_digests_are_written_wherever_an_image_is_named(copied: Path) -> None:
    """
    With all digests in the list nothing is left to say, every file still reads the same, and once more changes nothing.
    """
    digests = {image: f"sha256:{number:064x}" for number, image in enumerate(images.listed(copied))}
    images.write(copied, digests)
    assert images.problems(copied) == []
    for path in images.files(copied):
        before, after = (ROOT / path.relative_to(copied)).read_text(), path.read_text()
        assert re.sub("@sha256:[0-9a-f]{64}", "", after) == before
        if path.suffix in (".yaml", ".yml"):
            list(yaml.safe_load_all(after))
    images.write(copied, digests)
    assert images.problems(copied) == []
    image = yaml.safe_load((copied / "docker-compose.yml").read_text())["services"]["jaeger"]["image"]
    assert image == f"jaegertracing/jaeger:{image.split(':')[1].split('@')[0]}@{digests[image.partition('@')[0]]}"


def test_an_image_that_is_not_as_the_list_says_is_told(copied: Path) -> None:
    """
    A tag that was changed in one file, a digest of another image, and an image that nothing names any more.
    """
    images.write(copied, dict.fromkeys(images.listed(copied), "sha256:" + "a" * 64))
    compose = copied / "docker-compose.yml"
    text = compose.read_text()
    compose.write_text(text.replace("grafana/loki:", "grafana/lokki:"))
    told = images.problems(copied)
    assert [line for line in told if "grafana/lokki" in line and "is not in deploy/images.txt" in line]
    assert [line for line in told if line.startswith("deploy/images.txt: nothing uses grafana/loki:")]
    compose.write_text(text.replace("a" * 64, "b" * 64, 1))
    assert [line for line in images.problems(copied) if "is not written with the digest" in line]


def test_what_builds_the_wheel_is_pinned() -> None:
    """
    pyproject.toml names one version of each, the same as the file of hashes, and as this environment was made of.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        required = tomllib.load(file)["build-system"]["requires"]
    build, dev = pins("build.txt"), pins("dev.txt")
    assert all(f"{name}=={build[name]}" in required for name in ("hatchling",))
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", requirement) for requirement in required)
    assert build.items() <= dev.items()
    assert pins("service.txt").items() <= dev.items()


@pytest.mark.parametrize("name", ["build.txt", "service.txt", "libraries.txt", "dev.txt", "oldest.txt"])
def test_no_file_of_requirements_names_a_registry(name: str) -> None:
    """
    Each package by version and hashes, and nothing of where it came from.
    """
    pins(name)
    assert "://" not in (REQUIREMENTS / name).read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=[str(path.parent.name) for path in DOCKERFILES])
def test_an_image_installs_by_hash_only(path: Path) -> None:
    """
    Every `pip` of a Dockerfile takes a file of hashes, or only what is there already: no index and no other version.
    """
    text = re.sub(r"\\\n", " ", path.read_text())
    commands = re.findall(r"\bpip (?:install|wheel|download) [^\n&|]*", text)
    assert commands
    for command in commands:
        assert "--no-deps" in command
        assert "--require-hashes" in command or "--no-index" in command or "--no-build-isolation" in command
        for named in re.findall(r"--requirement (\S+)", command):
            pins(Path(named).name)


def test_the_operators_directory_is_installed_by_hash_only() -> None:
    """
    Its script installs only from what it took out of the file of hashes, and the wheel that it was given without an index.
    """
    script = (ROOT / "deploy/operator/assemble.sh").read_text()
    installs = [line for line in script.splitlines() if line.startswith("into ")]
    assert len(installs) == 3
    assert all("--require-hashes" in line or "--no-index" in line for line in installs)
    known = pins("libraries.txt")
    for name in ("packages.txt", "fallback.txt"):
        lines = (ROOT / "deploy/operator" / name).read_text().splitlines()
        assert {line for line in lines if line and not line.startswith("#")} <= known.keys()
