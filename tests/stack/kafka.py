"""
Get Kafka and its tools from Maven Central, once.

``tools/kafka`` holds the committed ``pom.xml`` and the checksums of every file. The files lie in
``<cache>/stack/kafka-<version>-<hash of its inputs>/`` beside a ``stamp.json``; where a stamp is, nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.stack import build

VERSION: Final = "4.1.1"
JAVA_MINIMUM: Final = 17  # Kafka 4's brokers.
SOURCE: Final = build.SOURCES / "kafka"
# What Dockerfile of apache/kafka declares. A volume that is mounted above one of these is hidden by a new, empty one: Docker
# makes it for each container, and containerd throws it away with the container.
IMAGE_VOLUMES: Final = ("/etc/kafka/secrets", "/var/lib/kafka/data", "/mnt/shared/config")
COPY: Final = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
ADVICE: Final = "install it, on Debian by: apt-get install --no-install-recommends openjdk-17-jre-headless maven"


def java() -> str:
    """
    Return the ``java`` command.

    Raises:
        StackError: None is on PATH, or it is too old; one line that says what to do.
    """
    found = shutil.which("java")
    if found is None:
        raise build.StackError(f"Kafka needs Java {JAVA_MINIMUM} or newer, and there is no `java`: {ADVICE}")
    said = subprocess.run([found, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < JAVA_MINIMUM:
        what = f"version {version[1]}" if version else "one that does not run"
        raise build.StackError(f"Kafka needs Java {JAVA_MINIMUM} or newer and found {what} at {found}: {ADVICE}")
    return found


def lasts(directory: str, mounted: str) -> bool:
    """
    Tell whether what the image's Kafka writes to ``directory`` lies on the volume that is ``mounted`` there or above.
    """
    hiding = [volume for volume in IMAGE_VOLUMES if volume != mounted]
    inside = (Path(directory), *Path(directory).parents)
    return Path(mounted) in inside and not any(Path(volume) in inside for volume in hiding)


def _entry() -> str:
    """
    Return the name of the cache entry: the version, and a hash of all that decides what is fetched.
    """
    inputs = hashlib.sha256(COPY.encode())
    for path in sorted(SOURCE.iterdir()):
        inputs.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"kafka-{VERSION}-{inputs.hexdigest()[:12]}"


def fetched() -> Path | None:
    """
    Return the directory of Kafka's jars where a stamp says that they are there, else None.
    """
    directory = build.cache_dir() / "stack" / _entry()
    return directory / "lib" if (directory / "stamp.json").exists() else None


def check() -> None:
    """
    Return where Kafka can run, and is there or can be fetched.

    Raises:
        StackError: Java or Maven is missing.
    """
    java()
    if fetched() is None:
        _maven()


def ensure() -> Path:
    """
    Return the directory of Kafka's jars, fetching them first where no stamp says that they are there.

    Raises:
        StackError: Maven is missing, the download failed, or a file is not the one that was committed.
    """
    if (ready := fetched()) is not None:
        return ready
    with build.locked("kafka") as directory:
        entry = _entry()
        final = directory / entry
        if (final / "stamp.json").exists():
            return final / "lib"
        maven = _maven()
        build.say(f"fetching kafka {VERSION} (once)")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"{entry}-", dir=directory) as scratch:
            result = Path(scratch) / "result"
            command = [maven, "--batch-mode", "--file", str(SOURCE / "pom.xml"), COPY, "-DincludeScope=runtime"]
            build.run([*command, f"-DoutputDirectory={result / 'lib'}"], Path(scratch), directory / f"{entry}.log")
            _compare(result / "lib")
            seconds = round(time.monotonic() - started, 1)
            stamp = {"tool": "kafka", "version": VERSION, "seconds": seconds}
            (result / "stamp.json").write_text(json.dumps(stamp) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            result.rename(final)  # The stamp and the files appear together or not at all.
        build.say(f"fetched kafka in {seconds} s")
    return final / "lib"


def _maven() -> str:
    found = shutil.which("mvn")
    if found is None:
        raise build.StackError(f"Kafka is fetched from Maven Central, and there is no `mvn`: {ADVICE}")
    return found


def _compare(directory: Path) -> None:
    """
    Raise unless the directory holds exactly the committed files, byte for byte.
    """
    lines = (line.split() for line in (SOURCE / "SHA256SUMS").read_text().splitlines())
    wanted = {name: digest for digest, name in lines}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise build.StackError(f"not what tools/kafka/SHA256SUMS says, so nothing of it is used: {', '.join(wrong)}")
